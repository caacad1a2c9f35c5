"""What couplings do in the plane, as a table and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit.evals.plane import EULER_STEPS, PROBLEMS, PlaneProblem, carry, even, times
from dit.evals.protocol import protocol_hash
from dit.evals.transport import trajectory
from dit.files import write_atomically, write_picture
from dit.outputs import write_record
from dit.sample.denoise import Denoiser
from dit.sample.solve import Euler

TITLES = {
    "independent": "independent",
    "ot": "optimal transport",
    "reflow": "reflow",
    "ot_reflow": "optimal transport, then reflow",
}


def write_report(
    out: Path, table: dict[str, dict[str, Any]], protocol: dict[str, Any], seconds: float
) -> None:
    """Write OUT.json and OUT.md, and print the latter."""
    out.parent.mkdir(parents=True, exist_ok=True)
    digest = protocol_hash(protocol)
    values = {"protocol": protocol, "hash": digest, "torch": torch.__version__, "results": table}
    lines = ["# Couplings in the plane", ""]
    for name, rows in table.items():
        lines += _section(PROBLEMS[name], rows)
    lines += [
        "straightness: ∫ E|x(1) − x(0) − dx/dt|² dt (arXiv 2209.03003, §2.2), bend: the same over E|x(1) − x(0)|². W2: "
        "exact, to the target, after so many steps of Euler's method. Error: mean distance from the end of the ODE "
        "itself. Reflow learns to end, in fewer steps, where the flow that made its pairs ends (that one's W2 at 64 "
        "steps), whose error it inherits.",
        "",
        f"`python tools/toys.py --out=OUT --steps={protocol['steps']} --seed={protocol['seed']}`, {seconds:.0f} s of "
        f"CPU time; protocol {digest}: `{json.dumps(protocol)}`",
    ]
    write_atomically(out.with_name(f"{out.name}.md"), ("\n".join(lines) + "\n").encode())
    write_record(out.with_name(f"{out.name}.json"), values)  # last: it says that the others are whole
    print("\n".join(lines))


def _section(problem: PlaneProblem, rows: dict[str, Any]) -> list[str]:
    """The lines of one problem's table."""
    columns = [
        "path energy",
        "straightness",
        "bend",
        *(f"W2, {n} steps" for n in EULER_STEPS),
        "error, 4 steps",
    ]
    lines = [f"## {problem.title}", "", f"| coupling | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for coupling, title in TITLES.items():
        row = rows[coupling]
        figures = [row["energy"], row["straightness"], row["bend"], *row["w2"].values(), row["error"][4]]
        lines.append(f"| {title} | {' | '.join(f'{v:.3g}' for v in figures)} |")
    known = rows["floor"]
    return [
        *lines,
        "",
        f"Least possible: energy {known['energy']:.3g}, W2 {known['w2']:.3g} (other points of the target).",
        "",
    ]


def draw_picture(
    problem: PlaneProblem, flows: dict[str, Denoiser], rows: dict[str, Any], seed: int, file: Path
) -> None:
    """Paths above, samples after four steps below, a column for each coupling."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    eps, target = problem.source(even(seed + 1)).float(), problem.target(even(seed + 2))
    size = (3.1 * len(TITLES), 7.2)
    figure, axes = plt.subplots(2, len(TITLES), figsize=size, squeeze=False, layout="constrained")
    for (above, below), (name, title) in zip(axes.T, TITLES.items(), strict=True):
        course = trajectory(flows[name], eps[:160], times(50), flows[name].path)
        above.plot(course[:, :, 0], course[:, :, 1], color="#8a8a8a", linewidth=0.7, zorder=1)
        for points, colour, label in ((course[0], "#1f5fa8", "source"), (course[-1], "#d2541b", "end")):
            above.scatter(points[:, 0], points[:, 1], s=9, color=colour, linewidths=0, zorder=2, label=label)
        above.set_title(f"{title}\nstraightness {rows[name]['straightness']:.2g}", fontsize=11)
        end = carry(flows[name], eps, 4, Euler())
        below.scatter(target[:, 0], target[:, 1], s=9, color="#c8c8c8", linewidths=0, label="target")
        below.scatter(end[:, 0], end[:, 1], s=6, color="#d2541b", linewidths=0, label="4 steps")
        below.set_title(f"W2 to the target {rows[name]['w2'][4]:.3f}", fontsize=11)
        for axis, half in ((above, problem.extent), (below, problem.inner)):
            axis.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xticks=[], yticks=[])
    for axis in axes[:, 0]:
        axis.legend(fontsize=9, loc="upper left", markerscale=2, handletextpad=0.2, borderpad=0.3)
    figure.suptitle(f"{problem.title}: paths of the ODE (above), samples after four Euler steps (below)")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_picture(file, figure, dpi=110)
    plt.close(figure)
