"""Gradients in flat buckets: the mean over ranks, sent while the backward pass goes on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as td
from torch import Tensor, nn

from dit.bench.speed.collectives import Collective, CollectiveCounter
from dit.ranks import group
from dit.train.engines.reduction import GradientBuckets
from tests.rank_processes import Server


class Chain(nn.Module):
    """Three layers, and a parameter that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2))
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()  # type: ignore[no-any-return]


def micro_batches(rank: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [torch.randn(4, 5, generator=generator) for _ in range(3)]


def expected(ranks: int, step: int) -> list[Tensor]:
    """The mean over ranks of summed gradients, on one process."""
    module = Chain()
    for rank in range(ranks):
        for x in micro_batches(rank, step):
            (module(x) / ranks).backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def reduced(bucket: int) -> list[tuple[list[Tensor], int]]:
    """Of two steps the gradients, and how many buckets were sent before the backward passes were over."""
    module, world = Chain(), group.World.from_env()
    buckets, found = GradientBuckets(list(module.parameters()), world.size, bucket), []
    for step in range(2):
        *first, last = micro_batches(world.rank, step)
        for x in first:
            module(x).backward()
        assert all(b.work is None for b in buckets._buckets)
        buckets.expect_last()
        module(last).backward()
        early = sum(b.work is not None for b in buckets._buckets)
        buckets.finish()
        found.append(([p.grad.clone() for p in module.parameters() if p.grad is not None], early))
        buckets.clear()
    return found


# 4 bytes: a bucket a parameter; the unused one is the first to be sent, so all wait for the end
@pytest.mark.parametrize("bucket", [4, 60, 1 << 20])
def test_every_gradient_is_the_mean_over_ranks(ranks: Server, bucket: int) -> None:
    for found in ranks.run(2, reduced, bucket):
        for step, (grads, _) in enumerate(found):
            for mine, theirs in zip(grads, expected(2, step), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def sent_early() -> list[tuple[int, int]]:
    module, world = Chain().layers, group.World.from_env()
    found = []
    for size in (4, 60, 1 << 20):
        buckets = GradientBuckets(list(module.parameters()), world.size, size)
        buckets.expect_last()
        module(torch.ones(2, 5)).sum().backward()
        found.append((sum(b.work is not None for b in buckets._buckets), len(buckets._buckets)))
        buckets.finish()
        buckets.close()
    assert all(p.grad is None for p in module.parameters())
    return found


def test_buckets_are_sent_as_soon_as_they_are_complete(ranks: Server) -> None:
    for found in ranks.run(2, sent_early):
        assert found == [(6, 6), (2, 2), (1, 1)]


def counted() -> dict[str, int]:
    module = Chain()
    buckets = GradientBuckets(list(module.parameters()), 2, 1 << 20)
    with CollectiveCounter() as counter:
        for x in micro_batches(0, 0):
            module(x).backward()
        buckets.finish()  # also where nobody said which pass is the last
    (kind,) = counter.found
    assert kind == Collective("all_reduce", torch.float32, kind.numel, 2)
    return {"numbers": kind.numel, "times": counter.found[kind]}


def test_each_number_is_sent_once_a_step(ranks: Server) -> None:
    numbers = sum(p.numel() for p in Chain().parameters())
    assert ranks.run(2, counted) == [{"numbers": numbers, "times": 1}] * 2


def twice() -> str:
    module = Chain().layers
    buckets = GradientBuckets(list(module.parameters()), 2, 4)
    x = torch.ones(2, 5)
    buckets.expect_last()
    module(x).sum().backward()
    try:
        module(x).sum().backward()
    except RuntimeError as error:
        td.barrier()
        return str(error)
    return ""


def test_a_gradient_that_comes_after_its_bucket_was_sent_is_no_silent_loss(ranks: Server) -> None:
    for found in ranks.run(2, twice):
        assert "came twice" in found
