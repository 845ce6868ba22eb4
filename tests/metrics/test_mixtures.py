"""Mixtures of normals against torch.distributions, SciPy and scoringrules, by quadrature too, and their symmetries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import SIZES, cases, close, profile, random_mixture
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.metrics import mixtures
from bnn.seeding import generator


@pytest.mark.parametrize("weighted", [False, True])
def test_mixture_log_prob_is_that_of_torch_distributions(weighted: bool) -> None:
    means, scales, y, log_weight = random_mixture((4, 6, 3), 1, weighted)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=log_weight.expand(6, 4)),
        torch.distributions.Independent(torch.distributions.Normal(means.movedim(0, 1), scales.movedim(0, 1)), 1),
    )
    found = metrics.mixture_log_prob(means, scales, y, log_weight if weighted else None)
    close(found, mixture.log_prob(y))


@pytest.mark.parametrize("weighted", [False, True])
def test_pit_is_the_mixture_of_scipys_normal_cdfs(weighted: bool) -> None:
    means, scales, y, log_weight = random_mixture((4, 6, 3), 2, weighted)
    each = scipy.stats.norm.cdf(y.numpy(), means.numpy(), scales.numpy())
    found = metrics.mixture_cdf(means, scales, y, log_weight if weighted else None)
    close(found, np.average(each, axis=0, weights=log_weight.exp().numpy()))


def test_crps_value_that_scoringrules_documents() -> None:
    """`scoringrules.crps_mixnorm(0.0, [0.1, -0.3, 1.0], [0.4, 2.1, 0.7], [0.1, 0.2, 0.7])`."""
    means, scales, weights = torch.tensor([[0.1, -0.3, 1.0], [0.4, 2.1, 0.7], [0.1, 0.2, 0.7]], dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    found = metrics.mixture_crps(means.view(3, 1, 1), scales.view(3, 1, 1), zero, weights.log())
    close(found, [[0.46806866729387275]])


@pytest.mark.parametrize("weighted", [False, True])
def test_crps_is_the_integral_of_the_squared_cdf_error(weighted: bool) -> None:
    """CRPS = int (F(x) - 1[x >= y])^2 dx, by quadrature."""
    means, scales, y, log_weight = random_mixture((4, 3, 2), 3, weighted)
    weights, mu, sigma = log_weight.exp().numpy(), means.numpy(), scales.flatten().numpy()
    found = metrics.mixture_crps(means, scales, y, log_weight if weighted else None)
    for row, column in np.ndindex(3, 2):
        centres, target = mu[:, row, column], float(y[row, column])

        def cdf(x: float, centres: np.ndarray = centres) -> float:
            return float(weights @ scipy.special.ndtr((x - centres) / sigma))

        low, high = min(centres.min(), target) - 15, max(centres.max(), target) + 15
        below = scipy.integrate.quad(lambda x: cdf(x) ** 2, low, target, limit=200)[0]
        above = scipy.integrate.quad(lambda x: (1 - cdf(x)) ** 2, target, high, limit=200)[0]
        assert float(found[row, column]) == pytest.approx(below + above, abs=1e-7)


@pytest.mark.parametrize("weighted", [False, True])
def test_mixture_scores_are_those_of_scoringrules(weighted: bool, oracle: Any) -> None:
    peer = oracle("scoringrules")
    means, scales, y, log_weight = random_mixture((5, 6, 1), 4, weighted)
    mu, sigma = means[:, :, 0].T.numpy(), scales.expand_as(means)[:, :, 0].T.numpy()  # [B, S]
    weights = log_weight.exp().expand(6, 5).numpy()
    passed = log_weight if weighted else None
    crps = peer.crps_mixnorm(y[:, 0].numpy(), mu, sigma, weights)
    close(metrics.mixture_crps(means, scales, y, passed)[:, 0], crps)
    logs = peer.logs_mixnorm(y[:, 0].numpy(), mu, sigma, weights)
    close(-metrics.mixture_log_prob(means, scales, y, passed), logs)


def test_crps_of_one_sample_is_that_of_its_normal() -> None:
    """sigma (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)), Gneiting et al. (2005)."""
    means, scales, y, _ = random_mixture((1, 6, 2), 5)
    sigma = float(scales)
    z = (y - means[0]).numpy() / sigma
    expected = sigma * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - 1 / math.sqrt(math.pi))
    close(metrics.mixture_crps(means, scales, y), expected)


@pytest.mark.parametrize("samples_at_once", [1, 2, 3, 6])
def test_crps_does_not_depend_on_how_many_pairs_are_held(samples_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    means, scales, y, log_weight = random_mixture((7, 5, 2), 6)
    whole = metrics.mixture_crps(means, scales, y, log_weight)
    monkeypatch.setattr(mixtures, "PAIR_VALUES", samples_at_once * means.numel())
    close(metrics.mixture_crps(means, scales, y, log_weight), whole)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_coverage_is_that_of_intervals_between_quantiles(level: float) -> None:
    means, scales, y, log_weight = random_mixture((3, 40, 2), 7)
    weights, mu, sigma = log_weight.exp().numpy(), means.numpy(), scales.flatten().numpy()

    def quantile(share: float, row: int, column: int) -> float:
        centres = mu[:, row, column]
        return scipy.optimize.brentq(lambda x: weights @ scipy.special.ndtr((x - centres) / sigma) - share, -40, 40)

    ends = (1 - level) / 2, (1 + level) / 2
    inside = [
        quantile(ends[0], row, column) <= float(y[row, column]) <= quantile(ends[1], row, column)
        for row, column in np.ndindex(40, 2)
    ]
    found = metrics.coverage(metrics.mixture_cdf(means, scales, y, log_weight), level)
    assert 0.1 < np.mean(inside) < 0.9, "targets all inside, or none, tell nothing"
    close(found, np.mean(inside))


def test_targets_drawn_from_the_mixture_are_calibrated() -> None:
    rows = 20_000
    means, scales, _, log_weight = random_mixture((3, rows, 1), 8)
    source = generator(8, "targets")
    chosen = torch.multinomial(log_weight.exp(), rows, replacement=True, generator=source)
    noise = torch.randn(rows, 1, generator=source, dtype=torch.float64)
    y = means[chosen, torch.arange(rows)] + scales[chosen, :, 0] * noise
    pit = metrics.mixture_cdf(means, scales, y, log_weight)
    assert scipy.stats.kstest(pit.flatten().numpy(), "uniform").pvalue > 1e-3
    for level in (0.5, 0.9, 0.95):
        error = math.sqrt(level * (1 - level) / rows)
        assert abs(float(metrics.coverage(pit, level)) - level) < 4 * error


def test_targets_drawn_from_a_normal_give_its_entropy_and_its_crps() -> None:
    """E[-log p] = log(2 pi e sigma^2) / 2 and E[CRPS] = sigma / sqrt(pi)."""
    rows, sigma = 20_000, 0.6
    means = torch.randn(1, rows, 1, generator=generator(9), dtype=torch.float64)
    y = means[0] + sigma * torch.randn(rows, 1, generator=generator(10), dtype=torch.float64)
    scales = torch.full((1, 1, 1), sigma, dtype=torch.float64)
    for values, expected in (
        (-metrics.mixture_log_prob(means, scales, y), 0.5 * math.log(2 * math.pi * math.e * sigma**2)),
        (metrics.mixture_crps(means, scales, y), sigma / math.sqrt(math.pi)),
    ):
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / math.sqrt(rows)


def mixture_scores(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> dict[str, Tensor]:
    arguments = means, scales, y, log_weight
    pit = metrics.mixture_cdf(*arguments)
    return {
        "nll": -metrics.mixture_log_prob(*arguments).mean(),
        "crps": metrics.mixture_crps(*arguments).mean(),
        "pit": pit.mean(),
        "coverage": metrics.coverage(pit, 0.5),
    }


@profile
@cases
def test_order_of_samples_rows_and_outputs_does_not_matter(size: tuple[int, int, int], seed: int) -> None:
    means, scales, y, log_weight = random_mixture(size, seed)
    samples, rows, outputs = (torch.randperm(n, generator=generator(seed, i)) for i, n in enumerate(size))
    expected = mixture_scores(means, scales, y, log_weight)
    moved = means[samples][:, rows][:, :, outputs], scales[samples], y[rows][:, outputs], log_weight[samples]
    for name, value in mixture_scores(*moved).items():
        close(value, expected[name], atol=1e-10)


@profile
@cases
def test_duplicated_samples_change_nothing(size: tuple[int, int, int], seed: int) -> None:
    means, scales, y, log_weight = random_mixture(size, seed)
    for once, twice in ((log_weight, torch.cat([log_weight, log_weight]) - math.log(2)), (None, None)):
        expected = mixture_scores(means, scales, y, once)
        found = mixture_scores(torch.cat([means, means]), torch.cat([scales, scales]), y, twice)
        for name, value in found.items():
            close(value, expected[name], atol=1e-10)


@profile
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31), unit=st.sampled_from([1e-3, 0.4, 25.0, 1e4]))
def test_scores_follow_the_units_of_the_target(size: tuple[int, int, int], seed: int, unit: float) -> None:
    """y -> a y + b: RMSE and CRPS times a, NLL plus log a an output, PIT and coverage as before."""
    means, scales, y, log_weight = random_mixture(size, seed)
    moved = unit * means - 3.0, unit * scales, unit * y - 3.0
    before, after = mixture_scores(means, scales, y, log_weight), mixture_scores(*moved, log_weight)
    close(after["crps"], unit * before["crps"], rtol=1e-9)
    close(after["nll"], before["nll"] + size[2] * math.log(unit), atol=1e-8)
    close(after["pit"], before["pit"], atol=1e-9)
    close(after["coverage"], before["coverage"])
    close(metrics.rmse(moved[0].mean(0), moved[2]), unit * metrics.rmse(means.mean(0), y), rtol=1e-9)


def test_scores_far_from_every_sample_stay_finite() -> None:
    means, scales, _, log_weight = random_mixture((4, 3, 2), 11)
    y = torch.full((3, 2), 1e6, dtype=torch.float64)
    found = mixture_scores(means, scales, y, log_weight)
    assert all(bool(torch.isfinite(value)) for value in found.values())
    close(found["crps"], 1e6, rtol=1e-5)
    assert float(found["pit"]) == 1.0
    assert float(found["coverage"]) == 0.0


# By quadrature


@profile
@cases
def test_quadrature_is_the_sum_over_pairs_within_its_error(size: tuple[int, int, int], seed: int) -> None:
    means, scales, y, log_weight = random_mixture(size, seed)
    for each in (scales, scales * torch.rand(1, *size[1:], generator=generator(seed), dtype=torch.float64).add(0.1)):
        found = metrics.mixture_crps_quadrature(means, each, y, log_weight)
        exact = metrics.mixture_crps(means, each, y, log_weight)
        assert found.value.shape == found.error.shape == y.shape
        assert bool(((found.value - exact).abs() <= found.error).all())
        assert float(found.error.max()) < 1e-12


@pytest.mark.parametrize("step", [0.7, 1.0, 1.4, 2.0])
def test_the_bound_holds_where_steps_are_long(step: float) -> None:
    means, scales, y, log_weight = random_mixture((3, 40, 2), 20)
    found = metrics.mixture_crps_quadrature(means, scales, y, log_weight, step=step)
    wrong = (found.value - metrics.mixture_crps(means, scales, y, log_weight)).abs()
    assert bool((wrong <= found.error).all())
    if step > 1.2:
        assert float(wrong.max()) > 1e-9, "steps are so short that the bound is not tried"
    narrow = float(scales.min())
    assert float(found.error.max()) < 1e3 * narrow * math.exp(-((math.pi / step) ** 2)) + 1e-12


def test_more_than_a_thousand_samples_take_the_quadrature(monkeypatch: pytest.MonkeyPatch) -> None:
    means, scales, y, log_weight = random_mixture((1003, 4, 2), 21)
    value, error = metrics.mixture_crps_quadrature(means, scales, y, log_weight)
    assert torch.equal(metrics.mixture_crps(means, scales, y, log_weight), value)
    monkeypatch.setattr(mixtures, "EXACT_SAMPLES", 2000)
    pairs = metrics.mixture_crps(means, scales, y, log_weight)
    assert bool(((value - pairs).abs() <= error).all())
    assert float(error.max()) < 1e-11


def test_quadrature_above_a_thousand_samples_is_scoringrules_sum(oracle: Any) -> None:
    peer = oracle("scoringrules")
    means, scales, y, log_weight = random_mixture((1200, 3, 1), 22)
    mu, sigma = means[:, :, 0].T.numpy(), scales.expand_as(means)[:, :, 0].T.numpy()  # [B, S]
    expected = peer.crps_mixnorm(y[:, 0].numpy(), mu, sigma, log_weight.exp().expand(3, 1200).numpy())
    close(metrics.mixture_crps(means, scales, y, log_weight)[:, 0], expected, atol=1e-10)


def test_quadrature_of_one_normal_is_its_closed_form() -> None:
    """E|X - X'| / 2 = sigma / sqrt(pi), at scales from the smallest to the largest."""
    scales = torch.logspace(-6, 6, 13, dtype=torch.float64).view(1, 13, 1)
    zero = torch.zeros(1, 13, 1, dtype=torch.float64)
    found = metrics.mixture_crps_quadrature(zero, scales, zero[0])
    close(found.value / scales[0], np.full((13, 1), 2 / math.sqrt(2 * math.pi) - 1 / math.sqrt(math.pi)))


@pytest.mark.parametrize("held", [1, 300, 5_000])
def test_quadrature_does_not_depend_on_how_much_is_held(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    means, scales, y, log_weight = random_mixture((6, 11, 2), 23)
    scales = scales * torch.logspace(-0.5, 1, 11, dtype=torch.float64).view(1, 11, 1)  # rows with few nodes and many
    whole = metrics.mixture_crps_quadrature(means, scales, y, log_weight)
    monkeypatch.setattr(mixtures, "PAIR_VALUES", held)
    close(metrics.mixture_crps_quadrature(means, scales, y, log_weight).value, whole.value)


def test_rows_with_samples_far_apart_take_the_sum_over_pairs() -> None:
    """A million scales between two samples would be millions of nodes."""
    means, scales, y, log_weight = random_mixture((3, 5, 2), 24)
    means[0, 2] += 1e6
    found = metrics.mixture_crps_quadrature(means, scales, y, log_weight)
    close(found.value, metrics.mixture_crps(means, scales, y, log_weight), rtol=1e-12)
    assert float(found.error[[0, 1, 3, 4]].max()) < 1e-12
    assert float(found.error[2].max()) < 1e-7


def test_quadrature_far_from_zero_keeps_its_digits() -> None:
    means, scales, y, log_weight = random_mixture((4, 6, 2), 25)
    means, y = (means * 1024).round() / 1024, (y * 1024).round() / 1024  # so that they move without rounding
    here = metrics.mixture_crps_quadrature(means, scales, y, log_weight)
    there = metrics.mixture_crps_quadrature(means + 2.0**30, scales, y + 2.0**30, log_weight)
    close(there.value, here.value)


def test_samples_of_no_weight_have_no_say() -> None:
    means, scales, y, _ = random_mixture((4, 6, 2), 26)
    means[3] = 1e7
    log_weight = torch.tensor([0.2, 0.5, 0.3, 0.0], dtype=torch.float64).log()
    kept = means[:3], scales[:3], y, log_weight[:3]
    found = metrics.mixture_crps_quadrature(means, scales, y, log_weight)
    assert torch.equal(found.value, metrics.mixture_crps_quadrature(*kept).value)
    close(found.value, metrics.mixture_crps(*kept))
    for score in (metrics.mixture_log_prob, metrics.mixture_cdf, metrics.mixture_crps):
        close(score(means, scales, y, log_weight), score(*kept), rtol=1e-12)


# Bad input

MIXTURE_SCORES = [
    metrics.mixture_log_prob,
    metrics.mixture_cdf,
    metrics.mixture_crps,
    metrics.mixture_crps_quadrature,
]


@pytest.mark.parametrize("score", MIXTURE_SCORES)
def test_mixtures_and_targets_that_do_not_fit_are_refused(score: object) -> None:
    means, scales, y, log_weight = random_mixture((4, 6, 3), 27)
    holed, endless = means.clone(), means.clone()
    holed[1, 2, 0], endless[1, 2, 0] = math.nan, math.inf
    some = y.clone()
    some[5, 1] = math.nan
    for arguments, says in [
        ((means, scales, y[:, :2], log_weight), r"want means \[S, B, C\].*\[6, 2\]"),
        ((means, scales, y[0], log_weight), "want means"),  # nothing is broadcast over rows
        ((means[0], scales, y, log_weight), "want means"),
        ((means, scales[:, 0, 0], y, log_weight), "want means"),
        ((means[:0], scales[:0], y, log_weight[:0]), "at least one sample"),
        ((means, -scales, y, log_weight), "scales above 0, got -"),
        ((means, 0 * scales, y, log_weight), "scales above 0, got 0"),
        ((means, scales * math.nan, y, log_weight), "scales above 0, got nan"),
        ((holed, scales, y, log_weight), "no number for row 2"),
        ((means, scales, some, log_weight), "NaN in row 5"),
        ((means, scales, y, log_weight[:3]), "4 logarithms of weights"),
        ((means, scales, y, 0 * log_weight), "weights sum to 4"),
    ]:
        with pytest.raises(DataError, match=says):
            score(*arguments)  # type: ignore[operator]
    if score in (metrics.mixture_crps, metrics.mixture_crps_quadrature):
        with pytest.raises(DataError, match="row 2"):
            score(endless, scales, y, log_weight)  # type: ignore[operator]


@pytest.mark.parametrize("score", MIXTURE_SCORES)
def test_no_rows_give_no_scores(score: object) -> None:
    means, scales, y, log_weight = random_mixture((4, 0, 3), 28)
    found = score(means, scales, y, log_weight)  # type: ignore[operator]
    assert len(found if isinstance(found, Tensor) else found.value) == 0


@pytest.mark.parametrize("step", [0.0, -1.0, 2.1, math.nan])
def test_steps_that_are_none_are_refused(step: float) -> None:
    with pytest.raises(ConfigError, match="step="):
        metrics.mixture_crps_quadrature(*random_mixture((2, 3, 1), 29), step=step)


def test_narrow_input_is_widened_before_it_is_used() -> None:
    means, scales, y, log_weight = (values.float() for values in random_mixture((5, 6, 2), 30))
    wide = means.double(), scales.double(), y.double(), log_weight.double()
    for score in (metrics.mixture_log_prob, metrics.mixture_cdf, metrics.mixture_crps):
        found = score(means, scales, y, log_weight)
        assert found.dtype == torch.float64
        close(found, score(*wide), atol=0)
