"""The time layer on diffusers' sinusoids, against diffusers' own embedding of times."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from dit.config import ConfigError
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import Velocity
from dit.interop.pipeline import time_layer
from dit.interop.pipeline.schedulers import scheduler_for
from dit.model.embed import sinusoid
from tests.interop.pipeline.test_schedulers import OBJECTIVES, SIT
from tests.interop.random_models import random_model

FITTED = {name: OBJECTIVES[name] for name in ("ddpm", "cosine", "flow")} | {
    "sit": Objective(path=SIT, prediction=Velocity())
}
THEIRS = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=1)


def test_our_ddpm_sinusoids_are_theirs_to_the_bit() -> None:
    t = torch.cat([torch.arange(1000.0), torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1000])
    assert torch.equal(sinusoid(t, spacing="ddpm"), THEIRS(t))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_at_the_steps_of_a_run_the_layer_gives_what_it_gave(name: str, num_steps: int) -> None:
    model, objective = random_model(8, 4, 10), FITTED[name]
    scheduler = scheduler_for(objective)
    timesteps = scheduler.timesteps(num_steps)
    times = scheduler.times(timesteps)
    assert not time_layer.is_alike(model, objective.path, timesteps, times)
    found = time_layer.fit(model, objective.path, timesteps, times)
    own = model.time_embed.fc1.weight
    wanted = sinusoid(objective.path.model_time(times.float())) @ own.T
    torch.testing.assert_close(THEIRS(timesteps) @ found.weight.T, wanted, rtol=0, atol=2e-5)
    assert found.weight.abs().max() < 5 * own.abs().max()  # in floats of their usual size
    divisors = scheduler.timesteps(max(1, num_steps // 5))
    assert set(divisors.tolist()) <= set(timesteps.tolist())


def test_more_steps_than_there_are_sinusoids_for_are_refused() -> None:
    model, scheduler = random_model(8, 4, 10), scheduler_for(OBJECTIVES["ddpm"])
    timesteps = scheduler.timesteps(250)
    with pytest.raises(ConfigError, match="num_steps is 250: so many times cannot be fitted"):
        time_layer.fit(model, OBJECTIVES["ddpm"].path, timesteps, scheduler.times(timesteps))


def test_nothing_is_to_be_fitted_where_sinusoids_and_times_are_theirs() -> None:
    model, scheduler = random_model(8, 4, 10, time_frequencies="ddpm"), scheduler_for(OBJECTIVES["flow"])
    timesteps = scheduler.timesteps(250)
    times = scheduler.times(timesteps)
    assert time_layer.is_alike(model, Linear(), timesteps, times)
    assert not time_layer.is_alike(model, SIT, timesteps, times)
