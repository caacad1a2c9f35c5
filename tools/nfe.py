"""How good samples are for how many evaluations of the network: solvers against each other on trained runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from dit.cli import run
from dit.config import ConfigError, from_dict
from dit.data.sources.images import open_source
from dit.evals.features import Pca
from dit.evals.frechet import Gaussian, frechet_distance
from dit.evals.protocol import protocol_hash
from dit.experiments.trained import Trained
from dit.files import expand, read_text, write_atomically
from dit.ranks import group
from dit.sample.generate import Sampler, SamplerSpec, labels_for
from dit.sample.solve import SOLVERS, Solver


def main(
    runs: Annotated[str, "run directories or checkpoints, comma-separated, each as NAME=PATH or PATH"],
    *,
    out: Annotated[str, "where to write OUT.json, OUT.md and OUT.png"],
    reference: Annotated[str, "images to compare with: a folder, a tar, or digits:train"],
    floor: Annotated[str | None, "more real images, whose distance is the best to hope for"] = None,
    solvers: Annotated[str, "names, comma-separated"] = "euler,heun,dpmpp_2m,unipc,rk4",
    nfe: Annotated[str, "evaluations of the denoiser per image, comma-separated"] = "2,4,8,16,32,64",
    grid: Annotated[str, "times visited"] = "uniform",
    num_samples: Annotated[int, "images for each figure"] = 500,
    cfg_scale: Annotated[float, "guidance; its second branch is not counted in the evaluations"] = 1.0,
    components: Annotated[int, "principal components of the reference's pixels that are compared"] = 32,
    seed: Annotated[int, "of the noise; for a reflow another than its pairs were made with"] = 0,
    batch_size: Annotated[int, "images at a time"] = 100,
) -> None:
    """Draw images with every solver at every budget and write a table of Fréchet distances, with a plot.

    The distance is taken in principal components of the reference's pixels: it is no FID, and comparable with
    nothing but figures of the same protocol. A solver takes as many steps as the budget allows; a budget below
    its first step is left empty. All figures of a run share their noise. Start it again to go on where it was.
    """
    if num_samples <= components:
        raise ConfigError(f"num_samples {num_samples} must be more than the {components} components compared")
    budgets = numbers(nfe)
    chosen = {name: SOLVERS[name]() for name in solvers.split(",")}
    protocol = {"reference": reference, "components": components, "num_samples": num_samples}
    protocol |= {"cfg_scale": cfg_scale, "grid": grid, "seed": seed, "weights": "ema"}
    spec = from_dict(SamplerSpec, {"grid": grid, "seed": seed})
    with group.session() as world:
        table = Table(Path(expand(out)), protocol)
        for name, path in named(runs).items():
            trained = Trained.load(path, "ema", world.device)
            first = trained.sampler(spec, {}, world.device, "fp32")
            compare = Comparison(reference, components, trained.contract["image_size"])
            real = {"run": name, "solver": "real images"}
            if floor is not None and not table.has(real):
                table.add({**real, "frechet": compare(compare.load(floor))})
            labels = labels_for(torch.arange(num_samples), trained.classes("all"))
            for cell, sampler in tqdm(list(cells(first, chosen, budgets, cfg_scale)), desc=name):
                row = {"run": name, "checkpoint": str(trained.path), **cell}
                if not table.has(row):
                    table.add({**row, "frechet": compare(draw(sampler, labels, batch_size))})
        table.write()
    print(f"{out}.md, {out}.png, {out}.json")


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


def cells(
    sampler: Sampler, solvers: dict[str, Solver], budgets: Sequence[int], cfg_scale: float
) -> Iterator[tuple[dict[str, Any], Sampler]]:
    """(what is drawn, its sampler) for every solver and every budget that it can meet."""
    for name, solver in solvers.items():
        for budget in budgets:
            spec = replace(sampler.spec, solver=solver, cfg_scale=cfg_scale)
            found = most_steps(replace(sampler, spec=spec), budget)
            if found is not None:
                row = {"solver": name, "budget": budget, "num_steps": found.spec.num_steps, "nfe": found.nfe}
                yield row, found


def most_steps(sampler: Sampler, budget: int) -> Sampler | None:
    """The sampler with as many steps as `budget` evaluations allow; None where they do not allow one.

    ConfigError for a solver that chooses its own steps.
    """
    best = None
    for num_steps in range(1, budget + 1):
        tried = replace(sampler, spec=replace(sampler.spec, num_steps=num_steps))
        if tried.nfe is None:
            raise ConfigError(f"{sampler.spec.solver} chooses its own steps: it cannot be given a budget")
        if tried.nfe <= budget:
            best = tried
    return best


def draw(sampler: Sampler, labels: torch.Tensor, batch_size: int) -> np.ndarray:
    """(N, H, W, 3) uint8: images 0 ... N - 1 of these labels (N,)."""
    parts = torch.arange(len(labels)).split(batch_size)
    return np.concatenate([sampler.images(index, labels[index]) for index in parts])


class Comparison:
    """Fréchet distance of images to a reference set in principal components of the reference."""

    def __init__(self, reference: str, components: int, size: int):
        self.size = size
        images = self.load(reference)
        self._features = Pca.fit(images, components)
        self._target = Gaussian.fit(self._features(images))

    def load(self, source: str) -> np.ndarray:
        """(N, H, W, 3) uint8 of a source of images."""
        opened = open_source(source)
        return np.stack([opened.load(i, self.size) for i in range(len(opened))])

    def __call__(self, images: np.ndarray) -> float:
        return frechet_distance(Gaussian.fit(self._features(images)), self._target)


@dataclass
class Table:
    """The figures, kept in OUT.json as they come in, so that nothing is drawn twice."""

    out: Path
    protocol: dict[str, Any]

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            try:
                held = json.loads(read_text(self.file))
            except ValueError as error:
                raise ConfigError(f"{self.file} is not JSON ({error}): remove it") from None
            if held["protocol"] != self.protocol:
                raise ConfigError(
                    f"{self.file} was made with another protocol ({held['protocol']}, now {self.protocol}): "
                    "remove it or choose another --out"
                )
            self.rows = held["rows"]

    @property
    def file(self) -> Path:
        """Where the figures are kept."""
        return self.out.with_name(f"{self.out.name}.json")

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this cell was measured."""
        return any(all(held.get(key) == value for key, value in row.items()) for held in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a figure."""
        self.rows.append(row)
        values = {"protocol": self.protocol, "hash": protocol_hash(self.protocol), "rows": self.rows}
        write_atomically(self.file, (json.dumps(values, indent=1) + "\n").encode())

    def write(self) -> None:
        """The table and the picture."""
        write_atomically(self.out.with_name(f"{self.out.name}.md"), self.markdown().encode())
        self.plot(self.out.with_name(f"{self.out.name}.png"))

    def drawn(self) -> list[dict[str, Any]]:
        """Rows of generated images, as opposed to real ones."""
        return [row for row in self.rows if "budget" in row]

    def floor(self) -> float | None:
        """The distance of real images."""
        return next((row["frechet"] for row in self.rows if "budget" not in row), None)

    def markdown(self) -> str:
        """A line for each run and solver, a column for each budget; the best of a column and run is bold."""
        budgets = sorted({row["budget"] for row in self.drawn()})
        lines = [
            "| run | solver | " + " | ".join(f"NFE {b}" for b in budgets) + " |",
            "|---|---|" + "---|" * len(budgets),
        ]
        found = {(r["run"], r["solver"], r["budget"]): r["frechet"] for r in self.drawn()}
        for name, solver in dict.fromkeys((r["run"], r["solver"]) for r in self.drawn()):
            words = []
            for b in budgets:
                best = min(v for (n, _, budget), v in found.items() if (n, budget) == (name, b))
                value = found.get((name, solver, b))
                words.append("" if value is None else f"**{value:.2f}**" if value == best else f"{value:.2f}")
            lines.append(f"| {name} | {solver} | " + " | ".join(words) + " |")
        if self.floor() is not None:
            lines.append(f"\nReal images: {self.floor():.2f}.")
        return "\n".join(
            [*lines, f"\nProtocol {protocol_hash(self.protocol)}: `{json.dumps(self.protocol)}`\n"]
        )

    def plot(self, file: Path) -> None:
        """Distance against evaluations, a panel for each run."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        runs = list(dict.fromkeys(row["run"] for row in self.drawn()))
        figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3.8), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], runs, strict=True):
            mine = [row for row in self.drawn() if row["run"] == name]
            for solver in dict.fromkeys(row["solver"] for row in mine):
                points = sorted((r["nfe"], r["frechet"]) for r in mine if r["solver"] == solver)
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=solver)
            if self.floor() is not None:
                axis.axhline(self.floor(), color="grey", linestyle="--", linewidth=1, label="real images")
            axis.set(xscale="log", yscale="log", title=name, xlabel="evaluations of the denoiser per image")
            axis.set_xticks(sorted({row["budget"] for row in mine}))
            axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
            for each in (axis.xaxis, axis.yaxis):
                each.set_major_formatter(mpl.ticker.ScalarFormatter())
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("Fréchet distance to the training images")
        axes[0][-1].legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(file, dpi=130)
        plt.close(figure)


if __name__ == "__main__":
    run(main)
