"""Faults of the disk, the runs that they are put into, and what must be true after each.

Sample i's values are a function of i, so that whatever is found can be checked bit for bit.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from bank.test_bank import LAYOUT, rows, rows_at

from bnn.bank import Bank, BankWriter, disk
from bnn.bank import writer as writing
from bnn.errors import BankError, BankNotFound

CALLS = tuple(name for name, value in vars(disk).items() if inspect.isfunction(value))
WRITES = ("create", "write", "fsync", "close", "replace", "unlink", "sync_folder", "make_folders", "open_lock")

Handler = Callable[..., Any]  # of name, real function and arguments of a call


@contextmanager
def intercepted(handler: Handler) -> Iterator[None]:
    """Every call of `disk` becomes `handler(name, real, *args)`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(disk, name, functools.partial(handler, name, getattr(disk, name)))
        yield


@contextmanager
def without_syncs() -> Iterator[None]:
    """Syncs do nothing, which only a loss of power could tell; they are most of a small bank's time."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "sync_folder"):
            patch.setattr(disk, name, lambda place: None)
        yield


# Runs

Told = Callable[[str, int], object]  # a writer and how many of its rows are acknowledged
STARTS = {"main": 0, "a": 0, "b": 1000}  # the first index of each writer's rows
OLD = 5000  # and of those of a bank that is replaced
GOAL = 14  # rows that a writer has in the end
BASE = {"buffer": torch.arange(4.0)}


def opened(folder: Path, writer: str = "main", **options: Any) -> BankWriter:
    """A writer of four rows a shard."""
    bank_writer = BankWriter(folder, layout=LAYOUT, config={"seed": 0}, base=BASE, writer=writer, **options)
    bank_writer._capacity = 4
    return bank_writer


def steps(bank_writer: BankWriter, sizes: list[int], told: Told, *, states: bool = True) -> Iterator[None]:
    """Append and commit, one size after the other, then close."""
    last = bank_writer.num_rows
    for size in sizes:
        state = {"step": last + size, "num_steps": GOAL, "info": {}, "flat": torch.full((3,), float(last + size))}
        bank_writer.append(rows(STARTS[bank_writer.writer] + last, size), state if states else None)
        bank_writer.commit()
        last += size
        told(bank_writer.writer, last)
        yield
    bank_writer.close()


def run_all(*parts: Iterator[None]) -> None:
    """Take steps in turn until none is left."""
    waiting = list(parts)
    while waiting:
        waiting = [part for part in waiting if next(part, waiting) is None]


def ignore(writer: str, count: int) -> None:
    """Tell nobody."""


class Plan(NamedTuple):
    """A run: what is there before, what it does, and what was acknowledged before it."""

    prepare: Callable[[Path], None]
    run: Callable[[Path, Told], None]
    before: Mapping[str, int]
    writers: tuple[str, ...] = ("main",)
    replaces: bool = False
    between: tuple[int, ...] = ()  # rows after commits that nobody was told of


def nothing(folder: Path) -> None:
    """No bank is there."""


def five_rows(folder: Path) -> None:
    run_all(steps(opened(folder), [3, 2], ignore))


def another_bank(folder: Path) -> None:
    for writer in ("main", "z"):
        bank_writer = BankWriter(folder, layout=LAYOUT, config={"seed": OLD}, base=BASE, writer=writer)
        bank_writer.append(rows(OLD, 3) if writer == "main" else rows(OLD + 3, 2))
        bank_writer.close()


def two_writers(folder: Path, told: Told) -> None:
    first, second = opened(folder, "a"), opened(folder, "b")
    run_all(steps(first, [3, 5, 0], told), steps(second, [2, 4], told))


def beside(folder: Path, told: Told) -> None:
    """Shards of 4, 3, 4 and 3 rows, the first three committed by the thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "BESIDE_BYTES", 0)
        bank_writer, last = opened(folder), 0
        for size in (4, 3, 4, 3):
            last += size
            state = {"step": last, "num_steps": GOAL, "info": {}, "flat": torch.full((3,), float(last))}
            bank_writer.append(rows(last - size, size), state)
        bank_writer.commit()
        told("main", last)
        bank_writer.close()


PLANS = {
    "fresh": Plan(nothing, lambda f, told: run_all(steps(opened(f), [3, 6, 0, 2], told)), {}),
    "stateless": Plan(nothing, lambda f, told: run_all(steps(opened(f), [3, 6], told, states=False)), {}),
    "resume": Plan(five_rows, lambda f, told: run_all(steps(opened(f, resume=True), [1, 0, 5], told)), {"main": 5}),
    "overwrite": Plan(
        another_bank,
        lambda f, told: run_all(steps(opened(f, overwrite=True), [3, 5], told)),
        {},
        replaces=True,
    ),
    "two writers": Plan(nothing, two_writers, {}, ("a", "b")),
    "beside": Plan(nothing, beside, {}, between=(4, 7, 11)),
}


@functools.cache
def boundaries(name: str) -> dict[str, set[int]]:
    """How many rows each writer has after each of its commits."""
    import tempfile

    plan = PLANS[name]
    found = {writer: {0, plan.before.get(writer, 0), *plan.between} for writer in plan.writers}
    with tempfile.TemporaryDirectory() as folder, without_syncs():
        plan.prepare(Path(folder) / "bank")
        plan.run(Path(folder) / "bank", lambda writer, count: found[writer].add(count))
    return found


# What must be true afterwards


def counted(bank: Bank) -> dict[str, int]:
    """How many rows each writer has; every value is that of its row, and each writer's are its first."""
    found = bank.block(slice(None))
    index = (-found.log_joint).long().tolist()
    places = {**STARTS, "old": OLD}
    counts = {name: sum(start <= i < start + 1000 for i in index) for name, start in places.items() if name != "a"}
    want = [i for name, count in counts.items() for i in range(places[name], places[name] + count)]
    assert sorted(index) == want, index
    expected = rows_at(torch.tensor(index, dtype=torch.int64))
    for name in LAYOUT.names:
        assert torch.equal(found.params[name], expected.params[name])
    for column in ("draw", "log_joint", "log_weight"):
        assert torch.equal(getattr(found, column), getattr(expected, column))
    return counts


def check_rows_of(bank: Bank, commits: tuple[int, ...]) -> None:
    """The rows are those of one of the commits, in order."""
    assert len(bank) in commits, f"{len(bank)} rows, which no commit had"
    counted(bank)
    assert (-bank.log_joint).long().tolist() == list(range(len(bank)))


def check_survived(folder: Path, name: str, acknowledged: Mapping[str, int]) -> None:
    """The bank opens with a committed prefix that has every acknowledged row; or is none, if none was acknowledged."""
    plan = PLANS[name]
    told = {**plan.before, **acknowledged}
    bank, problem = None, None
    try:
        bank = Bank.open(folder, verify="full")
    except BankError as error:
        problem = error
    if bank is None:
        assert not told, f"rows {told} were acknowledged: {problem}"
        assert plan.replaces or isinstance(problem, BankNotFound), problem
        return
    counts = counted(bank)
    if counts["old"]:
        assert plan.replaces
        assert not told
        assert set(counts.values()) == {0, 5}, "some rows of the bank that was to go"
    for writer in plan.writers:
        count = counts["main" if STARTS[writer] == 0 else writer]
        assert count >= told.get(writer, 0), f"{writer} has {count} rows, {told} were acknowledged"
        assert count in boundaries(name)[writer], f"{writer} has {count} rows, which no commit had"


def check_goes_on(folder: Path, name: str) -> None:
    """A resume, or a new start where there is no bank yet, completes it, and nothing of the fault is left."""
    plan = PLANS[name]
    for writer in plan.writers:
        begun = (folder / "bank.json").exists()
        if plan.replaces:
            begun = begun and json.loads((folder / "bank.json").read_text())["seed"] < OLD
        old_is_there = plan.replaces and not begun and (folder / "bank.json").exists()
        bank_writer = opened(folder, writer, resume=begun, overwrite=old_is_there)
        done = bank_writer.num_rows
        if bank_writer.state is not None:
            assert bank_writer.state["step"] == done
            assert bank_writer.state["flat"].tolist() == [float(done)] * 3
        run_all(steps(bank_writer, [GOAL - done], ignore))
        bank_writer.release = lambda: None  # type: ignore[method-assign]
    bank = Bank.open(folder, verify="full")
    counts = counted(bank)
    assert bank.info["complete"]
    assert sorted(filter(None, counts.values())) == [GOAL] * len(plan.writers)
    assert bank.base()["buffer"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert bank.check_headers() == []
    assert [path.name for path in folder.glob(".tmp-*")] == []
    assert len(list(folder.glob("state-*"))) == len(plan.writers)


# Processes


def serve() -> None:
    """Read orders, one JSON a line, and answer each with what a fork of this process made of it."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed does not mix with the answers
    for line in sys.stdin:
        order = json.loads(line)
        function = getattr(importlib.import_module(order["module"]), order["function"])
        source, sink = os.pipe()
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            try:
                answer = {"result": function(*order["args"])}
            except BaseException:
                answer = {"error": traceback.format_exc()}
            with os.fdopen(sink, "w") as file:
                print(json.dumps(answer), file=file)
            os._exit(0)
        os.close(sink)
        with os.fdopen(source) as file:
            ready, _, _ = select.select([file], [], [], order["limit"])
            raw = file.readline() if ready else ""
        if not raw:
            raw = json.dumps({"error": f"{order['function']} ended without a word, or not within {order['limit']} s"})
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(raw.strip(), file=answers, flush=True)


class Forked:
    """A fork that runs `work(tell)`; what it tells comes as text, its end as a status."""

    def __init__(self, work: Callable[[Callable[[str], object]], object]) -> None:
        self.source, sink = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            code = 3
            try:
                os.close(self.source)
                work(lambda text: os.write(sink, f"{text}\n".encode()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(sink)

    def line(self) -> str:
        """The next line that it tells; empty at its end."""
        raw = b""
        while not raw.endswith(b"\n") and (byte := os.read(self.source, 1)):
            raw += byte
        return raw.decode().strip()

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def end(self) -> tuple[int, list[str]]:
        """Its exit status (minus the signal that ended it), and what else it told."""
        raw = b""
        while piece := os.read(self.source, 65536):
            raw += piece
        os.close(self.source)
        _, status = os.waitpid(self.process, 0)
        return os.waitstatus_to_exitcode(status), raw.decode().split("\n")[:-1]
