"""Model cards: README.md with a hub's metadata, made of what a checkpoint and its run's evaluations say."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from dit.config import to_dict
from dit.errors import Notice
from dit.evals import record
from dit.evals.figures import hash_of, protocol_of
from dit.experiments.about import named
from dit.experiments.trained import Trained
from dit.files import expand, read_text, write_atomically
from dit.outputs import MENDING
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.nearby import MODEL, kind_of

FILE = "README.md"
TASK = "unconditional-image-generation"  # the hub's name for images from nothing, or from a class
SHOWN = 12  # classes that a card lists
NAME = "FILE"  # in the code of a `Use`: the file's name


@dataclass(frozen=True)
class Use:
    """What a card says of one form of a model. library: which loads it; code: how, in Python; notes: what to know."""

    library: str
    code: str
    notes: Sequence[str] = ()
    repository: str = ""  # whose form it is, where that is another project's


OURS = Use(
    "dit",
    f"""
import dit

model = dit.load("{NAME}")  # codec={{"path": FOLDER}} where the VAE lies elsewhere
images = model.sample(16, cfg_scale=1.5)  # (16, H, W, 3) uint8
""",
)
FACEBOOK = Use(
    "pytorch",
    f"""
import torch
from dit.interop import facebook_dit

state = torch.load("{NAME}", weights_only=True)  # of .safetensors: safetensors.torch.load_file
model = facebook_dit.from_state_dict(state, **arguments)  # those of facebookresearch/DiT's constructor
""",
    ("Made for the repository facebookresearch/DiT.",),
    "facebookresearch/DiT",
)


def _made_for(module: str, repository: str) -> Use:
    code = FACEBOOK.code.replace("facebook_dit", module).replace("facebookresearch/DiT", repository)
    return Use("pytorch", code, (f"Made for the repository {repository}.",), repository)


SIT = _made_for("sit", "willisma/SiT")
LIGHTNING = _made_for("lightningdit", "hustvl/LightningDiT")
DDT = _made_for("ddt", "MCG-NJU/DDT")


def with_card(
    run_or_checkpoint: str, weights: str, out: str | Path, use: Use, overwrite: bool = False
) -> tuple[Path, ...]:
    """Write the card of weights that were given out as one file, beside it under its name; (file, card).

    No card for what draws no images (an autoencoder, a classifier). Another one that is there stays, with a Notice,
    unless told to overwrite: it may have been written in.
    """
    file = Path(expand(str(out)))
    if kind_of(checkpoint.resolve(run_or_checkpoint).meta["config"]) != MODEL:
        return (file,)
    path, trained = file.with_suffix(".md"), Trained.load(run_or_checkpoint, weights, torch.device("cpu"))
    wanted = text(trained, file.stem, replace(use, code=use.code.replace(NAME, file.name)))
    if not path.exists() or overwrite:
        write_atomically(path, wanted.encode())
    elif read_text(path) != wanted:
        warnings.warn(f"{path} is there and says something else, and stays: {MENDING}", Notice, stacklevel=2)
    return file, path


def text(trained: Trained, title: str, use: Use) -> str:
    """The card, as Markdown behind the hub's YAML."""
    rows = evaluations(trained)
    held = yaml.safe_dump(_metadata(trained, title, use, rows), sort_keys=False, allow_unicode=True)
    parts = [f"---\n{held}---", f"# {title}", _what(trained), _data(trained)]
    parts += [f"## Use\n\n```python\n{use.code.strip()}\n```", *use.notes]
    parts += [_figures(rows)] if rows else ["## Figures\n\nNone were measured of these weights."]
    return "\n\n".join(parts) + "\n"


def evaluations(trained: Trained) -> list[dict[str, Any]]:
    """The rows of the run's evaluations that are of these weights; a line that is none is left out, with a Notice.

    Of a figure of the same images that was measured twice by one protocol, what was measured last.
    """
    ours = {"step": trained.step, "digest": trained.digest, "weights": trained.weights}
    found: dict[str, dict[str, Any]] = {}
    for row in record.read(trained.run_dir):
        own = {"digest": trained.digest} if row.get("by") == record.TRAINING else {}  # they name none
        if all({**own, **row}.get(key) == value for key, value in ours.items()):
            same = json.dumps([row["hash"], (row.get("samples") or {}).get("content")])
            found[same] = _joined(found.get(same, {}), row)
    return _once(list(found.values()))


def _once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without figures that a later one has of the same images by the same protocol of the figure."""

    def key(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
        return str((row.get("samples") or {}).get("content")), record.titled(row, name), hash_of(name, row)

    last = {key(row, name): number for number, row in enumerate(rows) for name in row["figures"]}
    kept = [
        {**row, "figures": {k: v for k, v in row["figures"].items() if last[key(row, k)] == number}}
        for number, row in enumerate(rows)
    ]
    return [row for row in kept if row["figures"]]


def _joined(older: Mapping[str, Any], newer: dict[str, Any]) -> dict[str, Any]:
    """A row with the figures of an older one of the same images that it lacks."""
    kept = [key for key in older.get("figures", {}) if key not in newer["figures"]]
    held = {part: {key: older[part][key] for key in kept if key in (older.get(part) or {})}
            for part in ("figures", "intervals")}  # fmt: skip
    return {**newer, **{part: {**held[part], **(newer.get(part) or {})} for part in held}}


def _metadata(trained: Trained, title: str, use: Use, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    conditional = ["class-conditional"] if trained.contract["classes"] else []
    made: dict[str, Any] = {
        "library_name": use.library,
        "pipeline_tag": TASK,
        "tags": ["diffusion", "dit", *conditional],
    }
    metrics = [
        {"type": name, "value": value, "name": f"{record.titled(row, name)}, protocol {hash_of(name, row)}"}
        for row in rows
        for name, value in row["figures"].items()
    ]
    if metrics:
        data = {"name": _data_name(trained), "type": "images"}
        result = {"task": {"type": TASK}, "dataset": data, "metrics": metrics}
        made["model-index"] = [{"name": title, "results": [result]}]
    return made


def _what(trained: Trained) -> str:
    """What network it is, what it was trained as, and how long."""
    model: Any = trained.experiment.model
    size = (
        f"{model.size or 'S'}/{model.patch}"
        if model.width is None
        else f"{model.width} wide, patch {model.patch}"
    )
    parameters = sum(p.numel() for p in trained.model.parameters())
    rows = {
        "network": f"diffusion transformer (DiT) {size}, {parameters:,} parameters",
        "trained as": named(trained.experiment.objective),
        "weights": f"{trained.average}, step {trained.step}, after {trained.updates} updates",
        "checkpoint": f"`{trained.digest}`",
    }
    return _table("", "", rows)


def _data(trained: Trained) -> str:
    """What it was trained on, and what its latents are."""
    contract, codec = trained.contract, trained.contract["codec"]
    classes, shape = contract["classes"], " x ".join(map(str, contract["shape"]))
    listed = ", ".join(classes[:SHOWN]) + (", ..." if len(classes) > SHOWN else "")
    meta = checkpoint.resolve(str(trained.path)).meta.get("data", {})
    rows = {
        "data set": f"{_data_name(trained)} (`{meta.get('digest', 'unknown')}`)",
        "images": f"{contract['image_size']} pixels a side",
        "classes": f"{len(classes)}: {listed}" if classes else "none",
        "latents": f"{shape}, of codec {codec['name']} (`{codec.get('sha256', 'weights unknown')}`)"
        if codec["name"] != "pixels"
        else f"{shape}, pixels",
    }
    return f"## Data\n\n{_table('', '', rows)}"


def _data_name(trained: Trained) -> str:
    """The last part of where the data lay: the rest is of the machine."""
    data: Any = to_dict(trained.experiment)["data"]
    return Path(str(data.get("path") or "several data sets").rstrip("/")).name


def _figures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each figure with its interval and protocol, and the protocols: figures of unlike ones do not compare."""
    lines = ["## Figures", "", "| figure | value | interval | protocol |", "|---|---|---|---|"]
    protocols: dict[str, Any] = {}
    for row in rows:
        for name, value in row["figures"].items():
            digest = hash_of(name, row)
            protocols[digest] = protocol_of(name, row.get("protocol", {}))
            lines.append(
                f"| {record.titled(row, name)} | {_number(value)} | {_interval(row, name)} | `{digest}` |"
            )
    lines += ["", "Figures of the same protocol compare, and no others."]
    for key, protocol in protocols.items():
        lines += ["", f"`{key}`:", "", "```json", json.dumps(protocol, indent=1), "```"]
    return "\n".join(lines)


def _interval(row: Mapping[str, Any], name: str) -> str:
    held = (row.get("intervals") or {}).get(name)
    return " to ".join(_number(v) for v in held) if isinstance(held, list) else ""


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(left: str, right: str, rows: Mapping[str, str]) -> str:
    return "\n".join(
        [f"| {left} | {right} |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in rows.items())]
    )


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
