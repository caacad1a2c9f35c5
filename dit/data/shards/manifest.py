"""manifest.json: the contract between those who write latent shards and those who read them.

Written last, beside its final name, and renamed: a folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from dit.config import ConfigError, config, from_dict, to_dict
from dit.data import DataError
from dit.data.origin import Foreign, Split, leave_out_unsaid
from dit.data.shards.absent import absent
from dit.data.storage.files import describe, open_storage
from dit.data.storage.remote import advice_of, advised, has_own_root, is_remote, join, public
from dit.files import expand, write_atomically

FILE = "manifest.json"
FORMATS = {
    "dit-blocks/2": "blocks as tools/encode.py writes them",
    "dit-samples/1": "an index of other shards",
}
CHECKSUM = "sha256"  # the manifest's own, over all its other keys
DTYPE: Literal["float16"] = "float16"  # of encoded images
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
MAX_BLOCK_BYTES = 16 << 20  # of samples; a reading thread holds a block, so blocks of big samples hold fewer


@config
class Block:
    """One record: `bytes` bytes at `offset` of shard number `shard`, and how many samples they hold.

    xxh3: their 64-bit XXH3 hash, 16 hexadecimal digits.
    """

    shard: int
    offset: int
    bytes: int
    samples: int
    xxh3: str


@config
class Shard:
    """One tar."""

    name: str
    bytes: int
    sha256: str


@config
class Names:
    """The names file: line i (from 0) is the name of the image with id i."""

    file: str = "names.txt"
    count: int
    sha256: str


@config
class Manifest:
    """A data set of latents on disk (the data contract: docs/architecture.md).

    shape: of one sample's array: (views, 2, C, H, W) for moments, mean then std; (views, C, H, W) for latents.
    mean, std: (C,) of the latents over samples, views and places, std^2 = Var[mean] + E[std^2].
    eps: whether the noise that each sample was generated from is stored beside it, float32 of the same shape
        (pairs.py). Then mean and std are not of these samples: they are the normalisation of the model that made
        them, which a model trained on them must see again.
    posterior: what is kept of the codec's posterior: its moments, one sample, or nothing (pixels have none, and
        generated latents do not come from it).
    names.count: images the source had; `bad` are those of them that could not be read, so are not here.
    counted: images by what was done to them beside cropping (sources/decode.py: COUNTED), such as turned upright;
        not in the file where that was done to none, or was not counted yet.
    foreign: of an index of shards made elsewhere. Their names may be whole paths and URLs, a block is a stretch of
        whole members, the id of a sample is its place in the data set, and its name its key.
    split: which part of a larger set this is, where a share was held out.
    """

    format: Literal["dit-blocks/2", "dit-samples/1"] = "dit-blocks/2"
    samples: int
    array: Literal["moments", "latents"]
    shape: tuple[int, ...]
    dtype: Literal["float16", "float32"] = DTYPE
    eps: bool = False
    views: tuple[Literal["original", "flipped"], ...]
    posterior: Literal["moments", "sample", "none"]
    image_size: int
    transform: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    unlabelled: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    codec: dict[str, Any]
    seed: int
    block: int
    names: Names
    bad: tuple[str, ...] = ()
    counted: dict[str, int] = field(default_factory=dict)
    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]
    foreign: Foreign | None = None
    split: Split | None = None
    root: str = ""  # the folder or URL it was read from; not in the file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read and check a data set's manifest; `path` is its folder or the file, here or at a URL.

        Raises DataError where there is none, or where it is not as it was written.
        """
        root = folder_of(expand(os.fspath(path)))
        file = public(join(root, FILE))
        try:
            data = open_storage(root).bytes(FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(absent(root, FILE)) from None
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {advised(error)}") from None
        manifest = cls._parse(file, data, root)
        problems = list(manifest.problems())
        if problems:
            raise DataError(f"{file}: {'; '.join(problems[:5])}")
        return manifest

    @classmethod
    def _parse(cls, file: str, data: bytes, root: str) -> Manifest:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON ({error}); copy it again or encode again") from None
        if not isinstance(values, dict) or values.get("format") not in FORMATS:
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise DataError(
                f"{file}: format {got!r}, expected {' or '.join(map(repr, FORMATS))}; encode again with this version"
            )
        stated = values.pop(CHECKSUM, None)
        if stated != checksum(values):
            raise DataError(
                f"{file}: altered: its checksum is {checksum(values)[:16]}..., it says {str(stated)[:16]}...; copy "
                "it again or encode again (a manifest is not to be edited by hand)"
            )
        try:
            return from_dict(cls, {**values, "root": root})
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write manifest.json in `folder`, whole or not at all."""
        write_atomically(Path(folder) / FILE, self.text())

    def text(self) -> bytes:
        """Return what manifest.json holds, to the byte."""
        plain = self._plain()
        return (json.dumps({**plain, CHECKSUM: checksum(plain)}, indent=1) + "\n").encode()

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        del plain["root"]
        leave_out_unsaid(plain)
        return plain

    def problems(self) -> list[str]:
        """List what in it contradicts itself, a line each."""
        found = [] if self.blocks else ["holds no samples"]
        if sum(b.samples for b in self.blocks) != self.samples:
            found.append(f"blocks hold {sum(b.samples for b in self.blocks)} samples, not {self.samples}")
        if sum(self.class_counts) + self.unlabelled != self.samples:
            found.append("class counts do not add up to the samples")
        if len(self.classes) != len(self.class_counts):
            found.append(f"{len(self.classes)} classes but {len(self.class_counts)} class counts")
        if len(self.shape) != (5 if self.array == "moments" else 4) or self.shape[0] != len(self.views):
            found.append(f"shape {self.shape} does not fit {self.array} of {len(self.views)} views")
        elif self.eps and (self.array != "latents" or len(self.views) != 1):
            found.append(
                f"noise is stored with one view of latents, not with {len(self.views)} of {self.array}"
            )
        elif len(self.mean) != self.channels or len(self.std) != self.channels:
            found.append(f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels")
        if (self.foreign is not None) != (self.format == "dit-samples/1"):
            found.append(f"format {self.format} with foreign: {self.foreign}")
        elif self.foreign is not None and not self._fits(self.foreign):
            found.append(f"shape {self.shape} does not fit stored arrays of {self.foreign.shape}")
        found += [f"{name!r} is no name of a file of this data set" for name in self.odd_names()]
        return found + list(self._block_problems())

    def odd_names(self) -> list[str]:
        """List names of its files that no file can have, or that lead out of its folder where they should not.

        Shards of an index may lie anywhere.
        """
        inside, anywhere = [self.names.file], [s.name for s in self.shards]
        if self.foreign is None:
            inside, anywhere = [*inside, *anywhere], []
        odd = [n for n in (*inside, *anywhere) if not n or not n.isprintable()]
        return odd + [n for n in inside if has_own_root(n) or ".." in n.split("/")]

    def _fits(self, foreign: Foreign) -> bool:
        """Whether stored arrays have the numbers of one view, and as many views as there are."""
        views = 1 if foreign.flipped is None else 2
        same = math.prod(foreign.shape) == math.prod(self.shape[1:]) and foreign.shape[-2:] == self.shape[-2:]
        return same and views == len(self.views) and not self.eps

    def _block_problems(self) -> Iterator[str]:
        """Blocks stand one behind the other in the order of their shards, and have room for their samples."""
        numbers, stored = math.prod(self.shape), self.dtype if self.foreign is None else self.foreign.dtype
        sample = numbers * ITEMSIZE[stored]  # bytes in its shard, without headers
        most = max(1, MAX_BLOCK_BYTES // max(1, numbers * ITEMSIZE[self.dtype]))
        if min(self.shape, default=0) < 1 or self.block > most:
            yield f"blocks of {self.block} samples of shape {self.shape}, expected at most {most}"
        shard, end = 0, 0
        for i, b in enumerate(self.blocks):
            if not 0 <= b.shard < len(self.shards) or not 0 < b.samples <= self.block:
                yield f"block {i}: shard {b.shard} or {b.samples} samples out of range"
                continue
            if b.offset < 0 or b.offset + b.bytes > self.shards[b.shard].bytes:
                yield f"block {i} lies outside {self.shards[b.shard].name}"
            if b.shard < shard or b.offset != (end if b.shard == shard else 0):
                yield f"block {i} does not begin where the one before it ends"
            if b.bytes < b.samples * sample:
                yield f"block {i}: {b.bytes} bytes have no room for {b.samples} samples of {sample} bytes"
            shard, end = b.shard, b.offset + b.bytes

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.shape[-3]

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of a latent."""
        return self.shape[-2], self.shape[-1]

    @property
    def digest(self) -> str:
        """sha256 over everything in it: the data's identity in checkpoints, wherever the folder lies."""
        return checksum(self._plain())

    def path(self, shard: int) -> str:
        """Return where a shard lies."""
        return join(self.root, self.shards[shard].name)

    def record(self, index: int) -> str:
        """Name a block's record in its shard, for messages; foreign samples by their places from and to."""
        shard = self.blocks[index].shard
        if self.foreign is not None:
            first = self.first_id(index)
            return f"of samples {first} to {first + self.blocks[index].samples - 1}"
        return record_key(self.shards[shard].name, index - self._first_blocks[shard])

    def first_id(self, index: int) -> int:
        """Count the samples before block `index`: the id of its first one in an index of foreign shards."""
        return self._first_ids[index]

    @cached_property
    def _first_blocks(self) -> dict[int, int]:
        """The first block of each shard."""
        return {b.shard: i for i, b in reversed(list(enumerate(self.blocks)))}

    @cached_property
    def _first_ids(self) -> tuple[int, ...]:
        return tuple(accumulate((b.samples for b in self.blocks), initial=0))

    def read_names(self) -> list[str]:
        """Read the images' names by id. Raises DataError where the file is not the one that was written."""
        file = public(join(self.root, self.names.file))
        try:
            data = open_storage(self.root).bytes(self.names.file)
        except OSError as error:
            raise DataError(f"{file}: {describe(error)}; {advice_of(error) or 'encode again'}") from None
        if hashlib.sha256(data).hexdigest() != self.names.sha256:
            raise DataError(f"{file}: not the names file that the manifest describes; encode again")
        try:
            return data.decode().split("\n")[:-1]
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 ({error}); encode again") from None


def folder_of(path: str) -> str:
    """Return the folder or URL of a data set, given itself or its manifest; a URL's query stays."""
    base, mark, query = path.partition("?") if is_remote(path) else (path, "", "")
    return (base.removesuffix(f"/{FILE}").rstrip("/") or "/") + mark + query


def record_key(shard: str, place: int) -> str:
    """Return the key of the record at a place of a shard: `000012-0003` in shard-000012.tar."""
    return f"{Path(shard).stem.removeprefix('shard-')}-{place:04d}"


def checksum(values: dict[str, Any]) -> str:
    """Hash (sha256) JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
