"""Reading runs: what is used, and what is named and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit.errors import UserError
from dit.scaling.laws.table import Runs
from tests.scaling.laws.surfaces import CHINCHILLA, HOFFMANN, Grid, table, write

Rows = list[dict[str, Any]]
TOKENS = 256  # of an image


def rows(**more: Any) -> Rows:
    """Eight runs of a law, as `collect` writes them."""
    made = table(HOFFMANN, Grid(4, 2))
    for number, row in enumerate(made):
        row |= {
            "run": f"r{number}",
            "tokens": row["flops"] / 6 / row["params"],
            "seed": 0,
            "complete": "true",
        }
        row |= {"samples": row["tokens"] / TOKENS, "metric": "loss", "protocol": "p1", **more}
    return made


def at(number: int, **cells: Any) -> Callable[[Rows], Rows]:
    """Change a row's cells."""
    return lambda made: [row | (cells if i == number else {}) for i, row in enumerate(made)]


def without(*names: str) -> Callable[[Rows], Rows]:
    """Leave columns out."""
    return lambda made: [{key: cell for key, cell in row.items() if key not in names} for row in made]


def renamed(name: str, new: str) -> Callable[[Rows], Rows]:
    """Call a column something else."""
    return lambda made: [{new if key == name else key: cell for key, cell in row.items()} for row in made]


def test_what_is_read(tmp_path: Path) -> None:
    runs = Runs.read(write(tmp_path / "runs.csv", rows()))
    assert runs.run == [f"r{i}" for i in range(8)]
    np.testing.assert_allclose(runs.flops, 6 * runs.params * runs.tokens)
    assert runs.flops_per_param_token == pytest.approx(6)
    assert runs.tokens_per_sample == pytest.approx(TOKENS)
    assert runs.choice == {"metric": "loss", "protocol": "p1"}
    assert runs.notes == []


def test_tokens_are_derived_and_that_is_said() -> None:
    runs = Runs.read(CHINCHILLA)
    assert len(runs) == 245
    np.testing.assert_allclose(runs.tokens, runs.flops / (6 * runs.params))
    assert runs.notes == ["no column `tokens`: they are flops / (6 · params)"]
    assert runs.run[0] == "line 3"  # below its comment and header


def test_runs_that_are_not_complete_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    made = at(3, complete="False", loss="")(rows())
    runs = Runs.read(write(tmp_path / "runs.csv", made))
    assert len(runs) == 7
    assert runs.notes == ["not complete and left out: 1 run (line 5)"]


def test_one_of_several_metrics_and_protocols_is_chosen(tmp_path: Path) -> None:
    other = [row | {"metric": "fid", "loss": row["loss"] * 10} for row in rows()]
    newer = [row | {"protocol": "p2", "loss": "nan"} for row in rows()]  # what is not chosen is not looked at
    file = write(tmp_path / "runs.csv", rows() + other + newer)
    runs = Runs.read(file, "loss", "p1")
    np.testing.assert_array_equal(runs.loss, [row["loss"] for row in rows()])
    assert Runs.read(file, "fid").choice == {"metric": "fid", "protocol": "p1"}
    with pytest.raises(
        UserError, match=r"2 metrics.*'loss' \(16 rows\), 'fid' \(8 rows\)\. Choose with --metric="
    ):
        Runs.read(file)
    with pytest.raises(
        UserError, match=r"2 protocols.*'p1' \(8 rows\), 'p2' \(8 rows\)\. Choose with --protocol="
    ):
        Runs.read(file, "loss")
    with pytest.raises(UserError, match=r"has no protocol 'p3': there are 'p1'"):
        Runs.read(file, "loss", "p3")
    with pytest.raises(UserError, match="has no metric 'fid': there is no such column"):
        Runs.read(CHINCHILLA, "fid")


FAULTS: dict[str, tuple[Callable[[Rows], Rows], str]] = {
    "no loss": (without("loss"), "column loss missing; there are params, flops, run"),
    "neither": (without("loss", "params"), "columns params, loss missing"),
    "a near name": (renamed("loss", "losss"), "did you mean"),
    "a capital": (renamed("params", "Params"), "column 'Params' is to be written params"),
    "a space": (renamed("flops", " flops"), "column ' flops' is to be written flops"),
    "NaN": (at(2, loss="nan"), r"line 4: loss is not finite \('nan'\); mend the cell"),
    "infinite": (at(2, flops="inf"), "line 4: flops is not finite"),
    "negative": (at(0, loss=-1.5), r"line 2: loss is not above 0 \('-1.5'\)"),
    "no parameters": (at(7, params=0), "line 9: params is not above 0"),
    "a word": (at(1, loss="diverged"), r"line 3: loss is no number \('diverged'\)"),
    "an empty cell": (at(1, tokens=""), "line 3: tokens is empty"),
    "a decimal comma": (at(1, loss='"2,5"'), r"line 3: loss is no number \('2,5'\)"),
    "several rows": (lambda made: [row | {"loss": 0} for row in made], "lines 2, 3, 4, 5, 6 and 3 more: loss"),
    "the same run": (lambda made: [*made, made[2]], "lines 4 and 10 are the same run"),
    "the same run in other digits": (
        lambda made: [*made, made[2] | {"flops": f"{made[2]['flops']:.14e}"}],
        "lines 4 and 10 are the same run",
    ),
    "the same name": (at(5, run="r1"), r"lines 3 and 7 have the same `run` \(r1\)"),
    "a number in Python's way": (at(1, loss="2_5"), r"line 3: loss is no number \('2_5'\)"),
    "digits of another script": (at(1, loss="\u0663"), "line 3: loss is no number"),
    "beyond all units": (at(2, loss=1e-300), r"line 4: loss is beyond 1e-36 to 1e\+36"),
    "millions of parameters": (
        lambda made: without("tokens", "samples")([row | {"params": row["params"] / 1e6} for row in made]),
        r"lines 2, .*flops / \(6 · params\) is .* tokens a parameter: .* not in thousands or millions",
    ),
    "one in millions": (
        lambda made: without("tokens", "samples")(at(3, params=made[3]["params"] / 1e6)(made)),
        r"line 5: flops / \(6 · params\) is .* tokens a parameter",
    ),
    "billions throughout": (
        lambda made: [
            row | {"params": row["params"] / 1e9, "tokens": row["tokens"] / 1e9, "flops": row["flops"] / 1e18}
            for row in without("samples")(made)
        ],
        "tokens is below one token: expected are",
    ),
    "a row each step": (
        lambda made: [made[0] | {"run": f"r{i}", "seed": i} for i in range(10_001)],
        "has more than 10000 rows, and a law is fitted to so many at most: expected a line a run, of its end",
    ),
    "half done": (at(5, complete="almost"), "line 7: `complete` is true or false"),
    "none done": (lambda made: [row | {"complete": "false"} for row in made], "no run is complete"),
    "samples among tokens": (
        lambda made: at(5, tokens=made[5]["samples"])(made),
        "line 7: tokens are the samples, and elsewhere they are not",
    ),
    "samples among tokens, unsaid": (
        lambda made: without("samples")(at(5, tokens=made[5]["samples"])(made)),
        r"line 7: flops / \(params · tokens\) is 1536, and 6 in the middle of all runs: samples among tokens",
    ),
    "samples for tokens": (
        lambda made: [row | {"tokens": row["samples"]} for row in made],
        "is 1536, where about 6 is usual: tokens look like samples",
    ),
    "millions of samples": (
        lambda made: [row | {"samples": row["samples"] / 1e6} for row in made],
        r"tokens / samples is 2\.56e\+08, which are no tokens of an image",
    ),
    "thousands of samples in one": (
        lambda made: at(5, samples=made[5]["samples"] / 1e3)(made),
        r"line 7: tokens / samples is 2\.56e\+05, and 256 in the middle of all runs",
    ),
    "more samples than tokens": (
        lambda made: [row | {"samples": 4 * row["tokens"]} for row in made],
        r"tokens / samples is 0\.25, which are no tokens",
    ),
    "petaflops": (
        lambda made: [row | {"flops": row["flops"] / 1e15} for row in made],
        "is 6e-15, where about 6 is usual: flops, params or tokens are in another unit",
    ),
    "petaflops alone": (
        lambda made: without("tokens", "samples")([row | {"flops": row["flops"] / 1e18} for row in made]),
        "is below one token",
    ),
    "two floors": (lambda made: at(1, floor=1.2)([row | {"floor": 1.1} for row in made]), "column floor has 2 values"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_used_is_named(spoil: Callable[[Rows], Rows], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "runs.csv", spoil(rows()))
    with pytest.raises(UserError, match=said):
        Runs.read(file)


TEXTS = {
    "": "is empty: expected a header with params, flops, loss",
    "params,flops,loss\n": "has a header and no runs",
    "params,flops,loss\n1,2\n": "line 2 has 2 cells, and the header 3",
    "params,flops,loss,loss\n1,2,3,3\n": "column 'loss' is there 2 times",
    "params;flops;loss\n1;2;3\n": "semicolons stand between the cells",
    "params\tflops\tloss\n1\t2\t3\n": "tabs stand between the cells",
    "1e9,1e18,3.2\n1e9,2e18,3.1\n": "the first line is numbers",
    'params,flops,loss\n1,"2,3\n': "is no CSV",
    "params,flops,loss\n1,2,\0\n": "zero byte",
}


@pytest.mark.parametrize(("text", "said"), TEXTS.items(), ids=repr)
def test_what_is_no_table_is_named(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "runs.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        Runs.read(file)
    with pytest.raises(UserError, match="there is no such file"):
        Runs.read(tmp_path / "nothing.csv")
    with pytest.raises(UserError, match=r"is a folder; expected a CSV of runs, such as .*runs\.csv"):
        Runs.read(tmp_path)


def test_digits_that_were_cut_still_tell_tokens_of_an_image(tmp_path: Path) -> None:
    made = [row | {name: f"{row[name]:.5g}" for name in ("tokens", "samples")} for row in rows()]
    assert Runs.read(write(tmp_path / "runs.csv", made)).tokens_per_sample == pytest.approx(TOKENS, rel=1e-3)


def test_a_file_of_another_kind_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "metrics.csv").open("wb") as file:
        file.truncate(2**36)  # a hole, which takes no space
    with pytest.raises(UserError, match="has 65536 MiB, more than any table of runs"):
        Runs.read(tmp_path / "metrics.csv")


def test_a_spreadsheet_s_file_is_read(tmp_path: Path) -> None:
    """With a byte-order mark, Windows line ends, quotes, blank lines, and commas at the ends of lines."""
    plain = write(tmp_path / "plain.csv", rows())
    text = plain.read_text().replace("r0", '"r0, again"').replace("\n", ",,,\r\n") + "\r\n"
    (tmp_path / "other.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    runs = Runs.read(tmp_path / "other.csv")
    assert runs.run[0] == "r0, again"
    np.testing.assert_array_equal(runs.loss, Runs.read(plain).loss)
