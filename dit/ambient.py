"""What a caller has set for torch as a whole, in a notebook perhaps, and what stands in its place in here.

A command starts with torch as it comes; a function that is called finds what the program around it has set. Ours give
the same numbers in both, and leave the caller's settings and random numbers as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit.errors import UserError


@contextlib.contextmanager
def plain_numbers() -> Iterator[None]:
    """New tensors are float32 on the CPU unless it is said otherwise, and nothing is cast, whatever the caller has set.

    Gradients are as the caller wants them.
    """
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as held:
        if torch.get_default_device().type != "cpu":  # else it would cost a little with every operation
            held.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                held.enter_context(torch.autocast(kind, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            held.callback(torch.set_default_dtype, dtype)
        yield


@contextlib.contextmanager
def as_it_comes() -> Iterator[None]:
    """The same, gradients are recorded, and what is drawn or seeded inside leaves the caller's random numbers alone."""
    cards = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with (
        plain_numbers(),
        torch.random.fork_rng(devices=cards),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


def numbers_of(given: Any, what: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Take real numbers, in whatever they come, as a tensor. Raises UserError for what are none; what: their name."""
    if isinstance(given, np.ndarray):
        given = np.ascontiguousarray(given)  # torch takes no view that runs backwards
    try:
        numbers = torch.as_tensor(given)
        if numbers.is_complex():
            raise TypeError("complex numbers")
        return numbers.to(device, dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(given).__name__
        raise UserError(f"{what}: expected a tensor, an array or numbers, got {kind} ({error})") from None
