"""What is written of a coordinate check: a picture, a CSV line for each size, and a record with the slopes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit.config import to_dict
from dit.files import as_csv, write_atomically, write_picture
from dit.outputs import claim, write_record
from dit.scaling.mup.coordinates import Check, Coordinates, Setting

FILES = ("coordinates.png", "coordinates.csv", "coordinates.json")
PANEL = 3.4  # inches, of a panel's side


def protocol(setting: Setting, check: Check) -> dict[str, Any]:
    """Give what decides about the figures: JSON values."""
    return {
        "check": to_dict(check),
        "model": to_dict(setting.model),
        "optim": to_dict(setting.optim),
        "task": repr(setting.task),
        "data": setting.data,
    }


def claim_files(out: Path, made: Mapping[str, Any], overwrite: bool) -> None:
    """Look at where a check's files will lie, and make the folder. OutputError where another's lie there."""
    places = [out / name for name in FILES]
    claim(places, {"protocol": made}, record=out / FILES[-1], overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)


def write(found: Coordinates, out: Path, made: Mapping[str, Any]) -> None:
    """Write the picture, the CSV of all sizes, and the record: protocol, slopes and verdicts."""
    verdicts = {name: found.verdict(name) for name in found.check.parametrizations}
    slopes = [asdict(slope) for slope in found.slopes]
    # the record first: what is stopped behind it is made anew by the same command
    write_record(out / FILES[2], {"protocol": made, "slopes": slopes, "verdicts": verdicts})
    write_csv(out / FILES[1], [asdict(size) for size in found.sizes])
    draw(found, out / FILES[0])


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys, with these as the first line."""
    write_atomically(file, as_csv(list(rows[0]), rows).encode())


def table(found: Coordinates) -> str:
    """Give the slopes after the last step as Markdown: a line a kind of layer, a column a parametrization."""
    names, last = found.check.parametrizations, max(found.check.steps)
    slopes = {(s.parametrization, s.layer): s.change for s in found.slopes if s.step == last}
    layers = dict.fromkeys(layer for _, layer in slopes)
    lines = [
        f"| change after {last} steps, width to the power of | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for layer in layers:
        values = (slopes.get((name, layer)) for name in names)
        cells = ("" if value is None else f"{value:+.2f}" for value in values)
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Coordinates, file: Path) -> None:
    """Write a PNG: changes against the width, a row a parametrization, a column a step, a line a kind of layer."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names, steps = found.check.parametrizations, sorted(found.check.steps)
    size = (PANEL * len(steps) + 2.2, PANEL * len(names))
    figure, axes = plt.subplots(
        len(names), len(steps), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    layers = list(dict.fromkeys(s.layer for s in found.sizes))
    colours = {layer: plt.get_cmap("tab20")(i % 20) for i, layer in enumerate(layers)}
    for row, name in zip(axes, names, strict=True):
        for axis, step in zip(row, steps, strict=True):
            for layer in layers:
                own = [s for s in found.sizes if (s.parametrization, s.step, s.layer) == (name, step, layer)]
                points = _means((s.width, s.change) for s in own)
                if points and all(y > 0 for _, y in points):
                    axis.plot(
                        *zip(*points, strict=True), "o-", ms=3, lw=1.2, color=colours[layer], label=layer
                    )
            axis.set(title=f"{name}, after {step} step{'s' * (step > 1)}", xscale="log", yscale="log")
            _tick(axis, sorted({s.width for s in found.sizes}))
        row[0].set_ylabel("change of activations, RMS")
    for axis in axes[-1]:
        axis.set_xlabel("width")
    handles = {h.get_label(): h for row in axes for axis in row for h in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
    write_picture(file, figure, dpi=130)
    plt.close(figure)


def _tick(axis: Any, places: Sequence[float]) -> None:
    """Ticks where there are points, and a grid."""
    axis.set_xticks(places, [f"{x:g}" for x in places])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _means(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The mean y at each x, in order of x."""
    by_x: dict[float, list[float]] = {}
    for x, y in points:
        by_x.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(by_x.items())]
