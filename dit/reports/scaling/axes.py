"""Logarithmic axes with few round labels, and colours on a logarithmic scale."""

from __future__ import annotations

from typing import Any

import numpy as np


def label_plainly(axis: Any) -> None:
    """A logarithmic axis of loss, which seldom spans a decade, with plain numbers that do not overlap."""
    import matplotlib as mpl

    low, high = sorted(axis.get_view_interval())
    step = mpl.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    places = [v for v in step.tick_values(low, high) if low <= v <= high and v > 0]
    _ticks(
        axis, places if high / low < 4 else round_numbers(low, high), mpl.ticker.FormatStrFormatter("%.4g")
    )


def label_few(axis: Any) -> None:
    """A logarithmic axis of whatever span with few labels: 1, 2 and 5 where it is short, powers of 10 where long."""
    import matplotlib as mpl

    low, high = sorted(axis.get_view_interval())
    places = round_numbers(low, high)
    _ticks(axis, places, mpl.ticker.FuncFormatter(lambda value, _: _scientific(value)))


def round_numbers(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from low to high: 1, 2 and 5 of each decade, or 1 alone, or every second or third power."""
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for parts, every in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        powers = [power for power in decades if power % every == 0]
        found = [
            part * 10.0**power for power in powers for part in parts if low <= part * 10.0**power <= high
        ]
        if len(found) <= most:
            break
    return found


def _scientific(value: float) -> str:
    """2·10⁵ as matplotlib writes it; powers of 10 without the 1."""
    power = int(np.floor(np.log10(value) + 1e-9))
    part = round(value / 10.0**power, 6)
    return f"$10^{{{power}}}$" if part == 1 else f"${part:g}{{\\cdot}}10^{{{power}}}$"


def _ticks(axis: Any, places: list[float], formatter: Any) -> None:
    import matplotlib as mpl

    axis.set_major_locator(mpl.ticker.FixedLocator(places))
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def shades(values: np.ndarray) -> tuple[Any, Any]:
    """Colours on a logarithmic scale, and what a colour bar needs of them."""
    import matplotlib as mpl

    low, high = float(values.min()), float(values.max())
    scale = mpl.colors.LogNorm(low / 1.3, high * 1.6)  # the ends of viridis are too dark and too light
    mapped = mpl.cm.ScalarMappable(scale, mpl.colormaps["viridis"])
    return mapped.to_rgba, mapped


def colour_bar(axes: Any, mapped: Any, label: str) -> None:
    bar = axes.figure.colorbar(mapped, ax=axes, label=label, pad=0.02)
    label_few(bar.ax.yaxis)
