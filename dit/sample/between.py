"""Rows of images between two seeds or two classes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn
from dit.sample.generate import Sampler

COLUMNS = 9  # of a row, its two ends among them
ROWS = 8  # at most


@dataclass(frozen=True)
class Between:
    """What a row goes between: `ends` are two seeds, or two classes. kind: "seeds" or "classes", as in BETWEEN."""

    kind: str
    ends: tuple[int, int]


def parse_between(text: str, classes: Callable[[str], list[int]]) -> Between:
    """From "seeds:0,1" or "classes:3,7". classes: numbers of what is typed there. ConfigError for anything else."""
    kind, _, ends = text.partition(":")
    if kind not in BETWEEN:
        raise ConfigError(f"interpolate is {text!r}, expected seeds:0,1 or classes:3,7 (or names)")
    if kind == "seeds" and not re.fullmatch(r"\s*-?\d+\s*,\s*-?\d+\s*", ends):
        raise ConfigError(f"interpolate is {text!r}, expected two seeds, such as seeds:0,1")
    two = [int(end) for end in ends.split(",")] if kind == "seeds" else classes(ends)
    if len(two) != 2 or two[0] == two[1]:
        raise ConfigError(f"interpolate is {text!r}, expected two different {kind}, such as {kind}:0,1")
    if kind == "seeds" and max(map(abs, two)) >= 2**63:  # said before anything is drawn
        raise ConfigError(f"interpolate is {text!r}, expected seeds between -2^63 and 2^63")
    return Between(kind, (two[0], two[1]))


def interpolated(
    sampler: Sampler, between: Between, index: Tensor, label: Tensor, done: Callable[[int], Any]
) -> np.ndarray:
    """(B · COLUMNS, H, W, 3) uint8, a row for each of images `index` (B,) of classes `label` (B,), int64.

    The first and the last column are the images of the two ends themselves. done: is told of each column's B images.
    Raises NotFiniteError.
    """
    columns = []
    for weight in torch.linspace(0, 1, COLUMNS).tolist():
        latents = BETWEEN[between.kind](sampler, between.ends, weight, index, label)
        columns.append(sampler.pictures(latents, index, label))
        done(len(index))
    return np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation of noise (B, ...), each sample along the arc between its two ends.

    sin((1 − w)θ)/sin θ · a + sin(wθ)/sin θ · b, θ the angle between a and b (Shoemake, "Animating rotation with
    quaternion curves", 1985): independent noise stays about as long as noise is; a straight line would shorten it.
    """
    if weight in (0.0, 1.0):
        return b if weight else a
    first, second = a.double().flatten(1), b.double().flatten(1)
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)).unsqueeze(1)
    near = angle.sin() < 1e-6  # the same direction: nothing to go around
    safe = torch.where(near, 1.0, angle.sin())
    left = torch.where(near, 1 - weight, torch.sin((1 - weight) * angle) / safe)
    right = torch.where(near, weight, torch.sin(weight * angle) / safe)
    return (left * first + right * second).reshape(a.shape).to(a.dtype)


def _between_seeds(
    sampler: Sampler, ends: tuple[int, int], weight: float, index: Tensor, label: Tensor
) -> Tensor:
    """The same classes from noise between that of two seeds; noise that a solver adds on its way is the spec's."""
    first, second = (replace(sampler, spec=replace(sampler.spec, seed=seed)).noise(index) for seed in ends)
    return sampler.latents(index, label, noise=slerp(first, second, weight))


def _between_classes(
    sampler: Sampler, ends: tuple[int, int], weight: float, index: Tensor, label: Tensor
) -> Tensor:
    """The same noise by the mean of two guided denoisers, of one class each."""
    if weight in (0.0, 1.0):
        return sampler.latents(index, torch.full_like(label, ends[int(weight)]))
    return sampler.latents(index, label, denoise=_of_two(sampler.denoise, ends, weight))


def _of_two(denoise: DenoiseFn, ends: tuple[int, int], weight: float) -> DenoiseFn:
    def mixed(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        first, second = (
            denoise(x, t, {**cond, "label": torch.full_like(cond["label"], label)}) for label in ends
        )
        return first.lerp(second, weight)

    return mixed


BETWEEN: dict[str, Callable[[Sampler, tuple[int, int], float, Tensor, Tensor], Tensor]] = {
    "seeds": _between_seeds,
    "classes": _between_classes,
}
