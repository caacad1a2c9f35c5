"""Guidances that correct the one answer they get: by a classifier's gradient, or by thresholding."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dit.config import config
from dit.flow.path import broadcast
from dit.flow.predict import DELTA, Cond, Endpoints
from dit.sample.denoise import DenoiseFn
from dit.sample.guide import GUIDANCES, Context, Guidance, LogitsFn


@GUIDANCES.register("classifier")
@config
class ClassifierGuidance(Guidance):
    """eps − scale·sigma·∇ log p(label | x, t) (Dhariwal & Nichol, arXiv 2105.05233, eq. 14).

    The classifier is one of noisy latents, trained by tools/train_classifier.py on the same latents and path.
    data moves with eps: by scale·sigma²/alpha·∇. Where alpha is below a thousandth of sigma x says nothing of
    the data, and nothing is guided. Samples without a label, or with a dropped one, are not guided.
    """

    checkpoint: str  # run directory or checkpoint of tools/train_classifier.py
    scale: float  # of the classifier's gradient; 0 = no guidance

    @property
    def is_neutral(self) -> bool:
        return self.scale == 0.0

    @property
    def needs_label(self) -> bool:
        return not self.is_neutral

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        """The guided denoiser; it refuses a `cond` without labels."""
        classify, path = self._opener(context).classifier(self.checkpoint), self._path(context)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            if "label" not in cond:
                raise ValueError(f"classifier guidance needs cond['label'], got {sorted(cond)}")
            ends, coeffs = denoise(x, t, cond), path.coeffs(t)
            known = cond["label"] >= 0
            if "drop" in cond:
                known = known & ~cond["drop"]
            gradient = log_likelihood_gradient(classify, x, t, cond["label"], known)
            sees_data = coeffs.alpha > DELTA * coeffs.sigma
            shift = torch.where(sees_data, self.scale * coeffs.sigma, 0.0)
            lift = torch.where(sees_data, shift * coeffs.sigma / coeffs.alpha, 0.0)
            return Endpoints(
                ends.data + broadcast(lift, x) * gradient,
                ends.eps - broadcast(shift, x) * gradient,
                ends.log_variance,
            )

        return guided


def log_likelihood_gradient(classify: LogitsFn, x: Tensor, t: Tensor, label: Tensor, known: Tensor) -> Tensor:
    """∇ of log p(label | x, t) in x, (B, C, ...); 0 where `known` (B,) is False. Works under no_grad."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        label, known = label.clamp(min=0), known.clone()
        log_p = F.log_softmax(classify(leaf, t.clone()), dim=-1)  # (B, classes)
        chosen = log_p.gather(1, label.unsqueeze(1)).squeeze(1)
        return torch.autograd.grad(torch.where(known, chosen, 0.0).sum(), leaf)[0]


@GUIDANCES.register("threshold")
@config
class DynamicThreshold(Guidance):
    """data clipped to [−s, s] and scaled by floor/s, s = max(floor, quantile of |data|), for each sample.

    Dynamic thresholding (Saharia et al., arXiv 2205.11487, section 2.3), which keeps large guidance scales from
    saturating. There data are pixels in [−1, 1] and floor is 1. Latents of unit variance reach further: give the
    size that real ones reach, 3 or more.
    """

    quantile: Annotated[float, Field(gt=0, le=1)] | None  # of |data|; 0.995 in Imagen; null = none
    floor: Annotated[float, Field(gt=0)]  # size up to which data stay: 1 for pixels, 3 or more for latents

    @property
    def is_neutral(self) -> bool:
        return self.quantile is None

    def guide(self, denoise: DenoiseFn, context: Context | None) -> DenoiseFn:
        path = self._path(context)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            ends = denoise(x, t, cond)
            limit = broadcast(
                quantile(ends.data.abs().flatten(1), self.quantile or 1.0).clamp(min=self.floor), x
            )
            data = ends.data.clamp(-limit, limit) * (self.floor / limit)
            return ends.with_data(path.coeffs(t), x, data)

        return guided


def quantile(values: Tensor, share: float) -> Tensor:
    """(B,) of each row of (B, n), linear between neighbours. Older torch.quantile refuses more than 2^24 numbers."""
    ordered, place = values.sort(1).values, share * (values.shape[1] - 1)
    low, high = ordered[:, int(place)], ordered[:, math.ceil(place)]
    return low + (place - int(place)) * (high - low)
