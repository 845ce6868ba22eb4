"""Logits as log probabilities: torch's own, however few the classes."""

from __future__ import annotations

import pytest
import torch

from bnn.softmax import FEW, log_softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (7, 2), (5, 33, 10), (4, FEW - 1), (4, FEW), (3, 0, 5), (1, 6, 1)])
def test_values_and_slopes_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(shape, generator=source, dtype=dtype)
    weights = torch.randn(shape, generator=source, dtype=dtype)
    logits.requires_grad_()
    found, wanted = log_softmax(logits), logits.log_softmax(dim=-1)
    torch.testing.assert_close(found, wanted)
    slopes = [torch.autograd.grad((each * weights).sum(), logits)[0] for each in (found, wanted)]
    torch.testing.assert_close(*slopes)


def test_logits_far_apart_lose_nothing() -> None:
    logits = torch.tensor([[1000.0, -1000.0], [-torch.inf, 3.0]])
    assert torch.equal(log_softmax(logits), torch.tensor([[0.0, -2000.0], [-torch.inf, 0.0]]))


def test_chains_beside_each_other_find_what_each_finds_alone() -> None:
    logits = torch.randn(5, 67, 10, generator=torch.Generator().manual_seed(1))
    together = torch.func.vmap(log_softmax)(logits)
    assert torch.equal(together, torch.stack([log_softmax(each) for each in logits]))
