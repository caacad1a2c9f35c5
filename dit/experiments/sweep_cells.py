"""What a sweep is asked for: every cell of it, checked before the first is drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit.config import ConfigError, to_dict
from dit.evals.features.network import FeatureSpace
from dit.evals.metrics.resampling import Resampling
from dit.evals.order import Options, check_names
from dit.evals.protocol import protocol_hash
from dit.evals.sides import Sides
from dit.evals.sweep.axes import Axes, Setting, most_steps
from dit.evals.sweep.cells import Cell
from dit.experiments.draw_order import check_amount
from dit.experiments.drawing import check_labelled
from dit.experiments.trained import Precision, Trained
from dit.ranks.asked import EndAsked
from dit.sample.generate import Sampler
from dit.sample.tally import Tally


@dataclass(frozen=True)
class SweepOrder:
    """What is to be measured. runs: {name: run directory or checkpoint}.

    reference, held_out: as `open_pictures` has them; the reference may be a statistics file. options: of the figures;
    num_samples and batch_size are of the drawing, too. precision: "run", "fp32" or "bf16". splits: of real images.
    codec_keys: {"codec.path": ...}, over where training had it. asked: where a signal says that it is to end.
    """

    runs: Mapping[str, str]
    reference: str
    out: Path
    axes: Axes
    spaces: Sequence[FeatureSpace]
    options: Options
    metric_keys: Mapping[str, str] = field(default_factory=dict)
    precision: str = "run"
    splits: int = 5
    codec_keys: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    overwrite: bool = False
    asked: EndAsked = field(default_factory=EndAsked)

    def __post_init__(self) -> None:
        check_amount(self.count, self.options.batch_size)
        check_names(self.options.metrics, self.metric_keys)
        if self.axes.nfe and self.axes.num_steps != Axes().num_steps:
            raise ConfigError("nfe and num_steps are both given: a budget says how many steps there are")
        if self.options.class_accuracy:
            raise ConfigError(
                "class_accuracy is of ImageNet's classes by the images' folders: draw them, and evaluate"
            )
        if self.splits < 1:
            raise ConfigError(f"splits is {self.splits}; expected 1 or more")

    @property
    def count(self) -> int:
        """Images of each cell."""
        return self.options.num_samples or 0

    @property
    def batch(self) -> int:
        """Images at a time and rank."""
        return min(self.options.batch_size, self.count)

    @property
    def resampling(self) -> Resampling:
        """What intervals come from."""
        return Resampling(self.options.bootstrap, self.options.seed)


@dataclass(frozen=True)
class Asked:
    """One cell before the reference is known. path: of the checkpoint itself, which a run's training adds to."""

    run: str
    path: str
    setting: Setting
    seed: int
    sampler: Sampler | None
    facts: Mapping[str, Any]
    noise: str
    size: int

    def cell(self, order: SweepOrder, sides: Mapping[str, Sides]) -> Cell:
        """The cell with its whole protocol."""
        if self.sampler is None:
            return Cell(self.run, self.setting, self.seed, None, {}, self.noise)
        protocol = {**self.facts, "sampler": to_dict(self.sampler.spec), **shared_protocol(order, sides)}
        return Cell(self.run, self.setting, self.seed, self.sampler.spec, protocol, self.noise)


def shared_protocol(order: SweepOrder, sides: Mapping[str, Sides]) -> dict[str, Any]:
    """What all cells have in common of their protocol."""
    spaces = {
        name: {"features": dict(side.network.identity), "reference": dict(side.protocol)}
        for name, side in sides.items()
    }
    return {
        "num_samples": order.count,
        "spaces": spaces,
        "metrics": sorted({word.strip() for word in order.options.metrics.split(",")}),
        "metric_keys": dict(sorted(order.metric_keys.items())),
    }


class Models:
    """Loads models, and keeps the latest."""

    def __init__(self, order: SweepOrder, device: torch.device):
        self._order, self._device = order, device
        self._kept: tuple[tuple[str, str], Trained, Sampler] | None = None

    def get(self, path: str, weights: str) -> Trained:
        """The model."""
        return self._open(path, weights)[0]

    def sampler(self, path: str, weights: str) -> Sampler:
        """A sampler of the model, of any spec, with its codec."""
        return self._open(path, weights)[1]

    def precision(self, trained: Trained) -> Precision:
        """What a model computes in."""
        return trained.precision(self._order.precision)

    def _open(self, path: str, weights: str) -> tuple[Trained, Sampler]:
        if self._kept is None or self._kept[0] != (path, weights):
            self._kept = None  # its memory is free before the next one is loaded
            trained = Trained.load(path, weights, self._device)
            spec = Setting(weights, 1.0, (0.0, 1.0), self._order.axes.solver[0], 1).spec(
                1, self._order.axes.grid, 0
            )
            keys = self._order.codec_keys
            made = trained.sampler(spec, keys, self._device, self.precision(trained))
            self._kept = ((path, weights), trained, made)
        return self._kept[1:]


def asked_cells(order: SweepOrder, models: Models) -> Iterator[Asked]:
    """All cells, each checked. Raises ConfigError or CheckpointError, with the cell that cannot be."""
    axes = order.axes
    for run, named in order.runs.items():
        path = named
        for setting in axes.settings():
            trained = models.get(path, setting.weights)
            path = str(trained.path)
            classes = trained.classes("all")
            facts = {
                "digest": trained.digest,
                "weights": trained.weights,
                "classes": classes,
                "precision": models.precision(trained),
                "codec": dict(order.codec_keys),
            }
            first = models.sampler(path, setting.weights)
            for seed in axes.seeds:
                what = [seed, list(first.shape), classes, order.count]
                sampler = _checked(order, trained, first, setting, seed)
                noise, size = protocol_hash({"noise": what}), int(trained.contract["image_size"])
                yield Asked(run, path, setting, seed, sampler, facts, noise, size)


def _checked(
    order: SweepOrder, trained: Trained, first: Sampler, setting: Setting, seed: int
) -> Sampler | None:
    """What draws a cell; None where one step is more than the budget."""
    spec = setting.spec(1 if setting.is_budget else setting.steps, order.axes.grid, seed)
    objective = trained.experiment.objective
    check_labelled(spec, trained.classes("all"), trained)
    if spec.needs_label and not trained.contract["classes"]:
        raise ConfigError(
            f"{trained.path} was trained without classes: guidance has no effect; cfg_scale 1 is none"
        )
    sampler = dataclasses.replace(first, spec=spec, tally=Tally())
    found = most_steps(sampler, setting.steps) if setting.is_budget else sampler
    if found is not None:
        found.spec.check(objective.path, objective.prediction, trained.experiment.model.learn_sigma)
    return found


def one_size(asked: Sequence[Asked]) -> int:
    """Pixels a side of what all runs draw."""
    sizes = {a.run: a.size for a in asked}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{run} {size}" for run, size in sizes.items())
        raise ConfigError(
            f"the runs draw images of unlike sizes ({told} pixels a side), and a sweep compares one"
        )
    return asked[0].size


def named_runs(runs: str) -> dict[str, str]:
    """{name: path} of "a=runs/x,runs/y"; without a name the path is one. ConfigError where one comes twice."""
    words = [word.strip() for word in runs.split(",") if word.strip()]
    pairs = [(word.partition("=")[0], word.partition("=")[2] or word) for word in words]
    if len(dict(pairs)) < len(pairs) or not pairs:
        raise ConfigError(f"two runs have one name, or there is none, in '{runs}': write NAME=PATH")
    return dict(pairs)
