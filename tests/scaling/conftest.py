"""An experiment that was run to its end, which many tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dit.scaling.plan import Plan
from dit.scaling.planned import plan_into
from dit.scaling.running import Orders, run_plan
from tests.datasets import Digits
from tests.scaling.experiments import ForkedRun, spec


@dataclass(frozen=True)
class Done:
    """An experiment's folder and plan."""

    out: Path
    plan: Plan


@pytest.fixture(scope="package")
def done(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Two sizes, each a trunk and a branch, all complete."""
    out = tmp_path_factory.mktemp("scaling") / "out"
    plan = plan_into(spec(digits, out))
    run_plan(out, plan, Orders(starter=ForkedRun))
    return Done(out, plan)
