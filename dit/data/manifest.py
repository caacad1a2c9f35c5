"""manifest.json: the contract between those who write latent shards and those who read them.

Written last, beside its final name, and renamed: a folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from dit.config import ConfigError, config, from_dict, to_dict
from dit.data import DataError
from dit.files import write_atomically

FILE = "manifest.json"
FORMAT: Literal["dit-blocks/1"] = "dit-blocks/1"
DTYPE: Literal["float16"] = "float16"  # of encoded images


@config
class Block:
    """One record: `bytes` bytes at `offset` of shard number `shard`, their zlib crc32, and how many samples."""

    shard: int
    offset: int
    bytes: int
    samples: int
    crc32: int


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
    """A data set of latents on disk (design: "Data contract").

    shape: of one sample's array: (views, 2, C, H, W) for moments, mean then std; (views, C, H, W) for latents.
    mean, std: (C,) of the latents over samples, views and places, std^2 = Var[mean] + E[std^2].
    eps: whether the noise that each sample was generated from is stored beside it, float32 of the same shape
        (pairs.py). Then mean and std are not of these samples: they are the normalisation of the model that made
        them, which a model trained on them must see again.
    posterior: what is kept of the codec's posterior: its moments, one sample, or nothing (pixels have none, and
        generated latents do not come from it).
    names.count: images the source had; `bad` are those of them that could not be read, so are not here.
    """

    format: Literal["dit-blocks/1"] = FORMAT
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
    shards: tuple[Shard, ...]
    blocks: tuple[Block, ...]
    root: str = ""  # the folder it was read from; not in the file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read and check a data set's manifest; `path` is its folder or the file. Raises DataError."""
        file = Path(path)
        file = file / FILE if file.is_dir() or file.suffix != ".json" else file
        if not file.is_file():
            there = (
                "an encode that did not finish, or not a data set"
                if file.parent.is_dir()
                else "no such folder"
            )
            raise DataError(
                f"{file.parent}: no {FILE} ({there}); write one with tools/encode.py, or pairs for reflow with "
                "tools/sample.py RUN --save_pairs=DIR"
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: not JSON ({error}); encode again") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            got = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise DataError(f"{file}: format {got!r}, expected {FORMAT!r}; encode again with this version")
        try:
            manifest = from_dict(cls, {**values, "root": str(file.parent)})
        except ConfigError as error:
            raise DataError(f"{file}: {error}") from None
        problems = list(manifest.problems())
        if problems:
            raise DataError(f"{file}: {'; '.join(problems[:5])}")
        return manifest

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write manifest.json in `folder`, whole or not at all."""
        text = json.dumps(self._plain(), indent=1) + "\n"
        write_atomically(Path(folder) / FILE, text.encode())

    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_dict(self)
        del plain["root"]
        if not self.eps:
            del plain["eps"]  # data sets that knew no such key keep their digest
        return plain

    def problems(self) -> list[str]:
        """What in it contradicts itself, a line each."""
        found = []
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
        for i, b in enumerate(self.blocks):
            if not 0 <= b.shard < len(self.shards) or not 0 < b.samples <= self.block:
                found.append(f"block {i}: shard {b.shard} or {b.samples} samples out of range")
            elif b.offset < 0 or b.offset + b.bytes > self.shards[b.shard].bytes:
                found.append(f"block {i} lies outside {self.shards[b.shard].name}")
        return found

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
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def path(self, shard: int) -> Path:
        """Where a shard lies."""
        return Path(self.root) / self.shards[shard].name

    def read_names(self) -> list[str]:
        """The images' names by id. Raises DataError where the file is not the one that was written."""
        file = Path(self.root) / self.names.file
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}; encode again") from None
        if hashlib.sha256(data).hexdigest() != self.names.sha256:
            raise DataError(f"{file}: not the names file that the manifest describes; encode again")
        return data.decode().split("\n")[:-1]
