"""What is written of an ablation: a table as Markdown, a CSV line for each figure and run, a picture, and a record."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit.config import to_dict
from dit.errors import plural
from dit.files import as_csv, write_atomically, write_picture
from dit.outputs import write_record
from dit.scaling.ablation.judged import QUARTERS, Against, Figure, Found
from dit.scaling.ablation.study import FILES, IDENTITY, Ablation, Variant
from dit.scaling.collecting import FILE
from dit.scaling.planned import ScalingError
from dit.scaling.states import LOGS

COLUMNS = ("change", "budget", "lr", "seed", "figure", "value", "protocol", "run")
WORDS = {FILE: "held-out loss", "velocity_error": "velocity error"}


def write(ablation: Ablation, found: Found) -> str:
    """Write FILES into the ablation's folder, and give the Markdown. ScalingError where nothing was measured."""
    if not found.figures:
        raise ScalingError(f"nothing was measured in {ablation.out}: why each run ended is in {LOGS}/")
    text = table(ablation, found)
    rows = list(_rows(found))
    picture, lines, page, kept = (ablation.out / name for name in FILES)
    write_atomically(lines, as_csv(COLUMNS, rows).encode())
    write_atomically(page, f"{text}\n".encode())
    draw(ablation, found, picture)
    write_record(
        kept, {**IDENTITY, "spec": to_dict(ablation.spec), "compared": list(_compared(ablation, found))}
    )
    return text


def table(ablation: Ablation, found: Found) -> str:
    """Give all tables as Markdown: means with spreads, differences to each baseline with verdicts, quarters of t."""
    parts: list[str] = []
    for budget in ablation.spec.budgets:
        own = [v for v in ablation.variants if v.budget == budget]
        parts += [f"## {budget:.3g} training FLOPs a run", _means(ablation, found, own)]
        parts += [_differences(ablation, found, own, name) for name in ablation.spec.baselines]
        parts += [_quarters(found, own, name) for name in QUARTERS if _named(found, QUARTERS[name])]
    return "\n\n".join([*parts, *_notes(ablation, found)])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _means(ablation: Ablation, found: Found, variants: Sequence[Variant]) -> str:
    head = ["change", "rate", "steps", "FLOPs a sample", *(_title(f) for f in found.main)]
    rows = []
    for v in variants:
        rate = found.rates.get(v)
        tried = "none complete" if rate is None else f"{rate.lr:g}" + " †" * rate.is_at_edge
        cells = [_mean(figure, v) for figure in found.main]
        name = v.change + " (baseline)" * (v.change in ablation.spec.baselines)
        rows.append([name, tried, f"{ablation.steps(v):,}", f"{ablation.cost(v).training_flops:.4g}", *cells])
    return _markdown(head, rows)


def _differences(ablation: Ablation, found: Found, variants: Sequence[Variant], baseline: str) -> str:
    others = [v for v in variants if v.change != baseline]
    rows = []
    for v in others:
        cells = [_cell(figure, v, figure.against(v, baseline, len(others))) for figure in found.main]
        rows.append([v.change, *cells])
    return f"Against {baseline}:\n\n" + _markdown([f"less {baseline}", *map(_title, found.main)], rows)


def _quarters(found: Found, variants: Sequence[Variant], name: str) -> str:
    figures = _named(found, QUARTERS[name])
    head = [f"{WORDS[name]} at t in", "[0, ¼)", "[¼, ½)", "[½, ¾)", "[¾, 1]"][: 1 + len(figures)]
    return _markdown(head, [[v.change, *(_mean(figure, v) for figure in figures)] for v in variants])


def _named(found: Found, names: Sequence[str]) -> list[Figure]:
    return [figure for figure in found.figures if figure.name in names]


def _title(figure: Figure) -> str:
    return WORDS.get(figure.name, figure.name) + (" ↓" if figure.low_is_good else " ↑")


def _mean(figure: Figure, variant: Variant) -> str:
    known = figure.mean_and_spread(variant)
    if known is None:
        return "–"
    mean, spread = known
    return f"{mean:.4g}" if math.isnan(spread) else f"{mean:.4g} ± {spread:.2g}"


def _cell(figure: Figure, variant: Variant, found: Against | None) -> str:
    if found is None:
        return "not compared" if variant in figure.values else "–"
    half = "" if math.isinf(found.difference.half) else f" ± {found.difference.half:.2g}"
    outcome = found.outcome if found.outcome == "not distinguishable" else f"**{found.outcome}**"
    return f"{found.difference.mean:+.3g}{half} ({found.ratio:.3g}×): {outcome}"


def _notes(ablation: Ablation, found: Found) -> Iterator[str]:
    spec = ablation.spec
    cfg = ablation.configs[spec.baselines[0]]
    chosen = (
        f"Rates: each change has the best of {', '.join(f'{lr:g}' for lr in sorted(spec.lrs))} by the held-out loss of "
        f"its own objective on seed {spec.tune_seed}"
        if spec.is_tuned
        else f"Rate: {spec.lrs[0]:g} for all, which may suit one change better than another"
    )
    edge = "; † at the end of the rates: a better one may lie beyond" if any(
        rate.is_at_edge for rate in found.rates.values()
    ) else ""  # fmt: skip
    yield (
        f"{chosen}{edge}. Means ± standard deviations over {plural(len(spec.seeds), 'seed')} "
        f"({', '.join(map(str, spec.seeds))}), EMA weights, equal training FLOPs with auxiliary forward passes. "
        "Differences are paired by seed; ± is what chance does in 95 % of ablations, for all changes of a figure "
        "together (Student's t, Bonferroni)."
    )
    if len(spec.seeds) == 1:
        yield "One seed tells no change from chance: give more `seeds`."
    if cfg.evaluate.reference is not None:
        drawn = cfg.evaluate
        guided = "no guidance" if not drawn.guidance and drawn.cfg_scale == 1 else "guided"
        yield (
            f"Images: {drawn.num_samples:,} of each run, {guided}, against {drawn.reference}; "
            + "; ".join(_protocols(found))
        )
    if any(not figure.is_common for figure in found.figures if figure.name in (FILE, *QUARTERS[FILE])):
        yield (
            "Held-out losses of unlike objectives are of unlike things and not compared. The velocity error is: the "
            "straight path's, at the same samples, noise and noise levels."
        )
    if found.missing:
        failed = "; ".join(f"{name} ({why})" for name, why in found.missing.items())
        yield f"Missing, and no part of any mean: {failed}. Why a run failed is in {LOGS}/."


def _protocols(found: Found) -> Iterator[str]:
    for figure in found.main:
        if figure.name not in WORDS:
            yield f"{figure.name}: protocol {' and '.join(dict.fromkeys(figure.protocols.values()))}"


# --- as data ---------------------------------------------------------------------------------------------------


def _rows(found: Found) -> Iterator[dict[str, Any]]:
    for figure in found.figures:
        for variant, values in figure.values.items():
            lr = found.rates[variant].lr
            for seed, value in values.items():
                yield {
                    "change": variant.change,
                    "budget": variant.budget,
                    "lr": lr,
                    "seed": seed,
                    "figure": figure.name,
                    "value": value,
                    "protocol": figure.protocols[variant],
                    "run": variant.run(lr, seed),
                }


def _compared(ablation: Ablation, found: Found) -> Iterator[dict[str, Any]]:
    """Every comparison, with finite numbers alone: null where one seed bounds nothing."""
    for figure, baseline, v in itertools.product(found.figures, ablation.spec.baselines, ablation.variants):
        against = figure.against(v, baseline, len(ablation.spec.changes) - 1)
        if v.change != baseline and against is not None:
            half = against.difference.half
            yield {
                "figure": figure.name,
                "budget": v.budget,
                "change": v.change,
                "baseline": baseline,
                "difference": against.difference.mean,
                "half": half if math.isfinite(half) else None,
                "ratio": against.ratio if math.isfinite(against.ratio) else None,
                "verdict": against.outcome,
            }


def draw(ablation: Ablation, found: Found, file: Path) -> None:
    """Write a PNG: a panel a figure, a row a change; a point a seed, a bar the mean, a line at each baseline's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(ablation.spec.changes)
    size = (1.6 + 3.2 * len(found.main), 1.2 + 0.36 * len(names))
    figure, axes = plt.subplots(
        1, len(found.main), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axis, one in zip(axes[0], found.main, strict=True):
        for i, budget in enumerate(ablation.spec.budgets):
            for place, name in enumerate(names):
                values = list(one.values.get(Variant(name, budget), {}).values())
                if values:
                    axis.plot(values, [place] * len(values), "o", ms=4, color=f"C{i}", alpha=0.6)
                    axis.plot([sum(values) / len(values)], [place], "|", ms=14, mew=2, color=f"C{i}")
                if values and name in ablation.spec.baselines:
                    axis.axvline(sum(values) / len(values), color=f"C{i}", ls=":", lw=1)
        axis.set(title=_title(one), yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].invert_yaxis()
    write_picture(file, figure, dpi=130)
    plt.close(figure)
