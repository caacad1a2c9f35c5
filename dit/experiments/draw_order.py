"""What is ordered of a drawing: how many images of which classes, in which forms, and where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dit.config import ConfigError
from dit.experiments.trained import Precision
from dit.sample.between import Between
from dit.sample.formats import LATENTS
from dit.sample.labels import LabelOrder
from dit.sample.pictures import OLD_FORMATS

MOST = 10**8  # images: their names have eight digits
MOST_AT_A_TIME = 2**20  # images: beyond it their noise alone is gigabytes


@dataclass(frozen=True)
class DrawOrder:
    """What is to be drawn, and where to.

    batch_size: images at a time; None = as what is there already, else `default_batch`. codec_keys: {"codec.path":
    ...}, over where training had it. asked: fields of the spec that are no defaults, but were asked for. out: folder
    for pictures. save_pairs: folder for a data set of noise and latents. overwrite: what is there is replaced.
    label_order: how images get their classes (`Labels`). formats: of the pictures, names in FORMATS or LATENTS.
    preview: latents and their false colours alone; no codec is opened. trajectory, interpolate: pictures beside them.
    share_encoder: evaluations in a row that share what the model's encoder says.
    """

    classes: list[int]
    num_samples: int
    batch_size: int | None = None
    precision: Precision = "fp32"
    codec_keys: Mapping[str, str] = field(default_factory=dict)
    asked: frozenset[str] = frozenset()
    out: Path | None = None
    save_pairs: Path | None = None
    overwrite: bool = False
    label_order: LabelOrder = "balanced"
    formats: tuple[str, ...] = OLD_FORMATS
    preview: bool = False
    trajectory: bool = False
    interpolate: Between | None = None
    share_encoder: int = 1

    @property
    def forms(self) -> tuple[str, ...]:
        """In which forms the pictures are given."""
        return (LATENTS,) if self.preview else self.formats

    def __post_init__(self) -> None:
        check_amount(self.num_samples, self.batch_size)
        if self.out is not None and self.out == self.save_pairs:
            raise ConfigError(f"--out and --save_pairs are both {self.out}: give each a folder of its own")


def check_amount(num_samples: int, batch_size: int | None) -> None:
    """ConfigError for numbers of images that are none."""
    for name, number, most in (
        ("num_samples", num_samples, MOST),
        ("batch_size", batch_size, MOST_AT_A_TIME),
    ):
        if number is not None and not 1 <= number <= most:
            expected = "1 or more" if number < 1 else f"{most} or fewer"
            raise ConfigError(f"{name}: expected {expected}, got {number}")
