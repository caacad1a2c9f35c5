"""Run-level settings of training; each component's own settings stand beside the component."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from dit.config import Complaint, ConfigError, config
from dit.data.loading.mixture import Mixture, PartConfig
from dit.data.storage.nodecache import NodeCacheConfig
from dit.files import FileError, expand
from dit.ranks.group import World
from dit.train.ema import EmaConfig
from dit.train.engines.optimizers import OPTIMIZERS
from dit.train.engines.optimizers import check as check_optimizer
from dit.train.engines.zero_config import ZeroConfig
from dit.train.faults import FaultsConfig
from dit.train.optim import OptimConfig


@config
class TrainConfig:
    """How long, how large, how precise."""

    steps: int = 1000  # batches drawn, over the whole run
    global_batch: int = 256  # samples a step, over all ranks
    micro_batch: int | None = None  # samples a forward pass and rank, at most; null = the rank's whole share
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = fp32 weights and autocast matrix products
    log_every: int = 10  # steps between lines of the log
    max_skipped: int = 20  # updates skipped in a row before the run stops
    graphs: bool = False  # launch a step as one CUDA graph: for small models; needs a GPU and engine: plain
    threads: int | None = None  # torch CPU threads a rank; null = as the environment says
    # The ranks that hold the others up are named, and the run ends. A rank that is not heard of is after half as long.
    hang_timeout: float | None = 300.0  # seconds without progress in a step or in its data; null = no limit
    freeze: tuple[str, ...] = ()  # names of parameters that are not trained, with * and ?: ["blocks.0.*"]

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "log_every", "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1 or null, got {getattr(self, name)}")
        if self.hang_timeout is not None and not 1.0 <= self.hang_timeout < math.inf:
            raise ConfigError(
                f"train.hang_timeout must be at least 1 second, or null for never; got {self.hang_timeout}"
            )

    def local_batch(self, world: World) -> int:
        """Samples a rank takes a step. Raises ConfigError where they cannot be shared out evenly."""
        if self.global_batch % world.size:
            divisors = [d for d in range(1, self.global_batch + 1) if self.global_batch % d == 0]
            raise ConfigError(
                f"train.global_batch = {self.global_batch} cannot be shared by {world.size} ranks; use a multiple of "
                f"{world.size}, or one of {divisors} ranks"
            )
        return self.global_batch // world.size

    def micro(self, world: World) -> int:
        """Samples in one forward pass on one rank."""
        local = self.local_batch(world)
        micro = min(self.micro_batch or local, local)
        if micro < 1 or local % micro:
            raise ConfigError(
                f"train.micro_batch = {micro} does not divide a rank's share of {local} samples "
                f"(global batch {self.global_batch} over {world.size} ranks)"
            )
        return micro

    def shared_out(self, world: World) -> str:
        """How a batch is shared by the ranks, as text. Raises ConfigError where it cannot be."""
        micro, local = self.micro(world), self.local_batch(world)
        return f"{self.global_batch} = {world.size} ranks x {micro} x {local // micro} accumulated"


@config
class CheckpointConfig:
    """When to save and what to keep. The last step is always saved."""

    every: int = 1000  # steps between checkpoints
    keep: int = 3  # newest checkpoints kept; 0 = all
    keep_every: int = 0  # steps; those saved at its multiples are kept as well, for good; 0 = none
    at: tuple[int, ...] = ()  # steps saved at besides, and kept for good: where init.branch is to begin
    background: bool = True  # write while training goes on, from a copy in the host's memory

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 0 or self.keep_every < 0:
            raise ConfigError(
                "checkpoint.every must be at least 1, checkpoint.keep and keep_every at least 0"
            )
        if self.keep_every % self.every:
            raise ConfigError(
                f"checkpoint.keep_every = {self.keep_every} is no multiple of checkpoint.every = {self.every}: most of "
                "its steps would not be saved"
            )
        if any(step < 1 for step in self.at):
            raise ConfigError(f"checkpoint.at must be steps of at least 1, got {list(self.at)}")

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved when this many steps are done."""
        return step % self.every == 0 or step in self.at

    def is_for_good(self, step: int) -> bool:
        """Whether the checkpoint of this step stays, however many newer ones there are."""
        return step in self.at or (self.keep_every > 0 and step % self.keep_every == 0)


@config
class InitConfig:
    """Start a new run from another's weights, or as its branch. To go on with a run, start the same command again."""

    from_: str | None = None  # run directory or checkpoint whose weights a new run starts from; null = none
    weights: str = "ema"  # which of its weights: ema, model, or another average, as ema_0.999
    # run or checkpoint as which a new run begins, its logs and optimizer too (docs/training.md); null = none
    branch: str | None = None


@config
class DataConfig:
    """Where the shards lie and in what order they are read. The order depends on seed, lanes and window alone."""

    path: str | None = None  # folder or URL with a manifest.json, written by tools/encode.py
    mix: tuple[PartConfig, ...] = ()  # or several: [{path: A, weight: 3}, {path: B, weight: 1}], or repeat
    val: str | None = None  # held-out shards of the same codec, for the held-out loss
    lanes: int = 64  # data sequences that a batch is filled from, evenly; as many as its samples at most
    window: int = 2  # blocks a lane shuffles over
    prefetch: int = 4  # batches made ahead
    readers: int = 2  # threads a rank that read blocks
    max_quarantined: int = 0  # blocks that may be unreadable: their samples then count for nothing
    cache: NodeCacheConfig = NodeCacheConfig()  # blocks of slow or remote storage kept on this node

    def __post_init__(self) -> None:
        for name in ("lanes", "window", "prefetch", "readers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_quarantined < 0:
            raise ConfigError(f"data.max_quarantined must be at least 0, got {self.max_quarantined}")
        if self.path and self.mix:
            twice = Complaint(("path",), "is set, and data.mix too; add --data.path=null")
            raise ConfigError(
                problems=[twice, Complaint(("mix",), "is set, and data.path too; or add --data.mix=[]")]
            )
        if not self.path and not self.mix:
            raise ConfigError("data needs a path, or a mix of several data sets")

    @property
    def name(self) -> str:
        """What to call the data in messages."""
        return self.path or " + ".join(part.path for part in self.mix)

    def open(self) -> Mixture:
        """The data set, or the mixture. Raises DataError."""
        return Mixture.load(self.mix or (PartConfig(path=str(self.path)),))


@config
class ValConfig:
    """The held-out loss, with EMA weights and draws that are the same in every run."""

    every: int = 0  # steps between held-out losses; 0 = never; needs data.val
    samples: int = (
        1024  # held-out samples, or as many as there are; the same for any batch and number of ranks
    )
    batches: int | None = (
        None  # as many times train.global_batch samples, in place of val.samples; null = none
    )

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 1 or (self.batches is not None and self.batches < 1):
            raise ConfigError("val.every must be at least 0, val.samples and val.batches at least 1")


@config
class RunConfig:
    """What every run has, whatever it trains."""

    data: DataConfig
    run_dir: str = "runs/default"  # folder of everything the run writes
    seed: int = 0  # of the weights, the order and every draw
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    faults: FaultsConfig = FaultsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    zero: ZeroConfig = ZeroConfig()
    val: ValConfig = ValConfig()
    # deepspeed; plain = torch alone, nothing sharded, the same checkpoints; local = that on one rank
    engine: Literal["deepspeed", "plain", "local"] = "deepspeed"
    init: InitConfig = InitConfig()

    @property
    def folder(self) -> Path:
        """The run directory, ~ and variables filled in. ConfigError for a variable that is not set."""
        try:
            return Path(expand(self.run_dir))
        except FileError as error:
            raise ConfigError(problems=[Complaint(("run_dir",), str(error))]) from None

    def __post_init__(self) -> None:
        if self.val.every and self.data.val is None:
            raise ConfigError("val.every is set, but data.val (a folder of held-out shards) is not")
        self._check_engine()
        beyond = [step for step in self.checkpoint.at if step > self.train.steps]
        if beyond:
            raise ConfigError(
                f"checkpoint.at = {beyond} lies beyond train.steps = {self.train.steps} and would never be saved: take "
                "those steps out, or train longer"
            )
        check_optimizer(self.optim)
        if self.zero.offload != "none" and not OPTIMIZERS[self.optim.name].may_offload:
            raise ConfigError(
                f"zero.offload is {self.zero.offload}, and optim.name {self.optim.name} needs its state on the device: "
                "leave the offload out, or take optim.name: adamw"
            )
        self.optim.schedule.check(self.optim.warmup, self.train.steps)

    @property
    def is_plain(self) -> bool:
        """Whether torch alone applies the updates, and nothing is sharded."""
        return self.engine != "deepspeed"

    def _check_engine(self) -> None:
        """ConfigError for what the engine does not do."""
        if self.train.graphs and not self.is_plain:
            raise ConfigError(
                "train.graphs needs engine: plain: DeepSpeed decides on the host between a step's kernels, which no "
                "CUDA graph can hold. Set engine: plain, or leave train.graphs out"
            )
        if self.train.graphs and (self.optim.name != "adamw" or self.optim.one_pass):
            raise ConfigError(
                "train.graphs captures torch's own AdamW: leave it out, or optim.name and optim.one_pass"
            )
        if not self.is_plain:
            return
        if self.zero.offload != "none" or self.zero.hpz > 1:
            raise ConfigError(
                f"zero.offload and zero.hpz are DeepSpeed's: leave them out, or engine: {self.engine}"
            )
        if self.engine == "plain" and self.zero.stage not in ("auto", 0):
            raise ConfigError(
                f"zero.stage = {self.zero.stage} is DeepSpeed's: engine: plain shards nothing, as 0 and auto say. "
                "Leave out zero.stage, or engine: plain"
            )
        if self.engine == "plain" and self.zero.communication == "bf16":
            raise ConfigError(
                "zero.communication = bf16 is DeepSpeed's: engine: plain sends gradients in fp32. Leave out "
                "zero.communication, or engine: plain"
            )


# A change of these is taken and recorded; a change of any other key would make it another run and is refused.
# data.path, data.mix and codec are here because the identity of the data and of their codec is in the manifests,
# whose digest checkpoints hold, as they hold the sha256 of perceptual.weights.
OPERATIONAL = (
    "run_dir", "engine", "zero", "checkpoint", "faults", "sample", "evaluate", "val", "codec", "data.path",
    "data.mix", "data.val", "data.prefetch", "data.readers", "data.max_quarantined", "data.cache",
    "train.steps", "train.micro_batch", "train.log_every", "train.max_skipped", "train.compile", "train.graphs",
    "train.threads", "train.hang_timeout", "optim.one_pass", "ema.snapshot_every", "init.branch",
    "train.memory_gb", "model.checkpoint_blocks", "model.checkpoint_keep", "model.kernels", "model.attention",
    "classifier.checkpoint_blocks", "perceptual.weights",
)  # fmt: skip
