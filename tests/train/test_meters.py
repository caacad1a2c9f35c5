"""Sums over an interval, on one and several ranks, and the files they are written to."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.flow.loss import Loss
from dit.ranks import group
from dit.ranks.group import World
from dit.train.meters import Meters, RunLog
from dit.train.rows import truncate
from tests.rank_processes import Server

CPU = torch.device("cpu")


def loss(per_sample: list[float], t: list[float] | None = None, **scalars: float) -> Loss:
    each = torch.tensor(per_sample)
    times = None if t is None else torch.tensor(t)
    return Loss(each.mean(), each, times, {k: torch.tensor(v) for k, v in scalars.items()})


def test_an_interval_is_the_mean_over_micro_batches_and_by_quarters_of_t() -> None:
    meters = Meters(CPU)
    meters.add(loss([1.0, 3.0], [0.0, 0.3], drop=0.5))
    meters.add(loss([5.0, 7.0], [0.26, 1.0], drop=0.7))
    row = meters.take(steps=2, samples=4)
    assert row["loss"] == 4.0
    assert [row[f"loss_q{i}"] for i in (1, 2, 3, 4)] == [1.0, 4.0, None, 7.0]
    assert row["drop"] == pytest.approx(0.6)


def test_a_loss_without_times_has_no_quarters() -> None:
    meters = Meters(CPU)
    meters.add(loss([1.0]))
    assert not any(name.startswith("loss_q") for name in meters.take(1, 1))


def test_taking_starts_a_new_interval() -> None:
    meters = Meters(CPU)
    meters.add(loss([1.0], [0.5]))
    meters.add_hash(torch.tensor([5, 6]))
    meters.wait_seconds = 1.0
    assert meters.take(1, 1)["batch_hash"] == 11
    meters.add(loss([9.0], [0.5]))
    row = meters.take(1, 1)
    assert (row["loss"], row["batch_hash"], row["data_wait"]) == (9.0, 0, 0.0)


def test_hashes_add_up_mod_2_63() -> None:
    meters = Meters(CPU)
    big = 2**63 - 1
    meters.add_hash(torch.tensor([big, big, 3]))  # wraps in int64 on the way
    meters.add_hash(torch.tensor([big]))
    assert meters.batch_hash == (3 * big + 3) % 2**63


def test_speeds_leave_out_pauses() -> None:
    begun = time.perf_counter()
    meters = Meters(CPU)
    meters.add(loss([1.0]))
    time.sleep(0.05)
    meters.pause(0.04)
    meters.wait_seconds = 0.005
    row = meters.take(steps=2, samples=10)
    seconds = row["step_ms"] * 2 / 1e3
    assert 0.009 < seconds < time.perf_counter() - begun - 0.04  # a busy machine sleeps longer
    assert row["images_per_s"] == pytest.approx(10 / seconds)
    assert row["data_wait"] == pytest.approx(0.005 / seconds)


def test_a_state_between_two_intervals_carries_on() -> None:
    whole, first, second = Meters(CPU), Meters(CPU), Meters(CPU)
    parts = [loss([1.0, 2.0], [0.1, 0.9], drop=0.1), loss([4.0, 8.0], [0.1, 0.6], drop=0.3)]
    for i, part in enumerate(parts):
        whole.add(part)
        whole.add_hash(torch.tensor([i + 7]))
    first.add(parts[0])
    first.add_hash(torch.tensor([7]))
    second.load_state(json.loads(json.dumps(first.state())), is_main=True)
    second.add(parts[1])
    second.add_hash(torch.tensor([8]))
    expected, found = whole.take(2, 4), second.take(2, 4)
    for name in ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "drop", "batch_hash"):
        assert found[name] == expected[name], name
    other = Meters(CPU)
    other.load_state(first.state(), is_main=False)  # rank 0 alone carries them
    assert (other.batch_hash, other.state()["sums"]) == (0, {})


def two_ranks_after_a_resume() -> dict:
    """Rank 0 carries the sums of a checkpoint; rank 1 has nothing, not even the names."""
    rank = World.from_env().rank
    meters = Meters(CPU)
    meters.load_state(
        {"sums": {"loss": 6.0, "count": 2.0, "slots": 2.0, "metric/drop": 1.0}, "batch_hash": 2**63 - 1},
        rank == 0,
    )
    meters.add(loss([1.0 + rank], [0.3 * rank]))
    meters.add_hash(torch.tensor([1 + rank]))
    group.barrier()
    return meters.take(1, 2)


def test_ranks_add_up(ranks: Server) -> None:
    for row in ranks.run(2, two_ranks_after_a_resume):
        assert row["loss"] == (6 + 1 + 2) / 4
        assert row["batch_hash"] == 2  # 2^63 - 1 + 1 + 2 mod 2^63
        assert row["drop"] == 0.25
        assert (row["loss_q1"], row["loss_q2"], row["loss_q3"]) == (1.0, 2.0, None)


@pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_forward_passes_are_timed_by_the_step(device: torch.device) -> None:
    meters = Meters(device)
    a = torch.ones(512, 512, device=device)
    a @ a  # loads what it needs
    with meters.forward.timing():
        a @ a
    meters.clear()  # what was before does not count
    begun = time.perf_counter()
    for _ in range(4):
        with meters.forward.timing():
            for _ in range(20):
                a @ a
    meters.add(loss([1.0]))
    row = meters.take(steps=2, samples=2)
    assert 0 < 2 * row["forward_ms"] <= 1e3 * (time.perf_counter() - begun)
    assert row["forward_ms"] == row["forward_ms_max"]
    assert row["slowest_rank"] == 0
    meters.add(loss([1.0]))
    assert meters.take(1, 1)["forward_ms"] == 0


SLEEPS = (0.02, 0.5, 0.04)  # seconds


def one_slow_rank() -> tuple[dict, float]:
    """What is told of two steps, and the seconds that this rank's forward pass took at most."""
    rank = World.from_env().rank
    meters = Meters(CPU)
    begun = time.perf_counter()
    with meters.forward.timing():
        time.sleep(SLEEPS[rank])
    took = time.perf_counter() - begun
    meters.wait_seconds = (0.0, 0.0, 0.1)[rank]
    meters.add(loss([1.0]))
    return meters.take(steps=2, samples=2), took


def test_the_slowest_rank_and_the_longest_wait_are_told(ranks: Server) -> None:
    (row, *_), took = zip(*ranks.run(3, one_slow_rank), strict=True)
    assert row["slowest_rank"] == int(np.argmax(took)) == 1
    for name, of in (("forward_ms_max", max), ("forward_ms", statistics.median)):
        assert 1e3 * of(SLEEPS) <= 2 * row[name] <= 1e3 * of(took), name
    seconds = 2e-3 * row["step_ms"]
    assert (row["data_wait"], row["data_wait_max"]) == (0.0, pytest.approx(0.1 / seconds))


# --- files -------------------------------------------------------------------------------------------------


def test_a_line_is_json_without_nan(tmp_path: Path) -> None:
    log = RunLog(tmp_path, is_main=True)
    log.open(0)
    log.scalars(3, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1, "batch_hash": 2**63 - 1, "mfu": None})
    log.image(3, "samples", np.zeros((4, 4, 3), np.uint8))
    log.held_out(3, {"loss": 1.0, "protocol": "abc"})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 3, "loss": None, "grad_norm": None, "lr": 0.1, "batch_hash": 2**63 - 1, "mfu": None}
    assert json.loads(line, parse_constant=pytest.fail) == expected
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "held_out.jsonl").read_text()) == {
        "step": 3,
        "loss": 1.0,
        "protocol": "abc",
    }


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, is_main=False)
    log.open(0)
    log.scalars(1, {"loss": 1.0})
    log.held_out(1, {"x": 1.0})
    log.image(1, "samples", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (['{"step": 1}', '{"step": 2}', '{"step": 3}'], 2),
        (['{"step": 1}', '{"step": 2}', '{"step": 3, "lo'], 2),
        (['{"step": 1}', '{"ste', '{"step": 2}'], 1),
        (['{"step": 1}', "[]", '{"step": 2}'], 1),
        (['{"step": 1}', '{"step": 2}', "\0\0\0\0"], 2),  # what a stop of the machine leaves of a file
        (['{"step": 1}', '{"step": 2}', '{"step": 1, "\udcff'], 2),  # a byte that is no text
        (['{"step": 5}'], 0),
        ([], 0),
    ],
)
def test_lines_beyond_the_step_and_broken_ones_are_cut_off(
    tmp_path: Path, lines: list[str], kept: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    truncate(path, 2)
    assert path.read_text() == "".join(line + "\n" for line in lines[:kept])
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
