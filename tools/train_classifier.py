"""Train a classifier of noisy latents for classifier guidance, or go on: start the same command again to resume."""

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
from dit.experiments.classifier import ClassifierExperiment
from dit.train.command import start


def main(
    config: Annotated[str, "a YAML file such as configs/digits_classifier.yaml"],
    *,
    dry_run: Annotated[bool, "print parameters, FLOPs, memory and hours, and train nothing"] = False,
    preflight: Annotated[bool, "check nodes, network, data and disk, and train nothing"] = False,
    **overrides: str,
) -> None:
    """Train a classifier in run_dir, or resume what is there.

    The data and objective.path are those of the model that it will guide. The held-out accuracy is in
    RUN_DIR/held_out.jsonl. To guide with it:
    tools/sample.py RUN --out=DIR --guidance='[{name: classifier, checkpoint: RUN_DIR, scale: 2}]'
    """
    cfg = load(ClassifierExperiment, config, overrides)
    start(cfg, ClassifierExperiment.make_parts, dry_run=dry_run, preflight=preflight)


TOOL = Tool(main, config=ClassifierExperiment)

if __name__ == "__main__":
    run(TOOL)
