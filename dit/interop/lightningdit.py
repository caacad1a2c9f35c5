"""LightningDiT's own weights (Yao et al., arXiv 2501.01423; the repository hustvl/LightningDiT).

    lightning = from_state_dict(state_dict, use_qknorm=True, ...)
    denoise = Denoiser(lightning.model, lightning.path, lightning.prediction)

Its time runs from noise (0) to data (1) and reaches the sinusoids as it is, as SiT's does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit.config import config, from_dict, to_dict
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import ReverseVelocity
from dit.interop.format import Format
from dit.interop.outward import arguments_of, check_flow, named_as_theirs
from dit.interop.weights import (
    NAMES,
    PATCHES,
    Arguments,
    Names,
    Pretrained,
    ReferenceNetwork,
    StateDict,
    WeightsError,
    infer,
    network,
    parse_arguments,
    without_discarded,
)
from dit.model.block import AdaLNZero
from dit.model.dit import DiT, DiTConfig
from dit.model.mlp import SwiGluMlp
from dit.model.norms import NoNorm, RootMeanSquare
from dit.model.rope import Halves

QK_EPSILON = 1e-5  # of its LayerNorms of queries and keys
COSINES, SINES = "feat_rope.freqs_cos", "feat_rope.freqs_sin"  # functions of the shapes, stored all the same
SAME_TABLE = 1e-5  # up to this they are the computed ones: float32's rounding of an angle
PATH = Linear(model_time_data=1.0, model_time_noise=0.0)
GATES, GATE_NORM = "blocks.0.mlp.w12.weight", "blocks.0.norm1.weight"  # what tells SwiGLU, RMSNorms
QUERY_NORM, ROWS = "blocks.0.attn.q_norm.weight", "blocks.0.adaLN_modulation.1.weight"
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

    @property
    def tables(self) -> tuple[str, ...]:
        """Stored functions of the shapes, beside the position table."""
        return (COSINES, SINES) if self.use_rope else ()

    def inferred(self, state: StateDict) -> Arguments:
        """The arguments that a state dict speaks for, with as many heads as these."""
        return LightningDiT().infer(state, self.num_heads)

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
        return Arguments.shapes(self) | dict.fromkeys(self.tables, table)


class LightningDiT(Format[LightningArguments]):
    """Velocity from noise to data on the linear path; the embedder gets 1 - t. Its latents are VA-VAE's."""

    factor, scale = 16, None

    def infer(
        self, state: StateDict, num_heads: int | None = None, num_classes: int | None = None
    ) -> LightningArguments:
        """The arguments that names and shapes speak for; heads as wide as norms or rotary tables say."""
        gated = _gated_width(state) if GATES in state else None
        found = infer(state, num_heads or _heads(state), num_classes, gated)
        told = {
            "use_qknorm": QUERY_NORM in state,
            "use_swiglu": GATES in state,
            "use_rope": COSINES in state,
            "use_rmsnorm": GATE_NORM in state,
            "wo_shift": len(state.get(ROWS, ())) == 4 * found.hidden_size,
        }
        return from_dict(LightningArguments, {**to_dict(found), **told})

    def ours(
        self, state: StateDict, arguments: LightningArguments
    ) -> tuple[LightningArguments, dict[str, Tensor]]:
        """(arguments of our network, its weights). WeightsError where the state dict does not fit."""
        kept, found = without_discarded(state, arguments)
        if arguments.use_rope:
            _check_tables(state, arguments)
        return kept, found

    def objective(self, arguments: Arguments) -> Objective:
        """What the weights were trained with."""
        return Objective(path=PATH, prediction=ReverseVelocity())

    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The reference's state dict. WeightsError for a network or an objective that it does not have."""
        check_flow("LightningDiT", objective, PATH)
        arguments = _arguments_of(model)
        named = named_as_theirs(model, arguments=arguments)
        return {**named, **(_stored_tables(arguments) if arguments.use_rope else {})}


def _heads(state: StateDict) -> int | None:
    """Heads, where norms of queries or rotary tables tell their width."""
    widths = [state[name].shape[-1] for name in (QUERY_NORM, COSINES) if name in state]
    return len(state[PATCHES]) // widths[0] or None if widths and PATCHES in state else None


def _gated_width(state: StateDict) -> int:
    """Width of the MLPs, int(2/3 of which) is that of SwiGLU's gates; of those the roundest multiple of the width."""
    gates = len(state[GATES]) // 2
    fit = [m for m in range(3 * gates // 2, 3 * gates // 2 + 3) if int(2 / 3 * m) == gates]
    return min(fit, key=lambda m: len(repr(m / max(1, len(state.get(PATCHES, ()))))))


def _arguments_of(model: DiT) -> LightningArguments:
    """The reference's arguments that come nearest to our network."""
    found: dict[str, Any] = {}
    if isinstance(block := model.cfg.block, AdaLNZero):
        found = {
            "use_qknorm": not isinstance(block.qk_norm, NoNorm),
            "use_swiglu": isinstance(block.mlp, SwiGluMlp),
            "use_rope": block.rope is not None,
            "use_rmsnorm": isinstance(block.norm, RootMeanSquare),
            "wo_shift": not block.shift,
        }
    return from_dict(LightningArguments, {**to_dict(arguments_of(model)), **found})


def _stored_tables(arguments: LightningArguments) -> dict[str, Tensor]:
    """The rotary tables as it stores them: all in float32, whose rounding of an angle is another than float64's."""
    side = arguments.input_size // arguments.patch_size
    half = arguments.hidden_size // arguments.num_heads // 2
    frequencies = 1.0 / 10_000 ** (torch.arange(0, half, 2).float() / half)
    angles = torch.outer(torch.arange(side) / side * side, frequencies).repeat_interleave(2, dim=-1)
    down, across = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    both = torch.cat([down, across], dim=-1).flatten(0, 1)  # (T, d)
    return {COSINES: both.cos(), SINES: both.sin()}


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
