"""Random predictions and targets, shared by the tests of metrics."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnn.seeding import generator

SIZES = [(1, 5, 3), (2, 6, 4), (3, 4, 2), (7, 5, 6), (9, 2, 3)]  # S, B, C: no two alike
cases = given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31))
profile = settings(max_examples=20, deadline=None, derandomize=True)


def close(actual: Tensor, expected: object, atol: float = 1e-12, rtol: float = 0.0) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=rtol, atol=atol)


def random_classes(size: tuple[int, int, int], seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Log probabilities [S, B, C] and targets [B]."""
    logits = spread * torch.randn(size, generator=generator(seed, "logits"), dtype=torch.float64)
    return logits.log_softmax(dim=-1), torch.randint(size[2], size[1:2], generator=generator(seed, "y"))


def random_mixture(size: tuple[int, int, int], seed: int, weighted: bool = True) -> tuple[Tensor, ...]:
    """means [S, B, C], scales [S, 1, 1], y [B, C], normalised log weights [S]."""
    source = generator(seed, "mixture")
    means = 3 * torch.randn(size, generator=source, dtype=torch.float64)
    scales = 0.2 + torch.rand(size[0], 1, 1, generator=source, dtype=torch.float64)
    y = 3 * torch.randn(size[1:], generator=source, dtype=torch.float64)
    log_weight = torch.randn(size[0], generator=source, dtype=torch.float64) * weighted
    return means, scales, y, log_weight.log_softmax(dim=0)


def random_errors(rows: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    """An uncertainty [N], of few values where `ties`, and 0 / 1 errors [N] that it tells something of."""
    source = generator(seed, "errors")
    uncertainty = torch.rand(rows, generator=source, dtype=torch.float64)
    wrong = torch.rand(rows, generator=source, dtype=torch.float64) < 0.1 + 0.6 * uncertainty
    return ((8 * uncertainty).round() / 8 if ties else uncertainty), wrong
