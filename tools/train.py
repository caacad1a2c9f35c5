"""Train a diffusion or flow model, or go on with a run: start the same command again to resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.cli import run
from dit.configfile import load
from dit.data.manifest import Manifest
from dit.experiment import Experiment
from dit.train.start import train


def main(
    config: Annotated[str, "a YAML file, see configs/"],
    *,
    dry_run: Annotated[bool, "print parameters, FLOPs, memory and hours, and train nothing"] = False,
    **overrides: str,
) -> None:
    """Train in run_dir, or resume what is there.

    The same command resumes a run that was killed, on any number of ranks and at any ZeRO stage. On several
    devices start it through launch/local.sh, on a SLURM cluster through launch/multinode.sh.
    """
    cfg = load(Experiment, config, overrides)
    if dry_run:
        print(report(cfg))
    else:
        train(cfg, cfg.make_parts)


def report(cfg: Experiment) -> str:
    """What the run will cost, computed from the config and the data's manifest."""
    from dit.dist import World
    from dit.train.start import device_peak

    world, manifest = World.from_env(), Manifest.load(cfg.data.path)
    cost, micro = cfg.cost(manifest), cfg.train.micro(World(0, world.size))
    peak = device_peak(world.device) * world.size
    memory = cost.memory(
        micro, zero_stage=cfg.zero.stage, world_size=world.size, precision=cfg.train.precision
    )
    images = cfg.train.steps * cfg.train.global_batch
    rows = [
        (
            "parameters",
            f"{cost.parameters.trainable:,} trained (+ {cost.parameters.position:,} in the position table)",
        ),
        (
            "forward",
            f"{cost.multiply_adds / 1e9:.3f} G multiply-adds an image = {cost.forward_flops / 1e9:.3f} GFLOP",
        ),
        (
            "training",
            f"{cost.training_flops / 1e9:.3f} GFLOP an image, {cost.training_flops * images:.3g} in all",
        ),
        ("data", f"{manifest.samples:,} samples of {manifest.shape}, {images / manifest.samples:.1f} epochs"),
        ("batch", f"{cfg.train.global_batch} = {world.size} ranks x {cfg.train.micro(world)} x accumulation"),
        (
            "memory",
            f"{memory.total / 2**30:.2f} GiB a rank, of it activations {memory.activations / 2**30:.2f}",
        ),
        ("peak", f"{peak / 1e12:.2f} TFLOP/s over {world.size} device(s)"),
        (
            "hours",
            f"{cost.hours(images, peak, 0.5):.3g} at 50% MFU, {cost.hours(images, peak, 0.2):.3g} at 20%",
        ),
    ]
    return "\n".join(f"{name:11s} {text}" for name, text in rows)


if __name__ == "__main__":
    run(main, config=Experiment)
