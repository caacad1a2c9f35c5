"""Running the project's commands: in this process, in one that is forked, or in one that is started afresh.

Each start of an interpreter that imports torch and the rest takes 5 s of CPU: it is for what is tested of just that.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit.commandline.cli import run
from tests import forks
from tests.forks import ROOT


def call(main: Callable[..., Any], *words: object, config: type | None = None) -> int:
    """A tool's main with these words on its command line, in this process: the exit code."""
    try:
        run(main, config=config, argv=[str(w) for w in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def command(tool: str, *words: object) -> list[str]:
    """What starts a tool in a process of its own."""
    return [sys.executable, str(ROOT / "tools" / tool), *(str(w) for w in words)]


def environment() -> dict[str, str]:
    """This process's, without what a launcher may have left in it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in launcher and not k.startswith("SLURM_")}


class Forked:
    """A tool in a process of its own that need not import torch first; used as subprocess.Popen is.

    The tool's file is run as by `python tools/...`, from its first line to its end.
    """

    def __init__(self, tool: str, *words: object, cwd: Path | None = None, env: dict[str, str] | None = None):
        """env: of the process, `environment()` by default."""
        self._folder = tempfile.TemporaryDirectory(prefix="dit-tests-")
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._files:
            file.touch()
        argv, here = command(tool, *words)[1:], cwd or Path.cwd()
        self._process = forks.context().Process(
            target=_run_file, args=(argv, here, env or environment(), self._files), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended, or None."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """returncode."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.returncode is None:
            assert self.pid
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = 200) -> int:
        """Its end: the exit code, or minus the number of the signal. TimeoutError after so many seconds."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"still runs after {timeout} s; it printed {self.printed()}")
        return self.returncode

    def printed(self) -> tuple[str, str]:
        """What it wrote to stdout and stderr until now."""
        out, error = (file.read_text() for file in self._files)
        return out, error

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """wait, and all that it wrote."""
        self.wait(timeout)
        return self.printed()


def _run_file(argv: list[str], cwd: Path, env: dict[str, str], printed: list[Path]) -> None:
    """What a forked process does: all that `python argv[0] argv[1:]` does once torch and the rest are imported."""
    forks.print_to(*printed)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    forks.as_if_alone()
    sys.argv, sys.path[:0] = argv, [str(Path(argv[0]).parent)]
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 (printed as the interpreter does)
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    atexit._run_exitfuncs()
    raise SystemExit(code)


def execute(
    tool: str, *words: object, cwd: Path | None = None, afresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end in a process that is forked or, with `afresh`, by an interpreter of its own."""
    if not afresh:
        process = Forked(tool, *words, cwd=cwd)
        out, error = process.communicate()
        return subprocess.CompletedProcess(command(tool, *words), process.wait(), out, error)
    return subprocess.run(
        command(tool, *words),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
        env=environment(),
    )
