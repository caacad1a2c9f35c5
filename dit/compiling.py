"""What torch.compile makes of a run: few graphs, kept on disk for the next start, counted and timed.

A training batch has one size all along and is compiled for it. Whatever else the network is called with (held-out
data, pictures, a checkpoint's probe) has many sizes and shares one graph, of any size.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import stat
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit.errors import Notice

FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # the variable by which torch is told where to keep what it has compiled

BATCHED = ("shared", "value")  # keywords of blocks whose first dimension is the batch


def compile_forward(module: nn.Module, **options: Any) -> None:
    """Compile a module's forward in place, with torch.compile's options: its own graph for gradients and without.

    With gradients each size of a batch is a graph. Without, one graph takes all sizes above 1: their first dimension is
    the batch, as is that of every tensor given by position, and of those whose names are in BATCHED.
    """
    forward = module.forward
    trained = compile_for_one_size(forward, **options)
    drawn = torch.compile(forward, **options)

    @functools.wraps(forward)
    def compiled(*inputs: Tensor, **given: Any) -> Any:
        if torch.is_grad_enabled():
            return trained(*inputs, **given)
        batched = [*inputs, *(given[name] for name in BATCHED if given.get(name) is not None)]
        for tensor in () if torch.compiler.is_compiling() else batched:  # else it is part of a larger graph
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return drawn(*inputs, **given)

    module.forward = compiled


def compile_for_one_size(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile for inputs of one size. Another size is another graph, and never one of any size for both."""
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False, **options)
    return compiled


# --- what was compiled, and how long it took -----------------------------------------------------------------


@dataclass
class _Clock:
    """Seconds that this process has spent on compiling, by torch's own calls at the start and end of it."""

    seconds: float = 0.0
    _begun: float = 0.0

    def begin(self, *_: object) -> None:
        self._begun = time.perf_counter()

    def end(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun

    def ticking(self) -> _Clock:
        """Itself, heard of by torch from here on; `torch.compiler.reset` makes torch forget."""
        from torch._dynamo import callback  # takes a second to import

        if self.begin not in callback.callback_handler.start_callbacks:
            callback.on_compile_start(self.begin)
            callback.on_compile_end(self.end)
        return self


_CLOCK = _Clock()  # of this process


@dataclass(frozen=True)
class Compiled:
    """What this process has compiled so far. loaded: graphs and parts of them that were found on disk."""

    graphs: int = 0
    seconds: float = 0.0
    loaded: int = 0

    @classmethod
    def now(cls) -> Compiled:
        """Count. Takes microseconds."""
        from torch._dynamo.utils import counters

        loaded = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        return cls(counters["stats"]["unique_graphs"], _CLOCK.ticking().seconds, loaded)

    def since(self, before: Compiled) -> Compiled:
        """What came after `before`."""
        return Compiled(
            self.graphs - before.graphs, self.seconds - before.seconds, self.loaded - before.loaded
        )


def last_reason() -> str:
    """Why torch compiled anew the last time that it did, in its own words; empty where it does not say."""
    from torch._dynamo.utils import get_compilation_metrics

    found = [getattr(metrics, "recompile_reason", None) for metrics in get_compilation_metrics()]
    return next((" ".join(reason.split()) for reason in reversed(found) if reason), "")


class CompileWatch:
    """Tells what is compiled in which part of a run's cycle, and when a part compiles that has run before.

    say: prints on rank 0. is_main: whether this is rank 0, which alone warns.
    """

    def __init__(self, say: Callable[[str], object], is_main: bool):
        self._say, self._is_main = say, is_main
        self._known: set[str] = set()
        self._has_warned = False
        self._before = Compiled.now()

    def look(self, part: str) -> float:
        """Say what `part`, which has just run, has compiled; give the seconds that this took.

        The first time that a part compiles though it has run before, a Notice gives the reason.
        """
        now = Compiled.now()
        found, self._before = now.since(self._before), now
        is_first = part not in self._known
        self._known.add(part)
        if found.graphs and is_first:
            where = f", {found.loaded} part(s) of them from disk" if found.loaded else ""
            self._say(f"{part}: compiled {found.graphs} graph(s) in {found.seconds:.1f} s{where}")
        elif found.graphs and self._is_main and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{part}: torch compiled {found.graphs} graph(s) more in {found.seconds:.1f} s, though it had run "
                f"before, because: {last_reason() or 'torch does not say'}. Where this comes again and again, training "
                "without train.compile is quicker",
                Notice,
                stacklevel=2,
            )
        return found.seconds


# --- on disk -------------------------------------------------------------------------------------------------


def keep_on_disk() -> Path:
    """Have torch keep what it compiles in a folder of this machine and user, and give it; before anything is compiled.

    TORCHINDUCTOR_CACHE_DIR, where it is set. Else a folder in the machine's temporary one: for this user alone, and for
    programs on this machine, processor, GPU and torch alone. What torch writes there is named by its content and moved
    into place when it is whole, under locks that hold within a machine: ranks and runs of a machine share it, and
    machines that share a file system do not meet.
    """
    given = os.environ.get(FOLDER)
    if given and not _is_torchs_own(Path(given)):
        return Path(given)
    folder = Path(tempfile.gettempdir()) / f"dit-compiled-{os.getuid()}" / _machine()
    try:
        for place in (folder.parent, folder):
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(place)
    except OSError as error:
        warnings.warn(
            f"what is compiled is kept for this process alone: {error}. Set {FOLDER} to a folder of your own",
            Notice,
            stacklevel=2,
        )
        folder = Path(tempfile.mkdtemp(prefix="dit-compiled-"))
    os.environ[FOLDER] = str(folder)
    return folder


def _is_torchs_own(folder: Path) -> bool:
    """Whether torch itself has set it, as it does when it looks for it first: /tmp/torchinductor_USER."""
    return folder.parent == Path(tempfile.gettempdir()) and folder.name.startswith("torchinductor_")


def _check_private(folder: Path) -> None:
    """Raise PermissionError where others could put files there, which torch would load and run."""
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only user {os.getuid()} may write to")


def _machine() -> str:
    """What compiled code depends on, in short."""
    gpus = {
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i))
        for i in range(torch.cuda.device_count())
    }
    processor = torch.backends.cpu.get_cpu_capability()
    parts = (torch.__version__, platform.python_version(), platform.machine(), processor, sorted(gpus))
    return f"{platform.node()}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
