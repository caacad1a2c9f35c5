"""Holding images out: of each class its share, the same ones whatever the order."""

import numpy as np
import pytest
from PIL import Image

from dit.config import ConfigError
from dit.data import DataError
from dit.data.sources.source import ImageSource
from dit.data.sources.split import check_share, split


def opened(index):
    return Image.new("RGB", (2, 2), (index % 256, 0, 0))


def source(counts, unlabelled=0):
    labels = np.repeat(np.arange(-1, len(counts)), [unlabelled, *counts])
    names = tuple(f"{label}/{i}.png" for i, label in enumerate(labels))
    return ImageSource(names, labels.astype(np.int64), tuple(f"c{i}" for i in range(len(counts))), opened)


def counts_of(part):
    return np.bincount(part.labels + 1, minlength=len(part.classes) + 1).tolist()


def test_of_each_class_its_share():
    whole = source([100, 50, 10, 1, 25], unlabelled=20)
    train, held = split(whole, 0.1, seed=3)
    assert set(train.names) | set(held.names) == set(whole.names)
    assert (len(train), len(held)) == (206 - 21, 21)
    assert counts_of(held)[:5] == [2, 10, 5, 1, 0]
    assert counts_of(held)[5] in (2, 3)
    assert train.classes == held.classes == whole.classes
    assert (train.split.part, held.split.part) == ("train", "held out")
    assert (held.split.share, held.split.seed, held.split.images) == (0.1, 3, 206)
    for part in (train, held):
        places = [int(name.split("/")[1].split(".")[0]) for name in part.names]
        assert places == sorted(places)
        assert part.labels.tolist() == whole.labels[places].tolist()
        assert all(part.open(i).getpixel((0, 0))[0] == place % 256 for i, place in enumerate(places))


def test_the_order_of_the_images_does_not_matter_and_the_seed_does():
    whole = source([40, 40])
    order = np.random.default_rng(0).permutation(80)
    mixed = ImageSource(tuple(whole.names[i] for i in order), whole.labels[order], whole.classes, opened)
    assert set(split(whole, 0.25, 0)[1].names) == set(split(mixed, 0.25, 0)[1].names)
    assert set(split(whole, 0.25, 0)[1].names) != set(split(whole, 0.25, 1)[1].names)


def test_more_images_change_few():
    small, large = source([200]), source([210])
    before, after = (set(split(s, 0.1, 0)[1].names) for s in (small, large))
    assert len(before - after) <= 2


def test_every_image_is_as_likely_as_any_other():
    """Over 200 seeds each of 60 images is held out 40 times; binomial, so within 6 standard deviations of it."""
    whole = source([30, 20, 10])
    times = dict.fromkeys(whole.names, 0)
    for seed in range(200):
        for name in split(whole, 0.2, seed)[1].names:
            times[name] += 1
    assert sum(times.values()) == 200 * 12
    assert all(abs(n - 40) < 6 * np.sqrt(200 * 0.2 * 0.8) for n in times.values())


def test_between_classes_of_equal_size_chance_decides():
    """Ten classes of five hold 5 of 50 out: half an image each."""
    found = sum(np.array(counts_of(split(source([5] * 10), 0.1, seed)[1])[1:]) for seed in range(100))
    assert found.sum() == 500
    assert found.min() > 20
    assert found.max() < 80


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3]])
def test_where_none_would_be_held_out(sizes):
    with pytest.raises(DataError, match=r"--holdout=0.1 of 3 images holds none out"):
        split(source(sizes), 0.1, 0)


@pytest.mark.parametrize("share", [-0.1, 1.0, 10, float("nan")])
def test_impossible_shares(share):
    with pytest.raises(ConfigError, match="expected the share of images"):
        check_share(share)
