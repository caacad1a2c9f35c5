"""From a checked config to a running loop: the same for every task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from dit.data.loading.stream import Stream
from dit.errors import Stopped
from dit.ranks import group
from dit.ranks.group import World
from dit.train import run_dir
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.engines.local import LocalEngine
from dit.train.engines.zero_config import Choice
from dit.train.loop import Loop
from dit.train.plan import MakeParts, Plan, device_peak, stored_shape
from dit.train.preflight import checks
from dit.train.settings import RunConfig
from dit.train.stop import stop_request
from dit.train.summary import summary
from dit.train.task import synthetic_samples


def train(cfg: RunConfig, make_parts: MakeParts) -> None:
    """Train, or go on training, in cfg.run_dir. Collective: every rank of the job calls it."""
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    # from the beginning, for a signal may come while the run loads what it needs
    with stop_request() as stop, group.session() as world, _leaving_together():
        plan = Plan(cfg, make_parts, world)
        checks.check(plan)
        loop = build(plan)
        loop.say(summary(plan))
        with run_dir.locked(loop.run_dir, world):
            if loop.resume() and loop.step >= cfg.train.steps:
                loop.say(f"{cfg.run_dir} has done its {cfg.train.steps} steps; raise train.steps to go on")
                return
            loop.run(stop)
            missing = loop.quarantine.known()
            if missing:
                loop.say(f"left out: {_left_out(loop.stream, missing)}")
            loop.say(f"done: {loop.step} steps; everything is in {loop.run_dir}")


@contextlib.contextmanager
def _leaving_together() -> Iterator[None]:
    """A rank that ends with a status that is not 0 may make its launcher end the others: none does before all can."""
    try:
        yield
    except Stopped:
        group.barrier()
        raise


def build(plan: Plan) -> Loop:
    """Every part of the run, checked, and the run directory claimed. Collective."""
    cfg, world, parts, zero = plan.cfg, plan.world, plan.parts, plan.sharding
    module = group.together(plan.build)
    folder = run_dir.claim(cfg, world, {"stage": zero.stage, **({"why": zero.why} if zero.why else {})})
    accumulation = cfg.train.local_batch(world) // cfg.train.micro(world)
    engine = _engine(cfg, module, parts.leaf_modules, world, zero, accumulation)
    return Loop(
        seed=cfg.seed,
        train=cfg.train,
        optim=cfg.optim,
        saving=cfg.checkpoint,
        guard=cfg.faults,
        engine=engine,
        ema=Ema(engine, cfg.ema),
        task=parts.task,
        stream=plan.stream,
        run_dir=folder,
        identity=plan.identity,
        check_config=lambda config, where: run_dir.differences(config, cfg, where),
        samples=synthetic_samples(stored_shape(plan.manifest), len(plan.manifest.classes), world.device),
        flops_per_image=parts.flops_per_image,
        peak_flops=float(group.all_sum(torch.tensor(device_peak(world.device), device=world.device))),
        from_scratch=cfg.init.from_ is None,
        hooks=parts.hooks,
        prefetch=cfg.data.prefetch,
    )


def _left_out(stream: Stream, blocks: Iterable[tuple[int, int]]) -> str:
    """How much of the data is in quarantine."""
    found = list(blocks)
    lost = sum(stream.sources[n].reader.manifest.blocks[block].samples for n, block in found)
    whole = sum(source.order.samples for source in stream.sources)
    return f"{lost} of {whole} samples ({lost / whole:.2%}), in {len(found)} block(s) that cannot be read"


def _engine(
    cfg: RunConfig,
    module: nn.Module,
    leaf_modules: tuple[type[nn.Module], ...],
    world: World,
    zero: Choice,
    accumulation: int,
) -> Engine:
    if cfg.engine == "local":
        return LocalEngine(module, cfg.optim, world, accumulation=accumulation, precision=cfg.train.precision)
    from dit.train.engines.zero_engine import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(
        module,
        cfg.optim,
        world,
        zero=zero.zero,
        global_batch=cfg.train.global_batch,
        accumulation=accumulation,
        precision=cfg.train.precision,
        leaf_modules=leaf_modules,
    )
