"""The first layer of the time embedder, fitted to other sinusoids at the times of a sampling run.

diffusers' sinusoids have frequencies 10000^(-i/127) where DiT's and SiT's have 10000^(-i/128), and nothing configures
that. The layer is linear in them, so at some times other weights give just what these gave: at about 50 even steps to
float32's rounding. At all 1000 nothing near it is possible: there are 256 sinusoids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.path import NoisePath
from dit.model.dit import DiT
from dit.model.embed import sinusoid

CUT = 1e-6  # singular values below it, relative to the largest, are no directions to fit in
TOLERANCE = 1e-4  # what may be left of the layer's output, relative to its largest


class Fitted(NamedTuple):
    """The layer's weight (D, 256) float32, and what is left between the two outputs, relative to the largest."""

    weight: Tensor
    error: float


def is_alike(model: DiT, path: NoisePath, timesteps: Tensor, times: Tensor) -> bool:
    """Whether diffusers' network is handed the same times and makes the same sinusoids of them: nothing to fit."""
    same = torch.allclose(path.model_time(times), timesteps.to(times), rtol=1e-6, atol=1e-4)
    return model.time_embed.spacing == "ddpm" and same


def fit(model: DiT, path: NoisePath, timesteps: Tensor, times: Tensor) -> Fitted:
    """Fit the layer: of diffusers' sinusoids at timesteps (n,) it gives what ours gives at times (n,) in [0, 1].

    The weights nearest to ours that do so. ConfigError where those at so many times are none.
    """
    embed = model.time_embed
    weight = embed.fc1.weight.detach().double()  # (D, 256)
    given = path.model_time(times.float())  # as the sampler computes them
    ours = sinusoid(given, embed.frequencies, embed.max_period, embed.spacing).double()  # (n, 256)
    theirs = sinusoid(timesteps.float(), spacing="ddpm").double()  # (n, 256)
    wanted = ours @ weight.T  # (n, D)
    change = torch.linalg.pinv(theirs, rtol=CUT) @ (wanted - theirs @ weight.T)  # (256, D)
    found = (weight + change.T).float()
    left = (theirs @ found.double().T - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
    if not float(left) <= TOLERANCE:
        raise ConfigError(
            f"num_steps is {len(times)}: so many times cannot be fitted to diffusers' sinusoids (an error of "
            f"{float(left):.2g} is left); about 50 can. A model that was trained with "
            "model.time_frequencies=ddpm needs no fit and can be sampled with any number of steps"
        )
    return Fitted(found, float(left))
