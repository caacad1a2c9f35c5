"""Images to latent shards with a manifest: `python tools/encode.py IMAGES OUT --codec=vae --codec.path=FOLDER`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen()  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

import torch

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.flags import options_as_flags
from dit.config import merge
from dit.data.codecs.codec import CODECS
from dit.data.encoding.encode import EncodeOptions
from dit.data.encoding.parts import images_done
from dit.data.sources.classes import LabelChoice, LabelType
from dit.data.sources.crops import CROPS
from dit.data.sources.decode import Decode
from dit.data.sources.parquet import Columns
from dit.errors import Stopped
from dit.experiments.encoding import EncodeOrder, encode_images
from dit.files import expand
from dit.ranks import group
from dit.ranks.devices import chosen_device


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
    named = (Columns(image_column, label_column), LabelChoice(label_key, label_type))
    order = EncodeOrder(images, folder, chosen, options, classes, labels, *named, holdout)
    world = group.World.from_env()
    with _interruptible(order.outs, world) as asked:
        if "OMP_NUM_THREADS" not in os.environ:  # launch/ sets it
            torch.set_num_threads(group.cores())
        encode_images(order, chosen_device(device, world, "--device"), world, again=asked.again)


@contextlib.contextmanager
def _interruptible(outs: list[Path], world: group.World) -> Iterator[_EndAsked]:
    """Let Ctrl-C, or a scheduler's signal, end the work with what is done, said once."""
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


def _named(family: str, name: str, keys: dict[str, str]) -> Any:
    """A choice with its own keys ("crop.scale_min" or "crop_scale_min"): {"name": ..., "scale_min": ...}."""
    pattern = re.compile(rf"{family}[._]")
    return merge(
        {"name": name}, {pattern.sub("", k, count=1): v for k, v in keys.items() if pattern.match(k)}
    )


TOOL = Tool(main, choices={"codec": CODECS, "crop": CROPS})

if __name__ == "__main__":
    run(TOOL)
