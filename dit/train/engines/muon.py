"""Muon for hidden matrices, AdamW for the rest (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).

A matrix moves by its momentum made orthogonal: M = U S V^T becomes about U V^T, by Newton and Schulz's iteration. Of
such an update of shape (d_out, d_in) the root of the mean square is 1 / sqrt(max(d_out, d_in)), so it is multiplied by
0.2 * sqrt(max(d_out, d_in)) (Liu et al., arXiv 2502.16982, eq. 4): the root is then 0.2, about AdamW's own, and one
learning rate and weight decay serve both.

Gradients come averaged and clipped, as for AdamW: what is orthogonal is the update, and clipping never sees it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import ConfigError
from dit.ranks.group import World
from dit.train.engines.base import MOMENTUM, Bundles, Place, ensure_state
from dit.train.engines.matrices import Exchange, Piece
from dit.train.optim import MuonConfig

# Of the iteration x <- a x + b (x x^T) x + c (x x^T)^2 x: small singular values grow fastest, and end at 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
RMS = 0.2  # of an update's elements, before the learning rate
TOGETHER = (
    1 << 25
)  # numbers of equal matrices that are worked on in one batch, which takes about 4 times that
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def hidden_matrices(module: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Parameter]:
    """Find the matrices that are trained and whose names fit a pattern. ConfigError where a pattern fits no matrix."""
    there = {name: p for name, p in module.named_parameters() if len(_shape(p)) == 2}
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(there, pattern)
        if not fitting:
            raise ConfigError(
                f"optim.muon.matrices: no matrix fits '{pattern}'; there are {', '.join(there) or 'none'}. Set "
                "optim.muon.matrices, or optim.name: adamw"
            )
        chosen.update(fitting)
    trained = {name: p for name, p in there.items() if name in chosen and p.requires_grad}
    if not trained:
        raise ConfigError(
            f"optim.name is muon, and every matrix of optim.muon.matrices ({', '.join(patterns)}) is frozen: take "
            "optim.name: adamw, or leave some out of train.freeze"
        )
    return trained


def _shape(p: Tensor) -> tuple[int, ...]:
    """Of the whole parameter, also under ZeRO-3."""
    return tuple(getattr(p, "ds_shape", p.shape))


def matrix_groups(matrices: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of hidden matrices, as `parameter_groups` makes them of all others.

    Of maximal updates (dit/model/parametrization.py) Muon takes the root of Adam's factors. A matrix with r times the
    inputs and outputs is to move by as much in its largest singular value (arXiv 2310.17813, condition 1). Adam's
    update has one that grows by r, so its rate falls by r; Muon's are all the same and grow by sqrt(r).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p in matrices:
        lr, decay = (math.sqrt(getattr(p, f"{name}_factor", 1.0)) for name in ("lr", "decay"))
        groups.setdefault((lr, decay), []).append(p)
    return [
        {
            "params": groups[key],
            "weight_decay": weight_decay * key[1],
            "name": "matrices",
            "lr_factor": key[0],
        }
        | {"matrices": True}
        for key in sorted(groups)
    ]


def orthogonalised(x: Tensor, iterations: int) -> Tensor:
    """(n, rows, columns) -> the same shape and dtype: of each the nearest semi-orthogonal matrix, roughly.

    Singular values come out between 0.7 and 1.2, those below about 1e-3 of the matrix's norm less; zero stays zero.
    """
    a, b, c = QUINTIC
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def updates_of(matrices: Sequence[Tensor], iterations: int) -> list[Tensor]:
    """What each matrix moves by at a rate of -1: orthogonal, and of RMS 0.2. Equal shapes are worked on together."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(tuple(matrix.shape), []).append(i)
    made: dict[int, Tensor] = {}
    for (rows, columns), places in by_shape.items():
        many = max(1, TOGETHER // (rows * columns))
        for first in range(0, len(places), many):
            some = places[first : first + many]
            batch = orthogonalised(torch.stack([matrices[i] for i in some]), iterations)
            made |= zip(some, batch * (RMS * math.sqrt(max(rows, columns))), strict=True)
    return [made[i] for i in range(len(matrices))]


@dataclass
class Bundle:
    """What one call of `step` updates at once: flat tensors (or whole parameters), and the exchange of their pieces."""

    tensors: list[Tensor]
    exchange: Exchange


class Muon(torch.optim.AdamW):
    """Muon for groups with the key `matrices`, AdamW for all others.

    `lay_out` has to be called once before the first step. Momentum takes 4 bytes a number, where AdamW's moments take
    8. A step of every group is collective.
    """

    def __init__(self, params: Any, *, settings: MuonConfig, **kwargs: Any):
        """settings: of matrices. kwargs: AdamW's."""
        super().__init__(params, **kwargs)
        self.settings = settings
        self.bundles: dict[Tensor, Bundle] = {}  # by the first tensor that a step is of

    def lay_out(self, bundles: Bundles, places: Sequence[Place], world: World) -> None:
        """Tell which elements of which matrices the tensors hold that are updated on this rank. Collective.

        places: of all trained parameters here, of some bundles perhaps none.
        """
        for number, (of, tensors) in enumerate(bundles):
            if not self.param_groups[of].get("matrices"):
                continue
            at = {id(tensor): i for i, tensor in enumerate(tensors)}
            for tensor in tensors:
                ensure_state(self, tensor, MOMENTUM)
            pieces = [
                Piece(p.name, p.shape, p.stacked, p.offset, p.numel, at[id(p.flat)], p.start)
                for p in places
                if p.bundle == number
            ]
            exchange = Exchange(pieces, world, DTYPES[self.settings.dtype])
            self.bundles[tensors[0]] = Bundle(list(tensors), exchange)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all groups that have parameters. `closure` is not used."""
        groups = self.param_groups
        try:
            self.param_groups = [g for g in groups if not g.get("matrices")]
            super().step()
        finally:
            self.param_groups = groups
        for own in groups:
            if own.get("matrices") and own["params"]:
                self._update(self.bundles[own["params"][0]], own)

    def _update(self, bundle: Bundle, own: Mapping[str, Any]) -> None:
        """Move the matrices of a group by their momentum made orthogonal."""
        exchange = bundle.exchange
        directions = [self._direction(tensor) for tensor in bundle.tensors]
        made = updates_of(exchange.gathered(directions), self.settings.iterations)
        del directions
        if own["weight_decay"]:
            torch._foreach_mul_(bundle.tensors, 1 - own["lr"] * own["weight_decay"])
        for number, start, piece in exchange.handed_back(made):
            bundle.tensors[number].view(-1).narrow(0, start, piece.numel()).add_(piece, alpha=-own["lr"])

    def _direction(self, tensor: Tensor) -> Tensor:
        """Take the gradient into the momentum; what is to be made orthogonal, flat. A gradient may be overwritten."""
        share = self.settings.momentum
        momentum = self.state[tensor]["momentum"]
        gradient = torch.zeros_like(momentum) if tensor.grad is None else tensor.grad.to(momentum.dtype)
        momentum.lerp_(gradient, 1 - share)
        found = gradient.lerp_(momentum, share) if self.settings.nesterov else momentum
        return found.to(DTYPES[self.settings.dtype]).view(-1)
