"""Runs that many tests look at: the same 20 steps by plain torch, and by two ranks at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from tests.datasets import Digits, altered
from tests.rank_processes import Server
from tests.train.runs import BATCH, Engine, Values, engine_of, go, values


@pytest.fixture(scope="session")
def hooked(digits: Digits) -> Values:
    """Sections that add the held-out loss and sample grids to a run."""
    return {
        "data": {"val": str(digits.moments_val)},
        "val": {"every": 10, "batches": 2},
        "sample": {"every": 10, "count": 10, "num_steps": 2, "cfg_scale": 2.0},
    }


@pytest.fixture(scope="session")
def reference(
    digits: Digits, ranks: Server, hooked: Values, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """One process, plain torch, 4 micro-batches a step."""
    run_dir = tmp_path_factory.mktemp("reference")
    ranks.run(1, go, values(digits, run_dir, engine="local", **hooked))
    return run_dir


@pytest.fixture(scope="session")
def sharded(
    digits: Digits, ranks: Server, hooked: Values, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Engine], Path]:
    """engine -> the run of two ranks on it (a number is a ZeRO stage), 2 micro-batches a step."""

    @cache
    def run(engine: Engine) -> Path:
        run_dir = tmp_path_factory.mktemp(f"stage{engine}")
        ranks.run(2, go, values(digits, run_dir, **engine_of(engine), **hooked))
        return run_dir

    return run


@dataclass(frozen=True)
class Poisoned:
    """A data set with NaN in one sample: its id, and the step and slot of the first epoch where it stands."""

    folder: Path
    id: int
    step: int = 2
    slot: int = 20  # of 32 slots the upper half is the second rank's


@pytest.fixture(scope="session")
def poisoned(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    stream = Stream(Manifest.load(digits.moments), 0, BATCH, lanes=8)
    bad = int(stream.batch(Poisoned.step).id[Poisoned.slot])
    stream.close()

    def poison(samples: np.ndarray, ids: np.ndarray) -> None:
        samples[ids == bad, :, 0, 1, 2, 3] = np.nan

    return Poisoned(altered(digits.moments, tmp_path_factory.mktemp("poison") / "data", poison), bad)
