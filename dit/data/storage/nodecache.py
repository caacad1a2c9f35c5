"""A folder on a node's own disk that keeps blocks read from elsewhere, shared by all ranks of the node.

A block is one file named by its shard's sha256, its offset and its bytes, so that runs and copies of a data set share
it. Its access time, set at each use, says which block was not used for longest and goes when room is needed. The
folder never holds more than its limit.

Processes agree by a lock on the file LOCK, which also holds the bytes in use. It is held while room is made, a place
taken and a file renamed (some 50 microseconds, and a listing of the folder once in as many evictions as it has blocks),
never during a download or a write, and ends with its process. So processes that miss the same block at once all
download it, and one of them stores it: ranks read the same blocks only where several share a lane, or where lanes
meet within a block. A file half written is locked by its writer; without a writer it is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dit.config import ConfigError, config
from dit.data.storage.files import State, describe, fill
from dit.errors import Notice

LIMIT_GB = 100.0
LOCK = ".lock"
PARTIAL = ".partial"
NAME = re.compile(rf"[0-9a-f]{{64}}-\d+-\d+({re.escape(PARTIAL)})?")  # nothing else in the folder is touched


@config
class NodeCacheConfig:
    """Blocks of slow or remote storage kept on this node.

    folder: on a local disk, shared by the node's ranks; ~ and variables such as $TMPDIR are filled in. None: no cache.
    limit_gb: what it may hold at most, 10⁹ bytes, all data sets and runs that use the folder together.
    """

    folder: str | None = None  # on a disk of the node, such as $TMPDIR/blocks, for blocks of slow storage
    limit_gb: float = LIMIT_GB  # what that folder may hold, 10^9 bytes; what was not used for longest goes

    def __post_init__(self) -> None:
        if not self.limit_gb > 0:
            raise ConfigError(
                f"limit_gb is {self.limit_gb:g}, expected more than 0; for no cache leave folder unset"
            )
        if self.folder is None and self.limit_gb != LIMIT_GB:
            raise ConfigError(
                f"limit_gb is {self.limit_gb:g}, but there is no folder to keep blocks in; give folder too"
            )


@dataclass
class CacheStats:
    """Counts of what one process did.

    Blocks found, not found and found damaged, bytes fetched from the source for want of them, blocks stored, evicted.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    fetched: int = 0
    stored: int = 0
    evicted: int = 0


class NodeCache:
    """Blocks in a folder, under a limit. Threads and processes may share it.

    Only `prepare` raises OSError: where the folder cannot be used any more a Notice says so once, and nothing is kept
    from then on.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int):
        self.folder, self.limit, self.stats = Path(folder), limit_bytes, CacheStats()
        self._stats_lock = threading.Lock()
        self._storing = True
        # Both change under the folder's lock alone.
        self._oldest: list[tuple[int, str]] = []  # (last use, name) as of the last listing, the oldest last
        self._counted = False  # whether this process has listed the folder

    def prepare(self) -> None:
        """Make the folder and list it. Raises OSError where it is none or cannot be written."""
        with self._locked():
            probe = self.folder / f"{LOCK}-{os.getpid()}-{threading.get_ident()}"
            probe.touch(mode=0o600)
            probe.unlink()

    def count(self, **more: int) -> None:
        """Add to the statistics."""
        with self._stats_lock:
            for name, n in more.items():
                setattr(self.stats, name, getattr(self.stats, name) + n)

    def load(self, name: str, buffer: memoryview) -> State | None:
        """Fill a buffer from a block's file; its state, or None where it is not here or not whole."""
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None  # not stored; or not to be read, and then `store` will say so
        try:
            stat = os.fstat(descriptor)
            whole = stat.st_size == size_of(name)
            if whole:
                fill(descriptor, 0, buffer)
                with contextlib.suppress(OSError):  # a cache that may only be read is of use all the same
                    touch(descriptor, stat.st_mtime_ns)
        except (OSError, EOFError):
            whole = False
        finally:
            os.close(descriptor)
        if whole:
            return state_of(stat)
        self.drop(name, state_of(stat))
        return None

    def drop(self, name: str, state: State) -> None:
        """Remove a damaged file, unless another is in its place by now."""
        self.count(damaged=1)
        with self._guarded(), self._locked() as ledger:
            if state_of(os.stat(self.folder / name)) == state:
                self._remove(ledger, name)

    def store(self, name: str, block: memoryview) -> None:
        """Keep a block, if it fits and nobody else has it or is storing it."""
        if not self._storing:
            return
        with self._guarded():
            with self._locked() as ledger:
                file = self._claim(ledger, name)
            if file is None:
                return
            with file:
                try:
                    file.write(block)
                    file.flush()
                    touch(file.fileno(), time.time_ns())
                    with self._locked():  # nothing changes its name while another lists the folder
                        os.rename(file.name, self.folder / name)
                except BaseException:
                    with self._locked() as ledger:
                        self._remove(ledger, name + PARTIAL)
                    raise
            self.count(stored=1)

    # --- the folder ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Training goes on where its cache fails."""
        try:
            yield
        except FileNotFoundError:
            pass  # another process was faster, or somebody emptied the folder: the block is fetched again, no more
        except OSError as error:
            with self._stats_lock:
                first, self._storing = self._storing, False
            if first:
                what = f"{self.folder}: no blocks are kept there from now on: {describe(error)}"
                warnings.warn(what, Notice, stacklevel=4)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Alone among all threads and processes; gives the open file that holds the bytes in use."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        ledger = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(ledger, fcntl.LOCK_EX)
            if not self._counted or not re.fullmatch(rb"\d{20}", os.pread(ledger, 32, 0)):
                self._list(ledger)
            yield ledger
        finally:
            os.close(ledger)

    def _claim(self, ledger: int, name: str) -> BinaryIO | None:
        """The file to write a block into, locked and with its bytes counted; None where it is not to be stored."""
        partial, size = self.folder / (name + PARTIAL), size_of(name)
        if has_writer(partial) or (self.folder / name).exists():
            return None
        self._remove(ledger, partial.name)  # of a process that was killed
        if not self._make_room(ledger, size):
            return None
        # First counted, then there: whoever is killed between them leaves a folder that seems fuller than it is,
        # until a process lists it.
        self._set_used(ledger, self._used(ledger) + size)
        file = partial.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _make_room(self, ledger: int, size: int) -> bool:
        """Remove what was not used for longest until `size` bytes fit. The folder is listed again only when all that
        the last listing had are gone or were used since: what came later was used later."""
        if size > self.limit:
            return False
        listed = False
        while self._used(ledger) + size > self.limit:
            if not self._oldest:
                if listed:
                    return False
                listed = True
                self._list(ledger)
                continue
            used_at, name = self._oldest.pop()
            with contextlib.suppress(FileNotFoundError):
                if listed or os.stat(self.folder / name).st_atime_ns == used_at:
                    self.count(evicted=self._remove(ledger, name))
        return True

    def _remove(self, ledger: int, name: str) -> int:
        """Remove a file and what it counts; 0 where it is not there."""
        try:
            os.unlink(self.folder / name)
        except FileNotFoundError:
            return 0
        self._set_used(ledger, self._used(ledger) - size_of(name))
        return 1

    def _used(self, ledger: int) -> int:
        """Bytes in use."""
        return int(os.pread(ledger, 32, 0))

    def _set_used(self, ledger: int, used: int) -> None:
        os.pwrite(ledger, b"%020d" % max(used, 0), 0)

    def _list(self, ledger: int) -> None:
        """Count the bytes in use, and find which blocks were not used for longest."""
        used, blocks = 0, []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not NAME.fullmatch(entry.name):
                    continue
                if not entry.name.endswith(PARTIAL):
                    blocks.append((entry.stat(follow_symlinks=False).st_atime_ns, entry.name))
                elif not has_writer(Path(entry.path)):
                    os.unlink(entry.path)
                    continue
                used += size_of(entry.name)
        self._oldest = sorted(blocks, reverse=True)
        self._counted = True
        self._set_used(ledger, used)


def has_writer(partial: Path) -> bool:
    """Whether a process has this file locked."""
    try:
        with partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def file_of(sha256: str, offset: int, size: int) -> str:
    """Name the file that keeps a block: `size` bytes at `offset` of the shard with this hash."""
    return f"{sha256}-{offset}-{size}"


def size_of(name: str) -> int:
    """Return the bytes of a block, which its file's name tells even where the file is damaged."""
    return int(name.removesuffix(PARTIAL).rpartition("-")[2])


def touch(descriptor: int, modified: int) -> None:
    """Set a file's last use to now. Not left to the kernel, whose clock for files is coarse and which may not do it."""
    os.utime(descriptor, ns=(time.time_ns(), modified))


def state_of(stat: os.stat_result) -> State:
    """Return what differs after a file has changed."""
    return stat.st_ino, stat.st_size, stat.st_mtime_ns
