"""The bench of the step: the plain loop is a DiT that trains, ours does what training does, rows are whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dit.bench.speed.plain import DECAY, PlainDiT, PlainLoop
from dit.bench.speed.step import (
    BARE_OURS,
    BARE_PLAIN,
    LOCAL,
    PLAIN,
    Bench,
    Entry,
    Report,
    _built,
    _turn,
    run,
    turns,
)
from dit.bench.speed.step_table import closing, line
from dit.bench.speed.steppers import OurStep, Setting, StepBench
from dit.bench.speed.turns import MedianRange
from dit.config import ConfigError, from_dict
from dit.interop.outward import to_theirs
from dit.model.dit import DiTConfig
from dit.ranks.group import World
from tests.rank_processes import Server

TINY = {"size": ["nano"], "patch": 8, "batch": 4, "steps": 1, "repeats": 2, "stages": [0, 2]}


def setting(**keys: Any) -> Setting:
    return Setting(from_dict(StepBench, {**TINY, **keys}), "nano", World())


def test_the_plain_model_computes_what_ours_does() -> None:
    cfg = DiTConfig(size="nano")
    ours = cfg.build(8, 4, 10)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(std=0.2)
    plain = PlainDiT(cfg.dims(8, 4, 10), ours.position).eval()
    plain.load_state_dict(to_theirs(ours))
    x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 500.0, 999.0]), torch.tensor([0, 9, 4])
    expected = ours(x, t, {"label": label})
    assert float(expected.detach().std()) > 0.1
    torch.testing.assert_close(plain(x, t, label), expected, rtol=1e-4, atol=1e-5)


def test_the_plain_loop_trains_and_averages() -> None:
    """The first update of Adam is the learning rate in size; the average takes its share of it."""
    one = setting()
    loop = PlainLoop(one.plain(), bf16=False, compiled=False)
    layer, mean = loop.weights.final_layer.linear.bias, loop.average.final_layer.linear.bias
    loop.step(one.latents, one.label, micro=2)
    torch.testing.assert_close(layer.abs(), torch.full_like(layer, 1e-4), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean, (1 - DECAY) * layer)


def test_our_step_trains_and_averages() -> None:
    step = OurStep(setting(), 2, None)
    (weight,) = (p for n, p in step.engine.module.named_parameters() if n == "output.proj.bias")
    step.step()
    assert step.engine.updates == 1
    assert float(weight.detach().abs().min()) > 0
    assert step.meters.state()["batch_hash"] != 0
    assert any(
        not torch.equal(a, b)
        for a, b in zip(step.ema.pieces, OurStep(setting(), 2, None).ema.pieces, strict=True)
    )


def test_our_step_as_a_graph_is_the_same_step() -> None:
    """On a CPU, where what a graph holds runs uncaptured."""
    ordinary, graph = OurStep(setting(), 2, None), OurStep(setting(), 2, None, graph=True)
    assert graph.about == f"{ordinary.about}, a CUDA graph a step"
    for _ in range(3):
        ordinary.step()
        graph.step()
    assert graph.engine.grad_norm() == ordinary.engine.grad_norm()
    assert all(torch.equal(a, b) for a, b in zip(graph.ema.pieces, ordinary.ema.pieces, strict=True))


def benched(cfg: StepBench) -> tuple[dict[str, Any], list[str], list[str], int]:
    """What a run of the bench finds; what it printed and wrote meanwhile, and how many turns it told of."""
    lines, written, ticks = [], [], []  # type: ignore[var-annotated]
    report = Report(lines.append, lambda f: written.append(json.dumps(f)), lambda: ticks.append(1))
    return run(cfg, report), lines, written, len(ticks)


def test_rows_are_whole_and_every_round_is_handed_on(ranks: Server) -> None:
    cfg = from_dict(StepBench, TINY)
    [(figures, lines, written, ticks)] = ranks.run(1, benched, cfg)
    found = figures["nano"]
    assert ticks == turns(cfg) == 18
    assert len(written) == cfg.repeats
    assert written[-1] == json.dumps(figures)
    assert list(found["rows"]) == [PLAIN, "ours, stage 0", "ours, stage 2", LOCAL, BARE_PLAIN, BARE_OURS]
    for name, row in found["rows"].items():
        assert row["micro_batch"] == 4
        assert row["of_product"] > 0
        assert all(row[key]["low"] > 0 for key in ("images_per_s", "cpu_ms", "quicker_cpu", "quicker_wall"))
        assert line(name, row) in lines
    assert found["rows"][PLAIN]["quicker_cpu"]["low"] == found["rows"][PLAIN]["quicker_cpu"]["high"] == 1
    engines = {name: row["engine"] for name, row in found["rows"].items()}
    assert "AdamW not fused" in engines[PLAIN]
    assert engines[LOCAL] == "plain torch: GuardedAdamW fused"
    assert "at stage 0: GuardedAdamW fused" in engines["ours, stage 0"]
    assert "at stage 2 (DeepSpeedZeroOptimizer): AdamW fused" in engines["ours, stage 2"]
    assert list(found["deepspeed_ms"]) == ["0", "2"]
    assert closing(found) in lines


@pytest.mark.parametrize(("median", "verdict"), [(1.1, "met"), (1.11, "straw man")])
def test_a_straw_man_is_called_one(median: float, verdict: str) -> None:
    assert verdict in closing({"bare_plain_of_ours": vars(MedianRange(median, 1.0, 2.0))})


class Crowded:
    """Runs out of memory at step `at` in micro-batches of more than 1, as GPUs do once Adam's moments are there."""

    about = "crowded"

    def __init__(self, micro: int, at: int):
        self.micro, self.at, self.steps, self.is_closed = micro, at, 0, False

    def step(self) -> None:
        self.steps += 1
        if self.micro > 1 and self.steps >= self.at:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("at", [1, 2])
def test_what_does_not_fit_is_taken_in_smaller_micro_batches(at: int) -> None:
    bench, made = Bench(setting()), []

    def make(micro: int) -> Crowded:
        made.append(Crowded(micro, at))
        return made[-1]

    assert _built(bench, Entry("big", make)) is made[-1]
    assert [one.micro for one in made] == [4, 2, 1]
    assert [one.is_closed for one in made] == [True, True, False]
    assert bench.about["big"]["micro_batch"] == 1
    assert _turn(bench, "big", made[-1]).run(0) == 4


def test_a_micro_batch_that_was_asked_for_is_not_changed() -> None:
    with pytest.raises(ConfigError, match="big does not fit in this device's memory with micro-batches of 2"):
        _built(Bench(setting(micro_batch=2)), Entry("big", lambda micro: Crowded(micro, at=1)))


def test_micro_batches_fill_the_batch() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch \(3\) must divide batch \(4\)"):
        setting(micro_batch=3)


def test_ours_has_the_arithmetic_that_is_asked_for() -> None:
    """And the plain loop none of it, but heads of the same width."""
    one = setting(precision="bf16", head_width=16, residual="bfloat16", attention="math", fp8="rowwise")
    ours, plain = one.ours(), one.plain()
    assert ours.dims.heads == plain.blocks[0].attn.num_heads == 4
    assert (ours.cfg.residual, ours.blocks[0].attention.backend) == ("bfloat16", "math")
    kinds = {type(m).__name__ for m in ours.blocks[0].mlp.modules()}
    assert "Float8Linear" in kinds
    assert one.flops == setting().flops
    with pytest.raises(ConfigError, match="need precision bf16, and it is fp32"):
        setting(fp8="tensorwise")
