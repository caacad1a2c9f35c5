"""The training step at the batch that P1 is stated for: images a second, share of the peak, memory, and its loss."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit.bench.gpu.item import Found, Place
from dit.bench.gpu.measures import BATCH, precision
from dit.bench.sampling.images import stir
from dit.bench.speed.step import PEAK, product_rate
from dit.bench.speed.steppers import CHANNELS, CLASSES, SIDE, OurStep, Setting, StepBench
from dit.bench.speed.turns import Contender, MedianRange, take_turns
from dit.config import from_dict
from dit.model.cost import cost
from dit.model.dit import DiTConfig
from dit.ranks import group
from dit.rng import Draws
from dit.train.task import batch_samples, loss_of

USABLE = 0.92  # of a GPU's memory; the rest is for the context, fragments and work space of kernels
Tell = Callable[[dict[str, Any]], object]
CLOSE = {"bf16": 2e-2, "fp32": 1e-5}  # relative difference between the compiled loss and the eager one


def step(place: Place, size: str, *, is_whole: bool) -> Found:
    """P1: our compiled step without DeepSpeed. is_whole: 20 warm-up steps and 5 turns of 30; else 5 and 4 of 5."""
    with group.session() as world:
        amount, tell = WHOLE if is_whole else SHORT, _telling(place)
        figures = measured(place, size, amount, world, {}, tell)
    return Found(text_of(figures), figures)


def variants(place: Place, size: str, key: str, values: Sequence[Any], **more: Any) -> Found:
    """The same, short, for each value of a key of the step's bench, the first of which the others are compared with.

    more: other keys of the bench. A value whose step fails is recorded with its error, and the others go on.
    """
    rows: dict[str, Any] = {}

    def found() -> Found:
        rates = {name: row["images_per_s"]["median"] for name, row in rows.items() if "images_per_s" in row}
        first = next(iter(rates.values()), math.nan)
        told = [f"{key}={name} {rate:.4g} images/s ({rate / first:.3g} x)" for name, rate in rates.items()]
        told += [f"{key}={name} failed: {row['error']}" for name, row in rows.items() if "error" in row]
        return Found("; ".join(told), {"rows": rows})

    with group.session() as world:
        for value in values:
            try:
                rows[str(value)] = measured(place, size, SHORT, world, {**more, key: value})
            except (RuntimeError, ValueError) as error:
                rows[str(value)] = {"error": str(error).splitlines()[0][:300]}
            _clear(world.device)
            place.tell(found())
    if all("error" in row for row in rows.values()):
        raise RuntimeError(found().text)
    return found()


@dataclass(frozen=True)
class Amount:
    """How many steps are done before, and in how many turns of how many steps it is measured."""

    warmup: int
    turns: int
    steps: int


WHOLE, SHORT = Amount(20, 5, 30), Amount(5, 4, 5)


def measured(
    place: Place,
    size: str,
    amount: Amount,
    world: group.World,
    more: Mapping[str, Any],
    tell: Tell = lambda figures: None,
) -> dict[str, Any]:
    """The figures of one step, as JSON values. more: keys of the step's bench, over those of P1. tell: gets the speed.

    RuntimeError where the loss is not the eager one's.
    """
    how: dict[str, Any] = {
        "size": [place.pick(size, "nano")],
        "patch": place.pick(2, 8),
        "batch": place.pick(BATCH, 4),
        "precision": precision(place),
        "compile": True,
        "steps": place.pick(amount.steps, 1),
        "repeats": place.pick(amount.turns, 2),
        **more,
    }
    cfg, warmup = from_dict(StepBench, how), place.pick(amount.warmup, 2)
    product = product_rate(world.device, cfg.precision)
    setting = Setting(cfg, cfg.size[0], world)
    micro, stepper = _built(setting, place.pick(cfg.batch, 2))
    for _ in range(warmup - 1):  # one was done to see that it fits
        stepper.step()
    rate = MedianRange.of(_timed(stepper, cfg))
    flops = setting.flops * rate.median
    figures = {
        "protocol": how | {"warmup_steps": warmup, "micro_batch": micro, "engine": stepper.about},
        "images_per_s": asdict(rate),
        "step_ms": 1e3 * cfg.batch / rate.median,
        "flops_per_image": setting.flops,
        "mfu": flops / PEAK,
        "product_flops": product,
        "of_product": flops / product,
        "predicted_bytes": predicted(cfg, micro),
        **_peak(world.device),
    }
    tell(figures)
    figures |= losses(stepper, micro, cfg.precision)
    stepper.close()
    return figures


def _telling(place: Place) -> Tell:
    return lambda figures: place.tell(Found(text_of(figures), dict(figures)))


def text_of(figures: dict[str, Any]) -> str:
    """The figures of one step in a line."""
    rate, peak = MedianRange(**figures["images_per_s"]), figures.get("peak_bytes")
    memory = "" if peak is None else f", peak {peak / 2**30:.1f} GiB"
    gap = figures.get("loss_gap")
    loss = "" if gap is None else f", loss {figures['loss']:.4g}, off the eager one by {gap:.1e}"
    return (
        f"{rate} images/s, MFU {figures['mfu']:.1%}, {figures['of_product']:.1%} of a product"
        f"{memory}, micro-batch {figures['protocol']['micro_batch']}{loss}"
    )


def predicted(cfg: StepBench, micro: int) -> int:
    """Bytes that a step takes by the cost model, for eager execution."""
    model = DiTConfig(size=cfg.size[0], patch=cfg.patch)
    return cost(model, SIDE, CHANNELS, CLASSES).memory(micro, precision=cfg.precision).total


def _built(setting: Setting, most: int) -> tuple[int, OurStep]:
    """The largest micro-batch that fits by the cost model, or half of it and so on, and a stepper that did a step."""
    cfg, device = setting.cfg, setting.device
    sizes = [micro for micro in range(most, 0, -1) if cfg.batch % micro == 0]
    if device.type == "cuda":
        usable = USABLE * torch.cuda.mem_get_info(device)[1]
        sizes = [micro for micro in sizes if predicted(cfg, micro) <= usable] or sizes[-1:]
    for micro in sizes:
        stepper = _fitting(setting, micro)
        if stepper is not None:
            return micro, stepper
    raise RuntimeError(f"{cfg.size[0]} does not fit in this device's memory with a micro-batch of 1")


def _fitting(setting: Setting, micro: int) -> OurStep | None:
    """A stepper after its first step; None where the memory ran out."""
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    stepper = None
    try:
        stepper = OurStep(setting, micro, None)
        stir(stepper.engine.module)
        stepper.step()
    except torch.cuda.OutOfMemoryError:
        stepper = None
    if stepper is None:  # not where the error is handled, which holds the frames that hold the tensors
        _clear(setting.device)
    return stepper


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(stepper: OurStep, cfg: StepBench) -> list[float]:
    """Images a second, a turn each, by the wall clock from an idle device to an idle device."""

    def run(turn: int) -> int:
        for _ in range(cfg.steps):
            stepper.step()
        if stepper.engine.device.type == "cuda":
            torch.cuda.synchronize(stepper.engine.device)
        return cfg.steps * cfg.batch

    if stepper.engine.device.type == "cuda":
        torch.cuda.synchronize(stepper.engine.device)
    return take_turns([Contender("step", run)], cfg.repeats, warmup=0)["step"].rate


def _peak(device: torch.device) -> dict[str, int]:
    return {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def losses(stepper: OurStep, micro: int, how: str) -> dict[str, Any]:
    """The loss of one micro-batch by the compiled network, and its distance to the eager one's, of the same weights.

    RuntimeError where it is not finite or further from it than CLOSE.
    """
    draws = Draws(0, stepper.number, stepper.batch.slots, len(stepper.batch.slots))
    samples, _ = batch_samples(stepper.batch, stepper.task, draws, stepper.engine.device)
    (first, *_) = samples.micro_batches(micro)

    def loss() -> float:
        found: Tensor = loss_of(stepper.task, stepper.engine, first).mean
        return float(found.detach())

    compiled = loss()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        eager = loss()
    gap = abs(compiled - eager) / abs(eager) if eager else math.inf
    if not (math.isfinite(compiled) and gap <= CLOSE[how]):
        raise RuntimeError(f"the compiled network's loss is {compiled}, the eager one's {eager}")
    return {"loss": compiled, "loss_eager": eager, "loss_gap": gap}
