"""The Python that samples from a folder for diffusers, as its card shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dit.data.codecs.norm import LatentNorm
from dit.interop.pipeline.schedulers import Scheduler

_PIPELINE = """
from diffusers import DiTPipeline

pipeline = DiTPipeline.from_pretrained("{name}")
images = pipeline({classes}, guidance_scale=1.5, num_inference_steps={steps}).images
"""
_LOOP = """
{imports}

transformer = DiTTransformer2DModel.from_pretrained("{name}", subfolder="transformer")
scheduler = {scheduler}.from_pretrained("{name}", subfolder="scheduler")
labels, null, scale, steps = torch.tensor({classes}), {null}, 1.5, {steps}
x = torch.randn(len(labels), {channels}, {height}, {width})
both = torch.cat([labels, torch.full_like(labels, null)])
{timesteps}
with torch.no_grad():
    for t in scheduler.timesteps:
        out = transformer(torch.cat([x, x]), t.expand(len(both)), both).sample[:, :{channels}]
        of_class, of_none = out.chunk(2)
        x = scheduler.step(of_none + scale * (of_class - of_none), t, x).prev_sample
{images}
"""
_ALONE = """
from diffusers import DiTTransformer2DModel

transformer = DiTTransformer2DModel.from_pretrained("{name}", subfolder="transformer")
# transformer(x, model_time, labels).sample; no scheduler of diffusers is for this path. To sample it:
#   python tools/convert.py diffusers {name} RUN; python tools/sample.py RUN --out=SAMPLES
"""


def code(name: str, scheduler: Scheduler | None, is_pipeline: bool, numbers: Mapping[str, Any]) -> str:
    """Lines of Python. numbers: classes to draw, null, shape (C, H, W), steps, codec, norm (None where a VAE is)."""
    given = {key: numbers[key] for key in ("classes", "null", "steps")}
    if is_pipeline:
        return _PIPELINE.format(name=name, **given)
    if scheduler is None:
        return _ALONE.format(name=name)
    channels, height, width = numbers["shape"]
    classes = ["DiTTransformer2DModel", scheduler.name, *([] if numbers["norm"] else ["AutoencoderKL"])]
    numpy = "" if scheduler.in_pipeline else "import numpy as np\n"
    sigmas = "sigmas=np.linspace(1, 1 / steps, steps)"
    return _LOOP.format(
        name=name,
        imports=f"{numpy}import torch\nfrom diffusers import {', '.join(sorted(classes))}",
        scheduler=scheduler.name,
        timesteps=f"scheduler.set_timesteps({'steps' if scheduler.in_pipeline else sigmas})",
        channels=channels,
        height=height,
        width=width,
        images=_images(name, numbers["norm"], numbers["codec"]),
        **given,
    )


def _images(name: str, norm: LatentNorm | None, codec: str) -> str:
    """What becomes of the drawn latents x: decoded by the VAE, pixels, or what another codec decodes."""
    if norm is None:
        decoded = "vae.decode(x / vae.config.scaling_factor).sample"
        return (
            f'    vae = AutoencoderKL.from_pretrained("{name}", subfolder="vae")\n'
            f"    images = ({decoded} / 2 + 0.5).clamp(0, 1)  # (N, 3, H, W)"
        )
    mean, std = (f"torch.tensor({list(values)})[:, None, None]" for values in (norm.mean, norm.std))
    latents = f"    latents = x * {std} + {mean}"
    if codec == "pixels":
        return f"{latents}\n    images = (latents / 2 + 0.5).clamp(0, 1)  # (N, 3, H, W)"
    return f"{latents}  # (N, C, H, W), which the codec {codec} decodes"
