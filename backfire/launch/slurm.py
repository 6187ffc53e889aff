"""Runs workers as Slurm jobs, through submitit (extra `slurm`).

The truth about the work is the run folder. Slurm only says which workers are in its queue: they are
found by the job's name, so any shell of the same user finds the workers of a run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from backfire.errors import UserError, shortened
from backfire.launch.remote import FOLDER, Probe, Worker
from backfire.store import digest, slug

_SIGNAL, _LEAD = "USR1", 120
"""Signal before the end of a job's time, and how many seconds before: time for a checkpoint."""
_ENDED = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
_HELD = ("JobHeldAdmin", "launch failed requeued held")
"""Why a waiting job does not start by itself; another one may."""
_NEVER = (
    "BadConstraints",
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "QOSMaxWallDurationPerJobLimit",
)
"""Why no job with the same options will ever start."""
_IMMEDIATE = 15
"""Seconds within which a node must be free to be asked whether it sees the folders."""
_TRIES = 20  # seconds that a shared disk may lag behind
_LOOK = """
uname -n
tries=$1
shift
while [ $# -gt 0 ]; do
    while [ "$(cat "$1" 2>/dev/null)" != "$2" ] && [ $tries -gt 0 ]; do
        sleep 1
        tries=$((tries - 1))
    done
    [ "$(cat "$1" 2>/dev/null)" = "$2" ] || echo "$1"
    shift 2
done
"""
"""Prints the host, and those of the files that do not have the content after them."""
_TIMEOUTS = 10_000  # how often a job whose time is over is queued again
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}


def minutes_of(text: str) -> int:
    """Minutes of a time as sbatch takes it: `30`, `4:00:00`, `2-12`, `1-12:30:00`; rounded up.

    Raises:
        UserError: it is no such time.
    """
    match = _TIME.fullmatch(text.strip())
    numbers = [int(part) for part in match["parts"].split(":")] if match else []
    if not match or not any((*numbers, int(match["days"] or 0))):
        raise UserError(f"--time {shortened(text)} is no time; write 90, 4:00:00 or 2-12:00:00.")
    if match["days"]:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return int(match["days"]) * 1440 + hours * 60 + minutes + (seconds > 0)
    hours, minutes, seconds = numbers if len(numbers) == 3 else (0, *numbers, 0)[:3]
    return hours * 60 + minutes + (seconds > 0)


def memory_of(text: str) -> int:
    """Bytes of an amount of memory as sbatch takes it: `16G`, `800M`; a bare number is in MB.

    Raises:
        UserError: it is no such amount.
    """
    match = _MEMORY.fullmatch(text.strip())
    if not match or not float(match[1]):
        raise UserError(f"--mem {shortened(text)} is no amount of memory; write 16G or 16000M.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Request:
    """What each worker asks for."""

    minutes: int
    memory: int
    """Bytes."""
    cpus: int = 1
    gpus: int = 0
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    others: Mapping[str, str | bool] = field(default_factory=dict)
    """Other options of sbatch, without dashes; True for one without a value."""

    def _named(self) -> dict[str, Any]:
        named = {"partition": self.partition, "account": self.account, "qos": self.qos}
        amounts = {"gpus_per_node": self.gpus, "time": self.minutes, "cpus_per_task": self.cpus}
        memory = f"{-(-self.memory // 2**20)}M"
        return {key: value for key, value in {**named, **amounts, "mem": memory}.items() if value}

    def parameters(self) -> dict[str, Any]:
        """The request in the words of submitit."""
        lead = min(_LEAD, 30 * self.minutes)
        others = {"requeue": True, **self.others}
        more = {"signal_delay_s": lead, "stderr_to_stdout": True, "additional_parameters": others}
        return self._named() | more

    def flags(self) -> list[str]:
        """The request as options of sbatch."""
        named = {key.replace("_", "-"): value for key, value in self._named().items()}
        flags = {**named, **self.others}.items()
        return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags]


class Slurm:
    """The workers of one run in Slurm's queue."""

    name = "Slurm"

    def __init__(self, run: Path, request: Request) -> None:
        self.run, self.request = run.absolute(), request
        self.job_name = f"backfire-{slug(run.name)}-{digest(str(self.run), 8)}"
        self.worker: Worker | None = None

    def check(self) -> None:
        """Ask Slurm whether it would take such a job; nothing is submitted or written.

        Raises:
            UserError: Slurm refuses, as for an unknown partition.
        """
        if "%" in str(self.run):
            raise UserError(f"Slurm reads the % in {self.run} as its own; choose another --out.")
        done = _ask("sbatch", "--test-only", *self.request.flags(), "--wrap", "true")
        if done.returncode:
            raise UserError(f"Slurm does not take the job: {_reason(done.stderr)}.")

    def unread(self, probes: Sequence[Probe]) -> tuple[str, Probe] | None:
        """Asked of one node, if one is free within some seconds."""
        small = replace(self.request, minutes=1, memory=100 * 2**20, cpus=1, gpus=0)
        once = ("--nodes=1", "--ntasks=1", f"--immediate={_IMMEDIATE}", "--job-name=backfire-look")
        files = [word for one in probes for word in (str(one.path), one.content)]
        look = ("sh", "-c", _LOOK, "sh", str(_TRIES), *files)
        done = _ask("srun", *small.flags(), *once, "--chdir=/", *look)
        host, *lines = done.stdout.splitlines() or [""]
        unread = [one for one in probes if str(one.path) in lines]
        return (host, unread[0]) if unread else None

    def begin(self, options: tuple[str, ...], probe: Probe) -> None:
        """What its workers will do."""
        self.worker = _Requeued(self.run, options, probe)

    def start(self, count: int) -> list[str]:
        """Submit workers, as one array."""
        submitit = _import_submitit()
        with _outside_of_jobs():
            executor = submitit.SlurmExecutor(self.run / FOLDER, max_num_timeout=_TIMEOUTS)
            executor.update_parameters(job_name=self.job_name, **self.request.parameters())
            try:
                with executor.batch():
                    jobs = [executor.submit(self.worker) for _ in range(count)]
            except submitit.core.utils.FailedJobError as error:
                raise UserError(f"Slurm does not take the job: {_reason(str(error))}.") from None
        return [job.job_id for job in jobs]

    def alive(self) -> dict[str, str]:
        """The workers in the queue: id -> state and, if it waits, why.

        Raises:
            UserError: one waits for ever.
        """
        mine = [f"--user={os.getuid()}", f"--name={self.job_name}"]
        done = _ask("squeue", "--noheader", "--array", *mine, "--format=%i %T %r")
        if done.returncode:
            raise ConnectionError(_reason(done.stderr))
        rows = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.strip()]
        if never := next((why for _, _, why in rows if why.strip("()") in _NEVER), None):
            raise UserError(f"Slurm will never start a worker with these options: {never}.")
        return {
            number: state.lower() if why == "None" else f"{state.lower()} ({why})"
            for number, state, why in rows
            if why not in _HELD and state not in _ENDED
        }

    def end_of(self, worker: str) -> str:
        """By the accounting if there is one, else by the controller, which forgets a job some
        minutes after its end; else `gone`."""
        done = _ask("sacct", "-n", "-X", "-P", "-j", worker, "-o", "State")
        if done.returncode == 0 and (states := done.stdout.split()):
            return states[0].lower()
        done = _ask("scontrol", "--oneliner", "show", "job", worker)
        match = re.search(r"\bJobState=(\w+)", done.stdout)
        return match[1].lower() if match else "gone"

    def log_of(self, worker: str) -> str:
        return f"slurm-{worker}.log"

    def cancel(self, say: Callable[[str], None]) -> None:
        """Remove the workers from the queue."""
        _ask("scancel", f"--user={os.getuid()}", f"--name={self.job_name}")

    def goes_on(self, say: Callable[[str], None]) -> str:
        """What to know after Ctrl-C."""
        return (
            "The workers go on. See them with `squeue --me`, end them with `scancel --me "
            f"--name={self.job_name}`; the same command watches them again."
        )


class _Requeued(Worker):
    """A worker that Slurm queues again before its time is over, or when others take precedence."""

    def __call__(self) -> int:
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        number = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", str(os.getpid()))
        if code := self.work(f"slurm-{number}.log"):
            sys.exit(code % 256)  # Slurm then counts the job as failed
        return 0

    def checkpoint(self) -> Any:
        """Called by submitit at the signal."""
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(_Requeued(self.run, self.options, self.probe, self.environment))


def available() -> None:
    """Refuse a machine without submitit or Slurm.

    Raises:
        UserError: one is missing.
    """
    _import_submitit()
    if not shutil.which("sbatch"):
        raise UserError(
            "This machine has no Slurm (sbatch is not found); use a login node, or --on local."
        )


def _import_submitit() -> Any:
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = _SIGNAL  # submitit reads it when imported
    try:
        import submitit
    except ImportError:
        raise UserError("--on slurm needs submitit: pip install 'backfire[slurm]'") from None
    return submitit


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Hide the variables of a Slurm job that this process may run in: sbatch would take them for
    the wishes of the new job."""
    kept = {"SLURM_CONF", "SUBMITIT_PREEMPT_SIGNAL"}
    starts = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")
    hidden = {k: v for k, v in os.environ.items() if k.startswith(starts) and k not in kept}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's programs; a missing or silent one counts as failed."""
    try:
        with _outside_of_jobs():
            return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _reason(text: str) -> str:
    """The last line of Slurm's messages that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Try ")] or ["no reason"]
    return shortened(re.sub(r"^(?:\w+: )?(?:[\w ]*(?:error|failure): )?", "", said[-1]))
