"""Distance in a backbone's features: closed forms, real networks from real files, and files that are not right."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dit.config import ConfigError, from_dict
from dit.stage1.perceptual import IMAGENET, Backbone, Perceptual, PerceptualConfig

TIMM, TORCHVISION = "test_resnet", "torchvision:squeezenet1_1"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of both libraries, with random numbers in them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    found = {TIMM: folder / "model.safetensors", TORCHVISION: folder / "squeezenet.pth"}
    save_file(timm.create_model(TIMM).state_dict(), found[TIMM])
    torch.save(torchvision.models.squeezenet1_1().state_dict(), found[TORCHVISION])
    return found


LAYERS = {TIMM: (0, 1, 2), TORCHVISION: ("features.1", "features.4")}


def settings(files: dict[str, Path], which: str, **changed: object) -> PerceptualConfig:
    values = {"backbone": which, "weights": str(files[which]), "layers": LAYERS[which], **changed}
    return from_dict(PerceptualConfig, values)


def some(count: int = 3, size: int = 32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Looks(nn.Module):
    """Maps that can be worked out by hand: the normalised picture, and its first channel with a constant."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, torch.cat([x[:, :1], torch.ones_like(x[:, :1])], 1)]


def test_the_distance_is_that_of_unit_vectors_averaged_over_places_and_layers() -> None:
    by_hand = Perceptual(
        1.0, {}, Backbone(Looks(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    )  # leaves [-1, 1] as it is
    a = torch.zeros(1, 3, 1, 2)
    b = torch.zeros(1, 3, 1, 2)
    a[0, :, 0, 0], b[0, :, 0, 0] = torch.tensor([0.5, 0, 0]), torch.tensor([0, 0.25, 0])  # at right angles
    a[0, :, 0, 1] = b[0, :, 0, 1] = torch.tensor([0.0, 0, 1])  # the same
    first = (2.0 + 0.0) / 2
    unit = torch.tensor([0.5, 1.0]) / torch.tensor([0.5, 1.0]).norm() - torch.tensor([0.0, 1.0])
    second = (float(unit.square().sum()) + 0.0) / 2
    torch.testing.assert_close(by_hand(a, b), torch.tensor([(first + second) / 2]))


def test_images_are_normalised_as_imagenet_is() -> None:
    backbone = Backbone(Looks(), **IMAGENET)
    white = backbone(torch.ones(1, 3, 1, 1))[0].flatten()
    expected = [(1 - m) / s for m, s in zip(IMAGENET["mean"], IMAGENET["std"], strict=True)]
    torch.testing.assert_close(white, torch.tensor(expected))


@pytest.mark.parametrize("backbone", [TIMM, TORCHVISION])
def test_real_networks_from_files(files: dict[str, Path], backbone: str) -> None:
    perceptual = settings(files, backbone).build(32, 32, CPU)
    a, b = some(4), some(4).flip(0)
    assert len(perceptual.backbone(a)) == len(LAYERS[backbone])
    assert perceptual(a, a).tolist() == [0.0] * 4
    distance = perceptual(a, b)
    assert ((distance > 0) & (distance <= 4)).all()
    torch.testing.assert_close(distance, perceptual(b, a))
    torch.testing.assert_close(distance[:1], perceptual(a[:1], b[:1]))  # no batch statistics
    features = perceptual.features(a)
    torch.testing.assert_close(features, perceptual.backbone(a)[-1].mean((2, 3)))
    leaf = a.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(perceptual(leaf, b).sum(), leaf)
    assert gradient.any()
    assert not any(p.requires_grad for p in perceptual.backbone.parameters())
    assert not any(m.training for m in perceptual.backbone.modules())


def test_torchvisions_features_are_its_own(files: dict[str, Path]) -> None:
    model = torchvision.models.squeezenet1_1()
    model.load_state_dict(torch.load(files[TORCHVISION], weights_only=True))
    perceptual = settings(files, TORCHVISION, layers=("features.0", "features.1")).build(32, 32, CPU)
    mean, std = (torch.tensor(IMAGENET[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = model.features[0](((some() + 1) / 2 - mean) / std)
        before, after = perceptual.backbone(some())
    torch.testing.assert_close(before, expected)  # and not what the activation after it, in place, made of it
    torch.testing.assert_close(after, expected.relu())


def test_the_identity_is_of_the_file_and_not_of_its_place(files: dict[str, Path], tmp_path: Path) -> None:
    first = settings(files, TIMM).build(32, 32, CPU)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(files[TIMM].read_bytes())
    again = settings(files, TIMM, weights=str(moved)).build(32, 32, CPU)
    assert again.identity == first.identity
    assert repr(again) == repr(first)  # it is part of a protocol
    torch.manual_seed(9)
    save_file(timm.create_model(TIMM).state_dict(), moved)
    assert settings(files, TIMM, weights=str(moved)).build(32, 32, CPU).identity != first.identity
    assert first.name == "test_resnet"
    assert settings(files, TORCHVISION).build(32, 32, CPU).name == "torchvision_squeezenet1_1"


def test_all_levels_are_the_default(files: dict[str, Path]) -> None:
    perceptual = settings(files, TIMM, layers=()).build(32, 32, CPU)
    assert len(perceptual.backbone(some())) == len(timm.create_model(TIMM).feature_info)


# --- what is not right -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "changed", "says"),
    [
        (TIMM, {"weights": "/nowhere/w.safetensors"}, "hf download timm/test_resnet.*model.safetensors"),
        (
            TORCHVISION,
            {"weights": "/nowhere/w.pth"},
            "curl -LO https://download.pytorch.org/models/squeezenet1_1",
        ),
        (TIMM, {"backbone": "test_resnt"}, "no model 'test_resnt'; did you mean test_resnet"),
        (TORCHVISION, {"backbone": "torchvision:squeezenet1_11"}, "did you mean squeezenet1_1"),
        (TIMM, {"backbone": "keras:vgg"}, "unknown source 'keras'"),
        (TIMM, {"layers": (9,)}, r"has levels 0\.\.\d, got 9"),
        (TIMM, {"layers": ("features.1",)}, "got 'features.1'"),
        (
            TORCHVISION,
            {"layers": ("features.99",)},
            "must name nodes of torchvision's squeezenet1_1: x, features.0",
        ),
        (TORCHVISION, {"layers": ()}, "must name nodes"),
        (TORCHVISION, {"backbone": "torchvision:resnet18"}, "are not those of torchvision:resnet18"),
        (TIMM, {"backbone": "test_convnext"}, "are not those of test_convnext"),
    ],
)
def test_what_cannot_be_used_is_refused(
    files: dict[str, Path], backbone: str, changed: dict, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(files, backbone, **changed).build(32, 32, CPU)


def test_images_too_small_for_it_are_refused_at_the_start(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"cannot look at images of 2x2.*earlier perceptual\.layers"):
        settings(files, TORCHVISION).build(2, 2, CPU)


class Planted:
    """Would create a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_file_that_is_none_is_refused_and_a_pickle_is_not_run(
    files: dict[str, Path], tmp_path: Path
) -> None:
    file, trap = tmp_path / "w.pth", tmp_path / "trap"
    for content in (b"", b"rubbish", pickle.dumps(Planted(trap)), files[TORCHVISION].read_bytes()[:5000]):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="is no file of weights that can be trusted"):
            settings(files, TORCHVISION, weights=str(file)).build(32, 32, CPU)
    torch.save({"features.0.weight": Planted(trap)}, file)
    with pytest.raises(ConfigError, match="is no file of weights that can be trusted"):
        settings(files, TORCHVISION, weights=str(file)).build(32, 32, CPU)
    assert not trap.exists()
    cut = tmp_path / "w.safetensors"
    cut.write_bytes(files[TIMM].read_bytes()[:1000])
    with pytest.raises(ConfigError, match="is no file of weights that can be trusted"):
        settings(files, TIMM, weights=str(cut)).build(32, 32, CPU)
