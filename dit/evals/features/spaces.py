"""All feature networks there are: importing this registers them."""

from typing import Annotated

from dit.config import config
from dit.evals.features.backbones import Timm, Torchvision
from dit.evals.features.efficientnet import EfficientNetLite0
from dit.evals.features.inception import Inception
from dit.evals.features.network import FEATURES, FeatureSpace
from dit.evals.features.pixels import PixelComponents

__all__ = [
    "FEATURES",
    "EfficientNetLite0",
    "FeatureSpaces",
    "Inception",
    "PixelComponents",
    "Timm",
    "Torchvision",
]


@config
class FeatureSpaces:
    """Several feature spaces, in which sets of images are compared side by side."""

    features: tuple[Annotated[FeatureSpace, FEATURES], ...] = (
        Inception(),
    )  # networks, each {name: ..., field: ...}
