"""The table of results: what the runs left, of one protocol, and what is missing."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dit.errors import Notice
from dit.evals import record
from dit.scaling.collecting import COLUMNS, collect, warn_of_missing, write_table
from dit.scaling.planned import ScalingError
from dit.scaling.states import RunState
from tests.scaling.conftest import Done


@pytest.fixture
def copy(done: Done, tmp_path: Path) -> Done:
    shutil.copytree(done.out, tmp_path / "out")
    return Done(tmp_path / "out", done.plan)


def held_out(done: Done, place: int) -> Path:
    return RunState(done.out, done.plan.runs[place]).folder / "held_out.jsonl"


def last(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])
    return found


def measured(
    done: Done,
    place: int,
    value: float,
    digest: str = "abc",
    step: int | None = None,
    cost: int | None = None,
) -> None:
    run = done.plan.runs[place]
    drawn = record.drawn_by({"sampler": {}, "network_evaluations": cost}) if cost else {}
    row = {
        **drawn,
        "step": run.steps if step is None else step,
        "figures": {"frechet": value},
        "hash": digest,
        "features": "x",
    }
    record.append(RunState(done.out, run).folder, [row])


def test_the_table_has_the_held_out_loss_of_each_run(done: Done, tmp_path: Path) -> None:
    write_table(collect(done.out, done.plan), tmp_path / "a" / "runs.csv")
    with (tmp_path / "a" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert COLUMNS[:9] == (
        "run",
        "params",
        "samples",
        "tokens",
        "flops",
        "loss",
        "metric",
        "seed",
        "complete",
    )
    for place, (row, run) in enumerate(zip(rows, done.plan.runs, strict=True)):
        there = last(held_out(done, place))
        assert there["step"] == run.steps
        assert float(row["loss"]) == there["loss"]
        assert [float(row[f"loss_q{i}"]) for i in (1, 2, 3, 4)] == [there[f"loss_q{i}"] for i in (1, 2, 3, 4)]
        assert (row["run"], row["metric"], row["complete"]) == (run.name, "held_out_loss", "true")
        assert [int(row[key]) for key in ("params", "samples", "tokens", "seed")] == [
            run.params, run.samples, run.tokens, 0,
        ]  # fmt: skip
        assert float(row["flops"]) == run.flops
    assert len({row["protocol"] for row in rows}) == 1


def test_a_better_law_needs_more_than_one_value(done: Done) -> None:
    """Sizes and lengths differ in their losses, or the runs were one and the same."""
    assert len({row["loss"] for row in collect(done.out, done.plan).rows}) == len(done.plan.runs)


def test_missing_runs_are_named_and_left_out(copy: Done) -> None:
    never, begun, lost = copy.plan.runs[0], copy.plan.runs[2], copy.plan.runs[3]
    shutil.rmtree(RunState(copy.out, never).folder)
    shutil.rmtree(RunState(copy.out, begun).folder / "checkpoints" / f"step-{begun.steps:08d}")
    held_out(copy, 3).unlink()
    found = collect(copy.out, copy.plan)
    assert [row["run"] for row in found.rows] == [copy.plan.runs[1].name]
    assert found.missing[never.name] == "not begun"
    assert found.missing[begun.name] == f"not complete: step {begun.steps} of {begun.steps}"
    assert found.missing[lost.name] == "no held_out_loss"
    with pytest.warns(Notice, match=f"3 runs left out: {never.name} \\(not begun\\)"):
        warn_of_missing(found)


@pytest.mark.parametrize(
    "line",
    [
        b'{"loss": 1.0, "step": "x", "protocol": "p"}',
        b'{"loss": 1.0, "protocol": "p"}',
        b'{"loss": 1.0, "step": 7, "protocol": 3}',
        b"\xff\xfe",
    ],
)
def test_a_row_that_is_none_is_passed_over(copy: Done, line: bytes) -> None:
    before = collect(copy.out, copy.plan)
    with held_out(copy, 1).open("ab") as file:
        file.write(line + b"\n")
    assert collect(copy.out, copy.plan) == before


def test_what_is_not_complete_may_be_taken(copy: Done) -> None:
    begun = copy.plan.runs[2]
    shutil.rmtree(RunState(copy.out, begun).folder / "checkpoints" / f"step-{begun.steps:08d}")
    rows = {row["run"]: row for row in collect(copy.out, copy.plan, partial=True).rows}
    assert rows[begun.name]["complete"] == "false"
    assert len(rows) == len(copy.plan.runs)


def test_runs_of_unlike_data_are_said(copy: Done) -> None:
    trained = collect(copy.out, copy.plan).trained_on
    assert list(trained.values()) == [[run.name for run in copy.plan.runs]]
    run = copy.plan.runs[3]
    place = RunState(copy.out, run).folder / "checkpoints" / f"step-{run.steps:08d}"
    meta = json.loads((place / "meta.json").read_text())
    meta["data"]["digest"] = "0123456789abcdef"
    (place / "meta.json").write_text(json.dumps(meta))
    (place / "COMPLETE").write_text(hashlib.sha256((place / "meta.json").read_bytes()).hexdigest())
    with pytest.warns(Notice, match=f"on 2 unlike sets of data, .*; 0123456789ab: {run.name}$"):
        warn_of_missing(collect(copy.out, copy.plan))


def test_protocols_are_not_mixed(copy: Done) -> None:
    file = held_out(copy, 1)
    row = {**last(file), "protocol": "0123456789ab"}
    file.write_text(json.dumps(row) + "\n")
    whole = collect(copy.out, copy.plan, protocol="0123456789ab")
    assert [row["run"] for row in whole.rows] == [copy.plan.runs[1].name]
    assert len(whole.missing) == 3
    with pytest.raises(ScalingError, match="not all of one protocol") as found:
        collect(copy.out, copy.plan)
    assert f"0123456789ab: {copy.plan.runs[1].name}\n" in str(found.value) + "\n"
    assert f"{copy.plan.runs[0].name}, {copy.plan.runs[2].name}" in str(found.value)


def test_figures_of_drawn_images_are_collected_too(copy: Done) -> None:
    for place in range(4):
        measured(copy, place, 10.0 + place)
        measured(copy, place, 99.0, step=1)  # of an earlier checkpoint
    for metric in ("frechet", "frechet (x)"):
        found = collect(copy.out, copy.plan, metric)
        assert [row["loss"] for row in found.rows] == [10.0, 11.0, 12.0, 13.0]
        assert {row["metric"] for row in found.rows} == {metric}
        assert found.protocol == "abc"


def test_figures_of_two_protocols_have_to_be_chosen_from(copy: Done) -> None:
    for place in range(4):
        measured(copy, place, 1.0, "abc")
        measured(copy, place, 2.0, "def")
    with pytest.raises(ScalingError, match=r"of several protocols.*--protocol=HASH"):
        collect(copy.out, copy.plan, "frechet")
    assert {row["loss"] for row in collect(copy.out, copy.plan, "frechet", "def").rows} == {2.0}


def test_a_figure_that_nobody_measured_is_named_beside_those_there_are(copy: Done) -> None:
    measured(copy, 0, 1.0)
    with pytest.raises(
        ScalingError, match=r"has no fid of any run(.|\n)*There are: frechet \(x\), held_out_loss"
    ):
        collect(copy.out, copy.plan, "fid")


def test_the_cost_of_drawn_images_goes_with_their_figures(copy: Done, tmp_path: Path) -> None:
    for place in range(4):
        measured(copy, place, 10.0, cost=64)
    assert [row["evaluations"] for row in collect(copy.out, copy.plan, "frechet").rows] == [64] * 4
    write_table(collect(copy.out, copy.plan), tmp_path / "runs.csv")
    with (tmp_path / "runs.csv").open() as file:
        assert {row["evaluations"] for row in csv.DictReader(file)} == {""}
