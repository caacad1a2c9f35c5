"""Mixtures: each data set's share of every batch, exactness within each, and what the whole is taken for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit.config import ConfigError
from dit.data import DataError
from dit.data.loading.mixture import Mixture, PartConfig
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from tests.data.helpers import sample_of, write_dataset


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """30 samples in two views, 11 in one, 24 in two with other classes."""
    root = tmp_path_factory.mktemp("mix")
    return [
        write_dataset(root / "a", [7, 7, 7, 7, 2], views=2),
        write_dataset(root / "b", [4, 4, 3], views=1),
        write_dataset(root / "c", [6, 6, 6, 6], views=2, classes=tuple("edxyz")),
    ]


def mixed(*parts):
    return Mixture.load([PartConfig(path=m.root, **share) for m, share in parts])


def test_one_alone_is_itself(sets):
    mixture = Mixture.load([PartConfig(path=sets[0].root)])
    assert mixture.manifest is mixture.parts[0][0]
    one, other = Stream(mixture, 3, 10), Stream(sets[0], 3, 10)
    assert torch.equal(one.batch(4).moments, other.batch(4).moments)
    one.close(), other.close()


def test_shares_by_weight_and_by_repeat(sets):
    a, b, c = sets
    by_weight = mixed((a, {"weight": 6}), (b, {"weight": 3}), (c, {"weight": 1}))
    assert [n for _, n in by_weight.shares(20)] == [12, 6, 2]
    assert [n for _, n in by_weight.shares(7)] == [4, 2, 1]  # 4.2, 2.1, 0.7
    by_repeat = mixed((a, {}), (b, {"repeat": 6}), (c, {"repeat": 1}))
    assert [n for _, n in by_repeat.shares(120)] == [30, 66, 24]


@settings(max_examples=25, deadline=None)
@given(
    weights=st.tuples(*[st.integers(1, 5)] * 3),
    batch=st.sampled_from([12, 24]),
    lanes=st.sampled_from([1, 4, 64]),
    size=st.sampled_from([1, 2, 3, 4, 6]),
    start=st.integers(0, 12),
)
def test_ranks_together_see_what_one_sees(sets, weights, batch, lanes, size, start):
    mixture, made = mixed(*((m, {"weight": w}) for m, w in zip(sets, weights, strict=True))), []
    counts = [n for _, n in mixture.shares(batch)]
    if any(n > m.samples for n, m in zip(counts, sets, strict=True)):
        with pytest.raises(ConfigError, match="larger than the data set"):
            Stream(mixture, 1, batch, lanes=lanes)
        return
    try:
        made.append(Stream(mixture, 1, batch, lanes=lanes))
        made.extend(Stream(mixture, 1, batch, r, size, lanes=lanes) for r in range(size))
        ends = np.cumsum([0, *(m.names.count for m in sets)])
        for step in range(start, start + 3):
            whole, *parts = (s.batch(step) for s in made)
            for name in ("moments", "label", "id", "view", "slots"):
                assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
            owner = np.searchsorted(ends, whole.id.numpy(), side="right") - 1
            assert owner.tolist() == np.repeat([0, 1, 2], counts).tolist()
            for i, m in enumerate(sets):
                mine = owner == i
                ids = whole.id.numpy()[mine] - ends[i]
                stored = torch.from_numpy(sample_of(ids, len(m.views), True))
                view = whole.view[torch.from_numpy(mine)]
                assert torch.equal(
                    whole.moments[torch.from_numpy(mine)], stored[torch.arange(len(ids)), view]
                )
                names = [mixture.classes[label] for label in whole.label[torch.from_numpy(mine)].tolist()]
                assert names == [m.classes[i % 5] for i in ids]
    finally:
        for stream in made:
            stream.close()


def test_each_data_set_is_used_up_before_it_begins_anew(sets):
    stream = Stream(mixed((sets[0], {"weight": 3}), (sets[2], {"weight": 1})), 0, 8, lanes=4)
    batches = [stream.batch(step) for step in range(12)]
    stream.close()
    for offset, count, per_epoch in ((0, 6, 5), (6, 2, 12)):
        for epoch in range(12 // per_epoch):
            part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
            seen = [i for b in part for i in b.id[offset : offset + count].tolist()]
            assert len(seen) == len(set(seen)) == per_epoch * count
    assert stream.steps_per_epoch == 12


def test_what_the_mixture_is(sets):
    """Its statistics are those of a sample drawn from a batch; its classes all there are."""
    a, _, c = sets
    whole = mixed((a, {"weight": 3}), (c, {"weight": 1})).manifest
    assert whole.classes == ("a", "b", "c", "d", "e", "x", "y", "z")
    assert (sum(whole.class_counts), whole.samples) == (54, 54)
    mean, std = np.array(whole.mean), np.array(whole.std)
    second = 0.75 * (np.array(a.std) ** 2 + np.array(a.mean) ** 2) + 0.25 * (
        np.array(c.std) ** 2 + np.array(c.mean) ** 2
    )
    assert np.allclose(mean, 0.75 * np.array(a.mean) + 0.25 * np.array(c.mean))
    assert np.allclose(std**2 + mean**2, second)
    digests = {m.manifest.digest for m in (mixed((a, {"weight": w}), (c, {"weight": 1})) for w in (1, 2, 3))}
    assert len(digests) == 3
    assert whole.digest in digests


@pytest.mark.parametrize("share", [179, 77, 167, 251])
def test_any_share_keeps_its_lanes(tmp_path, share):
    """Also one that no number of lanes divides: its part of a batch comes from many blocks."""
    made = write_dataset(tmp_path / "set", [4] * 256)
    stream = Stream(Mixture(((made, share / 256), (made, 1 - share / 256))), 0, 256)
    order = stream.order
    stream.close()
    assert order.global_batch == share
    assert order.lanes == round(64 * share / 256)
    assert len(set(order.locate(0)[0].tolist())) >= order.lanes


def test_data_sets_that_do_not_fit(sets, tmp_path):
    other = write_dataset(tmp_path / "other", [4, 4], codec={"name": "another"})
    with pytest.raises(DataError, match="differ in codec"):
        mixed((sets[0], {}), (other, {}))
    latents = write_dataset(tmp_path / "latents", [4, 4], posterior=False)
    with pytest.raises(DataError, match="differ in array"):
        mixed((sets[0], {}), (latents, {}))


@pytest.mark.parametrize(
    "shares", [({"weight": 1}, {}), ({"weight": 1}, {"repeat": 2}), ({"weight": 1, "repeat": 1}, {})]
)
def test_weights_and_repeats_do_not_mix(sets, shares):
    with pytest.raises(ConfigError, match="a weight, or a repeat"):
        mixed(*zip(sets[:2], shares, strict=True))


def test_a_share_of_less_than_a_slot(sets):
    mixture = mixed((sets[0], {"weight": 99}), (sets[1], {"weight": 1}))
    with pytest.raises(ConfigError, match=r"would fill 0\.2 slots"):
        Stream(mixture, 0, 20)


def test_the_place_of_a_data_set_does_not_matter(sets):
    moved = replace(sets[0], root="/elsewhere")
    assert isinstance(moved, Manifest)
    assert (
        Mixture(((moved, 0.5), (sets[2], 0.5))).manifest.digest
        == Mixture(((sets[0], 0.5), (sets[2], 0.5))).manifest.digest
    )
