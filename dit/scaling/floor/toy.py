"""A ladder of tiny networks on data whose exact floor is known: does a law that is told the floor predict better?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit.config import ConfigError
from dit.evals import plane
from dit.evals.protocol import protocol_hash
from dit.files import as_csv, write_atomically
from dit.flow.couple import Independent
from dit.flow.objective import Objective
from dit.outputs import claim, read_record, write_record
from dit.progress import Bar
from dit.sample.denoise import Denoiser
from dit.scaling.floor.floors import PLANE, even, floor
from dit.scaling.laws import cells
from dit.scaling.laws.fit import Floor, fit
from dit.scaling.laws.law import Law
from dit.scaling.laws.solver import Points
from dit.scaling.laws.table import Runs

EVALUATED = 2**17  # points at which each network's loss is measured: the same for all
FLOOR_SAMPLES = 2**15
FLOPS = 6  # of training by parameter and point: 2 a multiply-add, forward and twice that backward
RECORD, TABLE, CELLS = "toy.json", "runs.csv", "runs"
KINDS = ("fit", "exact")  # of floors that are compared
COLUMNS = (*cells.COLUMNS, "protocol", "floor")
PROBLEMS = {
    "eight_gaussians": plane.PlaneProblem(
        "Gaussian noise to eight Gaussians", plane.normal, plane.eight_gaussians, 5.2, 5.2
    ),
    **plane.PROBLEMS,
}


@dataclass(frozen=True)
class ToyLadder:
    """What is trained: every width for every number of steps and seed, each with a schedule of its own.

    problem: one of `dit.scaling.floor.floors.PLANE`.
    """

    problem: str = "eight_gaussians"
    widths: tuple[int, ...] = (6, 9, 14, 21, 32, 48)
    steps: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    seeds: tuple[int, ...] = (0, 1)
    batch: int = 256
    lr: float = 3e-3  # of Adam, falling to 0 along a cosine

    def __post_init__(self) -> None:
        """Check the values. ConfigError for a problem that is not known, or too few rungs to fit and to hold out."""
        if self.problem not in PLANE:
            raise ConfigError(f"problem '{self.problem}': expected one of {', '.join(PLANE)}")
        for name in ("widths", "steps"):
            values = getattr(self, name)
            if len(set(values)) < 4 or min(values) < 1:
                raise ConfigError(
                    f"{name}={list(values)}: at least four numbers above 0 are needed, as the largest is held out"
                )

    @property
    def cells(self) -> dict[str, plane.Budget]:
        """Name -> what is trained, from few FLOPs to many."""
        found = {
            f"w{width}-n{steps}-s{seed}": plane.Budget(steps, self.batch, width, self.lr, seed)
            for width in sorted(set(self.widths))
            for steps in sorted(set(self.steps))
            for seed in sorted(set(self.seeds))
        }
        return dict(sorted(found.items(), key=lambda cell: cell[1].width ** 2 * cell[1].steps))


def run_toy(ladder: ToyLadder, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Train what is not there yet, write OUT/runs.csv, fit with the floor free and exact, and return what was found.

    The same command goes on where it was stopped: a finished network's loss is in OUT/runs. Raises OutputError where
    OUT holds another ladder.
    """
    protocol = _protocol(ladder)
    record = out / RECORD
    held = claim([record, out / TABLE], {"protocol": protocol}, record=record, overwrite=overwrite)
    (out / CELLS).mkdir(parents=True, exist_ok=True)
    if held is None:  # says whose the table is, if it is stopped behind that
        write_record(record, {"protocol": protocol})
    data, eps = PLANE[ladder.problem]
    known = floor(Objective(), data, eps, samples=FLOOR_SAMPLES)
    digest = protocol_hash(protocol)
    losses = _trained(ladder, out / CELLS, digest)
    rows = [_row(name, ladder, losses[name], digest, known.loss) for name in ladder.cells]
    write_atomically(out / TABLE, as_csv(COLUMNS, rows).encode())
    found = {
        "protocol": protocol, "hash": digest, "torch": torch.__version__,
        "floor": {"loss": known.loss, "error": known.error},
        "best": min(losses.values()), "predictions": predictions(Runs.read(out / TABLE)),
    }  # fmt: skip
    write_record(record, found)
    return found


def _protocol(ladder: ToyLadder) -> dict[str, Any]:
    return {
        **asdict(ladder),
        "objective": plane.PROTOCOL["objective"],
        "network": plane.PROTOCOL["network"],
        "evaluated": f"{EVALUATED} scrambled Sobol points of t, data and eps",
        "floor": f"exact posterior, 8 times {FLOOR_SAMPLES} scrambled Sobol points",
    }


def _trained(ladder: ToyLadder, folder: Path, digest: str) -> dict[str, float]:
    """Name -> loss on the points that are the same for all; what is there already of this protocol is taken."""
    losses: dict[str, float] = {}
    total = sum(budget.steps for budget in ladder.cells.values())
    with Bar[None](total=total, unit="step", desc="toy ladder") as bar:
        for name, budget in ladder.cells.items():
            file = folder / f"{name}.json"
            held = read_record(file) if file.is_file() else {}
            if held.get("protocol") != digest:
                held = {
                    "loss": _loss(ladder.problem, _network(ladder.problem, budget, bar)),
                    "protocol": digest,
                }
                write_record(file, held)
            else:
                bar.update(budget.steps)
            losses[name] = float(held["loss"])
    return losses


def _network(problem: str, budget: plane.Budget, bar: Bar[None]) -> Denoiser:
    pairs = plane.drawn(PROBLEMS[problem], Independent(), budget)
    return plane.fit(pairs, budget, bar.update)


@torch.no_grad()
def _loss(problem: str, flow: Denoiser) -> float:
    """The objective's loss on new data at EVALUATED points."""
    objective, (data, eps), u = Objective(), PLANE[problem], even(2, EVALUATED, seed=2**31 - 1)
    total = 0.0
    for part in u.split(2**14):
        t = objective.time(part[:, 0].contiguous()).float()
        clean, noise = data.draw(part[:, 1:4]).float(), eps.draw(part[:, 4:]).float()
        total += float(objective.per_sample(flow.model, clean, noise, t, {}).double().sum())
    return total / len(u)


def _row(name: str, ladder: ToyLadder, loss: float, digest: str, known: float) -> dict[str, Any]:
    budget = ladder.cells[name]
    params = sum(p.numel() for p in plane.PlaneNetwork(budget.width).parameters())
    points = budget.steps * budget.batch
    return {
        "run": name, "params": params, "samples": points, "tokens": points, "flops": FLOPS * params * points,
        "loss": loss, "metric": "loss", "seed": budget.seed, "complete": "true", "protocol": digest, "floor": known,
    }  # fmt: skip


# --- what is predicted -------------------------------------------------------------------------------------


def predictions(runs: Runs) -> list[dict[str, Any]]:
    """How laws of the smaller rungs, with the floor free and exact, predict the largest one.

    The largest rung is the largest size with the most tokens, over its seeds. Fitted are the runs below it in both;
    then ever fewer: without the next size and number of tokens too, as long as three of each are left.
    """
    sizes, counts = (np.unique(values) for values in (runs.params, runs.tokens))
    top = runs.chosen((runs.params == sizes[-1]) & (runs.tokens == counts[-1]))
    exact = float(runs.floor or 0.0)
    measured = float(top.loss.mean())
    spread = float(top.loss.std(ddof=1)) if len(top) > 1 else None
    found = []
    for left in range(1, min(len(sizes), len(counts)) - 2):
        small = runs.chosen((runs.params < sizes[-left]) & (runs.tokens < counts[-left]))
        points = Points.of(small.params, small.tokens, small.loss)
        beyond = float(top.flops[0] / small.flops.max())
        row: dict[str, Any] = {
            "runs": len(small),
            "beyond": beyond,
            "measured": measured,
            "seeds_std": spread,
        }
        for kind, held in zip(KINDS, (Floor(), Floor(exact)), strict=True):
            row[kind] = _prediction(fit(points, held).law, top, exact)
        found.append(row)
    return found


def _prediction(law: Law, top: Runs, exact: float) -> dict[str, Any]:
    """error: relative, of the loss; excess_error: of what of it lies above the exact floor."""
    predicted, measured = float(law.loss(top.params[0], top.tokens[0])), float(top.loss.mean())
    return {
        "E": law.E, "A": law.A, "B": law.B, "alpha": law.alpha, "beta": law.beta,
        "predicted": predicted,
        "error": predicted / measured - 1,
        "excess_error": (predicted - exact) / (measured - exact) - 1,
    }  # fmt: skip


def as_text(found: Mapping[str, Any]) -> str:
    """The predictions as a table."""
    known = found["floor"]
    lines = [
        f"exact floor {known['loss']:.5f} ± {known['error']:.5f}, the lowest loss of a network {found['best']:.5f}",
        "",
        "| fitted runs | FLOPs beyond | measured | floor | E | alpha | beta | predicted | error | error above floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["predictions"]:
        for kind in KINDS:
            one = row[kind]
            lines.append(
                f"| {row['runs']} | {row['beyond']:.3g}x | {row['measured']:.4f} | {kind} | {one['E']:.4f} | "
                f"{one['alpha']:.3f} | {one['beta']:.3f} | {one['predicted']:.4f} | {one['error']:+.2%} | "
                f"{one['excess_error']:+.1%} |"
            )
    return "\n".join(lines)
