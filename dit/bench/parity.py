"""Whether a cheaper arithmetic trains as well: held-out losses of runs that differ in one key, at the same seeds.

    figures = run(ParityBench(study="residual", data=..., val=...), folder, say)

Runs of a seed share initial weights, batches and draws, so that the differences of their losses at a seed tell more
than the losses do. They are ordinary runs, one after the other in this process, which go on where they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dit.config import ConfigError, config, did_you_mean
from dit.configfile import load
from dit.data.codecs.codec import Pixels
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.sources.images import open_source
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.model.fp8 import FP8
from dit.scaling.mup.rates import Difference
from dit.train.rows import HELD_OUT, METRICS, logged
from dit.train.start import train

MARGIN = 0.01  # of the reference's mean loss, by which a variant may be worse and is still as good
Values = dict[str, str]  # dotted key of a configuration -> its text


@dataclass(frozen=True)
class Study:
    """Variants by their names, the first of which is what the others are compared with; `shared` holds for all.

    on_cpu: of those of them that a CPU computes in another way only.
    """

    variants: Mapping[str, Values]
    shared: Values = field(default_factory=dict)
    on_cpu: Mapping[str, Values] = field(default_factory=dict)

    def keys(self, variant: str, device: str) -> Values:
        """The keys of one variant on a device."""
        more = self.on_cpu.get(variant, {}) if device == "cpu" else {}
        return {**self.shared, **self.variants[variant], **more}


STUDIES: dict[str, Study] = {
    "residual": Study(
        {"float32": {"model.residual": "float32"}, "bfloat16": {"model.residual": "bfloat16"}},
        shared={"train.precision": "bf16"},
    ),
    "fp8": Study(
        {
            "bf16": {},
            "fp8 tensorwise": {"train.fp8": "tensorwise"},
            "fp8 rowwise": {"train.fp8": "rowwise"},
        },
        shared={"train.precision": "bf16"},
        on_cpu={f"fp8 {name}": {"train.fp8.emulate": "true"} for name in FP8},
    ),
}


@config
class ParityBench:
    """Which study, of which run, how long."""

    study: str = "residual"  # what is compared: residual, fp8
    config: str = "configs/digits.yaml"  # the run; what follows is set over it
    data: str | None = None  # training shards; null = as the configuration says
    val: str | None = None  # held-out shards; null = as the configuration says
    # pixels a side of scikit-learn's digits, encoded here in place of data and val; null = these
    digits: int | None = None
    size: str = "nano"  # of the model
    steps: int = 300  # training steps of each run
    batch: int = 32  # samples a step
    compile: bool = False  # compile each block
    seeds: tuple[int, ...] = (0, 1, 2)  # runs of each variant

    def __post_init__(self) -> None:
        if self.study not in STUDIES:
            raise ConfigError(f"unknown study '{self.study}'{did_you_mean(self.study, STUDIES)}")
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("steps is at least 1, and seeds are at least one, each once")


def run(
    cfg: ParityBench,
    folder: Path,
    report: Callable[[str], object] = print,
    extra: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Train all variants at all seeds and compare them: figures as JSON values. report: gets a line a run.

    folder: of the runs, which it goes on with. extra: more dotted keys for all of them.
    """
    study = STUDIES[cfg.study]
    if cfg.digits is not None:
        train_set, val = _digits(folder / f"digits-{cfg.digits}", cfg.digits)
        extra = {"data.path": train_set, "data.val": val, "codec": "null", **(extra or {})}
    losses: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for seed in cfg.seeds:  # a seed's variants together, so that what is there at any time can be compared
        for variant in study.variants:
            place = folder / cfg.study / f"{variant.replace(' ', '_')}-seed{seed}"
            loss = _trained(cfg, {**study.keys(variant, _device()), **(extra or {})}, seed, place)
            losses.setdefault(variant, []).append(loss)
            rates.setdefault(variant, []).append(_rate(place))
            report(f"{variant}, seed {seed}: held-out loss {loss:.5f}")
    return compared(losses) | {"images_per_s": {name: median(found) for name, found in rates.items()}}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _digits(folder: Path, side: int) -> tuple[str, str]:
    """Real digits as pixels, to train on and held out; written once."""
    options = EncodeOptions(image_size=side, block=64, workers=1)
    for part in ("train", "test"):
        encode(open_source(f"digits:{part}"), Pixels().build(), folder / part, options)
    return str(folder / "train"), str(folder / "test")


def _trained(cfg: ParityBench, keys: Values, seed: int, place: Path) -> float:
    """The held-out loss of one run's average at its end, which it is trained to, or has been."""
    found = _loss(place, cfg.steps)
    if found is None:
        values = {
            "run_dir": str(place),
            "seed": str(seed),
            "engine": "local",
            "model.size": cfg.size,
            "train.steps": str(cfg.steps),
            "train.global_batch": str(cfg.batch),
            "train.compile": str(cfg.compile).lower(),
            "val.every": str(cfg.steps),
            "checkpoint.every": str(max(1, cfg.steps // 3)),
            "checkpoint.keep": "1",
            "sample.every": "0",
            **({"data.path": cfg.data} if cfg.data else {}),
            **({"data.val": cfg.val} if cfg.val else {}),
            **keys,
        }
        torch.compiler.reset()  # or the variants' graphs together are more than torch keeps of one function
        train(load(Experiment, cfg.config, values), make_parts, owns_process=False)
        found = _loss(place, cfg.steps)
    if found is None:
        raise ConfigError(f"{place} ended without a held-out loss at step {cfg.steps}: see its {METRICS}")
    return found


def _loss(place: Path, step: int) -> float | None:
    """What a run has logged at a step; infinite where that is no number."""
    rows = [row for row in logged(place / HELD_OUT) if row["step"] == step]
    if not rows:
        return None
    return math.inf if rows[-1]["loss"] is None else float(rows[-1]["loss"])


def _rate(place: Path) -> float:
    """Images a second, the median of a run's log; 0 where it has none."""
    return median([float(row["images_per_s"] or 0) for row in logged(place / METRICS)] or [0.0])


def compared(losses: Mapping[str, list[float]]) -> dict[str, Any]:
    """Compare each variant with the first one, by the differences at each seed. losses: one a seed, of each variant.

    half: chance moves the mean difference by more in 5 % of studies (Student's t, one-sided). spread: the standard
    deviation of the losses over seeds, null with one seed.
    """
    reference, *_ = losses
    base = np.array(losses[reference])
    rows: dict[str, dict[str, Any]] = {}
    for name, found in losses.items():
        here = np.array(found)
        with np.errstate(invalid="ignore"):  # of failed runs
            spread, more = here.std(ddof=1) if len(here) > 1 else math.nan, Difference.of(here - base)
        rows[name] = {
            "losses": [_number(loss) for loss in found],
            "mean": _number(here.mean()),
            "spread": _number(spread),
        }
        if name != reference:
            rows[name] |= {"difference": _number(more.mean), "half": _number(more.half)}
            rows[name]["verdict"] = verdict(more, float(base.mean()))
    return {"reference": reference, "margin": MARGIN, "variants": rows}


def _number(value: float) -> float | None:
    """As JSON has it, which knows no infinity."""
    return float(value) if math.isfinite(value) else None


def _shown(value: float | None, form: str = ".5f") -> str:
    return "failed" if value is None else format(value, form)


def verdict(more: Difference, loss: float) -> str:
    """What a mean difference of losses says. loss: the reference's mean."""
    if not math.isfinite(more.mean):
        return "worse: a run failed"
    if not math.isfinite(more.half):
        return "not decided: one seed does not tell it from chance"
    if more.mean + more.half <= MARGIN * loss:
        return f"parity: {'clearly worse, by ' if more.is_clear else ''}at most {MARGIN:.0%}, whatever chance does"
    if more.is_clear:
        return "worse"
    return f"not decided: it may be more than {MARGIN:.0%} worse; take more seeds"


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Write the figures as a table in Markdown, a variant a line."""
    yield "| variant | held-out loss of each seed | mean | spread over seeds | worse by | verdict |"
    yield "|---|---|---|---|---|---|"
    for name, row in figures["variants"].items():
        each = ", ".join(map(_shown, row["losses"]))
        spread = "" if row["spread"] is None else _shown(row["spread"])
        worse = _shown(row["difference"], "+.5f") if "difference" in row else ""
        worse += "" if row.get("half") is None else f" ± {_shown(row['half'])}"
        yield f"| {name} | {each} | {_shown(row['mean'])} | {spread} | {worse} | {row.get('verdict', '')} |"
