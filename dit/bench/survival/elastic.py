"""The elastic chain: one run over several numbers of ranks and ZeRO stages, beside the same run on one rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit.bench.survival.launched import GLOBAL_BATCH, claim, launch_to_end, read_lines
from dit.bench.survival.same import Row, figure_problems, step_problems
from dit.config import ConfigError, config, to_dict

BOUND = 1e-5  # of the loss, relative


@config
class ElasticBench:
    """steps: of the run, shared evenly by the links of the chain. ranks, stages: one of each a link."""

    steps: int = 50  # of the whole run, shared evenly by the links of the chain
    lr: float = 1e-4  # peak learning rate
    ranks: tuple[int, ...] = (1, 2, 4, 2)  # processes of each link
    stages: tuple[int, ...] = (1, 3, 2, 0)  # of ZeRO, 0 to 3, of each link

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.stages) or not 0 < len(self.ranks) <= self.steps:
            raise ConfigError(
                f"give as many ranks as stages, and at least as many steps; got ranks {self.ranks}, "
                f"stages {self.stages}, steps {self.steps}"
            )
        if any(n < 1 or GLOBAL_BATCH % n for n in self.ranks) or any(s not in range(4) for s in self.stages):
            raise ConfigError(
                f"ranks must divide the global batch of {GLOBAL_BATCH} and stages be 0 to 3; got ranks {self.ranks}, "
                f"stages {self.stages}"
            )


@dataclass(frozen=True)
class Link:
    """Steps (first, last] of the chain."""

    ranks: int
    stage: int
    first: int
    last: int


def links(cfg: ElasticBench) -> list[Link]:
    """Make the chain."""
    count = len(cfg.ranks)
    ends = [round(cfg.steps * i / count) for i in range(count + 1)]
    return [
        Link(*pair, *span)
        for pair, span in zip(zip(cfg.ranks, cfg.stages, strict=True), itertools.pairwise(ends), strict=True)
    ]


def run(folder: Path, cfg: ElasticBench, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Do both runs, each start by launch/local.sh: {"problems": [...], "links": [...], "loss": ...}.

    A link ends where its train.steps say, and the next one is the same command with more of them. What is done already
    is not done again.
    """
    experiment = claim(folder, to_dict(cfg))

    def start(name: str, ranks: int, stage: int, steps: int) -> None:
        words = [
            str(experiment),
            f"--run_dir={folder / name}",
            f"--zero.stage={stage}",
            f"--train.steps={steps}",
        ]
        more = [f"--optim.lr={cfg.lr}", "--optim.schedule=constant"]  # constant: train.steps do not change it
        launch_to_end([*words, *more], ranks, folder / "logs" / f"{name}-{steps}.log")
        progress()

    chain = links(cfg)
    start("unbroken", 1, 0, cfg.steps)
    for link in chain:
        start("chain", link.ranks, link.stage, link.last)
    rows, reference = (read_lines(folder / name / "metrics.jsonl") for name in ("chain", "unbroken"))
    return figures(rows, reference, chain)


def figures(rows: Sequence[Row], reference: Sequence[Row], chain: Sequence[Link]) -> dict[str, Any]:
    """Find the largest relative differences of loss and gradient norm, by link and in all; what is wrong, in words."""
    steps = chain[-1].last
    problems = step_problems(rows, steps) + step_problems(reference, steps)
    problems += figure_problems(rows, reference, ("batch_hash", "lr", "updates", "skipped"))
    there = {row["step"]: row for row in reference}

    def most(name: str, link: Link) -> float:
        mine = [row for row in rows if link.first < row["step"] <= link.last and row["step"] in there]
        return max((_relative(row[name], there[row["step"]][name]) for row in mine), default=0.0)

    found = [
        {**asdict(link), "loss": most("loss", link), "grad_norm": most("grad_norm", link)} for link in chain
    ]
    for link in found:
        if not link["loss"] <= BOUND:
            problems.append(
                f"steps {link['first'] + 1} to {link['last']}, {link['ranks']} ranks, stage {link['stage']}: the loss "
                f"differs by {link['loss']:.3g} relative (at most {BOUND:g})"
            )
    return {"problems": problems, "links": found, "loss": max(link["loss"] for link in found)}


def _relative(ours: float | None, theirs: float | None) -> float:
    """Return the relative difference; infinite where a value is not finite, which metrics.jsonl has as null."""
    if ours is None or theirs is None or not math.isfinite(ours - theirs):
        return math.inf
    return abs(ours - theirs) / abs(theirs)


def table(found: dict[str, Any]) -> str:
    """Show the figures of `run` to people."""
    rows = [
        "largest relative difference of",
        f"{'steps':12s} {'ranks':>6s} {'stage':>6s} {'loss':>10s} {'gradient norm':>14s}",
    ]
    for k in found["links"]:
        where = f"{k['first'] + 1:>4d} to {k['last']:<4d} {k['ranks']:>6d} {k['stage']:>6d}"
        rows.append(f"{where} {k['loss']:>10.2e} {k['grad_norm']:>14.2e}")
    verdict = "not as promised" if found["problems"] else "batch_hash the same at every step"
    return "\n".join([*rows, f"loss, all steps: {found['loss']:.2e} (at most {BOUND:g}); {verdict}"])
