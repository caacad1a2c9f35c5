"""Where the figures of a benchmark go, and how they were measured."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dit.bench.speed.turns import protocol
from dit.errors import UserError
from dit.files import expand
from dit.outputs import claim_report, write_record

SHOWN = 20  # of the problems that a benchmark finds
REPEATS = 5  # turns of each contender for which the bounds are stated


@dataclass(frozen=True)
class Sheet:
    """The protocol of one benchmark, and the file that its figures are written to; None = to the screen alone."""

    how: dict[str, Any]
    file: Path | None

    @classmethod
    def begin(cls, json_file: str | None, **asked: Any) -> Self:
        """Say how it will be measured; OutputError where the figures could not be written, before they are taken."""
        file = Path(expand(json_file)) if json_file else None
        if file is not None:
            claim_report(file)
            file.parent.mkdir(parents=True, exist_ok=True)
        return cls(protocol(**asked), file)

    @classmethod
    def begin_on(cls, device: str | None, threads: int, json_file: str | None, **asked: Any) -> Self:
        """Do the same on a CPU, with so many threads, or a GPU; UserError where there is none. None: a GPU if any."""
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("there is no CUDA device here; take --device=cpu")
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        return cls.begin(json_file, **asked, threads=torch.get_num_threads())

    def write(self, figures: dict[str, Any]) -> None:
        """Write the figures that are known so far in the place of those before."""
        if self.file is not None:
            write_record(self.file, {"protocol": self.how, "figures": figures})

    def write_plan(self, plan: dict[str, Any]) -> None:
        """Write what was estimated, its keys beside the protocol's: no figures that were measured."""
        if self.file is not None:
            write_record(self.file, {"protocol": self.how, **plan})

    def conclude(self, found: dict[str, Any]) -> None:
        """Print how it was measured, write the figures, and raise UserError where they are not what was promised."""
        print(json.dumps(self.how))
        self.write(found)
        if problems := found.get("problems", []):
            more = [f"and {len(problems) - SHOWN} more; --json_file has them all"] * (len(problems) > SHOWN)
            rows = [*problems[:SHOWN], *more]
            raise UserError("this is not as promised:\n" + "\n".join(f"  {row}" for row in rows))
