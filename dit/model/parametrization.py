"""How initial weights, rates and decay follow the width: as in the reference, or by maximal updates (μP).

μP (Yang et al., arXiv 2203.03466; of diffusion transformers: arXiv 2505.15270) has every layer's activations move by
as much at any width, so that the best learning rate of a narrow model is that of a wide one. Table 3 of the paper, for
Adam, is what is done here: it has no multipliers in the forward pass, so checkpoints, exports and costs are those of
any network. (Its table 8 is the same training in other numbers: lemma J.1.)

Of a matrix that has r_in times the inputs (fan_in) and r_out times the outputs of the base width's:

| kind | r_in, r_out | initial std | rate | decay | eps |
|---|---|---|---|---|---|
| input: patches, time's first layer, class table | 1, r | the base's | 1 | 1 | 1/r |
| hidden: attention, MLPs, time's second layer, modulation | r, r | the base's / √r | 1/r | r | 1/r |
| output: the last layer | r, 1 | the base's / r | 1/r | r | 1 |
| vectors: biases, gains | , r_out | the base's | 1 | none | 1/r_out |

The initial std of what starts at zero (modulations, last layer) stays zero. Decay: rate times decay is then the same
for every tensor, which keeps AdamW's horizon of 1 / (rate · decay) updates (arXiv 2405.13698; "independent" decay in
arXiv 2309.14322). eps follows the gradients, which get smaller by 1/r_out (arXiv 2407.05872). Clipping is left as it
is: it sees the norm of the whole gradient, of which hidden matrices keep their share and the last layer's grows as √r,
so a wide model is clipped more often; Adam knows no difference where the factor is the same at all steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, Registry, config
from dit.model.dims import Dims


class Parametrization(ABC):
    """Tells which network of another width a network's initial weights and rates are derived from."""

    @abstractmethod
    def base(self, dims: Dims) -> Dims | None:
        """Give the base's shapes; None where there is no base, or the network is the base."""

    def attention_scale(self, head_width: int) -> float | None:
        """Give the factor of attention's logits; None is 1/√(head width)."""
        return None

    def about(self, dims: Dims) -> str | None:
        """Say what it does to a network of these shapes; None where nothing."""
        return None


PARAMETRIZATIONS: Registry[Parametrization] = Registry("parametrization")


@PARAMETRIZATIONS.register("standard")
@config
class Standard(Parametrization):
    """Initialises as the reference does, and trains everything at one rate, whatever the width."""

    def base(self, dims: Dims) -> Dims | None:
        """None."""
        return None


@PARAMETRIZATIONS.register("mup")
@config
class MuP(Parametrization):
    """Maximal updates: at `base_width` the standard network; at others its optimum of the rate holds (2203.03466)."""

    # width at which rates were found, where this and the standard parametrization are the same
    base_width: Annotated[int, Field(ge=4)]
    # channels of a head there; null = as many as here. Where they differ logits are scaled by √base/here
    base_head_width: Annotated[int, Field(ge=1)] | None = None

    def base(self, dims: Dims) -> Dims | None:
        """Give the shapes at the base width, the MLPs' hidden width in proportion."""
        if dims.width == self.base_width:
            return None
        hidden = max(1, round(dims.mlp_width * self.base_width / dims.width))
        try:
            # one head: how many there are changes no matrix
            return replace(dims, width=self.base_width, heads=1, mlp_width=hidden, attention_scale=None)
        except ConfigError as error:
            raise ConfigError(f"parametrization.base_width: {error}") from None

    def attention_scale(self, head_width: int) -> float | None:
        """Give √(base head width)/(head width): 1/√d at the base, and falling as 1/d (section 4 of 2203.03466)."""
        if self.base_head_width in (None, head_width):
            return None
        return math.sqrt(self.base_head_width) / head_width

    def about(self, dims: Dims) -> str:
        """Say by how much rates and decay are scaled."""
        scaled = f", logits by {dims.attention_scale:.4g}" if dims.attention_scale is not None else ""
        if dims.width == self.base_width:
            return f"width {self.base_width} is the base: the rate is every tensor's{scaled}"
        ratio = dims.width / self.base_width
        return (
            f"from width {self.base_width}: matrices with inputs of the width train at the rate / {ratio:g}, "
            f"with the decay x {ratio:g}, all others at the rate{scaled}"
        )


class Growth(NamedTuple):
    """How many times as many inputs and outputs a tensor has as the base's."""

    inputs: float
    outputs: float

    @property
    def spread(self) -> float:
        """Of the initial standard deviation, over the base's (the table above)."""
        if self.inputs == 1.0:
            return 1.0
        return self.inputs**-0.5 if self.outputs != 1.0 else 1 / self.inputs


class Initialised(Protocol):
    """A network that knows how it draws its weights."""

    def initial_std(self, module: nn.Module) -> float:
        """Give the standard deviation of a matrix's initial weights."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Give every module with its name."""


def scale(model: Initialised, base: Initialised) -> None:
    """Turn a network just initialised in the standard way into one of maximal updates.

    base: the same network at the base width; on the meta device, as its shapes alone are read. Parameters get
    `lr_factor`, `decay_factor` and `eps_factor`, which `dit.train.optim.parameter_groups` goes by.
    ConfigError where a tensor of two or more axes is of no layer whose inputs and outputs are known.
    """
    modules = dict(base.named_modules())
    for name, module in model.named_modules():
        like = modules[name]
        for key, p in module.named_parameters(recurse=False):
            grown = _growth(module, p, like.get_parameter(key), f"{name}.{key}")
            if p.ndim > 1:
                _rescale(p, grown.spread * base.initial_std(like) / model.initial_std(module))
            _mark(p, grown)


def _growth(module: nn.Module, p: Tensor, like: Tensor, name: str) -> Growth:
    """Of one tensor. Biases and gains have outputs alone."""
    if p.ndim <= 1:
        return Growth(1.0, p.numel() / like.numel())
    first, second = (here / there for here, there in zip(p.shape[:2], like.shape[:2], strict=True))
    if isinstance(module, nn.Linear):
        return Growth(second, first)
    if isinstance(module, nn.Embedding):
        return Growth(first, second)
    raise ConfigError(
        f"parametrization mup: which axes of {name}, {tuple(p.shape)} of {type(module).__name__}, are inputs is not "
        "known; use parametrization: standard, or make it of linear layers and embeddings"
    )


@torch.no_grad()
def _rescale(p: Tensor, factor: float) -> None:
    """Multiply initial weights; not by what rounding alone makes another number than 1."""
    if not math.isclose(factor, 1.0, rel_tol=1e-12):
        p.mul_(factor)


def _mark(p: Any, grown: Growth) -> None:
    """Leave with a parameter what the optimizer does otherwise with it."""
    p.lr_factor = 1 / grown.inputs
    p.decay_factor = grown.inputs
    p.eps_factor = 1 / grown.outputs
