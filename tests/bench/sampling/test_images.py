"""The benchmark of sampling: the plain loop is the same sampler, and what is counted is what was evaluated."""

from __future__ import annotations

import pytest
import torch

from dit.bench.sampling.images import INTERVAL, OURS, UNGUIDED, Bench, SampleBench, lines, run, turns
from dit.config import ConfigError, from_dict

CPU = torch.device("cpu")
SMALL = {"size": "nano", "patch": 8, "batch": 2, "num_steps": 5, "repeats": 1}


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("is_guided", [True, False])
def test_the_plain_loop_draws_what_ours_does(solver: str, is_guided: bool) -> None:
    cfg = from_dict(SampleBench, {**SMALL, "solver": solver, "scale": 3.0})
    bench = Bench(cfg, CPU)
    sampler, index = bench.samplers[OURS if is_guided else UNGUIDED], torch.arange(2)
    ours = sampler.latents(index, bench.label)
    theirs = bench.plain(3.0 if is_guided else 1.0)(sampler.noise(index), bench.label)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((ours - sampler.noise(index)).abs().max()) > 0.1  # the network says something


def test_evaluations_are_counted_and_an_interval_saves_half_of_each_pair_outside() -> None:
    """Heun's five steps see t = 1, .8, .8, .6, .6, .4, .4, .2, .2, 0: four of ten lie within [0.25, 0.6]."""
    cfg = from_dict(SampleBench, SMALL)
    calls: list[int] = []
    found = run(cfg, lambda: calls.append(1))
    assert len(calls) == turns(cfg)
    assert found["evaluations"] == {OURS: 20, UNGUIDED: 10, INTERVAL: 14}
    assert found["flops_an_image"][OURS] == 2 * found["flops_an_image"][UNGUIDED] > 0
    table = list(lines(found, cfg, enough=True))
    assert sum(": met" in row or ": missed" in row for row in table) == 2
    assert not any(": met" in row or ": missed" in row for row in lines(found, cfg, enough=False))


def test_no_guidance_is_refused() -> None:
    with pytest.raises(ConfigError, match="which is no guidance"):
        from_dict(SampleBench, {"scale": 1})
    with pytest.raises(ConfigError, match="interval must be"):
        from_dict(SampleBench, {"interval": [0.6, 0.2]})
