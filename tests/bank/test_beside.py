"""Full shards that a thread commits while the next one fills: the same bank, and nothing lost where that goes wrong."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bank.test_bank import LAYOUT, check, rows
from disk_faults import Forked

from bnn.bank import Bank, BankWriter, disk, files, writer
from bnn.errors import BankError, BankWriteError

pytestmark = pytest.mark.usefixtures("beside")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a shard, each committed beside."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)
    monkeypatch.setattr(writer, "BESIDE_BYTES", 0)


def new(path: Path) -> BankWriter:
    return BankWriter(path, layout=LAYOUT, config={"seed": 0})


def fill(bank_writer: BankWriter, sizes: list[int], first: int = 0) -> None:
    for size in sizes:
        first += size
        bank_writer.append(rows(first - size, size), {"step": first, "num_steps": 99, "info": {}})


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; a quarter of a minute at most."""
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate:
    """Shards wait at `write_tensors` until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "main-") -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        real = files.write_tensors

        def waiting(path: Path, *args: Any, **options: Any) -> Any:
            if path.name.startswith(kind) and threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(15)
            return real(path, *args, **options)

        monkeypatch.setattr(files, "write_tensors", waiting)


@pytest.mark.parametrize("sizes", [[10, 10, 10], [5, 5, 5, 5], [7, 7, 7, 4], [4, 25, 6, 10], [35], [10], [1] * 23])
def test_the_bank_is_the_one_that_is_written_without_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    first, second = new(tmp_path / "beside"), new(tmp_path / "plain")
    fill(first, sizes)
    first.close()
    monkeypatch.setattr(writer, "BESIDE_BYTES", 2**40)
    fill(second, sizes)
    second.close()
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "beside").iterdir()) == names
    for name in names:
        assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    check(Bank.open(tmp_path / "beside", verify="full"), sum(sizes))


def test_a_full_shard_is_durable_without_another_call(tmp_path: Path) -> None:
    bank_writer = new(tmp_path / "bank")
    fill(bank_writer, [6, 4])
    wait_for(lambda: bank_writer.num_rows == 10)
    check(Bank.open(tmp_path / "bank", verify="full"), 10)
    assert bank_writer.state is not None
    assert bank_writer.state["step"] == 10
    bank_writer.release()


def test_rows_are_taken_while_the_disk_is_slow_and_release_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank_writer = new(tmp_path / "bank")
    fill(bank_writer, [10, 9])
    assert gate.reached.wait(15)
    assert bank_writer.num_rows == 0
    assert bank_writer.has_news
    threading.Timer(0.2, gate.opened.set).start()
    bank_writer.release()
    assert bank_writer.num_rows == 10
    check(Bank.open(tmp_path / "bank", verify="full"), 10)  # the nine were never committed
    resumed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, resume=True)
    fill(resumed, [9], first=10)
    resumed.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 19)


@pytest.mark.parametrize("kind", ["main-", "state-", "manifest-"])
def test_a_refusal_beside_is_told_at_the_next_call_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bank_writer, real, refused = new(tmp_path / "bank"), disk.create, list[str]()

    def create(path: Path) -> int:
        beside = threading.current_thread() is not threading.main_thread()
        if beside and path.name.startswith(f".tmp-{kind}") and not refused:
            refused.append(path.name)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(disk, "create", create)
    fill(bank_writer, [10, 3])
    wait_for(lambda: bool(refused))
    with pytest.raises(BankWriteError, match="No space left"):
        bank_writer.commit()
    assert bank_writer.num_rows == 0
    assert bank_writer.has_news
    bank_writer.commit()
    assert bank_writer.num_rows == 13
    check(Bank.open(tmp_path / "bank", verify="full"), 13)
    bank_writer.close()
    assert len(list((tmp_path / "bank").glob("main-*"))) == 2  # no shard twice


def test_on_a_disk_that_refuses_everything_each_block_waits_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_writer, real, full = new(tmp_path / "bank"), disk.write, threading.Event()

    def write(descriptor: int, view: memoryview) -> int:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, view)

    monkeypatch.setattr(disk, "write", write)
    fill(bank_writer, [10])
    wait_for(lambda: bank_writer.num_rows == 10)
    full.set()
    refused = 0
    for first in range(10, 50, 5):
        try:
            fill(bank_writer, [5], first)
        except BankWriteError:
            refused += 1
    assert refused >= 4
    full.clear()
    bank_writer.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 50)


def test_ctrl_c_before_the_thread_has_begun_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank_writer = new(tmp_path / "bank")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.Threads, "give", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill(bank_writer, [10])
    fill(bank_writer, [2], first=10)
    bank_writer.commit()
    check(Bank.open(tmp_path / "bank", verify="full"), 12)
    bank_writer.close()


def test_a_row_that_is_not_finite_is_named_behind_those_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    bank_writer = new(tmp_path / "bank")
    fill(bank_writer, [10, 4])
    block = rows(14, 3)
    block.params["0.bias"][1] = float("nan")
    with pytest.raises(BankError, match=r"row 15\b|sample 15\b"):
        bank_writer.append(block)
    gate.opened.set()
    bank_writer.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 14)


def test_two_images_are_all_that_is_ever_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [0], files.blank_image

    def counted(*args: Any) -> files.Image:
        made[0] += 1
        return real(*args)

    monkeypatch.setattr(files, "blank_image", counted)
    bank_writer = new(tmp_path / "bank")
    fill(bank_writer, [5] * 17)
    bank_writer.close()
    assert made == [2]
    check(Bank.open(tmp_path / "bank"), 85)


def test_without_a_thread_one_image_is_made_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [0], files.blank_image

    def counted(*args: Any) -> files.Image:
        made[0] += 1
        return real(*args)

    monkeypatch.setattr(files, "blank_image", counted)
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, beside=False)
    fill(bank_writer, [10, 10, 7])
    assert bank_writer.num_rows == 20
    bank_writer.spare_memory()  # which rows are gathered in: it stays
    fill(bank_writer, [2], first=27)
    assert made == [1]
    bank_writer.commit()
    bank_writer.spare_memory()
    fill(bank_writer, [10, 3], first=29)
    assert made == [2]
    bank_writer.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 42)


def test_abandon_waits_for_the_commit_beside_and_takes_all_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank_writer = new(tmp_path / "bank")
    fill(bank_writer, [10])
    assert gate.reached.wait(15)
    threading.Timer(0.2, gate.opened.set).start()
    bank_writer.abandon(rows=True)
    assert list(tmp_path.iterdir()) == []


def forked(root: str) -> list[str]:
    """What a fork gets that releases a writer whose commit is beside, and what becomes of that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)
        patch.setattr(writer, "BESIDE_BYTES", 0)
        gate = Gate(patch)
        bank_writer = new(Path(root) / "bank")
        fill(bank_writer, [10])
        assert gate.reached.wait(15)

        def work(tell: Callable[[str], object]) -> None:
            bank_writer.release()
            tell("released")

        _, told = Forked(work).end()
        gate.opened.set()
        bank_writer.close()
    check(Bank.open(Path(root) / "bank", verify="full"), 10)
    return told


def test_a_fork_does_not_wait_for_a_thread_that_it_has_not(tmp_path: Path, alone: Callable[..., Any]) -> None:
    assert alone(forked, tmp_path) == ["released"]
