"""What each figure of a scaling law draws, on matplotlib's axes."""

from __future__ import annotations

from typing import Any

import numpy as np

from dit.reports.curves import COLOURS
from dit.reports.scaling.axes import colour_bar, label_few, label_plainly, shades
from dit.reports.scaling.material import Material, residuals
from dit.scaling.laws.published import DIT_LAW, DIT_POINTS, PUBLISHED, power

SHOWN = 8  # budgets of a picture at equal FLOPs: more cover each other
OURS, MARK = COLOURS[0], COLOURS[1]
COMPUTE = "training FLOPs $C$"
PARAMS = "parameters $N$"
TOKENS = "tokens $D$"


def _loss_axis(axes: Any, material: Material) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(material.fit.metric or "loss")
    label_plainly(axes.yaxis)


def _budget_mark(axes: Any, material: Material, at: float | None) -> None:
    """A mark at the budget that was asked for."""
    if material.budget is not None and at is not None:
        axes.plot(
            material.budget, at, "*", color=MARK, markersize=10, zorder=5, label="at the budget asked for"
        )


def isoflop(axes: Any, material: Material) -> None:
    """Draw losses against N at equal FLOPs, with the law and its optimum at each budget."""
    fit, groups = material.fit, _spread(material.groups)
    params, loss = fit.column("params"), fit.column("loss")
    middle = np.array([np.exp(np.log(fit.column("flops")[own]).mean()) for own in groups])
    colour, mapped = shades(middle)
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
    colour_bar(axes, mapped, COMPUTE)


def _spread(groups: list[np.ndarray]) -> list[np.ndarray]:
    """At most SHOWN of the budgets, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(groups) - 1, min(len(groups), SHOWN)).round().astype(int))
    return [groups[i] for i in chosen]


def frontier(axes: Any, material: Material) -> None:
    """Draw all losses against C, with the law's lowest loss and its band."""
    fit, band = material.fit, material.band(material.span)
    params = fit.column("params")
    colour, mapped = shades(params)
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
    colour_bar(axes, mapped, PARAMS)


def n_opt(axes: Any, material: Material) -> None:
    """Draw the best N against C, with its band and the other approaches' points."""
    _optimum(axes, material, "params", 1, PARAMS)


def d_opt(axes: Any, material: Material) -> None:
    """Draw the best D against C, the same way."""
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
    label_few(axes.yaxis)
    axes.legend(loc="upper left")


def missed(axes: Any, material: Material) -> None:
    """Draw what the law misses of each run against C."""
    import matplotlib as mpl

    fit = material.fit
    params = fit.column("params")
    colour, mapped = shades(params)
    axes.axhline(0, color="#666", linewidth=0.9)
    axes.scatter(fit.column("flops"), residuals(fit), s=13, c=colour(params), linewidth=0)
    axes.set(xscale="log", xlabel=COMPUTE, ylabel="measured / predicted − 1")
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    colour_bar(axes, mapped, PARAMS)


def against_rates(axes: Any, material: Material) -> None:
    """Draw losses against the learning rate, a line for each size and number of tokens."""
    found = material.rates
    colour, mapped = shades(np.array([one.params for one in found]))
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
    colour_bar(axes, mapped, PARAMS)


def rate_drift(axes: Any, material: Material) -> None:
    """Draw the best learning rates against N, with their power law."""
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
    label_few(axes.yaxis)


def published_sizes(axes: Any, material: Material) -> None:
    """Draw the best N against C beside the published laws."""
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
    label_few(axes.yaxis)
    axes.legend(loc="upper left", title="exponent of $N_{opt}$", title_fontsize=7.5)


def against_sampling(axes: Any, material: Material) -> None:
    """Draw losses against the FLOPs of sampling."""
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
    colour, mapped = shades(shade)
    for own in joined:
        order = own[np.argsort(cost[own], kind="stable")]
        axes.plot(cost[order], loss[order], "-", color=colour(float(shade[order].mean())), linewidth=0.9)
    axes.scatter(cost, loss, s=11, c=colour(shade), linewidth=0, zorder=2)
    axes.set(
        xscale="log",
        xlabel="sampling FLOPs of an image" + (", each evaluation" if evaluations is None else ""),
    )
    _loss_axis(axes, material)
    colour_bar(axes, mapped, COMPUTE if evaluations is None else PARAMS)


def dit_points(axes: Any, material: Material) -> None:
    """Draw the 12 models of DiT and their law."""
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
    label_plainly(axes.yaxis)
    axes.legend()
