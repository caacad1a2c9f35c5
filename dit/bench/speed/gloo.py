"""Ranks of a benchmark on this machine's CPU: processes of one thread each, connected by gloo."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from dit.files import read_text
from dit.ranks import group


def on_ranks(size: int, work: Callable[..., Any], *args: Any) -> Any:
    """Call work(world, *args), a function of a module, in `size` processes; give what rank 0's returns, JSON values."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        spawn(_rank, (size, group.free_port(), work, args, str(out)), nprocs=size)
        return json.loads(read_text(out))


def _rank(rank: int, size: int, port: int, work: Callable[..., Any], args: tuple[Any, ...], out: str) -> None:
    """What one process does."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    with group.session() as world:
        found = work(world, *args)
    if world.is_main:
        Path(out).write_text(json.dumps(found), encoding="utf-8")
