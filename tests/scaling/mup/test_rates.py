"""What is said of curves of losses that are known: the best rate, what is as good, whether it carries over."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dit.config import ConfigError
from dit.scaling.mup.rates import Carried, Curve, Difference, carried, draw, table, verdict

RATES = (0.001, 0.002, 0.004, 0.008, 0.016)


def curve(
    name: str, width: int, best: float, bend: float = 0.01, noise: float = 1e-4, seeds: int = 3
) -> Curve:
    """A parabola over log2 of the rate with its vertex at `best`, moved by each seed, and noise of a run's own."""
    x = np.log2(np.array(RATES) / best)
    generator = np.random.default_rng(width)
    own = generator.normal(size=(len(RATES), seeds)) * noise
    return Curve(name, width, RATES, 1.0 + bend * x[:, None] ** 2 + 0.05 * np.arange(seeds) + own)


def test_the_best_is_that_of_the_least_mean_and_seeds_in_common_do_not_count() -> None:
    found = curve("mup", 64, 0.004)
    assert found.rates[found.best] == 0.004
    assert found.behind(found.best) == Difference(0.0, 0.0)
    assert found.behind(1).is_clear  # by 0.01, among seeds that are 0.05 apart
    assert found.spread == pytest.approx(0.05, rel=0.05)


def test_an_interval_is_students_over_the_seeds_differences() -> None:
    """By hand: differences 1, 2, 3 of three rates are 2 ± t · 1 / √3, with t(0.975; 2) = 4.303: 5 % among two rates."""
    losses = np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    found = Curve("mup", 64, (1.0, 2.0, 4.0), losses).behind(1)
    assert (found.mean, found.half) == (2.0, pytest.approx(4.302653 / math.sqrt(3)))
    assert not found.is_clear


def test_chance_alone_seldom_makes_a_rate_worse() -> None:
    """Of 400 studies in which every rate is as good, 5 % at most tell the middle rate from the best."""
    generator = np.random.default_rng(0)
    clear = 0
    for _ in range(400):
        found = Curve("mup", 64, RATES, generator.normal(size=(len(RATES), 3)))
        clear += found.behind(2).is_clear
    assert clear <= 20


@pytest.mark.parametrize("best", [0.0025, 0.004, 0.0055])
def test_the_vertex_of_a_parabola_is_found_between_rates(best: float) -> None:
    optimum = curve("mup", 64, best, noise=0.0).optimum
    assert optimum is not None
    assert optimum[0] == pytest.approx(math.log2(best))
    assert optimum[1] == pytest.approx(0.0, abs=1e-9)


def test_at_the_edge_there_is_no_vertex() -> None:
    assert curve("mup", 64, 0.0005).optimum is None
    assert curve("mup", 64, 0.0005).is_at_edge


@pytest.mark.parametrize(
    ("wide", "bend", "noise", "outcome"),
    [
        (0.004, 0.01, 1e-4, "the same"),
        (0.001, 0.01, 1e-4, "another"),
        (0.0026, 1e-5, 1e-2, "not distinguishable"),
    ],
)
def test_a_rate_carries_over_or_not(wide: float, bend: float, noise: float, outcome: str) -> None:
    found = Carried(curve("mup", 64, 0.004), curve("mup", 512, wide, bend, noise))
    assert found.outcome == outcome
    assert ("costs" in str(found)) == (outcome == "another")


@pytest.mark.parametrize(
    ("mup", "standard", "said"),
    [
        (0.004, 0.002, "Verdict: shown, that"),
        (0.002, 0.002, "it does not carry over by maximal updates either"),
        (0.004, 0.004, "in the standard one too"),
    ],
)
def test_every_outcome_is_told(mup: float, standard: float, said: str) -> None:
    curves = [curve(name, 64, 0.004) for name in ("standard", "mup")]
    curves += [curve("standard", 256, standard), curve("mup", 256, mup)]
    assert said in verdict(curves)


def test_a_best_rate_at_the_edge_is_told_and_decides_nothing_that_may_lie_beyond() -> None:
    standard = [curve("standard", 64, 0.004), curve("standard", 256, 0.0005)]
    assert "at the edge of the rates at width 256: widen them" in verdict(standard)
    mup = [curve("mup", 64, 0.004), curve("mup", 256, 0.004)]
    assert "Verdict: shown, that" in verdict([*standard, *mup])  # it is 0.001 or less, and not 0.004
    beyond = [curve("mup", width, 0.06) for width in (64, 256)]
    assert "Verdict: not decided" in verdict([*standard, *beyond])


def test_one_seed_tells_nothing_apart() -> None:
    found = Carried(curve("mup", 64, 0.004, seeds=1), curve("mup", 256, 0.001, seeds=1))
    assert found.outcome == "not distinguishable"
    assert math.isnan(found.wide.spread)


def test_one_seed_decides_nothing_and_no_number_is_made_up() -> None:
    curves = [curve(name, width, 0.004, seeds=1) for name in ("mup", "standard") for width in (64, 256)]
    said = verdict(curves)
    assert said.endswith(
        "Verdict: not decided: one seed does not tell a rate from chance; give --seeds=0,1,2"
    )
    assert "nan" not in said


def test_a_rate_with_a_failed_run_is_never_the_best() -> None:
    losses = np.array([[0.5, 0.5], [0.1, math.nan], [0.6, 0.6]])
    found = Curve("mup", 64, (1.0, 2.0, 4.0), losses)
    assert found.best == 0
    assert found.behind(1).is_clear
    assert "| 2 | failed |" in table([found])
    with pytest.raises(ConfigError, match="take lower rates"):
        _ = Curve("mup", 64, (1.0,), np.array([[math.nan]])).best


def test_every_wider_one_is_compared_with_the_least() -> None:
    curves = [curve("mup", width, 0.004) for width in (256, 64, 128)]
    assert [(c.narrow.width, c.wide.width) for c in carried(curves)] == [(64, 128), (64, 256)]


def test_the_table_marks_the_best_and_what_is_as_good(tmp_path: Path) -> None:
    curves = [curve("mup", 64, 0.004), curve("mup", 256, 0.0028, bend=1e-6, noise=1e-2)]
    text = table(curves)
    assert text.count("**") == 4
    assert " \\* |" in text
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
