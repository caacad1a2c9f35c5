"""diffusers' DiTTransformer2DModel: its names, its config.json, its folder, and our network of it.

The network is the reference's (facebookresearch/DiT) with two differences, which are keys of our model: its sinusoids
of time have other frequencies, and an epsilon is configured. Each of its blocks holds the time and label embedders
anew, and the output layer uses the first block's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.config import ConfigError, flatten, from_dict, to_dict
from dit.errors import shown
from dit.files import read_text
from dit.interop.files import read_weights
from dit.interop.outward import arguments_of, check_has_no_more, named_as_theirs
from dit.interop.weights import (
    LABELS,
    POSITION,
    SAME_TABLE,
    Arguments,
    StateDict,
    WeightsError,
    mismatches,
)
from dit.model.block import AdaLNZero
from dit.model.dit import DiT, DiTConfig
from dit.model.embed import position_table, wide

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
CLASSES = (
    "DiTTransformer2DModel",
    "Transformer2DModel",
)  # the second, of folders made before 2024, is read as well
KNOWN = ("time_frequencies", "block.mlp_epsilon")  # keys of a model that diffusers has too
MLP_RATIO = 4.0  # which its blocks have, whatever is configured
# What every DiT is configured as; the defaults of the class.
FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
DEFAULTS = {
    **FIXED,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
SIZES = (
    "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip
# Theirs, the reference's: parts of names. Those of a block stand under transformer_blocks.I and blocks.I.
_ENDS = (
    ("pos_embed.proj", "x_embedder.proj"),
    ("proj_out_1", "final_layer.adaLN_modulation.1"),
    ("proj_out_2", "final_layer.linear"),
)
_BLOCK = (
    ("attn1.to_out.0", "attn.proj"),
    ("ff.net.0.proj", "mlp.fc1"),
    ("ff.net.2", "mlp.fc2"),
    ("norm1.linear", "adaLN_modulation.1"),
)
_HEADS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # thirds of the reference's attn.qkv
_EMBEDDERS = (  # in every block the same
    ("norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("norm1.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
)
_TABLE = "norm1.emb.class_embedder.embedding_table.weight"


@dataclass(frozen=True)
class Place:
    """Where the reference has what diffusers has under a name: all of an entry, or one third of its rows."""

    name: str
    third: int | None = None

    def of(self, state: StateDict) -> Tensor:
        """The tensor in the reference's state dict."""
        return state[self.name] if self.third is None else state[self.name].chunk(3)[self.third]

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Its shape, from those of the reference."""
        rows, *rest = shapes[self.name]
        return (rows if self.third is None else rows // 3, *rest)


def layout(depth: int) -> dict[str, Place]:
    """Every entry of diffusers' state dict, and where the reference has it."""
    return dict(_layout(depth))


def _layout(depth: int) -> Iterator[tuple[str, Place]]:
    for kind in ("weight", "bias"):
        for theirs, name in _ENDS:
            yield f"{theirs}.{kind}", Place(f"{name}.{kind}")
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        yield f"{block}.{_TABLE}", Place(LABELS)
        for kind in ("weight", "bias"):
            for theirs, name in _EMBEDDERS:
                yield f"{block}.{theirs}.{kind}", Place(f"{name}.{kind}")
            for theirs, name in _BLOCK:
                yield f"{block}.{theirs}.{kind}", Place(f"blocks.{i}.{name}.{kind}")
            for third, theirs in enumerate(_HEADS):
                yield f"{block}.{theirs}.{kind}", Place(f"blocks.{i}.attn.qkv.{kind}", third)


# --- in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transformer:
    """One that was read: the reference's arguments and state dict, and the epsilon of the norm before the MLP."""

    arguments: Arguments
    state: dict[str, Tensor]
    epsilon: float

    def model(self) -> DiTConfig:
        """Our config of the network."""
        block = AdaLNZero(mlp_epsilon=self.epsilon)
        return replace(self.arguments.model(), time_frequencies="ddpm", block=block)

    def with_classes(self, count: int) -> Transformer:
        """The same with the first `count` classes alone, and the null row."""
        table = self.state[LABELS]
        kept = torch.cat([table[:count], table[-1:]])
        return replace(
            self, arguments=replace(self.arguments, num_classes=count), state={**self.state, LABELS: kept}
        )


def read(folder: Path) -> Transformer:
    """Read a folder that save_pretrained wrote. WeightsError for what is no DiT, or one whose embedders differ."""
    settings = read_json(folder / CONFIG)
    arguments = _arguments({**DEFAULTS, **settings}, folder)
    state = _read_state(folder)
    places, shapes = layout(arguments.depth), arguments.shapes()
    expected = {name: place.shape(shapes) for name, place in places.items()}
    if rows := mismatches(state, expected):
        raise WeightsError("\n  ".join([f"{folder}: weights that do not fit its {CONFIG}:", *rows]))
    found: dict[str, list[Tensor]] = {}
    for name, place in places.items():
        there = found.setdefault(place.name, [])
        if place.third is None and there:
            _check_same(name, state[name], there[0], folder)
        else:
            there.append(state[name])
    grid = arguments.input_size // arguments.patch_size
    position = position_table(arguments.hidden_size, (grid, grid)).float()[None]
    reference = {
        name: wide(torch.cat(parts) if len(parts) > 1 else parts[0]) for name, parts in found.items()
    }
    epsilon = float(settings.get("norm_eps", DEFAULTS["norm_eps"]))
    return Transformer(arguments, {POSITION: position, **reference}, epsilon)


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file. WeightsError where it is missing or holds something else."""
    try:
        held = json.loads(read_text(path))
    except OSError as error:
        raise WeightsError(
            f"cannot read {path} ({error.strerror}); expected a folder that diffusers' save_pretrained wrote"
        ) from None
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error})") from None
    if not isinstance(held, dict):
        raise WeightsError(f"{path} holds no settings, but a {type(held).__name__}")
    return held


def _check_same(name: str, tensor: Tensor, first: Tensor, folder: Path) -> None:
    if not torch.equal(tensor, first):
        raise WeightsError(
            f"{folder}: {name} is another than in block 0; a DiT has one embedder of times and one of labels, which "
            "diffusers repeats in each block: these were trained apart, and no network of ours computes that"
        )


def _arguments(settings: Mapping[str, Any], folder: Path) -> Arguments:
    if (kind := settings.get("_class_name")) not in CLASSES:
        raise WeightsError(f"{folder / CONFIG}: _class_name is {kind!r}, expected {CLASSES[0]}")
    other = [
        f"{key} = {settings[key]!r}, not {value!r}" for key, value in FIXED.items() if settings[key] != value
    ]
    _check_numbers(settings, folder)
    outputs = settings["out_channels"] or settings["in_channels"]
    if outputs not in (settings["in_channels"], 2 * settings["in_channels"]):
        other.append(f"out_channels = {outputs}, neither in_channels nor twice as many")
    if other:
        raise WeightsError(f"{folder / CONFIG} is of no DiT: {'; '.join(other)}")
    values = {
        "input_size": settings["sample_size"],
        "patch_size": settings["patch_size"],
        "in_channels": settings["in_channels"],
        "hidden_size": settings["num_attention_heads"] * settings["attention_head_dim"],
        "depth": settings["num_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_ratio": MLP_RATIO,
        "num_classes": settings["num_embeds_ada_norm"],
        "learn_sigma": outputs != settings["in_channels"],
    }
    try:
        return from_dict(Arguments, values)
    except ConfigError as error:
        raise WeightsError(f"{folder / CONFIG}: {error}") from None


def _check_numbers(settings: Mapping[str, Any], folder: Path) -> None:
    """WeightsError for sizes that are no numbers, in the words of the file; and for one size a side."""
    for key in SIZES:
        value = settings[key]
        if type(value) is int and value > 0:
            continue
        square = "; only square inputs are known" if isinstance(value, list) else ""
        raise WeightsError(
            f"{folder / CONFIG}: {key} is {shown(value)}, expected a whole number above 0{square}"
        )
    if type(settings["norm_eps"]) not in (int, float):
        raise WeightsError(f"{folder / CONFIG}: norm_eps is {shown(settings['norm_eps'])}, expected a number")


def _read_state(folder: Path) -> dict[str, Tensor]:
    """The weights: one file or several with an index, of safetensors, else of torch.save."""
    for name in (f"{STEM}.safetensors", f"{STEM}.bin"):
        if (folder / name).is_file():
            return dict(read_weights(folder / name)["model"])
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            parts = [read_weights(folder / file)["model"] for file in files]
            return {key: tensor for part in parts for key, tensor in part.items()}
    raise WeightsError(
        f"{folder} holds no {STEM}.safetensors, nor .bin; expected what save_pretrained writes"
    )


# --- out ---------------------------------------------------------------------------------------------------


def config_of(model: DiT, num_classes: int) -> dict[str, Any]:
    """The config.json of our network, its label table padded to so many classes. WeightsError where it has none."""
    arguments = arguments_of(model)
    check_has_no_more(model, KNOWN)
    if arguments.mlp_ratio != MLP_RATIO:
        raise WeightsError(
            f"diffusers' DiT has MLPs of {MLP_RATIO:g} times its width, these are {arguments.mlp_ratio:g} times as wide"
        )
    return {
        "_class_name": CLASSES[0],
        **FIXED,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "upcast_attention": False,
        "num_attention_heads": arguments.num_heads,
        "attention_head_dim": arguments.hidden_size // arguments.num_heads,
        "in_channels": arguments.in_channels,
        "out_channels": arguments.in_channels * (1 + arguments.learn_sigma),
        "num_layers": arguments.depth,
        "sample_size": arguments.input_size,
        "patch_size": arguments.patch_size,
        "num_embeds_ada_norm": num_classes,
        "norm_eps": flatten(to_dict(model.cfg))["block.mlp_epsilon"],
    }


def state_of(model: DiT, num_classes: int) -> dict[str, Tensor]:
    """diffusers' state dict of our network, its label table padded by zeros to so many classes, the null row last.

    WeightsError for a network that diffusers does not have.
    """
    arguments = arguments_of(model)
    named = named_as_theirs(model, KNOWN)
    table = named[LABELS]
    padding = table.new_zeros(num_classes - arguments.num_classes, table.shape[1])
    named[LABELS] = torch.cat([table[:-1], padding, table[-1:]])
    return {name: place.of(named).contiguous() for name, place in layout(arguments.depth).items()}


def position_error(model: DiT) -> float:
    """How far the position table is from the computed one, which diffusers has; 0 within float32's rounding."""
    computed = position_table(model.dims.width, model.dims.grid).to(model.position)
    error = float((model.position - computed).abs().max())
    return error if error > SAME_TABLE else 0.0
