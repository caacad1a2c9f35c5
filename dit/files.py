"""Files that are there whole or not at all, and last through a stop of the machine."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes, tag: str = "") -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops.

    tag: goes into the name it has while it is written; writers that may be at it at the same time need their own.
    """
    beside = path.with_name(f".{path.name}{tag}.partial")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder (files made, renamed), last through a stop of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
