"""The batches under way: those of the stream in turn, from any step once what was read ahead is let go."""

from __future__ import annotations

import pytest
import torch

from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.train.feed import Feed
from tests.datasets import Digits


def test_batches_come_in_turn_and_from_any_step_after_forgetting(digits: Digits) -> None:
    manifest = Manifest.load(digits.moments)
    expected = Stream(manifest, 0, 32, lanes=8)
    feed = Feed(Stream(manifest, 0, 32, lanes=8), prefetch=2, say=pytest.fail)
    for step in (0, 1, 2):
        assert torch.equal(feed.next(step, 9).id, expected.batch(step).id)
    feed.forget()  # 3 and 4 had been read ahead
    for step in (7, 8):
        assert torch.equal(feed.next(step, 9).id, expected.batch(step).id)
    with pytest.raises(StopIteration):
        feed.next(9, 9)  # beyond the last step nothing is read
    assert feed.counts() == {}
    feed.close()
    expected.close()
