"""Images to latent shards with a manifest: `python tools/encode.py IMAGES OUT --codec=vae --codec.path=FOLDER`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from dit import dist
from dit.cli import run
from dit.config import from_dict, merge
from dit.data.codecs.base import CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.encoding.encode import EncodeOptions, encode
from dit.data.sources.crops import CROPS
from dit.data.sources.images import ImageSource, open_source


def main(
    images: str,
    out: str,
    *,
    codec: Annotated[str, "which of the codecs below"] = "vae",
    image_size: Annotated[int, "pixels a side, a multiple of the codec's factor"] = 256,
    crop: Annotated[str, "which of the crops below"] = "centre",
    flip: Annotated[bool, "store a flipped view beside each image"] = True,
    classes: Annotated[str | None, "imagenet1k: its 1000 labels, for folders or tars named by wnid"] = None,
    labels: Annotated[str | None, "file of lines `name class`, in place of the images' folders"] = None,
    posterior: Annotated[Literal["moments", "sample"], "keep mean and std, or one draw"] = "moments",
    dtype: Annotated[Literal["float16", "float32"], "of what is stored"] = "float16",
    block: Annotated[int, "samples a block at most"] = 256,
    shard_mb: Annotated[float, "MB a shard at most"] = 512.0,
    seed: Annotated[int, "of the order of writing, of random crops and of drawn latents"] = 0,
    batch_size: Annotated[int, "images at a time through the codec"] = 64,
    max_bad: Annotated[int, "unreadable images to leave out before giving up"] = 0,
    workers: Annotated[int, "threads a rank that decode images; 0: one a core, at most 16"] = 0,
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; the rank's GPU where there is one"] = None,
    **codec_crop_keys: str,
) -> None:
    """Encode IMAGES once, into latent shards and a manifest in the new folder OUT.

    IMAGES: a folder (CLASS/name.jpg), a tar of such a folder, WebDataset tars of KEY.jpg and KEY.cls, ImageNet's tar
    of class tars, Parquet with image bytes (each: one file, a folder of them, train-{000..099}.tar or a pattern), or
    digits:train and digits:test (scikit-learn's handwritten digits).

    Stopped or killed, the same command goes on with what is done. Ranks share the work: launch/local.sh
    tools/encode.py IMAGES OUT ..., or sbatch ... launch/multinode.sh tools/encode.py IMAGES OUT ... (OUT on a file
    system that the nodes share). The same images, codec and options give the same bytes, whatever the ranks.
    """
    first = {"image_size": image_size, "flip": flip, "posterior": posterior, "dtype": dtype, "block": block}
    more = {"shard_mb": shard_mb, "seed": seed, "batch_size": batch_size, "max_bad": max_bad}
    how = {**first, **more, "workers": workers, "crop": _named("crop", crop, codec_crop_keys)}
    options = from_dict(EncodeOptions, how)
    chosen = CODECS.parse(_named("codec", codec, codec_crop_keys))
    source = open_source(images, classes, labels)
    _encode(images, source, chosen, out, options, device)


def _encode(
    images: str, source: ImageSource, codec: CodecConfig, out: str, options: EncodeOptions, device: str | None
) -> None:
    """This rank's share, with a bar over the whole set on rank 0."""
    world = dist.World.from_env()
    if world.is_main:
        print(f"{images}: {source}", flush=True)
    if "OMP_NUM_THREADS" not in os.environ:  # launch/ sets it
        torch.set_num_threads(dist.cores())
    built = codec.build(device or world.device)
    with tqdm(total=len(source), unit="img", desc="encode", disable=not world.is_main) as bar:

        def resumed(count: int) -> None:
            if count:
                bar.initial = bar.n = count
                bar.refresh()

        def waiting(parts: Sequence[int]) -> None:
            more = ", ..." if len(parts) > 4 else ""
            some = ", ".join(map(str, sorted(parts)[:4]))
            bar.set_postfix_str(f"others are at part {some}{more}" if parts else "")

        me = {"rank": world.rank, "size": world.size}
        report = encode(source, built, out, options, bar.update, **me, resumed=resumed, waiting=waiting)
    who = "" if report.finished else f" (rank {world.rank})"
    print(f"{out}{who}: {report}", flush=True)


def _named(family: str, name: str, keys: dict[str, str]) -> Any:
    """A choice with its own keys ("crop.scale_min" or "crop_scale_min"): {"name": ..., "scale_min": ...}."""
    pattern = re.compile(rf"{family}[._]")
    return merge(
        {"name": name}, {pattern.sub("", k, count=1): v for k, v in keys.items() if pattern.match(k)}
    )


if __name__ == "__main__":
    run(main, choices={"codec": CODECS, "crop": CROPS})
