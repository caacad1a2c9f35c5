"""How good samples are for how many evaluations of the network: solvers against each other on trained runs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

import torch

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.config import ConfigError, from_dict
from dit.evals.budget_table import BudgetTable
from dit.evals.budgets import FrechetTo, budgeted
from dit.experiments.trained import Trained
from dit.files import expand
from dit.progress import Bar
from dit.ranks import group
from dit.sample.generate import SamplerSpec, labels_for
from dit.sample.solve import SOLVERS


def main(
    runs: Annotated[str, "run directories or checkpoints, comma-separated, each as NAME=PATH or PATH"],
    *,
    out: Annotated[str, "where to write OUT.json, OUT.md and OUT.png"],
    reference: Annotated[str, "images to compare with: a folder, a tar, or digits:train"],
    floor: Annotated[str | None, "more real images, whose distance is the best to hope for"] = None,
    solvers: Annotated[str, "names of solvers, comma-separated"] = "euler,heun,dpmpp_2m,unipc,rk4",
    nfe: Annotated[str, "evaluations of the denoiser per image, comma-separated"] = "2,4,8,16,32,64",
    grid: Annotated[str, "which times they visit"] = "uniform",
    num_samples: Annotated[int, "images for each figure"] = 500,
    cfg_scale: Annotated[float, "guidance; its second branch is not counted in the evaluations"] = 1.0,
    components: Annotated[int, "principal components of the reference's pixels that are compared"] = 32,
    seed: Annotated[int, "of the noise; for a reflow another than its pairs were made with"] = 0,
    batch_size: Annotated[int, "images at a time"] = 100,
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    overwrite: Annotated[bool, "replace figures of another protocol there"] = False,
) -> None:
    """Draw images with every solver at every budget and write a table of Fréchet distances, with a plot.

    The distance is taken in principal components of the reference's pixels: it is no FID, and comparable with
    nothing but figures of the same protocol. A solver takes as many steps as the budget allows; a budget below
    its first step is left empty. All figures of a run share their noise. Start it again to go on where it was.
    """
    if num_samples <= components:
        raise ConfigError(f"num_samples {num_samples} must be more than the {components} components compared")
    budgets, chosen = numbers(nfe), {name: SOLVERS[name]() for name in solvers.split(",")}
    protocol = {"reference": reference, "components": components, "num_samples": num_samples}
    protocol |= {"cfg_scale": cfg_scale, "grid": grid, "seed": seed, "weights": weights}
    spec = from_dict(SamplerSpec, {"grid": grid, "seed": seed})
    with group.session() as world:
        table = BudgetTable(Path(expand(out)), protocol, overwrite)
        for name, path in named(runs).items():
            trained = Trained.load(path, weights, world.device)
            trained.say_weights(f"{name}: ")
            first = trained.sampler(spec, {}, world.device, "fp32")
            compare = FrechetTo(reference, components, trained.contract["image_size"])
            if floor is not None:
                table.measure({"run": name, "solver": "real images"}, partial(compare.real, floor))
            labels = labels_for(torch.arange(num_samples), trained.classes("all"))
            row = {"run": name, "checkpoint": str(trained.path)}
            cells = list(budgeted(first, chosen, budgets, cfg_scale))
            for cell, sampler in Bar(cells, total=len(cells), unit="cell", desc=name):
                table.measure(row | cell, partial(compare.drawn, sampler, labels, batch_size))
        table.write()
    print(table.markdown(), f"{out}.md, {out}.png, {out}.json", sep="\n")


def numbers(nfe: str) -> list[int]:
    """The budgets in "2,4,8"; ConfigError for anything but whole numbers above 0."""
    if not all(word.isdecimal() and int(word) for word in nfe.split(",")):
        raise ConfigError(f"nfe must be whole numbers above 0 like 2,4,8; got {nfe}")
    return [int(word) for word in nfe.split(",")]


def named(runs: str) -> dict[str, str]:
    """{name: path} of "a=runs/x,runs/y"; without a name the path is one. ConfigError where one comes twice."""
    pairs = [(word.partition("=")[0], word.partition("=")[2] or word) for word in runs.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise ConfigError(f"two runs have one name in {runs}: write NAME=PATH")
    return dict(pairs)


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
