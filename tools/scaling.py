"""Experiments over sizes: `python tools/scaling.py coordinates`, `... transfer CONFIG --out=DIR`."""

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
from dit.commandline.flags import options_as_flags
from dit.config import ConfigError
from dit.configfile import load
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.scaling import telling
from dit.scaling.coordinates import Check, Setting, measure


@options_as_flags
def coordinates(
    config: Annotated[str | None, "a YAML file, see configs/; none = a nano DiT on random latents"] = None,
    *,
    out: Annotated[str, "folder for coordinates.png, coordinates.csv and coordinates.json"],
    check: Check,
    overwrite: Annotated[bool, "replace another check there"] = False,
    **overrides: str,
) -> None:
    """Measure how activations go with the width after a few steps: flat by maximal updates, growing without.

    Each parametrization is trained at every width and seed on one batch, and the root mean square of the change of what
    every kind of layer gives out is fitted as a power of the width. docs/scaling.md says how to read it.
    """
    if config is None and overrides:
        raise ConfigError(f"--{next(iter(overrides))} is a key of a configuration, and none is given")
    setting = (
        Setting.synthetic(check) if config is None else Setting.of(load(Experiment, config, overrides), check)
    )
    place, made = Path(expand(out)), telling.protocol(setting, check)
    telling.claim_files(place, made, overwrite)
    found = measure(setting, check)
    telling.write(found, place, made)
    print(telling.table(found), *map(found.verdict, check.parametrizations), sep="\n")
    print(*(f"{place / name}" for name in telling.FILES), sep="\n")


TOOL = Tool({"coordinates": coordinates}, config=Experiment)

if __name__ == "__main__":
    run(TOOL)
