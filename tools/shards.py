"""Check, describe and index data sets of latents: `python tools/shards.py verify|info|index PATH`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.flags import options_as_flags
from dit.config import to_dict
from dit.data.codecs.codec import CODECS
from dit.data.foreign.existing import already, refuse_encoded
from dit.data.foreign.index import UnknownCodec, codec_of
from dit.data.foreign.index import index as write_index
from dit.data.foreign.probe import IndexOptions
from dit.data.foreign.shard_list import find_shards, total_bytes
from dit.data.loading.mixing import mixing
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.data.shards.verify import check_answers, check_manifest, strays
from dit.data.shards.verify import verify as find_faults
from dit.data.sources.decode import count_lines
from dit.data.sources.labels import read_classes
from dit.progress import Bar

CLASSES_SHOWN = 20
BATCH = 256  # for which memory and mixing are stated


def verify(
    path: Annotated[str, "the data set's folder or URL"],
    *,
    threads: Annotated[int, "shards at a time"] = 4,
    json: Annotated[bool, "print JSON instead of a table"] = False,
) -> None:
    """Read a whole data set once and print a table of all that is broken; exit status 1 if anything is.

    PATH: its folder or URL. Checks the manifest, the names, each shard's size and sha256, each block's hash, key, types
    and shapes, that nothing lies between them, that values are finite, labels have a class and ids occur once, and
    that counts and statistics are those of the samples.
    """
    manifest, faults = check_manifest(path)
    if manifest is not None:
        total = sum(s.bytes for s in manifest.shards)
        with Bar[None](total=total, unit="B", scale=True, desc="verify") as bar:
            faults += find_faults(manifest, bar.update, threads)
    rows = [{"file": f.file, "where": f.part, "what": f.what} for f in faults]
    left = strays(manifest) if manifest is not None else []
    if json:
        _print_json({"path": path, "whole": not faults, "faults": rows, "strays": left})
    elif faults:
        _print_table(
            [("file", "where", "what is wrong"), *((r["file"], r["where"] or "-", r["what"]) for r in rows)]
        )
        again = "index" if manifest is not None and manifest.foreign is not None else "encode"
        print(f"{path}: {len(faults)} fault(s); copy these files again or {again} again")
    elif manifest is not None:
        print(f"{path}: {manifest.samples} samples in {len(manifest.blocks)} blocks are whole")
    if left and not json:
        print(f"{path}: no part of the data set, though in its folder: {', '.join(left)}")
    if faults:
        raise SystemExit(1)


def _print_json(values: dict[str, object]) -> None:
    print(json.dumps(values, indent=1))


def _print_table(rows: list[tuple[str, str, str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for file, where, what in rows:
        print(f"{file:{widths[0]}s}  {where:{widths[1]}s}  {what}")


@options_as_flags
def index(
    path: Annotated[str, "tars, a folder, pattern or list of them, as above"],
    out: Annotated[str, "folder for manifest.json and names.txt"],
    *,
    codec: Annotated[str, "that made them: vae or ldm (with --codec.path), pixels, or unknown"],
    classes: Annotated[str | None, "imagenet1k, or a file of names, one a line; numbers by default"] = None,
    options: IndexOptions,
    **codec_keys: str,
) -> None:
    """Make a data set of latent shards from elsewhere: write manifest.json and names.txt in OUT, copy nothing.

    PATH: tars of KEY.npy (or .pt, .pth) and KEY.cls (or KEY.json with a "label"), one sample after the other: one tar,
    a folder of them, a pattern ("shards/*.tar"), a range (shards/{000..099}.tar, also in URLs), or a text file with one
    of these a line. OUT: a folder, that of the shards or another.

    --codec.path=FOLDER --codec.subfolder=... configure the vae and ldm; --codec.channels=4 and, where known,
    --codec.scaling_factor=0.18215 --codec.factor=8 an unknown one.
    """
    if classes is not None:
        options = replace(options, classes=read_classes(classes))
    made_by = codec_of(codec, codec_keys, options.scale)
    shards = find_shards(path)
    refuse_encoded(shards)
    if (there := already(shards, out, made_by, options)) is not None:
        print(f"{out}: is an index of these shards already, of {there.samples} samples; nothing to do")
        return
    with Bar[None](total=total_bytes(shards), unit="B", scale=True, desc="index") as bar:
        manifest = write_index(shards, out, made_by, options, bar.update)
    print(
        f"{out}: {manifest.samples} samples in {len(manifest.shards)} shard(s), {len(manifest.classes)} classes"
    )


def info(
    path: Annotated[str, "the data set's folder or URL"],
    *,
    json: Annotated[bool, "print JSON, with all that the codec is"] = False,
) -> None:
    """Print what a data set is: counts, classes, latents and their statistics, codec, files, memory of a stream."""
    m = Manifest.load(path)
    check_answers(m)
    batch = min(BATCH, m.samples)
    stream = Stream(m, 0, batch)
    memory, mixed = stream.memory_bytes(), str(mixing(stream.order))
    stream.close()
    if json:
        counts = {"shards": len(m.shards), "blocks": len(m.blocks), "bytes": sum(s.bytes for s in m.shards)}
        of_stream = {"batch": batch, "memory_bytes": memory, "mixing": mixed}
        _print_json({"path": path, **to_dict(m), **counts, "stream": of_stream, "digest": m.digest})
    else:
        _print_info(m, memory, mixed, f"at a global batch of {batch} on one rank, window 2")


def _print_info(m: Manifest, memory: int, mixed: str, in_order: str) -> None:
    size = sum(s.bytes for s in m.shards)
    rows = {
        "samples": f"{m.samples} in {len(m.blocks)} block(s) of at most {m.block}, {len(m.shards)} shard(s)",
        "bytes": f"{size} ({size / m.samples:.0f} a sample)",
        "images": f"{m.image_size} x {m.image_size}, views: {', '.join(m.views)}; {m.transform}",
        **({"done": "; ".join(count_lines(m.counted))} if m.counted else {}),
        "left out": f"{len(m.bad)} unreadable image(s) {' '.join(m.bad[:5])}".strip(),
        "array": f"{m.array} {m.dtype} {' x '.join(map(str, m.shape))}, posterior: {m.posterior}"
        + (", with the noise that they were generated from" if m.eps else ""),
        **_foreign(m),
        "codec": _codec(m.codec),
        "latent mean": "  ".join(f"{v:+.5f}" for v in m.mean),
        "latent std": "  ".join(f"{v:.5f}" for v in m.std),
        "memory": f"{memory / 2**20:.1f} MiB of batches to come, {in_order}",
        "mixing": f"{mixed}; {in_order}",
        "digest": m.digest,
        "classes": f"{len(m.classes)}; {m.unlabelled} sample(s) without a label",
    }
    for name, text in rows.items():
        print(f"{name:12s} {text}")
    for name, count in list(zip(m.classes, m.class_counts, strict=True))[:CLASSES_SHOWN]:
        print(f"  {name:20s} {count}")
    if len(m.classes) > CLASSES_SHOWN:
        rest = m.class_counts[CLASSES_SHOWN:]
        print(f"  and {len(rest)} more of {min(rest)} to {max(rest)} samples")


def _codec(identity: Mapping[str, Any]) -> str:
    """A codec in a few words; `info --json` has all of it."""
    config = identity.get("config", {})
    words = [str(identity.get(key)) for key in ("name", "class") if key in identity]
    if widths := config.get("block_out_channels"):
        words.append("-".join(map(str, widths)))
    if channels := config.get("latent_channels", identity.get("channels")):
        words.append(f"{channels} channels")
    if digest := identity.get("sha256"):
        words.append(f"weights {str(digest)[:8]}")
    return ", ".join(words)


def _foreign(m: Manifest) -> dict[str, str]:
    """How an index's shards have their samples."""
    f = m.foreign
    if f is None:
        return {}
    stored = f"KEY.{f.array} {f.dtype} {' x '.join(map(str, f.shape))}, times {f.scale:g}"
    members = [*([f"KEY.{f.flipped}"] if f.flipped else []), f"KEY.{f.label}" if f.label else "no labels"]
    return {
        "stored": f"one by one: {', '.join([stored, *members])}" + f"; {f.spread}" * (m.array == "moments")
    }


TOOL = Tool(
    {"verify": verify, "info": info, "index": index},
    keys={"codec": [UnknownCodec, *(codec for _, codec in CODECS.items())]},
)

if __name__ == "__main__":
    run(TOOL)
