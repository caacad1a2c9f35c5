"""Which shards somebody means: files here and URLs, in order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dit.data import DataError
from dit.data.sources.source import expand_range, files_of, listing
from dit.data.storage.files import AnyStorage
from dit.data.storage.remote import advised, is_remote, public
from dit.files import expand, read_text


def find_shards(spec: str) -> list[str]:
    """Find whole paths and URLs of shards, in order. DataError where there are none.

    spec: one tar, a folder of tars, a pattern (shards/*.tar), a brace range (shards/{000..099}.tar, also in URLs), or a
    text file with one of these a line.
    """
    spec = expand(spec)
    path = Path(spec)
    if not is_remote(spec) and path.suffix == ".txt":
        lines = [line.strip() for line in read_text(path).splitlines()]
        found = [s for line in lines if line and line[0] != "#" for s in _expand(line, path.parent)]
    else:
        found = _expand(spec, Path())
    twice = [shard for shard, count in Counter(found).items() if count > 1]
    if twice:
        raise DataError(listing(f"{spec}: {len(twice)} shard(s) named more than once", twice))
    return found


def _expand(spec: str, base: Path) -> list[str]:
    if is_remote(spec):
        return expand_range(spec)
    path = base / expand(spec)
    paths = files_of(str(path), ".tar")
    if not paths:
        raise DataError(f"{path}: no tar there; expected a .tar, a folder of them, a pattern or a range")
    return [str(p.resolve()) for p in paths]


def total_bytes(shards: list[str]) -> int:
    """Sum the bytes of all shards. DataError for one that is not there."""
    storage, total = AnyStorage(""), 0
    for shard in shards:
        try:
            total += storage.size(shard)
        except OSError as error:
            raise DataError(f"{public(shard)}: {advised(error)}") from None
    return total
