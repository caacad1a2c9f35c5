"""The matrices of a network that ranks share in pieces: who has which piece, who works on which, and the exchange.

ZeRO 1 and 2 cut a flat tensor of many matrices at arbitrary places, ZeRO 3 each matrix in as many pieces as there are
ranks, and without sharding every rank has all. One plan serves all of it: each matrix has one rank that works on it,
to which the others send their pieces, and which sends back to each what it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dit.ranks import group
from dit.ranks.group import World

Span = tuple[int, int]  # from, to: elements of a flattened matrix


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's elements on this rank.

    name, shape: of the whole parameter, (rows, columns). stacked: matrices in it, one above the other. offset: of the
    first element, in the flattened parameter. tensor: number of the flat tensor that holds it, from `start` on.
    """

    name: str
    shape: tuple[int, ...]
    stacked: int
    offset: int
    numel: int
    tensor: int
    start: int

    def spans(self) -> list[tuple[Key, Span]]:
        """The matrices that it is of, with the elements of each."""
        rows, columns = self.shape[0] // self.stacked, self.shape[1]
        size, found = rows * columns, []
        for n in range(self.stacked):
            low, high = max(self.offset, n * size), min(self.offset + self.numel, (n + 1) * size)
            if low < high:
                found.append((Key(self.name, n, rows, columns), (low - n * size, high - n * size)))
        return found


@dataclass(frozen=True, order=True)
class Key:
    """A matrix: number `part` of those that a parameter holds, and its shape."""

    name: str
    part: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Its elements."""
        return self.rows * self.columns

    @property
    def work(self) -> int:
        """FLOPs of a product of it with its transpose, by which the work is shared out."""
        return 2 * self.numel * min(self.rows, self.columns)


@dataclass(frozen=True)
class Shared:
    """A matrix, what each rank holds of it (None: nothing), and the rank that works on it."""

    key: Key
    held: tuple[Span | None, ...]
    owner: int

    def gives(self, rank: int) -> bool:
        """Whether a rank has to send its piece to the owner, which does not have the whole."""
        return (
            rank != self.owner
            and self.held[rank] is not None
            and not _is_whole(self.key, self.held[self.owner])
        )

    def gets(self, rank: int) -> bool:
        """Whether a rank is sent what the owner made of the elements that it holds."""
        return rank != self.owner and self.held[rank] is not None

    def length(self, rank: int) -> int:
        """Elements that a rank holds."""
        low, high = self.held[rank] or (0, 0)
        return high - low


def _is_whole(key: Key, span: Span | None) -> bool:
    return span == (0, key.numel)


def shared_out(pieces: Sequence[Sequence[Piece]]) -> list[Shared]:
    """Which rank works on which matrix, from every rank's pieces: the same list on every rank.

    A rank that has the whole is preferred, as nothing has to be sent to it; the rest goes by the work so far.
    """
    held: dict[Key, list[Span | None]] = {}
    for rank, own in enumerate(pieces):
        for piece in own:
            for key, span in piece.spans():
                held.setdefault(key, [None] * len(pieces))[rank] = span
    loads, found = [0] * len(pieces), []
    for key in sorted(held, key=lambda k: (-k.work, k)):
        spans = held[key]
        ranks = [r for r, span in enumerate(spans) if span is not None]
        able = [r for r in ranks if _is_whole(key, spans[r])] or ranks
        owner = min(able, key=lambda r: (loads[r], r))
        loads[owner] += key.work
        found.append(Shared(key, tuple(spans), owner))
    return found


class Exchange:
    """Gathers the pieces of this rank's matrices from all ranks, and hands back what was made of them."""

    def __init__(self, pieces: Sequence[Piece], world: World, dtype: torch.dtype):
        """Collective. dtype: of everything that is sent."""
        self.rank, self.ranks, self.device, self.dtype = world.rank, range(world.size), world.device, dtype
        self.matrices = shared_out(group.gather_objects(tuple(pieces)))
        self.own = [m for m in self.matrices if m.owner == self.rank]
        # where each matrix's elements lie here: number of the tensor, and the first one in it
        self.here = {
            key: (piece.tensor, piece.start + key.part * key.numel + low - piece.offset)
            for piece in pieces
            for key, (low, _) in piece.spans()
        }

    @property
    def sent(self) -> int:
        """Bytes that this rank sends in one `gathered` and one `handed_back`."""
        there = sum(m.length(self.rank) for m in self.matrices if m.gives(self.rank))
        back = sum(m.length(r) for m in self.own for r in self.ranks if m.gets(r))
        return (there + back) * self.dtype.itemsize

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Make whole the matrices that this rank works on: (rows, columns) each, in the order of `own`.

        tensors: the flat ones that pieces lie in. Collective.
        """
        out = [
            [self._mine(tensors, m) for m in self.matrices if m.owner == r and m.gives(self.rank)]
            for r in self.ranks
        ]
        parts = [
            iter(p)
            for p in self._swap(out, [[m.length(r) for m in self.own if m.gives(r)] for r in self.ranks])
        ]
        found = []
        for m in self.own:
            if _is_whole(m.key, m.held[self.rank]):
                found.append(self._mine(tensors, m).view(m.key.rows, m.key.columns))
                continue
            whole = torch.empty(m.key.numel, dtype=self.dtype, device=self.device)
            for r, span in enumerate(m.held):
                if span is not None:
                    whole[slice(*span)] = self._mine(tensors, m) if r == self.rank else next(parts[r])
            found.append(whole.view(m.key.rows, m.key.columns))
        return found

    def handed_back(self, made: Sequence[Tensor]) -> list[tuple[int, int, Tensor]]:
        """Give every rank its elements of what was made: (number of the tensor, first element in it, (numel,)) each.

        made: of `own`, in its order. Collective.
        """
        both = list(zip(self.own, made, strict=True))
        theirs = [[m for m in self.matrices if m.owner == r and m.gets(self.rank)] for r in self.ranks]
        out = [[_part(whole, m.held[r]) for m, whole in both if m.gets(r)] for r in self.ranks]
        parts = self._swap(out, [[m.length(self.rank) for m in some] for some in theirs])
        found = [(m.key, _part(whole, m.held[self.rank])) for m, whole in both if m.held[self.rank]]
        for some, pieces in zip(theirs, parts, strict=True):
            found += [(m.key, piece) for m, piece in zip(some, pieces, strict=True)]
        return [(*self.here[key], piece) for key, piece in found]

    def _mine(self, tensors: Sequence[Tensor], matrix: Shared) -> Tensor:
        """The elements of a matrix that this rank holds."""
        number, start = self.here[matrix.key]
        return tensors[number].view(-1).narrow(0, start, matrix.length(self.rank))

    def _swap(self, out: list[list[Tensor]], lengths: list[list[int]]) -> list[list[Tensor]]:
        """Send each rank its tensors, and get from each those of `lengths`."""
        if len(self.ranks) == 1:
            return [[]]
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        sizes = [sum(t.numel() for t in some) for some in out], [sum(some) for some in lengths]
        sending = torch.cat([empty, *(t for some in out for t in some)])
        arrived = torch.empty(sum(sizes[1]), dtype=self.dtype, device=self.device)
        width = self.dtype.itemsize
        there, back = ([width * n for n in some] for some in sizes)
        # as bytes: not every backend sends every dtype
        dist.all_to_all_single(arrived.view(torch.uint8), sending.view(torch.uint8), back, there)
        return [list(p.split(n)) if n else [] for p, n in zip(arrived.split(sizes[1]), lengths, strict=True)]


def _part(whole: Tensor, span: Span | None) -> Tensor:
    """Elements of a flattened matrix."""
    low, high = span or (0, 0)
    return whole.reshape(-1)[low:high]
