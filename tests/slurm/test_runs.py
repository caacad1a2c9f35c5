"""Training under a real SLURM: what a cluster does to a job does not show in the run."""

from __future__ import annotations

import datetime as dt
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.datasets import Digits
from tests.rank_processes import Server
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import AGAIN, ENVIRONMENT, ROOT, Job, submit
from tests.train.runs import Values, column, go, values

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SAVED = "is saved, and the same command goes on"
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


@dataclass
class Training(Job):
    """A job, or an element of an array, that trains in run_dir."""

    run_dir: Path

    def reaches(self, step: int) -> None:
        """Wait until so many steps are done."""
        log = self.run_dir / "metrics.jsonl"

        def there() -> bool:
            ended = self.cluster.job(self.number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")
            assert not ended, self.said()
            return log.is_file() and log.read_text().count("\n") >= step

        until(there, 120, self.said)


class Submitted(Training):
    """A job of launch/multinode.sh, one rank on each of two nodes."""

    def __init__(self, cluster: Cluster, given: Values, folder: Path, *options: str, **env: str):
        """given: the config, which is in folder / "config.yaml"; env: besides that of every job."""
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(given))
        number = submit(cluster, folder / "out.txt", options, config, **env)
        super().__init__(cluster, number, folder / "out.txt", Path(given["run_dir"]))


def submitted(
    cluster: Cluster, digits: Digits, folder: Path, *options: str, every: int, **env: str
) -> Submitted:
    """A job that is to have the curve of `quiet`, with a checkpoint every so many steps."""
    return Submitted(cluster, settings(digits, folder / "run", every), folder, *options, **env)


def same_curve(run_dir: Path, quiet: Path) -> bool:
    """Every step once, with the same samples, and on as many ranks the same losses to the last digit."""
    return all(column(run_dir, name) == column(quiet, name) for name in ("step", "batch_hash", "loss"))


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_ranks_saves_and_queues_again(
    cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    job = submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    cluster.signal(job.number, sent)
    job.ends("COMPLETED", restarts=1)
    assert SAVED in job.said()
    assert AGAIN in job.said()
    assert job.said().count("resuming") == 1
    assert same_curve(job.run_dir, quiet)


def test_a_node_that_crashes(cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path) -> None:
    job = submitted(cluster, digits, tmp_path, every=5)
    job.reaches(12)
    cluster.crash("n2")
    cluster.boot("n2")
    cluster.hold_until_forgotten(job.number)
    job.ends("COMPLETED", restarts=1)
    assert "resuming" in job.said()
    assert same_curve(job.run_dir, quiet)


def test_a_job_that_is_preempted(cluster: Cluster, digits: Digits, quiet: Path, tmp_path: Path) -> None:
    job = submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    cluster.wait(other, "COMPLETED")
    job.ends("COMPLETED", restarts=1)
    assert SAVED in job.said()
    assert same_curve(job.run_dir, quiet)


def test_a_job_that_is_cancelled_has_saved_and_stays_so(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    job = submitted(cluster, digits, tmp_path, every=STEPS)
    job.reaches(5)
    cluster.call("scancel", job.number)
    job.ends("CANCELLED")
    until(lambda: SAVED in job.said(), 30, job.said)
    (saved,) = (job.run_dir / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) >= 5


def test_without_queueing_again_the_status_says_so(cluster: Cluster, digits: Digits, tmp_path: Path) -> None:
    job = submitted(cluster, digits, tmp_path, every=STEPS, REQUEUE="0")
    job.reaches(5)
    cluster.signal(job.number, signal.SIGUSR1)
    job.ends("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "75:0"


def test_two_nodes_of_two_ranks(cluster: Cluster, digits: Digits, ranks: Server, tmp_path: Path) -> None:
    given = settings(digits, tmp_path / "run", 20) | {
        "train": {"steps": 20, "global_batch": 32, "log_every": 1}
    }
    job = Submitted(cluster, given, tmp_path, "--ntasks-per-node=2")
    job.ends("COMPLETED")
    ranks.run(4, go, given | {"run_dir": str(tmp_path / "quiet")})
    assert same_curve(job.run_dir, tmp_path / "quiet")


# --- one run, and all that a cluster does to it --------------------------------------------------------------


class Endless(Submitted):
    """A run without an end, until it is given one; it counts how often it started again."""

    restarts = 0

    def trains(self) -> None:
        """Wait until it is at it, this time."""
        until(lambda: self.said().count("resuming") >= self.restarts, 180, self.said)
        log = self.run_dir / "metrics.jsonl"
        self.reaches(log.read_text().count("\n") + 10 if log.is_file() else 10)

    def starts_again(self) -> None:
        self.restarts += 1
        self.cluster.wait(self.number, "RUNNING", "PENDING", restarts=self.restarts)
        assert int(self.cluster.job(self.number)["Restarts"]) == self.restarts

    def nears_its_limit(self) -> None:
        """SLURM's own time limit, of whole minutes: 40 s away or more; it looks every 30 s."""
        began = dt.datetime.fromisoformat(self.cluster.job(self.number)["StartTime"])
        seconds = (dt.datetime.now() - began).total_seconds()
        minutes = int((seconds + 40) // 60) + 1
        self.cluster.call("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")
        stops = self.said().count(AGAIN)
        until(lambda: self.said().count(AGAIN) > stops, 150, self.said)  # of the signal before the limit

    def is_given_an_end(self) -> int:
        """While it waits to start again: 50 steps more than it has."""
        steps = max(column(self.run_dir, "step")) + 50
        config = self.run_dir.parent / "config.yaml"
        given = yaml.safe_load(config.read_text())
        given["train"]["steps"] = steps
        config.write_text(yaml.safe_dump(given))
        return steps


def test_one_run_survives_all_that_a_cluster_does(
    cluster: Cluster, digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Queued again by hand, preempted, at its time limit, a node crashed: the curve of a run that nothing befell."""
    given = settings(digits, tmp_path / "run", 25)
    given["train"]["steps"], given["optim"]["schedule"] = 10**6, "constant"
    job = Endless(cluster, given, tmp_path, "--signal=USR1@40")
    job.trains()
    cluster.call("scontrol", "requeue", job.number)
    job.starts_again()
    assert job.said().count(SAVED) == 1
    job.trains()
    other = cluster.submit("--partition=high", "--nodes=2", "--exclusive", "--wrap=true", cwd=tmp_path)
    cluster.wait(other, "COMPLETED")
    job.starts_again()
    assert job.said().count(SAVED) == 2
    job.trains()
    job.nears_its_limit()
    job.starts_again()
    cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    assert job.said().count(SAVED) == 3
    job.trains()
    cluster.crash("n2")
    steps = job.is_given_an_end()
    cluster.boot("n2")
    cluster.hold_until_forgotten(job.number)
    job.starts_again()
    job.ends("COMPLETED", seconds=300)
    assert cluster.job(job.number)["Restarts"] == "4"
    assert job.said().count(SAVED) == 3
    assert job.said().count("resuming") == 4
    given["train"]["steps"], given["run_dir"] = steps, str(tmp_path / "quiet")
    ranks.start(2, go, given).wait(600)
    assert column(job.run_dir, "step") == list(range(1, steps + 1))
    assert same_curve(job.run_dir, tmp_path / "quiet")


# --- what is wrong is named ----------------------------------------------------------------------------------


def seconds_of(cluster: Cluster, number: str) -> float:
    """From a job's start to its end."""
    shown = cluster.job(number)
    began, ended = (dt.datetime.fromisoformat(shown[name]) for name in ("StartTime", "EndTime"))
    return (ended - began).total_seconds()


def test_a_node_that_sees_another_run_directory_is_named(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with cluster.hidden("n2", shared):
        job = Submitted(cluster, settings(digits, shared / "run", 10), tmp_path)
        job.ends("FAILED")
    assert (
        f"on n2 (rank 1): a file that n1 wrote into {shared} is not seen; run_dir={shared}/run" in job.said()
    )
    assert seconds_of(cluster, job.number) < 120  # ten of them wait for NFS; the rest starts Python
    assert list(shared.iterdir()) == []


def test_a_node_without_the_data_is_named_by_preflight_alone(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    with cluster.hidden("n2", digits.moments):
        job = Submitted(cluster, settings(digits, tmp_path / "run", 10), tmp_path, PREFLIGHT="1")
        job.ends("FAILED")
    assert f"data        FAILED: on n2 (rank 1): {digits.moments}: no manifest.json" in job.said()
    assert "all-reduce  gloo, 2 rank(s): " in job.said()
    assert seconds_of(cluster, job.number) < 120
    assert not job.run_dir.exists()


LATE = """
import sys, time
from dit.ranks import group
from dit.commandline.cli import run
def main(config: str) -> None:
    if group.World.from_env().rank == 1:
        time.sleep(60)
    with group.session():
        print("they met")
run(main)
"""


def test_a_rank_that_does_not_come_is_named(cluster: Cluster, digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    env = {"DIT_ENTRY": f"{tmp_path}/late.py", "DIT_JOIN_SECONDS": "5"}
    job = Submitted(cluster, settings(digits, tmp_path / "run", 10), tmp_path, **env)
    job.ends("FAILED")
    assert "error (rank 0): rank 1 of 2 did not come to n1:" in job.said()
    assert "within 5 s. Nobody came from n2. Came: n1 (rank 0)." in job.said()
    assert "they met" not in job.said()


# --- an array ------------------------------------------------------------------------------------------------


def test_a_sweep_of_which_one_element_stops_and_goes_on(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    """The one whose number is that of the array, which does not queue the others again."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(digits, tmp_path / "none", STEPS)))
    runs = "".join(f"{config} --run_dir='{tmp_path}/run {i}' --seed={i} # run {i}\n" for i in (1, 2, 3))
    (tmp_path / "sweep.txt").write_text(runs)
    shape = ("--parsable", "--ntasks=1", "--time=10")
    array = cluster.call(
        ROOT / "launch/sweep.sh", *shape, tmp_path / "sweep.txt", cwd=tmp_path, **ENVIRONMENT
    ).strip()
    (tmp_path / "sweep.txt").unlink()  # a copy is kept
    names = {
        i: (f"{array}_{i}", tmp_path / f"slurm-{array}_{i}.out", tmp_path / f"run {i}") for i in (1, 2, 3)
    }
    jobs = {i: Training(cluster, *name) for i, name in names.items()}
    for job in jobs.values():
        job.reaches(5)
    (stopped,) = [i for i, job in jobs.items() if cluster.job(job.number)["JobId"] == array]
    cluster.signal(jobs[stopped].number, signal.SIGUSR1)
    for i, job in jobs.items():
        job.ends("COMPLETED", restarts=int(i == stopped), seconds=300)
        assert cluster.job(job.number)["Restarts"] == str(int(i == stopped))
        assert (AGAIN in job.said()) == (i == stopped)
        assert column(job.run_dir, "step") == list(range(1, STEPS + 1))
    hashes = [tuple(column(job.run_dir, "batch_hash")) for job in jobs.values()]
    assert len(set(hashes)) == 3
