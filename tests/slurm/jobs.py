"""Jobs of launch/multinode.sh on the cluster of these tests."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
AGAIN = "was stopped by a signal and has saved: it queues again"


@dataclass
class Job:
    """A job, or an element of an array, and the file of what it says."""

    cluster: Cluster
    number: str
    output: Path

    def said(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""

    def ends(self, state: str, **how: Any) -> None:
        """Wait until the job has ended like this."""
        try:
            self.cluster.wait(self.number, state, **how)
        except AssertionError as error:
            raise AssertionError(f"{self.said()}\n{error}") from None


def submit(cluster: Cluster, output: Path, options: Sequence[str], *words: object, **env: str) -> str:
    """Queue launch/multinode.sh with these words, one rank on each of two nodes unless options say otherwise."""
    shape = ("--nodes=2", "--ntasks-per-node=1", "--time=10", f"--output={output}", *options)
    return cluster.submit(*shape, ROOT / "launch/multinode.sh", *words, cwd=ROOT, **ENVIRONMENT | env)
