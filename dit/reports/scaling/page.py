"""A scaling law as one HTML page that needs nothing else, with its figures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from dit.evals.protocol import protocol_hash
from dit.files import write_atomically
from dit.outputs import claim, write_record
from dit.progress import Bar
from dit.reports.page import document, html_table, table
from dit.reports.scaling.figures import Figure, drawn, figures
from dit.reports.scaling.material import Material
from dit.reports.scaling.tables import Table, equation, held_out, protocol, tables

PAGE, RECORD = "report.html", "report.json"
STYLE = """
.law { font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.warning { border-left: .25rem solid #c77; padding: .1rem .7rem; margin: .4rem 0; }
.tables { overflow-x: auto; } figure { max-width: 31rem; flex: 1 1 22rem; } figure svg { width: 100%; height: auto; }
td:last-child { font-variant-numeric: normal; }
"""


def write_report(material: Material, out: Path, overwrite: bool = False) -> list[Path]:
    """Write OUT/report.html and OUT/NAME.png of each figure; a report of the same fit is made anew.

    Raises OutputError where OUT has a report of another fit, or files of the same names that are none.
    """
    found = figures(material)
    images = [out / f"{figure.name}.png" for figure in found]
    spec = {"fit": protocol_hash(material.fit.as_json())}
    claim([out / PAGE, *images, out / RECORD], spec, record=out / RECORD, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    told = {**spec, "flops": material.budget, "predictions": _predictions(material)}
    write_record(out / RECORD, told)  # first: what is stopped behind it is made anew by the same command
    with Bar[None](total=len(found), unit="picture", desc="drawing", delay=2) as bar:
        pictures = []
        for figure, file in zip(found, images, strict=True):
            vector, pixels = drawn(figure, material)
            write_atomically(file, pixels)
            pictures.append(_figure(figure, vector))
            bar.update()
    write_atomically(out / PAGE, as_page(material, pictures).encode())
    return [out / PAGE, *images]


def _predictions(material: Material) -> list[dict[str, object]]:
    """What the page predicts, as numbers."""
    largest = float(material.fit.column("flops").max())
    band = material.band([largest, 10 * largest, *([material.budget] if material.budget else [])])
    names = ("params", "tokens", "loss")
    return [
        {"flops": float(flops)} | {name: getattr(band, name)[:, i].tolist() for name in names}
        for i, flops in enumerate(band.flops)
    ]


def as_page(material: Material, pictures: Iterable[str]) -> str:
    """The page. pictures: pieces of HTML, a figure each."""
    first, *others = tables(material)
    title = f"Scaling law of {material.fit.source or material.source}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="law">{escape(equation(material))}</p>',
        f'<p class="verdict">{escape(held_out(material))}</p>',
        f'<p class="note">{escape(protocol(material))}</p>',
        *(f'<p class="warning">{escape(line)}</p>' for line in material.fit.warnings),
        _table(first),
        "<h2>Figures</h2>",
        f'<div class="panels">{"".join(pictures)}</div>',
        *map(_table, others),
    ]
    return document(title, parts, STYLE)


def _table(told: Table) -> str:
    cells = ([escape(cell) for cell in row] for row in told.rows)
    body = html_table(map(escape, told.head), cells)
    note = f'<p class="note">{escape(told.note)}</p>' if told.note else ""
    return f'<h2>{escape(told.title)}</h2><div class="tables">{body}</div>{note}'


def _figure(figure: Figure, vector: str) -> str:
    return f"<figure>{vector}<figcaption>{escape(figure.note)}</figcaption></figure>"


def as_text(material: Material) -> str:
    """The report's words and tables for a terminal."""
    lines = [equation(material), "", held_out(material), protocol(material)]
    lines += ["", *(f"warning: {line}" for line in material.fit.warnings)] if material.fit.warnings else []
    for told in tables(material):
        lines += ["", told.title, *(f"  {line}" for line in table([told.head, *told.rows])), f"  {told.note}"]
    return "\n".join(lines)
