"""A comparison as one HTML page that needs nothing else, and as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dit.errors import shown
from dit.evals.protocol import protocol_hash
from dit.files import write_atomically
from dit.outputs import claim_file
from dit.progress import Bar
from dit.reports.comparison import Comparison, Difference
from dit.reports.curves import AXES, Panel, coloured, draw, panels
from dit.reports.told import RunTold

SHOWN = 12  # keys that differ, on a terminal
NONE = "No figure of these runs was measured by one protocol, so nothing here says which is better. "
DRAW = (
    "Draw the same number of images from each and measure them alike: tools/sample.py RUN --out=OUT "
    "--num_samples=5000, then tools/evaluate.py OUT --reference=IMAGES; or hold data out in all of them (data.val, "
    "val.every)."
)
HOLD_OUT = "Hold the same data out in all of them (data.val, val.every)."  # of runs that draw no images
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 80rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: left; vertical-align: top; }
td, th { border-bottom: 1px solid #8884; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .9em; overflow-wrap: anywhere; } .note { opacity: .75; font-size: .85rem; }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }
.best { font-weight: 600; } .verdict { font-size: 1.05rem; }
.panels { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; background: #fff; color: #222; }
figure { border: 1px solid #8884; border-radius: .4rem; padding: .3rem; }
figcaption { font-size: .8rem; padding: 0 .5rem; }
.keys { position: sticky; top: 0; background: Canvas; padding: .5rem 0; z-index: 1; }
.keys label { margin-right: 1.2rem; }
"""


def summary(run: RunTold) -> dict[str, str]:
    """What is said of a run in a row of a table: heading -> text."""
    flops, last = run.flops_per_sample, run.last
    return {
        "steps": f"{last['step']} of {run.planned}",
        "samples": f"{last['samples']:,}",
        "FLOPs": "not told" if flops is None else f"{flops * last['samples']:.3g}",
        "seconds": f"{run.seconds[-1]:,.0f}",
        "training loss": "not finite" if last.get("loss") is None else f"{last['loss']:.4g}",
    }


# --- a terminal --------------------------------------------------------------------------------------------


def as_text(comparison: Comparison) -> str:
    """The comparison in lines."""
    lines = table(
        [["run", *summary(comparison.runs[0])]] + [[r.name, *summary(r).values()] for r in comparison.runs]
    )
    lines += ["", "which is better:", *(f"  {line}" for line in verdicts(comparison)), "", "where they part:"]
    first = comparison.runs[0].name
    lines += [f"  {run.name} from {first}: {found}" for run, found in comparison.partings]
    rows = comparison.differences
    lines += ["", f"{len(rows)} keys differ:" if rows else "no key differs"]
    lines += [f"  {line}" for line in table([_cells(row) for row in rows[:SHOWN]])]
    lines += [f"  and {len(rows) - SHOWN} more, all on the page"] if len(rows) > SHOWN else []
    return "\n".join(lines)


def verdicts(comparison: Comparison) -> list[str]:
    """The answer to "which is better", a line a figure; what is to be done where there is none."""
    lines = [str(contest) for contest in comparison.contests] or [
        NONE + (DRAW if all(run.draws for run in comparison.runs) else HOLD_OUT)
    ]
    lines += comparison.not_comparable
    if comparison.unlike:
        keys = ", ".join(comparison.unlike)
        lines.append(
            f"their training losses say nothing: {keys} differ, so that they are means of different things"
        )
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text under each other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cells(row: Difference) -> list[str]:
    return [row.key, *map(shown, row.values)]


# --- a page ------------------------------------------------------------------------------------------------


def as_page(comparison: Comparison) -> str:
    """The comparison as HTML: pictures, styles and all."""
    names = (
        " and ".join(run.name for run in comparison.runs)
        if len(comparison.runs) < 4
        else f"{len(comparison.runs)} runs"
    )
    parts = [
        f"<h1>{escape(names)}</h1>",
        _summaries(comparison),
        "<h2>Which is better</h2>",
        *(f'<p class="verdict">{escape(line)}</p>' for line in verdicts(comparison)),
        *_contests(comparison),
        "<h2>Where they part</h2>",
        _list(f"{run.name} from {comparison.runs[0].name}: {found}" for run, found in comparison.partings),
        "<h2>Curves</h2>",
        _curves(comparison),
        f"<h2>{len(comparison.differences)} keys differ</h2>",
        _differences(comparison),
    ]
    return document(names, parts, _switches())


def write_page(comparison: Comparison, file: Path, overwrite: bool = False) -> None:
    """Write the page; an older one of the same runs is replaced. Raises OutputError where anything else is there."""
    marker = (
        f"<!-- compare-runs {protocol_hash({'runs': [str(r.folder.resolve()) for r in comparison.runs]})} -->"
    )
    if not claim_file(file, lambda: marker.encode() in file.read_bytes(), overwrite=overwrite):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (as_page(comparison) + marker + "\n").encode())


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page of pieces of HTML, which needs nothing else. style: CSS beside STYLE."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}{style}</style></head>\n<body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def html_table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = True) -> str:
    """A table of HTML cells, the first of each row being its name."""
    kind = ' class="number"' if numbers else ""
    cells = "".join(f"<th{kind if i else ''}>{word}</th>" for i, word in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind if i else ''}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def _named(run: RunTold, colour: str) -> str:
    return f'<span class="chip" style="background:{colour}"></span>{escape(run.name)}'


def _summaries(comparison: Comparison) -> str:
    rows = [
        [_named(run, colour), *map(escape, summary(run).values())]
        for run, colour in coloured(comparison.runs)
    ]
    folders = "".join(f"<br><code>{escape(str(run.folder))}</code>" for run in comparison.runs)
    note = "Seconds are of training alone, by the speeds that were logged. FLOPs count 2 per multiply-add."
    head = ["run", *summary(comparison.runs[0])]
    return f'{html_table(head, rows)}<p class="note">{note}{folders}</p>'


def _contests(comparison: Comparison) -> list[str]:
    """A table for each figure that runs have by one protocol."""
    colours, found = {id(run): colour for run, colour in coloured(comparison.runs)}, []
    for contest in comparison.contests:
        rows = []
        for one in contest.standings:
            value = f"{one.value:.5g}"
            value = f'<span class="best">{value}</span>' if one is contest.standings[0] else value
            ends = f"{one.interval[0]:.4g} … {one.interval[1]:.4g}" if one.interval else ""
            rows.append([_named(one.run, colours[id(one.run)]), str(one.step), value, ends])
        head = ["run", "step", escape(str(contest.alike)), "interval"]
        found.append(f'{html_table(head, rows)}<p class="note">protocol {escape(contest.alike.digest)}</p>')
    return found


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _switches() -> str:
    """Styles by which the chosen axis is shown, and the others are not."""
    hidden = ", ".join(f".{axis}" for axis in AXES)
    rules = "".join(f"body:has(#x-{axis}:checked) .{axis} {{ display: block; }} " for axis in AXES)
    return f"{hidden} {{ display: none; }} {rules}"


def _curves(comparison: Comparison) -> str:
    """All pictures, each against every axis, of which one is shown."""
    buttons = "".join(
        f'<label><input type="radio" name="x" id="x-{axis}"{" checked" if axis == "samples" else ""}> {title}</label>'
        for axis, title in AXES.items()
    )
    key = " &nbsp; ".join(_named(run, colour) for run, colour in coloured(comparison.runs))
    found = panels(comparison)
    with Bar[None](total=len(found) * len(AXES), unit="picture", desc="drawing", delay=2) as bar:
        figures = [_figure(panel, bar) for panel in found]
    return f'<div class="keys">against {buttons}<br>{key}</div><div class="panels">{"".join(figures)}</div>'


def _figure(panel: Panel, bar: Bar[Any]) -> str:
    pictures = []
    for axis in AXES:
        pictures.append(f'<div class="{axis}">{draw(panel, axis)}</div>')
        bar.update()
    note = f"<figcaption>{escape(panel.note)}</figcaption>" if panel.note else ""
    return f"<figure>{''.join(pictures)}{note}</figure>"


def _differences(comparison: Comparison) -> str:
    head = ["key", *(_named(run, colour) for run, colour in coloured(comparison.runs)), ""]
    rows = []
    for row in comparison.differences:
        values = [f"<code>{escape(shown(value))}</code>" for value in row.values]
        rows.append(
            [f"<code>{escape(row.key)}</code>", *values, "" if row.is_identity else "may change within a run"]
        )
    return html_table(head, rows, numbers=False)
