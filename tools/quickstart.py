"""The whole job on real handwritten digits: images -> autoencoder -> latent shards -> DiT -> samples -> figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.quick import answer

if __name__ == "__main__":
    answer(__file__)  # --help and what is mistyped, before seconds of imports

import numpy as np
import torch
from PIL import Image
from torchmetrics import MeanSquaredError

from dit.cli import run
from dit.commandline import Tool
from dit.data.codecs.autoencoders import Vae
from dit.data.sources.images import open_source
from dit.errors import UserError
from dit.evals.digits import DigitsJudge, LabelledImages
from dit.files import expand, read_text
from dit.sample.generate import image_grid, to_uint8

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 500
STEPS = 16  # of Heun's method


def main(
    *,
    out: Annotated[str, "folder for everything it makes"] = "runs/quickstart",
    config: Annotated[str, "the diffusion or flow experiment"] = "configs/digits.yaml",
    num_steps: Annotated[int, "solver steps when sampling"] = STEPS,
    stage1: Annotated[str | None, "another OUT whose autoencoder and shards to use"] = None,
) -> None:
    """Run the main job end to end and write OUT/grid.png and OUT/report.json.

    Every stage is one of the project's command lines, printed before it runs. Encoding and training that are done
    are not done again, and training that was interrupted goes on where it was.
    """
    folder, first = Path(expand(out)), Path(expand(stage1 or out))
    prepare(first)
    call(
        folder,
        "train_dit",
        "tools/train.py",
        config,
        f"--run_dir={folder / 'dit'}",
        f"--data.path={first / 'latents/train'}",
        f"--data.val={first / 'latents/test'}",
        f"--codec.path={first / 'vae/vae'}",
    )
    for scale in (2, 1):
        call(
            folder,
            f"sample_cfg{scale}",
            "tools/sample.py",
            str(folder / "dit"),
            f"--out={folder / f'samples_cfg{scale}'}",
            f"--num_samples={SAMPLES}",
            f"--cfg_scale={scale}",
            f"--num_steps={num_steps}",
            "--batch_size=100",
            "--overwrite",
        )
    finish(folder, first / "vae" / "vae")


def prepare(folder: Path) -> None:
    """Pixel shards, the autoencoder and latent shards in `folder`."""
    for split in ("train", "test"):
        encode(folder, "pixels", split, "--codec=pixels")
    call(
        folder,
        "train_autoencoder",
        "tools/train_vae.py",
        "configs/digits_vae.yaml",
        f"--run_dir={folder / 'vae'}",
        f"--data.path={folder / 'pixels/train'}",
        f"--data.val={folder / 'pixels/test'}",
    )
    for split in ("train", "test"):
        encode(folder, "latents", split, "--codec=vae", f"--codec.path={folder / 'vae/vae'}")


def encode(folder: Path, kind: str, split: str, *flags: str) -> None:
    """Encode a split of the digits into folder/kind/split, unless that is done."""
    out = folder / kind / split
    if not (out / "manifest.json").is_file():
        words = ("tools/encode.py", f"digits:{split}", str(out), *flags, "--image_size=32", "--flip=false")
        call(folder, f"encode_{kind}_{split}", *words)


def call(folder: Path, stage: str, *words: str) -> None:
    """Run one of the project's commands with all cores, showing it; its seconds are added to seconds.json."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    threads = str(min(4, os.cpu_count() or 1))
    # PASSIVE: waiting threads that spin make everything crawl where other programs use the cores
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    try:
        ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False)
    finally:  # an interrupted stage took its time too
        seconds = spent(folder)
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 1)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    if ended.returncode:
        raise UserError(
            f"this stage failed (exit status {ended.returncode}); mend it and start again to go on"
        )


def spent(folder: Path) -> dict[str, float]:
    """Seconds of each stage so far, over all starts."""
    file = folder / "seconds.json"
    return dict(json.loads(read_text(file))) if file.is_file() else {}


def finish(folder: Path, vae: Path) -> None:
    """Judge the samples, draw the picture, write the report."""
    start = time.perf_counter()
    train, held_out = real("train"), real("test")
    guided, unguided = (generated(folder / f"samples_cfg{scale}") for scale in (2, 1))
    report = DigitsJudge(train, held_out).report(guided, unguided)
    report["reconstruction_mse"] = reconstruction_mse(vae, held_out.images)
    seconds = {**spent(folder), "judge": round(time.perf_counter() - start, 1)}
    report["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    by_class = [guided.images[guided.labels == c][:10] for c in range(10)]
    picture = Image.fromarray(image_grid(np.concatenate(by_class), columns=10))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(
        folder / "grid.png"
    )
    print(
        f"\nThe picture: {folder / 'grid.png'} (a row for each class)\n"
        f"class accuracy  {report['class_accuracy']:.3f} at cfg_scale 2, {report['class_accuracy_cfg1']:.3f} at 1 "
        f"(real held-out digits: {report['class_accuracy_held_out_real']:.3f})\n"
        f"Frechet (PCA)   {report['frechet']:.3f} at cfg_scale 1, {report['frechet_cfg2']:.3f} at 2 "
        f"(real held-out digits: {report['frechet_floor']:.3f})\n"
        f"autoencoder     mean squared error {report['reconstruction_mse']:.2e} on held-out digits in [0, 1]\n"
        f"{report['seconds']['total']:.0f} s in all; every figure is in {folder / 'report.json'}"
    )


def real(split: str) -> LabelledImages:
    """The digits themselves."""
    source = open_source(f"digits:{split}")
    return LabelledImages(
        np.stack([source.load(i, 32) for i in range(len(source))]), np.asarray(source.labels)
    )


def generated(folder: Path) -> LabelledImages:
    """What tools/sample.py wrote."""
    with np.load(folder / "samples.npz") as held:
        return LabelledImages(held["arr_0"], held["arr_1"])


def reconstruction_mse(vae: Path, images: np.ndarray) -> float:
    """Mean squared error in [0, 1] of images (N, H, W, 3) uint8 through the autoencoder's posterior mean."""
    codec, metric = Vae(path=str(vae)).build(), MeanSquaredError()
    for part in np.array_split(images, max(1, len(images) // 100)):
        pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = to_uint8(codec.decode(codec.encode(pixels)[:, 0]))
        metric.update(torch.from_numpy(decoded).float() / 255, torch.from_numpy(part).float() / 255)
    return float(metric.compute())


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
