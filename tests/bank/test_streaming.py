"""A bank through a budget: never a hang, never another row's bytes, what is wanted soonest kept, nothing left behind."""

from __future__ import annotations

import errno
import faulthandler
import gc
import hashlib
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bank.test_kinds import SHARD_BYTES, S, bits, block_of, quick, same_blocks, same_params, write
from memory import PEAK
from torch import nn

import bnn
from bnn.bank import Bank, BankWriter, disk, streaming
from bnn.bank.foresight import Plan
from bnn.bank.residency import Placement, num_bytes
from bnn.beside import num_running
from bnn.errors import BankCorrupt, BankError, BankLimit, BankMismatch, ConfigError
from bnn.layout import layout_of
from bnn.likelihoods import Categorical
from bnn.types import make_block

__all__ = ["quick"]  # the fixture, which holds for these tests too
SHARDS = 6  # of the bank of `write`


def stream(path: Path, buffers: int, **options: Any) -> Bank:
    return Bank.open(path, residency="streamed", host_budget=buffers * SHARD_BYTES, **options)


def ring_of(bank: Bank) -> streaming.Ring:
    assert bank._stream is not None
    return bank._stream.ring


def within(seconds: float, run: Callable[[], Any]) -> Any:
    """What `run` gives, or a failure with the stacks of all threads where it has not come back in time."""
    found: list[Any] = []

    def kept() -> None:
        try:
            found.append(run())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=kept, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
        pytest.fail(f"it hangs: nothing in {seconds} s")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what threads do on their own."""
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def readers() -> int:
    gc.collect()  # those of banks that nobody has any more
    return num_running()


# What is asked for


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7), ("7", 7), ("7B", 7), ("2kB", 2000), ("2KB", 2000), ("2KiB", 2048), ("1.5 MB", 1_500_000), ("3GB", 3 * 10**9),
        ("3GiB", 3 * 2**30), ("1T", 10**12),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: int | str, size: int) -> None:
    assert num_bytes("host_budget", text) == size


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "GB", "2 TBs", "-3MB", "0", None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ConfigError, match="host_budget: want a number of bytes"):
        num_bytes("host_budget", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"residency": "cloud"}, "one of mapped, host, device, streamed"),
        ({"residency": "streamed"}, "want a host_budget, got none"),
        ({"device_budget": "1GB"}, "residency='mapped': want no device_budget"),
        ({"residency": "host", "device_budget": 5}, "want no device_budget"),
        ({"residency": "host", "device": "cpu"}, "want no device"),
        ({"residency": "device", "device": "cpu", "host_budget": 5}, "want no host_budget"),
        ({"residency": "streamed", "host_budget": "1GB", "device_budget": "1GB"}, "want no device_budget"),
        ({"residency": "streamed", "host_budget": "much"}, "want a number of bytes"),
        ({"residency": "device", "device": "cuda:99"}, "device: want cpu"),
        ({"residency": "device", "device": "xpu"}, "device: want cpu"),
        ({"residency": "device", "device": "gpu"}, "a device of torch"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, options: Any, message: str) -> None:
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Bank.open(path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    for options in ({"residency": "device"}, {"residency": "streamed", "device": "cuda", "device_budget": "1GB"}):
        with pytest.raises(ConfigError, match="want cpu, got cuda"):
            Bank.open(path, **options)  # type: ignore[arg-type]


def test_a_budget_below_two_shards_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    path, before = write(tmp_path), readers()
    largest = max(file.stat().st_size for file in path.glob("main-*.safetensors"))
    size = -(-largest // 4096) * 4096
    with pytest.raises(
        BankLimit, match=rf"at least {2 * size} bytes, for 2 shards.*got {2 * size - 1}; .*bank compact"
    ):
        Bank.open(path, residency="streamed", host_budget=2 * size - 1)
    assert len(Bank.open(path, residency="streamed", host_budget=2 * size)) == S
    with pytest.raises(BankLimit, match=r"for the whole bank.*residency='streamed'"):
        Bank.open(path, residency="host", host_budget=4 * size)
    with pytest.raises(
        BankLimit,
        match=rf"host_budget of at least {largest} bytes, for the largest of its shards, {largest} bytes, got {largest - 1}; raise it",
    ):
        Bank.open(path, host_budget=largest - 1)
    assert len(Bank.open(path, host_budget=largest)) == S
    with pytest.raises(BankLimit, match="device_budget of at least"):
        Bank.open(path, residency="device", device="cpu", device_budget="1kB")
    assert readers() == before  # and nothing was begun for it


def test_an_empty_bank_streams(tmp_path: Path) -> None:
    writer = BankWriter(tmp_path / "bank", layout=layout_of(nn.Linear(3, 2)), config={})
    writer.append(
        make_block(
            {"weight": torch.zeros(0, 2, 3), "bias": torch.zeros(0, 2)}, chain=torch.zeros(0), draw=torch.zeros(0)
        )
    )
    writer.close()
    for options in ({"residency": "streamed", "host_budget": 1}, {"residency": "host"}):
        bank = Bank.open(tmp_path / "bank", **options)  # type: ignore[arg-type]
        assert len(bank) == 0
        assert bank.chain.shape == (0,)
        assert list(bank.blocks(5)) == []


def test_one_shard_takes_one_buffer(tmp_path: Path) -> None:
    writer = BankWriter(tmp_path / "bank", layout=layout_of(nn.Linear(3, 2)), config={})
    writer.append(
        make_block(
            {"weight": torch.ones(5, 2, 3), "bias": torch.zeros(5, 2)}, chain=torch.zeros(5), draw=torch.arange(5)
        )
    )
    writer.close()
    bank = Bank.open(tmp_path / "bank", residency="streamed", host_budget=8192)
    kept = [bank[index] for index in (4, 0, 2)]
    assert all(float(params["weight"].sum()) == 6 for params in kept)
    assert len(ring_of(bank).states) == 1
    bank.release()


# Never a hang, never another row's bytes


def trouble(seed: int, *, slow: float, failing: float) -> Callable[[int, memoryview, int], int]:
    """Reads of the disk of which some take long, some give few bytes, and some fail."""
    source, lock, real = np.random.default_rng(seed), threading.Lock(), disk.read_at

    def read_at(descriptor: int, view: memoryview, offset: int) -> int:
        with lock:
            chance, length = source.random(3), int(source.integers(1, max(len(view), 2)))
        if chance[0] < slow:
            time.sleep(0.003 * chance[0] / slow)
        if chance[1] < failing:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, view[:length] if chance[2] < 0.2 else view, offset)

    return read_at


def wander(bank: Bank, ordinary: Bank, seed: int, steps: int) -> int:
    """Ask for things at random, keep some, and compare all; how many times the disk refused."""
    source, kept, refused = np.random.default_rng(seed), [], 0
    for _ in range(steps):
        what = source.integers(0, 7)
        try:
            if what <= 2:
                index = int(source.integers(-S, S))
                kept.append((bank[index], ordinary[index]))
            elif what == 3:
                first, length = source.integers(0, S, 2)
                chosen = slice(int(first), int(first + length), int(source.integers(1, 4)))
                assert same_blocks(bank.block(chosen), ordinary.block(chosen))
            elif what == 4:
                rows = source.integers(0, S, int(source.integers(0, 9)))
                assert same_blocks(bank.block(rows), ordinary.block(rows))
            elif what == 5:
                for first, block in bank.blocks(int(source.integers(1, 7))):
                    assert same_blocks(block, ordinary.block(slice(first, first + block.num_samples)))
            else:
                order = None if source.random() < 0.3 else source.integers(0, S, int(source.integers(0, 40)))
                bank.follow(order, window=int(source.integers(1, 50)))
                for index in () if order is None else order[: int(source.integers(0, 40))].tolist():
                    assert same_params(bank[index], ordinary[index])
        except BankError as error:
            if "Input/output error" not in str(error):
                raise
            refused += 1
        if source.random() < 0.1:
            kept = kept[-int(source.integers(0, 12)) :]
        if source.random() < 0.02:
            bank.release()
    assert all(same_params(found, expected) for found, expected in kept)
    return refused


@pytest.mark.parametrize("buffers", [2, 3, 4, 5, 6, 50])
def test_no_hang_at_any_budget_on_a_slow_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, buffers)
    list(ordinary.blocks(4))
    monkeypatch.setattr(disk, "read_at", trouble(buffers, slow=0.1, failing=0.02))
    refused = within(120, lambda: wander(bank, ordinary, seed=buffers, steps=250))
    assert refused > 0  # a test of faults without any would say nothing
    assert len(ring_of(bank).states) == min(buffers, SHARDS)
    within(20, bank.release)


@pytest.mark.parametrize("buffers", [2, 3, 5])
def test_no_hang_with_several_threads_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int) -> None:
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, buffers)
    list(ordinary.blocks(4))
    monkeypatch.setattr(disk, "read_at", trouble(buffers, slow=0.05, failing=0.01))
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            wander(bank, ordinary, seed, 60)
        except BaseException as error:
            errors.append(error)

    def together() -> None:
        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    within(120, together)
    assert errors == []
    within(20, bank.release)


def test_rows_that_are_kept_are_never_written_over(tmp_path: Path) -> None:
    """Views keep their buffers, and beyond what the ring can spare rows are copies: their memory is all different."""
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, 4)
    kept = [bank.block(slice(first, first + 1)) for first in range(0, S, 4)]
    bufs = [block.params["first.weight"].untyped_storage().data_ptr() for block in kept]
    assert len(set(bufs)) == SHARDS
    assert ring_of(bank).states.count("in use") <= 3  # two that are lent, and the one asked for last
    for _ in range(3):
        for _, block in bank.blocks(4):
            block.params["half"].sum()
    for place, block in enumerate(kept):
        assert same_blocks(block, ordinary.block(slice(4 * place, 4 * place + 1)))
    del kept, block
    bank[0]
    assert bank[0]["half"].untyped_storage().nbytes() == SHARD_BYTES  # a view again, once they are let go
    bank.release()


def test_whoever_holds_all_buffers_gets_the_next_shard_all_the_same(tmp_path: Path) -> None:
    """Not by way of a bank, which hands out copies before that: the memory is left to whoever holds it."""
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, 2)
    ring = ring_of(bank)
    held = [dict(ring.tensors(shard)) for shard in range(SHARDS)]
    for shard, tensors in enumerate(held):
        assert same_params(
            {"half": tensors["half"]}, {"half": ordinary.block(slice(4 * shard, 4 * shard + 4)).params["half"]}
        )
    bank.release()


def test_a_view_alone_keeps_its_buffer(tmp_path: Path) -> None:
    """Of a row whose dictionary is gone one entry is left, of that a slice, of that what autograd keeps."""
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, 4)
    leaf = torch.ones(3, requires_grad=True)
    product = bank[9]["first.weight"][1:3] @ leaf
    for index in range(S):
        bank[index]
    product.sum().backward()
    assert torch.equal(leaf.grad, ordinary[9]["first.weight"][1:3].sum(dim=0))
    bank.release()


# What the disk says


def test_a_shard_that_fails_raises_where_it_is_asked_for_and_only_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    ordinary, bank = Bank.open(path), stream(path, 4)
    real, bad = disk.read_at, {"main-000002.safetensors"}

    def read_at(descriptor: int, view: memoryview, offset: int) -> int:
        if os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) in bad:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, view, offset)

    monkeypatch.setattr(disk, "read_at", read_at)
    order = list(range(S))
    bank.follow(order)  # reads it ahead, and says nothing yet
    for index in order:
        if index // 4 == 2:
            with pytest.raises(BankCorrupt, match=r"main-000002\.safetensors.*Input/output error"):
                bank[index]
        else:
            assert same_params(bank[index], ordinary[index])
    bad.clear()
    assert same_params(bank[9], ordinary[9])  # asked once more, it is tried again
    bank.release()


@pytest.mark.parametrize("residency", ["host", "device", "streamed"])
def test_altered_bytes_are_found_when_they_are_first_read(tmp_path: Path, residency: Any) -> None:
    path = write(tmp_path)
    file = path / "main-000003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-20] ^= 1
    file.write_bytes(raw)
    options: dict[str, Any] = {"streamed": {"host_budget": 3 * SHARD_BYTES}, "device": {"device": "cpu"}, "host": {}}[
        residency
    ]
    Bank.open(path, verify="never", residency=residency, **options)[13]
    with pytest.raises(BankCorrupt, match=r"main-000003\.safetensors: want tensor '.*' with the crc32 of the manifest"):
        Bank.open(path, residency=residency, **options)[13]
    with pytest.raises(BankCorrupt, match="main-000003"):
        Bank.open(path, verify="full", residency=residency, **options)
    with pytest.raises(BankCorrupt, match=r"crc32 of the manifest"):
        _ = Bank.open(path, residency=residency, **options).columns


def test_checksums_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    bank, seen = stream(path, 2), []
    from bnn.bank import reading

    real = reading.zlib.crc32
    monkeypatch.setattr(reading.zlib, "crc32", lambda data, *more: (seen.append(len(data)), real(data, *more))[1])
    for _ in range(3):
        for _, block in bank.blocks(4):
            block.params["half"].sum()
    assert len(seen) == SHARDS * (4 + 5 + 1)  # entries, columns and the header of each
    assert ring_of(bank).num_reads > SHARDS
    bank.release()


def test_another_bank_in_the_same_folder_is_not_read_for_it(tmp_path: Path) -> None:
    path = write(tmp_path)
    bank = stream(path, 2)
    bank[0]
    writer = BankWriter(
        path, layout=bank.layout, config={"columns": ["energy"], "seed": 9}, overwrite=True, shard_rows=4
    )
    writer.append(block_of(50, S))
    writer.close()
    bank.release()
    with pytest.raises((BankMismatch, BankCorrupt)):
        bank[22]
    bank.release()


def test_a_shard_put_back_is_checked_anew(tmp_path: Path) -> None:
    """The same bytes in another file are the same shard; others are not."""
    path = write(tmp_path)
    bank, ordinary = stream(path, 2), Bank.open(path)
    expected = {name: tensor.clone() for name, tensor in ordinary[1].items()}
    bank[1], bank[22], bank[10]
    file = path / "main-000000.safetensors"
    raw = bytearray(file.read_bytes())
    file.unlink()
    file.write_bytes(raw)
    assert same_params(bank[1], expected)
    bank[22], bank[10]
    raw[-20] ^= 1
    file.unlink()
    file.write_bytes(raw)
    with pytest.raises(BankCorrupt, match="crc32"):
        bank[1]
    bank.release()


# What is wanted next


def belady(wanted: list[int], buffers: int) -> int:
    """Fewest reads of shards for a sequence, by looking through all of what follows at every miss."""
    here: set[int] = set()
    reads = 0
    for place, shard in enumerate(wanted):
        if shard in here:
            continue
        reads += 1
        if len(here) == buffers:
            later = wanted[place + 1 :]
            here.remove(max(here, key=lambda other: later.index(other) if other in later else math.inf))
        here.add(shard)
    return reads


@pytest.mark.parametrize("buffers", [2, 3, 4, 5])
def test_the_shard_wanted_last_is_the_one_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffers: int
) -> None:
    path, order = write(tmp_path), np.random.default_rng(buffers).integers(0, S, 300)
    wanted = (order // 4).tolist()
    fewest = belady(wanted, buffers)
    counts = {}
    for ahead in (0, 2):
        monkeypatch.setattr(streaming, "AHEAD", ahead)
        bank = stream(path, buffers)
        bank.follow(order, window=1000)
        for index in order.tolist():
            bank[index]
        counts[ahead] = ring_of(bank).num_reads
        bank.release()
    assert counts[0] == fewest  # one at a time, when it is asked for
    blind = stream(path, buffers)
    for index in order.tolist():
        blind[index]
    assert fewest <= counts[2] < ring_of(blind).num_reads  # read ahead, sooner than Belady would
    blind.release()


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_pass_in_window_order_reads_each_shard_once(tmp_path: Path, window: int) -> None:
    path = write(tmp_path)
    bank, ordinary = stream(path, window + 2), Bank.open(path)
    sampler = bnn.SampleIndexSampler(bank, window=window, seed=3)
    passes = 4
    bank.follow(sampler, window=8)
    for index in sampler.at(range(passes * S)).tolist():
        assert same_params(bank[index], ordinary[index])
    reads = ring_of(bank).num_reads
    stay = (passes - 1) * (window + 2)  # from one pass to the next, at most; and two are ahead in the end
    assert passes * SHARDS - stay <= reads <= passes * SHARDS + 2
    bank.release()


def test_following_begins_where_the_sampler_stands(tmp_path: Path) -> None:
    path = write(tmp_path)
    bank = stream(path, 5)
    sampler = bnn.SampleIndexSampler(bank, strategy="sequential")
    sampler.load_state_dict({**sampler.state_dict(), "position": 17})
    bank.follow(sampler)
    ring = ring_of(bank)
    eventually(lambda: ring.states.count("ready") >= 2)
    assert {4, 5} <= ring._where.keys()  # rows 17 to 22, then those of the next pass
    bank.follow(sampler, start=8)
    eventually(lambda: 2 in ring._where)
    bank.follow([-1, 3])
    eventually(lambda: {5, 0} <= ring._where.keys())
    with pytest.raises(IndexError, match=f"want 0 <= index < {S}"):
        bank.follow([S])
    with pytest.raises(ConfigError, match="window"):
        bank.follow(sampler, window=0)
    bank.release()


def test_a_pass_from_first_to_last_reads_ahead_without_being_told(tmp_path: Path) -> None:
    path = write(tmp_path)
    bank = stream(path, 4)
    ring = ring_of(bank)
    bank[0]
    eventually(lambda: {0, 1, 2} <= ring._where.keys() and "filling" not in ring.states)
    bank[5]
    eventually(lambda: 3 in ring._where)
    bank[21]  # no order in that
    bank[2]
    bank[13]
    eventually(lambda: "filling" not in ring.states)
    reads = ring.num_reads
    time.sleep(0.05)
    assert ring.num_reads == reads
    bank.release()


def test_a_plan_that_is_left_is_given_up(tmp_path: Path) -> None:
    """A reader that goes through the bank in order, though another order was announced, is read ahead again."""
    path = write(tmp_path)
    bank = stream(path, 4)
    bank.follow([0] * 5000)
    for _ in range(4):
        for _, block in bank.blocks(4):
            block.params["half"].sum()
    assert isinstance(ring_of(bank)._plan, streaming.ReadAhead)
    bank.release()


def test_a_plan_knows_when_each_shard_is_wanted_next() -> None:
    source = np.random.default_rng(0)
    order = source.integers(0, 40, 500)
    plan = Plan(iter(np.array_split(order, 9)), lambda indices: indices // 7, 30)
    for place, index in enumerate(order.tolist()):
        known = plan._end
        later = (order[place:known] // 7).tolist()
        for shard in range(6):
            assert plan.next_use(shard) == (later.index(shard) if shard in later else math.inf)
        here = {int(shard) for shard in source.integers(0, 6, 3)}
        missing = [(shard, far) for far, shard in enumerate(later) if shard not in here]
        assert Plan.upcoming(_again(plan), here.__contains__) == (missing[0] if missing else None)
        assert known - place >= min(30, len(order) - place)
        plan.note([index], index // 7)
    assert plan.is_lost


def _again(plan: Plan) -> Plan:
    """The plan as if nothing had been read ahead yet."""
    plan._ahead = 0
    return plan


# What uses it


def net_of(folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    layout = layout_of(module)
    writer = BankWriter(folder / "net", layout=layout, config={"likelihood": Categorical().to_config()}, shard_rows=8)
    flat = torch.randn(61, layout.num_values, generator=torch.Generator().manual_seed(1))
    writer.append(make_block(layout.unflatten(flat), chain=torch.arange(61) % 2, draw=torch.arange(61) // 2))
    writer.close()
    return module, folder / "net"


def test_predicting_and_training_give_what_they_give_of_a_mapped_bank(tmp_path: Path) -> None:
    module, path = net_of(tmp_path)
    x, y = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)), torch.arange(40) % 3
    for options in ({}, {"tolerance": 1e-2}):
        found, expected = (
            bnn.predict(bnn.FunctionalModel(module, bank, strategy="loop"), x, **options)  # type: ignore[arg-type]
            for bank in (Bank.open(path, residency="streamed", host_budget="50kB"), Bank.open(path))
        )
        assert torch.equal(found.probs, expected.probs)
    streamed, mapped = Bank.open(path, residency="streamed", host_budget="60kB"), Bank.open(path)
    outputs = []
    for bank in (streamed, mapped):
        net = bnn.FunctionalModel(module, bank, strategy="loop")
        loader = bnn.PairedLoader((x, y), bnn.SampleIndexSampler(bank, window=2, seed=1), batch_size=7, shuffle=True)
        outputs.append(torch.cat([net(data, index) for _ in range(9) for (data, _), index in loader]))
    assert torch.equal(*outputs)
    ring = ring_of(streamed)
    assert ring.num_reads <= 10  # 54 batches are less than a pass of 61 samples in 8 shards; two are read ahead
    assert isinstance(ring._plan, Plan)
    streamed.release()


def test_several_indices_a_batch_and_one_a_row_are_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = net_of(tmp_path)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    for options in ({"num_indices": 5}, {"per_row": True}, {}):
        bank = Bank.open(path, residency="streamed", host_budget="100kB")
        told: list[int] = []
        monkeypatch.setattr(Bank, "follow", lambda self, order, *, start, told=told: told.append((order, start)))
        sampler = bnn.SampleIndexSampler(bank, seed=4)
        loader = bnn.PairedLoader({"x": x}, sampler, batch_size=6, **options)  # type: ignore[arg-type]
        indices = [torch.as_tensor(index).reshape(-1) for _ in range(2) for _, index in loader]
        each = len(indices[0])
        assert told == [(sampler, 0), (sampler, 4 * each)]
        assert torch.equal(indices[4], sampler.at(range(4 * each, 5 * each)))
        bank.release()


# What is left behind


def test_threads_end_with_their_bank(tmp_path: Path) -> None:
    path, before = write(tmp_path), readers()
    bank = stream(path, 3)
    assert readers() == before  # none before a row is asked for
    row = bank[3]
    assert readers() == before + streaming.THREADS
    bank.release()
    assert readers() == before
    again = bank[3]
    assert all(bool((bits(again[name]) == bits(row[name])).all()) for name in row)
    del bank
    eventually(lambda: readers() == before)
    assert same_params(again, row)  # what was handed out outlives its bank


def test_release_closes_the_files_that_are_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 512)
    path, order = write(tmp_path), [index % S for index in range(0, 3 * S, 7)]

    def opened() -> list[str]:
        places = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [target for target in map(link, places) if target.startswith(str(path))]

    def link(place: str) -> str:
        try:
            return os.readlink(place)
        except FileNotFoundError:  # the descriptor by which the folder was read
            return ""

    for _ in range(40):
        bank = stream(path, 3)
        bank.follow(order)
        bank[0]
        bank.release()
        assert opened() == []


def test_an_order_that_reads_the_bank_is_refused(tmp_path: Path) -> None:
    bank = stream(write(tmp_path), 3)

    class Reading:
        """An order that follows what rows say."""

        position = 0

        def detached(self) -> Reading:
            return self

        def at(self, positions: range) -> torch.Tensor:
            if positions.start > 0:  # not while it is told of
                bank[positions.start % S]
            return torch.tensor([index % S for index in positions])

    def run() -> None:
        bank.follow(Reading(), window=S)
        for index in range(10 * S):
            bank[index % S]

    with pytest.raises(BankError, match="want an order that is known without this bank, got one that reads it"):
        within(60, run)
    assert same_params(bank[3], bank[3])
    bank.release()


def test_no_file_of_the_bank_is_touched(tmp_path: Path) -> None:
    path = write(tmp_path)

    def digests() -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}

    before = digests()
    bank = stream(path, 2)
    wander(bank, Bank.open(path), 1, 60)
    bank.release()
    assert digests() == before


def in_a_fork(path: str) -> list[float]:
    """A bank that is streamed here, asked in a child while its threads are at work here, and again here."""
    bank = Bank._open(Path(path), "first-use", None, Placement("streamed", None, 3 * SHARD_BYTES))
    bank.follow([index % S for index in range(500)])
    here = [float(bank[index]["first.weight"].sum()) for index in range(S)]
    end, other = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads forks
        child = os.fork()
    if child == 0:
        there = [float(bank[index]["first.weight"].sum()) for index in range(S)]
        os.write(other, b"y" if there == here else b"n")
        os._exit(0)
    os.close(other)
    said = os.read(end, 1)
    os.waitpid(child, 0)
    after = [float(bank[index]["first.weight"].sum()) for index in range(S)]
    bank.release()
    return [float(said == b"y"), float(after == here)]


def test_a_fork_reads_by_threads_of_its_own(tmp_path: Path, alone: Callable[..., Any]) -> None:
    assert alone(in_a_fork, str(write(tmp_path))) == [1.0, 1.0]


CTRL_C = """
import signal, sys, torch
from bnn.bank import Bank
signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they start in the background
bank = Bank.open(sys.argv[1], residency="streamed", host_budget=int(sys.argv[2]))
bank.follow([i % len(bank) for i in range(10**6)])
print("ready", flush=True)
i = 0
while True:
    bank[i % len(bank)]["half"].sum()
    i += 1
"""


def test_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    import signal

    with subprocess.Popen(
        [sys.executable, "-c", CTRL_C, str(write(tmp_path)), str(3 * SHARD_BYTES)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        try:
            _, told = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode in (1, 130, -signal.SIGINT)
    assert "KeyboardInterrupt" in told


ENDS = """
import sys, bnn
bank = bnn.Bank.open(sys.argv[1], residency="streamed", host_budget="30MB")
sampler = bnn.SampleIndexSampler(bank, window=4)
bank.follow(sampler)
for index in sampler:
    bank[index]["weight"].sum()
for _ in bank.blocks(7):
    pass
"""


def test_python_ends_while_threads_read(tmp_path: Path) -> None:
    """A thread that is stopped inside of torch takes the process down ("terminate called without an active exception")."""
    layout = layout_of(nn.Linear(300, 300, bias=False))
    writer = BankWriter(tmp_path / "bank", layout=layout, config={}, shard_rows=10)
    for start in range(0, 200, 10):
        flat = torch.ones(10, layout.num_values)
        writer.append(make_block(layout.unflatten(flat), chain=torch.zeros(10), draw=torch.arange(start, start + 10)))
    writer.close()
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path / "bank")], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


EPOCH = (
    PEAK
    + """
import os, sys, torch
from torch import nn
import bnn
from bnn.bank import Bank
from bnn.cli.bench import machine

path, budget = sys.argv[1], int(sys.argv[2])
for name in os.listdir(path):  # what is read comes from the disk
    descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
bank = Bank.open(path, residency="streamed", host_budget=budget)
torch.zeros(10).sum()
before = peak()
sampler = bnn.SampleIndexSampler(bank, window=4)
total, seen = 0.0, 0
for _ in range(2):
    bank.follow(sampler)
    for index in sampler:
        total += float(bank[index]["0.weight"].sum())
    for first, block in bank.blocks(64):
        seen += block.num_samples
print(before, peak(), sum(os.stat(os.path.join(path, n)).st_size for n in os.listdir(path)), seen)
"""
)


@pytest.mark.slow
def test_an_epoch_over_ten_times_the_budget_keeps_to_it(tmp_path: Path) -> None:
    """Half a gigabyte through 48 MB: peak resident memory of a process of its own, against that before the first row."""
    module = nn.Sequential(nn.Linear(310, 310), nn.Tanh(), nn.Linear(310, 11))
    layout = layout_of(module)
    writer = BankWriter(tmp_path / "bank", layout=layout, config={}, shard_rows=20)  # shards of 8 MB
    source = torch.Generator().manual_seed(0)
    for start in range(0, 1300, 20):
        flat = torch.randn(20, layout.num_values, generator=source)
        writer.append(make_block(layout.unflatten(flat), chain=torch.zeros(20), draw=torch.arange(start, start + 20)))
    writer.close()
    budget = 50_000_000
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(tmp_path / "bank"), str(budget)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, peak, total, seen = map(int, done.stdout.split())
    assert total > 10 * budget
    assert seen == 2 * 1300
    assert peak - before < budget + 200_000_000, f"{(peak - before) / 1e6:.0f} MB"
    assert peak - before < budget + 30_000_000, f"{(peak - before) / 1e6:.0f} MB"  # and by far less than is allowed
