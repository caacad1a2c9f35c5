"""Training under a real SLURM: what a cluster does to a job does not show in the run."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.datasets import Digits
from tests.ranks import Server
from tests.slurm.cluster import Cluster, until
from tests.train.runs import Values, column, go, values

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 300  # ten seconds and more: SLURM looks for jobs to preempt every two


def settings(digits: Digits, run_dir: Path, every: int) -> Values:
    train = {"steps": STEPS, "micro_batch": None}
    return values(digits, run_dir, train=train, checkpoint={"every": every, "keep": 2}, zero={"stage": 2})


@pytest.fixture(scope="session")
def quiet(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("quiet")
    ranks.run(2, go, settings(digits, run_dir, STEPS))
    return run_dir


class Submitted:
    """A job of launch/multinode.sh, one rank on each of two nodes."""

    def __init__(self, cluster: Cluster, digits: Digits, folder: Path, *options: str, every: int, **env: str):
        self.cluster, self.run_dir = cluster, folder / "run"
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(settings(digits, self.run_dir, every)))
        shape = ("--nodes=2", "--ntasks-per-node=1", "--time=10", f"--output={folder}/out.txt", *options)
        self.output = folder / "out.txt"
        self.number = cluster.submit(
            *shape,
            ROOT / "launch/multinode.sh",
            config,
            cwd=ROOT,
            PYTHON=sys.executable,
            OMP_NUM_THREADS="1",
            **env,
        )

    def said(self) -> str:
        return self.output.read_text() if self.output.is_file() else ""

    def reaches(self, step: int) -> None:
        """Wait until so many steps are done."""
        log = self.run_dir / "metrics.jsonl"

        def there() -> bool:
            ended = self.cluster.job(self.number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")
            assert not ended, self.said()
            return log.is_file() and log.read_text().count("\n") >= step

        until(there, 120, self.said)

    def ends(self, state: str, **how: Any) -> None:
        """Wait until the job has ended like this."""
        try:
            self.cluster.wait(self.number, state, **how)
        except AssertionError as error:
            raise AssertionError(f"{self.said()}\n{error}") from None


def same_curve(run_dir: Path, quiet: Path) -> bool:
    """Every step once, with the same samples, and on as many ranks the same losses to the last digit."""
    return all(column(run_dir, name) == column(quiet, name) for name in ("step", "batch_hash", "loss"))


@pytest.fixture(autouse=True)
def _rested(cluster: Cluster) -> None:
    cluster.wait_idle()


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_ranks_saves_and_queues_again(
    cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    job = Submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    cluster.signal(job.number, sent)
    job.ends("COMPLETED", restarts=1)
    assert "is saved, and the same command goes on" in job.said()
    assert "it queues again" in job.said()
    assert job.said().count("resuming") == 1
    assert same_curve(job.run_dir, quiet)


def test_a_node_that_crashes(cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path) -> None:
    job = Submitted(cluster, digits, tmp_path, every=5)
    job.reaches(12)
    cluster.crash("n2")
    cluster.boot("n2")
    job.ends("COMPLETED", restarts=1)
    assert "resuming" in job.said()
    assert same_curve(job.run_dir, quiet)


def test_a_job_that_is_preempted(cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path) -> None:
    job = Submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    cluster.wait(other, "COMPLETED")
    job.ends("COMPLETED", restarts=1)
    assert "is saved, and the same command goes on" in job.said()
    assert same_curve(job.run_dir, quiet)


def test_a_job_that_is_cancelled_has_saved_and_stays_so(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    job = Submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    cluster.call("scancel", job.number)
    job.ends("CANCELLED")
    until(lambda: "is saved, and the same command goes on" in job.said(), 30, job.said)
    (saved,) = (job.run_dir / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) >= 5


def test_without_queueing_again_the_status_says_so(cluster: Cluster, digits: Digits, tmp_path: Path) -> None:
    job = Submitted(cluster, digits, tmp_path, every=STEPS, REQUEUE="0")
    job.reaches(5)
    cluster.signal(job.number, signal.SIGUSR1)
    job.ends("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "75:0"
