"""fit.json: a fitted law, what it was fitted to and how sure it is; `FitRecord.load` reads one again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit.files import expand, read_text, sought
from dit.outputs import write_record
from dit.scaling.laws.law import Law, LawError

FILE = "fit.json"
KIND = "scaling fit"
VERSION = 1
NUMBERS = ("E", "A", "B", "alpha", "beta")
Ends = tuple[float | None, float | None]  # of an interval; None is an open end


@dataclass(frozen=True)
class FitRecord:
    """All that fit.json holds. Units: params in numbers, tokens in tokens, flops in FLOPs, losses as in the table.

    law: at the optimum of the Huber fit. ci: 95% bootstrap intervals of E, A, B, alpha, beta, n_opt_exponent and
    d_opt_exponent. huber: the summed Huber loss of log L there, with `delta`. flops_per_param_token: k in
    C = k · N · D. runs: a row each (run, params, tokens, flops, loss, seed, predicted, residual). approaches: envelope
    and isoflop. without_E: the law and its sum with E = 0. profile: intervals of the same names by the profile of the
    sum. draws (R, 5): [E, A, B, alpha, beta] of the bootstrap's resamples. held_out: how the largest rung was
    predicted. floor: how E was found, {"kind": fit | value | exact, "value": None or the value}.
    """

    law: Law
    ci: Mapping[str, tuple[float, float]]
    warnings: list[str]
    protocol: str
    metric: str
    huber: float
    delta: float
    converged: bool
    flops_per_param_token: float
    tokens_per_sample: float | None
    runs: list[dict[str, Any]]
    approaches: Mapping[str, Any]
    without_E: Mapping[str, float] | None
    profile: Mapping[str, Ends]
    draws: np.ndarray
    seed: int
    held_out: Mapping[str, Any] | None
    floor: Mapping[str, Any]
    columns: list[str]
    source: str = ""

    @property
    def draw_laws(self) -> Law:
        """The resamples' laws as one, whose numbers are arrays (R,)."""
        return Law.of_rows(self.draws)

    def column(self, name: str) -> np.ndarray:
        """A number of every run, (n,): params, tokens, flops, loss, predicted or residual."""
        return np.array([run[name] for run in self.runs], float)

    def as_json(self) -> dict[str, Any]:
        """The values of fit.json, the keys that readers rely on first."""
        held = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        for name in ("law", "draws", "seed"):
            del held[name]
        return {
            **dict(zip(NUMBERS, self.law.rows.tolist(), strict=True)),
            "n_opt_exponent": self.law.n_opt_exponent,
            "d_opt_exponent": self.law.d_opt_exponent,
            "loss_exponent": self.law.loss_exponent,
            **{name: held.pop(name) for name in ("ci", "warnings", "protocol", "metric")},
            **held,
            "bootstrap": {
                "draws": len(self.draws), "seed": self.seed, "level": 0.95,
                "params": self.draws.tolist(),
            },
            "kind": KIND,
            "version": VERSION,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write fit.json, whole or not at all."""
        write_record(path, self.as_json())

    @classmethod
    def load(cls, path: Path | str) -> FitRecord:
        """Read fit.json, or that of a folder. LawError where it is not there, or none."""
        place = Path(expand(str(path)))
        place = place / FILE if place.is_dir() else place
        if not place.is_file():
            raise LawError(f"{place}: there is no such file{sought(place)}; `scaling.py fit` writes it")
        try:
            held = json.loads(read_text(place))
        except ValueError as error:
            raise LawError(
                f"{place} is not JSON ({error}): expected fit.json, which `scaling.py fit` writes of a table of runs"
            ) from None
        if not isinstance(held, dict) or held.get("kind") != KIND:
            raise LawError(
                f"{place} is not a fit of `scaling.py fit`: expected a JSON object of kind '{KIND}'"
            )
        if held.get("version") != VERSION:
            raise LawError(
                f"{place} is of version {held.get('version')} of a fit, and this reads version {VERSION}: fit the runs "
                "again"
            )
        try:
            return cls._of(held)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise LawError(f"{place} is damaged ({error!r}): fit the runs again") from None

    @classmethod
    def _of(cls, held: Mapping[str, Any]) -> FitRecord:
        own = {one.name: held[one.name] for one in dataclasses.fields(cls) if one.name in held}
        for name in ("ci", "profile"):
            own[name] = {key: tuple(ends) for key, ends in held[name].items()}
        own["law"] = Law(*(float(held[name]) for name in NUMBERS))
        own["draws"] = np.array(held["bootstrap"]["params"], float)
        if own["draws"].shape[1:] != (5,):
            raise ValueError("bootstrap.params are rows of five numbers")
        own["seed"] = int(held["bootstrap"]["seed"])
        found = cls(**own)
        found._check()
        return found

    def _check(self) -> None:
        """ValueError, KeyError or TypeError for what no fit has written."""
        laws = np.vstack([self.law.rows[None], self.draws])
        if not len(self.draws) or not np.isfinite(laws).all() or (laws < 0).any() or not self.law.alpha > 0:
            raise ValueError("E, A, B, alpha, beta and those of bootstrap.params are numbers of at least 0")
        for name in ("params", "tokens", "flops", "loss", "predicted"):
            column = self.column(name)
            if not len(column) or not np.isfinite(column).all() or not (column > 0).all():
                raise ValueError(f"runs have a {name} above 0, all of them")
        for name in ("flops_per_param_token", "tokens_per_sample", "delta"):
            value = getattr(self, name)
            is_left_out = value is None and name == "tokens_per_sample"
            if not is_left_out and not (isinstance(value, int | float) and 0 < value < np.inf):
                raise ValueError(f"{name} is a number above 0")
        for name, kind in (("warnings", list), ("columns", list), ("floor", dict), ("huber", float)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is a {kind.__name__}")
        for way in ("envelope", "isoflop"):
            self.approaches[way]["n_opt_exponent"], self.approaches[way]["points"]
        if (
            self.ci.keys() != self.profile.keys()
            or not self.ci
            or any(len(ends) != 2 for ends in self.ci.values())
        ):
            raise ValueError("ci and profile have two ends of every number")
        if self.held_out is not None and "error" not in self.held_out:
            raise ValueError("held_out has an error, or is null")
