"""A Slurm of two nodes on this machine, in a temporary folder, under the user who starts it.

Both nodes are this machine under other names: each has its own slurmd and port. Authentication is
a munged with its own key and socket in the folder, so another Slurm of this machine is not touched.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
_CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={root}/munge/socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmctldPort={control}
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=8000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=10 State=UP
"""


def why_not() -> str:
    """Why no Slurm can be started here; empty if one can."""
    lacking = [name for name in PROGRAMS if not _program(name)]
    names = ", ".join(lacking)
    return f"Slurm is not installed ({names}): apt-get install slurm-wlm munge" if names else ""


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True)
class Slurm:
    """A running Slurm. `SLURM_CONF` in their environment marks everything that belongs to it."""

    root: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment for every program that talks to it."""
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *words: str) -> str:
        """Run one of its programs; returns what it prints."""
        program = _program(words[0]) or words[0]
        done = subprocess.run(
            [program, *words[1:]],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def processes(self, part: str, node: str = "") -> list[int]:
        """Ids of its processes whose command line contains `part`, of one node or of all."""
        return [pid for pid, line in self._all(node) if part in line]

    def _all(self, node: str = "") -> Iterator[tuple[int, str]]:
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                variables = (place / "environ").read_bytes().split(b"\0")
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                mine = mark in variables and int(place.name) != os.getpid()
                if mine and (not node or self._is_on(node, place, variables, line)):
                    yield int(place.name), line

    def _is_on(self, node: str, place: Path, variables: list[bytes], line: str) -> bool:
        if f"SLURMD_NODENAME={node}".encode() in variables or f"-N {node}" in line:
            return True
        log = self.root / f"slurmd-{node}.log"  # a slurmstepd has it open
        return any(link.readlink() == log for link in (place / "fd").iterdir())

    def start_node(self, name: str) -> None:
        self.command("slurmd", "-f", str(self.root / "slurm.conf"), "-N", name)

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon and all that runs on the node, as if its power had failed."""
        for pid, _ in self._all(name):
            _kill(pid)

    @contextlib.contextmanager
    def nodes_without(self, folder: Path) -> Iterator[None]:
        """Hide a folder from the nodes, as if it was not on a shared disk; needs root."""
        folder.mkdir(parents=True, exist_ok=True)
        daemon = f"{_program('slurmd')} -f {self.root}/slurm.conf -N"
        for name in NODES:
            self.lose_node(name)
            hide = f"mount -t tmpfs none '{folder}' && {daemon} {name}"
            self.command("unshare", "--mount", "sh", "-c", hide)
        self.wait_for_nodes()
        try:
            yield
        finally:
            for name in NODES:
                self.lose_node(name)
                self.start_node(name)
            self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Wait until both nodes can take jobs."""
        ready = {"idle", "mix", "alloc"}
        wait_until(
            lambda: (
                set(self.command("sinfo", "-h", "-N", "-p", "debug", "-o", "%t").split()) <= ready
            )
        )

    def stop(self) -> None:
        """Kill everything that belongs to it."""
        for _ in range(3):  # what was being started meanwhile is found by the next round
            for pid, _ in self._all():
                _kill(pid)
            time.sleep(0.2)


@contextlib.contextmanager
def running() -> Iterator[Slurm]:
    """Start a Slurm; it stops at the end, also after an error."""
    root = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: paths of sockets have a limit
    slurm = Slurm(root)
    try:
        root.chmod(0o711)
        for name in ("state", "munge"):
            (root / name).mkdir(mode=0o700)
        (root / "munge/key").write_bytes(os.urandom(128))
        (root / "munge/key").chmod(0o400)
        control, first, second = _free_ports(3)
        names = {"host": socket.gethostname().partition(".")[0], "user": getpass.getuser()}
        conf = _CONF.format(root=root, control=control, first=first, second=second, **names)
        (root / "slurm.conf").write_text(conf)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        files = [f"--{k}={root}/munge/{v}" for k, v in {**places, "seed-file": "seed"}.items()]
        slurm.command("munged", "--force", *files)
        slurm.command("slurmctld", "-f", str(root / "slurm.conf"))
        for name in NODES:
            slurm.start_node(name)
        slurm.wait_for_nodes()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(root, ignore_errors=True)


def wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until something is true.

    Raises:
        TimeoutError: it is not within so many seconds.
    """
    end = time.monotonic() + seconds
    while not _holds(true):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(0.2)


def _holds(true: Callable[[], bool]) -> bool:
    try:
        return true()
    except RuntimeError:  # the controller is still starting
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
