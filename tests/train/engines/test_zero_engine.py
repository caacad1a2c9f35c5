"""ZeRO stages 0-3 and plain torch on two ranks against one (I2), in fp32 and bf16; skipped updates on all (I4)."""

from __future__ import annotations

import gc
import math
import platform
import resource
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.ranks.group import World
from dit.train.engines import base
from dit.train.engines.local import LocalEngine
from dit.train.engines.zero_config import BUCKET, ZeroConfig
from dit.train.optim import OptimConfig
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import ENGINES, STEPS, Engine, Values, at_step, column, engine_of, go, state, values

STAGES = [0, 1, 2, 3]


def relative(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return float(np.abs(np.array(found) / np.array(expected) - 1).max())


def flat(tensors: dict[str, Tensor], kind: str) -> Tensor:
    return torch.cat([t.flatten() for name, t in sorted(tensors.items()) if name.startswith(kind + "/")])


# --- fp32 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_losses_and_gradient_norms_are_plain_torchs(
    reference: Path, sharded: Callable[[Engine], Path], engine: Engine
) -> None:
    """Two ranks with 2 micro-batches against one with 4: only the order of float32 sums differs."""
    run = sharded(engine)
    assert relative(column(run, "loss"), column(reference, "loss")) < 1e-5
    assert relative(column(run, "grad_norm"), column(reference, "grad_norm")) < 1e-5
    assert column(run, "lr") == column(reference, "lr")
    assert column(run, "updates") == list(range(1, STEPS + 1))
    norms = column(reference, "grad_norm")  # clipping at 0.38 acts in some steps and not in others
    assert max(norms) > 0.4
    assert min(norms) < 0.36
    assert column(reference, "loss")[-1] < 0.97 * column(reference, "loss")[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("step", [STEPS // 2, STEPS])
def test_fp32_weights_averages_and_adams_moments_are_plain_torchs(
    reference: Path, sharded: Callable[[Engine], Path], engine: Engine, step: int
) -> None:
    """The moments are linear and quadratic in clipped gradients: a clip that is off by 1% shows in them."""
    expected, found = state(at_step(reference, step)), state(at_step(sharded(engine), step))
    assert found.keys() == expected.keys()
    for kind, tolerance in {"model": 1e-5, "ema": 1e-5, "exp_avg": 1e-5, "exp_avg_sq": 1e-5}.items():
        a, b = flat(expected, kind), flat(found, kind)
        assert float((a - b).norm() / a.norm()) < tolerance, kind


# --- bf16 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bf16_reference(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("bf16")
    ranks.run(1, go, bf16(digits, run_dir, engine="local"))
    return run_dir


def bf16(digits: Digits, run_dir: Path, **sections: object) -> Values:
    return values(digits, run_dir, train={"precision": "bf16"}, **sections)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_agrees_with_plain_torchs_autocast(
    digits: Digits, ranks: Server, reference: Path, bf16_reference: Path, tmp_path: Path, engine: Engine
) -> None:
    """Products are rounded to 2^-9 = 2e-3 and the ranks' gradients are added up in bf16, so single gradients differ
    by about that; over many elements the rounding averages out: 2e-4 on losses, 2e-3 on norms."""
    ranks.run(2, go, bf16(digits, tmp_path, **engine_of(engine)))
    assert relative(column(tmp_path, "loss"), column(bf16_reference, "loss")) < 2e-4
    assert relative(column(tmp_path, "grad_norm"), column(bf16_reference, "grad_norm")) < 2e-3
    assert column(tmp_path, "batch_hash") == column(bf16_reference, "batch_hash")
    expected, found = state(at_step(bf16_reference, STEPS)), state(at_step(tmp_path, STEPS))
    a, b = flat(expected, "exp_avg"), flat(found, "exp_avg")
    assert float((a - b).norm() / a.norm()) < 1e-2
    # and it is bf16 indeed: two fp32 runs agree to 1e-6
    assert relative(column(tmp_path, "grad_norm"), column(reference, "grad_norm")) > 1e-5


def test_bf16_is_not_fp32_and_keeps_fp32_weights(reference: Path, bf16_reference: Path) -> None:
    assert 1e-5 < relative(column(bf16_reference, "grad_norm"), column(reference, "grad_norm")) < 1e-2
    weights = state(at_step(bf16_reference, STEPS))["model/blocks.0.attention.qkv.weight"]
    rounded = weights.bfloat16().float()
    assert float((weights != rounded).float().mean()) > 0.9


# --- what DeepSpeed is told --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("numbers", [1, 7, 1_000_001, 10**10])
def test_buckets_are_even_and_no_larger_than_they_need_be(stage: int, numbers: int) -> None:
    """DeepSpeed refuses odd ones, and a model may well have an odd number of parameters."""
    from dit.train.engines.deepspeed_config import deepspeed_config

    zero = from_dict(ZeroConfig, {"stage": stage})
    made = deepspeed_config(zero, OptimConfig(), (8, 4, 1), "fp32", numbers)["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        assert made[key] % 2 == 0
        assert min(numbers, BUCKET) <= made[key] <= min(numbers + 1024, BUCKET)


# --- one rank, where nothing is sent -----------------------------------------------------------------------


Trained = tuple[list[float], list[Tensor]]


def trained(engine: base.Engine) -> Trained:
    """Gradient norms, and the weights after steps of two micro-batches, of which the third has a gradient of NaN."""
    norms = []
    for step in range(6):
        for half in (1.0, -0.5):
            x = torch.linspace(-1, half * (step + 1), 4 * 67).reshape(4, 67)
            engine.backward(engine(x).square().mean() * (math.nan if step == 2 else 1.0))
        assert engine.step(1e-2) is (step != 2)
        norms.append(engine.grad_norm())
    return norms, [f.weight.detach().clone() for f in sorted(engine.fragments(), key=lambda f: f.name)]


def on_one_rank() -> dict[tuple[str, int | None], Trained]:
    """What each stage, and plain torch (None), makes of one network, in each precision."""
    from dit.train.engines.zero_engine import DeepSpeedEngine

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(67, 33), torch.nn.GELU(), torch.nn.Linear(33, 5))

    optim = OptimConfig(clip=0.05, weight_decay=0.1)  # clips; two groups
    found: dict[tuple[str, int | None], Trained] = {}
    for precision in ("fp32", "bf16"):
        plain = LocalEngine(network(), optim, World(), accumulation=2, precision=precision)
        found[precision, None] = trained(plain)
        for stage in STAGES:
            zero = from_dict(ZeroConfig, {"stage": stage})
            engine = DeepSpeedEngine(
                network(), optim, World(), zero=zero, global_batch=8, accumulation=2, precision=precision
            )
            found[precision, stage] = trained(engine)
    return found


def test_what_one_rank_leaves_out_changes_nothing(ranks: Server) -> None:
    """No buckets, no reduction, no mean over ranks: as plain torch, accumulating, clipping, skipping an update."""
    [every] = ranks.run(1, on_one_rank)
    for (precision, stage), (norms, weights) in every.items():
        expected, plain = every[precision, None]
        finite = [i for i, norm in enumerate(expected) if math.isfinite(norm)]
        assert finite == [0, 1, 3, 4, 5]
        assert max(expected[i] for i in finite) > 0.05
        tolerance = 1e-5 if precision == "fp32" else 2e-2
        error = relative([norms[i] for i in finite], [expected[i] for i in finite])
        assert error < tolerance, (precision, stage)
        for a, b in zip(weights, plain, strict=True):
            torch.testing.assert_close(a.flatten(), b.flatten(), rtol=tolerance, atol=tolerance)


def left_behind() -> dict[int, int]:
    """At each stage, how many parameters of a model outlive its engine after steps."""
    from dit.train.engines.zero_engine import DeepSpeedEngine

    found = {}
    for stage in STAGES:
        zero = from_dict(ZeroConfig, {"stage": stage})
        engine = DeepSpeedEngine(
            torch.nn.Linear(67, 33), OptimConfig(), World(), zero=zero, global_batch=8, accumulation=2
        )
        trained(engine)
        parameters = [weakref.ref(p) for p in engine.module.parameters()]
        engine.close()
        del engine
        gc.collect()
        found[stage] = sum(p() is not None for p in parameters)
    return found


def test_a_closed_engine_gives_its_memory_back(ranks: Server) -> None:
    """Else a notebook that trains again, or the next contender of a benchmark, has less."""
    [found] = ranks.run(1, left_behind)
    assert found == dict.fromkeys(STAGES, 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_from_step_to_step() -> None:
    """A page that went back to the kernel would be cleared anew; of 64 MB there are 16384."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    LocalEngine(torch.nn.Linear(2, 2), OptimConfig(), World())
    assert [faults() for _ in range(8)][-1] < 2000  # the heap grows in the first ones


# --- the local engine and the guarded optimizer ------------------------------------------------------------


def test_the_local_engine_is_for_one_rank() -> None:
    with pytest.raises(ConfigError, match="set engine: deepspeed"):
        LocalEngine(torch.nn.Linear(2, 2), OptimConfig(), World(0, 2, 0))


def one_step(clip: float | None, gradient: float) -> tuple[LocalEngine, Tensor, bool]:
    """An engine of one weight after an update with this gradient (from two micro-batches)."""
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    engine = LocalEngine(module, OptimConfig(lr=0.1, clip=clip), World(), accumulation=2)
    for part in (0.5, 1.5):
        engine.backward(engine(torch.ones(1, 1)).sum() * gradient * part)
    applied = engine.step(0.1)
    return engine, module.weight.detach(), applied


def test_the_local_engine_averages_micro_batches_and_clips_the_mean() -> None:
    engine, weight, applied = one_step(clip=None, gradient=3.0)
    assert applied
    assert engine.grad_norm() == pytest.approx(3.0)
    assert float(weight) == pytest.approx(-0.1, rel=1e-6)  # Adam's first step: lr * sign
    assert float(engine.fragments()[0].state["exp_avg"]) == pytest.approx(0.1 * 3.0)
    clipped, _, _ = one_step(clip=1.5, gradient=3.0)
    assert clipped.grad_norm() == pytest.approx(3.0)  # before clipping
    assert float(clipped.fragments()[0].state["exp_avg"]) == pytest.approx(0.1 * 1.5)
    assert float(one_step(clip=4.0, gradient=3.0)[0].fragments()[0].state["exp_avg"]) == pytest.approx(0.3)


@pytest.mark.parametrize("gradient", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(gradient: float) -> None:
    engine, weight, applied = one_step(clip=1.0, gradient=gradient)
    assert not applied
    assert (engine.updates, engine.skipped) == (0, 1)
    assert float(weight) == 0
    fragment = engine.fragments()[0]
    assert float(fragment.state["exp_avg"]) == float(fragment.state["exp_avg_sq"]) == 0
    engine.backward(engine(torch.ones(1, 1)).sum())
    assert engine.step(0.1)  # and the next gradient is clean
    assert engine.grad_norm() == pytest.approx(0.5)
