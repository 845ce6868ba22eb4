"""Mistakes of other suites, each with the number on the page of definitions: here they must not happen."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from predictions import close, random_classes, random_mixture
from torch import Tensor

from bnn import metrics, uncertainty
from bnn.errors import DataError
from bnn.seeding import generator


def apart() -> Tensor:
    """Two samples that are sure of different classes on row 0, and agree to be unsure on row 1: [2, 2, 3]."""
    return torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0]], [[0, 1.0, 0], [0.5, 0.5, 0]]], dtype=torch.float64)


def test_01_a_confidence_of_one_shares_the_last_bin() -> None:
    """Bins [a, b) need a hidden bin more for it; float32 saturates at logits of 17 and fills that bin."""
    confidence = torch.sigmoid(torch.tensor([20.0, 20.0, 2.75]))
    assert confidence[0] == 1.0
    bins = metrics.calibration_bins(confidence, torch.tensor([1, 0, 1]), num_bins=10)
    assert bins.rows.tolist() == [0] * 9 + [3]
    close(metrics.ece(bins), abs(2 / 3 - float(confidence.double().mean())))


@pytest.mark.parametrize("bins_of", [metrics.calibration_bins, metrics.adaptive_bins])
def test_02_no_confidence_on_an_edge_is_dropped(bins_of: object) -> None:
    confidence = torch.arange(11, dtype=torch.float64) / 10
    bins = bins_of(confidence, torch.ones(11), num_bins=10)  # type: ignore[operator]
    assert int(bins.rows.sum()) == 11
    close((bins.rows * bins.confidence).sum(), 5.5)


def test_03_the_number_of_bins_is_fifteen_unless_it_is_said() -> None:
    for function in (metrics.calibration_bins, metrics.adaptive_bins, metrics.classwise_ece):
        option = inspect.signature(function).parameters["num_bins"]
        assert (option.default, option.kind) == (15, inspect.Parameter.KEYWORD_ONLY)
    confidence = torch.linspace(0, 1, 31)
    assert metrics.calibration_bins(confidence, torch.ones(31)).rows.shape == (15,)


def test_04_two_classes_are_binned_by_the_predicted_one() -> None:
    """By P(y = 1) a row of 0.1 would fall into a low bin; its confidence is 0.9. The two errors differ."""
    positive = torch.tensor([0.1, 0.1, 0.1, 0.9], dtype=torch.float64)
    probs = torch.stack([1 - positive, positive], dim=1)
    y = torch.tensor([0, 0, 1, 0])
    confidence, predicted = probs.max(dim=1)
    top = metrics.ece(metrics.calibration_bins(confidence, predicted == y, num_bins=10))
    close(top, 0.4)  # one bin: half are right at a confidence of 0.9
    close(metrics.classwise_ece(probs, y, num_bins=10), (3 * abs(1 / 3 - 0.1) + 0.9) / 4)


def test_05_a_probability_above_one_by_rounding_stays_one() -> None:
    """Elsewhere any value outside [0, 1] makes the whole tensor logits, and a softmax of probabilities is taken."""
    probs = torch.tensor([[1.0 + 1e-7, 0.0], [0.3, 0.7]])
    assert probs[0, 0] > 1
    y = torch.tensor([0, 0])
    close(metrics.brier(probs, y), 0.49, atol=1e-6)
    bins = metrics.calibration_bins(probs.max(dim=1).values, torch.tensor([1, 0]), num_bins=5)
    assert bins.rows.tolist() == [0, 0, 0, 1, 1]


def test_05_logits_are_refused_and_not_guessed() -> None:
    logits, y = 3 * torch.randn(6, 4, generator=generator(5)), torch.arange(6) % 4
    for score in (metrics.brier, metrics.nll, metrics.classwise_ece):
        with pytest.raises(DataError, match=r"sum to 1, got .*softmax over the classes first"):
            score(logits, y)
    metrics.nll(logits.log_softmax(dim=1), y)
    with pytest.raises(DataError, match="log_softmax"):
        metrics.nll(logits.softmax(dim=1), y)  # probabilities, where their logarithms are meant


def test_06_the_square_norm_has_no_hidden_correction() -> None:
    confidence, correct = torch.tensor([0.9, 0.8, 0.3], dtype=torch.float64), torch.tensor([1, 0, 1])
    bins = metrics.calibration_bins(confidence, correct, num_bins=2)
    close(metrics.rmsce(bins), math.sqrt(2 / 3 * (0.5 - 0.85) ** 2 + 1 / 3 * (1 - 0.3) ** 2))


def test_07_the_mixture_is_not_the_normal_of_mean_parameters() -> None:
    """A mean of means and scales loses the epistemic part, and calls the gap between two samples likely."""
    means = torch.tensor([-3.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    scales = torch.tensor([0.5, 0.7], dtype=torch.float64).view(2, 1, 1)
    gap = torch.zeros(1, 1, dtype=torch.float64)
    of_means = scipy.stats.norm.logpdf(0.0, 0.0, 0.6)
    assert float(metrics.mixture_log_prob(means, scales, gap)) < of_means - 5
    split = uncertainty.variance(means, scales)
    close(split.epistemic, [[9.0]])
    close(split.total, [[9.0 + (0.25 + 0.49) / 2]])


def test_08_brier_is_of_the_mean_and_samples_are_no_rows() -> None:
    log_probs, y = random_classes((3, 40, 4), 8)
    probs = log_probs.exp()
    own = torch.stack([metrics.brier(one, y) for one in probs]).mean()
    assert metrics.brier(probs.mean(dim=0), y) < own - 0.05
    with pytest.raises(DataError, match="average over samples first"):
        metrics.brier(probs, y)


def test_09_the_mean_of_softmax_is_not_the_softmax_of_the_mean() -> None:
    logits = 6 * torch.randn(4, 30, 3, generator=generator(9), dtype=torch.float64)
    y = torch.arange(30) % 3
    log_probs = logits.log_softmax(dim=-1)
    of_probs = metrics.nll(log_probs.logsumexp(dim=0) - math.log(4), y)
    each = np.log(scipy.special.softmax(logits.numpy(), axis=-1).mean(axis=0))
    close(of_probs, -each[np.arange(30), y.numpy()].mean())
    assert abs(of_probs - metrics.nll(logits.mean(dim=0).log_softmax(dim=-1), y)) > 0.1


def test_10_three_entropies_are_three_scores() -> None:
    """A score called entropy may be that of the mean predictive, or the mean of the samples' own: they rank rows apart."""
    probs = apart()
    close(uncertainty.entropy(probs.mean(dim=0)), [math.log(2)] * 2)
    close(uncertainty.expected_entropy(probs), [0.0, math.log(2)])
    close(uncertainty.mutual_information(probs), [math.log(2), 0.0])


def test_11_batches_of_rows_add_up() -> None:
    """Rows of later batches are not taken for more samples: means weighted by rows are the whole's."""
    log_probs, y = random_classes((1, 50, 4), 11)
    parts = [(log_probs[0][rows], y[rows]) for rows in torch.arange(50).split(16)]
    for score in (metrics.accuracy, metrics.nll):
        total = sum(float(score(*part)) * len(part[1]) for part in parts) / 50
        close(score(log_probs[0], y), total)


def test_12_votes_have_no_axis_of_samples() -> None:
    """Shares .7 and .6 of the winner are a mean ratio of .35, whatever B and C are."""
    votes = torch.tensor([[7, 3, 0], [4, 6, 0]])
    close(uncertainty.variation_ratio(votes).mean(), 0.35)
    assert uncertainty.variation_ratio(votes.expand(5, 2, 3)).shape == (5, 2)


def test_13_each_row_of_information_is_clamped_before_the_mean() -> None:
    probs = random_classes((1, 500, 3), 13)[0].exp().expand(7, -1, -1)
    raw = uncertainty.entropy(probs.mean(dim=0)) - uncertainty.expected_entropy(probs)
    assert raw.min() < 0
    assert uncertainty.mutual_information(probs).mean() > raw.mean()
    assert uncertainty.mutual_information(probs).min() == 0


def test_14_inputs_are_left_alone_and_one_sample_is_no_nan() -> None:
    probs = apart()
    kept = probs.clone()
    uncertainty.mutual_information(probs)
    assert torch.equal(uncertainty.entropy(torch.eye(3, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(probs, kept)
    # E[mu^2] - E[mu]^2 of equal means far from 0 falls below 0 by rounding; divided by S - 1 it is NaN for one sample.
    means = torch.full((3, 4, 2), 1e8 + 0.3, dtype=torch.float64)
    assert torch.equal(
        uncertainty.variance(means, torch.ones(3, 1, 1)).epistemic, torch.zeros(4, 2, dtype=torch.float64)
    )
    assert torch.equal(uncertainty.variance(means[:1], torch.ones(1)).epistemic, torch.zeros(4, 2, dtype=torch.float64))


def test_17_coverage_at_risk_is_full_where_the_risk_of_all_rows_is_allowed() -> None:
    """The surest of four rows is wrong: kept alone it has risk 1, with all others .25."""
    curve = metrics.risk_coverage(torch.arange(4), torch.tensor([1, 0, 0, 0]))
    assert float(metrics.coverage_at_risk(curve, 0.3)) == 1.0
    assert float(metrics.coverage_at_risk(curve, 0.24)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_18_ties_do_not_depend_on_the_order_of_rows(seed: int) -> None:
    """A saturated module has many rows of one confidence: sorted by chance, any area would come out."""
    wrong = torch.arange(30) < 9
    order = torch.randperm(30, generator=generator(18, seed))
    curve = metrics.risk_coverage(torch.full((30,), 0.0), wrong[order])
    assert float(metrics.aurc(curve)) == 0.3


def test_18_the_area_reaches_down_to_coverage_zero() -> None:
    """Two rows, the surer one wrong: risk 1 from coverage 0 to 1/2, then down to 1/2 at coverage 1."""
    curve = metrics.risk_coverage(torch.tensor([0.1, 0.2]), torch.tensor([1, 0]))
    assert float(metrics.aurc(curve)) == 1.0 * 0.5 + 0.75 * 0.5
    assert float(metrics.augrc(curve)) == 0.25 * 0.5 + 0.5 * 0.5
    assert float(metrics.aurc(metrics.risk_coverage(torch.ones(1), torch.ones(1)))) == 1.0  # one row is no NaN


def test_19_fpr_is_of_the_first_threshold_that_reaches_the_rate() -> None:
    """18 of 19 outside are nearest to 95 %, but below: the first threshold above also flags 2 of 4 inside."""
    outside = torch.tensor([5.0] * 18 + [1.0])
    assert metrics.fpr_at_tpr(torch.tensor([0.0, 0.5, 2.0, 3.0]), outside) == 0.5


def test_19_aupr_draws_no_line_between_points_and_names_its_positives() -> None:
    inside, outside = torch.tensor([0.1, 0.6, 0.2, 0.3]), torch.tensor([0.5, 0.9])
    close(
        torch.tensor(metrics.aupr_out(inside, outside)), 0.5 * 1 + 0.5 * 2 / 3
    )  # trapezia: (1 + 1) / 4 + (1/2 + 2/3) / 4
    close(torch.tensor(metrics.aupr_in(inside, outside)), 0.75 + 0.25 * 4 / 5)
    more = inside.repeat(10)
    assert metrics.aupr_out(more, outside) < metrics.aupr_out(inside, outside) - 0.2  # it hangs on the sizes
    assert metrics.auroc(more, outside) == metrics.auroc(inside, outside)


def test_20_an_excess_in_one_tail_does_not_make_up_for_the_other() -> None:
    """Targets all in the upper tail, of a lopsided mixture: none is in a central interval, at any level below 0.8."""
    means = torch.tensor([0.0, 8.0], dtype=torch.float64).view(2, 1, 1)
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    y = torch.full((1, 1), 8.0, dtype=torch.float64)
    pit = metrics.mixture_cdf(means, torch.ones(1, 1, 1, dtype=torch.float64), y, weights)
    close(pit, [[0.95]], atol=1e-9)
    assert float(metrics.coverage(pit, 0.8)) == 0.0
    assert float(metrics.coverage(pit, 0.91)) == 1.0
    # Mirrored, a low target: the same, though the density at the ends of a central interval is not the same there.
    low = metrics.mixture_cdf(-means, torch.ones(1, 1, 1, dtype=torch.float64), -y, weights)
    assert float(metrics.coverage(low, 0.8)) == 0.0


def test_20_sharpness_is_the_root_of_the_mean_variance() -> None:
    close(metrics.sharpness(torch.tensor([[1.0], [25.0]])), math.sqrt(13))  # the mean of 1 and 5 is 3


def test_20_each_row_is_a_mixture_and_not_the_normal_of_its_moments() -> None:
    means, scales, y, log_weight = random_mixture((2, 30, 1), 20)
    weights = log_weight.exp().view(2, 1, 1)
    mean = (weights * means).sum(dim=0)
    total = (weights * (scales.square() + (means - mean).square())).sum(dim=0)
    matched = metrics.mixture_crps(mean.unsqueeze(0), total.sqrt().unsqueeze(0), y)
    assert float((metrics.mixture_crps(means, scales, y, log_weight) - matched).abs().max()) > 0.05
