"""DiT's own weights (Peebles & Xie, arXiv 2212.09748; the repository facebookresearch/DiT).

dit = facebook_dit.from_state_dict(torch.load("DiT-XL-2-256x256.pt", weights_only=True))
denoise = Denoiser(dit.model, dit.path, dit.prediction)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit.flow.discrete import DiscreteVP
from dit.flow.objective import Objective
from dit.flow.predict import Eps
from dit.flow.variance import LearnedRange
from dit.interop.format import DiTFormat
from dit.interop.outward import to_theirs
from dit.interop.weights import (
    Arguments,
    Pretrained,
    ReferenceNetwork,
    StateDict,
    WeightsError,
    network,
    parse_arguments,
    to_ours,
)
from dit.model.dit import DiT


class FacebookDiT(DiTFormat):
    """eps on DDPM's 1000 steps with linear betas; the embedder gets the step k. A learned variance follows."""

    def ours(self, state: StateDict, arguments: Arguments) -> tuple[Arguments, dict[str, Tensor]]:
        """(arguments of our network, its weights). WeightsError where the state dict does not fit."""
        return arguments, to_ours(state, arguments)

    def objective(self, arguments: Arguments) -> Objective:
        """What the weights were trained with."""
        auxiliary = LearnedRange() if arguments.learn_sigma else None
        return Objective(path=DiscreteVP(), prediction=Eps(), auxiliary=auxiliary)

    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The reference's state dict. WeightsError for a network or an objective that it does not have."""
        if (objective.path, objective.prediction) != (DiscreteVP(), Eps()):
            raise WeightsError(
                f"facebookresearch/DiT samples eps on {DiscreteVP()}; these weights predict {objective.prediction} "
                f"on {objective.path}; configs/objectives/ddpm_learned_variance.yaml trains such weights"
            )
        return to_theirs(model)


def from_state_dict(state_dict: StateDict, **model_arguments: Any) -> Pretrained:
    """The reference's model of these weights, its path and its prediction.

    model_arguments: the reference's names and defaults (`Arguments`), so none for DiT-XL/2 at 256 x 256. `.model`
    takes the step index k (0..999) as model time, and gives eps, then the variance's C channels if learn_sigma.

    Raises WeightsError naming every entry that does not fit, ConfigError for an unknown argument.
    """
    kind = FacebookDiT()
    arguments, ours = kind.ours(state_dict, parse_arguments(model_arguments, Arguments))
    objective = kind.objective(arguments)
    return Pretrained(ReferenceNetwork(network(ours, arguments)), objective.path, objective.prediction)
