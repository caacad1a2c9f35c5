"""Auxiliary terms of the objective: losses that are added to the main one.

Here are the axis and the terms that train nothing but the network. The one that trains a learned variance is in
`dit/flow/variance.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, cast

from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, Registry, config
from dit.flow.path import Coeffs, NoisePath
from dit.flow.predict import Cond, Endpoints, Model, Prediction, call_network, split_channels
from dit.rng import Draws


@dataclass(frozen=True)
class Context:
    """What a term may be made of: one call of the network, and what it was called with.

    t: (B,). coeffs: of the path at t. data, eps, x: (B, C, ...), x = alpha·data + sigma·eps. output: (B, C or 2C, ...)
    what the network said, in the dtype of data, float32 at least. ends: where it sees data and eps, and its variance
    channels if it has them. taps: n -> (B, T, D), tokens behind the network's n-th block, of the terms' `taps` alone,
    in whatever dtype they were computed. draws: of the micro-batch, for a term's own numbers. weight: (B,) of the main
    loss. call: the network once more, (x, t, cond) -> output, where a term's `forwards` says so.
    """

    path: NoisePath
    prediction: Prediction
    t: Tensor
    coeffs: Coeffs
    data: Tensor
    eps: Tensor
    x: Tensor
    output: Tensor
    ends: Endpoints
    taps: Mapping[int, Tensor]
    cond: Cond
    draws: Draws
    weight: Tensor
    call: Callable[[Tensor, Tensor, Cond], Tensor]

    @property
    def pred(self) -> Tensor:
        """(B, C, ...) what the network predicts, without variance channels."""
        return split_channels(self.output, self.x)[0]


class Auxiliary:
    """A term beside the main loss. Subclasses are frozen `@config` classes."""

    uses_variance: ClassVar[bool] = False  # needs a network of twice the channels
    metric: ClassVar[str]  # name of its mean in the log, its weight in it
    places: ClassVar[str] = ""  # the fields that name blocks
    forwards: ClassVar[int] = (
        0  # forward passes of the network beside the one that is trained, without gradients
    )
    needs_drop: ClassVar[bool] = False  # works by a network that knows the dropped condition too

    @property
    def slots(self) -> int:
        """How many consecutive slots it looks at together; they must stay in one micro-batch."""
        return 1

    @property
    def taps(self) -> tuple[int, ...]:
        """Behind which of the network's blocks, counted from 1, the term looks at the tokens."""
        return ()

    def check(self, path: NoisePath) -> None:
        """Raise ConfigError for a path on which the term is not defined; on most it is."""

    def term(self, context: Context) -> Tensor:
        """(B,) what is added to each sample's loss, in float32 at least. Waits for no device."""
        raise NotImplementedError


AUXILIARIES: Registry[Auxiliary] = Registry("auxiliary term")

# beyond it a velocity's coefficients are held, where the velocity is infinite: its direction is the same
FASTEST = 1e12
SMOOTHING = 1e-6  # of the squared norm, so that the gradient is finite where the network says 0


def call_tapped(
    model: Model, path: NoisePath, x: Tensor, t: Tensor, cond: Cond, taps: tuple[int, ...]
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """`call_network`, and the tokens behind some blocks by their numbers; no network is asked for none."""
    if not taps:
        return call_network(model, path, x, t, cond), {}
    answer: Any = call_network(partial(cast(Any, model), taps=taps), path, x, t, cond)
    return answer[0], dict(zip(taps, answer[1], strict=True))


def smoothed_cosine(said: Tensor, true: Tensor, dim: int) -> Tensor:
    """The cosine along `dim`, with |said| as sqrt(|said|² + 1e-6): finite, as its gradient is, where said is 0."""
    norm = true.square().sum(dim).sqrt().clamp(min=SMOOTHING**0.5)
    smooth = (said.square().sum(dim) + SMOOTHING).sqrt()
    return (true * said).sum(dim) / (norm * smooth)


@AUXILIARIES.register("direction")
@config
class Direction(Auxiliary):
    """1 − cosine, over the channels, of the predicted and the true velocity (LightningDiT, arXiv 2501.01423, §4.2).

    The mean over positions, from 0 to 2, of the velocities that follow from whatever is predicted. The predicted
    one's norm is smoothed, sqrt(|v|² + 1e-6): a new network says 0, which has no direction, and its term is 1.
    weight: of the term; 1.0 is the paper's.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0  # of the term; 1.0 is the paper's
    metric: ClassVar[str] = "direction"

    def term(self, context: Context) -> Tensor:
        rates = (context.coeffs.d_alpha, context.coeffs.d_sigma)
        d_alpha, d_sigma = (rate.clamp(-FASTEST, FASTEST) for rate in rates)
        coeffs = replace(context.coeffs, d_alpha=d_alpha, d_sigma=d_sigma)
        true = Endpoints(context.data, context.eps).velocity(coeffs)
        said = context.ends.velocity(coeffs)
        cosine = smoothed_cosine(said, true, dim=1)
        return self.weight * (1.0 - cosine.reshape(len(cosine), -1).mean(1))


@AUXILIARIES.register("layersync")
@config
class LayerSync(Auxiliary):
    """1 − cosine of each token behind an early block and behind a later one, which it follows (arXiv 2510.12581).

    The mean over tokens. No gradient reaches the later one; there is no projection, and no other network. The paper's
    term is the negative cosine: this less a constant. The defaults are its repository's, for the 28 blocks of XL.
    """

    weight: Annotated[float, Field(gt=0)] = 0.2  # of the term
    early: Annotated[int, Field(ge=1)] = 8  # block, counted from 1, whose tokens follow
    late: Annotated[int, Field(ge=2)] = 16  # block whose tokens are followed
    metric: ClassVar[str] = "layersync"
    places: ClassVar[str] = "early and late"

    def __post_init__(self) -> None:
        if self.early >= self.late:
            raise ConfigError(
                f"early is {self.early} and late {self.late}: an early block follows a later one"
            )

    @property
    def taps(self) -> tuple[int, ...]:
        return self.early, self.late

    def term(self, context: Context) -> Tensor:
        early, late = (context.taps[n].to(context.output.dtype) for n in self.taps)  # (B, T, D)
        return self.weight * (1.0 - smoothed_cosine(early, late.detach(), dim=2).mean(1))
