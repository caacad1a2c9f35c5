"""The DeepSpeed engine at ZeRO stages 0-3. The only file that imports deepspeed.

Precision: fp32 parameters throughout; "bf16" adds DeepSpeed's `torch_autocast`, which keeps weights, norms and
the residual stream in fp32 and communicates the linear layers' gradients in bf16.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dit.dist import World
from dit.train.fragments import ADAM_STATE, Fragment, ensure_adam_state, set_adam_step, whole_parameters
from dit.train.optim import GuardedAdamW, OptimConfig, adamw_arguments, parameter_groups, set_lr
from dit.train.settings import ZeroConfig

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it probes for every accelerator it knows, aloud
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import set_z3_leaf_modules

deepspeed_logger.setLevel(logging.ERROR)


def deepspeed_config(
    stage: int, optim: OptimConfig, sizes: tuple[int, int, int], precision: str
) -> dict[str, Any]:
    """DeepSpeed's own configuration. sizes: (global batch, micro-batch, accumulation)."""
    global_batch, micro_batch, accumulation = sizes
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        # Eager stage 3 with the memory-efficient linear gives wrong gradients under selective checkpointing.
        zero |= {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
    return {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": (optim.clip or 0.0) if stage else 0.0,  # stage 0: GuardedAdamW clips
        "zero_optimization": zero,
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }


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
        """leaf_modules: module classes that stage 3 gathers whole, which is what lets their forward compile."""
        self.world, self.device, self.stage = world, world.device, zero.stage
        self.updates = self.skipped = 0
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a minute of C++ build on CPU
        deepspeed.init_distributed(verbose=False)
        module = module.to(self.device)
        if self.stage == 3 and leaf_modules:
            set_z3_leaf_modules(module, list(leaf_modules))
        groups = parameter_groups(module, optim.weight_decay)
        arguments = adamw_arguments(optim, self.device)
        optimizer = (
            torch.optim.AdamW(groups, **arguments)
            if self.stage
            else GuardedAdamW(groups, optim.clip, **arguments)
        )
        sizes = (global_batch, global_batch // (accumulation * world.size), accumulation)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(self.stage, optim, sizes, precision)
        )
        self._fragments: list[Fragment] | None = None

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

    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer.optimizer if self.stage else optimizer  # type: ignore[no-any-return]

    def fragments(self) -> list[Fragment]:
        if self._fragments is None:
            self._fragments = _FRAGMENTS[self.stage](self)
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

    def set_updates(self, updates: int) -> None:
        self.updates = updates
        self.fragments()  # creates the state
        set_adam_step(self._base_optimizer(), updates)


def _whole(engine: DeepSpeedEngine) -> list[Fragment]:
    return whole_parameters(engine.module, engine._base_optimizer(), is_owned=engine.world.is_main)


def _pieces_of_partition(engine: DeepSpeedEngine) -> list[Fragment]:
    """Stages 1 and 2: this rank's partition of each group's flat fp32 master."""
    optimizer, found = engine._engine.optimizer, []
    flats = optimizer.single_partition_of_fp32_groups
    states = [ensure_adam_state(engine._base_optimizer(), flat) for flat in flats]
    for name, p in engine.module.named_parameters():
        piece = getattr(p, "_hp_mapping", None)  # None where this rank holds nothing of it
        if piece is not None:
            where, group = piece.hp_fragment_address, piece.param_group_index
            found.append(
                _piece(
                    name,
                    p.shape,
                    piece.lp_fragment_address.start,
                    flats[group],
                    states[group],
                    where.start,
                    where.numel,
                )
            )
    return found


def _pieces_of_parameters(engine: DeepSpeedEngine) -> list[Fragment]:
    """Stage 3: this rank's piece of every parameter."""
    optimizer, found = engine._engine.optimizer, []
    flats = optimizer.fp32_partitioned_groups_flat
    states = [ensure_adam_state(engine._base_optimizer(), flat) for flat in flats]
    p: Any  # DeepSpeed's additions to a parameter
    for name, p in engine.module.named_parameters():
        if p.requires_grad:
            group, start, size = optimizer.grad_position[optimizer.get_param_id(p)]
            offset = size * engine.world.rank
            numel = max(0, min(size, p.ds_numel - offset))  # the last piece is padded
            if numel:
                found.append(_piece(name, p.ds_shape, offset, flats[group], states[group], start, numel))
    return found


def _piece(
    name: str, shape: Any, offset: int, flat: Tensor, state: dict[str, Tensor], start: int, numel: int
) -> Fragment:
    views = {key: state[key].narrow(0, start, numel) for key in ADAM_STATE}
    return Fragment(name, tuple(shape), int(offset), flat.detach().narrow(0, start, numel), views)


_FRAGMENTS = {0: _whole, 1: _pieces_of_partition, 2: _pieces_of_partition, 3: _pieces_of_parameters}
