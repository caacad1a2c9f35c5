"""From a checked config to a run under way: the same for every task."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from dit.config import to_dict
from dit.data.loading.mixture import Mixture
from dit.data.loading.quarantine import Quarantine
from dit.data.loading.stream import Stream
from dit.data.shards.manifest import Manifest
from dit.data.storage.remote import public
from dit.errors import Stopped
from dit.model.cost import Memory, peak_flops, state_memory
from dit.ranks import group
from dit.ranks.group import World
from dit.ranks.watch import Watch
from dit.train import run_dir
from dit.train.checkpoints import checkpoint
from dit.train.checkpoints.archive import Archive, checkpoints_of, whats_there
from dit.train.checkpoints.checkpoint import CheckpointError, Reader
from dit.train.checkpoints.probe import Probe
from dit.train.ema import Ema
from dit.train.engines.base import Engine
from dit.train.engines.local import LocalEngine
from dit.train.engines.zero_config import Choice, Device, choose
from dit.train.faults import Faults
from dit.train.feed import Feed
from dit.train.loop import Loop
from dit.train.optim import freeze
from dit.train.preflight import checks
from dit.train.records import Records
from dit.train.run import Parts, Run
from dit.train.settings import RunConfig
from dit.train.stop import stop_request
from dit.train.task import synthetic_samples
from dit.version import code_version

AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def train(cfg: AnyConfig, make_parts: Callable[[AnyConfig, Manifest, World], Parts]) -> None:
    """Train, or go on training, in cfg.run_dir. Collective: every rank of the job calls it.

    Raises Stopped where a signal ended it, once it has saved; KeyboardInterrupt where a Ctrl-C left nothing to save.
    """
    if cfg.train.threads:
        torch.set_num_threads(cfg.train.threads)
    # signals from the beginning: they may come while the run loads what it needs
    with stop_request() as stop, contextlib.ExitStack() as held:
        run = _started(cfg, make_parts, held)
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


def _started(
    cfg: AnyConfig,
    make_parts: Callable[[AnyConfig, Manifest, World], Parts],
    held: contextlib.ExitStack,
) -> Run:
    """Join the other ranks, take hold of the run directory, and build the run as it was last saved.

    held: keeps the ranks together and the directory until it is closed. A Ctrl-C in here says what it leaves.
    """
    try:
        world = held.enter_context(group.session())
        held.enter_context(_leaving_together())
        checks.check(cfg, world)
        held.enter_context(run_dir.locked(cfg.folder, world))
        run = build(cfg, make_parts, world)
        run.resume()
        return run
    except KeyboardInterrupt:
        if World.from_env().is_main:
            print(f"interrupted while starting, before any step: {whats_there(cfg.folder)}", flush=True)
        raise


@contextlib.contextmanager
def _leaving_together() -> Iterator[None]:
    """Let no rank end before all can: one whose status is not 0 may make its launcher end the others."""
    try:
        yield
    except Stopped:
        group.barrier()
        raise


def _done(run: Run) -> str:
    """Say of a run that it has no step left to do."""
    steps = run.cfg.train.steps
    if run.step == steps:
        return f"{run.folder} has done its {steps} steps; raise train.steps to go on"
    return (
        f"{run.folder} is at step {run.step}, and train.steps = {steps} asks for fewer: there is nothing to do; "
        f"raise train.steps above {run.step} to go on"
    )


def build(cfg: AnyConfig, make_parts: Callable[[AnyConfig, Manifest, World], Parts], world: World) -> Run:
    """Make every part of the run, checked, and claim the run directory. Collective."""
    micro = cfg.train.micro(world)
    mixture = group.together(cfg.data.open)
    manifest = mixture.manifest
    group.on_main(lambda: run_dir.compare(cfg.folder / run_dir.CONFIG, cfg))
    torch.manual_seed(cfg.seed)
    parts = group.together(lambda: make_parts(cfg, manifest, world))
    group.together(lambda: _initialise(parts.module, cfg, world))
    device = Device.smallest(world)
    zero = group.together(lambda: _sharding(cfg, parts, world, device))
    stream = group.together(lambda: _stream(cfg, mixture, world))
    every = sum(p.numel() for p in parts.module.parameters())
    trained = sum(p.numel() for p in parts.module.parameters() if p.requires_grad)
    group.on_main(lambda: checks.space(cfg, every, trained))
    folder = run_dir.claim(cfg, world, {"stage": zero.stage, **({"why": zero.why} if zero.why else {})})
    engine = _engine(cfg, parts, world, zero, cfg.train.local_batch(world) // micro)
    ema, records = Ema(engine, cfg.ema), Records(folder, world)
    samples = synthetic_samples(stored_shape(manifest), len(manifest.classes), world.device)
    probe = Probe(parts.task, engine, ema, samples, cfg.train.precision)
    if len(stream.sources) > 1:
        records.say(f"each batch of {cfg.train.global_batch}: {_shares(stream)}")
    return Run(
        cfg=cfg,
        folder=folder,
        identity=_identity(cfg, manifest, parts),
        parts=parts,
        engine=engine,
        ema=ema,
        feed=Feed(stream, cfg.data.prefetch, records.say),
        records=records,
        faults=Faults(cfg.faults, cfg.train.max_skipped, folder, world.rank),
        watch=Watch(world, cfg.train.hang_timeout, folder),
        archive=Archive(folder, cfg.checkpoint, probe, world),
        peak_flops=float(group.all_sum(torch.tensor(device_peak(world.device), device=world.device))),
    )


def _identity(cfg: RunConfig, manifest: Manifest, parts: Parts) -> dict[str, Any]:
    """Collect what every checkpoint says about its run."""
    return {
        "config": to_dict(cfg),
        "data": {"digest": manifest.digest, "samples": manifest.samples, "classes": list(manifest.classes)},
        "contract": parts.contract,
        "code": code_version(),
        "torch": torch.__version__,
    }


def _left_out(stream: Stream, blocks: Iterable[tuple[int, int]]) -> str:
    """Say how much of the data is in quarantine."""
    found = list(blocks)
    lost = sum(stream.sources[n].reader.manifest.blocks[block].samples for n, block in found)
    whole = sum(source.order.samples for source in stream.sources)
    return f"{lost} of {whole} samples ({lost / whole:.2%}), in {len(found)} block(s) that cannot be read"


def _shares(stream: Stream) -> str:
    return ", ".join(f"{s.order.global_batch} from {public(s.reader.manifest.root)}" for s in stream.sources)


def stored_shape(manifest: Manifest) -> tuple[int, ...]:
    """Give one sample's shape in one view: (2, C, H, W) where moments are stored, (1, C, H, W) where latents are."""
    one = manifest.shape[1:]
    return one if manifest.array == "moments" else (1, *one)


def _stream(cfg: RunConfig, mixture: Mixture, world: World) -> Stream:
    return Stream(
        mixture,
        cfg.seed,
        cfg.train.global_batch,
        world.rank,
        world.size,
        cfg.data.lanes,
        cfg.data.window,
        readers=cfg.data.readers,
        cache=cfg.data.cache,
        quarantine=Quarantine(cfg.data.max_quarantined),
        pin=world.device.type == "cuda",
    )


def _initialise(module: nn.Module, cfg: RunConfig, world: World) -> None:
    """Load the weights of init.from, if it is set and the run has no checkpoint of its own."""
    if cfg.init.from_ is None or group.on_main(lambda: checkpoint.exists(checkpoints_of(cfg.folder))):
        return
    source = checkpoint.resolve(cfg.init.from_)
    try:
        module.load_state_dict(Reader(source).state_dict(cfg.init.weights))
    except RuntimeError as error:
        _, *rows = str(error).splitlines()
        more = f"\n  and {len(rows) - 3} more" if len(rows) > 3 else ""
        raise CheckpointError(
            f"init.from: {source.path} does not fit this model:\n" + "\n".join(rows[:3]) + more
        ) from None
    if world.is_main:
        print(f"starting from the {cfg.init.weights} weights of {source.path}", flush=True)


def _sharding(cfg: RunConfig, parts: Parts, world: World, device: Device) -> Choice:
    """Freeze what is to be frozen and decide on the ZeRO stage."""
    frozen = freeze(parts.module, cfg.train.freeze)
    cfg.zero.check(world)
    numbers = sum(p.numel() for p in parts.module.parameters())

    def memory(stage: int) -> Memory:
        if parts.memory is None:
            return state_memory(numbers, stage, world.size, cfg.ema.count, frozen)
        return parts.memory(stage, frozen)

    found = choose(cfg.zero, memory, device)
    if found.why and world.is_main:
        print(found.why, flush=True)
    return found


def _engine(cfg: RunConfig, parts: Parts, world: World, zero: Choice, accumulation: int) -> Engine:
    if cfg.engine == "local":
        return LocalEngine(
            parts.module, cfg.optim, world, accumulation=accumulation, precision=cfg.train.precision
        )
    from dit.train.engines.zero_engine import DeepSpeedEngine  # takes seconds to import

    return DeepSpeedEngine(
        parts.module,
        cfg.optim,
        world,
        zero=zero.zero,
        global_batch=cfg.train.global_batch,
        accumulation=accumulation,
        precision=cfg.train.precision,
        leaf_modules=parts.leaf_modules,
    )


def device_peak(device: torch.device) -> float:
    """Give the peak FLOP/s of this rank's device for MFU: the maker's, else what a matrix product reaches here."""
    known = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or _measured_peak(device)


@functools.cache
def _measured_peak(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    """Measure the FLOP/s of the best of some square fp32 matrix products (0.1 s on a CPU core)."""
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
