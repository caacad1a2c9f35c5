"""The command-line wrapper: nothing runs before everything is checked, and text stays text."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from dit.commandline.argv import Tool
from dit.commandline.cli import UsageError, help_text, parse, run
from dit.config import ConfigError, config
from dit.errors import InterruptTold
from dit.ranks.group import World
from tests.shapes import SHAPES

Calls = list[dict[str, Any]]


@config
class Optim:
    lr: float = 1e-4  # peak learning rate


@config
class Settings:
    run_dir: str = "runs/x"  # everything is written here
    optim: Optim = Optim()


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def work(calls: Calls) -> Callable[..., None]:
    def work(
        place: Annotated[str, "where it is"],
        other: str = "there",
        *,
        size: Annotated[int, "pixels a side"] = 8,
        scale: float = 1.0,
        out: str | None = None,
        verbose: bool = False,
        kind: Literal["ema", "model"] = "ema",
        many: tuple[int, ...] = (),
        limit: int | None = None,
    ) -> None:
        """Do the work.

        And a second paragraph.
        """
        calls.append(dict(locals(), calls=None))

    return work


@pytest.fixture
def train(calls: Calls) -> Callable[..., None]:
    def train(config: str, *, dry_run: bool = False, **overrides: str) -> None:
        """Train it."""
        calls.append({"config": config, "dry_run": dry_run, **overrides})

    return train


def exit_code(commands: Any, *words: str, config: type | None = None) -> int:
    try:
        run(commands, config=config, argv=list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


# --- nothing wrong is swallowed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "--sise=3"], "unknown flag --sise; did you mean size?"),
        (["a", "--zzz=3"], "unknown flag --zzz; valid here:"),
        (["a", "--size.x=3"], "unknown flag --size.x"),
        (["a", "b", "stray"], "unexpected argument 'stray'"),
        ([], "missing PLACE"),
        (["--size=3"], "missing PLACE"),
        (["a", "--size=3", "--size=4"], "--size is given twice"),
        (["a", "--place=b"], "place is given twice"),
        (["a", "--size"], "--size needs a value"),
        (["a", "--size", "--scale=2"], "--size needs a value"),
        (["a", "--size=big"], "--size=big: expected a whole number"),
        (["a", "--size=2.5"], "--size=2.5"),
        (["a", "--size=0x10"], "--size=0x10: numbers are decimal: write 16"),
        (["a", "--size=1,000"], "--size=1,000: numbers are decimal: write 1000"),
        (["a", "--size=1:30"], "--size=1:30: numbers are decimal: write one number"),
        (["a", "--size=yes"], "--size=yes: expected a number, not a truth value"),
        (["a", "--size=99999999999999999999"], "whole number of at most 9223372036854775807"),
        (["a", "--scale=nan"], "--scale=nan: expected a number, and NaN is none"),
        (["a", "--scale=0,5"], "write 0.5"),
        (["a", "--many=1,0x2"], "--many=1,0x2: numbers are decimal: write 2"),
        (["a", "--size="], "--size="),
        (["a", "--scale=fast"], "--scale=fast"),
        (["a", "--verbose=perhaps"], "--verbose=perhaps"),
        (["a", "--kind=emma"], "--kind=emma"),
        (["a", "--other=null"], "--other=null: expected text, and null"),
        (["~"], "--place=~: expected text"),
        (["a", "--many=1,x"], "--many=1,x"),
        (["a", "--limit=x"], "--limit=x"),
        (["a", "b", "--verbose", "false"], "unexpected argument 'false'"),  # a switch takes no word after it
        (["a", "--no-verbose=true"], "unknown flag --no_verbose"),
        (["a", "--no-size"], "unknown flag --no_size"),  # no switch
        (["a", "--verbose", "--no-verbose"], "--verbose is given twice"),
        (["a", "--verbos"], "unknown flag --verbos; did you mean verbose?"),
    ],
)
def test_a_wrong_command_line_runs_nothing_and_exits_2(
    work, calls: Calls, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert exit_code(work, *words) == 2
    assert calls == []
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert says in errors
    assert "--help" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("words", [["--help"], ["a", "--help"], ["a", "-h"], ["a", "--size=3", "--help"]])
def test_help_only_ever_prints_help(work, calls: Calls, capsys, words: list[str]) -> None:
    assert exit_code(work, *words) == 0
    assert calls == []
    text = capsys.readouterr().out
    assert "Do the work.\n\nAnd a second paragraph." in text
    assert "PLACE" in text
    assert "str, required; where it is" in text
    assert "int, default 8; pixels a side" in text


def test_help_lists_the_configuration_keys(train, capsys) -> None:
    assert exit_code(train, "--help", config=Settings) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "[--key.sub=value ...]" in lines[0]
    row = next(line for line in lines if line.strip().startswith("optim.lr"))
    assert row.split() == ["optim.lr", "=", "0.0001", "peak", "learning", "rate"]
    assert any("run_dir" in line and "everything is written here" in line for line in lines)


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "name", "expected"),
    [
        ("--other=2024", "other", "2024"),
        ("--other=1e-4", "other", "1e-4"),
        ("--other=True", "other", "True"),
        ("--other=None", "other", "None"),
        ("--other=[1, 2]", "other", "[1, 2]"),
        ("--other=0,3", "other", "0,3"),
        ("--other=a b 'c' \"d\"", "other", "a b 'c' \"d\""),
        ("--other=a=b", "other", "a=b"),
        ("--other=", "other", ""),
        ("--other=-", "other", "-"),
        ("--out=2024", "out", "2024"),
        ("--out=none", "out", None),
        ("--out=~", "out", None),
        ("--out=~/a", "out", "~/a"),
        ("--other=./null", "other", "./null"),
        ("--size=12", "size", 12),
        ("--size=-3", "size", -3),
        ("--size=010", "size", 10),
        ("--size=1e3", "size", 1000),
        ("--many=08,010", "many", (8, 10)),
        ("--limit=007", "limit", 7),
        ("--verbose=off", "verbose", False),
        ("--other=010", "other", "010"),
        ("--other=--x", "other", "--x"),
        ("--scale=1e-4", "scale", 1e-4),
        ("--scale=2", "scale", 2.0),
        ("--verbose", "verbose", True),
        ("--verbose=false", "verbose", False),
        ("--kind=model", "kind", "model"),
        ("--many=0,3", "many", (0, 3)),
        ("--many=[5]", "many", (5,)),
        ("--limit=none", "limit", None),
        ("--limit=7", "limit", 7),
    ],
)
def test_a_value_has_its_parameters_type(work, calls: Calls, word: str, name: str, expected: object) -> None:
    assert exit_code(work, "2024", word) == 0
    assert len(calls) == 1
    assert calls[0]["place"] == "2024"
    assert calls[0][name] == expected
    assert type(calls[0][name]) is type(expected)


def test_a_flag_may_be_followed_by_its_value_and_have_dashes(calls: Calls) -> None:
    def work(*, batch_size: int, seed: int = 0, classes: str = "all") -> None:
        calls.append(dict(locals(), calls=None))

    assert exit_code(work, "--batch-size", "4", "--seed", "-1", "-classes", "0,3") == 0
    assert (calls[0]["batch_size"], calls[0]["seed"], calls[0]["classes"]) == (4, -1, "0,3")


def test_positionals_may_be_given_by_name_and_in_any_place(work, calls: Calls) -> None:
    assert exit_code(work, "--size=3", "a", "--other=b") == 0
    assert (calls[0]["place"], calls[0]["other"], calls[0]["size"]) == ("a", "b", 3)


def test_overrides_arrive_as_they_were_typed(train, calls: Calls) -> None:
    words = ["c.yaml", "--run_dir=2024", "--optim.lr=1e-4", "--a.b=[1, 2]", "--c=x y", "--model.size", "S"]
    assert exit_code(train, *words) == 0
    assert calls == [
        {
            "config": "c.yaml",
            "dry_run": False,
            "run_dir": "2024",
            "optim.lr": "1e-4",
            "a.b": "[1, 2]",
            "c": "x y",
            "model.size": "S",
        }
    ]


@pytest.mark.parametrize("word", ["--no-verbose", "--no_verbose"])
def test_a_switch_is_turned_off_by_no(work, calls: Calls, word: str) -> None:
    assert exit_code(work, "a", word, "b") == 0
    assert (calls[0]["verbose"], calls[0]["other"]) == (False, "b")


def test_a_switch_beside_overrides(train, calls: Calls) -> None:
    assert exit_code(train, "--dry_run", "c.yaml") == 0
    assert calls[0] == {"config": "c.yaml", "dry_run": True}
    assert exit_code(train, "c.yaml", "d.yaml") == 2
    assert len(calls) == 1


# --- subcommands -------------------------------------------------------------------------------------------


def test_subcommands_are_chosen_and_listed(work, train, calls: Calls, capsys) -> None:
    commands = {"work": work, "train": train}
    assert exit_code(commands, "work", "here") == 0
    assert calls[0]["place"] == "here"
    assert exit_code(commands, "--help") == 0
    assert "train" in capsys.readouterr().out
    assert exit_code(commands, "work", "--help") == 0
    assert "PLACE" in capsys.readouterr().out
    assert exit_code(commands) == 2
    assert exit_code(commands, "wrok", "here") == 2
    assert "unknown command 'wrok'; did you mean work?" in capsys.readouterr().err
    assert len(calls) == 1


def test_a_default_commands_name_may_be_left_out(
    work, train, calls: Calls, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    tool = Tool({"work": work, "train": train}, default="work")
    for word in ("there", "~/there", str(tmp_path / "there"), "s3://bucket/there", "*.tar", "digits:test"):
        assert exit_code(tool, word) == 0
        assert calls.pop()["place"] == word
    assert exit_code(tool, "work", "nowhere") == 0  # a command's own errors are its own
    assert calls.pop()["place"] == "nowhere"
    assert exit_code(tool, "--verbose", "there") == 0
    assert (calls[0]["place"], calls.pop()["verbose"]) == ("there", True)
    assert exit_code(tool, "there", "--help") == 0
    assert "PLACE" in capsys.readouterr().out
    assert exit_code(tool, "--help") == 0
    said = capsys.readouterr().out
    assert " PLACE ...   for " in said
    assert "work PLACE ..." in said
    assert exit_code(tool) == 2
    capsys.readouterr()
    assert exit_code(tool, "trian", "c.yaml") == 2
    said = capsys.readouterr().err
    assert "'trian' is neither a command nor a file or folder that is there; did you mean train?" in said
    assert str(tmp_path) in said  # where it was looked for
    assert exit_code(tool, "$DIT_UNSET/x") == 1
    assert "DIT_UNSET is not set" in capsys.readouterr().err
    assert calls == []
    (tmp_path / "train").mkdir()
    assert exit_code(tool, "train", "c.yaml") == 0  # a command comes before a folder of its name
    assert calls.pop()["config"] == "c.yaml"


# --- errors of the work itself -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("low must not be above high"), 1),
        (FileNotFoundError(2, "No such file or directory", "/nowhere"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_for_the_user_is_one_line_and_no_traceback(capsys, error: BaseException, code: int) -> None:
    def work() -> None:
        raise error

    assert exit_code(work) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_of_a_ctrl_c_that_the_work_has_spoken_of_nothing_more_is_said(capsys) -> None:
    def work() -> None:
        raise InterruptTold

    assert exit_code(work) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_what_to_do(capsys, number: int) -> None:
    def work() -> None:
        raise OSError(number, os.strerror(number))  # as of a write: without a name

    assert exit_code(work) == 1
    assert "free space (or raise the quota) and start the same command again" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    def work() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run(work, argv=[])


def test_the_rank_is_named_where_there_are_several(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def work() -> None:
        raise ConfigError("no")

    assert exit_code(work) == 1
    assert capsys.readouterr().err == "error (rank 1): no\n"


def test_half_a_launch_is_an_error_for_the_user(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert exit_code(World.from_env) == 1
    said = "error: WORLD_SIZE, LOCAL_RANK not set beside RANK: start with torchrun or launch/\n"
    assert capsys.readouterr().err == said


def test_a_result_is_not_printed(capsys) -> None:
    def work() -> dict[str, int]:
        return {"a": 1}

    assert exit_code(work) == 0
    assert capsys.readouterr().out == ""


def test_parse_is_what_run_uses(work) -> None:
    assert parse(work, ["a", "--size=3"]) == {"place": "a", "size": "3"}
    with pytest.raises(UsageError, match="unknown flag"):
        parse(work, ["a", "--no"])


def test_a_family_of_flags_takes_its_own_and_no_others() -> None:
    def work(place: str, *, size: int = 8, **codec_keys: str) -> None: ...

    assert parse(work, ["a", "--codec.path=2024", "--codec_dtype=x"]) == {
        "place": "a",
        "codec.path": "2024",
        "codec_dtype": "x",
    }
    for word in ("--codc.path=x", "--codec=x", "--codec.=x", "--sise=3", "--codecs.path=x"):
        with pytest.raises(UsageError, match="unknown flag"):
            parse(work, ["a", word])


def test_several_families_of_flags() -> None:
    def work(place: str, *, solver: str = "heun", **solver_grid_keys: str) -> None:
        """Do it."""

    given = ["a", "--solver=x", "--solver.eta=1e-2", "--grid_rho=7"]
    wanted = {"place": "a", "solver": "x", "solver.eta": "1e-2", "grid_rho": "7"}
    assert parse(work, given) == wanted
    for word in ("--codec.path=x", "--solver.=x", "--grid=x", "--sollver.eta=1", "--keys.x=1"):
        with pytest.raises(UsageError, match="unknown flag"):
            parse(work, ["a", word])
    assert "[--solver.sub=value ...] [--grid.sub=value ...]" in help_text(work, "it")


def test_help_lists_the_choices_of_a_flag_with_their_fields(work, calls: Calls, capsys) -> None:
    run(work, argv=["--help=shape"], choices={"shape": SHAPES})
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Choices of shape:")
    rows = [line.split() for line in lines[start + 1 :]]
    assert [row[0] for row in rows] == ["round", "radius", "square", "side", "corners"]
    assert rows[-1] == ["corners", "=", "4"]
    assert calls == []


def test_the_default_of_fire_reads_nothing(train, work, calls: Calls) -> None:
    """Fire's own reader would make numbers, lists and names of Python's of what was typed."""
    run(train, argv=["010", "--a.b=[1, 2]", "--c.d=True", "--e.f={x: 1}"])
    assert calls == [{"config": "010", "dry_run": False, "a.b": "[1, 2]", "c.d": "True", "e.f": "{x: 1}"}]
    assert not hasattr(train, "FIRE_METADATA")  # what is called is left as it is


def test_help_is_printed_in_any_encoding(work, monkeypatch: pytest.MonkeyPatch) -> None:
    def accented() -> None:
        """Fr\u00e9chet, \u03b1\u00b2."""

    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    run(accented, argv=["--help"])
    sys.stdout.flush()
    assert b"Fr?chet, ??." in raw.getvalue()
