"""The tables of a scaling report: heads and rows of text, for the page and the terminal alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit.reports.scaling.material import Material, smaller
from dit.scaling.laws.predicting import FAR
from dit.scaling.laws.published import DIT_LAW, MEI, PUBLISHED
from dit.scaling.laws.record import NUMBERS

UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """A table. note: what has to be known to read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(material: Material) -> list[Table]:
    """All tables, in the order in which they are read."""
    return [
        _predictions(material),
        _numbers(material),
        _optima(material),
        _smaller(material),
        _published(material),
    ]


def equation(material: Material) -> str:
    """The fitted law in one line."""
    law = material.fit.law
    return f"L(N, D) = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4g} + {law.B:.4g} / D^{law.beta:.4g}"


def protocol(material: Material) -> str:
    """What the law was fitted to, and how: no number is read without it."""
    fit = material.fit
    flops, params = fit.column("flops"), fit.column("params")
    floor = fit.floor
    told = {
        "fit": "fitted",
        "exact": f"held at the exact floor, {floor['value']}",
        "value": f"held at {floor['value']}",
    }
    parts = [
        f"{len(fit.runs)} runs of {fit.source or material.source}: {params.min():.3g} to {params.max():.3g} "
        f"parameters, {flops.min():.3g} to {flops.max():.3g} training FLOPs",
        f"Figure: {fit.metric or 'loss'}{f', protocol {fit.protocol}' if fit.protocol else ''}",
        f"summed Huber loss of log L {fit.huber:.5g} (delta {fit.delta:g}), E {told[floor['kind']]}",
        f"FLOPs = {fit.flops_per_param_token:.4g} · N · D",
        f"intervals: 95% of {len(fit.draws)} laws of a bootstrap over runs (seed {fit.seed})",
    ]
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def held_out(material: Material) -> str:
    """How well the smaller runs predict the largest."""
    found = material.fit.held_out
    if not found:
        return "The fit tells nothing of how the largest rung is predicted by the others."
    if found.get("error") is None:
        return f"How the largest rung is predicted is not known: {found['why']}."
    spread = found.get("seeds_spread")
    seeds = "no seeds were repeated" if spread is None else f"seeds alone spread losses by {spread:.2%}"
    return (
        f"Fitted to the {found['fitted_runs']} runs below it, the law predicts the largest rung ({found['flops']:.3g} "
        f"FLOPs, {len(found['runs'])} runs) with an error of {found['error']:+.2%} of the loss; {seeds}."
    )


def _between(ends: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    low, high = ends
    return f"{low:.{digits}g} … {high:.{digits}g}"


def _predictions(material: Material) -> Table:
    """Budgets: the largest run's, ten times that, and the one that was asked for."""
    largest = float(material.fit.column("flops").max())
    asked = [] if material.budget is None else [material.budget]
    named = {
        largest: "the largest run's",
        10 * largest: "ten times that",
        **dict.fromkeys(asked, "asked for"),
    }
    band, names = material.band(list(named)), list(named.values())
    rows = [
        [
            f"{names[i]}: {flops:.3g}", f"{band.params[0, i]:.4g}", _between(band.params[1:, i]),
            f"{band.tokens[0, i]:.4g}", _between(band.tokens[1:, i]),
            f"{band.loss[0, i]:.5g}", _between(band.loss[1:, i], 5),
        ]
        for i, flops in enumerate(band.flops)
    ]  # fmt: skip
    note = "An interval is of the law's numbers alone: that the law holds so far out is an assumption."
    if asked and asked[0] > FAR * largest:
        note += f" The budget asked for is {asked[0] / largest:.3g} times the largest run's: so far out it is a guess."
    head = ["training FLOPs", "N", "95%", "D (tokens)", "95%", "loss", "95%"]
    return Table("What the law predicts", head, rows, note)


def _numbers(material: Material) -> Table:
    fit = material.fit
    estimates = {
        name: float(getattr(fit.law, name)) for name in (*NUMBERS, "n_opt_exponent", "d_opt_exponent")
    }
    rows = []
    for name, value in estimates.items():
        low, high = fit.profile.get(name, (None, None))
        ends = " … ".join("open" if end is None else f"{end:.4g}" for end in (low, high))
        rows.append([name, f"{value:.5g}", _between(fit.ci[name], 4) if name in fit.ci else UNKNOWN, ends])
    note = "N_opt ∝ C^n_opt_exponent. A and B belong to their exponents: alone they say little."
    return Table("The law's numbers", ["number", "estimate", "bootstrap 95%", "profile 95%"], rows, note)


def _optima(material: Material) -> Table:
    """The three approaches beside each other."""
    fit = material.fit
    rows = [["law (Huber)", f"{fit.law.n_opt_exponent:.3f}", f"{fit.law.d_opt_exponent:.3f}", UNKNOWN, ""]]
    if fit.without_E:
        own = fit.without_E
        rows.append(["law without E", f"{own['n_opt_exponent']:.3f}", f"{own['d_opt_exponent']:.3f}", UNKNOWN,
                     f"Huber {own['huber']:.4g}"])  # fmt: skip
    for name, title in (("isoflop", "parabolas at equal FLOPs"), ("envelope", "envelope of losses")):
        own = fit.approaches[name]
        if own.get("n_opt_exponent") is None:
            rows.append([title, UNKNOWN, UNKNOWN, UNKNOWN, own.get("why", "")])
            continue
        bias = own.get("bias")
        rows.append([
            title, f"{own['n_opt_exponent']:.3f}", f"{own['d_opt_exponent']:.3f}",
            UNKNOWN if bias is None else f"{bias:+.3f}", f"{len(own['points'])} points",
        ])  # fmt: skip
    note = (
        "Bias: of the approach's exponent of N_opt, by exact losses of the fitted law at these runs. Parabolas are "
        "not the law's shape, and an envelope is as coarse as the grid of sizes."
    )
    return Table("Exponents by each approach", ["approach", "N_opt", "D_opt", "bias", "note"], rows, note)


def _smaller(material: Material) -> Table:
    budget = material.budget or float(material.fit.column("flops").max())
    rows = [
        [
            f"{one['share']:g} of the best N", f"{one['share']:.0%}",
            "never" if one["tokens"] is None else f"{one['tokens']:.3g} times",
            "never" if one["training"] is None else f"{one['training']:.3g} times",
        ]
        for one in smaller(material.fit, budget)
    ]  # fmt: skip
    note = f"At {budget:.3g} training FLOPs, by the law: what a smaller model takes to come to the same loss. {MEI}"
    return Table(
        "Cheaper sampling by longer training",
        ["size", "FLOPs an evaluation", "tokens", "training FLOPs"],
        rows,
        note,
    )


def _published(material: Material) -> Table:
    def cells(power: tuple[float, float] | None, floor: float = 0.0) -> str:
        if power is None:
            return UNKNOWN
        return (f"{floor:.4g} + " if floor else "") + f"{power[0]:.4g} · C^{power[1]:.4f}"

    fit = material.fit
    params, tokens, loss = fit.law.optimum(1.0, fit.flops_per_param_token)
    rows = [[
        "ours", cells((params, fit.law.n_opt_exponent)), cells((tokens, fit.law.d_opt_exponent)),
        cells((loss - fit.law.E, fit.law.loss_exponent), fit.law.E), "",
    ]]  # fmt: skip
    for law in PUBLISHED:
        told = f"{law.source}: {law.note}"
        rows.append([law.name, cells(law.n_opt), cells(law.d_opt), cells(law.loss, law.floor), told])
    rows.append(["DiT", UNKNOWN, UNKNOWN, f"FID = {DIT_LAW[0]:g} · G^{DIT_LAW[1]:g}",
                 "arXiv 2212.09748: G in 1e9 multiply-adds of a forward pass, 400,000 steps each"])  # fmt: skip
    note = "Of other data, models and losses: exponents can be compared, coefficients and losses hardly."
    return Table("Published laws", ["law", "N_opt", "D_opt", "loss", "of"], rows, note)
