"""Links of the pages that are read on a forge alone, and notebooks as pages; those of the site `make docs` checks."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.commands import ROOT

LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page ends in."""
    lines = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "benchmarks").glob("*.md"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = LINK.findall((ROOT / page).read_text())
    assert links or page not in ("README.md", "CONTRIBUTING.md")
    for path, anchor in links:
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page} links to {path}"
        assert not anchor or anchor in anchors(there), f"{page} links to {path}#{anchor}"


def test_no_page_takes_the_place_of_another_in_the_site() -> None:
    pages = [page.stem for page in (ROOT / "benchmarks").iterdir() if page.suffix in (".md", ".html")]
    assert len(pages) == len(set(pages)), "x.md becomes x.html in the site: name one of the two otherwise"


def test_the_readme_is_a_start() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_a_notebook_becomes_a_page(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/site/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    cells = [
        {"cell_type": "markdown", "source": ["# Draw\n", "in five lines"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["1\n"]},
                {"output_type": "display_data", "data": {"image/png": "AAAA\n", "text/plain": ["<Image>"]}},
            ],
        },
    ]
    (tmp_path / "x.ipynb").write_text(json.dumps({"cells": cells}))
    text = hooks.notebook(tmp_path / "x.ipynb")
    assert text.startswith("# Draw\nin five lines\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n")
    assert "![](data:image/png;base64,AAAA)" in text
