"""The training loop: exact, resumable, the same for every task and engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from dit.data.loading.stream import Batch
from dit.errors import Stopped
from dit.progress import Bar
from dit.ranks import group
from dit.rng import Draws
from dit.train.faults import Fault, TrainingError, guarded
from dit.train.meters import RunLog
from dit.train.persistent import PersistentRun
from dit.train.stop import StopRequest, rank_flags
from dit.train.task import batch_samples, loss_of


class Loop(PersistentRun):
    """Trains a run. `resume()` once, then `run()`."""

    def run(self, stop: StopRequest) -> None:
        """Train to train.steps, logging, saving and calling hooks on the way; collective.

        stop: hears the signals that ask for an end: it raises Stopped then, after the step's checkpoint.
        """
        self.log = RunLog(self.run_dir, self.step, self.world.is_main, self.step - self.hooks_are_due)
        self._logged = self.step
        start, steps = self.step, self.train.steps
        bar = Bar[None](total=steps, initial=start, unit="step", desc="train", hidden=not self.world.is_main)
        self.watch.at("data", self.step)
        try:
            with rank_flags(self.world) as flags, self.watch:
                if self.hooks_are_due:
                    self._show(last=False)
                    self.hooks_are_due = False
                for batch in self._batches():
                    fault = self.train_step(batch)
                    bar.update()
                    asked = stop.heard is not None
                    told = flags.exchange(asked, self.saver.progress(), self.snapshots.progress())
                    self._after_step(bar, fault, *told)
                self.complete()
        except KeyboardInterrupt:
            self.say(
                f"interrupted after step {self.step}; the same command goes on from the last checkpoint (one is saved "
                f"every {self.saving.every} steps)"
            )
            raise
        finally:
            bar.close()
            self.log.close()
            self.stream.close()
            self.saver.close()
            self.snapshots.close()

    def _after_step(
        self, bar: Bar[None], fault: Fault | None, stopped: int, saving: int, snapping: int
    ) -> None:
        """Log, mend, call hooks and save, as is due. stopped: raise Stopped, once the step is saved.

        saving, snapping: how far the ranks are with what they write.
        """
        self.saver.see(saving)
        self.snapshots.see(snapping)
        last = self.step == self.train.steps
        if fault is None and self.step % self.train.log_every == 0:
            fault = self._log(bar)
        paused, leaving = time.perf_counter(), bool(stopped) and not last
        if fault is not None and self.mend(fault):
            self.meters.reset_clock()
        else:
            self._save_and_show(last, leaving)
            self.meters.pause(time.perf_counter() - paused)
        if leaving:
            self.say(f"stopped by a signal: step {self.step} is saved, and the same command goes on")
            raise Stopped

    def _save_and_show(self, last: bool, leaving: bool) -> None:
        """What is due after this step. leaving: little time may be left; hooks are the next start's then."""
        self.hooks_are_due = leaving
        if not leaving:
            self._show(last)
        if self.is_snapshot_due():
            self.save_snapshot()
        if leaving or last or self.step % self.saving.every == 0:
            started = time.perf_counter()
            self.save()
            self.log.point(self.step, "speed/checkpoint_stall_s", time.perf_counter() - started)
        if leaving:
            self.complete()

    def _show(self, last: bool) -> None:
        """Call the hooks that are due."""
        for hook in self.hooks:
            if hook.every and (self.step % hook.every == 0 or last):
                self.watch.at("hook", self.step)
                hook(self.step, self.engine, self.ema, self.log)

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
            self.stop_reading()

    def train_step(self, batch: Batch) -> Fault | None:
        """One step: draw, forward and backward by micro-batches, update, average."""
        draws = Draws(self.seed, self.step, batch.slots, self.train.global_batch)
        samples, fingerprints = batch_samples(batch, self.task, draws, self.engine.device)
        self.meters.add_hash(fingerprints)
        losses = []
        for micro in samples.micro_batches(self.micro):
            with self.meters.forward.timing():
                loss = loss_of(self.task, self.engine, micro)
            self.engine.backward(guarded(loss, self.guard.max_loss))
            self.meters.add(loss)
            losses.append(loss)
        if self.step == 0 and self.from_scratch:
            self._check_first_loss(losses, samples.moments[0, 0].numel(), batch.whole)
        applied = self.engine.step(self.optim.lr_at(self.engine.updates, self.train.steps))
        if applied:
            self.ema.update()
        self.step += 1
        if not applied:
            self.say(
                f"step {self.step}: update skipped, {self.faults.cause}; ids in {self.run_dir / 'nonfinite'}"
            )
        return self.faults.watch_update(applied, self.step, batch.id, losses)

    def _check_first_loss(self, losses: list[Any], numel: int, is_whole: bool) -> None:
        complaint = self.task.check_first_loss(losses, numel) if is_whole else None

        def refuse() -> None:
            if complaint is not None:
                raise TrainingError(complaint)

        group.together(refuse)

    def _log(self, bar: Bar[None]) -> Fault | None:
        """Log the steps since the last logged one, and judge their mean loss."""
        steps, self._logged = self.step - self._logged, self.step
        row = self.meters.take(steps, steps * self.train.global_batch)
        rate = float(row["images_per_s"] or 0.0)
        mfu = None if self.peak_flops is None else self.flops_per_image * rate / self.peak_flops
        loss = float(row["loss"] or 0.0)
        fault = self.faults.watch_loss(loss, self.step)
        self.log.scalars(
            self.step,
            {
                "samples": self.samples_seen(),
                **row,
                "grad_norm": self.engine.grad_norm(),
                "lr": self.optim.lr_at(max(0, self.engine.updates - 1), self.train.steps),
                "mfu": mfu,
                "updates": self.engine.updates,
                "skipped": self.engine.skipped,
                "ema_start_share": self.ema.main.start_share,
                **self.faults.counts(),
                **({"quarantined": len(self.quarantine.known())} if self.stream.quarantine.budget else {}),
            },
        )
        bar.note(f"loss={loss:.4f}")
        return fault
