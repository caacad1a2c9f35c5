"""Offload, hpZ and frozen parameters: what checkpoints and averages hold is what it is without them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.checkpoint import Reader
from dit.train.run import Run
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.checkpoints.test_checkpoint import TRUE
from tests.train.on_ranks import resave
from tests.train.runs import Values, at_step, built, differing, engine_of, go, state, values
from tests.train.short_runs import Short, short_runs

STEPS = 4
FREEZE = ["blocks.0.*", "*attention.qkv.weight", "conditioners.0.table.weight"]


@dataclass(frozen=True)
class Source:
    """A checkpoint of two ranks at stage 2 with frozen parameters, which init.from brought: no seed gives them."""

    run: Path
    config: Values
    state: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def source(digits: Digits, ranks: Server, tmp_path_factory: pytest.TempPathFactory) -> Source:
    first, run = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("source")
    short = {"checkpoint": {"every": STEPS}, "train": {"steps": STEPS}}
    ranks.run(1, go, values(digits, first, engine="local", **short))
    short["train"]["freeze"] = FREEZE
    given = values(digits, run, init={"from": str(first), "weights": "model"}, **short)
    ranks.run(2, go, given)
    before, after = state(at_step(first, STEPS)), state(at_step(run, STEPS))
    for name, is_frozen in {"blocks.0.modulation.weight": True, "blocks.1.modulation.weight": False}.items():
        assert torch.equal(before[f"model/{name}"], after[f"model/{name}"]) == is_frozen
    meta = json.loads((at_step(run, STEPS) / "meta.json").read_text())
    return Source(run, meta["config"], after)


def resaved(ranks: Server, source: Source, size: int, folder: Path, choices: list[dict[str, Any]]) -> None:
    """Load and save by each choice in turn: every bit must be there again, and the model compute with it."""
    places = [source.run, *(folder / str(i) for i in range(len(choices)))]
    chain = []
    for here, out, choice in zip(places, places[1:], choices, strict=False):
        given = {**source.config, "run_dir": str(here), "train": {**source.config["train"]}, **choice}
        given["train"]["micro_batch"] = 8
        chain.append((given, str(out)))
    for found in ranks.run(size, resave, chain):
        for choice, seen in zip(choices, found, strict=True):
            assert (seen["step"], seen["updates"]) == (STEPS, STEPS)
            assert [name for name in TRUE if not seen[name]] == [], choice
    for place, choice in zip(places[1:], choices, strict=True):
        assert differing(source.state, state(at_step(place, STEPS))) == [], choice


def test_a_checkpoint_holds_frozen_parameters_without_an_optimizers_state(source: Source) -> None:
    kinds = ("model", "ema", "exp_avg")
    names = {k: {n.removeprefix(k + "/") for n in source.state if n.startswith(k + "/")} for k in kinds}
    assert names["model"] == names["ema"] > names["exp_avg"]
    frozen = names["model"] - names["exp_avg"]
    assert {"blocks.0.mlp.fc1.bias", "blocks.1.attention.qkv.weight"} < frozen
    assert "blocks.1.mlp.fc1.bias" in names["exp_avg"]
    for name in frozen:
        assert torch.equal(source.state[f"model/{name}"], source.state[f"ema/{name}"])
    assert not torch.equal(
        source.state["model/blocks.1.mlp.fc1.weight"], source.state["ema/blocks.1.mlp.fc1.weight"]
    )
    held = Reader(checkpoint.read(at_step(source.run, STEPS))).state_dict("ema")
    assert torch.equal(held["blocks.0.mlp.fc1.bias"], source.state["model/blocks.0.mlp.fc1.bias"])


def test_frozen_parameters_come_back_bit_for_bit_at_every_stage(
    ranks: Server, source: Source, tmp_path: Path
) -> None:
    """Also into the live model: one that was just built has other numbers where this one is frozen."""
    resaved(ranks, source, 2, tmp_path, [engine_of(chosen) for chosen in (3, 0, "plain", 1, 3, "plain", 2)])


OFFLOADED = [{"stage": stage, "offload": "optimizer"} for stage in (1, 2, 3)] + [
    {"stage": 3, "offload": "all"}
]


def test_offloaded_state_is_saved_and_loaded_bit_for_bit(
    ranks: Server, source: Source, tmp_path: Path
) -> None:
    resaved(ranks, source, 2, tmp_path, [{"zero": zero} for zero in OFFLOADED])


def nudged(runs: list[Values]) -> list[tuple[bool, bool]]:
    """Of each run: whether the model computes otherwise once frozen weights were changed, and as before thereafter."""
    return [_nudged(built(given)) for given in runs]


@torch.no_grad()
def _nudged(run: Run) -> tuple[bool, bool]:
    def loss(change: float) -> float:
        for fragment in run.engine.fragments():
            if "table" in fragment.name:
                fragment.weight.add_(change)
        run.engine.sync_weights()
        return float(run.task.loss(run.engine, run.archive.probe.samples).mean)

    for fragment in run.engine.fragments():
        fragment.weight.fill_(0.125)  # that adding and subtracting 1 leaves as it was; and no gate is closed
    before, changed, after = loss(0), loss(1), loss(-1)
    return changed != before, after == before


@pytest.mark.slow
def test_second_copies_of_the_parameters_follow_the_first_on_four_ranks(
    ranks: Server, source: Source, tmp_path: Path
) -> None:
    """Where the model computes with a stale copy, the average swapped in computes what the weights do."""
    zeros = [{"hpz": 2}, {"hpz": 4}, {"hpz": 2, "offload": "optimizer"}, {}]
    choices = [{"zero": {"stage": 3, **zero}} for zero in zeros]
    resaved(ranks, source, 4, tmp_path, choices)
    runs = [{**source.config, "run_dir": str(tmp_path / "nudged"), **choice} for choice in choices]
    for seen in ranks.run(4, nudged, runs):
        assert seen == [(True, True)] * len(choices)


def test_one_rank_of_plain_torch_reads_them_too(ranks: Server, source: Source, tmp_path: Path) -> None:
    resaved(ranks, source, 1, tmp_path, [{"engine": "local"}, {"zero": {"stage": 3}}])


# --- training ----------------------------------------------------------------------------------------------


def compare(a: Short, b: Short, tolerance: float) -> None:
    """Relative: losses, norms, and over all elements weights and moments."""
    assert torch.tensor(a.losses) == pytest.approx(torch.tensor(b.losses), rel=tolerance)
    assert torch.tensor(a.norms) == pytest.approx(torch.tensor(b.norms), rel=tolerance)
    assert a.states.keys() == b.states.keys()
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        names = [name for name in sorted(b.states) if name.startswith(kind + "/")]
        x, y = (torch.cat([s.states[name].flatten() for name in names]) for s in (a, b))
        assert float((x - y).norm() / y.norm()) <= tolerance, kind


def trained(
    digits: Digits, ranks: Server, folder: Path, size: int, zeros: list[dict[str, Any]]
) -> list[Short]:
    """A few steps with accumulation, clipping and frozen parameters, in bf16."""
    train = {"precision": "bf16", "freeze": FREEZE, "micro_batch": 4}
    runs = [values(digits, folder / str(i), train=train, zero=zero) for i, zero in enumerate(zeros)]
    return list(ranks.run(size, short_runs, runs, STEPS)[0])


@pytest.mark.slow
def test_offloading_trains_as_if_it_were_not(digits: Digits, ranks: Server, tmp_path: Path) -> None:
    """The norm is added up parameter by parameter there, so that clipping may differ in the last bit, 6e-8; Adam
    divides gradients by their own size, so that elements whose gradients nearly cancel move by 1% of lr more."""
    plain = [{"stage": stage} for stage in (1, 2, 3)]
    found = trained(digits, ranks, tmp_path, 2, [*plain, *OFFLOADED])
    for zero, offloaded in zip(OFFLOADED, found[3:], strict=True):
        compare(offloaded, found[zero["stage"] - 1], 1e-5)


@pytest.mark.slow
def test_a_second_copy_of_the_parameters_changes_nothing(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    without, pairs, one = trained(
        digits, ranks, tmp_path, 4, [{"stage": 3}, {"stage": 3, "hpz": 2}, {"stage": 3, "hpz": 4}]
    )
    compare(pairs, without, 0)
    compare(one, without, 0)
