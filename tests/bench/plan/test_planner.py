"""The planner: what holds of every estimate, closed forms of its parts, and what it says of what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dit.bench.plan import communication, compute
from dit.bench.plan.compute import Work
from dit.bench.plan.devices import GPUS, NAMES, DeviceFacts, core, device_facts, together
from dit.bench.plan.job import Asked, Job, job_of
from dit.bench.plan.measured import Curve, curve_for, held_out, known_name, read_points
from dit.bench.plan.planner import Estimate, as_json, estimate, plan
from dit.bench.plan.table import lines
from dit.bench.speed.collectives import formula
from dit.config import ConfigError, from_dict
from dit.configfile import load
from dit.errors import UserError
from dit.experiments.diffusion import Experiment
from dit.model.cost import Memory, cost
from dit.model.dit import DiTConfig
from dit.ranks.group import World
from dit.train.engines.zero_config import STAGES, USABLE, Device, ZeroConfig, choose
from tests.data.helpers import write_dataset

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs" / "imagenet256").glob("?*2_rectified_flow.yaml"))
KEYS = [
    "fits", "stage", "micro_batch", "images_per_s", "mfu", "memory_bytes", "gpu_hours", "communication_share",
    "assumptions",
]  # fmt: skip
CORE = core(peak=1e11, memory=4 * 2**30, cores=2)
DEVICES = [*GPUS.values(), CORE]


def asked(device: str = "h100", gpus: int = 8, **keys: Any) -> Asked:
    return from_dict(Asked, {"device": device, "gpus": gpus, **keys})


def job(config: Path = CONFIGS[-1], batch: int | None = None, **keys: str) -> Job:
    return job_of(load(Experiment, config, keys), asked(batch=batch))


def small(batch: int = 32, **keys: Any) -> Job:
    return Job(cost(DiTConfig(size="S"), 32, 4, 1000), batch, **keys)


# --- what holds of every estimate ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("config", [*CONFIGS, ROOT / "configs/digits.yaml"], ids=lambda path: path.stem[:3])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_more_devices_are_quicker_together_and_no_quicker_each(
    config: Path, device: DeviceFacts, compiled: str
) -> None:
    its = job(config, **{"train.compile": compiled})
    counts = [2**n for n in range(13) if 2**n <= its.batch]
    found = [each for n in counts if (each := estimate(its, device, n)).way is not None]
    assert len(found) >= 5
    for fewer, more in pairwise(found):
        assert more.rate >= fewer.rate
        assert more.rate / more.ranks <= fewer.rate / fewer.ranks
    for one in found:
        assert one.memory is not None
        assert one.memory <= device.memory
        assert 0 < one.mfu < device.gemm_share


def test_devices_that_would_only_slow_it_down_idle() -> None:
    """Machines joined by a thread: eight in one are quicker than sixteen in two, and the plan says so."""
    thread = replace(GPUS["h100"], network=1e8)
    eight, sixteen = estimate(job(), thread, 8), as_json(estimate(job(), thread, 16))
    assert sixteen["images_per_s"] == eight.rate
    assert (sixteen["gpus"], sixteen["gpus_used"]) == (16, 8)
    assert sixteen["gpu_hours"] == pytest.approx(16 * eight.hours)  # those that idle are paid for
    assert sixteen["mfu"] == pytest.approx(eight.mfu / 2)
    assert "8 of the 16 devices are used" in " ".join(lines(sixteen))
    assert as_json(eight)["gpus_used"] == 8


def test_devices_are_never_quicker_each_where_memory_allows_larger_micro_batches() -> None:
    """A model whose state fills a device alone: sharing it makes room, and the roofline alone would gain by that."""
    tight = replace(GPUS["h100"], memory=24 * 2**30)
    its = job(batch=1024)
    found = {n: estimate(its, tight, n) for n in (1, 2, 4, 8, 16, 64)}
    fitting = [one for one in found.values() if one.way is not None]
    raw = [one.job.batch / one.way.seconds / one.ranks for one in fitting if one.way]
    assert any(more > fewer for fewer, more in pairwise(raw)), "the case is no longer one"
    each = [one.rate / one.ranks for one in fitting]
    assert all(more <= fewer for fewer, more in pairwise(each))
    assert any("larger micro-batches" in one.limit for one in fitting)


@pytest.mark.parametrize("gpus", [1, 8, 64, 4096])
def test_figures_agree_with_each_other(gpus: int) -> None:
    its = job(batch=max(256, 2 * gpus))
    found = as_json(estimate(its, GPUS["h100"], gpus), price=2.5)
    json.dumps(found)
    assert list(found)[: len(KEYS)] == KEYS
    assert found["fits"] is True
    hours = found["samples"] / found["images_per_s"] / 3600
    assert found["gpu_hours"] == pytest.approx(hours * gpus)
    assert found["cost"] == pytest.approx(2.5 * found["gpu_hours"])
    flops = found["images_per_s"] * its.cost.training_flops
    assert found["mfu"] == pytest.approx(flops / (gpus * 989.5e12))
    assert found["step_ms"] == pytest.approx(1e3 * its.batch / found["images_per_s"])
    assert gpus * found["micro_batch"] * found["accumulation"] == its.batch
    parts = found["parts_ms"]
    assert found["communication_share"] == pytest.approx(parts["sent"] / sum(parts.values()))
    assert 0 <= found["communication_share"] < 1
    assert (found["communication_share"] == 0) == (gpus == 1)
    assert any("ESTIMATE" in line for line in lines(found))


def test_xl_on_eight_h100_is_plausible() -> None:
    """Public trainers of DiTs of this size reach 20 to 25% of the peak; a compiler's fusion allows 54%."""
    eager = estimate(job(), GPUS["h100"], 8)
    compiled = estimate(job(**{"train.compile": "true"}), GPUS["h100"], 8)
    assert 0.15 < eager.mfu < compiled.mfu < 0.54
    alone = estimate(job(**{"train.compile": "true"}), GPUS["h100"], 1)
    assert alone.way is not None
    assert alone.way.accumulation > 1
    assert compiled.rate < 8 * alone.rate


def test_the_roofline_is_that_of_the_arithmetic() -> None:
    """XL/2 compiled on an H100: about 0.89 ms of products and 0.39 ms of other traffic an image, attention aside."""
    its = job(**{"train.compile": "true"})
    each = compute.pass_seconds(its, 2, GPUS["h100"]) - compute.pass_seconds(its, 1, GPUS["h100"])
    assert each == pytest.approx(1.33e-3, rel=0.03)


@pytest.mark.parametrize("name", GPUS)
def test_float32_is_not_multiplied_at_the_rate_of_bfloat16(name: str) -> None:
    """The trainer leaves TF32 off, and MFU is still a share of the peak in bfloat16, as its own is."""
    exact, half = (estimate(small(precision=precision), GPUS[name], 1) for precision in ("fp32", "bf16"))
    assert exact.rate < half.rate
    flops = exact.rate * exact.job.cost.training_flops
    assert 0.2 * GPUS[name].peak_fp32 < flops < GPUS[name].peak_fp32
    assert exact.mfu == pytest.approx(flops / GPUS[name].peak)
    assert f"{GPUS[name].peak_fp32 / 1e12:.4g} TFLOP/s" in exact.assumptions["peak"]
    assert f"{GPUS[name].peak / 1e12:.4g} TFLOP/s" in half.assumptions["peak"]


# --- what the trainer would do --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "size", "gpus"), [("h100", "XL", 8), ("a100", "XL", 1), ("tight", "XL", 8)]
)
def test_the_stage_is_the_one_that_the_trainer_would_choose(device: str, size: str, gpus: int) -> None:
    facts = {**GPUS, "tight": replace(GPUS["a100"], memory=13 * 2**30)}[device]
    found = estimate(job(), facts, gpus)
    assert found.way is not None
    way, its = found.way, found.job
    room = Device(int(USABLE * facts.memory), False, gpus)

    def memory(stage: int) -> Memory:
        return its.memory(way.micro, stage, gpus, way.accumulation)

    taken = choose(ZeroConfig(), memory, room)
    assert way.stage == taken.stage
    assert (device == "tight") == (way.stage > 0)
    assert found.memory == ZeroConfig().needs(memory(way.stage), way.stage, room)


def test_a_budget_makes_micro_batches_as_large_as_fit_with_the_least_work_done_again() -> None:
    """Of ways that fit it takes the quickest; FLOPs and MFU do not count what is done again."""
    facts, rates, works = GPUS["h100"], [], []
    for gigabytes in (70, 40, 20):
        planned = job(**{"train.memory_gb": str(gigabytes), "train.precision": "bf16"})
        found = estimate(planned, facts, 1)
        assert found.way is not None
        assert found.way.memory <= 1e9 * gigabytes
        rates.append(found.rate)
        works.append(found.way.recompute.work(28))
        assert found.mfu == pytest.approx(found.rate * planned.cost.training_flops / facts.peak)
    assert works[0] == 0.0 < works[-1]
    assert works == sorted(works)
    assert rates == sorted(rates, reverse=True)
    assert "train.memory_gb" in reason(estimate(job(**{"train.memory_gb": "2"}), facts, 1))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_and_a_micro_batch_that_are_named_are_kept_to(stage: int) -> None:
    found = estimate(job(**{"zero.stage": str(stage), "train.micro_batch": "8"}), GPUS["h100"], 8)
    assert found.way is not None
    assert found.way.stage == stage
    assert found.way.micro <= 8


def test_micro_batches_are_multiples_of_the_couplings_group() -> None:
    found = estimate(small(group=3), GPUS["h100"], 1)
    assert found.way is None
    assert "a multiple of 3, the group of objective.coupling" in found.reason
    assert estimate(small(48, group=3), GPUS["h100"], 2).way is not None


# --- what cannot be -------------------------------------------------------------------------------------------


def reason(found: Estimate) -> str:
    made = as_json(found)
    assert made["fits"] is False
    assert list(made)[: len(KEYS)] == KEYS
    assert made["images_per_s"] is None
    assert any(made["reason"] in line for line in lines(made))
    return str(made["reason"])


def test_a_batch_that_is_too_small_or_cannot_be_shared() -> None:
    assert "smaller than 64 devices" in reason(estimate(small(32), GPUS["h100"], 64))
    assert "cannot be shared by 3 ranks" in reason(estimate(small(32), GPUS["h100"], 3))


def test_a_model_that_is_too_large() -> None:
    text = reason(estimate(job(), replace(GPUS["h100"], memory=4 * 2**30), 1))
    assert "does not fit" in text
    assert "checkpoint_blocks" in text  # what would help
    made = as_json(estimate(job(), replace(GPUS["h100"], memory=4 * 2**30), 1))
    assert made["memory_bytes"] > 4 * 2**30


def test_ranks_that_the_engine_cannot_group() -> None:
    assert "zero.hpz" in reason(estimate(small(zero=ZeroConfig(stage=3, hpz=4)), GPUS["h100"], 2))
    assert "local engine" in reason(estimate(small(is_local=True), GPUS["h100"], 2))
    assert estimate(small(is_local=True), GPUS["h100"], 1).way is not None


def test_the_plain_engine_shards_nothing_on_any_ranks() -> None:
    found = estimate(small(is_plain=True, zero=ZeroConfig(stage=0)), GPUS["h100"], 2)
    assert found.way is not None
    assert found.way.stage == 0
    assert found.rate == estimate(small(zero=ZeroConfig(stage=0)), GPUS["h100"], 2).rate
    full = replace(GPUS["h100"], memory=2 * 2**20)
    assert "does not fit" in reason(estimate(small(is_plain=True), full, 2))


@pytest.mark.parametrize(("word", "meant"), [("h10", "h100"), ("B20", "b200"), ("cpus", "cpu")])
def test_an_unknown_device_names_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {meant}") as error:
        device_facts(word, "bf16")
    assert all(name in str(error.value) for name in NAMES)
    assert device_facts("H100", "bf16") is GPUS["h100"]


@pytest.mark.parametrize(
    "keys",
    [{"gpus": 0}, {"batch": 0}, {"samples": -1}, {"price": -1.0}, {"image_size": 256, "input_size": 32}],
)
def test_what_is_asked_is_checked(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(keys))}"):
        from_dict(Asked, {"device": "h100", "gpus": 1, **keys})


# --- communication --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rings_send_the_bytes_of_the_formula(stage: int, accumulation: int) -> None:
    """Without latency a ring of fp32 takes the formula's bytes over the bandwidth; 2 psi, and 3 psi at stage 3."""
    near = replace(GPUS["h100"], latency=0.0)
    sent = communication.traffic(10**8, 12, stage, "fp32", "auto")
    seconds = communication.step_seconds(stage, sent, accumulation, 8, near)
    expected = formula(stage, 4 * 10**8, 8, accumulation) / (near.link * near.wire_share)
    assert seconds == pytest.approx(expected)


def test_small_messages_go_by_a_tree() -> None:
    far = GPUS["h100"]
    assert communication.leg_seconds(0.0, 1, 1024, far) == pytest.approx(10 * far.network_latency)
    assert communication.leg_seconds(1e9, 1, 1, far) == 0


def test_machines_are_left_through_all_their_adapters() -> None:
    slow = replace(GPUS["h100"], network=1e9, network_latency=0.0)
    assert communication.leg_seconds(8e9, 1, 16, slow) == pytest.approx(15 / 16 * 8e9 / (8e9 * 0.8))


def test_gradients_are_rounded_as_the_engine_rounds_them() -> None:
    sizes = {stage: communication.traffic(1, 1, stage, "bf16", "auto").gradient for stage in STAGES}
    assert sizes == {0: 4, 1: 2, 2: 2, 3: 2}
    assert communication.traffic(1, 1, 2, "bf16", "fp32").gradient == 4


# --- measurements ---------------------------------------------------------------------------------------------


def step_file(path: Path, factor: float, device: str = "NVIDIA H100 80GB HBM3", **how: Any) -> Path:
    """Figures of `step` on a device that takes `factor` times as long as the roofline."""
    how = {"size": ["S"], "patch": 2, "batch": 64, "precision": "bf16", "compile": False, **how}
    model = cost(DiTConfig(size="S", patch=2), 32, 4, 1000)
    seconds = compute.step_seconds(Job(model, 64, "bf16"), Work(32, 2, 0, 1.0), GPUS["h100"])
    row = {"micro_batch": 32, "images_per_s": {"median": 64 / (factor * seconds)}}
    rows = {"plain loop": row, "ours, stage 0": row, "ours, no DeepSpeed": row}
    path.write_text(json.dumps({"protocol": {**how, "device": device}, "figures": {"S": {"rows": rows}}}))
    return path


def test_what_was_measured_corrects_the_roofline(tmp_path: Path) -> None:
    its = small(64, precision="bf16")
    points = read_points(None, str(step_file(tmp_path / "found.json", 3.0)))
    curve = curve_for(points, GPUS["h100"], its)
    assert [point.factor for point in points] == [pytest.approx(3.0)]
    quick, slow = estimate(its, GPUS["h100"], 1), estimate(its, GPUS["h100"], 1, curve)
    assert quick.way is not None and slow.way is not None  # noqa: PT018
    assert slow.way.passes == pytest.approx(3 * quick.way.passes)
    assert "not measured" in quick.assumptions["efficiency"]
    assert "found.json" in slow.assumptions["efficiency"]
    assert "measured on one rank" in slow.assumptions["efficiency"]


@pytest.mark.parametrize("how", [{"precision": "fp32"}, {"compile": True}, {"device": "NVIDIA H200"}])
def test_what_was_measured_in_another_way_tells_nothing(tmp_path: Path, how: dict[str, Any]) -> None:
    points = read_points(None, str(step_file(tmp_path / "found.json", 3.0, **how)))
    assert len(points) == 1
    assert not curve_for(points, GPUS["h100"], small(precision="bf16")).points


def test_a_file_without_steps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"protocol": {}, "figures": {}}')
    with pytest.raises(UserError, match=r"expected figures of `tools/bench.py step"):
        read_points(None, str(tmp_path / "other.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_points(None, str(tmp_path / "broken.json"))
    traced = {"protocol": {"size": "S", "patch": 2, "compile": False, "device": "x86_64"}}
    (tmp_path / "trace.json").write_text(json.dumps({**traced, "figures": {"step_ms": 1.0, "parts_ms": {}}}))
    with pytest.raises(UserError, match="expected figures"):
        read_points(None, str(tmp_path / "trace.json"))
    step_file(tmp_path / "unknown.json", 1.0, device="NVIDIA T4")
    with pytest.raises(UserError, match="device that is known"):
        read_points(None, str(tmp_path / "unknown.json"))


def test_a_curve_goes_between_what_was_measured_and_not_beyond(tmp_path: Path) -> None:
    (low,) = read_points(None, str(step_file(tmp_path / "a.json", 4.0)))
    high = replace(low, work=100 * low.work, seconds=low.seconds / 4)  # a factor of 1
    curve = Curve((low, high))
    assert curve.factor(0, low.work / 7) == pytest.approx(4)
    assert curve.factor(0, 10 * low.work) == pytest.approx(2)
    assert curve.factor(0, 1e6 * low.work) == pytest.approx(1)
    assert curve.factor(3, 10 * low.work) == pytest.approx(2)  # where no step of its own is known
    assert Curve().factor(0, 1.0) == 1


def test_the_published_steps_are_estimated_from_each_other() -> None:
    """Within a quarter: they were taken on one machine, of models of a sixteenth of each other's work."""
    rows = list(held_out(read_points(ROOT / "benchmarks", None)))
    assert len(rows) >= 8
    for point, seconds, others in rows:
        assert others or point.device != "cpu"
        if point.device == "cpu":
            assert math.isclose(seconds, point.seconds, rel_tol=0.25), point.name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GH200 480GB", None),
        ("x86_64", "cpu"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_devices_are_known_by_what_torch_calls_them(said: str, name: str | None) -> None:
    assert known_name(said) == name


def test_ranks_here_are_in_one_machine() -> None:
    assert together(CORE, 1).node == CORE.node == 2
    assert together(CORE, 4).node == 4
    near, far = (estimate(small(), facts, 4).way for facts in (together(CORE, 4), CORE))
    assert near is not None and far is not None  # noqa: PT018
    assert near.sent < far.sent


# --- the data -------------------------------------------------------------------------------------------------


def test_the_data_say_their_shape_where_they_are_and_flags_say_it_otherwise(tmp_path: Path) -> None:
    cfg = load(
        Experiment, ROOT / "configs/digits.yaml", {"data.path": str(tmp_path / "none"), "model.patch": "1"}
    )
    absent = job_of(cfg, asked())
    assert absent.cost.dims.tokens == 1024
    assert "ImageNet-256" in absent.data
    write_dataset(tmp_path / "none", [8])
    there = job_of(cfg, asked())
    manifest = cfg.data.open().manifest
    assert there.cost == cfg.cost(manifest)
    assert "none says" in there.data
    told = job_of(cfg, asked(input_size=16, channels=8, num_classes=7))
    assert (told.cost.dims.tokens, told.cost.dims.channels, told.cost.dims.num_classes) == (256, 8, 7)
    assert job_of(cfg, asked(image_size=512)).cost.dims.tokens == 4096
    with pytest.raises(ConfigError, match="multiple of 8"):
        job_of(cfg, asked(image_size=100))


def test_pixels_have_three_channels_and_their_own_size() -> None:
    cfg = load(Experiment, ROOT / "configs/cifar10_pixels.yaml", {"codec": "pixels"})
    found = job_of(cfg, asked(image_size=32))
    assert (found.cost.dims.channels, found.cost.dims.grid[0] * cfg.model.patch) == (3, 32)


def test_frozen_parameters_are_not_sent() -> None:
    whole, frozen = job(), job(**{"train.freeze": "[blocks.0.*]"})
    assert frozen.frozen > 0
    slow, quick = (estimate(one, GPUS["h100"], 8).way for one in (whole, frozen))
    assert slow is not None and quick is not None  # noqa: PT018
    assert quick.sent < slow.sent


def test_samples_are_the_runs_unless_told() -> None:
    cfg = load(Experiment, CONFIGS[-1])
    assert plan(cfg, asked(), [])["samples"] == 400_000 * 256
    assert plan(cfg, asked(samples=10**6, batch=512), [])["samples"] == 10**6
    assert plan(cfg, asked(batch=512), [])["global_batch"] == 512
    assert World(size=3).size == 3
