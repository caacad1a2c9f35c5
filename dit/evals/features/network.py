"""The axis of feature networks: what each gives of a batch of images, and what identifies it in a protocol."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dit.config import Registry
from dit.errors import UserError
from dit.files import expand, sought


class FeatureError(UserError):
    """A feature network cannot be had: a package or a file is missing, or is another than it should be."""


class Extracted(NamedTuple):
    """What a network gives of B images: features (B, D), and where it has them logits (B, K) and spatial (B, S).

    float32 of a network's own precision, float64 where it computes in that.
    """

    features: Tensor
    logits: Tensor | None = None
    spatial: Tensor | None = None


class FeatureNetwork:
    """A network that is loaded. Calling it is deterministic: a function of the images and the batch's shape.

    identity: JSON values that go into the protocol (its name, the weights' SHA-256, how images are resized, the dtype).
    classes: names of what the logits are of, in their order ("" = ImageNet's 1000 synsets are not what they are of).
    """

    identity: dict[str, Any]
    classes: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Extracted:
        """Images (B, H, W, 3) uint8 to their features."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        """What was fitted on the reference, by name, for a statistics file; nothing of networks that are given."""
        return {}


Sample = Callable[[int], np.ndarray]  # so many images (N, H, W, 3) uint8 of the reference, chosen evenly


class FeatureSpace:
    """A choice of network, and its own configuration."""

    fitted: ClassVar[bool] = False  # whether building needs images of the reference

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Load the network. Raises FeatureError where its weights or its package are missing.

        sample: gives images of the reference, to a space that is fitted.
        """
        raise NotImplementedError

    def restore(self, state: Mapping[str, np.ndarray], identity: Mapping[str, Any]) -> FeatureNetwork:
        """The network that `state` and `identity` of a statistics file are of, for a space that is fitted."""
        raise NotImplementedError


FEATURES: Registry[FeatureSpace] = Registry("feature network")


# --- what networks share -----------------------------------------------------------------------------------


class Resized(FeatureNetwork):
    """A torch module behind a resize of the whole image, as FID does it: nothing is cropped off.

    Resized by torch's antialiased filter (the one of Pillow), neither rounded nor clipped, then (x/255 − mean) / std.
    """

    def __init__(
        self,
        module: nn.Module,
        identity: Mapping[str, Any],
        device: torch.device,
        size: tuple[int, int],
        mode: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.module = module.eval().requires_grad_(False).to(device)
        self.device, self.size, self.mode = device, size, mode
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.identity = {
            **identity,
            "resize": f"{mode}, antialiased, whole image to {size[0]}x{size[1]}, not rounded",
            "mean": list(mean),
            "std": list(std),
            "dtype": "float32",
        }

    def prepared(self, images: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 as the module wants them, (B, 3, size) float32."""
        x = images.to(self.device).permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        if tuple(x.shape[2:]) != self.size:
            x = interpolate(x, self.size, mode=self.mode, antialias=True, align_corners=False)
        result: Tensor = (x / 255 - self.mean) / self.std
        return result

    def __call__(self, images: Tensor) -> Extracted:
        """Features are what goes into the last linear layer, or all the module gives where it has none."""
        with exactly():
            features, logits = last_linear(self.module, self.prepared(images))
        return Extracted(features.float(), None if logits is None else logits.float())


def last_linear(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the module's last linear layer is given, (B, D), and what it makes of it, (B, K).

    The module's own output and None where that layer is not its end (no classifier: its output is the features).
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    given: list[Tensor] = []
    hook = layers[-1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0])) if layers else None
    try:
        out: Tensor = module(x)
    finally:
        if hook is not None:
            hook.remove()
    if given and given[-1].ndim == 2 and out.ndim == 2 and out.shape[1] == layers[-1].out_features:
        return given[-1], out
    return out.flatten(1), None


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """No gradients, and float32 products as float32: GPUs otherwise round a convolution's inputs to 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    cudnn = torch.backends.cudnn  # whose flags() turns it off where nobody says otherwise
    try:
        with (
            torch.inference_mode(),
            cudnn.flags(enabled=cudnn.enabled, allow_tf32=False, deterministic=True),
        ):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def weights_file(weights: str, network: str) -> Path:
    """The local file of weights that was named. Raises FeatureError where there is none: nothing is downloaded."""
    if not weights:
        raise FeatureError(
            f"features={network} needs --features.weights=FILE, its weights as .safetensors or .pth: nothing is "
            "downloaded. features=efficientnet_lite0 has its weights in a package, features=pixels needs none"
        )
    file = Path(expand(weights))
    if not file.is_file():
        raise FeatureError(f"features={network}: no file {file}{sought(file)}; nothing is downloaded")
    return file


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
