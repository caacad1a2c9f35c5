"""The kill test, small, of real runs by launch/local.sh: it ends as promised, and names what is made to differ."""

import json
import shutil

import pytest

from dit.bench.survival.kills import Bench, SurvivalBench, table
from dit.config import ConfigError, from_dict
from dit.errors import UserError
from dit.train.checkpoints import checkpoint
from tests.commands import execute
from tests.train.runs import at_step, flip_bit, metrics, rewrite_tensors

KILLS, STEPS = 4, 40


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kills": 0}, "kills must be at least 1"),
        ({"steps": 19}, "steps at least four times every"),
        ({"ranks": 3}, "ranks must divide the global batch of 32, got 3"),
        ({"stage": 4}, "stage"),
    ],
)
def test_settings_that_make_no_sense(given, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(SurvivalBench, given)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A benchmark that is done, and what came of it."""
    bench = Bench(tmp_path_factory.mktemp("kills"), SurvivalBench(kills=KILLS, steps=STEPS))
    ticks = []
    found = bench.run(lambda: ticks.append(1))
    assert len(ticks) == KILLS
    return bench, found


@pytest.fixture
def copied(done, tmp_path):
    """A copy of it, to be damaged."""
    shutil.copytree(done[0].folder, tmp_path / "copy")
    return Bench(tmp_path / "copy", done[0].cfg)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a start takes half a minute where others use the cores
def test_a_run_that_is_killed_ends_as_if_it_were_not(done):
    bench, found = done
    assert found["problems"] == []
    assert found["tensors"] > 100
    assert found["starts"] == KILLS + 1
    assert [row["step"] for row in metrics(bench.folder / "killed")] == list(range(1, STEPS + 1))
    assert found["steps_done"] >= STEPS
    assert found["resumed"] == sum(k["checkpoint"] is not None for k in found["kills"]) > 0
    assert [k["kill"] for k in found["kills"]] == list(range(KILLS))
    assert sorted(len(k["ranks"]) for k in found["kills"]) == [1, 1, 2, 2]
    assert {k["during"] for k in found["kills"]} == {"start", "steps", "saving"}
    for kill in found["kills"]:
        assert kill["status"] == 1
        assert kill["phase"] != "start" or kill["logged"] == (kill["resumed_at"] or 0)
    steps = [k["checkpoint"] or 0 for k in found["kills"]]
    assert steps == sorted(steps)
    assert "as if nobody had disturbed it" in table(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_is_made_to_differ_is_named(copied):
    """The command goes on in the folder, where all kills are done, and fails."""
    run = copied.folder / "killed"
    kept = metrics(run)
    kept[6]["batch_hash"] += 1
    lines = [json.dumps(row) + "\n" for row in (*kept[:9], *kept[10:20], kept[19], *kept[20:])]
    (run / "metrics.jsonl").write_text("".join(lines))

    def first(tensors):
        name = sorted(n for n in tensors if n.startswith("exp_avg/"))[0]
        tensors[name].view(-1)[0] += 1e-3

    rewrite_tensors(at_step(run, STEPS), first)
    (run / "checkpoints/step-00000041.partial").mkdir()
    ended = execute(
        "bench.py", "kills", f"--kills={KILLS}", f"--steps={STEPS}", f"--folder={copied.folder}",
        f"--json_file={copied.folder / 'found.json'}",
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    for words in (
        "batch_hash at step 7",
        "step 10 is missing",
        "step 20 is there 2 times",
        "checkpoint: exp_avg/",
        "left over",
    ):
        assert words in ended.stderr
    found = json.loads((copied.folder / "found.json").read_text())
    assert found["protocol"]["kills"] == KILLS
    assert len(found["figures"]["problems"]) >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_done_before_its_kills(copied):
    (copied.folder / "kills.jsonl").write_text("")
    with pytest.raises(UserError, match=rf"the run finished its {STEPS} steps after 0 of {KILLS} kills"):
        copied.run()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_start_that_fails_is_told_from_one_that_was_killed(copied):
    shutil.rmtree(copied.folder / "killed")
    (copied.folder / "kills.jsonl").write_text("")
    for shard in (copied.folder / "data").glob("*.tar"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)start 0 failed before it was killed: .*shard-\d+.tar"):
        copied.run()


@pytest.mark.slow
def test_a_checkpoint_that_is_broken_or_older_than_before_is_named(copied):
    assert copied._look(0, STEPS) == (STEPS, [])
    newest = at_step(copied.folder / "killed", STEPS)
    flip_bit(newest / "rank-00001.safetensors")
    step, problems = copied._look(0, STEPS)
    assert step == STEPS - 5
    assert "rank-00001.safetensors: its content does not match its checksum" in problems[0]
    assert problems[1] == f"the newest checkpoint was of step {STEPS} and is of step {STEPS - 5}"
    for folder in (copied.folder / "killed/checkpoints").iterdir():
        (folder / "COMPLETE").unlink()
    with pytest.raises(UserError, match="kill 3 left no checkpoint that can be loaded"):
        copied._look(3, STEPS)
    assert checkpoint.latest(copied.folder / "undisturbed/checkpoints").step == STEPS
