"""What the DiT and SiT repositories' state dicts have in common: names, shapes, and the network behind them.

Their networks are ours under other names (DiT's models.py; SiT's is a copy of it), so that weights only change
names and the patch embedding its shape. All errors of what came are `WeightsError`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Protocol, TypeVar

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, config, from_dict, to_dict
from dit.errors import UserError
from dit.flow.path import NoisePath
from dit.flow.predict import Cond, Prediction
from dit.model.dit import DiT, DiTConfig
from dit.model.embed import position_table, wide
from dit.model.sizes import SIZES, Size
from dit.model.tables import place_tables

StateDict = Mapping[str, Tensor]
Count = Annotated[int, Field(ge=1)]

Names = tuple[tuple[str, str], ...]
# Ours, theirs: parts of parameter names, replaced in this order.
NAMES: Names = (
    ("patch_embed.", "x_embedder."),
    ("time_embed.fc1.", "t_embedder.mlp.0."),
    ("time_embed.fc2.", "t_embedder.mlp.2."),
    ("conditioners.0.table.", "y_embedder.embedding_table."),
    ("output.proj.", "final_layer.linear."),
    ("output.modulation.", "final_layer.adaLN_modulation.1."),
    (".attention.", ".attn."),
    (".modulation.", ".adaLN_modulation.1."),
)
PATCHES, POSITION, LABELS = "x_embedder.proj.weight", "pos_embed", "y_embedder.embedding_table.weight"
OUTPUT, HIDDEN = ("final_layer.linear.weight", "final_layer.linear.bias"), "blocks.0.mlp.fc1.weight"
# Heads are not in the weights: those of the paper's widths (arXiv 2212.09748, table 1)
HEADS = {SIZES[name].width: SIZES[name].heads for name in ("S", "B", "L", "XL")}
SAME_TABLE = 1e-6  # up to this a position table is the computed one: float32 rounding of sines


class WeightsError(UserError):
    """Foreign weights that are not what they should be, or ours that have no place in the other project."""


@config
class Arguments:
    """A reference model's arguments, with its names and defaults (XL/2 at 256 x 256 pixels)."""

    input_size: Count = 32  # latent pixels on a side
    patch_size: Count = 2  # latent pixels of a patch, on a side
    in_channels: Count = 4  # of the latents
    hidden_size: Count = 1152  # channels of a token
    depth: Count = 28  # blocks of the transformer
    num_heads: Count = 16  # of the attention; divides hidden_size
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0  # hidden width of the MLPs over hidden_size
    # share of labels dropped; 0: the label table has no null row
    class_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.1
    num_classes: Annotated[int, Field(ge=0)] = 1000  # classes without the null row
    learn_sigma: bool = True  # twice the output channels

    @property
    def names(self) -> Names:
        """Ours, theirs: parts of parameter names, replaced in this order."""
        return NAMES

    @property
    def tables(self) -> tuple[str, ...]:
        """Stored functions of the shapes, beside the position table."""
        return ()

    @property
    def has_null(self) -> bool:
        """Whether the label table has a null row."""
        return self.class_dropout_prob > 0

    def inferred(self, state: StateDict) -> Arguments:
        """The arguments that a state dict's shapes speak for, with as many heads as these."""
        return infer(state, self.num_heads)

    def model(self, stored_position: bool = False) -> DiTConfig:
        """Our config of the same network; of a named size where there is one."""
        size = Size(self.hidden_size, self.depth, self.num_heads)
        named = [name for name, known in SIZES.items() if known == size]
        values = {
            **({"size": named[0]} if named else size._asdict()),
            "patch": self.patch_size,
            "mlp_ratio": self.mlp_ratio,
            "learn_sigma": self.learn_sigma,
            "stored_position": stored_position,
        }
        return from_dict(DiTConfig, values)

    def build(self, stored_position: bool = False) -> DiT:
        """The network without numbers, on the meta device."""
        with torch.device("meta"):
            model = self.model(stored_position)
            return model.build(self.input_size, self.in_channels, self.num_classes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The state dict that a reference model of these arguments has: name -> shape."""
        model = self.build()
        found = {their_name(name, self.names): tuple(p.shape) for name, p in model.named_parameters()}
        found[PATCHES] = (self.hidden_size, self.in_channels, self.patch_size, self.patch_size)
        found[LABELS] = (self.num_classes + (self.class_dropout_prob > 0), self.hidden_size)
        return {POSITION: (1, *model.position.shape), **found}


def their_name(name: str, names: Names = NAMES) -> str:
    """The reference's name of one of our parameters."""
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name


def infer(
    state: StateDict,
    num_heads: int | None = None,
    num_classes: int | None = None,
    mlp_width: int | None = None,
) -> Arguments:
    """The arguments of the model that a state dict is of, from its shapes.

    num_heads: where the width is not one of the paper's. num_classes: for a model that was trained without
    label dropout, whose label table lacks the null row. mlp_width: of MLPs by other names, which `mlp_ratio` is then
    of. WeightsError where it is no state dict of such a model.
    """
    needed: tuple[str, ...] = (PATCHES, POSITION, LABELS, HIDDEN, OUTPUT[0])
    if mlp_width is not None:
        needed = (PATCHES, POSITION, LABELS, OUTPUT[0])
    if missing := [name for name in needed if name not in state]:
        some = ", ".join(list(state)[:5])
        raise WeightsError(f"no weights of a DiT or SiT: {', '.join(missing)} are missing; there are {some}")
    expected = [4, 3, 2, 2, 2][: len(needed)]
    if (axes := [state[name].ndim for name in needed]) != expected:
        raise WeightsError(
            f"no weights of a DiT or SiT: {', '.join(needed)} have {axes} axes, not {', '.join(map(str, expected))}"
        )
    width, channels, patch, _ = state[PATCHES].shape
    tokens, side = state[POSITION].shape[1], math.isqrt(state[POSITION].shape[1])
    if side * side != tokens:
        raise WeightsError(
            f"{POSITION} has {tokens} positions, which is no square; only square inputs are known"
        )
    heads = num_heads or HEADS.get(width)
    if heads is None:
        raise WeightsError(f"the number of heads of a model of width {width} is not known: give --num_heads")
    rows, hidden = len(state[LABELS]), len(state[HIDDEN]) if mlp_width is None else mlp_width
    return Arguments(
        input_size=side * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=width,
        depth=1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=heads,
        mlp_ratio=ratio_of(hidden, width),
        class_dropout_prob=0.0 if rows == num_classes else 0.1,
        num_classes=rows - 1 if num_classes is None else num_classes,
        learn_sigma=len(state[OUTPUT[0]]) == 2 * channels * patch**2,
    )


def ratio_of(hidden: int, width: int) -> float:
    """The smallest ratio with int(width * ratio) = hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def check(state: StateDict, arguments: Arguments) -> None:
    """WeightsError that names every entry that is missing, unexpected or of another shape."""
    rows = mismatches(state, arguments.shapes())
    if rows:
        text = "\n  ".join([f"the weights are not those of {arguments}:", *rows])
        raise WeightsError(text + _correction(state, arguments))


def mismatches(state: StateDict, expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each entry that is missing, unexpected or of another shape than name -> shape; of many the first."""
    has = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return [
        *_few([f"missing: {name} {shape}" for name, shape in expected.items() if name not in has]),
        *_few([f"unexpected: {name} {shape}" for name, shape in has.items() if name not in expected]),
        *_few(
            [
                f"{name}: is {has[name]}, expected {shape}"
                for name, shape in expected.items()
                if has.get(name, shape) != shape
            ]
        ),
    ]


def _few(rows: list[str], shown: int = 12) -> list[str]:
    return rows if len(rows) <= shown else [*rows[:shown], f"and {len(rows) - shown} more like that"]


def _correction(state: StateDict, arguments: Arguments) -> str:
    """Which arguments the shapes speak for instead, where they speak for any."""
    try:
        found = to_dict(arguments.inferred(state))
    except (WeightsError, ConfigError):
        return ""
    given = to_dict(arguments)
    better = [f"{name}={value}" for name, value in found.items() if value != given[name]]
    return f"\nThe shapes speak for {', '.join(better)}" if better else ""


def to_ours(state: StateDict, arguments: Arguments) -> dict[str, Tensor]:
    """Our state dict of these weights: copies in at least float32. "position" is in it if it is not computed.

    The reference averages its fixed position table along with its weights, so that the table of EMA weights may
    have drifted from the computed one by rounding. Then it is kept as it is: the network's numbers hang on it.
    A label table without a null row gets one of zeros.
    """
    check(state, arguments)
    model = arguments.build()
    found = {}
    for name, parameter in model.named_parameters():
        theirs = their_name(name, arguments.names)
        weight = wide(state[theirs].detach()).clone()
        if theirs == LABELS and len(weight) < len(parameter):
            weight = torch.cat([weight, weight.new_zeros(1, weight.shape[1])])
        found[name] = weight.reshape(parameter.shape)
    position = wide(state[POSITION][0].detach()).clone()  # (T, D)
    computed = position_table(arguments.hidden_size, model.dims.grid).to(position)
    return found if (position - computed).abs().max() <= SAME_TABLE else {**found, "position": position}


AnyArguments = TypeVar("AnyArguments")
Known = TypeVar("Known", bound=Arguments)


def without_discarded(state: StateDict, arguments: Known) -> tuple[Known, dict[str, Tensor]]:
    """(arguments of our network, its weights), as `to_ours`: without the output rows that `learn_sigma` adds.

    They are computed and discarded where no variance is learned, as in SiT.
    """
    check(state, arguments)
    kept = replace(arguments, learn_sigma=False)
    if not arguments.learn_sigma:
        return kept, to_ours(state, kept)
    rows = {name: _first_half(state[name], arguments.patch_size) for name in OUTPUT}
    return kept, to_ours({**state, **rows}, kept)


def _first_half(weight: Tensor, patch: int) -> Tensor:
    """Take of the output layer's rows (p q 2C) those of the first C channels: (p q C, ...)."""
    rows = rearrange(weight, "(p q c) ... -> p q c ...", p=patch, q=patch)
    return rearrange(rows[:, :, : rows.shape[2] // 2], "p q c ... -> (p q c) ...")


class Built(Protocol):
    """What `network` needs to know of a network."""

    def build(self, stored_position: bool = False) -> DiT:
        """The network without numbers, on the meta device."""


def network(ours: StateDict, arguments: Built) -> DiT:
    """The network with these weights of ours (see `to_ours`), which become its own; for evaluation."""
    model = arguments.build("position" in ours)
    model.load_state_dict(dict(ours), assign=True)
    place_tables(model, next(iter(ours.values())).dtype, but=ours.keys())
    return model.eval()


@dataclass(frozen=True)
class Pretrained:
    """Foreign weights ready for `dit.sample`: Denoiser(model, path, prediction)."""

    model: ReferenceNetwork
    path: NoisePath
    prediction: Prediction


class ReferenceNetwork(nn.Module):
    """Our network called as the reference's is: labels as numbers, num_classes for none."""

    def __init__(self, dit: DiT):
        super().__init__()
        self.dit = dit

    def forward(self, x: Tensor, model_time: Tensor, y: Tensor | Cond) -> Tensor:
        """x (B, C, H, W), model_time (B,), y (B,) int64 or a `Cond` -> the raw network's output.

        model_time: as the reference's embedder gets it; whole numbers are taken as float32. Of y, num_classes is
        the null class. (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        """
        if not model_time.is_floating_point():
            model_time = model_time.float()
        if isinstance(y, Tensor):
            y = {"label": torch.where(y == self.dit.dims.num_classes, -1, y)}
        out: Tensor = self.dit(x, model_time, y)
        return out


def parse_arguments(given: Mapping[str, object], kind: type[AnyArguments]) -> AnyArguments:
    """Arguments from keyword arguments; ConfigError names an unknown one and the nearest there is."""
    try:
        return from_dict(kind, given)
    except ConfigError as error:
        raise ConfigError(f"model arguments of the reference: {error}") from None
