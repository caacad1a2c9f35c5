"""Images to latents and back: a diffusers KL autoencoder, or the identity (pixel space).

`encode` gives what the codec gives, `decode` takes the same; `LatentNorm` stands between that and the unit
variance that the model sees, in training (`draw`) and in sampling (`invert`).
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit.config import ConfigError, Registry, config, from_dict
from dit.data import DataError
from dit.data.manifest import Manifest
from dit.rng import Draws, Purpose

WEIGHTS = "diffusion_pytorch_model.safetensors"
# What decides about the function that an AutoencoderKL computes. A fixed list with its defaults, so that the
# identity does not change with the version of diffusers.
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}


@config
class LatentNorm:
    """Per-channel mean and std of latents: `draw` goes to the model's unit variance, `invert` comes back."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ConfigError(f"{len(self.mean)} means and {len(self.std)} stds; expected one each a channel")
        if not all(0 < s < float("inf") for s in self.std) or not all(
            abs(m) < float("inf") for m in self.mean
        ):
            raise ConfigError(f"mean {self.mean} and std {self.std}: expected finite numbers, std above 0")

    def draw(self, moments: Tensor, draws: Draws) -> Tensor:
        """Normalised latents (B, C, H, W) float32 from moments (B, 2, C, H, W), or from (B, 1, C, H, W) as they are.

        Two moments are mean and std of a Gaussian posterior, drawn from with draws' POSTERIOR numbers.
        """
        mean = moments[:, 0].float()  # (B, C, H, W)
        if moments.shape[1] == 2:
            mean = mean + moments[:, 1].float() * draws.normal(Purpose.POSTERIOR, mean.shape[1:])
        return (mean - _per_channel(self.mean, mean)) / _per_channel(self.std, mean)

    def invert(self, latents: Tensor) -> Tensor:
        """What the codec decodes, (B, C, H, W) float32, from normalised latents of that shape."""
        latents = latents.float()
        return latents * _per_channel(self.std, latents) + _per_channel(self.mean, latents)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    if like.shape[1] != len(values):
        raise ConfigError(f"latents of {like.shape[1]} channels, but statistics of {len(values)}")
    return _constant(values, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1) float32. Kept, because making one on a GPU makes the host wait for it."""
    with torch.inference_mode(False):  # else one first made while sampling could not be used in training
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


class Codec(ABC):
    """Images in [-1, 1] to latents of `channels` channels and 1 / `factor` of the size, and back.

    `norm` is the codec's own normalisation (a Stable Diffusion VAE's 0.18215), for weights trained with it.
    """

    channels: int
    factor: int
    has_posterior: bool  # whether encode gives two moments
    norm: LatentNorm

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, 2, C, h, w), mean and std; to (B, 1, C, h, w) where there is no posterior."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w), not normalised, to images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that are the same for the same function: what was configured, and a hash of the weights."""


class CodecConfig(ABC):
    """A choice on the codec axis."""

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> Codec:
        """Load it."""


CODECS: Registry[CodecConfig] = Registry("codec")


def parse_codec(base: Mapping[str, Any], keys: Mapping[str, str]) -> CodecConfig:
    """The codec of `base` ({"name": ...}) with a command line's keys over it: "codec.path" or "codec_path"."""
    return CODECS.parse({**base, **{re.sub(r"^codec[._]", "", k): v for k, v in keys.items()}})


@CODECS.register("pixels")
@config
class Pixels(CodecConfig):
    """The identity: the model sees pixels."""

    def build(self, device: torch.device | str = "cpu") -> Codec:
        return PixelCodec()


@CODECS.register("vae")
@config
class Vae(CodecConfig):
    """diffusers' AutoencoderKL. path: a folder that save_pretrained wrote, else a name on the Hugging Face hub.

    subfolder: where it lies in that (a pipeline has `vae`). dtype: in which it computes.
    """

    path: str | None = None
    subfolder: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def build(self, device: torch.device | str = "cpu") -> Codec:
        return VaeCodec(load_vae(self.path, self.subfolder), getattr(torch, self.dtype), device)


class PixelCodec(Codec):
    """Images are their own latents."""

    channels = 3
    factor = 1
    has_posterior = False

    def __init__(self) -> None:
        self.norm = codec_norm(self.identity())

    def encode(self, images: Tensor) -> Tensor:
        return images[:, None].float()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        return {"name": "pixels"}


class VaeCodec(Codec):
    """An AutoencoderKL (Rombach et al., arXiv 2112.10752), frozen."""

    has_posterior = True

    def __init__(self, vae: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        settings = _vae_config(vae.config)
        self._identity = {"name": "vae", "config": settings, "sha256": weights_hash(vae)}
        self.channels = int(settings["latent_channels"])
        self.factor = 2 ** (len(settings["block_out_channels"]) - 1)
        self.norm = codec_norm(self._identity)
        self.dtype, self.device = dtype, torch.device(device)
        self.vae = vae.to(device=device, dtype=dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1).float()  # (B, 2, C, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents.to(self.device, self.dtype)).sample
        return images.float().clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        return self._identity


def codec_norm(identity: Mapping[str, Any]) -> LatentNorm:
    """The normalisation that a codec brings along, from its identity: (latents - shift_factor) * scaling_factor."""
    if identity["name"] == "pixels":
        return LatentNorm(mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = identity["config"]
    channels, shift = settings["latent_channels"], settings["shift_factor"] or 0.0
    return LatentNorm(mean=(shift,) * channels, std=(1.0 / settings["scaling_factor"],) * channels)


def unknown_vae(channels: int, scale: float) -> dict[str, Any]:
    """The identity of a VAE of which no more is known, as of the one that weights from elsewhere go with."""
    known = {"latent_channels": channels, "scaling_factor": scale, "shift_factor": None}
    return {"name": "vae", "config": known}


def latent_norm(manifest: Manifest, which: Literal["dataset", "codec"] = "dataset") -> LatentNorm:
    """`dataset`: by the statistics of these latents. `codec`: by the codec's own constant, as official weights want."""
    if which == "codec":
        return codec_norm(manifest.codec)
    try:
        return from_dict(LatentNorm, {"mean": manifest.mean, "std": manifest.std})
    except ConfigError as error:
        raise DataError(
            f"{manifest.root}: latents cannot be normalised by their statistics ({error})"
        ) from None


def _vae_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: settings.get(name, default) for name, default in VAE_CONFIG.items()}
    return {name: list(v) if isinstance(v, tuple | list) else v for name, v in chosen.items()}


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over the names, shapes and float32 values of a module's weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(weight.shape)}\n".encode())
        total.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()


def load_vae(path: str | None, subfolder: str = "") -> Any:
    """An AutoencoderKL from a folder or the hub, from safetensors only and with every weight found in them.

    Raises ConfigError without a path, DataError where something is missing.
    """
    if not path:
        raise ConfigError(
            "the vae codec needs a path: a folder that diffusers' save_pretrained wrote (tools/train_vae.py makes "
            "one), or a name on the hub such as stabilityai/sd-vae-ft-ema"
        )
    from diffusers import AutoencoderKL
    from diffusers.utils import logging as diffusers_logging

    folder = Path(path).expanduser()
    local = folder.exists() or path.startswith((".", "/", "~"))
    if local:
        _check_folder(folder / subfolder)
    diffusers_logging.set_verbosity_error()
    try:
        vae, info = AutoencoderKL.from_pretrained(
            str(folder) if local else path,
            subfolder=subfolder or None,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        hint = (
            ""
            if local
            else f"; on a machine with a network: hf download {path} --local-dir FOLDER, then give FOLDER"
        )
        raise DataError(f"cannot load an AutoencoderKL from '{path}'{hint} ({error})") from error
    wrong = {
        k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        what = "; ".join(f"{k.replace('_', ' ')}: {list(v)[:3]}" for k, v in wrong.items())
        raise DataError(
            f"'{path}': weights that do not fit their config ({what}); the folder mixes two models"
        )
    return vae


def _check_folder(folder: Path) -> None:
    """Say which file of a saved autoencoder is missing, and where to get it."""
    for name in ("config.json", WEIGHTS):
        if not (folder / name).is_file():
            nested = (
                "; it has a folder vae/: set the codec's subfolder to vae"
                if (folder / "vae").is_dir()
                else ""
            )
            raise DataError(
                f"{folder / name} is missing{nested}. Copy it there, train one with tools/train_vae.py, or fetch one: "
                f"hf download stabilityai/sd-vae-ft-ema {name} --local-dir {folder}"
            )


def check_same_codec(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str
) -> None:
    """Refuse to mix latents of two codecs: raises DataError with both sides named and what differs."""
    if dict(ours) == dict(theirs):
        return
    keys = [k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)]
    sides = "; ".join(
        f"{k}: {our_name} has {ours.get(k)!r}, {their_name} has {theirs.get(k)!r}" for k in keys
    )
    raise DataError(
        f"{our_name} and {their_name} come from different codecs ({sides}); use the same for both"
    )
