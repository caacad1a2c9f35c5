"""DDT's own weights (Wang et al., arXiv 2504.05741; the repository MCG-NJU/DDT).

    ddt = from_state_dict(state_dict, num_encoder_blocks=22, ...)
    denoise = Denoiser(ddt.model, ddt.path, ddt.prediction)

Its time runs from noise (0) to data (1); the sinusoids have period 10. Inputs may be of any size, as no weight hangs on
it.
"""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor

from dit.config import config, from_dict
from dit.errors import Notice
from dit.flow.objective import Objective
from dit.flow.path import Linear
from dit.flow.predict import Cond, ReverseVelocity
from dit.interop.format import Format
from dit.interop.outward import check_attention, check_flow, check_has_no_more
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
from dit.model.kinds import MODELS
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
PATCHES, LABELS = "s_embedder.proj.weight", "y_embedder.embedding_table.weight"
QUERY_NORM = "blocks.0.attn.q_norm.weight"
XL = (28, 22)  # blocks, and those of them that are the encoder's
# keys of our config that are compared as shapes
FREE = ("decoder_depth", "decoder_width", "decoder_heads")
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

    def model(self, stored_position: bool = False) -> DDTConfig:
        """Our config of the same network; it has no position table that could be stored."""
        if self.num_encoder_blocks >= self.num_blocks:
            raise WeightsError(
                f"num_encoder_blocks is {self.num_encoder_blocks} of {self.num_blocks} blocks, and leaves none for the "
                "decoder: give --num_encoder_blocks"
            )
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

    def build(self, stored_position: bool = False) -> DiT:
        """The network without numbers, on the meta device, for inputs of one patch."""
        with torch.device("meta"):
            return self.model().build(self.patch_size, self.in_channels, self.num_classes)


@config
class SizedArguments(DDTArguments):
    """A DDT's arguments with the size of its inputs, which its network does not hold."""

    input_size: Count = 32  # latent pixels on a side

    @property
    def has_null(self) -> bool:
        """Whether the label table has a null row: it always has."""
        return True

    def build(self, stored_position: bool = False) -> DiT:
        """The network without numbers, on the meta device."""
        with torch.device("meta"):
            return self.model().build(self.input_size, self.in_channels, self.num_classes)


@config
class DDT(Format[SizedArguments]):
    """A DDT, with what its weights do not tell, by the names of its command line."""

    num_encoder_blocks: Count | None = None  # of its blocks; null = 22 where there are XL's 28
    patch_size: Count = 2  # latent pixels of a patch, on a side
    input_size: Count = 32  # latent pixels on a side

    def infer(
        self, state: StateDict, num_heads: int | None = None, num_classes: int | None = None
    ) -> SizedArguments:
        """The arguments that the shapes speak for, beside those that are given. A Notice says which was guessed."""
        needed = {PATCHES: 2, LABELS: 2, QUERY_NORM: 1}
        if missing := [
            name for name, axes in needed.items() if name not in state or state[name].ndim != axes
        ]:
            some = ", ".join(list(state)[:5])
            raise WeightsError(f"no weights of a DDT: {', '.join(missing)} are missing; there are {some}")
        width, numbers = state[PATCHES].shape
        channels, rest = divmod(numbers, self.patch_size**2)
        if rest or not channels:
            raise WeightsError(
                f"{PATCHES} takes {numbers} numbers, no multiple of those of patches of {self.patch_size} x "
                f"{self.patch_size}: give --patch_size"
            )
        blocks = 1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name)))
        return SizedArguments(
            in_channels=channels,
            num_groups=num_heads or max(1, width // max(1, len(state[QUERY_NORM]))),
            hidden_size=width,
            num_blocks=blocks,
            num_encoder_blocks=self.num_encoder_blocks or _encoder_of(blocks),
            patch_size=self.patch_size,
            num_classes=len(state[LABELS]) - 1 if num_classes is None else num_classes,
            input_size=self.input_size,
        )

    def ours(self, state: StateDict, arguments: SizedArguments) -> tuple[SizedArguments, dict[str, Tensor]]:
        """(arguments of our network, its weights). WeightsError where the state dict does not fit."""
        return arguments, to_ours(state, arguments)[1]

    def objective(self, arguments: SizedArguments) -> Objective:
        """What the weights were trained with."""
        return Objective(path=PATH, prediction=ReverseVelocity())

    def theirs(self, model: DiT, objective: Objective) -> dict[str, Tensor]:
        """The reference's state dict. WeightsError for a network or an objective that it does not have."""
        check_flow("DDT", objective, PATH)
        return to_theirs(model)


def _encoder_of(blocks: int) -> int:
    """The encoder's share of so many blocks, where it is not said."""
    if blocks != XL[0]:
        raise WeightsError(
            f"how many of the {blocks} blocks are the encoder's is not in the weights: give --num_encoder_blocks "
            f"(DDT-XL has {XL[1]} of {XL[0]})"
        )
    text = f"{XL[1]} of {XL[0]} blocks are taken to be the encoder's, as DDT-XL's are: --num_encoder_blocks says others"
    warnings.warn(text, Notice, stacklevel=2)
    return XL[1]


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
    model = arguments.build()
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


def to_theirs(model: DiT) -> dict[str, Tensor]:
    """The reference's state dict of our network's weights. WeightsError for a network that it does not have."""
    if not isinstance(model.cfg, DDTConfig):
        raise WeightsError(
            f"DDT's networks are of model 'ddt', this one is of '{MODELS.name_of(model.cfg)}': an encoder and a decoder"
        )
    dims = model.dims
    reference = DDTArguments(
        in_channels=dims.channels,
        num_groups=dims.heads,
        hidden_size=dims.width,
        num_blocks=dims.depth + model.cfg.decoder_depth,
        num_encoder_blocks=dims.depth,
        patch_size=dims.patch,
        num_classes=dims.num_classes,
    )
    check_has_no_more(model, FREE, reference.model())
    shapes = {name: tuple(p.shape) for name, p in reference.build().named_parameters()}
    has = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if wrong := [name for name in {**has, **shapes} if has.get(name) != shapes.get(name)]:
        raise WeightsError(
            f"DDT has no such network; it differs in the shapes of {', '.join(wrong[:5])}: its decoder is as wide as "
            "its encoder, with as many heads, and its MLPs are of 4 times the width"
        )
    check_attention(model)
    found = {}
    for name, parameter in model.named_parameters():
        theirs, weight = their_name(name, dims.depth), parameter.detach()
        if GATES in name:
            weight, found[theirs.replace(".w1.", ".w3.")] = weight.chunk(2)
        if name.startswith(OUTPUT):
            weight = rearrange(weight, "(p q c) ... -> (c p q) ...", p=dims.patch, q=dims.patch)
        found[theirs] = weight
    return found


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
