"""Distance of images in the features of a frozen network whose weights lie in a local file. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dit.config import ConfigError, config, did_you_mean
from dit.files import expand, not_found

VGG16_LAYERS = (
    "features.3",
    "features.8",
    "features.15",
    "features.22",
    "features.29",
)  # relu1_2 to relu5_3, as LPIPS
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of pixels in [0, 1]


class Backbone(nn.Module):
    """A frozen network's feature maps. net: images normalised by mean and std -> maps (B, C, h, w)."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: Callable[[Tensor], Sequence[Tensor]], mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        writing: list[Any] = [m for m in self.modules() if hasattr(m, "inplace")]
        for module in writing:
            module.inplace = False  # a map that is looked at must not be written over by what follows it
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> a map (B, C, h, w) of each layer."""
        return list(self.net(((images + 1) / 2 - self.mean) / self.std))


class _Named(nn.Module):
    """torchvision's extractor gives a dictionary."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> list[Tensor]:
        return list(self.extractor(images).values())


class _Intermediates(nn.Module):
    """timm's models give their intermediate maps by a method."""

    def __init__(self, model: Any, layers: list[int]):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, images: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.layers, intermediates_only=True, norm=False, output_fmt="NCHW"
        )
        return found


@config
class PerceptualConfig:
    """Distance in a frozen backbone's features (Zhang et al., arXiv 1801.03924, eq. 1, without its learned weights).

    backbone: torchvision:NAME, or the name of a timm model. layers: for torchvision names of nodes (vgg16 has those
    of LPIPS by default), for timm the numbers of its feature levels (default: all).
    """

    weights: str  # a local file of the backbone's weights, safetensors or a state dict that torch.save wrote
    backbone: str = "torchvision:vgg16"  # torchvision:NAME, or the name of a timm model
    # names (torchvision) or numbers (timm) of feature levels; [] = LPIPS's for vgg16, all for timm
    layers: tuple[int | str, ...] = ()
    weight: Annotated[float, Field(ge=0)] = 1.0  # of the distance, which is in [0, 4]

    def build(self, height: int, width: int, device: torch.device) -> Perceptual:
        """The distance for height x width images. ConfigError where the file is missing or does not fit."""
        source, _, name = self.backbone.rpartition(":")
        if source not in SOURCES:
            raise ConfigError(
                f"unknown source '{source}' in perceptual.backbone = '{self.backbone}'; write torchvision:NAME or the "
                "name of a timm model"
            )
        backbone = SOURCES[source](self, name).to(device)
        try:
            with torch.no_grad():
                backbone(torch.zeros(1, 3, height, width, device=device))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"perceptual.backbone {self.backbone} cannot look at images of {height}x{width}: {error}; choose "
                "another, or earlier perceptual.layers"
            ) from None
        with Path(expand(self.weights)).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        identity = {"backbone": self.backbone, "layers": list(self.layers), "sha256": digest}
        return Perceptual(self.weight, identity, backbone)


def _load(cfg: PerceptualConfig, model: nn.Module, where: str) -> None:
    """Fill a model from the weight file; its last layer, which tells classes, may be another one or missing."""
    path = Path(expand(cfg.weights))
    if not path.is_file():
        raise ConfigError(f"perceptual.weights = {not_found(path)}. Get it with: {where}")
    try:
        held = timm.models.load_state_dict(str(path), device="cpu", weights_only=True)
        found = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    except Exception as error:  # noqa: BLE001 (the readers raise all kinds; each means a bad file)
        said = f"{type(error).__name__}: {str(error).partition('.')[0]}"
        raise ConfigError(
            f"perceptual.weights = {path} is no file of weights that can be trusted ({said}); get one with: {where}"
        ) from None
    own = model.state_dict()
    wrong = [k for k, v in found.items() if k in own and own[k].shape != v.shape and not _is_head(k)]
    missing = [k for k in own if k not in found and not _is_head(k) and "num_batches_tracked" not in k]
    if wrong or missing or not any(k in own for k in found):
        raise ConfigError(
            f"perceptual.weights = {path} are not those of {cfg.backbone}: {len(missing)} missing "
            f"{missing[:2]}, {len(wrong)} of another shape {wrong[:2]}; get them with: {where}"
        )
    model.load_state_dict(
        {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}, strict=False
    )


def _is_head(name: str) -> bool:
    return name.split(".")[0] in ("head", "fc", "classifier", "pre_logits", "heads")


def _timm(cfg: PerceptualConfig, name: str) -> Backbone:
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models()).split("; valid here")[0]
        raise ConfigError(f"perceptual.backbone: timm has no model '{name}'{near}")
    model: Any = timm.create_model(name, pretrained=False)
    settings = model.pretrained_cfg
    hub = settings.get("hf_hub_id") or f"timm/{name}"
    _load(cfg, model, f"hf download {hub} model.safetensors --local-dir FOLDER")
    count = len(model.feature_info) if hasattr(model, "feature_info") else 0
    layers = [_number(layer, count, cfg.backbone) for layer in cfg.layers] or list(range(count))
    if not layers or not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"perceptual.backbone: timm's {name} does not give its intermediate features; take another"
        )
    model.prune_intermediate_layers(layers, prune_norm=True, prune_head=True)
    return Backbone(_Intermediates(model, layers), settings["mean"], settings["std"])


def _number(layer: int | str, count: int, backbone: str) -> int:
    if not str(layer).isdecimal() or int(layer) >= count:
        raise ConfigError(f"perceptual.layers: {backbone} has levels 0..{count - 1}, got {layer!r}")
    return int(layer)


def _torchvision(cfg: PerceptualConfig, name: str) -> Backbone:
    from torchvision.models import get_model, get_model_weights, list_models
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    if name not in list_models():
        near = did_you_mean(name, list_models()).split("; valid here")[0]
        raise ConfigError(f"perceptual.backbone: torchvision has no model '{name}'{near}")
    model = get_model(name, weights=None)
    known = list(get_model_weights(name))
    _load(cfg, model, f"curl -LO {known[0].url}" if known else f"torchvision's documentation of {name}")
    layers = [str(layer) for layer in cfg.layers] or (list(VGG16_LAYERS) if name == "vgg16" else [])
    nodes = get_graph_node_names(model.eval())[1]
    if not layers or not all(any(f"{n}.".startswith(f"{layer}.") for n in nodes) for layer in layers):
        raise ConfigError(
            f"perceptual.layers = {layers} must name nodes of torchvision's {name}: {', '.join(nodes[:40])} ..."
        )
    return Backbone(_Named(create_feature_extractor(model, return_nodes=layers)), **IMAGENET)


SOURCES: dict[str, Callable[[PerceptualConfig, str], Backbone]] = {"": _timm, "torchvision": _torchvision}


@dataclass(frozen=True)
class Perceptual:
    """The distance, outside of what is trained, averaged and saved. identity: JSON values that say which one it is."""

    weight: float
    identity: dict[str, Any]
    backbone: Backbone = field(repr=False, compare=False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) in [0, 4] of images (B, 3, H, W) in [-1, 1]: |unit vector over channels of a - of b|², averaged over
        places and layers."""
        maps = zip(self.backbone(a), self.backbone(b), strict=True)
        of_layers = [(_unit(x) - _unit(y)).square().sum(1).flatten(1).mean(1) for x, y in maps]  # (B,) each
        return torch.stack(of_layers).mean(0)

    def features(self, images: Tensor) -> Tensor:
        """(B, C): the last layer's means over places."""
        last: Tensor = self.backbone(images)[-1].float()  # (B, C, h, w)
        return last.flatten(2).mean(2)

    @property
    def name(self) -> str:
        """The backbone's, fit for the name of a figure."""
        return re.sub(r"\W+", "_", self.identity["backbone"])


def _unit(x: Tensor) -> Tensor:
    unit: Tensor = F.normalize(x.float(), dim=1, eps=1e-10)
    return unit
