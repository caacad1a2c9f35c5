"""What was measured of a run: rows are added and never lost, and unlike protocols are told apart."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit.errors import Notice, UserError
from dit.evals import record
from dit.reports.told import RunTold


def row(step: int, value: float, hash_: str = "aa", **protocol: object) -> dict[str, object]:
    return {
        "time": "2026-01-02T03:04:05+0000", "step": step, "weights": "ema", "features": "pixels", "hash": hash_,
        "figures": {"frechet": value}, "intervals": {"frechet": [value - 1, value + 1]}, "protocol": protocol,
    }  # fmt: skip


def test_rows_are_read_as_they_were_added(tmp_path):
    assert record.read(tmp_path) == []
    record.append(tmp_path, [row(1, 5.0)])
    record.append(tmp_path, [row(2, 4.0), row(3, 3.0)])
    assert record.read(tmp_path) == [row(1, 5.0), row(2, 4.0), row(3, 3.0)]


def test_a_line_that_was_not_finished_is_left_out_and_said(tmp_path):
    record.append(tmp_path, [row(1, 5.0)])
    with (tmp_path / record.FILE).open("a") as file:
        file.write('{"step": 2, "figu')
    record.append(tmp_path, [row(3, 3.0)])
    with pytest.warns(Notice, match="line 2"):
        assert record.read(tmp_path) == [row(1, 5.0), row(3, 3.0)]


def test_values_that_are_no_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record.append(tmp_path, [row(1, 5.0), row(2, float("nan"))])
    assert not (tmp_path / record.FILE).exists()


def add(folder: Path, first: int) -> None:
    for step in range(first, first + 20):
        record.append(folder, [row(step, 1.0)])


def test_several_processes_may_add_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add, args=(tmp_path, 100 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({held["step"] for held in record.read(tmp_path)}) == 60


def test_figures_of_unlike_protocols_stand_apart_and_the_difference_is_named(tmp_path):
    record.append(tmp_path, [row(1, 5.0, "aa", count=100, features={"name": "pixels"})])
    record.append(tmp_path, [row(2, 9.0, "bb", count=50, features={"name": "pixels"})])
    record.append(tmp_path, [row(2, 4.0, "aa", count=100, features={"name": "pixels"})])
    text = "\n".join(record.history(tmp_path))
    first, second = text.split("pixels, protocol bb")
    assert "frechet 5 [4, 6]" in first
    assert "frechet 4 [3, 5]" in first
    assert "not to be compared with aa" in second
    assert "count: 100 in the first, 50 here" in second
    assert "name" not in second  # what is the same is not listed


def test_options_of_one_figure_do_not_set_the_others_apart(tmp_path):
    parts = {"features": {"name": "pixels"}, "samples": {"images": 9}, "reference": {"content": "r"}}
    rows = []
    for step, extra in ((1, {}), (2, {"held_out": {"content": "h"}})):
        made = {**row(step, 5.0 + step, f"hash{step}", **parts, metrics={}, **extra), "seed": step}
        rows.append(made)
    rows[1]["figures"] |= {"frechet_ratio": 1.5}
    record.append(tmp_path, rows)
    first, second = "\n".join(record.history(tmp_path)).split("pixels, protocol ")[1:]
    assert "frechet 6 [5, 7]" in first
    assert "ema, seed 2: frechet 7 [6, 8]" in first
    assert "frechet_ratio 1.5" in second
    assert "not to be compared" not in second  # there is no other ratio
    assert set(record.curves(rows[0])) < set(record.curves(rows[1]))


def test_a_run_of_which_nothing_was_measured_says_how_to(tmp_path):
    with pytest.raises(UserError, match=r"is no run directory"):
        record.history(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"tools/sample\.py"):
        record.history(tmp_path)


@pytest.mark.parametrize("ask", [record.history, RunTold.read])
def test_a_folder_above_runs_names_them(tmp_path, ask):
    for name in ("a", "more/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    record.append(tmp_path / "a", [row(1, 5.0)])
    with pytest.raises(UserError, match="give one of those below") as caught:
        ask(tmp_path)
    lines = str(caught.value).splitlines()[1:]
    assert lines == [f"  {tmp_path / 'a'}", f"  {tmp_path / 'more/b'} (nothing was measured of it)"]


def test_each_figure_says_which_images_it_is_of(tmp_path):
    record.append(tmp_path, [{**row(1, 5.0), "samples": {"named": "cfg_scale=2, num_steps=4"}}])
    assert record.history(tmp_path)[-1].endswith("frechet 5 [4, 6]  of cfg_scale=2, num_steps=4")


def test_tensorboard_has_a_curve_for_each_protocol(tmp_path):
    record.draw_curves(tmp_path, [row(1, 5.0), row(2, 4.0), row(2, 9.0, "bb")])
    events = EventAccumulator(str(tmp_path / record.CURVES)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("pixels/frechet (aa)")] == [(1, 5.0), (2, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("pixels/frechet (bb)")] == [(2, 9.0)]


def test_the_run_is_the_folder_above_the_checkpoint(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    assert record.run_of({"checkpoint": str(tmp_path / "run" / "checkpoints" / "step-1")}) == tmp_path / "run"
    assert record.run_of({"checkpoint": str(tmp_path / "gone")}) is None
    assert record.run_of(None) is None
