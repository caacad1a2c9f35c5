"""The MLP of a block: two linear layers with GELU between them, or a gated pair (SwiGLU)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from dit.config import Registry, config
from dit.model.dims import Dims
from dit.model.kernels.activation import GELU, SWIGLU
from dit.model.kernels.choice import Kerneled
from dit.model.stacked import stacked


@dataclass(frozen=True)
class MlpCost:
    """What one MLP costs."""

    parameters: int
    multiply_adds: int  # a token
    saved: int  # numbers kept for the backward pass, a token, in the dtype of the matrix products
    products: int  # those of them that its matrix products give out


class MlpConfig(ABC):
    """A kind of MLP: builds it and knows its cost."""

    @abstractmethod
    def build(self, dims: Dims) -> nn.Module:
        """An MLP: (B, T, D) -> (B, T, D)."""

    @abstractmethod
    def cost(self, dims: Dims) -> MlpCost:
        """The cost of one."""


MLPS: Registry[MlpConfig] = Registry("mlp")


@MLPS.register("gelu")
@config
class GeluMlp(MlpConfig):
    """Linear, GELU in its tanh form (arXiv 1606.08415), linear; of `mlp_ratio` times the width."""

    bias: bool = True  # learn biases of both layers

    def build(self, dims: Dims) -> nn.Module:
        """The MLP for these shapes."""
        return Mlp(dims.width, dims.mlp_width, self.bias)

    def cost(self, dims: Dims) -> MlpCost:
        """Weights d·m twice; kept are the input, GELU's input and output, and what comes out."""
        d, m = dims.width, dims.mlp_width
        return MlpCost(2 * d * m + (m + d) * self.bias, 2 * d * m, 2 * d + 2 * m, d + m)


@MLPS.register("swiglu")
@config
class SwiGluMlp(MlpConfig):
    """SiLU of one linear layer gates another, then linear (arXiv 2002.05202, section 2): as many weights as GELU's."""

    bias: bool = True  # learn biases of all layers
    hidden: Annotated[int, Field(ge=1)] | None = (
        None  # width of the gate; null = 2/3 of mlp_ratio times the width
    )

    def build(self, dims: Dims) -> nn.Module:
        """The MLP for these shapes."""
        return SwiGlu(dims.width, self._hidden(dims), self.bias)

    def cost(self, dims: Dims) -> MlpCost:
        """Weights d·h three times; kept are the input, gate and value, the gate's SiLU, its product, what comes out."""
        d, h = dims.width, self._hidden(dims)
        return MlpCost(3 * d * h + (2 * h + d) * self.bias, 3 * d * h, 2 * d + 4 * h, d + 2 * h)

    def _hidden(self, dims: Dims) -> int:
        return max(1, int(2 / 3 * dims.mlp_width)) if self.hidden is None else self.hidden


class Mlp(Kerneled):
    """Linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.fc2 = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.kernels.feed_forward(x, self.fc1, GELU, self.fc2)  # (B, T, D)


class SwiGlu(Kerneled):
    """silu(gate)·value, then linear. Rows of `fc1` are (gate, value), so that both are one product."""

    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.fc1 = stacked(nn.Linear(width, 2 * hidden, bias), 2)
        self.fc2 = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.kernels.feed_forward(x, self.fc1, SWIGLU, self.fc2)  # (B, T, D)
