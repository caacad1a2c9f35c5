"""What ranks that encode together share: parts of the set, who writes which, and what is done.

The images, in the order of writing, are cut into parts; a part becomes one shard, whose content depends on the part
alone. Ranks never talk to each other: each looks into OUT.partial for parts that nobody is at. There lie

    plan.json            what is encoded, how: another command is refused
    shard-000012.tar     a part, renamed to this when it is whole
    parts/000012.json    that it is done, and what stands in it (`Done`), renamed to this after the shard
    parts/000012.lock    whoever is at this part holds a lock on it, which ends when its holder does
    run                  since when there are ranks at it: the first writes that, all of them share a lock

A lock only saves work: two ranks at one part write the same bytes and each renames its own file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

from dit.config import config, from_dict, to_dict
from dit.data import DataError
from dit.data.encoding.differences import differences, is_of_images, shown
from dit.data.shards.manifest import FILE, Block, Manifest, Shard
from dit.data.shards.write import PLAN, shard_name
from dit.files import sync, try_lock, write_atomically

FORMAT = "dit-parts/1"
RUN = "run"
MANY = 64  # parts, where there are as many blocks


@config
class Part:
    """Images start, ..., stop - 1 of the order of writing; shard number `number`."""

    number: int
    start: int
    stop: int

    @property
    def shard(self) -> str:
        """The file's name."""
        return shard_name(self.number)

    def __len__(self) -> int:
        return self.stop - self.start


def cut(images: int, block: int, record_bytes: int, shard_bytes: int) -> tuple[Part, ...]:
    """The parts: whole blocks each but for the last, as many as `shard_bytes` hold (one at least).

    And fewer, where there are 64 blocks or more, so that there are 64 parts or more to share out; with less than 64
    blocks each is a part. record_bytes: that a full block takes.
    """
    blocks = -(-images // block)
    per_part = max(1, min(shard_bytes // record_bytes, blocks // MANY))
    starts = range(0, images, per_part * block)
    return tuple(
        Part(number=i, start=s, stop=min(images, s + per_part * block)) for i, s in enumerate(starts)
    )


@config
class Unreadable:
    """An image that could not be read: its id, and why."""

    id: int
    why: str


@config
class Done:
    """A part that is written. shard: none where none of its images can be read.

    blocks: with the part's number as their shard. stats: ChannelStats as JSON values. label_counts: by class.
    images: readable or not. seconds: of the rank that wrote it: decoding, codec, writing, whole. ended: Unix time.
    enlarged: images that were smaller than what was cut from them. counted: images by what else was done to them
    (decode.COUNTED); none in parts that were written before that was counted.
    """

    shard: Shard | None
    blocks: tuple[Block, ...]
    stats: dict[str, Any]
    label_counts: tuple[int, ...]
    unlabelled: int
    bad: tuple[Unreadable, ...]
    images: int
    seconds: dict[str, float]
    rank: int
    ended: float
    enlarged: int = 0
    counted: dict[str, int] = field(default_factory=dict)


class Books:
    """The folder OUT.partial of an encode under way."""

    def __init__(self, out: Path, plan: dict[str, Any]):
        """plan: JSON values that say what is encoded and how; equal ones go on together."""
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.plan = {"format": FORMAT, **plan}
        self.tag = f".{secrets.token_hex(6)}"  # in names of files under way, which others may be at too
        self.locks = True  # whether the file system has them, as far as was seen
        self._parts = self.folder / "parts"

    def open(self) -> None:
        """Begin, or go on with what is there. DataError where that is another command's."""
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"{self.folder} is a file: remove it or choose another OUT")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / PLAN
        if not file.exists():
            others = [p.name for p in self.folder.iterdir() if p.name != "parts" and p.name[0] != "."]
            if others and not file.exists():
                raise DataError(
                    f"{self.folder} holds other things ({', '.join(sorted(others)[:3])}): remove it or choose "
                    "another OUT"
                )
            self._parts.mkdir(exist_ok=True)
            self._write_plan(file)
        try:
            there = json.loads(file.read_bytes())
        except ValueError as error:
            raise DataError(f"{file}: not JSON ({error}); remove {self.folder} to begin anew") from None
        refuse_other(self.folder, there, self.plan)

    @contextlib.contextmanager
    def run(self) -> Iterator[float]:
        """Be one of the ranks that are at it; since when (Unix time) there always was one."""
        with (self.folder / RUN).open("a+", encoding="utf-8") as file:
            if self._lock(file.fileno()):
                file.truncate(0)
                file.write(repr(time.time()))
                file.flush()
            with contextlib.suppress(OSError):  # no locks here: each rank speaks for itself
                fcntl.flock(file.fileno(), fcntl.LOCK_SH)
            file.seek(0)
            yield float(file.read() or time.time())

    def _write_plan(self, file: Path) -> None:
        """Exclusively, where the file system has links: of two commands that begin at once one finds the other's."""
        beside = file.with_name(f".{PLAN}{self.tag}.whole")
        write_atomically(beside, (json.dumps(self.plan, indent=1) + "\n").encode())
        try:
            os.link(beside, file)
        except FileExistsError:
            pass
        except OSError:  # no links here
            beside.replace(file)
        beside.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove the folder if there is nothing in it: others finished before this rank began."""
        with contextlib.suppress(OSError):
            self._parts.rmdir()
            (self.folder / PLAN).unlink()
            self.folder.rmdir()

    def read(self, part: Part) -> Done | None:
        """What is known of a part; None if it has to be (re)written."""
        file = self._sidecar(part)
        try:
            done = from_dict(Done, dict(json.loads(file.read_bytes())))
            if done.shard and (self.folder / done.shard.name).stat().st_size != done.shard.bytes:
                return None
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # damaged (ConfigError is one, too): the part is written once more
            return None
        return done

    def forget(self, part: Part) -> None:
        """Remove the sidecar before a part is written (again): a shard must never meet that of another."""
        self._sidecar(part).unlink(missing_ok=True)

    def record(self, part: Part, done: Done) -> None:
        """A part is written."""
        if done.shard is None:
            (self.folder / part.shard).unlink(missing_ok=True)
        write_atomically(self._sidecar(part), json.dumps(to_dict(done)).encode(), self.tag)

    def _sidecar(self, part: Part) -> Path:
        return self._parts / f"{part.number:06d}.json"

    @contextlib.contextmanager
    def claim(self, part: Part | None, unlocked: bool) -> Iterator[bool]:
        """Hold a part (None: the last step): whether nobody else does; `unlocked` where there are no locks."""
        file = self.folder / PLAN if part is None else self._parts / f"{part.number:06d}.lock"
        descriptor = os.open(file, os.O_RDWR | (0 if part is None else os.O_CREAT), 0o644)
        try:
            held = self._lock(descriptor)
            yield unlocked if held is None else held
        finally:
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool | None:
        held = try_lock(descriptor)
        self.locks = self.locks and held is not None
        return held

    @property
    def finished(self) -> bool:
        """Whether OUT is there, whole."""
        return (self.out / FILE).exists()

    @property
    def complete(self) -> bool:
        """Whether all that OUT will hold is written: parts are no longer to be looked at."""
        return (self.folder / FILE).exists() or self.finished

    def finish(self, manifest: Manifest | None, names: bytes) -> None:
        """Write what stands beside the shards, remove what ranks shared, and give the folder its name.

        manifest: None where it is written, and whoever did that was stopped.
        """
        if manifest is not None:
            write_atomically(self.folder / manifest.names.file, names, self.tag)
            manifest.save(self.folder)
        for left_over in (
            self.folder / "bad.txt",
            *self.folder.glob(".*.partial"),
            *self.folder.glob(".*.whole"),
        ):
            left_over.unlink(missing_ok=True)  # of ranks that were killed
        _remove(self._parts)
        sync(self.folder)
        self.folder.rename(self.out)  # onto nothing or an empty folder
        sync(self.out.parent)
        forget_plan(self.out)


def images_done(out: Path) -> int:
    """Images of the parts that are done, of an encode to `out` under way; damaged records count nothing."""
    images = 0
    for file in out.with_name(out.name + ".partial").glob("parts/*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            images += int(json.loads(file.read_bytes())["images"])
    return images


def forget_plan(out: Path) -> None:
    """Remove what says how a data set was written: the last step, as until then the same command goes on."""
    for name in (RUN, PLAN):
        (out / name).unlink(missing_ok=True)
    sync(out)


def refuse_other(folder: Path, there: Any, here: dict[str, Any]) -> None:
    """DataError where the plan that `folder` was begun with is another one."""
    if not (differing := differences(there, here)):
        return
    rest = "remove it to begin anew, or choose another OUT"
    if is_of_images(differing):
        raise DataError(f"{folder} was begun with {shown(differing)}; give it back those to go on, {rest}")
    raise DataError(f"{folder} is of another command ({shown(differing)}): repeat that one to go on, {rest}")


def _remove(folder: Path, seconds: float = 10.0) -> None:
    """Remove a folder in which another rank may just be looking at a lock."""
    end = time.monotonic() + seconds
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            continue
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
