"""Training times: their distributions, the shift, discrete steps."""

from __future__ import annotations

import math

import pydantic
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import to_dict
from dit.flow.path import VP, DiscreteVP, Linear
from dit.flow.times import TIMES, LogitNormal, Uniform, shift_time

U = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
shifts = st.floats(0.1, 10)
unit = st.floats(0, 1)
every_time = pytest.mark.parametrize("name", TIMES.names())


def one(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


@every_time
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_quantiles(name: str, shift: float, dtype: torch.dtype) -> None:
    """Within [0, 1], strictly rising with u, in the dtype of u."""
    t = TIMES[name](shift=shift)(U.to(dtype), Linear())
    assert t.dtype == dtype
    assert t.shape == U.shape
    assert bool((t.diff() > 0).all())
    assert float(t[0]) >= 0
    assert float(t[-1]) <= 1


@every_time
def test_the_smallest_and_the_largest_draw_stay_inside(name: str) -> None:
    """Uniform draws are odd multiples of 2^-24, their ends the hardest."""
    t = TIMES[name]()(torch.tensor([2.0**-24, 1 - 2.0**-24]), Linear())
    assert bool(torch.isfinite(t).all())
    assert 0 < float(t[0]) < float(t[1]) < 1


@every_time
def test_a_shift_moves_the_times_alone(name: str) -> None:
    plain, shifted = TIMES[name]()(U, VP()), TIMES[name](shift=2.5)(U, VP())
    torch.testing.assert_close(shifted, shift_time(plain, 2.5))


@every_time
def test_discrete_paths_are_trained_at_their_steps(name: str) -> None:
    path = DiscreteVP(num_steps=16)
    t = TIMES[name]()(U.float(), path)
    k = path.model_time(t)
    assert torch.equal(k, k.round())
    assert torch.equal(t, (k + 1) / 16)


def test_uniform_times_reach_each_ddpm_step_equally_often() -> None:
    u = (torch.arange(100_000) + 0.5) / 100_000
    counts = torch.bincount(DiscreteVP().model_time(Uniform()(u, DiscreteVP())).long(), minlength=1000)
    assert int(counts.min()) >= 99
    assert int(counts.max()) <= 101


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.2, 1.5)])
def test_the_logit_is_normal(mean: float, std: float) -> None:
    t = LogitNormal(mean=mean, std=std)(U, Linear())
    logit = torch.log(t) - torch.log1p(-t)
    torch.testing.assert_close(torch.from_numpy(scipy.stats.norm(mean, std).cdf(logit.numpy())), U)


def test_known_shift() -> None:
    """SD3, eq. 23, with its shift of 3: the middle goes to 3/4."""
    assert float(shift_time(one(0.5), 3.0)) == pytest.approx(0.75, rel=1e-12)


@settings(deadline=None)
@given(unit, shifts, shifts)
def test_shifts_compose_and_invert(t: float, a: float, b: float) -> None:
    both = shift_time(shift_time(one(t), a), b)
    torch.testing.assert_close(both, shift_time(one(t), a * b), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(shift_time(shift_time(one(t), a), 1 / a), one(t), rtol=1e-12, atol=1e-15)


@settings(deadline=None)
@given(shifts)
def test_a_shift_keeps_the_ends(shift: float) -> None:
    assert float(shift_time(one(0.0), shift)) == 0.0
    assert float(shift_time(one(1.0), shift)) == pytest.approx(1.0, rel=1e-15)


@settings(deadline=None)
@given(unit, shifts)
def test_a_shift_multiplies_the_odds_of_noise(t: float, shift: float) -> None:
    """On the linear path it is a change of the noise-to-signal ratio t/(1 − t)."""
    shifted = float(shift_time(one(t), shift))
    assert shifted * (1 - t) == pytest.approx(shift * t * (1 - shifted), rel=1e-9, abs=1e-12)


def test_no_shift_is_the_identity() -> None:
    t = one(0.3)
    assert shift_time(t, 1.0) is t


@every_time
@pytest.mark.parametrize("shift", [0.0, -1.0, True, math.nan])
def test_impossible_shifts_are_refused(name: str, shift: float) -> None:
    with pytest.raises(pydantic.ValidationError):
        TIMES[name](shift=shift)


@every_time
def test_low_precision_draws_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="float32"):
        TIMES[name]()(U.bfloat16(), Linear())


@every_time
def test_times_are_their_own_configuration(name: str) -> None:
    times = TIMES[name](shift=2.0)
    assert TIMES.parse(to_dict(times)) == times
