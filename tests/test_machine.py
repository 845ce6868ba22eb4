"""Memory of the machine: blank tensors, of the allocator or in huge pages, are plain tensors."""

from __future__ import annotations

import pickle
import platform
import subprocess
import sys

import pytest
import torch

from bnn import machine

PAGES = """
import ctypes, resource, sys, torch
from bnn.machine import keep_freed

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: a fault is 4 KiB
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for size in range(1, 25):  # MiB: each is larger than what was freed before, and so asked of the system anew by rule
    torch.ones(size * 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fresh", [2**25, 64], ids=["of the allocator", "in huge pages"])
def test_blank_tensors(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, fresh: int) -> None:
    monkeypatch.setattr(machine, "FRESH", fresh)
    wanted = torch.arange(3 * 7 * 5).reshape(3, 7, 5).to(dtype)
    first, second = machine.blank((3, 7, 5), dtype), machine.blank(wanted.shape, dtype)
    second.zero_()
    first.copy_(wanted)
    assert (first.dtype, first.shape, first.is_contiguous()) == (dtype, wanted.shape, True)
    assert first.data_ptr() % 64 == 0  # as torch's own: what products of matrices round to hangs on it
    assert torch.equal(first, wanted)
    assert not second.any()
    part = first[1]
    del first
    assert torch.equal(part, wanted[1])
    assert torch.equal(pickle.loads(pickle.dumps(part)), wanted[1])
    assert machine.blank((0, 7), dtype).shape == (0, 7)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's, whose rule this is")
def test_memory_that_was_freed_is_used_again() -> None:
    plain, kept = (
        int(subprocess.check_output([sys.executable, "-c", PAGES, word], text=True, timeout=120))
        for word in ("plain", "kept")
    )
    assert plain > 256 * 290  # pages: of all 300 MiB
    assert kept < plain / 2  # of the largest, and once or twice more, by what lies behind them in the heap
