"""Samples of a bank wherever it is: mapped, in memory and streamed, beside a memory map and bare reads of the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from bnn.bank import Bank

PIECE = 4 * 2**20  # of a bare read
SHARDS = 16  # of the bank that is streamed; a quarter of them fit its budget


class Work(NamedTuple):
    """The same samples handled by us and by a rival; each returns how many."""

    ours: str
    rival: str
    run: Callable[[], int]
    rival_run: Callable[[], int]


def works(bank: Bank, folder: Path, order: Sequence[int]) -> Iterator[Work]:
    """What is to be timed.

    Args:
        bank: on disk.
        folder: to write other forms of the bank to.
        order: of the samples that are read at random.
    """
    import numpy as np
    import torch

    from bnn.bank import Bank, compact

    assert bank.path is not None
    flat = bank.layout.flatten(bank.block(slice(None)).params)
    np.save(folder / "rows.npy", flat.numpy())
    matrix = np.asarray(np.load(folder / "rows.npy", mmap_mode="c"))
    shapes = [(entry.name, entry.shape, entry.numel) for entry in bank.layout.entries]

    def touch(params: dict[str, Tensor]) -> float:
        return sum(float(tensor.sum()) for tensor in params.values())

    def by_map(index: int) -> dict[str, Tensor]:
        row, found, begin = torch.from_numpy(matrix[index]), {}, 0
        for name, shape, size in shapes:
            found[name] = row[begin : begin + size].view(shape)
            begin += size
        return found

    def through(get: Callable[[int], dict[str, Tensor]]) -> Callable[[], int]:
        def run() -> int:
            for index in order:
                touch(get(index))
            return len(order)

        return run

    wrong = [name for name, value in by_map(order[0]).items() if not torch.equal(bank[order[0]][name], value)]
    if wrong:
        raise RuntimeError(f"bench: the two ways gave different results for '{wrong[0]}'")
    for name, form in (("mapped", Bank.open(bank.path)), ("in memory", Bank.open(bank.path, residency="host"))):
        yield Work(f"bank[i], {name}", "NumPy memmap", through(form.__getitem__), through(by_map))
    total = sum(file.stat().st_size for file in bank.path.glob("*.safetensors"))
    small = compact(bank, folder / "small", shard_bytes=total // SHARDS + 16_384)
    yield _streaming(small)


def _streaming(bank: Bank) -> Work:
    """A pass from first to last through a quarter of the bank's bytes, against reads of its files and nothing else."""
    from bnn.bank import Bank

    assert bank.path is not None
    files = sorted(bank.path.glob("main-*.safetensors"))
    budget = sum(file.stat().st_size for file in files) // 4 + 2 * max(file.stat().st_size for file in files)
    streamed = Bank.open(bank.path, residency="streamed", host_budget=budget)
    buffer = bytearray(PIECE)

    def ours() -> int:
        return sum(block.num_samples for _, block in streamed.blocks(64))

    def bare() -> int:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            while os.readv(descriptor, [buffer]):
                pass
            os.close(descriptor)
        return len(bank)

    return Work("a pass, streamed", "bare reads", ours, bare)
