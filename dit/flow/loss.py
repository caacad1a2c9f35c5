"""What a loss is, whatever is trained: per sample, with the terms beside it; and what a new network's must be."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit.flow.couple import Metrics


@dataclass(frozen=True)
class Loss:
    """The loss of a micro-batch, in float32 at least.

    mean: scalar to differentiate. per_sample: (B,), weighted; its mean, and the auxiliary terms', is `mean`.
    t: (B,), None for a loss without times (stage 1). metrics: scalars to log.
    auxiliary: (B,) the sum of the auxiliary terms, or None; no part of per_sample, which the first loss predicts.
    valid: (B,) bool, False for samples that are missing and whose loss is 0; None where none is.
    """

    mean: Tensor
    per_sample: Tensor
    t: Tensor | None
    metrics: Metrics
    auxiliary: Tensor | None = None
    valid: Tensor | None = None

    def where(self, valid: Tensor) -> Loss:
        """The same with the loss of some samples 0, in a mean over all: where (B,) bool `valid` is False."""
        per_sample = torch.where(valid, self.per_sample, 0)
        auxiliary = None if self.auxiliary is None else torch.where(valid, self.auxiliary, 0)
        mean = (per_sample if auxiliary is None else per_sample + auxiliary).mean()
        return replace(self, mean=mean, per_sample=per_sample, auxiliary=auxiliary, valid=valid)


@dataclass(frozen=True)
class FirstLoss:
    """What the loss of a network that says 0 must be on unit-variance latents.

    mean: the expected loss. std: of one sample's loss, for Gaussian latents of independent elements.
    """

    mean: float
    std: float

    def standard_error(self, samples: int) -> float:
        """Return that of the mean loss of so many samples."""
        return self.std / math.sqrt(samples)

    def deviation(self, per_sample: Tensor) -> float:
        """How many standard errors the mean of per_sample (n,), n > 1, lies from the expected loss.

        Real latents spread more than Gaussian ones, so the larger of the two standard errors counts.
        """
        observed = float(per_sample.double().std()) / math.sqrt(len(per_sample))
        error = max(observed, self.standard_error(len(per_sample)))
        return (float(per_sample.double().mean()) - self.mean) / error
