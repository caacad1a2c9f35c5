"""Who this process is among its peers, by what a launcher has set; read before torch is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit.errors import UserError

if TYPE_CHECKING:
    import torch

_LAUNCHERS = (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class World:
    """rank in [0, size); local_rank counts the ranks of this node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls) -> World:
        """Read torchrun's or SLURM's variables; one process where neither launched it.

        SLURM's count only inside a step (SLURM_STEP_ID): `python tools/train.py` typed in an allocation's
        batch script is one process, not rank 0 of a job that waits for others.
        """
        if "RANK" in os.environ:
            names = _LAUNCHERS[0]
        elif "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ:
            names = _LAUNCHERS[1]
        else:
            return cls()
        missing = [n for n in names if n not in os.environ]
        if missing:
            raise UserError(f"{', '.join(missing)} not set beside {names[0]}: start with torchrun or launch/")
        rank, size, local_rank = (int(os.environ[n]) for n in names)
        return cls(rank, size, local_rank)

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none (or CUDA_VISIBLE_DEVICES is empty)."""
        import torch  # seconds, which those who only ask for the rank need not wait

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0
