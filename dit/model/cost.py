"""What a model costs, computed from its config: parameters, FLOPs and memory, before anything is built.

One multiply-add is 2 FLOPs. The DiT paper's "Gflops" are multiply-adds (S/2: 6.06 G, XL/2: 118.6 G). Counted
are matrix products alone, as by `torch.utils.flop_counter`: norms, activations and softmax are left out.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dit.config import ConfigError, did_you_mean
from dit.model.block import BlockCost
from dit.model.dims import Dims
from dit.model.dit import DiTConfig
from dit.model.embed import FREQUENCIES

# Dense bfloat16 matrix products with float32 accumulation, FLOP/s, as the makers state them. A name fits if
# all its words are in the device's name; the first that fits counts. A CPU has no entry: measure it.
PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "H200": 989.5e12,
    "GH200": 989.5e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


@dataclass(frozen=True)
class Precision:
    """Bytes a number takes."""

    compute: int  # in the matrix products and what they keep
    copies: int  # a half-precision copy of each weight that the matrix products use


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision(compute=4, copies=0),
    "bf16": Precision(compute=2, copies=2),  # float32 parameters under autocast
}


@dataclass(frozen=True)
class Parameters:
    """Parameters by part. The reference also counts its frozen position table; here that is a buffer."""

    patch_embed: int
    time_embed: int
    conditioners: int  # with the null row
    blocks: int
    output: int
    position: int  # numbers in the position table: not trained, not in `trainable`

    @property
    def trainable(self) -> int:
        """What the optimizer sees: every part but the position table, which the reference's counts have too."""
        parts: int = sum(getattr(self, f.name) for f in fields(self))
        return parts - self.position


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them."""

    parameters: int
    gradients: int
    master: int  # the float32 copy that DeepSpeed keeps of its share, from stage 1
    optimizer: int  # Adam's two moments
    ema: int
    copies: int  # of weights in half precision, while a forward and backward pass are under way
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        parts: int = sum(getattr(self, f.name) for f in fields(self))
        return parts


@dataclass(frozen=True)
class Cost:
    """The cost of one model; `cost` makes it."""

    dims: Dims
    blocks: tuple[BlockCost, ...]
    output_saved: (
        int  # numbers that what comes after the blocks keeps for the backward pass, per image, in float32
    )
    parameters: Parameters
    multiply_adds: int  # of a forward pass, per image
    checkpoint_blocks: bool
    forwards: int = 0  # passes of an objective's terms, without gradients, beside the one that is trained

    @property
    def forward_flops(self) -> int:
        """Count those of a forward pass, per image: 2 per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def training_flops(self) -> int:
        """Count those of a training step, per image: 3 × forward, and the objective's other forward passes.

        What checkpointing computes again is not counted.
        """
        return (3 + self.forwards) * self.forward_flops

    def hours(self, images: int, peak: float, mfu: float) -> float:
        """Hours to train on so many images (with repeats) at that share of `peak` (FLOP/s of all devices)."""
        return images * self.training_flops / (peak * mfu) / 3600

    def memory(
        self,
        micro_batch: int,
        *,
        zero_stage: int = 0,
        world_size: int = 1,
        precision: str = "fp32",
        averages: int = 1,
        frozen: int = 0,
    ) -> Memory:
        """Bytes on one rank at the end of a forward pass of `micro_batch` images, gradients allocated.

        Stage 1 shares the optimizer's and the EMA's state, 2 also gradients, 3 also parameters. `frozen`
        parameters have no gradients and no optimizer's state. For eager execution; compiled blocks keep less. Not
        counted: communication buckets, the blocks that stage 3 has gathered, kernels' work space, the allocator's
        fragments.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{precision}'{did_you_mean(precision, PRECISIONS)}")
        if zero_stage not in range(4) or world_size < 1 or micro_batch < 0:
            raise ConfigError(
                "expected a ZeRO stage of 0 to 3, a world size of 1 or more and a micro-batch of 0 or more, "
                f"got {zero_stage}, {world_size} and {micro_batch}"
            )
        linear = sum(block.linear_parameters for block in self.blocks)
        kept = PRECISIONS[precision]
        states = state_memory(self.parameters.trainable, zero_stage, world_size, averages, frozen)
        return replace(
            states,
            parameters=states.parameters + 4 * self.parameters.position,
            copies=kept.copies * linear if zero_stage < 3 else 0,
            activations=micro_batch * self._activations(kept),
        )

    def _activations(self, precision: Precision) -> int:
        """Bytes kept for the backward pass, per image."""
        d, t = self.dims.width, self.dims.tokens
        kept = [precision.compute * block.saved_narrow + 4 * block.saved_wide for block in self.blocks]
        # patches, time embedding, and what comes after the blocks
        ends = t * self.dims.channels * self.dims.patch**2 + FREQUENCIES + 3 * d + self.output_saved
        if self.checkpoint_blocks:  # every block's input, and one block in full while it is computed again
            return 4 * ends + 4 * sum(block.input for block in self.blocks) + max(kept)
        return 4 * ends + sum(kept)


def cost(cfg: DiTConfig, input_size: int | tuple[int, int], channels: int, num_classes: int) -> Cost:
    """The cost of the model that `cfg.build` with the same arguments would give."""
    dims = cfg.dims(input_size, channels, num_classes)
    beside = [cfg.registers + cfg.context * (i >= cfg.context_from) for i in range(dims.depth)]
    output = cfg.output_cost(dims)
    blocks = (*(cfg.block.cost(replace(dims, beside=count)) for count in beside), *output.blocks)
    d, t = dims.width, dims.tokens
    patch_in = dims.channels * dims.patch**2
    extra_in = sum(c.extra_channels for c in cfg.cond) * dims.patch**2
    embed = patch_in * d if cfg.bottleneck is None else (patch_in + d) * cfg.bottleneck
    return Cost(
        dims=dims,
        blocks=blocks,
        output_saved=output.saved,
        parameters=Parameters(
            patch_embed=embed + (1 + extra_in) * d,
            time_embed=(FREQUENCIES + 1) * d + (d + 1) * d,
            conditioners=sum(c.parameters(dims) for c in cfg.cond) + cfg.registers * d,
            blocks=sum(block.parameters for block in blocks) + blocks[0].shared_parameters,
            output=output.parameters,
            position=t * d,
        ),
        multiply_adds=t * (embed + extra_in * d)
        + (FREQUENCIES + d) * d
        + sum(c.multiply_adds(dims) for c in cfg.cond)
        + sum(block.multiply_adds for block in blocks)
        + blocks[0].shared_multiply_adds
        + output.multiply_adds,
        checkpoint_blocks=cfg.checkpoint_blocks,
    )


def state_memory(
    parameters: int, zero_stage: int, world_size: int, averages: int = 1, frozen: int = 0
) -> Memory:
    """Bytes on one rank that any model of so many parameters takes, `frozen` of them; nothing of activations."""
    every, trained = 4 * parameters, 4 * (parameters - frozen)  # every state is in float32

    def share(bytes_: int, stage: int) -> int:
        return -(-bytes_ // world_size) if zero_stage >= stage else bytes_

    return Memory(
        parameters=share(every, 3),
        gradients=share(trained, 2),
        master=share(trained, 1) if zero_stage >= 1 else 0,
        optimizer=2 * share(trained, 1),
        ema=averages * (share(trained, 1) + share(every - trained, 3)),
        copies=0,
        activations=0,
    )


def counted_training_flops(module: nn.Module, *inputs: Any) -> float:
    """FLOPs of a training step of any network: 3 times a counted forward pass of `inputs`, of one image each.

    On the meta device, where nothing is computed and every torch counts attention.
    """
    shapes = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in inputs]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).to("meta")(*shapes)
    return 3.0 * float(counter.get_total_flops())


def peak_flops(device_name: str) -> float | None:
    """Peak FLOP/s of a device by its name (`torch.cuda.get_device_name()`), or None if not in the table."""
    words = set(re.findall(r"\w+", device_name.lower()))
    for name, peak in PEAK_FLOPS.items():
        if set(name.lower().split()) <= words:
            return peak
    return None
