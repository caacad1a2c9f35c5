"""The training config of each run of a plan, whole: `tools/train.py` takes it alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dit.config import flatten, to_dict
from dit.experiments.diffusion import Experiment
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planning import decay_begins
from dit.scaling.spec import ScalingSpec, shared_config
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import checkpoints_of

RUNS = "runs"  # folder of the runs' directories


def run_folder(out: Path, name: str) -> Path:
    """Name a run's directory."""
    return out / RUNS / name


def config_file(out: Path, name: str) -> Path:
    """Name the file of a run's config."""
    return out / "plan" / f"{name}.yaml"


def branch_point(out: Path, run: PlannedRun) -> Path:
    """Name the checkpoint that a branch begins from."""
    assert run.trunk is not None
    assert run.branch_step is not None
    return checkpoint.path_of(checkpoints_of(run_folder(out, run.trunk)), run.branch_step)


def _branch_steps(spec: ScalingSpec, plan: Plan, run: PlannedRun) -> list[int]:
    """The steps of a run that others branch from, or will where the experiment gets longer runs: before its decay."""
    steps = {branch.branch_step for branch in plan.branches(run.name)}
    if spec.branching and spec.decay is not None and run.trunk is None:
        steps.add(decay_begins(run.steps, spec.decay))
    return sorted(step for step in steps if step is not None)


def run_config(spec: ScalingSpec, plan: Plan, run: PlannedRun) -> Experiment:
    """Give a run's config. Raises ConfigError where the rules make a wrong one."""
    base, out = shared_config(spec), Path(spec.out)
    keys: dict[str, Any] = {
        "run_dir": str(run_folder(out, run.name)),
        "seed": run.seed,
        "model.size": None,
        "model.width": run.width,
        "model.depth": run.depth,
        "model.heads": run.heads,
        "train.steps": run.steps,
        "train.global_batch": run.batch,
        "optim.lr": run.lr,
        "val.every": base.val.every or run.steps,  # at the last step in any case
        "checkpoint.at": _branch_steps(spec, plan, run),
    }
    for rule in (spec.batch, spec.lr):
        keys |= {} if rule is None else rule.overrides()
    if spec.decay is not None:
        keys["optim.schedule"] = {"name": "wsd", "decay": spec.decay}
    if run.trunk is not None:
        keys["init.branch"] = str(branch_point(out, run))
    return shared_config(spec, keys)


def overridden(spec: ScalingSpec, configs: Iterable[Experiment]) -> list[str]:
    """Name the keys that `training` itself sets, its base apart, and some run has otherwise, for the plan decides them.

    Not val.every, which runs without it have at their last step in any case.
    """
    given = flatten({key: value for key, value in spec.training.items() if key != "base"})
    shared, runs = flatten(to_dict(shared_config(spec))), [flatten(to_dict(cfg)) for cfg in configs]
    differ = {key for run in runs for key in {*run, *shared} if run.get(key) != shared.get(key)} - {
        "val.every"
    }
    return [key for key in given if any(other == key or other.startswith(f"{key}.") for other in differ)]
