"""Any backbone of timm or torchvision by its name, with weights from a local file: DINOv2, CLIP, ConvNeXt, MAE, ..."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit.config import config, did_you_mean
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


@functools.cache
def imagenet_synsets() -> tuple[str, ...]:
    """The 1000 synsets of ImageNet in the order of classifiers' logits (n01440764, ...)."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@FEATURES.register("timm")
@config
class Timm(FeatureSpace):
    """A network of timm, its weights from a local file: what its head would be given (DINOv2: the class token)."""

    model: str = ""  # timm's name, as vit_small_patch14_dinov2.lvd142m
    weights: str = ""  # file of its weights, .safetensors or .pth
    size: int | None = None  # pixels a side; none = those it was trained with

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Build timm's network, fill it from the file, tensor by tensor, and take its classifier off."""
        import timm
        from timm.data import config as timm_data

        file = weights_file(self.weights, "timm")
        if not timm.is_model(self.model):
            raise FeatureError(
                f"timm has no model '{self.model}'{did_you_mean(self.model, timm.list_models())}"
            )
        try:
            # with the classifier that its file has: without it timm lets any tensor be missing, and leaves it random
            module: Any = timm.create_model(
                self.model, pretrained=True, pretrained_cfg_overlay={"file": str(file)}
            )
            module.reset_classifier(0)
        except (RuntimeError, KeyError, ValueError, pickle.UnpicklingError, EOFError) as error:
            raise FeatureError(f"{file} does not fill timm's {self.model}: {_first_line(error)}") from error
        if self.size is not None and hasattr(module, "set_input_size"):  # where positions are embedded
            module.set_input_size(img_size=(self.size, self.size))
        data = timm_data.resolve_model_data_config(module)
        height, width = (self.size, self.size) if self.size is not None else data["input_size"][1:]
        mode = data["interpolation"] if data["interpolation"] in ("bilinear", "bicubic") else "bicubic"
        identity = {"name": "timm", "model": self.model, "weights": sha256_of(file)}
        return Resized(module, identity, device, (height, width), mode, data["mean"], data["std"])


@FEATURES.register("torchvision")
@config
class Torchvision(FeatureSpace):
    """A classifier of torchvision, its weights from a local file: what its last linear layer is given."""

    model: str = ""  # torchvision's name, as convnext_base
    weights: str = ""  # file of its state dict, .pth or .safetensors

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Build torchvision's network and fill it from the file, tensor by tensor."""
        from torchvision import models

        file = weights_file(self.weights, "torchvision")
        if self.model not in models.list_models(module=models):
            near = did_you_mean(self.model, models.list_models(module=models))
            raise FeatureError(f"torchvision has no classifier '{self.model}'{near}")
        module: nn.Module = models.get_model(self.model, weights=None)
        try:
            module.load_state_dict(_state_dict(file))
        except (RuntimeError, KeyError, ValueError) as error:
            raise FeatureError(
                f"{file} does not fill torchvision's {self.model}: {_first_line(error)}"
            ) from error
        done = models.get_model_weights(self.model).DEFAULT.transforms()  # how it was judged
        (side,) = {*done.crop_size}
        identity = {"name": "torchvision", "model": self.model, "weights": sha256_of(file)}
        network = Resized(
            module,
            identity,
            device,
            (side, side),
            done.interpolation.value,
            tuple(done.mean),
            tuple(done.std),
        )
        network.classes = imagenet_synsets()
        return network


def _state_dict(file: Path) -> dict[str, torch.Tensor]:
    """Tensors by name. ValueError where the file holds anything else; nothing in it is run."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"not a file of tensors ({_first_line(error)})") from error
    if not isinstance(held, dict):
        raise ValueError(f"holds a {type(held).__name__}, expected tensors by name")
    return held


def _first_line(error: BaseException) -> str:
    """The beginning of what torch says, which may be pages."""
    return " ".join(str(error).split())[:300]
