"""Shards made elsewhere: one sample after the other, each as tar members KEY.npy (or .pt, .pth) and KEY.cls (or .json).

index.py writes their manifest. A block is then a stretch of whole members, so that order, resuming, hashes and
caches are those of our own blocks.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from dit.data.origin import Foreign
from dit.data.shards.blocks import BlockReader
from dit.data.shards.manifest import Manifest
from dit.data.shards.records import TAR_BLOCK, parse_npy, parse_npy_header
from dit.data.sources.beside import at_key, cls_value, has_key, json_fields, keys_shown
from dit.data.sources.classes import Label, read_label
from dit.data.storage.files import AnyStorage, Storage

LOGVAR_RANGE = (-30.0, 20.0)  # to which latent diffusion's DiagonalGaussianDistribution clamps log variances
DTYPES = ("float16", "bfloat16", "float32")
FILES, LONG_NAME, EXTENDED, EXTENSIONS = b"0\x007", ord("L"), b"xL", b"xLgK"  # kinds of a tar's headers


# --- members -----------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A member in the bytes of a tar: its path, and where its data stand."""

    path: bytes
    offset: int
    size: int


def places(data: bytes | bytearray | memoryview) -> Iterator[Place]:
    """List the files in bytes of a tar that were walked by tarwalk.py once, and have not changed since.

    Takes a few microseconds a member, with none of the walk's checks. Raises ValueError where the bytes are of
    something else.
    """
    at, path, size = 0, b"", -1
    while at < len(data):
        start = at + TAR_BLOCK
        if start > len(data):
            raise ValueError(f"breaks off at byte {at}")
        header = bytes(data[at:start])
        kind, length = header[156], int(header[124:136].strip(b" \0") or b"0", 8)
        if kind in EXTENDED:
            said = bytes(data[start : start + length])
            path, size = (said.split(b"\0")[0], size) if kind == LONG_NAME else _pax(said, path, size)
        elif kind in FILES:
            length = length if size < 0 else size
            if start + length > len(data):
                raise ValueError(f"a member of {length} bytes at byte {at} goes past the end")
            yield Place((path or _path(header)).removeprefix(b"./"), start, length)
        if kind not in EXTENSIONS:
            path, size = b"", -1
        at = start + length + -length % TAR_BLOCK


def _path(header: bytes) -> bytes:
    """Return the path in a header; the long ones of ustar have their first part elsewhere."""
    name = header[:100].split(b"\0")[0]
    if header[345] and header[257:263] == b"ustar\0":
        return header[345:500].split(b"\0")[0] + b"/" + name
    return name


def _pax(said: bytes, path: bytes, size: int) -> tuple[bytes, int]:
    """Path and size after pax records ("LENGTH KEY=VALUE\\n"), which set neither in most tars."""
    if b" path=" in said or b" size=" in said:
        while said:
            length = int(said[: said.index(b" ")])
            key, _, value = said[: length - 1].partition(b" ")[2].partition(b"=")
            path = value if key == b"path" else path
            size = int(value) if key == b"size" else size
            said = said[length:]
    return path, size


def split_path(path: bytes, dotted: bool = False) -> tuple[bytes, str]:
    """Return (key, extension) as webdataset has them: the key ends at the name's first dot (dotted: at the last)."""
    dot = (path.rfind if dotted else path.find)(b".", path.rfind(b"/") + 1)
    if dot < 0:
        return path, ""
    return path[:dot], path[dot + 1 :].lower().decode("utf-8", "replace")


class MemberError(ValueError):
    """Says what is wrong with a sample. offset: of the member's header, in the bytes that it was read from."""

    def __init__(self, place: Place, text: str):
        self.offset = place.offset - TAR_BLOCK
        super().__init__(text)


class Sample(NamedTuple):
    """A sample: its key, and its members by extension."""

    key: bytes
    members: dict[str, Place]


def samples_in(found: Iterator[Place], wanted: frozenset[str], dotted: bool = False) -> Iterator[Sample]:
    """Group members by key, of each group those of the wanted extensions; groups without any are left out."""
    key, members = b"", dict[str, Place]()
    for place in found:
        own, extension = split_path(place.path, dotted)
        if own != key:
            if members:
                yield Sample(key, members)
            key, members = own, {}
        if extension in wanted:
            members[extension] = place
    if members:
        yield Sample(key, members)


# --- arrays and labels -------------------------------------------------------------------------------------


def _npy(data: memoryview) -> tuple[str, np.ndarray]:
    try:
        array = parse_npy(data)
    except ValueError as error:
        more = (
            "; save them with np.ascontiguousarray" if b"'fortran_order': True" in bytes(data[:256]) else ""
        )
        raise ValueError(f"{error}{more}") from None
    return array.dtype.name, array


def _pt(data: memoryview) -> tuple[str, np.ndarray]:
    try:
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (whatever bytes make the unpickler raise; the caller says where)
        raise ValueError(f"torch.load(weights_only=True): {str(error).splitlines()[0][:200]}") from None
    if not isinstance(loaded, torch.Tensor) or loaded.layout != torch.strided:
        keys = f" with {', '.join(map(str, list(loaded)[:5]))}" if isinstance(loaded, dict) else ""
        raise ValueError(f"holds a {type(loaded).__name__}{keys}, expected one plain tensor")
    name = str(loaded.dtype).removeprefix("torch.")
    return name, (loaded.float() if loaded.dtype == torch.bfloat16 else loaded).detach().numpy()


# How a member's bytes become (name of the stored type, array), by the end of its extension. All raise ValueError.
ARRAYS: dict[str, Callable[[memoryview], tuple[str, np.ndarray]]] = {"npy": _npy, "pt": _pt, "pth": _pt}


def read_array(extension: str, data: memoryview) -> tuple[str, np.ndarray]:
    """Read (type, array) of a member. Raises ValueError; never unpickles anything but tensors."""
    dtype, array = ARRAYS[extension.rpartition(".")[2]](data)
    if dtype not in DTYPES:
        raise ValueError(f"{dtype}, expected one of {', '.join(DTYPES)}")
    return dtype, array


def _json(data: bytes, key: str) -> Any:
    fields = json_fields(data)
    if not has_key(fields, key):
        raise ValueError(f"nothing under {key!r}; its keys are {keys_shown(fields)}")
    return at_key(fields, key)


# How a member's bytes become a label as it is written; key: of JSON. Both raise ValueError.
LABELS: dict[str, Callable[[bytes, str], Any]] = {"cls": lambda data, key: cls_value(data), "json": _json}


def to_codec(foreign: Foreign, raw: np.ndarray, out: np.ndarray) -> None:
    """Turn stored arrays (n, *foreign.shape) into the codec's: out (n, 2, C, H, W), mean and std, or (n, C, H, W).

    Stored latents (or means and standard deviations) are the codec's times foreign.scale; log variances are of the
    posterior as the codec gives it, and the scale is of its mean and std (Rombach et al., arXiv 2112.10752).
    """
    raw = raw.reshape(out.shape)
    logvar = out.ndim == 5 and foreign.spread == "logvar"
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinite, which the index refuses
        if logvar or foreign.scale != 1.0:
            raw = raw.astype(np.float32)
            if logvar:
                raw[:, 1] = np.exp(0.5 * np.clip(raw[:, 1], *LOGVAR_RANGE))
                raw[:, 0] /= np.float32(foreign.scale)
            else:
                raw /= np.float32(foreign.scale)
        out[...] = raw


def wanted(foreign: Foreign) -> frozenset[str]:
    """Return the extensions of the members that are read."""
    return frozenset(e for e in (foreign.array, foreign.flipped, foreign.label) if e is not None)


def decode(foreign: Foreign, samples: list[Sample], data: bytearray | memoryview, out: np.ndarray) -> None:
    """Decode the arrays of the samples in `data` to `out`, (n, *manifest.shape).

    Raises MemberError naming the sample that is not as `foreign` says.
    """
    for view, extension in enumerate(e for e in (foreign.array, foreign.flipped) if e is not None):
        to_codec(foreign, _stack(foreign, extension, samples, memoryview(data)), out[:, view])


def decode_labels(
    foreign: Foreign,
    samples: list[Sample],
    data: bytearray | memoryview,
    take: Callable[[Any], Label | None],
) -> list[Label | None]:
    """List the labels of the samples in `data`: what `take` makes of each as it is written; -1 where none is stored.

    take: raises ValueError for what is none. Raises MemberError naming the sample.
    """
    if foreign.label is None:
        return [-1] * len(samples)
    labels: list[Label | None] = []
    read = LABELS[foreign.label]
    for sample in samples:
        place = _member(sample, foreign.label)
        try:
            labels.append(
                take(read(bytes(data[place.offset : place.offset + place.size]), foreign.label_key))
            )
        except ValueError as error:
            raise MemberError(place, f"{_name(sample)}.{foreign.label}: no label: {error}") from None
    return labels


def _stack(foreign: Foreign, extension: str, samples: list[Sample], data: memoryview) -> np.ndarray:
    """The arrays of one member of each sample, (n, *foreign.shape), checked."""
    raw = np.empty((len(samples), *foreign.shape), np.float16 if foreign.dtype == "float16" else np.float32)
    flat = raw.reshape(len(samples), -1).view(np.uint8)  # (n, bytes of an array)
    head = b""  # of the npy file before, where the bytes behind it can be copied as they are
    for row, sample in enumerate(samples):
        place = _member(sample, extension)
        _, start, size = place
        if head and size == len(head) + flat.shape[1] and data[start : start + len(head)] == head:
            flat[row] = np.frombuffer(data[start + len(head) : start + size], np.uint8)
            continue
        member = data[start : start + size]
        try:
            dtype, array = read_array(extension, member)
        except ValueError as error:
            raise MemberError(place, f"{_name(sample)}.{extension}: {error}") from None
        if dtype != foreign.dtype or array.shape != foreign.shape:
            found = f"{dtype} {array.shape}, expected {foreign.dtype} {foreign.shape}"
            raise MemberError(place, f"{_name(sample)}.{extension}: {found}")
        raw[row] = array
        if extension.endswith("npy") and array.dtype == raw.dtype:
            head = bytes(member[: parse_npy_header(member)[2]])
    return raw


def _member(sample: Sample, extension: str) -> Place:
    place = sample.members.get(extension)
    if place is None:
        first = next(iter(sample.members.values()))
        raise MemberError(first, f"the sample {_name(sample)!r} has no .{extension}")
    return place


def _name(sample: Sample) -> str:
    return sample.key.decode("utf-8", "replace")


# --- the reader --------------------------------------------------------------------------------------------


class SampleReader(BlockReader):
    """Reads blocks of an index of foreign shards; the same calls, checks and errors as of its parent.

    A block's samples are converted to the manifest's array and dtype while they are read.
    """

    def __init__(self, manifest: Manifest, *args: Any, **kwargs: Any):
        super().__init__(manifest, *args, **kwargs)
        assert manifest.foreign is not None
        self.foreign, self.wanted = manifest.foreign, wanted(manifest.foreign)
        self._places = {name: i for i, name in enumerate(manifest.classes)} if self.foreign.named else {}

    def open_storage(self, root: str) -> Storage:
        """Open what holds shards in their manifest's folder or anywhere else."""
        return AnyStorage(root)

    def parse(self, index: int, record: memoryview) -> dict[str, np.ndarray]:
        """See the parent. The label is -1 everywhere in a data set without; the id is the place in the data set."""
        count, first = self.manifest.blocks[index].samples, self.manifest.first_id(index)
        samples = list(samples_in(places(record), self.wanted, self.foreign.dotted))
        if len(samples) != count:
            raise ValueError(f"{len(samples)} samples, the manifest says {count}")
        arrays = np.empty((count, *self.manifest.shape), self.manifest.dtype)
        decode(self.foreign, samples, record, arrays)
        return {
            self.manifest.array: arrays,
            "label": np.array(decode_labels(self.foreign, samples, record, self._number), np.int64),
            "id": np.arange(first, first + count, dtype=np.uint64),
        }

    def _number(self, value: Any) -> int:
        """The number of a label's class."""
        label = read_label(value, "name" if self.foreign.named else "number")
        if not isinstance(label, str):
            return label
        if label not in self._places:
            raise ValueError(f"{label!r}, which is none of the {len(self._places)} classes")
        return self._places[label]

    def keys(self, record: bytes) -> list[str]:
        """Return the keys of the samples in a block's bytes."""
        return [_name(s) for s in samples_in(places(record), self.wanted, self.foreign.dotted)]

    def expected_keys(self, index: int, names: list[str]) -> list[str]:
        """Return the keys that the names file has for them."""
        first = self.manifest.first_id(index)
        return names[first : first + self.manifest.blocks[index].samples]
