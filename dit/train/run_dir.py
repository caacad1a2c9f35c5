"""The run directory: its config, what may change between starts, and what each start was."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from dit.config import ConfigError, flatten, from_dict, to_dict
from dit.configfile import read_own, write_yaml
from dit.errors import Notice, shown
from dit.files import lies_at, try_lock
from dit.outputs import refuse_other
from dit.ranks import group
from dit.ranks.group import World
from dit.scalars import resolved
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.settings import OPERATIONAL, RunConfig
from dit.version import code_version

CONFIG = "config.yaml"
HISTORY = "history.jsonl"
LOCK = ".lock"
PATIENCE = 30.0  # seconds to wait for a run directory whose job may be dying
NO_LOCK = (
    "{} lies on a file system without file locks: nothing keeps out a second job, and two would cut off each other's "
    "logs and checkpoints. Start one at a time, or give a run_dir on another file system (Lustre has locks where it is "
    "mounted with -o flock)"
)
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def begun_with(run_dir: Path) -> Mapping[str, Any] | None:
    """Read the plain values of the config that a run directory's run has: config.yaml, or else its newest checkpoint's.

    None where no run has begun there.
    """
    if (run_dir / CONFIG).is_file():
        return read_own(run_dir / CONFIG)
    for path in checkpoint.candidates(run_dir / "checkpoints"):
        with contextlib.suppress(CheckpointError):  # a broken one, which resuming names and passes over
            return dict(checkpoint.read(path, verify=False).meta["config"])
    return None


def stage_of(run_dir: Path, before: Mapping[str, Any] | None, unnamed: int) -> int | None:
    """Tell the ZeRO stage that a run has had: that of its last start, or what its configuration (`before`) names.

    unnamed: what a configuration without the key meant. None where no run has begun, or its stage is not known.
    """
    if before is None:
        return None
    history = run_dir / HISTORY
    for line in reversed(history.read_text(encoding="utf-8").splitlines() if history.is_file() else []):
        with contextlib.suppress(json.JSONDecodeError):  # a line that a kill has cut off tells nothing
            stage = json.loads(line).get("stage")
            if isinstance(stage, int):
                return stage
    stage = resolved(before.get("zero") or {}).get("stage", unnamed)
    return stage if isinstance(stage, int) else None


def settled(cfg: AnyConfig, before: Mapping[str, Any] | None) -> AnyConfig:
    """Decide what the config leaves open: as in `before`, what its run began with, or as in a new run (None).

    A run that began before a key existed goes on without what the key turns on.
    """
    if cfg.ema.warmup is not None:
        return cfg
    ema = {} if before is None else before.get("ema")
    held = ema.get("warmup") if isinstance(ema, Mapping) else None
    warmup = before is None or bool(
        resolved(held)
    )  # config.yaml's values are words still, and "false" is one
    return replace(cfg, ema=replace(cfg.ema, warmup=warmup))


def claim(cfg: RunConfig, world: World, facts: Mapping[str, Any] | None = None) -> Path:
    """Make the run directory, or check that what is there is this run. Collective.

    Raises ConfigError showing every identity key that differs. Operational changes are taken: config.yaml is
    rewritten and history.jsonl tells when and what. facts: what else the line about this start shall hold.
    """
    run_dir = cfg.folder

    def check_and_write() -> None:
        changes = compare(run_dir / CONFIG, cfg)
        run_dir.mkdir(parents=True, exist_ok=True)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "code": code_version(),
            "ranks": world.size,
            **(facts or {}),
        }
        with (run_dir / HISTORY).open(
            "a", encoding="utf-8"
        ) as file:  # first, so that no change goes unrecorded
            file.write(json.dumps({**start, "on": group.job_name(), "changes": changes}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        write_yaml(run_dir / CONFIG, cfg)

    group.on_main(check_and_write)
    return run_dir


@contextlib.contextmanager
def locked(run_dir: Path, world: World, patience: float | None = None) -> Iterator[None]:
    """Hold the run directory: two jobs in one would cut off each other's logs and checkpoints. Collective.

    patience: seconds to wait for a job that is still dying; None: PATIENCE. The lock goes with the process, however
    that ends. Where nothing else was written inside, a directory that was not there before is gone again afterwards.
    On a file system without locks it is on the user's word that it is alone, and a Notice says so.
    Raises ConfigError on every rank, with who holds it, and OutputError where it is no run's, but a data set, say; then
    nothing in the directory was touched.
    """
    seconds = PATIENCE if patience is None else patience
    with contextlib.ExitStack() as held:
        group.together(lambda: held.enter_context(_held(run_dir, seconds)) if world.is_main else None)
        yield


@contextlib.contextmanager
def _held(run_dir: Path, patience: float) -> Iterator[None]:
    """Hold the lock, on one rank."""
    refuse_other(run_dir, "run directory")
    made: list[Path] = []  # folders that were not there before, the inmost first
    with _wait_for(run_dir / LOCK, patience, made) as file:
        file.truncate(0)
        file.write(f"{group.job_name()}, process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            if made and [path.name for path in run_dir.iterdir()] == [LOCK]:
                (run_dir / LOCK).unlink()
                for folder in made:
                    with contextlib.suppress(OSError):  # somebody else has found a use for it
                        folder.rmdir()


def _wait_for(path: Path, patience: float, made: list[Path]) -> IO[str]:
    """Open and lock a file, once nobody else holds it; that somebody does is said at once. made: takes new folders."""
    end, is_said = time.monotonic() + patience, False
    while True:
        made += [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        is_mine = try_lock(file.fileno())
        if is_mine is None:
            warnings.warn(NO_LOCK.format(path.parent), Notice, stacklevel=2)
        if is_mine is not False:
            if lies_at(path, file.fileno()):
                return file
            file.close()  # its holder has removed it: what was locked is no file of the directory any more
            continue
        file.seek(0)
        holder = file.read().strip() or "which has not said yet who it is"
        file.close()
        in_use = f"{path.parent} is in use by another process ({holder})"
        if time.monotonic() > end:
            raise ConfigError(f"{in_use}; end that one, or choose another run_dir. Nothing of it was touched")
        if not is_said:
            is_said = True
            print(f"{in_use}: waiting up to {patience:.0f} s for its end", flush=True)
        time.sleep(0.2)


def compare(path: Path, cfg: RunConfig) -> dict[str, list[Any]]:
    """{operational key: [before, now]} against a config.yaml; ConfigError if an identity key differs."""
    if not path.is_file():
        return {}
    return differences(read_own(path), cfg, str(path.parent))


def differences(before: Mapping[str, Any], cfg: RunConfig, where: str) -> dict[str, list[Any]]:
    """{operational key: [before, now]} against a resolved config's values; ConfigError if an identity key differs.

    Keys that did not exist when `before` was written count as having had their defaults.
    """
    cfg = settled(cfg, before)
    try:
        before = to_dict(from_dict(type(cfg), before))
    except ConfigError:  # a key that exists no longer shows among the differing ones
        before = resolved(before)
    there, now = flatten(before), flatten(to_dict(cfg))
    there["ema.warmup"] = bool(there.get("ema.warmup"))  # not there, or null: from before it existed
    differing = {k: [there.get(k), now.get(k)] for k in sorted({*there, *now}) if there.get(k) != now.get(k)}
    fatal = {k: v for k, v in differing.items() if not is_operational(k)}
    if fatal:
        rows = "\n".join(f"  {k}: {shown(was)} there, {shown(is_)} now" for k, (was, is_) in fatal.items())
        raise ConfigError(
            f"{where} holds a run with another config:\n{rows}\n"
            "Give these keys their old values to go on with it, or another --run_dir to start a new run "
            "(init.from starts one from its weights)."
        )
    return differing


def is_operational(key: str) -> bool:
    """Whether a dotted key may change between starts of one run."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in OPERATIONAL)
