"""Runs workers as Ray tasks (extra `ray`), on a cluster that exists, or on this machine alone.

Whoever reaches a Ray cluster can run any code on it. So none is started that others can reach, and
one on another host is only used if it asks its clients for a token.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from backfire.errors import UserError, shortened
from backfire.launch.remote import Probe, Worker, unread
from backfire.resources import cores

_RETRIES = 3
"""How often Ray itself repeats the task of a worker that died; then `launch.watch` does."""
_PATIENCE = 600.0
"""Seconds that cancelled workers have to save a checkpoint. One that has just taken a job loads its
model first, which takes minutes on a busy machine."""
_QUIET = 5.0  # seconds of it that need no explanation
_LOOK = 60.0  # seconds that a node has to say whether it sees the folders
_CONNECT = 10.0
_ASK = 30.0  # seconds for the question whether a cluster is open


@dataclass(frozen=True)
class Request:
    """What each worker asks for, and where."""

    memory: int
    """Bytes."""
    cpus: int = 1
    gpus: int = 0
    address: str | None = None
    """HOST:PORT of a cluster's control service (GCS); None starts Ray on this machine."""


class Ray:
    """The workers of one run on Ray. They end with this process."""

    name = "Ray"

    def __init__(self, run: Path, request: Request) -> None:
        self.run, self.request = run.absolute(), request
        self.worker: Worker | None = None
        self._tasks: dict[str, Any] = {}

    def check(self) -> None:
        """Connect; nothing is started or written.

        Raises:
            UserError: the cluster is out of reach, or has no node that is large enough.
        """
        where: dict[str, Any] = {"address": self.request.address}
        if self.request.address:
            _refuse_silent(self.request.address)
        else:  # nobody else knows the token
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
            where = {"address": "local", "include_dashboard": False}
            where["_node_ip_address"] = "127.0.0.1"
            where["num_cpus"] = self.request.cpus * max(1, cores() // self.request.cpus)
        ray = _import_ray()
        try:
            ray.init(**where, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray raises many kinds
            raise UserError(f"Ray cannot be reached: {shortened(error, 300)}") from None
        self._refuse_small(ray.nodes())

    def _refuse_small(self, nodes: list[dict[str, Any]]) -> None:
        asked = {"CPU": self.request.cpus, "GPU": self.request.gpus, "memory": self.request.memory}
        has = [node["Resources"] for node in nodes if node["Alive"]]
        if not any(all(one.get(k, 0) >= v for k, v in asked.items()) for one in has):
            most = {k: max((one.get(k, 0) for one in has), default=0) for k in asked}
            wanted, found = (
                f"{one['CPU']:g} CPUs, {one['GPU']:g} GPUs and {one['memory'] / 1e9:.1f} GB"
                for one in (asked, most)
            )
            raise UserError(
                f"No node of the Ray cluster is large enough for a worker with {wanted}; the most "
                f"that nodes have: {found}."
            )

    def unread(self, probes: Sequence[Probe]) -> tuple[str, Probe] | None:
        """Asked of every node."""
        if not self.request.address:  # this machine alone
            return None
        ray = _import_ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        look, asked = ray.remote(unread), dict[Any, str]()
        for node in (one for one in ray.nodes() if one["Alive"]):
            there = On(node["NodeID"], soft=False)
            task = look.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[task.remote(probes)] = node["NodeManagerHostname"]
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK)
        for task in answered:
            try:
                if found := ray.get(task):
                    return asked[task], probes[found[0]]
            except ray.exceptions.RayTaskError as error:
                reason = shortened(str(error).strip().splitlines()[-1], 300)
                raise UserError(f"Ray's node {asked[task]} cannot run backfire: {reason}") from None
            except ray.exceptions.RayError:  # it is lost: no worker will start there
                continue
        return None

    def begin(self, options: tuple[str, ...], probe: Probe) -> None:
        """What its workers will do."""
        self.worker = Worker(self.run, options, probe)

    def start(self, count: int) -> list[str]:
        """Submit tasks; Ray starts each where there is room."""
        ray, wanted = _import_ray(), self.request
        task = ray.remote(_task).options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            memory=wanted.memory,
            max_retries=_RETRIES,
        )
        workers = [secrets.token_hex(4) for _ in range(count)]
        for worker in workers:
            self._tasks[worker] = task.remote(self.worker, self.log_of(worker))
        return workers

    def alive(self) -> dict[str, str]:
        """The tasks that have not ended."""
        return dict.fromkeys(self._left(), "running or waiting")

    def _left(self) -> dict[str, Any]:
        ray, tasks = _import_ray(), list(self._tasks.values())
        _, left = ray.wait(tasks, num_returns=len(tasks), timeout=0) if tasks else ([], [])
        return {worker: task for worker, task in self._tasks.items() if task in left}

    def end_of(self, worker: str) -> str:
        """Its exit code, or the error by which Ray tells of its death."""
        try:
            return f"exit code {_import_ray().get(self._tasks[worker], timeout=1)}"
        except Exception as error:
            return type(error).__name__

    def log_of(self, worker: str) -> str:
        return f"ray-{worker}.log"

    def cancel(self, say: Callable[[str], None]) -> None:
        """Let the workers save their checkpoints, and end them."""
        self._end(say)

    def _end(self, say: Callable[[str], None]) -> int:
        """Cancel the workers, and wait for their end; returns how many have not ended in time: Ray
        kills them when this process ends."""
        ray, left = _import_ray(), list(self._left().values())
        for task in left:
            with suppress(Exception):  # it has just ended
                ray.cancel(task)
        begun, said = time.monotonic(), False
        while left and (waited := time.monotonic() - begun) < _PATIENCE:
            if not said and (said := waited >= _QUIET):
                say(
                    "Waiting until the workers have saved their checkpoints, for at most "
                    f"{_PATIENCE / 60:g} minutes; Ctrl-C ends them at once."
                )
            _, left = ray.wait(left, num_returns=len(left), timeout=1)
        return len(left)

    def goes_on(self, say: Callable[[str], None]) -> str:
        """What to know after Ctrl-C."""
        ended = "The workers have ended too"
        if killed := self._end(say):
            ended = f"Workers that had not saved a checkpoint in time were killed ({killed})"
        return f"{ended}; finished work is kept, and the same command goes on."


def _task(worker: Worker, log: str) -> int:
    return worker.work(log)


def available(address: str | None, may_be_open: bool) -> None:
    """Refuse a machine without Ray, and a cluster on other hosts that asks nobody for a token.

    Raises:
        UserError: Ray is missing, or the cluster is open.
    """
    if find_spec("ray") is None:
        raise UserError("--on ray needs Ray: pip install 'backfire[ray]'")
    if address:
        _refuse_open(address, may_be_open)


def _refuse_open(address: str, may_be_open: bool) -> None:
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host or "/" in host:
        raise UserError(
            f"{shortened(address)} is no address of a Ray cluster; write HOST:PORT, as "
            "`ray start --head` prints it."
        )
    if may_be_open or _is_loopback(host):
        return
    advice = (
        "start it with RAY_AUTH_MODE=token and set the same here (`ray get-auth-token "
        "--generate`), or say --open-cluster if only you can reach it."
    )
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise UserError(f"The Ray cluster at {address} may be open to everybody: {advice}")
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    without = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, env=without, capture_output=True, timeout=_ASK)
        if done.returncode == 0:
            raise UserError(f"The Ray cluster at {address} answers without a token: {advice}")


def _refuse_silent(address: str) -> None:
    """Refuse an address where nothing listens: Ray itself asks it again for many minutes."""
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # for one where something else does
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Ray cannot be reached: nothing answers at {address} ({reason})."
        ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _import_ray() -> Any:
    """Ray reads the variables of its authentication when it is imported: not before `check`."""
    import ray

    return ray
