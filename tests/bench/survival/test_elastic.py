"""The elastic chain: its links, its figures, and a small one of real runs."""

import pytest

from dit.bench.survival.elastic import ElasticBench, Link, figures, links, run, table
from dit.config import ConfigError, from_dict

CHAIN = [Link(1, 1, 0, 2), Link(2, 3, 2, 4)]


def rows(*losses):
    return [
        {"step": s, "batch_hash": s, "loss": loss, "grad_norm": 1.0, "lr": 1e-4, "updates": s, "skipped": 0}
        for s, loss in enumerate(losses, 1)
    ]


def test_links_of_the_promise():
    assert links(ElasticBench()) == [
        Link(1, 1, 0, 12),
        Link(2, 3, 12, 25),
        Link(4, 2, 25, 38),
        Link(2, 0, 38, 50),
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ranks": (1, 2)}, "as many ranks as stages"),
        ({"steps": 3}, "at least as many steps"),
        ({"ranks": (1, 2, 5, 2)}, "ranks must divide"),
        ({"stages": (1, 3, 2, 4)}, "stages be 0 to 3"),
    ],
)
def test_settings_that_make_no_sense(given, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(ElasticBench, given)


def test_figures_of_the_same_losses():
    found = figures(rows(4, 3, 2, 1), rows(4, 3, 2, 1), CHAIN)
    assert (found["problems"], found["loss"]) == ([], 0)


def test_a_loss_beyond_the_bound_is_named_by_its_link():
    found = figures(rows(4, 3.00001, 2, 1.00002), rows(4, 3, 2, 1), CHAIN)
    assert [link["loss"] for link in found["links"]] == pytest.approx([1e-5 / 3, 2e-5])
    assert found["problems"] == [
        "steps 3 to 4, 2 ranks, stage 3: the loss differs by 2e-05 relative (at most 1e-05)"
    ]
    assert "not as promised" in table(found)


def test_a_loss_that_is_no_number_is_beyond_the_bound():
    for bad in (float("nan"), None):  # None is what is logged of it
        for ours, theirs in (((4, 3, 2, bad), (4, 3, 2, 1)), ((4, 3, 2, 1), (4, 3, bad, 1))):
            found = figures(rows(*ours), rows(*theirs), CHAIN)
            assert found["loss"] == float("inf")
            assert "2 ranks, stage 3: the loss differs by inf" in found["problems"][0]


def test_other_batches_and_other_steps_are_named():
    ours = rows(4, 3, 2, 1)
    ours[2]["batch_hash"] = 7
    assert "batch_hash at step 3 is 7" in figures(ours, rows(4, 3, 2, 1), CHAIN)["problems"][0]
    assert figures(rows(4, 3, 2), rows(4, 3, 2, 1), CHAIN)["problems"] == ["metrics.jsonl: step 4 is missing"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_chain(tmp_path):
    ticks = []
    cfg = ElasticBench(steps=6, ranks=(1, 2), stages=(3, 1))
    found = run(tmp_path, cfg, lambda: ticks.append(1))
    assert found["problems"] == []
    assert len(ticks) == 3
    assert [(k["ranks"], k["stage"], k["last"]) for k in found["links"]] == [(1, 3, 3), (2, 1, 6)]
    assert found["links"][1]["loss"] <= 1e-5
    assert "batch_hash the same at every step" in table(found)
