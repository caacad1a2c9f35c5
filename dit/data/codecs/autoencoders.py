"""Image autoencoders of diffusers as codecs: KL, deep compression, vector quantised, tiny ones, and their kin.

The class is the one that the folder's config.json names. Of a KL posterior encode gives mean and std, else the
latents alone; latents of a vector quantised one are those before quantisation, and decode quantises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit.config import ConfigError, config
from dit.data import DataError
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.hub import find_folder
from dit.files import read_text

CONFIG = "config.json"
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
PROBES = (32, 256)  # pixels a side of the image that finds factor and channels; some factors are 128
OVERLAP = 0.25  # of a tile with its neighbour, blended
# of a model that takes no images
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)

Dtype = Literal["float32", "bfloat16", "float16"]
Tile = Annotated[int, Field(gt=0)]


@config
class Vae(CodecConfig):
    """An image autoencoder of diffusers. path: a folder that save_pretrained wrote, else owner/name on the hub.

    subfolder: where it lies in that (a pipeline has `vae`). download: a name on the hub may be fetched; else only the
    local cache is looked into. dtype: in which it computes. tile: pixels a side of the tiles in which larger images
    go through it, overlapping by a quarter (nearly the same result, less memory); null: whole.
    """

    path: str | None = None  # folder that save_pretrained wrote, or owner/name on the hub
    subfolder: str = ""  # where it lies in that; in a pipeline: vae
    download: bool = False  # fetch a name on the hub; false = look into the local cache only
    dtype: Dtype = "float32"  # of the computation
    tile: Tile | None = None  # pixels a side of tiles that larger images go through; null = whole

    def build(self, device: torch.device | str = "cpu") -> Codec:
        model = load_vae(self.path, self.subfolder, self.download)
        return VaeCodec(model, getattr(torch, self.dtype), device, self.tile)


class VaeCodec(Codec):
    """A diffusers autoencoder (KL: Rombach et al., arXiv 2112.10752; DC: Chen et al., arXiv 2410.10733), frozen.

    Raises DataError for a model that does not take images to latents of a fixed factor and back, the same each
    time; ConfigError for a tile that it cannot have.
    """

    def __init__(
        self,
        vae: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        tile: int | None = None,
    ):
        _quieten()
        digest = weights_hash(vae)
        self.dtype, self.device = dtype, torch.device(device)
        self.tile: int | None = None  # pixels a side; images up to that go through it whole
        self.vae = vae.to(device=device, dtype=dtype).eval().requires_grad_(False)
        moments, side = _probe(self)
        self.has_posterior = moments.shape[1] == 2
        self.channels, self.factor = moments.shape[2], side // moments.shape[-1]
        self._identity = _identity(vae, self.channels) | {"sha256": digest}
        if tile is not None:
            self._set_tile(tile)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        if self.tile:
            self.vae.use_tiling = max(images.shape[-2:]) > self.tile
        encoded = self.vae.encode(images.to(self.device, self.dtype))
        posterior = encoded.get("latent_dist")
        if posterior is not None:
            return torch.stack([posterior.mean, posterior.std], dim=1).float()  # (B, 2, C, h, w)
        latents: Tensor = encoded["latents" if "latents" in encoded else "latent"]
        return latents[:, None].float()  # (B, 1, C, h, w)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self.tile:
            self.vae.use_tiling = max(latents.shape[-2:]) * self.factor > self.tile
        images: Tensor = self.vae.decode(latents.to(self.device, self.dtype)).sample
        return images.float().clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def _set_tile(self, tile: int) -> None:
        """Have the model tile, seen to work on an image of four of the smallest tiles."""
        name, unit = type(self.vae).__name__, 4 * self.factor
        if tile % unit or tile < 2 * unit:
            raise ConfigError(
                f"tile = {tile}: expected a multiple of {unit} pixels for a codec of factor {self.factor}, from "
                f"{2 * unit} on"
            )
        self.tile = 2 * unit
        try:
            _use_tiles(self.vae, 2 * unit, self.factor)
            image = _ramp(3 * unit)
            moments = self.encode(image)
            fits = moments.shape[-1] == 12 and self.decode(moments[:, 0]).shape == image.shape
        except FAILURES as error:
            raise ConfigError(f"{name} cannot work in tiles ({_line(error)}); set tile to null") from error
        if not fits:
            raise ConfigError(f"the tiles of {name} do not add up to the whole; set tile to null")
        self.tile = tile
        _use_tiles(self.vae, tile, self.factor)


def _use_tiles(vae: Any, tile: int, factor: int) -> None:
    """Set the size of tiles, in both of the ways that diffusers' classes have."""
    if hasattr(vae, "tile_sample_min_height"):
        stride = int(tile * (1 - OVERLAP))
        vae.tile_sample_min_height = vae.tile_sample_min_width = tile
        vae.tile_latent_min_height = vae.tile_latent_min_width = tile // factor
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = stride
    elif hasattr(vae, "tile_sample_min_size"):
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile, tile // factor
        vae.tile_overlap_factor = OVERLAP
    else:
        raise AttributeError("diffusers has no tiling for it")


def _probe(codec: VaeCodec) -> tuple[Tensor, int]:
    """(moments, pixels a side) of a small image. DataError unless it comes back as an image, the same each time."""
    name = type(codec.vae).__name__
    if any(isinstance(module, torch.nn.Conv3d) for module in codec.vae.modules()):
        raise DataError(
            f"{name} is an autoencoder of videos (latents of 5 dimensions); expected one of images"
        )
    failure: Exception | None = None
    for side in PROBES:
        image = _ramp(side)
        try:
            moments = codec.encode(image)
            once, again = codec.decode(moments[:, 0]), codec.decode(moments[:, 0])
        except (*FAILURES, KeyError) as error:
            failure = error
            continue
        if moments.ndim != 5 or side % moments.shape[-1] or once.shape != image.shape:
            raise DataError(
                f"{name} takes an image of {tuple(image.shape)} to latents of {tuple(moments[:, 0].shape)} and back "
                f"to {tuple(once.shape)}; expected (1, channels, side / factor, side / factor) and the same image"
            )
        if float((once - again).abs().max()) > 0.01:
            raise DataError(
                f"{name} decodes the same latents to another image each time; take another decoder"
            )
        return moments, side
    raise DataError(f"{name} does not take an image of 3 channels to latents and back ({_line(failure)})")


def _ramp(side: int) -> Tensor:
    return torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side)


def _line(error: Exception | None) -> str:
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else text[:297] + "..."


# --- identity ----------------------------------------------------------------------------------------------


def _identity(vae: Any, channels: int) -> dict[str, Any]:
    """Return what VAE_CONFIG lists of an AutoencoderKL; of other classes their name and their whole config."""
    if type(vae).__name__ == "AutoencoderKL":
        return {"name": "vae", "config": _vae_config(vae.config)}
    settings = {k: v for k, v in json.loads(vae.to_json_string()).items() if not k.startswith("_")}
    return {"name": "vae", "class": type(vae).__name__, "channels": channels, "config": settings}


def _vae_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {name: settings.get(name, default) for name, default in VAE_CONFIG.items()}
    return {name: list(v) if isinstance(v, tuple | list) else v for name, v in chosen.items()}


def unknown_vae(channels: int, scale: float | None) -> dict[str, Any]:
    """Return the identity of a VAE of which no more is known, such as the one that weights from elsewhere go with."""
    known = {"latent_channels": channels, "scaling_factor": scale, "shift_factor": None}
    return {"name": "vae", "config": known}


def weights_hash(module: torch.nn.Module) -> str:
    """Hash (sha256) the names, shapes and float32 values of a module's weights, whatever file they came from."""
    total = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        total.update(f"{name} {tuple(weight.shape)}\n".encode())
        total.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return total.hexdigest()


# --- loading -----------------------------------------------------------------------------------------------


def load_vae(path: str | None, subfolder: str = "", download: bool = False) -> Any:
    """Load a diffusers autoencoder from a folder or the hub: safetensors only, and every weight found in them.

    Raises ConfigError without a path, DataError where something is missing.
    """
    if not path:
        raise ConfigError(
            "the vae codec needs a path: a folder that diffusers' save_pretrained wrote (tools/train_vae.py makes "
            "one), or a name on the hub such as stabilityai/sd-vae-ft-ema with download: true"
        )
    folder = find_folder(path, subfolder, (CONFIG, WEIGHTS), download)
    cls = _class_of(folder)
    _quieten()
    try:
        vae, info = cls.from_pretrained(
            str(folder),
            use_safetensors=True,  # never a pickle
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, *FAILURES) as error:
        raise DataError(f"cannot load an {cls.__name__} from {folder} ({_line(error)})") from error
    wrong = {
        k: v for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    if wrong:
        what = "; ".join(f"{k.replace('_', ' ')}: {list(v)[:3]}" for k, v in wrong.items())
        raise DataError(
            f"{folder}: weights that do not fit their config ({what}); the folder mixes two models"
        )
    for weight in (*vae.parameters(), *vae.buffers()):
        weight.data = weight.data.clone()  # mapped from the file, which may change
    return vae


def _quieten() -> None:
    """Without diffusers' warnings of what is meant here: that modules are cast, that none is kept in float32."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def _class_of(folder: Path) -> Any:
    """The class that config.json names. DataError where it is none of diffusers' autoencoders."""
    import diffusers

    try:
        settings = json.loads(read_text(folder / CONFIG))
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: not JSON ({error})") from None
    name = settings.get("_class_name") if isinstance(settings, dict) else None
    found = getattr(diffusers, str(name), None)
    is_model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    if not is_model or not hasattr(found, "encode") or not hasattr(found, "decode"):
        raise DataError(
            f"{folder / CONFIG}: _class_name is {name!r}; expected an autoencoder that diffusers "
            f"{diffusers.__version__} has, such as AutoencoderKL or AutoencoderDC"
        )
    return found
