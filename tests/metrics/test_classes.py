"""Metrics against scikit-learn, SciPy and the slow obvious version, their edges and their symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
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


# Classification


def test_accuracy_is_scikit_learns() -> None:
    log_probs, y = random_classes((1, 200, 4), 0)
    assert float(metrics.accuracy(log_probs[0].exp(), y)) == sklearn.metrics.accuracy_score(y, log_probs[0].argmax(1))


def test_nll_is_scikit_learns_log_loss() -> None:
    log_probs, y = random_classes((1, 200, 4), 1)
    close(metrics.nll(log_probs[0], y), sklearn.metrics.log_loss(y, log_probs[0].exp().numpy(), labels=range(4)))


def test_brier_is_the_squared_error_from_one_hot_targets_summed_over_classes() -> None:
    log_probs, y = random_classes((1, 200, 4), 2)
    probs = log_probs[0].exp()
    one_hot = np.eye(4)[y.numpy()]
    close(metrics.brier(probs, y), 4 * sklearn.metrics.mean_squared_error(one_hot, probs.numpy()))


def test_brier_of_two_classes_is_twice_the_binary_score() -> None:
    log_probs, y = random_classes((1, 200, 2), 3)
    probs = log_probs[0].exp()
    close(metrics.brier(probs, y), 2 * sklearn.metrics.brier_score_loss(y.numpy(), probs[:, 1].numpy()))


def test_brier_reaches_both_ends_of_its_range() -> None:
    sure = torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]]
    assert float(metrics.brier(sure, torch.tensor([0, 1, 2, 1]))) == 0.0
    assert float(metrics.brier(sure, torch.tensor([1, 2, 0, 0]))) == 2.0


@profile
@cases
def test_the_mean_predictive_loses_no_more_than_its_samples_do(size: tuple[int, int, int], seed: int) -> None:
    """Jensen: -log mean p <= mean -log p; for one sample the two are one number."""
    log_probs, y = random_classes(size, seed)
    mean_predictive = metrics.nll(log_probs.logsumexp(dim=0) - math.log(size[0]), y)
    gibbs = torch.stack([metrics.nll(one, y) for one in log_probs]).mean()
    close(gibbs, metrics.nll(log_probs.mean(dim=0), y))
    assert mean_predictive <= gibbs + 1e-12
    if size[0] > 1:
        assert gibbs - mean_predictive > 1e-6


def test_labels_drawn_from_the_predictive_give_the_entropy_and_calibration() -> None:
    rows = 20_000
    log_probs = random_classes((1, rows, 4), 4)[0][0]
    probs = log_probs.exp()
    y = torch.multinomial(probs, 1, generator=generator(4, "labels")).squeeze(1)
    each = -log_probs.gather(1, y.unsqueeze(1)).squeeze(1)
    entropy = torch.special.entr(probs).sum(dim=1)
    assert abs(metrics.nll(log_probs, y) - entropy.mean()) < 4 * (each - entropy).std() / math.sqrt(rows)
    expected_brier = (probs * (1 - probs)).sum(dim=1)
    excess = (probs - torch.eye(4)[y]).square().sum(dim=1) - expected_brier
    assert abs(metrics.brier(probs, y) - expected_brier.mean()) < 4 * excess.std() / math.sqrt(rows)
    bins = metrics.calibration_bins(probs.max(dim=1).values, probs.argmax(dim=1) == y)
    errors = (bins.confidence * (1 - bins.confidence) / bins.rows.clamp_min(1)).sqrt()
    assert int((bins.rows > 0).sum()) >= 11  # of 15: none below 1 / C
    assert bool(((bins.accuracy - bins.confidence).abs() <= 4 * errors).all())


@pytest.mark.parametrize(
    ("probs", "y"),
    [
        (torch.full((2, 5, 3), 1 / 3), torch.zeros(5, dtype=torch.int64)),
        (torch.full((5, 3), 1 / 3), torch.zeros(4, dtype=torch.int64)),
        (torch.full((5, 3), 1 / 3), torch.zeros(5, 1, dtype=torch.int64)),
        (torch.full((5, 3), 1 / 3), torch.zeros(5)),
        (torch.full((5, 3), 1 / 3), torch.tensor([0, 1, 2, 3, 0])),
        (torch.full((5, 3), 1 / 3), torch.tensor([0, 1, 2, -1, 0])),
    ],
)
@pytest.mark.parametrize("score", [metrics.accuracy, metrics.nll, metrics.brier])
def test_probabilities_and_targets_that_do_not_fit_are_refused(score: object, probs: Tensor, y: Tensor) -> None:
    with pytest.raises(DataError, match="metrics: want"):
        score(probs, y)  # type: ignore[operator]


# Calibration


def confidences_off_edges(rows: int, num_bins: int, seed: int) -> tuple[Tensor, Tensor]:
    """Confidences inside bins, on no edge, where every rule for edges agrees; and whether they are correct."""
    source = generator(seed, "confidences")
    place = torch.randint(num_bins, (rows,), generator=source)
    inside = 0.01 + 0.98 * torch.rand(rows, generator=source, dtype=torch.float64)
    return (place + inside) / num_bins, torch.rand(rows, generator=source) < 0.6


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_bins_are_those_of_scikit_learns_calibration_curve(num_bins: int) -> None:
    confidence, correct = confidences_off_edges(300, num_bins, 0)
    bins = metrics.calibration_bins(confidence, correct, num_bins=num_bins)
    accuracy, mean = sklearn.calibration.calibration_curve(correct.numpy(), confidence.numpy(), n_bins=num_bins)
    filled = bins.rows > 0
    close(bins.accuracy[filled], accuracy)
    close(bins.confidence[filled], mean)
    expected = np.histogram(confidence.numpy(), bins=num_bins, range=(0, 1))[0]
    assert bins.rows.tolist() == expected.tolist()
    gap = np.abs(accuracy - mean) @ expected[expected > 0] / 300
    close(metrics.ece(bins), gap)


@pytest.mark.parametrize("num_bins", [5, 15])
def test_ece_is_netcals(num_bins: int) -> None:
    netcal = pytest.importorskip("netcal.metrics", reason="netcal (extra 'oracles') is not installed")
    confidence, correct = confidences_off_edges(400, num_bins, 1)
    expected = netcal.ECE(num_bins).measure(confidence.numpy(), correct.numpy().astype(int))
    close(metrics.ece(metrics.calibration_bins(confidence, correct, num_bins=num_bins)), expected)


@pytest.mark.parametrize("num_bins", [1, 2, 3, 7, 10, 15, 49])
def test_edges_belong_to_the_bin_below_and_zero_to_the_first(num_bins: int) -> None:
    """(a, b], the first bin closed at 0: the confidences 0, 1/M, ..., 1 fill bins 0, 0, 1, ..., M - 1."""
    edges = torch.tensor([k / num_bins for k in range(num_bins + 1)], dtype=torch.float64)
    bins = metrics.calibration_bins(edges, torch.ones(num_bins + 1), num_bins=num_bins)
    assert bins.rows.tolist() == [2] + [1] * (num_bins - 1)
    assert int(bins.rows.sum()) == num_bins + 1
    close(bins.confidence[1:], edges[2:])
    close(bins.confidence[0], edges[1] / 2)


def test_next_numbers_beside_an_edge_fall_on_their_own_side() -> None:
    edge = 0.6
    around = torch.tensor([np.nextafter(edge, 0), edge, np.nextafter(edge, 1)], dtype=torch.float64)
    assert metrics.calibration_bins(around, torch.ones(3), num_bins=5).rows.tolist() == [0, 0, 2, 1, 0]


@profile
@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=40), num_bins=st.sampled_from([1, 3, 10, 15, 30]))
def test_every_row_is_counted_once(values: list[int], num_bins: int) -> None:
    confidence = torch.tensor(values, dtype=torch.float64) / 30
    correct = torch.tensor(values) % 3 == 0
    bins = metrics.calibration_bins(confidence, correct, num_bins=num_bins)
    assert bins.rows.shape == (num_bins,)
    assert int(bins.rows.sum()) == len(values)
    close((bins.rows * bins.confidence).sum(), confidence.sum(), atol=1e-10)
    close((bins.rows * bins.accuracy).sum(), correct.sum(), atol=1e-10)
    assert 0 <= float(metrics.ece(bins)) <= 1


@pytest.mark.parametrize(("confidence", "correct", "expected"), [(0.7, True, 0.3), (1.0, True, 0.0), (1.0, False, 1.0)])
def test_ece_of_a_single_row(confidence: float, correct: bool, expected: float) -> None:
    bins = metrics.calibration_bins(torch.tensor([confidence], dtype=torch.float64), torch.tensor([correct]))
    assert int(bins.rows.sum()) == 1
    close(metrics.ece(bins), expected)


@pytest.mark.parametrize("confidence", [0.0, 0.35, 0.6, 1.0])
def test_ece_of_identical_confidences_is_their_distance_from_the_accuracy(confidence: float) -> None:
    correct = torch.tensor([True, False, False, True, False])
    bins = metrics.calibration_bins(torch.full((5,), confidence, dtype=torch.float64), correct, num_bins=10)
    close(metrics.ece(bins), abs(0.4 - confidence))


def test_ece_does_not_depend_on_the_order_of_rows() -> None:
    confidence, correct = confidences_off_edges(60, 7, 2)
    order = torch.randperm(60, generator=generator(2))
    first, second = (
        metrics.ece(metrics.calibration_bins(confidence[rows], correct[rows], num_bins=7))
        for rows in (torch.arange(60), order)
    )
    close(second, first)


def test_bad_bins_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_bins"):
        metrics.calibration_bins(torch.rand(4, generator=generator(0)), torch.ones(4), num_bins=0)
    with pytest.raises(DataError, match=r"\[4, 2\] and \[4\]"):
        metrics.calibration_bins(torch.full((4, 2), 0.5), torch.ones(4))


# Out of distribution


def random_scores(seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    """Uncertainty of 40 rows inside and 27 outside, on whole numbers where `ties`."""
    source = generator(seed, "scores")
    inside, outside = torch.randn(40, generator=source), torch.randn(27, generator=source) + 1.0
    return (inside.round(), outside.round()) if ties else (inside, outside)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_auroc_is_the_share_of_pairs_in_order(seed: int, ties: bool) -> None:
    inside, outside = random_scores(seed, ties)
    pairs = outside[:, None] - inside[None, :]
    expected = float(((pairs > 0).double() + 0.5 * (pairs == 0)).mean())
    assert metrics.auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    statistic = scipy.stats.mannwhitneyu(outside.numpy(), inside.numpy()).statistic
    assert metrics.auroc(inside, outside) == pytest.approx(statistic / (40 * 27), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_of_the_negated_score_is_the_complement(ties: bool) -> None:
    inside, outside = random_scores(3, ties)
    found = metrics.auroc(inside, outside)
    assert found > 0.6
    assert metrics.auroc(-inside, -outside) == pytest.approx(1 - found, abs=1e-12)
    assert metrics.auroc(outside, inside) == pytest.approx(1 - found, abs=1e-12)


def test_auroc_and_fpr_of_constant_and_perfect_scores() -> None:
    assert metrics.auroc(torch.full((5,), 0.3), torch.full((3,), 0.3)) == 0.5
    assert metrics.fpr_at_tpr(torch.full((5,), 0.3), torch.full((3,), 0.3)) == 1.0
    inside, outside = torch.linspace(0, 1, 5), torch.linspace(2, 3, 4)
    assert metrics.auroc(inside, outside) == 1.0
    assert metrics.fpr_at_tpr(inside, outside) == 0.0
    assert metrics.auroc(outside, inside) == 0.0
    assert metrics.fpr_at_tpr(outside, inside) == 1.0


@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fpr_at_the_first_threshold_that_flags_enough(seed: int, ties: bool, tpr: float) -> None:
    inside, outside = random_scores(seed, ties)
    thresholds = torch.cat([inside, outside]).unique().flip(0)
    first = next(t for t in thresholds if float((outside >= t).double().mean()) >= tpr)
    expected = float((inside >= first).double().mean())
    assert metrics.fpr_at_tpr(inside, outside, tpr=tpr) == pytest.approx(expected, abs=1e-12)


def test_fpr95_takes_no_threshold_below_95_percent() -> None:
    """18 of 19 flagged is 94.7 %, the nearest to 95 %: the first one above costs all rows inside."""
    outside = torch.tensor([5.0] * 18 + [0.0])
    assert metrics.fpr_at_tpr(torch.full((7,), 1.0), outside) == 1.0
    assert metrics.fpr_at_tpr(torch.full((7,), 1.0), torch.tensor([5.0] * 19 + [0.0])) == 0.0


# Regression


def test_rmse_is_scikit_learns() -> None:
    mean, _, y, _ = random_mixture((1, 30, 2), 0)
    flat = y.flatten().numpy(), mean[0].flatten().numpy()
    close(metrics.rmse(mean[0], y), math.sqrt(sklearn.metrics.mean_squared_error(*flat)))


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
def test_mixture_scores_are_those_of_scoringrules(weighted: bool) -> None:
    oracle = pytest.importorskip("scoringrules", reason="scoringrules (extra 'oracles') is not installed")
    means, scales, y, log_weight = random_mixture((5, 6, 1), 4, weighted)
    mu, sigma = means[:, :, 0].T.numpy(), scales.expand_as(means)[:, :, 0].T.numpy()  # [B, S]
    weights = log_weight.exp().expand(6, 5).numpy()
    passed = log_weight if weighted else None
    crps = oracle.crps_mixnorm(y[:, 0].numpy(), mu, sigma, weights)
    close(metrics.mixture_crps(means, scales, y, passed)[:, 0], crps)
    logs = oracle.logs_mixnorm(y[:, 0].numpy(), mu, sigma, weights)
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
    monkeypatch.setattr(metrics, "PAIR_VALUES", samples_at_once * means.numel())
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


@profile
@cases
def test_class_scores_do_not_depend_on_the_order_of_rows_and_classes(size: tuple[int, int, int], seed: int) -> None:
    log_probs, y = random_classes(size, seed)
    rows, classes = (torch.randperm(n, generator=generator(seed, n)) for n in size[1:])
    new_name = classes.argsort()  # class c stands at place new_name[c]
    moved, targets = log_probs[0][rows][:, classes], new_name[y[rows]]
    close(metrics.nll(moved, targets), metrics.nll(log_probs[0], y), atol=1e-10)
    close(metrics.brier(moved.exp(), targets), metrics.brier(log_probs[0].exp(), y), atol=1e-10)
    close(metrics.accuracy(moved, targets), metrics.accuracy(log_probs[0], y))


def test_scores_far_from_every_sample_stay_finite() -> None:
    means, scales, _, log_weight = random_mixture((4, 3, 2), 11)
    y = torch.full((3, 2), 1e6, dtype=torch.float64)
    found = mixture_scores(means, scales, y, log_weight)
    assert all(bool(torch.isfinite(value)) for value in found.values())
    close(found["crps"], 1e6, rtol=1e-5)
    assert float(found["pit"]) == 1.0
    assert float(found["coverage"]) == 0.0
