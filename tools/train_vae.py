"""Stage 1: train a KL or VQ autoencoder on pixel shards, or go on with it: start the same command again to resume."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen()  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.configfile import load
from dit.experiments.autoencoder import AutoencoderExperiment, export
from dit.ranks.group import World
from dit.stage1.figures import figures_line, newest
from dit.train.command import start


def main(
    config: Annotated[str, "a YAML file such as configs/digits_vae.yaml"],
    *,
    weights: Annotated[str, "which go to RUN_DIR/vae: ema, model, or another average, as ema_0.999"] = "ema",
    dry_run: Annotated[bool, "print parameters, FLOPs, memory and hours, and train nothing"] = False,
    preflight: Annotated[bool, "check nodes, network, data and disk, and train nothing"] = False,
    **overrides: str,
) -> None:
    """Train an autoencoder in run_dir, or resume what is there, and write it to RUN_DIR/vae.

    The data are pixel shards (tools/encode.py IMAGES OUT --codec=pixels). RUN_DIR/vae is a diffusers folder for
    tools/encode.py --codec=vae --codec.path=RUN_DIR/vae. With data.val and val.every it tells the PSNR and SSIM of
    held-out images; discriminator.weight, perceptual.weights and the like turn on what is off by default.
    """
    cfg = load(AutoencoderExperiment, config, overrides)
    cfg.ema.check_name(weights)
    trained = start(cfg, AutoencoderExperiment.make_parts, dry_run=dry_run, preflight=preflight)
    if trained and World.from_env().is_main:
        done = export(cfg.run_dir, cfg.folder / "vae", weights)
        print(f"the autoencoder of step {done.step} is in {done.folder}: {done.average}")
        done.average.warn()
        figures = newest(cfg.folder, done.step)
        if figures is not None:
            print(figures_line(figures))


TOOL = Tool(main, config=AutoencoderExperiment)

if __name__ == "__main__":
    run(TOOL)
