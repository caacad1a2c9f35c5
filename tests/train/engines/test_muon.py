"""Muon against a reference of one process in float64, alone and at every ZeRO stage; and what it leaves to AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit.model.stacked import stacked
from dit.ranks.group import World
from dit.train.engines.base import Engine
from dit.train.engines.local import LocalEngine
from dit.train.engines.muon import QUINTIC, MuonConfig
from dit.train.engines.zero_config import STAGES, ZeroConfig
from dit.train.optim import OptimConfig
from tests.rank_processes import Server

STEPS = 4
OPTIM = OptimConfig(
    name="muon",
    lr=0.05,
    weight_decay=0.1,
    clip=1.5,
    muon=MuonConfig(matrices=("*.deep.*", "wide.weight"), dtype="float64", momentum=0.9),
)


class Sloped(nn.Module):
    """A loss that is linear in the weights, so that their gradient is whatever is asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7)  # AdamW's, with every vector
        self.blocks = nn.ModuleList(Deep() for _ in range(2))
        self.wide = nn.Linear(11, 3)

    def forward(self, slopes: dict[str, Tensor]) -> Tensor:
        """The sum of weights times slopes, by module, because ZeRO-3 gathers a module's parameters for its forward."""
        total = torch.zeros(())
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                total = total + tilted(module, slopes[f"{name}.weight"], slopes[f"{name}.bias"])
        return total


class Deep(nn.Module):
    """Two matrices, of which one is three."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.ModuleDict({"qkv": stacked(nn.Linear(6, 18), 3), "out": nn.Linear(6, 9)})


def tilted(module: nn.Linear, weight: Tensor, bias: Tensor) -> Tensor:
    """(weights · slopes).sum(), by a call of the module: W e_i for every column i, and the bias."""
    columns = module(torch.eye(module.in_features))  # (in, out): rows of W^T, each with the bias
    rest = module(torch.zeros(1, module.in_features))  # (1, out)
    return ((columns - rest) * weight.T).sum() + (rest * bias).sum()


def slopes(step: int, rank: int) -> dict[str, Tensor]:
    """A rank's gradients of a step, the first ones small and the rest clipped."""
    made = torch.Generator().manual_seed(100 * step + rank)
    return {
        name: torch.randn(p.shape, generator=made) * 10.0 ** (step - 3)
        for name, p in Sloped().named_parameters()
    }


def trained(engine: Engine, rank: int, steps: int = STEPS) -> dict[str, Tensor]:
    """Of this rank's pieces after some steps: "model/name", "momentum/name", ... -> (offset, tensor)."""
    for step in range(steps):
        engine.backward(engine(slopes(step, rank)))
        assert engine.step(OPTIM.lr)
    return {
        f"{kind}/{f.name}": (f.offset, tensor.clone())  # type: ignore[misc]
        for f in engine.fragments()
        for kind, tensor in {"model": f.weight, **f.state}.items()
        if f.is_owned
    }


def reference(ranks: int) -> dict[str, np.ndarray]:
    """The same in float64 and by itself: mean over ranks, clipping, momentum, the iteration, decay, AdamW."""
    weights = {n: p.detach().double().numpy().copy() for n, p in Sloped().named_parameters()}
    momenta: dict[str, Any] = {n: np.zeros_like(w) for n, w in weights.items()}
    squares: dict[str, Any] = {n: np.zeros_like(w) for n, w in weights.items()}
    for step in range(STEPS):
        each = [{n: g.double().numpy() for n, g in slopes(step, r).items()} for r in range(ranks)]
        grads = {n: sum(some[n] for some in each) / ranks for n in weights}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, raw in grads.items():
            grad = raw * min(1.0, 1.5 / (norm + 1e-6))
            is_matrix = ".deep." in name or name == "wide.weight"
            if is_matrix and grad.ndim == 2:
                momenta[name] = 0.9 * momenta[name] + 0.1 * grad
                direction = 0.1 * grad + 0.9 * momenta[name]
                parts = np.split(direction, 3 if "qkv" in name else 1)
                moved = np.concatenate([0.2 * math.sqrt(max(p.shape)) * iterated(p) for p in parts])
            else:
                momenta[name] = 0.9 * momenta[name] + 0.1 * grad
                squares[name] = 0.999 * squares[name] + 0.001 * grad**2
                mean, square = (
                    momenta[name] / (1 - 0.9 ** (step + 1)),
                    squares[name] / (1 - 0.999 ** (step + 1)),
                )
                moved = mean / (np.sqrt(square) + 1e-8)
            decay = 0.1 if grad.ndim == 2 else 0.0
            weights[name] = (1 - 0.05 * decay) * weights[name] - 0.05 * moved
    return {f"model/{n}": w for n, w in weights.items()} | {f"momenta/{n}": m for n, m in momenta.items()}


def iterated(x: np.ndarray) -> np.ndarray:
    """The quintic on the singular values themselves, which the products of matrices amount to."""
    u, s, v = np.linalg.svd(x, full_matrices=False)
    s = s / np.linalg.norm(x)
    for _ in range(5):
        s = QUINTIC[0] * s + QUINTIC[1] * s**3 + QUINTIC[2] * s**5
    made: np.ndarray = u @ np.diag(s) @ v
    return made


def check(found: list[Mapping[str, Any]], ranks: int) -> None:
    """All ranks' pieces, put together, against the reference."""
    expected, seen = reference(ranks), {}
    for pieces in found:
        for name, (offset, tensor) in pieces.items():
            kind, parameter = name.split("/", 1)
            whole = seen.setdefault(name, np.full(expected[f"model/{parameter}"].size, np.nan))
            whole[offset : offset + tensor.numel()] = tensor.numpy()
    for name, whole in seen.items():
        kind, parameter = name.split("/", 1)
        assert not np.isnan(whole).any(), name
        if kind == "model":
            np.testing.assert_allclose(whole, expected[name].ravel(), rtol=0, atol=2e-6, err_msg=name)
        elif kind in ("momentum", "exp_avg"):
            there = expected[f"momenta/{parameter}"].ravel()
            np.testing.assert_allclose(whole, there, rtol=1e-5, atol=1e-7, err_msg=name)
    kept = {
        kind: {n.split("/", 1)[1] for n in seen if n.startswith(kind + "/")}
        for kind in ("momentum", "exp_avg_sq")
    }
    matrices = {"blocks.0.deep.qkv.weight", "blocks.1.deep.qkv.weight"}
    matrices |= {"blocks.0.deep.out.weight", "blocks.1.deep.out.weight", "wide.weight"}
    assert kept["momentum"] == matrices
    assert kept["exp_avg_sq"] == {n for n, _ in Sloped().named_parameters()} - matrices


def on_ranks(stages: list[int]) -> list[Any]:
    """The training at each stage, behind DeepSpeed."""
    from dit.train.engines.zero_engine import DeepSpeedEngine

    world, found = World.from_env(), []
    for stage in stages:
        engine = DeepSpeedEngine(
            Sloped(), OPTIM, world, zero=ZeroConfig(stage=stage), global_batch=world.size, accumulation=1
        )
        found.append(trained(engine, world.rank))
        engine.close()
    return found


def test_alone_it_is_the_reference() -> None:
    check([trained(LocalEngine(Sloped(), OPTIM, World()), 0)], 1)


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_at_every_stage_it_is_the_reference(ranks: Server, size: int) -> None:
    """Of one rank and of several: matrices lie across the cuts."""
    found = ranks.run(size, on_ranks, list(STAGES))
    for i, stage in enumerate(STAGES):
        if stage == 0 and size > 1:
            assert all(not len(other[0]) for other in found[1:])  # replicas own nothing
        check([own[i] for own in found], size)
