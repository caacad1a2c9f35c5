"""Published laws are what their sources say, and agree with themselves."""

from __future__ import annotations

import numpy as np
import pytest

from dit.scaling.laws.published import CHINCHILLA, DIT_LAW, DIT_POINTS, PUBLISHED, optimal, power


def test_the_twelve_points_of_dit_lie_around_its_law() -> None:
    assert len(DIT_POINTS) == 12
    work, fid = np.log(np.array(list(DIT_POINTS.values()))).T
    slope, end = np.polyfit(work, fid, 1)
    assert slope == pytest.approx(DIT_LAW[1], abs=5e-4)
    assert np.exp(end) == pytest.approx(DIT_LAW[0], abs=0.5)


@pytest.mark.parametrize("law", PUBLISHED, ids=lambda law: law.name)
def test_best_sizes_and_tokens_spend_the_budget(law) -> None:
    """C = 6 N D at every C, to the digits that are published."""
    assert law.n_opt[1] + law.d_opt[1] == pytest.approx(1, abs=1e-3)
    for flops in (1e18, 1e21):
        assert 6 * power(law.n_opt, flops) * power(law.d_opt, flops) == pytest.approx(flops, rel=0.02)


def test_a_law_at_its_optimum_is_its_power_laws() -> None:
    law = optimal("", "", "", CHINCHILLA)
    flops = np.array([1e18, 1e22])
    params, tokens, loss = CHINCHILLA.optimum(flops)
    np.testing.assert_allclose(power(law.n_opt, flops), params, rtol=1e-9)
    np.testing.assert_allclose(power(law.d_opt, flops), tokens, rtol=1e-9)
    np.testing.assert_allclose(law.floor + power(law.loss, flops), loss, rtol=1e-9)


def test_chinchilla_spends_about_twenty_tokens_a_parameter() -> None:
    """As arXiv 2404.10102, section 4, finds at 5.76e23 FLOPs."""
    params, tokens, _ = CHINCHILLA.optimum(5.76e23)
    assert 15 < tokens / params < 30
