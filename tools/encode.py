"""Images to latent shards with a manifest: `python tools/encode.py IMAGES OUT --codec=vae --codec.path=FOLDER`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dit.cli import run
from dit.config import ConfigError, from_dict, merge
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.encoding.checks import check_early, check_out
from dit.data.encoding.encode import EncodeOptions, Waiting, encode
from dit.data.encoding.older import as_begun
from dit.data.encoding.parts import images_done
from dit.data.sources.crops import CROPS
from dit.data.sources.decode import MAX_PIXELS, Decode
from dit.data.sources.images import ImageSource, check_spec, open_source, unlabelled_note
from dit.data.sources.parquet import Columns
from dit.errors import Stopped
from dit.files import expand
from dit.progress import Bar, say
from dit.ranks import group

PATIENCE = 60  # seconds until a rank says that it waits for one which nobody takes over from


def main(
    images: str,
    out: str,
    *,
    codec: Annotated[str, "which of the codecs below"] = "vae",
    image_size: Annotated[int, "pixels a side, a multiple of the codec's factor"] = 256,
    crop: Annotated[str, "which of the crops below"] = "centre",
    flip: Annotated[bool, "store a mirrored view beside each image; --no-flip for digits and text"] = True,
    exif: Annotated[Literal["turn", "ignore"], "turn images upright, or take them as stored"] = "turn",
    background: Annotated[str, "under transparent places: white, black, #rrggbb"] = "white",
    icc: Annotated[Literal["convert", "ignore"], "colours to sRGB by ICC profiles, or not"] = "convert",
    max_pixels: Annotated[int, "of an image; larger ones are unreadable"] = MAX_PIXELS,
    classes: Annotated[str | None, "imagenet1k: its 1000 labels, for folders or tars named by wnid"] = None,
    labels: Annotated[str | None, "file of lines `name class`, in place of the images' folders"] = None,
    posterior: Annotated[Literal["moments", "sample"], "keep mean and std, or one draw"] = "moments",
    dtype: Annotated[Literal["float16", "float32"], "of what is stored"] = "float16",
    block: Annotated[int, "samples a block at most"] = 256,
    shard_mb: Annotated[float, "MB a shard at most"] = 512.0,
    seed: Annotated[int, "of the order of writing, of random crops and of drawn latents"] = 0,
    batch_size: Annotated[int, "images at a time through the codec"] = 64,
    max_bad: Annotated[int, "unreadable images to leave out before giving up"] = 0,
    workers: Annotated[int, "threads a rank that decode images; 0: one a core, at most 16"] = 0,
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; the rank's GPU where there is one"] = None,
    label_column: Annotated[str | None, "of Parquet, where it is not called label; empty: no labels"] = None,
    image_column: Annotated[str | None, "of Parquet, where it is not called image"] = None,
    **codec_crop_keys: str,
) -> None:
    """Encode IMAGES once, into latent shards and a manifest in the new folder OUT.

    IMAGES: a folder (CLASS/name.jpg), a tar of such a folder, WebDataset tars of KEY.jpg and KEY.cls, ImageNet's tar
    of class tars, Parquet with image bytes (each: one file, a folder of them, train-{000..099}.tar or a pattern), or
    digits:train and digits:test. Formats: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, QOI.

    Stopped or killed, the same command goes on with what is done. Ranks share the work: launch/local.sh
    tools/encode.py IMAGES OUT ..., or sbatch ... launch/multinode.sh tools/encode.py IMAGES OUT ... (OUT on a file
    system that the nodes share). The same images, codec and options give the same bytes, whatever the ranks.
    """
    images, out = expand(images), expand(out)
    options = _options(locals())
    chosen = CODECS.parse(_named("codec", codec, codec_crop_keys))
    world, columns = group.World.from_env(), Columns(image_column, label_column)
    with _interruptible(Path(out).resolve(), world):
        built = _checked(images, out, chosen, options, _device(device, world))
        source = open_source(images, classes, labels, columns)
        _encode(images, source, built, out, options, world)


def _options(given: Mapping[str, Any]) -> EncodeOptions:
    """Those of the arguments that say how to encode; each is called as its option."""
    plain = {f.name: given[f.name] for f in fields(EncodeOptions) if f.name in given}
    decode = {f.name: given[f.name] for f in fields(Decode)}
    crop = _named("crop", given["crop"], given["codec_crop_keys"])
    return from_dict(EncodeOptions, {**plain, "crop": crop, "decode": decode})


def _tell(images: str, source: ImageSource, options: EncodeOptions) -> None:
    """What was found, what is odd about it, and what will be done to it."""
    note = unlabelled_note(images, source)
    notes = [f"note: {note}"] if note else []
    print(f"{images}: {source}", *notes, *options.steps(), sep="\n", flush=True)


def _device(text: str | None, world: group.World) -> torch.device:
    """What --device says, and this rank's GPU for `cuda`. ConfigError where there is no such device here."""
    if text is None:
        return world.device
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ConfigError(f"--device={text}: no such device; expected cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device={text}: no GPU here")
    if device.type == "cuda" and device.index is None:
        return world.device
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = str(error).split("\n", 1)[0]
        raise ConfigError(f"--device={text}: no such device here ({line}); expected cpu or cuda") from None
    return device


def _checked(
    images: str, out: str, codec: CodecConfig, options: EncodeOptions, device: torch.device
) -> Codec:
    """The codec, after all that can be checked before images are listed."""
    check_spec(images)
    check_out(Path(out).resolve())
    if "OMP_NUM_THREADS" not in os.environ:  # launch/ sets it
        torch.set_num_threads(group.cores())
    built = codec.build(device)
    check_early(Path(out).resolve(), built, options)
    return built


@contextlib.contextmanager
def _interruptible(out: Path, world: group.World) -> Iterator[None]:
    """Ctrl-C, or a scheduler's signal, ends with what is done, said once."""
    try:
        with group.on_signals(_stop):
            yield
    except (KeyboardInterrupt, Stopped) as ended:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on, to those who have it already
        done = images_done(out)
        kept = f"{done} images are done and kept" if done else "nothing is done yet"
        if world.is_main:
            print(f"interrupted: {kept}; start the same command again to go on", file=sys.stderr, flush=True)
        raise SystemExit(Stopped.status if isinstance(ended, Stopped) else 130) from None


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _encode(
    images: str, source: ImageSource, codec: Codec, out: str, options: EncodeOptions, world: group.World
) -> None:
    """This rank's share; rank 0 says what will be done, has a bar over the whole set, and says what was done."""
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # which images are damaged or odd is said by the report
    if world.is_main:
        _tell(images, source, as_begun(Path(out).resolve(), options))
    with contextlib.closing(_Bar(len(source), world)) as bar:
        me = {"rank": world.rank, "size": world.size}
        tell = {"resumed": bar.resumed, "waiting": bar.waiting}
        report = encode(source, codec, out, options, bar.progress, **me, **tell)
    if world.is_main:
        print(f"{out}: {report}", flush=True)


class _Bar:
    """Rank 0's bar, from when nothing stands in the way of the encode; and what ranks have to say while they wait."""

    def __init__(self, total: int, world: group.World):
        self.total, self.world = total, world
        self.bar: Bar[None] | None = None
        self.told = False

    def resumed(self, count: int) -> None:
        hidden = not self.world.is_main
        self.bar = Bar(total=self.total, initial=count, unit="img", desc="encode", hidden=hidden)

    def progress(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def waiting(self, what: Waiting) -> None:
        if self.bar is not None:
            self.bar.note(str(what))
        if what.ranks and what.seconds > PATIENCE and not self.told:  # on all ranks: rank 0 may be the one
            self.told = True
            say(f"rank {self.world.rank} waits: {what}", sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.note()
            self.bar.close()


def _named(family: str, name: str, keys: dict[str, str]) -> Any:
    """A choice with its own keys ("crop.scale_min" or "crop_scale_min"): {"name": ..., "scale_min": ...}."""
    pattern = re.compile(rf"{family}[._]")
    return merge(
        {"name": name}, {pattern.sub("", k, count=1): v for k, v in keys.items() if pattern.match(k)}
    )


if __name__ == "__main__":
    run(main, choices={"codec": CODECS, "crop": CROPS})
