"""Drawing many images on many ranks, in blocks that are kept as they are done: killed, it goes on where it was.

A block is one batch, and the same batch wherever it is drawn, so that the arrays depend neither on the ranks nor on how
often the work was started. Nor on how many images there are in all: the last block is drawn as a whole batch too, of
the images that would come next, and cut.
"""

from __future__ import annotations

import contextlib
import io
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dit.errors import Notice
from dit.files import sync
from dit.outputs import RECORD, OutputError, write_record
from dit.progress import Bar
from dit.ranks import group
from dit.sample.generate import Sampler, image_grid
from dit.sample.tally import Tally
from dit.unfinished import Blocks

IN_GRID = 100  # images at most
FAR = 100.0  # beyond it are no latents of data, whose standard deviation is 1
BATCH = 64  # images at a time, unless asked for otherwise
TALLY = "tally"  # array of a block: images, calls and evaluations that it took


class Product(Protocol):
    """What becomes of drawn latents: pictures, or pairs of noise and latents; kept in blocks until it is whole."""

    @property
    def blocks(self) -> Blocks: ...

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """What is kept of a block: of the first `batch.wanted` of its images."""

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        """Put the result together from its blocks, and give it its place. On rank 0; labels: (N,) of all images."""


LabelFn = Callable[[Tensor], Tensor]  # image numbers (B,) int64 → their classes (B,) int64


def draw(sampler: Sampler, labels: LabelFn, products: Sequence[Product], world: group.World) -> None:
    """Draw what is missing of the products, which have the same blocks. Collective.

    Raises NotFiniteError naming the first bad image; the blocks before it are kept.
    """
    missing = [set(product.blocks.missing()) for product in products]
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


# --- pictures ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pictures:
    """samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: int64 labels, the ADM suite's format), grid.png and spec.json."""

    out: Path
    blocks: Blocks
    sampler: Sampler
    KIND: ClassVar[str] = "folder of drawn images"  # of dit.outputs.KINDS

    @staticmethod
    def files(out: Path) -> list[Path]:
        """All that is written to `out`; the record comes last, and says that the others are whole."""
        return [out / name for name in ("samples.npz", "grid.png", RECORD)]

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """The images (B, H, W, 3) uint8 of latents. Raises NotFiniteError."""
        return {"images": self.sampler.pictures(batch.latents, batch.index, batch.label, batch.wanted)}

    def take(self, held: Mapping[str, Any]) -> None:
        """Make blocks of what a finished result of fewer images holds. held: its record.

        Not where the solver chooses its own steps: the record does not say which block took how many.
        """
        if self.sampler.nfe is None:
            return
        with _stored(self.out / "samples.npz") as (images, shape):
            whole = [k for k in range(self.blocks.number) if (k + 1) * self.blocks.size <= shape[0]]
            for number in whole:
                count = len(self.blocks.samples(number))
                data = images.read(count * int(np.prod(shape[1:])))
                array = np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
                took = np.array([1, held["nfe"], held["network_evaluations"]]) * count
                self.blocks.add(number, {"images": array, TALLY: took.astype(np.int64)})

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        """Put the result together from all blocks, one at a time, and give it its place. labels: (N,) int64.

        about: JSON values that become spec.json, with the evaluations counted.
        """
        tally, first = Tally(), list[np.ndarray]()
        beside = self.blocks.folder
        with zipfile.ZipFile(beside / "samples.npz", "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                for number in range(self.blocks.number):
                    held = self.blocks.read(number)
                    images = held["images"]
                    if number == 0:
                        member.write(_header((self.blocks.count, *images.shape[1:]), images.dtype))
                    member.write(np.ascontiguousarray(images).data)
                    tally = Tally.sum([tally, Tally(*held[TALLY].tolist())])
                    if number * self.blocks.size < IN_GRID:
                        first.append(images)
            with archive.open("arr_1.npy", "w") as member:
                np.lib.format.write_array(member, labels.numpy())
        grid = image_grid(np.concatenate(first)[:IN_GRID], columns=min(10, len(about["classes"])))
        Image.fromarray(grid).save(beside / "grid.png")
        self.out.mkdir(parents=True, exist_ok=True)
        made = ("samples.npz", "grid.png")
        for name in made:
            sync(beside / name)  # of many images this takes long; a kill in here leaves what was there before
        (self.out / RECORD).unlink(missing_ok=True)  # never an old one beside new images
        for name in made:
            (beside / name).replace(self.out / name)
        sync(self.out)
        write_record(self.out / RECORD, {**about, **tally.per_image()})


def _header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What a .npy file begins with."""
    header = io.BytesIO()
    form = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, form)
    return header.getvalue()


@contextlib.contextmanager
def _stored(path: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The bytes of a samples.npz's images after their header, and their shape. OutputError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
            np.lib.format.read_magic(member)
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype != np.uint8 or len(shape) != 4:
                raise ValueError(f"images of {shape} {dtype}")
            yield member, shape
            while member.read(1 << 20):  # to its end, where its checksum is compared
                pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise OutputError(
            f"{path} is damaged ({type(error).__name__}: {error}): give --overwrite to draw it anew"
        ) from None
