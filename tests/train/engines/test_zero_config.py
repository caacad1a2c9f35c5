"""Settings of the sharding, and the choice of the ZeRO stage by the memory model."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from dit.config import ConfigError, from_dict
from dit.model.cost import Memory, state_memory
from dit.ranks.group import World
from dit.train.engines.zero_config import (
    BUCKET,
    QUICKEST,
    STAGES,
    USABLE,
    Device,
    Stage,
    ZeroConfig,
    choose,
    unsharded,
)
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import at_step, experiment, go, values

GIB = 2**30


def zero(**keys: object) -> ZeroConfig:
    return from_dict(ZeroConfig, keys)


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"stage": 0, "offload": "optimizer"}, "zero.offload = optimizer needs zero.stage 1, 2 or 3, got 0"),
        ({"stage": 2, "offload": "all"}, r"zero.offload = all \(parameters too\) needs zero.stage 3, got 2"),
        ({"stage": 2, "hpz": 2}, r"zero.hpz = 2 .* needs zero.stage 3, got 2"),
        ({"stage": 1, "hpz": 2, "offload": "all"}, "zero.offload = all .* and zero.hpz = 2 .* got 1"),
        ({"hpz": 0}, "zero.hpz must be at least 1"),
        ({"offload": "cpu"}, "offload: "),
        ({"stage": True}, "truth value"),
        ({"communication": "fp16"}, "communication: "),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        zero(**keys)


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ({}, (0, 1, 2, 3)),
        ({"offload": "optimizer"}, (1, 2, 3)),
        ({"offload": "all"}, (3,)),
        ({"hpz": 2}, (3,)),
    ],
)
def test_auto_goes_with_the_other_keys(keys: dict[str, object], stages: tuple[int, ...]) -> None:
    assert zero(stage="auto", **keys).possible == stages
    for stage in stages:
        assert zero(stage=stage, **keys).stage == stage


def test_groups_of_ranks_must_be_whole() -> None:
    zero(stage=3, hpz=2).check(World(0, 4))
    with pytest.raises(ConfigError, match=r"zero.hpz = 4 does not divide 6 ranks; use one of \[1, 2, 3, 6\]"):
        zero(stage=3, hpz=4).check(World(0, 6))


def test_plain_torch_offloads_nothing(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero.offload and zero.hpz are DeepSpeed's"):
        experiment(values(digits, tmp_path, engine="local", zero={"stage": 1, "offload": "optimizer"}))


# --- the choice --------------------------------------------------------------------------------------------

BILLION = 10**9
ACTIVATIONS = 4 * GIB


def memory(stage: int, ranks: int = 8) -> Memory:
    """A thousand million parameters on 8 ranks; by hand, in 4e9 bytes: 5, 2 + 4/8, 1 + 5/8, 6/8."""
    made = state_memory(BILLION, stage, ranks)
    return Memory(**{**vars(made), "activations": ACTIVATIONS})


BY_HAND = {0: 5.0, 1: 2.5, 2: 1.625, 3: 0.75}


def needed(stage: int) -> int:
    """With DeepSpeed's buffers: 5e8 gradients at stage 0, a bucket of them at 1 and 2, three at 3."""
    return (
        int(BY_HAND[stage] * 4 * BILLION)
        + ACTIVATIONS
        + {0: 2 * BILLION, 3: 12 * BUCKET}.get(stage, 4 * BUCKET)
    )


def test_what_shards_nothing_needs_what_stage_0_does_and_says_where_that_is_too_much() -> None:
    need = zero().needs(memory(0), 0, Device(0, False, 8))
    fits, full = (unsharded(zero(), memory(0), Device(usable, False, 8)) for usable in (need, need - 1))
    assert (fits.stage, fits.why, full.stage) == (0, "", 0)
    assert re.search(r"needs (\d+\.\d) GiB of \1; engine: deepspeed shards", full.why)


@pytest.mark.parametrize("ranks", [1, 8])
def test_the_quickest_stage_that_fits_is_taken(ranks: int) -> None:
    """With just enough for one stage, all that are quicker are too large."""

    def of(stage: int) -> Memory:
        return memory(stage, ranks)

    needs = {s: zero().needs(of(s), s, Device(0, False, ranks)) for s in STAGES}
    assert set(QUICKEST) == set(STAGES)
    for usable in needs.values():
        found = choose(zero(), of, Device(usable, False, ranks))
        assert found.stage == next(s for s in QUICKEST if needs[s] <= usable)
        assert found.zero.stage == found.stage
    least = min(needs.values())
    none = choose(zero(), of, Device(least - 1, False, ranks))
    assert needs[none.stage] == least
    assert "NONE fits" in none.why


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_what_its_states_take(stage: int) -> None:
    assert zero().needs(memory(stage), stage, Device(0, False, 8)) == needed(stage)


def test_it_says_why() -> None:
    assert choose(zero(), memory, Device(int(15 * GIB), False, 8)).why == (
        "zero.stage: 1, the quickest that fits: stage 0 needs 24.5 GiB of 15.0, stage 1 13.5"
    )
    assert choose(zero(), memory, Device(int(9 * GIB), False, 8)).why == (
        "zero.stage: 3, the quickest that fits: stage 0 needs 24.5 GiB of 9.0, stage 1 13.5, stage 2 10.2, stage 3 7.4"
    )
    assert choose(zero(stage=2), memory, Device(0, False, 8)).why == ""
    assert choose(zero(stage=2), memory, Device(0, False, 8)).stage == 2


@pytest.mark.parametrize("kept", STAGES)
def test_the_stage_that_a_run_has_had_is_kept_while_it_fits(kept: Stage) -> None:
    found = choose(zero(), memory, Device(needed(kept), False, 8), kept)
    assert found.stage == kept
    assert found.why.startswith(f"zero.stage: {kept}, as the run has had: stage {kept} needs")
    tight = choose(zero(), memory, Device(needed(kept) - 1, False, 8), kept)
    assert tight.stage != kept or "NONE fits" in tight.why
    assert choose(zero(stage=1), memory, Device(needed(kept), False, 8), kept).stage == 1


def test_a_kept_stage_that_the_other_keys_exclude_is_not_taken() -> None:
    assert choose(zero(offload="all"), memory, Device(40 * GIB, False, 8), 2).stage == 3


def test_where_none_fits_it_says_what_would_help() -> None:
    found = choose(zero(), memory, Device(2 * GIB, False, 8))
    assert found.stage == 3
    assert found.why == (
        "zero.stage: 3, as NONE fits; it lacks 5.4 GiB: stage 0 needs 24.5 GiB of 2.0, stage 1 13.5, stage 2 10.2, "
        "stage 3 7.4. What would help: a smaller train.micro_batch or model.checkpoint_blocks=true, "
        "zero.offload=optimizer or all, more ranks"
    )
    on_cpu = choose(zero(), memory, Device(2 * GIB, True, 8))
    assert "zero.offload" not in on_cpu.why  # the host's memory is what lacks


def test_offloading_takes_off_what_it_moves() -> None:
    device, moved = Device(0, False, 8), 4 * BILLION // 8
    for stage, parts in {
        1: 4,
        2: 5,
        3: 5,
    }.items():  # master, two moments, average; and gradients from stage 2
        less = needed(stage) - parts * moved
        assert zero(stage=stage, offload="optimizer").needs(memory(stage), stage, device) == less
    assert zero(stage=3, offload="all").needs(memory(3), 3, device) == needed(3) - 6 * moved
    on_cpu = Device(0, True, 8)
    assert zero(stage=3, offload="all").needs(memory(3), 3, on_cpu) == needed(3)


def test_a_second_copy_is_counted() -> None:
    more = 4 * BILLION // 4
    assert zero(stage=3, hpz=4).needs(memory(3), 3, Device(0, False, 8)) == needed(3) + more


def test_frozen_parameters_have_no_gradients_and_no_optimizers_state() -> None:
    for stage in (0, 1, 2, 3):
        every, half = (state_memory(1000, stage, 4, frozen=frozen) for frozen in (0, 500))
        assert half.parameters == every.parameters
        for kind in ("gradients", "master", "optimizer"):
            assert getattr(half, kind) == getattr(every, kind) / 2
        assert half.ema == (every.ema if stage in (0, 3) else 500 + 2000)


def test_without_a_model_of_activations_it_says_so() -> None:
    found = choose(zero(stage="auto"), lambda stage: state_memory(10, stage, 1), Device(GIB, False, 1))
    assert found.why.endswith("; activations are not counted")


def test_the_hosts_memory_is_shared_by_the_ranks_on_it() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert Device.smallest(World(0, 2)) == Device(int(USABLE * (total // 2)), True, 2)


# --- in a run ----------------------------------------------------------------------------------------------


def test_a_run_takes_a_stage_records_it_and_keeps_it(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """config.yaml keeps the word "auto"; history.jsonl has the stage, which goes before what would be taken anew."""
    given = values(digits, tmp_path, train={"steps": 2}, zero={"offload": "optimizer"})
    job = ranks.start(2, go, given)
    job.wait()
    [start] = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    first = next(s for s in QUICKEST if s)  # offloading needs a stage above 0
    assert start["stage"] == first
    assert start["why"].startswith(f"zero.stage: {first}, the quickest that fits: stage {first} needs")
    assert start["why"] in job.output(0)
    assert start["why"] not in job.output(1)
    assert "stage: auto" in (tmp_path / "config.yaml").read_text()
    assert json.loads((at_step(tmp_path, 2) / "meta.json").read_text())["config"]["zero"]["stage"] == "auto"
    for steps, named, taken in ((3, {"stage": 3}, 3), (4, {}, 3)):
        ranks.run(
            1, go, values(digits, tmp_path, train={"steps": steps}, zero={"offload": "optimizer", **named})
        )
        last = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
        assert last["stage"] == taken
    assert last["why"].startswith("zero.stage: 3, as the run has had: ")
