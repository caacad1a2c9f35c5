"""How the condition reaches a block: rows of shifts, scales and gates, from layers that start at zero (adaLN-Zero).

A block's own linear layer makes them (arXiv 2212.09748), or one layer of the whole network does, to which each block
adds a table (adaLN-single, arXiv 2310.00426) or a product of low rank (adaLN-LoRA, arXiv 2501.03575, section 5.1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from dit.config import Registry, config
from dit.model.embed import wide
from dit.model.stacked import stacked


@dataclass(frozen=True)
class ModulationCost:
    """What modulation costs: of one block, and of the layer that all share."""

    parameters: int
    linear_parameters: int  # those of them that autocast copies to half precision
    multiply_adds: int  # an image
    shared_parameters: int = 0
    shared_multiply_adds: int = 0


class Modulation(ABC):
    """A way to make `rows` rows of D numbers from the condition: builds it and knows its cost."""

    is_shared = False  # whether the network has one layer (B, D) -> (B, rows·D) whose output every block gets

    @abstractmethod
    def build(self, width: int, rows: int) -> nn.Module:
        """A block's part: (c (..., D), shared (..., rows·D) or None) -> (..., rows·D), with `zero_layers()`."""

    @abstractmethod
    def cost(self, width: int, rows: int) -> ModulationCost:
        """Its cost."""


MODULATIONS: Registry[Modulation] = Registry("modulation")


@MODULATIONS.register("full")
@config
class FullModulation(Modulation):
    """A linear layer in each block: a third of a DiT's weights."""

    def build(self, width: int, rows: int) -> nn.Module:
        """The layer."""
        return stacked(FullRows(width, rows * width), rows)

    def cost(self, width: int, rows: int) -> ModulationCost:
        """A matrix and a bias."""
        numbers = (width + 1) * rows * width
        return ModulationCost(numbers, numbers, rows * width * width)


@MODULATIONS.register("single")
@config
class SingleModulation(Modulation):
    """One linear layer for all blocks, and a table of its own in each (adaLN-single)."""

    is_shared = True

    def build(self, width: int, rows: int) -> nn.Module:
        """The table."""
        return TableRows(width, rows)

    def cost(self, width: int, rows: int) -> ModulationCost:
        """A row each; the shared layer once."""
        return ModulationCost(rows * width, 0, 0, (width + 1) * rows * width, rows * width * width)


@MODULATIONS.register("lora")
@config
class LowRankModulation(Modulation):
    """One linear layer for all blocks, and a product of two thin matrices in each (adaLN-LoRA)."""

    rank: Annotated[int, Field(ge=1)] = 256  # of the two matrices' product
    is_shared = True

    def build(self, width: int, rows: int) -> nn.Module:
        """The two matrices."""
        return LowRankRows(width, rows, self.rank)

    def cost(self, width: int, rows: int) -> ModulationCost:
        """Two thin matrices; the shared layer once."""
        numbers = (1 + rows) * width * self.rank
        shared = (width + 1) * rows * width
        return ModulationCost(numbers, numbers, numbers, shared, rows * width * width)


class FullRows(nn.Linear):
    """A linear layer that starts at zero."""

    def zero_layers(self) -> list[nn.Module]:
        """Itself."""
        return [self]

    def forward(self, c: Tensor, shared: Tensor | None = None) -> Tensor:
        """c (..., D) -> (..., rows·D); nothing is shared."""
        return super().forward(c.to(self.weight.dtype))


class TableRows(nn.Module):
    """What is shared, and a table."""

    def __init__(self, width: int, rows: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(rows * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero."""
        nn.init.zeros_(self.table)

    def zero_layers(self) -> list[nn.Module]:
        """Itself."""
        return [self]

    def forward(self, c: Tensor, shared: Tensor | None = None) -> Tensor:
        """shared (..., rows·D) -> (..., rows·D)."""
        return wide(cast(Tensor, shared)) + self.table


class LowRankRows(nn.Module):
    """What is shared, and up(down(c)); `up` starts at zero."""

    def __init__(self, width: int, rows: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, rows * width, bias=False)

    def zero_layers(self) -> list[nn.Module]:
        """The second matrix."""
        return [self.up]

    def forward(self, c: Tensor, shared: Tensor | None = None) -> Tensor:
        """c (..., D), shared (..., rows·D) -> (..., rows·D)."""
        return wide(cast(Tensor, shared)) + wide(self.up(self.down(c.to(self.down.weight.dtype))))


def cut(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, count·D) or, a token its own, (B, T, count·D) -> `count` tensors (B, 1 or T, D) in at least float32.

    1 + scale must not be rounded to bfloat16.
    """
    full = wide(rows)
    return (full.unsqueeze(1) if full.ndim == 2 else full).chunk(count, dim=-1)


def modulate(normed: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """normed·(1 + scale) + shift: (B, T, D) with (B, 1 or T, D)."""
    return normed * (1 + scale) if shift is None else torch.addcmul(shift, normed, 1 + scale)
