"""From a checked config to a run under way: the same for every task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dit.compiling import CompileWatch
from dit.data.loading.stream import Stream
from dit.errors import InterruptTold, Stopped
from dit.ranks import group
from dit.ranks.group import World
from dit.ranks.watch import Watch
from dit.train import branch, run_dir
from dit.train.checkpoints.archive import Archive, whats_there
from dit.train.checkpoints.probe import Probe
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.engines.plain import PlainEngine
from dit.train.faults import Faults
from dit.train.feed import Feed
from dit.train.loop import Loop
from dit.train.plan import MakeParts, Plan, device_peak, stored_shape
from dit.train.preflight import checks
from dit.train.records import Records
from dit.train.run import Run
from dit.train.settings import RunConfig
from dit.train.step import StepGraph
from dit.train.stop import stop_request
from dit.train.summary import summary
from dit.train.task import synthetic_samples


def train(cfg: RunConfig, make_parts: MakeParts, owns_process: bool = True) -> None:
    """Train, or go on training, in cfg.run_dir. Collective: every rank of the job calls it.

    owns_process: whether the process is there for this run alone, so that a second Ctrl-C may end it where it hangs.
    Raises Stopped where a signal ended it, once it has saved; KeyboardInterrupt where a Ctrl-C left nothing to save.
    """
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    # signals from the beginning: they may come while the run loads what it needs
    with stop_request(owns_process) as stop, contextlib.ExitStack() as held:
        run = _started(cfg, make_parts, held)
        held.enter_context(_closed(run.engine))
        if run.step >= cfg.train.steps:
            run.complete()
            run.close()
            run.say(_done(run))
            return
        Loop(run).train(stop)
        missing = run.feed.quarantine.known()
        if missing:
            run.say(f"left out: {_left_out(run.feed.stream, missing)}")
        run.say(f"done: {run.step} steps; everything is in {run.folder}")


def _started(cfg: RunConfig, make_parts: MakeParts, held: contextlib.ExitStack) -> Run:
    """Join the other ranks, take hold of the run directory, and build the run as it was last saved.

    held: keeps the ranks together and the directory until it is closed. A Ctrl-C in here says what it leaves.
    """
    try:
        world = held.enter_context(group.session())
        held.enter_context(_leaving_together())
        plan = Plan(cfg, make_parts, world)
        checks.check(plan, checks.MACHINES)
        held.enter_context(run_dir.locked(cfg.folder, world))
        checks.check(plan, checks.FITS)  # of what a job that was still dying has left
        _begin_branch(plan)
        run = build(plan)
        run.say(summary(plan))
        run.resume()
        return run
    except KeyboardInterrupt as pressed:
        if not World.from_env().is_main:
            raise
        print(f"interrupted while starting, before any step: {whats_there(cfg.folder)}", flush=True)
        raise InterruptTold from pressed


def _begin_branch(plan: Plan) -> None:
    """Make a new run directory what init.branch names, where that is to be; resuming goes on from there. Collective."""
    found = plan.branch
    if found is not None:
        group.on_main(lambda: branch.begin(plan.cfg, found))


@contextlib.contextmanager
def _leaving_together() -> Iterator[None]:
    """Let no rank end before all can: one whose status is not 0 may make its launcher end the others."""
    try:
        yield
    except Stopped:
        group.barrier()
        raise


@contextlib.contextmanager
def _closed(engine: Engine) -> Iterator[None]:
    """Close it where the run ends in good order; after a failure that might wait for a device that does not answer."""
    try:
        yield
    except Stopped:
        engine.close()
        raise
    engine.close()


def _done(run: Run) -> str:
    """Say of a run that it has no step left to do."""
    steps = run.cfg.train.steps
    if run.step == steps:
        return f"{run.folder} has done its {steps} steps; raise train.steps to go on"
    return (
        f"{run.folder} is at step {run.step}, and train.steps = {steps} asks for fewer: there is nothing to do; "
        f"raise train.steps above {run.step} to go on"
    )


def build(plan: Plan) -> Run:
    """Make every part of a run that was planned and checked, and claim the run directory. Collective."""
    cfg, world, parts, zero, stream = plan.cfg, plan.world, plan.parts, plan.sharding, plan.stream
    module = group.together(plan.build)
    facts: dict[str, Any] = {
        "flops_per_sample": parts.flops_per_image
    }  # of a training step: `compare-runs` draws against FLOPs
    if not cfg.is_plain:
        facts |= {"stage": zero.stage, **({"why": zero.why} if zero.why else {})}
    folder = run_dir.claim(cfg, world, facts)
    engine = _engine(plan, module)
    ema, records = Ema(engine, cfg.ema), Records(folder, world)
    samples = synthetic_samples(stored_shape(plan.manifest), len(plan.manifest.classes), world.device)
    graph = None
    if cfg.train.graphs and isinstance(engine, PlainEngine):
        graph = StepGraph(
            parts.compiled_task or parts.task, engine, cfg.train.micro(world), cfg.faults.max_loss
        )
    return Run(
        cfg=cfg,
        folder=folder,
        identity=plan.identity,
        parts=parts,
        engine=engine,
        graph=graph,
        ema=ema,
        feed=Feed(stream, cfg.data.prefetch, records.say),
        records=records,
        faults=Faults(cfg.faults, cfg.train.max_skipped, folder, world.rank),
        watch=Watch(world, cfg.train.hang_timeout, folder),
        archive=Archive(
            folder, cfg.checkpoint, Probe(parts.task, engine, ema, samples, cfg.train.precision), world
        ),
        compile_watch=CompileWatch(records.say, world.is_main) if parts.compiled_task else None,
        peak_flops=float(group.all_sum(torch.tensor(device_peak(world.device), device=world.device))),
    )


def _left_out(stream: Stream, blocks: Iterable[tuple[int, int]]) -> str:
    """Say how much of the data is in quarantine."""
    found = list(blocks)
    lost = sum(stream.sources[n].reader.manifest.blocks[block].samples for n, block in found)
    whole = sum(source.order.samples for source in stream.sources)
    return f"{lost} of {whole} samples ({lost / whole:.2%}), in {len(found)} block(s) that cannot be read"


def _engine(plan: Plan, module: nn.Module) -> Engine:
    cfg, world = plan.cfg, plan.world
    accumulation = cfg.train.local_batch(world) // cfg.train.micro(world)
    if cfg.is_plain:
        return PlainEngine(module, cfg.optim, world, accumulation=accumulation, precision=cfg.train.precision)
    from dit.train.engines.zero_engine import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(
        module,
        cfg.optim,
        world,
        zero=plan.sharding.zero,
        global_batch=cfg.train.global_batch,
        accumulation=accumulation,
        precision=cfg.train.precision,
        leaf_modules=plan.parts.leaf_modules,
    )
