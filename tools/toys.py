"""Couplings in the plane: what optimal transport and reflow do to the paths of a flow, measured and drawn."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.config import ConfigError
from dit.evals.plane import PROBLEMS, PROTOCOL, Budget, floor, judge, train
from dit.evals.plane_report import TITLES, draw_picture, write_report
from dit.files import expand
from dit.outputs import claim
from dit.progress import Bar


def main(
    *,
    out: Annotated[str, "where to write OUT.json and OUT.md"],
    pictures: Annotated[
        str | None, "folder for toys_moons.png and toys_checkerboard.png; none = OUT's"
    ] = None,
    steps: Annotated[int, "training steps of each network"] = 2000,
    seed: Annotated[int, "of all that is drawn"] = 0,
    overwrite: Annotated[bool, "replace what is there"] = False,
) -> None:
    """Train small networks on problems in the plane, with each coupling, and write a table and a picture of each.

    Eight Gaussians to two moons, and Gaussian noise to a checkerboard: with noise and data paired independently, by
    minibatch optimal transport, and by the ODE of each of these two flows (reflow). Takes a minute or two on a core.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    budget, started = Budget(steps=steps, seed=seed), time.process_time()
    place, protocol = Path(expand(out)), {**asdict(budget), **PROTOCOL}
    drawn = {name: Path(expand(pictures or str(place.parent))) / f"toys_{name}.png" for name in PROBLEMS}
    record, table_file = (place.with_name(f"{place.name}.{ending}") for ending in ("json", "md"))
    files = [record, table_file, *drawn.values()]
    if claim(files, {"protocol": protocol}, record=record, overwrite=overwrite) is not None:
        print(
            f"{record}, {table_file}: made already by the same protocol; give --overwrite to make them anew"
        )
        return
    table: dict[str, dict[str, Any]] = {}
    with Bar[None](total=len(PROBLEMS) * len(TITLES) * steps, unit="step", desc="toys") as bar:
        for name, problem in PROBLEMS.items():
            flows = train(problem, budget, bar.update)
            table[name] = {coupling: judge(problem, flow, seed) for coupling, flow in flows.items()}
            table[name]["floor"] = floor(problem, seed)
            draw_picture(problem, flows, table[name], seed, drawn[name])
    seconds = time.process_time() - started
    write_report(place, table, protocol, seconds)


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
