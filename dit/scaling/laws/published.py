"""Scaling laws that others have published, to be shown beside one's own: of other data, models and losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit.scaling.laws.law import Law

Power = tuple[float, float]  # coefficient and exponent of a power law


@dataclass(frozen=True)
class PublishedLaw:
    """Power laws in the training FLOPs C, as (coefficient, exponent); None where the source gives none.

    note: what it was measured of, which has to be known before it is compared.
    """

    name: str
    source: str
    note: str
    n_opt: Power | None = None
    d_opt: Power | None = None
    loss: Power | None = None
    floor: float = 0.0  # added to the power law of the loss


def power(law: Power, at: Any) -> Any:
    """Evaluate coefficient · at^exponent, of a number or an array."""
    coefficient, exponent = law
    return coefficient * at**exponent


def optimal(name: str, source: str, note: str, law: Law, flops_per_param_token: float = 6.0) -> PublishedLaw:
    """Give the power laws in C that a law of N and D comes to at its optimum."""
    params, tokens, loss = law.optimum(1.0, flops_per_param_token)
    return PublishedLaw(
        name, source, note,
        (params, law.n_opt_exponent), (tokens, law.d_opt_exponent), (loss - law.E, law.loss_exponent), law.E,
    )  # fmt: skip


CHINCHILLA = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
PUBLISHED = (
    PublishedLaw(
        "Liang et al.",
        "arXiv 2410.08184",
        "diffusion transformers, text to image, linear path and velocity",
        (0.0009, 0.5681),
        (186.85, 0.4319),
        (2.3943, -0.0273),
    ),
    optimal(
        "Chinchilla, fitted again",
        "arXiv 2404.10102 of 2203.15556",
        "language models, nats a token; the law of N and D at its optimum",
        CHINCHILLA,
    ),
)

# DiT at 400,000 steps of batch 256 on ImageNet 256 x 256 (arXiv 2212.09748, table 4): multiply-adds of a forward pass
# in units of 1e9, and FID of 50,000 samples without guidance.
DIT_POINTS = {
    "S/8": (0.36, 153.60), "S/4": (1.41, 100.41), "S/2": (6.06, 68.40),
    "B/8": (1.42, 122.74), "B/4": (5.56, 68.38), "B/2": (23.01, 43.47),
    "L/8": (5.01, 118.87), "L/4": (19.70, 45.64), "L/2": (80.71, 23.33),
    "XL/8": (7.39, 106.41), "XL/4": (29.05, 43.01), "XL/2": (118.64, 19.47),
}  # fmt: skip
DIT_LAW: Power = (138.0, -0.365)  # FID in 1e9 multiply-adds, least squares of logarithms
MEI = (
    "At an equal budget of sampling FLOPs smaller models often win (Mei et al., arXiv 2404.01367): they afford more "
    "steps."
)
