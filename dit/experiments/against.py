"""What images drawn during training are compared with: looked at before training, gone through once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dit.config import ConfigError, to_dict
from dit.evals.extraction import Pass
from dit.evals.making import Taken, make_reference
from dit.evals.metrics.measuring import ALL, choose_metrics
from dit.evals.metrics.metric import FeatureSet, Metric
from dit.evals.order import Options
from dit.evals.pictures.opening import open_pictures
from dit.evals.pictures.pictures import Pictures
from dit.evals.protocol import protocol_hash
from dit.evals.reference import ReferenceFile, is_reference, load
from dit.evals.sides import Sides, sides_of_file
from dit.experiments.diffusion import EvaluateConfig
from dit.files import expand
from dit.ranks import group
from dit.ranks.group import World


@dataclass
class Against:
    """What drawn images are compared with. Opened at the start, gone through before the first figures.

    size: of the images, (height, width). options: which figures. folder: where statistics of images are kept.
    keep: whether single images' features are needed.
    """

    cfg: EvaluateConfig
    size: tuple[int, int]
    folder: Path
    opened: Pictures | ReferenceFile
    keep: bool
    held: dict[str, Sides] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        """Which figures there are to be."""
        return Options(metrics=self.cfg.metrics)

    @classmethod
    def open(cls, cfg: EvaluateConfig, size: tuple[int, int], folder: Path, device: torch.device) -> Against:
        """Open the reference and the networks, and see that the figures can be computed. Not collective.

        Raises FeatureError, PicturesError, DataError or ConfigError, with what is missing or does not fit.
        """
        place = Path(expand(str(cfg.reference)))
        made = cls(cfg, size, folder, _opened(place, cfg), keep=False)
        theirs = tuple(
            made.opened.about["size"] if isinstance(made.opened, ReferenceFile) else made.opened.size
        )
        if theirs != size:
            raise ConfigError(
                f"evaluate.reference = {cfg.reference} has images of {theirs[1]}x{theirs[0]}, and this run draws "
                f"{size[1]}x{size[0]}: give others, or set evaluate.image_size to crop and resize files of images"
            )
        if isinstance(made.opened, ReferenceFile):
            made.held = sides_of_file(made.opened, cfg.features, device)
        kinds = [made._kinds(number, device) for number in range(len(cfg.features))]
        made.keep = any(list(map(made._needs_features, kinds)))
        return made

    def _kinds(self, number: int, device: torch.device) -> set[str]:
        """What a network gives of an image: features, logits, spatial. One that is fitted later gives features."""
        space = self.cfg.features[number]
        if space.fitted:
            return {"features"}
        made = space.build(device)(torch.zeros(1, *self.size, 3, dtype=torch.uint8))._asdict()
        return {kind for kind, rows in made.items() if rows is not None}

    def _needs_features(self, kinds: set[str]) -> bool:
        """Whether a figure needs single images' features. Raises where one cannot be had of as many images."""
        file = self.opened if isinstance(self.opened, ReferenceFile) else None
        count = int(file.about["count"]) if file else len(self.opened)  # type: ignore[arg-type]
        ours, theirs = _made_up(self.cfg.num_samples, kinds), _made_up(count, kinds)
        try:
            metrics, _ = choose_metrics(self.cfg.metrics, {}, ours, theirs)
        except ConfigError as error:
            raise ConfigError(f"evaluate.metrics: {str(error).removeprefix('--metrics: ')}") from None
        for metric in metrics.values():
            metric.check(ours, theirs)
            for side in self.held.values() if self.cfg.metrics != ALL else ():
                side.for_metric(metric)
        return any(_is_of_single_images(metric) for metric in metrics.values())

    def sides(self, world: World) -> dict[str, Sides]:
        """The reference in each space; the first time its images are gone through. Collective."""
        if not self.held:
            self.held = self._of_images(world)
        return self.held

    def _of_images(self, world: World) -> dict[str, Sides]:
        """From a statistics file in the run directory, which is made where it is not there yet."""
        assert isinstance(self.opened, Pictures)
        cfg = self.cfg
        what = {
            "images": dict(self.opened.about),
            "features": [to_dict(space) for space in cfg.features],
            "image_size": cfg.image_size,
            "keep": self.keep,
        }
        file = self.folder / f"reference-{protocol_hash(what)}.npz"
        how, taken = Pass(cfg.batch_size, group.cores()), Taken(cfg.image_size, keep=self.keep)
        make_reference(str(cfg.reference), file, cfg.features, how, world, taken)
        found = group.together(lambda: sides_of_file(load(file), cfg.features, world.device))
        if world.is_main:
            return found
        return {name: Sides(side.network, side.protocol) for name, side in found.items()}


def _opened(place: Path, cfg: EvaluateConfig) -> Pictures | ReferenceFile:
    if is_reference(place):
        return load(place)
    pictures = open_pictures(str(cfg.reference), cfg.image_size)
    if not len(pictures):
        raise ConfigError(f"evaluate.reference = {cfg.reference} has no images")
    return pictures


def _made_up(count: int, kinds: set[str]) -> FeatureSet:
    """Features that stand for those of so many images, to see whether figures could be had of them."""
    rows = np.arange(2.0 * count).reshape(count, 2)
    return FeatureSet(**dict.fromkeys(kinds, rows), name=f"{count} images")


def _is_of_single_images(metric: Metric) -> bool:
    return metric.looks_at_reference and not metric.takes_statistics
