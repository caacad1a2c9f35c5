"""A sweep as text: the table with its differences for a person, and a line for each cell for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dit.evals.metrics.resampling import LEVEL
from dit.evals.protocol import protocol_hash
from dit.evals.sweep.results import Group, Results
from dit.files import as_csv as csv_text

AXES = ("run", "weights", "cfg_scale", "interval", "guidance", "solver")


def words_of(group: Group) -> dict[str, str]:
    """The values of all axes but the steps and the seed."""
    return {"run": group.run, **group.setting.words}


def varying(groups: Sequence[Group]) -> list[str]:
    """The axes that have more than one value."""
    return [axis for axis in AXES if len({words_of(g)[axis] for g in groups}) > 1]


def steps_word(group: Group) -> str:
    """What the column of a group is called."""
    return f"NFE {group.setting.steps}" if group.setting.is_budget else f"{group.setting.steps} steps"


def markdown(results: Results) -> str:
    """A table for each figure, then the differences, what the figures are of, and their protocol."""
    parts = [part for space, name in results.figures for part in _of_figure(results, space, name)]
    return "\n\n".join([*parts, *_notes(results)]) + "\n"


def _of_figure(results: Results, space: str, name: str) -> list[str]:
    groups = results.groups
    axes, constant = varying(groups) or ["solver"], words_of(groups[0])
    fixed = ", ".join(f"{axis} {constant[axis]}" for axis in AXES if axis not in axes and constant[axis])
    parts = [
        f"## {name} in {space}",
        f"All with {fixed}." if fixed else "",
        _table(results, axes, space, name),
    ]
    floor = results.floors.get(space)
    if floor is not None and (mean := floor.mean(name)) is not None:
        spread = floor.spread(name)
        other = "stored statistics" if floor.reference is None else f"{floor.reference:,}"
        splits = len(floor.figures[name])
        deviation = (
            "" if spread is None else f" ± {spread:.2g} (standard deviation over {splits} random splits)"
        )
        parts.append(f"Real images: {mean:.4g}{deviation}, {floor.samples:,} against {other}.")
    return [part for part in [*parts, *_differences(results, space, name)] if part]


def _table(results: Results, axes: Sequence[str], space: str, name: str) -> str:
    """A line for each combination of `axes`, a column for each number of steps; the best of a run's column is bold."""
    columns = list(dict.fromkeys(sorted((g.setting.steps, steps_word(g)) for g in results.groups)))
    lines = [_line([*axes, *(word for _, word in columns)]), "|" + "---|" * (len(axes) + len(columns))]
    rows: dict[tuple[str, ...], dict[int, Group]] = {}
    for group in results.groups:
        words = words_of(group)
        rows.setdefault(tuple(words[axis] for axis in AXES), {})[group.setting.steps] = group
    best = {
        (run, steps): results.best(
            space, name, [g for g in results.groups if (g.run, g.setting.steps) == (run, steps)]
        )
        for run in results.runs
        for steps, _ in columns
    }
    for key, found in rows.items():
        named = dict(zip(AXES, key, strict=True))
        cells = [
            "" if (g := found.get(steps)) is None else _cell(g, best[g.run, steps] is g, space, name)
            for steps, _ in columns
        ]
        lines.append(_line([*(named[axis] for axis in axes), *cells]))
    return "\n".join(lines)


def _cell(group: Group, is_best: bool, space: str, name: str) -> str:
    value = group.value(space, name)
    if value is None:
        return group.lacking
    return f"**{value.text()}**" if is_best else value.text()


def _line(words: Sequence[str]) -> str:
    return "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |"


def _differences(results: Results, space: str, name: str) -> list[str]:
    """Tables of paired differences: of other runs less the first, and of all less the best."""
    parts = []
    best = results.best(space, name)
    first = results.runs[0]
    found = [
        (f"{name}, less that of {first} at the same setting, from the same noise:", results.against_first(space, name)),
        (f"{name}, less that of the best ({_named(results, best)}), from the same noise:" if best else "",
         results.against_best(space, name)),
    ]  # fmt: skip
    for head, rows in found:
        if rows:
            lines = [_line(["", "difference"]), "|---|---|"]
            lines += [_line([_named(results, g), value.text(3)]) for g, value in rows]
            parts += [head, "\n".join(lines)]
    return parts


def _named(results: Results, group: Group) -> str:
    """A group by the axes that vary, and its steps."""
    words = words_of(group)
    named = [
        words[a] if a in ("run", "solver") else f"{a} {words[a]}" for a in varying(results.groups) if words[a]
    ]
    return ", ".join([*named, steps_word(group)])


def _notes(results: Results) -> list[str]:
    """What the numbers behind a mean are, and the protocol."""
    seeds = len(results.groups[0].cells)
    of = [f"± is the standard error over {seeds} seeds"] if seeds > 1 else []
    if any(found and found.values.get("bootstrap") for g in results.groups for _, found in g.cells):
        of.append(
            f"brackets are {LEVEL:.0%} intervals of resampled images, the same image numbers in all cells"
        )
    unmet = [g for g in results.groups if any(cell.spec is None for cell, _ in g.cells)]
    empty = list(dict.fromkeys(f"{g.setting.words['solver']} at NFE {g.setting.steps}" for g in unmet))
    bad = [f"{cell}: {m.not_finite}" for g in results.groups for cell, m in g.cells if m and m.not_finite]
    notes = ["; ".join(of).capitalize() + "."] if of else []
    notes += ["Left empty, as one step takes more evaluations: " + "; ".join(empty) + "."] if empty else []
    notes += ["Not finite: " + "; ".join(bad) + "."] if bad else []
    about = dict(results.about)
    return [*notes, f"Protocol {protocol_hash(about)}: `{json.dumps(about)}`"]


def as_csv(results: Results) -> str:
    """A line for each cell and feature space, with every figure, its interval and the protocol's hash."""
    figures = list(dict.fromkeys(name for _, name in results.figures))
    ends = [f"{name}_{end}" for name in figures for end in ("low", "high")]
    head = [
        *AXES, "num_steps", "budget", "seed", "nfe", "network_evaluations", "step", "images", "features",
        *figures, *ends, "not_finite", "cell", "protocol",
    ]  # fmt: skip
    rows = []
    for group in results.groups:
        for cell, found in group.cells:
            values = {} if found is None else found.values
            row = {
                **words_of(group), "num_steps": "" if cell.spec is None else cell.spec.num_steps,
                "budget": group.setting.steps if group.setting.is_budget else "", "seed": cell.seed,
                **{key: values.get(key) for key in ("nfe", "network_evaluations", "step", "not_finite")},
                "images": results.about.get("num_samples"), "cell": "" if cell.spec is None else cell.hash,
            }  # fmt: skip
            for space in results.spaces:
                held = values.get("spaces", {}).get(space, {})
                own = dict(held.get("figures", {}))
                for name, (low, high) in held.get("intervals", {}).items():
                    own |= {f"{name}_low": low, f"{name}_high": high}
                rows.append(row | own | {"features": space, "protocol": held.get("hash")})
            if not results.spaces:
                rows.append(row)
    return csv_text(head, rows)
