"""Which objective a scheduler of diffusers samples, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from dit.flow.discrete import CosineDDPM, DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import VP, Linear
from dit.flow.predict import Data, Eps, ReverseVelocity, Score, V, Velocity
from dit.interop.pipeline.schedulers import objective_of, scheduler_for
from dit.interop.weights import WeightsError

SIT = Linear(model_time_data=1.0, model_time_noise=0.0)
OBJECTIVES = {
    "ddpm": Objective(path=DiscreteVP(), prediction=Eps()),
    "other betas": Objective(path=DiscreteVP(beta_start=1e-3, beta_end=0.03), prediction=Data()),
    "fewer": Objective(path=DiscreteVP(num_steps=200), prediction=V()),
    "cosine": Objective(path=CosineDDPM(), prediction=V()),
    "zero terminal": Objective(path=DiscreteVP(zero_terminal_snr=True), prediction=V()),
    "flow": Objective(path=Linear(), prediction=Velocity()),
}


def saved(folder: Path, made: Any) -> Path:
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", OBJECTIVES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    given = OBJECTIVES[name]
    found = scheduler_for(given)
    assert found is not None
    assert objective_of(saved(tmp_path, found.build()), learn_sigma=False) == given


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "flow"])
def test_its_noise_is_that_of_our_path_at_its_steps(name: str) -> None:
    path = OBJECTIVES[name].path
    found = scheduler_for(OBJECTIVES[name])
    made, steps = found.build(), found.timesteps(50)
    times = found.times(steps)
    alpha, sigma = path.alpha_sigma(times)
    theirs = made.alphas_cumprod[steps.long()].double()
    torch.testing.assert_close(theirs, alpha.square(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(1 - theirs, sigma.square(), rtol=1e-4, atol=1e-7)
    assert (path.model_time(times) == steps).all()


def test_flow_matching_is_told_t_by_its_sigmas() -> None:
    found = scheduler_for(OBJECTIVES["flow"])
    times = found.times(found.timesteps(4))
    torch.testing.assert_close(times, torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))
    assert not found.negated
    assert scheduler_for(Objective(path=SIT, prediction=ReverseVelocity())).negated


@pytest.mark.parametrize(
    "objective", [Objective(path=VP(), prediction=Eps()), Objective(path=DiscreteVP(), prediction=Score())]
)
def test_what_they_do_not_sample_has_no_scheduler(objective: Objective) -> None:
    assert scheduler_for(objective) is None


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_all_of_one_noise_are_one_objective(name: str, tmp_path: Path) -> None:
    saved(tmp_path, getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"))
    assert objective_of(tmp_path, learn_sigma=False) == OBJECTIVES["ddpm"]
    assert objective_of(tmp_path, learn_sigma=True).uses_variance


def test_betas_one_by_one_are_known_for_what_they_are(tmp_path: Path) -> None:
    for name in ("ddpm", "other betas", "cosine"):
        path = OBJECTIVES[name].path
        saved(tmp_path, diffusers.DDIMScheduler(trained_betas=path.betas().tolist()))
        assert objective_of(tmp_path, learn_sigma=False).path == path
    strange = CosineDDPM(offset=0.1)
    made = scheduler_for(Objective(path=strange, prediction=Eps())).build()
    assert torch.allclose(made.betas.double(), strange.betas(), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "DDIMScheduler",
            {"beta_schedule": "scaled_linear"},
            r"\(scaled_linear, 0.0001 to 0.02\) are of no path",
        ),
        ("DDPMScheduler", {"prediction_type": "other"}, "prediction_type is 'other'"),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 100}, "its timesteps are 100 sigma"),
        ("EDMEulerScheduler", {}, "is none of betas, nor of flow matching"),
        ("AutoencoderKL", {}, "_class_name is 'AutoencoderKL', no scheduler of diffusers"),
        ("NoSuchScheduler", {}, "_class_name is 'NoSuchScheduler', no scheduler of diffusers"),
    ],
)
def test_what_is_no_objective_of_ours_is_refused(
    name: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **settings}))
    with pytest.raises(WeightsError, match=says):
        objective_of(tmp_path, learn_sigma=False)
