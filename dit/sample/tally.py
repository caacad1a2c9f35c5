"""Counting what sampling costs: calls of the guided denoiser, and samples through any network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit.flow.predict import Cond, Endpoints
from dit.sample.denoise import DenoiseFn
from dit.sample.guide import LogitsFn, Opener


@dataclass
class Tally:
    """What was evaluated for how many images: counts of samples, whatever the batches."""

    images: int = 0
    calls: int = 0  # samples through the guided denoiser
    evaluations: int = 0  # samples through any network: every branch of the guidance, its other models

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images, calls and evaluations so far."""
        return self.images, self.calls, self.evaluations

    def of_calls(self, denoise: DenoiseFn) -> DenoiseFn:
        """`denoise`, counted as what the solver calls."""

        def counted(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            self.calls += len(x)
            return denoise(x, t, cond)

        return counted

    def of_evaluations(self, denoise: DenoiseFn) -> DenoiseFn:
        """`denoise`, counted as a network."""

        def counted(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
            self.evaluations += len(x)
            return denoise(x, t, cond)

        return counted

    def per_image(self) -> dict[str, float]:
        """Means an image: `nfe`, calls of the guided denoiser, and `network_evaluations`.

        Whole numbers as such; adaptive solvers give fractions. ValueError before any image.
        """
        if not self.images:
            raise ValueError("nothing was drawn yet")
        means = {"nfe": self.calls / self.images, "network_evaluations": self.evaluations / self.images}
        return {name: int(mean) if mean.is_integer() else mean for name, mean in means.items()}

    @staticmethod
    def sum(tallies: Iterable[Tally]) -> Tally:
        """Add up those of several ranks."""
        total = Tally()
        for t in tallies:
            total.images, total.calls = total.images + t.images, total.calls + t.calls
            total.evaluations += t.evaluations
        return total


@dataclass(frozen=True)
class CountedOpener:
    """An opener whose networks are counted."""

    inner: Opener
    tally: Tally

    @property
    def opened(self) -> dict[str, dict[str, Any]]:
        return self.inner.opened

    def denoiser(self, checkpoint: str) -> DenoiseFn:
        return self.tally.of_evaluations(self.inner.denoiser(checkpoint))

    def classifier(self, checkpoint: str) -> LogitsFn:
        classify = self.inner.classifier(checkpoint)

        def counted(x: Tensor, t: Tensor) -> Tensor:
            self.tally.evaluations += len(x)
            return classify(x, t)

        return counted
