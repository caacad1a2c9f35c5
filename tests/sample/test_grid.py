"""Grids: from noise to the end of the interval, strictly falling, at the steps of a discrete path."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit.config import ConfigError, from_dict, to_dict
from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, VE, VP, Cosine, Linear, NoisePath
from dit.flow.predict import EDM, Cond, Data, Endpoints, Eps, Prediction, V, Velocity, check_times, usable
from dit.flow.times import shift_time
from dit.sample.grid import (
    GRIDS,
    Grid,
    KarrasGrid,
    LogSNRGrid,
    QuadraticGrid,
    RespacedGrid,
    UniformGrid,
    sampling_interval,
)
from dit.sample.solve import Heun, nodes
from tests.gaussian import PAIR_IDS, PAIRS, Gaussian, golden, normal

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)
CONTINUOUS = [name for name in GRIDS.names() if name != "respaced"]


def made(name: str, **fields: object) -> Grid:
    """The grid of this name; where it has no such field it does without."""
    known = GRIDS[name]()
    return from_dict(GRIDS[name], {key: value for key, value in fields.items() if hasattr(known, key)})


@every_pair
@pytest.mark.parametrize("name", GRIDS.names())
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_fall_from_one_end_to_the_other(
    path: NoisePath, prediction: Prediction, name: str, shift: float
) -> None:
    if path.num_steps is None and name == "respaced":
        return
    lo, hi = sampling_interval(path, prediction)
    for num_steps in (1, 2, 25):
        if num_steps == 1 and name == "respaced":
            continue
        times = made(name, shift=shift)(num_steps, path, prediction)
        assert times.shape == (num_steps + 1,)
        assert times.dtype == torch.float64
        assert bool((times.diff()[:-1] < 0).all())
        assert float(times[-1]) < float(times[-2]) or float(path.alpha_sigma(times[-1:])[1]) > 0
        assert float(times[-1]) == lo
        assert float(times[0]) == float(path.snap(torch.tensor([hi], dtype=torch.float64)))
        check_times(path, prediction, times)
        assert torch.equal(path.snap(times[:-1]), times[:-1])
        nodes(path, times)  # solvers take them


@every_pair
def test_sampling_stays_off_the_path_s_singularity(path: NoisePath, prediction: Prediction) -> None:
    lo, hi = sampling_interval(path, prediction)
    c = path.coeffs(torch.tensor([lo, hi], dtype=torch.float64))
    assert bool(torch.isfinite(c.d_alpha).all() and torch.isfinite(c.d_sigma).all())
    assert usable(path, prediction)[0] <= lo < 1e-2
    assert 0.98 < hi <= usable(path, prediction)[1]


def test_where_sampling_ends() -> None:
    assert sampling_interval(Linear(), Velocity()) == (0.0, 1.0)
    assert sampling_interval(VP(), Eps())[0] == usable(VP(), Velocity())[0] > 0  # eps itself is fine at 0
    assert sampling_interval(Linear(), Data())[0] == usable(Linear(), Data())[0] > 0


def test_the_uniform_grid_is_even() -> None:
    times = UniformGrid()(4, Linear(), Velocity())
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_the_quadratic_grid_is_even_in_the_root() -> None:
    times = QuadraticGrid()(4, Linear(), Velocity())
    assert times.tolist() == [1.0, 0.5625, 0.25, 0.0625, 0.0]
    k = DiscreteVP().model_time(QuadraticGrid()(25, DiscreteVP(), Eps())[:-1])
    assert k.tolist() == [math.ceil(1000 * (i / 25) ** 2 - 1e-9) - 1 for i in range(25, 0, -1)]


@pytest.mark.parametrize("name", ["uniform", "quadratic"])
def test_a_shift_is_that_of_the_training_times(name: str) -> None:
    plain, shifted = (GRIDS[name](shift=s)(8, Linear(), V()) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_time(plain, 3.0))


@pytest.mark.parametrize("name", ["karras", "log_snr"])
def test_a_shift_maps_the_times_that_were_found(name: str) -> None:
    plain, shifted = (GRIDS[name](shift=s)(8, Cosine(), V()) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_time(plain, 3.0))


# --- noise levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [2, 18, 40])
def test_karras_on_ve_is_edm_s_schedule(num_steps: int) -> None:
    """arXiv 2206.00364, eq. 5: N evaluations at its sigmas from 80 to 0.002, the last of them returning data."""
    path, seen = VE(), list[float]()
    times = KarrasGrid()(num_steps, path, EDM())
    steps = torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)
    sigmas = (80 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(path.alpha_sigma(times[:-1])[1], sigmas, rtol=1e-9, atol=0)
    assert times[-2:].tolist() == [0.0, 0.0]

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Endpoints:
        seen.append(float(path.alpha_sigma(t)[1][0]))
        return Gaussian().endpoints(path, x, t)

    got = Heun()(denoise, 80 * normal(2, 3), times, path)
    assert (
        len(seen) == Heun().nfe(num_steps, to_data=True) == 2 * num_steps - 1
    )  # 35 of 18 steps, as published
    assert seen[-1] == pytest.approx(0.002)
    exact = Gaussian().transport(path, 80 * normal(2, 3), 1.0, 0.0)
    assert num_steps < 40 or float((got - exact).abs().max()) < 0.02


def test_karras_rho() -> None:
    path = VE(sigma_min=1.0, sigma_max=81.0)
    grid = KarrasGrid(rho=2.0, sigma_min=1.0, sigma_max=81.0)
    levels = path.alpha_sigma(grid(5, path, EDM())[:-1])[1]
    torch.testing.assert_close(levels, torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0], dtype=torch.float64) ** 2)


def test_log_snr_steps_are_even() -> None:
    path = VP()
    times = LogSNRGrid(sigma_min=0.01, sigma_max=50.0)(9, path, V())
    log_snr = path.log_snr(times[1:-1])
    assert log_snr.diff().tolist() == pytest.approx([2 * math.log(5000) / 8] * 7)
    assert float(log_snr[-1]) == pytest.approx(-2 * math.log(0.01))
    assert float(times[0]) == 1.0  # not where sigma/alpha is 50


@pytest.mark.parametrize("name", ["karras", "log_snr"])
@pytest.mark.parametrize("path", [Linear(), VP(), DiscreteVP(), VE(sigma_min=0.1, sigma_max=9.0)], ids=str)
def test_noise_levels_that_a_path_does_not_have_are_left_out(name: str, path: NoisePath) -> None:
    times = GRIDS[name](sigma_min=1e-9, sigma_max=1e9)(12, path, V())
    assert bool((times.diff()[:-1] < 0).all())
    lo, hi = sampling_interval(path, V())
    least = path.snap(torch.tensor([lo], dtype=torch.float64))
    assert float(times[0]) == hi
    assert float(times[-2]) == pytest.approx(1e-9 if isinstance(path, Linear) else float(least), rel=1e-6)


@pytest.mark.parametrize("name", ["karras", "log_snr"])
@pytest.mark.parametrize(
    "fields", [{"sigma_min": 0.0}, {"sigma_max": -1.0}, {"sigma_min": 3.0, "sigma_max": 2.0}]
)
def test_impossible_levels_are_refused(name: str, fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sigma_m"):
        from_dict(GRIDS[name], fields)


# --- discrete paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 7, 30, 50, 250, 1000])
def test_ddpm_grids_visit_whole_steps(num_steps: int) -> None:
    path = DiscreteVP()
    k = path.model_time(UniformGrid()(num_steps, path, Eps())[:-1])
    assert torch.equal(k, k.round())
    assert int(k[0]) == 999
    assert int(k[-1]) <= 1000 / num_steps  # the last evaluation is one stride from the data
    if 1000 % num_steps == 0:
        assert k.tolist() == [999 - i * 1000 // num_steps for i in range(num_steps)]


@pytest.mark.parametrize(("stride", "num_steps", "key"), [("even", 50, "50"), ("ddim", 25, "ddim25")])
def test_respaced_steps_are_the_reference_s(stride: str, num_steps: int, key: str) -> None:
    path = DiscreteVP()
    times = RespacedGrid(stride=stride)(num_steps, path, Eps())
    want = golden("ddpm")[f"respace/{key}"].tolist()
    assert path.model_time(times[:-1]).flip(0).tolist() == want
    assert path.model_time(times[:-1].float()).flip(0).tolist() == want
    assert float(times[-1]) == sampling_interval(path, Eps())[0]


@pytest.mark.parametrize(
    ("num_steps", "total", "sections", "steps"),
    [
        (4, 4, (), [0, 1, 2, 3]),
        (2, 1000, (), [0, 999]),
        (5, 300, (2, 3), [0, 149, 150, 224, 299]),  # 74.5 is rounded to the even 74
        (3, 7, (1, 1, 1), [0, 3, 5]),  # sections of 3, 2 and 2 steps
        (4, 10, (3, 1), [0, 2, 4, 5]),
    ],
)
def test_sections(num_steps: int, total: int, sections: tuple[int, ...], steps: list[int]) -> None:
    assert RespacedGrid(sections=sections).steps(num_steps, total) == steps


@pytest.mark.parametrize(
    ("fields", "num_steps", "says"),
    [
        ({}, 1, "at least 2"),
        ({"sections": (2, 3)}, 6, "add up to num_steps = 6"),
        ({}, 1001, "cannot give 1001"),
        ({"sections": (501, 1)}, 502, "a section of 500 steps cannot give 501"),
        ({"stride": "ddim"}, 300, "no integer stride makes 300 steps of 1000"),
    ],
)
def test_maps_that_there_are_none_of_are_refused(fields: dict, num_steps: int, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(RespacedGrid, fields)(num_steps, DiscreteVP(), Eps())
    assert says in str(error.value)


@pytest.mark.parametrize("path", [Linear(), VP(), VE()], ids=str)
def test_only_discrete_paths_are_respaced(path: NoisePath) -> None:
    with pytest.raises(ConfigError, match="is for discrete paths"):
        RespacedGrid()(50, path, V())


def test_more_steps_than_the_path_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="visit a time twice"):
        UniformGrid()(1001, DiscreteVP(), Eps())
    with pytest.raises(ConfigError, match="visit a time twice"):  # clean data twice: nothing to ask there
        KarrasGrid(sigma_min=1e-14)(10, Linear(), Velocity())


EVERY_GRID = [UniformGrid(shift=5.0), KarrasGrid(), LogSNRGrid(), QuadraticGrid()]


@pytest.mark.parametrize("num_steps", [50, 900, 1000])
@pytest.mark.parametrize("grid", EVERY_GRID, ids=str)
def test_every_step_of_a_discrete_path_can_be_had_and_none_twice(grid: Grid, num_steps: int) -> None:
    """Where a grid would visit a step twice the visits make room for each other, and elsewhere none moves."""
    times = grid(num_steps, DiscreteVP(), Eps())
    steps = (times[:-1] * 1000).round().long()
    torch.testing.assert_close(times[:-1], steps.double() / 1000)
    assert bool((steps.diff() < 0).all())
    assert steps[0] == 1000
    if num_steps == 1000:
        assert torch.equal(steps, torch.arange(1000, 0, -1))
    wanted = DiscreteVP().snap(grid.times(num_steps, DiscreteVP(), 0.0, 1.0).clamp(0, 1)[:-1])
    room = 1 - torch.arange(num_steps).double() / 1000
    assert bool((times[:-1] >= torch.minimum(wanted, room) - 1e-12).all())
    alone = wanted.diff(prepend=torch.tensor([2.0])) < -1e-9
    if bool(alone.all()):
        torch.testing.assert_close(times[:-1], wanted)


def test_log_snr_steps_are_even_from_the_first_on_vp() -> None:
    """Its own first level, 151 on vp, is below the grid's sigma_max."""
    times = LogSNRGrid()(20, PATHS["vp"](), Eps())
    steps = PATHS["vp"]().log_snr(times[:-1]).diff()
    torch.testing.assert_close(steps, steps[:1].expand(19), rtol=1e-6, atol=0)


def test_a_stride_and_sections_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="no meaning with stride ddim"):
        from_dict(RespacedGrid, {"stride": "ddim", "sections": (5, 5)})


@pytest.mark.parametrize("num_steps", [0, -3])
@pytest.mark.parametrize("name", GRIDS.names())
def test_no_steps_are_refused(name: str, num_steps: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        GRIDS[name]()(num_steps, Linear(), Velocity())


@pytest.mark.parametrize("name", GRIDS.names())
def test_a_grid_is_its_own_configuration(name: str) -> None:
    grid = made(name, shift=2.0, rho=5.0, sigma_max=70.0, sections=(4, 5))
    assert grid != GRIDS[name]()
    assert GRIDS.parse(to_dict(grid)) == grid


@pytest.mark.parametrize("name", [n for n in GRIDS if hasattr(GRIDS[n](), "shift")])
def test_a_shift_by_dimension_is_one_of_the_latents_size(name: str) -> None:
    grid = GRIDS[name](shift="dimension")
    found = grid.sized(4 * 64 * 64)
    assert found == GRIDS[name](shift=2.0)
    assert torch.equal(found(8, Linear(), V()), GRIDS[name](shift=2.0)(8, Linear(), V()))
    with pytest.raises(ConfigError, match="not known here; give a number"):
        grid(8, Linear(), V())


@pytest.mark.parametrize("name", GRIDS.names())
def test_a_grid_with_a_number_is_of_any_size(name: str) -> None:
    assert GRIDS[name]().sized(7) == GRIDS[name]()
