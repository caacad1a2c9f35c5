"""Muon against a reference of one process in float64, alone and at every ZeRO stage; and what it leaves to AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dit.bench.speed.collectives import CollectiveCounter
from dit.config import ConfigError, from_dict
from dit.experiments.parts import make_parts
from dit.model.dit import DiTConfig
from dit.model.stacked import stacked
from dit.ranks.group import World
from dit.train.engines.base import Engine
from dit.train.engines.local import LocalEngine
from dit.train.engines.matrices import Piece, shared_out
from dit.train.engines.muon import QUINTIC, hidden_matrices, orthogonalised, updates_of
from dit.train.engines.optimizers import OPTIMIZERS
from dit.train.engines.zero_config import STAGES, ZeroConfig
from dit.train.optim import MuonConfig, OptimConfig
from dit.train.plan import Plan
from dit.train.summary import summary
from tests.datasets import Digits
from tests.rank_processes import Server
from tests.train.runs import Values, at_step, column, differing, experiment, forked, go, state, values

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
        each = [own[i] for own in found]
        if stage == 0:  # replicas, which stay the same to the bit
            assert all(torch.equal(each[0][name][1], other[name][1]) for other in each[1:] for name in other)
            each = each[:1]
        check(each, size)


def bytes_of_a_step(stages: list[int]) -> list[tuple[float, int]]:
    """What a rank sends to be made orthogonal, as counted and as stated."""
    from dit.train.engines.zero_engine import DeepSpeedEngine

    world, found = World.from_env(), []
    for stage in stages:
        engine = DeepSpeedEngine(
            Sloped(), OPTIM, world, zero=ZeroConfig(stage=stage), global_batch=world.size, accumulation=1
        )
        engine.backward(engine(slopes(0, world.rank)))
        with CollectiveCounter() as counter:
            engine.step(OPTIM.lr)
        counted = sum(kind.sent * n for kind, n in counter.found.items() if kind.op == "all_to_all")
        optimizer: Any = engine.optimizer
        found.append((counted, sum(bundle.exchange.sent for bundle in optimizer.bundles.values())))
        engine.close()
    return found


def test_it_sends_what_it_says(ranks: Server) -> None:
    """Of both ranks: all matrices at stage 0; at 3 those that both have of, which of three in one is one; less at 1."""
    numbers = 8 * (2 * (18 * 6 + 9 * 6) + 3 * 11)  # bytes of all matrices in float64
    found = ranks.run(2, bytes_of_a_step, [0, 1, 3])
    shared = 8 * (2 * (36 + 54) + 33)  # the middle one of q, k, v; half of it is sent and half sent back
    for i, (stage, most) in enumerate(((0, numbers), (1, numbers / 4), (3, shared))):
        both = [own[i] for own in found]
        assert all(counted == stated for counted, stated in both)
        total = sum(counted for counted, _ in both)
        assert 0 < total <= most if stage == 1 else total == pytest.approx(most, rel=0.05), stage


# --- the iteration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 40), (2, 40, 5), (1, 1, 7)])
def test_singular_values_come_near_one_and_zero_stays_zero(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for scale in (1.0, 1e-12, 1e9):  # of the gradient, which does not matter
        made = orthogonalised(scale * x, 5)
        values = torch.linalg.svdvals(made)
        assert made.shape == x.shape
        assert float(values.min()) > 0.3  # of a square matrix one may be nearly zero before
        assert float(values.max()) < 1.25
    assert not orthogonalised(torch.zeros(shape, dtype=torch.float64), 5).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_is_that_of_torchs_muon(dtype: str) -> None:
    """Which computes in bf16: to its rounding. (Its `adjust_lr_fn` is the same rule of the rate.)"""
    torch.manual_seed(3)
    plain = nn.Linear(24, 40, bias=False)
    ours = nn.ModuleDict({"deep": nn.Linear(24, 40, bias=False)})
    ours["deep"].load_state_dict(plain.state_dict())
    settings = MuonConfig(matrices=("deep.weight",), dtype=dtype)  # type: ignore[arg-type]
    engine = LocalEngine(ours, OptimConfig(name="muon", weight_decay=0.1, clip=None, muon=settings), World())
    theirs = torch.optim.Muon(
        plain.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    start = plain.weight.detach().clone()
    for _ in range(6):
        slope = torch.randn(40, 24)
        plain.weight.grad, ours["deep"].weight.grad = slope, slope.clone()
        theirs.step()
        engine.step(0.02)
    with torch.no_grad():
        moved, off = (plain.weight - start).norm(), (ours["deep"].weight - plain.weight).norm()
    assert float(off / moved) < 1e-2


def test_equal_shapes_together_or_each_by_itself_are_the_same() -> None:
    made = torch.Generator().manual_seed(2)
    shapes = [(4, 6), (6, 4), (4, 6), (3, 3)]
    some = [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]
    together = updates_of(some, 5)
    for matrix, found in zip(some, together, strict=True):
        torch.testing.assert_close(found, updates_of([matrix], 5)[0])
        assert 0.13 < float(found.square().mean().sqrt()) < 0.26


# --- which matrices, and who works on them -----------------------------------------------------------------


def test_hidden_matrices_of_a_network_are_those_of_attention_and_mlps() -> None:
    block = {"name": "adaln_zero", "mlp": "swiglu", "qk_norm": "rms"}
    with torch.device("meta"):
        network = from_dict(DiTConfig, {"size": "nano", "block": block}).build(8, 4, 3)
    found = hidden_matrices(network, MuonConfig().matrices)
    each = ("attention.qkv", "attention.proj", "mlp.fc1", "mlp.fc2")
    assert list(found) == [f"blocks.{i}.{name}.weight" for i in range(2) for name in each]
    assert [getattr(p, "stacked", 1) for p in found.values()] == 2 * [3, 1, 2, 1]
    more = hidden_matrices(network, ("blocks.*.modulation.weight",))
    assert [getattr(p, "stacked", 1) for p in more.values()] == [6, 6]
    next(iter(found.values())).requires_grad_(False)
    assert len(hidden_matrices(network, MuonConfig().matrices)) == len(found) - 1
    with pytest.raises(ConfigError, match=r"no matrix fits '\*.mpl.\*'; there are patch_embed.proj.weight"):
        hidden_matrices(network, ("*.attention.*", "*.mpl.*"))


def test_of_maximal_updates_a_matrix_moves_by_the_same_singular_value_at_any_width() -> None:
    """Rate times the factor of the group times the update's largest singular value; and rate times decay."""
    moved, decays = [], []
    optim = OptimConfig(name="muon", weight_decay=0.5, muon=MuonConfig(dtype="float32"))
    for width in (32, 128):
        mup = {"name": "mup", "base_width": 32}
        given = {"width": width, "depth": 1, "heads": 2, "parametrization": mup}
        network = from_dict(DiTConfig, given).build(8, 4, 3)
        engine = LocalEngine(network, optim, World())
        (group,) = [g for g in engine.optimizer.param_groups if g.get("matrices")]
        update = updates_of([torch.eye(width)], 5)[0]
        assert len(group["params"]) == 4
        moved.append(group["lr_factor"] * float(torch.linalg.matrix_norm(update, 2)))
        decays.append(group["lr_factor"] * group["weight_decay"])
    assert moved[1] / moved[0] == pytest.approx(
        1.0, abs=0.5
    )  # the iteration leaves 0.7 to 1.2; Adam's rule: 0.5
    assert decays == pytest.approx([0.5, 0.5])


def pieces(cuts: list[list[tuple[str, int, int]]], shape: tuple[int, int]) -> list[list[Piece]]:
    """Of each rank: (parameter, first element, how many), one behind the other in one tensor."""
    found = []
    for own in cuts:
        starts = np.cumsum([0, *(n for *_, n in own)])
        found.append(
            [Piece(name, shape, 1, at, n, 0, int(s)) for (name, at, n), s in zip(own, starts, strict=False)]
        )
    return found


def test_who_has_a_whole_matrix_works_on_it_and_the_rest_is_shared_out() -> None:
    partition = pieces([[("a", 0, 12), ("b", 0, 5)], [("b", 5, 7), ("c", 0, 12)]], (3, 4))
    found = {m.key.name: m for m in shared_out(partition)}
    assert (found["a"].owner, found["c"].owner) == (0, 1)
    assert not any(found[name].gives(rank) or found[name].gets(rank) for name in "ac" for rank in (0, 1))
    b = found["b"]
    assert b.gives(1 - b.owner)
    assert b.gets(1 - b.owner)
    replicas = shared_out(pieces([[(f"w{i}", 0, 12) for i in range(8)]] * 4, (3, 4)))
    assert sorted(m.owner for m in replicas) == [0, 0, 1, 1, 2, 2, 3, 3]  # nobody does the work of all
    assert not any(m.gives(rank) for m in replicas for rank in range(4))
    thirds = shared_out(pieces([[(f"w{i}", 4 * rank, 4) for i in range(6)] for rank in range(3)], (3, 4)))
    assert sorted(m.owner for m in thirds) == [0, 0, 1, 1, 2, 2]


def test_every_name_of_the_key_is_an_optimizer() -> None:
    assert set(get_args(get_type_hints(OptimConfig)["name"])) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"muon": {"momentum": 0.9}}, "optim.muon is set, but optim.name is adamw"),
        (
            {"name": "muon", "muon": {"momentum": 1.0}},
            "muon.momentum must be at least 0 and below 1, got 1.0",
        ),
        ({"name": "muon", "muon": {"iterations": 0}}, "optim.muon.iterations must be at least 1"),
        ({"name": "muon", "muon": {"matrices": []}}, "optim.muon.matrices is empty"),
        ({"name": "mouon"}, "name"),
    ],
)
def test_what_means_nothing_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_dict(OptimConfig, wrong)


# --- runs --------------------------------------------------------------------------------------------------

RUN = {"optim": {"name": "muon", "muon": {"dtype": "float32"}}}


def given(digits: Digits, run_dir: Path, **sections: Any) -> Values:
    """A run with Muon; the rest of its optimizer as in other tests."""
    made = values(digits, run_dir, **sections)
    return {**made, "optim": {**made["optim"], **RUN["optim"]}}


def test_a_run_goes_on_as_if_never_stopped_and_at_another_stage(
    digits: Digits, ranks: Server, tmp_path: Path
) -> None:
    """Alone to the bit; on two ranks at stage 3, where every matrix is cut, to rounding."""
    whole = tmp_path / "whole"
    ranks.run(1, go, given(digits, whole, engine="local"))
    cut, away = (forked(whole, 10, tmp_path / name) for name in ("cut", "away"))
    ranks.run(1, go, given(digits, cut, engine="local"))
    ranks.run(2, go, given(digits, away, zero={"stage": 3}))
    expected, there = state(at_step(whole, 20)), state(at_step(away, 20))
    kinds = {name.split("/")[0] for name in expected if not name.startswith("buffer/")}
    assert kinds == {"model", "ema", "exp_avg", "exp_avg_sq", "momentum"}
    assert differing(expected, state(at_step(cut, 20))) == []
    assert expected.keys() == there.keys()
    for kind in kinds:
        names = [name for name in sorted(expected) if name.startswith(kind + "/")]
        a, b = (torch.cat([found[name].flatten() for name in names]) for found in (expected, there))
        assert float((a - b).norm() / a.norm()) < 1e-3, kind
    losses = column(whole, "loss")
    assert losses[-1] < losses[0]
    with pytest.raises(Exception, match=r"optim\.name: .*muon.* there, .*adamw.* now"):
        ranks.run(1, go, values(digits, cut, engine="local"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_stage_goes_on_to_the_bit(
    digits: Digits, ranks: Server, tmp_path: Path, stage: int
) -> None:
    sections: Any = {"zero": {"stage": stage}, "train": {"precision": "bf16"}}
    ranks.run(2, go, given(digits, tmp_path / "whole", **sections))
    cut = forked(tmp_path / "whole", 10, tmp_path / "cut")
    ranks.run(2, go, given(digits, cut, **sections))
    assert differing(state(at_step(tmp_path / "whole", 20)), state(at_step(cut, 20))) == []


def test_offload_is_refused(digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero.offload is optimizer, and optim.name muon needs its state"):
        experiment(given(digits, tmp_path, zero={"stage": 2, "offload": "optimizer"}))


def test_memory_and_disk_have_a_number_less_of_each_matrix(digits: Digits, tmp_path: Path) -> None:
    adamw, muon = (
        Plan(experiment(made(digits, tmp_path)), make_parts, World(0, 1, 0)) for made in (values, given)
    )
    matrices = 2 * (4 + 8) * 64**2  # two blocks of nano, 64 wide
    assert (adamw.outline.matrices, muon.outline.matrices) == (0, matrices)
    for stage in (0, 1, 3):
        assert adamw.memory(stage).optimizer - muon.memory(stage).optimizer == 4 * matrices
    assert "Muon of 98,304 numbers in matrices (momentum 0.95, float32), else AdamW" in summary(muon)
    for plan in (adamw, muon):
        plan.close()


def test_matrices_that_are_all_frozen_are_no_work_for_muon() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    assert list(hidden_matrices(module, ("*.weight",))) == ["1.weight"]
    with pytest.raises(ConfigError, match=r"is frozen: take optim\.name: adamw"):
        hidden_matrices(module, ("0.*",))
