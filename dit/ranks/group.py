"""How the ranks of a job meet and act together. With `world.py` the only reader of rank and SLURM variables.

One process (nothing set), torchrun (RANK, WORLD_SIZE, LOCAL_RANK) and `srun` (SLURM_PROCID, SLURM_NTASKS,
SLURM_LOCALID) all end in the same `World` and, inside `session()`, in one torch.distributed process group.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor

from dit.errors import Stopped, UserError
from dit.ranks import early
from dit.ranks.join import SECONDS, JoinError, Meeting, patience, ranks_text
from dit.ranks.world import World

T = TypeVar("T")

SIGNALS = early.SIGNALS
FILES = 65536  # open at a time
STOPPED = ("", "")  # in the place of a node and what failed there: a rank was asked to end


class PeerError(UserError, RuntimeError):
    """Another rank failed at something that ranks do together."""


@contextlib.contextmanager
def session(timeout: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join the process group (gloo on CPU, NCCL on GPUs), and leave it whatever happens.

    timeout: of a collective. Ranks that do not come at all are named sooner, by a JoinError (DIT_JOIN_SECONDS).
    Leaving matters: a gloo thread that outlives the interpreter aborts one exit in ten.
    """
    world = World.from_env()
    if td.is_initialized():
        yield world
        return
    launched = "RANK" in os.environ or world.size > 1  # else nobody hosts a store, and this process does
    device = world.device
    # DeepSpeed takes LOCAL_RANK for the device: where each task sees one GPU of its own, that is 0
    local_rank = world.local_rank if device.index is None else device.index
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local_rank))
    if not launched:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _allow_files()
    excepthook = sys.excepthook  # which torch puts one around, and another one each time
    _init_group("nccl" if device.type == "cuda" else "gloo", world, launched, timeout)
    try:
        yield world
    except RuntimeError as error:
        if is_broken_connection(error):
            raise PeerError(
                f"the connection to another rank broke: see that rank's message ({error})"
            ) from error
        raise
    finally:
        td.destroy_process_group()
        if not launched:
            sys.excepthook = excepthook
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)


def _init_group(backend: str, world: World, launched: bool, timeout: timedelta) -> None:
    """Find the other ranks, within dit.ranks.join.patience(), and connect to them. Raises JoinError.

    torchrun's agents meet before their ranks start, and have a store. It goes with them: a rank whose launcher was
    killed meanwhile would wait for it as long as a collective may take, in C, where no signal is heard.
    """
    if not launched:
        td.init_process_group(backend, timeout=timeout)
        return
    soon = timedelta(seconds=patience())
    store = None if "TORCHELASTIC_RUN_ID" in os.environ else _meet(world)
    how: dict[str, Any] = (
        {} if store is None else {"store": store, "rank": world.rank, "world_size": world.size}
    )
    try:
        td.init_process_group(backend, timeout=soon, **how)
    except RuntimeError as error:
        what = f"all {world.size} ranks are there, but " if store is not None else ""
        raise JoinError(
            f"{what}rank {world.rank} on {node_name()} cannot connect to the others: {error}. Each rank is reached at "
            "the address that its node's name resolves to, or that of the interface which GLOO_SOCKET_IFNAME names; "
            f"any port must be open between nodes; {SECONDS}=N waits longer"
        ) from error
    td.distributed_c10d._get_default_store().set_timeout(timeout)
    # its name in older ones comes second
    set_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout
    set_timeout(timeout)


def _meet(world: World) -> Any:
    """Give the store of ranks that nobody brought together, once all have come. Raises JoinError."""
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise JoinError("MASTER_ADDR and MASTER_PORT must name rank 0's node and a port of it") from None
    nodes = tuple(os.environ.get("DIT_NODES", "").split())
    return Meeting(world.rank, world.size, node_name(), _job_and_restart(), *place, nodes).join()


def _job_and_restart() -> str:
    """Name the job's step, the same on all its ranks and anew when the job starts again; "" without SLURM."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(os.environ.get(name, "") for name in names).strip(".")


def _allow_files() -> None:
    """Allow many open files: a rank has connections to every other one, in each group."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def is_broken_connection(error: BaseException) -> bool:
    """Whether this is what a rank sees of another's end."""
    if not isinstance(error, RuntimeError) or isinstance(error, PeerError):
        return False
    return "gloo" in str(error) or isinstance(error, td.DistError)


@contextlib.contextmanager
def on_signals(
    handle: Callable[[int, FrameType | None], None], numbers: Sequence[int] = SIGNALS
) -> Iterator[None]:
    """Have signals handled inside (in the main thread, where alone they can be), and as before afterwards.

    Those that came while Python was still importing (`dit.ranks.early`) are handled at once. Once Stopped was raised
    they do nothing any more: a launcher passes them on to ranks that are just leaving.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = early.stop_listening()
    before: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}
    try:
        for number in kept:
            handle(number, None)
        yield
    except Stopped:
        before = dict.fromkeys(numbers, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Find a TCP port that nobody on this machine listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def cores() -> int:
    """Count this rank's cores: those it may run on, or its share of the machine's where ranks are not bound to theirs.

    torchrun says how many ranks share this machine (LOCAL_WORLD_SIZE), and SLURM the most on one node of the step;
    ranks that were started by hand are taken to be on one machine.
    """
    whole = os.cpu_count() or 1
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else whole
    if "RANK" in os.environ:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        return max(1, here // ranks)
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as 2(x3),1
    return max(1, min(here, whole // max(int(part.partition("(")[0]) for part in tasks.split(","))))


def node_name() -> str:
    """Name this machine: by SLURM's name of the node, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def job_name() -> str:
    """Name this job for logs: SLURM's job id and restart count where there is one, and the host."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return f"slurm job {job} (restart {restarts}) on {socket.gethostname()}" if job else socket.gethostname()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place; int64 sums wrap, as batch_hash wants. Every rank must call it."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.barrier()


def gather_objects(value: T, group: Any = None) -> list[T]:
    """Give every rank the values of all. group: all ranks, over another backend than the job's."""
    if not td.is_initialized() or td.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * td.get_world_size()
    td.all_gather_object(values, value, group=group)
    return values


def is_main() -> bool:
    """Whether this process is rank 0, or of no group: whose word is said once of what all ranks see alike."""
    return not td.is_initialized() or td.get_rank() == 0


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; its result, or its failure, is every rank's; so is Stopped."""
    if not td.is_initialized() or td.get_world_size() == 1:
        return action()
    box: list[Any] = [None, None]
    error: Exception | None = None
    if td.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
            error, box[1] = caught, _as_told(caught)
    td.broadcast_object_list(box, src=0)
    if error is not None:
        raise error
    if box[1] is not None:
        raise Stopped if box[1] == STOPPED else PeerError(f"rank 0 on {box[1][0]} failed: {box[1][1]}")
    return box[0]  # type: ignore[no-any-return]


def _as_told(error: Exception) -> tuple[str, str]:
    """This node and what failed, as ranks tell each other; STOPPED where nothing failed."""
    return STOPPED if isinstance(error, Stopped) else (node_name(), str(error))


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any, every rank raises, naming the rank and the error.

    Without this a rank that fails alone leaves its peers waiting in the next collective. Where it is Stopped on any,
    and fails on none, every rank raises Stopped.
    """
    error: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
        error = caught
    mine = None if error is None else _as_told(error)
    ended = {rank: found for rank, found in enumerate(gather_objects(mine)) if found is not None}
    failed = {rank: found for rank, found in ended.items() if found != STOPPED}
    if error is not None and not (failed and isinstance(error, Stopped)):
        raise error
    if failed:
        rank, (node, text) = next(iter(failed.items()))
        more = f" (as did {ranks_text(set(failed) - {rank})})" if len(failed) > 1 else ""
        raise PeerError(f"rank {rank} on {node} failed{more}: {text}")
    if ended:
        raise Stopped
    return result  # type: ignore[return-value]
