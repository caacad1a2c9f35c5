"""The axes of a sweep: what is typed, which settings there are, and budgets that are used up and never passed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit.config import ConfigError, from_dict
from dit.evals.sweep.axes import ALWAYS, Axes, Setting, most_steps, read_intervals
from dit.flow.path import PATHS
from dit.flow.predict import PREDICTIONS
from dit.sample.cfg_zero import ClassifierFreeZero
from dit.sample.generate import Sampler, SamplerSpec
from dit.sample.grid import UniformGrid
from dit.sample.solve import SOLVERS, Heun

CPU = torch.device("cpu")
FIXED = [name for name in SOLVERS if SOLVERS[name]().nfe(1) is not None]


def sampler(solver: str) -> Sampler:
    """Of a network that says 0, which counts its calls."""
    spec = from_dict(SamplerSpec, {"solver": {"name": solver}, "num_steps": 1})
    shape = (1, 2, 2)
    return Sampler(
        lambda x, t, cond: torch.zeros_like(x), PATHS["linear"](), PREDICTIONS["velocity"](), lambda x: x, shape, spec,
        CPU,
    )  # fmt: skip


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_budget_is_used_up_and_never_passed(name: str, budget: int) -> None:
    found = most_steps(sampler(name), budget)
    if found is None:
        assert (sampler(name).nfe or 0) > budget
        return
    assert (found.nfe or 0) <= budget
    more = replace(found, spec=replace(found.spec, num_steps=found.spec.num_steps + 1))
    assert (more.nfe or 0) > budget


def test_a_solver_that_chooses_its_steps_has_no_budget() -> None:
    with pytest.raises(ConfigError, match="dopri5 chooses its own steps"):
        most_steps(sampler("dopri5"), 8)


def test_no_guidance_is_one_setting_whatever_the_intervals() -> None:
    axes = Axes(cfg_scale=(1.0, 2.0), interval=(ALWAYS, (0.2, 0.7)), num_steps=(5, 10))
    found = [(s.scale, s.interval, s.steps) for s in axes.settings()]
    ways = [(1.0, ALWAYS), (2.0, ALWAYS), (2.0, (0.2, 0.7))]
    assert found == [(*way, steps) for way in ways for steps in (5, 10)]


def test_each_guidance_is_drawn_at_each_scale_and_none_once() -> None:
    axes = Axes(cfg_scale=(1.0, 2.0), interval=(ALWAYS, (0.2, 0.7)), guidance=("cfg", "cfg_zero"))
    found = list(axes.settings())
    assert [(s.scale, s.interval, s.guidance) for s in found] == [
        (1.0, ALWAYS, "cfg"), (2.0, ALWAYS, "cfg"), (2.0, ALWAYS, "cfg_zero"),
        (2.0, (0.2, 0.7), "cfg"), (2.0, (0.2, 0.7), "cfg_zero"),
    ]  # fmt: skip
    specs = [s.spec(4, UniformGrid(), 0).in_turn for s in found]
    assert specs[2] == (ClassifierFreeZero(scale=2.0),)
    assert specs[4] == (ClassifierFreeZero(scale=2.0, interval=(0.2, 0.7)),)
    assert len(set(specs)) == 5
    assert [s.words["guidance"] for s in found] == ["", "", "cfg_zero", "", "cfg_zero"]
    alone = Axes(cfg_scale=(1.0, 2.0), guidance=("cfg_zero",)).settings()
    assert [s.spec(4, UniformGrid(), 0).in_turn[0].scale for s in alone] == [1.0, 2.0]


def test_guidance_of_all_times_is_what_cfg_scale_says() -> None:
    grid = UniformGrid()
    assert Setting("ema", 2.0, ALWAYS, Heun(), 4).spec(4, grid, 3) == SamplerSpec(
        solver=Heun(), num_steps=4, grid=grid, cfg_scale=2.0, seed=3
    )
    (guidance,) = Setting("ema", 2.0, (0.2, 0.7), Heun(), 4).spec(4, grid, 0).guidance
    assert (guidance.scale, guidance.interval) == (2.0, (0.2, 0.7))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"cfg_scale": [1, 1]}, "cfg_scale has 1.0 twice"),
        ({"seeds": []}, "seeds has no value"),
        ({"interval": [[0.7, 0.2]]}, "interval must be"),
        ({"guidance": ["cfg_zeros"]}, "did you mean cfg_zero"),
        (
            {"guidance": ["threshold"]},
            "threshold does not take a scale and an interval; choices: cfg, cfg_zero",
        ),
        ({"num_steps": [0]}, "1 or more"),
        ({"solver": [{"name": "hen"}]}, "did you mean heun"),
    ],
)
def test_axes_that_are_none_are_refused(values: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_dict(Axes, values)


def test_intervals_are_read() -> None:
    assert read_intervals("0:1, 0.2:0.7") == (ALWAYS, (0.2, 0.7))
    for text in ("0.2", "a:b", "0:1:2", ""):
        with pytest.raises(ConfigError, match="expected LOW:HIGH"):
            read_intervals(text)
