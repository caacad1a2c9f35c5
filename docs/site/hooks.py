"""Bring what is no page of docs/ into the site: benchmarks, CONTRIBUTING, notebooks. Links stay the checkout's.

A page in docs/ links to `../benchmarks/x.md`, as it is read on a forge; in the site that page is `benchmarks/x.md`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Where a link from a page leads, in the checkout and in the site.
MOVED = [
    (r"\]\((?:\.\./)?CONTRIBUTING\.md", "](contributing.md"),
    (r"\]\((?:\.\./)?README\.md", "](index.md"),
    (r"\]\(\.\./benchmarks/", "](benchmarks/"),
]


def on_files(files: Any, config: Any) -> Any:
    """Add what lies elsewhere in the checkout."""
    from mkdocs.structure.files import File  # which the tests do without

    for path in sorted((ROOT / "benchmarks").iterdir()):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        files.append(File.generated(config, f"{path.stem}-notebook.md", content=notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the checkout's links into the site's."""
    if "/" not in page.file.src_uri:
        for there, here in MOVED:
            markdown = re.sub(there, here, markdown)
        markdown = re.sub(r"\]\((\w+)\.ipynb", r"](\1-notebook.md", markdown)
    elif page.file.src_uri.startswith("benchmarks/"):
        markdown = re.sub(r"\]\(\.\./docs/", "](../", markdown)
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Mark inline code of one word, such as a flag: a browser would break it behind its dashes (wide.css)."""
    return re.sub(r"<code>([^<>\s]{1,44})</code>", r'<code class="word">\1</code>', html)


def notebook(path: Path) -> str:
    """Turn a notebook into Markdown: text as it is, code as a block, each output below its code."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [shown(output) for output in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def shown(output: dict[str, Any]) -> str:
    """Turn an output of a cell into Markdown: a picture where there is one, else text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", []))).rstrip("\n")
    return f"```text\n{text}\n```"
