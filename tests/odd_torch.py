"""A program that has set torch up in a way of its own, for what is to be the same in any."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def odd_torch() -> Iterator[None]:
    """float64 on no device, cast to bfloat16, without gradients; fails where its settings or random numbers change."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            numbers = torch.get_rng_state()
            yield
            assert torch.equal(numbers, torch.get_rng_state())
            assert torch.get_default_dtype() == torch.float64
            assert torch.get_default_device().type == "meta"
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
