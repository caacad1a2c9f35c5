"""Curves of several runs as pictures (SVG) that a page can hold: each against samples, FLOPs and seconds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit.reports.comparison import HELD_OUT_LOSS, Alike, Comparison
from dit.reports.told import RunTold
from dit.train.meters import group_of

POINTS = 300  # of a curve; more are averaged in as many stretches
COLOURS = ("#1f5fa8", "#d2541b", "#2f8f4e", "#8f4fb3", "#b5912b", "#4a4a4a", "#c23b6b", "#3aa3b5")
AXES = {"samples": "samples seen", "flops": "training FLOPs", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Line:
    """A curve of a run: values (N,) at steps (N,), which may be NaN; band: lower and upper ends (N,), or none."""

    run: RunTold
    colour: str
    steps: list[int]
    values: list[float]
    band: tuple[list[float], list[float]] | None = None


@dataclass(frozen=True)
class Panel:
    """A picture of one figure. note: what has to be known to read it."""

    title: str
    lines: list[Line]
    is_log: bool = False
    note: str = ""


def panels(comparison: Comparison) -> list[Panel]:
    """All pictures there are to draw: figures of drawn images, held-out losses, training losses, health, speed."""
    found = [_of_figure(comparison, alike) for alike in comparison.figures]
    apart = f"not comparable: {', '.join(comparison.unlike)} differ" if comparison.unlike else ""
    for key, title, note in [
        ("loss", "training loss", apart),
        *[(f"loss_q{q}", f"training loss, t in [{(q - 1) / 4:g}, {q / 4:g}]", apart) for q in (1, 2, 3, 4)],
        *[(key, f"training: {key}", apart) for key in _others(comparison.runs)],
        ("grad_norm", "norm of the gradient", ""),
        ("images_per_s", "images a second", ""),
    ]:
        drawn = (_of_rows(run, colour, key) for run, colour in coloured(comparison.runs))
        lines = [line for line in drawn if line is not None]
        if lines:
            found.append(Panel(title, lines, key != "images_per_s", note))
    return found


def _others(runs: Sequence[RunTold]) -> list[str]:
    """What a task tells of its training beside the loss: terms of it, or an accuracy."""
    keys = dict.fromkeys(key for run in runs for key in run.last)
    return [
        key
        for key in keys
        if group_of(key).startswith("train/") and key not in ("step", "loss", "batch_hash")
    ]


def coloured(runs: Sequence[RunTold]) -> list[tuple[RunTold, str]]:
    """Each run with its colour; of many runs colours come again."""
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]


def _of_figure(comparison: Comparison, alike: Alike) -> Panel:
    """The course of one figure, by one protocol, of one kind of weights."""
    lines = []
    for run, colour in coloured(comparison.runs):
        mine = sorted((one for one in comparison.figures[alike] if one.run is run), key=lambda one: one.step)
        if mine:
            ends = [one.interval for one in mine if one.interval is not None]
            band = ([lo for lo, _ in ends], [hi for _, hi in ends]) if len(ends) == len(mine) else None
            lines.append(Line(run, colour, [one.step for one in mine], [one.value for one in mine], band))
    return Panel(str(alike), lines, alike.figure == HELD_OUT_LOSS, f"protocol {alike.digest}")


def _of_rows(run: RunTold, colour: str, key: str) -> Line | None:
    """A figure of metrics.jsonl; None where the run has none of it."""
    rows = [row for row in run.steps if row.get(key) is not None]
    values = [float(row[key]) for row in rows]
    return Line(run, colour, [row["step"] for row in rows], values) if rows else None


def thinned(
    steps: Sequence[int], values: Sequence[float], points: int = POINTS
) -> tuple[list[float], list[float]]:
    """At most so many points: the means over as many stretches of the curve."""
    if len(steps) <= points:
        return [float(s) for s in steps], list(values)
    parts = list(
        zip(np.array_split(np.asarray(steps, float), points), np.array_split(values, points), strict=True)
    )
    return [float(s.mean()) for s, _ in parts], [float(v.mean()) for _, v in parts]


def at(axis: str, run: RunTold, steps: Sequence[float]) -> list[float] | None:
    """Where steps of a run lie on an axis (AXES); None where the run does not tell."""
    if axis == "samples":
        return [step * run.batch for step in steps]
    if axis == "flops":
        each = run.flops_per_sample
        return None if each is None else [step * run.batch * each for step in steps]
    return run.seconds_at(steps)


def draw(panel: Panel, axis: str) -> str:
    """The picture as SVG, without the XML header: a line a run, in the colour of the run's place."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dit", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        for line in panel.lines:
            _draw_line(axes, line, axis)
        axes.set(title=panel.title, xlabel=AXES[axis])
        if panel.is_log and all(v > 0 for line in panel.lines for v in line.values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
            axes.yaxis.set_minor_formatter(mpl.ticker.ScalarFormatter())
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
        axes.xaxis.set_major_formatter(mpl.ticker.EngFormatter(sep=""))
        axes.grid(alpha=0.3)
        held = io.StringIO()
        figure.savefig(held, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = held.getvalue()
    return text[text.index("<svg") :]


def _draw_line(axes: Any, line: Line, axis: str) -> None:
    """One run's curve, with its band where it has one."""
    steps, values = thinned(line.steps, line.values)
    x = at(axis, line.run, steps)
    if x is None:
        return
    few = "o" if len(x) < 25 else ""
    axes.plot(x, values, linewidth=1.2, marker=few, markersize=3, color=line.colour)
    if line.band is not None and len(steps) == len(line.steps):
        axes.fill_between(x, *line.band, alpha=0.15, color=line.colour, linewidth=0)
