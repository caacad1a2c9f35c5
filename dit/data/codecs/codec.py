"""The codec axis: pixels, diffusers' autoencoders (autoencoders.py), original weights of latent diffusion (ldm.py).

`encode` gives what the codec gives, `decode` takes the same; norm.py stands between that and what the model sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit.config import Registry, config, flatten, merge
from dit.data import DataError
from dit.data.codecs.autoencoders import Vae
from dit.data.codecs.base import Codec, CodecConfig, in_range
from dit.data.codecs.ldm import Ldm

SHOWN = 6  # differing keys in a message


@config
class Pixels(CodecConfig):
    """The identity: the model sees pixels."""

    def build(self, device: torch.device | str = "cpu") -> Codec:
        return PixelCodec()


class PixelCodec(Codec):
    """Images are their own latents."""

    channels = 3
    factor = 1
    has_posterior = False

    def encode(self, images: Tensor) -> Tensor:
        return images[:, None].float()

    def decode(self, latents: Tensor) -> Tensor:
        return in_range(latents)

    def identity(self) -> dict[str, Any]:
        return {"name": "pixels"}


# Filled here and not by decorators, so that whoever has the registry has all of it.
CODECS: Registry[CodecConfig] = Registry("codec")
CODECS.register("pixels")(Pixels)
CODECS.register("vae")(Vae)
CODECS.register("ldm")(Ldm)


def parse_codec(base: Mapping[str, Any], keys: Mapping[str, Any]) -> CodecConfig:
    """Build the codec of `base` ({"name": ...}) with a command line's keys over it: "codec.path" or "codec_path".

    Another "codec.name" than base's starts from that codec's defaults.
    """
    return CODECS.parse(merge(dict(base), {re.sub(r"^codec[._]", "", k): v for k, v in keys.items()}))


def check_same_codec(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], our_name: str, their_name: str
) -> None:
    """Refuse to mix latents of two codecs: DataError with both sides named, what differs, and what to do."""
    if dict(ours) == dict(theirs):
        return
    left, right = flatten(ours), flatten(theirs)
    keys = [k for k in sorted({*left, *right}) if left.get(k) != right.get(k)]
    sides = [f"{k}: {_short(left, k)} against {_short(right, k)}" for k in keys]
    more = [f"and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
    raise DataError(
        f"{our_name} and {their_name} come from different codecs ({'; '.join(sides[:SHOWN] + more)}). Encode the "
        "images again with the codec that the other has, or take the codec or the run that made the data: "
        "--codec.path=PATH"
    )


def _short(values: Mapping[str, Any], key: str) -> str:
    """A value for a message: hashes by their first 8 characters."""
    if key not in values:
        return "none"
    text = str(values[key])
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return text[:8]
    return text if len(text) <= 60 else text[:57] + "..."
