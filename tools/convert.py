"""Weights of other projects in, and out again, and one file of a run's: `python tools/convert.py COMMAND ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
from dit.config import from_dict, to_dict
from dit.data.codecs.codec import CODECS, parse_codec
from dit.interop import card
from dit.interop.convert import Converted, from_run, to_run
from dit.interop.ddt import DDT
from dit.interop.facebook_dit import FacebookDiT
from dit.interop.format import Format
from dit.interop.latents import Choices
from dit.interop.lightningdit import LightningDiT
from dit.interop.pipeline.given import from_run as to_pipeline
from dit.interop.pipeline.taken import to_run as from_pipeline
from dit.interop.push import check_name
from dit.interop.push import push as push_to_hub
from dit.interop.sit import PathName, PredictionName, SiT, TimeName
from dit.train.checkpoints.export import export as write_export

Heads = Annotated[int | None, "attention heads; none = those of S, B, L or XL, by the width"]
Classes = Annotated[int | None, "classes; none = the label table's rows but the null one"]
Scale = Annotated[float | None, "latents were multiplied with it; none = the codec's own, or 0.18215"]
Overwrite = Annotated[bool, "replace a file of something else that is there"]
Push = Annotated[str | None, "owner/name on the Hugging Face hub that it is uploaded to; none = nowhere"]
Weights = Annotated[str, "which weights: ema, model, or another average, as ema_0.999"]
ALREADY = "; the same export is there already, nothing was written"


def facebook_dit(
    weights: Annotated[str, "a .pt or .safetensors such as DiT-XL-2-256x256.pt"],
    out: Annotated[str, "a new folder"],
    *,
    num_heads: Heads = None,
    num_classes: Classes = None,
    scaling_factor: Scale = None,
    **codec_keys: str,
) -> None:
    """facebookresearch/DiT's weights as a run directory OUT that tools/sample.py takes, and init.from of training.

    --codec.path=FOLDER says which VAE the weights go with (sd-vae-ft-ema or -mse for the official ones), if it is
    at hand; otherwise tools/sample.py takes the one it is given.
    """
    choices = _choices(
        codec_keys, num_heads=num_heads, num_classes=num_classes, scaling_factor=scaling_factor
    )
    _report(to_run(weights, out, FacebookDiT(), choices))


def sit(
    weights: Annotated[str, "a .pt or .safetensors such as SiT-XL-2-256x256.pt"],
    out: Annotated[str, "a new folder"],
    *,
    path: Annotated[PathName, "its path, as SiT names it"] = "Linear",
    prediction: Annotated[PredictionName, "what it predicts, as SiT names it"] = "velocity",
    time: Annotated[TimeName | None, "whose time; none = REPA's with its projectors, else SiT's"] = None,
    num_heads: Heads = None,
    num_classes: Classes = None,
    scaling_factor: Scale = None,
    **codec_keys: str,
) -> None:
    """willisma/SiT's weights as a run directory OUT that tools/sample.py takes, and init.from of training.

    The output rows that SiT computes and discards are left out, and REPA's projectors. --codec.path=FOLDER: as for
    facebook-dit.
    """
    choices = _choices(
        codec_keys, num_heads=num_heads, num_classes=num_classes, scaling_factor=scaling_factor
    )
    _report(
        to_run(weights, out, from_dict(SiT, {"path": path, "prediction": prediction, "time": time}), choices)
    )


def lightningdit(
    weights: Annotated[str, "a .pt or .safetensors such as lightningdit-xl-imagenet256-64ep.pt"],
    out: Annotated[str, "a new folder"],
    *,
    latents_stats: Annotated[str | None, "latents_stats.pt: mean and std of the latents' channels"] = None,
    factor: Annotated[int | None, "pixels of a latent pixel, on a side; none = the codec's, or 16"] = None,
    num_heads: Annotated[int | None, "attention heads; none = as the weights or the width tell"] = None,
    num_classes: Classes = None,
    scaling_factor: Annotated[
        float | None, "latents were multiplied with it, after latents_stats; none = 1, or the codec's"
    ] = None,
    **codec_keys: str,
) -> None:
    """hustvl/LightningDiT's weights as a run directory OUT that tools/sample.py takes, and init.from of training.

    SwiGLU, RMSNorm, rotary positions, norms of queries and keys, and blocks without shifts are seen in the weights.
    --codec.path=FOLDER: as for facebook-dit.
    """
    choices = _choices(
        codec_keys,
        num_heads=num_heads,
        num_classes=num_classes,
        scaling_factor=scaling_factor,
        latents_stats=latents_stats,
        factor=factor,
    )
    _report(to_run(weights, out, LightningDiT(), choices))


def ddt(
    weights: Annotated[str, "a .ckpt, .pt or .safetensors, such as DDT-XL's model.ckpt"],
    out: Annotated[str, "a new folder"],
    *,
    num_encoder_blocks: Annotated[
        int | None, "blocks of the encoder; none = 22, where there are XL's 28"
    ] = None,
    input_size: Annotated[int, "latent pixels on a side: 64 for images of 512 pixels"] = 32,
    patch_size: Annotated[int, "latent pixels of a patch, on a side"] = 2,
    scaling_factor: Scale = None,
    **codec_keys: str,
) -> None:
    """MCG-NJU/DDT's weights as a run directory OUT that tools/sample.py takes, and init.from of training.

    What the weights do not tell are the encoder's share of the blocks and the sizes of inputs and patches.
    --codec.path=FOLDER: as for facebook-dit.
    """
    given = {"num_encoder_blocks": num_encoder_blocks, "input_size": input_size, "patch_size": patch_size}
    choices = _choices(codec_keys, scaling_factor=scaling_factor)
    _report(to_run(weights, out, from_dict(DDT, given), choices))


def diffusers(
    folder: Annotated[str, "a DiTPipeline's folder, as save_pretrained writes it"],
    out: Annotated[str, "a new folder"],
    *,
    num_classes: Annotated[int | None, "classes; none = those that have names, or the label table's"] = None,
    scaling_factor: Annotated[float | None, "latents were multiplied with it; none = the VAE's own"] = None,
    **codec_keys: str,
) -> None:
    """diffusers' DiTPipeline as a run directory OUT that tools/sample.py takes, and init.from of training.

    The scheduler says what the network predicts, the folder's VAE decodes; --codec.path=FOLDER takes another one.
    """
    choices = _choices(codec_keys, num_classes=num_classes, scaling_factor=scaling_factor)
    _report(from_pipeline(folder, out, choices))


def to_diffusers(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new folder"],
    *,
    weights: Weights = "ema",
    num_steps: Annotated[
        int, "steps of the sampling that the time layer is fitted for, where diffusers' sinusoids are others"
    ] = 50,
    overwrite: Overwrite = False,
    push: Push = None,
    **codec_keys: str,
) -> None:
    """A checkpoint's weights as a folder for diffusers: a DiTPipeline where it can sample the model, else its parts.

    --codec.path=FOLDER says where the VAE is, if it is not where training had it.
    """
    _check_push(push)
    done = to_pipeline(
        run_or_ckpt, out, weights=weights, num_steps=num_steps, codec=codec_keys, overwrite=overwrite
    )
    print(f"{done.line}\n{done.folder}: for diffusers{'' if done.is_new else ALREADY}")
    for note in done.notes:
        print(f"note: {note}")
    _push(push, done.folder)


def to_facebook_dit(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new .pt or .safetensors file"],
    *,
    weights: Weights = "ema",
    overwrite: Overwrite = False,
    push: Push = None,
) -> None:
    """A checkpoint's weights as a state dict for facebookresearch/DiT: eps on DDPM's linear betas."""
    _out(run_or_ckpt, out, FacebookDiT(), card.FACEBOOK, weights, overwrite, push)


def to_sit(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new .pt or .safetensors file"],
    *,
    weights: Weights = "ema",
    learn_sigma: Annotated[
        bool, "with rows of zeros where SiT's learn_sigma=True has ones to discard"
    ] = True,
    overwrite: Overwrite = False,
    push: Push = None,
) -> None:
    """A checkpoint's weights as a state dict for willisma/SiT: a path with model times of 1 - t."""
    _out(run_or_ckpt, out, SiT(learn_sigma=learn_sigma), card.SIT, weights, overwrite, push)


def to_lightningdit(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new .pt or .safetensors file"],
    *,
    weights: Weights = "ema",
    overwrite: Overwrite = False,
    push: Push = None,
) -> None:
    """A checkpoint's weights as a state dict for hustvl/LightningDiT: runs of the objective sit, of blocks it has."""
    _out(run_or_ckpt, out, LightningDiT(), card.LIGHTNING, weights, overwrite, push)


def to_ddt(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new .pt or .safetensors file"],
    *,
    weights: Weights = "ema",
    overwrite: Overwrite = False,
    push: Push = None,
) -> None:
    """A checkpoint's weights as a state dict for MCG-NJU/DDT: runs of model ddt and of the objective sit."""
    _out(run_or_ckpt, out, DDT(), card.DDT, weights, overwrite, push)


def export(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    out: Annotated[str, "a new .safetensors file"],
    *,
    weights: Weights = "ema",
    width: Annotated[
        float | None,
        "an average of this width (sigma_rel), made of the run's snapshots; none = as it was kept",
    ] = None,
    overwrite: Overwrite = False,
    push: Push = None,
) -> None:
    """One set of weights as one file that tools/sample.py takes: the model's own names, and what it was trained as.

    Averages of any width can be made after training with ema.power and ema.snapshot_every (EDM2's post-hoc EMA).
    """
    _check_push(push)
    written, off, is_new = write_export(run_or_ckpt, out, weights, width, overwrite)
    how = "" if off is None else f" (profile off by {off:.2%})"
    print(f"{out}: {written.line}{how}{'' if is_new else ALREADY}")
    written.average.warn()
    if off is not None and off > 0.1:
        print(
            "note: the snapshots cannot make an average of that width (the profile is what each step's weights count "
            "for): take a width between those of ema.power, or about them, and more snapshots"
        )
    source = run_or_ckpt if width is None else out  # no checkpoint holds an average that was made now
    _push(push, *card.with_card(source, weights, out, card.OURS, overwrite))


def _out(
    run_or_ckpt: str,
    out: str,
    format: Format[Any],
    use: card.Use,
    weights: str,
    overwrite: bool,
    push: str | None,
) -> None:
    """Write a state dict for another project and its card, say so, and upload both where that is asked for."""
    _check_push(push)
    line, is_new = from_run(run_or_ckpt, out, format, weights, overwrite)
    print(f"{line}\n{out}: a state dict for {use.repository}{'' if is_new else ALREADY}")
    _push(push, *card.with_card(run_or_ckpt, weights, out, use, overwrite))


def _check_push(name: str | None) -> None:
    if name is not None:
        check_name(name)


def _push(name: str | None, *paths: Path) -> None:
    if name is not None:
        print(f"pushed to {push_to_hub(name, paths)}")


def _choices(codec_keys: dict[str, str], **given: float | str | None) -> Choices:
    codec = to_dict(parse_codec({"name": "vae"}, codec_keys)) if codec_keys else None
    return from_dict(Choices, {**given, "codec": codec})


def _report(done: Converted) -> None:
    print("\n".join(done.told()))


COMMANDS: dict[str, Callable[..., None]] = {
    "facebook-dit": facebook_dit,
    "sit": sit,
    "lightningdit": lightningdit,
    "ddt": ddt,
    "diffusers": diffusers,
    "to-facebook-dit": to_facebook_dit,
    "to-sit": to_sit,
    "to-lightningdit": to_lightningdit,
    "to-ddt": to_ddt,
    "to-diffusers": to_diffusers,
    "export": export,
}

TOOL = Tool(COMMANDS, keys={"codec": [codec for _, codec in CODECS.items()]})

if __name__ == "__main__":
    run(TOOL)
