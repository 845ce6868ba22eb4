"""Ranks that `torchrun` started: how they meet, and how they part."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

from bnn.errors import ConfigError, RankLost
from bnn.meeting import Meeting, agree
from bnn.ranks import ALONE, ASKING, FAILED, TIMEOUT, TIMEOUT_NAME, Ranks, restarts

__all__ = ["ALONE", "LAUNCHED", "TIMEOUT", "TIMEOUT_NAME", "Ranks", "joined", "launched", "ranks", "restarts"]

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets
LEAVING = 10.0  # seconds that rank 0 keeps the meeting place open for the others to leave
ENDED = b""  # in place of the name of a start, once all its ranks have ended well

_current = ALONE
_earlier: tuple[bool, bool] | None = None  # as this process found it when it first joined others: `again`, `_remembers`


def ranks() -> Ranks:
    """The ranks that this process has joined; `ALONE` without any.

    Examples:
        >>> ranks().rank, ranks().world_size
        (0, 1)
    """
    return _current


def launched() -> bool:
    """Whether torchrun, or whoever sets the same variables, started this process as one of several ranks."""
    return all(name in os.environ for name in LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


@contextmanager
def joined(*, timeout: float | None = None) -> Iterator[Ranks]:
    """Meet the other ranks of a run that torchrun started, and part from them at the end.

    Inside, `bnn.fit` splits its work over the ranks. Without torchrun nothing happens, and `torch.distributed` is
    not imported. Tensors on CPUs travel by gloo, those on GPUs by NCCL, where each rank takes the GPU that its
    LOCAL_RANK names.

    Args:
        timeout: seconds without a sign of another rank after which this one gives up, above 0; by default what
            the environment says in BNN_RANKS_TIMEOUT, or 300.

    Raises:
        ConfigError: a timeout that is none, or a process group that is there already.
        RankLost: another rank ended, did not come, or was silent for longer than the timeout.

    Examples:
        >>> with joined() as together:
        ...     together.world_size
        1
    """
    global _current, _earlier
    if _current.several or not launched():
        yield _current
        return
    together = _meet(_timeout(timeout))
    stop = threading.Event()
    pulse = threading.Thread(target=_beat, args=(together, stop), daemon=True, name="bnn-pulse")
    pulse.start()
    try:
        together._again = any(together.values(together.again))  # and all are here
        _earlier = together._again, together._remembers
        _current = together
        yield together
        _leave(together)
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        with suppress(RuntimeError):
            together.post(f"{FAILED}/{together.rank}", lines[0])
            if not isinstance(error, RankLost):
                together.post(FAILED, f"rank {together.rank} ended: {type(error).__name__}: {lines[0]}")
        raise
    finally:
        _current = ALONE
        stop.set()
        pulse.join(ASKING)  # it may wait for an answer that does not come
        with suppress(RuntimeError):
            torch.distributed.destroy_process_group()


def _timeout(given: float | None) -> float:
    try:
        seconds = float(os.environ.get(TIMEOUT_NAME, TIMEOUT)) if given is None else float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        got = os.environ.get(TIMEOUT_NAME) if given is None else str(given)
        raise ConfigError(TIMEOUT_NAME, want="seconds above 0", got=repr(got), fix=f"the default is {TIMEOUT:g}")
    return seconds


def _meet(timeout: float) -> Ranks:
    """The ranks, once all have come."""
    import torch.distributed as distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        raise ConfigError(
            "torch.distributed",
            want="no process group yet: bnn.distributed.joined() makes one",
            got="one that is there",
            fix="leave init_process_group out",
        )
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"

    def agreed() -> tuple[Any, Meeting, bool, bool, str]:
        store, _, _ = next(iter(rendezvous("env://", timeout=limit)))
        store.set_timeout(limit)
        place = Meeting(PrefixStore("bnn", store), timeout)
        again, remembers = _earlier or (False, place.check(["round"]))
        if _earlier is None and remembers:  # processes before this one met here
            again = place.get("round") != ENDED
        return store, place, again, remembers, agree(place, rank, world_size, timeout)

    try:
        try:
            found = agreed()
        except distributed.DistNetworkError:
            if _earlier is None or rank == 0:
                raise
            found = agreed()  # that was where these processes met before, which rank 0 had not closed yet
        store, place, again, remembers, round_name = found
        store = PrefixStore(f"bnn/{round_name}", store)
        own = Meeting(PrefixStore("own", store), timeout)
        own.add(f"pulse/{rank}", 0)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RankLost(
            f"rank {rank} of {world_size}",
            want=f"all ranks at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} s",
            got=lines[0][:200],
            fix=f"look at the other ranks' messages and the hosts' firewall, or set {TIMEOUT_NAME} to more seconds",
        ) from error
    together = Ranks(rank, world_size, store=own, timeout=timeout, again=again and rank == 0)
    together._place, together._remembers = place, remembers
    return together


def _beat(together: Ranks, stop: threading.Event) -> None:
    """Signs of life until the end, for those who wait long."""
    while not stop.wait(min(together.timeout / 8, 5.0)):
        with suppress(RuntimeError):
            together._store.add(f"pulse/{together.rank}", 1)  # which is answered, unlike `set`


def _leave(together: Ranks) -> None:
    """Say goodbye; rank 0, in whose process the meeting place may be, goes last."""
    store = together._store
    with suppress(RuntimeError):
        left, end = store.add("left", 1), time.monotonic() + LEAVING
        while together.rank == 0 and left < together.world_size and time.monotonic() < end:
            time.sleep(0.02)
            left = store.add("left", 0)
        if together.rank == 0 and left == together.world_size:
            together._place.set("round", ENDED.decode())  # what follows under this torchrun is no restart of it
