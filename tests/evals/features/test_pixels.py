"""The PCA feature space."""

import numpy as np
import pytest

from dit.evals.features.pixels import Pca


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)


def test_components_are_orthonormal_and_all_of_them_keep_distances(images):
    pca = Pca.fit(images, 39)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(39), atol=1e-10)
    features, pixels = pca(images), images.reshape(40, -1) / 255
    np.testing.assert_allclose(
        np.linalg.norm(features[0] - features[1:], axis=1), np.linalg.norm(pixels[0] - pixels[1:], axis=1)
    )


def test_leading_component_is_the_direction_of_most_variance():
    rng = np.random.default_rng(1)
    images = np.full((200, 2, 2, 3), 128, np.uint8)
    images[:, 0, 0, 0] = rng.integers(0, 256, 200)
    images[:, 1, 1, 1] = rng.integers(120, 136, 200)
    assert abs(Pca.fit(images, 1).components[0, 0]) == pytest.approx(1.0, abs=1e-2)


@pytest.mark.parametrize("components", [0, 41])
def test_impossible_numbers_of_components_are_refused(images, components):
    with pytest.raises(ValueError, match=r"1\.\.40"):
        Pca.fit(images, components)


def test_anything_but_uint8_rgb_is_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        Pca.fit(images.astype(np.float32), 2)
