"""Finds on a CPU, where nothing waits, where the host would wait for a GPU: by which tensors would lie there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]
# Operations of which the host needs a number of the device, be it only the size of what comes out.
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "bincount"}
# Ways out of torch, which dispatch nothing on a CPU.
LEAVING = {"cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__int__", "__float__", "__index__"}
Place = tuple[str, str]  # a file's name and a function's in it


class OnDevice:
    """The storages that would be a GPU's: those given, and those of whatever is computed from them."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._known: set[StorageWeakRef] = set()
        self.add(tensors)

    def add(self, tensors: Iterable[Any]) -> None:
        self._known.update(StorageWeakRef(t.untyped_storage()) for t in tensors if isinstance(t, Tensor))

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and StorageWeakRef(value.untyped_storage()) in self._known


class NoWaiting:
    """Raises AssertionError inside where code of the project has the host wait for the device.

    tensors: that lie there to begin with. allowed: functions in which, and in whatever they call, it may.
    """

    def __init__(self, tensors: Iterable[Tensor], allowed: frozenset[Place]):
        self.on_device, self.allowed = OnDevice(tensors), allowed
        self.counted = 0  # operations that were looked at
        self._modes: tuple[Any, ...] = (_Dispatched(self), _Called(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def refuse(self, name: str) -> None:
        """Raise, unless the caller is another library or may wait."""
        frames = [*_frames(sys._getframe(1))]
        (place, caller), names = frames[0], {(Path(str(file)).name, function) for file, function in frames}
        if place is not None and not names & self.allowed:
            raise AssertionError(f"{name} in {place}, {caller}: the host waits for the device")


def _frames(frame: FrameType | None) -> Iterable[tuple[str | None, str]]:
    """(file in the project, function) from the innermost call out, until another library's but torch."""
    here, outside = Path(__file__), (str(ROOT / "dit"), str(ROOT / "tests"))
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(outside) and Path(file) != here:
            yield file, frame.f_code.co_name
        elif "site-packages" in file and "/torch/" not in file:
            yield None, frame.f_code.co_name
        frame = frame.f_back


class _Dispatched(TorchDispatchMode):
    def __init__(self, owner: NoWaiting):
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs or {}))
        is_on_device = any(self.owner.on_device.has(value) for value in given)
        name = func.overloadpacket.__name__
        self.owner.counted += is_on_device
        if is_on_device and (name in WAITING or _by_mask(name, given)):
            self.owner.refuse(name)
        found = func(*args, **(kwargs or {}))
        if is_on_device:
            self.owner.on_device.add(tree_leaves(found))
            self.owner.on_device.add(value for value in given if _is_written(name, value, given))
        return found


def _by_mask(name: str, given: list[Any]) -> bool:
    """Whether elements are chosen by a mask, of which the host needs to know how many."""
    return name in ("index", "index_put_") and any(
        isinstance(v, Tensor) and v.dtype == torch.bool for v in given[1:]
    )


def _is_written(name: str, value: Any, given: list[Any]) -> bool:
    return name.endswith("_") and given and value is given[0]


class _Called(TorchFunctionMode):
    def __init__(self, owner: NoWaiting):
        super().__init__()
        self.owner = owner

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in LEAVING and args and self.owner.on_device.has(args[0]):
            self.owner.refuse(name)
        if (
            name == "to"
            and self.owner.on_device.has(args[0])
            and _names_cpu((*args[1:], *(kwargs or {}).values()))
        ):
            self.owner.refuse("to")
        return func(*args, **(kwargs or {}))


def _names_cpu(values: Iterable[Any]) -> bool:
    return any(
        value == "cpu" or (isinstance(value, torch.device) and value.type == "cpu") for value in values
    )
