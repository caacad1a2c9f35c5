"""The figures of a scaling law: each is drawn once, and kept as SVG for the page and as PNG for a paper."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit.reports.curves import COLOURS
from dit.reports.scaling.material import Material, residuals
from dit.scaling.laws.published import DIT_LAW, DIT_POINTS, PUBLISHED, power

SIZE = (4.8, 3.5)  # inches
SHOWN = 8  # budgets of a picture at equal FLOPs: more cover each other
OURS, MARK = COLOURS[0], COLOURS[1]
COMPUTE = "training FLOPs $C$"
PARAMS = "parameters $N$"
TOKENS = "tokens $D$"


@dataclass(frozen=True)
class Figure:
    """A picture. name: of its files. note: what has to be known to read it."""

    name: str
    title: str
    note: str
    draw: Callable[[Any, Material], None]  # on matplotlib's axes


def figures(material: Material) -> list[Figure]:
    """The figures that can be drawn of this material, in the page's order."""
    return [figure for figure, can in _all(material) if can]


def _all(material: Material) -> Iterator[tuple[Figure, bool]]:
    """Each figure, and whether there is what it shows."""
    metric = material.fit.metric or "loss"
    interval = "Band: 95% of the bootstrap's laws."
    budgets = len(material.groups)
    shown = f"{SHOWN} of {budgets} budgets are shown. " if budgets > SHOWN else ""
    yield Figure(
        "isoflop", "Equal training FLOPs",
        f"Each colour is a budget: runs (dots), the law at that budget (line) and its optimum (cross). {shown}"
        f"Figure: {metric}.", _isoflop,
    ), bool(material.groups)  # fmt: skip
    yield Figure(
        "frontier", "Loss against compute",
        f"Every run; the law's lowest loss at a budget (line). {interval} Dashed: E, which nothing lowers.", _frontier,
    ), True  # fmt: skip
    yield Figure("n_opt", "The best size at a budget", interval, _n_opt), True
    yield Figure("d_opt", "The best number of tokens at a budget", interval, _d_opt), True
    yield Figure(
        "residuals", "What the law misses",
        "Measured over predicted loss, less 1. A slope or a bend here is what the law's shape cannot follow.",
        _residuals,
    ), True  # fmt: skip
    yield Figure(
        "rates", "Loss against the learning rate",
        "Each line is a size at one number of tokens; its best rate (cross) by a parabola through three points.",
        _rates,
    ), bool(material.rates)  # fmt: skip
    yield Figure(
        "rate_drift", "The best learning rate against size",
        "A slope says that a rate found at a small size is wrong at a large one.", _drift,
    ), sum(one.best is not None for one in material.rates) >= 2  # fmt: skip
    yield Figure(
        "published", "Best sizes, ours and published",
        "Other data, models and losses: slopes can be compared, heights hardly.", _published,
    ), True  # fmt: skip
    yield Figure(
        "sampling", "Quality against sampling FLOPs",
        "Sampling FLOPs of an image: evaluations of the network times those of one, a third of a sample's training "
        "FLOPs." if "evaluations" in material.more else
        "Sampling FLOPs of one evaluation of the network; a drawing takes as many times that as its solver evaluates. "
        "Lines join runs of one training budget.", _sampling,
    ), material.forward_flops is not None  # fmt: skip
    yield Figure(
        "dit", "DiT: FID against forward FLOPs",
        "The 12 models of arXiv 2212.09748, table 4, after 400,000 steps; FID of 50,000 samples without guidance.",
        _dit,
    ), True  # fmt: skip


def drawn(figure: Figure, material: Material) -> tuple[str, bytes]:
    """The picture as SVG, without the XML header, and as PNG at 200 dots an inch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "dit", "font.size": 9, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 10, "legend.fontsize": 7.5, "legend.frameon": False,
        "mathtext.fontset": "dejavusans",
    }  # fmt: skip
    with mpl.rc_context(style):
        canvas, axes = plt.subplots(figsize=SIZE, layout="constrained")
        figure.draw(axes, material)
        if axes.get_xscale() == "log":
            _few(axes.xaxis)
        axes.set_title(figure.title)
        axes.grid(alpha=0.2, linewidth=0.6)
        canvas.draw_without_rendering()
        canvas.set_layout_engine("none")  # laid out once, for both
        vector, pixels = io.StringIO(), io.BytesIO()
        canvas.savefig(vector, format="svg", metadata={"Date": None})
        canvas.savefig(pixels, format="png", dpi=200)
        plt.close(canvas)
    text = vector.getvalue()
    return text[text.index("<svg") :], pixels.getvalue()


# --- parts -------------------------------------------------------------------------------------------------


def _plain(axis: Any) -> None:
    """A logarithmic axis of loss, which seldom spans a decade, with plain numbers that do not overlap."""
    import matplotlib as mpl

    low, high = sorted(axis.get_view_interval())
    step = mpl.ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    places = [v for v in step.tick_values(low, high) if low <= v <= high and v > 0]
    _ticks(axis, places if high / low < 4 else _round(low, high), mpl.ticker.FormatStrFormatter("%.4g"))


def _few(axis: Any) -> None:
    """A logarithmic axis of whatever span with few labels: 1, 2 and 5 where it is short, powers of 10 where long."""
    import matplotlib as mpl

    low, high = sorted(axis.get_view_interval())
    places = _round(low, high)
    _ticks(axis, places, mpl.ticker.FuncFormatter(lambda value, _: _scientific(value)))


def _round(low: float, high: float, most: int = 7) -> list[float]:
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


def _loss_axis(axes: Any, material: Material) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(material.fit.metric or "loss")
    _plain(axes.yaxis)


def _shades(values: np.ndarray) -> tuple[Any, Any]:
    """Colours on a logarithmic scale, and what a colour bar needs of them."""
    import matplotlib as mpl

    low, high = float(values.min()), float(values.max())
    scale = mpl.colors.LogNorm(low / 1.3, high * 1.6)  # the ends of viridis are too dark and too light
    mapped = mpl.cm.ScalarMappable(scale, mpl.colormaps["viridis"])
    return mapped.to_rgba, mapped


def _bar(axes: Any, mapped: Any, label: str) -> None:
    bar = axes.figure.colorbar(mapped, ax=axes, label=label, pad=0.02)
    _few(bar.ax.yaxis)


def _budget_mark(axes: Any, material: Material, at: float | None) -> None:
    """A mark at the budget that was asked for."""
    if material.budget is not None and at is not None:
        axes.plot(
            material.budget, at, "*", color=MARK, markersize=10, zorder=5, label="at the budget asked for"
        )


# --- figures -----------------------------------------------------------------------------------------------


def _isoflop(axes: Any, material: Material) -> None:
    fit, groups = material.fit, _spread(material.groups)
    params, loss = fit.column("params"), fit.column("loss")
    middle = np.array([np.exp(np.log(fit.column("flops")[own]).mean()) for own in groups])
    colour, mapped = _shades(middle)
    for own, flops in zip(groups, middle, strict=True):
        sizes = np.geomspace(params[own].min() / 1.15, params[own].max() * 1.15, 80)
        axes.plot(
            sizes,
            fit.law.loss(sizes, flops / fit.flops_per_param_token / sizes),
            color=colour(flops),
            linewidth=1,
        )
        axes.plot(params[own], loss[own], "o", color=colour(flops), markersize=3.5)
        best, _, least = fit.law.optimum(flops, fit.flops_per_param_token)
        if sizes[0] <= best <= sizes[-1]:
            axes.plot(best, least, "x", color="#222", markersize=5)
    axes.set(xscale="log", xlabel=PARAMS)
    _loss_axis(axes, material)
    _bar(axes, mapped, COMPUTE)


def _spread(groups: list[np.ndarray]) -> list[np.ndarray]:
    """At most SHOWN of the budgets, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), SHOWN)).round().astype(int))
    return [groups[i] for i in chosen]


def _frontier(axes: Any, material: Material) -> None:
    fit, band = material.fit, material.band(material.span)
    params = fit.column("params")
    colour, mapped = _shades(params)
    axes.scatter(fit.column("flops"), fit.column("loss"), s=11, c=colour(params), linewidth=0, zorder=2)
    axes.fill_between(band.flops, band.loss[1], band.loss[2], color=MARK, alpha=0.18, linewidth=0)
    axes.plot(band.flops, band.loss[0], color=MARK, linewidth=1.4, label="lowest loss by the law", zorder=3)
    if fit.law.E > 0:
        axes.axhline(fit.law.E, color="#666", linewidth=0.9, linestyle="--", label=f"E = {fit.law.E:.4g}")
    if material.budget is not None:
        _budget_mark(axes, material, float(material.band(np.array([material.budget])).loss[0, 0]))
    axes.set(xscale="log", xlabel=COMPUTE)
    _loss_axis(axes, material)
    axes.legend(loc="upper right")
    _bar(axes, mapped, PARAMS)


def _n_opt(axes: Any, material: Material) -> None:
    _optimum(axes, material, "params", 1, PARAMS)


def _d_opt(axes: Any, material: Material) -> None:
    _optimum(axes, material, "tokens", 2, TOKENS)


def _optimum(axes: Any, material: Material, name: str, at: int, label: str) -> None:
    """N_opt or D_opt against C: the law with its band, and the points of the two other approaches."""
    fit, band = material.fit, material.band(material.span)
    values = getattr(band, name)
    exponent = fit.law.n_opt_exponent if name == "params" else fit.law.d_opt_exponent
    letter = "N" if name == "params" else "D"
    axes.fill_between(band.flops, values[1], values[2], color=OURS, alpha=0.18, linewidth=0)
    axes.plot(
        band.flops,
        values[0],
        color=OURS,
        linewidth=1.4,
        label=f"law: ${letter} \\propto C^{{{exponent:.3f}}}$",
    )
    for way, marker, title in (("isoflop", "o", "parabolas"), ("envelope", "^", "envelope")):
        points = fit.approaches[way]["points"]
        if points:
            own = fit.approaches[way][f"{letter.lower()}_opt_exponent"] if len(points) >= 3 else None
            told = f": $C^{{{own:.3f}}}$" if own is not None else ""
            axes.plot(
                [point[0] for point in points], [point[at] for point in points], marker, markersize=4,
                color=COLOURS[2 if way == "isoflop" else 4], label=f"{title}{told}", linestyle="", alpha=0.85,
            )  # fmt: skip
    if material.budget is not None:
        _budget_mark(axes, material, float(getattr(material.band(np.array([material.budget])), name)[0, 0]))
    axes.set(xscale="log", yscale="log", xlabel=COMPUTE, ylabel=label)
    _few(axes.yaxis)
    axes.legend(loc="upper left")


def _residuals(axes: Any, material: Material) -> None:
    import matplotlib as mpl

    fit = material.fit
    params = fit.column("params")
    colour, mapped = _shades(params)
    axes.axhline(0, color="#666", linewidth=0.9)
    axes.scatter(fit.column("flops"), residuals(fit), s=13, c=colour(params), linewidth=0)
    axes.set(xscale="log", xlabel=COMPUTE, ylabel="measured / predicted − 1")
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    _bar(axes, mapped, PARAMS)


def _rates(axes: Any, material: Material) -> None:
    found = material.rates
    colour, mapped = _shades(np.array([one.params for one in found]))
    for one in found:
        axes.plot(one.lr, one.loss, "o-", color=colour(one.params), markersize=3.5, linewidth=1)
        if one.best is not None:
            axes.plot(
                one.best,
                np.interp(np.log(one.best), np.log(one.lr), one.loss),
                "x",
                color="#222",
                markersize=6,
            )
    axes.set(xscale="log", xlabel="learning rate")
    _loss_axis(axes, material)
    _bar(axes, mapped, PARAMS)


def _drift(axes: Any, material: Material) -> None:
    found = [one for one in material.rates if one.best is not None]
    params, best = np.array([one.params for one in found]), np.array([one.best for one in found], float)
    axes.plot(params, best, "o", color=OURS, markersize=5)
    if len(np.unique(params)) >= 2:
        slope, end = np.polyfit(np.log(params), np.log(best), 1)
        ends = np.array([params.min(), params.max()])
        axes.plot(ends, np.exp(end) * ends**slope, color=OURS, linewidth=1, label=f"$N^{{{slope:.2f}}}$")
        axes.legend()
    axes.set(xscale="log", yscale="log", xlabel=PARAMS, ylabel="best learning rate")
    axes.set_ylim(best.min() / 2, best.max() * 2)
    _few(axes.yaxis)


def _published(axes: Any, material: Material) -> None:
    flops = material.span
    band = material.band(flops)
    axes.fill_between(flops, band.params[1], band.params[2], color=OURS, alpha=0.18, linewidth=0)
    axes.plot(
        flops, band.params[0], color=OURS, linewidth=1.6, label=f"ours: {material.fit.law.n_opt_exponent:.3f}"
    )
    for law, colour in zip(PUBLISHED, COLOURS[1:], strict=False):
        if law.n_opt is not None:
            label = f"{law.name}: {law.n_opt[1]:.3f}"
            axes.plot(flops, power(law.n_opt, flops), "--", color=colour, linewidth=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel=COMPUTE, ylabel=f"best {PARAMS}")
    _few(axes.yaxis)
    axes.legend(loc="upper left", title="exponent of $N_{opt}$", title_fontsize=7.5)


def _sampling(axes: Any, material: Material) -> None:
    fit, forward = material.fit, material.forward_flops
    assert forward is not None  # else there is no such figure
    evaluations = material.more.get("evaluations")
    cost = forward if evaluations is None else forward * evaluations
    loss, params, flops = (fit.column(name) for name in ("loss", "params", "flops"))
    joined = (
        material.groups
        if evaluations is None
        else [np.flatnonzero(params == one) for one in np.unique(params)]
    )
    shade = flops if evaluations is None else params
    colour, mapped = _shades(shade)
    for own in joined:
        order = own[np.argsort(cost[own], kind="stable")]
        axes.plot(cost[order], loss[order], "-", color=colour(float(shade[order].mean())), linewidth=0.9)
    axes.scatter(cost, loss, s=11, c=colour(shade), linewidth=0, zorder=2)
    axes.set(
        xscale="log",
        xlabel="sampling FLOPs of an image" + (", each evaluation" if evaluations is None else ""),
    )
    _loss_axis(axes, material)
    _bar(axes, mapped, COMPUTE if evaluations is None else PARAMS)


def _dit(axes: Any, material: Material) -> None:
    for family, colour in zip(("S", "B", "L", "XL"), COLOURS, strict=False):
        own = {name: point for name, point in DIT_POINTS.items() if name.split("/")[0] == family}
        axes.plot(
            [2e9 * work for work, _ in own.values()], [fid for _, fid in own.values()], "o", color=colour,
            markersize=4, label=f"DiT-{family}",
        )  # fmt: skip
    work = np.geomspace(0.3, 150, 50)
    label = f"FID = {DIT_LAW[0]:g} · G$^{{{DIT_LAW[1]}}}$"
    axes.plot(2e9 * work, power(DIT_LAW, work), color="#666", linewidth=1.1, label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOPs of a forward pass (2 · multiply-adds)", ylabel="FID-50K"
    )
    _plain(axes.yaxis)
    axes.legend()
