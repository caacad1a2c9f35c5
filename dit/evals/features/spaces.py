"""All feature networks there are: importing this registers them."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from dit.config import ConfigError, config, from_dict
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
    "spaces_of",
]


@config
class FeatureSpaces:
    """Several feature spaces, in which sets of images are compared side by side."""

    features: tuple[Annotated[FeatureSpace, FEATURES], ...] = (
        Inception(),
    )  # networks, each {name: ..., field: ...}


def spaces_of(members: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> tuple[FeatureSpace, ...]:
    """The feature spaces of {name: ..., field: ...} each. keys: fields of one alone, as {"features.weights": F}."""
    if keys and len(members) != 1:
        raise ConfigError(
            f"--{next(iter(keys))} is a field of one network; write the fields of several as a list"
        )
    fields = {re.sub(r"^features[._]", "", key): text for key, text in keys.items()}
    return from_dict(FeatureSpaces, {"features": [{**one, **fields} for one in members]}).features
