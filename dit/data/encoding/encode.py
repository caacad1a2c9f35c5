"""Encoding: image sets to data sets of latents, by any number of ranks, killed and started again at will.

Samples are written in a seeded random order: shards in the order of class folders would give batches of few
classes. What is written is a pure function of (images, codec, options), whoever writes what, and when: parts.py.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dit.config import to_dict
from dit.data import DataError
from dit.data.codecs.base import Codec
from dit.data.encoding.checks import check_out, refuse_something_else
from dit.data.encoding.job import EncodeOptions, Job, filled
from dit.data.encoding.older import BEFORE, as_begun
from dit.data.encoding.part_encoder import PartEncoder
from dit.data.encoding.parts import Books, Done, Part, Unreadable, forget_plan, images_done
from dit.data.encoding.report import Report, Waiting
from dit.data.shards.manifest import FILE, Manifest
from dit.data.shards.write import PLAN
from dit.data.sources.images import BadImage, ImageSource
from dit.errors import Notice
from dit.files import expand, write_atomically

__all__ = ["EncodeOptions", "Report", "Waiting", "encode"]

GIVE_UP = 100  # unreadable images beyond max_bad: no point in finding all of them
POLL = (0.05, 2.0)  # seconds between looks at the other ranks' parts: at first, at most


def _ignore(value: object) -> None:
    """Nobody wants to know."""


def encode(
    source: ImageSource,
    codec: Codec,
    out: str | os.PathLike[str],
    options: EncodeOptions,
    progress: Callable[[int], object] = _ignore,
    *,
    rank: int = 0,
    size: int = 1,
    resumed: Callable[[int], object] = _ignore,
    waiting: Callable[[Waiting], object] = _ignore,
) -> Report:
    """Write `source` as a data set in the folder `out`; return when it is there.

    Ranks that call it with the same arguments share the work, without being connected; whoever of them is stopped,
    the others take over. What is done waits in OUT.partial, and the same call goes on with it. A data set that the
    same call has written is left as it is.

    rank, size: where this rank begins, so that few meet. progress: called with the number of images done since the
    last call, on any rank; resumed: with those done before. waiting: again and again with what this rank waits for,
    while there is nothing else to do. Raises DataError where images cannot be read, latents are not finite or
    `out` or OUT.partial is something else; nothing that looks like a data set is left then, and nothing done is lost.
    """
    out = Path(expand(str(out))).resolve()
    job = as_begun(Job(source, codec, options), out)
    if job.options != options and rank == 0:
        warnings.warn(f"{out} {BEFORE}", Notice, stacklevel=2)
    found = _already(job, out)
    if found is not None:
        resumed(len(source))
        return Report(found)
    books = Books(out, job.plan())
    with _explained(books):
        books.open()
        if books.finished:  # since we looked
            books.abandon()
            resumed(len(source))
            return Report(Manifest.load(out), finished=False)
        with books.run() as began, PartEncoder(job, books.folder, books.tag) as encoder:
            run = _Run(job, books, encoder, (rank, size), (progress, resumed, waiting))
            return run.go(began)


def _already(job: Job, out: Path) -> Manifest | None:
    """What is in `out`, if that is what this job writes; DataError where it is something else."""
    check_out(out)
    if not (out / FILE).exists():
        return None
    there = Manifest.load(out)
    expected = {**to_dict(job.described(there.bad)), "shards": job.filled(there.bad)}
    held = {**to_dict(there), "shards": filled(there)}
    refuse_something_else(out, {k: held[k] for k in expected}, expected)
    if len(there.bad) > job.options.max_bad:
        raise DataError(
            f"{out} is written already, without {len(there.bad)} image(s) that could not be read "
            f"({', '.join(there.bad[:5])}{', ...' if len(there.bad) > 5 else ''}), {job.options.max_bad} allowed: take "
            f"it as it is with --max_bad={len(there.bad)}, or mend them and choose another OUT"
        )
    if (out / PLAN).exists():  # its writer was stopped at the very last step
        forget_plan(out)
    return there


@contextmanager
def _explained(books: Books) -> Iterator[None]:
    """Errors of the file system with what they mean here."""
    try:
        yield
    except OSError as error:
        where = error.filename or books.folder
        kept = "; parts that are done are kept, and the same command goes on when that is mended"
        raise DataError(
            f"cannot write to {where}: {error.strerror or error}{kept if images_done(books.out) else ''}"
        ) from error


class _Run:
    """One rank's share in an encode."""

    def __init__(
        self,
        job: Job,
        books: Books,
        encoder: PartEncoder,
        place: tuple[int, int],
        tell: tuple[Callable[[int], object], Callable[[int], object], Callable[[Waiting], object]],
    ):
        self.job, self.books, self.encoder = job, books, encoder
        self.rank, self.size = place
        self.progress, self.resumed, self.waiting = tell
        # first those that no other rank begins with
        own = job.parts[self.rank :: self.size]
        self.parts = [*own, *(p for p in job.parts if p.number % self.size != self.rank)]
        self.done: dict[int, Done] = {}
        self.mine: set[int] = set()
        self.before = 0  # images done when this rank began
        self._readable: dict[int, bool] = {}  # at the last look
        self._missed: set[int] = set()  # images that this rank could not read once

    def go(self, began: float) -> Report:
        """Until OUT is there. began: when the first of the ranks that are at it did (Unix time)."""
        own, since = time.time(), time.monotonic()
        self.before = sum(done.images for done in self._look())
        self.resumed(self.before)
        pause = POLL[0]
        while True:
            try:
                worked = self._write_what_is_free()
                if self._finish():
                    return self._report(began, finished=True)
            except FileNotFoundError:
                if not self.books.complete:  # else another rank is just tidying up
                    raise
                worked = False
            if self.books.finished:
                self.progress(sum(len(p) for p in self._missing()))
                return self._report(own, finished=False)
            pause = POLL[0] if worked else min(POLL[1], 1.5 * pause)
            if worked:
                since = time.monotonic()
            else:
                self.waiting(self._waits(time.monotonic() - since))
                time.sleep(pause)

    def _waits(self, seconds: float) -> Waiting:
        parts = tuple(p.number for p in self._missing())
        ranks = {n % self.size for n in parts} or {0}  # which takes the last step
        alone = () if self.books.locks else tuple(sorted(ranks))
        return Waiting(parts, alone, seconds, len(self.job.parts))

    def _missing(self) -> list[Part]:
        return [p for p in self.parts if p.number not in self.done]

    def _look(self) -> list[Done]:
        """The parts that are done since the last look."""
        found = []
        for part in self._missing():
            done = self._accepted(part)
            if done is not None:
                self.done[part.number] = done
                found.append(done)
        return found

    def _accepted(self, part: Part) -> Done | None:
        """A part that is done, unless this rank would leave out fewer images.

        Ranks that disagree for good about what can be read come to an end: each writes a part once without knowing what
        it will leave out, and after that only with fewer bad images than it has.
        """
        done = self.books.read(part)
        if done is None or not any(self._can_read(image.id) for image in done.bad):
            return done
        if not self.books.locks and part.number % self.size != self.rank:
            return done  # nobody but its rank may write it
        ids = self._missed.intersection(self.job.order[part.start : part.stop].tolist())
        missed = sum(not self._can_read(index) for index in ids)
        return done if missed >= len(done.bad) else None

    def _can_read(self, index: int) -> bool:
        if index not in self._readable:
            self._readable[index] = not isinstance(self.encoder.load(index), BadImage)
            if not self._readable[index]:
                self._missed.add(index)
        return self._readable[index]

    def _write_what_is_free(self) -> bool:
        """Go once over the parts, writing those that nobody is at; whether there was one."""
        worked = False
        for part in self._missing():
            if part.number in self.done:
                continue
            # without locks everybody keeps to his own
            with self.books.claim(part, unlocked=part.number % self.size == self.rank) as free:
                # somebody may have written it, or even have finished, before we had the claim
                if free and self._accepted(part) is None and not self.books.complete:
                    self._write(part)
                    worked = True
            if worked:
                self.progress(sum(done.images for done in self._look()))
        self.progress(sum(done.images for done in self._look()))
        return worked

    def _write(self, part: Part) -> None:
        self.books.forget(part)
        rest = self.parts[self.parts.index(part) + 1 :]
        after = next((p for p in rest if p.number not in self.done), None)
        done = self.encoder.write(part, after, self.rank, self.progress, self._check_bad)
        self._readable.update((image.id, False) for image in done.bad)
        self._missed.update(image.id for image in done.bad)
        self.books.record(part, done)
        self.done[part.number] = done
        self.mine.add(part.number)

    def _check_bad(self, here: list[Unreadable]) -> None:
        """here: the unreadable images of the part under way, so far."""
        bad = [*self._bad(), *here]
        if len(bad) > self.job.options.max_bad + GIVE_UP:
            raise self._too_many(bad, "; gave up looking for more")

    def _bad(self) -> list[Unreadable]:
        return [image for _, done in sorted(self.done.items()) for image in done.bad]

    def _finish(self) -> bool:
        """Once all parts are done: write the manifest and name the folder; False where another rank is at it."""
        if self._missing() and not self.books.complete:
            return False
        with ExitStack() as claims:
            free = claims.enter_context(self.books.claim(None, unlocked=self.rank == 0))
            if not free or self.books.finished:
                return False
            if (self.books.folder / FILE).exists():  # whoever wrote it was stopped
                self.books.finish(None, b"")
                return True
            if not self._settled(claims):
                return False
            if len(self._bad()) > self.job.options.max_bad:
                raise self._too_many(self._bad())
            manifest = self.job.manifest([self.done[p.number] for p in self.job.parts])
            self.books.finish(manifest, self.job.names_bytes)
        return True

    def _settled(self, claims: ExitStack) -> bool:
        """Whether the parts are, in a last fresh look, what this rank took them for.

        Parts that another rank might write again, as it can read what they lack, are held by `claims` from then on.
        """
        for part in self.job.parts:
            if self.done[part.number].bad and not claims.enter_context(self.books.claim(part, unlocked=True)):
                return False
        self._readable.clear()
        seen = {p.number: done for p in self.job.parts if (done := self._accepted(p)) is not None}
        settled, self.done = seen == self.done, seen
        return settled

    def _too_many(self, bad: list[Unreadable], note: str = "") -> DataError:
        """All of them in a file, the first in the text."""
        lines = [f"{self.job.source.names[image.id]}: {image.why}" for image in bad]
        file = self.books.folder / "bad.txt"
        write_atomically(file, "".join(f"{line}\n" for line in lines).encode(), self.books.tag)
        return DataError(
            f"{len(bad)} image(s) cannot be read, {self.job.options.max_bad} allowed{note}. What is done is kept: mend "
            f"them, or leave up to N out with --max_bad=N, and run the same command again. They are in {file}:\n"
            + "\n".join(f"  {line}" for line in lines[:20])
        )

    def _report(self, began: float, finished: bool) -> Report:
        """Over all ranks where this one finished; their sidecars are gone where another did."""
        manifest = Manifest.load(self.books.out)
        parts = [d for n, d in self.done.items() if (d.ended >= began if finished else n in self.mine)]
        seconds = {n: sum(d.seconds.get(n, 0.0) for d in parts) for n in ("decoding", "codec", "writing")}
        images = sum(d.images for d in parts)
        return Report(
            manifest,
            images=images,
            resumed=self.job.names.count - images if finished else 0,
            ranks=len({d.rank for d in parts}),
            busy=sum(d.seconds["whole"] for d in parts),
            whole=time.time() - began,
            finished=finished,
            enlarged=sum(d.enlarged for d in self.done.values()),
            seen=sum(d.images for d in self.done.values()),
            others=0 if finished else max(0, self.job.names.count - self.before - images),
            **seconds,
        )
