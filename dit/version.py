"""Which code this is: the package's version and, in a git checkout, the commit."""

from __future__ import annotations

import functools
import os
import subprocess

__version__ = "0.1.0"


@functools.cache
def code_version() -> str:
    """The package's version and, in a git checkout, the commit (with a plus where files were changed).

    As it was when this process first asked: that is what it has loaded.
    """
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not os.path.exists(
        os.path.join(root, ".git")
    ):  # installed: whatever checkout lies around it is not ours
        return __version__
    git = ["git", "-C", root, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    return f"{__version__}-{found.stdout.strip()}" if found.returncode == 0 else __version__
