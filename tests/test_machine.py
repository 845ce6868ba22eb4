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
import resource, sys, torch
from bnn.machine import keep_freed

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        held = [torch.ones(2**19) for _ in range(8)]  # 16 MiB, or 4,096 pages
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
first = faults(20)
keep_freed()
faults(2)
print(first, faults(20))
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
    done = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, timeout=120, check=True)
    before, after = (int(word) for word in done.stdout.split())
    assert before > 20 * 1024  # pages: most of them handed out anew in each round
    assert after < 1024
