"""Whether finished results are still as they were written: sizes and checksums, kept in their records."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dit.sample.formats import DAMAGE, Format, format_of
from dit.unfinished import Blocks

FILES = "files"  # key of a record: {name: what `sums` gives}
BLOCKS = "block_crc32"  # key of a record: {array: eight hexadecimal digits a block, joined}
PIECE = 1 << 20
LACKING = "is missing"


def sums(path: Path) -> dict[str, Any]:
    """Bytes and sha256 of a file; of a folder, those of all files in it in the order of their names, and how many."""
    digest, total = hashlib.sha256(), 0
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if not file.name.startswith(".")]  # of file managers
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() if path.is_dir() else b"")
        with file.open("rb") as held:
            while piece := held.read(PIECE):
                digest.update(piece)
                total += len(piece)
    count = {"files": len(files)} if path.is_dir() else {}
    return {**count, "bytes": total, "sha256": digest.hexdigest()}


def summed(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """What a record keeps of these files and folders."""
    return {FILES: {name: sums(folder / name) for name in names}}


def damaged(folder: Path, held: Mapping[str, Any], older: Collection[str]) -> dict[str, str]:
    """What of a finished result is not as it was written, by its name: in which way. Reads all of it once.

    held: its record. older: the names that it is of, for a record of an older version, which keeps no checksums: they
    are only looked for.
    """
    kept: Mapping[str, Any] = held.get(FILES, dict.fromkeys(older))
    found: dict[str, str] = {}
    for name, expected in kept.items():
        path = folder / name
        if not path.exists():
            found[name] = LACKING
        elif expected is not None and (unlike := _unlike(path, expected)) is not None:
            found[name] = unlike
    return found


def _unlike(path: Path, expected: Mapping[str, Any]) -> str | None:
    """How a file or a folder differs from what it was, if it does."""
    try:
        there = sums(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    for key in ("files", "bytes"):
        if there.get(key) != expected.get(key):
            return f"holds {there.get(key, 'no')} {key}, and was written with {expected.get(key, 'no')}"
    return None if there["sha256"] == expected["sha256"] else "has another content than was written"


def broken(folder: Path, form: str, count: int) -> str | None:
    """How images or latents in a form of an older result, which has no checksums but their own, are damaged."""
    read = 0
    try:
        for _ in format_of(form).read(folder):
            read += 1
    except DAMAGE as error:
        return f"is damaged ({type(error).__name__}: {error})"
    return None if read == count else f"holds {read} images, and {count} were drawn"


def crc32(values: np.ndarray) -> str:
    """Eight hexadecimal digits: of a block's array."""
    return f"{zlib.crc32(np.ascontiguousarray(values).data):08x}"


@dataclass(frozen=True)
class Source:
    """One array of a finished result, read back a block at a time. held: the result's record.

    damaged: names in the result's folder that are not whole; what can be seen to be right of them is taken.
    """

    out: Path
    held: Mapping[str, Any]
    array: str
    blocks: Blocks
    damaged: Collection[str]

    @property
    def _forms(self) -> list[Format]:
        """Those that it is in: one that is whole, or all where none is."""
        forms = [format_of(name) for name in self.held.get("formats", ("npz",))]
        own = [form for form in forms if form.array == self.array]
        return [form for form in own if not self._is_hurt(form)][:1] or own

    @property
    def is_damaged(self) -> bool:
        """Whether it is whole in none of its forms."""
        return any(map(self._is_hurt, self._forms))

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray | None]:
        """The values of blocks 0, 1, ... in turn, each from whichever form has it whole; None where none has."""
        rows = [(form, form.rescue(self.out, self.held["num_samples"])) for form in self._forms]
        for number in numbers:
            size = len(self.blocks.samples(number))
            found = [(form, [row for row in islice(of, size) if row is not None]) for form, of in rows]
            yield next((np.stack(held) for form, held in found if self._is_right(form, number, held)), None)

    def _is_right(self, form: Format, number: int, held: Sequence[np.ndarray]) -> bool:
        """Whether these are the samples of a block, all of them, as they were written.

        A record of an older version has no checksums of blocks: then the form's own count.
        """
        if len(held) < len(self.blocks.samples(number)) or len({row.shape for row in held}) > 1:
            return False
        kept: Mapping[str, str] = self.held.get(BLOCKS, {})
        if self.array in kept:
            return kept[self.array][8 * number : 8 * number + 8] == crc32(np.stack(held))
        return form.checks_each or not self._is_hurt(form)

    def _is_hurt(self, form: Format) -> bool:
        return bool({*form.names} & {*self.damaged})
