"""Train a diffusion or flow model, or go on with a run: start the same command again to resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen()  # before seconds of imports

import torch

from dit.cli import run
from dit.configfile import load
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.ranks.group import World
from dit.train import run_dir
from dit.train.engines.zero_config import Device, choose
from dit.train.hooks import held_out_hook
from dit.train.preflight.checks import check_and_print
from dit.train.start import device_peak, train


def main(
    config: Annotated[str, "a YAML file, see configs/"],
    *,
    dry_run: Annotated[bool, "print parameters, FLOPs, memory and hours, and train nothing"] = False,
    preflight: Annotated[bool, "check nodes, network, data and disk, and train nothing"] = False,
    **overrides: str,
) -> None:
    """Train in run_dir, or resume what is there.

    The same command resumes a run that was killed, on any number of ranks and at any ZeRO stage. On several
    devices start it through launch/local.sh, on a SLURM cluster through launch/multinode.sh.
    """
    if dry_run or preflight:
        early.end_if_asked()
    cfg = load(Experiment, config, overrides)
    if dry_run:
        print(report(cfg))
    elif preflight:
        check_and_print(cfg, lambda manifest: cfg.cost(manifest).parameters.trainable)
    else:
        train(cfg, make_parts)


def report(cfg: Experiment) -> str:
    """What the run will cost, computed from the config and the data's manifest; refuses what training would."""
    world, manifest = World.from_env(), cfg.data.open().manifest
    held_out_hook(cfg, manifest, cfg.task(manifest, world), world)
    if cfg.sample.every:
        cfg.open_codec(manifest, torch.device("cpu"))
    run_dir.compare(Path(cfg.run_dir) / run_dir.CONFIG, cfg)
    cost, train = cfg.cost(manifest), cfg.train
    micro, local = train.micro(world), train.local_batch(world)
    peak, images = device_peak(world.device) * world.size, train.steps * train.global_batch
    cfg.zero.check(world)
    frozen, device = cfg.frozen(manifest), Device.smallest(world)
    zero = choose(cfg.zero, lambda stage: cfg.memory(manifest, world, stage, frozen), device)
    memory = cfg.memory(manifest, world, zero.stage, frozen)
    need, activations = zero.zero.needs(memory, zero.stage, device) / 2**30, memory.activations / 2**30
    table, half, fifth = (
        cost.parameters.position,
        cost.hours(images, peak, 0.5),
        cost.hours(images, peak, 0.2),
    )
    gflop, flop = cost.training_flops / 1e9, cost.training_flops * images
    macs, forward = cost.multiply_adds / 1e9, cost.forward_flops / 1e9
    rows = {
        "parameters": f"{cost.parameters.trainable - frozen:,} trained (+ {table:,} in the position table"
        + (f", {frozen:,} frozen)" if frozen else ")"),
        "forward": f"{macs:.3f} G multiply-adds an image = {forward:.3f} GFLOP",
        "training": f"{gflop:.3f} GFLOP an image, {flop:.3g} in all",
        "data": f"{manifest.samples:,} samples of {manifest.shape}, {images / manifest.samples:.1f} epochs",
        "batch": f"{train.global_batch} = {world.size} ranks x {micro} x {local // micro} accumulated",
        "memory": f"{need:.2f} GiB a rank, of it activations {activations:.2f}",
        **({"sharding": zero.why} if zero.why else {}),
        "peak": f"{peak / 1e12:.2f} TFLOP/s over {world.size} device(s)",
        "hours": f"{half:.3g} at 50% MFU, {fifth:.3g} at 20%",
    }
    return "\n".join(f"{name:11s} {text}" for name, text in rows.items())


if __name__ == "__main__":
    run(main, config=Experiment)
