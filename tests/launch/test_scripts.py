"""The launch scripts: what they would run (DRY_RUN=1), what they refuse, and two real ranks on this machine.

multinode.sh on a real SLURM cluster is tested by the tests marked `slurm`; here a stand-in for
`scontrol show hostnames` is enough to see what a job would get.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCAL, MULTINODE = ROOT / "launch/local.sh", ROOT / "launch/multinode.sh"
SCRIPTS = pytest.mark.parametrize("script", [LOCAL, MULTINODE], ids=lambda p: p.name)
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


# --- both --------------------------------------------------------------------------------------------------


@SCRIPTS
def test_bash_can_read_it(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@SCRIPTS
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


def test_local_dry_run_starts_nothing(entry):
    done = run(LOCAL, "c.yaml", "--run_dir=a b", "--x=$HOME", DIT_ENTRY=entry, NPROC="3", DRY_RUN="1")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    assert words[-4:] == [entry, "c.yaml", "--run_dir=a b", "--x=$HOME"]
    assert f"PYTHONPATH={ROOT}" in words
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
from dit import dist
with dist.session(timeout=datetime.timedelta(seconds=20)) as world:
    total = dist.all_sum(torch.tensor([10 ** world.rank]))
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
    program.write_text("import time\nprint('here', flush=True)\ntime.sleep(100)\n")
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


# --- multinode.sh ------------------------------------------------------------------------------------------

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
