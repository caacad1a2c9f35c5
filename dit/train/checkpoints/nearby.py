"""Which runs lie below a folder: what to say to somebody who named the folder, or a run of another kind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEPTH = 3  # folders down
SHOWN = 12
KINDS = {  # section of the config -> what was trained
    "autoencoder": "an autoencoder, for --codec.path=RUN/vae",
    "classifier": "a classifier, for --guidance",
}
MODEL = "a model to draw from"
DIFFUSERS = ("model_index.json", "transformer/config.json")  # of which one lies in a folder of theirs


@dataclass(frozen=True)
class FoundRun:
    """A run directory. kind: what was trained in it, in words. step: of its newest checkpoint."""

    path: Path
    kind: str
    step: int

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}, step {self.step})"


def kind_of(config: Mapping[str, Any]) -> str:
    """What a run with this config trained, in words."""
    return next((words for section, words in KINDS.items() if section in config), MODEL)


def runs_below(folder: Path, depth: int = DEPTH) -> list[FoundRun]:
    """The run directories in a folder and up to `depth` below it, by name. What cannot be read is passed over."""
    found = []
    for path in _folders(folder, depth):
        steps = sorted((path / "checkpoints").glob("step-*/meta.json"), key=lambda meta: meta.parent.name)
        for meta in reversed(steps):
            try:
                values = json.loads(meta.read_bytes())
                found.append(FoundRun(path, kind_of(values["config"]), int(values["step"])))
                break
            except (OSError, ValueError, KeyError, TypeError):  # broken: an older one says as much
                continue
    return found


def _folders(folder: Path, depth: int) -> list[Path]:
    """A folder and those below it that may be runs; what is within a run is not looked through."""
    if (folder / "checkpoints").is_dir() or depth < 0:
        return [folder] if depth >= 0 else []
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []
    return [path for name in below for path in _folders(Path(name), depth - 1)]


def no_run(folder: Path) -> str:
    """What a folder without a checkpoint is, and what is to be done: the end of an error message."""
    if (folder / "config.yaml").is_file():
        return " yet: a run saves every checkpoint.every steps, at Ctrl-C and at its end; let it train until then"
    if (folder / "manifest.json").is_file():
        return ": it is a data set; expected the run directory of a model that was trained on it"
    return "; expected RUN/checkpoints/step-*/COMPLETE or one such directory"


def suggestion(folder: Path) -> str:
    """The end of an error message: which runs lie in a folder, or what makes one of it; empty where nothing does."""
    if any((folder / name).is_file() for name in DIFFUSERS):
        return (
            f". It is a folder of diffusers: python tools/convert.py diffusers {folder} RUN makes a run of it"
        )
    found = runs_below(folder)
    if not found:
        return ""
    more = [f"and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
    rows = [f"  {line}" for line in [*found[:SHOWN], *more]]
    return "\n".join([f"\nThere are runs in {folder}; give one of them:", *rows])
