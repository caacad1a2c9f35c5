"""A plan on disk: OUT/plan.json, OUT/plan.csv and a config for each run; and what an earlier plan there binds."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dit.config import ConfigError, from_dict
from dit.configfile import write_yaml
from dit.data import DataError
from dit.data.shards.manifest import Manifest
from dit.errors import Notice, UserError, plural, shown
from dit.experiments.diffusion import Experiment
from dit.files import as_csv, expand, write_atomically
from dit.outputs import OutputError, read_record, refuse_other, write_record
from dit.scaling.configs import RUNS, branch_point, config_file, overridden, run_config, run_folder
from dit.scaling.plan import Plan, PlannedRun
from dit.scaling.planning import make_plan
from dit.scaling.spec import ScalingSpec, load_spec, shared_config
from dit.scaling.states import RunState, last_step
from dit.train.run_dir import begun_with, differences

PLAN, TABLE, KIND = "plan.json", "plan.csv", "folder of a scaling experiment"


class ScalingError(UserError):
    """A scaling experiment cannot be planned, run or collected as it was asked for."""


def plan_into(spec: ScalingSpec) -> Plan:
    """Plan an experiment and write the plan; runs that have begun must stay what they are. Raises ScalingError."""
    out = spec.folder
    refuse_other(out, KIND)
    held = _begun(out)
    plan = make_plan(
        spec, [name for name, begun in held.items() if begun.get("init", {}).get("branch") is None]
    )
    configs = {run.name: run_config(spec, plan, run) for run in plan.runs}
    problems = [line for run in plan.runs for line in changed(out, run, configs[run.name])]
    gone = [name for name in _names_before(out, held) if name not in plan]
    problems += [f"{name} has begun, and is not planned any more" for name in gone if name in held]
    problems += other_data(out, plan, shared_config(spec))
    if problems:
        raise ScalingError(
            f"{out} holds runs of another plan:\n"
            + "\n".join(problems)
            + "\nRuns may be added to an experiment, not changed: give the spec its old values, or another --out."
        )
    without_effect = overridden(spec, configs.values())
    if without_effect:
        warnings.warn(
            f"`training` of the spec sets {', '.join(without_effect)}, which the plan decides: that has no effect",
            Notice,
            stacklevel=2,
        )
    (out / "plan").mkdir(parents=True, exist_ok=True)
    for name, cfg in configs.items():
        write_yaml(config_file(out, name), cfg)
    for name in gone:
        config_file(out, name).unlink(missing_ok=True)
    write_atomically(out / TABLE, runs_csv(plan).encode())
    write_record(out / PLAN, plan.as_json())
    return plan


def read_plan(out: Path) -> Plan:
    """Read the plan of an experiment's folder. Raises ScalingError where there is none, or it is damaged."""
    file = out / PLAN
    if not file.is_file():
        raise ScalingError(f"{out} has no {PLAN}: plan it first, by tools/scaling.py plan SPEC")
    try:
        return Plan.from_json(read_record(file))
    except (KeyError, TypeError, OutputError) as error:
        why = str(error).removeprefix(f"{file} ").partition(": give --overwrite")[0]
        raise ScalingError(f"{file} is damaged, or of another version ({why}): plan it again") from None


def opened(where: str, out: str | None = None, replan: bool = False) -> tuple[Path, Plan]:
    """Give an experiment's folder and plan, by the folder or by the spec's file.

    out: in place of the spec's own. replan: plan a spec first, and again, so that a change of it is not overlooked.
    """
    place = Path(expand(where))
    if place.is_dir():
        if out is not None:
            raise ConfigError(f"{where} is an experiment's folder already: leave --out out")
        plan = read_plan(place)
        problems = other_data(place, plan, shared_config(spec_of(plan))) if replan else []
        if problems:
            raise ScalingError("\n".join(problems))
        return place, plan
    spec = load_spec(place, out)
    return spec.folder, plan_into(spec) if replan else read_plan(spec.folder)


def spec_of(plan: Plan) -> ScalingSpec:
    """Give the spec that a plan was made of."""
    return from_dict(ScalingSpec, plan.values)


# --- what an earlier plan binds --------------------------------------------------------------------------------


def _begun(out: Path) -> dict[str, Mapping[str, Any]]:
    """What each run that has begun began with, by its folder: plan.json may be gone or damaged, and the runs hold."""
    folders = sorted((out / RUNS).iterdir()) if (out / RUNS).is_dir() else []
    found = {folder.name: begun_with(folder) for folder in folders if folder.is_dir()}
    return {name: begun for name, begun in found.items() if begun is not None}


def _names_before(out: Path, held: Iterable[str]) -> list[str]:
    """The names of an earlier plan's runs; where it is damaged, which planning mends, of those that have begun."""
    if not (out / PLAN).is_file():
        return []
    try:
        return [run.name for run in read_plan(out).runs]
    except ScalingError as error:
        warnings.warn(
            f"{error}; it is made anew, with what has begun as its folder says", Notice, stacklevel=2
        )
        return list(held)


def other_data(out: Path, plan: Plan, base: Experiment) -> list[str]:
    """Say which runs have been trained on other data than there are now: one law is of one distribution.

    Nothing where the data are not here, as of a plan that is made elsewhere.
    """
    trained = {run.name: RunState(out, run).trained_on for run in plan.runs}
    if not any(trained.values()):
        return []
    try:
        now = base.data.open().manifest.digest
    except DataError:
        return []
    others = [name for name, digest in trained.items() if digest not in (None, now)]
    if not others:
        return []
    return [
        f"{', '.join(others)}: trained on other data than {base.data.name} has now, and one law is of one set of data: "
        "bring the data back, or give another --out"
    ]


def changed(out: Path, run: PlannedRun, cfg: Experiment) -> Iterator[str]:
    """Say what a run that has begun would have otherwise, a line each."""
    before = begun_with(run_folder(out, run.name))
    if before is not None:
        try:
            operational = differences(before, cfg, run.name)
        except ConfigError as error:
            rows = [line for line in str(error).splitlines() if line.startswith("  ")]
            yield "\n".join([f"{run.name}:", *rows])
            return
        for key, is_same in BOUND.items():
            if key in operational and not is_same(*operational[key]):
                was, now = operational[key]
                yield f"{run.name}:\n  {key}: {shown(was)} there, {shown(now)} now"
    elif run.trunk is not None and run.branch_step is not None:
        passed = last_step(run_folder(out, run.trunk))
        if passed > run.branch_step and not branch_point(out, run).is_dir():
            yield (
                f"{run.name} would branch from {run.trunk} at step {run.branch_step}, which that has passed (step "
                f"{passed}) without keeping a checkpoint"
            )


def _same_held_out(was: str | None, now: str | None) -> bool:
    """Whether two places hold the same held-out samples; where one is not here, `collect` sees by what was measured."""
    try:
        return Manifest.load(str(was)).digest == Manifest.load(str(now)).digest
    except DataError:
        return True


def _same_point(was: str | None, now: str | None) -> bool:
    """Whether two places of a checkpoint are of one run and step: an experiment's folder may be moved."""
    return was is not None and now is not None and Path(was).parts[-3:] == Path(now).parts[-3:]


# Keys that a run may change between its starts, and not within an experiment, with what tells whether they have:
# losses on other held-out samples are not compared.
BOUND: Mapping[str, Callable[[Any, Any], bool]] = {
    "train.steps": operator.eq,
    "init.branch": _same_point,
    "val.samples": operator.eq,
    "val.batches": operator.eq,
    "data.val": _same_held_out,
}


# --- told ------------------------------------------------------------------------------------------------------


def runs_csv(plan: Plan) -> str:
    """The runs as CSV, a line each, with the columns of `PlannedRun`."""
    names = [field.name for field in dataclasses.fields(PlannedRun)]
    return as_csv(names, (dataclasses.asdict(run) for run in plan.runs))


def as_table(plan: Plan, out: Path, device: str, ranks: int) -> str:
    """The plan for a person: runs, what is left out, what it costs and what branching saves."""
    rows = [_row(run) for run in plan.runs]
    lines = [*aligned(HEAD, rows), "", *_explained(plan)]
    if plan.left_out:
        lines += ["", "left out:", *(f"  {one.name}: {one.why}" for one in plan.left_out)]
    whole, apart = plan.flops, plan.separate_flops
    saved = f"; branching saves {1 - whole / apart:.0%} of {apart:.3g}" if apart > whole else ""
    on = device if ranks == 1 else f"{ranks} x {device}"
    lines += [
        "",
        f"{plural(len(plan.runs), 'run')}, {whole:.3g} FLOPs{saved}; {_hours(plan.hours)} in all on {on}",
    ]
    return "\n".join([*lines, f"a config for each run is in {out / 'plan'}"])


HEAD = (
    "run", "kind", "N", "with emb.", "samples", "tokens", "epochs", "FLOPs", "steps", "from", "batch", "lr", "hours",
)  # fmt: skip


def _row(run: PlannedRun) -> tuple[str, ...]:
    begins = "" if run.branch_step is None else str(run.branch_step)
    return (
        run.name, run.kind, _short(run.params), _short(run.params_total), _short(run.samples), _short(run.tokens),
        f"{run.epochs:.3g}", f"{run.flops:.3g}", str(run.steps), begins, str(run.batch), f"{run.lr:.3g}",
        f"{run.hours:.3g}",
    )  # fmt: skip


def _explained(plan: Plan) -> list[str]:
    explained = [
        "N: parameters of the blocks and the output layer; with emb.: also of what embeds patches, time and labels",
        "FLOPs: samples x 3 x forward pass, 2 per multiply-add, attention and modulation included",
    ]
    if any(run.trunk for run in plan.runs):
        explained.append(
            "from: the step at which a branch parts from its trunk; its samples, tokens and FLOPs count from the "
            "beginning, its hours from there"
        )
    return [*explained, *plan.notes]


def _short(value: float) -> str:
    """As 12.3M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _hours(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 1 else f"{60 * hours:.3g} minutes"


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, others to the right, but for words."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    words = [i == 0 or not any(row[i][:1].isdigit() for row in rows) for i in range(len(head))]

    def line(cells: tuple[str, ...]) -> str:
        placed = [
            cell.ljust(width) if is_word else cell.rjust(width)
            for cell, width, is_word in zip(cells, widths, words, strict=True)
        ]
        return "  ".join(placed).rstrip()

    return [line(head), *(line(row) for row in rows)]
