"""Scaling-law experiments: `python tools/scaling.py plan SPEC`, then run, status, collect, fit and predict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run as run_tool
from dit.commandline.flags import options_as_flags
from dit.config import ConfigError
from dit.configfile import load
from dit.errors import UserError, plural
from dit.experiments.diffusion import Experiment
from dit.files import expand
from dit.model.cost import PEAK_FLOPS, peak_flops
from dit.outputs import claim_report, write_record
from dit.reports.scaling.material import read_material
from dit.reports.scaling.page import as_text as report_text
from dit.reports.scaling.page import write_report
from dit.scaling.arrays import submit
from dit.scaling.collecting import collect as collect_figures
from dit.scaling.collecting import warn_of_missing, write_table
from dit.scaling.floor.floors import PLANE
from dit.scaling.floor.toy import ToyLadder, run_toy
from dit.scaling.floor.toy import as_text as toy_text
from dit.scaling.laws import telling as laws_telling
from dit.scaling.laws.fitting import Order, fit_file
from dit.scaling.laws.predicting import Device
from dit.scaling.laws.predicting import predict as predict_optimum
from dit.scaling.laws.record import FILE, FitRecord
from dit.scaling.mup import telling
from dit.scaling.mup.coordinates import Check, Setting, measure
from dit.scaling.mup.transfer import Grid, Study, run_study
from dit.scaling.planned import as_table, opened, spec_of
from dit.scaling.recipes import with_recipe
from dit.scaling.running import Orders, run_plan
from dit.scaling.spec import load_spec
from dit.scaling.status import status as status_table

Where = Annotated[
    str, "spec, a YAML file as in configs/scaling, or the folder of an experiment that is planned"
]
Out = Annotated[str | None, "folder of the experiment, in place of the spec's `out`"]


def plan(
    spec: Annotated[str, "a YAML file, see configs/scaling"],
    *,
    out: Out = None,
) -> None:
    """Print what a spec comes to: runs, their sizes, samples, FLOPs and hours, and what cannot be run and why.

    Writes OUT/plan.json, OUT/plan.csv and OUT/plan/RUN.yaml, a whole config for each run, which tools/train.py takes.
    Planned again, an experiment may grow; runs that have begun stay what they are.
    """
    folder, planned = opened(spec, out, replan=True)
    of = spec_of(planned)
    print(as_table(planned, folder, str(of.device), of.ranks))


def run(
    spec: Where,
    *,
    out: Out = None,
    jobs: Annotated[int, "runs at a time, each a process (or `ranks` of them)"] = 1,
    only: Annotated[tuple[str, ...], "names of runs, comma-separated; none = all"] = (),
    slurm: Annotated[str | None, "submit job arrays instead, with these options of sbatch"] = None,
) -> None:
    """Run what is not complete: here, one run after the other, or as two SLURM job arrays.

    Trunks come before their branches. The same command again goes on: complete runs are left alone, others resume.
    A run that fails says why, its output is in OUT/logs, and the others go on; the exit status is 1 then. Ctrl-C and
    TERM have the runs save first.
    """
    folder, planned = opened(spec, out, replan=True)
    if slurm is not None:
        submit(folder, planned, slurm, only)
    else:
        run_plan(folder, planned, Orders(jobs, only, spec_of(planned).ranks))


def status(spec: Where, *, out: Out = None) -> None:
    """Print how far each run is, what it waits for or why it failed, and how long is left at the measured rate."""
    folder, planned = opened(spec, out)
    print(status_table(folder, planned, spec_of(planned).device.speed))


def collect(
    spec: Where,
    *,
    out: Out = None,
    metric: Annotated[
        str, "held_out_loss, or a figure in RUN/evaluations.jsonl, such as frechet"
    ] = "held_out_loss",
    protocol: Annotated[str | None, "hash of the figures' protocol, where there are several"] = None,
    partial: Annotated[bool, "take the newest figure of runs that are not complete too"] = False,
    table: Annotated[str | None, "CSV file to write; none = OUT/runs.csv"] = None,
) -> None:
    """Write the runs' figures as one CSV, which `fit` reads: params, samples, tokens, FLOPs, loss, seed.

    Losses are of EMA weights at the last step, on held-out samples, times and noise that are the same for every run.
    Figures of unlike protocols are refused, and runs that are missing named.
    """
    folder, planned = opened(spec, out)
    found = collect_figures(folder, planned, metric, protocol, partial)
    warn_of_missing(found)
    file = folder / "runs.csv" if table is None else Path(expand(table))
    write_table(found, file)
    print(
        f"{len(found.rows)} of {plural(len(planned.runs), 'run')}, {metric}, protocol {found.protocol}: {file}"
    )


def fit(
    runs: Annotated[
        str, "CSV with columns params, flops, loss; tokens, seed, complete, metric, protocol too"
    ],
    *,
    out: Annotated[str, "folder for fit.json and residuals.png; an earlier fit there is replaced"],
    metric: Annotated[str | None, "of which to take the rows, where the file has several"] = None,
    protocol: Annotated[str | None, "of which to take the rows, where the file has several"] = None,
    floor: Annotated[str, "E: fit; a number; or exact, as the column `floor` has it"] = "fit",
    bootstrap: Annotated[int, "resamples of the runs for 95% intervals, at least 100"] = 2000,
    seed: Annotated[int, "of the resamples alone"] = 0,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to runs, with intervals, and say what the data cannot carry.

    params is N, without embeddings where `collect` wrote the file; tokens is D, flops / (6 · params) where there is no
    such column. The Huber loss of log L (delta 1e-3) is minimised from many starts; docs/scaling.md says what fit.json
    holds. Rows that cannot be used are named with their lines, and nothing is written.
    """
    order = Order(Path(expand(runs)), metric, protocol, floor, bootstrap, seed)
    folder = Path(expand(out))
    laws_telling.claim_fit(folder)
    found = fit_file(order)
    laws_telling.write_fit(found, folder)
    print("\n".join(laws_telling.lines(found)))
    laws_telling.warn(found.warnings)
    print(f"{folder / FILE}, {folder / laws_telling.PICTURE}")


def report(
    fitted: Annotated[str, "fit.json, or its folder"],
    *,
    out: Annotated[str, "folder for report.html and a PNG of each figure"],
    runs: Annotated[
        str | None, "the CSV that was fitted: its lr, samples and evaluations give more figures"
    ] = None,
    flops: Annotated[float | None, "training FLOPs for which a prediction is wanted, such as 1e21"] = None,
    overwrite: Annotated[bool, "replace the report of another fit there"] = False,
) -> None:
    """Write a fit's report: one HTML page with figures and tables, PNG files, and the tables on the terminal.

    Equal FLOPs, the frontier, N_opt and D_opt with bands, residuals, learning rates, published laws beside it, and
    loss against sampling FLOPs. The page needs no network. docs/scaling.md says how each figure is read.
    """
    material = read_material(FitRecord.load(fitted), fitted, None if runs is None else Path(runs), flops)
    files = write_report(material, Path(expand(out)), overwrite)
    print(report_text(material))
    print(f"\n{files[0]}: the same with {len(files) - 1} figures, which are PNG files beside it too")


def predict(
    fitted: Annotated[str, "fit.json, or its folder"],
    *,
    flops: Annotated[float, "training FLOPs to spend, such as 1e21"],
    spec: Annotated[str | None, "a YAML file as in configs/scaling: its rules give batch and rate"] = None,
    tokens_per_sample: Annotated[
        float | None, "tokens of an image; none = as the fit's runs had them"
    ] = None,
    device: Annotated[str | None, f"for hours: {', '.join(PEAK_FLOPS)}"] = None,
    gpus: Annotated[int, "devices that share the work"] = 1,
    mfu: Annotated[float, "share of the device's peak that training is assumed to reach"] = 0.4,
    json_file: Annotated[str | None, "write the figures here too"] = None,
) -> None:
    """Print what a fit says of a budget: N, D, steps, batch and rate, the loss with its interval, and GPU-hours.

    Warnings of the fit are repeated: they hold of what it predicts. Hours need --device.
    """
    if json_file is not None:
        claim_report(Path(expand(json_file)))  # before the work
    peak = None if device is None else peak_flops(device)
    if device is not None and peak is None:
        raise UserError(f"--device={device}: its peak is not known; expected one of {', '.join(PEAK_FLOPS)}")
    if device is None and (gpus, mfu) != (1, 0.4):
        raise UserError("--gpus and --mfu say for how many hours of --device, which is not given")
    hours = None if device is None or peak is None else Device(device, peak, mfu, gpus)
    found = predict_optimum(FitRecord.load(fitted), flops, tokens_per_sample, hours)
    if spec is not None:
        found = with_recipe(found, load_spec(spec))
    print("\n".join(found.lines()))
    laws_telling.warn(found.warnings)
    if json_file is not None:
        place = Path(expand(json_file))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_record(place, found.as_json())


def toy(
    *,
    out: Annotated[str, "folder for runs.csv, toy.json and runs/; the same command goes on there"],
    problem: Annotated[str, f"whose floor is known: {', '.join(PLANE)}"] = "eight_gaussians",
    widths: Annotated[tuple[int, ...], "of the networks, comma-separated"] = ToyLadder.widths,
    steps: Annotated[tuple[int, ...], "of training, comma-separated"] = ToyLadder.steps,
    seeds: Annotated[tuple[int, ...], "of each, comma-separated"] = ToyLadder.seeds,
    overwrite: Annotated[bool, "replace another ladder there"] = False,
) -> None:
    """Train tiny networks on toy data whose irreducible loss is known, and compare laws with E fitted and E exact.

    The largest rung is predicted from the smaller ones, from all of them and from ever fewer. Takes ten minutes on a
    core; runs.csv has the exact floor as a column, so that `fit --floor=exact` takes it.
    """
    ladder = ToyLadder(problem, tuple(widths), tuple(steps), tuple(seeds))
    print(toy_text(run_toy(ladder, Path(expand(out)), overwrite)))


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


@options_as_flags
def transfer(
    config: Annotated[str, "a YAML file, see configs/; with data.val"],
    *,
    out: Annotated[str, "folder of the study: its runs, transfer.md, transfer.csv and transfer.png"],
    grid: Grid,
    jobs: Annotated[int, "runs at a time, each a process"] = 1,
    **overrides: str,
) -> None:
    """Train every width at every learning rate and seed, and say whether the best rate of the least is that of all.

    What counts is the held-out loss at the last step. Each run is one of tools/train.py, in OUT/runs; the same command
    again goes on, also with more rates, seeds or widths. docs/scaling.md says how to read the verdict.
    """
    print(run_study(Study(load(Experiment, config, overrides), grid, Path(expand(out))), Orders(jobs)))


TOOL = Tool(
    {
        "plan": plan,
        "run": run,
        "status": status,
        "collect": collect,
        "fit": fit,
        "report": report,
        "predict": predict,
        "toy": toy,
        "coordinates": coordinates,
        "transfer": transfer,
    },
    config=Experiment,
)

if __name__ == "__main__":
    run_tool(TOOL)
