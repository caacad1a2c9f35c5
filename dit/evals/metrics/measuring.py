"""Several figures of one pair of sets, with intervals and with the protocol that they are comparable by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit.config import ConfigError, did_you_mean, from_dict, to_dict
from dit.data import DataError
from dit.evals.figures import protocol_of
from dit.evals.metrics.metric import METRICS, FeatureSet, Metric, Side, Statistics
from dit.evals.metrics.resampling import LEVEL, Resampled, Resampling
from dit.evals.protocol import protocol_hash

ALL = "all"  # figures that the sets suffice for
LEAST = 20  # resamples of which quantiles are taken


@dataclass(frozen=True)
class Measured:
    """Figures of one pair of sets."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]  # empty without resampling
    protocol: dict[str, Any]  # JSON values: what has to be the same for two figures to be compared
    resampling: Resampling
    missing: dict[str, str] = field(default_factory=dict)  # figures that there are none of, and why
    resamples: dict[str, Resampled] = field(default_factory=dict)  # what the intervals come from

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the protocol."""
        return protocol_hash(self.protocol)

    @property
    def hashes(self) -> dict[str, str]:
        """For each figure the hash of what it depends on of the protocol."""
        return {name: protocol_hash(protocol_of(name, self.protocol)) for name in self.figures}

    def as_json(self) -> dict[str, Any]:
        """The figures under their names, None where one is missing, and beside them all that belongs to them."""
        drawn = self.resampling
        how = {"resamples": drawn.count, "level": LEVEL, "seed": drawn.seed} if drawn.count else None
        return {
            **self.figures,
            **dict.fromkeys(self.missing),
            "intervals": {name: list(ends) for name, ends in self.intervals.items()},
            "bootstrap": how,
            "samples": self.protocol["samples"],
            "protocol": self.protocol,
            "hash": self.hash,
            "hashes": self.hashes,
        }

    def table(self) -> str:
        """The figures as lines for a person, each with the hash of what it depends on and its interval."""
        hashes = self.hashes
        rows = [("", "figure", "protocol", f"{LEVEL:.0%} interval" if self.intervals else "")]
        for name, value in self.figures.items():
            ends = self.intervals.get(name)
            told = "" if ends is None else f"{ends[0]:.6g} to {ends[1]:.6g}"
            rows.append((name, f"{value:.6g}", hashes[name], told))
        rows += [(name, "-", "", why) for name, why in self.missing.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [f"{a:{widths[0]}s}  {b:>{widths[1]}s}  {c:{widths[2]}s}  {d}" for a, b, c, d in rows]
        return "\n".join(line.rstrip() for line in lines)


def measure(
    metrics: Mapping[str, Metric],
    generated: FeatureSet,
    reference: Side,
    resampling: Resampling | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Measured:
    """Compute the figures of each metric, {name: metric}. DataError, before any is, where one cannot be.

    resampling: how many resamples the intervals come from; none without. identity: what else belongs to the protocol,
    as JSON values (the network, the reference's hash).
    """
    drawn = resampling or Resampling()
    check_resamples(drawn.count)
    for metric in metrics.values():
        metric.check(generated, reference)
    figures, resamples = {}, {}
    for metric in metrics.values():
        for name, values in metric.values(generated, reference, drawn).items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"{name} of these features is no finite number: they are too large (up to "
                    f"{largest(generated, reference):.3g}) for float64; divide both sets by one number"
                )
            figures[name] = float(values[0])
            if drawn.count:
                resamples[name] = Resampled(values, metric.is_shifted)
    intervals = {name: drawn_of.interval for name, drawn_of in resamples.items()}
    theirs = reference.count if isinstance(reference, Statistics) else len(reference)
    protocol = {
        **(identity or {}),
        "samples": {"generated": len(generated), "reference": theirs},
        "dimensions": generated.features.shape[1],
        "metrics": {name: to_dict(metric) for name, metric in metrics.items()},
    }
    return Measured(figures, intervals, protocol, drawn, resamples=resamples)


def check_resamples(count: int) -> None:
    """ConfigError for fewer resamples than quantiles are taken of."""
    if count and count < LEAST:
        raise ConfigError(f"bootstrap is {count}; expected 0 (no intervals) or at least {LEAST} resamples")


def check_counts(
    wanted: str, keys: Mapping[str, str], generated: Mapping[str, int], reference: Mapping[str, int]
) -> None:
    """DataError where a set, {name: samples}, is smaller than a figure needs: before features are computed, for hours.

    wanted, keys: as `choose_metrics` has them.
    """
    anything = FeatureSet(np.eye(2))
    for metric in choose_metrics(wanted, keys, anything, anything)[0].values():
        for sizes in (generated, reference) if metric.looks_at_reference else (generated,):
            for name, count in sizes.items():
                if count < metric.at_least:
                    raise DataError(
                        f"{name}: {count} image(s), and {metric.figures[0]} needs at least {metric.at_least}: take "
                        "more, or name the figures that so many suffice for (frechet, kid and mind need 2)"
                    )


def largest(generated: FeatureSet, reference: Side) -> float:
    """The greatest size of a feature, or of a mean of them."""
    theirs = reference.mean if isinstance(reference, Statistics) else reference.features
    return float(max(np.abs(generated.features).max(), np.abs(theirs).max()))


def choose_metrics(
    wanted: str, keys: Mapping[str, str], generated: FeatureSet, reference: Side
) -> tuple[dict[str, Metric], dict[str, str]]:
    """({name: metric}, {figure that cannot be: why}) of names with commas between them.

    wanted: names of metrics or of figures, or "all", which leaves out what the sets lack arrays for. keys: fields of
    metrics, as {"mind.projections": "100"}, or with _ for the dot. ConfigError for names and keys that there are not.
    """
    known = [ALL, *METRICS, *(figure for _, metric in METRICS.items() for figure in metric.figures)]
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise ConfigError(f"--metrics: unknown figure '{word}'{did_you_mean(word, known)}")
    if not words:
        raise ConfigError(f"--metrics names no figure; expected some of {', '.join(dict.fromkeys(known))}")
    names = [name for name in METRICS if {ALL, name, *METRICS[name].figures} & set(words)]
    fields: dict[str, dict[str, str]] = {}
    for key, text in keys.items():
        name, own = re.split(r"[._]", key, maxsplit=1)
        if name not in names:
            raise ConfigError(f"--{key} has a meaning where {name} is measured alone; --metrics={wanted}")
        fields.setdefault(name, {})[own] = text
    chosen: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for name in names:
        metric = from_dict(METRICS[name], fields.get(name, {}))
        if ALL in words and not metric.can_see(generated, reference):
            missing |= dict.fromkeys(metric.figures if metric.is_expected else (), f"needs {metric.needs}")
        else:
            chosen[name] = metric
    return chosen, missing
