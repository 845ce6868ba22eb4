"""What ranks say to each other, without any fit; run as a script, once a rank, by `ranked.launch`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from typing import Any

import torch

import bnn.pacing
import bnn.turns
from bnn import distributed
from bnn.errors import BnnError, DataError
from bnn.traffic import counted


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def collectives() -> None:
    """What is said comes to all, whatever its form."""
    with distributed.joined() as together:
        rank = together.rank
        uneven = together.pooled(torch.full((rank, 2), float(rank)))
        state = {"tensor": torch.arange(3.0) + 1j if rank == 0 else None, "step": 4, "info": {"a": [1.5, None]}}
        found = together.first_state(state if rank == 0 else None)
        assert found is not None
        told = {
            "pooled": uneven.tolist(),
            "total": together.total(torch.tensor([rank, 1.0])).tolist(),
            "later": later_totals(together),
            "values": together.values({"rank": rank, "text": "ü" * rank}),
            "first": together.first_value([rank, "x"]),
            "flag": together.first_flag(rank == 0),
            "nothing": together.first_state(None),
            "tensor": str(found["tensor"]),
            "plain": [found["step"], found["info"]],
        }
        together.barrier()
        together.wait()
    say(json.dumps(told))


def later_totals(together: distributed.Ranks) -> list[list[float]]:
    """Sums of what ranks have worked out after they were asked, of several sizes, one rank later than the other."""
    found = []
    for size in (3, 100_000, 1, 0):
        summed = together.coming_total(torch.empty(size))
        time.sleep(0.02 * together.rank)
        whole = summed(torch.arange(float(size)) + together.rank)
        found.append([float(whole.numel()), *whole[:3].tolist()])
    return found


def given_up() -> None:
    """Sums of two that were asked for and given up, or have another in between, and one of a tensor that was not announced."""
    with distributed.joined() as together:
        one = torch.ones(3) * (together.rank + 1)
        together.coming_total(one)
        found = [together.total(one).tolist()]
        summed = together.coming_total(one)
        found += [together.total(10 * one).tolist(), summed(one).tolist()]
        for other in (one.double(), torch.ones(4)):
            try:
                together.coming_total(one)(other)
            except AssertionError:
                found.append(["refused"])
        found.append(together.total(one).tolist())
    say(json.dumps(found))


def turns() -> None:
    """Items that ranks take in turn: what comes of them, how many calls were made, and what comes where some are wrong."""
    told = []
    with distributed.joined() as together:

        def work(wrong: tuple[int, ...], item: int) -> dict[str, Any]:
            if item in wrong:
                raise DataError(f"item {item}", want="another", got="this", fix="leave it out")
            return {"item": item, "a/b": torch.full((item,), float(item)), "rank": together.rank}

        for number, held, wrong in ((11, 2**20, ()), (11, 0, ()), (1, 2**20, ()), (0, 2**20, ()), (13, 2**20, (9, 7))):
            items, error, bnn.turns.HELD = list[Any](), "", held
            with counted() as traffic:
                try:
                    for state in bnn.turns.in_turn(range(number), partial(work, wrong), together):
                        items.append([state["item"], state["a/b"].tolist(), state["rank"]])
                except DataError as found:
                    error = found.place
            told.append([items, traffic.calls.get("all_gather", 0), error])
    say(json.dumps(told))


def mesh() -> None:
    """Two rows of two ranks, whose columns have unlike clocks, and an item late in the run that is wrong: all hear of it."""
    with distributed.joined() as together:
        column, row = together.mesh(2)
        bnn.pacing.SECONDS = (0.05, 0.01)[row.rank]
        started, error, count = time.monotonic(), "", 0

        def work(item: int) -> dict[str, Any]:
            if item == 26:
                raise DataError(f"item {item}", want="another", got="this", fix="leave it out")
            time.sleep(0.004)
            return {"item": sum(state["item"] for state in bnn.turns.by_all(lambda: {"item": item}, row))}

        try:
            for state in bnn.turns.in_turn(range(60), work, column, row):
                assert state["item"] == 2 * count
                count += 1
        except DataError as found:
            error = found.place
        assert time.monotonic() - started > 0.05  # so that clocks count
        told = together.values([error, count])  # and all go on together
    say(json.dumps(told))


def silence(kind: str) -> None:
    """Rank 1, or where it is about the meeting place rank 0, ends or stands still, while the other waits for it."""
    try:
        with distributed.joined() as together:
            summed = together.coming_total(torch.ones(1000)) if kind.startswith("summing") else None
            if kind.startswith("before"):
                summed = together.total
            if together.rank == (0 if kind.startswith("meeting") else 1):
                if kind.endswith("error"):
                    raise ValueError("no such file")
                os.kill(os.getpid(), signal.SIGKILL if kind.endswith("killed") else signal.SIGSTOP)
            started = time.monotonic()
            try:
                if summed is not None:
                    summed(torch.ones(1000))
                together.wait() if kind in ("stopped", "meeting waited") else together.barrier()
            finally:
                say(str(time.monotonic() - started))
    except BnnError as error:
        say(f"{type(error).__name__}: {error}")
    except ValueError:
        pass


def starts(*counts: str) -> None:
    """Whether the run was started before, when joined and when joined again; torchrun's count may differ by host."""
    if counts:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = counts[int(os.environ["RANK"])]
    found = []
    for _ in range(2):
        with distributed.joined() as together:
            found.append(together.again)
    say(json.dumps(found))


def meets(times: str) -> None:
    """Joined so many times; rank 0 closes where they met when the others are there again already."""
    found = []
    for number in range(int(times)):
        with distributed.joined() as together:
            found.append(together.values([number, together.rank]))
        time.sleep(0.2 * (together.rank == 0))
        del together  # and the store with it
    say(json.dumps(found))


def ends_badly() -> None:
    """A start that comes to nothing."""
    with distributed.joined():
        raise SystemExit("rows that nobody has")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
