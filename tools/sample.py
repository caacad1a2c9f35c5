"""Draw images from a trained model."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.cli import UsageError, run
from dit.config import ConfigError, Registry, from_dict, to_dict
from dit.configfile import overridden
from dit.data.shards.pairs import Origin, PairWriter, writing
from dit.experiments.trained import Trained
from dit.files import expand, write_atomically
from dit.ranks import group
from dit.sample.generate import Sampler, SamplerSpec, image_grid, labels_for, to_uint8
from dit.sample.grid import GRIDS
from dit.sample.guide import GUIDANCES
from dit.sample.solve import SOLVERS
from dit.sample.tally import Tally
from dit.version import code_version

CHOICES: dict[str, Registry[Any]] = {"solver": SOLVERS, "grid": GRIDS, "guidance": GUIDANCES}


def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    *,
    out: Annotated[str | None, "folder for samples.npz, grid.png and spec.json"] = None,
    save_pairs: Annotated[str | None, "new folder for noise and latents: the data of a reflow"] = None,
    num_samples: Annotated[int, "images in all"] = 64,
    classes: Annotated[str, "all, or numbers like 0,3; image i is of classes[i mod n]"] = "all",
    cfg_scale: Annotated[float, "null + scale * (cond - null); 1 = no guidance"] = 1.0,
    guidance: Annotated[
        str | None, "in turn: '{name: cfg, scale: 2, interval: [0.2, 0.7]}, {name: ...}'"
    ] = None,
    solver: Annotated[str, "how steps are taken; its fields are --solver.field=value"] = "heun",
    num_steps: Annotated[int, "steps of the solver"] = 50,
    grid: Annotated[str, "which times it visits; its fields are --grid.field=value"] = "uniform",
    shift: Annotated[float | None, "time shift of the grid, the same as --grid.shift; 1 = none"] = None,
    seed: Annotated[int, "of the noise; image i has its own"] = 0,
    batch_size: Annotated[int, "images at a time and rank"] = 64,
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    **solver_grid_codec_keys: str,
) -> None:
    """Draw images: integrate the probability-flow ODE or the SDE, with guidance.

    Writes samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: int64 labels, the ADM suite's format), grid.png and
    spec.json. Image i depends on the checkpoint, the spec and i alone, not on batch size or number of ranks.

    --codec.path=FOLDER says where the VAE is, if not where training had it; --codec.dtype=bfloat16 decodes faster.
    --save_pairs=DIR writes a data set of latents and the noise they were made from, for objective.coupling=reflow.
    """
    if min(num_samples, batch_size) < 1:
        raise ConfigError(f"num_samples {num_samples} and batch_size {batch_size} must be at least 1")
    given = {"solver": solver, "num_steps": num_steps, "cfg_scale": cfg_scale, "seed": seed, "grid": grid}
    spec, codec_keys = read_spec(given, solver_grid_codec_keys, shift, guidance)
    check_wanted(out, save_pairs, spec)
    with group.session() as world:
        trained = Trained.load(run_or_ckpt, weights, world.device)
        chosen = trained.classes(classes)
        check_effect(spec, chosen, trained, world)
        chosen_precision = trained.experiment.train.precision if precision == "run" else precision
        sampler = trained.sampler(spec, codec_keys if out else None, world.device, chosen_precision)
        _ = sampler.denoise  # opens what guidance names, before anything is drawn
        about = described(trained, sampler) | {"codec": codec_keys, "precision": chosen_precision}
        about |= {"classes": chosen, "batch_size": batch_size, "num_samples": num_samples}
        labels, origin = labels_for(torch.arange(num_samples), chosen), Origin.of(trained.contract, spec.seed)
        produce(
            sampler, labels, batch_size, world, Path(expand(out)) if out else None, save_pairs, origin, about
        )


def produce(
    sampler: Sampler,
    labels: torch.Tensor,
    batch_size: int,
    world: group.World,
    out: Path | None,
    save_pairs: str | None,
    origin: Origin,
    about: dict[str, Any],
) -> None:
    """Draw, and write what is wanted of it: pictures in `out`, noise and latents in `save_pairs`."""
    with contextlib.nullcontext() if save_pairs is None else writing(save_pairs, origin, about) as pairs:
        images = draw(sampler, labels, batch_size, out, world, pairs)
    tally = Tally.sum(group.gather_objects(sampler.tally))
    if out is not None and images is not None:
        write(out, images, labels.numpy(), {**about, **tally.per_image()})
    if save_pairs is not None and world.is_main:
        print(f"{len(labels)} pairs in {save_pairs}: train on them with objective.coupling=reflow")


def check_effect(spec: SamplerSpec, chosen: list[int], trained: Trained, world: group.World) -> None:
    """Refuse guidance that would cost as always and change nothing; note where the run's own pictures differ."""
    if spec.needs_label and set(chosen) == {-1} and trained.contract["classes"]:
        raise ConfigError(
            "guidance by class has no effect on --classes=-1, no class; leave one of the two out"
        )
    own = trained.experiment.sample
    differing = [
        f"--{key}={registry.name_of(getattr(own, key))}"
        for key, registry in (("solver", SOLVERS), ("grid", GRIDS))
        if registry.name_of(getattr(own, key)) != registry.name_of(getattr(spec, key))
    ]
    if differing and world.is_main:
        print(f"note: this run's own config draws with {' '.join(differing)}")


def described(trained: Trained, sampler: Sampler) -> dict[str, Any]:
    """What made the samples: the models, the spec, the machine and the code."""
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "weights": trained.weights,
        "guidance_checkpoints": sampler.open.opened if sampler.open else {},
        "sampler": to_dict(sampler.spec),
        "device": sampler.device.type,
        "code": code_version(),
    }


def check_wanted(out: str | None, save_pairs: str | None, spec: SamplerSpec) -> None:
    """Refuse to draw for nobody, and pairs that belong together only in part."""
    if not out and not save_pairs:
        raise UsageError("missing --out (a folder for pictures) or --save_pairs (one for noise and latents)")
    if save_pairs and spec.solver.stochastic:
        raise ConfigError(
            f"--save_pairs with the solver {SOLVERS.name_of(spec.solver)}: it adds noise on the way, so what it ends "
            "in is not a function of the noise that it starts from; take an ODE solver, such as heun"
        )


def read_spec(
    values: Mapping[str, Any], given: Mapping[str, str], shift: float | None, guidance: str | None
) -> tuple[SamplerSpec, dict[str, str]]:
    """The spec of the plain values with the command line's keys over them; and the codec's keys as given.

    ConfigError for a key that is given twice.
    """
    codec = {key: text for key, text in given.items() if key.startswith("codec")}
    keys = [
        (re.sub(r"^(solver|grid)_", r"\1.", key), text) for key, text in given.items() if key not in codec
    ]
    keys += [("grid.shift", str(shift))] if shift is not None else []
    if guidance is not None:
        keys.append(("guidance", guidance if guidance.startswith("[") else f"[{guidance}]"))
    twice = [key for key, count in Counter(key for key, _ in keys).items() if count > 1]
    if twice:
        raise ConfigError(f"--{twice[0]} is given twice")
    return from_dict(SamplerSpec, overridden(SamplerSpec, values, dict(keys))[0]), codec


def draw(
    sampler: Sampler,
    labels: torch.Tensor,
    batch_size: int,
    folder: Path | None,
    world: group.World,
    pairs: PairWriter | None = None,
) -> np.ndarray | None:
    """(N, H, W, 3) uint8 on rank 0, None elsewhere. Ranks take whole batches in turn: the same batches on any.

    folder: where images are gathered; without one none are decoded. pairs: takes the latents and their noise.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(labels), batch_size)
    mine = starts[world.rank :: world.size]
    drawn = {}
    for start in tqdm(mine, unit="batch", disable=not world.is_main, desc="sampling"):
        index = torch.arange(start, min(start + batch_size, len(labels)))
        latents = sampler.latents(index, labels[index])
        if pairs is not None:
            pairs.add(index, latents, sampler.noise(index), labels[index])
        if folder is not None:
            drawn[start] = to_uint8(sampler.decode(latents))
    return None if folder is None else gathered(drawn, folder, world)


def gathered(drawn: dict[int, np.ndarray], folder: Path, world: group.World) -> np.ndarray | None:
    """The images of all ranks in order, on rank 0; each gives {first index: its images}."""
    part = folder / f".part-{world.rank:05d}.npz"
    if world.size > 1:
        np.savez(part, **{str(k): v for k, v in drawn.items()})
    group.barrier()
    if not world.is_main:
        return None
    if world.size > 1:
        for file in [folder / f".part-{rank:05d}.npz" for rank in range(world.size)]:
            with np.load(file) as held:
                drawn |= {int(k): held[k] for k in held.files}
            file.unlink()
    return np.concatenate([drawn[s] for s in sorted(drawn)])


def write(folder: Path, images: np.ndarray, labels: np.ndarray, spec: dict[str, Any]) -> None:
    """samples.npz, grid.png (at most 100 images, a column for each class up to 10) and spec.json."""
    (folder / "spec.json").unlink(missing_ok=True)  # never an old one beside new images
    np.savez(folder / ".samples.npz", images, labels)
    (folder / ".samples.npz").replace(folder / "samples.npz")
    grid = image_grid(images[:100], columns=min(10, len(spec["classes"])))
    Image.fromarray(grid).save(folder / "grid.png")
    write_atomically(folder / "spec.json", (json.dumps(spec, indent=1) + "\n").encode())
    print(f"{len(images)} images in {folder / 'samples.npz'}; look at {folder / 'grid.png'}")


if __name__ == "__main__":
    run(main, choices=CHOICES)
