"""LightningDiT's own weights (Yao et al., arXiv 2501.01423; the repository hustvl/LightningDiT).

    lightning = from_state_dict(state_dict, use_qknorm=True, ...)
    denoise = Denoiser(lightning.model, lightning.path, lightning.prediction)

Its time runs from noise (0) to data (1) and reaches the sinusoids as it is, as SiT's does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from dit.config import config, from_dict
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import ReverseVelocity
from dit.interop.weights import (
    NAMES,
    Arguments,
    Names,
    Pretrained,
    ReferenceNetwork,
    StateDict,
    WeightsError,
    network,
    parse_arguments,
    to_ours,
)
from dit.model.block import AdaLNZero
from dit.model.dit import DiTConfig
from dit.model.rope import Halves

QK_EPSILON = 1e-5  # of its LayerNorms of queries and keys
COSINES, SINES = "feat_rope.freqs_cos", "feat_rope.freqs_sin"  # functions of the shapes, stored all the same
SAME_TABLE = 1e-5  # up to this they are the computed ones: float32's rounding of an angle
PATH = Linear(model_time_data=1.0, model_time_noise=0.0)
# Ours, theirs: what its blocks have beside the reference's
GATED: Names = ((".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3."))
MORE: Names = (("output.norm.", "final_layer.norm_final."), (".gain", ".weight"))


@config
class LightningArguments(Arguments):
    """A LightningDiT's arguments, with its names and defaults (XL/1 on 16 x 16 latents of 32 channels)."""

    input_size: int = 16  # latent pixels on a side
    patch_size: int = 1  # latent pixels of a patch, on a side
    in_channels: int = 32  # of the latents
    learn_sigma: bool = False  # twice the output channels
    use_qknorm: bool = False  # norms of queries and keys
    use_swiglu: bool = False  # gated MLPs (SwiGLU) in place of GELU
    use_rope: bool = False  # rotary positions, beside the table
    use_rmsnorm: bool = False  # RMSNorms with gains, in place of LayerNorms without
    wo_shift: bool = False  # blocks without shifts

    @property
    def names(self) -> Names:
        """Ours, theirs."""
        return (*MORE, *(GATED if self.use_swiglu else ()), *NAMES)

    def model(self, stored_position: bool = False) -> DiTConfig:
        """Our config of the same network."""
        qk_norm: Any = "none"
        if self.use_qknorm:
            qk_norm = "rms" if self.use_rmsnorm else {"name": "layer", "affine": True, "epsilon": QK_EPSILON}
        block = {
            "norm": "rms" if self.use_rmsnorm else "layer",
            "qk_norm": qk_norm,
            "mlp": "swiglu" if self.use_swiglu else "gelu",
            "rope": "halves" if self.use_rope else None,
            "shift": not self.wo_shift,
        }
        return replace(Arguments.model(self, stored_position), block=from_dict(AdaLNZero, block))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The state dict that a LightningDiT of these arguments has: name -> shape."""
        table = ((self.input_size // self.patch_size) ** 2, self.hidden_size // self.num_heads)
        return Arguments.shapes(self) | (dict.fromkeys((COSINES, SINES), table) if self.use_rope else {})


class LightningDiT:
    """Velocity from noise to data on the linear path; the embedder gets 1 - t."""

    def ours(self, state: StateDict, arguments: LightningArguments) -> tuple[Arguments, dict[str, Tensor]]:
        """(arguments of our network, its weights). WeightsError where the state dict does not fit."""
        found = to_ours(state, arguments)
        if arguments.use_rope:
            _check_tables(state, arguments)
        return arguments, found

    def objective(self, arguments: Arguments) -> Objective:
        """What the weights were trained with."""
        return Objective(path=PATH, prediction=ReverseVelocity())


def _check_tables(state: StateDict, arguments: LightningArguments) -> None:
    """Refuse rotary tables that are not the computed ones, such as those of a model stretched to a larger grid."""
    side = arguments.input_size // arguments.patch_size
    tables = Halves().table((side, side), arguments.hidden_size // arguments.num_heads)  # (2, T, d/2)
    for name, table in zip((COSINES, SINES), tables, strict=True):
        error = float((state[name].double() - table.repeat_interleave(2, dim=-1)).abs().max())
        if not error <= SAME_TABLE:
            raise WeightsError(
                f"{name} is not that of rotary positions 0 to {side - 1} with base 10000 (off by {error:.3g}); "
                "interpolated positions are not known"
            )


def from_state_dict(state_dict: StateDict, **model_arguments: Any) -> Pretrained:
    """The reference's model of these weights, its path and its prediction.

    model_arguments: the reference's names and defaults (`LightningArguments`). `.model` takes its own time (0 noise,
    1 data) as model time; of labels the last, num_classes, is the null class.

    Raises WeightsError naming every entry that does not fit, ConfigError for an unknown argument.
    """
    kind = LightningDiT()
    arguments, ours = kind.ours(state_dict, parse_arguments(model_arguments, LightningArguments))
    objective = kind.objective(arguments)
    return Pretrained(ReferenceNetwork(network(ours, arguments)), objective.path, objective.prediction)
