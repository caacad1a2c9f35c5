"""What a model costs, computed from its config: parameters, FLOPs and memory, before anything is built.

One multiply-add is 2 FLOPs. The DiT paper's "Gflops" are multiply-adds (S/2: 6.06 G, XL/2: 118.6 G). Counted
are matrix products alone, as by `torch.utils.flop_counter`: norms, activations and softmax are left out.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
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
from dit.model.recompute import Recompute

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
class Moment:
    """One moment of the backward pass: what of the activations is held, with the gradients that go through them."""

    held: int  # bytes
    done: float  # share of the parameters whose gradients are made


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by what holds them."""

    parameters: int
    gradients: int
    master: int  # the float32 copy that DeepSpeed keeps of its share, from stage 1
    optimizer: int  # Adam's two moments
    ema: int
    copies: int  # of weights in half precision, while a forward and backward pass are under way
    activations: int  # at the end of a forward pass
    moments: tuple[Moment, ...] = ()  # of the backward pass, in order; none where it is not known
    gradients_stay: bool = False  # all through the pass, from the micro-batch before or as stage 3 has them

    @property
    def states(self) -> int:
        """What is there between steps too."""
        return self.parameters + self.master + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """The most at a time, but for what an engine has besides: not all gradients are there with all activations."""
        return self.peak(lambda done: 0)

    def peak(self, buffers: Callable[[float], int], update: int = 0) -> int:
        """The most at a time. buffers: an engine's, when a share of the gradients is made; update: in the update."""
        if not self.moments:
            return self.states + self.gradients + max(self.copies + self.activations + buffers(1.0), update)
        passes = [
            moment.held
            + round(self.gradients * (1.0 if self.gradients_stay else moment.done))
            + buffers(moment.done)
            for moment in self.moments
        ]
        return self.states + max(*passes, self.gradients + max(buffers(1.0), update))


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
    recompute: Recompute
    forwards: int = 0  # passes of an objective's terms, without gradients, beside the one that is trained

    @property
    def forward_flops(self) -> int:
        """Count those of a forward pass, per image: 2 per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def training_flops(self) -> int:
        """Count those of a training step, per image: 3 × forward, and the objective's other forward passes.

        What is computed again is not counted, nor in MFU.
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
        accumulation: int = 1,
        recompute: Recompute | None = None,
    ) -> Memory:
        """Bytes on one rank in a step of `accumulation` micro-batches of `micro_batch` images.

        Stage 1 shares the optimizer's and the EMA's state, 2 also gradients, 3 also parameters; of a block that keeps
        its activations it keeps the gathered weights too, from the forward to the backward pass. `frozen` parameters
        have no gradients and no optimizer's state. recompute: in place of the configuration's. For eager execution;
        compiled blocks keep less. Not counted: an engine's buffers (ZeroConfig.needs counts DeepSpeed's), kernels' work
        space, the allocator's fragments.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{precision}'{did_you_mean(precision, PRECISIONS)}")
        if zero_stage not in range(4) or world_size < 1 or micro_batch < 0:
            raise ConfigError(
                "expected a ZeRO stage of 0 to 3, a world size of 1 or more and a micro-batch of 0 or more, "
                f"got {zero_stage}, {world_size} and {micro_batch}"
            )
        again = self.recompute if recompute is None else recompute
        kept = PRECISIONS[precision]
        states = state_memory(self.parameters.trainable, zero_stage, world_size, averages, frozen)
        passing = self._passing(kept, again, zero_stage == 3 and world_size > 1)
        moments = tuple(self._moments(micro_batch, passing))
        copies = sum(part.weights for part in passing) if zero_stage < 3 else 0
        return replace(
            states,
            parameters=states.parameters + 4 * self.parameters.position,
            copies=copies,
            activations=micro_batch * (self._ends() + sum(part.kept for part in passing)),
            moments=moments,
            gradients_stay=accumulation > 1 or zero_stage == 3,
        )

    def _passing(self, precision: Precision, recompute: Recompute, is_gathered: bool) -> list[_Passing]:
        """What each block holds for its backward pass, and in it. is_gathered: weights are, for that, at stage 3."""
        found = []
        for i, block in enumerate(self.blocks):
            keep = recompute.at(i)
            whole = precision.compute * block.saved_narrow + 4 * block.saved_wide
            products = 4 * block.input + precision.compute * block.products
            kept = {None: whole, "input": 4 * block.input, "products": products}[keep]
            working = precision.compute * block.working_narrow + 4 * block.working_wide
            # A half-precision copy stays in the graph, and so do gathered weights unless all of the block is run again.
            weight = precision.copies or 4 * is_gathered
            held = weight * block.linear_parameters * (not is_gathered or keep is None)
            gathered = 2 * 4 * block.parameters * is_gathered  # with the next one's
            found.append(_Passing(kept, whole - kept + working, held, gathered, block.parameters))
        return found

    def _moments(self, micro_batch: int, passing: list[_Passing]) -> Iterator[Moment]:
        """The backward pass as it begins, and in each block, from the last to the first."""
        # noise, noisy latents, prediction and its gradient
        latents = 4 * 4 * self.dims.channels * math.prod(self.dims.image_size)
        kept, weights = sum(part.kept for part in passing), sum(part.weights for part in passing)
        yield Moment(micro_batch * (kept + self._ends() + latents) + weights, 0.0)
        ends = self._ends() - 4 * self.output_saved + latents
        done = self.parameters.output - sum(part.parameters for part in passing[self.dims.depth :])
        for part in reversed(passing):
            held = micro_batch * (kept + part.working + ends) + weights + part.gathered
            yield Moment(held, done / self.parameters.trainable)
            kept, weights, done = kept - part.kept, weights - part.weights, done + part.parameters

    def _ends(self) -> int:
        """Bytes kept for the backward pass outside of blocks, per image: patches, time, what comes after the blocks."""
        d, t = self.dims.width, self.dims.tokens
        return 4 * (t * self.dims.channels * self.dims.patch**2 + FREQUENCIES + 3 * d + self.output_saved)


@dataclass(frozen=True)
class _Passing:
    """Bytes of one block, kept and in its backward pass: kept, working: of an image; weights, gathered: of weights."""

    kept: int
    working: int
    weights: int
    gathered: int
    parameters: int


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
        recompute=cfg.recompute,
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
