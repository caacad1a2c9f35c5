"""Draw images from a trained model."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.cli import UsageError, run
from dit.commandline import Tool
from dit.config import ConfigError, Registry, from_dict, to_dict
from dit.configfile import overridden
from dit.data.codecs.codec import CODECS
from dit.experiments.drawing import DrawOrder, produce
from dit.experiments.trained import Trained
from dit.files import expand
from dit.ranks import group
from dit.sample.between import parse_between
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.guide import GUIDANCES
from dit.sample.labels import LabelOrder
from dit.sample.pictures import LATENTS, OLD_FORMATS, parse_formats
from dit.sample.solve import SOLVERS

CHOICES: dict[str, Registry[Any]] = {"solver": SOLVERS, "grid": GRIDS, "guidance": GUIDANCES}


def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    *,
    out: Annotated[str | None, "folder for the images, grid.png and spec.json"] = None,
    formats: Annotated[
        str, "npz, png (a folder of them), webdataset (shards), or several with commas"
    ] = "npz",
    save_latents: Annotated[bool, "latents.npz too: float32 (N, C, H, W), as the network sees them"] = False,
    preview: Annotated[bool, "latents.npz and grid.png in false colours alone: opens no codec"] = False,
    save_pairs: Annotated[str | None, "new folder for noise and latents: the data of a reflow"] = None,
    trajectory: Annotated[bool, "trajectory.webp too: the solver's way of up to 16 images, animated"] = False,
    interpolate: Annotated[
        str | None, "interpolation.png too, rows of 9 images: seeds:0,1 or classes:3,7 (or names)"
    ] = None,
    num_samples: Annotated[int, "images in all"] = 64,
    classes: Annotated[str, "all, numbers like 0,3 or names"] = "all",
    label_order: Annotated[
        LabelOrder, "image i is of classes[i mod n] (balanced), or of one drawn by (seed, i)"
    ] = "balanced",
    cfg_scale: Annotated[float | None, "null + scale * (cond - null); none = 1, no guidance"] = None,
    guidance: Annotated[
        str | None, "in turn: '{name: cfg, scale: 2, interval: [0.2, 0.7]}, {name: ...}'"
    ] = None,
    solver: Annotated[
        str | None, "how steps are taken; its fields are --solver.field=value; none = heun"
    ] = None,
    num_steps: Annotated[int | None, "steps of the solver; none = 50"] = None,
    grid: Annotated[str | None, "times it visits; its fields are --grid.field=value; none = uniform"] = None,
    shift: Annotated[float | None, "time shift of the grid, the same as --grid.shift; 1 = none"] = None,
    seed: Annotated[int, "of the noise; image i has its own"] = 0,
    batch_size: Annotated[
        int | None,
        "images at a time and rank, and in each block that is kept; none = 64, or fewer where all are",
    ] = None,
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    overwrite: Annotated[bool, "replace what another spec has drawn there"] = False,
    **solver_grid_codec_keys: str,
) -> None:
    """Draw images: integrate the probability-flow ODE or the SDE, with guidance.

    Writes samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: int64 labels, the ADM suite's format) or the images in other
    --formats, grid.png and spec.json. Image i depends on the checkpoint, the spec and i alone, not on batch size,
    number of images or of ranks. Killed, it goes on when the same command is started again, on any number of ranks:
    what is done lies in OUT.partial. More --num_samples or --formats are added to what is there.
    What it draws with is printed, and what of it the pictures during training were drawn with otherwise.

    --codec.path=FOLDER says where the VAE is, if not where training had it; --codec.dtype=bfloat16 decodes faster.
    --save_pairs=DIR writes a data set of latents and the noise they were made from, for objective.coupling=reflow.
    """
    given = {"solver": solver, "num_steps": num_steps, "cfg_scale": cfg_scale, "seed": seed, "grid": grid}
    spec, asked, codec_keys = read_spec(given, solver_grid_codec_keys, shift, guidance)
    check_wanted(out, save_pairs, spec)
    forms = parse_formats(formats) + ((LATENTS,) if save_latents else ())
    if preview and (forms != OLD_FORMATS or codec_keys):
        raise UsageError("--preview makes no images: leave out --formats, --save_latents and --codec.*")
    if (trajectory or interpolate) and (preview or not out):
        raise UsageError("--trajectory and --interpolate make images in --out: give that, and no --preview")
    with group.session() as world:
        trained = Trained.load(run_or_ckpt, weights, world.device)
        if world.is_main:
            trained.say_weights()
        made = trained.precision(precision)
        where = {"out": folder(out), "save_pairs": folder(save_pairs), "overwrite": overwrite}
        where |= {"label_order": label_order, "formats": forms, "preview": preview}
        where["trajectory"] = trajectory
        where["interpolate"] = parse_between(interpolate, trained.classes) if interpolate else None
        order = DrawOrder(trained.classes(classes), num_samples, batch_size, made, codec_keys, asked, **where)
        produce(trained, spec, order, world)


def check_wanted(out: str | None, save_pairs: str | None, spec: SamplerSpec) -> None:
    """Refuse to draw for nobody, and pairs that belong together only in part."""
    if not out and not save_pairs:
        raise UsageError("missing --out (a folder for pictures) or --save_pairs (one for noise and latents)")
    if save_pairs and spec.solver.stochastic:
        raise ConfigError(
            f"--save_pairs with the solver {SOLVERS.name_of(spec.solver)}: it adds noise on the way, so what it ends "
            "in is not a function of the noise that it starts from; take an ODE solver, such as heun"
        )


def folder(name: str | None) -> Path | None:
    """What was typed, as a place."""
    return Path(expand(name)) if name else None


def read_spec(
    values: Mapping[str, Any], given: Mapping[str, str], shift: float | None, guidance: str | None
) -> tuple[SamplerSpec, frozenset[str], dict[str, str]]:
    """Make the spec of the plain values that are not None, with the command line's keys over them.

    And which fields of it were asked for, and the codec's keys as given. ConfigError for a key that is given twice.
    """
    values = {key: value for key, value in values.items() if value is not None}
    plain = {**to_dict(SamplerSpec()), **values}
    codec = {key: text for key, text in given.items() if key.startswith("codec")}
    keys = [
        (re.sub(r"^(solver|grid)_", r"\1.", key), text) for key, text in given.items() if key not in codec
    ]
    keys += [("grid.shift", str(shift))] if shift is not None else []
    if guidance is not None:
        keys.append(("guidance", guidance if guidance.startswith("[") else f"[{guidance}]"))
    twice = [key for key, count in Counter(key for key, _ in keys).items() if count > 1]
    if twice:
        raise ConfigError(f"--{twice[0]} is given twice")
    asked = frozenset({*values, *(key.partition(".")[0] for key, _ in keys)})
    return from_dict(SamplerSpec, overridden(SamplerSpec, plain, dict(keys))[0]), asked, codec


TOOL = Tool(main, choices=CHOICES, keys={"codec": [codec for _, codec in CODECS.items()]})

if __name__ == "__main__":
    run(TOOL)
