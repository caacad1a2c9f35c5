"""The launch scripts: what they would run (DRY_RUN=1), what they refuse, and two real ranks on this machine.

multinode.sh on a real SLURM cluster is tested by the tests marked `slurm`; here a stand-in for
`scontrol show hostnames` is enough to see what a job would get.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.train.runs import column, values

ROOT = Path(__file__).resolve().parents[2]
LOCAL, MULTINODE, SWEEP = (ROOT / "launch" / name for name in ("local.sh", "multinode.sh", "sweep.sh"))
SCRIPTS = pytest.mark.parametrize("script", [LOCAL, MULTINODE], ids=lambda p: p.name)
ALL = pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
CORES = len(os.sched_getaffinity(0))
LAUNCHER = (
    "SLURM_",
    "DIT_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_",
    "OMP_",
    "NPROC",
    "DRY_RUN",
    "TORCHELASTIC",
    "CONTAINER",
    "PREFLIGHT",
    "LIMIT",
)


def run(script: Path, *arguments: str, cwd: Path = ROOT, timeout: float = 120, **env: str):
    """Run a script in an environment that knows nothing of the launcher which this test may run under."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}
    clean |= {"PYTHON": sys.executable} | env
    command = [str(script), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def entry(tmp_path: Path) -> str:
    """A program that says it was started, for runs that must not start it."""
    path = tmp_path / "entry.py"
    path.write_text("print('STARTED')\n")
    return str(path)


# --- all --------------------------------------------------------------------------------------------------


@ALL
def test_bash_can_read_it(script):
    assert os.access(script, os.X_OK) == (script.name != "common.sh")
    subprocess.run(["bash", "-n", script], check=True)


@ALL
@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    found = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@SCRIPTS
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(script, flag):
    done = run(script, flag)
    assert (done.returncode, done.stderr) == (0, "")
    for word in (f"launch/{script.name} CONFIG.yaml", "PYTHON=", "OMP_NUM_THREADS=", "DRY_RUN=1"):
        assert word in done.stdout


@SCRIPTS
def test_without_a_config_it_says_how(script):
    done = run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert "CONFIG.yaml" in done.stderr


@SCRIPTS
def test_a_missing_program_is_named(script):
    done = run(script, "c.yaml", DIT_ENTRY="tools/no_such.py", NPROC="1", DRY_RUN="1")
    assert done.returncode == 2
    assert f"there is no {ROOT}/tools/no_such.py" in done.stderr


@SCRIPTS
def test_another_program_may_come_first(script):
    env = {"NPROC": "1", "DRY_RUN": "1"}
    done = run(script, "tools/encode.py", "images", "out dir", "--codec=pixels", **env)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[-4:] == [f"{ROOT}/tools/encode.py", "images", "out dir", "--codec=pixels"]
    done = run(script, "tools/no_such.py", **env)
    assert done.returncode == 2
    assert f"there is no {ROOT}/tools/no_such.py; the first argument or DIT_ENTRY" in done.stderr


# --- local.sh ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [("", f"{ROOT}"), ("/of mine:/else", f"{ROOT}:/of mine:/else")])
def test_local_dry_run_starts_nothing(entry, before, after):
    env = {"DIT_ENTRY": entry, "NPROC": "3", "DRY_RUN": "1", "PYTHONPATH": before}
    done = run(LOCAL, "c.yaml", "--run_dir=a b", "--x=$HOME", **env)
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[-4:] == [entry, "c.yaml", "--run_dir=a b", "--x=$HOME"]
    assert f"PYTHONPATH={after}" in words
    assert "--nproc-per-node=3" in words


@pytest.mark.parametrize("asked", [None, 1, 1000])
@pytest.mark.parametrize("ranks", [1, CORES, 3 * CORES])
def test_local_threads_never_outnumber_the_cores(entry, ranks, asked):
    env = {} if asked is None else {"OMP_NUM_THREADS": str(asked)}
    done = run(LOCAL, "c.yaml", DIT_ENTRY=entry, NPROC=str(ranks), DRY_RUN="1", **env)
    threads = max(1, CORES // ranks) if asked is None else min(asked, max(1, CORES // ranks))
    assert shlex.split(done.stdout)[0] == f"OMP_NUM_THREADS={threads}"


@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
def test_local_refuses_what_is_no_number_of_ranks(entry, ranks):
    done = run(LOCAL, "c.yaml", DIT_ENTRY=entry, NPROC=ranks)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"NPROC={ranks}" in done.stderr


def test_local_names_an_interpreter_that_does_not_run(entry):
    done = run(LOCAL, "c.yaml", DIT_ENTRY=entry, PYTHON="/no/such/python")
    assert done.returncode == 2
    assert "/no/such/python" in done.stderr


RANKS = """
import datetime, os, sys
import torch
import dit
from dit.ranks import group
with group.session(timeout=datetime.timedelta(seconds=20)) as world:
    total = group.all_sum(torch.tensor([10 ** world.rank]))
    root = os.path.dirname(dit.__path__[0])
    line = [world.rank, world.size, total.item(), os.environ["OMP_NUM_THREADS"], root, *sys.argv[1:]]
    with open(f"rank{world.rank}", "w") as out:
        out.write("|".join(map(str, line)))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_local_runs_ranks_that_reach_each_other(tmp_path, ranks):
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    env = {"DIT_ENTRY": str(program), "NPROC": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    done = run(LOCAL, "c.yaml", "--a.b=x y", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        told = (tmp_path / f"rank{rank}").read_text().split("|")
        total, threads = int("1" * ranks), max(1, CORES // ranks)
        assert told == [str(v) for v in (rank, ranks, total, threads, ROOT, "c.yaml", "--a.b=x y")]


def test_local_fails_when_a_rank_does(tmp_path):
    program = tmp_path / "fail.py"
    program.write_text(
        "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(100)\n"
    )
    done = run(LOCAL, "c.yaml", DIT_ENTRY=str(program), NPROC="2")
    assert done.returncode != 0
    assert done.stderr == "launch/local.sh: rank 1 failed (exit status 7): see its error above\n"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os.kill(os.getpid(), 9)", "launch/local.sh: rank 1 was killed by SIGKILL; out of memory?"),
        ("raise KeyError('its own words')", "KeyError: 'its own words'"),
    ],
)
def test_local_tells_how_a_rank_ended(tmp_path, how, words):
    """What the rank says stays; torchrun's own traceback does not."""
    program = tmp_path / "fail.py"
    program.write_text(f"import os, time\nif os.environ['RANK'] == '1':\n    {how}\ntime.sleep(100)\n")
    done = run(LOCAL, "c.yaml", DIT_ENTRY=str(program), NPROC="2")
    assert done.returncode == 1
    assert words in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert done.stderr.count("Traceback") == how.count("raise")


def test_local_passes_a_signal_on(tmp_path):
    program = tmp_path / "wait.py"
    program.write_text("import os, time\nos.write(1, b'here\\n')\ntime.sleep(100)\n")
    env = {**os.environ, "DIT_ENTRY": str(program), "NPROC": "2", "PYTHON": sys.executable}
    with subprocess.Popen(
        ["bash", LOCAL, "c.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as started:
        assert started.stdout.readline() == "here\n"
        started.terminate()
        _, error = started.communicate(timeout=60)
    assert started.returncode == 128 + 15
    assert error.splitlines()[-1] == "launch/local.sh: stopped by SIGTERM"
    assert "Traceback" not in error


SAVING = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(1)
    with open(f"saved{os.environ['RANK']}", "w"):
        sys.exit(130 if number == signal.SIGINT else 75)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
os.write(1, b"here\\n")
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)], ids=str)
def test_local_ends_as_its_ranks_do_once_they_have_saved(tmp_path, number, status):
    program = tmp_path / "saving.py"
    program.write_text(SAVING)
    env = {**os.environ, "DIT_ENTRY": str(program), "NPROC": "2", "PYTHON": sys.executable}
    with subprocess.Popen(
        ["bash", LOCAL, "c.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=tmp_path,
    ) as started:
        assert [started.stdout.readline() for _ in range(2)] == ["here\n"] * 2
        started.send_signal(number)
        _, error = started.communicate(timeout=60)
    assert started.returncode == status, error
    assert "Traceback" not in error
    assert {p.name for p in tmp_path.glob("saved*")} == {"saved0", "saved1"}


@pytest.mark.slow
def test_a_run_under_local_saves_when_it_is_stopped_and_goes_on(digits, tmp_path):
    """TERM, then Ctrl-C, to the launcher of two ranks; the same command goes on each time."""
    config = tmp_path / "run.yaml"
    given = values(digits, tmp_path / "run", checkpoint={"every": 10**6}, train={"steps": 10**6})
    config.write_text(yaml.safe_dump(given))
    env = {**os.environ, "NPROC": "2", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    log, steps = tmp_path / "run" / "metrics.jsonl", 0
    for number, status, words in (
        (signal.SIGTERM, 75, "stopped by a signal: step"),
        (signal.SIGINT, 130, "interrupted: step"),
    ):
        with subprocess.Popen(
            ["bash", LOCAL, config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        ) as started:
            end = time.monotonic() + 120
            while not log.is_file() or log.read_text().count("\n") < steps + 3:
                assert time.monotonic() < end
                assert started.poll() is None, started.stdout.read()
                time.sleep(0.05)
            started.send_signal(number)
            said, _ = started.communicate(timeout=60)
        assert started.returncode == status, said
        steps = max(int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir())
        assert f"{words} {steps} is saved, and the same command goes on" in said
    assert column(tmp_path / "run", "step") == list(range(1, steps + 1))


# --- multinode.sh ------------------------------------------------------------------------------------------

FORCED = ["OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"]  # also where an image sets them
JOB = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[7-8]", "SLURM_JOB_NUM_NODES": "2"}


@pytest.fixture
def slurm_path(tmp_path: Path) -> str:
    """A PATH whose `scontrol show hostnames n[7-8]` answers as SLURM's does."""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    return f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"


def settings(done: subprocess.CompletedProcess[str]) -> tuple[dict[str, str], list[str]]:
    """DRY_RUN's output: the variables, and the command."""
    assert done.returncode == 0, done.stderr
    *variables, command = done.stdout.splitlines()
    return dict(line.split("=", 1) for line in variables), shlex.split(command)


def test_multinode_dry_run_outside_a_job(entry):
    variables, command = settings(run(MULTINODE, "c.yaml", "--x=a b", DIT_ENTRY=entry, DRY_RUN="1"))
    assert variables["MASTER_ADDR"] == "<first node>"
    assert command[0] == "srun"
    assert command[-4:] == [sys.executable, entry, "c.yaml", "--x=a b"]


def test_multinode_outside_a_job_says_sbatch(entry):
    done = run(MULTINODE, "c.yaml", DIT_ENTRY=entry)
    assert (done.returncode, done.stdout) == (2, "")
    assert "sbatch" in done.stderr


@pytest.mark.parametrize(
    ("slurm", "threads"),
    [
        ({}, "1"),
        ({"SLURM_CPUS_PER_TASK": "6"}, "6"),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}, "2"),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "64"}, "6"),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "2(x2)"}, "4"),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1,3(x2)"}, "2"),
        ({"SLURM_CPUS_ON_NODE": "2", "SLURM_TASKS_PER_NODE": "4"}, "1"),
    ],
)
def test_multinode_settings_of_a_job(entry, slurm_path, slurm, threads):
    env = JOB | slurm | {"DIT_ENTRY": entry, "DRY_RUN": "1", "PATH": slurm_path}
    variables, command = settings(run(MULTINODE, "c.yaml", **env))
    assert variables["MASTER_ADDR"] == "n7"
    assert variables["MASTER_PORT"] == str(10000 + 123456 % 20000)
    assert variables["OMP_NUM_THREADS"] == threads
    assert variables["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    per_task = slurm.get("SLURM_CPUS_PER_TASK")
    assert (f"--cpus-per-task={per_task}" in command) == (per_task is not None)


def test_multinode_port_can_be_chosen(entry, slurm_path):
    env = JOB | {"DIT_ENTRY": entry, "DRY_RUN": "1", "PATH": slurm_path, "MASTER_PORT": "4711"}
    assert settings(run(MULTINODE, "c.yaml", **env))[0]["MASTER_PORT"] == "4711"


def test_multinode_tells_the_ranks_which_nodes_there_are(entry, slurm_path, tmp_path):
    """For the message that nobody came from one."""
    srun = Path(slurm_path.split(os.pathsep)[0]) / "srun"
    srun.write_text('#!/bin/sh\necho "nodes: $DIT_NODES"\n')
    srun.chmod(0o755)
    done = run(MULTINODE, "c.yaml", DIT_ENTRY=entry, PATH=slurm_path, **JOB)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "nodes: n7 n8"


@pytest.mark.parametrize(("status", "queued"), [(75, True), (130, False), (1, False), (0, False)])
def test_multinode_queues_again_what_was_stopped_and_not_what_was_interrupted(
    entry, slurm_path, tmp_path, status, queued
):
    folder, asked = Path(slurm_path.split(os.pathsep)[0]), tmp_path / "asked"
    (folder / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
    scontrol = (folder / "scontrol").read_text()
    (folder / "scontrol").write_text(f'{scontrol}[ "$1" = show ] || {{ echo "$*" >{asked}; exit 1; }}\n')
    (folder / "srun").chmod(0o755)
    done = run(MULTINODE, "c.yaml", DIT_ENTRY=entry, PATH=slurm_path, **JOB)
    assert done.returncode == status
    assert asked.exists() == queued
    assert not queued or asked.read_text() == "requeue 123456\n"


@pytest.mark.parametrize(("value", "words"), [("1", ["--preflight"]), ("0", [])])
def test_multinode_preflight(entry, value, words):
    env = {"DIT_ENTRY": entry, "DRY_RUN": "1", "PREFLIGHT": value}
    _, command = settings(run(MULTINODE, "c.yaml", "--a=b", **env))
    assert command[-3 - len(words) :] == [entry, "c.yaml", "--a=b", *words]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("nvcr.io#nvidia/pytorch:25.01-py3", ["--container-image=nvcr.io#nvidia/pytorch:25.01-py3"]),
        ("images/a b.sqsh", ["--container-image={cwd}/images/a b.sqsh"]),  # a file: its whole path
        ("centos", ["--container-image=centos"]),
    ],
)
@pytest.mark.parametrize("more", [None, "/data:/data,/scratch/me:/scratch"])
def test_multinode_in_a_container_of_pyxis(entry, tmp_path, image, words, more):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a b.sqsh").touch()
    env = {"DIT_ENTRY": entry, "DRY_RUN": "1", "CONTAINER": image, "PYTHON": ""}
    env |= {"CONTAINER_MOUNTS": more} if more else {}
    done = run(MULTINODE, "c.yaml", cwd=tmp_path, **env)
    _, command = settings(done)
    mounts = [f"{ROOT}:{ROOT}", f"{tmp_path}:{tmp_path}", *([more] if more else [])]
    inside = [f"--container-mounts={','.join(mounts)}", f"--container-workdir={tmp_path}"]
    assert command[0] == "srun"
    assert command[3:6] == [words[0].format(cwd=tmp_path), *inside]
    assert command[6] == "env"
    assert [word.split("=")[0] for word in command[7:11]] == FORCED
    assert command[11:] == ["python3", entry, "c.yaml"]


@pytest.mark.parametrize("image", ["torch.sif", "docker://pytorch/pytorch:latest", "oras://a/b", "box"])
def test_multinode_in_a_container_of_apptainer(entry, tmp_path, image):
    (tmp_path / "box").mkdir()  # a folder, apptainer's sandbox
    env = {"DIT_ENTRY": entry, "DRY_RUN": "1", "CONTAINER": image, "CONTAINER_MOUNTS": "/d:/d"}
    _, command = settings(run(MULTINODE, "c.yaml", cwd=tmp_path, **env, PYTHON="/opt/python"))
    at = command.index("apptainer")
    assert not [word for word in command[:at] if word.startswith("--container")]
    mounts = f"--bind={ROOT}:{ROOT},{tmp_path}:{tmp_path},/d:/d"
    name = str(tmp_path / image) if image == "box" else image
    assert command[at : at + 6] == ["apptainer", "exec", "--nv", mounts, f"--pwd={tmp_path}", name]
    assert command[at + 6] == "env"
    assert [word.split("=")[0] for word in command[at + 7 : at + 11]] == FORCED
    assert command[at + 11 :] == ["/opt/python", entry, "c.yaml"]


def test_multinode_mounts_the_checkout_once(entry):
    _, command = settings(run(MULTINODE, "c.yaml", DIT_ENTRY=entry, DRY_RUN="1", CONTAINER="x"))
    assert f"--container-mounts={ROOT}:{ROOT}" in command


def test_multinode_tells_of_idle_gpus(entry, slurm_path):
    env = JOB | {"DIT_ENTRY": entry, "DRY_RUN": "1", "PATH": slurm_path, "SLURM_GPUS_ON_NODE": "4"}
    assert "4 GPUs but 1 tasks" in run(MULTINODE, "c.yaml", **env).stderr
    assert run(MULTINODE, "c.yaml", **env, SLURM_TASKS_PER_NODE="4(x2)").stderr == ""


def test_multinode_finds_the_checkout_from_the_spool_directory(entry, slurm_path, tmp_path):
    spool = tmp_path / "spool/job123456/slurm_script"
    spool.parent.mkdir(parents=True)
    shutil.copy(MULTINODE, spool)
    env = JOB | {"DIT_ENTRY": entry, "DRY_RUN": "1", "PATH": slurm_path}
    submitted = run(spool, "c.yaml", cwd=tmp_path, **env, SLURM_SUBMIT_DIR=str(ROOT))
    assert settings(submitted)[0]["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    told = run(spool, "c.yaml", cwd=tmp_path, **env, SLURM_SUBMIT_DIR=str(tmp_path), DIT_ROOT=str(ROOT))
    assert settings(told)[0] == settings(submitted)[0]
    lost = run(spool, "c.yaml", cwd=tmp_path, **env, SLURM_SUBMIT_DIR=str(tmp_path))
    assert lost.returncode == 2
    assert f"{tmp_path} is not the checkout" in lost.stderr


# --- @FILE and sweep.sh ------------------------------------------------------------------------------------

RUNS = r"""# rates
configs/digits.yaml --run_dir=runs/a --optim.lr=1e-3

  configs/digits.yaml --run_dir 'runs/b c' --x='q"u ote' --w="it's" --y=a\ b --data.mix='[{path: A}]' # trailing
tools/train_vae.py configs/digits_vae.yaml --z=100% --run_dir=runs/d#1"""
WORDS = [
    ["tools/train.py", "configs/digits.yaml", "--run_dir=runs/a", "--optim.lr=1e-3"],
    [
        "tools/train.py",
        "configs/digits.yaml",
        "--run_dir",
        "runs/b c",
        '--x=q"u ote',
        "--w=it's",
        "--y=a b",
        "--data.mix=[{path: A}]",
    ],
    ["tools/train_vae.py", "configs/digits_vae.yaml", "--z=100%", "--run_dir=runs/d#1"],
]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.txt"
    path.write_text(RUNS)
    return path


def test_sweep_dry_run_shows_what_each_element_would_run(sweep):
    before = sorted(ROOT.iterdir())
    done = run(SWEEP, "--nodes=2", "--comment=a b", str(sweep), DRY_RUN="1", LIMIT="2")
    assert (done.returncode, done.stderr) == (0, "")
    submit, *elements = done.stdout.splitlines()
    *options, script, kept = shlex.split(submit)
    assert options == [
        "sbatch", "--array=1-3%2", "--output=slurm-%A_%a.out", "--nodes=2", "--comment=a b",
    ]  # fmt: skip
    assert script == str(MULTINODE)
    assert kept.startswith(f"@{ROOT}/sweep-")
    for number, (element, (tool, *words)) in enumerate(zip(elements, WORDS, strict=True), 1):
        assert element.startswith(f"{number}: srun ")
        assert shlex.split(element)[-len(words) - 2 :] == [sys.executable, str(ROOT / tool), *words]
    assert sorted(ROOT.iterdir()) == before


def test_sweep_submits_a_copy(sweep, tmp_path):
    """What a stand-in for sbatch gets; a real one is in tests/slurm."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nprintf "%s\\n" "$DIT_ROOT" "$@"\nexit ${STATUS:-0}\n')
    sbatch.chmod(0o755)
    env = {"PATH": f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}"}
    done = run(SWEEP, str(sweep), cwd=tmp_path, **env, DIT_ENTRY=f"{ROOT}/tools/train.py")
    assert done.returncode == 2  # a config is not found from here
    assert "line 2: there is no config file configs/digits.yaml" in done.stderr
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = run(SWEEP, str(sweep), cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("sweep-*.txt")
    root, *words = done.stdout.splitlines()
    assert root == str(ROOT)
    assert words == ["--array=1-3", "--output=slurm-%A_%a.out", str(MULTINODE), f"@{kept}"]
    assert len(kept.read_text().splitlines()) == 3
    assert "3 runs" in done.stderr
    kept.unlink()
    failed = run(SWEEP, str(sweep), cwd=tmp_path, **env, STATUS="3")
    assert failed.returncode == 3
    assert not list(tmp_path.glob("sweep-*.txt"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no runs"),
        ("# configs/digits.yaml --run_dir=a\n", "has no runs"),
        ("configs/digits.yaml", "line 1: has no --run_dir"),
        ("\nconfigs/digts.yaml --run_dir=a", "line 2: there is no config file configs/digts.yaml"),
        ("tools/train_vea.py c.yaml --run_dir=a", f"line 1: there is no {ROOT}/tools/train_vea.py"),
        (
            "configs/digits.yaml --run_dir=a/../b\n\nconfigs/digits.yaml --run_dir b/",
            f"line 3: has the same run_dir as line 1: {ROOT}/b",
        ),
        ("configs/digits.yaml --run_dir=$HOME/a", "line 1: variables are not expanded"),
        ('configs/digits.yaml --run_dir="$HOME"', "line 1: variables are not expanded"),
        ("configs/digits.yaml --run_dir=`a`", "line 1: variables are not expanded"),
        ("configs/digits.yaml --run_dir='a", "quotes come in pairs"),
        ('configs/digits.yaml --run_dir="a', "quotes come in pairs"),
    ],
)
def test_sweep_refuses_a_file(tmp_path, text, says):
    (tmp_path / "sweep.txt").write_text(text)
    done = run(SWEEP, str(tmp_path / "sweep.txt"), DRY_RUN="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/sweep.sh: ")
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (["no.txt"], {}, "there is no no.txt"),
        (["{file}", "--nodes=2"], {}, "the last argument is the FILE of runs, not --nodes=2"),
        (["--array=1-3", "{file}"], {}, "--array=1-3: the array is FILE's runs"),
        (["-a1-3", "{file}"], {}, "the array is FILE's runs"),
        (["{file}"], {"LIMIT": "0"}, "LIMIT=0 is not a number of elements"),
    ],
)
def test_sweep_refuses_arguments(sweep, arguments, env, says):
    done = run(SWEEP, *(a.format(file=sweep) for a in arguments), DRY_RUN="1", **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_sweep_help():
    for flag in ("--help", "-h"):
        done = run(SWEEP, flag)
        assert (done.returncode, done.stderr) == (0, "")
        assert "launch/sweep.sh [SBATCH OPTIONS] FILE" in done.stdout
    assert run(SWEEP).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "index", "says"),
    [
        (["@{file}"], None, "@FILE is for job arrays"),
        (["@no.txt"], "1", "there is no no.txt"),
        (["@{file}"], "9", "has no run in line 9"),
        (["@{file}", "--x=1"], "2", "nothing may follow"),
    ],
)
def test_multinode_refuses_a_line(sweep, arguments, index, says):
    env = {"DRY_RUN": "1"} | ({"SLURM_ARRAY_TASK_ID": index} if index else {})
    done = run(MULTINODE, *(a.format(file=sweep) for a in arguments), **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


@pytest.fixture
def queued(slurm_path, entry, tmp_path) -> Callable[..., str]:
    """What `scontrol requeue` is called with after ranks that ended with a status."""
    folder = Path(slurm_path.split(os.pathsep)[0])
    log = tmp_path / "requeued"
    (folder / "sleep").write_text("#!/bin/sh\n")
    (folder / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = show ] && printf "n7\\nn8\\n" || echo "$*" >>{shlex.quote(str(log))}\n'
    )

    def after(status: int, **env: str) -> str:
        (folder / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
        for name in ("srun", "sleep"):
            (folder / name).chmod(0o755)
        log.write_text("")
        done = run(MULTINODE, "c.yaml", **JOB, DIT_ENTRY=entry, PATH=slurm_path, **env)
        assert done.returncode == status
        return log.read_text()

    return after


def test_a_job_that_saved_and_stopped_queues_again(queued):
    assert queued(75) == "requeue 123456\n"
    assert queued(75, REQUEUE="0") == ""


@pytest.mark.parametrize("status", [0, 1, 137, 138, 143])
def test_any_other_end_is_the_end(queued, status):
    """143: also what srun ends with when one rank failed and the others were ended for it; that would fail again."""
    assert queued(status) == ""


def test_an_element_queues_itself_again_and_not_the_array(queued):
    """By the name that SLURM has for an element: the number alone may be that of the whole array."""
    array = {"SLURM_ARRAY_JOB_ID": "123400", "SLURM_ARRAY_TASK_ID": "3"}
    assert queued(75, **array) == "requeue 123400_3\n"
