"""Small data sets on disk whose samples say who they are, and a small autoencoder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from dit.data.shards.manifest import CHECKSUM, FILE, Manifest, Names, checksum
from dit.data.shards.write import ShardWriter

CHANNELS, SIZE, CLASSES = 2, 3, 5


def sample_of(identity: np.ndarray, views: int, posterior: bool) -> np.ndarray:
    """The arrays of samples: mean = id + view / 4 everywhere, std = 1 / (1 + view); exact in float16 for small ids."""
    shape = (len(identity), views, *((2,) if posterior else ()), CHANNELS, SIZE, SIZE)
    array = np.empty(shape, np.float16)
    for v in range(views):
        mean = (identity + v / 4).reshape(-1, 1, 1, 1)
        if posterior:
            array[:, v, 0], array[:, v, 1] = mean, 1 / (1 + v)
        else:
            array[:, v] = mean
    return array


def noise_of(identity: np.ndarray) -> np.ndarray:
    """The noise of samples: standard normal numbers that no two share, (n, 1, C, H, W) float32."""
    shape = (1, CHANNELS, SIZE, SIZE)
    noise = [np.random.default_rng(int(i)).standard_normal(shape) for i in identity]
    return np.array(noise, np.float32).reshape(-1, *shape)


def write_dataset(
    folder: Path,
    sizes: Sequence[int],
    *,
    views: int = 1,
    posterior: bool = True,
    blocks_per_shard: int = 3,
    eps: bool = False,
    **fields: Any,
) -> Manifest:
    """A data set with blocks of these sizes; ids are not in the order of the blocks. fields: of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    total, array = sum(sizes), "moments" if posterior else "latents"
    ids = np.random.default_rng(0).permutation(total)
    biggest = sample_of(np.zeros(max(sizes)), views, posterior).nbytes + 4096
    start = 0
    with ShardWriter(folder, blocks_per_shard * biggest) as writer:
        for size in sizes:
            chosen = ids[start : start + size]
            big = sample_of(chosen, views, posterior)
            noise = {"eps": noise_of(chosen)} if eps else {}
            writer.add({array: big, **noise, "label": chosen % CLASSES, "id": chosen.astype(np.uint64)})
            start += size
        writer.finish()
    names = "".join(f"image-{i}\n" for i in range(total)).encode()
    (folder / "names.txt").write_bytes(names)
    everything = sample_of(np.arange(total), views, posterior).astype(np.float64)
    mean = everything[:, :, 0] if posterior else everything
    noise = (everything[:, :, 1] ** 2).mean() if posterior else 0.0
    made = Manifest(
        samples=total,
        array=array,
        shape=big.shape[1:],
        eps=eps,
        views=("original", "flipped")[:views],
        posterior="moments" if posterior else "sample",
        image_size=8 * SIZE,
        transform="none",
        classes=tuple("abcde"),
        class_counts=tuple(np.bincount(ids % CLASSES, minlength=CLASSES).tolist()),
        unlabelled=0,
        mean=(float(mean.mean()),) * CHANNELS,
        std=(float(np.sqrt(mean.var() + noise)),) * CHANNELS,
        codec={"name": "made up"},
        seed=0,
        block=max(sizes),
        names=Names(count=total, sha256=hashlib.sha256(names).hexdigest()),
        shards=tuple(writer.shards),
        blocks=tuple(writer.blocks),
    )
    replace(made, **fields).save(folder)
    return Manifest.load(folder)


def edit_manifest(root: str | Path, *, keep_checksum: bool = False, **changes: Any) -> str:
    """Change keys of a data set's manifest on disk, and its checksum with them unless that is to stay."""
    file = Path(root) / FILE
    values = {**json.loads(file.read_text()), **changes}
    if not keep_checksum:
        values[CHECKSUM] = checksum({k: v for k, v in values.items() if k != CHECKSUM})
    file.write_text(json.dumps(values))
    return str(root)


def flip_byte(path: str | Path, offset: int) -> None:
    """Alter one byte of a file."""
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


def tiny_vae(seed: int = 0, **changes: Any) -> AutoencoderKL:
    """A random autoencoder of RGB images to 3 channels of half the size."""
    torch.manual_seed(seed)
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 3,
        "mid_block_add_attention": False,
        "shift_factor": 0.5,
        "scaling_factor": 0.25,
    }
    return AutoencoderKL(**{**settings, **changes})


@contextlib.contextmanager
def endless(out: Path, part: int = 0) -> Iterator[None]:
    """No encode to `out` can end meanwhile: this process is at one of its parts, which the others leave to it."""
    lock = out.with_name(out.name + ".partial") / "parts" / f"{part:06d}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
