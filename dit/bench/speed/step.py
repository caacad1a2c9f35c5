"""Our whole training step at each ZeRO stage beside a plain DiT loop's (P2), and its share of the machine (P1).

A step of ours is what the training loop does between two batches: the draws, forward, backward, clipping, the check of
the gradients, AdamW, the average, the meters. Latents are synthetic and lie on the device. On a CPU all contenders
live in one process and take turns; on a GPU each is alone on it, one after the other, which is also what its peak of
memory is measured by, and where a batch does not fit it is taken in micro-batches of half the size.
docs/guarantees.md says what P1 and P2 bound.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dit.bench.speed.step_table import HEADER, closing, line
from dit.bench.speed.steppers import BareStep, OurStep, PlainStep, Setting, StepBench, Stepper
from dit.bench.speed.turns import Contender, MedianRange, TurnFigures, ratio, take_turns
from dit.config import ConfigError
from dit.ranks import group

PEAK = 990e12  # FLOP/s of dense bf16 products on an H100 or H200, which P1's MFU is stated against
PLAIN, PLAIN_COMPILED = "plain loop", "plain loop, compiled"
BARE_PLAIN, BARE_OURS = "plain, forward + backward", "ours, forward + backward"
LOCAL, GRAPH = "ours, no DeepSpeed", "ours, a CUDA graph"


@dataclass
class Report:
    """Takes what is found, as it is found. line: a row of the table. write: all figures so far. turn: one more."""

    line: Callable[[str], object] = lambda text: None
    write: Callable[[dict[str, Any]], object] = lambda figures: None
    turn: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Entry:
    """A contender to be. make: from a micro-batch's size. base: the name of the one it is compared with."""

    name: str
    make: Callable[[int], Stepper]
    base: str = PLAIN


@dataclass
class Bench:
    """What has been found in one setting. only: names of the contenders; empty = all."""

    setting: Setting
    only: frozenset[str] = frozenset()
    found: dict[str, TurnFigures] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    product: float = 0.0  # FLOP/s that a large matrix product reaches here, in the dtype of the step

    def __post_init__(self) -> None:
        self.cfg, self.device = self.setting.cfg, self.setting.device

    def entries(self) -> Iterator[Entry]:
        """The contenders: the plain loop first, which the others are compared with."""
        yield from (entry for entry in self._all() if not self.only or entry.name in self.only)

    def _all(self) -> Iterator[Entry]:
        yield Entry(PLAIN, partial(PlainStep, self.setting, compiled=False))
        if self.cfg.compile:
            yield Entry(PLAIN_COMPILED, partial(PlainStep, self.setting, compiled=True))
        for stage in self.cfg.stages:
            yield Entry(f"ours, stage {stage}", partial(OurStep, self.setting, stage=stage))
        yield Entry(LOCAL, partial(OurStep, self.setting, stage=None))
        if self.device.type == "cuda":
            yield Entry(GRAPH, partial(OurStep, self.setting, stage=None, graph=True))
        yield Entry(BARE_PLAIN, partial(BareStep, self.setting, is_ours=False), BARE_PLAIN)
        yield Entry(BARE_OURS, partial(BareStep, self.setting, is_ours=True), BARE_PLAIN)

    def figures(self) -> dict[str, Any]:
        """All that is known so far, as JSON values."""
        rows = {entry.name: self.row(entry) for entry in self.entries() if entry.name in self.found}
        return {
            "flops_per_image": self.setting.flops,
            "product_flops": self.product,
            "rows": rows,
            **self.deepspeed(),
            **self.straw_man(),
        }

    def row(self, entry: Entry) -> dict[str, Any]:
        """A contender's figures. quicker_*: of the baseline's time over its own, in the same turn."""
        mine, base = self.found[entry.name], self.found[entry.base]
        median = self.setting.flops / MedianRange.of(self._ms(mine)).median * 1e3
        made = {
            **self.about[entry.name],
            "images_per_s": vars(MedianRange.of(mine.rate)),
            "cpu_ms": vars(MedianRange.of([us / 1e3 for us in mine.cpu])),
            "quicker_cpu": vars(ratio(base.cpu, mine.cpu)),
            "quicker_wall": vars(ratio(mine.rate, base.rate)),
            "of_product": median / self.product,
        }
        if self.device.type == "cuda":
            made["mfu"] = median / PEAK
        compiled = self.found.get(PLAIN_COMPILED)
        if compiled is not None and entry.base == PLAIN:
            made["quicker_wall_than_compiled"] = vars(ratio(mine.rate, compiled.rate))
        return made

    def deepspeed(self) -> dict[str, Any]:
        """What DeepSpeed itself takes at each stage: ms an image above the same step without it, as `_ms` counts."""
        alone = self.found.get(LOCAL)
        if alone is None:
            return {}
        more = {}
        for stage in self.cfg.stages:
            its = self.found.get(f"ours, stage {stage}")
            if its is not None:
                pairs = zip(self._ms(its), self._ms(alone), strict=True)
                more[str(stage)] = vars(MedianRange.of([a - b for a, b in pairs]))
        return {"deepspeed_ms": more}

    def ceiling(self) -> str:
        """What there is to do, and how quickly this device could at most."""
        image, product = self.setting.flops / 1e9, self.product / 1e12
        return f"{image:.4g} GFLOP an image; a large product reaches {product:.4g} TFLOP/s"

    def straw_man(self) -> dict[str, Any]:
        """The plain model's bare forward and backward pass over ours, as `_ms` counts."""
        if BARE_OURS not in self.found:
            return {}
        plain, ours = self.found[BARE_PLAIN], self.found[BARE_OURS]
        return {"bare_plain_of_ours": vars(ratio(self._ms(plain), self._ms(ours)))}

    def _ms(self, its: TurnFigures) -> list[float]:
        """Milliseconds an image, of each turn: of CPU time on a CPU, whose other work then does not count."""
        if self.device.type == "cpu":
            return [us / 1e3 for us in its.cpu]
        return [1e3 / rate for rate in its.rate]


# --- measuring ---------------------------------------------------------------------------------------------


def run(cfg: StepBench, report: Report, only: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Measure {size: figures}, as JSON values; report gets each row, and all figures, as soon as they are known.

    only: the contenders' names, what they are compared with among them; empty = all.
    """
    figures: dict[str, Any] = {}
    with group.session() as world:
        for size in cfg.size:
            bench = Bench(Setting(cfg, size, world), only)
            bench.product = product_rate(world.device, cfg.precision)
            report.line(f"{size}/{cfg.patch}, batch {cfg.batch}, {cfg.precision}; {bench.ceiling()}")
            report.line(HEADER)

            def known(bench: Bench = bench, size: str = size) -> None:
                figures[size] = bench.figures()
                report.write(figures)

            (_one_by_one if world.device.type == "cuda" else _in_turns)(bench, report, known)
            report.line(closing(figures[size]))
    return figures


def turns(cfg: StepBench) -> int:
    """Say how often `run` calls `report.turn`."""
    contenders = 4 + cfg.compile + len(cfg.stages) + torch.cuda.is_available()
    return len(cfg.size) * (1 + cfg.repeats) * contenders


def _in_turns(bench: Bench, report: Report, known: Callable[[], None]) -> None:
    """All contenders together, in turns; what is known is handed on after every round."""
    contenders = [_turn(bench, entry.name, _built(bench, entry)) for entry in bench.entries()]

    def after_round(found: dict[str, TurnFigures]) -> None:
        bench.found = found
        known()

    take_turns(contenders, bench.cfg.repeats, progress=report.turn, after_round=after_round)
    for entry in bench.entries():
        report.line(line(entry.name, bench.row(entry)))


def _one_by_one(bench: Bench, report: Report, known: Callable[[], None]) -> None:
    """One contender after the other, alone on the device."""
    for entry in bench.entries():
        stepper = _built(bench, entry)
        turn = _turn(bench, entry.name, stepper)
        bench.found |= take_turns([turn], bench.cfg.repeats, progress=report.turn)
        bench.about[entry.name]["peak_bytes"] = torch.cuda.max_memory_allocated()
        stepper.close()
        del stepper, turn
        _clear(bench.device)
        known()
        report.line(line(entry.name, bench.row(entry)))


def _built(bench: Bench, entry: Entry) -> Stepper:
    """The contender, after its first steps. Where the GPU's memory is too small, in micro-batches of half the size."""
    cfg, micro = bench.cfg, bench.cfg.micro_batch or bench.cfg.batch
    stepper = _fitting(bench.device, entry, micro)
    while stepper is None and micro > 1 and cfg.micro_batch is None:
        micro = max(m for m in range(1, micro) if cfg.batch % m == 0)
        stepper = _fitting(bench.device, entry, micro)
    if stepper is None:
        raise ConfigError(f"{entry.name} does not fit in this device's memory with micro-batches of {micro}")
    bench.about[entry.name] = {"engine": stepper.about, "micro_batch": micro}
    return stepper


def _turn(bench: Bench, name: str, stepper: Stepper) -> Contender:
    """A turn of a contender's steps."""

    def run(turn: int) -> int:
        for _ in range(bench.cfg.steps):
            stepper.step()
        _wait(bench.device)
        return bench.cfg.steps * bench.cfg.batch

    return Contender(name, run)


def _fitting(device: torch.device, entry: Entry, micro: int) -> Stepper | None:
    """The contender, after the steps that show how much memory it takes; None where that ran out.

    Two of them: the optimizer's state is there from the first one's end. The peak of memory is counted from here.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stepper, fits = None, True
    try:
        stepper = entry.make(micro)
        for _ in range(2):
            stepper.step()
    except torch.cuda.OutOfMemoryError:
        fits = False
    if fits:
        return stepper
    if stepper is not None:
        stepper.close()
    del stepper
    _clear(device)  # not where the error is handled, which holds the frames that hold the tensors
    return None


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of the best of five rounds of a large square product, in the dtype of the step; a CPU's by CPU time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    size, rounds = (8192, 20) if device.type == "cuda" else (1024, 2)
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = clock()
        for _ in range(rounds):
            a @ a
        _wait(device)
        best = min(best, clock() - start)
    return 2 * rounds * size**3 / best
