"""Clipping's factor, AdamW and the averages of the weights in one pass over memory (optim.one_pass).

Each by itself, they read and write 48 bytes a number: the factor 8 (gradient in and out), AdamW 28 (weights, gradient
and two moments in, all but the gradient out), an average 12 (weights and average in, average out). Together it is 36:
gradient, weights, moments and average in, all but the gradient out; each further average is 8 in place of 12.

The function below is compiled, by which the compiler writes that one loop for the device at hand: a kernel written by
hand would move the same bytes. Its sums are rounded otherwise than those of torch's fused AdamW.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit.train.engines.base import ADAM_STATE, ensure_state
from dit.train.optim import GuardedAdamW

Shares = Sequence[tuple[Tensor, float]]  # averages of a tensor, and the share of the new weights in each


def update(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    averages: list[Tensor],
    shares: list[Tensor],
    factor: Tensor,
    scalars: tuple[Tensor, ...],
) -> None:
    """One update of AdamW (arXiv 1711.05101, algorithm 2) in place: all (n,) float32, shares and scalars of no axis.

    factor: of the gradient. scalars: 1 - beta1, 1 - beta2, rate · decay, rate / (1 - beta1^t), sqrt(1 - beta2^t), eps.
    """
    mean, square = moments
    one, two, decay, rate, root, eps = scalars
    gradient = gradient * factor
    mean.lerp_(gradient, one)
    square.lerp_(gradient * gradient, two)
    weight.sub_(decay * weight)
    weight.sub_(rate * mean / (square.sqrt() / root + eps))
    for average, share in zip(averages, shares, strict=True):
        average.lerp_(weight, share)


@functools.cache
def compiled() -> Callable[..., None]:
    """The function above, of tensors of any length."""
    return torch.compile(update, dynamic=True)


def _none(tensor: Tensor) -> Shares:
    return ()


class OnePassAdamW(torch.optim.AdamW):
    """AdamW that takes a factor of the gradient and averages along.

    factor: of the next step's gradients; None is 1. along: a tensor's averages and their shares in the step to come.
    """

    how = "in one pass"

    def __init__(self, params: Any, **kwargs: Any):
        super().__init__(params, **{**kwargs, "fused": False})  # by which steps are counted on the host
        self.factor: Tensor | None = None
        self.along: Callable[[Tensor], Shares] = _none
        # of this step, as tensors: one for each average, since a compiler tells apart where two are the same
        self._shares: dict[tuple[int, float], Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. `closure` is not used."""
        self._shares.clear()
        for group in self.param_groups:
            scalars: dict[float, tuple[Tensor, ...]] = {}  # by the number of the update
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = ensure_state(self, p, ADAM_STATE)
                state["step"] += 1
                count = float(state["step"])
                if count not in scalars:
                    scalars[count] = _scalars(group, count)
                self._update(p, state, scalars[count])

    def _update(self, p: Tensor, state: dict[str, Tensor], scalars: tuple[Tensor, ...]) -> None:
        assert p.grad is not None
        flat = [t.detach().view(-1) for t in (p, p.grad, *(state[kind] for kind in ADAM_STATE))]
        averages = self.along(p)
        shares = [share for _, share in averages]
        for key in enumerate(shares):
            if key not in self._shares:
                self._shares[key] = torch.tensor(key[1])
        if self.factor is None:
            self.factor = torch.ones((), device=p.device)
        compiled()(
            flat[0],
            flat[1].to(flat[0].dtype),
            (flat[2], flat[3]),
            [average.view(-1) for average, _ in averages],
            [self._shares[key] for key in enumerate(shares)],
            self.factor.to(p.device),
            scalars,
        )


def _scalars(group: dict[str, Any], count: float) -> tuple[Tensor, ...]:
    """As `update` takes them; made in double precision."""
    (one, two), rate = group["betas"], group["lr"]
    made = (
        1 - one,
        1 - two,
        rate * group["weight_decay"],
        rate / (1 - one**count),
        math.sqrt(1 - two**count),
        group["eps"],
    )
    return tuple(torch.tensor(value, dtype=torch.float32) for value in made)


class GuardedOnePass(GuardedAdamW, OnePassAdamW):
    """The same for unsharded gradients: they are clipped by the factor, and skipped as by GuardedAdamW."""

    def scale(self, grads: list[Tensor], factor: Tensor) -> None:
        """Keep the factor for the update."""
        self.factor = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, or none. `closure` is not used."""
        self.factor = None
        super().step()


def clip_along(zero: Any, optimizer: OnePassAdamW, clip: float | None) -> None:
    """Have DeepSpeed's optimizer of a ZeRO stage hand its clipping on, in place of a pass over the gradients.

    The factor is DeepSpeed's: 1 / max(1, (norm + 1e-6) / clip), of the norm over all ranks.
    """

    def keep(_: Any, norm: Any) -> None:
        if clip is not None:
            optimizer.factor = 1 / torch.clamp((torch.as_tensor(norm) + 1e-6) / clip, min=1.0)

    zero.unscale_and_clip_grads = keep
