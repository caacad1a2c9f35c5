"""Going back behind a fault in the numbers: to the last checkpoint from before it, and on behind the steps since."""

from __future__ import annotations

from dit.ranks import group
from dit.train.checkpoints.checkpoint import Checkpoint, CheckpointError
from dit.train.faults import Fault, TrainingError
from dit.train.run import Run


def save(run: Run) -> None:
    """Save the run, or mend what keeps it from being saved. Collective. Raises TrainingError as `mend` does."""
    fault = run.save()
    if fault is not None:
        mend(run, fault)


def mend(run: Run, fault: Fault) -> bool:
    """Have the run go back behind a fault, where it may and can; else it only says so, or stops. Collective.

    Returns whether it went back. Raises TrainingError where the fault is fatal and it did not.
    """
    found = None
    if run.faults.may_return:
        run.complete()
        found = group.on_main(lambda: _before(run, fault))
    if found is not None:
        _go_back(run, found, fault)
        return True
    if fault.is_fatal:
        run.complete()
        raise TrainingError(fault.why)
    run.say(fault.why)
    return False


def _before(run: Run, fault: Fault) -> Checkpoint | None:
    """Find the newest good checkpoint from when all was well. Called on rank 0."""
    try:
        return run.archive.newest(run.say, fault.good)
    except CheckpointError as error:  # the fault itself is the news
        run.say(f"there is no way back behind step {fault.good}: {error}")
        return None


def _go_back(run: Run, found: Checkpoint, fault: Fault) -> None:
    """Take the checkpoint's state, and go on with the step after this one: those between are left out."""
    step, returned = run.step, run.faults.returned + 1
    run.feed.forget()
    run.archive.discard(found.step)
    run.restore(found)
    run.faults.leave_out(found.step + 1, step, returned)
    run.step = step
    run.records.go_back(found.step, step)
    run.say(
        f"{fault.why}\nwent back to {found.path} by itself ({returned} of faults.returns = {run.cfg.faults.returns}) "
        f"and leaves out steps {found.step + 1} to {step}"
    )
    save(run)
    run.archive.checkpoints.wait()  # so that the same command goes on here, and does not meet it again
