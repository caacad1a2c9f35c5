"""Running an ablation: the rates, then the runs that are reported, then what is measured of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit.config import ConfigError, did_you_mean
from dit.errors import plural
from dit.progress import say
from dit.scaling.ablation.judged import found_of
from dit.scaling.ablation.study import Ablation, Rate, Variant
from dit.scaling.ablation.telling import write
from dit.scaling.ablation.velocity import measure_velocity
from dit.scaling.arrays import submit
from dit.scaling.configs import run_folder
from dit.scaling.plan import Plan
from dit.scaling.planned import aligned
from dit.scaling.running import Orders
from dit.scaling.states import RunState
from dit.scaling.study import run_rest

HEAD = ("change", "budget", "params", "FLOPs a sample", "steps", "samples")


@dataclass(frozen=True)
class Way:
    """How an ablation is run. orders: None = nothing is run. slurm: options of sbatch, to submit job arrays instead.

    changes: names of those that are run; none = all. tuned: whether rates are chosen among the runs that are complete,
    and no other is run for that.
    """

    orders: Orders | None
    slurm: str | None = None
    changes: Sequence[str] = ()
    tuned: bool = False


def run_ablation(ablation: Ablation, way: Way) -> str:
    """Run what is not complete, and write table, CSV, picture and record; give what is to be said.

    A run that fails is named, and counts as a rate that is too high, or is no part of the means. On a cluster each call
    submits the next round, where nothing is left of the one before. Raises ScalingError where nothing was measured,
    Stopped where a signal ended it: the same command goes on.
    """
    for name in way.changes:
        if name not in ablation.spec.changes:
            known = ablation.spec.changes
            raise ConfigError(
                f"there is no change {name}{did_you_mean(name, known)}; changes are {', '.join(known)}"
            )
    ablation.warn_of_evaluations()
    if not way.tuned and (waits := _round(ablation, way, ablation.tuning(way.changes), "rates")):
        return waits
    rates = ablation.rates()
    if waits := _round(ablation, way, ablation.report(rates, way.changes), "the runs that are reported"):
        return waits
    _measure(ablation, rates)
    return write(ablation, found_of(ablation, rates))


def _round(ablation: Ablation, way: Way, plan: Plan, what: str) -> str:
    """Run a round, or submit it: then what is waited for; "" where it is done."""
    left = [run for run in plan.runs if not RunState(ablation.out, run).is_complete]
    if not left or (way.orders is None and way.slurm is None):
        return ""
    if way.slurm is None:
        assert way.orders is not None
        run_rest(ablation.out, plan, way.orders)
        return ""
    submit(ablation.out, plan, way.slurm)
    return (
        f"{plural(len(left), 'run')} of {what} to go: give the same command when they have ended; with --tuned, rates "
        "are chosen among the runs that are complete"
    )


def _measure(ablation: Ablation, rates: dict[Variant, Rate]) -> None:
    """Take the velocity error of every run that is complete and lacks it."""
    for variant, rate in rates.items():
        for seed in ablation.spec.seeds:
            cfg = ablation.config(variant, rate.lr, seed)
            plan = ablation.plan([(variant, rate.lr, seed)])
            if RunState(ablation.out, plan.runs[0]).is_complete and measure_velocity(cfg, ablation.manifest):
                say(f"{run_folder(ablation.out, plan.runs[0].name).name}: velocity error measured")


def as_plan(ablation: Ablation) -> str:
    """Tell what will be run: each change's cost and steps, the number of runs, and all FLOPs. Writes nothing."""
    spec, rows = ablation.spec, []
    rates = len(spec.lrs) if spec.is_tuned else 0
    ablation.warn_of_evaluations()
    for variant in ablation.variants:
        cost, steps = ablation.cost(variant), ablation.steps(variant)
        samples = steps * ablation.configs[variant.change].train.global_batch
        rows.append(
            (
                variant.change,
                f"{variant.budget:.3g}",
                f"{cost.parameters.trainable:,}",
                f"{cost.training_flops:.4g}",
                f"{steps:,}",
                f"{samples:,}",
            )
        )
    each = rates + len(spec.seeds)
    total = each * sum(variant.budget for variant in ablation.variants)
    return "\n".join(
        [
            *aligned(HEAD, rows),
            "",
            f"{plural(each * len(rows), 'run')}: for each line {rates} to choose the rate and {len(spec.seeds)} that "
            f"are reported; {total:.3g} FLOPs in all, measurements not counted",
        ]
    )
