"""The training loop: exact, resumable, the same for every task and engine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from dit.data.loading.stream import Batch
from dit.errors import Interrupted, InterruptTold, Stopped
from dit.flow.loss import Loss
from dit.progress import Bar
from dit.ranks import group
from dit.rng import Draws
from dit.train import recovery
from dit.train.checkpoints.archive import whats_there
from dit.train.faults import Fault, TrainingError
from dit.train.run import Run
from dit.train.step import passes
from dit.train.stop import INTERRUPTED, StopRequest, rank_flags
from dit.train.task import batch_samples


class Loop:
    """Trains a run from the step that it has come to. Every method is collective."""

    def __init__(self, run: Run):
        self.run = run

    def train_step(self, batch: Batch) -> Fault | None:
        """One step: batch → samples → loss → backward → step → average → meters."""
        run, cfg = self.run, self.run.cfg
        draws = Draws(cfg.seed, run.step, batch.slots, cfg.train.global_batch)
        samples, fingerprints = batch_samples(batch, run.task, draws, run.engine.device)
        if run.graph is not None and samples.valid is None:
            losses, applied = run.graph(samples, run.lr)
            self._check_first_loss(batch, losses)
        else:
            timing = run.meters.forward.timing
            losses = passes(run.task, run.engine, samples, run.micro, cfg.faults.max_loss, timing)
            self._check_first_loss(batch, losses)
            applied = run.engine.step(run.lr)
        if applied:
            run.ema.update()
        run.meters.add_step(losses, fingerprints)
        run.step += 1
        run.meters.pause(run.look_at_compiling("training step"))
        return self._judged(applied, batch, losses)

    def train(self, stop: StopRequest) -> None:
        """Train to train.steps, logging, saving and calling hooks on the way; ends the run's threads.

        stop: hears the signals that ask for an end: it raises Stopped then, after the step's checkpoint.
        """
        run, steps, at_once = self.run, self.run.cfg.train.steps, False
        group.together(lambda: run.records.open(run.step, run.step - run.hooks_are_due))
        bar = Bar[None](
            total=steps, initial=run.step, unit="step", desc="train", hidden=not run.world.is_main
        )
        run.watch.at("data", run.step)
        try:
            with rank_flags(run.world) as flags, run.watch, stop.is_heard_after_steps(self._words):
                if run.hooks_are_due:
                    self._show(last=False)
                    run.hooks_are_due = False
                run.meters.reset_clock()
                while run.step < steps:
                    fault = self.train_step(self._next_batch())
                    bar.update()
                    self._after_step(bar, fault, *flags.exchange(stop.urgency, *run.archive.progress()))
                run.feed.forget()
                run.complete()
        except KeyboardInterrupt as pressed:
            at_once = True
            if not run.world.is_main:
                raise
            bar.close()  # so that the words are the last line
            run.say(f"interrupted {self._words()}")
            raise InterruptTold from pressed
        finally:
            bar.close()
            run.close(at_once)

    def _words(self) -> str:
        """Say what there is of a run that ends at once."""
        return f"after step {self.run.step}, which is not saved: {whats_there(self.run.folder)}"

    def _next_batch(self) -> Batch:
        """Wait for the next step's batch, on the clock of the meters."""
        run = self.run
        run.watch.at("data", run.step)
        asked = time.perf_counter()
        batch = run.feed.next(run.step, run.cfg.train.steps)
        run.meters.wait_seconds += time.perf_counter() - asked
        run.watch.at("step", run.step)
        return batch

    def _check_first_loss(self, batch: Batch, losses: list[Loss]) -> None:
        """Refuse a first loss that a model from scratch cannot have. Raises TrainingError on every rank."""
        if self.run.step or self.run.cfg.init.from_ is not None:
            return
        numel = batch.moments[0, 0].numel()
        complaint = self.run.task.check_first_loss(losses, numel) if batch.whole else None

        def refuse() -> None:
            if complaint is not None:
                raise TrainingError(complaint)

        group.together(refuse)

    def _judged(self, applied: bool, batch: Batch, losses: Sequence[Loss]) -> Fault | None:
        """Say where the step just done changed nothing, and judge whether that can go on."""
        run = self.run
        if not applied:
            place = run.folder / "nonfinite"
            run.say(f"step {run.step}: update skipped, {run.faults.cause}; ids in {place}")
        return run.faults.watch_update(applied, run.step, batch.id, losses)

    # --- between steps -------------------------------------------------------------------------------------

    def _after_step(self, bar: Bar[None], fault: Fault | None, stopped: int, *progress: int) -> None:
        """Log, mend, call hooks and save, as is due.

        stopped: the urgency with which any rank was asked to end: raises Stopped, once the step is saved.
        progress: how far the ranks are with what they write.
        """
        run = self.run
        run.archive.advance(*progress)
        last = run.step == run.cfg.train.steps
        if fault is None and run.step % run.cfg.train.log_every == 0:
            fault = self._log(bar)
        started, leaving = time.perf_counter(), bool(stopped) and not last
        if fault is not None and recovery.mend(run, fault):
            run.meters.reset_clock()
        else:
            self._save_and_show(last, leaving)
            run.meters.pause(time.perf_counter() - started)
        if leaving:
            bar.close()  # so that the words are the last line
            how = "interrupted" if stopped == INTERRUPTED else "stopped by a signal"
            words = f"{how}: step {run.step} is saved, and the same command goes on"
            run.say(words)
            raise (Interrupted if stopped == INTERRUPTED else Stopped)(words)

    def _save_and_show(self, last: bool, leaving: bool) -> None:
        """Do what is due after this step. leaving: little time may be left; hooks are the next start's then."""
        run = self.run
        run.hooks_are_due = leaving
        if not leaving:
            self._show(last)
        if run.is_snapshot_due():
            run.save_snapshot()
        if leaving or last or run.cfg.checkpoint.is_due(run.step):
            started = time.perf_counter()
            recovery.save(run)
            run.look_at_compiling("checkpoint")
            run.records.log.point(run.step, "speed/checkpoint_stall_s", time.perf_counter() - started)
        if leaving:
            run.complete()

    def _show(self, last: bool) -> None:
        """Call the hooks that are due."""
        run = self.run
        for hook in run.parts.hooks:
            if hook.every and (run.step % hook.every == 0 or last):
                run.watch.at("hook", run.step)
                hook(run.step, run.engine, run.ema, run.records.log)
                run.look_at_compiling(hook.name)

    def _log(self, bar: Bar[None]) -> Fault | None:
        """Log the steps since the last logged one, and judge their mean loss."""
        run = self.run
        steps = run.records.take_steps(run.step)
        row = run.meters.take(steps, steps * run.cfg.train.global_batch)
        rate, loss = float(row["images_per_s"] or 0.0), float(row["loss"] or 0.0)
        fault = run.faults.watch_loss(loss, run.step)
        run.records.log.scalars(
            run.step,
            {
                "samples": run.samples_seen,
                **row,
                "grad_norm": run.engine.grad_norm(),
                "lr": run.cfg.optim.lr_at(max(0, run.engine.updates - 1), run.cfg.train.steps),
                "mfu": None if run.peak_flops is None else run.parts.flops_per_image * rate / run.peak_flops,
                "updates": run.engine.updates,
                "skipped": run.engine.skipped,
                "ema_start_share": run.ema.main.start_share,
                **run.faults.counts(),
                **run.feed.counts(),
            },
        )
        bar.note(f"loss={loss:.4f}")
        return fault
