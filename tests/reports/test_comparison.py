"""Runs beside each other: what their files tell, where they part, which is better by what, and the page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit.config import merge
from dit.configfile import write_yaml
from dit.errors import Notice, UserError
from dit.evals import record
from dit.evals.pictures.choice import sampler_hash
from dit.experiments.diffusion import Experiment
from dit.outputs import OutputError
from dit.reports.comparison import Comparison, Contest, Measured, parting
from dit.reports.curves import AXES, at, panels, thinned
from dit.reports.page import as_page, as_text, write_page
from dit.reports.told import RunTold, read_all, told_apart

FLOPS = 2e6


def made(
    folder: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None, **files: Any
) -> Path:
    """A run directory as training leaves it. files: rows of held_out, evaluations."""
    folder.mkdir(parents=True)
    base = {"run_dir": str(folder), "train": {"steps": 100, "global_batch": 8}, "data": {"path": "latents"}}
    write_yaml(folder / "config.yaml", to_experiment(merge(base, config or {})))
    lines = {"metrics": rows, "history": [{"ranks": 1, "flops_per_sample": FLOPS}], **files}
    for name, given in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return folder


def to_experiment(values: dict[str, Any]) -> Experiment:
    from dit.config import from_dict

    return from_dict(Experiment, values)


def steps(count: int = 4, **changed: dict[int, Any]) -> list[dict[str, Any]]:
    """Rows of every tenth step; changed: key -> {step: value}."""
    rows = []
    for step in range(10, 10 * count + 1, 10):
        row = {
            "step": step,
            "samples": 8 * step,
            "loss": 1 / step,
            "images_per_s": 40.0,
            "batch_hash": 7 * step,
        }
        rows.append(row | {"grad_norm": 0.5} | {key: at[step] for key, at in changed.items() if step in at})
    return rows


def figure(
    step: int, value: float, digest: str = "abc", ends: tuple[float, float] | None = None, **protocol: Any
):
    intervals = {} if ends is None else {"frechet": list(ends)}
    return {
        "step": step,
        "figures": {"frechet": value},
        "intervals": intervals,
        "protocol": protocol,
        "hash": digest,
    }


def test_what_is_told_is_counted_from_the_files_alone(tmp_path: Path) -> None:
    run = RunTold.read(made(tmp_path / "a", steps()))
    assert run.name == "a"
    assert run.flops_per_sample == FLOPS
    assert run.seconds == pytest.approx([2.0, 4.0, 6.0, 8.0])  # 80 samples at 40 a second, four times
    assert run.seconds_at([0, 15, 40]) == pytest.approx([0.0, 3.0, 8.0])
    assert at("samples", run, [10]) == [80]
    assert at("flops", run, [10]) == [80 * FLOPS]
    assert run.config["optim.lr"] == 1e-4  # a default


def test_a_line_that_a_kill_has_cut_off_ends_the_rows(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", steps())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "los')
    assert [row["step"] for row in RunTold.read(folder).steps] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("mine", "theirs", "step", "what"),
    [
        ({}, {}, None, "the same in all 4 logged steps"),
        ({}, {"batch_hash": {30: 1}}, 30, "other batches from step 30 on"),
        ({}, {"loss": {20: 1 / 20 * (1 + 1e-3)}}, 20, "the same batches; losses part at step 20, by 0.001"),
        ({}, {"loss": {20: 1 / 20 * (1 + 1e-7)}}, None, "the same"),
        ({}, {"loss": {40: None}}, 40, "where one is not finite"),
        ({"loss": {20: None}}, {"loss": {20: None}}, None, "the same"),
        ({}, {"loss": {10: 2.0}, "batch_hash": {10: 1}}, 10, "other batches"),
    ],
)
def test_runs_part_at_the_first_step_that_differs(
    tmp_path: Path, mine: dict[str, Any], theirs: dict[str, Any], step: int | None, what: str
) -> None:
    a, b = made(tmp_path / "a", steps(**mine)), made(tmp_path / "b", steps(**theirs))
    found = parting(RunTold.read(a), RunTold.read(b))
    assert found.step == step
    assert what in str(found)


def test_steps_that_one_alone_has_logged_are_not_compared(tmp_path: Path) -> None:
    odd = [{**row, "step": row["step"] + 1} for row in steps()]
    a, b = RunTold.read(made(tmp_path / "a", steps())), RunTold.read(made(tmp_path / "b", odd))
    assert "no step in common" in str(parting(a, b))


def test_keys_that_differ_come_with_those_that_make_another_run_first(tmp_path: Path) -> None:
    a = made(tmp_path / "a", steps())
    b = made(tmp_path / "b", steps(), {"train": {"micro_batch": 4}, "objective": {"path": "vp"}, "seed": 3})
    found = Comparison(read_all([str(a), str(b)]))
    names = [row.key for row in found.differences]
    assert names.index("seed") < names.index("train.micro_batch")
    assert "run_dir" not in names
    assert "objective.path.name" in found.unlike
    assert "seed" not in found.unlike
    assert "their training losses say nothing: objective.path" in as_text(found)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (
            (3.0, (2.9, 3.1)),
            (4.0, (3.8, 4.2)),
            "a is best by frechet (lower is better): 3 against 4 of b, 25% lower than that",
        ),
        ((3.0, (2.9, 3.1)), (4.0, (3.8, 4.2)), "their intervals do not touch"),
        ((3.9, (3.7, 4.1)), (4.0, (3.8, 4.2)), "it may be chance"),
        ((5.0, None), (4.0, None), "b is best by frechet"),
    ],
)
def test_the_better_run_is_named_and_whether_that_may_be_chance(
    tmp_path: Path, first: tuple[float, Any], second: tuple[float, Any], said: str
) -> None:
    a = made(tmp_path / "a", steps(), evaluations=[figure(20, 9.0), figure(40, first[0], ends=first[1])])
    b = made(tmp_path / "b", steps(), evaluations=[figure(40, second[0], ends=second[1])])
    (contest,) = Comparison(read_all([str(a), str(b)])).contests
    assert said in str(contest)
    assert ("interval" in str(contest)) == (first[1] is not None)


def test_more_precision_is_better(tmp_path: Path) -> None:
    rows = [
        {"step": 40, "features": "pixels", "figures": {"precision": p}, "protocol": {}, "hash": "h"}
        for p in (0.4, 0.6)
    ]
    a, b = (made(tmp_path / name, steps(), evaluations=[row]) for name, row in zip("ab", rows, strict=True))
    (contest,) = Comparison(read_all([str(a), str(b)])).contests
    assert "b is best by precision (pixels) (higher is better)" in str(contest)


def test_unlike_protocols_are_not_put_side_by_side_but_named(tmp_path: Path) -> None:
    a = made(tmp_path / "a", steps(), evaluations=[figure(40, 3.0, "abc", reference="x")])
    b = made(tmp_path / "b", steps(), evaluations=[figure(40, 4.0, "def", reference="y")])
    found = Comparison(read_all([str(a), str(b)]))
    assert found.contests == []
    (line,) = found.not_comparable
    assert "protocols abc and def: reference 'x' and 'y'" in line
    assert "nothing here says which is better" in as_text(found)
    assert len([p for p in panels(found) if p.title == "frechet"]) == 2


def test_unlike_samplers_are_told_apart_by_their_settings(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"features": {"name": "pixels"}, "reference": {"content": "r"}, "metrics": {}}
    rows = []
    for scale in (1.5, 2.0):
        spec = {"sampler": {"cfg_scale": scale, "num_steps": 8, "seed": 3}, "classes": [0]}
        samples = {"images": 50, "sampler": sampler_hash(spec)}
        beside = {"features": "pixels", "weights": "ema", "time": "2026-01-02T03:04"}
        rows.append(figure(40, 3.0, **parts, samples=samples) | beside | record.drawn_by(spec))
    a, b = (made(tmp_path / name, steps(), evaluations=[row]) for name, row in zip("ab", rows, strict=True))
    (line,) = Comparison(read_all([str(a), str(b)])).not_comparable
    assert line.endswith(": sampler.cfg_scale 1.5 and 2.0)")
    record.append(a, [rows[1]])
    assert "sampler.cfg_scale: 1.5 in the first, 2.0 here" in "\n".join(record.history(a))
    old = {key: value for key, value in rows[0].items() if key != "sampler"}
    c = made(tmp_path / "c", steps(), evaluations=[old])
    (line,) = Comparison(read_all([str(b), str(c)])).not_comparable
    assert "samples.sampler (a hash; an older version recorded no settings) '" in line


@pytest.mark.parametrize(
    ("best", "second", "order", "said"),
    [
        (0.1, 1.1, "lower", "91% lower than that"),
        (0.5, 0.4, "higher", "25% higher than that"),
        (0.9, 0.4, "higher", "0.5 higher"),
        (-0.0001, 0.0003, "lower", "0.0004 lower"),
        (-0.0003, -0.0001, "lower", "0.0002 lower"),
        (0.0, 0.5, "lower", "0.5 lower"),
    ],
)
def test_a_lead_is_a_share_of_the_second_where_that_has_a_meaning(
    best: float, second: float, order: str, said: str
) -> None:
    runs = [SimpleNamespace(name=name, batch=1) for name in "ab"]
    figure = "kid (pixels)" if order == "lower" else "recall"
    pair = [Measured(r, figure, "x", 2, v) for r, v in zip(runs, (best, second), strict=True)]  # type: ignore[arg-type]
    assert str(Contest.of(pair)).endswith(f" of b, {said}")


def test_held_out_losses_of_unlike_protocols_say_what_that_may_come_from(tmp_path: Path) -> None:
    rows = [[{"step": 40, "loss": 0.5, "protocol": protocol}] for protocol in ("p", "q")]
    a, b = (made(tmp_path / name, steps(), held_out=row) for name, row in zip("ab", rows, strict=True))
    (line,) = Comparison(read_all([str(a), str(b)])).not_comparable
    assert "protocols p and q: other held-out data, val.samples or objective, or an older version's" in line


def test_figures_at_different_steps_are_said_to_be(tmp_path: Path) -> None:
    rows = [[{"step": step, "loss": loss, "protocol": "p"}] for step, loss in ((40, 0.5), (20, 0.6))]
    a, b = (made(tmp_path / name, steps(), held_out=row) for name, row in zip("ab", rows, strict=True))
    (contest,) = Comparison(read_all([str(a), str(b)])).contests
    assert contest.alike.figure == "held-out loss"
    assert "at steps 40 and 20, which are not the same amount of training" in str(contest)


def test_weights_of_another_kind_are_not_put_side_by_side(tmp_path: Path) -> None:
    ema, model = figure(40, 3.0) | {"weights": "ema"}, figure(40, 1.0) | {"weights": "model"}
    a = made(tmp_path / "a", steps(), evaluations=[ema, model])
    b = made(tmp_path / "b", steps(), evaluations=[figure(40, 2.0) | {"weights": "ema"}])
    c = made(tmp_path / "c", steps(), evaluations=[model])
    (contest,) = Comparison(read_all([str(a), str(b)])).contests
    assert "b is best by frechet (lower is better): 2 against 3 of a" in str(contest)
    (contest,) = Comparison(read_all([str(a), str(c)])).contests
    assert "are equal by frechet of model weights" in str(contest)
    found = Comparison(read_all([str(b), str(c)]))
    assert (found.contests, len(found.not_comparable)) == ([], 1)
    assert "of ema and model weights" in found.not_comparable[0]


def test_runs_are_compared_after_as_many_samples_where_they_can_be(tmp_path: Path) -> None:
    a = made(tmp_path / "a", steps(), evaluations=[figure(20, 5.0), figure(40, 1.0)])
    b = made(tmp_path / "b", steps(), evaluations=[figure(20, 4.0)])
    double = {"train": {"steps": 100, "global_batch": 16}}
    c = made(tmp_path / "c", steps(), double, evaluations=[figure(20, 2.0)])
    (contest,) = Comparison(read_all([str(a), str(b)])).contests
    assert "b is best by frechet (lower is better): 4 against 5 of a" in str(contest)
    (contest,) = Comparison(read_all([str(a), str(c)])).contests
    assert "1 against 2 of c" in str(contest)
    assert "not the same amount" not in str(contest)
    (contest,) = Comparison(read_all([str(b), str(c)])).contests
    assert "at steps 20 and 20 of 16 and 8 samples, which are not the same amount of training" in str(contest)


def test_the_distance_of_real_images_is_no_figure_of_a_run(tmp_path: Path) -> None:
    rows = [figure(40, value) for value in (3.0, 4.0)]
    for row in rows:
        row["figures"]["frechet_held_out"] = 2.0
    a, b = (made(tmp_path / name, steps(), evaluations=[row]) for name, row in zip("ab", rows, strict=True))
    assert [c.alike.figure for c in Comparison(read_all([str(a), str(b)])).contests] == ["frechet"]


def test_evaluations_behind_one_that_a_kill_has_cut_off_are_read(tmp_path: Path) -> None:
    folder = made(tmp_path / "a", steps(), evaluations=[figure(20, 5.0)])
    with (folder / record.FILE).open("a") as file:
        file.write('{"step": 30, "figu')
    record.append(folder, [figure(40, 3.0)])
    with pytest.warns(Notice, match="line 2"):
        assert [row["step"] for row in RunTold.read(folder).evaluations] == [20, 40]


def test_figures_that_are_no_numbers_are_none_and_a_row_that_is_cut_off_is_left_out(tmp_path: Path) -> None:
    """NaN and Infinity as other programs write them, which are no JSON: a loss that diverged is not the same loss."""
    rows = [figure(20, 5.0) | {"intervals": {"frechet": [1.0, math.inf]}}, figure(40, math.nan)]
    a = made(
        tmp_path / "a", steps(loss={30: math.nan, 40: math.inf}, grad_norm={40: -math.inf}), evaluations=rows
    )
    b = made(
        tmp_path / "b", steps(), evaluations=[figure(20, 6.0)], held_out=[{"step": 20, "loss": math.nan}]
    )
    for file in (a / "metrics.jsonl", a / record.FILE, b / "held_out.jsonl"):
        with file.open("a") as log:
            log.write('{"step": 50, "loss": Na')
    with pytest.warns(Notice, match="line 3 is not a row"):
        found = Comparison(read_all([str(a), str(b)]))
    assert [row["loss"] for row in found.runs[0].steps] == [0.1, 0.05, None, None]
    assert str(found.partings[0][1]) == "the same batches; losses part at step 30, where one is not finite"
    (contest,) = found.contests
    assert [(one.run.name, one.step, one.interval) for one in contest.standings] == [
        ("a", 20, None),
        ("b", 20, None),
    ]
    assert "not finite" in as_text(found)
    assert not re.search(r"\b(nan|NaN|inf|Infinity)\b", as_page(found))
    with pytest.warns(Notice, match="line 3 is not a row"):
        lines = record.history(a)
    assert [line.strip() for line in lines if "step" in line] == [
        "step 20, weights not told: frechet 5",
        "step 40, weights not told: frechet not finite",
    ]


def test_thinning_keeps_the_mean_of_every_stretch() -> None:
    x, y = thinned(range(1000), [float(i % 2) for i in range(1000)], points=100)
    assert len(x) == 100
    assert y == [0.5] * 100
    assert x[0] == 4.5


class Reading(HTMLParser):
    """Asks for nothing from elsewhere, and closes what it opens."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "input", "br", "link"):
            self.open.append(tag)
        self.asked += [value or "" for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_nothing_else_and_shows_no_name_as_markup(tmp_path: Path) -> None:
    a = made(tmp_path / "<b>", steps(), evaluations=[figure(40, 3.0)])
    b = made(
        tmp_path / "other",
        steps(),
        {"codec": {"name": "vae", "path": "<script>"}},
        evaluations=[figure(40, 4.0)],
    )
    page = as_page(Comparison(read_all([str(a), str(b)])))
    reading = Reading()
    reading.feed(page)
    assert reading.open == []
    assert not [text for text in reading.asked if not text.startswith("#")]
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == len(AXES) * page.count("<figure>")
    assert re.search(r"&lt;b&gt; is best by frechet", page)


def test_a_page_of_the_same_runs_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    runs = [str(made(tmp_path / name, steps())) for name in "abc"]
    page = tmp_path / "pages" / "ab.html"
    write_page(Comparison(read_all(runs[:2])), page)
    write_page(Comparison(read_all(runs[:2])), page)
    with pytest.raises(OutputError, match="holds something else"):
        write_page(Comparison(read_all(runs[1:])), page)
    write_page(Comparison(read_all(runs[1:])), page, overwrite=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{a}"], "two runs or more"),
        (["{a}", "{a}/."], "given twice"),
        (["x={a}", "x={b}"], "two runs are called x"),
        (["{a}", "{none}"], "no run directory"),
        (["{a}", "{empty}"], "has logged no step yet"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, given: list[str], said: str) -> None:
    places = {"a": made(tmp_path / "a", steps()), "b": made(tmp_path / "b", steps())}
    places |= {"none": tmp_path / "none", "empty": made(tmp_path / "empty", [])}
    with pytest.raises(UserError, match=said):
        read_all([word.format(**places) for word in given])


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert told_apart([Path("/r/x/dit"), Path("/r/y/dit"), Path("/r/z")]) == ["x/dit", "y/dit", "z"]


def test_a_run_of_an_older_version_is_compared_by_what_its_file_says(tmp_path: Path) -> None:
    a, b = made(tmp_path / "a", steps()), made(tmp_path / "b", steps())
    with (b / "config.yaml").open("a") as file:
        file.write("\nfrom_before: 3\n")
    names = [row.key for row in Comparison(read_all([str(a), str(b)])).differences]
    assert "from_before" in names
    assert "train.steps" not in names


def test_of_equal_figures_none_is_best() -> None:
    runs = [SimpleNamespace(name=name, batch=1) for name in "ab"]
    said = str(Contest.of([Measured(run, "kid (pixels)", "x", 2, 0.5) for run in runs]))  # type: ignore[arg-type]
    assert said == "a and b are equal by kid (pixels): 0.5"
