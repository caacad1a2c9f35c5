"""Images to latent shards with a manifest: `python tools/encode.py IMAGES OUT --codec=vae --codec.path=FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from dit.cli import run
from dit.config import from_dict
from dit.data.codec import parse_codec
from dit.data.encode import EncodeOptions, encode
from dit.data.images import open_source


def main(
    images: str,
    out: str,
    *,
    codec: Annotated[str, "pixels | vae (which needs --codec.path)"] = "vae",
    image_size: Annotated[int, "pixels a side, a multiple of the codec's factor"] = 256,
    flip: Annotated[bool, "store a flipped view beside each image"] = True,
    block: Annotated[int, "samples a block at most"] = 256,
    shard_mb: Annotated[float, "MB a shard at most"] = 512.0,
    seed: Annotated[int, "of the order of writing and of drawn latents"] = 0,
    batch_size: Annotated[int, "images at a time through the codec"] = 64,
    max_bad: Annotated[int, "unreadable images to leave out before giving up"] = 0,
    posterior: Annotated[Literal["moments", "sample"], "keep mean and std, or one draw"] = "moments",
    workers: Annotated[int, "threads that decode images; 0: one a core, at most 16"] = 0,
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; a GPU where there is one"] = None,
    **codec_keys: str,
) -> None:
    """Encode IMAGES once, into latent shards and a manifest in the new folder OUT.

    IMAGES: a folder (CLASS/name.jpg), a tar of such a folder, WebDataset tars of KEY.jpg and KEY.cls (one, a
    folder of them, train-{000..099}.tar), or digits:train and digits:test (scikit-learn's handwritten digits).

    --codec.path=FOLDER or a hub name, --codec.subfolder=, --codec.dtype=float32|bfloat16|float16 configure the vae.
    Images are cropped as in guided diffusion (ADM). The same images, seed and options give the same bytes.
    """
    given = {
        "image_size": image_size,
        "flip": flip,
        "block": block,
        "shard_mb": shard_mb,
        "seed": seed,
        "batch_size": batch_size,
        "max_bad": max_bad,
        "posterior": posterior,
        "workers": workers,
    }
    options = from_dict(EncodeOptions, given)
    chosen = parse_codec({"name": codec}, codec_keys)
    source = open_source(images)
    print(f"{images}: {source}")
    built = chosen.build(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tqdm(total=len(source), unit="img", desc="encode") as bar:
        report = encode(source, built, out, options, progress=bar.update)
    print(f"{out}: {report}")


if __name__ == "__main__":
    run(main)
