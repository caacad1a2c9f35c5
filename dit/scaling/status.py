"""How an experiment stands, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from dit.errors import plural
from dit.scaling.plan import Plan
from dit.scaling.planned import aligned
from dit.scaling.starting import claim_file
from dit.scaling.states import RunState, is_held, states_of

HEAD = ("run", "kind", "step", "of", "FLOPs", "left", "state")
SHOWN = 90  # characters of why a run failed


def status(out: Path, plan: Plan, default_speed: float) -> str:
    """Say of each run how far it is and what it waits for, and how long all of them still take one after the other.

    default_speed: FLOP/s, of runs where none has been measured.
    """
    states = states_of(out, plan)
    left = {state.run.name: _seconds_left(state, states, default_speed) for state in states}
    rows = [
        (
            state.run.name,
            state.run.kind,
            str(state.step),
            str(state.run.steps),
            f"{state.flops_done / state.run.own_flops:.0%}",
            "" if state.is_complete else str(tqdm.format_interval(left[state.run.name])),
            _words(state, states),
        )
        for state in states
    ]
    done, whole = sum(state.flops_done for state in states), plan.flops
    complete = sum(state.is_complete for state in states)
    measured = any(state.speed for state in states)
    rate = "at measured rates" if measured else f"at {default_speed:.3g} FLOP/s, as none is measured yet"
    end = (
        f"{complete} of {plural(len(states), 'run')} complete, {done / whole:.0%} of {whole:.3g} FLOPs; "
        f"{tqdm.format_interval(sum(left.values()))} left one after the other, {rate}"
    )
    return "\n".join([*aligned(HEAD, rows), "", end])


def _seconds_left(state: RunState, states: Sequence[RunState], default: float) -> float:
    """At its own rate, else that of the measured run that is nearest in size."""
    if state.is_complete:
        return 0.0
    measured = [other for other in states if other.speed]
    nearest = min(measured, key=lambda other: abs(other.run.params - state.run.params), default=None)
    speed = state.speed or (nearest.speed if nearest is not None else None) or default
    return (state.run.own_flops - state.flops_done) / speed


def _words(state: RunState, states: Sequence[RunState]) -> str:
    if state.is_complete:
        return "complete"
    if state.is_running:
        return "running"
    if is_held(claim_file(state.out, state.run.name)):
        return "starting"
    if state.failure is not None:
        why = [line.strip() for line in state.failure.splitlines() if line.strip()]
        return f"failed: {(why or ['?'])[-1][:SHOWN]}"
    if state.has_begun:
        return "stopped"
    if not state.can_begin:
        return f"waits for step {state.run.branch_step} of {state.run.trunk}"
    return "waiting"
