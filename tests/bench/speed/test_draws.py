"""The bench of draws: its contender draws what a training step draws, to the number, and the step beside it trains."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from dit.bench.speed.draws import LATENT, DrawsBench, _DrawsContenders, run, turns
from dit.config import from_dict
from dit.data.codecs.norm import LatentNorm
from dit.data.loading.stream import Batch, Stream
from dit.flow.objective import Objective
from dit.rng import Draws, Purpose
from dit.train.task import LatentTask, batch_samples
from tests.data.helpers import write_dataset

CPU, COUNT = torch.device("cpu"), 3
CFG = from_dict(DrawsBench, {"size": "nano", "batch": COUNT, "steps": 1, "repeats": 2})
OF_THE_ORDER = {Purpose.BLOCKS, Purpose.ROTATION, Purpose.SAMPLES}  # of an epoch, not of a step


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[Purpose]]:
    """Takes out how many numbers were drawn for what since it was asked last; they are drawn all the same."""
    seen, words = Counter[Purpose](), Draws._words

    def noted(self: Draws, purpose: Purpose, count: int) -> torch.Tensor:
        seen[purpose] += count * len(self.slots)
        return words(self, purpose, count)

    def take() -> Counter[Purpose]:
        found = Counter({purpose: n for purpose, n in seen.items() if purpose not in OF_THE_ORDER})
        seen.clear()
        return found

    monkeypatch.setattr(Draws, "_words", noted)
    return take


def test_a_turn_draws_what_a_training_step_does(drawn, tmp_path) -> None:
    _DrawsContenders(CFG, CPU).draw(0)
    ours = drawn()
    stream = Stream(write_dataset(tmp_path / "set", [4], views=2), 0, COUNT)
    stream.batch(0)  # draws the views
    stream.close()
    slots = torch.arange(COUNT)
    stored = Batch(torch.ones(COUNT, 2, *LATENT).half(), slots, slots, slots % 2, slots, 0)
    task = LatentTask(Objective(), LatentNorm(mean=(0.0,) * 4, std=(1.0,) * 4), 0.1, True)
    samples, _ = batch_samples(stored, task, Draws(0, 0, slots, COUNT), CPU)
    task.loss(lambda x, t, cond: torch.zeros_like(x), samples)
    assert ours == drawn()


def test_the_step_beside_it_trains() -> None:
    contenders = _DrawsContenders(CFG, CPU)
    before = [p.detach().clone() for p in contenders.engine.module.parameters() if p.requires_grad]
    assert contenders.step(0) == CFG.steps
    after = [p for p in contenders.engine.module.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_figures_are_of_the_same_turns() -> None:
    ticks: list[int] = []
    found = run(CFG, lambda: ticks.append(1))
    assert len(ticks) == turns(CFG) == 6
    draws, step, share = found["ms"]["draws"], found["ms"]["step"], found["draws / step"]
    assert draws["low"] / step["high"] <= share["low"] <= share["high"] <= draws["high"] / step["low"]
