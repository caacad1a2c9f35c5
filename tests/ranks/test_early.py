"""Signals that come while Python still imports: kept by tools that save at one; Ctrl-C is a line and a status."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = sorted((Path(__file__).parents[2] / "tools").glob("*.py"))
# at a scheduler's signal
SAVING = {"train", "train_vae", "train_classifier", "encode", "sample", "evaluate", "likelihood"}

KEPT = """
import sys
from dit.ranks import early
early.listen()
print("listening", flush=True)
sys.stdin.readline()
from dit.train.stop import stop_request
with stop_request() as stop:
    print(stop.heard.name, flush=True)
"""

# a tool that stands still at its first import of something that takes long
HELD = """
import runpy, signal, sys
class Hold:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "numpy", "pydantic", "yaml", "fire"):
            ends = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            print("ends" if ends else "keeps", flush=True)
            sys.stdin.readline()
            sys.exit("no signal came")
sys.meta_path.insert(0, Hold())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_ctrl_c_while_a_tool_imports_is_a_line_and_130(tool: Path) -> None:
    with started(HELD, str(tool)) as process:
        assert first_line(process) == ("keeps" if tool.stem in SAVING else "ends")  # at SIGTERM
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate("go on\n", timeout=60)
    assert said == "interrupted while starting: nothing has begun, nothing was changed\n"
    assert process.returncode == 130


def test_a_signal_that_is_kept_is_heard_by_the_run() -> None:
    with started(KEPT) as process:
        assert first_line(process) == "listening"
        process.send_signal(signal.SIGUSR1)
        said, _ = process.communicate("go on\n", timeout=60)
    assert (process.returncode, said) == (0, "SIGUSR1\n")


def test_once_imports_are_over_ctrl_c_ends_the_work_itself() -> None:
    """And of a job in the background, whose Ctrl-C is for others, it ends nothing at all."""
    begun = "from dit.ranks import early; import signal; early.listen(keep=()); early.end_imports(); "
    asked = "print(signal.getsignal(signal.SIGINT) == signal.{}); "
    held = subprocess.run(
        [sys.executable, "-c", begun + asked.format("default_int_handler")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ignored = subprocess.run(
        ["/bin/sh", "-c", 'trap "" INT; exec "$0" -c "$1"', sys.executable, begun + asked.format("SIG_IGN")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert (held.stdout, ignored.stdout) == ("True\n", "True\n")
