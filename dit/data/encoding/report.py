"""What an encode says of itself: at its end, and while it waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit.data.shards.manifest import Manifest
from dit.data.sources.decode import count_lines


@dataclass
class Report:
    """What an encode did. Seconds: of all ranks waiting for decoded images, in the codec, writing, and in parts.

    images: that were encoded in this run, in `whole` seconds by `ranks` ranks; if another rank finished, of this
    rank alone. resumed: images that were done before. others: images that other ranks did meanwhile, where one of them
    finished. enlarged: images smaller than their crop, of the `seen` ones: all, unless another rank finished.
    """

    manifest: Manifest
    images: int = 0
    resumed: int = 0
    ranks: int = 1
    decoding: float = 0.0
    codec: float = 0.0
    writing: float = 0.0
    busy: float = 0.0
    whole: float = 0.0
    finished: bool = True  # by this rank
    others: int = 0
    enlarged: int = 0
    seen: int = 0

    def __str__(self) -> str:
        m = self.manifest
        size = f"{m.samples} images in {len(m.views)} view(s) -> {len(m.blocks)} block(s) in {len(m.shards)} shard(s)"
        size += f" of up to {max(s.bytes for s in m.shards) / 1e6:.3g} MB"
        left_out = f"; {len(m.bad)} unreadable left out: {', '.join(m.bad[:10])}" if m.bad else ""
        if not self.images + self.others:
            return f"{size}; all was there already{left_out}{self._notes()}"
        busy = max(self.busy, 1e-9)
        shares = ", ".join(f"{n} {getattr(self, n) / busy:.0%}" for n in ("decoding", "codec", "writing"))
        total = self.images if self.finished else self.images + self.others
        speed = f"{total / max(self.whole, 1e-9):.1f} images/s in {self.whole:.1f} s"
        if not self.finished:
            own = (
                f"{self.images} of them by this rank ({shares})"
                if self.images
                else "none of them by this rank"
            )
            return f"{size}: {speed}, {own}{left_out}{self._notes()}"
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        resumed = f"; {self.resumed} images were done before" if self.resumed else ""
        return f"{size}: {speed}{ranks} ({shares}){resumed}{left_out}{self._notes()}"

    def _notes(self) -> str:
        counts = [
            f"\nnote: of {self.manifest.samples} images, {line}"
            for line in count_lines(self.manifest.counted)
        ]
        return "".join([self._enlarged(), *counts])

    def _enlarged(self) -> str:
        """Nobody should find out from blurred samples."""
        m = self.manifest
        if not self.enlarged:
            return ""
        least = "at least " if self.seen < m.samples + len(m.bad) else ""
        verb = "is" if self.enlarged == 1 else "are"
        share = f"{self.enlarged} of {m.samples} images {verb} smaller than {m.image_size}"
        return f"\nnote: {least}{share} and {'was' if self.enlarged == 1 else 'were'} enlarged"


@dataclass(frozen=True)
class Waiting:
    """Why a rank has nothing to do. parts: that others are at, by number; none where the last step is all there is.

    ranks: those whose work it is, where the file system has no locks: nobody takes over from them. seconds: so far.
    of: parts in all.
    """

    parts: tuple[int, ...]
    ranks: tuple[int, ...]
    seconds: float
    of: int

    def __str__(self) -> str:
        what = f"part {_some([n + 1 for n in self.parts])} of {self.of}" if self.parts else "the last step"
        if not self.ranks:
            return f"waiting for other ranks ({what})"
        return (
            f"no locks on this file system: {what} is left to rank {_some(self.ranks)}; if it was stopped, start it "
            "again"
        )


def _some(numbers: Sequence[int], most: int = 4) -> str:
    return ", ".join(map(str, sorted(numbers)[:most])) + (", ..." if len(numbers) > most else "")
