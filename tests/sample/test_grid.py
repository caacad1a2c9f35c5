"""Grids: from noise to the end of the interval, strictly falling, at the steps of a discrete path."""

from __future__ import annotations

import pytest
import torch

from dit.config import ConfigError, to_dict
from dit.flow.path import VP, DiscreteVP, Linear, Path
from dit.flow.predict import Data, Eps, Prediction, V, Velocity, check_times, usable
from dit.flow.times import shift_time
from dit.sample.grid import GRIDS, UniformGrid, sampling_interval
from tests.gaussian import PAIR_IDS, PAIRS

every_pair = pytest.mark.parametrize(("path", "prediction"), PAIRS, ids=PAIR_IDS)


@every_pair
@pytest.mark.parametrize("name", GRIDS.names())
@pytest.mark.parametrize("num_steps", [1, 2, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_grids_fall_from_one_end_to_the_other(
    path: Path, prediction: Prediction, name: str, num_steps: int, shift: float
) -> None:
    times = GRIDS[name](shift=shift)(num_steps, path, prediction)
    assert times.shape == (num_steps + 1,)
    assert times.dtype == torch.float64
    assert bool((times.diff() < 0).all())
    lo, hi = sampling_interval(path, prediction)
    assert float(times[-1]) == lo
    assert float(times[0]) == float(path.snap(torch.tensor([hi], dtype=torch.float64)))
    check_times(path, prediction, times)
    assert torch.equal(path.snap(times[:-1]), times[:-1])


@every_pair
def test_sampling_stays_off_the_path_s_singularity(path: Path, prediction: Prediction) -> None:
    lo, hi = sampling_interval(path, prediction)
    c = path.coeffs(torch.tensor([lo, hi], dtype=torch.float64))
    assert bool(torch.isfinite(c.d_alpha).all() and torch.isfinite(c.d_sigma).all())
    assert usable(path, prediction)[0] <= lo < 1e-2
    assert 0.99 < hi <= usable(path, prediction)[1]


def test_where_sampling_ends() -> None:
    assert sampling_interval(Linear(), Velocity()) == (0.0, 1.0)
    assert sampling_interval(VP(), Eps())[0] == usable(VP(), Velocity())[0] > 0  # eps itself is fine at 0
    assert sampling_interval(Linear(), Data())[0] == usable(Linear(), Data())[0] > 0


def test_the_uniform_grid_is_even() -> None:
    times = UniformGrid()(4, Linear(), Velocity())
    assert times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_shift_is_that_of_the_training_times() -> None:
    plain, shifted = (UniformGrid(shift=s)(8, Linear(), V()) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, shift_time(plain, 3.0))


@pytest.mark.parametrize("num_steps", [1, 7, 30, 50, 250, 1000])
def test_ddpm_grids_visit_whole_steps(num_steps: int) -> None:
    path = DiscreteVP()
    k = path.model_time(UniformGrid()(num_steps, path, Eps())[:-1])
    assert torch.equal(k, k.round())
    assert int(k[0]) == 999
    assert int(k[-1]) <= 1000 / num_steps  # the last evaluation is one stride from the data
    if 1000 % num_steps == 0:
        assert k.tolist() == [999 - i * 1000 // num_steps for i in range(num_steps)]


def test_more_steps_than_the_path_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="visit a time twice"):
        UniformGrid()(1001, DiscreteVP(), Eps())
    with pytest.raises(ConfigError, match="visit a time twice"):
        UniformGrid(shift=5.0)(900, DiscreteVP(), Eps())


@pytest.mark.parametrize("num_steps", [0, -3])
def test_no_steps_are_refused(num_steps: int) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        UniformGrid()(num_steps, Linear(), Velocity())


@pytest.mark.parametrize("name", GRIDS.names())
def test_a_grid_is_its_own_configuration(name: str) -> None:
    assert GRIDS.parse(to_dict(GRIDS[name](shift=2.0))) == GRIDS[name](shift=2.0)
