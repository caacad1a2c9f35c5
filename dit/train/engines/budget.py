"""Which activations a run computes again, and at which stage it trains, to stay within a budget of bytes a rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from dit.model.cost import Memory
from dit.model.recompute import Recompute, ways
from dit.train.engines.zero_config import Choice, Device, ZeroConfig, choose


@dataclass(frozen=True)
class Budget:
    """What a run may fill. size: bytes a rank; blocks: of the network; memory: (stage, frozen numbers, way) -> what
    a rank holds."""

    size: int
    blocks: int
    memory: Callable[[int, int, Recompute], Memory]


@dataclass(frozen=True)
class Fitted:
    """What was chosen, and why in one line."""

    choice: Choice
    recompute: Recompute
    needed: int
    why: str

    def fits(self, size: int) -> bool:
        """Whether so many bytes are enough, as far as is predicted."""
        return self.needed <= size


def fit(zero: ZeroConfig, budget: Budget, frozen: int, device: Device, kept: int | None = None) -> Fitted:
    """Find the way with the least work done again that fits, at the stage that `choose` takes for it.

    Where none fits it is the one that needs least, which is said: no error, for the figures are a prediction.
    """
    least: Fitted | None = None
    for way in ways(budget.blocks):
        found = _fitted(zero, budget, frozen, replace(device, usable=budget.size), way, kept)
        if found.fits(budget.size):
            return found
        least = found if least is None or found.needed < least.needed else least
    assert least is not None  # there are ways
    return replace(least, why=f"{least.why}, which is MORE: take a smaller train.micro_batch, or more ranks")


def _fitted(
    zero: ZeroConfig, budget: Budget, frozen: int, device: Device, way: Recompute, kept: int | None
) -> Fitted:
    memory = partial(_memory, budget, frozen, way)
    choice = choose(zero, memory, device, kept)
    needed = zero.needs(memory(choice.stage), choice.stage, device)
    why = (
        f"train.memory_gb: {way.words(budget.blocks)}, at stage {choice.stage}: {needed / 1e9:.3g} GB of "
        f"{budget.size / 1e9:.3g} predicted, and {way.work(budget.blocks):.0%} of the forward pass done again"
    )
    return Fitted(choice, way, needed, why)


def _memory(budget: Budget, frozen: int, way: Recompute, stage: int) -> Memory:
    return budget.memory(stage, frozen, way)
