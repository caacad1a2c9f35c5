"""A fit as text and as a picture, and where the two are written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from dit.errors import Notice
from dit.files import write_picture
from dit.outputs import OutputError, claim, read_record
from dit.scaling.laws.intervals import NAMES
from dit.scaling.laws.record import FILE, KIND, FitRecord

PICTURE = "residuals.png"


def claim_fit(folder: Path) -> None:
    """Look at where a fit will be written: an earlier one is replaced. OutputError where anything else is there."""
    files = [folder / FILE, folder / PICTURE]
    claim(files, overwrite=True)
    there = [file for file in files if file.exists()]
    if there and not (files[0].is_file() and read_record(files[0]).get("kind") == KIND):
        raise OutputError(f"{there[0]} is there already, and is not of a fit: give another place to write to")


def write_fit(record: FitRecord, folder: Path) -> None:
    """Write fit.json and residuals.png."""
    folder.mkdir(parents=True, exist_ok=True)
    record.save(
        folder / FILE
    )  # first: what is stopped behind it is a fit's, which the same command makes anew
    draw_residuals(record, folder / PICTURE)


def warn(texts: list[str]) -> None:
    """Give each text as a Notice."""
    for text in texts:
        warnings.warn(text, Notice, stacklevel=3)


def lines(record: FitRecord) -> list[str]:
    """What a fit says, for a terminal: the law with intervals, the exponents three ways, the held-out rung."""
    values = record.as_json()
    of = [f"{name} {values[name]}" for name in ("metric", "protocol") if values[name]]
    found = [
        ", ".join([f"L = E + A/N^alpha + B/D^beta, {len(record.runs)} runs of {record.source}", *of]),
        f"{'':16s} {'estimate':>11s}   {'95% bootstrap':>26s}   {'95% profile':>26s}",
    ]
    for name in NAMES:
        bootstrap, profile = _ends(record.ci[name]), _ends(record.profile[name])
        found.append(f"{name:16s} {values[name]:11.5g}   {bootstrap}   {profile}")
    found.append(
        f"summed Huber loss of log L {record.huber:.6g} (delta {record.delta:g}), "
        f"FLOPs = {record.flops_per_param_token:.4g} · N · D"
    )
    if record.without_E is not None:
        own = record.without_E
        found.append(
            f"without E: alpha {own['alpha']:.4g}, beta {own['beta']:.4g}, summed Huber loss {own['huber']:.6g}"
        )
    return [*found, *_approaches(record), _held_out(record)]


def _ends(ends: tuple[float | None, float | None]) -> str:
    low, high = ("open" if end is None else f"{end:.5g}" for end in ends)
    return f"[{low:>11s}, {high:>11s}]"


def _approaches(record: FitRecord) -> list[str]:
    words = {"envelope": "approach 1, envelope", "isoflop": "approach 2, isoFLOP parabolas"}
    found = []
    for name, own in record.approaches.items():
        if own["n_opt_exponent"] is None:
            found.append(f"{words[name]}: {own['why']}")
            continue
        bias = "" if own["bias"] is None else f"; off by {own['bias']:+.4f} on exact losses of the law"
        found.append(
            f"{words[name]}: N_opt ∝ C^{own['n_opt_exponent']:.4f} ({len(own['points'])} points{bias})"
        )
    return found


def _held_out(record: FitRecord) -> str:
    own = record.held_out
    if own is None or own["error"] is None:
        return f"held-out largest rung: {'not predicted' if own is None else own['why']}"
    spread = own["seeds_spread"]
    beside = "no two seeds of one point" if spread is None else f"seeds spread by {spread:.2%}"
    return (
        f"held-out largest rung ({len(own['runs'])} runs, up to {own['flops']:.3g} FLOPs) predicted by the "
        f"{own['fitted_runs']} others: {own['error']:+.2%} ({beside})"
    )


# --- the picture -------------------------------------------------------------------------------------------


def draw_residuals(record: FitRecord, file: Path) -> None:
    """Write a PNG: how far each run's loss lies above the law, against N and against FLOPs, coloured by the other."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    params, flops = record.column("params"), record.column("flops")
    percent = 100 * np.expm1(record.column("residual"))
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), sharey=True, layout="constrained")
    for axis, (x, colour, label, other) in zip(
        axes, ((params, flops, "params N", "FLOPs"), (flops, params, "FLOPs", "params N")), strict=True
    ):
        _scatter(figure, axis, x, percent, colour, other)
        axis.set(xlabel=label, xscale="log")
        axis.axhline(0.0, color="grey", linewidth=1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss over the law's, %")
    figure.suptitle(f"residuals of {len(percent)} runs, standard deviation {percent.std():.3g}%", fontsize=10)
    write_picture(file, figure, dpi=130)
    plt.close(figure)


def _scatter(figure: Any, axis: Any, x: np.ndarray, y: np.ndarray, colour: np.ndarray, label: str) -> None:
    drawn = axis.scatter(x, y, c=colour, s=14, norm="log", cmap="viridis")
    figure.colorbar(drawn, ax=axis, label=label)
