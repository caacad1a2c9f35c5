"""The law: its optimum is where a search finds it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from dit.scaling.laws.law import Law
from tests.scaling.laws.surfaces import LAWS


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("k", [6.0, 3.7])
def test_the_optimum_is_the_lowest_loss_at_its_budget(law: Law, k: float) -> None:
    flops = 1e20
    params, tokens, loss = law.optimum(flops, k)
    assert k * params * tokens == pytest.approx(flops)
    found = minimize_scalar(
        lambda x: law.loss(np.exp(x), flops / k / np.exp(x)),
        bounds=(5.0, 40.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert loss == pytest.approx(found.fun, rel=1e-12)
    assert np.log(params) == pytest.approx(found.x, abs=1e-4)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_exponents_are_slopes_of_the_optimum(law: Law) -> None:
    (n1, d1, l1), (n2, d2, l2) = law.optimum(1e20), law.optimum(1e21)
    assert np.log10(n2 / n1) == pytest.approx(law.n_opt_exponent)
    assert np.log10(d2 / d1) == pytest.approx(law.d_opt_exponent)
    assert np.log10((l2 - law.E) / (l1 - law.E)) == pytest.approx(law.loss_exponent)


def test_several_laws_at_once_are_each_alone() -> None:
    rows = np.stack([law.rows for law in LAWS.values()])
    together = Law.of_rows(rows)
    np.testing.assert_array_equal(together.rows, rows)
    for place, law in enumerate(LAWS.values()):
        one = [number[place] for number in together.optimum(1e19, 5.0)]
        np.testing.assert_allclose(one, law.optimum(1e19, 5.0), rtol=1e-12)
