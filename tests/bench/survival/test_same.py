"""Two runs that are the same, and each way in which they may not be, by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dit.bench.survival.same import (
    checkpoint_problems,
    figure_problems,
    leftovers,
    same_bits,
    step_problems,
)
from dit.train.checkpoints import checkpoint
from tests.train.runs import rewrite_tensors, sign

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture
def saved(tmp_path):
    """Two equal checkpoints of two ranks."""
    generator = torch.Generator().manual_seed(0)
    pieces = {
        "weight": [[3, 4], [(0, 7), (7, 5)]],
        "bias": [[3], [(0, 3)]],
    }  # shape, (offset, numel) of each rank
    ranks = [{}, {}]
    fragments = [{}, {}]
    for name, (shape, parts) in pieces.items():
        for rank, (offset, numel) in enumerate(parts):
            fragments[rank][name] = [shape, offset, numel]
            ranks[rank] |= {f"{kind}/{name}": torch.randn(numel, generator=generator) for kind in KINDS}
    ranks[0]["buffer/mean"] = torch.arange(3)
    meta = {
        "step": 10,
        "updates": 10,
        "probe": {"model": 0.5, "ema": 0.25},
        "config": {"run_dir": "?"},
        "files": [],
    }
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
        entries = [{"file": f"rank-{r:05d}.safetensors", "fragments": f} for r, f in enumerate(fragments)]
        for entry, tensors in zip(entries, ranks, strict=True):
            save_file(tensors, folder / entry["file"])
        (folder / "meta.json").write_text(
            json.dumps({**meta, "config": {"run_dir": folder.name}, "files": entries})
        )
        sign(folder)
    return folders


def differences(saved):
    return checkpoint_problems(*(checkpoint.read(folder) for folder in saved))


def test_equal_checkpoints(saved):
    assert differences(saved) == (2 * len(KINDS) + 1, [])


@pytest.mark.parametrize(
    "name", ["model/weight", "ema/bias", "exp_avg/weight", "exp_avg_sq/bias", "buffer/mean"]
)
def test_one_bit_of_any_tensor(saved, name):
    def change(tensors):
        if name in tensors:
            tensors[name].view(torch.uint8)[-1] ^= 1

    rewrite_tensors(saved[0], change)
    assert differences(saved)[1] == [f"checkpoint: {name} differs"]


def test_what_the_checkpoint_says(saved):
    sign(saved[0], lambda meta: meta.update(updates=9))
    sign(saved[1], lambda meta: meta["probe"].update(ema=0.2500001))
    assert differences(saved)[1] == [
        "checkpoint: probe is {'model': 0.5, 'ema': 0.25}, undisturbed {'model': 0.5, 'ema': 0.2500001}",
        "checkpoint: updates is 9, undisturbed 10",
    ]


def test_bits_and_not_values():
    nan = torch.tensor(float("nan"))
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))


def rows(*steps):
    return [{"step": s, "batch_hash": 100 + s, "loss": 1 / s} for s in steps]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((1, 2, 3, 4), []),
        ((1, 2, 4), ["step 3 is missing"]),
        ((1, 2, 3), ["step 4 is missing"]),
        ((1, 2, 3, 3, 4), ["step 3 is there 2 times"]),
        ((1, 2, 3, 4, 5), ["step 5 is beyond the run's 4"]),
        ((1, 3, 2, 4), ["the steps are not in order"]),
        ((2, 2, 3, 4), ["step 1 is missing", "step 2 is there 2 times"]),
    ],
)
def test_steps(steps, words):
    assert step_problems(rows(*steps), 4) == [f"metrics.jsonl: {w}" for w in words]


def test_figures():
    ours, names = rows(1, 2, 3, 4), ("batch_hash", "loss")
    assert figure_problems(ours, rows(1, 2, 3, 4), names) == []
    ours[1]["batch_hash"] += 1
    ours[2]["loss"] = ours[3]["loss"] = 0.5
    assert figure_problems(ours, rows(1, 2, 3, 4), names) == [
        "metrics.jsonl: batch_hash at step 2 is 103, undisturbed 102 (1 steps differ)",
        "metrics.jsonl: loss at step 3 is 0.5, undisturbed 0.3333333333333333 (2 steps differ)",
    ]


def test_a_figure_that_is_not_there():
    ours = rows(1, 2)
    del ours[1]["loss"]
    assert "loss at step 2 is None" in figure_problems(ours, rows(1, 2), ("loss",))[0]


def test_leftovers(tmp_path):
    (tmp_path / "checkpoints/step-00000010.partial").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.partial").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert leftovers(tmp_path) == [
        f"left over: {tmp_path / name}"
        for name in (".metrics.jsonl.partial", "checkpoints/step-00000010.partial")
    ]
