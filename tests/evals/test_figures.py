"""The hash of a figure is of what that figure depends on, and of nothing else; rows of older versions compare."""

from __future__ import annotations

from typing import Any

import pytest

from dit.config import ConfigError, to_dict
from dit.evals.figures import hash_of, own_names, protocol_of
from dit.evals.metrics import METRICS
from dit.evals.protocol import protocol_hash

BASE: dict[str, Any] = {
    "features": {"name": "inception", "sha256": "x"},
    "samples": {"images": 50, "chosen": "all", "labels": "none", "sampler": "abc"},
    "reference": {"content": "r", "images": 70},
    "metrics": {},
}
HELD_OUT = {"frechet_ratio", "frechet_held_out"}
ALL = [figure for _, metric in METRICS.items() for figure in metric.figures]


def changed(**parts: Any) -> dict[str, Any]:
    return {**BASE, **parts}


def other_than(protocol: dict[str, Any], base: dict[str, Any] = BASE) -> set[str]:
    """The figures whose hash a protocol changes."""
    names = [*ALL, "class_accuracy", "frechet_ratio", "frechet_held_out"]
    return {name for name in names if protocol_of(name, protocol) != protocol_of(name, base)}


@pytest.mark.parametrize(
    ("parts", "figures"),
    [
        ({"held_out": {"content": "h", "images": 50}}, HELD_OUT),
        ({"metrics": {"neighbours": {**to_dict(METRICS["neighbours"]()), "k": 4}}}, {"precision", "recall"}),
        (
            {"metrics": {"neighbours": {**to_dict(METRICS["neighbours"]()), "density_k": 4}}},
            {"density", "coverage"},
        ),
        (
            {"metrics": {"neighbours": {**to_dict(METRICS["neighbours"]()), "references": 60}}},
            {"precision", "recall", "density", "coverage"},
        ),
        ({"metrics": {"mind": {**to_dict(METRICS["mind"]()), "projections": 10}}}, {"mind"}),
        ({"metrics": {"inception": {**to_dict(METRICS["inception"]()), "splits": 10}}}, {"inception_score"}),
        ({"reference": {"content": "s", "images": 70}}, {*ALL, *HELD_OUT} - {"inception_score"}),
        ({"samples": {**BASE["samples"], "images": 40}}, {*ALL, "class_accuracy", "frechet_ratio"}),
        ({"features": {"name": "inception", "sha256": "y"}}, {*ALL, "class_accuracy", *HELD_OUT}),
    ],
)  # fmt: skip
def test_a_figures_hash_changes_with_what_it_depends_on_alone(
    parts: dict[str, Any], figures: set[str]
) -> None:
    assert other_than(changed(**parts)) == figures


def test_of_a_reference_with_statistics_each_figure_sees_what_it_compares_with() -> None:
    both, alone = (
        changed(reference={**BASE["reference"], "statistics": "m"}),
        changed(reference={"statistics": "m"}),
    )
    assert protocol_of("fid", both) == protocol_of("fid", alone) != protocol_of("fid", BASE)
    assert protocol_of("precision", both) == protocol_of("precision", BASE)


def test_names_of_spaces_have_the_options_of_their_metric() -> None:
    one = changed(metrics={"inception": {"name": "inception", "splits": 10}})
    assert protocol_of("logits_score", one) == protocol_of("inception_score", one)
    assert own_names("fid, logits_score", ["inception"]) == "frechet,inception_score"
    with pytest.raises(ConfigError, match="sfid is computed with Inception's"):
        own_names("sfid", ["inception", "pixels"])


def test_a_plain_figures_hash_is_that_of_the_rows_that_older_versions_wrote() -> None:
    row = {"protocol": BASE, "hash": protocol_hash(BASE), "figures": {"fid": 1.0}}
    assert hash_of("fid", row) == row["hash"]
    with_more = changed(
        held_out={"content": "h", "images": 50}, metrics={"mind": {"name": "mind", "seed": 1}}
    )
    assert hash_of("fid", {"protocol": with_more, "hash": protocol_hash(with_more)}) == row["hash"]


def test_of_what_is_no_protocol_of_ours_the_hash_on_file_counts() -> None:
    assert hash_of("fid", {"protocol": {"features": "pixels"}, "hash": "aa"}) == "aa"
    assert hash_of("fid", {"hash": "aa"}) == "aa"
    unknown = changed(metrics={"mind": {"name": "mind", "seed": 1}})
    assert protocol_of("from_a_newer_version", unknown) == unknown


def test_given_features_score_does_not_depend_on_the_other_set() -> None:
    given = {
        "features": "given",
        "reference": "r",
        "samples": {"generated": 9, "reference": 8},
        "dimensions": 4,
    }
    other = {
        "features": "given",
        "reference": "s",
        "samples": {"generated": 9, "reference": 7},
        "dimensions": 4,
    }
    assert protocol_of("inception_score", given) == protocol_of("inception_score", other)
    assert protocol_of("frechet", given) != protocol_of("frechet", other)
