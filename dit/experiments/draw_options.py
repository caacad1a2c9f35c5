"""What a command line says of a drawing, besides how each image is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dit.config import config
from dit.experiments.draw_order import DrawOrder
from dit.experiments.trained import Precision, Trained
from dit.files import expand
from dit.sample.between import parse_between
from dit.sample.formats import LATENTS
from dit.sample.labels import LabelOrder
from dit.sample.pictures import parse_formats


@config
class DrawOptions:
    """What is drawn, how much of it, and where to."""

    out: str | None = None  # folder for the images, grid.png and spec.json
    formats: str = "npz"  # npz, png (a folder of them), webdataset (shards), or several with commas
    save_latents: bool = False  # latents.npz too: float32 (N, C, H, W), as the network sees them
    preview: bool = False  # latents.npz and grid.png in false colours alone: opens no codec
    trajectory: bool = False  # trajectory.webp too: the solver's way of up to 16 images, animated
    interpolate: str | None = None  # interpolation.png too, rows of 9: seeds:0,1 or classes:3,7 (or names)
    save_pairs: str | None = None  # new folder for noise and latents: the data of a reflow
    num_samples: int = 64  # images in all
    classes: str = "all"  # all, numbers like 0,3 or names
    label_order: LabelOrder = (
        "balanced"  # image i is of classes[i mod n], or (random) of one drawn by (seed, i)
    )
    batch_size: int | None = None  # images at a time and rank, and in a block that is kept; none = 64, or all
    compile: bool = (
        False  # the blocks with torch.compile, which takes a minute or two at first: for many images
    )
    # evaluations in a row that share what the encoder of a model: ddt says, as of the first of them; 1 = none
    share_encoder: Annotated[int, Field(ge=1)] = 1
    overwrite: bool = False  # replace what another spec has drawn there

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that images, and latents, are wanted in. ConfigError for one that there is not."""
        return (*parse_formats(self.formats), *([LATENTS] if self.save_latents else []))

    def order(
        self, trained: Trained, precision: Precision, codec_keys: Mapping[str, str], asked: frozenset[str]
    ) -> DrawOrder:
        """What it is of this model. codec_keys, asked: as `DrawOrder` has them. Raises ConfigError."""
        return DrawOrder(
            trained.classes(self.classes),
            self.num_samples,
            self.batch_size,
            precision,
            codec_keys,
            asked,
            out=_folder(self.out),
            save_pairs=_folder(self.save_pairs),
            overwrite=self.overwrite,
            label_order=self.label_order,
            formats=self.forms,
            preview=self.preview,
            trajectory=self.trajectory,
            share_encoder=self.share_encoder,
            interpolate=parse_between(self.interpolate, trained.classes) if self.interpolate else None,
        )


def _folder(name: str | None) -> Path | None:
    """What was typed, as a place."""
    return Path(expand(name)) if name else None
