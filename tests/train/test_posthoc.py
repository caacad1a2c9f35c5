"""Power-function averages: the update telescopes to the profile, widths are standard deviations, others can be made."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit.train.posthoc import WIDEST, Profile, combination, power_of, power_share


def weights_of(power: float, updates: int) -> np.ndarray:
    """(updates,) what each update's weights count for in the average, by running the average itself."""
    found = np.zeros(updates)
    for n in range(1, updates + 1):
        share = power_share(power, n)
        found *= 1 - share
        found[n - 1] += share
    return found


@given(st.floats(0.0, 40.0), st.integers(1, 60))
def test_the_update_telescopes_to_the_profile(power: float, updates: int) -> None:
    edges = (np.arange(updates + 1) / updates) ** (power + 1)
    assert np.allclose(weights_of(power, updates), np.diff(edges), atol=1e-12)


@given(st.floats(0.01, WIDEST - 1e-3))
def test_the_width_is_the_profiles_standard_deviation(width: float) -> None:
    """Of tau^g on [0, 1], whose moments are known: E[tau^k] = (g + 1) / (g + 1 + k)."""
    power = power_of(width)
    mean, square = (power + 1) / (power + 2), (power + 1) / (power + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=1e-6)


def test_an_even_average_is_the_widest() -> None:
    assert power_of(WIDEST) == pytest.approx(0.0, abs=1e-6)
    assert weights_of(0.0, 5) == pytest.approx([0.2] * 5)


def test_a_snapshot_itself_is_found_again() -> None:
    snapshots = [Profile(power_of(w), n) for n in (100, 200) for w in (0.05, 0.1)]
    for i, snapshot in enumerate(snapshots):
        if snapshot.updates == 200:
            factors, off = combination(snapshots, snapshot)
            assert factors == pytest.approx(np.eye(4)[i], abs=1e-6)
            assert off < 1e-6


@pytest.mark.parametrize(("width", "most"), [(0.06, 0.02), (0.08, 0.02), (0.12, 0.02), (0.2, 0.03)])
def test_others_are_made_of_snapshots_of_two(width: float, most: float) -> None:
    """Against the running average of that width: the factors applied to what the snapshots weigh."""
    snapshots = [Profile(power_of(w), n) for n in range(50, 801, 50) for w in (0.05, 0.1)]
    wanted = Profile(power_of(width), 800)
    factors, off = combination(snapshots, wanted)
    assert off < most
    profiles = [np.pad(weights_of(s.power, s.updates), (0, 800 - s.updates)) for s in snapshots]
    made = factors @ np.stack(profiles)
    true = weights_of(wanted.power, 800)
    assert np.linalg.norm(made - true) / np.linalg.norm(true) < 1.5 * most
    assert factors.sum() == pytest.approx(1.0, abs=1e-6)


def test_far_from_the_snapshots_it_says_how_far_off_it_is() -> None:
    _, off = combination([Profile(power_of(0.1), 100)], Profile(power_of(0.02), 100))
    assert 0.3 < off < 1


def test_snapshots_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one update"):
        combination([], Profile(1.0, 3))
    with pytest.raises(ValueError, match="at least one update"):
        combination([Profile(1.0, 0)], Profile(1.0, 3))
