"""The cluster of these tests, which are skipped with a word where there can be none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    missing = why_not()
    if missing is not None:
        pytest.skip(f"no SLURM cluster can be started here: {missing}")
    with Cluster(2) as up:
        yield up


@pytest.fixture(autouse=True)
def _rested(cluster: Cluster) -> None:
    cluster.wait_idle()
