"""A SLURM cluster of several nodes on this machine, from Debian's packages, for tests; needs root.

Debian builds slurmd for several on one host. Each node here is an `unshare` process with a host name, process ids,
/dev/shm and /etc/hosts of its own, and an address of the loopback network; whoever kills that process has crashed the
node. The controller and the clients run outside, on the network that all share. File systems are shared, as by NFS.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from dit.ranks.group import free_port

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "sinfo",
    "scancel",
    "unshare",
    "setpriv",
    "nsenter",
)
SBIN = ("/usr/sbin", "/sbin")
APART = ("--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")

CONF = """
ClusterName=dit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a job that was queued again waits; SLURM takes no less than 5 s
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
KillWait=20
SlurmdTimeout=10
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=debug Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN\n"

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# What the first process of a node does: its name, its own /etc/hosts and /dev/shm, and then slurmd.
INIT = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount -t tmpfs -o mode=1777 shm /dev/shm
exec slurmd -D -N "$1" -f "$2/slurm.conf"
"""


class NoCluster(Exception):
    """A cluster cannot be had here; the text says why."""


def why_not() -> str | None:
    """What is missing for a cluster on this machine."""
    if os.geteuid() != 0:
        return "needs root"
    path = os.pathsep.join([os.environ["PATH"], *SBIN])
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge util-linux)"
    done = subprocess.run(["unshare", *APART, "hostname", "n1"], capture_output=True, text=True, check=False)
    return f"no namespaces: {done.stderr.strip()}" if done.returncode else None


def until(true: Callable[[], bool], seconds: float, what: Callable[[], str] | str) -> None:
    """Wait for it. AssertionError with `what` after so many seconds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.1)


class Cluster:
    """As a context it is up; at the end every process that it started is killed."""

    def __init__(self, nodes: int):
        self.nodes = {f"n{i}": f"127.0.1.{i}" for i in range(1, nodes + 1)}
        self.folder = Path(tempfile.mkdtemp(prefix="dit-slurm-"))  # short: sockets' paths have a limit
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._crashed = 0.0  # when a node last did
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD_SIZE"))}
        self.env |= {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.env["PATH"] = os.pathsep.join([os.environ["PATH"], *SBIN])

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()  # of a node: all of its processes
            daemon.wait()
        if not any(error):
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- coming up -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in self.nodes.items())
        )
        conf = CONF.format(host=socket.gethostname().split(".")[0], port=free_port(), folder=self.folder)
        nodes = [
            NODE.format(name=name, address=address, port=free_port()) for name, address in self.nodes.items()
        ]
        (self.folder / "slurm.conf").write_text(conf + "".join(nodes))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name.removesuffix('-file')}" for name in names]
        self._daemon("munged", ["munged", "--foreground", *files])
        until((self.folder / "munge.socket").exists, 10, lambda: self.log("munged"))
        (self.folder / "munge.sock").symlink_to(self.folder / "munge.socket")
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.folder / "slurm.conf")])
        for name in self.nodes:
            self.boot(name)
        self.wait_idle()

    def _daemon(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # also where the tests themselves are killed
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.env,
                start_new_session=True,
            )

    def boot(self, name: str) -> None:
        """Start a node; returns when its slurmd listens."""
        listens = self.folder / f"slurmd-{name}.pid"
        listens.unlink(missing_ok=True)
        init = ["sh", "-c", INIT, "sh", name, str(self.folder)]
        self._daemon(name, ["unshare", *APART, "--propagation", "slave", *init])
        until(listens.exists, 20, lambda: self.log(name))

    def crash(self, name: str) -> None:
        """Kill a node with all that runs on it; returns when the controller has noticed."""
        self._crashed = time.monotonic()
        self._daemons[name].kill()
        self._daemons[name].wait()
        until(lambda: self.states()[name].startswith("down"), 60, self.log)

    def hold_until_forgotten(self, number: str) -> None:
        """Keep a job whose node crashed and is back from starting for as long as SLURM may remember.

        What it could not tell the node, that the step's tasks are to end, it says again after 60 s and more: to the
        tasks that the same job has there by then, be they of its next start. Nodes seldom are back so soon.
        """
        self.wait(number, "PENDING")
        self.call("scontrol", "hold", number)
        time.sleep(max(0.0, self._crashed + 80 - time.monotonic()))
        self.call("scontrol", "release", number)

    @contextlib.contextmanager
    def hidden(self, name: str, folder: Path) -> Iterator[None]:
        """On this node an empty file system lies over a folder, inside."""
        there = ["nsenter", f"--mount=/proc/{self._daemons[name].pid}/ns/mnt"]
        self.call(*there, "mount", "-t", "tmpfs", "tmpfs", folder)
        try:
            yield
        finally:
            self.call(*there, "umount", folder)

    def wait_idle(self, seconds: float = 60) -> None:
        """Until every node waits for work; one that crashed is taken back, as an administrator would."""

        def idle() -> bool:
            states = self.states()
            self._take_back(states)
            return states == dict.fromkeys(self.nodes, "idle")

        until(idle, seconds, self.log)

    def _take_back(self, states: Mapping[str, str]) -> None:
        for name, state in states.items():
            if state.startswith("down") and self._daemons[name].poll() is None:
                self._quietly("scontrol", "update", f"NodeName={name}", "State=resume")

    def states(self) -> dict[str, str]:
        """What the controller takes each node for."""
        said = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T"],
            env=self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return dict(line.split(maxsplit=1) for line in said.stdout.splitlines() if " " in line)

    def log(self, *names: str) -> str:
        """The ends of the daemons' logs."""
        files = [
            p
            for n in names or ("",)
            for p in sorted(self.folder.glob(f"{n}*"))
            if p.suffix in (".log", ".out")
        ]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in files)

    # --- jobs ----------------------------------------------------------------------------------------------

    def call(self, *words: object, cwd: Path | None = None, **env: str) -> str:
        """A client's output. AssertionError where it fails."""
        done = subprocess.run(
            [str(w) for w in words], env=self.env | env, cwd=cwd, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: object, cwd: Path, **env: str) -> str:
        """sbatch; the job's number."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **env).strip()

    def job(self, number: str) -> Mapping[str, str]:
        """What scontrol shows of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def wait(self, number: str, *states: str, seconds: float = 180, restarts: int = 0) -> None:
        """Until the job is in one of these states, having started again at least so many times."""
        over = [
            0
        ]  # looks in a row at which it had ended otherwise: before it is queued again it has, for a moment

        def there() -> bool:
            now = self.job(number)
            self._take_back(self.states())
            over[0] = over[0] + 1 if now["JobState"] in {*ENDED} - {*states} else 0
            assert over[0] < 50, f"{now}\n{self.log()}"
            return now["JobState"] in states and int(now["Restarts"]) >= restarts

        until(there, seconds, lambda: f"{self.job(number)}\n{self.log()}")

    def _quietly(self, *words: str) -> None:
        """What may come too late, or too early."""
        subprocess.run(words, env=self.env, capture_output=True, check=False)

    def signal(self, number: str, sent: signal.Signals) -> None:
        """A signal to the ranks of a job, as SLURM sends one before the time limit."""
        self.call("scancel", f"--signal={sent.name.removeprefix('SIG')}", number)
