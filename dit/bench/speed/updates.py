"""What an update takes: clipping, optimizer and average alone, as time, and as bytes moved a second.

Each by itself and in one pass (optim.one_pass), over a model's parameters and over one flat tensor of as many numbers,
as a rank has of them at ZeRO stages 1 to 3; averaged every 8 updates; and with Muon. Gradients are given, and clipped
in every update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit.bench.speed.turns import Contender, MedianRange, take_turns
from dit.config import config, from_dict
from dit.model.dit import DiTConfig
from dit.ranks.group import World
from dit.train.ema import Ema, EmaConfig
from dit.train.engines.local import LocalEngine
from dit.train.optim import OptimConfig

LATENT, CLASSES = (4, 32, 32), 1000
NORM, FACTOR, ADAMW, AVERAGE, TOGETHER = 4, 8, 28, 12, 36  # bytes that are read and written, a number
CLIP = 1.0  # which the gradients' norm is far above, and then at: they are clipped in place, in every update


@config
class UpdatesBench:
    """Settings of the benchmark of updates."""

    size: str = "S"  # of the model: S, B, L, XL
    steps: int = 8  # updates of a turn: a multiple of 8, so that each has the same averages
    repeats: int = 5  # turns of each contender


@dataclass(frozen=True)
class Way:
    """A way to update: its name, the optimizer, how often it averages, whether all numbers are in one tensor.

    bytes: a number that have to be moved, the gradient's norm included; None where products of matrices count.
    """

    name: str
    optim: OptimConfig
    every: int
    is_flat: bool
    bytes: float | None


def ways() -> Iterator[Way]:
    """All ways; the first of each layout is what a run does by default."""
    plain, together = OptimConfig(clip=CLIP), OptimConfig(clip=CLIP, one_pass=True)
    for is_flat, where in ((False, "by parameter"), (True, "flat")):
        yield Way(f"each by itself, {where}", plain, 1, is_flat, NORM + FACTOR + ADAMW + AVERAGE)
        yield Way(f"in one pass, {where}", together, 1, is_flat, NORM + TOGETHER)
        rarely = (AVERAGE / 8, TOGETHER - (1 - 1 / 8) * 8)
        yield Way(f"each by itself, {where}, every 8", plain, 8, is_flat, NORM + FACTOR + ADAMW + rarely[0])
        yield Way(f"in one pass, {where}, every 8", together, 8, is_flat, NORM + rarely[1])
    yield Way("muon, by parameter", OptimConfig(clip=CLIP, name="muon"), 1, False, None)


class Flat(nn.Module):
    """As many numbers in one parameter."""

    def __init__(self, numbers: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numbers))


class Updates:
    """One way, on a device, with gradients that were drawn once."""

    def __init__(self, way: Way, cfg: UpdatesBench, world: World):
        torch.manual_seed(0)
        network: nn.Module = from_dict(DiTConfig, {"size": cfg.size}).build(LATENT[1:], LATENT[0], CLASSES)
        self.numbers = sum(p.numel() for p in network.parameters())
        module = Flat(self.numbers) if way.is_flat else network
        self.way, self.steps = way, cfg.steps
        self.engine = LocalEngine(module, way.optim, world)
        self.ema = Ema(self.engine, EmaConfig(warmup=True, every=way.every))
        self.gradients: list[Tensor] = [torch.randn_like(p) for p in module.parameters()]

    def run(self, turn: int) -> int:
        """Update `steps` times."""
        for _ in range(self.steps):
            for p, gradient in zip(self.engine.module.parameters(), self.gradients, strict=True):
                p.grad = gradient
            assert self.engine.step(1e-4)
            self.ema.update()
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return self.steps


def run(cfg: UpdatesBench, progress: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
    """Measure milliseconds and microseconds of CPU an update of each way, and gigabytes a second of what it must move.

    Each layout's ways take turns by themselves, for a GPU's memory.
    """
    rows: dict[str, dict[str, Any]] = {}
    for is_flat in (False, True):
        made = [Updates(way, cfg, World()) for way in ways() if way.is_flat == is_flat]
        contenders = [Contender(one.way.name, one.run) for one in made]
        found = take_turns(contenders, cfg.repeats, progress=progress)
        for one in made:
            figures, moved = found[one.way.name], one.way.bytes
            rows[one.way.name] = {
                "ms": vars(MedianRange.of([1e3 / rate for rate in figures.rate])),
                "cpu_ms": vars(MedianRange.of([cpu / 1e3 for cpu in figures.cpu])),
                "bytes": None if moved is None else moved * one.numbers,
                "gb_per_s": None
                if moved is None
                else vars(MedianRange.of([1e-9 * moved * one.numbers * rate for rate in figures.rate])),
            }
    return rows


def turns(cfg: UpdatesBench) -> int:
    """Say how often `run` calls `progress`."""
    return len(list(ways())) * (1 + cfg.repeats)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| update | ms | CPU ms | GB moved | GB/s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        moved = "" if row["bytes"] is None else f"{row['bytes'] / 1e9:.3g}"
        speed = "" if row["gb_per_s"] is None else str(MedianRange(**row["gb_per_s"]))
        ms, cpu = (MedianRange(**row[key]) for key in ("ms", "cpu_ms"))
        lines.append(f"| {name} | {ms} | {cpu} | {moved} | {speed} |")
    return "\n".join(lines)
