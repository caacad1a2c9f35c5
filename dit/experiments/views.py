"""Pictures beside drawn images that show how they come about: the solver's way, and what lies between two of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dit.errors import Notice
from dit.files import sync
from dit.outputs import claim, write_record
from dit.progress import Bar
from dit.sample.between import COLUMNS, ROWS, Between, interpolated
from dit.sample.drawing import LabelFn
from dit.sample.generate import Sampler, image_grid
from dit.sample.intact import damaged, summed
from dit.sample.trajectory import SHOWN, trajectory, write_animation

COUNT = "num_samples"


@dataclass(frozen=True)
class View:
    """A picture of the first images. file: its name in OUT. most: images at most. spec: JSON values, what it is of.

    show: draws it to a path, of images `index` of classes `label`, (B,) int64 each.
    """

    file: str
    most: int
    spec: Mapping[str, Any]
    show: Callable[[Path, Sampler, Tensor, Tensor], None]

    def files(self, out: Path) -> list[Path]:
        """The picture, and the record of how it was made."""
        return [out / self.file, (out / self.file).with_suffix(".json")]

    def is_there(self, out: Path, record: Mapping[str, Any], overwrite: bool, **how: Any) -> bool:
        """Whether it was drawn already, by the same spec. Raises OutputError, as `claim`."""
        files, spec = self.files(out), self.record(record)
        held = claim(files, spec, record=files[-1], overwrite=overwrite, growing=COUNT, **how)
        if held is None or held[COUNT] != spec[COUNT]:
            return False
        found = damaged(out, held, [self.file])
        for name, way in found.items():
            warnings.warn(f"{out / name} {way}: it is made anew", Notice, stacklevel=2)
        return not found

    def record(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What is compared of a drawing's record, of the images that are shown."""
        rest = {key: value for key, value in record.items() if key != "batch_size"}
        return {**rest, **self.spec, COUNT: min(self.most, record[COUNT])}

    def draw(self, out: Path, sampler: Sampler, labels: LabelFn, record: Mapping[str, Any]) -> None:
        """Draw it and write it down. On one rank. Raises NotFiniteError."""
        picture, about = self.files(out)
        index = torch.arange(min(self.most, record[COUNT]))
        out.mkdir(parents=True, exist_ok=True)
        about.unlink(missing_ok=True)  # never an old one beside a new picture
        self.show(picture, sampler, index, labels(index))
        write_record(about, self.record(record) | summed(out, [self.file]))


def views_of(trajectory: bool, interpolate: Between | None) -> list[View]:
    """What was asked for."""
    views = [View("trajectory.webp", SHOWN, {}, _show_trajectory)] if trajectory else []
    if interpolate is not None:
        spec = {"interpolate": {interpolate.kind: list(interpolate.ends)}}

        def show(path: Path, sampler: Sampler, index: Tensor, label: Tensor) -> None:
            _show_between(path, sampler, interpolate, index, label)

        views.append(View("interpolation.png", ROWS, spec, show))
    return views


def _show_trajectory(path: Path, sampler: Sampler, index: Tensor, label: Tensor) -> None:
    with Bar[None](total=sampler.nfe, unit="evaluation", desc="trajectory") as bar:
        frames = trajectory(sampler, index, label, bar.update)
    write_animation(path, frames, sampler)


def _show_between(path: Path, sampler: Sampler, between: Between, index: Tensor, label: Tensor) -> None:
    with Bar[None](total=COLUMNS * len(index), unit="image", desc="interpolation") as bar:
        images = interpolated(sampler, between, index, label, bar.update)
    Image.fromarray(image_grid(images, COLUMNS)).save(path)
    sync(path)
