"""What studies of many ordinary runs share: a run's config, the plan on disk, and the running of what is left.

A study decides which runs there are; each is a whole config that tools/train.py takes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit.configfile import write_yaml
from dit.data.shards.manifest import Manifest
from dit.experiments.diffusion import Experiment
from dit.outputs import claim, write_record
from dit.progress import say
from dit.scaling.collecting import Collected
from dit.scaling.configs import config_file, run_folder
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planned import ScalingError, changed, other_data
from dit.scaling.running import Orders, RunsFailed, run_plan
from dit.scaling.states import LOGS


def as_run(
    cfg: Experiment, out: Path, name: str, *, seed: int, lr: float, figures: bool = False
) -> Experiment:
    """Give the config of one run of a study: measured at its last step, with one checkpoint kept and no pictures.

    figures: whether those of drawn images are taken at the last step.
    """
    return replace(
        cfg,
        run_dir=str(run_folder(out, name)),
        seed=seed,
        optim=replace(cfg.optim, lr=lr),
        val=replace(cfg.val, every=cfg.val.every or cfg.train.steps),
        checkpoint=replace(cfg.checkpoint, keep=1, keep_every=0),
        sample=replace(cfg.sample, every=0),
        evaluate=replace(cfg.evaluate, every=cfg.train.steps if figures else 0),
    )


def planned(name: str, size: str, cfg: Experiment, manifest: Manifest) -> PlannedRun:
    """Give a run of a study as the runner takes it."""
    return PlannedRun.alone(
        name, size, cfg.cost(manifest), seed=cfg.seed, batch=cfg.train.global_batch, lr=cfg.optim.lr,
        steps=cfg.train.steps, there_are=manifest.samples,
    )  # fmt: skip


def lay_out(record: Path, identity: Mapping[str, Any], configs: Mapping[str, Experiment], plan: Plan) -> None:
    """Write a study's record and a config for each run, beside the record.

    configs: by the names of the plan's runs. Raises OutputError where the record is another study's, ScalingError
    where a run has begun as another one than it would be now, or on other data.
    """
    out = record.parent
    claim([record], identity, record=record)
    problems = [line for run in plan.runs for line in changed(out, run, configs[run.name])]
    problems += other_data(out, plan, next(iter(configs.values())))
    if problems:
        raise ScalingError(
            f"{out} holds runs of another study:\n"
            + "\n".join(problems)
            + "\nRuns may be added to a study, not changed: give what they had, or another --out"
        )
    (out / "plan").mkdir(parents=True, exist_ok=True)
    for name, cfg in configs.items():
        write_yaml(config_file(out, name), cfg)
    if not record.exists():
        write_record(record, identity)


def run_rest(out: Path, plan: Plan, orders: Orders) -> None:
    """Run what is not complete; a run that fails is named, and the study goes on without it. Raises Stopped."""
    try:
        run_plan(out, plan, orders)
    except RunsFailed as error:
        say(str(error))


def told_missing(found: Collected, meaning: str) -> str:
    """Say which runs have no figure and why, and where more is; "" where all have one. meaning: what they count as."""
    if not found.missing:
        return ""
    failed = "; ".join(f"{name} ({why})" for name, why in found.missing.items())
    return f"Failed, and {meaning}: {failed}. Why is in {LOGS}/."
