"""The nodes that a run is on, and what is found on each of them, told to every rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as td

from dit.errors import UserError
from dit.ranks import group
from dit.ranks.group import PeerError, World
from dit.ranks.join import ranks_text
from dit.train.plan import Plan
from dit.train.settings import RunConfig

T = TypeVar("T")


class PreflightError(UserError):
    """Something that the run needs is missing on some nodes. The text names them."""


@dataclass(frozen=True)
class Site:
    """The run on its machines.

    group: all ranks, over connections of its own, so that what a rank found can be told where the job's are broken.
    nodes: of each rank.
    """

    plan: Plan
    world: World
    group: Any
    nodes: tuple[str, ...]

    @property
    def cfg(self) -> RunConfig:
        """The run's configuration."""
        return self.plan.cfg

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of its node."""
        return self.nodes.index(self.nodes[self.world.rank]) == self.world.rank

    def named(self, node: str) -> str:
        """A node with its ranks."""
        return f"{node} ({ranks_text(r for r, n in enumerate(self.nodes) if n == node)})"

    def on_nodes(self, action: Callable[[], T]) -> dict[str, T]:
        """Run it on the first rank of each node; the results by node, on every rank.

        Where it fails on some node PreflightError is raised on every rank, or with one node the error itself.
        """
        error: Exception | None = None
        value: Any = None
        if self.leads:
            try:
                value = action()
            except Exception as caught:  # noqa: BLE001 (raised again below, on every rank)
                error = caught
        found = self._agreed((self.leads, value), error)
        return {node: value for node, (leads, value) in zip(self.nodes, found, strict=True) if leads}

    def on_ranks(self, action: Callable[[], T]) -> None:
        """Run it on every rank; where it fails on some, as above."""
        error: Exception | None = None
        try:
            action()
        except Exception as caught:  # noqa: BLE001 (as above)
            error = caught
        self._agreed(None, error)

    def _agreed(self, value: T, error: Exception | None) -> list[T]:
        """Every rank's value, unless one has an error."""
        mine = value, None if error is None else str(error) or type(error).__name__
        found = group.gather_objects(mine, self.group)
        texts = {rank: text for rank, (_, text) in enumerate(found) if text is not None}
        if not texts:
            return [value for value, _ in found]
        if len(set(self.nodes)) > 1:
            raise PreflightError(self._listed(texts)) from error
        first = min(texts)
        raise error or PeerError(f"rank {first} on {self.nodes[first]} failed: {texts[first]}")

    def _listed(self, texts: Mapping[int, str]) -> str:
        """What ranks found, the same words of several nodes once."""
        rows = []
        for text in dict.fromkeys(texts.values()):
            nodes = list(dict.fromkeys(self.nodes[rank] for rank in texts if texts[rank] == text))
            whose = "every node" if len(nodes) == len(set(self.nodes)) else ", ".join(map(self.named, nodes))
            rows.append(f"on {whose}: {text}")
        return "; ".join(rows)


def existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(f for f in (folder, *folder.parents) if os.path.isdir(f))


@contextlib.contextmanager
def open_site(plan: Plan) -> Iterator[Site]:
    """Find which ranks are on which nodes. Collective."""
    world = plan.world
    over_gloo = td.new_group(backend="gloo") if world.size > 1 else None
    try:
        yield Site(plan, world, over_gloo, tuple(group.gather_objects(group.node_name(), over_gloo)))
    finally:
        if over_gloo is not None:
            td.destroy_process_group(over_gloo)
