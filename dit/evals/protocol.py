"""A figure's protocol: what has to be the same for two figures to be compared, its hash, and how two differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit.config import flatten
from dit.errors import shown


def protocol_hash(protocol: dict[str, Any]) -> str:
    """12 hexadecimal digits of the SHA-256 of a protocol's JSON form; the order of keys does not count."""
    text = json.dumps(protocol, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Told:
    """What is on file of how a figure came to be. sampler: the settings that the protocol hashes; None of old rows."""

    protocol: Mapping[str, Any]
    sampler: Mapping[str, Any] | None = None

    def unlike(self, other: Told) -> list[tuple[str, str, str]]:
        """(dotted key, value here, value in the other) of all that differs, values as messages show them.

        Where both samplers are told, that is by their settings; else by their hashes, and the key says so.
        """
        mine, theirs = flatten(self.protocol), flatten(other.protocol)
        key = "samples.sampler"
        if mine.get(key) != theirs.get(key):
            if self.sampler is not None and other.sampler is not None:
                del mine[key], theirs[key]
                mine |= flatten(self.sampler)
                theirs |= flatten(other.sampler)
            elif mine.get(key) and theirs.get(key):
                told = f"{key} (a hash; an older version recorded no settings)"
                mine[told], theirs[told] = mine.pop(key), theirs.pop(key)
        keys = [k for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)]
        return [(k, shown(mine.get(k)), shown(theirs.get(k))) for k in keys]
