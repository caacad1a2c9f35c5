"""A run before its first step: what it is made of, each part made when it is first asked for.

A start, the preflight and the dry run all look at a `Plan`, through the checks in `dit/train/preflight`: what one of
them refuses, all refuse, in the same words.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dit.config import ConfigError, to_dict
from dit.data.loading.mixture import Mixture
from dit.data.loading.quarantine import Quarantine
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.errors import UserError
from dit.model.cost import Memory, peak_flops, state_memory
from dit.ranks import group
from dit.ranks.group import World
from dit.train import branch
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import checkpoints_of
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError, Reader
from dit.train.engines.budget import Budget, Fitted, fit
from dit.train.engines.local import check_alone
from dit.train.engines.optimizers import OPTIMIZERS
from dit.train.engines.zero_config import BEFORE, Choice, Device, choose, unsharded
from dit.train.hooks import Hook
from dit.train.optim import freeze
from dit.train.run_dir import begun_with, settled, stage_of
from dit.train.settings import RunConfig
from dit.train.task import Task
from dit.version import code_version


@dataclass
class Parts:
    """What a kind of experiment brings to the loop.

    build: makes the network, its weights drawn from torch's global generator; on the meta device too.
    contract: JSON values that travel with every checkpoint (latent statistics, codec, ...).
    flops_per_image: of a training step. leaf_modules: see DeepSpeedEngine.
    memory: (ZeRO stage, numbers in frozen parameters) -> what a rank holds; None: all but the activations is counted.
    budget: what a rank may fill, where that decides which activations of the network are computed again.
    about: rows of what is printed at the start, by name ("model", "objective", "codec").
    on_host: what of the loss the host decides in each step, so that no CUDA graph can hold it; "" for nothing.
    doubts: what in the configuration contradicts the data: refused in a new run, warned of in one that goes on.
    compiled_task: the same task for training steps, where torch.compile is used; None where it is not.
    """

    build: Callable[[], nn.Module]
    task: Task
    flops_per_image: float
    contract: dict[str, Any] = field(default_factory=dict)
    hooks: list[Hook] = field(default_factory=list)
    leaf_modules: tuple[type[nn.Module], ...] = ()
    memory: Callable[[int, int], Memory] | None = None
    budget: Budget | None = None
    about: dict[str, str] = field(default_factory=dict)
    on_host: str = ""
    doubts: tuple[str, ...] = ()
    compiled_task: Task | None = None


MakeParts = Callable[[Any, Manifest, World], Parts]


@dataclass(frozen=True)
class Outline:
    """The network on the meta device, where it takes no memory, and how its numbers are shared out."""

    module: nn.Module
    frozen: int  # numbers in parameters that train.freeze keeps from training
    matrices: int = 0  # numbers of which the optimizer keeps one number each, and not two

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def buffers(self) -> int:
        """Numbers in all buffers."""
        return sum(b.numel() for b in self.module.buffers())


class Plan:
    """A run of a configuration on these ranks. Making one is collective; asking for a part of it is not.

    cfg: what it leaves open is decided: by the run that run_dir holds, or as in a new one. before: what that run has
    for a configuration, as plain values; None where none has begun. stage_before: the ZeRO stage it has had. branch:
    the checkpoint that a new run is to begin as, of whose run the two before are then; None where it is none.
    """

    def __init__(self, cfg: RunConfig, make_parts: MakeParts, world: World):
        self._given, self._make_parts, self.world = cfg, make_parts, world
        self.device = Device.smallest(world)
        self.look()

    def look(self) -> None:
        """See what run_dir holds now. Collective; before any part is asked for."""
        # rank 0 looks for all: file systems may not show every rank the same
        self.before: Mapping[str, Any] | None
        self.branch: Checkpoint | None  # what a new run begins as by init.branch
        self.before, self.has_checkpoint, self.stage_before, self.branch = group.on_main(
            lambda: _seen(self._given)
        )
        self.cfg = settled(self._given, self.before)

    @cached_property
    def mixture(self) -> Mixture:
        """The data, opened. Raises DataError."""
        return self.cfg.data.open()

    @property
    def manifest(self) -> Manifest:
        """The data's, of a mixture as if it were one set."""
        return self.mixture.manifest

    @cached_property
    def parts(self) -> Parts:
        """What the experiment brings. Raises ConfigError or DataError where that does not fit the data."""
        return self._make_parts(self.cfg, self.manifest, self.world)

    @cached_property
    def outline(self) -> Outline:
        """The network without its weights; ConfigError where a pattern, as of train.freeze, fits nothing."""
        build = self.parts.build  # made outside: data and codecs are no outlines
        with torch.device("meta"):
            module = build()
        frozen = freeze(module, self.cfg.train.freeze)
        return Outline(module, frozen, OPTIMIZERS[self.cfg.optim.name].matrices(module, self.cfg.optim))

    @cached_property
    def sharding(self) -> Choice:
        """The ZeRO stage, and why. ConfigError where the ranks cannot be grouped as asked."""
        if self.cfg.is_plain:
            return unsharded(self.cfg.zero, self.memory(0), self.device)
        self.cfg.zero.check(self.world)
        if self.fitted is not None:
            return self.fitted.choice
        return choose(self.cfg.zero, self.memory, self.device, kept=self.stage_before)

    @cached_property
    def fitted(self) -> Fitted | None:
        """What is computed again to stay within the parts' budget; None where there is none."""
        budget, zero = self.parts.budget, self.cfg.zero
        if budget is None:
            return None
        held = replace(budget, memory=lambda stage, *how: self._held(budget.memory(stage, *how), stage))
        if self.cfg.is_plain:
            return fit(replace(zero, stage=0), held, self.outline.frozen, self.device)
        return fit(zero, held, self.outline.frozen, self.device, kept=self.stage_before)

    def check_engine(self) -> None:
        """ConfigError for the local engine on several ranks, and for CUDA graphs where there can be none."""
        if self.cfg.engine == "local":
            check_alone(self.world)
        if not self.cfg.train.graphs:
            return
        if self.parts.on_host:
            raise ConfigError(
                f"train.graphs: {self.parts.on_host}, which no CUDA graph can hold: leave it out"
            )
        if self.world.device.type != "cuda":
            raise ConfigError(
                "train.graphs launches CUDA graphs, and there is no GPU here (or CUDA_VISIBLE_DEVICES is empty): leave "
                "it out, or train on a GPU"
            )

    def memory(self, stage: int) -> Memory:
        """What a rank holds at a ZeRO stage."""
        frozen = self.outline.frozen
        if self.parts.budget is not None and self.fitted is not None:
            return self._held(self.parts.budget.memory(stage, frozen, self.fitted.recompute), stage)
        if self.parts.memory is not None:
            found = self.parts.memory(stage, frozen)
        else:
            found = state_memory(self.outline.parameters, stage, self.world.size, self.cfg.ema.count, frozen)
        return self._held(found, stage)

    def _held(self, found: Memory, stage: int) -> Memory:
        """The same with this run's optimizer and engine: the plain one's gradients stay in buckets on several ranks."""
        lacking = 4 * self.outline.matrices // (self.world.size if stage else 1)
        stay = found.gradients_stay or (self.cfg.is_plain and self.world.size > 1)
        return replace(found, optimizer=found.optimizer - lacking, gradients_stay=stay)

    @cached_property
    def stream(self) -> Stream:
        """This rank's batches. ConfigError where the data are fewer than a batch, or the sizes do not fit."""
        cfg = self.cfg
        return Stream(
            self.mixture,
            cfg.seed,
            cfg.train.global_batch,
            self.world.rank,
            self.world.size,
            cfg.data.lanes,
            cfg.data.window,
            readers=cfg.data.readers,
            cache=cfg.data.cache,
            quarantine=Quarantine(cfg.data.max_quarantined),
            pin=self.world.device.type == "cuda",
        )

    @cached_property
    def init(self) -> Reader | None:
        """What the weights come from: init.from, where it is set and the run has no checkpoint of its own."""
        if self.cfg.init.from_ is None or self.has_checkpoint or self.cfg.init.branch is not None:
            return None
        return Reader(checkpoint.resolve(self.cfg.init.from_))

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that go into every checkpoint, and of which "data" and "contract" must stay what they are."""
        manifest = self.manifest
        return {
            "config": to_dict(self.cfg),
            "data": {
                "digest": manifest.digest,
                "samples": manifest.samples,
                "classes": list(manifest.classes),
            },
            "contract": self.parts.contract,
            "code": code_version(),
            "torch": torch.__version__,
        }

    def network(self) -> nn.Module:
        """The network as the parts make it, with what the budget decides."""
        module = self.parts.build()
        if self.fitted is not None:
            module.recompute = self.fitted.recompute  # type: ignore[assignment]
        return module

    def build(self) -> nn.Module:
        """The network, with weights of the run's seed or of `init`, and what is to be frozen frozen."""
        torch.manual_seed(self.cfg.seed)
        module = self.network()
        source = self.init
        if source is not None:
            weights = self.cfg.init.weights
            fill(module, source, source.state_dict(weights))
            if self.world.is_main:
                print(f"starting from the {weights} weights of {source.checkpoint.path}", flush=True)
        freeze(module, self.cfg.train.freeze)
        return module

    def close(self) -> None:
        """End the reading threads, if there are any."""
        if "stream" in self.__dict__:
            self.stream.close()


def _seen(
    cfg: RunConfig,
) -> tuple[Mapping[str, Any] | None, bool, int | None, Checkpoint | None]:
    """What a run directory holds: its run's configuration, whether it has a checkpoint, the last start's ZeRO stage.

    Where a branch is to begin there, its trunk's configuration and stage, and the checkpoint.
    """
    folder = cfg.folder
    before, has_checkpoint = begun_with(folder), checkpoint.exists(checkpoints_of(folder))
    if cfg.init.branch is not None and not has_checkpoint:
        with contextlib.suppress(UserError, OSError):  # the check "branch" says why there is none
            found = branch.find(cfg)
            before, trunk = found.meta["config"], branch.trunk_of(found) or found.path
            return before, False, stage_of(trunk, before, BEFORE), found
    return before, has_checkpoint, stage_of(folder, before, BEFORE), None


def fill(module: nn.Module, source: Reader, weights: Mapping[str, torch.Tensor]) -> None:
    """Load init.from's weights; CheckpointError where they do not fit the network."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        _, *rows = str(error).splitlines()
        more = f"\n  and {len(rows) - 3} more" if len(rows) > 3 else ""
        raise CheckpointError(
            f"init.from: {source.checkpoint.path} does not fit this model:\n" + "\n".join(rows[:3]) + more
        ) from None


def stored_shape(manifest: Manifest) -> tuple[int, ...]:
    """(2, C, H, W) where moments are stored, (1, C, H, W) where latents are: one sample of one view."""
    one = manifest.shape[1:]
    return one if manifest.array == "moments" else (1, *one)


def device_peak(device: torch.device) -> float:
    """Peak FLOP/s of this rank's device for MFU: by the maker's table, else what a matrix product reaches here."""
    known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or _measured_peak(device)


@functools.cache
def _measured_peak(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the best of some square fp32 matrix products (0.1 s on a CPU core)."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
