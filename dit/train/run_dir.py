"""The run directory: its config, what may change between starts, and what each start was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

import yaml

from dit.config import ConfigError, flatten, from_dict, to_dict
from dit.configfile import write_yaml
from dit.ranks import group
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.settings import OPERATIONAL, RunConfig
from dit.version import code_version

CONFIG = "config.yaml"
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def begun_with(run_dir: Path) -> Mapping[str, Any] | None:
    """The plain values of the config that a run directory's run has, by config.yaml or else its newest checkpoint.

    None where no run has begun there.
    """
    if (run_dir / CONFIG).is_file():
        return yaml.safe_load((run_dir / CONFIG).read_text()) or {}
    for path in checkpoint.candidates(run_dir / "checkpoints"):
        with contextlib.suppress(CheckpointError):  # a broken one, which resuming names and passes over
            return dict(checkpoint.read(path, verify=False).meta["config"])
    return None


def settled(cfg: AnyConfig, before: Mapping[str, Any] | None) -> AnyConfig:
    """The config with what it leaves open decided: as in `before`, what its run began with, or as in a new run (None).

    A run that began before a key existed goes on without what the key turns on.
    """
    if cfg.ema.warmup is not None:
        return cfg
    warmup = True if before is None else bool((before.get("ema") or {}).get("warmup"))
    return replace(cfg, ema=replace(cfg.ema, warmup=warmup))


def claim(cfg: RunConfig, world: World, facts: Mapping[str, Any] | None = None) -> Path:
    """Make the run directory, or check that what is there is this run. Collective.

    Raises ConfigError showing every identity key that differs. Operational changes are taken: config.yaml is
    rewritten and history.jsonl tells when and what. facts: what else the line about this start shall hold.
    """
    run_dir = Path(cfg.run_dir)

    def check_and_write() -> None:
        changes = compare(run_dir / CONFIG, cfg)
        run_dir.mkdir(parents=True, exist_ok=True)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "code": code_version(),
            "ranks": world.size,
            **(facts or {}),
        }
        with (run_dir / "history.jsonl").open("a") as file:  # first, so that no change goes unrecorded
            file.write(json.dumps({**start, "on": group.job_name(), "changes": changes}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        write_yaml(run_dir / CONFIG, cfg)

    group.on_main(check_and_write)
    return run_dir


@contextlib.contextmanager
def locked(run_dir: Path, world: World, patience: float = 30.0) -> Iterator[None]:
    """Hold the run directory: two jobs in one would cut off each other's logs and checkpoints. Collective.

    patience: seconds to wait for a job that is still dying. The lock goes with the process, however it ends.
    """

    def hold() -> IO[str]:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("a+")
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    file.seek(0)
                    raise ConfigError(
                        f"{run_dir} is in use by another process ({file.read().strip()}); end that one, or choose "
                        "another run_dir"
                    ) from None
                time.sleep(0.2)
            else:
                file.truncate(0)
                file.write(f"{group.job_name()}, process {os.getpid()}")
                file.flush()
                return file

    held = group.together(lambda: hold() if world.is_main else None)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def compare(path: Path, cfg: RunConfig) -> dict[str, list[Any]]:
    """{operational key: [before, now]} against a config.yaml; ConfigError if an identity key differs."""
    if not path.is_file():
        return {}
    return differences(yaml.safe_load(path.read_text()) or {}, cfg, str(path.parent))


def differences(before: Mapping[str, Any], cfg: RunConfig, where: str) -> dict[str, list[Any]]:
    """{operational key: [before, now]} against a resolved config's values; ConfigError if an identity key differs.

    Keys that did not exist when `before` was written count as having had their defaults.
    """
    cfg = settled(cfg, before)
    with contextlib.suppress(ConfigError):  # a key that exists no longer shows among the differing ones
        before = to_dict(from_dict(type(cfg), before))
    there, now = flatten(before), flatten(to_dict(cfg))
    there["ema.warmup"] = bool(there.get("ema.warmup"))  # not there, or null: from before it existed
    differing = {k: [there.get(k), now.get(k)] for k in sorted({*there, *now}) if there.get(k) != now.get(k)}
    fatal = {k: v for k, v in differing.items() if not is_operational(k)}
    if fatal:
        rows = "\n".join(f"  {k}: {was!r} there, {is_!r} now" for k, (was, is_) in fatal.items())
        raise ConfigError(
            f"{where} holds a run with another config:\n{rows}\n"
            "Give these keys their old values to go on with it, or another --run_dir to start a new run "
            "(init.from starts one from its weights)."
        )
    return differing


def is_operational(key: str) -> bool:
    """Whether a dotted key may change between starts of one run."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in OPERATIONAL)
