"""Files of features: what is found in them, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dit.data import DataError
from dit.errors import Notice
from dit.evals.metrics.arrays import digest, read_features

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
Y = X[:7] + 1
LOGITS = X[:, :2]


def saved(folder: Path, **arrays: object) -> str:
    path = folder / "held.npz"
    np.savez(path, **{name: np.asarray(array) for name, array in arrays.items()})
    return str(path)


@pytest.mark.parametrize("name", ["generated", "features", "arr_0"])
def test_names_of_arrays(tmp_path: Path, name: str) -> None:
    held = read_features(
        saved(tmp_path, **{name: X, "logits": LOGITS, "arr_1": np.zeros(20, int)}), "generated"
    )
    np.testing.assert_array_equal(held.features, X)
    np.testing.assert_array_equal(held.logits, LOGITS)
    assert held.spatial is None


def test_one_file_of_both_sets(tmp_path: Path) -> None:
    path = saved(tmp_path, generated=X, reference=Y, logits=LOGITS, arr_0=X)
    np.testing.assert_array_equal(read_features(path, "generated").features, X)
    reference = read_features(path, "reference")
    np.testing.assert_array_equal(reference.features, Y)
    assert reference.logits is None  # those are of the others


def test_integers_are_converted_and_that_is_said(tmp_path: Path) -> None:
    with pytest.warns(Notice, match="arr_0 are uint8, converted to float64"):
        held = read_features(saved(tmp_path, arr_0=np.arange(8, dtype=np.uint8).reshape(4, 2)), "generated")
    assert held.features.dtype == np.float64
    with pytest.warns(Notice, match="sum to 1, as probabilities do"):
        read_features(saved(tmp_path, arr_0=X, logits=np.full((20, 4), 0.25)), "generated")


BAD = {
    "none of the names": ({"x": X}, r"holds none of generated, features, arr_0"),
    "two names": (
        {"features": X, "arr_0": Y},
        "holds features and arr_0: call the one that is meant generated",
    ),
    "objects": ({"arr_0": np.array([{"a": 1}], object)}, "holds Python objects"),
    "images": ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, "these look like images"),
    "nan": ({"arr_0": np.where(X > 1, np.nan, X)}, "not finite"),
    "logits of others": ({"arr_0": X, "logits": Y}, "20 samples have features"),
}


@pytest.mark.parametrize(("arrays", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_no_file_of_features(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    path = saved(tmp_path, **arrays)
    with pytest.raises(DataError, match=says) as error:
        read_features(path, "generated")
    assert path in str(error.value)


def test_files_that_are_none_or_cut_off_anywhere(tmp_path: Path) -> None:
    whole = Path(saved(tmp_path, arr_0=X)).read_bytes()
    cut = tmp_path / "cut.npz"
    for size in (0, 1, 30, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.npz"):
            read_features(str(cut), "generated")
    altered = bytearray(whole)
    altered[200] ^= 1  # among the numbers: the archive's checksum says so
    cut.write_bytes(altered)
    with pytest.raises(DataError, match="no whole npz file"):
        read_features(str(cut), "generated")
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("arr_0.npy", "text")
    with pytest.raises(DataError, match=r"cut\.npz"):
        read_features(str(cut), "generated")
    np.save(tmp_path / "single.npy", X)
    with pytest.raises(DataError, match=r"single array \(\.npy\); expected an npz"):
        read_features(str(tmp_path / "single.npy"), "generated")
    with pytest.raises(DataError, match="there is no such file"):
        read_features(str(tmp_path / "nowhere.npz"), "generated")
    with pytest.raises(DataError, match="there is no such file"):
        read_features(str(tmp_path), "generated")


def test_a_digest_is_of_all_that_the_array_is() -> None:
    others = [X, X[::-1], X.T, X.astype(np.float64), X.reshape(10, 6), X + np.float32(1e-3)]
    assert len({digest(x) for x in others}) == len(others)
    assert digest(X) == digest(X.copy(order="F"))
