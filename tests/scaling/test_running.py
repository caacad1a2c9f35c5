"""Running a plan: order, what is done already, what fails, what is stopped, and who else is at it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit.errors import Interrupted, Notice, Stopped
from dit.files import try_lock
from dit.scaling.collecting import collect
from dit.scaling.configs import config_file
from dit.scaling.plan import Plan
from dit.scaling.planned import ScalingError, plan_into
from dit.scaling.running import Orders, run_plan
from dit.scaling.starting import Start, claim_file, claimed, no_runner, start_process
from dit.scaling.states import RunState, failure_file, is_held, last_step, states_of
from dit.scaling.status import status
from tests.datasets import Digits
from tests.scaling.conftest import Done
from tests.scaling.experiments import ForkedRun, spec
from tests.surroundings import signals_kept
from tests.train.runs import column, experiment, go


def refuse(start: Start) -> ForkedRun:
    raise AssertionError(f"{start.run.name} was started")


def changed(out: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a run's config behind the plan's back."""
    file = config_file(out, name)
    values = yaml.safe_load(file.read_text())
    change(values)
    file.write_text(yaml.safe_dump(values))


def losses(done: Done) -> dict[str, float]:
    return {row["run"]: row["loss"] for row in collect(done.out, done.plan).rows}


def test_all_runs_are_complete(done: Done) -> None:
    assert all(state.is_complete for state in states_of(done.out, done.plan))
    for run in done.plan.runs:
        assert column(RunState(done.out, run).folder, "step") == list(range(1, run.steps + 1))
    said = status(done.out, done.plan, 1e9)
    assert said.count("complete") == len(done.plan.runs) + 1
    assert "4 of 4 runs complete, 100%" in said


def test_complete_runs_are_not_run_again(done: Done, capfd: pytest.CaptureFixture[str]) -> None:
    run_plan(done.out, done.plan, Orders(starter=refuse))
    assert "complete already: 4 runs" in capfd.readouterr().out


def test_a_branch_has_the_loss_of_a_run_from_its_start(digits: Digits, done: Done, tmp_path: Path) -> None:
    """To the last digit, as `init.branch` promises; so the table does not tell how a run was had."""
    plan = plan_into(spec(digits, tmp_path, branching=False))
    (name,) = [run.name for run in done.plan.runs if (run.kind, run.size) == ("branch", "w16d1")]
    go(yaml.safe_load(config_file(tmp_path, name).read_text()))
    assert {row["run"]: row["loss"] for row in collect(tmp_path, plan).rows} == {name: losses(done)[name]}


# --- the order ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # four more runs
def test_two_at_a_time_and_trunks_first(digits: Digits, done: Done, tmp_path: Path) -> None:
    """A branch begins as soon as its checkpoint is there; the losses are those of one after the other."""
    plan, started, most = plan_into(spec(digits, tmp_path)), list[str](), [0]
    alive: set[str] = set()

    def starter(start: Start) -> ForkedRun:
        if start.run.trunk is not None:
            assert RunState(tmp_path, start.run).can_begin
        started.append(start.run.name)
        alive.add(start.run.name)
        most[0] = max(most[0], len(alive))
        return ForkedRun(start, lambda run: alive.discard(start.run.name) if _ended(run) else None)

    run_plan(tmp_path, plan, Orders(jobs=2, starter=starter))
    assert sorted(started) == sorted(run.name for run in plan.runs)
    assert started[:2] == ["w16d1-r0.04-s0", "w32d1-r0.04-s0"]
    assert most == [2]
    assert losses(Done(tmp_path, plan)) == losses(done)


def _ended(run: ForkedRun) -> bool:
    return run._process.exitcode is not None


def test_some_runs_alone(digits: Digits, tmp_path: Path) -> None:
    plan = plan_into(spec(digits, tmp_path))
    trunk, branch = plan.runs[:2]
    with pytest.raises(
        ScalingError, match=f"{branch.name} branches from {trunk.name} at a step that is not saved"
    ):
        run_plan(tmp_path, plan, Orders(only=[branch.name], starter=refuse))
    with pytest.raises(ScalingError, match="there is no run w99; the plan has w16d1"):
        run_plan(tmp_path, plan, Orders(only=["w99"], starter=refuse))
    run_plan(tmp_path, plan, Orders(only=[trunk.name], starter=ForkedRun))
    assert [state.is_complete for state in states_of(tmp_path, plan)] == [True, False, False, False]
    assert "waiting" in status(tmp_path, plan, 1e9)  # the branch, which may begin now
    assert "waits for step 11 of w32d1" in status(tmp_path, plan, 1e9).replace("step 21", "step 11")


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_run_that_fails_says_why_and_the_others_go_on(digits: Digits, done: Done, tmp_path: Path) -> None:
    plan = plan_into(spec(digits, tmp_path))
    broken, branch = plan.runs[:2]
    changed(tmp_path, broken.name, lambda values: values["data"].update(path=str(tmp_path / "none")))
    order = Orders(only=[run.name for run in plan.runs[:3]], starter=ForkedRun)
    with pytest.raises(ScalingError) as found:
        run_plan(tmp_path, plan, order)
    said = str(found.value)
    assert f"{broken.name}: ended with status 1 before its last step" in said
    assert f"{tmp_path / 'none'}" in said  # the tail of its log
    assert f"{branch.name}: not started, for its trunk {broken.name} failed" in said
    assert "2 of 3 runs failed; the same command tries them again" in said
    table = status(tmp_path, plan, 1e9)
    assert table.count("failed: ") == 2
    assert [state.is_complete for state in states_of(tmp_path, plan)] == [False, False, True, False]
    plan_into(spec(digits, tmp_path))  # which mends the config
    run_plan(tmp_path, plan, order)
    wanted = losses(done)
    assert losses(Done(tmp_path, plan)) == {run.name: wanted[run.name] for run in plan.runs[:3]}
    assert not failure_file(tmp_path, broken.name).exists()


def test_a_trunk_without_its_checkpoint_is_named(digits: Digits, done: Done, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(done.out, out)
    branch = done.plan.runs[1]
    shutil.rmtree(RunState(out, branch).folder)
    shutil.rmtree(out / "runs" / str(branch.trunk) / "checkpoints" / f"step-{branch.branch_step:08d}")
    with pytest.raises(
        ScalingError, match=f"{branch.trunk} has no complete checkpoint of step {branch.branch_step}"
    ):
        run_plan(out, done.plan, Orders(starter=refuse))


def test_no_jobs_are_refused(done: Done) -> None:
    with pytest.raises(ScalingError, match="jobs must be at least 1"):
        run_plan(done.out, done.plan, Orders(jobs=0))


class _Ended:
    """A process that ended with a status."""

    def __init__(self, status: int):
        self.status = status

    def poll(self) -> int | None:
        return self.status

    def send_signal(self, number: int) -> None:
        raise AssertionError("it has ended")

    kill = None


def test_a_run_that_was_killed_says_by_what(digits: Digits, tmp_path: Path) -> None:
    plan = plan_into(spec(digits, tmp_path))
    name = plan.runs[0].name
    with pytest.raises(
        ScalingError, match=rf"{name}: ended by SIGKILL \(for want of memory, (.|\n)* said nothing"
    ):
        run_plan(tmp_path, plan, Orders(only=[name], starter=lambda start: _Ended(-signal.SIGKILL)))


def test_what_cannot_be_noted_leaves_no_run_to_itself(digits: Digits, tmp_path: Path) -> None:
    """As on a full disk: the other run saves and ends before the command does."""
    plan, told = plan_into(spec(digits, tmp_path)), list[int]()
    (tmp_path / "logs" / f".{plan.runs[0].name}.failed.partial").mkdir(parents=True)  # in the way
    processes = [_Ended(1), _Ending(told)]
    with pytest.raises(IsADirectoryError):
        run_plan(
            tmp_path, plan, Orders(jobs=2, starter=lambda start: processes[start.run is not plan.runs[0]])
        )
    assert told == [signal.SIGTERM]


# --- ends before the end -------------------------------------------------------------------------------------------


@pytest.mark.slow  # a run in micro-batches of 1, so that it lasts until it is stopped
def test_a_signal_has_the_runs_save_and_the_same_command_goes_on(
    digits: Digits, done: Done, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "training": {"checkpoint": {"every": 1000}}
    }  # saves nothing but what it is told to
    plan = plan_into(spec(digits, tmp_path, **keys))
    trunk = plan.runs[2]
    state, told = RunState(tmp_path, trunk), tmp_path / "told"

    def ask(run: ForkedRun) -> None:
        if last_step(state.folder) >= 2 and not told.exists():
            told.touch()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), signals_kept():
        run_plan(
            tmp_path, plan, Orders(only=[trunk.name], starter=lambda start: ForkedRun(slowed(start), ask))
        )
    assert 2 <= state.step < trunk.steps
    assert state.has_begun
    assert not state.is_running
    assert "stopped" in status(tmp_path, plan, 1e9)
    run_plan(tmp_path, plan, Orders(only=[trunk.name], starter=ForkedRun))
    # not to the digit: a micro-batch of 1 rounds otherwise
    assert losses(Done(tmp_path, plan))[trunk.name] == pytest.approx(losses(done)[trunk.name], rel=1e-5)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Stopped), (signal.SIGINT, Interrupted)])
def test_the_signal_decides_about_the_exit_status(
    digits: Digits, tmp_path: Path, number: signal.Signals, raised: type[Stopped]
) -> None:
    """As of a run itself: a scheduler starts the one again, and not the other."""
    plan, told = plan_into(spec(digits, tmp_path)), list[int]()

    def starter(start: Start) -> _Ending:
        os.kill(os.getpid(), number)
        return _Ending(told)

    with pytest.raises(raised) as ended, signals_kept():
        run_plan(tmp_path, plan, Orders(starter=starter))
    assert ended.type is raised
    assert told == [signal.SIGTERM]  # by which a run saves; a Ctrl-C would be one of its terminal's


class _Ending:
    """A process that ends as a run does that was told to."""

    def __init__(self, told: list[int]):
        self.told = told

    def poll(self) -> int | None:
        return Stopped.status if self.told else None

    def send_signal(self, number: int) -> None:
        self.told.append(number)

    def kill(self) -> None:
        raise AssertionError("killed")


def slowed(start: Start) -> Start:
    """The same, with more data read by less, so that its steps take time: a run must not end before it is stopped."""
    changed(start.config.parents[1], start.run.name, lambda values: values["train"].update(micro_batch=1))
    return start


def test_a_killed_runner_leaves_runs_that_hold_their_claim(digits: Digits, tmp_path: Path) -> None:
    """The process of a run has the lock too: it is nobody else's until that has ended."""
    plan = plan_into(spec(digits, tmp_path))
    (tmp_path / "locks").mkdir()
    claim = claim_file(tmp_path, plan.runs[0].name)
    with claim.open("w") as lock, (tmp_path / "log").open("wb") as log:
        with no_runner(tmp_path, []):
            pass
        assert try_lock(lock.fileno())
        process = start_process(_Sleeping(plan.runs[0], tmp_path, log, lock.fileno(), 1, {}))
    try:
        assert is_held(claim)  # though this process has closed it
        with (
            pytest.raises(ScalingError, match="is being run here now"),
            no_runner(tmp_path, [plan.runs[0].name]),
        ):
            pass
    finally:
        process.kill()
        while process.poll() is None:
            time.sleep(0.01)
    assert not is_held(claim)


class _Sleeping(Start):
    @property
    def command(self) -> list[str]:
        return ["sleep", "60"]


# --- two at one experiment -----------------------------------------------------------------------------------------


def test_two_runners_never_run_the_same_thing(digits: Digits, done: Done, tmp_path: Path) -> None:
    """What another runner has claimed is left to it, and waited for: here it ends without having done it."""
    plan, started = plan_into(spec(digits, tmp_path)), list[str]()
    theirs, ours = plan.runs[0].name, plan.runs[2].name
    held = no_runner(tmp_path, [theirs])
    held.__enter__()

    def starter(start: Start) -> ForkedRun:
        started.append(start.run.name)
        return ForkedRun(start, release)

    def release(run: ForkedRun) -> None:
        if run.start.run.name == ours and _ended(run) and is_held(claim_file(tmp_path, theirs)):
            assert "starting" in status(tmp_path, plan, 1e9)
            held.__exit__(None, None, None)

    run_plan(tmp_path, plan, Orders(only=[theirs, ours], starter=starter))
    assert started == [ours, theirs]
    wanted = losses(done)
    assert losses(Done(tmp_path, plan)) == {name: wanted[name] for name in (theirs, ours)}


def test_without_file_locks_it_is_said_that_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("dit.files.fcntl.flock", refuse)
    for _ in range(2):  # both get it
        with pytest.warns(Notice, match="without file locks: nothing keeps a second runner"):
            lock = claimed(tmp_path / "name")
        assert lock is not None
        os.close(lock)


def test_a_run_that_somebody_else_completes_is_not_started(
    digits: Digits, done: Done, tmp_path: Path
) -> None:
    plan = plan_into(spec(digits, tmp_path))
    trunk, other = plan.runs[0], plan.runs[2]

    def starter(start: Start) -> ForkedRun:
        assert start.run == other  # while that runs, somebody brings the first and its branch
        return ForkedRun(start, bring)

    def bring(run: ForkedRun) -> None:
        for name in (trunk.name, plan.runs[1].name):
            if _ended(run) and not (tmp_path / "runs" / name).exists():
                shutil.copytree(done.out / "runs" / name, tmp_path / "runs" / name)
                held.__exit__(None, None, None)

    held = no_runner(tmp_path, [trunk.name])
    held.__enter__()
    only = [trunk.name, other.name]
    run_plan(tmp_path, plan, Orders(only=only, starter=starter))
    assert RunState(tmp_path, other).is_complete


# --- how a run is started --------------------------------------------------------------------------------------------


def test_several_ranks_are_started_by_the_launcher(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    seen: list[Start] = []

    def starter(start: Start) -> ForkedRun:
        seen.append(start)
        raise KeyboardInterrupt

    out, plan = done.out, done.plan
    fresh = Plan(plan.values, [replace(run, name=f"x-{run.name}", trunk=None) for run in plan.runs], (), ())
    with pytest.raises(KeyboardInterrupt):
        run_plan(out, fresh, Orders(jobs=2, ranks=2, starter=starter))
    (start,) = seen
    assert start.command[0].endswith("launch/local.sh")
    assert start.env["NPROC"] == "2"
    assert start.env["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert int(start.env["OMP_NUM_THREADS"]) >= 1
    assert replace(start, ranks=1).command[1].endswith("tools/train.py")


def test_configs_are_those_that_train_py_takes(done: Done) -> None:
    for run in done.plan.runs:
        experiment(yaml.safe_load(config_file(done.out, run.name).read_text()))
