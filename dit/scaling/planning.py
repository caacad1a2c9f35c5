"""From a spec to its plan: steps, batches, rates and costs, who branches from whom, and what cannot be run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator

from dit.config import ConfigError, to_dict
from dit.data import DataError
from dit.experiments.diffusion import Experiment
from dit.model.cost import Cost, cost
from dit.scaling.ladder import Rung, rungs
from dit.scaling.plan import BRANCH, TRUNK, LeftOut, Plan, PlannedRun, params_of
from dit.scaling.recipes import MOST, batch_at, lr_at
from dit.scaling.spec import DataShape, ScalingSpec, shared_config
from dit.train.optim import WarmupStableDecay


def decay_begins(steps: int, decay: float) -> int:
    """Give the last step whose weights are those of a longer run too: where branches part."""
    return WarmupStableDecay(decay=decay).stable(steps)


def make_plan(spec: ScalingSpec, trunks: Collection[str] = ()) -> Plan:
    """Work out every run of a spec. Raises ConfigError and DataError for what is wrong of all of them.

    trunks: names of runs that have begun as no branch, and so stay what others branch from, be they longer.
    """
    base = shared_config(spec)
    if not base.data.val:
        raise ConfigError(
            "training.data.val is not set: the law is fitted to the held-out loss; name a folder of held-out shards"
        )
    runs: list[PlannedRun] = []
    left_out: list[LeftOut] = []
    shape = data_shape(spec, base)
    for rung in rungs(spec.ladder):
        sized = _Sized(spec, rung, shape)
        seeds = dict.fromkeys(seed for point in spec.points for seed in spec.seeds_at(rung.name, point))
        for seed in seeds:
            found, lacking = _family(sized, seed, trunks)
            runs += found
            left_out += lacking
    if base.val.batches is not None and len({run.batch for run in runs}) > 1:
        raise ConfigError(
            f"training.val.batches = {base.val.batches}: batches are of several sizes here, so that runs would be "
            "measured on unlike held-out samples, which are not compared; give val.samples in its place"
        )
    if not runs:
        whys = "\n".join(f"  {one.name}: {one.why}" for one in left_out)
        raise ConfigError(f"no point of the experiment can be run:\n{whys}")
    return Plan(to_dict(spec), runs, left_out, spec.ladder.notes())


def data_shape(spec: ScalingSpec, base: Experiment) -> DataShape:
    """Give what the data are, as they say, or as the spec says where they are not there yet.

    Raises DataError where they are not there and the spec does not say, ConfigError where the two differ.
    """
    try:
        manifest = base.data.open().manifest
    except DataError as error:
        if spec.data is None:
            raise DataError(
                f"{error}\n(`data` of the spec says what they will be, for a plan alone)"
            ) from None
        return spec.data
    height, width = manifest.input_size
    if height != width:
        raise ConfigError(f"{base.data.name}: latents of {height}x{width} are not square, as a ladder's are")
    found = DataShape(
        input_size=height,
        channels=manifest.channels,
        classes=len(manifest.classes),
        samples=manifest.samples,
    )
    if spec.data is not None and spec.data != found:
        raise ConfigError(f"data: {to_dict(spec.data)} in the spec, {to_dict(found)} in {base.data.name}")
    return found


class _Sized:
    """A size with all that follows from it: its costs, batch and rate."""

    def __init__(self, spec: ScalingSpec, rung: Rung, shape: DataShape):
        self.spec, self.rung, self.shape = spec, rung, shape
        size = rung.size
        model = {"size": None, "width": size.width, "depth": size.depth, "heads": size.heads}
        base = shared_config(spec, {f"model.{key}": value for key, value in model.items()})
        self.cost: Cost = cost(base.model, shape.input_size, shape.channels, shape.classes)
        self.params = params_of(self.cost)
        self.experiment, self.optim = base, base.optim
        self.batch = batch_at(spec, self.params, base.train.global_batch)
        self.lr = lr_at(spec, self.params, base.optim.lr)

    def steps(self, point: float) -> int:
        """Steps that come nearest to a budget, or to so many samples over N."""
        samples = point / self.cost.training_flops if self.spec.budgets else point * self.params
        if samples > MOST:
            raise ConfigError(
                f"{point:g} {'FLOPs' if self.spec.budgets else 'samples over N'} are {samples:.3g} samples for "
                f"{self.rung.name}, more than can be counted: mend that number"
            )
        return round(samples / self.batch)

    def run(self, point: float, seed: int) -> PlannedRun:
        """Give the run of a point, as if it were alone."""
        name = f"{self.rung.name}-{_budget_name(self.spec, point)}-s{seed}"
        run = PlannedRun.alone(
            name, self.rung.name, self.cost, seed=seed, batch=self.batch, lr=self.lr, steps=self.steps(point),
            there_are=self.shape.samples,
        )  # fmt: skip
        return dataclasses.replace(run, budget=point, hours=self.hours(run.flops))

    def hours(self, flops: float) -> float:
        """Hours that so many FLOPs take on the devices of a run."""
        return flops / (self.spec.device.speed * self.spec.ranks) / 3600

    def why_not(self, run: PlannedRun) -> str | None:
        """Say why a run is left out, or None."""
        return next((why for why in self._complaints(run) if why is not None), None)

    def _complaints(self, run: PlannedRun) -> Iterator[str | None]:
        spec, ratio = self.spec, run.samples / run.params
        if spec.window is not None and not spec.window[0] <= ratio <= spec.window[1]:
            yield f"{ratio:.3g} samples a parameter, outside the window of {list(spec.window)}"
        if run.steps < spec.min_steps:
            yield f"{run.steps} steps of {run.batch} samples, fewer than min_steps = {spec.min_steps}"
        if spec.decay is not None and decay_begins(run.steps, spec.decay) <= self.optim.warmup:
            yield (
                f"its decay would begin at step {decay_begins(run.steps, spec.decay)}, and the warm-up takes "
                f"{self.optim.warmup}"
            )
        if spec.max_epochs is not None and run.epochs > spec.max_epochs:
            yield f"{run.epochs:.3g} epochs, more than max_epochs = {spec.max_epochs:g}"
        if run.batch > self.shape.samples:
            yield f"a batch of {run.batch} is more than the {self.shape.samples} samples there are"
        if run.batch % spec.ranks:
            yield f"a batch of {run.batch} cannot be shared by {spec.ranks} ranks"
        yield self._too_large(run)

    def _too_large(self, run: PlannedRun) -> str | None:
        limit, train, zero = self.spec.device.memory, self.experiment.train, self.experiment.zero
        if limit is None:
            return None
        local = max(1, run.batch // self.spec.ranks)
        stages = zero.possible if zero.stage == "auto" else (int(zero.stage),)
        needs = min(
            self.cost.memory(
                min(train.micro_batch or local, local),
                zero_stage=stage,
                world_size=self.spec.ranks,
                precision=train.precision,
                averages=self.experiment.ema.count,
            ).total
            for stage in stages
        )
        gib = needs / 2**30
        return f"needs {gib:.3g} GiB a rank, and device.memory is {limit:g}" if gib > limit else None


def _budget_name(spec: ScalingSpec, point: float) -> str:
    """As c4e11 of FLOPs, r20 of samples over N."""
    return ("c" if spec.budgets else "r") + in_names(point)


def in_names(number: float) -> str:
    """Write a number as names of runs have it: 4e11."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{number:.6g}")


def _family(sized: _Sized, seed: int, trunks: Collection[str]) -> tuple[list[PlannedRun], list[LeftOut]]:
    """The runs of one size and seed: first that which the others branch from, the longest if none has begun."""
    spec = sized.spec
    points = [point for point in spec.points if seed in spec.seeds_at(sized.rung.name, point)]
    runs: list[PlannedRun] = []
    left_out: list[LeftOut] = []
    for point in sorted(points, reverse=True):
        run = sized.run(point, seed)
        why = sized.why_not(run)
        same = next((other for other in runs if other.steps == run.steps), None)
        if why is None and same is not None:
            why = f"{run.steps} steps, as {same.name} has"
        if why is None:
            runs.append(run)
        else:
            left_out.append(LeftOut(run.name, why))
    if not spec.branching or len(runs) < 2:
        return runs, left_out
    trunk = next((run for run in runs if run.name in trunks), runs[0])
    others = [_branch(sized, run, trunk) for run in runs if run is not trunk]
    return [dataclasses.replace(trunk, kind=TRUNK), *others], left_out


def _branch(sized: _Sized, run: PlannedRun, trunk: PlannedRun) -> PlannedRun:
    assert sized.spec.decay is not None  # branching asks for it
    step = decay_begins(min(run.steps, trunk.steps), sized.spec.decay)  # behind its own decay it is no trunk
    own = float((run.steps - step) * run.batch * sized.cost.training_flops)
    return dataclasses.replace(
        run, kind=BRANCH, trunk=trunk.name, branch_step=step, own_flops=own, hours=sized.hours(own)
    )
