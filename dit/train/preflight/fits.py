"""What of a run needs no machine to be looked at: whether its configuration, its data and its past fit together.

Each check is a function of the `Site`, as those in checks.py: collective, with what it found as text, and the same
error on every rank.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from dit.config import ConfigError
from dit.errors import Notice
from dit.ranks import group
from dit.train import branch as branches
from dit.train import run_dir
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import checkpoints_of
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, check_same_data
from dit.train.plan import Plan, fill
from dit.train.preflight.nodes import PreflightError, Site, existing
from dit.train.settings import CheckpointConfig, RunConfig


def config(site: Site) -> str:
    """The run directory is empty, or holds this run. ConfigError where it holds another one."""
    site.plan.look()
    cfg = site.cfg
    group.on_main(lambda: run_dir.compare(cfg.folder / run_dir.CONFIG, cfg))
    is_new = site.plan.before is None or site.plan.branch is not None
    return f"{cfg.run_dir} {'holds no run' if is_new else 'holds this run'}"


def order(site: Site) -> str:
    """Every step has samples: the batch is not larger than the data, and lanes and ranks divide it."""
    site.on_ranks(lambda: site.plan.stream)
    stream, train = site.plan.stream, site.cfg.train
    return f"{stream.steps_per_epoch} steps of {train.global_batch} samples an epoch"


def model(site: Site) -> str:
    """Model, objective, held-out data, the pictures' codec and guidance are there, and fit the data."""
    site.on_ranks(lambda: site.plan.outline)
    parts = site.plan.parts
    if parts.doubts and site.plan.before is None:
        raise ConfigError("\n".join(parts.doubts))
    for doubt in parts.doubts if site.world.is_main else ():
        warnings.warn(f"{doubt} This run goes on as it began.", Notice, stacklevel=2)
    return f"{site.plan.outline.parameters:,} parameters; {len(parts.hooks)} hook(s)"


def past(site: Site) -> str:
    """The newest checkpoint is of this configuration and these data. CheckpointError or ConfigError where not."""

    def look() -> str:
        found = newest(site.cfg.folder / "checkpoints")
        if found is None:
            return (
                "no checkpoint: begins at step 0" if site.plan.branch is None else "no checkpoint of its own"
            )
        run_dir.differences(found.meta["config"], site.cfg, str(found.path))
        check_same_data(found, site.plan.identity)
        _warn_of_missed(site.cfg, found.step)
        return f"goes on from {found.path}"

    return group.on_main(look)


def _warn_of_missed(cfg: RunConfig, step: int) -> None:
    """Say which steps of checkpoint.at the run has passed without saving them."""
    folder = checkpoints_of(cfg.folder)
    missed = [s for s in cfg.checkpoint.at if s < step and not checkpoint.path_of(folder, s).exists()]
    if missed:
        text = (
            f"checkpoint.at = {missed} is behind step {step}, where {cfg.run_dir} is, and was not saved there"
        )
        warnings.warn(text, Notice, stacklevel=2)


def branch(site: Site) -> str:
    """The checkpoint that init.branch names is one that this run would have come to. CheckpointError or ConfigError."""
    plan = site.plan
    return group.on_main(lambda: branches.check(plan.cfg, plan.identity, plan.branch))


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that looks whole; its tensors are verified when it is loaded."""
    for path in checkpoint.candidates(folder):
        try:
            return checkpoint.read(path, verify=False)
        except CheckpointError:  # named when the run resumes, which passes over it
            continue
    return None


def init(site: Site) -> str:
    """The weights that init.from names are there and fit the model. CheckpointError where not."""

    def look() -> str:
        source = site.plan.init
        if source is None:
            has_checkpoint = site.plan.has_checkpoint or site.plan.branch is not None
            return "the checkpoint's weights" if has_checkpoint else "the seed's weights"
        fill(site.plan.outline.module, source, source.outline(site.cfg.init.weights))
        return f"the {site.cfg.init.weights} weights of {source.checkpoint.path}"

    found: list[str] = []
    site.on_ranks(lambda: found.append(look()))
    return found[0]


def sharding(site: Site) -> str:
    """The ranks can be grouped as zero.* asks, and the engine runs on them."""

    def look() -> None:
        site.plan.check_engine()
        _ = site.plan.sharding

    site.on_ranks(look)
    if site.cfg.is_plain:
        return f"plain torch, nothing sharded{' (' + site.plan.sharding.why + ')' if site.plan.sharding.why else ''}"
    return site.plan.sharding.why or f"stage {site.plan.sharding.stage}"


def room(site: Site) -> str:
    """There is room on disk for the checkpoints. PreflightError where not even one fits."""
    return group.on_main(lambda: _room(site.plan))


def _room(plan: Plan) -> str:
    every = plan.outline.parameters
    return space(plan.cfg, every, every - plan.outline.frozen, plan.outline.matrices)


def space(cfg: RunConfig, parameters: int, trained: int, matrices: int = 0) -> str:
    """Room on disk for the checkpoints to come; called on one rank. parameters: numbers in them; trained: of them;
    matrices: of those, with one number of the optimizer's and not two.

    Raises PreflightError where not one fits, and warns where those that checkpoint.keep asks for do not.
    """
    run = cfg.folder.absolute()
    numbers = (1 + cfg.ema.count) * parameters + 2 * trained - matrices  # weights, averages; two moments
    size, free = 4 * numbers, shutil.disk_usage(existing(run)).free
    free += _left_over(run / "checkpoints")  # which goes before anything is written
    there = len([p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial"])
    wanted = max(1, held_at_most(cfg.checkpoint, cfg.train.steps) - there)
    told = f"{_bytes(free)} free in {existing(run)}, a checkpoint takes {_bytes(size)}"
    if free < size:
        raise PreflightError(f"{told}: free space, or choose another run_dir")
    if free < size * wanted:
        keep = f"checkpoint.keep = {cfg.checkpoint.keep}, keep_every = {cfg.checkpoint.keep_every}"
        warnings.warn(f"{told}: {free // size} fit, {wanted} are to come ({keep})", Notice, stacklevel=2)
    return f"{told}; {wanted} to come"


def _left_over(folder: Path) -> int:
    """Bytes of what a kill left of unfinished checkpoints."""
    return sum(f.stat().st_size for p in folder.glob("step-*.partial") for f in p.rglob("*") if f.is_file())


def held_at_most(saving: CheckpointConfig, steps: int) -> int:
    """Checkpoints of a run on disk at a time: a new one is there before the oldest goes."""
    at = {step for step in saving.at if step < steps}  # the last step is saved anyway
    saves = -(-steps // saving.every) + len([step for step in at if step % saving.every])
    for_good = steps // saving.keep_every if saving.keep_every else 0
    for_good += len([step for step in at if not saving.keep_every or step % saving.keep_every])
    return min(saves, saving.keep + 1 + for_good) if saving.keep else saves


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
