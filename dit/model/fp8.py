"""Linear layers of the blocks that multiply in float8 (arXiv 2209.05433), by torchao; their weights stay as they are.

Inputs, weights and gradients are scaled and rounded to 8 bits where they are multiplied, and nowhere else: parameters
keep their names, dtype and values, so that a checkpoint knows nothing of it. Converted are the layers that do almost
all of the work, those of attention and MLP. Modulation has a row an image, not a token, and is bound by its weights'
bytes; embeddings and the last layer compute in float32 for accuracy (`dit.model.embed`), and are 1% of the work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from dit.config import ConfigError, Registry, config

MULTIPLE = 16  # of what a float8 product adds up and gives out: its kernels load 16 bytes at a time
CAPABILITY = (8, 9)  # of the first NVIDIA GPUs with float8 products: Ada; Hopper is 9.0


@config
class Fp8:
    """A way to scale what is rounded to float8."""

    emulate: bool = False  # compute the same rounded values in wider products: slowly, on any device

    def check(self, device: torch.device, rows: int) -> None:
        """ConfigError where torchao is not there, or the device or the batch does not allow such products.

        rows: tokens of a micro-batch, which the gradients of weights add up.
        """
        _float8()
        if rows % MULTIPLE:
            raise ConfigError(
                f"train.fp8: the {rows} tokens of a micro-batch are no multiple of {MULTIPLE}: change "
                "train.micro_batch (or train.global_batch), or model.registers"
            )
        if self.emulate:
            return
        found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        if found is None or found < CAPABILITY:
            here = "a CPU" if found is None else f"{torch.cuda.get_device_name(device)} of {_dotted(found)}"
            raise ConfigError(
                f"train.fp8: products in float8 need a GPU of compute capability {_dotted(CAPABILITY)} or more (Ada, "
                f"Hopper, Blackwell), and this is {here}: leave train.fp8 out, or set train.fp8.emulate: true for the "
                "same values, slowly"
            )

    def convert(self, model: nn.Module) -> nn.Module:
        """The network, its blocks' linear layers changed in place; before it is compiled or given to an engine.

        ConfigError where torchao is not there, or a layer's width is no multiple of 16.
        """
        layers = product_layers(model)
        for name, layer in layers.items():
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                raise ConfigError(
                    f"train.fp8: {name} makes {layer.out_features} numbers of {layer.in_features}, and float8 products "
                    f"take multiples of {MULTIPLE}: change model.width, mlp_ratio or block.mlp.hidden, or leave it out"
                )
        float8 = _float8()
        how = float8.Float8LinearConfig.from_recipe_name(FP8.name_of(self))
        float8.convert_to_float8_training(
            model, config=replace(how, emulate=self.emulate), module_filter_fn=lambda _, name: name in layers
        )
        return model


FP8: Registry[Fp8] = Registry("float8 scaling")


@FP8.register("tensorwise")
@config
class Tensorwise(Fp8):
    """One scale of each tensor, from its greatest number; gradients in e5m2, all else in e4m3."""


@FP8.register("rowwise")
@config
class Rowwise(Fp8):
    """A scale, a power of 2, of each row and column; all in e4m3."""


def product_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a network's blocks, by name, but for those of the modulation."""
    kinds = tuple({type(block) for block in cast(Any, model).blocks})
    found: dict[str, nn.Linear] = {}
    for name, block in model.named_modules():
        if isinstance(block, kinds):
            left = set(getattr(block, "modulation", nn.Identity()).modules())
            found |= {
                f"{name}.{inner}": layer
                for inner, layer in block.named_modules()
                if isinstance(layer, nn.Linear) and layer not in left
            }
    return found


def float8_classes(model: nn.Module) -> list[str]:
    """The classes of converted layers in a network, as package.module.Class."""
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    return sorted(f"{k.__module__}.{k.__qualname__}" for k in kinds if k.__module__.startswith("torchao."))


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _float8() -> Any:
    """torchao.float8; ConfigError where it is not there."""
    try:
        from torchao import float8
    except ImportError as error:
        raise ConfigError(
            f"train.fp8 needs torchao 0.18 or newer: pip install 'dit[fp8]' ({error})"
        ) from None
    return float8
