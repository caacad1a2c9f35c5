"""What is there already when shards are to be indexed: an index of the same, or shards that need none."""

from __future__ import annotations

import os
from pathlib import Path

from dit.data import DataError
from dit.data.codecs.base import Codec
from dit.data.foreign.index import UnknownCodec, shard_name
from dit.data.foreign.probe import IndexOptions
from dit.data.shards.manifest import FILE, Manifest
from dit.data.storage.files import AnyStorage
from dit.data.storage.remote import is_remote
from dit.files import expand
from dit.outputs import refuse_other


def refuse_encoded(shards: list[str]) -> None:
    """Raise DataError for shards of a data set that tools/encode.py wrote, which has a manifest."""
    for folder in dict.fromkeys(os.path.dirname(shard) for shard in shards if not is_remote(shard)):
        if not os.path.isfile(os.path.join(folder, FILE)):
            continue
        manifest = Manifest.load(folder)
        ours = {manifest.path(i) for i in range(len(manifest.shards))}
        if manifest.foreign is None and ours.intersection(shards):
            raise DataError(f"{folder} has a manifest already: use it as it is")


def already(
    shards: list[str], out: str | os.PathLike[str], codec: Codec | UnknownCodec, options: IndexOptions
) -> Manifest | None:
    """Return the index of these shards with these options in the folder `out`, or None; judged by names and bytes.

    Raises DataError where there is another one, OutputError where the folder belongs to something else.
    """
    folder = Path(expand(str(out))).resolve()
    refuse_other(folder, "data set")
    if not (folder / FILE).exists():
        return None
    found, storage = Manifest.load(folder), AnyStorage(str(folder))
    same = [shard.name for shard in found.shards] == [shard_name(shard, folder) for shard in shards]
    if same and _chosen(found, codec, options) and all(storage.size(s.name) == s.bytes for s in found.shards):
        return found
    raise DataError(
        f"{folder / FILE} exists already, of other shards or options: remove it or choose another folder"
    )


def _chosen(found: Manifest, codec: Codec | UnknownCodec, options: IndexOptions) -> bool:
    """Whether an index has all that these options say."""
    foreign = found.foreign
    if foreign is None:
        return False
    label = {"auto": foreign.label, "none": None}.get(options.label, options.label)
    said = (
        foreign.spread,
        foreign.scale,
        foreign.flipped,
        foreign.label,
        found.array,
        found.dtype,
        found.codec,
    )
    asked = (
        options.spread,
        options.scale,
        options.flipped,
        label,
        options.array,
        options.dtype,
        codec.identity(),
    )
    free: list[tuple[object, object]] = [(options.extension, foreign.array), (options.classes, found.classes)]
    free += [(options.image_size, found.image_size), (options.label_key, foreign.label_key)]
    if any(given not in (None, has) for given, has in free):
        return False
    by_themselves = foreign.named and not all(map(str.isdecimal, found.classes))
    named = {"auto": by_themselves, "name": True, "number": False}[options.label_type]
    if foreign.label is not None and foreign.named != named:
        return False
    return said == asked and found.block <= options.block
