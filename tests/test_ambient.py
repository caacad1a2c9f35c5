"""What a caller has set for torch as a whole is replaced inside, and there again afterwards."""

from __future__ import annotations

import pytest
import torch

from dit.ambient import as_it_comes, plain_numbers
from tests.odd_torch import odd_torch


@pytest.mark.parametrize("inside", [plain_numbers, as_it_comes])
def test_numbers_are_plain_inside_and_the_callers_after(inside) -> None:
    @inside()
    def checked() -> None:
        made = torch.ones(2, 2)
        assert (made.dtype, made.device.type, (made @ made).dtype) == (torch.float32, "cpu", torch.float32)
        assert torch.is_inference_mode_enabled() is torch.is_inference(made) is (inside is plain_numbers)
        raise ZeroDivisionError

    with odd_torch():
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                checked()


def test_what_is_seeded_inside_leaves_the_callers_random_numbers() -> None:
    with odd_torch(), as_it_comes():
        torch.manual_seed(7)
        torch.randn(3, requires_grad=True).sum().backward()
