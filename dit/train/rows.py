"""The logs of a run as rows: metrics.jsonl and held_out.jsonl, a JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit.files import json_line, write_atomically

METRICS, HELD_OUT = "metrics.jsonl", "held_out.jsonl"


def logged(path: Path) -> Iterator[dict[str, Any]]:
    """Read the whole rows of a file of JSON lines; none where there is no file.

    A line that a kill has cut off ends them. Numbers that are none, such as NaN, are None.
    """
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json_line(line)
        except ValueError:  # no JSON, or no text
            return
        if isinstance(row, dict):
            yield row


def truncate(path: Path, step: int) -> None:
    """Keep the lines of such a file up to `step`; a half-written last line goes too. Atomic."""
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # no JSON, or no text: zeros, after a stop of the machine
            break  # cut off by a kill: nothing after it can be whole
    write_atomically(path, b"".join(line + b"\n" for line in kept))
