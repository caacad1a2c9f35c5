"""Guidance: maps of a `DenoiseFn` to a `DenoiseFn`; at neutral strength the very function that was given."""

from __future__ import annotations

import torch
from torch import Tensor

from dit.config import Registry, config
from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn


class Guidance:
    """A change of the denoiser. Subclasses are frozen `@config` classes; neutral ones return their input."""

    def __call__(self, denoise: DenoiseFn) -> DenoiseFn:
        raise NotImplementedError


GUIDANCES: Registry[Guidance] = Registry("guidance")


def null(cond: Cond, like: Tensor) -> Cond:
    """`cond` with every condition dropped; `like` (B, ...) gives the batch and the device."""
    return {**cond, "drop": torch.ones(len(like), dtype=torch.bool, device=like.device)}


def cfg(scale: float) -> ClassifierFree:
    """Classifier-free guidance of this scale; 1 is none."""
    return ClassifierFree(scale=scale)


@GUIDANCES.register("cfg")
@config
class ClassifierFree(Guidance):
    """null + scale·(conditional − null) on all channels (arXiv 2207.12598, eq. 6, scale = 1 + w).

    Both branches go through the network in one call of 2B samples, the conditional first. A learned variance
    is the conditional's. data and eps are guided alike, so x = alpha·data + sigma·eps still holds.
    """

    scale: float = 1.0

    def __call__(self, denoise: DenoiseFn) -> DenoiseFn:
        """The guided denoiser: `denoise` itself at scale 1. The guided one refuses an empty `cond`."""
        if self.scale == 1.0:
            return denoise

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            if not cond:
                raise ValueError(
                    f"guidance of scale {self.scale} needs a condition, cond is empty; use scale 1"
                )
            both = stack(cond, null(cond, x), x)
            conditional, unconditional = halves(denoise(torch.cat([x, x]), torch.cat([t, t]), both))
            return unconditional.lerp(conditional, self.scale)

        return guided


def stack(first: Cond, second: Cond, like: Tensor) -> Cond:
    """Two conditions of B samples each as one of 2B; `like` (B, ...). A missing "drop" is no drop.

    ValueError when an entry's first axis is not B.
    """
    keep = {"drop": torch.zeros(len(like), dtype=torch.bool, device=like.device)}
    one, two = {**keep, **first}, {**keep, **second}
    for key, value in [*one.items(), *two.items()]:
        if len(value) != len(like):
            raise ValueError(f"cond['{key}'] has {len(value)} entries for a batch of {len(like)}")
    return {key: torch.cat([one[key], two[key]]) for key in one}


def halves(ends: Endpoints) -> tuple[Endpoints, Endpoints]:
    """Endpoints of 2B samples as two of B."""
    (data, data2), (eps, eps2) = ends.data.chunk(2), ends.eps.chunk(2)
    extra, extra2 = (None, None) if ends.log_variance is None else ends.log_variance.chunk(2)
    return Endpoints(data, eps, extra), Endpoints(data2, eps2, extra2)
