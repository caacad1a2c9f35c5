"""The whole loop: exact and elastic resume (I1), skipped updates (I4), the first loss (I6), what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit.config import ConfigError, merge
from dit.data import DataError
from dit.data.codecs.codec import Pixels
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.sources.images import open_source
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.faults import TrainingError
from dit.train.meters import SPEEDS
from tests.datasets import Digits, altered, first
from tests.rank_processes import Job, RanksFailed, Server
from tests.train.conftest import Poisoned
from tests.train.runs import (
    BATCH,
    LR,
    STEPS,
    Engine,
    at_step,
    column,
    differing,
    engine_of,
    flip_bit,
    forked,
    go,
    go_until,
    metrics,
    rewrite_tensors,
    state,
    values,
)

Sharded = Callable[[Engine], Path]


def without_speeds(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in SPEEDS} for row in metrics(run_dir)]


def relative(found: list[float], expected: list[float]) -> float:
    return float(np.abs(np.array(found) / np.array(expected) - 1).max())


# --- the same samples and draws on any topology ------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_batch_hash_does_not_depend_on_ranks_micro_batch_or_stage(
    reference: Path, sharded: Sharded, stage: int
) -> None:
    hashes = column(reference, "batch_hash")
    assert len(set(hashes)) == STEPS
    assert all(0 <= h < 2**63 for h in hashes)
    assert column(sharded(stage), "batch_hash") == hashes


def test_neither_do_losses_on_micro_batch_prefetch_or_what_hooks_do(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    """One forward pass of 32 instead of four of 8; the reference also drew pictures and held-out losses."""
    go(
        values(
            digits,
            tmp_path,
            engine="local",
            train={"micro_batch": None},
            data={"prefetch": 1, "path": str(digits.moments)},
        )
    )
    assert column(tmp_path, "batch_hash") == column(reference, "batch_hash")
    assert relative(column(tmp_path, "loss"), column(reference, "loss")) < 1e-6


@pytest.mark.parametrize("engine", [1, 3, "plain"])
def test_auxiliary_terms_are_the_same_on_any_ranks_micro_batches_and_stages(
    digits: Digits, ranks: Server, tmp_path: Path, engine: Engine
) -> None:
    """Of the prediction, of tokens behind blocks, of several samples, with a second pass: each is in the log."""
    terms = [
        "direction", {"name": "layersync", "early": 1, "late": 2, "weight": 0.5},
        {"name": "dispersive", "layer": 1, "group": 4}, "contrastive", "model_guidance",
    ]  # fmt: skip
    names = ["direction", "layersync", "dispersive", "contrastive", "model_guidance"]
    chosen = {"objective": {"auxiliary": terms}}
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    go(values(digits, alone, engine="local", **chosen, train={"steps": 4, "micro_batch": 32}))
    ranks.run(2, go, values(digits, sharded, **engine_of(engine), **chosen, train={"steps": 4}))
    assert column(sharded, "batch_hash") == column(alone, "batch_hash")
    for name in ("loss", "grad_norm", *names):
        np.testing.assert_allclose(column(sharded, name), column(alone, name), rtol=1e-4, atol=1e-6)
    assert column(alone, "direction")[0] == pytest.approx(1.0)  # a new network says 0
    assert all(column(alone, name)[-1] != 0 for name in names)
    plain = tmp_path / "plain"
    go(values(digits, plain, engine="local", train={"steps": 1, "micro_batch": 32}))
    added = sum(column(alone, name)[0] for name in names)
    assert column(alone, "loss")[0] == pytest.approx(column(plain, "loss")[0] + added)


def test_the_seed_changes_everything(digits: Digits, reference: Path, tmp_path: Path) -> None:
    go(values(digits, tmp_path, engine="local", seed=1, train={"steps": 2}))
    both = zip(column(tmp_path, "batch_hash"), column(reference, "batch_hash"), strict=False)
    assert all(a != b for a, b in both)


def test_elastic_1_2_1_ranks_at_stages_1_3_0(
    digits: Digits, ranks: Server, reference: Path, tmp_path: Path
) -> None:
    often = {"every": 5, "keep": 0}
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    ranks.run(1, go, values(digits, first, zero={"stage": 1}, checkpoint=often, train={"micro_batch": 16}))
    forked(first, 5, second)
    ranks.run(2, go, values(digits, second, zero={"stage": 3}, checkpoint=often))
    forked(second, 15, third)
    ranks.run(1, go, values(digits, third, zero={"stage": 0}, checkpoint=often))
    for run in (first, second, third):
        assert column(run, "step") == list(range(1, STEPS + 1))
        assert column(run, "batch_hash") == column(reference, "batch_hash")
        assert column(run, "lr") == column(reference, "lr")
        assert relative(column(run, "loss"), column(reference, "loss")) < 1e-5
        assert relative(column(run, "grad_norm"), column(reference, "grad_norm")) < 1e-5
    expected, found = state(at_step(reference, STEPS)), state(at_step(third, STEPS))
    for name, tensor in expected.items():
        if not name.startswith("buffer/"):
            assert float((found[name] - tensor).abs().max()) < 1e-2 * LR, name
    assert [json.loads(line)["ranks"] for line in (third / "history.jsonl").read_text().splitlines()] == [
        1,
        2,
        1,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("chain", [[(2, 3), (4, 1), (2, 2)], [(2, "plain"), (4, 3), (4, "plain")]], ids=str)
def test_elastic_from_one_rank_to_others_and_other_engines(
    digits: Digits, ranks: Server, tmp_path: Path, chain: list[tuple[int, Engine]], precision: str
) -> None:
    sections: dict[str, Any] = {"checkpoint": {"every": 5, "keep": 0}}
    train = {"precision": precision}
    whole = tmp_path / "whole"
    ranks.run(1, go, values(digits, whole, engine="local", train=train, **sections))
    before, step = whole, 5
    for size, engine in chain:
        run = forked(before, step, tmp_path / f"at{step}")
        ranks.run(size, go, values(digits, run, **engine_of(engine), train=train, **sections))
        assert column(run, "batch_hash") == column(whole, "batch_hash")
        tolerance = 1e-5 if precision == "fp32" else 1e-3
        assert relative(column(run, "loss"), column(whole, "loss")) < tolerance
        before, step = run, step + 5


# --- killed ------------------------------------------------------------------------------------------------


def killed_at(job: Job, run_dir: Path, step: int) -> int:
    """SIGKILL all ranks once `step` has been logged; the last step that was."""
    log = run_dir / "metrics.jsonl"
    with job:
        end = time.monotonic() + 100
        while not log.is_file() or log.read_text().count("\n") < step:
            assert time.monotonic() < end, job.output()
            assert all(p.is_alive() for p in job.processes), job.output()
            time.sleep(0.003)
    return log.read_text().count("\n")


@pytest.mark.parametrize("engine", [2, "plain"])
def test_killed_and_started_again_it_is_the_same_run_bit_for_bit(
    digits: Digits, ranks: Server, sharded: Sharded, hooked: dict, tmp_path: Path, engine: Engine
) -> None:
    """SIGKILL on two ranks, before the first checkpoint and after the second; the uninterrupted run is the
    one of the stage tests."""
    given = values(digits, tmp_path, **engine_of(engine), checkpoint={"every": 4, "keep": 2}, **hooked)
    for step in (2, 10):
        job = ranks.start(2, go_until, given, STEPS - 1, tmp_path / "never")
        assert killed_at(job, tmp_path, step) < STEPS
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 99, "lo')  # and in the middle of a line
    ranks.run(2, go, given)
    assert without_speeds(tmp_path) == without_speeds(sharded(engine))
    assert differing(state(at_step(tmp_path, STEPS)), state(at_step(sharded(engine), STEPS))) == []
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3


def test_a_curve_of_a_resumed_run_has_each_step_once(digits: Digits, reference: Path, tmp_path: Path) -> None:
    run = forked(reference, 10, tmp_path / "run")
    go(values(digits, run, engine="local"))
    assert curve(run, "train/loss") == curve(reference, "train/loss")
    assert [step for step, _ in curve(run, "train/loss")] == list(range(1, STEPS + 1))


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    """A TensorBoard curve as its reader shows it, by all files in the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_a_checkpoint_between_two_logged_steps_keeps_their_sums(digits: Digits, tmp_path: Path) -> None:
    """Logged every 4, saved every 6: the line of step 8 covers steps on both sides of the checkpoint."""
    sections = {
        "engine": "local",
        "train": {"log_every": 4, "steps": 12},
        "checkpoint": {"every": 6, "keep": 0},
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    go(values(digits, whole, **sections))
    forked(whole, 6, run)
    go(values(digits, run, **sections))
    assert column(run, "step") == [4, 8, 12]
    assert without_speeds(run) == without_speeds(whole)
    assert differing(state(at_step(run, 12)), state(at_step(whole, 12))) == []


def test_the_sums_of_an_interval_do_not_show_how_its_batches_were_cut(digits: Digits, tmp_path: Path) -> None:
    """As above, the second half of an interval with another micro-batch: a sample counts the same in both."""
    sections = {"engine": "local", "checkpoint": {"every": 6, "keep": 0}}
    whole, run = tmp_path / "whole", tmp_path / "run"
    go(values(digits, whole, **sections, train={"log_every": 4, "steps": 12}))
    forked(whole, 6, run)
    go(values(digits, run, **sections, train={"log_every": 4, "steps": 12, "micro_batch": 32}))
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-5)
    assert column(run, "batch_hash") == column(whole, "batch_hash")


def test_data_without_labels_train_save_and_go_on(digits: Digits, tmp_path: Path) -> None:
    source = first(open_source("digits:train"), 40)
    unlabelled = replace(source, classes=(), labels=np.full(40, -1))
    encode(unlabelled, Pixels().build(), tmp_path / "data", EncodeOptions(image_size=8, workers=1))
    given = values(digits, tmp_path / "run", data={"path": str(tmp_path / "data")}, engine="local")
    given |= {"codec": {"name": "pixels"}, "checkpoint": {"every": 2, "keep": 1}}
    go(merge(given, {"train": {"steps": 2, "global_batch": 16}}))
    go(merge(given, {"train": {"steps": 4, "global_batch": 16}}))
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]


def test_a_checkpoint_of_another_config_is_refused_also_where_config_yaml_is_gone(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    run = forked(reference, STEPS, tmp_path / "run")
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"seed: 0 there, 5 now"):
        go(values(digits, run, seed=5, engine="local"))


def test_the_hash_of_an_interval_is_the_sum_of_its_steps_hashes(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    go(values(digits, tmp_path, engine="local", train={"log_every": 5}))
    single = column(reference, "batch_hash")
    sums = [sum(single[i : i + 5]) % 2**63 for i in range(0, STEPS, 5)]
    assert column(tmp_path, "batch_hash") == sums
    means = [np.mean(column(reference, "loss")[i : i + 5]) for i in range(0, STEPS, 5)]
    assert column(tmp_path, "loss") == pytest.approx(means, rel=1e-6)


def test_a_broken_checkpoint_is_passed_over_and_the_run_comes_out_the_same(
    digits: Digits, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = forked(reference, 20, tmp_path / "run")
    flip_bit(at_step(run, 20) / "rank-00000.safetensors")
    go(values(digits, run, engine="local"))
    said = capsys.readouterr().out
    assert "passing over a broken checkpoint" in said
    assert "step-00000020/rank-00000.safetensors: its content does not match its checksum" in said
    assert f"resuming {run} at step 10" in said
    assert differing(state(at_step(run, 20)), state(at_step(reference, 20))) == []
    assert without_speeds(run) == without_speeds(reference)


def test_a_run_that_is_done_stays_as_it_is_and_goes_on_when_there_is_more_to_do(
    digits: Digits, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = forked(reference, 20, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    go(values(digits, run, engine="local"))
    assert "has done its 20 steps; raise train.steps to go on" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before
    go(values(digits, run, engine="local", train={"steps": 22}))
    assert column(run, "step") == list(range(1, 23))
    assert column(run, "batch_hash")[:20] == column(reference, "batch_hash")


def test_a_run_that_has_more_than_it_is_asked_for_says_how_much(
    digits: Digits, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = forked(reference, 20, tmp_path / "run")
    go(values(digits, run, engine="local", train={"steps": 5}))
    said = capsys.readouterr().out
    assert "is at step 20, and train.steps = 5 asks for fewer: there is nothing to do" in said
    assert "has done its" not in said
    assert "learning rate" not in said


@pytest.mark.parametrize(("steps", "end"), [(40, 20), (30, 10), (15, 10)])
def test_a_learning_rate_that_leaps_with_train_steps_is_said(
    digits: Digits, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, end: int
) -> None:
    """Half a cosine over 16 updates after 4 of warm-up; at its end the rate is nearly 0, and rises again."""
    run = forked(reference, end, tmp_path / "run")
    before = column(reference, "lr")[end - 1]
    now = LR * (1 + math.cos(math.pi * (end - 4) / (steps - 4))) / 2
    go(values(digits, run, engine="local", train={"steps": steps}))
    said = capsys.readouterr().out
    assert (
        f"the learning rate goes from {before:.3g} to {now:.3g}, because train.steps went from 20 to {steps}"
        in said
    )
    assert "optim.schedule=constant" in said
    assert column(run, "lr")[end] == pytest.approx(now)


def test_a_constant_rate_does_not_leap_nor_an_unchanged_one(
    digits: Digits, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(values(digits, forked(reference, 10, tmp_path / "same"), engine="local"))
    constant = {"optim": {"schedule": "constant"}, "engine": "local"}
    go(values(digits, tmp_path / "run", **constant, train={"steps": 6}))
    go(values(digits, tmp_path / "run", **constant, train={"steps": 8}))
    assert "learning rate" not in capsys.readouterr().out


# --- what a resume refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "ema"])
def test_weights_that_compute_something_else_are_refused(
    digits: Digits, reference: Path, tmp_path: Path, kind: str
) -> None:
    """One bias of the output moved by 1%: validly signed, as if the code or a library had changed."""
    run = forked(reference, 10, tmp_path / "run")

    def move(tensors: dict) -> None:
        tensors[f"{kind}/output.proj.bias"] = tensors[f"{kind}/output.proj.bias"] + 0.01

    rewrite_tensors(at_step(run, 10), move)
    with pytest.raises(CheckpointError, match=rf"the probe loss of the {kind} weights was .* after loading"):
        go(values(digits, run, engine="local"))


def test_a_checkpoint_without_its_average_is_refused(digits: Digits, reference: Path, tmp_path: Path) -> None:
    run = forked(reference, 10, tmp_path / "run")

    def drop(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith("ema/")]:
            del tensors[name]

    rewrite_tensors(at_step(run, 10), drop)
    with pytest.raises(CheckpointError, match="lacks ema/"):
        go(values(digits, run, engine="local"))


def test_other_data_are_refused_with_both_sides_named_and_a_moved_folder_is_not(
    digits: Digits, reference: Path, tmp_path: Path
) -> None:
    run = forked(reference, 10, tmp_path / "run")
    moved = shutil.copytree(digits.moments, tmp_path / "moved")
    other = altered(digits.moments, tmp_path / "other", lambda samples, ids: samples.__imul__(1.01))
    with pytest.raises(CheckpointError, match=r"other data.*\n  data.digest: '\w+' there, '\w+' here"):
        go(values(digits, run, engine="local", data={"path": str(other)}))
    go(values(digits, run, engine="local", data={"path": str(moved)}))
    assert column(run, "batch_hash") == column(reference, "batch_hash")


def test_a_missing_data_set_is_named_before_the_run_directory_is_made(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no manifest.json"):
        go(values(digits, tmp_path / "run", engine="local", data={"path": str(tmp_path / "nowhere")}))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_ranks_cannot_share_is_refused(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, go, values(digits, tmp_path / "run", train={"global_batch": 15, "micro_batch": None}))
    for kind, text in failed.value.errors.values():
        assert kind == "ConfigError"
        assert "train.global_batch = 15 cannot be shared by 2 ranks" in text
    assert len(failed.value.errors) == 2
    assert not (tmp_path / "run").exists()


# --- losses that are not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_it_stops_after_max_skipped_with_the_ids_on_disk(digits: Digits, tmp_path: Path, bad: float) -> None:
    """Every sample is bad from the start: no update is ever applied."""

    def spoil(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[:, :, 0, 0, 0, 0] = bad

    folder = altered(digits.moments, tmp_path / "data", spoil)
    given = values(
        digits, tmp_path / "run", engine="local", data={"path": str(folder)}, train={"max_skipped": 3}
    )
    with pytest.raises(
        TrainingError, match=r"3 updates in a row were skipped.*nonfinite.*train.max_skipped = 3"
    ):
        go(given)
    rows = metrics(tmp_path / "run")
    assert [(r["step"], r["updates"], r["skipped"]) for r in rows] == [(1, 0, 1), (2, 0, 2)]
    assert all(r["loss"] is None and r["grad_norm"] is None for r in rows)
    assert not (tmp_path / "run" / "checkpoints").exists()
    dumped = json.loads((tmp_path / "run" / "nonfinite" / "step-00000003-rank-00000.json").read_text())
    assert dumped["step"] == 3
    assert dumped["ids_with_bad_loss"] == dumped["ids_in_batch"]
    assert len(dumped["ids_in_batch"]) == BATCH


def test_starting_again_does_not_start_the_count_of_skips_again(digits: Digits, tmp_path: Path) -> None:
    def spoil(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[:] = np.nan

    folder = altered(digits.moments, tmp_path / "data", spoil)
    run = values(
        digits, tmp_path / "run", engine="local", data={"path": str(folder)}, checkpoint={"every": 1}
    )
    go(merge(run, {"train": {"steps": 2, "max_skipped": 3}}))
    with pytest.raises(TrainingError, match=r"3 updates in a row were skipped .* the last at step 3\."):
        go(merge(run, {"train": {"steps": 9, "max_skipped": 3}}))


def test_one_bad_sample_skips_one_update_on_all_ranks_and_is_named(
    digits: Digits, ranks: Server, poisoned: Poisoned, tmp_path: Path
) -> None:
    """Its id is dumped by the rank that had it; the schedule stands still for a step; the run goes on."""
    steps = 5  # an epoch
    given = values(
        digits, tmp_path, data={"path": str(poisoned.folder)}, train={"steps": steps, "max_skipped": 2}
    )
    ranks.run(2, go, given)
    dumps = [json.loads(p.read_text()) for p in sorted((tmp_path / "nonfinite").iterdir())]
    assert [(d["step"], d["rank"], d["ids_with_bad_loss"]) for d in dumps] == [
        (poisoned.step + 1, 0, []),
        (poisoned.step + 1, 1, [poisoned.id]),
    ]
    assert poisoned.id in dumps[1]["ids_in_batch"]
    assert poisoned.id not in dumps[0]["ids_in_batch"]
    rows = metrics(tmp_path)
    assert [r["skipped"] for r in rows] == [0, 0, 1, 1, 1]
    assert [r["updates"] for r in rows] == [1, 2, 2, 3, 4]
    assert [r["lr"] for r in rows] == pytest.approx([LR * f for f in (1 / 4, 2 / 4, 2 / 4, 3 / 4, 1)])
    assert [r["loss"] is None for r in rows] == [False, False, True, False, False]
    assert [r["grad_norm"] is None for r in rows] == [False, False, True, False, False]
    go(merge(given, {"engine": "local", "train": {"steps": steps + 1}}))  # the count goes on after a resume
    last = metrics(tmp_path)[-1]
    assert last["skipped"] == 1 + (last["loss"] is None)
    assert last["updates"] == 6 - last["skipped"]


# --- the first loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_statistics_that_do_not_fit_the_latents_are_caught_in_step_0(
    digits: Digits, tmp_path: Path, factor: float
) -> None:
    def scale(samples: np.ndarray, ids: np.ndarray) -> None:
        samples *= factor

    folder = altered(digits.moments, tmp_path / "data", scale)
    given = values(digits, tmp_path / "run", engine="local", data={"path": str(folder)}, train={"steps": 1})
    with pytest.raises(
        TrainingError, match=r"the first losses are [\d.]+ times .* [+-][\d.]+ standard errors"
    ):
        go(given)
    assert not (tmp_path / "run" / "checkpoints").exists()
    go(given | {"run_dir": str(tmp_path / "codec"), "latents": {"norm": "codec"}})  # makes no such promise
    assert column(tmp_path / "codec", "step") == [1]


def test_a_rank_that_sees_a_wrong_first_loss_stops_all(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    def scale(samples: np.ndarray, ids: np.ndarray) -> None:
        samples *= 1.5

    folder = altered(digits.moments, tmp_path / "data", scale)
    with pytest.raises(RanksFailed) as failed:
        ranks.run(2, go, values(digits, tmp_path / "run", data={"path": str(folder)}))
    assert [kind for kind, _ in failed.value.errors.values()] == ["TrainingError"] * 2


@pytest.mark.parametrize(
    "objective",
    [
        {"path": "linear", "prediction": "velocity"},
        {"path": "linear", "prediction": "velocity", "coupling": {"name": "ot", "group": 16}},
        {"path": "vp", "prediction": "eps"},
        {"path": "ddpm", "prediction": "v"},
        {"path": "linear", "prediction": "data"},
    ],
)
def test_right_statistics_pass_with_every_objective(digits: Digits, tmp_path: Path, objective: dict) -> None:
    given = values(digits, tmp_path, engine="local", train={"steps": 1, "micro_batch": 16})
    go(given | {"objective": objective})
    assert column(tmp_path, "step") == [1]
