"""Features of blocks of images: the same to the bit on any ranks, sums as of all rows at once, and failures named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dit.evals import extraction
from dit.evals.extraction import Kept, Pass, Summed, extract
from dit.evals.features.network import Extracted, FeatureNetwork
from dit.evals.pictures.npz import open_npz
from dit.evals.pictures.pictures import Seen, digests
from dit.ranks import group
from dit.ranks.world import World
from tests.rank_processes import RanksFailed, Server

COUNT = 45  # of 4 in a block: 12 blocks, the last of one image


class Random(FeatureNetwork):
    """A fixed random projection of pixels in float32, with all three kinds of outputs."""

    identity = {"name": "random"}  # noqa: RUF012

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(4 * 4 * 3, 7)

    def __call__(self, images: torch.Tensor) -> Extracted:
        assert images.shape[0] == 4  # always a whole batch
        x = images.reshape(len(images), -1).float() @ self.weight
        return Extracted(x, x[:, :3], x[:, 3:])


class Broken(Random):
    def __call__(self, images: torch.Tensor) -> Extracted:
        if (images == 255).all((1, 2, 3)).any():
            raise ValueError("a white image")
        return super().__call__(images)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), dtype=np.uint8)
    images[30] = 255
    path = tmp_path_factory.mktemp("images") / "a.npz"
    np.savez_compressed(path, images)
    return path


def features_of(path: Path, network: type[Random] = Random) -> tuple[str, dict[str, np.ndarray]] | None:
    world = World.from_env()
    sinks = {"a": Kept(COUNT - 5), "b": Summed()}
    index = np.arange(5, COUNT)
    made = network()
    found = extract(open_npz(path), index, {"a": made, "b": made}, sinks, Pass(4, 2), world, "images")
    if not world.is_main:
        return None
    summed = sinks["b"].statistics("features")
    return found, {**sinks["a"].arrays, "mean": summed.mean, "cov": summed.cov}


@pytest.fixture(scope="module")
def alone(file: Path):
    return features_of(file)


@pytest.mark.parametrize("size", [2, 4])
def test_features_and_content_are_the_same_on_any_ranks(file, alone, ranks: Server, size):
    found, arrays = ranks.run(size, features_of, file)[0]
    assert found == alone[0]
    for name, array in alone[1].items():
        assert np.array_equal(array, arrays[name]), name


def test_features_are_the_networks_of_each_image(file, alone):
    pictures, network = open_npz(file), Random()
    images = torch.from_numpy(pictures.block(range(5, COUNT)))
    expected = images.reshape(40, -1).float() @ network.weight
    torch.testing.assert_close(torch.from_numpy(alone[1]["features"]), expected)
    assert alone[0] == Seen.of(digests(images.numpy()))


def test_what_fails_on_one_rank_is_named_on_all(file, ranks: Server):
    with pytest.raises(RanksFailed) as caught:
        ranks.run(2, features_of, file, Broken)
    assert len(caught.value.errors) == 2
    assert all("a white image" in text for _, text in caught.value.errors.values())


def test_sums_are_those_of_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(extraction, "CHUNK", 16)
    rows = (1e3 + np.random.default_rng(1).normal(size=(101, 5))).astype(np.float32)
    sink = Summed()
    for part in np.array_split(rows, 9):
        sink.add({"features": part})
    found = sink.statistics("features")
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        found.cov, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12
    )
    assert found.count == 101
    assert sink.statistics("spatial") is None


def test_progress_is_shown(file, capfd):
    extract(
        open_npz(file),
        np.arange(COUNT),
        {"a": Random()},
        {"a": Kept(COUNT)},
        Pass(4),
        group.World(),
        "reference",
    )
    assert "reference: 45/45 image (100%)" in capfd.readouterr().err
