"""The run directory: its config, what may change between starts, and what each start was."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from dit import dist
from dit.config import ConfigError, flatten, to_dict
from dit.configfile import write_yaml
from dit.dist import World
from dit.train.settings import OPERATIONAL, RunConfig

CONFIG = "config.yaml"


def claim(cfg: RunConfig, world: World) -> Path:
    """Make the run directory, or check that what is there is this run. Collective.

    Raises ConfigError showing every identity key that differs. Operational changes are taken: config.yaml is
    rewritten and history.jsonl tells when and what.
    """
    run_dir = Path(cfg.run_dir)

    def check_and_write() -> None:
        if not world.is_main:
            return
        changes = compare(run_dir / CONFIG, cfg)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_yaml(run_dir / CONFIG, cfg)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "code": dist.code_version(),
            "ranks": world.size,
        }
        with (run_dir / "history.jsonl").open("a") as file:
            file.write(json.dumps({**start, "on": dist.job_name(), "changes": changes}) + "\n")

    dist.together(check_and_write)
    return run_dir


def compare(path: Path, cfg: RunConfig) -> dict[str, list[Any]]:
    """{operational key: [before, now]} against a config.yaml; ConfigError if an identity key differs."""
    if not path.is_file():
        return {}
    before, now = flatten(yaml.safe_load(path.read_text())), flatten(to_dict(cfg))
    differing = {
        k: [before.get(k), now.get(k)] for k in sorted({*before, *now}) if before.get(k) != now.get(k)
    }
    fatal = {k: v for k, v in differing.items() if not is_operational(k)}
    if fatal:
        rows = "\n".join(f"  {k}: {was!r} there, {is_!r} now" for k, (was, is_) in fatal.items())
        raise ConfigError(
            f"{path.parent} holds a run with another config:\n{rows}\n"
            "Give these keys their old values to go on with it, or another --run_dir to start a new run "
            "(init.from starts one from its weights)."
        )
    return differing


def is_operational(key: str) -> bool:
    """Whether a dotted key may change between starts of one run."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in OPERATIONAL)
