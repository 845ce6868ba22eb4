"""Views of a bank: sums that become views, runs of draws and halves of them, beginnings, and the error over samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation.views import FEW, GROUPS, MOST_GROUPS, Views, views_of
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


@pytest.mark.parametrize(("number", "draws"), [(1, 1), (1, 2), (1, 5), (2, 9), (5, 11)])
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
    members += [half[views.group.numpy()] > 0 for half in views.halves.numpy()]
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


def test_logarithms_of_what_is_left_without_a_heavy_run_keep_their_digits() -> None:
    """e^-2000 beside 1: exponentials would be 0; and what is nothing in every run stays nothing."""
    views = views_of(chains(1, 6))
    runs = torch.tensor([0.0, -2000.0, -2001.0, -2002.0, -2003.0, -2004.0], dtype=torch.float64)
    sums = torch.full((views.num_sums, 2), -math.inf, dtype=torch.float64)
    sums[: views.num_groups, 0] = runs
    found = views.of_logs(sums)
    for place, half in enumerate(views.halves, start=1):
        expected = np.logaddexp.reduce(runs[half > 0].numpy())
        assert found[place, 0].item() == pytest.approx(expected, abs=1e-12)
    assert bool((found[:, 1] == -math.inf).all())


@pytest.mark.parametrize("size", [5, 7, 8, 9, 12, 13, 20, 21, 24, 25, 32])
def test_any_two_runs_are_apart_in_one_half_more_than_together(size: int) -> None:
    """The columns of a Hadamard matrix without its first row, whatever sides of its rows are taken."""
    views = views_of(bank_of(torch.arange(size), torch.zeros(size, dtype=torch.int64)))
    assert views.num_groups == size
    count, signs = len(views.halves), 2.0 * views.halves - 1.0
    assert size - 1 <= count <= size + 6
    expected = (count + 1) * torch.eye(size, dtype=torch.float64) - 1.0
    assert torch.equal(signs.T @ signs, expected)
    held = views.halves.sum(dim=1)
    assert bool((2 * held >= size).all())
    if count + 1 == size:
        assert bool((2 * held == size).all())
        assert bool((views.halves.sum(dim=0) < count).all())  # no run is in all halves
        assert bool((views.halves.sum(dim=0) > 0).all())


@pytest.mark.parametrize("size", range(1, FEW + 1))
def test_of_few_runs_each_is_left_out(size: int) -> None:
    views = views_of(chains(1, size))
    left = [half.tolist().index(0.0) for half in views.halves]
    assert left == (list(range(size)) if size > 1 else [])
    assert views.halves.sum() == size * (size - 1)


def of_runs(views: Views, figure: Tensor) -> Tensor:
    """Values [V] in each view of a mean over runs, each of which says one number [G]."""
    weight = torch.zeros(views.num_groups, dtype=torch.float64).index_add_(0, views.group, views.log_weight.exp())
    halves = (views.halves * weight) @ figure / (views.halves @ weight)
    beginnings = torch.zeros(len(views.sizes) - 1, dtype=torch.float64)
    return torch.cat([(weight @ figure / weight.sum())[None], halves, beginnings])


def weight_of(views: Views) -> Tensor:
    """Weights [V] of the samples in each view."""
    weight = torch.zeros(views.num_sums, dtype=torch.float64)
    weight[: views.num_groups].index_add_(0, views.group, views.log_weight.exp())
    return views.of(weight[:, None])[:, 0]


SETS = [(1, 2), (1, 3), (1, 4), (1, 5), (1, 7), (1, 13), (1, 50), (3, 5), (4, 50), (7, 30), (9, 40), (32, 4), (40, 3)]


@pytest.mark.parametrize(("number", "draws"), SETS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_squared_error_of_a_mean_is_its_variance_in_expectation(number: int, draws: int, weighted: bool) -> None:
    """Of independent runs of weights w_g and variances 1 / w_g the mean has the variance 1.

    The squared error is a quadratic form x' A x of what the runs say, so that its expectation is sum_g A_gg / w_g.
    """
    size = number * draws
    log_weight = torch.randn(size, generator=generator(4), dtype=torch.float64) if weighted else None
    views = views_of(chains(number, draws, log_weight))
    weight, total = weight_of(views), 0.0
    of_run = torch.zeros(views.num_groups, dtype=torch.float64).index_add_(0, views.group, views.log_weight.exp())
    for group, share in enumerate((of_run / of_run.sum()).tolist()):
        alone = torch.zeros(views.num_groups, dtype=torch.float64)
        alone[group] = 1.0
        error = views.monte_carlo_error(of_runs(views, alone), weight)
        again = views.monte_carlo_error(of_runs(views, 5.0 + 3.0 * alone), weight)
        assert error is not None
        assert again == pytest.approx(3.0 * error, rel=1e-9)
        total += error**2 / share
    assert total == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("number", "draws"), SETS)
def test_a_bias_that_falls_as_one_over_the_samples_is_no_error(number: int, draws: int) -> None:
    views = views_of(chains(number, draws))
    weight = weight_of(views)
    assert views.monte_carlo_error(3.0 + 2.0 / weight, weight) == pytest.approx(0.0, abs=1e-12)


def test_the_error_of_equal_halves_is_the_standard_deviation_of_the_figure_over_them() -> None:
    views = views_of(chains(2, 30))
    values = torch.randn(views.num_views, generator=generator(5), dtype=torch.float64)
    expected = values[views.left_out].numpy().std(ddof=1)
    assert views.monte_carlo_error(values, weight_of(views)) == pytest.approx(expected, rel=1e-12)


def test_the_error_needs_two_runs_that_weigh_something_and_values() -> None:
    single = views_of(chains(1, 1))
    assert single.monte_carlo_error(torch.tensor([1.0]), torch.ones(1)) is None
    heavy = torch.tensor([0.0, *[-math.inf] * 6], dtype=torch.float64)
    for size in (2, 3, 7):
        alone = views_of(chains(1, size, heavy[:size].clamp_min(-800)))
        weight = weight_of(alone)
        values = torch.where(weight > 0, 1.0, torch.nan).double()
        assert alone.monte_carlo_error(values, weight) is None
    views = views_of(chains(1, 7))
    values = torch.ones(views.num_views, dtype=torch.float64)
    assert views.monte_carlo_error(values, weight_of(views)) == 0.0
    values[1] = math.nan
    assert views.monte_carlo_error(values, weight_of(views)) is None


def test_views_without_errors_are_the_bank_alone() -> None:
    views = views_of(chains(4, 5), errors=False, beginnings=False)
    assert (views.num_views, views.num_sums, views.sizes) == (1, 1, (20,))
