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
    early.listen()  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import UsageError, run
from dit.commandline.flags import options_as_flags
from dit.config import ConfigError, Registry, from_dict, to_dict
from dit.configfile import overridden
from dit.data.codecs.codec import CODECS
from dit.experiments.draw_options import DrawOptions
from dit.experiments.draw_order import check_amount
from dit.experiments.drawing import produce
from dit.experiments.trained import Trained
from dit.ranks import group
from dit.ranks.asked import EndAsked
from dit.sample.generate import SamplerSpec
from dit.sample.grid import GRIDS
from dit.sample.guide import GUIDANCES
from dit.sample.pictures import OLD_FORMATS
from dit.sample.solve import SOLVERS

CHOICES: dict[str, Registry[Any]] = {"solver": SOLVERS, "grid": GRIDS, "guidance": GUIDANCES}


@options_as_flags
def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    *,
    options: DrawOptions,
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
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    **solver_grid_codec_keys: str,
) -> None:
    """Draw images: integrate the probability-flow ODE or the SDE, with guidance.

    Writes samples.npz (arr_0: uint8 (N, H, W, 3), arr_1: int64 labels, the ADM suite's format) or the images in other
    --formats, grid.png and spec.json. Image i depends on the checkpoint, the spec and i alone, not on batch size,
    number of images or of ranks. Stopped by a signal (status 75) or killed, it goes on when the same command is started
    again, on any number of ranks: what is done lies in OUT.partial. More --num_samples or --formats are added to what
    is there. What it draws with is printed, and what of it the pictures during training were drawn with otherwise.

    --codec.path=FOLDER says where the VAE is, if not where training had it; --codec.dtype=bfloat16 decodes faster.
    --save_pairs=DIR writes a data set of latents and the noise they were made from, for objective.coupling=reflow.
    """
    given = {"solver": solver, "num_steps": num_steps, "cfg_scale": cfg_scale, "seed": seed, "grid": grid}
    spec, given_fields, codec_keys = read_spec(given, solver_grid_codec_keys, shift, guidance)
    check_amount(options.num_samples, options.batch_size)
    check_wanted(options, spec, codec_keys)
    with EndAsked().listening() as asked, group.session() as world:
        trained = group.together(
            lambda: Trained.load(run_or_ckpt, weights, world.device, compiled=options.compile)
        )
        if world.is_main:
            trained.say_weights()
        order = options.order(trained, trained.precision(precision), codec_keys, given_fields)
        produce(trained, spec, order, world, asked)


def check_wanted(options: DrawOptions, spec: SamplerSpec, codec_keys: Mapping[str, str]) -> None:
    """Refuse to draw for nobody, what makes no images together with images, and pairs that belong together in part."""
    if not options.out and not options.save_pairs:
        raise UsageError("missing --out (a folder for pictures) or --save_pairs (one for noise and latents)")
    if options.preview and (options.forms != OLD_FORMATS or codec_keys):
        raise UsageError("--preview makes no images: leave out --formats, --save_latents and --codec.*")
    if (options.trajectory or options.interpolate) and (options.preview or not options.out):
        raise UsageError("--trajectory and --interpolate make images in --out: give that, and no --preview")
    if options.save_pairs and spec.solver.stochastic:
        raise ConfigError(
            f"--save_pairs with the solver {SOLVERS.name_of(spec.solver)}: it adds noise on the way, so what it ends "
            "in is not a function of the noise that it starts from; take an ODE solver, such as heun"
        )


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
