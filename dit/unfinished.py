"""Long work is kept in blocks beside its place, so that what was killed goes on when the same command is started again.

The blocks lie in OUT.partial, each of them whole or not there, beside a record of what they are blocks of.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.errors import Notice
from dit.files import beside, lies_at, try_lock, write_atomically
from dit.outputs import MENDING, RECORD, OutputError, differences, read_record, write_record
from dit.ranks import group

IN_USE = "{} is being written by another process; wait for it, or end it"


@dataclass(frozen=True)
class Blocks:
    """The finished blocks of one result, one file each, in a folder that all ranks share.

    count: samples in all. size: samples of a block: block k is of samples [k·size, (k + 1)·size), the last of what
    is left. So a block's samples are computed in the same batch wherever and whenever they are.
    """

    folder: Path
    count: int
    size: int

    @property
    def number(self) -> int:
        """How many blocks there are in all."""
        return -(-self.count // self.size)

    def samples(self, number: int) -> range:
        """The samples of a block."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def path(self, number: int) -> Path:
        """Where a block lies."""
        return self.folder / f"block-{number:08d}.npz"

    def add(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep a finished block, whole or not at all."""
        held = io.BytesIO()
        np.savez(held, id=np.asarray(self.samples(number), np.int64), **arrays)  # type: ignore[arg-type]
        write_atomically(self.path(number), held.getvalue(), tag=f"-{group.node_name()}-{os.getpid()}")

    def read(self, number: int) -> dict[str, np.ndarray]:
        """A block's arrays by name, with the samples' numbers as `id` (n,) int64.

        OutputError where it is damaged, or of other samples than it should be.
        """
        arrays = self._load(number)
        if arrays["id"].tolist() != list(self.samples(number)):
            raise OutputError(f"{self.path(number)} is not of samples {self.samples(number)}: start again")
        return arrays

    def missing(self, needs: Collection[str] = ()) -> list[int]:
        """The blocks that are not there; one that is damaged is removed and said. Collective.

        needs: arrays without which a block is none; one begun for something else may lack them.
        """
        world = group.World.from_env()
        there = self.there()
        mine = [k for k in range(self.number)[world.rank :: world.size] if k in there]
        good = [k for k in mine if self._is_good(k, needs)]
        everywhere = {k for part in group.gather_objects(good) for k in part}
        return [k for k in range(self.number) if k not in everywhere]

    def there(self) -> set[int]:
        """The blocks that lie there, good or not."""
        names = {
            path.name for path in self.folder.iterdir()
        }  # not exists(): NFS remembers what was not there
        return {k for k in range(self.number) if self.path(k).name in names}

    def _is_good(self, number: int, needs: Collection[str]) -> bool:
        """Whether a block is whole; the last one of when fewer samples were wanted is not."""
        try:
            held = self._load(number)
            return held["id"].tolist() == list(self.samples(number)) and held.keys() >= set(needs)
        except OutputError as error:
            warnings.warn(f"{error}; it is made anew", Notice, stacklevel=4)
            self.path(number).unlink()
            return False

    def _load(self, number: int) -> dict[str, np.ndarray]:
        path = self.path(number)
        try:
            with np.load(path) as held:  # a zip file: every array has a checksum
                return {"id": held["id"], **{name: held[name] for name in held.files}}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise OutputError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def partial_of(out: Path) -> Path:
    """OUT.partial, the folder of what is not finished of a result."""
    place = Path(os.path.abspath(out))  # ".." has no name to put anything beside
    return beside(place, ".partial")


@contextlib.contextmanager
def unfinished(
    out: Path,
    record: Mapping[str, Any],
    spec: Mapping[str, Any],
    blocks: tuple[int, int],
    overwrite: bool = False,
    older: Mapping[str, Any] | None = None,
) -> Iterator[Blocks]:
    """OUT.partial, held by this job while it works: new, or as a job of the same spec left it. Collective.

    record: what is written down there, `spec` among it. spec, older: as `claim` has them. blocks: samples in all (in
    `spec` as num_samples, which may have grown), and in a block. The folder is removed if the body ends well, and kept
    for the same command to go on if it does not.

    Raises OutputError where it is of another spec (overwrite: it is cleared) or in use by another job.
    """
    folder = partial_of(out)
    with contextlib.ExitStack() as stack:
        group.on_main(lambda: stack.enter_context(_held(folder, record, spec, overwrite, older or {})))
        try:
            yield Blocks(folder, *blocks)
        except OSError as error:
            if error.filename is None:  # a full disk says no name
                raise type(error)(error.errno, error.strerror, str(folder)) from error
            raise


@contextlib.contextmanager
def _held(
    folder: Path,
    record: Mapping[str, Any],
    spec: Mapping[str, Any],
    overwrite: bool,
    older: Mapping[str, Any],
) -> Iterator[None]:
    """Lock the folder, make it or check what is in it; remove it afterwards where nothing in it is of use."""
    with _locked(folder):
        _go_on(folder, record, spec, overwrite, older)
        try:
            yield
        except BaseException:
            if not any(folder.glob("block-*.npz")):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, by a file beside it (over NFS a folder has no lock), and by itself, as older code did.

    Raises OutputError where another process holds it.
    """
    lock = folder.with_name(f".{folder.name}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = lock.open("ab")
        is_mine = try_lock(file.fileno())
        if is_mine is False or lies_at(lock, file.fileno()):
            break
        file.close()  # its holder has just removed it
    with file, contextlib.ExitStack() as held:
        if is_mine is False:
            raise OutputError(IN_USE.format(folder))
        held.callback(lock.unlink, missing_ok=True)  # while it is held
        if is_mine is None:
            what = f"{folder}: no locks on this file system: see to it that no other command writes there"
            warnings.warn(what, Notice, stacklevel=2)
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        held.callback(os.close, descriptor)
        if try_lock(descriptor) is False:
            raise OutputError(IN_USE.format(folder))
        yield


def _go_on(
    folder: Path,
    record: Mapping[str, Any],
    spec: Mapping[str, Any],
    overwrite: bool,
    older: Mapping[str, Any],
) -> None:
    """Check that what is in the folder is of the same spec, or clear it; and write the record down."""
    path, is_empty = folder / RECORD, not any(folder.iterdir())
    if not is_empty and not path.is_file():
        raise OutputError(
            f"{folder} exists already and holds something else: remove it or choose another name"
        )
    if not is_empty:
        held = {**older, **read_record(path)}
        rows = differences(held, spec, "num_samples")
        if rows and not overwrite:
            what = [f"{folder} holds unfinished work of another spec:", *rows]
            raise OutputError("\n".join([*what, MENDING.capitalize() + "."]))
        if rows:
            for left_over in folder.iterdir():
                left_over.unlink() if not left_over.is_dir() else shutil.rmtree(left_over)
        else:
            for key in ("code", "device"):
                if held.get(key) != record.get(key):
                    warnings.warn(
                        f"{folder} was begun with {key} {held.get(key)}, and goes on with {record.get(key)}",
                        Notice,
                        stacklevel=2,
                    )
    write_record(path, record)
