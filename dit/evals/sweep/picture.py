"""The picture of a sweep: its first figure against the guidance's scale, and against evaluations of the denoiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit.evals.sweep.results import Group, Results
from dit.evals.sweep.table import varying, words_of
from dit.files import write_picture

WIDTH, HEIGHT = 4.6, 3.9  # inches of a panel
BY_SCALE, BY_NFE = "scale of the guidance", "evaluations of the denoiser per image"


def draw(results: Results, file: Path) -> None:
    """Write a PNG: a column for each run, a row against scale (where it varies) and one against evaluations.

    Against scale each line is at its most steps; against evaluations each is at its best scale and interval.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    space, name = next(results.figures)
    scales = {g.setting.scale for g in results.groups}
    kinds = [BY_SCALE] * (len(scales) > 1) + [BY_NFE] * (len({g.setting.steps for g in results.groups}) > 1)
    kinds = kinds or [BY_NFE]
    runs = results.runs
    size = (WIDTH * len(runs), HEIGHT * len(kinds))
    figure, axes = plt.subplots(len(kinds), len(runs), figsize=size, sharey="row", squeeze=False)
    for row, kind in zip(axes, kinds, strict=True):
        for axis, run in zip(row, runs, strict=True):
            own = [g for g in results.groups if g.run == run and g.value(space, name) is not None]
            lines = _by_scale(own) if kind == BY_SCALE else _by_nfe(results, own, space, name)
            for label, groups in lines:
                _line(axis, label, groups, kind, space, name)
            _floor(axis, results, space, name)
            _dress(axis, kind, mpl)
            axis.set_title(run, fontsize=10)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
        row[0].set_ylabel(f"{name} in {space}")
    figure.tight_layout()
    write_picture(file, figure, dpi=130)
    plt.close(figure)


def _by_scale(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Lines over the scales, each of one interval, guidance, solver and set of weights at its most steps.

    No guidance is a point of all intervals and kinds of guidance.
    """
    axes = [axis for axis in varying(groups) if axis not in ("run", "cfg_scale", "interval", "guidance")]
    ways = list(dict.fromkeys(_way(g) for g in groups if g.setting.scale != 1.0))
    several = [len({way[place] for way in ways}) > 1 for place in (0, 1)]
    lines: dict[str, list[Group]] = {}
    for group in groups:
        words = words_of(group)
        for interval, guidance in ways if group.setting.scale == 1.0 else [_way(group)]:
            parts = [words[axis] for axis in axes]
            parts += [f"t in {interval or '0:1'}"] * several[0] + [guidance] * several[1]
            lines.setdefault(", ".join(parts), []).append(group)
    most = {label: max(g.setting.steps for g in own) for label, own in lines.items()}
    kept = {label: [g for g in own if g.setting.steps == most[label]] for label, own in lines.items()}
    word = "NFE" if any(g.setting.is_budget for g in groups) else "steps"
    return [(f"{label or 'guided'} ({most[label]} {word})", own) for label, own in kept.items()]


def _way(group: Group) -> tuple[str, str]:
    """(interval, guidance) in words."""
    return words_of(group)["interval"], group.setting.guidance


def _by_nfe(
    results: Results, groups: Sequence[Group], space: str, name: str
) -> list[tuple[str, list[Group]]]:
    """Lines over evaluations, each of one solver and set of weights at the guidance that is best at some steps."""
    axes = [axis for axis in varying(groups) if axis in ("weights", "solver")]
    kinds: dict[str, list[Group]] = {}
    for group in groups:
        kinds.setdefault(", ".join(words_of(group)[axis] for axis in axes), []).append(group)
    lines = []
    for label, own in kinds.items():
        best = results.best(space, name, own)
        assert best is not None  # all of them have the figure
        taken = _guidance(best)
        guided = best.setting.words
        is_one = len({_guidance(g) for g in own}) == 1
        at = "" if is_one else f"{best.setting.guidance} {guided['cfg_scale']} {guided['interval']}".strip()
        line = [g for g in own if _guidance(g) == taken]
        lines.append((", ".join(part for part in (label, at) if part) or best.setting.words["solver"], line))
    return lines


def _guidance(group: Group) -> tuple[float, tuple[float, float], str]:
    return group.setting.scale, group.setting.interval, group.setting.guidance


def _line(axis: Any, label: str, groups: Sequence[Group], kind: str, space: str, name: str) -> None:
    place: Callable[[Group], float] = (
        (lambda g: g.setting.scale) if kind == BY_SCALE else (lambda g: g.nfe or 0.0)
    )
    points = sorted(((place(g), g.value(space, name)) for g in groups), key=lambda point: point[0])
    known = [(x, value) for x, value in points if value is not None]
    x, y = [x for x, _ in known], [value.mean for _, value in known]
    errors = [value.error or 0.0 for _, value in known]
    axis.errorbar(
        x, y, yerr=errors if any(errors) else None, marker="o", markersize=4, capsize=2, label=label
    )


def _floor(axis: Any, results: Results, space: str, name: str) -> None:
    floor = results.floors.get(space)
    mean = None if floor is None else floor.mean(name)
    if floor is None or mean is None:
        return
    axis.axhline(mean, color="grey", linestyle="--", linewidth=1, label="real images")
    if (spread := floor.spread(name)) is not None:
        axis.axhspan(mean - spread, mean + spread, color="grey", alpha=0.15)


def _dress(axis: Any, kind: str, mpl: Any) -> None:
    """Scales, ticks where there are points, and a grid."""
    axis.set_xlabel(kind)
    places = sorted(
        {float(x) for line in axis.get_lines() for x in line.get_xdata() if line.get_marker() == "o"}
    )
    values = [float(y) for line in axis.get_lines() for y in line.get_ydata()]
    if kind == BY_NFE:
        axis.set_xscale("log")
    if values and min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    if places:
        axis.set_xticks(places, [f"{x:g}" for x in places])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
