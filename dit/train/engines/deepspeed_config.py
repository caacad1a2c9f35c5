"""DeepSpeed's own configuration, from ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit.train.engines.zero_config import BUCKET, ZeroConfig
from dit.train.optim import OptimConfig


def deepspeed_config(
    zero: ZeroConfig,
    optim: OptimConfig,
    sizes: tuple[int, int, int],
    precision: str,
    numbers: int,
    linear: Sequence[str] = (),
) -> dict[str, Any]:
    """DeepSpeed's own configuration. sizes: (global batch, micro-batch, accumulation). numbers: that are trained.

    linear: classes of layers whose gradients are sent in half precision; none = those that DeepSpeed knows.
    """
    is_alone = sizes[0] == sizes[1] * sizes[2]
    global_batch, micro_batch, accumulation = sizes
    made: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": (optim.clip or 0.0) if zero.stage else 0.0,  # stage 0: GuardedAdamW clips
        "zero_optimization": _sharding(zero, numbers, is_alone),
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW for the CPU is as quick, and needs no C++ build
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a micro-batch
    }
    if zero.communication != "auto":
        made["communication_data_type"] = zero.communication
    if linear:
        made["torch_autocast"]["lower_precision_safe_modules"] = [*linear]
    if zero.communication == "fp32":  # under autocast the key above is for stage 0 alone
        made["torch_autocast"]["lower_precision_safe_modules"] = []
    return made


def _sharding(zero: ZeroConfig, numbers: int, is_alone: bool) -> dict[str, Any]:
    """The section zero_optimization. is_alone: there is one rank."""
    # DeepSpeed's own, 5e8, would take 2 GB a dtype, used or not; it must be even
    bucket = min(BUCKET, -(-numbers // 1024) * 1024)
    made: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "use_multi_rank_bucket_allreduce": False,  # a reduce to each owner: half the bytes of an all-reduce for all
    }
    if is_alone and zero.stage in (1, 2) and zero.offload == "none":
        # Nothing is sent: a bucket of one gradient is that gradient, and none is copied to one.
        made |= {"contiguous_gradients": False, "reduce_bucket_size": 2}
    if zero.stage == 3:
        # Eager stage 3 with the memory-efficient linear gives wrong gradients under selective checkpointing.
        made |= {"memory_efficient_linear": False, "stage3_param_persistence_threshold": 0}
        # By DeepSpeed's own figures a model of less than 1e9 parameters stays gathered from the forward to the backward
        # pass, and sharding saves nothing; so it does where more than a block is fetched ahead.
        made |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": min(BUCKET, numbers // 64)}
        made["zero_hpz_partition_size"] = zero.hpz
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if zero.offload != "none":
        made["offload_optimizer"] = host
    if zero.offload == "all":
        made["offload_param"] = host
    return made
