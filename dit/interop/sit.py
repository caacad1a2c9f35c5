"""SiT's own weights (Ma et al., arXiv 2401.08740; the repository willisma/SiT).

    sit = from_state_dict(torch.load("SiT-XL-2-256x256.pt", weights_only=True))
    denoise = Denoiser(sit.model, sit.path, sit.prediction)

SiT's time runs from noise (0) to data (1), so its velocity points from noise to data: the path hands the network
1 - t, and the prediction is the velocity's reverse.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from dit.config import ConfigError, config, from_dict, to_dict
from dit.errors import Notice
from dit.flow.objective import Objective
from dit.flow.path import VP, Cosine, Linear, NoisePath
from dit.flow.predict import Eps, Prediction, ReverseVelocity, Score, Velocity
from dit.interop.format import DiTFormat
from dit.interop.outward import to_theirs
from dit.interop.weights import (
    OUTPUT,
    Arguments,
    Pretrained,
    ReferenceNetwork,
    StateDict,
    WeightsError,
    network,
    parse_arguments,
    without_discarded,
)
from dit.model.dit import DiT

PathName = Literal["Linear", "GVP", "VP"]
TimeName = Literal["sit", "repa"]
PredictionName = Literal["velocity", "noise", "score"]
PATHS: dict[PathName, NoisePath] = {
    "Linear": Linear(model_time_data=1.0, model_time_noise=0.0),
    "GVP": Cosine(model_time_data=1.0, model_time_noise=0.0),
    "VP": VP(beta_min=0.1, beta_max=20.0, model_time_data=1.0, model_time_noise=0.0),
}
PREDICTIONS: dict[PredictionName, Prediction] = {
    "velocity": ReverseVelocity(),
    "noise": Eps(),
    "score": Score(),
}
PROJECTORS = "projectors."  # of hidden states to features of another network, in training alone
REPA_PATHS: dict[PathName, NoisePath] = {
    "Linear": Linear(model_time_data=0.0, model_time_noise=1.0),
    "GVP": Cosine(model_time_data=0.0, model_time_noise=1.0),
}


@config
class RepaArguments(Arguments):
    """A SiT's arguments, of weights that REPA trained: its time is our t, 0 data, 1 noise."""


@config
class SiT(DiTFormat):
    """A SiT of this path and prediction, by the names of its command line."""

    path: PathName = "Linear"  # its --path-type: Linear, GVP or VP
    prediction: PredictionName = "velocity"  # its --prediction: velocity, noise or score
    # SiT's time is 1 - t, REPA's (arXiv 2410.06940) t; null = REPA's where the weights hold its projectors
    time: TimeName | None = None
    learn_sigma: bool = True  # of weights written for SiT's code: with the rows that it computes and discards

    def infer(
        self, state: StateDict, num_heads: int | None = None, num_classes: int | None = None
    ) -> Arguments:
        """The arguments that the shapes speak for. A Notice says what is left out."""
        left = sorted(name for name in state if name.startswith(PROJECTORS))
        if left:
            warnings.warn(
                f"{len(left)} entries of projectors ({left[0]}, ...) are left out"
                + ("" if self.time else "; they are REPA's, whose time is taken: --time=sit says another"),
                Notice,
                stacklevel=2,
            )
        return super().infer(state, num_heads, num_classes)

    def ours(self, state: StateDict, arguments: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
        """(arguments of our network, its weights): without the output rows that SiT computes and discards.

        REPA's projectors are left out too. WeightsError where the state dict does not fit.
        """
        bare = {name: weight for name, weight in state.items() if not name.startswith(PROJECTORS)}
        kept, found = without_discarded(bare, arguments)
        is_repa = len(bare) < len(state) if self.time is None else self.time == "repa"
        return (from_dict(RepaArguments, to_dict(kept)) if is_repa else kept), found

    def objective(self, arguments: Arguments) -> Objective:
        """What the weights were trained with. ConfigError for what REPA does not have."""
        if isinstance(arguments, RepaArguments):
            if self.path not in REPA_PATHS or self.prediction != "velocity":
                raise ConfigError(
                    f"REPA trains velocity on {' or '.join(REPA_PATHS)}, not {self.prediction} on {self.path}"
                )
            return Objective(path=REPA_PATHS[self.path], prediction=Velocity())
        return Objective(path=PATHS[self.path], prediction=PREDICTIONS[self.prediction])

    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The reference's state dict. WeightsError for a network or an objective that it does not have."""
        if (objective.path, objective.prediction) not in product(PATHS.values(), PREDICTIONS.values()):
            raise WeightsError(
                f"SiT has no prediction {objective.prediction} on {objective.path}; it samples velocity, noise or "
                "score on its Linear, GVP and VP, with a model time of 1 - t and the velocity from noise to data: "
                "configs/objectives/sit.yaml trains such weights"
            )
        state = to_theirs(model)
        padded = {name: _with_second_half(state[name], model.dims.patch) for name in OUTPUT}
        return {**state, **padded} if self.learn_sigma else state


def _with_second_half(weight: Tensor, patch: int) -> Tensor:
    """The output layer's rows (p q C) with as many of zeros, which are discarded: (p q 2C, ...)."""
    rows = rearrange(weight, "(p q c) ... -> p q c ...", p=patch, q=patch)
    return rearrange(torch.cat([rows, torch.zeros_like(rows)], dim=2), "p q c ... -> (p q c) ...")


def from_state_dict(
    state_dict: StateDict,
    path: PathName = "Linear",
    prediction: PredictionName = "velocity",
    **model_arguments: Any,
) -> Pretrained:
    """The reference's model of these weights, our path and prediction for it.

    path, prediction: as SiT was trained (its --path-type and --prediction). model_arguments: the reference's names
    and defaults (`Arguments`), so none for SiT-XL/2 at 256 x 256. `.model` takes SiT's own time (0 noise, 1 data)
    as model time and gives C channels: those that SiT returns, also with learn_sigma. Weights with projectors are
    REPA's: the projectors are left out, and time and velocity are its own (0 data, 1 noise).

    Raises WeightsError naming every entry that does not fit, ConfigError for an unknown argument, path or
    prediction.
    """
    kind = from_dict(SiT, {"path": path, "prediction": prediction})
    arguments, ours = kind.ours(state_dict, parse_arguments(model_arguments, Arguments))
    objective = kind.objective(arguments)
    return Pretrained(ReferenceNetwork(network(ours, arguments)), objective.path, objective.prediction)
