"""What a run tells of its course: figures gathered between two logged steps, the log, and words beside the bar."""

from __future__ import annotations

from pathlib import Path

from dit.progress import say
from dit.ranks.group import World
from dit.train.meters import Meters, RunLog


class Records:
    """The meters and the log of a run. `open` before the first step, `close` after the last."""

    def __init__(self, folder: Path, world: World):
        self.world = world
        self.meters = Meters(world.device)
        self.log = RunLog(folder, world.is_main)
        self._logged = 0  # the step of the last row

    def open(self, step: int, hooks_step: int) -> None:
        """Begin to log behind `step` steps done. hooks_step: the steps done whose hooks have been called."""
        self.log.open(step, hooks_step)
        self._logged = step

    def take_steps(self, step: int) -> int:
        """Count the steps since the last row, for a row of this step."""
        steps, self._logged = step - self._logged, step
        return steps

    def go_back(self, good: int, step: int) -> None:
        """Take back the rows beyond step `good`, and go on behind `step`: those between are left out."""
        self._logged = step
        self.log.cut(good)

    def say(self, text: str) -> None:
        """Print on rank 0, beside a progress bar."""
        if self.world.is_main:
            say(text)

    def close(self) -> None:
        """Flush and close the log."""
        self.log.close()
