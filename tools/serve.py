"""A page in the browser that draws from a trained model."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dit.ranks import early

if __name__ == "__main__":
    early.listen(keep=())  # before seconds of imports
    from dit.commandline.quick import answer

    answer(__file__)  # --help and what is mistyped, before them too

from dit.commandline.argv import Tool
from dit.commandline.cli import run
from dit.commandline.flags import options_as_flags
from dit.data.codecs.codec import CODECS
from dit.experiments.loaded import load
from dit.ranks import group
from dit.serving.server import LOOPBACK, serving
from dit.serving.setting import Limits


@options_as_flags
def main(
    run_or_ckpt: Annotated[str, "a run directory or one checkpoint in it"],
    *,
    host: Annotated[str, "address to listen at; 0.0.0.0 lets in whoever reaches this machine"] = LOOPBACK[0],
    port: Annotated[int, "port to listen at; 0 = any that is free"] = 7860,
    device: Annotated[str | None, "cpu, cuda or cuda:1; none = the GPU where there is one"] = None,
    weights: Annotated[str, "which weights: ema, model, or another average, as ema_0.999"] = "ema",
    precision: Annotated[Literal["run", "fp32", "bf16"], "of matrix products; run = as in training"] = "run",
    limits: Limits,
    **codec_keys: str,
) -> None:
    """Serve a page that draws: class, guidance, solver, steps and seed, the way from noise, two settings side by side.

    One drawing at a time, others wait in a queue. It listens on this machine alone unless --host says otherwise, serves
    no file but its own pictures, and asks nothing of the network. Ctrl-C ends it. Needs Gradio (the extra `demo`).

    --codec.path=FOLDER says where the VAE is, if not where training had it.
    """
    model = load(run_or_ckpt, weights, device=device, precision=precision, codec=codec_keys)
    with serving(model, limits, host, port) as page, group.on_signals(_end, (signal.SIGTERM,)):
        print(f"{model.trained.weights_line()}\npage at {page.url} (Ctrl-C ends it)", flush=True)
        page.run()


def _end(number: int, frame: object) -> None:
    """Not at once: the page's pictures are removed first."""
    raise SystemExit(128 + number)


TOOL = Tool(main, keys={"codec": [codec for _, codec in CODECS.items()]})

if __name__ == "__main__":
    run(TOOL)
