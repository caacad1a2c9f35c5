"""Rotary positions on a grid: pairs of a head's channels turn by an angle of the token's row and column.

Queries and keys turn alike, so that their product knows the distance between two tokens and not their places
(arXiv 2104.09864; in two dimensions 2403.13298).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.model.embed import wide


class Rope(ABC):
    """How a head's channels turn with the place of a token. Subclasses are `@config` classes."""

    def table(self, grid: tuple[int, int], head_width: int) -> Tensor:
        """(2, T, d/2) float64: cosines and sines of the angles of tokens row by row; ConfigError as `check`."""
        self.check(head_width)
        angles = self.angles(grid, head_width // 4)  # (T, d/2)
        return torch.stack([angles.cos(), angles.sin()])

    def check(self, head_width: int) -> None:
        """Refuse, by ConfigError, heads whose channels cannot be shared by rows and columns in pairs."""
        if head_width % 4:
            raise ConfigError(
                f"rotary positions need heads of a multiple of 4 channels (pairs for rows and for columns), got "
                f"{head_width}; choose width and heads so that width / heads is one"
            )

    @abstractmethod
    def angles(self, grid: tuple[int, int], frequencies: int) -> Tensor:
        """(T, 2·frequencies) float64, of the pairs in their order; T = rows · columns."""


ROPES: Registry[Rope] = Registry("rotary position", default="halves")


@ROPES.register("halves")
@config
class Halves(Rope):
    """The first half of a head turns with the row, the second with the column; positions are whole numbers."""

    base: Annotated[float, Field(gt=1)] = 10_000.0  # of the frequencies base^(-i/n)
    trained_rows: Annotated[int, Field(ge=1)] | None = (
        None  # rows in training: larger grids are pressed into as many
    )

    def angles(self, grid: tuple[int, int], frequencies: int) -> Tensor:
        """Row · frequency, then column · frequency."""
        press = 1.0 if self.trained_rows is None else self.trained_rows / max(grid)
        rows, columns = (torch.arange(n, dtype=torch.float64, device="cpu") * press for n in grid)
        return torch.cat(_outer(rows, columns, _frequencies(self.base, frequencies)), dim=-1)


@ROPES.register("alternating")
@config
class Alternating(Rope):
    """Pairs turn with the column and with the row in turn; positions run from 0 to `length` on any grid."""

    base: Annotated[float, Field(gt=1)] = 10_000.0  # of the frequencies base^(-i/n)
    length: Annotated[float, Field(gt=0)] = 16.0  # position of the last row and of the last column

    def angles(self, grid: tuple[int, int], frequencies: int) -> Tensor:
        """Column · frequency and row · frequency, for one frequency after the other."""
        rows, columns = (torch.linspace(0.0, self.length, n, dtype=torch.float64, device="cpu") for n in grid)
        down, across = _outer(rows, columns, _frequencies(self.base, frequencies))
        return rearrange([across, down], "two t f -> t (f two)")


def _frequencies(base: float, count: int) -> Tensor:
    """(count,) base^(-i/count), radians a unit of position."""
    return base ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)


def _outer(rows: Tensor, columns: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """(T, F) each: of every token row · frequency and column · frequency."""
    down, across = torch.meshgrid(rows, columns, indexing="ij")  # each (h, w)
    return tuple(place.reshape(-1, 1) * frequencies for place in (down, across))  # type: ignore[return-value]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels: x (B, heads, T, d), table (2, T, d/2) of cosines and sines -> like x.

    In at least float32, given back in x's dtype.
    """
    cos, sin = table.to(wide(x).dtype)  # each (T, d/2)
    even, odd = rearrange(wide(x), "b h t (f two) -> two b h t f", two=2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # (B, heads, T, d/2, 2)
    return turned.flatten(-2).to(x.dtype)
