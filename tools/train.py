"""Train a diffusion or flow model, or go on with a run: start the same command again to resume."""

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
from dit.experiments.diffusion import Experiment
from dit.experiments.parts import make_parts
from dit.train.command import start


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
    start(load(Experiment, config, overrides), make_parts, dry_run=dry_run, preflight=preflight)


TOOL = Tool(main, config=Experiment)

if __name__ == "__main__":
    run(TOOL)
