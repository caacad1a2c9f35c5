"""Signals of a scheduler to one rank of the tools that measure: all end with status 75, and the work goes on later."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tools.evaluate
import tools.likelihood
from dit.ranks.asked import EndAsked
from dit.ranks.world import World
from tests.commands import call
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import random_run

PIXELS = ("--features=pixels", "--features.components=3", "--batch_size=4")
SWEEP = ("--cfg_scale=1,2", "--num_steps=2", "--solver=euler", "--num_samples=24", "--num_reference=40")


@pytest.fixture(scope="module")
def run(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_run(digits, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(file, np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8))
    return file


def signalled(number: int, looks: int, main: Callable[..., None], *words: object) -> int:
    """A tool on this rank; the second one gets a signal when it looks for one for the so many-th time."""
    look, counted = EndAsked.look, itertools.count(1)

    def counting(self: EndAsked) -> None:
        if World.from_env().rank == 1 and next(counted) == looks:
            os.kill(os.getpid(), number)
        look(self)

    EndAsked.look = counting  # type: ignore[method-assign]
    return call(main, *words)


def stop(ranks: Server, number: int, looks: int, main: Callable[..., None], *words: object) -> str:
    """Start it on two ranks, and see both end by the signal to one of them; what the first one said."""
    with ranks.start(2, signalled, number, looks, main, *words) as job:
        assert job.wait() == [75, 75]
        said = job.output()
        assert "error" not in said + job.output(1)
        assert said.count("stopped: ") == 1
        assert "stopped: " not in job.output(1)
        return said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_pass_over_images_stops_between_two_blocks(
    real: Path, ranks: Server, tmp_path: Path, number: int
) -> None:
    words = (real, f"--reference={real}", *PIXELS, f"--json_file={tmp_path / 'f.json'}")
    said = stop(ranks, number, 7, tools.evaluate.images, *words)  # of 5 blocks of the reference, and 5
    assert "nothing is kept; the same command starts anew" in said
    assert [*tmp_path.iterdir()] == []
    assert call(tools.evaluate.images, *words) == 0


def test_statistics_are_not_written_in_part(real: Path, ranks: Server, tmp_path: Path) -> None:
    words = (real, tmp_path / "new" / "statistics.npz", *PIXELS)
    assert "nothing is kept" in stop(ranks, signal.SIGUSR1, 3, tools.evaluate.reference, *words)
    assert [*tmp_path.iterdir()] == []
    assert call(tools.evaluate.reference, *words) == 0


def test_a_sweep_keeps_cells_and_the_blocks_of_one_that_is_not_finished(
    run: Path, real: Path, ranks: Server, tmp_path: Path, capsys
) -> None:
    """24 images in blocks of 4: 3 of them on each rank, of two evaluations, and 5 blocks of the reference before.

    The other rank finishes its block of the round in which one stops.
    """
    words = (f"net={run}", f"--reference={real}", *PIXELS, *SWEEP)
    out = tmp_path / "out"
    said = stop(ranks, signal.SIGUSR1, 5, tools.evaluate.sweep, *words, f"--out={out}")
    assert "no cell is begun" in said
    said = stop(ranks, signal.SIGUSR1, 5 + 6 + 2 + 2, tools.evaluate.sweep, *words, f"--out={out}")
    assert "1 of 2 cells are finished: all that was drawn is kept; the same command goes on" in said
    (finished,) = (out / "cells").glob("*.json")
    (begun,) = (out / "cells").glob("*.partial")
    kept = {file.name: file.read_bytes() for file in begun.glob("block-*")}
    assert [*sorted(kept)] == [f"block-{number:08d}.npz" for number in range(3)]
    when = finished.stat().st_mtime_ns
    assert call(tools.evaluate.sweep, *words, f"--out={out}") == 0
    assert finished.stat().st_mtime_ns == when
    assert not begun.exists()
    assert call(tools.evaluate.sweep, *words, f"--out={tmp_path / 'whole'}") == 0
    assert (out / "sweep.csv").read_text() == (tmp_path / "whole" / "sweep.csv").read_text()


def test_a_likelihood_keeps_batches(run: Path, digits: Digits, ranks: Server, tmp_path: Path, capsys) -> None:
    """In the middle of one; the nats are those of an unbroken one."""
    words = (run, digits.moments_val, "--count=12", "--num_steps=2", "--batch_size=2")
    out, whole = tmp_path / "out.json", tmp_path / "whole.json"
    assert call(tools.likelihood.main, *words, f"--out={whole}") == 0
    said = stop(ranks, signal.SIGTERM, 12, tools.likelihood.main, *words, f"--out={out}")
    assert not out.exists()
    done = 2 * len([*(tmp_path / "out.json.partial").glob("block-*")])
    assert 0 < done < 12
    assert f"{done} of 12 samples are measured and kept; the same command goes on" in said
    capsys.readouterr()
    assert call(tools.likelihood.main, *words, f"--out={out}") == 0
    assert f"{done} of 12 samples are measured already" in capsys.readouterr().out
    assert nats(out) == nats(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "whole.json"]


def nats(file: Path) -> Any:
    return json.loads(file.read_text())["nats_of_samples"]
