"""All figures together: the reference's numbers, what is refused, intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dit.config import ConfigError
from dit.data import DataError
from dit.evals.metrics import METRICS, FeatureSet, Metric, Statistics
from dit.evals.metrics.measuring import LEAST, choose_metrics, measure
from dit.evals.metrics.mind import Mind
from dit.evals.metrics.resampling import Resampling, interval
from tests.gaussian import golden

EACH = [name for name, _ in METRICS.items()]


def made(n: int, shift: float, seed: int, d: int = 4) -> FeatureSet:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) + shift
    return FeatureSet(x, rng.normal(size=(n, 5)) + 2 * x[:, :1] * np.arange(5), x[:, :3] ** 3)


def test_the_references_numbers() -> None:
    held = golden("metrics")
    generated, reference = FeatureSet(held["generated"], held["logits"]), FeatureSet(held["reference"])
    chosen, missing = choose_metrics("all", {}, generated, reference)
    found = measure(chosen, generated, reference).as_json()
    names = {"frechet", "kid", "precision", "recall", "density", "coverage", "mind", "inception_score"}
    assert {name for name, value in found.items() if isinstance(value, float)} == names
    for name in names - {"mind"}:
        assert found[name] == pytest.approx(float(held[name]), rel=1e-6), name
    assert found["mind"] == pytest.approx(8.853426, rel=1e-5)  # by its fixed directions
    assert missing == {}


# --- protocol and choice -------------------------------------------------------------------------------------------


def test_the_protocol_has_each_field_and_the_counts() -> None:
    a, b = made(30, 0, 0), made(40, 1, 1)
    first = measure({"mind": Mind(projections=3)}, a, b, identity={"features": "given"})
    assert first.protocol == {
        "features": "given",
        "samples": {"generated": 30, "reference": 40},
        "dimensions": 4,
        "metrics": {"mind": {"name": "mind", "projections": 3, "seed": 0, "scale": 3.0}},
    }
    others = [({"mind": Mind(projections=3, seed=1)}, b), ({"mind": Mind(projections=3)}, made(41, 1, 1))]
    assert len({first.hash, *(measure(m, a, r, identity={"features": "given"}).hash for m, r in others)}) == 3
    again = measure({"mind": Mind(projections=3)}, a, b, Resampling(LEAST), {"features": "given"})
    assert again.hash == first.hash  # how wide an interval is taken is no part of the figure
    json.dumps(again.as_json(), allow_nan=False)


def test_figures_are_chosen_by_their_names_and_their_metrics() -> None:
    a, b = FeatureSet(made(9, 0, 0).features), made(9, 0, 1)
    assert list(choose_metrics("coverage, kid", {}, a, b)[0]) == ["kid", "neighbours"]
    chosen, missing = choose_metrics("all", {"mind.projections": "7", "neighbours_k": "2"}, a, b)
    assert chosen["mind"] == Mind(projections=7)
    assert chosen["neighbours"] == METRICS["neighbours"](k=2)  # type: ignore[call-arg]
    assert missing == {"inception_score": "needs logits"}
    assert "frechet_spatial" not in chosen
    assert "frechet_spatial" in choose_metrics("all", {}, b, b)[0]
    of_statistics = choose_metrics("all", {}, b, Statistics.fit(b.features))[0]
    assert {"frechet", "inception"} <= set(of_statistics) <= {"frechet", "inception", "frechet_spatial"}
    for wanted, keys, says in (
        ("freschet", {}, "unknown figure 'freschet'; did you mean frechet?"),
        ("kid", {"mind.seed": "1"}, "mind is measured alone"),
        ("all", {"mind.seeds": "1"}, "seeds: unknown key; did you mean seed?"),
        ("all", {"mind.projections": "0"}, "projections: "),
        (" ,", {}, "no figure"),
    ):
        with pytest.raises(ConfigError, match=says):
            choose_metrics(wanted, keys, a, b)


# --- what is refused -----------------------------------------------------------------------------------------------


def altered(value: float) -> np.ndarray:
    x = made(9, 0, 0).features.copy()
    x[4, 1] = value
    return x


BAD = {
    "one dimension": ({"features": np.ones(5)}, r"shape \(5,\), float64; expected a row of numbers"),
    "images": ({"features": np.zeros((2, 4, 4, 3), np.uint8)}, "these look like images"),
    "integers": ({"features": np.arange(8).reshape(4, 2)}, "int64; expected floating point"),
    "objects": ({"features": np.array([["a", {}]], object)}, "object; expected floating point"),
    "complex": ({"features": np.ones((4, 2), complex)}, "complex128; expected floating point"),
    "none": ({"features": np.ones((0, 2))}, "there are none"),
    "nan": ({"features": altered(np.nan)}, r"features of 1 of 9 samples are not finite, first in row 4"),
    "inf": ({"features": altered(-np.inf)}, "not finite, first in row 4"),
    "constant": ({"features": np.ones((5, 3))}, "the same for all 5 samples"),
    "other logits": (
        {"features": np.eye(4), "logits": np.eye(3)},
        "logits of shape .3, 3., float64, but 4 samples",
    ),
    "logits' nan": ({"features": np.eye(4), "logits": np.full((4, 2), np.nan)}, "logits of 4 of 4"),
}


@pytest.mark.parametrize(("arrays", "says"), BAD.values(), ids=BAD.keys())
def test_arrays_that_are_no_features(arrays: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(DataError, match=f"(?s)mine: .*{says}"):
        FeatureSet(**arrays, name="mine")


@pytest.mark.parametrize("name", EACH)
def test_each_metric_refuses_what_it_cannot_see(name: str) -> None:
    metric = METRICS[name]()
    a, b = made(9, 0, 0), made(9, 0, 1)
    assert set(metric(a, b)) == set(metric.figures)
    if metric.looks_at_reference:
        narrow = FeatureSet(b.features[:, :2], spatial=b.spatial[:, :1])
        with pytest.raises(DataError, match="dimensions, the reference of"):
            metric(a, narrow)
    if not metric.takes_statistics:
        with pytest.raises(DataError, match="there are their mean and covariance alone"):
            metric(a, Statistics.fit(b.features))
    few = FeatureSet(a.features[:1], a.logits[:1], a.spatial[:1], name="few")
    with pytest.raises(DataError, match=r"few: 1 sample\(s\)"):
        metric(few, b)


def test_nothing_is_computed_where_one_figure_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(METRICS["kid"], "values", fail)
    with pytest.raises(DataError, match="needs logits"):
        measure(
            {"kid": METRICS["kid"](), "i": METRICS["inception"]()},
            FeatureSet(np.eye(3)),
            FeatureSet(np.eye(3)),
        )


# --- intervals -----------------------------------------------------------------------------------------------------


def test_resamples_are_of_the_sets_size_and_depend_on_the_seed_alone() -> None:
    drawn = Resampling(50, 3).counts(0, 40)
    assert drawn.shape == (51, 40)
    assert (drawn[0] == 1).all()
    assert (drawn.sum(1) == 40).all()
    np.testing.assert_array_equal(drawn[:11], Resampling(10, 3).counts(0, 40))
    assert (drawn != Resampling(50, 3).counts(1, 40)).any()
    assert (drawn != Resampling(50, 4).counts(0, 40)).any()
    assert drawn[1:].var() == pytest.approx(1 - 1 / 40, rel=0.1)  # of a multinomial's counts


def test_interval_is_of_quantiles_moved_where_resamples_are_shifted() -> None:
    values = np.concatenate([[10.0], np.linspace(0, 4, 401)])
    assert interval(values, False) == pytest.approx((0.1, 3.9))
    assert interval(values, True) == pytest.approx((8.1, 11.9))


@pytest.mark.parametrize("name", EACH)
def test_a_metric_without_resamples_is_the_same_and_its_interval_holds_the_figure(name: str) -> None:
    a, b = made(30, 0, 0), made(25, 1, 1)
    metrics = {name: METRICS[name]()}
    plain, drawn = measure(metrics, a, b), measure(metrics, a, b, Resampling(40))
    assert drawn.figures == pytest.approx(plain.figures, rel=1e-12)
    assert plain.intervals == {}
    for figure, (lower, upper) in drawn.intervals.items():
        assert lower <= drawn.figures[figure] <= upper
        assert lower < upper or figure in ("recall", "coverage", "precision")
    assert figure in drawn.table()


def test_too_few_resamples_for_an_interval() -> None:
    with pytest.raises(ConfigError, match="bootstrap is 5; expected 0"):
        measure({}, made(9, 0, 0), made(9, 0, 1), Resampling(5))


@pytest.mark.parametrize("name", ["frechet", "kid", "mind", "inception"])
def test_intervals_hold_the_expected_figure_about_as_often_as_they_say(name: str) -> None:
    """Of 60 pairs of sets of Gaussians; the expectation is the mean over 150 others. 95% of them would be 57."""
    metric: Metric = Mind(projections=10) if name == "mind" else METRICS[name]()
    figure = metric.figures[0]
    expected = np.mean([metric(made(60, 0.5, 2 * s), made(70, 0, 2 * s + 1))[figure] for s in range(150)])
    held = 0
    for s in range(1000, 1060):
        found = measure({name: metric}, made(60, 0.5, 2 * s), made(70, 0, 2 * s + 1), Resampling(60, s))
        lower, upper = found.intervals[figure]
        held += lower <= expected <= upper
    assert 48 <= held <= 60


def test_features_too_large_for_a_figure_are_refused() -> None:
    ours, theirs = FeatureSet(made(20, 0, 0).features * 1e150), FeatureSet(made(30, 1, 1).features)
    with (
        pytest.raises(DataError, match=r"kid of these features is no finite number.*e\+15"),
        np.errstate(all="ignore"),
    ):
        measure({"kid": METRICS["kid"]()}, ours, theirs)


def test_a_scale_is_finite() -> None:
    ours = made(20, 0, 0)
    with pytest.raises(ConfigError, match="scale"):
        choose_metrics("mind", {"mind.scale": "inf"}, ours, ours)
