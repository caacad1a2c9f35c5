"""The irreducible loss: what the best network there can be still gets wrong, of data whose distribution is known.

Given x, the best prediction is the target's posterior mean, and what it misses is the target's posterior variance:
floor = E_t[weight(t)·E_x[var(a·data + b·eps | x)]] (arXiv 2506.13763, §3: the optimal loss of diffusion models). It
bounds the expected loss on new data of the distribution. Of a finite set of points (`Mixture.points`) it is the
least *training* loss, which memorising them reaches; a loss on held-out data is not bounded by that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit.config import ConfigError
from dit.flow.couple import Independent
from dit.flow.objective import Objective
from dit.scaling.floor.known import Boxes, Known, Mixture

QUARTERS = 4  # of t, as the held-out loss has them
MEMORY = 2**19  # numbers at a time
END = 27.0  # the times drawn: from the quantile at 2e-12 to that at 1 - 2e-12


@dataclass(frozen=True)
class Floor:
    """The floor of an objective's loss, and one standard error of it by repeated scrambled draws.

    quarters: of the loss with t in [0, 1/4), [1/4, 1/2), ..., [3/4, 1], as `loss_q1`.. are; NaN where no time falls.
    """

    loss: float
    error: float
    quarters: tuple[float, ...]


def floor(
    objective: Objective,
    data: Known,
    eps: Mixture | None = None,
    *,
    samples: int = 2**13,
    repeats: int = 8,
    seed: int = 0,
) -> Floor:
    """Compute the least expected loss of an objective on data of a known distribution, without its auxiliary term.

    eps: the noise's distribution, standard normal by default. The posterior is exact at each (t, x); the mean over t
    and x is taken over `repeats` scrambled Sobol sequences of `samples` points (a power of 2), whose spread gives
    the error. Raises ConfigError for a coupling that pairs data with noise, since x then says more.
    """
    if not isinstance(objective.coupling, Independent):
        raise ConfigError(
            f"coupling {objective.coupling}: the floor is known for data and noise drawn independently alone; use "
            "coupling: independent"
        )
    if samples < 2 or samples & (samples - 1) or repeats < 2:
        raise ConfigError(
            f"samples is a power of 2 and repeats at least 2, got samples={samples}, repeats={repeats}"
        )
    eps = eps or Mixture.gaussian(data.elements)
    if eps.elements != data.elements:
        raise ConfigError(f"data have {data.elements} elements a sample and eps {eps.elements}")
    drawn = [_losses(objective, data, eps, even(data.elements, samples, seed + r)) for r in range(repeats)]
    t, losses, shares = (torch.stack(part) for part in zip(*drawn, strict=True))  # (repeats, samples)
    means = (shares * losses).sum(1) / shares.sum(1)
    quarter = (t * QUARTERS).long().clamp(max=QUARTERS - 1)
    parts = tuple(
        float((shares * losses)[quarter == q].sum() / shares[quarter == q].sum()) for q in range(QUARTERS)
    )
    return Floor(float(means.mean()), float(means.std()) / math.sqrt(repeats), parts)


def floor_of_classes(
    objective: Objective, classes: Sequence[tuple[float, Mixture]], label_drop: float = 0.0, seed: int = 0
) -> float:
    """Compute the floor of a model that is told the class: the classes' floors by their shares.

    classes: (share, distribution) of each. label_drop: share of samples whose label is dropped, as in training;
    their floor is that of the classes together.
    """
    shares = torch.tensor([share for share, _ in classes], dtype=torch.float64)
    shares = shares / shares.sum()
    told = sum(
        float(share) * floor(objective, part, seed=seed).loss
        for share, (_, part) in zip(shares, classes, strict=True)
    )
    if not label_drop:
        return told
    pooled = Mixture(
        torch.cat([part.means for _, part in classes]),
        torch.cat([part.stds for _, part in classes]),
        torch.cat([share * part.shares for share, (_, part) in zip(shares, classes, strict=True)]),
    )
    return (1 - label_drop) * told + label_drop * floor(objective, pooled, seed=seed).loss


def even(elements: int, samples: int, seed: int) -> Tensor:
    """(samples, 3 + 2·elements) float64 in (0, 1), spread evenly: for t, then data and eps with their components."""
    engine = torch.quasirandom.SobolEngine(3 + 2 * elements, scramble=True, seed=seed)
    return engine.draw(samples, dtype=torch.float64).clamp(2.0**-32, 1 - 2.0**-32)


def _losses(objective: Objective, data: Known, eps: Mixture, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t, the weighted posterior variances, and how much each counts, at the points that u stands for: (n,) each.

    Losses may grow as 1 / t does (a velocity of `vp`), so the ends of (0, 1) are drawn from more often.
    """
    cut = 2 + data.elements
    size, found = max(1, MEMORY // (data.size * len(eps.means))), []
    for part in u.split(size):
        is_end = part[:, 0] < 0.5  # a half of the points lies evenly in (0, 1), the other in its logit
        place = torch.where(is_end, torch.sigmoid(END * (4 * part[:, 0] - 1)), 2 * part[:, 0] - 1)
        place = place.clamp(1e-12, 1 - 1e-12)
        t = objective.time(place)
        coeffs = objective.path.coeffs(t)
        x = coeffs.mix(data.draw(part[:, 1:cut]), eps.draw(part[:, cut:]))
        row = objective.prediction.row(coeffs)
        losses = objective.weight(coeffs, row) * data.target_variance(eps, coeffs, row, x)
        found.append((t, losses, 2 / (1 + 0.5 / END / (place * (1 - place)))))
    t, losses, shares = (torch.cat(each) for each in zip(*found, strict=True))
    return t, losses, shares


# --- the plane ---------------------------------------------------------------------------------------------


def eight_gaussians() -> Mixture:
    """Build `dit.evals.plane.eight_gaussians` as a mixture."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    return Mixture.of(4 * torch.stack([angle.cos(), angle.sin()], 1), 0.3)


def moons(pieces: int = 48) -> Mixture:
    """Build `dit.evals.plane.moons` as a mixture, each arc as so many pieces, nearer to each other than its noise."""
    angle = math.pi * (torch.arange(pieces, dtype=torch.float64) + 0.5) / pieces
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return Mixture.of(2 * torch.cat([upper, -upper]), 0.15)


def checkerboard() -> Boxes:
    """Build `dit.evals.plane.checkerboard` as boxes."""
    corners = [(column, 2 * half + column % 2) for column in range(4) for half in range(2)]
    return Boxes(torch.tensor(corners, dtype=torch.float64) - 2, 1.0)


# Problems in the plane: the distributions of target (data) and source (eps), as in dit.evals.plane.
PLANE: dict[str, tuple[Known, Mixture]] = {
    "eight_gaussians": (eight_gaussians(), Mixture.gaussian(2)),
    "moons": (moons(), eight_gaussians()),
    "checkerboard": (checkerboard(), Mixture.gaussian(2)),
}
