"""What checkpoints cost: the time that training stands still, writing, loading, beside a plain write of the bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit.bench.speed.turns import Contender, MedianRange, ratio, take_turns
from dit.config import ConfigError, config
from dit.ranks.group import World
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import State
from dit.train.checkpoints.saver import ALL, Saver
from dit.train.ema import Ema, EmaConfig
from dit.train.engines.local import LocalEngine
from dit.train.optim import OptimConfig

KINDS = 4  # weights, average, Adam's two moments: 16 bytes a parameter


@config
class SavingBench:
    """parameters: of the model, in matrices of width x width. repeats: turns of each contender."""

    parameters: int = 33_000_000  # of the model; S/2 has about as many
    width: int = 1024  # of the square matrices that hold them
    repeats: int = 5  # turns of each contender

    def __post_init__(self) -> None:
        if self.width < 1 or self.parameters < self.width**2 or self.repeats < 1:
            raise ConfigError(
                f"parameters ({self.parameters}) must fill a matrix of width x width ({self.width}), and repeats "
                f"({self.repeats}) be at least 1"
            )


class _SavingContenders:
    """The contenders, each of which handles all of a checkpoint's bytes in a turn."""

    def __init__(self, folder: Path, cfg: SavingBench):
        layers = [nn.Linear(cfg.width, cfg.width, bias=False) for _ in range(cfg.parameters // cfg.width**2)]
        module = nn.Sequential(*layers)
        engine = LocalEngine(module, OptimConfig(), World())
        self.state = State(engine.fragments(), Ema(engine, EmaConfig()).averages, module)
        self.folder, self.bytes = folder, KINDS * 4 * sum(p.numel() for p in module.parameters())
        self.saver = Saver(folder / "ours", ALL, World())
        self.block = torch.ones(4 << 20).numpy().data.cast("B")  # 16 MiB
        self.stalls: list[float] = []

    def plain(self, turn: int) -> int:
        """Write the bytes in one file, through to the disk."""
        path = self.folder / "plain"
        with path.open("wb") as file:
            for start in range(0, self.bytes, len(self.block)):
                file.write(self.block[: self.bytes - start])
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        return self.bytes

    def save(self, turn: int) -> int:
        """Write a checkpoint, as training has it written."""
        started = time.perf_counter()
        self.saver.begin(turn, self.state, {})
        self.stalls.append(time.perf_counter() - started)
        self.saver.wait()
        for old in range(turn):
            shutil.rmtree(checkpoint.path_of(self.saver.folder, old), ignore_errors=True)
        return self.bytes

    def load(self, turn: int) -> int:
        """Load the newest checkpoint, with its checksums."""
        found = checkpoint.latest(self.saver.folder)
        assert found is not None
        checkpoint.load_into(found, self.state)
        return self.bytes


def run(folder: Path, cfg: SavingBench, progress: Callable[[], object]) -> dict[str, Any]:
    """Measure the seconds of each, `save / plain write` and `stall / save`: medians and ranges over turns."""
    bench = _SavingContenders(folder, cfg)
    contenders = [
        Contender("plain write", bench.plain),
        Contender("save", bench.save),
        Contender("load", bench.load),
    ]
    found = take_turns(contenders, cfg.repeats, progress=progress)
    bench.saver.close()
    seconds = {name: [bench.bytes / rate for rate in figures.rate] for name, figures in found.items()}
    seconds["stall"] = bench.stalls[-cfg.repeats :]
    return {
        "bytes": bench.bytes,
        "seconds": {name: vars(MedianRange.of(values)) for name, values in seconds.items()},
        "save / plain write": vars(ratio(seconds["save"], seconds["plain write"])),
        "stall / save": vars(ratio(seconds["stall"], seconds["save"])),
    }


def turns(cfg: SavingBench) -> int:
    """Say how often `run` calls `progress`."""
    return 3 * (1 + cfg.repeats)
