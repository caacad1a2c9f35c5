"""The share of stateless draws in a training step: every number a step draws, beside its forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit.bench.speed.turns import Contender, MedianRange, ratio, take_turns
from dit.config import config, from_dict
from dit.flow.objective import Objective
from dit.model.dit import DiTConfig
from dit.ranks.group import World
from dit.rng import Draws, Purpose
from dit.train.engines.local import LocalEngine
from dit.train.optim import OptimConfig

LATENT = (4, 32, 32)
CLASSES = 1000


@config
class DrawsBench:
    """size: of the model. batch: samples a step. steps: of a turn. precision: fp32 or bf16 of the step."""

    size: str = "S"  # of the model: S, B, L, XL
    batch: int = 8  # samples a step
    steps: int = 2  # training steps a turn
    repeats: int = 5  # turns of each contender
    precision: str = "fp32"  # of the step: fp32 or bf16


class _DrawsContenders:
    def __init__(self, cfg: DrawsBench, device: torch.device):
        torch.manual_seed(0)
        module = from_dict(DiTConfig, {"size": cfg.size}).build(LATENT[1:], LATENT[0], CLASSES)
        self.engine = LocalEngine(module, OptimConfig(), World(), precision=cfg.precision)
        self.objective = Objective()
        self.cfg, self.device = cfg, device
        self.slots = torch.arange(cfg.batch, device=device)
        self.latents = torch.randn(cfg.batch, *LATENT, device=device)
        self.label = torch.arange(cfg.batch, device=device) % CLASSES

    def draws(self, step: int) -> Draws:
        return Draws(0, step, self.slots, self.cfg.batch)

    def draw(self, turn: int) -> int:
        """Draw posterior noise, view, t, eps, label drop and the fingerprint."""
        for step in range(self.cfg.steps):
            draws = self.draws(step)
            normals = [draws.normal(purpose, LATENT) for purpose in (Purpose.POSTERIOR, Purpose.EPS)]
            drop = draws.uniform(Purpose.DROP) < 0.1
            views = draws.integers(Purpose.VIEW, 2)
            draws.uniform(Purpose.TIME)
            marks = draws.fingerprint(self.label, views, drop)
            float(normals[-1][0, 0, 0, 0]), int(marks[0])  # wait for the device
        return self.cfg.steps

    def step(self, turn: int) -> int:
        """Go forward, backward and update, with the objective's own draws of t and eps."""
        for step in range(self.cfg.steps):
            drop = torch.zeros(self.cfg.batch, dtype=torch.bool, device=self.device)
            cond = {"label": self.label, "drop": drop}
            loss = self.objective.loss(self.engine, self.latents, cond, self.draws(step))
            self.engine.backward(loss.mean)
            self.engine.step(1e-4)
        return self.cfg.steps


def run(cfg: DrawsBench, progress: Callable[[], object]) -> dict[str, Any]:
    """Measure milliseconds a step of each, and `draws / step`: medians and ranges over turns."""
    bench = _DrawsContenders(cfg, World().device)
    found = take_turns(
        [Contender("draws", bench.draw), Contender("step", bench.step)], cfg.repeats, progress=progress
    )
    ms = {name: [1e3 / rate for rate in figures.rate] for name, figures in found.items()}
    return {
        "ms": {name: vars(MedianRange.of(values)) for name, values in ms.items()},
        "draws / step": vars(ratio(ms["draws"], ms["step"])),
    }


def turns(cfg: DrawsBench) -> int:
    """Say how often `run` calls `progress`."""
    return 2 * (1 + cfg.repeats)
