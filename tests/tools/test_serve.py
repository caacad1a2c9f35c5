"""tools/serve.py: it says where the page is and of which weights, and ends in good order, leaving nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest

import tools.serve
from tests.commands import call, command, environment
from tests.datasets import Digits
from tests.train.runs import random_run


@pytest.mark.parametrize("flag", ["--max_images=0", "--max_seconds=-1", "--frames=-1", "--max_waiting=0"])
def test_limits_that_are_none_are_refused(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(tools.serve.main, tmp_path, flag) == 1
    assert flag.removeprefix("--").partition("=")[0] in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(tools.serve.main, tmp_path / "none") == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("told", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_serves_until_told_to_end_and_leaves_nothing(
    told: signal.Signals, status: int, digits: Digits, tmp_path: Path
) -> None:
    pytest.importorskip("gradio", reason="Gradio is not installed (the extra demo)")
    run, temporary = random_run(digits, tmp_path / "run"), tmp_path / "tmp"
    temporary.mkdir()
    words = command("serve.py", run, "--port=0", "--device=cpu")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        words, **pipes, text=True, cwd=tmp_path, env={**environment(), "TMPDIR": str(temporary)}
    ) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            assert "weights: ema" in lines[0]
            url = lines[1].removeprefix("page at ").partition(" ")[0]
            assert url.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(url, timeout=60) as reply:
                assert b"gradio" in reply.read().lower()
            assert [path.name[:9] for path in temporary.iterdir()] == ["dit-page-"]
            os.kill(process.pid, told)
            assert process.wait(30) == status
        finally:
            process.kill()
        said = process.stderr.read() if process.stderr else ""
    assert "Traceback" not in said
    assert list(temporary.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"run", "tmp"}, (
        "nothing is left where it was started"
    )
