"""The same bits at every place: in short batches, in long ones, and however many threads share them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dit.flow.alike import everywhere_alike

LONG = 70_003  # three threads share so many, and their parts do not fill vectors


def harsh(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What a CPU's loops round otherwise at their ends: an exponential, a power, a fused multiply-add."""
    return torch.sigmoid(torch.special.ndtri(u)) ** 0.3, torch.add(u, v, alpha=0.3)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_gives_the_same_bits_in_any_batch(dtype: torch.dtype, threads: int) -> None:
    u = ((torch.arange(LONG, dtype=torch.float64) * 0.618_033_988_749_895 + 0.01) % 0.98 + 0.01).to(dtype)
    v = u.flip(0)
    whole = everywhere_alike(harsh, u, v)
    assert [w.shape for w in whole] == [(LONG,)] * 2
    for size, many in ((1, 100), (3, 300), (64, 640), (65, 650), (1000, LONG)):
        cuts = zip(u[:many].split(size), v[:many].split(size), strict=True)
        parts = zip(*(everywhere_alike(harsh, *cut) for cut in cuts), strict=True)
        for found, expected in zip(parts, whole, strict=True):
            assert torch.equal(torch.cat(found), expected[:many]), size
    plain = harsh(u[:1000], v[:1000])
    for found, expected in zip(everywhere_alike(harsh, u[:1000], v[:1000]), plain, strict=True):
        torch.testing.assert_close(found, expected)
