"""docs/python.md and docs/python.ipynb: every block of code runs, one after the other, as a reader would run them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.datasets import Digits
from tests.train.runs import random_run

PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "python.ipynb"
STEPS = '"steps": 800'  # of the page's training, which a test need not finish

pytestmark = pytest.mark.filterwarnings("ignore::dit.errors.Notice")  # averages of so few steps


def test_every_block_of_the_page_runs(digits: Digits, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    random_run(digits, tmp_path / "runs" / "quickstart" / "dit")
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python") > 4
    assert sum(block.count(STEPS) for block in blocks) == 1
    space: dict[str, Any] = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        code = "\n" * line + block.replace(STEPS, '"steps": 3')
        exec(compile(code, str(PAGE), "exec"), space)
    said = capsys.readouterr().out
    assert (tmp_path / "three.png").is_file()
    assert "(10, 8, 8, 3)" in said
    for promised in re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        assert promised in said
    assert (space["images"].shape, space["drawn"].shape) == ((4, 16, 16, 3), (4, 4, 8, 8))


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_small_and_holds_its_pictures() -> None:
    assert NOTEBOOK.stat().st_size < 60_000
    outputs = [output for cell in cells() for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output["output_type"] == "error"]


@pytest.mark.slow
def test_the_notebook_runs_from_above_to_below(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), space)
    assert space["accuracy"] > 0.8, "of digits drawn with guidance, by a classifier of real ones"
