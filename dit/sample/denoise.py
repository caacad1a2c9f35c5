"""A network as a denoiser: what every guidance takes and gives, and what every solver calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.flow.path import NoisePath
from dit.flow.predict import Cond, Endpoints, Model, Prediction, call_network
from dit.ranks.asked import EndAsked

DenoiseFn = Callable[[Tensor, Tensor, Cond], Endpoints]  # (x (B, C, ...), t (B,), cond) → Endpoints


@dataclass(frozen=True)
class Denoiser:
    """The `DenoiseFn` of a network trained on a path with a prediction."""

    model: Model
    path: NoisePath
    prediction: Prediction

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        """data and eps expected at x (B, C, ...), t (B,) float32 or float64; float32 at least.

        Only meaningful for t in `usable(path, prediction)`, where grids and solvers stay.
        """
        coeffs = self.path.coeffs(t)
        return self.prediction.endpoints(coeffs, x, call_network(self.model, self.path, x, t, cond))


def stopping(denoise: DenoiseFn, asked: EndAsked) -> DenoiseFn:
    """`denoise`, which first raises Stopped where an end was asked for: a batch may take longer than there is time."""

    def looking(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        asked.look()
        return denoise(x, t, cond)

    return looking


def with_precision(model: Model, device: torch.device, precision: str) -> Model:
    """`model` with its matrix products in this precision: "bf16" is autocast, anything else as the weights are."""

    def network(x: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(x, model_time, cond)

    return network
