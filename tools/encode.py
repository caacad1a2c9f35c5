"""Images to latent shards with a manifest: `python tools/encode.py IMAGES OUT --codec=vae --codec.path=FOLDER`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.quick import answer

if __name__ == "__main__":
    answer(__file__)  # --help and what is mistyped, before seconds of imports

import torch

from dit.cli import run
from dit.commandline import Tool
from dit.config import ConfigError, merge
from dit.data.codecs.base import Codec, CodecConfig
from dit.data.codecs.codec import CODECS
from dit.data.encoding.checks import check_early, check_out
from dit.data.encoding.encode import EncodeOptions, Waiting, encode
from dit.data.encoding.older import options_as_begun
from dit.data.encoding.parts import images_done
from dit.data.sources.classes import LabelChoice, LabelType
from dit.data.sources.crops import CROPS
from dit.data.sources.decode import Decode
from dit.data.sources.images import ImageSource, check_spec, label_warning, open_source, unlabelled_note
from dit.data.sources.parquet import Columns
from dit.data.sources.split import check_share, held_out_folder, split
from dit.errors import Notice, Stopped
from dit.files import expand
from dit.flags import options_as_flags
from dit.progress import Bar, say
from dit.ranks import group

PATIENCE = 60  # seconds until a rank says that it waits for one which nobody takes over from


@options_as_flags
def main(
    images: Annotated[str, "a folder, tar, Parquet file or pattern, as above"],
    out: Annotated[str, "a new folder for the shards and their manifest"],
    *,
    codec: Annotated[str, "which of the codecs below"] = "vae",
    crop: Annotated[str, "which of the crops below"] = "centre",
    options: EncodeOptions,
    decode: Decode,
    classes: Annotated[str | None, "imagenet1k: its 1000 labels, for folders or tars named by wnid"] = None,
    labels: Annotated[str | None, "file of names and classes, a line each (CSV), for their own"] = None,
    label_key: Annotated[str | None, "of the label in KEY.json, or in the head of --labels"] = None,
    label_type: Annotated[LabelType, "take labels as numbers, or as names of classes"] = "auto",
    label_column: Annotated[str | None, "of Parquet, where it is not called label; empty: no labels"] = None,
    image_column: Annotated[str | None, "of Parquet, where it is not called image"] = None,
    holdout: Annotated[float, "share of the images, of each class, to keep from training in OUT-val"] = 0.0,
    device: Annotated[str | None, "cpu, cuda, cuda:1, ...; the rank's GPU where there is one"] = None,
    **codec_crop_keys: str,
) -> None:
    """Encode IMAGES once, into latent shards and a manifest in the new folder OUT.

    IMAGES: a folder (CLASS/name.jpg), a tar of such a folder, WebDataset tars of KEY.jpg and KEY.cls (or KEY.json),
    ImageNet's tar of class tars, Parquet with image bytes (each: one file, a folder of them, train-{000..099}.tar or a
    pattern), or digits:train and digits:test. Formats: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM, QOI.

    Stopped or killed, the same command goes on with what is done. Ranks share the work: launch/local.sh
    tools/encode.py IMAGES OUT ..., or sbatch ... launch/multinode.sh tools/encode.py IMAGES OUT ... (OUT on a file
    system that the nodes share). The same images, codec and options give the same bytes, whatever the ranks.

    --holdout=0.1 writes a tenth of each class to OUT-val first, for --data.val; the same images whatever the ranks.
    """
    images, folder = expand(images), Path(expand(out)).resolve()
    options = replace(options, crop=CROPS.parse(_named("crop", crop, codec_crop_keys)), decode=decode)
    chosen = CODECS.parse(_named("codec", codec, codec_crop_keys))
    world, columns = group.World.from_env(), Columns(image_column, label_column)
    check_share(holdout)
    outs = [held_out_folder(folder), folder] if holdout else [folder]
    with _interruptible(outs, world) as asked:
        built = _checked(images, outs, holdout, chosen, options, _device(device, world))
        source = open_source(images, classes, labels, columns, LabelChoice(label_key, label_type))
        if world.is_main:
            _tell(images, source, options_as_begun(folder, options))
        parts = reversed(split(source, holdout, options.seed)) if holdout else [source]
        _encode_each(zip(parts, outs, strict=True), built, options, world, asked)


def _tell(images: str, source: ImageSource, options: EncodeOptions) -> None:
    """What was found, what is odd about it, and what will be done to it."""
    note, odd = unlabelled_note(images, source), label_warning(source)
    by = f" ({source.labelled_by})" if source.labelled_by and source.classes else ""
    notes = [f"note: {note}"] if note else []
    print(f"{images}: {source}{by}", *notes, *options.steps(), sep="\n", flush=True)
    if odd:
        warnings.warn(odd, Notice, stacklevel=2)


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
    images: str,
    outs: list[Path],
    share: float,
    codec: CodecConfig,
    options: EncodeOptions,
    device: torch.device,
) -> Codec:
    """The codec, after all that can be checked before images are listed."""
    check_spec(images)
    for out in outs:
        check_out(out)
    if "OMP_NUM_THREADS" not in os.environ:  # launch/ sets it
        torch.set_num_threads(group.cores())
    built = codec.build(device)
    for out in outs:
        check_early(out, built, options, share)
    return built


@contextlib.contextmanager
def _interruptible(outs: list[Path], world: group.World) -> Iterator[_EndAsked]:
    """Ctrl-C, or a scheduler's signal, ends with what is done, said once."""
    asked = _EndAsked()
    try:
        with group.on_signals(asked, (*group.SIGNALS, signal.SIGINT)):
            yield asked
    except (KeyboardInterrupt, Stopped) as ended:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes it on, to those who have it already
        done = sum(images_done(out) for out in outs)
        kept = f"{done} images are done and kept" if done else "nothing is done yet"
        if world.is_main:
            print(f"interrupted: {kept}; start the same command again to go on", file=sys.stderr, flush=True)
        raise SystemExit(Stopped.status if isinstance(ended, Stopped) else 130) from None


class _EndAsked:
    """A signal that asked for an end. It raises where it is heard; `again`, where nothing came of that.

    Python lets no exception out of a finaliser, for one.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.again()

    def again(self) -> None:
        """Raise once more. Raises KeyboardInterrupt after Ctrl-C, Stopped after another signal."""
        if self.number is not None:
            raise KeyboardInterrupt if self.number == signal.SIGINT else Stopped


def _encode_each(
    sets: Iterable[tuple[ImageSource, Path]],
    codec: Codec,
    options: EncodeOptions,
    world: group.World,
    asked: _EndAsked,
) -> None:
    """One set after the other, each to its folder; max_bad is of all of them together."""
    warnings.filterwarnings(
        "ignore", module=r"PIL\."
    )  # which images are damaged or odd is said by the report
    for source, out in sets:
        bad = _encode(source, codec, out, options, _Bar(len(source), world, asked))
        options = replace(options, max_bad=options.max_bad - bad)


def _encode(source: ImageSource, codec: Codec, out: Path, options: EncodeOptions, shown: _Bar) -> int:
    """This rank's share; rank 0 has a bar over the whole set, and says what was done when that is closed.

    Returns how many images could not be read.
    """
    world = shown.world
    with contextlib.closing(shown) as bar:
        me = {"rank": world.rank, "size": world.size}
        tell = {"resumed": bar.resumed, "waiting": bar.waiting}
        report = encode(source, codec, out, options, bar.progress, **me, **tell)
    if world.is_main:
        print(f"{out}: {report}", flush=True)
    return len(report.manifest.bad)


class _Bar:
    """Rank 0's bar, from when nothing stands in the way of the encode; and what ranks have to say while they wait."""

    def __init__(self, total: int, world: group.World, asked: _EndAsked):
        self.total, self.world, self.asked = total, world, asked
        self.bar: Bar[None] | None = None
        self.told = False

    def resumed(self, count: int) -> None:
        hidden = not self.world.is_main
        self.bar = Bar(total=self.total, initial=count, unit="img", desc="encode", hidden=hidden)

    def progress(self, count: int) -> None:
        self.asked.again()
        if self.bar is not None:
            self.bar.update(count)

    def waiting(self, what: Waiting) -> None:
        self.asked.again()
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


TOOL = Tool(main, choices={"codec": CODECS, "crop": CROPS})

if __name__ == "__main__":
    run(TOOL)
