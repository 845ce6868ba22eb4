"""One contract for every kind of bank: the same rows, bit for bit, as the ordinary bank, by whatever way they are asked.

A new kind is a row in `KINDS`: a function that makes a bank of it in a folder, and the ordinary bank that it must equal.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_faults import without_syncs
from torch import Tensor

from bnn.bank import Bank, BankWriter
from bnn.layout import Entry, Layout
from bnn.reduction import cast
from bnn.types import Block, Params, make_block

LAYOUT = Layout(
    (
        Entry("first.weight", (5, 3), torch.float32),
        Entry("first.bias", (5,), torch.float64),
        Entry("half", (7,), torch.bfloat16),
        Entry("@likelihood.scale", (), torch.float32),
    )
)
S, SHARD_ROWS = 23, 4
COLUMNS = ("energy",)
SHARD_BYTES = 8192  # of a file of four such rows, in whole pages


def block_of(first: int, size: int) -> Block:
    source = torch.Generator().manual_seed(first)
    return make_block(
        {e.name: torch.randn(size, *e.shape, generator=source).to(e.dtype) for e in LAYOUT.entries},
        chain=torch.arange(first, first + size) % 3,
        draw=torch.arange(first, first + size) // 3,
        log_joint=torch.randn(size, generator=source).double(),
        log_weight=torch.randn(size, generator=source).double(),
        columns={"energy": torch.randn(size, generator=source).double()},
    )


def write(folder: Path, *, writers: tuple[str, ...] = ("main",)) -> Path:
    """S rows in shards of four, the last of three, by one writer or several."""
    path, first = folder / "bank", 0
    for number, name in enumerate(writers):
        size = S // len(writers) if number + 1 < len(writers) else S - first
        writer = BankWriter(
            path, layout=LAYOUT, config={"columns": list(COLUMNS), "likelihood": {"name": "Gaussian"}},
            base={"buffer": torch.arange(3.0)}, writer=name, shard_rows=SHARD_ROWS,
        )  # fmt: skip
        writer.append(block_of(first, size))
        writer.close()
        first += size
    return path


def opened(**options: Any) -> Callable[[Path], tuple[Bank, Bank]]:
    def make(folder: Path) -> tuple[Bank, Bank]:
        path = write(folder)
        return Bank.open(path, **options), Bank.open(path)

    return make


def by_two_writers(**options: Any) -> Callable[[Path], tuple[Bank, Bank]]:
    def make(folder: Path) -> tuple[Bank, Bank]:
        path = write(folder, writers=("a", "b"))
        return Bank.open(path, **options), Bank.open(path)

    return make


def in_memory(folder: Path) -> tuple[Bank, Bank]:
    ordinary = Bank.open(write(folder))
    whole = ordinary.block(slice(None))
    return Bank.from_blocks([whole], layout=LAYOUT, info=ordinary.info, base=ordinary.base()), ordinary


def coded(**options: Any) -> Callable[[Path], tuple[Bank, Bank]]:
    def make(folder: Path) -> tuple[Bank, Bank]:
        path = folder / "coded"
        cast(Bank.open(write(folder)), path, codec="int8")
        return Bank.open(path, **options), Bank.open(path)

    return make


def at_an_address(maker: Callable[[Path], tuple[Bank, Bank]], **options: Any) -> Callable[[Path], tuple[Bank, Bank]]:
    """A bank of some kind whose files stand in fsspec's memory, and come when they are touched."""

    def make(folder: Path) -> tuple[Bank, Bank]:
        fsspec = pytest.importorskip("fsspec", reason="fsspec (extra 'remote') is not installed")
        _, ordinary = maker(folder)
        assert ordinary.path is not None
        there = fsspec.filesystem("memory")
        for path in ordinary.path.iterdir():
            there.pipe_file(f"/kinds{folder}/{path.name}", path.read_bytes())
        return Bank.open(f"memory://kinds{folder}", cache=folder / "cache", **options), ordinary

    return make


needs_cuda = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

KINDS = {
    "mapped": opened(),
    "mapped, two writers": by_two_writers(),
    "mapped, two shards": opened(host_budget=2 * SHARD_BYTES),
    "in memory": in_memory,
    "host": opened(residency="host"),
    "host, two writers": by_two_writers(residency="host", host_budget="1MB", verify="never"),
    "device": opened(residency="device", device="cpu"),
    "streamed, two buffers": opened(residency="streamed", host_budget=2 * SHARD_BYTES),
    "streamed, three buffers": opened(residency="streamed", host_budget=3 * SHARD_BYTES, verify="full"),
    "streamed, five buffers, two writers": by_two_writers(residency="streamed", host_budget=5 * SHARD_BYTES),
    "streamed, all": opened(residency="streamed", device="cpu", host_budget="1GB", verify="never"),
    "coded": coded(),
    "coded, host": coded(residency="host"),
    "coded, device": coded(residency="device", device="cpu"),
    "coded, streamed": coded(residency="streamed", host_budget="1MB"),
    "at an address": at_an_address(opened()),
    "at an address, two writers": at_an_address(by_two_writers(), verify="full"),
    "at an address, streamed": at_an_address(opened(), residency="streamed", host_budget=3 * SHARD_BYTES),
    "at an address, coded": at_an_address(coded(), prefetch=True),
    "device, CUDA": pytest.param(opened(residency="device"), marks=needs_cuda),
    "streamed, CUDA": pytest.param(
        opened(residency="streamed", device="cuda", device_budget=3 * SHARD_BYTES), marks=needs_cuda
    ),
}

Pair = tuple[Bank, Bank]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Syncs do nothing: they are most of the time that a small bank takes."""
    with without_syncs():
        yield


@pytest.fixture(params=[pytest.param(k, marks=v.marks) if hasattr(v, "marks") else k for k, v in KINDS.items()])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A bank of each kind, and the ordinary one."""
    maker: Any = KINDS[request.param]
    bank, ordinary = (maker.values[0] if hasattr(maker, "values") else maker)(tmp_path)
    yield bank, ordinary
    bank.release()


def same(one: Tensor, other: Tensor) -> bool:
    """Dtype, shape and every bit."""
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and bool((bits(one) == bits(other)).all())


def bits(tensor: Tensor) -> Tensor:
    own = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return own.reshape(-1).view(torch.uint8)


def same_params(found: Params, expected: Params) -> bool:
    return list(found) == list(expected) and all(same(found[name], expected[name]) for name in expected)


def same_blocks(found: Block, expected: Block) -> bool:
    columns = zip(found[1:5], expected[1:5], strict=True)
    return (
        same_params(found.params, expected.params)
        and all(same(one, other) for one, other in columns)
        and same_params(found.columns, expected.columns)
    )


def test_each_sample_is_that_of_the_ordinary_bank(pair: Pair) -> None:
    bank, ordinary = pair
    assert len(bank) == len(ordinary) == S
    for index in [*range(S), *range(-S, 0), 22, 0, 11, 11, 3, np.int64(7)]:
        assert same_params(bank[index], ordinary[int(index)]), index


def test_rows_that_were_handed_out_stay_as_they_are(pair: Pair) -> None:
    """All at once, in an order that goes through every shard again and again, and blocks of them."""
    bank, ordinary = pair
    order = [(7 * step) % S for step in range(3 * S)]
    kept = [bank[index] for index in order]
    blocks = [bank.block(slice(first, first + 2)) for first in range(0, S - 1, 2)]
    assert all(same_params(params, ordinary[index]) for index, params in zip(order, kept, strict=True))
    for place, block in enumerate(blocks):
        assert same_blocks(block, ordinary.block(slice(2 * place, 2 * place + 2)))


@pytest.mark.parametrize(
    "chosen",
    [
        slice(None), slice(0, 4), slice(5, 7), slice(3, 18), slice(None, None, 5), slice(1, 4, 2), slice(20, None),
        slice(None, None, -1), slice(9, 3, -2), slice(6, 6), slice(-3, None),
        [0], [22, 0, 13, 13], [4, 5, 6], [1, 3], [3, 1], [-1, -23], [], range(2, 21, 6),
        torch.tensor([9, 10, 2]), np.array([8, 8, 1]),
    ],
    ids=str,
)  # fmt: skip
def test_blocks_are_those_of_the_ordinary_bank(pair: Pair, chosen: Any) -> None:
    bank, ordinary = pair
    assert same_blocks(bank.block(chosen), ordinary.block(chosen))


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_passes_are_those_of_the_ordinary_bank(pair: Pair, size: int) -> None:
    """Blocks of a pass hold every row once, in order, whatever the shards are."""
    bank, ordinary = pair
    seen = 0
    for _ in range(2):
        for first, block in bank.blocks(size):
            assert block.num_samples <= size
            assert first == seen % S
            assert same_blocks(block, ordinary.block(slice(first, first + block.num_samples)))
            seen += block.num_samples
    assert seen == 2 * S
    assert sum(bank.shard_rows) == S


def test_columns_layout_info_and_base_are_those_of_the_ordinary_bank(pair: Pair) -> None:
    bank, ordinary = pair
    for name in ("chain", "draw", "log_joint", "log_weight"):
        assert same(getattr(bank, name), getattr(ordinary, name)), name
        assert getattr(bank, name).device.type == "cpu"
    assert same_params(bank.columns, ordinary.columns)
    assert bank.layout == ordinary.layout
    assert bank.info == ordinary.info
    assert same_params(bank.base(), ordinary.base())
    assert bank.check_headers() == bank.check_values() == []
    assert same_params(bank[5], ordinary[5])  # also after what was checked was given back


def test_digest_names_the_samples_and_travels(pair: Pair) -> None:
    """A pickle is the same bank in another place; of a bank on disk it holds no rows."""
    bank, ordinary = pair
    same_params(bank[1], ordinary[1])
    sent = pickle.dumps(bank)
    again = pickle.loads(sent)
    assert again.digest == bank.digest
    assert again.residency == bank.residency
    if bank.path is not None:
        assert bank.digest == ordinary.digest
        assert len(sent) < 2000
    assert same_blocks(again.block([22, 3, 9]), ordinary.block([22, 3, 9]))
    assert same_params(bank[2], ordinary[2])  # and the one that was sent is as it was
    again.release()


def test_what_is_outside_is_refused(pair: Pair) -> None:
    bank, _ = pair
    for index in (S, -S - 1):
        with pytest.raises(IndexError, match=f"bank index {index}: want 0 <= index < {S}"):
            bank[index]
        with pytest.raises(IndexError, match=f"want 0 <= index < {S}"):
            bank.block([0, index])
        with pytest.raises(IndexError):
            bank.block([index])


def test_following_changes_no_value(pair: Pair) -> None:
    """Neither an order that is kept to, nor one that is not, nor none."""
    bank, ordinary = pair
    source = np.random.default_rng(0)
    for kept in (True, False):
        order = source.integers(0, S, 60)
        bank.follow(order, window=7)
        asked = order if kept else source.integers(0, S, 60)
        for index in asked.tolist():
            assert same_params(bank[index], ordinary[index])
    bank.follow(None)
    assert same_params(bank[4], ordinary[4])


def test_release_gives_everything_back_and_takes_it_again(pair: Pair) -> None:
    bank, ordinary = pair
    held = bank[3]
    bank.release()
    bank.release()
    assert same_params(held, ordinary[3])
    assert same_blocks(bank.block(slice(2, 20)), ordinary.block(slice(2, 20)))
    assert same_params(held, ordinary[3])


def test_a_sequence_as_python_knows_them(pair: Pair) -> None:
    bank, ordinary = pair
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(same_params(one, other) for one, other in zip(bank, ordinary, strict=True))
    assert repr(bank).startswith("Bank(")
    assert repr(bank).endswith(f"{S} samples of {5 * 3 + 5 + 7 + 1} values)")
