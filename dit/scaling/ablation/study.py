"""The runs of an ablation: each change at each rate on one seed, then at its best rate on the seeds that are reported.

All runs of a budget take the same training FLOPs: the steps follow from what a sample costs with the change, auxiliary
forward passes included. What is measured between, held-out loss and drawn images, is not counted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dit.config import ConfigError
from dit.data.shards.manifest import Manifest
from dit.errors import Notice
from dit.experiments.diffusion import Experiment
from dit.model.cost import Cost
from dit.scaling.ablation.spec import AblationSpec
from dit.scaling.collecting import FILE, Collected, NothingMeasured, collect
from dit.scaling.plan import Plan
from dit.scaling.planning import in_names
from dit.scaling.study import as_run, lay_out, planned

FILES = ("ablation.png", "ablation.csv", "ablation.md", "ablation.json")
IDENTITY = {"kind": "ablation"}  # of its record; what a run is, its own folder says


@dataclass(frozen=True)
class Variant:
    """A change at a budget: what gets a rate of its own, and a line of the table."""

    change: str
    budget: float

    def run(self, lr: float, seed: int) -> str:
        """Name a run."""
        return f"{self.change}-c{in_names(self.budget)}-lr{lr:.6g}-s{seed}"


@dataclass(frozen=True)
class Rate:
    """The best rate of a variant, and whether it is at the end of several that were tried."""

    lr: float
    is_at_edge: bool = False


@dataclass(frozen=True)
class Ablation:
    """An ablation of a spec, in its folder."""

    spec: AblationSpec

    @property
    def out(self) -> Path:
        """Its folder."""
        return self.spec.folder

    @cached_property
    def configs(self) -> dict[str, Experiment]:
        """Each change's config. ConfigError where one is none."""
        return {name: self.spec.config(name) for name in self.spec.changes}

    @cached_property
    def manifest(self) -> Manifest:
        """Of the data, which are the same for all. DataError where they are not there."""
        return next(iter(self.configs.values())).data.open().manifest

    @property
    def variants(self) -> list[Variant]:
        """Every change at every budget."""
        return [Variant(name, budget) for budget in self.spec.budgets for name in self.spec.changes]

    def cost(self, variant: Variant) -> Cost:
        """What a sample costs with the change."""
        return self.configs[variant.change].cost(self.manifest)

    def evaluations(self, change: str) -> int | None:
        """Count calls of the network for an image; None where the solver chooses its steps."""
        cfg, shape = self.configs[change], (self.manifest.channels, *self.manifest.input_size)
        return cfg.evaluate.nfe(cfg.objective.path, cfg.objective.prediction, math.prod(shape))

    def warn_of_evaluations(self) -> None:
        """Give a Notice where images will be drawn in unlike numbers of evaluations, before anything is run."""
        if next(iter(self.configs.values())).evaluate.reference is None:
            return
        counts = {name: self.evaluations(name) for name in self.configs}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} with {name}" for name, count in counts.items())
            warnings.warn(
                f"images take unlike numbers of evaluations ({told}), and figures of those are not compared: take a "
                "solver of one evaluation a step, such as unipc",
                Notice,
                stacklevel=2,
            )

    def steps(self, variant: Variant) -> int:
        """Steps that come nearest to the budget. ConfigError where the warm-up alone would take it."""
        cfg = self.configs[variant.change]
        each = self.cost(variant).training_flops * cfg.train.global_batch
        steps = round(variant.budget / each)
        if steps <= cfg.optim.warmup:
            raise ConfigError(
                f"budgets: {variant.budget:g} FLOPs are {steps} steps of {variant.change} ({each:.3g} each), and "
                f"optim.warmup is {cfg.optim.warmup}: give more FLOPs"
            )
        return steps

    def config(self, variant: Variant, lr: float, seed: int) -> Experiment:
        """Give a run's configuration; on the seeds that are reported with figures of images, where there are any."""
        cfg = self.configs[variant.change]
        cfg = replace(cfg, train=replace(cfg.train, steps=self.steps(variant)))
        figures = seed in self.spec.seeds and cfg.evaluate.reference is not None
        return as_run(cfg, self.out, variant.run(lr, seed), seed=seed, lr=lr, figures=figures)

    def plan(self, runs: Sequence[tuple[Variant, float, int]]) -> Plan:
        """Write a configuration for each run, and give them. Raises as `lay_out`, and DataError."""
        made = {v.run(lr, seed): (v.change, self.config(v, lr, seed)) for v, lr, seed in runs}
        configs = {name: cfg for name, (_, cfg) in made.items()}
        plan = Plan(
            {}, [planned(name, size, cfg, self.manifest) for name, (size, cfg) in made.items()], (), ()
        )
        if configs:
            lay_out(self.out / FILES[-1], IDENTITY, configs, plan)
        return plan

    # --- two rounds ----------------------------------------------------------------------------------------

    def tuning(self, changes: Sequence[str] = ()) -> Plan:
        """Give the runs by which rates are chosen: none where there is one rate. changes: their names; none = all."""
        if not self.spec.is_tuned:
            return Plan({}, [], (), ())
        chosen = [v for v in self.variants if not changes or v.change in changes]
        return self.plan([(v, lr, self.spec.tune_seed) for v in chosen for lr in sorted(self.spec.lrs)])

    def rates(self) -> dict[Variant, Rate]:
        """Give each variant's best rate, by the held-out loss of its own objective on the tuning seed.

        A rate without one counts as too high; a variant without any is left out.
        """
        rates = sorted(self.spec.lrs)
        if not self.spec.is_tuned:
            return dict.fromkeys(self.variants, Rate(rates[0]))
        found: dict[Variant, Rate] = {}
        for variant in self.variants:
            plan = self.plan([(variant, lr, self.spec.tune_seed) for lr in rates])
            losses = {float(row["lr"]): float(row["loss"]) for row in rows_of(self.out, plan)}
            if losses:
                best = min(losses, key=lambda lr: losses[lr])
                found[variant] = Rate(best, best in (rates[0], rates[-1]))
        return found

    def report(self, rates: dict[Variant, Rate], changes: Sequence[str] = ()) -> Plan:
        """Give the runs of the seeds that are reported, each variant at its best rate."""
        chosen = {v: rate for v, rate in rates.items() if not changes or v.change in changes}
        return self.plan([(v, rate.lr, seed) for v, rate in chosen.items() for seed in self.spec.seeds])


def gathered(out: Path, plan: Plan, metric: str = FILE) -> Collected | None:
    """Give what `collect` does; None where no run has the figure."""
    try:
        return collect(out, plan, metric)
    except NothingMeasured:
        return None


def rows_of(out: Path, plan: Plan, metric: str = FILE) -> list[Mapping[str, Any]]:
    """Give the rows of what `collect` does, none where no run has the figure."""
    found = gathered(out, plan, metric)
    return [] if found is None else list(found.rows)
