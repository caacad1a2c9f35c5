"""Training times: their distributions, the shift, discrete steps."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError, from_dict, to_dict
from dit.flow.discrete import DiscreteVP
from dit.flow.path import PATHS, VP, Linear, NoisePath
from dit.flow.times import TIMES, EDMTimes, LogitNormal, Mode, Uniform, shift_time
from tests.gaussian import ALL_PATHS

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
@pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_time_has_the_same_bits_in_any_batch(name: str, path: NoisePath, dtype: torch.dtype) -> None:
    """I1: in any micro-batch. A float64 time alone is not enough: one in 10^10 then rounds to another float32."""
    times, u = TIMES[name](shift=1.7), U[::20].to(dtype)
    whole = times(u, path)
    for size in (1, 3, 100):
        assert torch.equal(torch.cat([times(part, path) for part in u.split(size)]), whole), size


@every_time
@pytest.mark.parametrize(
    ("shape", "shift"), [((4, 32, 32), 1.0), ((4, 64, 64), 2.0), ((768, 16, 16), 48**0.5)]
)
def test_the_shift_by_dimension_is_the_root_of_the_latents_size(
    name: str, shape: tuple, shift: float
) -> None:
    """√(m / 4096) of m numbers, of RAE (arXiv 2510.11690): 6.93 for 256 tokens of 768 channels."""
    dimension = math.prod(shape)
    found = TIMES[name](shift="dimension")(U, Linear(), dimension)
    assert torch.equal(found, TIMES[name](shift=shift)(U, Linear()))
    assert TIMES.parse(to_dict(TIMES[name](shift="dimension"))).shift == "dimension"
    with pytest.raises(ConfigError, match="not known here; give a number"):
        TIMES[name](shift="dimension")(U, Linear())


@pytest.mark.parametrize("bad", ["dimensions", 0, -1, True])
def test_a_shift_is_a_positive_number_or_the_word(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"^shift: expected") as error:
        from_dict(Uniform, {"shift": bad})
    assert {p.key for p in error.value.problems} == {("shift",)}


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
    with pytest.raises(ConfigError):
        TIMES[name](shift=shift)


@every_time
def test_low_precision_draws_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="float32"):
        TIMES[name]()(U.bfloat16(), Linear())


@every_time
def test_times_are_their_own_configuration(name: str) -> None:
    times = TIMES[name](shift=2.0)
    assert TIMES.parse(to_dict(times)) == times


# --- SD3's mode sampling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, 2 / (math.pi - 2)])
def test_mode_sampling_is_the_papers(scale: float) -> None:
    """SD3, eq. 20, written out; the paper's u runs the other way."""
    times = Mode(scale=scale)(U, Linear())
    paper = 1 - (1 - U) - scale * (torch.cos(math.pi / 2 * (1 - U)) ** 2 - 1 + (1 - U))
    torch.testing.assert_close(times, paper, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("scale", [-0.9, 0.5, 1.29])
def test_the_density_of_mode_sampling(scale: float) -> None:
    """Its share below t is the u with t(u) = t; the density there is 1/t'(u) and highest at 1/2 if scale > 0."""
    t = Mode(scale=scale)(U, Linear())
    slope = 1 + scale - scale * math.pi / 2 * torch.sin(math.pi * U)
    torch.testing.assert_close(t[2:] - t[:-2], slope[1:-1] * 2 / len(U), rtol=1e-6, atol=0)
    middle, end = float(slope[len(U) // 2]), float(slope[0])
    assert (middle < end) == (scale > 0)


@pytest.mark.parametrize("scale", [-1.01, 1.76, math.nan])
def test_mode_scales_at_which_time_would_turn_back_are_refused(scale: float) -> None:
    with pytest.raises(ConfigError):
        Mode(scale=scale)


# --- EDM's noise levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.4, 0.5)])
def test_the_noise_level_is_log_normal_on_every_path(path: NoisePath, mean: float, std: float) -> None:
    """Wherever the path has such levels; what lies beyond them is taken at its ends."""
    times = EDMTimes(mean=mean, std=std)
    t = times.quantile(U, path)
    ends = path.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    level = -0.5 * path.log_snr(t)
    cdf = torch.from_numpy(scipy.stats.norm(mean, std).cdf(level.numpy()))
    reached = (t > 0) & (t < 1)
    assert float(reached.double().mean()) > 0.98
    torch.testing.assert_close(cdf[reached], U[reached], rtol=0, atol=1e-7)
    wanted = mean + std * torch.special.ndtri(U)
    assert bool((wanted[t == 0] <= -0.5 * ends[0] + 1e-9).all())
    assert bool((wanted[t == 1] >= -0.5 * ends[1] - 1e-9).all())


@every_time
@pytest.mark.parametrize("path", ALL_PATHS, ids=PATHS.names())
def test_single_precision_times_are_those_of_double(path: NoisePath, name: str) -> None:
    """In float32, and in the noise level too, which runs over five decades on some paths."""
    times = TIMES[name]()
    u = torch.cat([U, torch.tensor([2.0**-24, 1 - 2.0**-24])]).float()
    single, double = times.quantile(u, path), times.quantile(u.double(), path)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=1e-6)
