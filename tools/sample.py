"""Draw images from a trained model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit import dist
from dit.cli import run
from dit.config import ConfigError, from_dict, to_dict
from dit.experiment import Trained
from dit.files import write_atomically
from dit.sample.generate import Sampler, SamplerSpec, image_grid, labels_for


def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    *,
    out: Annotated[str, "folder for samples.npz, grid.png and spec.json"],
    num_samples: Annotated[int, "images in all"] = 64,
    classes: Annotated[str, "all, or numbers like 0,3; image i is of classes[i mod n]"] = "all",
    cfg_scale: Annotated[float, "null + scale * (cond - null); 1 = no guidance"] = 1.0,
    solver: Annotated[str, "euler or heun"] = "heun",
    num_steps: Annotated[int, "steps of the solver"] = 50,
    shift: Annotated[float, "time shift of the grid; 1 = even steps"] = 1.0,
    seed: Annotated[int, "of the noise; image i has its own"] = 0,
    batch_size: Annotated[int, "images at a time and rank"] = 64,
    weights: Annotated[Literal["ema", "model"], "which weights"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    **codec_keys: str,
) -> None:
    """Draw images by integrating the probability-flow ODE with classifier-free guidance.

    Writes samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: int64 labels, the ADM suite's format), grid.png and
    spec.json. Image i depends on the checkpoint, the spec and i alone, not on batch size or number of ranks.

    --codec.path=FOLDER says where the VAE is, if not where training had it; --codec.dtype=bfloat16 decodes faster.
    """
    if min(num_samples, batch_size) < 1:
        raise ConfigError(f"num_samples {num_samples} and batch_size {batch_size} must be at least 1")
    grid = {"name": "uniform", "shift": shift}
    values = {"solver": solver, "num_steps": num_steps, "cfg_scale": cfg_scale, "seed": seed, "grid": grid}
    spec = from_dict(SamplerSpec, values)
    with dist.session() as world:
        trained = Trained.load(run_or_ckpt, weights, world.device)
        chosen = trained.classes(classes)
        chosen_precision = trained.experiment.train.precision if precision == "run" else precision
        sampler = trained.sampler(spec, codec_keys, world.device, chosen_precision)
        sampler.times()  # an impossible grid is refused before anything is drawn
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        labels = labels_for(torch.arange(num_samples), chosen)
        images = draw(sampler, labels, batch_size, folder, world)
        if images is not None:
            described = {"checkpoint": str(trained.path), "step": trained.step, "weights": weights}
            described |= {"classes": chosen, "batch_size": batch_size, "num_samples": num_samples}
            described |= {"sampler": to_dict(spec), "nfe": sampler.nfe, "codec": codec_keys}
            described |= {"precision": chosen_precision, "device": world.device.type}
            write(folder, images, labels.numpy(), described)


def draw(
    sampler: Sampler, labels: torch.Tensor, batch_size: int, folder: Path, world: dist.World
) -> np.ndarray | None:
    """(N, H, W, 3) uint8 on rank 0, None elsewhere. Ranks take whole batches in turn: the same batches on any."""
    starts = range(0, len(labels), batch_size)
    mine = starts[world.rank :: world.size]
    drawn = {}
    for start in tqdm(mine, unit="batch", disable=not world.is_main, desc="sampling"):
        index = torch.arange(start, min(start + batch_size, len(labels)))
        drawn[start] = sampler.images(index, labels[index])
    part = folder / f".part-{world.rank:05d}.npz"
    if world.size > 1:
        np.savez(part, **{str(k): v for k, v in drawn.items()})
    dist.barrier()
    if not world.is_main:
        return None
    if world.size > 1:
        for file in [folder / f".part-{rank:05d}.npz" for rank in range(world.size)]:
            with np.load(file) as held:
                drawn |= {int(k): held[k] for k in held.files}
            file.unlink()
    return np.concatenate([drawn[s] for s in starts])


def write(folder: Path, images: np.ndarray, labels: np.ndarray, spec: dict[str, Any]) -> None:
    """samples.npz, grid.png (at most 100 images, a column for each class up to 10) and spec.json."""
    (folder / "spec.json").unlink(missing_ok=True)  # never an old one beside new images
    np.savez(folder / ".samples.npz", images, labels)
    (folder / ".samples.npz").replace(folder / "samples.npz")
    grid = image_grid(images[:100], columns=min(10, len(spec["classes"])))
    Image.fromarray(grid).save(folder / "grid.png")
    text = json.dumps({**spec, "code": dist.code_version()}, indent=1) + "\n"
    write_atomically(folder / "spec.json", text.encode())
    print(f"{len(images)} images in {folder / 'samples.npz'}; look at {folder / 'grid.png'}")


if __name__ == "__main__":
    run(main)
