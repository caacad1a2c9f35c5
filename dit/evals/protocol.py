"""A figure's protocol: what has to be the same for two figures to be compared, and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def protocol_hash(protocol: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a protocol's JSON form; the order of keys does not count."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
