"""Run directories of random weights, of any network and objective, on the digits' latents or pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from dit.config import from_dict
from dit.data.codecs.codec import CODECS
from dit.data.codecs.norm import latent_norm
from dit.data.shards.manifest import Manifest
from dit.experiments.latents import latent_contract
from dit.flow.objective import Objective
from dit.interop.convert import Weights, experiment_of, write_run
from dit.model.dit import DiT, DiTConfig
from tests.datasets import Digits

NANO = {"width": 32, "depth": 2, "heads": 4}
DDPM = {"path": "ddpm", "prediction": "eps"}
SIT = {
    "path": {"name": "linear", "model_time_data": 1.0, "model_time_noise": 0.0},
    "prediction": "reverse_velocity",
}


def random_model(size: int, channels: int, classes: int, seed: int = 0, **fields: Any) -> DiT:
    """A network whose weights are all random, the time embedder's enough for times to matter."""
    model = from_dict(DiTConfig, {**NANO, **fields}).build(size, channels, classes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_run(
    folder: Path,
    digits: Digits,
    objective: dict[str, Any],
    norm: Literal["dataset", "codec"] = "codec",
    data: str = "moments",
    **fields: Any,
) -> Path:
    """A run directory with one checkpoint of random weights; of `data`, moments or pixels."""
    manifest = Manifest.load(getattr(digits, data))
    contract = latent_contract(manifest, latent_norm(manifest, norm))
    (channels, side, _), classes = contract["shape"], len(contract["classes"])
    model = random_model(side, channels, classes, **fields)
    state = {name: p.detach() for name, p in model.named_parameters()}
    codec = None
    if data == "moments":
        codec = CODECS.parse({"name": "vae", "path": str(digits.vae)})
    cfg = from_dict(DiTConfig, {**NANO, **fields})
    experiment = experiment_of(folder, from_dict(Objective, objective), cfg, codec)
    return write_run(folder, Weights(state, state, model), experiment, contract, "random")
