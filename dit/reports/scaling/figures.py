"""The figures of a scaling law: each is drawn once, and kept as SVG for the page and as PNG for a paper."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dit.reports.scaling import drawings
from dit.reports.scaling.axes import label_few
from dit.reports.scaling.material import Material

SIZE = (4.8, 3.5)  # inches


@dataclass(frozen=True)
class Figure:
    """A picture. name: of its files. note: what has to be known to read it."""

    name: str
    title: str
    note: str
    draw: Callable[[Any, Material], None]  # on matplotlib's axes


def figures(material: Material) -> list[Figure]:
    """The figures that can be drawn of this material, in the page's order."""
    return [figure for figure, can in (*_of_the_law(material), *_beside(material)) if can]


def _of_the_law(material: Material) -> Iterator[tuple[Figure, bool]]:
    """Each figure of the law itself, and whether there is what it shows."""
    metric = material.fit.metric or "loss"
    interval = "Band: 95% of the bootstrap's laws."
    budgets = len(material.groups)
    shown = f"{drawings.SHOWN} of {budgets} budgets are shown. " if budgets > drawings.SHOWN else ""
    yield Figure(
        "isoflop", "Equal training FLOPs",
        f"Each colour is a budget: runs (dots), the law at that budget (line) and its optimum (cross). {shown}"
        f"Figure: {metric}.", drawings.isoflop,
    ), bool(material.groups)  # fmt: skip
    yield Figure(
        "frontier", "Loss against compute",
        f"Every run; the law's lowest loss at a budget (line). {interval} Dashed: E, which nothing lowers.",
        drawings.frontier,
    ), True  # fmt: skip
    yield Figure("n_opt", "The best size at a budget", interval, drawings.n_opt), True
    yield Figure("d_opt", "The best number of tokens at a budget", interval, drawings.d_opt), True
    yield Figure(
        "residuals", "What the law misses",
        "Measured over predicted loss, less 1. A slope or a bend here is what the law's shape cannot follow.",
        drawings.missed,
    ), True  # fmt: skip


def _beside(material: Material) -> Iterator[tuple[Figure, bool]]:
    """Each figure of rates, sampling and published laws, and whether there is what it shows."""
    yield Figure(
        "rates", "Loss against the learning rate",
        "Each line is a size at one number of tokens; its best rate (cross) by a parabola through three points.",
        drawings.against_rates,
    ), bool(material.rates)  # fmt: skip
    yield Figure(
        "rate_drift", "The best learning rate against size",
        "A slope says that a rate found at a small size is wrong at a large one.", drawings.rate_drift,
    ), sum(one.best is not None for one in material.rates) >= 2  # fmt: skip
    yield Figure(
        "published", "Best sizes, ours and published",
        "Other data, models and losses: slopes can be compared, heights hardly.", drawings.published_sizes,
    ), True  # fmt: skip
    yield Figure(
        "sampling", "Quality against sampling FLOPs",
        "Sampling FLOPs of an image: evaluations of the network times those of one, a third of a sample's training "
        "FLOPs." if "evaluations" in material.more else
        "Sampling FLOPs of one evaluation of the network; a drawing takes as many times that as its solver evaluates. "
        "Lines join runs of one training budget.", drawings.against_sampling,
    ), material.forward_flops is not None  # fmt: skip
    yield Figure(
        "dit", "DiT: FID against forward FLOPs",
        "The 12 models of arXiv 2212.09748, table 4, after 400,000 steps; FID of 50,000 samples without guidance.",
        drawings.dit_points,
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
            label_few(axes.xaxis)
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
