"""Data sets of scikit-learn's digits, written by the real encoder, and copies of them with something changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dit.data.codecs.autoencoders import Vae
from dit.data.codecs.codec import Pixels
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.write import ShardWriter
from dit.data.sources.images import ImageSource, open_source
from dit.stage1.autoencoder import Kl

SAMPLES, HELD_OUT = 160, 48


@dataclass(frozen=True)
class Digits:
    """Folders: 8x8 pixels, and 4x8x8 posterior moments of an untrained VAE at 16x16, all in two views; that VAE."""

    pixels: Path
    pixels_val: Path
    moments: Path
    moments_val: Path
    vae: Path


def first(source: ImageSource, count: int) -> ImageSource:
    """Its first `count` images."""
    return replace(source, names=source.names[:count], labels=source.labels[:count])


def encode_digits(root: Path) -> Digits:
    """SAMPLES training and HELD_OUT test digits through both codecs."""
    made = Digits(*(root / name for name in ("pixels", "pixels_val", "moments", "moments_val", "vae")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = Kl(widths=(8, 8), groups=4).build().vae
        vae.quant_conv.bias.data[4:] = -4.0  # posterior std e^-2: the latents are mostly picture, not noise
    vae.save_pretrained(made.vae, safe_serialization=True)
    codec = Vae(path=str(made.vae)).build()
    small = EncodeOptions(image_size=8, block=16, shard_mb=0.02, workers=1)
    larger = EncodeOptions(image_size=16, block=16, shard_mb=0.05, workers=1)
    train, test = first(open_source("digits:train"), SAMPLES), first(open_source("digits:test"), HELD_OUT)
    encode(train, Pixels().build(), made.pixels, small)
    encode(test, Pixels().build(), made.pixels_val, small)
    encode(train, codec, made.moments, larger)
    encode(test, codec, made.moments_val, larger)
    return made


def altered(source: Path, folder: Path, change: Callable[[np.ndarray, np.ndarray], None]) -> Path:
    """A valid copy of a data set after `change(samples (n, ...), ids (n,))` of each block, in place.

    Its manifest keeps the statistics of the original.
    """
    manifest, folder_of = Manifest.load(source), folder
    folder_of.mkdir()
    reader = BlockReader(manifest)
    with ShardWriter(folder_of, 10**9) as writer:
        for i in range(len(manifest.blocks)):
            arrays = reader.read(i)
            change(arrays[manifest.array], arrays["id"])
            writer.add(arrays)
        writer.finish()
    shutil.copy(source / manifest.names.file, folder_of)
    replace(manifest, shards=tuple(writer.shards), blocks=tuple(writer.blocks)).save(folder_of)
    return folder_of
