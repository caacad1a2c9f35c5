"""How good samples are for how many evaluations of the network: budgets, and distances to real images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dit.config import ConfigError
from dit.data.sources.images import open_source
from dit.evals.features.pixels import Pca
from dit.evals.metrics.frechet import Statistics, frechet_distance
from dit.sample.generate import Sampler
from dit.sample.solve import Solver


def budgeted(
    sampler: Sampler, solvers: Mapping[str, Solver], budgets: Sequence[int], cfg_scale: float
) -> Iterator[tuple[dict[str, Any], Sampler]]:
    """(what is drawn, its sampler) for every solver and every budget that it can meet."""
    for name, solver in solvers.items():
        for budget in budgets:
            spec = replace(sampler.spec, solver=solver, cfg_scale=cfg_scale)
            found = most_steps(replace(sampler, spec=spec), budget)
            if found is not None:
                row = {"solver": name, "budget": budget, "num_steps": found.spec.num_steps, "nfe": found.nfe}
                yield row, found


def most_steps(sampler: Sampler, budget: int) -> Sampler | None:
    """The sampler with as many steps as `budget` evaluations allow; None where they do not allow one.

    ConfigError for a solver that chooses its own steps.
    """
    best = None
    for num_steps in range(1, budget + 1):
        tried = replace(sampler, spec=replace(sampler.spec, num_steps=num_steps))
        if tried.nfe is None:
            raise ConfigError(f"{sampler.spec.solver} chooses its own steps: it cannot be given a budget")
        if tried.nfe <= budget:
            best = tried
    return best


class FrechetTo:
    """Fréchet distance of images to a reference set in principal components of the reference."""

    def __init__(self, reference: str, components: int, size: int):
        self.size = size
        images = self.load(reference)
        self._features = Pca.fit(images, components)
        self._target = Statistics.fit(self._features(images))

    def load(self, source: str) -> np.ndarray:
        """(N, H, W, 3) uint8 of a source of images."""
        opened = open_source(source)
        return np.stack([opened.load(i, self.size) for i in range(len(opened))])

    def __call__(self, images: np.ndarray) -> float:
        """Measure that of images (N, H, W, 3) uint8."""
        return frechet_distance(Statistics.fit(self._features(images)), self._target)

    def real(self, source: str) -> float:
        """Measure that of a source of images."""
        return self(self.load(source))

    def drawn(self, sampler: Sampler, labels: torch.Tensor, batch_size: int) -> float:
        """Measure that of images 0 ... N - 1 of these labels (N,). Raises NotFiniteError where one is none."""
        parts = torch.arange(len(labels)).split(batch_size)
        return self(np.concatenate([sampler.images(index, labels[index]) for index in parts]))
