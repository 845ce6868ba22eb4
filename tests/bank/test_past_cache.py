"""Shards read past the page cache: which, the same bytes, and systems on which that cannot be."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bnn.bank import Bank, BankWriter, disk, reading, streaming
from bnn.errors import BankCorrupt
from bnn.layout import layout_of
from bnn.types import make_block

S, ROWS = 33, 6  # the last shard is shorter than the others
LAYOUT = layout_of(nn.Linear(600, 37))
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reading, streaming):
        monkeypatch.setattr(module, "PIECE_BYTES", 16 * 4096)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bank that is not in the page cache."""
    writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, shard_rows=ROWS)
    for start in range(0, S, ROWS):
        index = torch.arange(start, min(start + ROWS, S))
        writer.append(make_block(LAYOUT.unflatten(values(index)), chain=index * 0, draw=index))
    writer.close()
    assert len(shards(tmp_path / "bank")) == 6
    if not forget(tmp_path / "bank"):
        pytest.skip("this system keeps what it is told to forget, or does not tell")
    descriptor = os.open(shards(tmp_path / "bank")[-1], os.O_RDONLY)
    try:
        if disk.is_cached(descriptor, 0):
            pytest.skip("this file system does not tell what is in the page cache")
        if not disk.bypass_cache(descriptor, True):
            pytest.skip("this file system has no reads past the page cache")
    finally:
        os.close(descriptor)
    assert forget(tmp_path / "bank")  # asking begins to read
    return tmp_path / "bank"


def values(index: torch.Tensor) -> torch.Tensor:
    return index.float().view(-1, 1) + torch.arange(LAYOUT.num_values) / LAYOUT.num_values  # [K, P]


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("main-*.safetensors"))


def cached(path: Path) -> list[float]:
    """The share of each shard's pages that are in the page cache."""
    found = []
    for file in shards(path):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            here = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.addressof(ctypes.c_ubyte.from_buffer(mapped))
            told = ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), here)
            assert told == 0
            found.append(sum(page & 1 for page in here) / len(here))
    return found


def forget(path: Path) -> bool:
    """Drop the shards from the page cache; whether they are gone."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for file in shards(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return not any(cached(path))


def stream(path: Path, buffers: int = 2) -> Bank:
    largest = max(file.stat().st_size for file in shards(path))
    return Bank.open(path, residency="streamed", host_budget=buffers * (-(-largest // 4096) * 4096))


def read(bank: Bank) -> None:
    """A pass from first to last, every value compared."""
    for first, block in bank.blocks(4):
        expected = LAYOUT.unflatten(values(torch.arange(first, first + block.num_samples)))
        assert all(torch.equal(block.params[name], expected[name]) for name in LAYOUT.names)


@pytest.fixture
def past(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each piece that was read, whether it went past the page cache."""
    real, found = disk.read_at, list[bool]()

    def watched(descriptor: int, view: memoryview, offset: int) -> int:
        if offset or len(view) > 4096:  # the header is no piece
            found.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT))
        return real(descriptor, view, offset)

    monkeypatch.setattr(disk, "read_at", watched)
    return found


def test_the_first_reading_goes_past_the_cache_and_the_second_fills_it(path: Path, past: list[bool]) -> None:
    bank = stream(path)
    read(bank)
    assert past
    assert all(past)
    assert max(cached(path)) < 0.5  # the header, and what the system reads behind it
    past.clear()
    read(bank)
    assert past
    assert not any(past)
    bank.release()
    assert cached(path).count(1.0) >= 4  # but for two shards that were still in buffers


def test_what_is_in_the_cache_is_read_from_it(path: Path, past: list[bool]) -> None:
    shards(path)[2].read_bytes()
    bank = stream(path)
    read(bank)
    pieces = -(-shards(path)[2].stat().st_size // reading.PIECE_BYTES)
    assert past.count(False) == pieces
    assert len(past) > 5 * pieces
    bank.release()


def test_a_bank_larger_than_memory_never_goes_through_the_cache(
    path: Path, past: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "memory_bytes", lambda: sum(file.stat().st_size for file in shards(path)) - 1)
    bank = stream(path)
    for _ in range(3):
        read(bank)
    assert all(past)
    assert max(cached(path)) < 0.5
    bank.release()


@pytest.mark.parametrize("buffers", [2, 3, 6])
def test_a_disk_that_gives_less_than_was_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    """The rest of a piece then begins within a page, and cannot go past the cache."""
    real = disk.read_at
    monkeypatch.setattr(disk, "read_at", lambda descriptor, view, offset: real(descriptor, view[:50_000], offset))
    bank = stream(path, buffers)
    read(bank)
    read(bank)
    bank.release()


def refusing(is_refused: Callable[[int], bool]) -> Callable[[int, memoryview, int], int]:
    real = disk.read_at

    def read_at(descriptor: int, view: memoryview, offset: int) -> int:
        if is_refused(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, view, offset)

    return read_at


def test_a_file_system_that_wants_other_pieces_past_its_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "read_at", refusing(lambda d: bool(fcntl.fcntl(d, fcntl.F_GETFL) & DIRECT)))
    bank = stream(path)
    read(bank)
    assert cached(path) == [1.0] * 6
    bank.release()


def test_a_disk_that_refuses_every_piece_is_told_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = stream(path)
    assert float(bank[0]["bias"][0]) == float(values(torch.tensor([0]))[0, -37])
    monkeypatch.setattr(disk, "read_at", refusing(lambda descriptor: True))
    with pytest.raises(BankCorrupt, match="main-000004"):
        bank[4 * ROWS]
    bank.release()


def test_a_system_without_either_reads_through_its_cache(
    path: Path, past: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT", raising=False)
    read(stream(path))
    assert not any(past)
    forget(path)
    monkeypatch.undo()
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    read(stream(path))
    assert cached(path) == [1.0] * 6
