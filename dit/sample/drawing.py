"""Drawing many images on many ranks, in blocks that are kept as they are done: killed, it goes on where it was.

A block is one batch, and the same batch wherever it is drawn, so that the arrays depend neither on the ranks nor on how
often the work was started. Nor on how many images there are in all: the last block is drawn as a whole batch too, of
the images that would come next, and cut.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dit.errors import Notice
from dit.progress import Bar
from dit.ranks import group
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


def draw(sampler: Sampler, labels: LabelFn, products: Sequence[Product], world: group.World) -> None:
    """Draw what is missing of the products, which have the same blocks. Collective.

    Raises NotFiniteError naming the first bad image; the blocks before it are kept.
    """
    missing = [set(product.blocks.missing(product.needs)) for product in products]
    blocks, todo = products[0].blocks, sorted(set().union(*missing))
    left = sum(len(blocks.samples(number)) for number in todo)
    if world.is_main and left < blocks.count:
        print(f"{blocks.count - left} of {blocks.count} images are drawn already; going on with the others")
    mine = todo[world.rank :: world.size]
    where = f"sampling, rank 0 of {world.size}" if world.size > 1 else "sampling"

    def draw_mine() -> float:
        """How far the latents of this rank's blocks reach."""
        reach, wanted = 0.0, [blocks.samples(number) for number in mine]
        hidden = not world.is_main or not mine
        with contextlib.closing(draw_batches(sampler, labels, wanted, blocks.size, where, hidden)) as drawn:
            for number, batch in zip(mine, drawn, strict=True):
                reach = max(reach, batch.reach)
                for product, lacking in zip(products, missing, strict=True):
                    if number in lacking:
                        product.blocks.add(number, {**product.arrays(batch), TALLY: batch.took})
        return reach

    # a rank that fails alone would leave the others waiting for it, for as long as the backend likes
    warn_if_far(group.together(draw_mine))


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
    desc: str = "sampling",
    hidden: bool = False,
) -> Generator[Batch, None, None]:
    """Draw one batch of `size` images after the other, with a bar over all that are wanted.

    wanted: image numbers of each batch, `size` at most; a shorter one is filled up with the numbers after it. Close it
    where it is left early: that ends the bar. Raises NotFiniteError naming the first image that is wanted and whose
    latents are not finite.
    """
    total = sum(map(len, wanted))
    with Bar[None](total=total, unit="image", hidden=hidden, desc=desc) as bar:
        for numbers in wanted:
            before, index = sampler.tally.counts, torch.arange(numbers.start, numbers.start + size)
            label = labels(index)
            latents = sampler.latents(index, label, len(numbers))
            took = np.subtract(sampler.tally.counts, before)
            yield Batch(index, label, latents, len(numbers), took)
            bar.update(len(numbers))


def warn_if_far(reach: float) -> None:
    """Warn where latents reach this far from 0, and so are none of data."""
    if reach > FAR:
        warnings.warn(
            f"latents reach {reach:.3g}, where those of data have a standard deviation of 1: the pictures are clipped, "
            "and show little; lower cfg_scale, or take more steps",
            Notice,
            stacklevel=2,
        )
