"""An encode from what somebody named to the data sets on disk: what is checked first, said and shown on the way."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dit.data.codecs.base import Codec, CodecConfig
from dit.data.encoding.checks import check_early, check_out
from dit.data.encoding.encode import EncodeOptions, Report, Waiting, encode
from dit.data.encoding.older import options_as_begun
from dit.data.sources.classes import LabelChoice
from dit.data.sources.images import ImageSource, check_spec, label_warning, open_source, unlabelled_note
from dit.data.sources.parquet import Columns
from dit.data.sources.split import check_share, held_out_folder, split
from dit.errors import Notice
from dit.progress import Bar, say
from dit.ranks.group import World

PATIENCE = 60  # seconds until a rank says that it waits for one which nobody takes over from


def _nothing() -> None:
    """Nobody asked for an end."""


def _print(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True)
class EncodeOrder:
    """What is to be encoded, and where to. Raises ConfigError for a share that is none.

    images: a folder, a tar, ... (`open_source`). out: the new folder, resolved. classes, labels, columns, choice: of
    the labels, as there. holdout: the share of the images, of each class, that goes to OUT-val.
    """

    images: str
    out: Path
    codec: CodecConfig
    options: EncodeOptions
    classes: str | None = None
    labels: str | None = None
    columns: Columns = field(default_factory=Columns)
    choice: LabelChoice = field(default_factory=LabelChoice)
    holdout: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.holdout)

    @property
    def outs(self) -> list[Path]:
        """The folders that are written, in turn."""
        return [held_out_folder(self.out), self.out] if self.holdout else [self.out]


def encode_images(
    order: EncodeOrder,
    device: torch.device,
    world: World,
    *,
    tell: Callable[[str], object] = _print,
    again: Callable[[], object] = _nothing,
) -> list[Report]:
    """Encode what is ordered, or go on with it, with this rank's share of the work; a report for each folder in turn.

    tell: takes the lines for a person, on rank 0. again: called now and then, to raise where an end was asked for.
    Raises ConfigError, DataError as `open_source` and `encode` do; what can be checked is before images are listed.
    """
    codec = _checked(order, device)
    source = open_source(order.images, order.classes, order.labels, order.columns, order.choice)
    if world.is_main:
        _tell(order, source, tell)
    parts = reversed(split(source, order.holdout, order.options.seed)) if order.holdout else [source]
    options, reports = order.options, []
    with warnings.catch_warnings():
        # which images are damaged or odd is said by the report
        warnings.filterwarnings("ignore", module=r"PIL\.")
        for part, out in zip(parts, order.outs, strict=True):  # max_bad is of all of them together
            report = _encode(part, codec, out, options, _Progress(len(part), world, again))
            options = replace(options, max_bad=options.max_bad - len(report.manifest.bad))
            reports.append(report)
            if world.is_main:
                tell(f"{out}: {report}")
    return reports


def _checked(order: EncodeOrder, device: torch.device) -> Codec:
    """The codec, after all that can be checked before images are listed."""
    check_spec(order.images)
    for out in order.outs:
        check_out(out)
    codec = order.codec.build(device)
    for out in order.outs:
        check_early(out, codec, order.options, order.holdout)
    return codec


def _tell(order: EncodeOrder, source: ImageSource, tell: Callable[[str], object]) -> None:
    """What was found, what is odd about it, and what will be done to it."""
    note, odd = unlabelled_note(order.images, source), label_warning(source)
    by = f" ({source.labelled_by})" if source.labelled_by and source.classes else ""
    notes = [f"note: {note}"] if note else []
    steps = options_as_begun(order.out, order.options).steps()
    tell("\n".join([f"{order.images}: {source}{by}", *notes, *steps]))
    if odd:
        warnings.warn(odd, Notice, stacklevel=2)


def _encode(source: ImageSource, codec: Codec, out: Path, options: EncodeOptions, shown: _Progress) -> Report:
    """This rank's share; rank 0 has a bar over the whole set."""
    world = shown.world
    with contextlib.closing(shown) as bar:
        return encode(
            source,
            codec,
            out,
            options,
            bar.progress,
            rank=world.rank,
            size=world.size,
            resumed=bar.resumed,
            waiting=bar.waiting,
        )


class _Progress:
    """Rank 0's bar, from when nothing stands in the way of the encode; and what ranks have to say while they wait."""

    def __init__(self, total: int, world: World, again: Callable[[], object]):
        self.total, self.world, self.again = total, world, again
        self.bar: Bar[None] | None = None
        self.told = False

    def resumed(self, count: int) -> None:
        hidden = not self.world.is_main
        self.bar = Bar(total=self.total, initial=count, unit="img", desc="encode", hidden=hidden)

    def progress(self, count: int) -> None:
        self.again()
        if self.bar is not None:
            self.bar.update(count)

    def waiting(self, what: Waiting) -> None:
        self.again()
        if self.bar is not None:
            self.bar.note(str(what))
        if what.ranks and what.seconds > PATIENCE and not self.told:  # on all ranks: rank 0 may be the one
            self.told = True
            say(f"rank {self.world.rank} waits: {what}", sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.note()
            self.bar.close()
