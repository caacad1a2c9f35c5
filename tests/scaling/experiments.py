"""Small scaling experiments on the digits, and runs of them in forked processes, which need no seconds of imports."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit.config import from_dict, merge
from dit.scaling.spec import ScalingSpec
from dit.scaling.starting import Start
from tests import forks
from tests.commands import _run_file, environment
from tests.datasets import Digits

Values = dict[str, Any]
SIZES = [{"width": 16, "depth": 1, "heads": 2}, {"width": 32, "depth": 1, "heads": 2}]


def spec_values(digits: Digits, out: Path, **keys: Any) -> Values:
    """A spec of two sizes and two lengths, as its YAML file would have it; keys are merged in."""
    base: Values = {
        "out": str(out),
        "training": {
            "data": {"path": str(digits.moments), "val": str(digits.moments_val), "lanes": 8},
            "objective": {"times": "logit_normal"},
            "optim": {"warmup": 2},
            "ema": {"decay": 0.9},
            "train": {"global_batch": 16, "log_every": 1},
            "checkpoint": {"every": 4, "keep": 1},
            "val": {"samples": 32},
            "engine": "local",
        },
        "ladder": {"name": "list", "sizes": SIZES},
        "samples_per_param": [0.02, 0.04],
        "lr": {"name": "power", "at": 2e-3, "params": 5664, "exponent": -0.3333},
        "min_steps": 4,
        "device": {"name": "a CPU", "flops": 1e9},
    }
    return merge(base, keys)


def spec(digits: Digits, out: Path, **keys: Any) -> ScalingSpec:
    return from_dict(ScalingSpec, spec_values(digits, out, **keys))


class ForkedRun:
    """A run's process. at_poll: called with it whenever it is asked how it is."""

    def __init__(self, start: Start, at_poll: Callable[[ForkedRun], None] | None = None):
        self.start, self._at_poll = start, at_poll
        log = Path(str(start.log.name))
        arguments = (start.command[1:], Path.cwd(), {**environment(), **start.env}, [log, log])
        self._process = forks.context().Process(target=_run_file, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        if self._at_poll is not None:
            self._at_poll(self)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
