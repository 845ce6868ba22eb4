"""Calibration against scikit-learn, netcal and torchmetrics, and the edges of bins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sklearn.calibration
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import close, profile, random_classes
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator


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
def test_ece_is_netcals(num_bins: int, oracle: Any) -> None:
    netcal = oracle("netcal.metrics")
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


@pytest.mark.parametrize("num_bins", [5, 15])
def test_mce_is_netcals(num_bins: int, oracle: Any) -> None:
    netcal = oracle("netcal.metrics")
    confidence, correct = confidences_off_edges(400, num_bins, 3)
    expected = netcal.MCE(num_bins).measure(confidence.numpy(), correct.numpy().astype(int))
    close(metrics.mce(metrics.calibration_bins(confidence, correct, num_bins=num_bins)), expected)


@pytest.mark.parametrize(("norm", "score"), [("l1", metrics.ece), ("l2", metrics.rmsce), ("max", metrics.mce)])
def test_three_norms_are_those_of_torchmetrics(norm: str, score: object, oracle: Any) -> None:
    peer = oracle("torchmetrics.functional.classification")
    probs, y = random_classes((1, 300, 4), 0)
    probs = probs[0].exp()
    confidence, predicted = probs.max(dim=1)
    bins = metrics.calibration_bins(confidence, predicted == y, num_bins=10)
    expected = peer.multiclass_calibration_error(probs, y, num_classes=4, n_bins=10, norm=norm)
    close(score(bins), float(expected), atol=1e-6)  # type: ignore[operator]  # it reckons in float32


@profile
@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=40), num_bins=st.sampled_from([1, 3, 10, 15, 30]))
def test_norms_are_in_order(values: list[int], num_bins: int) -> None:
    """Jensen: mean gap <= root mean squared gap <= largest gap; against NumPy, bin by bin."""
    confidence, correct = torch.tensor(values, dtype=torch.float64) / 30, torch.tensor(values) % 3 == 0
    for bins in (
        metrics.calibration_bins(confidence, correct, num_bins=num_bins),
        metrics.adaptive_bins(confidence, correct, num_bins=num_bins),
    ):
        rows = bins.rows.numpy()
        gaps = np.abs(bins.accuracy.numpy() - bins.confidence.numpy())[rows > 0]
        close(metrics.ece(bins), np.average(gaps, weights=rows[rows > 0]))
        close(metrics.rmsce(bins), math.sqrt(np.average(gaps**2, weights=rows[rows > 0])))
        close(metrics.mce(bins), gaps.max())
        assert metrics.ece(bins) <= metrics.rmsce(bins) + 1e-12 <= metrics.mce(bins) + 2e-12


@pytest.mark.parametrize(("rows", "num_bins"), [(60, 15), (61, 15), (74, 15), (4, 7), (20, 1), (33, 32)])
def test_adaptive_bins_are_those_of_tensor_split(rows: int, num_bins: int) -> None:
    confidence, correct = confidences_off_edges(rows, 3, 4)
    assert len(confidence.unique()) == rows
    order = confidence.argsort()
    parts = order.tensor_split(num_bins)
    bins = metrics.adaptive_bins(confidence, correct, num_bins=num_bins)
    assert bins.rows.tolist() == [len(part) for part in parts]
    for place, part in enumerate(parts):
        if len(part):
            close(bins.confidence[place], confidence[part].mean())
            close(bins.accuracy[place], correct[part].double().mean())


@profile
@given(
    values=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    num_bins=st.sampled_from([1, 3, 7]),
    seed=st.integers(0, 99),
)
def test_adaptive_bins_keep_ties_together_in_any_order(values: list[int], num_bins: int, seed: int) -> None:
    confidence, correct = torch.tensor(values, dtype=torch.float64) / 6, torch.arange(len(values)) % 3 == 0
    bins = metrics.adaptive_bins(confidence, correct, num_bins=num_bins)
    assert int(bins.rows.sum()) == len(values)
    order = torch.randperm(len(values), generator=generator(seed))
    for first, second in zip(
        bins, metrics.adaptive_bins(confidence[order], correct[order], num_bins=num_bins), strict=True
    ):
        close(second.double(), first.double())
    filled = bins.confidence[bins.rows > 0]
    assert bool((filled[1:] > filled[:-1]).all())
    # Whole groups: counts of bins are sums of counts of neighbouring values.
    groups = confidence.unique(return_counts=True)[1].cumsum(0).tolist()
    assert set(bins.rows.cumsum(0).tolist()) <= {0, *groups}


def test_adaptive_bins_of_ties_go_where_the_middle_row_falls() -> None:
    confidence = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    assert metrics.adaptive_bins(confidence, torch.ones(6), num_bins=3).rows.tolist() == [1, 4, 1]
    assert metrics.adaptive_bins(confidence, torch.ones(6), num_bins=2).rows.tolist() == [5, 1]


@pytest.mark.parametrize("confidence", [0.0, 0.35, 1.0])
def test_ace_of_identical_confidences_does_not_collapse(confidence: float) -> None:
    """Edges by quantiles all coincide there, and a bin between equal edges holds nothing."""
    correct = torch.tensor([True, False, False, True, False])
    bins = metrics.adaptive_bins(torch.full((5,), confidence, dtype=torch.float64), correct, num_bins=3)
    assert sorted(bins.rows.tolist()) == [0, 0, 5]
    close(metrics.ece(bins), abs(0.4 - confidence))


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_classwise_ece_is_the_mean_over_classes_of_scikit_learns_curves(num_bins: int) -> None:
    log_probs, y = random_classes((1, 200, 4), 8)
    probs = log_probs[0].exp()
    each = []
    for c in range(4):
        p, truth = probs[:, c].numpy(), (y == c).numpy()
        accuracy, mean = sklearn.calibration.calibration_curve(truth, p, n_bins=num_bins)
        counts = np.histogram(p, bins=num_bins, range=(0, 1))[0]
        each.append(np.abs(accuracy - mean) @ counts[counts > 0] / 200)
    close(metrics.classwise_ece(probs, y, num_bins=num_bins), np.mean(each))


def test_classwise_ece_does_not_depend_on_the_order_of_rows_and_classes() -> None:
    log_probs, y = random_classes((1, 60, 5), 9)
    probs, classes, rows = (
        log_probs[0].exp(),
        torch.randperm(5, generator=generator(9)),
        torch.randperm(60, generator=generator(8)),
    )
    moved = metrics.classwise_ece(probs[rows][:, classes], classes.argsort()[y[rows]])
    close(moved, metrics.classwise_ece(probs, y))


@pytest.mark.parametrize("rows", [2_000, 32_000])
def test_calibration_error_of_labels_drawn_from_the_predictive_falls_as_one_over_root_n(rows: int) -> None:
    """In each bin the gap is normal noise: E[ECE] = sum_m sqrt(2 / pi n_m v_m) / N, v_m the variance of a label."""
    probs = random_classes((1, rows, 4), 10)[0][0].exp()
    confidence, predicted = probs.max(dim=1)
    found = []
    for repeat in range(30):
        y = torch.multinomial(probs, 1, generator=generator(10, rows, repeat)).squeeze(1)
        bins = metrics.calibration_bins(confidence, predicted == y, num_bins=10)
        found.append(float(metrics.ece(bins)))
    place = (confidence * 10).ceil().long() - 1
    variance = torch.zeros(10, dtype=torch.float64).index_add_(0, place, confidence * (1 - confidence))
    expected = float((2 / math.pi * variance).sqrt().sum()) / rows
    assert abs(np.mean(found) - expected) < 4 * np.std(found, ddof=1) / math.sqrt(30)
    assert expected == pytest.approx(1.0 / math.sqrt(rows), rel=0.25)


def test_numbers_that_are_no_confidences_are_refused() -> None:
    confidence, correct = torch.full((4,), 0.5), torch.ones(4)
    for bins in (metrics.calibration_bins, metrics.adaptive_bins):
        with pytest.raises(DataError, match="at least one row"):
            bins(confidence[:0], correct[:0])
        with pytest.raises(DataError, match="NaN in row 0"):
            bins(confidence * math.nan, correct)
        with pytest.raises(DataError, match="between 0 and 1"):
            bins(confidence + 3, correct)  # a logit
        with pytest.raises(DataError, match=r"correct=\): want numbers between 0 and 1, got 7"):
            bins(confidence, 7 * correct)  # classes, not whether they are right
        with pytest.raises(ConfigError, match="num_bins"):
            bins(confidence, correct, num_bins=0)
    with pytest.raises(ConfigError, match="num_bins"):
        metrics.classwise_ece(torch.full((2, 3), 1 / 3), torch.tensor([0, 1]), num_bins=0)
    empty = metrics.Bins(torch.zeros(3, dtype=torch.int64), torch.zeros(3), torch.zeros(3))
    for score in (metrics.ece, metrics.rmsce, metrics.mce):
        with pytest.raises(DataError, match="at least one row"):
            score(empty)
