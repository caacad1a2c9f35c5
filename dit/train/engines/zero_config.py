"""How training state is shared out over ranks and memories (ZeRO, arXiv 1910.02054), and what each choice needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from dit.config import ConfigError, config
from dit.model.cost import Memory
from dit.ranks import group
from dit.ranks.group import World

# Gradients that are communicated at once, at most: 200 MB, so that the next ones are computed meanwhile.
BUCKET = 50_000 * 1024
# Gradients that stage 0 averages at once, in DeepSpeed's own words 5e8 of them, in a copy.
FLAT = 4 * 500_000_000
# Share of the memory; kernels' work space, the allocator's fragments and the driver take the rest.
USABLE = 0.9
Stage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]
Communication = Literal["auto", "fp32", "bf16"]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
# The stages, the quickest first, as `tools/bench.py step` found it on one rank and `zero` on two, on CPUs
# (benchmarks/2026-11-28-step.md; not measured on GPUs yet). A start goes by this table and times nothing.
QUICKEST: tuple[Stage, ...] = (0, 1, 2, 3)
BEFORE: Stage = 2  # of runs that began when a stage was not recorded, and had this for a default


@config
class ZeroConfig:
    """How DeepSpeed shards optimizer state (1), gradients (2), parameters (3) over the ranks; 0 = nothing."""

    # auto = the one that the run has had, or in a new run the quickest, while it fits in memory
    stage: Literal[0, 1, 2, 3, "auto"] = "auto"
    offload: Offload = "none"  # to host memory: optimizer = master weights, Adam, EMA; all = parameters too
    hpz: int = 1  # ranks, a node's, that hold a second copy of stage 3's parameters (arXiv 2306.10209, 3.2); 1 = none
    communication: Communication = "auto"  # dtype of gradients on the wire; auto = bf16 where precision is

    def __post_init__(self) -> None:
        if self.hpz < 1:
            raise ConfigError(f"zero.hpz must be at least 1 (no second copy), got {self.hpz}")
        if self.stage != "auto" and self.stage not in self.possible:
            need = {
                "zero.offload = optimizer needs zero.stage 1, 2 or 3": self.offload == "optimizer",
                "zero.offload = all (parameters too) needs zero.stage 3": self.offload == "all",
                f"zero.hpz = {self.hpz} (a second copy of sharded parameters) needs zero.stage 3": self.hpz
                > 1,
            }
            why = " and ".join(text for text, holds in need.items() if holds)
            raise ConfigError(f"{why}, got {self.stage}; set zero.stage, or leave the other key out")

    @property
    def possible(self) -> tuple[Stage, ...]:
        """The stages that can do what the other keys ask for."""
        least = 3 if self.offload == "all" or self.hpz > 1 else 1 if self.offload == "optimizer" else 0
        return STAGES[least:]

    def check(self, world: World) -> None:
        """ConfigError where the ranks cannot be grouped as asked."""
        if world.size % self.hpz:
            fit = [d for d in range(1, world.size + 1) if world.size % d == 0]
            raise ConfigError(f"zero.hpz = {self.hpz} does not divide {world.size} ranks; use one of {fit}")

    def needs(self, memory: Memory, stage: int, device: Device) -> int:
        """Bytes that a rank's device must have for `memory`, which is this stage's, with DeepSpeed's own buffers."""
        away = 0
        if self.offload != "none" and not device.on_host:
            away = memory.master + memory.optimizer + memory.ema + (memory.gradients if stage >= 2 else 0)
            away += memory.parameters if self.offload == "all" else 0
        whole = memory.parameters * (device.ranks if stage >= 3 else 1)
        copy = whole // self.hpz if self.hpz > 1 else 0
        gradients = memory.gradients * (device.ranks if stage >= 2 else 1)
        share = -(-gradients // device.ranks) if stage else 0
        # the gradients of a partition, and from stage 1 on a flat copy of them
        update = {0: 0, 3: share}.get(stage, 2 * share - memory.gradients)
        return memory.peak(partial(self._buffers, stage, gradients, device), update) - away + copy

    def _buffers(self, stage: int, gradients: int, device: Device, done: float) -> int:
        """DeepSpeed's, in the backward pass when a share of all `gradients` (bytes) is made."""
        bucket = min(4 * BUCKET, gradients)
        if (
            stage == 3
        ):  # one for as long as it lives; what is sent and received when it is full, or at the end
            return 3 * bucket if done * gradients >= bucket else bucket
        if device.ranks == 1 and self.offload == "none":
            return 0
        if stage == 0:
            return min(FLAT, gradients) if done == 1 else 0
        return bucket


@dataclass(frozen=True)
class Device:
    """The memory that each of `ranks` ranks may fill."""

    usable: int  # bytes
    on_host: bool  # it is the host's: offloading to there frees nothing
    ranks: int

    @classmethod
    def smallest(cls, world: World) -> Device:
        """Find the smallest of all ranks, the same on every one. Collective inside a session."""
        names = group.gather_objects(socket.gethostname())
        here = names.count(socket.gethostname()) if len(names) == world.size else world.size
        if world.device.type == "cuda":
            total = torch.cuda.get_device_properties(world.device).total_memory
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // here
        least = min(group.gather_objects(total))
        return cls(int(USABLE * least), world.device.type != "cuda", world.size)


@dataclass(frozen=True)
class Choice:
    """The stage taken, and why in one line; nothing to say where the configuration names it."""

    zero: ZeroConfig
    why: str = ""

    @property
    def stage(self) -> int:
        """0 to 3."""
        return int(self.zero.stage)


def unsharded(zero: ZeroConfig, memory: Memory, device: Device) -> Choice:
    """What an engine that shards nothing does: as stage 0, with `memory` in the device; where that is full, says so."""
    needed = zero.needs(memory, 0, device)
    why = ""
    if needed > device.usable:
        why = f"none: needs {_gib(needed)} GiB of {_gib(device.usable)}; engine: deepspeed shards over the ranks"
    return Choice(replace(zero, stage=0), why)


def choose(
    zero: ZeroConfig, memory: Callable[[int], Memory], device: Device, kept: int | None = None
) -> Choice:
    """The stage that is named; else `kept`, which the run has had, or the quickest whose `memory` fits in the device.

    Where none fits it is 3, with what would help. That is no error: the figures are an estimate for eager execution,
    and too high for compiled blocks.
    """
    if zero.stage != "auto":
        return Choice(zero)
    order = [stage for stage in QUICKEST if stage in zero.possible]
    order.sort(key=lambda stage: stage != kept)  # it comes first, if it is possible at all
    needed: dict[Stage, int] = {}
    for stage in order:
        found = memory(stage)
        needed[stage] = zero.needs(found, stage, device)
        if needed[stage] <= device.usable:
            break
    rows = [f"stage {s} {_gib(n)}" for s, n in needed.items()]
    rows[0] = f"stage {order[0]} needs {_gib(needed[order[0]])} GiB of {_gib(device.usable)}"
    uncounted, helps = "" if found.activations else "; activations are not counted", ""
    if needed[stage] <= device.usable:
        which = "as the run has had" if stage == kept else "the quickest that fits"
    else:
        stage = min(needed, key=lambda s: (needed[s], -s))
        which = f"as NONE fits; it lacks {_gib(needed[stage] - device.usable)} GiB"
        helps = f". What would help: {_help(zero, memory(stage), device)}"
    why = f"zero.stage: {stage}, {which}: {', '.join(rows)}{uncounted}{helps}"
    return Choice(replace(zero, stage=stage), why)


def _help(zero: ZeroConfig, memory: Memory, device: Device) -> str:
    """What brings the need down, the greatest part first."""
    moved = memory.master + memory.optimizer + memory.ema + memory.gradients
    ways = [(memory.activations, "a smaller train.micro_batch or model.checkpoint_blocks=true")]
    if not device.on_host and zero.offload != "all":
        ways.append((moved + memory.parameters, "zero.offload=optimizer or all"))
    ways.append((memory.total - memory.activations, "more ranks"))
    return ", ".join(text for size, text in sorted(ways, reverse=True) if size)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
