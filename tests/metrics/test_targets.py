"""Scores of numbers against scikit-learn, SciPy, Pyro and scoringrules, and their bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import SIZES, close, profile, random_mixture
from pyro.ops.stats import crps_empirical as pyros_crps
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator


def intervals(size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper ends and targets [B, C], some of which lie outside on either side."""
    source = generator(seed, "intervals")
    lower, width, y = (torch.randn(size, generator=source, dtype=torch.float64) for _ in range(3))
    return lower, lower + width.abs(), 1.5 * y


def test_rmse_is_scikit_learns() -> None:
    mean, _, y, _ = random_mixture((1, 30, 2), 0)
    flat = y.flatten().numpy(), mean[0].flatten().numpy()
    close(metrics.rmse(mean[0], y), math.sqrt(sklearn.metrics.mean_squared_error(*flat)))


def test_mae_is_scikit_learns_and_at_most_the_rmse() -> None:
    mean, _, y, _ = random_mixture((1, 30, 2), 1)
    flat = y.flatten().numpy(), mean[0].flatten().numpy()
    close(metrics.mae(mean[0], y), sklearn.metrics.mean_absolute_error(*flat))
    assert metrics.mae(mean[0], y) < metrics.rmse(mean[0], y)


def test_errors_of_float32_are_summed_in_float64() -> None:
    mean = torch.full((300_000, 1), 1000.0)
    y = mean + 0.5
    assert metrics.mae(mean, y).dtype == metrics.rmse(mean, y).dtype == torch.float64
    assert float(metrics.mae(mean, y)) == float(metrics.rmse(mean, y)) == 0.5


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_score_is_that_of_scoringrules(level: float, oracle: Any) -> None:
    peer = oracle("scoringrules")
    lower, upper, y = intervals((40, 3), 2)
    expected = peer.interval_score(y.numpy(), lower.numpy(), upper.numpy(), 1 - level)
    close(metrics.interval_score(lower, upper, y, level=level), expected)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_score_is_two_pinball_losses(level: float) -> None:
    """The loss of both ends, by scikit-learn, times 2 / (1 - level); and case by case."""
    lower, upper, y = intervals((40, 3), 3)
    found = metrics.interval_score(lower, upper, y, level=level)
    assert found.shape == (40, 3)
    tail = (1 - level) / 2
    losses = [
        sklearn.metrics.mean_pinball_loss(y.flatten(), end.flatten(), alpha=alpha)
        for end, alpha in ((lower, tail), (upper, 1 - tail))
    ]
    close(found.mean(), sum(losses) / tail)
    below, above = y < lower, y > upper
    assert min(int(below.sum()), int(above.sum()), int((~below & ~above).sum())) > 5
    inside = upper - lower
    for where, expected in (
        (below, inside + 2 / (1 - level) * (lower - y)),
        (above, inside + 2 / (1 - level) * (y - upper)),
        (~below & ~above, inside),
    ):
        close(found[where], expected[where])


@pytest.mark.parametrize("level", [0.05, 0.3, 0.9])
def test_pinball_is_scikit_learns(level: float) -> None:
    quantile, _, y = intervals((40, 3), 4)
    found = metrics.pinball(quantile, y, level=level)
    assert found.shape == (40, 3)
    assert bool((found >= 0).all())
    close(found.mean(), sklearn.metrics.mean_pinball_loss(y.flatten(), quantile.flatten(), alpha=level))
    expected = np.where(y < quantile, (1 - level) * (quantile - y), level * (y - quantile))
    close(found, expected)


def test_pinball_is_that_of_scoringrules(oracle: Any) -> None:
    peer = oracle("scoringrules")
    quantile, _, y = intervals((40, 3), 5)
    close(metrics.pinball(quantile, y, level=0.2), peer.quantile_score(y.numpy(), quantile.numpy(), 0.2))


def test_pinball_over_all_levels_is_half_the_crps() -> None:
    """CRPS = 2 int_0^1 pinball(F^-1(a), y, a) da, of one normal."""
    mean, scale, y = 0.3, 0.7, 1.1

    def loss(level: float) -> float:
        quantile = torch.tensor([[scipy.stats.norm.ppf(level, mean, scale)]])
        return float(metrics.pinball(quantile, torch.tensor([[y]]), level=level))

    # In two parts: the loss has a kink where the quantile passes the target.
    kink = float(scipy.stats.norm.cdf(y, mean, scale))
    parts = [scipy.integrate.quad(loss, *ends, limit=200)[0] for ends in ((0, kink), (kink, 1))]
    arguments = (torch.tensor(value, dtype=torch.float64).view(shape) for value, shape in
                 ((mean, (1, 1, 1)), (scale, (1, 1, 1)), (y, (1, 1))))  # fmt: skip
    close(metrics.mixture_crps(*arguments), [[2 * sum(parts)]], atol=1e-6)


def test_width_and_sharpness() -> None:
    lower, upper, _ = intervals((40, 3), 6)
    close(metrics.width(lower, upper), np.mean(upper.numpy() - lower.numpy()))
    variance = (upper - lower).square()
    close(metrics.sharpness(variance), math.sqrt(np.mean(variance.numpy())))


def test_sharpness_is_the_rmse_of_targets_drawn_from_the_predictive() -> None:
    rows = 20_000
    source = generator(7)
    scales = 0.2 + 3 * torch.rand(rows, 2, generator=source, dtype=torch.float64)
    y = scales * torch.randn(rows, 2, generator=source, dtype=torch.float64)
    excess = y.square() - scales.square()
    found = metrics.rmse(torch.zeros_like(y), y).square() - metrics.sharpness(scales.square()).square()
    assert abs(float(found)) < 4 * float(excess.std()) / math.sqrt(excess.numel())


def test_interval_scores_of_the_true_interval_are_least() -> None:
    """Proper: ends too narrow, too wide or shifted cost more, in the mean over targets from the predictive."""
    y = torch.randn(20_000, 1, generator=generator(8), dtype=torch.float64)
    end = torch.full_like(y, float(scipy.stats.norm.ppf(0.95)))
    true = metrics.interval_score(-end, end, y, level=0.9)
    for lower, upper in ((-0.6 * end, 0.6 * end), (-1.5 * end, 1.5 * end), (0.5 - end, 0.5 + end)):
        excess = metrics.interval_score(lower, upper, y, level=0.9) - true
        assert float(excess.mean()) > 4 * float(excess.std()) / math.sqrt(len(y))


@pytest.mark.parametrize(
    ("level", "scores"), [(0.9, [0.95, 0.05, 0.5, 0.951, 0.04]), (0.5, [0.25, 0.75, 0.76, 0.1, 1.0])]
)
def test_coverage_counts_both_ends_as_inside(level: float, scores: list[float]) -> None:
    pit = torch.tensor(scores, dtype=torch.float64).unsqueeze(1)
    tail = (1 - level) / 2
    assert float(metrics.coverage(pit, level)) == np.mean([tail - 1e-15 <= u <= 1 - tail + 1e-15 for u in scores])


# Draws


@profile
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31), ties=st.booleans())
def test_crps_of_draws_is_pyros_and_the_mean_over_all_pairs(size: tuple[int, int, int], seed: int, ties: bool) -> None:
    draws, _, y, _ = random_mixture(size, seed)
    draws, y = (draws.round(), y.round()) if ties else (draws, y)
    found = metrics.crps_empirical(draws, y)
    close(found, pyros_crps(draws, y))
    pairs = np.abs(draws.numpy()[:, None] - draws.numpy()[None]).sum(axis=(0, 1))
    first = np.abs(draws.numpy() - y.numpy()).mean(axis=0)
    close(found, first - pairs / (2 * size[0] ** 2))
    if size[0] > 1:
        close(metrics.crps_empirical(draws, y, fair=True), first - pairs / (2 * size[0] * (size[0] - 1)))
    order = torch.randperm(size[0], generator=generator(seed))
    close(metrics.crps_empirical(draws[order], y), found)
    twice = torch.cat([draws, draws])
    close(metrics.crps_empirical(twice, y), found)
    if size[0] > 1 and not ties:
        assert bool((metrics.crps_empirical(twice, y, fair=True) > metrics.crps_empirical(draws, y, fair=True)).all())


@pytest.mark.parametrize(("fair", "estimator"), [(False, "nrg"), (True, "fair")])
def test_crps_of_draws_is_that_of_scoringrules(fair: bool, estimator: str, oracle: Any) -> None:
    peer = oracle("scoringrules")
    draws, _, y, _ = random_mixture((7, 5, 2), 9)
    expected = peer.crps_ensemble(y.numpy(), draws.movedim(0, -1).numpy(), estimator=estimator)
    close(metrics.crps_empirical(draws, y, fair=fair), expected)


def test_fair_crps_has_no_bias_of_few_draws() -> None:
    """Four draws of the standard normal, y = 0: the mean is the CRPS of the normal itself; the other is too large."""
    draws = torch.randn(4, 20_000, 1, generator=generator(10), dtype=torch.float64)
    y = torch.zeros(20_000, 1, dtype=torch.float64)
    expected = 2 / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)
    for fair, bias in ((True, 0.0), (False, 1 / math.sqrt(math.pi) / 4)):  # E|X - X'| / (2 S)
        found = metrics.crps_empirical(draws, y, fair=fair)
        assert abs(float(found.mean()) - expected - bias) < 4 * float(found.std()) / math.sqrt(20_000)


def test_draws_that_do_not_fit_are_refused() -> None:
    draws, y = torch.zeros(4, 3, 2), torch.zeros(3, 2)
    holed = draws.clone()
    holed[1, 2, 0] = math.nan
    for arguments, fair, says in [
        ((draws, y[:, 0]), False, r"got \[4, 3, 2\] and \[3\]"),
        ((draws.movedim(0, -1), y), False, "first axis"),
        ((draws[:0], y), False, "S at least 1"),
        ((draws[:1], y), True, "S at least 2"),
        ((holed, y), False, "NaN in row 2"),
        ((draws, y * math.nan), False, "NaN in row 0"),
    ]:
        with pytest.raises(DataError, match=says):
            metrics.crps_empirical(*arguments, fair=fair)
    assert metrics.crps_empirical(draws[:, :0], y[:0]).shape == (0, 2)


# Bad input


def test_numbers_that_do_not_fit_are_refused() -> None:
    lower, upper, y = intervals((5, 2), 11)
    wide, none = torch.zeros(5, 1), lower[:0]
    for call, says in [
        (lambda: metrics.rmse(lower, wide), r"\[5, 2\] and \[5, 1\]"),
        (lambda: metrics.mae(lower, y.flatten()), "one shape"),
        (lambda: metrics.rmse(none, none), "at least one row"),
        (lambda: metrics.mae(none, none), "at least one row"),
        (lambda: metrics.rmse(lower, y * math.nan), "NaN in row 0"),
        (lambda: metrics.width(upper, lower), "other way in row 0"),
        (lambda: metrics.width(none, none), "at least one row"),
        (lambda: metrics.interval_score(upper, lower, y, level=0.9), "other way in row 0"),
        (lambda: metrics.interval_score(lower, upper, wide, level=0.9), "one shape"),
        (lambda: metrics.pinball(lower, wide, level=0.9), "one shape"),
        (lambda: metrics.pinball(lower * math.nan, y, level=0.9), "NaN in row 0"),
        (lambda: metrics.sharpness(-upper.square()), "at least 0"),
        (lambda: metrics.sharpness(none), "at least one row"),
        (lambda: metrics.coverage(none, 0.9), "at least one row"),
        (lambda: metrics.coverage(y * math.nan, 0.9), "NaN in row 0"),
        (lambda: metrics.coverage(y, 0.9), "probabilities"),  # targets, not their probabilities
    ]:
        with pytest.raises(DataError, match=says):
            call()
    assert metrics.interval_score(none, none, none, level=0.9).shape == (0, 2)
    assert metrics.pinball(none, none, level=0.9).shape == (0, 2)


@pytest.mark.parametrize("level", [0.0, 1.0, 90, -0.5, math.nan])
def test_levels_that_are_none_are_refused(level: float) -> None:
    lower, upper, y = intervals((5, 2), 12)
    for call in (
        lambda: metrics.coverage(torch.full((5, 2), 0.5), level),
        lambda: metrics.interval_score(lower, upper, y, level=level),
        lambda: metrics.pinball(lower, y, level=level),
    ):
        with pytest.raises(ConfigError, match="level="):
            call()
