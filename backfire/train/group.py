"""The process group of the ranks of a training run, new for each task, and what they write in the
store that they share: where they are, and why one of them has left."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from backfire.errors import CellError
from backfire.train.devices import launched

if TYPE_CHECKING:
    import torch

    from backfire.experiment import Machine
    from backfire.train.ranks import Ranks

TIMEOUT = timedelta(minutes=30)
"""Longest time that ranks wait for one another, such as for a checkpoint."""
_TO_JOIN = 600.0
"""Seconds after which a rank that does not join counts as lost; it may have to import first."""
_LOST = re.compile(r"gloo|nccl|\bpeer\b|process group|socket|timed? ?out", re.IGNORECASE)
"""Messages of torch.distributed after another rank has left."""


def meet() -> tuple[Any, int, int]:
    """The store that the ranks of a launcher share, the own rank, and their number."""
    from torch.distributed.rendezvous import rendezvous

    # We shard models ourselves; transformers would load empty weights on most ranks.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    return store, rank, size


@contextmanager
def joined(
    store: Any, number: int, rank: int, size: int, machine: Machine, check: Callable[[], None]
) -> Iterator[Ranks]:
    """A process group of all ranks for a task, after checking that each has its own device.

    Args:
        check: called while others have not joined yet; raises if one of them has left.

    Raises:
        CellError: two ranks have the same GPU, or one does not join (`killed`).
    """
    import torch.distributed as dist

    from backfire.train.ranks import Ranks

    device = _device(machine, rank)
    store.set(f"place {number} {rank}", json.dumps(_place(device)))
    keys = [f"place {number} {other}" for other in range(size)]
    until = time.monotonic() + _TO_JOIN
    while not store.check(keys):
        check()
        if time.monotonic() > until:
            late = next(other for other, key in enumerate(keys) if not store.check([key]))
            raise CellError("killed", f"Rank {late} of {size} did not join the others in time.")
        time.sleep(0.02)
    places = [json.loads(store.get(key)) for key in keys]
    gpus = [(host, gpu) for host, gpu, _ in places if gpu]
    if len(set(gpus)) < len(gpus):
        raise CellError("failed", f"Two of the {size} ranks have the same GPU.")
    hosts = list(dict.fromkeys(host for host, _, _ in places))
    if len(hosts) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"group {number}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        # Host names are nobody's business: a result tells them by number.
        several = len(hosts) > 1
        named = [f"host {hosts.index(h)} {name}" if several else name for h, _, name in places]
        yield Ranks(rank, size, device, named)
    finally:
        dist.destroy_process_group()


def _device(machine: Machine, rank: int) -> torch.device:
    """The device of a rank: GPUs are counted on each host."""
    import torch

    from backfire.model.load import device_of

    device = device_of(machine.device)
    if rank == 0 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", rank)) if launched() else rank
    return device_of(f"cuda:{local % torch.cuda.device_count()}")


def _place(device: torch.device) -> tuple[str, str, str]:
    """Host, identity of the GPU (empty for a CPU), and name of the device."""
    import torch

    if device.type == "cpu":
        return socket.gethostname(), "", "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return socket.gethostname(), str(torch.cuda.get_device_properties(index).uuid), f"cuda:{index}"


def error_key(number: int, rank: int) -> str:
    """Under which a rank tells why it left a task."""
    return f"error {number} {rank}"


def is_lost(error: BaseException) -> bool:
    """Whether this error tells that another rank has left."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
