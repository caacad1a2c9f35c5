"""Processes that are forked behave as those that are started afresh, and import nothing anew."""

from __future__ import annotations

import gc
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.commands import Forked, environment, execute
from tests.forks import PRELOADED
from tests.rank_processes import Server

TOOL = """
import atexit, os, sys, time
atexit.register(print, "left")
print(sys.argv[1:], os.getcwd(), os.environ.get("WORD"), __name__, flush=True)
print("to stderr", file=sys.stderr)
if sys.argv[1] == "wait":
    time.sleep(60)
{end}
"""
ENDS = {
    "a code": "raise SystemExit(7)",
    "a text": "sys.exit('what for')",
    "an error": "raise ValueError('broken')",
    "nothing": "",
}


def imported() -> tuple[list[str], int]:
    return [name for name in PRELOADED if name in sys.modules], gc.get_freeze_count()


def test_all_is_imported_when_a_process_begins(ranks: Server) -> None:
    """Without it everything works too, at half a second of CPU more for each process."""
    ((found, frozen),) = ranks.start_apart(1, imported).wait()
    assert found == list(PRELOADED)
    assert frozen > 100_000


@pytest.mark.parametrize("end", ENDS)
def test_a_tool_ends_as_it_would_by_itself(tmp_path: Path, end: str) -> None:
    (tmp_path / "tool.py").write_text(TOOL.format(end=ENDS[end]))
    forked, afresh = (
        execute(str(tmp_path / "tool.py"), "a word", 2, cwd=tmp_path, afresh=afresh)
        for afresh in (False, True)
    )
    assert forked.returncode == afresh.returncode
    assert forked.stdout == afresh.stdout
    assert forked.stdout.endswith(f"{tmp_path} None __main__\nleft\n")
    assert forked.stderr.splitlines()[0] == afresh.stderr.splitlines()[0] == "to stderr"
    assert forked.stderr.splitlines()[-1] == afresh.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_tool_can_be_ended(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "tool.py").write_text(TOOL.format(end=""))
    process = Forked(str(tmp_path / "tool.py"), "wait", env=environment() | {"WORD": "given"})
    while not process.printed()[0]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait() == -number
    assert process.printed()[0] == f"['wait'] {Path.cwd()} given __main__\n"


def test_what_does_not_end_is_killed_and_named(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(TOOL.format(end=""))
    process = Forked(str(tmp_path / "tool.py"), "wait")
    with pytest.raises(TimeoutError, match=r"still runs after 0\.5 s"):
        process.communicate(0.5)
    assert process.wait() == -signal.SIGKILL
