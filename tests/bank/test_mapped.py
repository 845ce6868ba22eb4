"""Pages of a mapped bank: no more than the budget says, and huge where samples are large."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bnn.bank import Bank, BankWriter, reader
from bnn.layout import layout_of
from bnn.types import make_block

MAPS = Path("/proc/self/smaps")
HUGE = Path("/sys/kernel/mm/transparent_hugepage")
S, ROWS = 60, 5  # samples, and those of a shard

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="this system does not tell what a process has mapped")


def write(path: Path, width: int) -> Path:
    """S samples of about 4 * width^2 bytes."""
    layout = layout_of(nn.Linear(width, width))
    writer = BankWriter(path, layout=layout, config={}, shard_rows=ROWS)
    for start in range(0, S, ROWS):
        index = torch.arange(start, start + ROWS)
        flat = index.float().view(ROWS, 1).expand(ROWS, layout.num_values)
        writer.append(make_block(layout.unflatten(flat), chain=index * 0, draw=index))
    writer.close()
    return path


def mapped(path: Path) -> tuple[int, list[str]]:
    """Bytes that the process has of a bank's shards, and the flags of each map of one."""
    num_bytes, flags = 0, []
    for place, text in re.findall(r"^[0-9a-f]+-.*?(/.*)?\n((?:[A-Z].*\n)+)", MAPS.read_text(), re.MULTILINE):
        if place.startswith(str(path)):
            num_bytes += 1024 * int(re.findall(r"Rss: +(\d+) kB", text)[0])
            flags.append(re.findall(r"VmFlags: (.*)", text)[0])
    return num_bytes, flags


def read_at_random(bank: Bank) -> None:
    order = [*range(S)] * 2
    random.Random(0).shuffle(order)
    for index in order:
        assert float(bank[index]["weight"].sum()) == pytest.approx(index * bank.layout.entries[0].numel)


@pytest.mark.parametrize("width", [300, 600])  # samples below and above a megabyte
def test_a_budget_bounds_the_pages_that_are_mapped(tmp_path: Path, width: int) -> None:
    path = write(tmp_path / "bank", width)
    total = S * 4 * width * width  # of the entry that is read
    largest = max(file.stat().st_size for file in path.glob("main-*.safetensors"))
    budget = 3 * largest
    bounded = Bank.open(path, host_budget=budget)
    peak = 0
    for index in torch.randperm(S, generator=torch.Generator().manual_seed(1)).tolist() * 2:
        assert float(bounded[index]["weight"].sum()) == pytest.approx(index * width * width)
        peak = max(peak, mapped(path)[0])
    assert largest < peak <= budget
    bounded.release()
    del bounded
    assert mapped(path)[0] == 0
    free = Bank.open(path, host_budget=2 * total)
    read_at_random(free)
    assert mapped(path)[0] >= total


def test_pages_are_kept_within_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bank", 300)
    largest = max(file.stat().st_size for file in path.glob("main-*.safetensors"))
    bank = Bank.open(path)
    read_at_random(bank)
    assert mapped(path)[0] >= S * 4 * 300 * 300  # all of a small bank
    monkeypatch.setattr(reader, "RESIDENT_BYTES", 2 * largest)
    read_at_random(bank)
    assert mapped(path)[0] <= 3 * largest


@pytest.mark.skipif(not HUGE.exists(), reason="this system has no huge pages")
@pytest.mark.parametrize(("width", "is_large"), [(300, False), (600, True)])
def test_large_samples_are_read_in_huge_pages(tmp_path: Path, width: int, is_large: bool) -> None:
    path = write(tmp_path / "bank", width)
    bank = Bank.open(path)
    assert float(bank[7]["bias"][0]) == 7.0
    (flags,) = mapped(path)[1]
    assert ("hg" in flags.split()) == is_large
