"""Diagnostics of chains: against ArviZ, closed forms of autoregressive chains, and the edges where figures end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bnn import diagnostics
from bnn.diagnostics import ebfmi, ess_bulk, ess_mean, ess_tail, mcse_mean, split_rhat
from bnn.errors import DataError
from bnn.seeding import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its next version at each import
    import arviz

ARVIZ: dict[Callable[[Tensor], Tensor], Callable[[np.ndarray], Any]] = {
    split_rhat: lambda one: arviz.rhat(one),
    ess_bulk: lambda one: arviz.ess(one, method="bulk"),
    ess_tail: lambda one: arviz.ess(one, method="tail"),
    ess_mean: lambda one: arviz.ess(one, method="mean"),
    mcse_mean: lambda one: arviz.mcse(one, method="mean"),
}
ALL = list(ARVIZ)
# C D - 1 is no multiple of 20 in any: a quantile then falls between two draws, and rounding decides nothing.
SIZES = [(2, 4), (3, 5), (2, 6), (5, 7), (3, 8), (2, 9), (3, 10), (2, 51), (4, 300)]


def autoregressive(correlation: float, chains: int, length: int, num: int, seed: int = 0) -> Tensor:
    """x_d = r x_{d-1} + sqrt(1 - r^2) noise, begun where it stays: standard normal at each draw. [C, D, P]"""
    noise = torch.randn(length, chains, num, dtype=torch.float64, generator=generator(seed, "chains", chains))
    draws = [noise[0]]
    for step in noise[1:]:
        draws.append(correlation * draws[-1] + math.sqrt(1 - correlation**2) * step)
    return torch.stack(draws, dim=1)


def by_arviz(function: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """What ArviZ says of each quantity, one after another."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        columns = draws.double().flatten(2).numpy()
        found = [float(ARVIZ[function](columns[:, :, place])) for place in range(columns.shape[2])]
    return torch.tensor(found, dtype=torch.float64).reshape(draws.shape[2:])


def check(draws: Tensor, functions: list[Callable[[Tensor], Tensor]] = ALL) -> None:
    for function in functions:
        found = function(draws)
        assert found.dtype == torch.float64
        want = by_arviz(function, draws)
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9, 0.99, -0.5, -0.95])
def test_chains_of_every_correlation_and_length(correlation: float) -> None:
    for chains, length in SIZES:
        check(autoregressive(correlation, chains, length, 6))


@pytest.mark.parametrize("length", [4, 7, 50, 78])
def test_one_chain(length: int) -> None:
    """ArviZ gives no R-hat of one chain; its formula on the scores of the two halves is what the paper says."""
    draws = autoregressive(0.6, 1, length, 5, seed=3)
    check(draws, [ess_bulk, ess_tail, ess_mean, mcse_mean])
    half = length // 2
    for place, found in enumerate(split_rhat(draws)):
        one = draws[0, :, place].numpy()
        halves = np.stack([one[:half], one[-half:]])
        scores = []
        for values in (halves, np.abs(halves - np.median(halves))):
            ranks = scipy.stats.rankdata(values).reshape(values.shape)
            scores.append(scipy.stats.norm.ppf((ranks - 3 / 8) / (values.size + 1 / 4)))
        within = [score.var(axis=1, ddof=1).mean() for score in scores]
        between = [half * score.mean(axis=1).var(ddof=1) for score in scores]
        want = max(math.sqrt((half - 1 + b / w) / half) for b, w in zip(between, within, strict=True))
        assert float(found) == pytest.approx(want, rel=1e-9)


def test_ties_and_two_values() -> None:
    draws = autoregressive(0.5, 3, 60, 7)
    check(draws.round())
    check((draws > 0.3).double())
    check((draws > 0.3).long())


def test_other_distributions() -> None:
    check(autoregressive(0.5, 3, 60, 4).exp() ** 3)
    check(torch.tan(autoregressive(-0.7, 3, 61, 4)))


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e9])
def test_constant_draws(value: float) -> None:
    draws = torch.full((3, 10, 2), value)
    check(draws)
    assert split_rhat(draws).isnan().all()
    assert torch.equal(ess_bulk(draws), torch.full((2,), 30.0, dtype=torch.float64))
    assert torch.equal(mcse_mean(draws), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("chains", [2, 3, 5])
def test_chains_that_stand_still_apart(chains: int) -> None:
    """Also two of them, which are equally far from their median: no folded R-hat can be had."""
    draws = (torch.arange(float(chains)) / 7).view(-1, 1, 1).expand(-1, 12, 4)
    assert torch.equal(split_rhat(draws), torch.full((4,), torch.inf, dtype=torch.float64))
    check(draws, [ess_bulk, ess_tail, ess_mean])


def test_a_stuck_chain_among_others() -> None:
    draws = autoregressive(0.2, 4, 80, 5)
    draws[2] = draws[2, :1]
    check(draws)
    draws[2] = 3.0
    check(draws)
    assert (split_rhat(draws) > 1.5).all()


def test_half_of_a_chain_far_from_the_other() -> None:
    """Whole chains of one mean and variance, whose halves differ: only split chains show it."""
    draws = autoregressive(0.0, 3, 90, 4)
    draws[:, 45:] += 3.0
    check(draws)
    assert (split_rhat(draws) > 1.5).all()


def test_chains_of_one_mean_and_two_widths() -> None:
    """The folded values show what means do not."""
    draws = autoregressive(0.0, 4, 200, 5)
    draws[:2] *= 6.0
    check(draws)
    assert (split_rhat(draws) > 1.1).all()


@pytest.mark.parametrize("function", ALL)
def test_not_a_number_stays_in_its_own_quantity(function: Callable[[Tensor], Tensor]) -> None:
    draws = autoregressive(0.4, 3, 20, 6)
    clean = function(draws)
    draws[1, 13, 2] = torch.nan
    found = function(draws)
    assert found.isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])
    assert function(torch.full((2, 8), torch.nan)).isnan()


def test_infinite_draws_are_ranked() -> None:
    draws = autoregressive(0.4, 3, 24, 4)
    draws[0, 3, 1], draws[2, 5, 2] = torch.inf, -torch.inf
    check(draws, [ess_bulk, ess_tail])
    assert all(function(draws)[[0, 3]].isfinite().all() for function in ALL)


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("length", [0, 1, 3])
def test_too_few_draws_give_nan(function: Callable[[Tensor], Tensor], length: int) -> None:
    assert function(torch.ones(2, length, 5)).isnan().tolist() == [True] * 5


def test_a_quantile_that_is_a_draw_counts_that_draw() -> None:
    """Of 101 draws the 5 % quantile is the sixth smallest, exactly."""
    draws = autoregressive(0.3, 1, 101, 4)
    for place, found in enumerate(ess_tail(draws)):
        one = draws[0, :, place].numpy()
        worth = []
        for count in (6, 96):
            below = (one <= np.sort(one)[count - 1]).astype(float)
            worth.append(float(arviz.ess(np.stack([below[:50], below[-50:]]), method="identity")))
        assert float(found) == pytest.approx(min(worth), rel=1e-9)


@pytest.mark.parametrize("function", ALL)
def test_axes_after_the_draws_are_kept(function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of quantities is taken at once; and no more are taken than memory is granted for."""
    draws = autoregressive(0.5, 3, 14, 2 * 5).reshape(3, 14, 2, 5)
    whole = function(draws)
    assert whole.shape == (2, 5)
    assert function(draws[:, :, 1, 3]).shape == ()
    torch.testing.assert_close(function(draws[:, :, 1, 3]), whole[1, 3], rtol=1e-12, atol=0)
    taken = []
    ess = diagnostics._ess
    monkeypatch.setattr(diagnostics, "_ess", lambda values: (taken.append(values.numel()), ess(values))[1])
    monkeypatch.setattr(diagnostics, "CHUNK_VALUES", 3 * 14 * 4)
    torch.testing.assert_close(function(draws), whole, rtol=1e-12, atol=0)
    assert all(numel <= 3 * 14 * 4 for numel in taken)
    monkeypatch.setattr(diagnostics, "CHUNK_VALUES", 1)  # at least one quantity is taken
    torch.testing.assert_close(function(draws), whole, rtol=1e-12, atol=0)
    assert function(draws[:, :, :0]).shape == (0, 5)


@pytest.mark.parametrize("function", ALL)
def test_single_precision_is_reckoned_in_double(function: Callable[[Tensor], Tensor]) -> None:
    draws = (1000.0 + 1e-3 * autoregressive(0.5, 3, 40, 5)).float().requires_grad_()
    assert not function(draws).requires_grad
    torch.testing.assert_close(function(draws), function(draws.detach().double()), rtol=0, atol=0)
    torch.testing.assert_close(function(draws), by_arviz(function, draws.detach()), rtol=1e-7, atol=0)


def test_what_does_not_matter() -> None:
    """Ranks see no monotone change, and no figure sees a unit, however small."""
    draws, small = autoregressive(0.5, 3, 40, 5), 2.0**-100
    for function in (ess_bulk, ess_tail):
        torch.testing.assert_close(function(draws.exp()), function(draws))
    for function in (split_rhat, ess_bulk, ess_tail, ess_mean):
        torch.testing.assert_close(function(small * draws), function(draws))
        torch.testing.assert_close(function(draws[[2, 0, 1]]), function(draws))
    for function in (split_rhat, ess_bulk, ess_mean):
        torch.testing.assert_close(function(-draws), function(draws))
    torch.testing.assert_close(mcse_mean(small * draws), small * mcse_mean(draws), atol=0, rtol=1e-9)


@pytest.mark.parametrize("correlation", [0.6, 0.0, -0.4])
def test_effective_size_and_standard_error_of_autoregressive_chains(correlation: float) -> None:
    """ESS = C D (1 - r) / (1 + r), and means divided by their standard errors are standard normal."""
    draws = autoregressive(correlation, 4, 1500, 150, seed=1)
    want = 4 * 1500 * (1 - correlation) / (1 + correlation)
    for function in (ess_mean, ess_bulk):
        found = function(draws)
        assert float(found.mean()) == pytest.approx(want, rel=0.05)
        assert float((found / want - 1).abs().max()) < 0.45
    z = draws.mean(dim=(0, 1)) / mcse_mean(draws)
    assert abs(float(z.mean())) < 4 / math.sqrt(150)
    assert abs(float(z.std()) - 1) < 4 / math.sqrt(2 * 150)


def test_r_hat_of_chains_set_apart_by_a_known_distance() -> None:
    """Of 4 chains a, 0, -a, 0 the variance of means is 2 a^2 / 3: over half chains 4 a^2 / 7."""
    away = 0.6
    draws = autoregressive(0.0, 4, 4000, 12) + away * torch.tensor([1.0, 0.0, -1.0, 0.0]).view(4, 1, 1)
    want = math.sqrt(1 + 4 * away**2 / 7)
    assert float(split_rhat(draws).mean()) == pytest.approx(want, abs=0.006)  # ranks bend it by less


# E-BFMI


def test_energy_fraction() -> None:
    energy = autoregressive(0.9, 3, 50, 1)[:, :, 0] + 1e5
    found = ebfmi(energy)
    torch.testing.assert_close(found, torch.from_numpy(arviz.bfmi(energy.numpy())), rtol=1e-9, atol=0)
    one = energy[1]
    jumps = sum(float(one[d] - one[d - 1]) ** 2 for d in range(1, 50))
    assert float(found[1]) == pytest.approx(jumps / sum(float(e - one.mean()) ** 2 for e in one))
    assert ebfmi(energy.float()).dtype == torch.float64


def test_energy_fraction_of_autoregressive_energies() -> None:
    """E (E_d - E_{d-1})^2 / var E = 2 (1 - r)."""
    for correlation in (0.0, 0.9):
        found = ebfmi(autoregressive(correlation, 3, 20_000, 1)[:, :, 0])
        torch.testing.assert_close(
            found, torch.full((3,), 2 * (1 - correlation), dtype=torch.float64), rtol=0.05, atol=0
        )


def test_energies_without_a_fraction() -> None:
    energy = torch.randn(3, 9, generator=generator(0))
    energy[1] = 2.0
    energy[2, 4] = torch.nan
    assert ebfmi(energy).isnan().tolist() == [False, True, True]
    assert ebfmi(energy[:, :3]).isnan().tolist() == [True, True, True]


@pytest.mark.parametrize("function", [*ALL, ebfmi])
def test_shapes_that_are_no_chains(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(DataError, match=r"diagnostics: want .*\[C, D.*got \[7\]; put chains first, then draws"):
        function(torch.zeros(7))
    if function is ebfmi:
        with pytest.raises(DataError, match=r"got \[2, 7, 3\]"):
            function(torch.zeros(2, 7, 3))
    else:
        with pytest.raises(DataError, match=r"got \[0, 7\]"):
            function(torch.zeros(0, 7))
