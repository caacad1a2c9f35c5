"""The training loop: exact, resumable, the same for every task and engine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dit import dist
from dit.config import flatten
from dit.data.stream import Batch, Stream
from dit.errors import Stopped, UserError
from dit.rng import Draws
from dit.train import checkpoint
from dit.train.checkpoint import CheckpointError
from dit.train.ema import Ema
from dit.train.fragments import Engine
from dit.train.hooks import Hook
from dit.train.meters import Meters, RunLog
from dit.train.optim import OptimConfig
from dit.train.quarantine import SharedQuarantine
from dit.train.settings import CheckpointConfig, TrainConfig
from dit.train.stop import stop_request
from dit.train.task import Samples, Task, batch_samples, loss_of
from dit.train.watch import Watch

PROBE_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative


class TrainingError(UserError):
    """The run cannot go on; what is on disk is whole."""


@dataclass
class Loop:
    """A run's parts. `resume()` once, then `run()`.

    identity: JSON values that go into every checkpoint (config, data contract, code version).
    check_config: refuses (by an error) to go on with a checkpoint of another config, given that and its name.
    probe: a fixed synthetic batch whose loss a checkpoint records and a load must find again.
    flops_per_image: of a training step. peak_flops: of all ranks' devices together, or None.
    """

    seed: int
    train: TrainConfig
    optim: OptimConfig
    saving: CheckpointConfig
    engine: Engine
    ema: Ema
    task: Task
    stream: Stream
    run_dir: Path
    identity: dict[str, Any]
    probe: Samples
    check_config: Callable[[Mapping[str, Any], str], object]
    flops_per_image: float
    peak_flops: float | None
    from_scratch: bool = True
    prefetch: int = 4  # batches
    hooks: list[Hook] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.world = self.engine.world
        self.step = 0  # steps done
        self.skipped_in_a_row = 0
        self.quarantine = SharedQuarantine(self.stream.quarantine, self.say)
        self.batches: Any = None  # of the stream, under way
        self.meters = Meters(self.engine.device)
        self.micro = self.train.micro(self.world)
        self.watch = Watch(self.world, self.train.hang_timeout, self.run_dir)

    # --- resume and save ---

    def resume(self) -> bool:
        """Go on from the run directory's newest good checkpoint; False where there is none. Collective."""
        # rank 0 finds and verifies for all: file systems may not show every rank the same
        found = dist.on_main(lambda: checkpoint.latest(self.run_dir / "checkpoints", self.say))
        if found is None:
            return False
        meta = found.meta
        self.check_config(meta["config"], str(found.path))
        self._check_data(found)
        self.quarantine.load(meta["quarantine"])
        dist.together(
            lambda: checkpoint.load_into(found, self.engine.fragments(), self.ema.pieces, self.engine.module)
        )
        self.engine.sync_weights()
        self.engine.set_updates(meta["updates"])
        self.engine.skipped = meta["skipped"]
        self.step, self.skipped_in_a_row = found.step, meta["skipped_in_a_row"]
        self.meters.load_state(meta["meters"], self.world.is_main)
        self._check_probe(found)
        self.say(f"resuming {self.run_dir} at step {self.step}")
        return True

    def save(self) -> None:
        """Write a checkpoint of the steps done; collective."""
        self.watch.at("save", self.step)
        meta = {
            **self.identity,
            "updates": self.engine.updates,
            "skipped": self.engine.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "samples": self.step * self.train.global_batch,
            "meters": self.meters.state(),
            "probe": {"precision": self.train.precision, **self._probe_losses()},
            "world_size": self.world.size,
            "quarantine": self.quarantine.agree(self._stop_reading),
        }
        folder = self.run_dir / "checkpoints"
        checkpoint.save(folder, self.step, self.engine.fragments(), self.ema.pieces, self.engine.module, meta)
        dist.on_main(lambda: checkpoint.prune(folder, self.saving.keep, self.step, self.saving.keep_every))

    @torch.no_grad()
    def _probe_losses(self) -> dict[str, float]:
        task = self.task.uncoupled()
        live = float(task.loss(self.engine, self.probe).mean)
        with self.ema.swapped_in():
            return {"model": live, "ema": float(task.loss(self.engine, self.probe).mean)}

    def _check_data(self, found: checkpoint.Checkpoint) -> None:
        """Refuse data, statistics or a codec that are not the checkpoint's."""
        there, here = ({k: d[k] for k in ("data", "contract")} for d in (found.meta, self.identity))
        before, now = flatten(there), flatten(json.loads(json.dumps(here)))
        rows = [
            f"  {k}: {before.get(k)!r} there, {now.get(k)!r} here"
            for k in sorted({*before, *now})
            if before.get(k) != now.get(k)
        ]
        if rows:
            raise CheckpointError(
                f"{found.path} was trained on other data than the ones given:\n" + "\n".join(rows) + "\n"
                "Set data.path (or data.mix) to the data of this run, or another run_dir to start a new one."
            )

    def _check_probe(self, found: checkpoint.Checkpoint) -> None:
        """Refuse weights that do not compute what they computed when they were saved."""
        saved, now = found.meta["probe"], self._probe_losses()
        tolerance = max(PROBE_TOLERANCE[saved["precision"]], PROBE_TOLERANCE[self.train.precision])
        for kind, value in now.items():
            if not math.isclose(value, saved[kind], rel_tol=tolerance):
                raise CheckpointError(
                    f"{found.path}: the probe loss of the {kind} weights was {saved[kind]:.8g} and is {value:.8g} "
                    f"after loading (allowed: {tolerance:g} relative). The code or the libraries changed the model."
                )

    # --- training ---

    def run(self) -> None:
        """Train to train.steps, logging, saving and calling hooks on the way; collective.

        Raises Stopped where a signal asked for it, after the step's checkpoint.
        """
        log = RunLog(self.run_dir, self.step, self.world.is_main)
        bar = tqdm(
            total=self.train.steps,
            initial=self.step,
            unit="step",
            disable=not self.world.is_main,
            smoothing=0.05,
        )
        self._logged = self.step
        self.watch.at("data", self.step)
        try:
            with self.watch, stop_request(self.world) as stop:
                for batch in self._batches():
                    self.train_step(batch)
                    bar.update()
                    self._after_step(log, bar, stop.agreed())
        except KeyboardInterrupt:
            self.say(
                f"interrupted after step {self.step}; the same command goes on from the last checkpoint (one is saved "
                f"every {self.saving.every} steps)"
            )
            raise
        finally:
            bar.close()
            log.close()
            self.stream.close()

    def _after_step(self, log: RunLog, bar: tqdm[Any], stopped: bool) -> None:
        """Log, call hooks and save, as is due. stopped: save first, as little time may be left, and raise Stopped."""
        last = self.step == self.train.steps
        if self.step % self.train.log_every == 0:
            bar.set_postfix(loss=f"{self._log(log, self.step - self._logged):.4f}", refresh=False)
            self._logged = self.step
        paused = time.perf_counter()
        if stopped:
            self.save()
        for hook in self.hooks:
            if hook.every and (self.step % hook.every == 0 or last):
                self.watch.at("hook", self.step)
                hook(self.step, self.engine, self.ema, log)
        if not stopped and (self.step % self.saving.every == 0 or last):
            self.save()
        self.meters.pause(time.perf_counter() - paused)
        if stopped and not last:
            self.say(f"stopped by a signal: step {self.step} is saved, and the same command goes on")
            raise Stopped

    def _batches(self) -> Iterator[Batch]:
        """Batches from the next step to the last, timing how long each is waited for."""
        try:
            self.meters.reset_clock()
            while self.step < self.train.steps:
                if self.batches is None:
                    self.batches = self.stream.iterate(self.step, self.train.steps, self.prefetch)
                self.watch.at("data", self.step)
                asked = time.perf_counter()
                batch = next(self.batches)
                self.meters.wait_seconds += time.perf_counter() - asked
                self.watch.at("step", self.step)
                yield batch
        finally:
            self._stop_reading()

    def _stop_reading(self) -> None:
        """Forget batches that were read ahead."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def train_step(self, batch: Batch) -> None:
        """One step: draw, forward and backward by micro-batches, update, average."""
        draws = Draws(self.seed, self.step, batch.slots, self.train.global_batch)
        samples, fingerprints = batch_samples(batch, self.task, draws, self.engine.device)
        self.meters.add_hash(fingerprints)
        losses = []
        for micro in samples.micro_batches(self.micro):
            with self.meters.forward.timing():
                loss = loss_of(self.task, self.engine, micro)
            self.engine.backward(loss.mean)
            self.meters.add(loss)
            losses.append(loss)
        if self.step == 0 and self.from_scratch:
            self._check_first_loss(losses, samples.moments[0, 0].numel(), batch.whole)
        applied = self.engine.step(self.optim.lr_at(self.engine.updates, self.train.steps))
        if applied:
            self.ema.update()
        self.step += 1
        self._watch(applied, batch, losses)

    def _check_first_loss(self, losses: list[Any], numel: int, is_whole: bool) -> None:
        complaint = self.task.check_first_loss(losses, numel) if is_whole else None

        def refuse() -> None:
            if complaint is not None:
                raise TrainingError(complaint)

        dist.together(refuse)

    def _watch(self, applied: bool, batch: Batch, losses: list[Any]) -> None:
        """Count updates skipped in a row, keep the offending samples' ids, and stop when it goes on."""
        if applied:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        per_sample = torch.cat([loss.per_sample.detach() for loss in losses]).cpu()
        self._dump_non_finite(batch, per_sample)
        if self.skipped_in_a_row >= self.train.max_skipped:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row were skipped because the gradient was not finite, the last "
                f"at step {self.step}. The samples' ids are in {self.run_dir / 'nonfinite'}. Look at those samples "
                "(tools/shards.py verify). The same command would meet them again: start a new run_dir with "
                f"init.from={self.run_dir} and a lower optim.lr, or with train.precision=fp32 "
                f"(train.max_skipped = {self.train.max_skipped})."
            )

    def _dump_non_finite(self, batch: Batch, per_sample: Tensor) -> None:
        bad = ~torch.isfinite(per_sample)
        folder = self.run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "step": self.step,
            "rank": self.world.rank,
            "ids_with_non_finite_loss": batch.id[bad].tolist(),
            "ids_in_batch": batch.id.tolist(),
        }
        (folder / f"step-{self.step:08d}-rank-{self.world.rank:05d}.json").write_text(json.dumps(content))

    def _log(self, log: RunLog, steps: int) -> float:
        """Log the steps since the last logged one; returns their mean loss."""
        row = self.meters.take(steps, steps * self.train.global_batch)
        rate = float(row["images_per_s"] or 0.0)
        mfu = None if self.peak_flops is None else self.flops_per_image * rate / self.peak_flops
        log.scalars(
            self.step,
            {
                "samples": self.step * self.train.global_batch,
                **row,
                "grad_norm": self.engine.grad_norm(),
                "lr": self.optim.lr_at(max(0, self.engine.updates - 1), self.train.steps),
                "mfu": mfu,
                "updates": self.engine.updates,
                "skipped": self.engine.skipped,
                **({"quarantined": len(self.quarantine.known())} if self.stream.quarantine.budget else {}),
            },
        )
        return float(row["loss"] or 0.0)

    def say(self, text: str) -> None:
        """Print on rank 0, beside a progress bar."""
        if self.world.is_main:
            tqdm.write(text)
