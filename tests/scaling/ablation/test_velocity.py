"""The velocity error is the same for the same denoiser on whatever path, and a velocity network's own loss."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dit.data.codecs.norm import LatentNorm
from dit.flow.objective import Objective
from dit.flow.path import PATHS, Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints, Eps, Prediction, Velocity
from dit.rng import Draws, Purpose
from dit.sample.denoise import Denoiser
from dit.scaling.ablation.velocity import STRAIGHT, error
from dit.train.task import LatentTask, Samples

COUNT = 32
TASK = LatentTask(Objective(), LatentNorm(mean=(0.0,), std=(1.0,)), 0.0, False)


def samples() -> Samples:
    draws = Draws(3, 5, torch.arange(COUNT), COUNT)
    moments = draws.normal(Purpose.PROBE, (1, 1, 4, 4))
    nothing = torch.zeros(COUNT, dtype=torch.int64)
    return Samples(moments, nothing, nothing.bool(), draws)


@dataclass(frozen=True)
class Posterior:
    """The best denoiser of data of unit variance: data = alpha·x / (alpha² + sigma²), eps = sigma·x / (...)."""

    path: NoisePath
    prediction: Prediction

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        c = self.path.coeffs(t)
        x = x / broadcast(c.alpha.square() + c.sigma.square(), x)
        return Endpoints(broadcast(c.alpha, x) * x, broadcast(c.sigma, x) * x)


@pytest.mark.parametrize("name", [name for name, _ in PATHS.items()])
def test_the_best_denoiser_has_the_same_error_on_every_path(name: str) -> None:
    """Closed form at r = t / (1 - t): data' = (data + r·eps) / (1 + r²), eps' = r·data'."""
    given = samples()
    path = PATHS.parse(name)
    found = error(Posterior(path, Eps()), TASK, given)  # type: ignore[arg-type]
    assert found.t is not None
    assert sorted(found.t.tolist()) == pytest.approx([(i + 0.5) / COUNT for i in range(COUNT)])
    data, eps = given.moments[:, 0], given.draws.normal(Purpose.EPS, (1, 4, 4))
    r = (found.t / (1 - found.t)).float().reshape(-1, 1, 1, 1)
    best = (data + r * eps) / (1 + r.square())
    expected = ((r - 1) * best - (eps - data)).square().flatten(1).mean(1)
    # a discrete path is looked at in its nearest step
    allowed = 0.15 if path.num_steps is not None else 2e-3
    assert found.per_sample.tolist() == pytest.approx(expected.tolist(), rel=allowed, abs=allowed)


def test_a_velocity_network_has_its_own_loss() -> None:
    given = samples()

    def network(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return 0.3 * x + broadcast(t.to(x) / 1000, x)

    found = error(Denoiser(network, Linear(), Velocity()), TASK, given)
    data, eps = given.moments[:, 0], given.draws.normal(Purpose.EPS, (1, 4, 4))
    assert found.t is not None
    own = Objective(path=STRAIGHT).per_sample(network, data, eps, found.t.float(), {"label": given.label})
    assert found.per_sample.tolist() == pytest.approx(own.tolist(), rel=1e-4)
