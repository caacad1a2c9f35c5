"""A step's parts: closed forms on small timelines, names of real kernels, and a real trace that adds up."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dit.bench.trace import record
from dit.bench.trace.classes import (
    ATTENTION,
    AVERAGE,
    COMMUNICATION,
    COPIES,
    DRAWS,
    ELEMENTWISE,
    GEMM,
    HOST,
    IDLE,
    METRICS,
    OPTIMIZER,
    OTHER,
    PARTS,
    STEP,
    classify,
)
from dit.bench.trace.record import TraceBench, marked
from dit.bench.trace.table import lines
from dit.bench.trace.timeline import breakdown
from dit.config import ConfigError, from_dict
from tests.rank_processes import Server


def event(name: str, start: float, end: float, cat: str = "cpu_op", **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "pid": 1, "tid": 1, **more}


def mark(name: str, start: float, end: float) -> dict[str, Any]:
    return event(name, start, end, "user_annotation")


def kernel(name: str, start: float, end: float, launch: int = 0, stream: int = 7) -> dict[str, Any]:
    return event(name, start, end, "kernel", args={"correlation": launch}, tid=stream, pid=0)


def launch(number: int, at: float) -> dict[str, Any]:
    return event("cudaLaunchKernel", at, at + 1, "cuda_runtime", args={"correlation": number})


def parts(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds in all; what is nothing is left out."""
    found = breakdown(events)
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert list(found.parts) == list(PARTS)
    return {part: round(1e3 * ms * found.steps, 6) for part, ms in found.parts.items() if ms}


def test_a_moment_belongs_to_the_innermost_operation() -> None:
    found = parts(
        [
            event("aten::mm", -50, -10),  # before the step
            mark(STEP, 0, 100),
            event("aten::linear", 5, 45),
            event("aten::addmm", 10, 40),
            event("aten::add", 50, 60),
            mark(OPTIMIZER, 60, 90),
            event("aten::mm", 65, 70),
            event("c10d::allreduce_", 70, 75),
            event("aten::mm", 20, 30, tid=2),  # another thread's
            event("aten::mm", 100, 140),  # after it
        ]
    )
    assert found == {GEMM: 40, ELEMENTWISE: 10, OPTIMIZER: 25, COMMUNICATION: 5, HOST: 20}


def test_several_steps_are_averaged() -> None:
    events = [mark(STEP, 0, 10), event("aten::mm", 0, 10), mark(STEP, 20, 50), event("aten::mm", 20, 40)]
    found = breakdown(events)
    assert (found.steps, found.step, found.is_device) == (2, pytest.approx(0.02), False)
    assert found.parts[GEMM] == pytest.approx(0.015)
    assert found.names[GEMM] == {"aten::mm": pytest.approx(0.015)}


def test_unknown_operations_are_told() -> None:
    assert parts([mark(STEP, 0, 10), event("vendor::mystery", 2, 8)]) == {OTHER: 6, HOST: 4}
    with pytest.raises(ValueError, match="no mark"):
        breakdown([event("aten::mm", 0, 1)])


def test_on_a_device_only_what_is_not_hidden_counts_as_sent() -> None:
    events = [
        mark(STEP, 0, 100),
        mark(OPTIMIZER, 40, 60),
        *(launch(number, at) for number, at in ((1, 1), (2, 2), (3, 3), (4, 45), (5, 50), (6, 70))),
        kernel("sm90_xmma_gemm_bf16bf16", 10, 30, 1),
        kernel("ncclDevKernel_AllReduce_Sum_bf16", 20, 45, 2, stream=9),  # 10 hidden, 15 not
        kernel("vectorized_elementwise_kernel", 50, 60, 3),
        kernel("vectorized_elementwise_kernel", 60, 70, 4),  # launched by the optimizer
        kernel("ncclDevKernel_AllGather", 70, 75, 5, stream=9),  # as well, but sent
        kernel("flash_fwd_kernel", 75, 80, 6),
    ]
    assert parts(events) == {
        GEMM: 20,
        COMMUNICATION: 20,
        IDLE: 5,
        ELEMENTWISE: 10,
        OPTIMIZER: 10,
        ATTENTION: 5,
    }
    found = breakdown(events)
    assert found.is_device
    assert found.sent == pytest.approx(0.030)
    assert found.step == pytest.approx(0.070)


def test_kernels_beside_each_other_are_counted_once() -> None:
    events = [
        mark(STEP, 0, 50),
        kernel("void gemm_a", 0, 20),
        kernel("void gelu_kernel", 5, 15, stream=8),
        event("Memcpy HtoD (Pinned -> Device)", 30, 40, "gpu_memcpy", args={}),
    ]
    assert parts(events) == {GEMM: 10, ELEMENTWISE: 10, IDLE: 10, COPIES: 10}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", GEMM),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", GEMM),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>", GEMM),
        ("ampere_sgemm_128x64_tn", GEMM),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128>>", ATTENTION),
        ("fmha_cutlassB_bf16_aligned_64x64_k96_sm80", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", ATTENTION),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            ELEMENTWISE,
        ),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>", ELEMENTWISE),
        ("triton_poi_fused_add_mul_native_layer_norm_3", ELEMENTWISE),
        ("_modulate_forward_kernel", ELEMENTWISE),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
            OPTIMIZER,
        ),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", COMMUNICATION),
        ("Memcpy HtoD (Pinned -> Device)", COPIES),
        ("Memset (Device)", COPIES),
        ("something else", OTHER),
    ],
)
def test_kernels_are_known_by_their_names(name: str, part: str) -> None:
    assert classify(name, is_kernel=True) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", GEMM),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", ATTENTION),
        ("aten::native_layer_norm_backward", ELEMENTWISE),
        ("aten::addcmul", ELEMENTWISE),
        ("aten::sum", ELEMENTWISE),
        ("## Call CompiledFxGraph fkdf7hamr2ne ##", ELEMENTWISE),
        ("aten::_fused_adamw_", OPTIMIZER),
        ("aten::copy_", COPIES),
        ("aten::t", HOST),
        ("autograd::engine::evaluate_function: AddmmBackward0", HOST),
        ("c10d::_reduce_scatter_base_", COMMUNICATION),
        ("gloo:all_reduce", COMMUNICATION),
        ("vendor::mystery", OTHER),
    ],
)
def test_operations_are_known_by_their_names(name: str, part: str) -> None:
    assert classify(name, is_kernel=False) == part


def test_marks_are_taken_away_again() -> None:
    class Thing:
        def work(self) -> int:
            return 3

    thing, plain = Thing(), Thing.work

    def fail() -> None:
        with marked((Thing, "work", DRAWS), (thing, "work", METRICS)):
            assert thing.work() == 3
            assert Thing.work is not plain
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert Thing.work is plain
    assert not vars(thing)


def test_sizes_are_checked() -> None:
    for keys, words in (
        ({"steps": 0}, "steps and warmup"),
        ({"batch": 4, "micro_batch": 3}, "must divide"),
        ({"size": "Q"}, "unknown size"),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(TraceBench, keys)


def traced(cfg: TraceBench, out: Path) -> dict[str, Any]:
    return record.run(cfg, out)


@pytest.mark.parametrize("stage", [None, 2])
def test_a_real_step_adds_up_and_is_classified(ranks: Server, tmp_path: Path, stage: int | None) -> None:
    sizes = {"size": "nano", "patch": 4, "batch": 8, "micro_batch": 4, "steps": 2, "warmup": 1}
    [found] = ranks.run(1, traced, from_dict(TraceBench, {**sizes, "stage": stage}), tmp_path)
    assert sum(found["parts_ms"].values()) == pytest.approx(found["step_ms"])
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert found["shares"][OTHER] < 0.05
    for part in (GEMM, ATTENTION, ELEMENTWISE, OPTIMIZER, AVERAGE, DRAWS, METRICS, HOST):
        assert found["parts_ms"][part] > 0, part
    assert (found["parts_ms"][COMMUNICATION] > 0) == (stage is not None)
    assert (found["on"], found["steps"]) == ("cpu", 2)
    text = "\n".join(lines(found))
    assert found["engine"] in text
    assert all(part in text for part in (GEMM, AVERAGE, "untraced"))
    events = json.loads(gzip.decompress((tmp_path / record.FILE).read_bytes()))["traceEvents"]
    assert sum(one.get("name") == STEP for one in events if one.get("cat") == "user_annotation") == 2
