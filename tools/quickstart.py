"""The whole job on real handwritten digits: images -> autoencoder -> latent shards -> DiT -> samples -> figures."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.errors import UserError
from dit.files import expand, read_text

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 500
STEPS = 16  # of Heun's method


@dataclass(frozen=True)
class Stage:
    """Name one command. words: as typed in the checkout. usual: its seconds on two cores of a server."""

    name: str
    words: tuple[str, ...]
    usual: float


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not at once: wait_for hands it on
    folder, first = Path(expand(out)), Path(expand(stage1 or out))
    run_all(folder, [*first_stages(first), *second_stages(folder, first, config, num_steps)])
    finish(folder, first / "vae" / "vae")


def first_stages(folder: Path) -> list[list[Stage]]:
    """Pixel shards, the autoencoder and latent shards in `folder`. What is in one list runs at the same time."""
    train = Stage(
        "train_autoencoder",
        (
            "launch/local.sh",
            "tools/train_vae.py",
            "configs/digits_vae.yaml",
            f"--run_dir={folder / 'vae'}",
            f"--data.path={folder / 'pixels/train'}",
            f"--data.val={folder / 'pixels/test'}",
        ),
        usual=38,
    )
    codec = ("--codec=vae", f"--codec.path={folder / 'vae/vae'}")
    return [encode(folder, "pixels", "--codec=pixels"), [train], encode(folder, "latents", *codec)]


def encode(folder: Path, kind: str, *flags: str) -> list[Stage]:
    """Encode the digits into folder/kind/train and folder/kind/test, what is not there yet."""
    return [
        Stage(
            f"encode_{kind}_{split}",
            (
                "python",
                "tools/encode.py",
                f"digits:{split}",
                str(out),
                *flags,
                "--image_size=32",
                "--flip=false",
            ),
            usual=5,
        )
        for split, out in ((split, folder / kind / split) for split in ("train", "test"))
        if not (out / "manifest.json").is_file()
    ]


def second_stages(folder: Path, first: Path, config: str, num_steps: int) -> list[list[Stage]]:
    """The DiT on the latents in `first`, and two sets of its samples. What is in one list runs at the same time."""
    train = Stage(
        "train_dit",
        (
            "launch/local.sh",
            config,
            f"--run_dir={folder / 'dit'}",
            f"--data.path={first / 'latents/train'}",
            f"--data.val={first / 'latents/test'}",
            f"--codec.path={first / 'vae/vae'}",
        ),
        usual=95,
    )
    draw = [
        Stage(
            f"sample_cfg{scale}",
            (
                "python",
                "tools/sample.py",
                str(folder / "dit"),
                f"--out={folder / f'samples_cfg{scale}'}",
                f"--num_samples={SAMPLES}",
                f"--cfg_scale={scale}",
                f"--num_steps={num_steps}",
                "--batch_size=100",
                "--overwrite",
            ),
            usual=17,
        )
        for scale in (2, 1)
    ]
    return [[train], draw]


# --- running ------------------------------------------------------------------------------------------------


def run_all(folder: Path, steps: Sequence[list[Stage]]) -> None:
    """Run all stages, with a clock and what is still to come over each; their seconds are added to seconds.json."""
    steps = [stages for stages in steps if stages]
    start, usual = time.monotonic(), [max(stage.usual for stage in stages) for stages in steps]
    for i, stages in enumerate(steps):
        passed = time.monotonic() - start
        slower = passed / sum(usual[:i]) if i else 1.0  # than the machine that `usual` is of
        names = " and ".join(stage.name.replace("_", " ") for stage in stages)
        print(
            f"\n[{clock(passed)}] {i + 1} of {len(steps)}: {names}. "
            f"About {clock(slower * sum(usual[i:]))} to go{coming(steps[i + 1 :])}",
            flush=True,
        )
        run_stages(folder, stages)


def coming(steps: Iterable[list[Stage]]) -> str:
    """Tell what follows, as "; then encode latents, train dit"."""
    names = [
        stages[0].name.removesuffix("_train").removesuffix("_cfg2").replace("_", " ") for stages in steps
    ]
    return "; then " + ", ".join(names) if names else ""


def clock(seconds: float) -> str:
    """Write seconds as minutes and seconds, 3:07."""
    return f"{seconds // 60:.0f}:{seconds % 60:02.0f}"


def run_stages(folder: Path, stages: Sequence[Stage]) -> None:
    """Run commands at the same time and show them: the first one as it goes, the others when all have ended."""
    for stage in stages:
        print(f"$ {shlex.join(stage.words)}", flush=True)
    start = time.perf_counter()
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in stages[1:]]
        running = [begin(stage, len(stages), log) for stage, log in zip(stages, [None, *logs], strict=True)]
        try:
            wait_for(running)
        finally:  # an interrupted stage took its time too
            add_seconds(folder, stages[0].name, time.perf_counter() - start)
            for log in logs:
                log.seek(0)
                print(log.read(), end="", flush=True)
    for stage, process in zip(stages, running, strict=True):
        if process.returncode:
            raise UserError(
                f"{stage.name} failed (exit status {process.returncode}); mend it and start again to go on"
            )


def begin(stage: Stage, beside: int, log: IO[str] | None) -> subprocess.Popen[bytes]:
    """Start a command on its share of the cores: one thread a process, and for launch/local.sh a rank a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = 1 if Path("/dev/nvidia0").exists() else 4 if cores >= 4 else 2 if cores >= 2 else 1
    threads = max(1, min(4, cores) // (ranks if stage.words[0].endswith(".sh") else beside))
    words = [sys.executable if word == "python" else word for word in stage.words]
    # PASSIVE: waiting threads that spin make everything crawl where other programs use the cores
    more = {
        "PYTHON": sys.executable, "NPROC": str(ranks), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"
    }  # fmt: skip
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **more}, stdout=log, stderr=log)


def wait_for(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until all have ended; at a signal, for what they save. Ctrl-C reaches them too, SIGTERM is handed on."""
    try:
        for process in running:
            process.wait()
    except (KeyboardInterrupt, SystemExit) as signalled:
        if isinstance(signalled, SystemExit):
            for process in running:
                process.terminate()
        for process in running:
            process.wait()
        raise


def spent(folder: Path) -> dict[str, float]:
    """Read the seconds of each stage so far, over all starts."""
    file = folder / "seconds.json"
    return dict(json.loads(read_text(file))) if file.is_file() else {}


def add_seconds(folder: Path, stage: str, seconds: float) -> None:
    """Count the time of a stage."""
    so_far = spent(folder)
    folder.mkdir(parents=True, exist_ok=True)
    so_far[stage] = round(so_far.get(stage, 0.0) + seconds, 1)
    (folder / "seconds.json").write_text(json.dumps(so_far), encoding="utf-8")


# --- judging ------------------------------------------------------------------------------------------------


def finish(folder: Path, vae: Path) -> None:
    """Judge the samples, draw the picture, write the report."""
    start = time.perf_counter()
    from dit.evals.digits import judge_quickstart  # seconds of imports, for which no stage waits

    report = judge_quickstart(folder, vae)
    seconds = {**spent(folder), "judge": round(time.perf_counter() - start, 1)}
    report["seconds"] = {**seconds, "total": round(sum(seconds.values()), 1)}
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"\nThe picture: {folder / 'grid.png'} (a row for each class)\n"
        f"class accuracy  {report['class_accuracy']:.3f} at cfg_scale 2, {report['class_accuracy_cfg1']:.3f} at 1 "
        f"(real held-out digits: {report['class_accuracy_held_out_real']:.3f})\n"
        f"Frechet (PCA)   {report['frechet']:.3f} at cfg_scale 1, {report['frechet_cfg2']:.3f} at 2 "
        f"(real held-out digits: {report['frechet_floor']:.3f})\n"
        f"autoencoder     mean squared error {report['reconstruction_mse']:.2e} on held-out digits in [0, 1]\n"
        f"{clock(report['seconds']['total'])} in all; every figure is in {folder / 'report.json'}"
    )


TOOL = Tool(main)

if __name__ == "__main__":
    run(TOOL)
