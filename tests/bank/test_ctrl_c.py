"""Ctrl-C all through what reads and writes banks: it comes out, nothing hangs or is lost, and all goes on after it."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bank.test_bank import LAYOUT, check, rows, write
from bank.test_streaming import eventually
from ctrl_c import everywhere
from tqdm import tqdm

from bnn.bank import Bank, BankWriter, files, streaming, writer
from bnn.bank.streaming import Ring
from bnn.beside import num_running

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a shard, committed beside and summed by a thread, and read in several pieces."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)
    monkeypatch.setattr(writer, "BESIDE_BYTES", 0)
    monkeypatch.setattr(files, "BESIDE_BYTES", 64)
    monkeypatch.setattr(streaming, "PIECE_BYTES", 512)
    monkeypatch.setattr(streaming, "PATIENCE", 0.001)
    # Which tqdm leaves taken where it is interrupted as it draws a bar, for all threads but this one.
    monkeypatch.setattr(tqdm, "_lock", threading.RLock(), raising=False)


@pytest.fixture
def left() -> Callable[[], bool]:
    """Whether no threads are left but those that were there before."""
    gc.collect()
    before = num_running()
    return lambda: num_running() <= before


def test_a_file_is_whole_or_not_there(tmp_path: Path, left: Callable[[], bool]) -> None:
    path, chunks = tmp_path / "file", [b"few", b"many" * 50, b"few", b"more" * 60]
    places = 0
    for where in everywhere(lambda: lambda: files.write_atomic(path, chunks)):
        places += 1
        assert not path.exists() or path.read_bytes() == b"".join(chunks), where
        assert [each.name for each in tmp_path.iterdir() if each != path] == [], where
        eventually(left)
        path.unlink(missing_ok=True)
    assert places > 50
    assert files.write_atomic(path, chunks) == (len(b"".join(chunks)), files.sha256_of(path))


@pytest.mark.parametrize("every", [61, pytest.param(29, marks=pytest.mark.slow)])
def test_a_writer_keeps_whole_blocks_and_goes_on(tmp_path: Path, left: Callable[[], bool], every: int) -> None:
    """As a fit does: commit what has come, and go on from there with another writer."""
    count = itertools.count()
    made: list[BankWriter] = []

    def attempt() -> Callable[[], object]:
        made[:] = [BankWriter(tmp_path / str(next(count)), layout=LAYOUT, config={"seed": 0})]
        return lambda: fill(made[-1], 0)

    places = 0
    for where in everywhere(attempt, every=every):
        places += 1
        (first,) = made
        if first.has_news:
            first.commit()
        first.release()
        eventually(left)
        size = first.num_rows
        assert size in (0, 6, 12, 18, 24), where
        assert size == 0 or (first.state is not None and first.state["step"] == size), where
        again = BankWriter(first.path, layout=LAYOUT, config={"seed": 0}, resume=first.path.exists())
        fill(again, size)
        again.close()
        check(Bank.open(first.path, verify="full"), 24)
    assert places > 50
    made[0].release()


def fill(bank_writer: BankWriter, first: int) -> None:
    for start in range(first, 24, 6):
        bank_writer.append(rows(start, 6), {"step": start + 6, "num_steps": 24, "info": {}})
    bank_writer.commit()


@pytest.mark.parametrize("every", [53, pytest.param(11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("reading", ["in order", "as foreseen", "with all buffers held"])
def test_a_streamed_bank_is_read_on(tmp_path: Path, left: Callable[[], bool], reading: str, every: int) -> None:
    write(tmp_path / "bank", [40])
    size = max(path.stat().st_size for path in (tmp_path / "bank").glob("main-*"))
    budget = 3 * (size // 4096 + 1) * 4096
    made: list[Bank] = []

    def attempt() -> Callable[[], object]:
        made[:] = [Bank.open(tmp_path / "bank", residency="streamed", host_budget=budget)]
        assert made[-1]._stream is not None
        assert isinstance(made[-1]._stream.ring, Ring)  # with its threads
        return lambda: work(made[-1])

    def work(bank: Bank) -> None:
        if reading == "as foreseen":
            bank.follow(ORDER)
        values = read(bank, held=reading == "with all buffers held")
        assert torch.equal(values, expected)
        bank.release()

    expected = rows(0, 40).params["0.bias"]
    places = 0
    for where in everywhere(attempt, every=every):
        places += 1
        (bank,) = made
        assert torch.equal(read(bank), expected), where
        bank.release()
        eventually(left)
    assert places > 50


ORDER = [*range(0, 40, 10), *range(5, 40, 10), *range(40)]  # which does not fit into three buffers


def read(bank: Bank, *, held: bool = False) -> torch.Tensor:
    """One value a row; with `held`, views of all shards are kept to the end."""
    views, values = list[torch.Tensor](), dict[int, torch.Tensor]()
    for index in ORDER:
        if held and index % 10 == 0:
            assert bank._stream is not None
            views.append(bank._stream.ring.tensors(index // 10)["0.bias"])
        values[index] = bank[index]["0.bias"].clone()
    return torch.stack([values[index] for index in range(40)])


def test_a_bank_is_loaded_afterwards(tmp_path: Path, left: Callable[[], bool]) -> None:
    write(tmp_path / "bank", [40])
    places = 0
    for _ in everywhere(lambda: lambda: Bank.open(tmp_path / "bank", residency="host"), every=3):
        places += 1
        eventually(left)
    assert places > 50
    check(Bank.open(tmp_path / "bank", residency="host"), 40)
