"""Check and describe data sets of latents: `python tools/shards.py verify|info PATH`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dit.cli import run
from dit.data.manifest import Manifest
from dit.data.verify import Fault
from dit.data.verify import verify as find_faults

CLASSES_SHOWN = 20


def verify(path: str) -> None:
    """Read a whole data set and print a table of what is broken; exit status 1 if anything is.

    PATH: its folder. Checks each shard's size and sha256, each block's crc32, shapes and types, the names, that ids
    occur once, and that class counts and latent statistics are those of the samples.
    """
    manifest = Manifest.load(path)
    faults: list[Fault] = []
    with tqdm(total=len(manifest.blocks), unit="block", desc="verify") as bar:
        for fault in find_faults(manifest):
            if fault is None:
                bar.update()
            else:
                faults.append(fault)
    if not faults:
        print(f"{path}: {manifest.samples} samples in {len(manifest.blocks)} blocks are whole")
        return
    rows = [("file", "where", "what is wrong"), *((f.file, f.part or "-", f.what) for f in faults)]
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    for file, where, what in rows:
        print(f"{file:{widths[0]}s}  {where:{widths[1]}s}  {what}")
    print(f"{path}: {len(faults)} fault(s); copy these files again or encode again")
    raise SystemExit(1)


def info(path: str) -> None:
    """Print what a data set is: counts, classes, latents and their statistics, codec, files."""
    m = Manifest.load(path)
    size = sum(s.bytes for s in m.shards)
    rows = {
        "samples": f"{m.samples} in {len(m.blocks)} block(s) of at most {m.block}, {len(m.shards)} shard(s)",
        "bytes": f"{size} ({size / m.samples:.0f} a sample)",
        "images": f"{m.image_size} x {m.image_size}, views: {', '.join(m.views)}; {m.transform}",
        "left out": f"{len(m.bad)} unreadable image(s) {' '.join(m.bad[:5])}".strip(),
        "array": f"{m.array} {m.dtype} {' x '.join(map(str, m.shape))}, posterior: {m.posterior}"
        + (", with the noise that they were generated from" if m.eps else ""),
        "codec": json.dumps(m.codec),
        "latent mean": "  ".join(f"{v:+.5f}" for v in m.mean),
        "latent std": "  ".join(f"{v:.5f}" for v in m.std),
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


if __name__ == "__main__":
    run({"verify": verify, "info": info})
