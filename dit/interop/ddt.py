"""DDT's own weights (Wang et al., arXiv 2504.05741; the repository MCG-NJU/DDT).

    ddt = from_state_dict(state_dict, num_encoder_blocks=22, ...)
    denoise = Denoiser(ddt.model, ddt.path, ddt.prediction)

Its time runs from noise (0) to data (1); the sinusoids have period 10. Inputs may be of any size, as no weight hangs on
it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from dit.config import config, from_dict
from dit.flow.path import Linear
from dit.flow.predict import Cond, ReverseVelocity
from dit.interop.weights import (
    Count,
    Pretrained,
    ReferenceNetwork,
    StateDict,
    WeightsError,
    mismatches,
)
from dit.interop.weights import parse_arguments as parse
from dit.model.ddt import DDTConfig
from dit.model.dit import DiT
from dit.model.embed import wide
from dit.model.tables import place_tables, resize

PERIOD = 10.0  # of its sinusoids of time
PATH = Linear(model_time_data=1.0, model_time_noise=0.0)
# Ours, theirs: parts of parameter names, replaced in this order; blocks are numbered through, the encoder's first
NAMES = (
    ("output.patch_embed.", "x_embedder."),
    ("patch_embed.", "s_embedder."),
    ("time_embed.fc1.", "t_embedder.mlp.0."),
    ("time_embed.fc2.", "t_embedder.mlp.2."),
    ("conditioners.0.table.", "y_embedder.embedding_table."),
    ("output.end.proj.", "final_layer.linear."),
    ("output.end.modulation.", "final_layer.adaLN_modulation.0."),
    (".attention.", ".attn."),
    (".modulation.", ".adaLN_modulation.0."),
    (".mlp.fc2.", ".mlp.w2."),
    (".gain", ".weight"),
)
GATES, OUTPUT = ".mlp.fc1.", "output.end.proj."  # of ours, in which theirs are stacked or turned


@config
class DDTArguments:
    """A DDT's arguments, with its names and defaults."""

    in_channels: Count = 4  # of the latents
    num_groups: Count = 12  # heads of the attention
    hidden_size: Count = 1152  # channels of a token
    num_blocks: Count = 18  # blocks of encoder and decoder
    num_encoder_blocks: Count = 4  # of them in the encoder
    patch_size: Count = 2  # latent pixels of a patch, on a side
    num_classes: Annotated[int, Field(ge=0)] = 1000  # classes without the null row
    learn_sigma: bool = False  # which changes nothing in its network

    def model(self) -> DDTConfig:
        """Our config of the same network."""
        values = {
            "width": self.hidden_size,
            "depth": self.num_encoder_blocks,
            "heads": self.num_groups,
            "decoder_depth": self.num_blocks - self.num_encoder_blocks,
            "patch": self.patch_size,
            "position_table": False,
            "time_period": PERIOD,
            "output_norm": "layer",
            "block": {
                "norm": "rms",
                "qk_norm": "rms",
                "mlp": {"name": "swiglu", "bias": False},
                "rope": "alternating",
                "qkv_bias": False,
            },
        }
        return from_dict(DDTConfig, values)


def their_name(name: str, encoder: int) -> str:
    """DDT's name of one of our parameters, whose encoder has so many blocks; of a gate and its value the gate's."""
    name = re.sub(r"^output\.blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + encoder}", name)
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name.replace(GATES, ".mlp.w1.")


def to_ours(state: StateDict, arguments: DDTArguments) -> tuple[DiT, dict[str, Tensor]]:
    """Our network on the meta device, and its weights: copies in at least float32.

    WeightsError that names every entry that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = arguments.model().build(arguments.patch_size, arguments.in_channels, arguments.num_classes)
    places = {name: their_name(name, arguments.num_encoder_blocks) for name, _ in model.named_parameters()}
    shapes = {places[name]: tuple(p.shape) for name, p in model.named_parameters()}
    for gate in [theirs for name, theirs in places.items() if GATES in name]:
        rows, width = shapes[gate]
        shapes[gate] = shapes[gate.replace(".w1.", ".w3.")] = (rows // 2, width)
    if wrong := mismatches(state, shapes):
        raise WeightsError("\n  ".join([f"the weights are not those of {arguments}:", *wrong]))
    found = {}
    for name, theirs in places.items():
        weight = wide(state[theirs].detach()).clone()
        if GATES in name:
            weight = torch.cat([weight, wide(state[theirs.replace(".w1.", ".w3.")].detach())])
        if name.startswith(OUTPUT):  # channels outermost there, innermost here
            weight = rearrange(
                weight, "(c p q) ... -> (p q c) ...", p=arguments.patch_size, q=arguments.patch_size
            )
        found[name] = weight.contiguous()
    return model, found


def from_state_dict(state_dict: StateDict, **model_arguments: Any) -> Pretrained:
    """The reference's model of these weights, its path and its prediction.

    model_arguments: the reference's names and defaults (`DDTArguments`). `.model` takes its own time (0 noise, 1 data)
    as model time; of labels the last, num_classes, is the null class.

    Raises WeightsError naming every entry that does not fit, ConfigError for an unknown argument.
    """
    model, ours = to_ours(state_dict, parse(model_arguments, DDTArguments))
    model.load_state_dict(ours, assign=True)
    place_tables(model, next(iter(ours.values())).dtype)
    return Pretrained(DDTNetwork(model.eval()), PATH, ReverseVelocity())


class DDTNetwork(ReferenceNetwork):
    """Our network called as DDT's is, with inputs of any size that its patches divide."""

    def forward(self, x: Tensor, model_time: Tensor, y: Tensor | Cond) -> Tensor:
        """x (B, C, H, W), model_time (B,), y (B,) int64 or a `Cond` -> (B, C, H, W)."""
        if self.dit.dims.image_size != tuple(x.shape[2:]):
            resize(self.dit, (x.shape[2], x.shape[3]))
        return super().forward(x, model_time, y)
