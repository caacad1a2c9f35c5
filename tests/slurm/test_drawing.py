"""Sampling at scale under a real SLURM: nodes crash, jobs are stopped, and the images are those of one rank."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

import tools.evaluate
import tools.sample
from tests.commands import call
from tests.datasets import Digits
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import AGAIN, Job, submit
from tests.train.runs import random_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

COUNT, SIZE = 24, 2
WORDS = (
    f"--num_samples={COUNT}",
    f"--batch_size={SIZE}",
    "--num_steps=80",
    "--cfg_scale=2",
    "--formats=npz,png",
)


def start(cluster: Cluster, folder: Path, name: str, *words: object) -> Job:
    """A job of one rank on each of two nodes: every rank costs seconds of imports at every start."""
    output = folder / name
    return Job(cluster, submit(cluster, output, [], *words), output)


def test_a_node_crashes_a_job_is_stopped_and_the_images_are_those_of_one_rank(
    cluster: Cluster, digits: Digits, tmp_path: Path
) -> None:
    """And figures of them on the ranks of two nodes."""
    run, out = random_run(digits, tmp_path / "run"), tmp_path / "out"
    words = ("tools/sample.py", run, *WORDS, f"--out={out}")

    def reach(job: Job, count: int) -> int:
        """Wait until so many blocks are there; how many are."""
        blocks = tmp_path / "out.partial"
        until(lambda: len(list(blocks.glob("block-*.npz"))) >= count, 120, job.said)
        assert not out.exists(), "it ended before anything could befall it"
        return len(list(blocks.glob("block-*.npz")))

    job = start(cluster, tmp_path, "crashed.txt", *words)
    reach(job, 2)
    cluster.crash("n2")
    cluster.wait(job.number, "PENDING")  # it queues again by itself; submitted anew no rank is left of it
    cluster.call("scancel", job.number)
    cluster.boot("n2")
    cluster.wait_idle()
    kept = reach(job, 2)

    job = start(cluster, tmp_path, "stopped.txt", *words)
    reach(job, kept + 2)
    cluster.signal(job.number, signal.SIGUSR1)
    job.ends("COMPLETED", restarts=1)
    assert AGAIN in job.said()
    assert f"of {COUNT} images are drawn and kept; the same command goes on" in job.said()
    assert job.said().count(f"of {COUNT} images are drawn already") == 2
    assert call(tools.sample.main, run, *WORDS, f"--out={tmp_path / 'one'}") == 0
    for ours, theirs in zip(npz(out), npz(tmp_path / "one"), strict=True):
        assert (ours == theirs).all()
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"{i:08d}.png" for i in range(COUNT)]

    told = ("--reference=digits:test", "--image_size=16", "--features=pixels", "--features.components=3")
    two = tmp_path / "two.json"
    words = ("tools/evaluate.py", out, *told, f"--json_file={two}")
    start(cluster, tmp_path, "evaluated.txt", *words).ends("COMPLETED")
    assert call(tools.evaluate.images, out, *told, f"--json_file={tmp_path / 'one.json'}") == 0
    (ours,), (theirs,) = (json.loads(f.read_text())["spaces"] for f in (two, tmp_path / "one.json"))
    assert ours["figures"] == pytest.approx(theirs["figures"], rel=1e-9)
    assert ours["hash"] == theirs["hash"]


def npz(out: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / "samples.npz") as held:
        return held["arr_0"], held["arr_1"]
