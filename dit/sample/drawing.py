"""Drawing many images on many ranks, in blocks that are kept as they are done: killed, it goes on where it was.

A block is one batch, and the same batch wherever it is drawn, so that the arrays depend neither on the ranks nor on how
often the work was started. Nor on how many images there are in all: the last block is drawn as a whole batch too, of
the images that would come next, and cut.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit.errors import Notice
from dit.progress import Bar
from dit.ranks import group
from dit.ranks.asked import EndAsked, telling
from dit.sample.behind import Behind
from dit.sample.denoise import DenoiseFn, stopping
from dit.sample.generate import Sampler
from dit.unfinished import Blocks

FAR = 100.0  # beyond it are no latents of data, whose standard deviation is 1
BATCH = 64  # images at a time, unless asked for otherwise
TALLY = "tally"  # array of a block: images, calls and evaluations that it took


class Product(Protocol):
    """What becomes of drawn latents: pictures, or pairs of noise and latents; kept in blocks until it is whole."""

    @property
    def blocks(self) -> Blocks: ...

    @property
    def needs(self) -> frozenset[str]:
        """The arrays of a block without which it is drawn anew."""

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What is kept of a block: of the first `batch.wanted` of its images."""

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        """Put the result together from its blocks, and give it its place. On rank 0; labels: (N,) of all images."""


LabelFn = Callable[[Tensor], Tensor]  # image numbers (B,) int64 → their classes (B,) int64


def draw(
    sampler: Sampler,
    labels: LabelFn,
    products: Sequence[Product],
    world: group.World,
    asked: EndAsked | None = None,
) -> None:
    """Draw what is missing of the products, which have the same blocks. Collective.

    Raises NotFiniteError naming the first bad image, Stopped where any rank was asked to end; whole blocks are kept.
    """
    missing = [set(product.blocks.missing(product.needs)) for product in products]
    blocks, todo = products[0].blocks, sorted(set().union(*missing))
    left = sum(len(blocks.samples(number)) for number in todo)
    _say_already(blocks, left, world)
    mine = todo[world.rank :: world.size]

    def keep(number: int, batch: Batch) -> None:
        for product, lacking in zip(products, missing, strict=True):
            if number in lacking:
                product.blocks.add(number, {**product.arrays(batch), TALLY: batch.took})

    def draw_mine(bar: Bar[None]) -> float:
        """How far the latents of this rank's blocks reach."""
        reach, wanted = 0.0, [blocks.samples(number) for number in mine]
        denoise = stopping(sampler.denoise, asked or EndAsked())
        drawn = draw_batches(sampler, labels, wanted, blocks.size, denoise)
        with Behind(sampler.device) as behind:
            for number, batch in zip(mine, drawn, strict=True):
                reach = max(reach, batch.reach)
                behind.do(keep, number, batch)
                if world.is_main:
                    bar.update(left - _lacking(products, missing) - bar.n)
        return reach

    hidden = not (world.is_main and todo)
    with (
        telling(lambda: _kept(blocks, _lacking(products, missing))),
        Bar[None](total=left, unit="image", hidden=hidden, desc="sampling") as bar,
    ):
        reach = group.together(partial(draw_mine, bar))
        bar.update(left - bar.n)
    _warn_once(reach, world)


def _warn_once(reach: float, world: group.World) -> None:
    """Warn, on rank 0 for all, where the latents of any rank reach far. Collective."""
    furthest = max(group.gather_objects(reach))
    if world.is_main:
        warn_if_far(furthest)


def _say_already(blocks: Blocks, left: int, world: group.World) -> None:
    """Say how many images lie there at the start, if any do."""
    if world.is_main and left < blocks.count:
        rest = "going on with the others" if left else "only their files are to be made"
        print(f"{blocks.count - left} of {blocks.count} images are drawn already; {rest}")


def _kept(blocks: Blocks, left: int) -> str:
    """What is said where an end was asked for."""
    return f"{blocks.count - left} of {blocks.count} images are drawn and kept; the same command goes on"


def _lacking(products: Sequence[Product], missing: Sequence[set[int]]) -> int:
    """How many images no rank has kept so far, by the blocks that lie there, of those that were missing."""
    still: set[int] = set()
    for product, lacking in zip(products, missing, strict=True):
        still |= lacking - product.blocks.there()
    return sum(len(products[0].blocks.samples(number)) for number in still)


@dataclass(frozen=True)
class Batch:
    """Drawn latents (B, C, H, W) of images `index` of classes `label`, (B,) int64 each. took: counts of the tally.

    wanted: how many of them are, the first; the rest fill the batch up, so that what is computed of it (decoded, too)
    has the same bits in every batch of B.
    """

    index: Tensor
    label: Tensor
    latents: Tensor
    wanted: int
    took: np.ndarray

    @property
    def reach(self) -> float:
        """The largest absolute value of what is wanted."""
        return float(self.latents[: self.wanted].abs().max())


def default_batch(num_samples: int) -> int:
    """Images at a time where nobody says how many: BATCH, or all where fewer are wanted."""
    return min(BATCH, num_samples)


def in_batches(num_samples: int, size: int) -> list[range]:
    """Images [0, N) in batches of `size`, the last of what is left."""
    return [range(first, min(first + size, num_samples)) for first in range(0, num_samples, size)]


def draw_batches(
    sampler: Sampler,
    labels: LabelFn,
    wanted: Sequence[range],
    size: int,
    denoise: DenoiseFn | None = None,
) -> Iterator[Batch]:
    """Draw one batch of `size` images after the other.

    wanted: image numbers of each batch, `size` at most; a shorter one is filled up with the numbers after it. denoise:
    what the solver calls in place of the sampler's guided denoiser. Raises NotFiniteError naming the first image that
    is wanted and whose latents are not finite.
    """
    for numbers in wanted:
        before, index = sampler.tally.counts, torch.arange(numbers.start, numbers.start + size)
        label = labels(index)
        latents = sampler.latents(index, label, len(numbers), denoise=denoise)
        yield Batch(index, label, latents, len(numbers), np.subtract(sampler.tally.counts, before))


def warn_if_far(reach: float) -> None:
    """Warn where latents reach this far from 0, and so are none of data."""
    if reach > FAR:
        warnings.warn(
            f"latents reach {reach:.3g}, where those of data have a standard deviation of 1: the pictures are clipped, "
            "and show little; lower cfg_scale, or take more steps",
            Notice,
            stacklevel=2,
        )
