"""How shards made elsewhere store their samples: what somebody says of them, and what the first one shows."""

from __future__ import annotations

import math
from typing import Any, Literal

from dit.config import ConfigError, config, from_dict
from dit.data import DataError
from dit.data.foreign.reader import ARRAYS, read_array, split_path
from dit.data.foreign.tape import MAX_SAMPLE, Beginning, SampleFormat, groups
from dit.data.origin import Foreign
from dit.data.shards.manifest import ITEMSIZE, MAX_BLOCK_BYTES
from dit.data.sources.beside import MAX_LABEL, has_key, json_fields, keys_shown, usual_key
from dit.data.sources.classes import LabelType
from dit.data.sources.tarwalk import Member
from dit.data.storage.remote import public


@config
class IndexOptions:
    """How the samples are stored, where the shards do not say it themselves.

    array: latents (C, H, W), or moments (2C, H, W) or (2, C, H, W); a leading axis of 1 may stand before. spread: what
    the second half of moments is. extension, label: of the members; found in the first sample by default. label_key: of
    the label in JSON; the first usual one by default. label_type: what labels are taken as. flipped: extension of the
    flipped view. scale: stored = latents * scale. dtype: of the samples when they are read.
    classes: their names; those that were found by default. image_size: pixels a side; the latents' times the
    codec's factor by default. block: samples a block at most. threads: shards at a time.
    """

    # latents (C, H, W), or moments (2C, H, W) or (2, C, H, W)
    array: Literal["latents", "moments"] = "latents"
    spread: Literal["std", "logvar"] = "std"  # what the second half of moments is
    extension: str | None = None  # of the members that hold arrays; null = as in the first sample
    flipped: str | None = None  # extension of the flipped view; null = there is none
    # how labels are stored; auto = as in the first sample
    label: Literal["auto", "cls", "json", "none"] = "auto"
    label_key: str | None = None  # of the label in KEY.json; null = the first usual one
    label_type: LabelType = "auto"  # take labels as numbers, or as names of classes
    scale: float = 1.0  # stored = latents * scale
    dtype: Literal["float16", "float32"] = "float16"  # of the samples when they are read
    classes: tuple[str, ...] | None = None  # their names; null = those that are found
    image_size: int | None = None  # pixels a side; null = the latents' times the codec's factor
    block: int = 256  # samples a block at most
    threads: int = 4  # shards that are read at a time

    def __post_init__(self) -> None:
        for name in ("block", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(
                f"scale is {self.scale}, expected a finite number above 0 (stored = latents * scale)"
            )
        if self.label_key is not None and self.label in ("cls", "none"):
            raise ConfigError(
                f"label_key is {self.label_key!r}, of JSON, and label is {self.label}: leave one out"
            )
        for name in ("extension", "flipped"):
            given = getattr(self, name)
            if given is not None and given.lower().rpartition(".")[2] not in ARRAYS:
                raise ConfigError(f"{name} is {given!r}, expected one that ends in {', '.join(ARRAYS)}")


def probe(location: str, options: IndexOptions, channels: int) -> SampleFormat:
    """Find out how samples are stored, from a shard's first one. Raises DataError where that is not clear."""
    file = Beginning(location)
    key, members, dotted = _first_sample(file, options)
    where = f"{public(location)}: the sample {key!r}"
    extension = options.extension or next(e for e in members if _is_array(e, options))
    arrays = [e for e in members if _is_array(e, options)]
    if extension not in members or (options.extension is None and len(arrays) > 1):
        have = ", ".join(arrays)
        raise DataError(f"{where} has the arrays {have}: choose one with --extension (and --flipped)")
    label, label_key, keys = _found_label(where, file, members, options)
    try:
        dtype, array = read_array(extension, memoryview(file.member(members[extension], MAX_SAMPLE)))
        shape = codec_shape(options.array, array.shape)
        if shape[-3] != channels:
            more = _advice(options.array, array.shape, channels)
            raise ValueError(f"{array.shape} has {shape[-3]} channels, the codec has {channels}{more}")
    except ValueError as error:
        raise DataError(f"{where}: .{extension}: {error}") from None
    values: dict[str, Any] = {"array": extension, "flipped": options.flipped, "dotted": dotted}
    values |= {"label": label, "label_key": label_key}
    values |= {"shape": array.shape, "dtype": dtype, "spread": options.spread, "scale": options.scale}
    whole = (1 if options.flipped is None else 2, *shape)
    most = MAX_BLOCK_BYTES // (math.prod(whole) * ITEMSIZE[options.dtype])
    return SampleFormat(
        from_dict(Foreign, values),
        whole,
        options.dtype,
        block=max(1, min(options.block, most)),
        no_labels=options.label == "auto" and label is None,
        labels=options.label_type,
        keys=keys,
    )


def _advice(array: Literal["latents", "moments"], stored: tuple[int, ...], channels: int) -> str:
    """What an array of another number of channels may be: of one with its channels last, or of moments."""
    *_, first, middle, last = stored
    known = (channels, 2 * channels) if array == "moments" else (channels,)
    is_last = last in known and (first == middle or middle != last)  # latents are square, as a rule
    if is_last:
        return (
            f": is it (H, W, C)? Channels come first, as in ({last}, {first}, {middle}): write the arrays anew, "
            "as numpy.moveaxis(array, -1, -3) gives them"
        )
    return ": are these mean and std? --array=moments" if array == "latents" and first == 2 * channels else ""


def _first_sample(file: Beginning, options: IndexOptions) -> tuple[str, dict[str, Member], bool]:
    """(key, members by extension, whether keys have dots) of the first sample that has an array."""
    for key, group in groups(file, file.name):
        found = list(group)
        if options.extension is None and _has_dots(found, options):
            return *next(iter(_by_last_dot(found).items())), True
        members = {split_path(m.path.encode())[1]: m for m in found}
        if any(_is_array(extension, options) for extension in members):
            return key, members, False
    raise DataError(f"{public(file.name)}: no member ends in one of {', '.join(ARRAYS)}")


def _by_last_dot(found: list[Member]) -> dict[str, dict[str, Member]]:
    samples: dict[str, dict[str, Member]] = {}
    for member in found:
        key, extension = split_path(member.path.encode(), dotted=True)
        samples.setdefault(key.decode(), {})[extension] = member
    return samples


def _has_dots(found: list[Member], options: IndexOptions) -> bool:
    """Whether members that share their path up to the first dot (22.00.npy, 22.00.cls, 22.01.npy, ...) are samples of
    their own: up to the last dot each has an array and a label."""
    if any("." not in split_path(m.path.encode())[1] for m in found):
        return False
    ends = [set(members) for members in _by_last_dot(found).values()]
    return all(end & {"cls", "json"} and any(_is_array(e, options) for e in end) for end in ends)


def _is_array(extension: str, options: IndexOptions) -> bool:
    return extension.rpartition(".")[2] in ARRAYS and extension != options.flipped


def _found_label(
    where: str, file: Beginning, members: dict[str, Member], options: IndexOptions
) -> tuple[Literal["cls", "json"] | None, str, str]:
    """(the file beside an array that is the label, the key in it, the keys that there are if it is none).

    Any .cls, else a .json with one of the usual keys; both may turn out bad ones.
    """
    key = options.label_key
    if options.label == "none" or (options.label == "auto" and not {"cls", "json"} & set(members)):
        return None, "label", ""
    if options.label == "cls" or ("cls" in members and options.label == "auto" and key is None):
        return "cls", "label", ""
    if "json" not in members:
        return "json", key or "label", ""  # which is said of the first sample
    try:
        fields = json_fields(file.member(members["json"], MAX_LABEL))
    except ValueError as error:
        raise DataError(f"{where}: .json: {error}; --label=none if it is no label") from None
    key = key or usual_key(fields)
    if key is None and options.label == "auto":
        return None, "label", keys_shown(fields)
    if key is None or not has_key(fields, key):
        raise DataError(
            f"{where}: .json: no label under {key or 'a usual key'}; its keys are {keys_shown(fields)}: choose one "
            "with --label_key, or --label=none"
        )
    return "json", key, ""


def codec_shape(array: Literal["latents", "moments"], stored: tuple[int, ...]) -> tuple[int, ...]:
    """Return (C, H, W), or (2, C, H, W) of moments, for one stored array. ValueError for a shape that is neither."""
    inner = stored[1:] if len(stored) > 3 and stored[0] == 1 else stored
    if array == "latents" and len(inner) == 3:
        return inner
    if array == "moments" and len(inner) == 3 and inner[0] % 2 == 0:
        return 2, inner[0] // 2, *inner[1:]
    if array == "moments" and len(inner) == 4 and inner[0] == 2:
        return inner
    expected = "(C, H, W)" if array == "latents" else "(2C, H, W) or (2, C, H, W)"
    raise ValueError(f"an array {stored} for {array}, expected {expected}, maybe with a leading 1")
