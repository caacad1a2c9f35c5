"""What a run is made of before its first step: the stored shape, and the device's peak."""

from __future__ import annotations

import torch

from dit.data.shards.manifest import Manifest
from dit.train.plan import device_peak, stored_shape
from tests.datasets import Digits


def test_stored_shapes(digits: Digits) -> None:
    assert stored_shape(Manifest.load(digits.moments)) == (2, 4, 8, 8)
    assert stored_shape(Manifest.load(digits.pixels)) == (1, 3, 8, 8)


def test_the_cpus_peak_is_measured() -> None:
    assert 1e8 < device_peak(torch.device("cpu")) < 1e14
