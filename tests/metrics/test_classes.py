"""Scores of class probabilities against scikit-learn and the slow obvious version, their edges and symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics
import torch
from predictions import cases, close, profile, random_classes
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator

Score = Callable[[Tensor, Tensor], Tensor]


def top_2(probs: Tensor, y: Tensor) -> Tensor:
    return metrics.top_k(probs, y, k=2)


SCORES = [metrics.accuracy, top_2, metrics.nll, metrics.brier, metrics.classwise_ece]


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
        (torch.full((5, 3), math.nan), torch.tensor([0, 1, 2, 1, 0])),
    ],
)
@pytest.mark.parametrize("score", SCORES)
def test_probabilities_and_targets_that_do_not_fit_are_refused(score: Score, probs: Tensor, y: Tensor) -> None:
    with pytest.raises(DataError, match="metrics"):
        score(probs, y)


def test_no_rows_are_refused() -> None:
    probs, y = torch.full((0, 3), 0.5), torch.zeros(0, dtype=torch.int64)
    for score in SCORES:
        with pytest.raises(DataError, match="at least one row"):
            score(probs, y)
    metrics.check_probs(probs, y)  # a batch without rows is no mistake


def test_a_nan_is_named_by_its_row() -> None:
    probs = torch.full((5, 3), 1 / 3)
    probs[3, 1] = math.nan
    with pytest.raises(DataError, match="NaN in row 3"):
        metrics.brier(probs, torch.zeros(5, dtype=torch.int64))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_top_k_is_scikit_learns(k: int) -> None:
    log_probs, y = random_classes((1, 200, 5), 5)
    expected = sklearn.metrics.top_k_accuracy_score(y.numpy(), log_probs[0].exp().numpy(), k=k, labels=range(5))
    close(metrics.top_k(log_probs[0].exp(), y, k=k), expected)


def test_top_k_ranges_from_the_accuracy_to_one() -> None:
    """Also where probabilities tie, as those of saturated modules do."""
    probs = torch.tensor([[0.4, 0.4, 0.2], [0.2, 0.4, 0.4], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    y = torch.tensor([1, 1, 2, 2])
    assert [float(metrics.top_k(probs, y, k=k)) for k in (1, 2, 3)] == [0.25, 0.5, 1.0]
    close(metrics.top_k(probs, y, k=1), metrics.accuracy(probs, y))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_k_of_no_such_k_is_refused(k: int) -> None:
    with pytest.raises(ConfigError, match=r"top_k\(k=\): want 1 to the number of classes, 3"):
        metrics.top_k(torch.full((2, 3), 1 / 3), torch.tensor([0, 1]), k=k)


def test_a_class_without_any_chance_costs_infinitely_much() -> None:
    log_probs = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]], dtype=torch.float64)
    assert float(metrics.nll(log_probs, torch.tensor([0, 0]))) == 0.0
    assert float(metrics.nll(log_probs, torch.tensor([0, 1]))) == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scores_are_means_in_float64_of_what_is_given(dtype: torch.dtype) -> None:
    """A mean of 20,000 rows in half precision would lose its digits: only the given numbers are rounded."""
    log_probs, y = random_classes((1, 20_000, 3), 6)
    given = log_probs[0].to(dtype)
    kept = given.clone()
    close(metrics.nll(given, y), metrics.nll(given.double(), y), atol=0)
    probs = log_probs[0].exp().to(dtype)
    close(metrics.brier(probs, y), metrics.brier(probs.double(), y), atol=0)
    assert metrics.nll(given, y).dtype == metrics.brier(probs, y).dtype == torch.float64
    assert torch.equal(given, kept)


def test_what_is_added_to_all_logits_of_a_row_changes_nothing() -> None:
    logits = random_classes((1, 50, 4), 7)[0][0]
    y = torch.arange(50) % 4
    moved = (logits + 100.0 * torch.arange(50, dtype=torch.float64).unsqueeze(1)).log_softmax(dim=1)
    close(metrics.nll(moved, y), metrics.nll(logits, y), atol=1e-10)
    huge = (1e4 * logits).log_softmax(dim=1)
    assert math.isfinite(float(metrics.nll(huge, y)))
    assert 0.0 <= float(metrics.brier(huge.exp(), y)) <= 2.0


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
    close(metrics.top_k(moved, targets, k=2), metrics.top_k(log_probs[0], y, k=2))
