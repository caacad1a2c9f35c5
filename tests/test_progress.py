"""How progress is shown: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
import os
import pty
from pathlib import Path

import pytest

from dit import progress
from dit.progress import Bar, bars, say


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)


def test_without_a_terminal_there_are_lines_and_no_carriage_returns() -> None:
    file = io.StringIO()
    assert list(Bar(range(3), total=3, unit="step", desc="train", file=file)) == [0, 1, 2]
    lines = file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "train: 1/3 step (33%)",
        "train: 2/3 step (67%)",
        "train: 3/3 step (100%)",
    ]
    assert lines[-1].endswith(" in all")
    assert "\r" not in file.getvalue()
    assert "\x1b" not in file.getvalue()


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand quick pieces: the first note at once, and the end."""
    monkeypatch.setattr(progress, "SECONDS", 1000.0)
    file = io.StringIO()
    with Bar[None](total=1000, file=file) as bar:
        for i in range(1000):
            bar.update()
            bar.note(f"loss={i}")
    first, last = file.getvalue().splitlines()
    assert first.startswith("1/1000 it")
    assert first.endswith("loss=0")
    assert last.startswith("1000/1000 it (100%)")
    assert last.endswith("loss=999")


def test_what_is_hidden_or_done_at_once_shows_nothing() -> None:
    file = io.StringIO()
    assert list(Bar(range(3), hidden=True, file=file)) == [0, 1, 2]
    assert list(Bar(range(3), delay=100, file=file)) == [0, 1, 2]
    assert file.getvalue() == ""


def test_what_is_done_is_no_part_of_the_rate() -> None:
    file = io.StringIO()
    with Bar[None](total=10, initial=8, file=file) as bar:
        bar.update()
    assert file.getvalue().startswith("9/10 it (90%), ")


def test_an_end_by_an_error_says_how_far_it_came() -> None:
    file = io.StringIO()
    with pytest.raises(ZeroDivisionError), Bar[None](total=10, file=file, desc="encode"):
        raise ZeroDivisionError
    assert file.getvalue().startswith("encode: 0/10 it (0%)")


def test_numbers_are_short() -> None:
    file = io.StringIO()
    with Bar[None](total=2.5e9, unit="B", scale=True, file=file) as bar:
        bar.update(1.25e9)
    assert file.getvalue().startswith("1.25G/2.50G B (50%), ")


def test_on_a_terminal_there_is_a_bar() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal, Bar[None](total=2, desc="train", file=terminal) as bar:
        bar.update()
        bar.note("loss=0.5")
        bar.update()
        bar.close()
        terminal.write("end of test")
        terminal.flush()
        shown = ""
        while "end of test" not in shown:  # the kernel hands a terminal's bytes over piece by piece
            shown += os.read(ours, 100_000).decode()
    os.close(ours)
    assert "\r" in shown
    assert "2/2" in shown
    assert "loss=0.5" in shown


def test_bars_that_are_not_shown() -> None:
    file = io.StringIO()
    with bars(False), Bar[None](total=2, file=file) as bar:
        bar.update(2)
        with bars(True), Bar[None](total=2, file=file) as inner:  # whoever is outside has said no
            inner.update(2)
    assert file.getvalue() == ""
    with bars(True), Bar[None](total=2, file=file) as bar:
        bar.update(2)
    assert file.getvalue().startswith("2/2 it")


def test_a_line_is_said_at_once(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        say("step 3", file)
        assert (tmp_path / "out").read_text() == "step 3\n"
