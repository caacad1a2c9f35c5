"""Values that are not finite are found and named."""

from __future__ import annotations

import math

import pytest
import torch

from dit.sample.finite import NotFiniteError, check_finite, first_not_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_first_is_found(value: float, dtype: torch.dtype) -> None:
    values = torch.zeros(5, 2, 3, 3, dtype=dtype)
    assert first_not_finite(values) is None
    values[3, 1, 2, 0] = values[4] = value
    assert first_not_finite(values) == 3


def test_what_is_finite_is_passed_on_and_what_is_not_is_named() -> None:
    values, index, label = torch.ones(2, 4), torch.tensor([8, 9]), torch.tensor([3, -1])
    assert check_finite(values, index, label, "its latents", "try this") is values
    values[1, 0] = math.nan
    with pytest.raises(NotFiniteError) as error:
        check_finite(values, index, label, "its latents", "try this")
    assert str(error.value) == "image 9 (no class): 25% of its latents are not finite; try this"
