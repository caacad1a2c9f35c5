"""Small real training runs, and how to look at what they left."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit.config import from_dict, merge
from dit.data.loading.stream import Batch, Stream
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.ranks import group
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import Reader
from dit.train.plan import Plan
from dit.train.run import Run
from dit.train.start import build, train
from tests.datasets import Digits

STEPS, BATCH, LR = 20, 32, 2e-3
Values = dict[str, Any]
# How several ranks share a step: DeepSpeed at each ZeRO stage, and plain torch.
Engine = int | str
PLAIN: Engine = "plain"
ENGINES: tuple[Engine, ...] = (0, 1, 2, 3, PLAIN)


def engine_of(chosen: Engine) -> Values:
    """The sections of a run on an engine."""
    return {"engine": "plain"} if chosen == PLAIN else {"zero": {"stage": chosen}}


def values(digits: Digits, run_dir: Path, **sections: Any) -> Values:
    """A nano DiT on the digits' moments as a plain dictionary; sections (train={...}) are merged in."""
    base: Values = {
        "data": {"path": str(digits.moments), "lanes": 8},
        "run_dir": str(run_dir),
        "model": {"size": "nano"},
        "objective": {"times": "logit_normal"},
        "optim": {"lr": LR, "clip": 0.38, "weight_decay": 0.01, "warmup": 4, "schedule": "cosine"},
        "ema": {"decay": 0.9},
        "train": {
            "steps": STEPS,
            "global_batch": BATCH,
            "micro_batch": 8,
            "log_every": 1,
            "label_drop": 0.25,
        },
        "checkpoint": {"every": STEPS // 2, "keep": 0},
        "codec": {"name": "vae", "path": str(digits.vae)},
    }
    return merge(base, sections)


def experiment(given: Values) -> Experiment:
    return from_dict(Experiment, given)


def go(given: Values) -> None:
    """Train as tools/train.py does."""
    cfg = experiment(given)
    train(cfg, make_parts)


def go_until(given: Values, step: int, released: Path) -> None:
    """As `go`, in a process of its own; the data of this step (from 0) come once the file `released` is there.

    So on a busy machine too a run cannot end before what is to happen to it.
    """
    iterate = Stream.iterate

    def held(self: Stream, start: int, *rest: Any) -> Iterator[Batch]:
        for at, batch in enumerate(iterate(self, start, *rest), start):
            while at == step and not released.exists():
                time.sleep(0.01)
            yield batch

    Stream.iterate = held  # type: ignore[method-assign]
    go(given)


def built(given: Values) -> Run:
    """A run, in a session that is open already."""
    return build(Plan(experiment(given), make_parts, group.World.from_env()))


def random_run(digits: Digits, folder: Path) -> Path:
    """A run of two steps, both kept, whose weights were made random everywhere: nothing in a picture of it is 0."""
    go(values(digits, folder, engine="local", train={"steps": 2}, checkpoint={"every": 1}))

    def stir(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(len(tensors))
        for name in sorted(tensors):
            if name.startswith(("model/", "ema/")):
                tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator)

    for step in (1, 2):
        rewrite_tensors(at_step(folder, step), stir)
    return folder


# --- what a run left ---------------------------------------------------------------------------------------


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def column(run_dir: Path, name: str) -> list[Any]:
    """One figure at every logged step."""
    return [row[name] for row in metrics(run_dir)]


def at_step(run_dir: Path, step: int) -> Path:
    """The folder of a checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def forked(run: Path, step: int, folder: Path) -> Path:
    """A copy of a run as it was when a checkpoint had just been written."""
    shutil.copytree(run, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name > at_step(folder, step).name:
            shutil.rmtree(path)
    return folder


def state(folder: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint, whole: "model/blocks.0...", "ema/...", "exp_avg/..." (of trained parameters)."""
    there = checkpoint.read(folder)
    reader = Reader(there)
    held = {key for file in folder.glob("rank-*.safetensors") for key in load_file(file)}
    named = [(kind, name) for kind in there.kinds for name in reader.shapes if f"{kind}/{name}" in held]
    found = {f"{kind}/{name}": reader.whole(kind, name) for kind, name in named}
    return found | {f"buffer/{name}": b for name, b in reader.buffers().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- breaking checkpoints ----------------------------------------------------------------------------------


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda meta: None) -> None:
    """Change meta.json, and make it and every checksum in it fit what is there now."""
    meta = json.loads((folder / "meta.json").read_text())
    for entry in meta["files"]:
        data = (folder / entry["file"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    change(meta)
    text = json.dumps(meta, indent=1)
    (folder / "meta.json").write_text(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text.encode()).hexdigest())


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of each rank's file, validly signed."""
    for file in folder.glob("rank-*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    sign(folder)


def flip_bit(path: Path, offset: int = -5) -> None:
    """Alter one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
