"""The Inception network of the FID: the original TensorFlow graph's weights, through torch-fidelity.

torch-fidelity 0.4 was taken, and not torchmetrics, because it resizes as TensorFlow 1 did (bit-exact on CPUs), takes
uint8 alone, so that nobody rounds twice, and does not swap precision and recall as its versions before 0.4 did.
torchmetrics wraps the same network, and with `normalize=True` truncates floats to uint8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit.config import config
from dit.evals.features.network import (
    FEATURES,
    Extracted,
    FeatureError,
    FeatureNetwork,
    FeatureSpace,
    Sample,
    exactly,
    sha256_of,
)
from dit.files import expand

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")  # the same file
DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BYTES = 95_628_359
URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SPATIAL = 7  # channels of 17 x 17, as in ADM's evaluator: 2023 values
WITHOUT = (
    "Without it: every figure in other features (--features=efficientnet_lite0, pixels, timm, torchvision), which are "
    "named by their network and are not FID; and all of `evaluate.py features` from features of your own"
)


@FEATURES.register("inception")
@config
class Inception(FeatureSpace):
    """Inception v3 of 2015, of FID, sFID and IS: 2048 features, 1008 logits, 2023 spatial values; TF1's resize."""

    weights: str = ""  # file pt_inception-2015-12-05-6726825d.pth; "" = where torch.hub keeps checkpoints

    def build(self, device: torch.device, sample: Sample | None = None) -> FeatureNetwork:
        """Load the file of weights, whose checksum has to be the original's."""
        return load(find(self.weights), device)


def find(weights: str) -> Path:
    """The file of weights, named or in torch.hub's folder. Raises FeatureError that says all of what is missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    places = [Path(expand(weights))] if weights else [folder / name for name in NAMES]
    for place in places:
        if place.is_file():
            return place
    raise FeatureError(
        f"features=inception needs the weights of the original graph, {NAMES[0]} ({BYTES:,} bytes, SHA-256 "
        f"{DIGEST[:16]}...), and there is no file {' or '.join(map(str, places))}. It is at {URL}: put it there, or "
        f"name it by --features.weights=FILE. {WITHOUT}"
    )


def load(file: Path, device: torch.device, digest: str = DIGEST) -> InceptionNetwork:
    """The network of a file whose SHA-256 is `digest`. FeatureError for any other: its figures would not be FID."""
    found = sha256_of(file)
    if found != digest:
        size = file.stat().st_size
        cut = f"; it has {size:,} of {BYTES:,} bytes: copy it again" if size < BYTES else ""
        raise FeatureError(
            f"{file} has the SHA-256 {found}, and the Inception weights of 2015 have {digest}{cut}. {WITHOUT}"
        )
    return InceptionNetwork(file, found, device)


class InceptionNetwork(FeatureNetwork):
    """torch-fidelity's port of the graph, and the values of sFID, which it has no name for."""

    def __init__(self, file: Path, digest: str, device: torch.device):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise FeatureError(
                "features=inception needs torch-fidelity 0.4 or newer: pip install 'dit[evals]'"
            ) from None
        self.module: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        ).to(device)
        self.device = device
        self._spatial: list[Tensor] = []
        # The graph's mixed_6/conv:0, behind its ReLU. Inception's own names count otherwise: mixed_6 is Mixed_6d
        self.module.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self.identity = {
            "name": "inception",
            "weights": digest,
            "resize": "bilinear as TensorFlow 1 does it, whole image to 299x299, not rounded",
            "dtype": "float32",
            "logits": "without the bias",
        }

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._spatial.append(output[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1).float())  # (B, 17·17·7)

    def __call__(self, images: Tensor) -> Extracted:
        self._spatial.clear()
        with exactly():
            features, logits = self.module(images.to(self.device).permute(0, 3, 1, 2).contiguous())
        return Extracted(features, logits, self._spatial.pop())
