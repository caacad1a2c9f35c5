"""Moments of kills: drawn once and for all, spread as stated, and such that they fit into the run."""

import os
from collections import Counter

import numpy as np
import pytest

from dit.bench.survival.moments import SAVING, STARTING, ObservedStart, aims, window


def test_kills_are_spread_as_stated():
    kills = 2000
    found = aims(kills, 4, seed=0)
    assert Counter(aim.during for aim in found) == {
        "start": kills * STARTING,
        "saving": kills * SAVING,
        "steps": kills - kills * STARTING - kills * SAVING,
    }
    alone = [aim.ranks for aim in found if len(aim.ranks) == 1]
    assert len(alone) == kills / 2
    assert {rank for (rank,) in alone} == {0, 1, 2, 3}
    assert {aim.ranks for aim in found if len(aim.ranks) > 1} == {(0, 1, 2, 3)}
    assert {aim.during for aim in found[:20]} == {"start", "saving", "steps"}  # in any order
    for during in ("start", "saving", "steps"):
        moments = [aim.moment for aim in found if aim.during == during]
        quarters, _ = np.histogram(moments, bins=4, range=(0, 1))
        assert quarters.sum() == len(moments)
        assert quarters.min() > len(moments) / 5


def test_kills_depend_on_the_seed_alone():
    assert aims(50, 2, seed=3) == aims(50, 2, seed=3)
    assert aims(50, 2, seed=3) != aims(50, 2, seed=4)


@pytest.mark.parametrize("quicker", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("kills", "steps"), [(100, 300), (4, 40), (20, 1000), (1, 20), (60, 40)])
def test_all_kills_fit_into_the_run(kills, steps, quicker):
    """Also where steps are quicker or slower than they were when they were measured; most of the run is used."""
    every = 5
    for seed in range(20):
        step = 0
        for number, aim in enumerate(aims(kills, 2, seed)):
            if aim.during == "start":
                continue
            after = aim.moment * window(steps - step, kills - number, every) * quicker
            reached = step + 1 + int(after) if aim.during == "steps" else step + every
            assert reached <= steps, (seed, number)
            step = min(reached, steps - 2) // every * every
        assert step <= steps - every
        if kills >= 20 and quicker >= 1:
            assert step >= 0.5 * steps, (seed, step)


@pytest.fixture
def run(tmp_path):
    """A run that was killed at step 7 while it saved step 5 for the second time."""
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000010.partial").mkdir()
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(1, 11)))
    return tmp_path


def resumes(run, *steps):
    """metrics.jsonl as a start puts it in the old one's place."""
    (run / "new").write_text("".join(f'{{"step": {s}}}\n' for s in steps))
    (run / "new").replace(run / "metrics.jsonl")


def test_what_was_there_before_is_no_progress(run):
    start = ObservedStart(None, run, 5, 100)
    assert (start.logged(), start.phase()) == (5, "start")
    resumes(run, *range(1, 6))
    assert (start.logged(), start.phase()) == (5, "start")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6}\n{"step"')
        file.flush()
        assert (start.logged(), start.phase()) == (6, "steps")


def test_saving_and_removing_are_told_apart(run):
    start, folder = ObservedStart(None, run, 5, 100), run / "checkpoints"
    resumes(run, *range(1, 11))
    assert start.phase() == "steps"
    os.rmdir(folder / "step-00000010.partial")
    (folder / "step-00000010.partial").mkdir()
    assert start.phase() == "saving"
    (folder / "step-00000010.partial").rename(folder / "step-00000010")
    assert start.phase() == "steps"
    (folder / "step-00000005").rename(folder / "step-00000005.partial")
    assert start.phase() == "removing"
