"""Devices by name."""

from __future__ import annotations

import pytest
import torch

from dit.errors import UserError
from dit.ranks.devices import chosen_device
from dit.ranks.group import World


def test_the_ranks_own_and_one_that_is_named() -> None:
    assert chosen_device(None, World(), "--device") == World().device
    assert chosen_device("cpu", World(1, 2, 1), "--device") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_what_is_no_device_here_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--device={name}: no "):
        chosen_device(name, World(), "--device")
