"""CFG-Zero*: the velocity is the paper's formula, exact models are known, and the first share of times is at rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict
from dit.flow.path import VP, Cosine, Linear, NoisePath, broadcast
from dit.flow.predict import Cond, Endpoints, Prediction
from dit.sample.cfg_zero import ClassifierFreeZero, at_rest, projection
from dit.sample.denoise import DenoiseFn, Denoiser
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS, sampling_interval
from dit.sample.guide import GUIDANCES, ClassifierFree, Context, null
from dit.sample.solve import SOLVERS, Solver
from tests.gaussian import ALL_PATHS, PAIR_IDS, PAIRS, Gaussian, normal

LABELS = torch.tensor([1, 3, 5])
TIMES = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
WITHOUT = {"zero_init": 0.0}


def exact(path: NoisePath, mean: float = 0.0) -> DenoiseFn:
    """Gaussian data: class k has the mean k·mean and the spread 0.4 + 0.1·k, the null is class 0."""

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        kinds = torch.where(cond["drop"], 0, cond["label"]) if "drop" in cond else cond["label"]
        of = [Gaussian(mean * float(k), 0.4 + 0.1 * float(k)) for k in kinds]
        ends = [g.endpoints(path, x[i : i + 1], t[i : i + 1]) for i, g in enumerate(of)]
        return Endpoints(torch.cat([e.data for e in ends]), torch.cat([e.eps for e in ends]), x.clone())

    return denoise


def guided(path: NoisePath, denoise: DenoiseFn, scale: float = 3.0, **fields: object) -> DenoiseFn:
    return ClassifierFreeZero(scale=scale, **fields)(denoise, Context(path))


@pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
def test_it_is_the_papers_formula_of_the_velocities(path: NoisePath, prediction: Prediction) -> None:
    """Sample by sample, for whatever a network says, whatever it is taken for."""
    x, scale, outputs = normal(3, 4, 2, 2), 2.5, normal(6, 4, 2, 2, seed=9)
    model = Denoiser(lambda *_: outputs, path, prediction)
    found = guided(path, model, scale, **WITHOUT)(x, TIMES, {"label": LABELS})
    coeffs = path.coeffs(TIMES)
    both = [prediction.endpoints(coeffs, x, part).velocity(coeffs) for part in outputs.split(3)]
    velocity = found.velocity(coeffs)
    for i in range(3):
        conditional, unconditional = both[0][i].flatten(), both[1][i].flatten()
        s = conditional.dot(unconditional) / unconditional.dot(unconditional)
        want = s * unconditional + scale * (conditional - s * unconditional)
        torch.testing.assert_close(velocity[i].flatten(), want)
    torch.testing.assert_close(coeffs.mix(found.data, found.eps), x)


@pytest.mark.parametrize("path", ALL_PATHS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_of_centred_gaussians_it_is_the_conditional_at_any_scale(path: NoisePath, scale: float) -> None:
    """There each velocity is a multiple of x, (alpha'·alpha·std² + sigma'·sigma)·x / (alpha²·std² + sigma²); so s·null
    is the conditional's, and s the ratio of the two factors. Plain cfg goes beyond it.
    """
    x, cond, c = normal(3, 4, 2, 2), {"label": LABELS}, path.coeffs(TIMES)
    found, want = guided(path, exact(path), scale, **WITHOUT)(x, TIMES, cond), exact(path)(x, TIMES, cond)
    torch.testing.assert_close(found.data, want.data)
    torch.testing.assert_close(found.eps, want.eps)
    assert torch.equal(found.log_variance, want.log_variance)

    def factor(std: Tensor) -> Tensor:
        rise = c.d_alpha * c.alpha * std**2 + c.d_sigma * c.sigma
        return rise / (c.alpha**2 * std**2 + c.sigma**2)

    plain = exact(path)(x, TIMES, null(cond, x))
    share = projection(want.velocity(c), plain.velocity(c))
    torch.testing.assert_close(share, factor(0.4 + 0.1 * LABELS) / factor(torch.full((3,), 0.4).double()))
    assert not torch.allclose(
        ClassifierFree(scale=scale)(exact(path))(x, TIMES, cond).eps, want.eps, rtol=1e-3
    )


@pytest.mark.parametrize("solver", [s() for _, s in SOLVERS.items() if not s().uses_variance], ids=str)
def test_each_solver_draws_the_conditionals_samples(solver: Solver) -> None:
    """At scale 4 of those Gaussians, from the same noise: the solver sees the same endpoints at each of its steps."""
    path, x, cond = VP(), normal(3, 4, 2, 2), {"label": LABELS}
    times = torch.linspace(1, 1e-3, 6, dtype=torch.float64)

    def added(draw: int) -> Tensor:
        return normal(3, 4, 2, 2, seed=draw + 1)

    found, want = (
        solver(denoise, x, times, path, added, cond)
        for denoise in (guided(path, exact(path), 4.0, **WITHOUT), exact(path))
    )
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_the_projection_is_the_nearest_multiple_and_none_of_nothing() -> None:
    a, b = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    b[1] = 0.0
    share = projection(a, b)
    rest = a - broadcast(share, a) * b
    torch.testing.assert_close((rest * b).flatten(1).sum(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    assert share[1] == 0
    torch.testing.assert_close(projection(-2.5 * b[::2], b[::2]), torch.full((2,), -2.5).double())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [3, 150])
def test_each_sample_is_guided_by_itself_to_the_bit(threads: int, size: int) -> None:
    """Alone, in any order, beside others at rest or out of the interval; also where threads share a long sum."""
    path, before = Linear(), torch.get_num_threads()
    x, t = normal(5, 3, size, size, dtype=torch.float32), torch.tensor([0.1, 0.5, 0.7, 0.9, 0.97])
    label = torch.tensor([1, 2, 3, 4, 5])

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        data = x * broadcast(torch.where(cond["drop"], 0.25, 1.0 / cond["label"]), x) + 0.5
        return Endpoints(data, x, None).with_data(path.coeffs(t), x, data)

    run = guided(path, denoise, interval=(0.2, 1.0))
    drop = torch.zeros(5, dtype=torch.bool)
    torch.set_num_threads(threads)
    try:
        whole = run(x, t, {"label": label, "drop": drop})
        for rows in ([1], [4], [3, 2], [2, 2, 0], [4, 3, 2, 1, 0]):
            part = run(x[rows], t[rows], {"label": label[rows], "drop": drop[rows]})
            assert torch.equal(part.data, whole.data[rows])
            assert torch.equal(part.eps, whole.eps[rows])
    finally:
        torch.set_num_threads(before)


# --- at rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL_PATHS, ids=str)
def test_the_first_share_of_times_is_at_rest(path: NoisePath) -> None:
    """t = 0.9, 0.95, 0.96 and 1 of a zero_init of 0.05: the last two, and the edge is no longer at rest."""
    x, t = normal(4, 4, 2, 2), torch.tensor([0.9, 0.95, 0.96, 1.0], dtype=torch.float64)
    cond, c = {"label": torch.tensor([1, 3, 5, 2])}, path.coeffs(t)
    found = guided(path, exact(path, 1.0), zero_init=0.05)(x, t, cond)
    moving = guided(path, exact(path, 1.0), **WITHOUT)(x, t, cond)
    speed = found.velocity(c).flatten(1).abs().amax(1) / (c.d_alpha.abs() + c.d_sigma.abs())
    assert (speed < 1e-12).tolist() == [False, False, True, True]
    assert torch.equal(found.data[:2], moving.data[:2])
    assert torch.equal(found.log_variance, x)
    torch.testing.assert_close(c.mix(found.data, found.eps), x)


def test_on_the_linear_path_at_rest_both_ends_are_x() -> None:
    x = normal(3, 4, 2, 2)
    rest = at_rest(Linear().coeffs(TIMES), x)
    torch.testing.assert_close(rest.data, x)
    torch.testing.assert_close(rest.eps, x)


@pytest.mark.parametrize(("steps", "count"), [(50, 2), (100, 4), (10, 1), (250, 10)])
def test_the_default_is_the_papers_share_of_steps_and_the_first_one_at_least(steps: int, count: int) -> None:
    path, seen = Linear(), []
    for t in torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]:
        for time in (t, t.float()):
            ends = guided(path, exact(path, 1.0))(normal(1, 2), time.reshape(1), {"label": LABELS[:1]})
            seen.append(torch.equal(ends.data, ends.eps))  # so there is no velocity
    assert seen == [True] * 2 * count + [False] * 2 * (steps - count)


@pytest.mark.parametrize("steps", [7, 10, 30, 49, 250])
def test_a_share_of_whole_steps_is_so_many_steps_however_it_is_rounded(steps: int) -> None:
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    for count in range(1, steps):
        guidance = ClassifierFreeZero(scale=2.0, zero_init=count / steps)
        for t in (times, times.float()):
            assert int(guidance._rests(t).sum()) == count


@pytest.mark.parametrize("name", ["euler", "heun", "midpoint", "rk4", "dpmpp_2m", "unipc"])
def test_an_ode_stays_where_it_began(name: str) -> None:
    path, x = Linear(), normal(3, 4, 2, 2)
    times = torch.linspace(1, 0.97, 4, dtype=torch.float64)
    found = SOLVERS[name]()(guided(path, exact(path, 1.0)), x, times, path, None, {"label": LABELS})
    torch.testing.assert_close(found, x)


@pytest.mark.parametrize("name", [n for n in SOLVERS if SOLVERS[n]().nfe(1) is not None])
@pytest.mark.parametrize(("path", "prediction"), PAIRS[:: len(PAIRS) // 9], ids=PAIR_IDS[:: len(PAIRS) // 9])
def test_every_solver_draws_with_it(name: str, path: NoisePath, prediction: Prediction) -> None:
    """From the grid's own first time, where the prediction may be barely usable, to its last."""
    solver = SOLVERS[name]()
    if solver.uses_variance:
        solver = type(solver)(variance="small")  # type: ignore[call-arg]
    times = GRIDS["uniform"]()(8, path, prediction)
    x = path.prior(normal(3, 4, 2, 2), float(times[0]))
    found = solver(
        guided(path, exact(path, 1.0), 2.0), x, times, path, lambda d: normal(3, 4, 2, 2, seed=d), {"label": LABELS}
    )  # fmt: skip
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) < 100


@pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
def test_it_is_finite_wherever_samplers_go(path: NoisePath, prediction: Prediction) -> None:
    t = torch.tensor(sampling_interval(path, prediction), dtype=torch.float64)
    for fields in (WITHOUT, {}):
        ends = guided(path, exact(path, 1.0), **fields)(normal(2, 4), t, {"label": LABELS[:2]})
        assert torch.isfinite(ends.data).all()
        assert torch.isfinite(ends.eps).all()


def test_at_scale_one_only_the_rest_is_left() -> None:
    """It needs no label then, and no null branch: the conditional is asked once, as it came."""
    calls: list[Cond] = []

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        calls.append(cond)
        return Endpoints(x - 1, x + 1)

    guidance = ClassifierFreeZero(scale=1.0)
    assert not guidance.is_neutral
    assert not guidance.needs_label
    t, x = torch.tensor([0.5, 0.99]), normal(2, 4)
    ends = guidance(denoise, Context(Linear()))(x, t, {})
    assert calls == [{}]
    assert torch.equal(ends.data[0], x[0] - 1)
    torch.testing.assert_close(ends.data[1], x[1])
    assert ClassifierFreeZero(scale=1.0, **WITHOUT)(denoise) is denoise


def test_the_null_branch_is_evaluated_where_it_matters_alone() -> None:
    """t = 0.1, 0.5 and 0.99, guided in [0.3, 1]: the second has two branches; the third rests."""
    sizes: list[int] = []

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        sizes.append(len(x))
        return Endpoints(x, x)

    run = guided(Cosine(), denoise, interval=(0.3, 1.0))
    run(normal(3, 4), torch.tensor([0.1, 0.5, 0.99]), {"label": LABELS})
    assert sizes == [4]


def test_it_counts_as_the_cfg_of_a_sampler() -> None:
    guide = {"name": "cfg_zero", "scale": 3.0}
    spec = from_dict(SamplerSpec, {"guidance": guide})
    assert spec.in_turn == (GUIDANCES.parse(guide),)
    assert spec.normal == spec
    with pytest.raises(ConfigError, match="guide twice"):
        from_dict(SamplerSpec, {"guidance": [guide, {"name": "cfg", "scale": 3.0}]})
    with pytest.raises(ConfigError, match="guidance has cfg_zero with scale 3: set cfg_scale to 1"):
        from_dict(SamplerSpec, {"cfg_scale": 2, "guidance": guide})
    with pytest.raises(ConfigError, match="fixed steps"):
        from_dict(SamplerSpec, {"solver": "dopri5", "guidance": guide})
    from_dict(SamplerSpec, {"solver": "dopri5", "guidance": guide | WITHOUT})
    for bad in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="zero_init"):
            GUIDANCES.parse(guide | {"zero_init": bad})
    with pytest.raises(ConfigError, match="cfg_zero's interval must be"):
        GUIDANCES.parse(guide | {"interval": [0.7, 0.2]})
