"""The first stage of latent diffusion as CompVis' code saves it (Rombach et al., arXiv 2112.10752), as a codec.

The shape of the autoencoder is read off its tensors, and the same weights then compute in diffusers'
AutoencoderKL: data encoded by the one are accepted with the other.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit.config import ConfigError, config
from dit.data import DataError
from dit.data.codecs.autoencoders import Dtype, Tile, VaeCodec
from dit.data.codecs.base import Codec, CodecConfig
from dit.files import expand, not_found

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
# of a whole latent diffusion model, of one of its forks, of none
PREFIXES = ("first_stage_model.", "vae.", "")
WRAPPERS = ("state_dict", "model")  # of training scripts, around the tensors

# CompVis' names to diffusers'. Levels of the decoder count from the image there and from the latents here: {up}.
RESNET = {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
NAMES = [
    (r"(encoder|decoder)\.norm_out", r"\1.conv_norm_out"),
    (r"(encoder|decoder)\.mid\.block_1", r"\1.mid_block.resnets.0"),
    (r"(encoder|decoder)\.mid\.block_2", r"\1.mid_block.resnets.1"),
    (r"(encoder|decoder)\.mid\.attn_1", r"\1.mid_block.attentions.0"),
    (r"encoder\.down\.(\d+)\.block", r"encoder.down_blocks.\1.resnets"),
    (r"encoder\.down\.(\d+)\.attn", r"encoder.down_blocks.\1.attentions"),
    (r"encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0"),
    (r"decoder\.up\.(\d+)\.block", r"decoder.up_blocks.{up}.resnets"),
    (r"decoder\.up\.(\d+)\.attn", r"decoder.up_blocks.{up}.attentions"),
    (r"decoder\.up\.(\d+)\.upsample", r"decoder.up_blocks.{up}.upsamplers.0"),
]


@config
class Ldm(CodecConfig):
    """A KL autoencoder from a file of CompVis' latent diffusion: .ckpt, .pt, .pth, .bin or .safetensors.

    It may be a whole model with the autoencoder as its first_stage_model. scale, shift: the model of its latents saw
    (latents - shift) * scale, which the file does not say. groups: of the group norms, nor that. dtype, tile: as of
    the codec vae.
    """

    path: str | None = None  # file: .ckpt, .pt, .pth, .bin or .safetensors
    # latents are multiplied with it; SD 1, 2 0.18215, XL 0.13025, SD3 1.5305
    scale: Annotated[float, Field(gt=0)] = 0.18215
    shift: float | None = None  # subtracted from latents before scale; SD3 0.0609, Flux 0.1159; null = 0
    groups: Annotated[int, Field(gt=0)] = 32  # of the group norms, which the file does not say
    dtype: Dtype = "float32"  # of the computation
    tile: Tile | None = None  # pixels a side of tiles that larger images go through; null = whole

    def build(self, device: torch.device | str = "cpu") -> Codec:
        if not self.path:
            raise ConfigError(
                "the ldm codec needs a path: a .ckpt, .pt or .safetensors file of latent diffusion's autoencoder"
            )
        file = Path(expand(self.path))
        model = build_autoencoder(read_first_stage(file), str(file), self.groups, self.scale, self.shift)
        return VaeCodec(model, getattr(torch, self.dtype), device, self.tile)


def read_first_stage(file: Path) -> dict[str, Tensor]:
    """Read the autoencoder's tensors by CompVis' names, without prefixes. DataError where it cannot be had."""
    if not file.is_file():
        what = f"{file} is a folder: the codec vae reads those" if file.is_dir() else not_found(file)
        raise DataError(f"{what}; expected the file of weights itself (.ckpt, .pt, .safetensors)")
    try:
        state = _safetensors(file) if file.suffix == ".safetensors" else _checkpoint(file)
    except (OSError, SafetensorError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read weights from {file} ({_advice(file, error)})") from error
    found = {bare: state[name] for name, bare in _names(state).items()}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(
            f"{file} holds no autoencoder of latent diffusion: expected tensors first_stage_model.encoder..., or "
            f"encoder... and decoder...; it has {sorted(map(str, state))[:3]}"
        )
    return found


def _names(state: Mapping[str, Any]) -> dict[str, str]:
    """Map names in the file to CompVis' names, for the tensors that belong to the autoencoder."""
    for prefix in PREFIXES:
        if any(str(name).startswith(f"{prefix}encoder.down.") for name in state):
            cut = {n: n.removeprefix(prefix) for n in map(str, state) if n.startswith(prefix)}
            return {n: bare for n, bare in cut.items() if bare.startswith(PARTS)}
    return {}


def _safetensors(file: Path) -> dict[str, Tensor]:
    """The autoencoder's tensors alone, of a file that may hold gigabytes of others; without any, all names."""
    with safe_open(file, "pt") as held:
        names = dict.fromkeys(held.keys())
        wanted = _names(names)
        return {name: held.get_tensor(name) for name in wanted} if wanted else names  # type: ignore[return-value]


def _checkpoint(file: Path) -> Mapping[str, Tensor]:
    """A state dict from what torch.save wrote; mapped, so that only what is used is read."""
    held: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    return held if isinstance(held, dict) else {}


def _advice(file: Path, error: Exception) -> str:
    """What to do about a file that cannot be read."""
    if not isinstance(error, pickle.UnpicklingError) or "Unsupported" not in str(error):
        return f"{type(error).__name__}: {error}".split("\n", 1)[0]
    return (
        "it is a pickle of more than tensors, which may run any code and is not opened here. Where you trust it, write "
        'its tensors to a file of their own, and give that: python -c "import torch; from safetensors.torch import '
        f"save_file; s = torch.load('{file}', map_location='cpu', weights_only=False); s = s.get('state_dict', s); "
        "save_file({k: v.contiguous() for k, v in s.items() if k.startswith(('first_stage_model.', 'encoder.', "
        f"'decoder.', 'quant_conv.', 'post_quant_conv.'))}}, '{file.with_suffix('.safetensors')}')\""
    )


# --- to diffusers ------------------------------------------------------------------------------------------


def build_autoencoder(
    state: Mapping[str, Tensor],
    named: str,
    groups: int = 32,
    scale: float = 0.18215,
    shift: float | None = None,
) -> Any:
    """Build diffusers' AutoencoderKL of these weights. DataError for tensors that are not one's; named: their file."""
    if any(name.startswith("quantize.") for name in state):
        raise DataError(
            f"{named} is vector quantised; the codec ldm reads KL autoencoders. diffusers' VQModel is read by vae"
        )
    from diffusers import AutoencoderKL

    try:
        settings = _settings(state, groups)
    except (KeyError, IndexError) as error:
        raise DataError(
            f"{named}: an autoencoder of latent diffusion has {error}, and it is not there"
        ) from None
    indivisible = [w for w in settings["block_out_channels"] if w % groups]
    if indivisible:
        raise ConfigError(
            f"{named} has widths {indivisible}, which groups = {groups} does not divide; set groups"
        )
    try:
        with torch.device("meta"):  # no random weights are made first
            vae: Any = AutoencoderKL(
                **settings, norm_num_groups=groups, scaling_factor=scale, shift_factor=shift
            )
        vae.load_state_dict(_renamed(state, len(settings["block_out_channels"])), assign=True)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise DataError(
            f"{named}: not the tensors of a KL autoencoder of latent diffusion ({reason})"
        ) from None
    return vae


def _settings(state: Mapping[str, Tensor], groups: int) -> dict[str, Any]:
    """AutoencoderKL's arguments as the tensors tell them. KeyError with the name of a tensor that is not there."""
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    with_attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(
            state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)
        ),
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in with_attention
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(with_attention)
        ),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=-1)


def _renamed(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """By diffusers' names. Its attentions are linear where CompVis' are convolutions of one pixel."""
    renamed = {}
    for theirs, tensor in state.items():
        name = _diffusers_name(theirs, levels)
        weight = tensor.flatten(1) if "attentions" in name and tensor.ndim == 4 else tensor  # (C, C, 1, 1)
        renamed[name] = weight.to(torch.float32, copy=True)  # not mapped from the file any more
    return renamed


def _diffusers_name(name: str, levels: int) -> str:
    for pattern, replacement in NAMES:
        found = re.match(pattern + r"\.", name)
        if found:
            up = levels - 1 - int(found[1]) if "{up}" in replacement else 0
            head = found.expand(replacement.replace("{up}", str(up)))
            inner = ATTENTION if "attentions" in head else RESNET
            return ".".join([head, *(inner.get(part, part) for part in name[found.end() :].split("."))])
    return name
