"""Write dit/commandline/schema.json, from which --help and the check of what is typed come without loading torch."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.schema import FILE, schema_of, text_of
from dit.files import write_atomically


def tools() -> dict[str, Tool]:
    """Every tool's command line, by the name of its file."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return {file.stem: importlib.import_module(f"tools.{file.stem}").TOOL for file in files}


def main() -> None:
    """Write dit/commandline/schema.json anew from the tools, the config classes and the registries."""
    write_atomically(FILE, text_of(schema_of(tools())).encode("utf-8"))
    print(f"{FILE} is written")


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
