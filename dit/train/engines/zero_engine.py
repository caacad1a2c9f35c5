"""The DeepSpeed engine at ZeRO stages 0-3. The only file that imports deepspeed.

Precision: fp32 parameters throughout; "bf16" adds DeepSpeed's `torch_autocast`, which keeps weights, norms and
the residual stream in fp32 and communicates the linear layers' gradients in bf16 (from stage 1; zero.communication).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import ConfigError
from dit.model.fp8 import float8_classes
from dit.ranks.group import World
from dit.train.engines.base import (
    Bundles,
    Fragment,
    Place,
    frozen_parameters,
    named,
    set_adam_step,
    stacked,
    whole_bundles,
    whole_places,
)
from dit.train.engines.deepspeed_config import deepspeed_config
from dit.train.engines.heap import keep_freed_memory
from dit.train.engines.muon import Muon
from dit.train.engines.one_pass import OnePassAdamW, clip_along
from dit.train.engines.optimizers import guarded, plain
from dit.train.engines.zero_config import ZeroConfig
from dit.train.optim import OptimConfig, set_lr

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it probes for every accelerator it knows, aloud
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.runtime import torch_autocast
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups, set_z3_leaf_modules
    from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.ERROR)


def _in_half_precision(module: nn.Module) -> list[str]:
    """Classes of layers that torch_autocast takes for linear ones; none where those are DeepSpeed's own choice."""
    more = float8_classes(module)
    return [*torch_autocast.get_default_autocast_lower_precision_modules(), *more] if more else []


def _forget_earlier_engines() -> None:
    """What DeepSpeed keeps in modules of an engine before this one, in the same process, and would go by."""
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    groups._WORLD_GROUP = None  # of ranks that have parted since, perhaps


def _forget_module(module: nn.Module) -> None:
    """What stage 3 keeps of a model in its own modules, for as long as the process lives."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    released = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    released.__closure__[0].cell_contents.cache_clear()  # a method's lru_cache, of all engines


class DeepSpeedEngine:
    """DeepSpeed behind the `Engine` interface. Every method is collective."""

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        world: World,
        *,
        zero: ZeroConfig,
        global_batch: int,
        accumulation: int,
        precision: str = "fp32",
        leaf_modules: tuple[type[nn.Module], ...] = (),
    ):
        """zero: with a stage, not "auto". leaf_modules: module classes that stage 3 gathers whole, which is what lets
        their forward compile."""
        if zero.stage == "auto":
            raise ConfigError(
                "zero.stage: auto has to be decided before an engine is made (dit.train.engines.zero_config.choose)"
            )
        self.world, self.device, self.stage = world, world.device, zero.stage
        self.updates = self.skipped = 0
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of C++ build on CPU
        deepspeed.init_distributed(verbose=False)
        keep_freed_memory(self.device)
        module = module.to(self.device)
        if self.stage == 3 and leaf_modules:
            set_z3_leaf_modules(module, list(leaf_modules))
        optimizer = plain(module, optim) if self.stage else guarded(module, optim)
        sizes = (global_batch, global_batch // (accumulation * world.size), accumulation)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        _forget_earlier_engines()
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_config(zero, optim, sizes, precision, trained, _in_half_precision(module)),
        )
        if world.size == 1:
            self._leave_out_averaging(is_rounded=precision == "bf16" and zero.communication != "fp32")
        self._fragments: list[Fragment] | None = None
        base = self.optimizer
        if self.stage and isinstance(base, OnePassAdamW):
            clip_along(self._engine.optimizer, base, optim.clip)
        if isinstance(base, Muon):
            base.lay_out(_bundles(self), _PLACES[self.stage](self), world)

    def _leave_out_averaging(self, is_rounded: bool) -> None:
        """On one rank: gradients are the mean over ranks already, and need not be gone through for that.

        is_rounded: they are to be rounded all the same as they would be on the wire.
        """
        optimizer = self._engine.optimizer
        if self.stage == 0:
            self._engine.enable_backward_allreduce = False  # copies all of them to one buffer and back
        elif self.stage < 3:
            optimizer.gradient_average = False  # divides all of them by 1
            if not is_rounded:  # of each "bucket" a collective, which DeepSpeed has no switch for
                optimizer.allreduce_bucket = lambda bucket, *_, **__: optimizer.flatten(bucket)

    @property
    def about(self) -> str:
        kind = type(self._engine.optimizer).__name__
        outer = f" ({kind})" if self.stage else ""
        return f"DeepSpeed {deepspeed.__version__} at stage {self.stage}{outer}: {named(self.optimizer)}"

    @property
    def module(self) -> nn.Module:
        return self._engine.module  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._engine(*args, **kwargs)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; updates nothing

    def step(self, lr: float) -> bool:
        set_lr(self._engine.optimizer, lr)
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        self.updates += applied
        self.skipped += not applied
        return applied

    def grad_norm(self) -> float:
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self.stage else optimizer  # type: ignore[no-any-return]

    def fragments(self) -> list[Fragment]:
        if self._fragments is None:
            self._fragments = _fragments(self)
        return self._fragments

    def sync_weights(self) -> None:
        optimizer = self._engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer.checkpoint_event_prologue()  # whatever is gathered goes back to pieces first
            for i in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            optimizer.checkpoint_event_epilogue()
            # hpZ's copy: the line above forgets that of trained ones alone
            for p in self.module.parameters():
                p.ds_secondary_tensor = None  # type: ignore[attr-defined]

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        self.fragments()  # creates the state
        set_adam_step(self.optimizer, updates)

    def close(self) -> None:
        self._fragments = None
        self._engine.destroy()  # hooks of parameters, in C++, by which they and their optimizer hold each other
        if self.stage == 3:
            _forget_module(self.module)


def _fragments(engine: DeepSpeedEngine) -> list[Fragment]:
    """This rank's pieces of trained parameters, and of frozen ones."""
    optimizer, is_owned = engine.optimizer, bool(engine.stage) or engine.world.is_main
    found = [place.fragment(optimizer, is_owned) for place in _PLACES[engine.stage](engine)]
    if engine.stage == 3:
        return found + _frozen_pieces(engine)
    return found + frozen_parameters(engine.module, is_owned=engine.world.is_main)


def _bundles(engine: DeepSpeedEngine) -> Bundles:
    """What each step of the optimizer updates."""
    optimizer = engine._engine.optimizer
    if engine.stage == 0:
        return whole_bundles(optimizer)
    if engine.stage < 3:
        return [(i, [flat]) for i, flat in enumerate(optimizer.single_partition_of_fp32_groups)]
    flats = optimizer.fp32_partitioned_groups_flat
    return [(optimizer.sub_group_to_group_id[i], [flat]) for i, flat in enumerate(flats)]


def _whole(engine: DeepSpeedEngine) -> list[Place]:
    return whole_places(engine.module, engine.optimizer)


def _in_partition(engine: DeepSpeedEngine) -> list[Place]:
    """Stages 1 and 2: this rank's partition of each group's flat fp32 master."""
    flats, found = engine._engine.optimizer.single_partition_of_fp32_groups, []
    for name, p in engine.module.named_parameters():
        piece = getattr(p, "_hp_mapping", None)  # None where this rank holds nothing of it
        if piece is not None:
            here, group = piece.hp_fragment_address, piece.param_group_index
            offset = int(piece.lp_fragment_address.start)
            shape, flat = tuple(p.shape), flats[group]
            found.append(Place(name, shape, offset, flat, here.start, here.numel, group, group, stacked(p)))
    return found


def _in_parameters(engine: DeepSpeedEngine) -> list[Place]:
    """Stage 3: this rank's piece of every parameter that is trained; a group may be of several flat tensors."""
    optimizer, found = engine._engine.optimizer, []
    for name, p, offset, numel in _pieces(engine):
        if p.requires_grad:
            bundle, start, _ = optimizer.grad_position[optimizer.get_param_id(p)]
            group, flat = (
                optimizer.sub_group_to_group_id[bundle],
                optimizer.fp32_partitioned_groups_flat[bundle],
            )
            found.append(
                Place(name, tuple(p.ds_shape), offset, flat, start, numel, group, bundle, stacked(p))
            )
    return found


def _frozen_pieces(engine: DeepSpeedEngine) -> list[Fragment]:
    """Stage 3: this rank's pieces of the others, without an optimizer's state."""
    return [
        Fragment(name, tuple(p.ds_shape), offset, p.ds_tensor.detach().narrow(0, 0, numel))
        for name, p, offset, numel in _pieces(engine)
        if not p.requires_grad
    ]


def _pieces(engine: DeepSpeedEngine) -> Iterator[tuple[str, Any, int, int]]:
    """Stage 3: each parameter of which this rank holds a piece, the first element of that, and how many."""
    p: Any  # DeepSpeed's additions to a parameter
    for name, p in engine.module.named_parameters():
        size = p.ds_tensor.ds_numel  # of every rank's piece, the last one padded
        offset = int(size * engine.world.rank)
        numel = max(0, min(size, p.ds_numel - offset))
        if numel:
            yield name, p, offset, numel


_PLACES = {0: _whole, 1: _in_partition, 2: _in_partition, 3: _in_parameters}
