"""diffusers' schedulers and our objectives: which goes with which, and the times that each step hands to the network.

A pair more is a function of an objective in `GIVEN`, and one of a scheduler in `TAKEN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.flow.discrete import CosineDDPM, DiscretePath, DiscreteVP
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import Data, Eps, Prediction, ReverseVelocity, V, Velocity
from dit.flow.variance import LearnedRange
from dit.interop.pipeline.transformer import read_json
from dit.interop.weights import WeightsError

FILE = "scheduler_config.json"
FLOW_STEPS = 1000  # timesteps of diffusers' flow matching: 1000 sigma
NAMES: dict[str, Prediction] = {"epsilon": Eps(), "v_prediction": V(), "sample": Data()}
SAME_ALPHA = 1e-4  # of alpha², relative: diffusers sums in float32


@dataclass(frozen=True)
class Scheduler:
    """One of diffusers' with its configuration, for an objective.

    negated: the network's output is the reverse of what it takes. in_pipeline: diffusers' DiTPipeline can use it.
    times: from timesteps, as the network gets them, to t in [0, 1].
    """

    name: str
    settings: Mapping[str, Any]
    negated: bool
    in_pipeline: bool
    times: Callable[[Tensor], Tensor]

    def timesteps(self, num_steps: int) -> Tensor:
        """(num_steps,) float32: what the network is handed in a run of so many steps."""
        made = self.build()
        if self.in_pipeline:
            made.set_timesteps(num_steps)
        else:
            made.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps))
        timesteps: Tensor = made.timesteps
        return timesteps.float()

    def build(self) -> Any:
        """diffusers' scheduler."""
        import diffusers

        return getattr(diffusers, self.name).from_config(dict(self.settings))

    def config(self) -> dict[str, Any]:
        """What scheduler_config.json holds."""
        return {"_class_name": self.name, **self.settings}


# --- out ---------------------------------------------------------------------------------------------------


def _ddim(objective: Objective) -> Scheduler | None:
    """Steps of a discrete path, deterministic as DiTPipeline runs it (arXiv 2010.02502, eta = 0)."""
    path, names = objective.path, {prediction: name for name, prediction in NAMES.items()}
    if not isinstance(path, DiscretePath) or objective.prediction not in names:
        return None
    settings = {
        "num_train_timesteps": path.num_steps,
        **_betas(path),
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "prediction_type": names[objective.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }
    total = path.num_steps
    return Scheduler("DDIMScheduler", settings, False, True, lambda k: (k.double() + 1) / total)


def _betas(path: DiscretePath) -> dict[str, Any]:
    """The betas, by the name that diffusers has for them, else one by one."""
    if isinstance(path, DiscreteVP):
        return {"beta_schedule": "linear", "beta_start": path.beta_start, "beta_end": path.beta_end}
    if isinstance(path, CosineDDPM) and (path.offset, path.max_beta) == (0.008, 0.999):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": path.betas().tolist()}


def _flow(objective: Objective) -> Scheduler | None:
    """Rectified flow: sigma = t, and a velocity from data to noise."""
    if not isinstance(objective.path, Linear) or not isinstance(
        objective.prediction, Velocity | ReverseVelocity
    ):
        return None
    negated = isinstance(objective.prediction, ReverseVelocity)
    settings = {"num_train_timesteps": FLOW_STEPS, "shift": 1.0}
    return Scheduler(
        "FlowMatchEulerDiscreteScheduler", settings, negated, False, lambda s: s.double() / FLOW_STEPS
    )


GIVEN: tuple[Callable[[Objective], Scheduler | None], ...] = (_ddim, _flow)


def scheduler_for(objective: Objective) -> Scheduler | None:
    """The scheduler that samples what was trained so; None where diffusers has none."""
    return next((made for give in GIVEN if (made := give(objective)) is not None), None)


# --- in ----------------------------------------------------------------------------------------------------


def _of_betas(made: Any) -> Objective | None:
    """Any scheduler of betas: DDPM, DDIM, PNDM, DPM-Solver, Euler and their kin share noise and predictions."""
    if not hasattr(made, "betas") or not hasattr(made.config, "prediction_type"):
        return None
    settings = made.config
    if settings.prediction_type not in NAMES:
        raise WeightsError(
            f"its prediction_type is {settings.prediction_type!r}, expected one of {', '.join(NAMES)}"
        )
    total, zero = settings.num_train_timesteps, bool(settings.get("rescale_betas_zero_snr", False))
    start, end = settings.beta_start, settings.beta_end
    if settings.get("trained_betas") is not None:  # to a few digits, as linear ones are in float32
        start, end = (float(f"{float(made.betas[i]):.6g}") for i in (0, -1))
    paths: tuple[DiscretePath, ...] = (
        DiscreteVP(num_steps=total, zero_terminal_snr=zero, beta_start=start, beta_end=end),
        CosineDDPM(num_steps=total, zero_terminal_snr=zero),
    )
    t = torch.arange(1, total + 1, dtype=torch.float64) / total
    theirs = made.alphas_cumprod.double()
    for path in paths:
        ours = path.alpha_sigma(t)[0].square()
        # some schedulers put 2^-24 in place of a last 0
        if torch.allclose(theirs, ours, rtol=SAME_ALPHA, atol=1e-7 if zero else 1e-9):
            return Objective(path=path, prediction=NAMES[settings.prediction_type])
    raise WeightsError(
        f"its betas ({settings.get('beta_schedule') or 'trained_betas'}, {float(made.betas[0]):g} to "
        f"{float(made.betas[-1]):g}) are of no path here; there are linear ones and those of squaredcos_cap_v2"
    )


def _of_flow(made: Any) -> Objective | None:
    """Flow matching: Euler's and Heun's schedulers."""
    if not type(made).__name__.startswith("FlowMatch"):
        return None
    if made.config.num_train_timesteps != FLOW_STEPS or made.config.get("invert_sigmas"):
        raise WeightsError(
            f"its timesteps are {made.config.num_train_timesteps} sigma"
            f"{', inverted' if made.config.get('invert_sigmas') else ''}; expected {FLOW_STEPS} sigma"
        )
    return Objective(path=Linear(), prediction=Velocity())


TAKEN: tuple[Callable[[Any], Objective | None], ...] = (_of_flow, _of_betas)


def objective_of(folder: Path, learn_sigma: bool) -> Objective:
    """What the weights beside a scheduler were trained with. WeightsError where no objective of ours is that."""
    import diffusers

    settings = read_json(folder / FILE)
    name = str(settings.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise WeightsError(
            f"{folder / FILE}: _class_name is {name!r}, no scheduler of diffusers {diffusers.__version__}"
        )
    made = kind.from_config(settings)
    try:
        found = next((taken for take in TAKEN if (taken := take(made)) is not None), None)
    except WeightsError as error:
        raise WeightsError(f"{folder / FILE} ({name}): {error}") from None
    if found is None:
        raise WeightsError(f"{folder / FILE}: {name} is none of betas, nor of flow matching")
    if not learn_sigma or not isinstance(found.path, DiscretePath):
        return found
    return Objective(path=found.path, prediction=found.prediction, auxiliary=LearnedRange())
