"""Training on data that are broken in places, and on mixtures."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.ranks import group
from dit.train import recovery
from dit.train.checkpoints.checkpoint import CheckpointError
from dit.train.loop import Loop
from dit.train.run import Run
from dit.train.shared_quarantine import QuarantineError
from dit.train.stop import StopRequest
from tests.data.helpers import flip_byte
from tests.data.storage.http_server import serving
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import BATCH, LR, STEPS, at_step, built, column, go, metrics, values

BROKEN = 3


@pytest.fixture
def broken(digits: Digits, tmp_path: Path) -> Path:
    """The digits with one altered block of 16."""
    folder = shutil.copytree(digits.moments, tmp_path / "broken")
    manifest = Manifest.load(folder)
    block = manifest.blocks[BROKEN]
    flip_byte(manifest.path(block.shard), block.offset + 5000)
    return folder


def quarantined(digits: Digits, run: Path, data: Path, budget: int = 1, **sections: Any) -> dict[str, Any]:
    return values(digits, run, data={"path": str(data), "max_quarantined": budget}, **sections)


def missing(run: Run, steps: int) -> int:
    return sum(int((~run.feed.stream.batch(step).valid).sum()) for step in range(steps))  # type: ignore[operator]


def test_a_broken_block_ends_the_run_unless_there_is_a_budget(
    digits: Digits, broken: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"shard-\d+.tar: record .* altered"):
        go(quarantined(digits, tmp_path / "run", broken, 0, engine="local"))


@pytest.mark.parametrize("engine", ["deepspeed", "plain"])
def test_the_same_on_one_rank_and_two(
    digits: Digits, broken: Path, ranks: Server, tmp_path: Path, engine: str
) -> None:
    go(quarantined(digits, tmp_path / "one", broken, engine="local"))
    ranks.run(2, go, quarantined(digits, tmp_path / "two", broken, engine=engine))
    assert column(tmp_path / "two", "batch_hash") == column(tmp_path / "one", "batch_hash")
    losses = [np.array(column(tmp_path / run, "loss")) for run in ("one", "two")]
    assert np.abs(losses[0] / losses[1] - 1).max() < 1e-4
    assert column(tmp_path / "two", "quarantined")[-1] == 1


def test_what_was_left_out_is_said_at_the_end(
    digits: Digits, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    go(quarantined(digits, tmp_path / "run", broken, engine="local"))
    said = capsys.readouterr().out
    assert "quarantined, its samples are left out" in said
    assert "left out: 16 of 160 samples (10.00%), in 1 block(s)" in said


def test_what_is_missing_weighs_nothing(digits: Digits, broken: Path, tmp_path: Path) -> None:
    """The loss is the mean of the samples that are there; the gradient is theirs, over the count of all slots."""
    given = quarantined(digits, tmp_path / "run", broken, engine="local", train={"micro_batch": None})
    run = built(given)
    step = next(s for s in range(STEPS) if not run.feed.stream.batch(s).whole)
    batch = run.feed.stream.batch(step)
    per_sample, valid = next(_losses(run, step)), batch.valid
    assert valid is not None
    ((per_sample * valid).sum() / BATCH).backward()
    expected = {n: p.grad.clone() for n, p in run.engine.module.named_parameters() if p.grad is not None}
    run.engine.module.zero_grad()
    seen: dict[str, torch.Tensor] = {}
    stepped = run.engine.step

    def step_and_look(lr: float) -> bool:
        seen.update(
            {n: p.grad.clone() for n, p in run.engine.module.named_parameters() if p.grad is not None}
        )
        return stepped(lr)

    run.engine.step = step_and_look  # type: ignore[method-assign]
    run.step = step
    Loop(run).train_step(batch)
    assert seen.keys() == expected.keys()
    assert all(torch.allclose(seen[n], expected[n], rtol=1e-5, atol=1e-8) for n in expected)
    row = run.meters.take(1, BATCH)
    assert row["loss"] == pytest.approx(float(per_sample.detach()[valid].mean()), rel=1e-6)
    run.feed.stream.close()


def _losses(run: Run, step: int) -> Iterator[torch.Tensor]:
    """Each sample's loss as the task gives it, missing or not."""
    from dit.rng import Draws
    from dit.train.task import batch_samples

    batch = run.feed.stream.batch(step)
    draws = Draws(run.cfg.seed, step, batch.slots, run.cfg.train.global_batch)
    samples, _ = batch_samples(batch, run.task, draws, run.engine.device)
    yield run.task.loss(run.engine, samples).per_sample


def test_a_block_in_quarantine_stays_there_when_the_file_is_mended(
    digits: Digits, broken: Path, tmp_path: Path
) -> None:
    """The run goes on as it would have: its checkpoints say what is left out."""
    go(quarantined(digits, tmp_path / "through", broken, engine="local"))
    run = shutil.copytree(tmp_path / "through", tmp_path / "run")
    shutil.rmtree(at_step(run, STEPS))
    go(quarantined(digits, run, digits.moments, engine="local"))
    assert column(run, "batch_hash") == column(tmp_path / "through", "batch_hash")
    assert column(run, "loss") == column(tmp_path / "through", "loss")
    fresh = quarantined(digits, tmp_path / "fresh", digits.moments, engine="local")
    go(fresh)
    assert column(tmp_path / "fresh", "batch_hash") != column(run, "batch_hash")


def test_the_budget_is_of_all_ranks_together(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """Each rank meets blocks of its own; together they are more than allowed."""
    found = ranks.run(2, _beyond, quarantined(digits, tmp_path / "run", digits.moments, 9))
    assert all("10 blocks cannot be read, data.max_quarantined = 9" in text for text in found)


def _beyond(given: dict[str, Any]) -> str:
    run = built(given)
    rank = group.World.from_env().rank
    run.feed.stream.quarantine.load({(0, 5 * rank + i): "unreadable" for i in range(5)})
    try:
        recovery.save(run)
    except QuarantineError as error:
        return str(error)
    return ""


def test_a_lower_budget_is_noticed_before_anything_is_trained(
    digits: Digits, broken: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    go(quarantined(digits, run, broken, engine="local", train={"steps": 10}))
    with pytest.raises(QuarantineError, match=r"1 blocks cannot be read.*= 0:\n.*shard-\d+.tar: record"):
        go(quarantined(digits, run, broken, 0, engine="local"))
    assert column(run, "step")[-1] == 10


def test_a_fault_that_one_rank_saw_once_holds_for_all_after_a_checkpoint(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """So a resume from there is the unbroken run, though the file is whole."""
    given = quarantined(digits, tmp_path / "run", digits.moments, 5, checkpoint={"every": 5})
    ranks.run(2, _with_a_fault, given)
    hashes = column(tmp_path / "run", "batch_hash")
    assert column(tmp_path / "run", "quarantined")[-1] == 1
    for step in (5, 10):
        run = shutil.copytree(tmp_path / "run", tmp_path / f"from-{step}")
        for path in (run / "checkpoints").iterdir():
            if path.name > at_step(run, step).name:
                shutil.rmtree(path)
        ranks.run(2, go, given | {"run_dir": str(run)})
        assert column(run, "batch_hash") == hashes


def _with_a_fault(given: dict[str, Any]) -> None:
    """The first read of one block fails, on rank 0 alone."""
    run = built(given)
    reader = run.feed.stream.sources[0].reader
    fetch, failed = reader.fetch, []

    def once(index: int, record: memoryview) -> Any:
        if not failed and group.World.from_env().is_main:
            failed.append(index)
            raise reader.fault(index, "a cable was loose")
        return fetch(index, record)

    reader.fetch = once  # type: ignore[method-assign]
    Loop(run).train(StopRequest())


# --- mixtures ----------------------------------------------------------------------------------------------


def _known_to_one(given: dict[str, Any]) -> list[list[Any]]:
    """What the ranks agree on where rank 1 found block 7 broken since the checkpoint that it went back to."""
    run = built(given)
    if group.World.from_env().rank == 1:
        run.feed.stream.quarantine.load({(0, 7): "a cable was loose"})
    run.feed.quarantine.load([])
    return [list(entry) for entry in run.feed.quarantine.agree(lambda: None)]


def test_what_one_rank_found_is_not_forgotten_when_the_run_goes_back(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    found = ranks.run(2, _known_to_one, quarantined(digits, tmp_path, digits.moments))
    assert found == [[[0, 7, "a cable was loose"]]] * 2


def mixed(digits: Digits, run: Path, weight: float = 3, **sections: Any) -> dict[str, Any]:
    parts = [{"path": str(digits.moments), "weight": weight}, {"path": str(digits.moments_val), "weight": 1}]
    return values(
        digits, run, data={"path": None, "mix": parts}, **{"engine": "local", "optim": {"lr": LR}, **sections}
    )


def test_a_mixture_trains_and_goes_on_exactly(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    go(mixed(digits, tmp_path / "through"))
    run = shutil.copytree(tmp_path / "through", tmp_path / "run")
    shutil.rmtree(at_step(run, STEPS))
    go(mixed(digits, run))
    assert column(run, "loss") == column(tmp_path / "through", "loss")
    ranks.run(2, go, mixed(digits, tmp_path / "two", engine="deepspeed"))
    assert column(tmp_path / "two", "batch_hash") == column(run, "batch_hash")
    assert metrics(run)[-1]["samples"] == STEPS * BATCH


def test_other_weights_are_other_data(digits: Digits, tmp_path: Path) -> None:
    go(mixed(digits, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"data.digest"):
        go(mixed(digits, tmp_path / "run", weight=2, train={"steps": STEPS + 1}))


# --- data from elsewhere -----------------------------------------------------------------------------------


def test_from_a_web_server_through_a_cache_it_is_the_same_run(digits: Digits, tmp_path: Path) -> None:
    """Two epochs and more: each block is fetched once, whole, and the server's faults do not show."""
    go(values(digits, tmp_path / "local", engine="local"))
    with serving(digits.moments) as server:
        server.fail(503, times=2, path=".tar")
        cache = {"folder": str(tmp_path / "cache")}
        go(values(digits, tmp_path / "web", engine="local", data={"path": server.url, "cache": cache}))
        fetched = [ranges for path, ranges in server.served if path.endswith(".tar")]
    assert column(tmp_path / "web", "loss") == column(tmp_path / "local", "loss")
    assert column(tmp_path / "web", "batch_hash") == column(tmp_path / "local", "batch_hash")
    assert (
        len(fetched) <= len(Manifest.load(digits.moments).blocks) + 3
    )  # two faults, and the preflight's look
