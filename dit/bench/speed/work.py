"""How a training step's time grows with its work (P8): exponents of batch, tokens, width, depth and ranks.

Each axis is varied alone, from one base; the sizes of an axis take turns, so that a busy machine slows all of them. The
exponent is the slope of log time over log size by least squares: 1 is linear. A step has a part that does not grow (the
update, the draws), so the exponent of what grows is told besides: of time added for size added. The step is that which
`dit/bench/speed/step.py` times, on plain torch. Ranks are processes with gloo, each with a batch of its own, and their
time is CPU time of one of them: 0 is what ranks that cost each other nothing would have.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from dit.bench.speed.gloo import on_ranks
from dit.bench.speed.steppers import CHANNELS, CLASSES, SIDE, OurStep, Setting, StepBench
from dit.bench.speed.turns import Contender, MedianRange, take_turns
from dit.config import ConfigError, config, from_dict
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.ranks import group
from dit.ranks.group import World
from dit.train.engines.zero_config import Stage

AXES = ("batch", "tokens", "width", "depth")
RANKS = "ranks"
LINEAR = ("batch", "depth")  # what P8 asks to be linear
WITHIN = 0.15  # of 1, that such an exponent of growth may be off
HEAD = 32  # channels of a head


@config
class WorkBench:
    """Sizes. Each axis has sizes of its own; on the others the step has the base's. A turn is `steps` steps."""

    axes: tuple[str, ...] = AXES  # batch, tokens, width, depth
    base_batch: int = 8  # samples of the base step
    base_patch: int = 4  # latent pixels of a patch, on a side: 64 tokens of latents of 32 x 32
    base_width: int = 128  # channels of a token
    base_depth: int = 4  # blocks of the base model
    batch: tuple[int, ...] = (4, 8, 16, 32)  # samples a step
    patch: tuple[int, ...] = (8, 4, 2)  # latent pixels of a patch; tokens are 16, 64, 256
    width: tuple[int, ...] = (64, 128, 256)  # multiples of 32, a head's
    depth: tuple[int, ...] = (2, 4, 8, 16)  # blocks of the models that are compared
    ranks: tuple[int, ...] = (1, 2)  # processes; one alone, or a GPU: that axis is left out
    stage: Stage = 1  # of ZeRO, on the axis of ranks
    steps: int = 1  # training steps a turn
    repeats: int = 5  # turns of each size

    def __post_init__(self) -> None:
        if wrong := [axis for axis in self.axes if axis not in AXES]:
            raise ConfigError(f"axes are {', '.join(AXES)}, got {wrong[0]}")
        if min(self.steps, self.repeats) < 1:
            raise ConfigError("steps and repeats are at least 1")
        for axis in self.axes:
            if len(set(self.sizes(axis))) < 2:
                raise ConfigError(f"an exponent needs two sizes or more of {axis}")

    def sizes(self, axis: str) -> tuple[int, ...]:
        """Give the sizes of an axis, as the step's settings have them."""
        found: tuple[int, ...] = getattr(self, "patch" if axis == "tokens" else axis)
        return found

    def setting(self, axis: str, size: int, world: World) -> Setting:
        """Make the step's setting for one size of one axis."""
        at = {
            "batch": self.base_batch,
            "tokens": self.base_patch,
            "width": self.base_width,
            "depth": self.base_depth,
        }
        at[axis] = size
        bench = from_dict(StepBench, {"size": ["nano"], "patch": at["tokens"], "batch": at["batch"]})
        made = Setting(bench, "nano", world)
        made.model = DiTConfig(width=at["width"], depth=at["depth"], head_width=HEAD, patch=at["tokens"])
        return made


def turns(cfg: WorkBench) -> int:
    """Count the turns that `run` takes, with those that do not count."""
    return sum(len(cfg.sizes(axis)) for axis in cfg.axes) * (1 + cfg.repeats)


def run(cfg: WorkBench, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Measure each axis: {axis: {"sizes", "seconds", "flops", "exponent", "of_flops"}}, as JSON values.

    seconds: of CPU a step on a CPU, of the wall on a GPU. of_flops: the exponent of the step's FLOPs on the same axis.
    """
    with group.session() as world:
        found = {axis: _axis(cfg, axis, world, progress) for axis in cfg.axes}
    if len(set(cfg.ranks)) > 1 and not torch.cuda.is_available():
        found[RANKS] = _ranks(cfg)
    return found


def _ranks(cfg: WorkBench) -> dict[str, Any]:
    """The same of numbers of ranks: each a job of its own, for they cannot take turns."""
    seconds, flops = [], []
    for size in cfg.ranks:
        taken, count = on_ranks(size, _on_rank, cfg)
        seconds.append(taken)
        flops.append(count)
    by_turn = zip(*seconds, strict=True)
    return {
        "sizes": list(cfg.ranks),
        "seconds": [vars(MedianRange.of(each)) for each in seconds],
        "flops": flops,
        "exponent": vars(MedianRange.of([slope(cfg.ranks, row) for row in by_turn])),
        "of_flops": slope(cfg.ranks, flops),
    }


def _on_rank(world: World, cfg: WorkBench) -> tuple[list[float], int]:
    """CPU seconds a step of each turn, and the FLOPs of a rank's step."""
    setting = cfg.setting("batch", cfg.base_batch, world)
    stepper = OurStep(setting, cfg.base_batch, cfg.stage)
    found = take_turns([Contender(RANKS, _turn(stepper, cfg.steps))], cfg.repeats)[RANKS]
    stepper.close()
    return [us / 1e6 for us in found.cpu], _flops(setting)


def _axis(cfg: WorkBench, axis: str, world: World, progress: Callable[[], object]) -> dict[str, Any]:
    settings = [cfg.setting(axis, size, world) for size in cfg.sizes(axis)]
    steppers = [OurStep(one, one.cfg.batch, None) for one in settings]
    names = [str(size) for size in cfg.sizes(axis)]
    contenders = [
        Contender(name, _turn(stepper, cfg.steps)) for name, stepper in zip(names, steppers, strict=True)
    ]
    found = take_turns(contenders, cfg.repeats, progress=progress)
    is_cpu = world.device.type == "cpu"
    seconds = {
        name: [us / 1e6 for us in figures.cpu] if is_cpu else [1 / rate for rate in figures.rate]
        for name, figures in found.items()
    }
    for stepper in steppers:
        stepper.close()
    flops = [_flops(one) for one in settings]
    medians = [statistics.median(seconds[name]) for name in names]
    sizes = [(SIDE // size) ** 2 if axis == "tokens" else size for size in cfg.sizes(axis)]
    by_turn = [[seconds[name][turn] for name in names] for turn in range(cfg.repeats)]
    return {
        "sizes": sizes,
        "seconds": [vars(MedianRange.of(seconds[name])) for name in names],
        "flops": flops,
        "exponent": vars(MedianRange.of([slope(sizes, row) for row in by_turn])),
        "exponent_of_growth": growth(sizes, medians) if len(sizes) > 2 else None,
        "of_flops": slope(sizes, flops),
    }


def _turn(stepper: OurStep, steps: int) -> Callable[[int], int]:
    def turn(number: int) -> int:
        for _ in range(steps):
            stepper.step()
        if stepper.engine.device.type == "cuda":
            torch.cuda.synchronize(stepper.engine.device)
        return steps

    return turn


def _flops(setting: Setting) -> int:
    """Of a step: matrix products, forward and backward."""
    return setting.cfg.batch * cost(setting.model, SIDE, CHANNELS, CLASSES).training_flops


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the exponent p of value = c * size^p by least squares of the logarithms."""
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def growth(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the exponent p of value = a + c * size^p, whatever a is, from three sizes or more.

    By the slope p - 1 of what each step from a size to the next adds for a unit of size. NaN where one adds
    nothing.
    """
    pairs = sorted(zip(sizes, values, strict=True))
    middles = [math.sqrt(a * b) for (a, _), (b, _) in pairwise(pairs)]
    added = [(w - v) / (b - a) for (a, v), (b, w) in pairwise(pairs)]
    return 1 + slope(middles, added) if min(added) > 0 else math.nan


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Write the table: an axis each line, its exponent, and milliseconds at each size."""
    yield f"{'':8s} {'exponent of time':>24s} {'of growth':>9s} {'of FLOPs':>9s}  ms a step at each size"
    for axis, row in found.items():
        at = ", ".join(
            f"{size}: {1e3 * seconds['median']:.3g}"
            for size, seconds in zip(row["sizes"], row["seconds"], strict=True)
        )
        exponent = MedianRange(**row["exponent"])
        grown = row.get("exponent_of_growth")
        off = "  NOT LINEAR" if axis in LINEAR and grown is not None and not abs(grown - 1) <= WITHIN else ""
        growing = "-" if grown is None else f"{grown:.3f}"
        yield f"{axis:8s} {exponent!s:>24s} {growing:>9s} {row['of_flops']:9.3f}  {at}{off}"
