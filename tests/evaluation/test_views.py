"""Views of a bank: sums that become views, runs of draws, beginnings spread over chains, and the jackknife."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation.views import GROUPS, MOST_GROUPS, views_of
from bnn.layout import layout_of
from bnn.seeding import generator
from bnn.types import make_block


def bank_of(chain: Tensor, draw: Tensor, log_weight: Tensor | None = None) -> bnn.Bank:
    module = nn.Linear(1, 1)
    params = {"weight": torch.zeros(len(chain), 1, 1), "bias": torch.zeros(len(chain), 1)}
    block = make_block(params, chain=chain, draw=draw, log_weight=log_weight)
    return bnn.Bank.from_blocks([block], layout=layout_of(module), info={})


def chains(number: int, draws: int, log_weight: Tensor | None = None) -> bnn.Bank:
    """Rows of all chains, draw after draw, as chains that run side by side write them."""
    chain = torch.arange(number).repeat(draws)
    return bank_of(chain, torch.arange(draws).repeat_interleave(number), log_weight)


@pytest.mark.parametrize(("number", "draws"), [(1, 1), (1, 2), (1, 7), (3, 5), (4, 50), (40, 3), (33, 1), (70, 2)])
def test_every_sample_is_in_one_run_of_one_chain(number: int, draws: int) -> None:
    bank = chains(number, draws)
    views = views_of(bank)
    assert sorted(views.group.unique().tolist()) == list(range(views.num_groups))
    assert views.num_groups <= MOST_GROUPS
    assert views.num_groups >= min(GROUPS, number * draws)
    if number <= MOST_GROUPS:
        for group in range(views.num_groups):
            members = (views.group == group).nonzero()[:, 0]
            assert len(bank.chain[members].unique()) == 1
            drawn = bank.draw[members].sort().values
            assert drawn.tolist() == list(range(int(drawn[0]), int(drawn[0]) + len(drawn)))  # in a row


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 21, 64, 100])
def test_beginnings_double_and_lie_evenly(size: int) -> None:
    views = views_of(chains(1, size))
    assert views.sizes[-1] == size
    assert list(views.sizes[:-1]) == [2**k for k in range(len(views.sizes) - 1)]
    for place, wanted in enumerate(views.sizes):
        members = (views.level <= place).nonzero()[:, 0]
        assert len(members) == wanted
        if wanted > 2:  # gaps of an even spread differ by a power of two at most
            assert int(members.diff().max()) <= 2 * max(size / wanted, 1) + 1


def test_beginnings_are_spread_over_chains_whatever_the_order_of_rows() -> None:
    views = views_of(chains(4, 16))
    bank = chains(4, 16)
    four = (views.level <= 2).nonzero()[:, 0]
    assert sorted(bank.chain[four].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("number", "draws"), [(1, 1), (1, 2), (2, 9), (5, 11)])
@pytest.mark.parametrize("weighted", [False, True])
def test_views_of_sums_are_sums_over_the_samples_of_each_view(number: int, draws: int, weighted: bool) -> None:
    size = number * draws
    log_weight = 2 * torch.randn(size, generator=generator(1), dtype=torch.float64) if weighted else None
    views = views_of(chains(number, draws, log_weight))
    values = torch.rand(size, 4, generator=generator(2), dtype=torch.float64)
    weight = np.ones(size) if log_weight is None else np.exp((log_weight - log_weight.max()).numpy())
    present, weights = views.sets(torch.arange(size))
    sums = torch.zeros(views.num_sums, 4, dtype=torch.float64).index_add_(0, present, weights @ values)
    logs = torch.full((views.num_sums, 4), -math.inf, dtype=torch.float64)
    logs[present] = torch.logsumexp(weights.log()[:, :, None] + values.log(), dim=1)
    members = [np.ones(size, dtype=bool)]
    if views.num_groups > 1:
        members += [views.group.numpy() != group for group in range(views.num_groups)]
    members += [views.level.numpy() <= place for place in range(len(views.sizes) - 1)]
    expected = np.stack([(weight * mine) @ values.numpy() for mine in members])
    assert views.num_views == len(members)
    np.testing.assert_allclose(views.of(sums).numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(views.of_logs(logs).numpy(), np.log(expected), rtol=1e-12, atol=1e-12)


def test_what_is_left_without_a_heavy_run_keeps_its_digits() -> None:
    """1e-30 beside 1: a difference of sums would be 0."""
    views = views_of(chains(1, 3))
    sums = torch.tensor([[1e-30], [1.0], [2e-30], [0.0], [0.0]], dtype=torch.float64)
    assert views.of(sums)[2, 0].item() == pytest.approx(3e-30, rel=1e-14)


@pytest.mark.parametrize("number", [1, 4])
def test_the_jackknife_of_a_mean_is_the_error_of_means_of_runs(number: int) -> None:
    """Of runs of equal size: the standard error of their means."""
    size = 40
    views = views_of(chains(number, size // number))
    values = torch.randn(size, generator=generator(3), dtype=torch.float64)
    means = np.array([values[views.group == group].mean() for group in range(views.num_groups)])
    assert len(values) % len(means) == 0
    present, weights = views.sets(torch.arange(size))
    sums = torch.zeros(views.num_sums, 1, dtype=torch.float64).index_add_(0, present, weights @ values[:, None])
    count = torch.zeros(views.num_sums, 1, dtype=torch.float64).index_add_(0, present, weights.sum(1, keepdim=True))
    weight = views.of(count)[:, 0]
    found = views.jackknife(views.of(sums)[:, 0] / weight, weight)
    assert found == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)), rel=1e-10)


def test_the_jackknife_needs_two_runs_and_values() -> None:
    single = views_of(chains(1, 1))
    assert single.jackknife(torch.tensor([1.0]), torch.ones(1)) is None
    views = views_of(chains(1, 3))
    values, weight = torch.ones(views.num_views, dtype=torch.float64), torch.full((views.num_views,), 2.0).double()
    weight[0] = 3.0
    assert views.jackknife(values, weight) == 0.0
    values[1] = math.nan
    assert views.jackknife(values, weight) is None


def test_views_without_errors_are_the_bank_alone() -> None:
    views = views_of(chains(4, 5), errors=False, beginnings=False)
    assert (views.num_views, views.num_sums, views.sizes) == (1, 1, (20,))
