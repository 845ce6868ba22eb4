"""Memory of the machine: blank tensors, of the allocator or in huge pages, are plain tensors."""

from __future__ import annotations

import pickle

import pytest
import torch

from bnn import machine


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
