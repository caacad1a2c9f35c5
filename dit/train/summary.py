"""What a run is, in a few lines: printed when it starts and by its dry run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from dit.data.storage.remote import public
from dit.train.ema import MAIN, Average, EmaConfig, percent
from dit.train.optim import SCHEDULES
from dit.train.plan import Plan

WIDTH = 11  # of the names


def summary(plan: Plan) -> str:
    """Run directory, devices, model, objective, data, steps, rate, averages, codec, and how to watch."""
    return table({**rows(plan), "watch": _watch(plan)})


def table(found: Mapping[str, str]) -> str:
    """Named texts as aligned lines."""
    return "\n".join(f"{name:{WIDTH}s} {text}" for name, text in found.items())


def rows(plan: Plan) -> dict[str, str]:
    """The lines of `summary` by name, but for how to watch."""
    about = dict(plan.parts.about)
    return {
        "run": f"{plan.cfg.run_dir} ({_beginning(plan)})",
        "device": _device(plan),
        "parameters": _parameters(plan),
        **about,
        "data": _data(plan),
        "batch": _batch(plan),
        "steps": _steps(plan),
        "rate": _rate(plan),
        "ema": _averages(plan.cfg.ema, plan.cfg.train.steps),
        **({"recompute": plan.fitted.why} if plan.fitted is not None else {}),
        **({"sharding": plan.sharding.why} if plan.sharding.why else {}),
    }


def _beginning(plan: Plan) -> str:
    if plan.branch is not None:
        return f"new, a branch of {plan.branch.path}"
    return "goes on" if plan.before is not None else "new"


def _device(plan: Plan) -> str:
    device, size = plan.world.device, plan.world.size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s) a rank"
    how = "plain torch" if plan.cfg.is_plain else f"ZeRO stage {plan.sharding.stage}"
    graphs = ", a CUDA graph a step" if plan.cfg.train.graphs else ""
    return f"{size} x {name}{threads}, {plan.cfg.train.precision}, {how}{graphs}"


def _parameters(plan: Plan) -> str:
    outline = plan.outline
    frozen = f", {outline.frozen:,} frozen" if outline.frozen else ""
    return f"{outline.parameters - outline.frozen:,} trained (+ {outline.buffers:,} in tables{frozen})"


def _data(plan: Plan) -> str:
    manifest, parts = plan.manifest, plan.mixture.parts
    named = " + ".join(public(part.root) for part, _ in parts)
    held_out = f", held out: {public(plan.cfg.data.val)}" if plan.cfg.val.every and plan.cfg.data.val else ""
    classes = f"{len(manifest.classes)} classes" if manifest.classes else "no classes"
    epochs = plan.cfg.train.steps * plan.cfg.train.global_batch / manifest.samples
    what = f"{manifest.samples:,} samples of {manifest.shape}, {epochs:.1f} epochs, {classes}"
    return f"{named}: {what}, codec {manifest.codec['name']}{held_out}"


def _batch(plan: Plan) -> str:
    train = plan.cfg.train
    text = train.shared_out(plan.world)
    sources = plan.stream.sources
    if len(sources) == 1:
        return text
    shares = ", ".join(f"{s.order.global_batch} from {public(s.reader.manifest.root)}" for s in sources)
    return f"{text}; each batch of {train.global_batch}: {shares}"


def _steps(plan: Plan) -> str:
    cfg = plan.cfg
    every = {"checkpoint": cfg.checkpoint.every, "held-out loss": cfg.val.every}
    every |= {
        name: getattr(getattr(cfg, section, None), "every", 0)
        for name, section in (("pictures", "sample"), ("figures", "evaluate"))
    }
    told = ", ".join(f"{name} every {steps}" for name, steps in every.items() if steps)
    return f"{cfg.train.steps:,}; {told}"


def _rate(plan: Plan) -> str:
    optim, steps = plan.cfg.optim, plan.cfg.train.steps
    warmup = f", {optim.warmup} updates of warm-up" if optim.warmup else ""
    last = optim.lr_at(max(0, steps - 1), steps)
    return (
        f"{optim.lr:g}, {SCHEDULES.name_of(optim.schedule)}{warmup} ({last:.3g} at the end); {_optimizer(plan)}, betas "
        f"{optim.betas[0]:g} {optim.betas[1]:g}, weight decay {optim.weight_decay:g}, clip {optim.clip}"
    )


def _optimizer(plan: Plan) -> str:
    """AdamW, and of how many numbers it is not."""
    matrices, settings = plan.outline.matrices, plan.cfg.optim.muon
    muon = (
        f"Muon of {matrices:,} numbers in matrices (momentum {settings.momentum:g}, {settings.dtype}), else "
    )
    return f"{muon if matrices else ''}AdamW"


def _averages(cfg: EmaConfig, updates: int) -> str:
    """Every average, and what of the start it will hold at the end."""
    names = [*cfg.decays, *cfg.powers]
    found = [Average.of(cfg, name, updates) for name in names]
    texts = [f"{a.how}{'' if a.name == MAIN else f' ({a.name})'}" for a in found]
    left = max(a.start_share or 0.0 for a in found)
    whose = "" if len(found) == 1 else " at most"
    return f"{'; '.join(texts)}; {percent(left)} of the first weights left after {updates} updates{whose}"


def _watch(plan: Plan) -> str:
    folder = plan.cfg.folder
    return (
        f"tensorboard --logdir {_quoted(folder)}   (or {_quoted(folder / 'metrics.jsonl')}, a line each "
        + (f"{plan.cfg.train.log_every} steps)")
    )


def _quoted(path: Path) -> str:
    return f"'{path}'" if " " in str(path) else os.fspath(path)
