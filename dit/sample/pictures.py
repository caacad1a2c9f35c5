"""Drawn images as a folder: the forms that were asked for, a grid to look at, and a record that comes last."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from dit.config import ConfigError, did_you_mean
from dit.files import sync
from dit.outputs import RECORD, OutputError, read_record, write_record
from dit.sample.drawing import TALLY, Batch
from dit.sample.formats import FORMATS, LATENTS, format_of
from dit.sample.generate import Sampler, image_grid
from dit.sample.intact import BLOCKS, Source, crc32, summed
from dit.sample.preview import false_colours
from dit.sample.tally import Tally
from dit.unfinished import Blocks, partial_of

GRID = "grid.png"
IN_GRID = 100  # images at most
OLD_FORMATS = ("npz",)  # of records that name none
PLACING = (
    "placing.json"  # in OUT.partial, while its files take their places: the forms of what was there before
)


def parse_formats(text: str) -> tuple[str, ...]:
    """Names of forms from "npz,png". ConfigError for one that there is not."""
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(
                f"formats: there is no '{name}'{did_you_mean(name, FORMATS)}; give one or more of "
                f"{', '.join(FORMATS)}, with commas"
            )
    return names


@dataclass(frozen=True)
class Pictures:
    """OUT with images in each of `formats`, grid.png and spec.json, the record.

    preview: the grid is of the latents in false colours, no codec is asked, and no image made.
    """

    out: Path
    blocks: Blocks
    sampler: Sampler
    formats: tuple[str, ...] = OLD_FORMATS
    preview: bool = False
    KIND: ClassVar[str] = "folder of drawn images"  # of dit.outputs.KINDS

    @staticmethod
    def files(out: Path, formats: Collection[str] = OLD_FORMATS) -> list[Path]:
        """The files (without folders) in `out`; the record comes last, and says that the others are whole."""
        names = [name for form in formats for name in format_of(form).names if "." in name]
        return [out / name for name in (*names, GRID, RECORD)]

    @property
    def needs(self) -> frozenset[str]:
        """The arrays of a block that it is made of."""
        return frozenset(format_of(name).array for name in self.formats)

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """The images (B, H, W, 3) uint8 of latents, and the latents (B, C, H, W). Raises NotFiniteError."""
        made: dict[str, np.ndarray] = {}
        if "images" in self.needs:
            made["images"] = self.sampler.pictures(batch.latents, batch.index, batch.label, batch.wanted)
        if "latents" in self.needs:
            made["latents"] = batch.latents[: batch.wanted].float().cpu().numpy()
        return made

    def take(self, held: Mapping[str, Any], damaged: Collection[str] = ()) -> None:
        """Make blocks of what a finished result holds, of as many images or fewer, that is as it was written.

        held: its record. damaged: names in OUT that are not whole. Nothing is taken where an array is in none of its
        forms; nor, of fewer images or of what is not all whole, where the solver chooses its own steps: the record does
        not say which block took how many.
        """
        forms = {n: format_of(n).array for n in held.get("formats", OLD_FORMATS)}
        if not self.needs <= set(forms.values()):
            return
        count, is_adaptive = held["num_samples"], self.sampler.nfe is None
        whole = [k for k in range(self.blocks.number) if self.blocks.samples(k).stop <= count]
        sources = [Source(self.out, held, array, self.blocks, damaged) for array in sorted(self.needs)]
        if is_adaptive and (count != self.blocks.count or any(source.is_damaged for source in sources)):
            return
        for number, found in zip(whole, zip(*(s.read(whole) for s in sources), strict=True), strict=True):
            arrays = {source.array: values for source, values in zip(sources, found, strict=True)}
            if any(values is None for values in found) or self.blocks.path(number).is_file():
                continue  # is drawn anew; or is of a start that was killed
            took = np.array([1, held["nfe"], held["network_evaluations"]]) * len(self.blocks.samples(number))
            self.blocks.add(number, {**arrays, TALLY: took})

    def write(self, labels: Tensor, about: Mapping[str, Any]) -> None:
        """Put the result together from all blocks, one at a time, and give it its place. labels: (N,) int64.

        about: JSON values that become spec.json, with the evaluations counted.
        """
        forms = [format_of(name) for name in self.formats]
        tally, first, beside = Tally(), list[np.ndarray](), self.blocks.folder
        checks = {array: list[str]() for array in sorted(self.needs)}
        with contextlib.ExitStack() as stack:
            writers = [(f.array, stack.enter_context(f.writing(beside, self.blocks.count))) for f in forms]
            for number in range(self.blocks.number):
                held, numbers = self.blocks.read(number), self.blocks.samples(number)
                for array, add in writers:
                    add(held[array], labels[numbers.start : numbers.stop].numpy())
                for array, checked in checks.items():
                    checked.append(crc32(held[array]))
                tally = Tally.sum([tally, Tally(*held[TALLY].tolist())])
                if numbers.start < IN_GRID:
                    first.append(held["latents" if self.preview else "images"])
        shown = np.concatenate(first)[:IN_GRID]
        shown = false_colours(shown) if self.preview else shown
        Image.fromarray(image_grid(shown, columns=min(10, len(about["classes"])))).save(beside / GRID)
        sync(beside / GRID)
        names = [*(name for f in forms for name in f.names), GRID]
        kept = {BLOCKS: {array: "".join(checked) for array, checked in checks.items()}} | summed(
            beside, names
        )
        self._place(names)
        write_record(self.out / RECORD, {**about, "formats": list(self.formats), **tally.per_image(), **kept})

    def _place(self, names: Sequence[str]) -> None:
        """Move what lies beside OUT into it. What was there in other forms goes: it is of another spec.

        A kill in here leaves the blocks and PLACING, and the next start does it again.
        """
        beside = self.blocks.folder
        self.out.mkdir(parents=True, exist_ok=True)
        if not (beside / PLACING).is_file():
            write_record(beside / PLACING, {"formats": formats_in(self.out)})
        before = read_record(beside / PLACING)["formats"]
        (self.out / RECORD).unlink(missing_ok=True)  # never an old one beside new images
        old = [name for form in before for name in format_of(form).names]
        for name in dict.fromkeys([*old, *names]):
            there, aside = self.out / name, beside / f"{name}.old"
            if there.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
                there.rename(aside)
            elif name not in names:
                there.unlink(missing_ok=True)
        for name in names:
            (beside / name).replace(self.out / name)
        sync(self.out)


def formats_in(out: Path) -> list[str]:
    """The forms in which a folder holds drawn images, by its record; none where that is of something else."""
    record = out / RECORD
    if not record.is_file():
        return []
    try:
        held = json.loads(record.read_bytes())
    except ValueError:  # whoever replaces it was told to
        return []
    is_ours = isinstance(held, dict) and "sampler" in held
    known = {*FORMATS, LATENTS}
    return [name for name in held.get("formats", OLD_FORMATS) if name in known] if is_ours else []


def is_placing(out: Path) -> bool:
    """Whether a job was killed while it gave OUT its files, which are then neither of the one result nor the other."""
    return (partial_of(out) / PLACING).is_file()


def refuse_foreign(out: Path, formats: Collection[str], overwrite: bool) -> None:
    """OutputError where `out` has something that bears the name of a form it does not hold. Folders always, files
    unless told to overwrite.
    """
    there = formats_in(out)
    for form in formats:
        for path in (out / name for name in format_of(form).names if form not in there):
            is_folder_name = "." not in path.name
            if path.exists() and (path.is_dir() or is_folder_name or not overwrite):
                raise OutputError(
                    f"{path} is there already, and nothing says that it holds drawn images: remove it, or give another "
                    "place to write to"
                )
