"""Branches: a new run that begins as another one, its trunk, was at a saved step, and has an end of its own.

Where trunk and branch have the same configuration and the same learning rates up to that step, the branch is to the bit
the run that its configuration plans from its start: of one trunk on the plateau of `optim.schedule: wsd` many lengths
are had for their decays alone. What begins it is its own afterwards: the trunk may go on, be pruned or be gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit.config import ConfigError
from dit.errors import UserError
from dit.evals import record
from dit.files import expand, write_atomically
from dit.ranks import group
from dit.train import run_dir
from dit.train.checkpoints import checkpoint, linking
from dit.train.checkpoints.archive import checkpoints_of
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, check_same_data
from dit.train.engines.zero_config import BEFORE
from dit.train.rows import HELD_OUT, METRICS, logged, truncate
from dit.train.run_dir import HISTORY
from dit.train.settings import RunConfig
from dit.version import code_version

CURVES, SNAPSHOTS = "tensorboard", "snapshots"


# --- where it begins ---------------------------------------------------------------------------------------


def find(cfg: RunConfig) -> Checkpoint:
    """Find the checkpoint that init.branch names; of a run directory, the newest that the run fits.

    Its tensors are not verified. Raises CheckpointError where there is none, ConfigError where none fits.
    """
    path = Path(expand(str(cfg.init.branch)))
    if path.is_dir() and (path / "checkpoints").is_dir():
        return _newest_that_fits(cfg, path)
    whole = path.with_suffix("")
    if path.suffix == ".partial" or (not path.exists() and path.with_suffix(".partial").is_dir()):
        raise CheckpointError(
            f"init.branch: {whole} is being written, or was when its job ended: not yet one"
        )
    if path.is_file():
        raise CheckpointError(
            f"init.branch: {path} is a file, and a branch needs a whole checkpoint, with the optimizer's state: a run "
            "directory or RUN/checkpoints/step-*. init.from takes weights alone"
        )
    if not (path / "meta.json").is_file():
        return checkpoint.resolve(path)  # says what is missing
    return checkpoint.read(path, verify=False)


def _newest_that_fits(cfg: RunConfig, trunk: Path) -> Checkpoint:
    found = []
    for path in checkpoint.candidates(checkpoints_of(trunk)):
        with contextlib.suppress(CheckpointError):  # a broken one is passed over, as in resuming
            found.append(checkpoint.read(path, verify=False))
    if not found:
        return checkpoint.resolve(trunk)  # says that there is none, or what is broken
    run_dir.differences(found[0].meta["config"], cfg, str(found[0].path))
    for there in found:
        if _misfit(there, cfg) is None:
            return there
    raise ConfigError(
        f"init.branch: none of the {len(found)} checkpoint(s) of {trunk} is of a run of train.steps = "
        f"{cfg.train.steps}. Of the oldest: {_misfit(found[-1], cfg)}"
    )


def trunk_of(found: Checkpoint) -> Path | None:
    """Name the run directory that a checkpoint lies in; None where it lies elsewhere."""
    folder = found.path.absolute().parent
    return folder.parent if folder.name == checkpoints_of(folder).name else None


# --- whether it can ----------------------------------------------------------------------------------------


def check(cfg: RunConfig, identity: Mapping[str, Any], found: Checkpoint | None) -> str:
    """Refuse what would be no run of this configuration from its start; tells where it begins. On rank 0.

    found: where it begins, if that is known. Raises ConfigError or CheckpointError.
    """
    if cfg.init.branch is None:
        return "none"
    if checkpoint.exists(checkpoints_of(cfg.folder)):
        return f"{cfg.run_dir} goes on as the branch of {_own_beginning(cfg)['from']} that it is"
    found = found or find(cfg)
    there = found.meta["config"]
    if cfg.init.from_ is not None and there.get("init", {}).get("from") != cfg.init.from_:
        raise ConfigError(
            f"init.from = {cfg.init.from_} and init.branch = {cfg.init.branch} are two ways to begin: a branch has its "
            "trunk's weights. Leave one of them out"
        )
    run_dir.differences(there, cfg, str(found.path))
    misfit = _misfit(found, cfg)
    if misfit is not None:
        raise ConfigError(f"init.branch: {misfit}")
    check_same_data(found, identity)
    return f"begins as {found.path}, at step {found.step}"


def _misfit(found: Checkpoint, cfg: RunConfig) -> str | None:
    """Why a run of `cfg`, whose other keys are the checkpoint's, would not have come to that checkpoint; or None."""
    steps, before = cfg.train.steps, found.meta["config"]["train"]["steps"]
    if found.step > steps:
        return (
            f"{found.path} is of step {found.step}, and train.steps = {steps} ends before it: branch at an earlier "
            "step, or train longer"
        )
    differing = _unlike_plan(found, cfg, before) or _unlike_log(found, cfg)
    if differing is None:
        return None
    return (
        f"{found.path} is not what a run of train.steps = {steps} comes to from its start: {differing}. Branch at a "
        "step before the rates part (checkpoint.at saves one there), with a schedule whose beginning does not depend "
        "on train.steps (optim.schedule=wsd)"
    )


def _unlike_plan(found: Checkpoint, cfg: RunConfig, before: int) -> str | None:
    """The first update whose learning rate is another by the trunk's train.steps, `before`; None where none is."""
    optim, now = cfg.optim, cfg.train.steps
    for update in range(found.updates) if before != now else ():
        was, rate = optim.lr_at(update, before), optim.lr_at(update, now)
        if was != rate:
            said = f"the learning rate of update {update + 1} is {rate:.6g}"
            return f"{said}, and was {was:.6g} with train.steps = {before}"
    return None


def _unlike_log(found: Checkpoint, cfg: RunConfig) -> str | None:
    """The same by what the trunk has logged: it may have had yet another train.steps for a while."""
    trunk = trunk_of(found)
    for row in () if trunk is None else logged(trunk / METRICS):
        if not {"step", "lr", "updates"} <= row.keys() or row["step"] > found.step:
            continue
        rate = cfg.optim.lr_at(max(0, row["updates"] - 1), cfg.train.steps)
        if not math.isclose(row["lr"], rate, rel_tol=1e-9):
            return f"the learning rate at step {row['step']} is {rate:.6g}, and {trunk}/{METRICS} has {row['lr']:.6g}"
    return None


# --- beginning ---------------------------------------------------------------------------------------------


def begin(cfg: RunConfig, found: Checkpoint) -> None:
    """Make a run directory without a checkpoint what the trunk's was at that step. On rank 0, which holds it.

    The checkpoint comes last: after a kill in here the same command begins it once more. Raises CheckpointError.
    """
    checkpoint.read(found.path)  # every checksum, before anything is written
    folder, trunk = cfg.folder, trunk_of(found)
    folder.mkdir(parents=True, exist_ok=True)
    _write_history(cfg, found)
    if trunk is not None:
        _take_logs(trunk, folder, found.step)
        for path in checkpoint.candidates(trunk / SNAPSHOTS):
            if checkpoint.step_of(path) <= found.step:
                linking.take_over(checkpoint.read(path, verify=False), folder / SNAPSHOTS)
    linking.take_over(found, checkpoints_of(folder))


def _take_logs(trunk: Path, folder: Path, step: int) -> None:
    """Copy the logs, which are added to in place, up to a step; what another beginning has left goes."""
    for name in (METRICS, HELD_OUT):
        if (trunk / name).is_file():
            write_atomically(folder / name, (trunk / name).read_bytes())
            truncate(folder / name, step)
    measured = [row for row in record.read(trunk) if row["step"] <= step]
    if measured:
        text = "".join(json.dumps(row) + "\n" for row in measured)
        write_atomically(folder / record.FILE, text.encode())
    if (trunk / CURVES).is_dir():  # resuming has TensorBoard leave out what lies beyond the step
        shutil.rmtree(folder / CURVES, ignore_errors=True)
        shutil.copytree(trunk / CURVES, folder / CURVES)


def _write_history(cfg: RunConfig, found: Checkpoint) -> None:
    """Have history.jsonl tell where the run comes from, once."""
    if (_recorded(cfg.folder) or {}).get("digest") == found.digest:
        return
    trunk = trunk_of(found)
    stage = None if trunk is None else run_dir.stage_of(trunk, found.meta["config"], BEFORE)
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "code": code_version(),
        "on": group.job_name(),
        "branch": {"from": str(found.path.absolute()), "step": found.step, "digest": found.digest},
        **({} if stage is None else {"stage": stage}),
    }
    history = cfg.folder / HISTORY
    before = history.read_bytes() if history.is_file() else b""
    write_atomically(history, before + (json.dumps(line) + "\n").encode())


def _recorded(folder: Path) -> dict[str, Any] | None:
    """What history.jsonl tells of a run's beginning as a branch; None where it did not begin so."""
    history, began = folder / HISTORY, None
    for line in history.read_bytes().splitlines() if history.is_file() else ():
        with contextlib.suppress(ValueError):  # a line that a kill has cut off tells nothing
            began = json.loads(line).get("branch", began)
    return began


def _own_beginning(cfg: RunConfig) -> dict[str, Any]:
    """What a run that has a checkpoint began as. ConfigError where init.branch is not that."""
    began = _recorded(cfg.folder)
    if began is None:
        raise ConfigError(
            f"{cfg.run_dir} holds a run that did not begin as a branch, and init.branch = {cfg.init.branch} would "
            "begin another: leave init.branch out to go on with that run, or give another run_dir"
        )
    if _is_another(Path(expand(str(cfg.init.branch))), began):
        raise ConfigError(
            f"{cfg.run_dir} holds a branch of {began['from']}, and init.branch = {cfg.init.branch} is another: leave "
            "init.branch out to go on with that run, or give another run_dir"
        )
    return began


def _is_another(given: Path, began: Mapping[str, Any]) -> bool:
    """Whether a path is of another checkpoint than the one a run began with. What is gone by now is not."""
    if (given / "checkpoints").is_dir():
        given = checkpoint.path_of(checkpoints_of(given), began["step"])
    if checkpoint.NAME.fullmatch(given.name) and checkpoint.step_of(given) != began["step"]:
        return True
    with contextlib.suppress(UserError, OSError):
        return bool(checkpoint.read(given, verify=False).digest != began["digest"])
    return False
