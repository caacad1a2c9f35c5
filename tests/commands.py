"""Running the project's commands: in this process, or as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit.cli import run

ROOT = Path(__file__).parents[1]


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


def execute(tool: str, *words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end."""
    return subprocess.run(
        command(tool, *words),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=cwd,
        env=environment(),
    )
