"""Rows outside told from rows inside, against scikit-learn, SciPy, torchmetrics and counting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator


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


def average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """sum over falling thresholds of the growth of recall times the precision, by counting."""
    total, before = 0.0, 0.0
    for threshold in np.unique(score)[::-1]:
        flagged = score >= threshold
        recall = positive[flagged].sum() / positive.sum()
        total += (recall - before) * positive[flagged].mean()
        before = recall
    return total


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_aupr_is_the_average_precision_of_either_side(seed: int, ties: bool) -> None:
    inside, outside = random_scores(seed, ties)
    score = torch.cat([inside, outside]).numpy()
    positive = np.arange(67) >= 40
    assert metrics.aupr_out(inside, outside) == pytest.approx(average_precision(positive, score), abs=1e-12)
    assert metrics.aupr_in(inside, outside) == pytest.approx(average_precision(~positive, -score), abs=1e-12)
    assert metrics.aupr_in(inside, outside) == metrics.aupr_out(-outside, -inside)


def test_areas_are_those_of_torchmetrics(oracle: Any) -> None:
    peer = oracle("torchmetrics.functional.classification")
    inside, outside = random_scores(5, ties=True)
    score = torch.cat([inside, outside]).sigmoid()
    positive = (torch.arange(67) >= 40).long()
    found = metrics.auroc(inside, outside), metrics.aupr_out(inside, outside), metrics.aupr_in(inside, outside)
    expected = (
        peer.binary_auroc(score, positive),
        peer.binary_average_precision(score, positive),
        peer.binary_average_precision(1 - score, 1 - positive),
    )
    assert found == pytest.approx([float(value) for value in expected], abs=1e-5)  # in float32


def test_aupr_without_information_is_the_share_of_positives() -> None:
    same = torch.full((30,), 0.3), torch.full((10,), 0.3)
    assert metrics.aupr_out(*same) == pytest.approx(0.25, abs=1e-12)
    assert metrics.aupr_in(*same) == pytest.approx(0.75, abs=1e-12)
    apart = torch.linspace(0, 1, 30), torch.linspace(2, 3, 10)
    assert (metrics.aupr_out(*apart), metrics.aupr_in(*apart)) == pytest.approx((1.0, 1.0), abs=1e-12)


FIGURES = [metrics.auroc, metrics.aupr_in, metrics.aupr_out, metrics.fpr_at_tpr]


@pytest.mark.parametrize("figure", FIGURES)
def test_only_the_order_of_scores_counts(figure: object) -> None:
    inside, outside = random_scores(6, ties=False)
    expected = figure(inside, outside)  # type: ignore[operator]
    order = torch.randperm(40, generator=generator(6))
    moved = figure(inside[order].double().exp() * 1e5, outside.double().exp() * 1e5)  # type: ignore[operator]
    assert moved == pytest.approx(expected, abs=1e-12)
    top, bottom = inside.argmax(), outside.argmin()
    endless, deep = inside.clone(), outside.clone()
    endless[top], deep[bottom] = 1e3, -1e3
    expected = figure(endless, deep)  # type: ignore[operator]
    endless[top], deep[bottom] = math.inf, -math.inf
    assert figure(endless, deep) == expected  # type: ignore[operator]


@pytest.mark.parametrize("figure", FIGURES)
def test_scores_of_one_side_alone_or_of_another_shape_are_refused(figure: object) -> None:
    some = torch.linspace(0, 1, 5)
    for scores, says in [
        ((some, some[:0]), r"score_out=\): want at least one row"),
        ((some[:0], some), r"score_in=\): want at least one row"),
        ((some, some.view(5, 1)), r"score_out of shape \[N\], got \[5, 1\]"),
        ((some.view(1, 5), some), r"score_in of shape \[N\], got \[1, 5\]"),
        ((some, some * math.nan), "NaN in row 0"),
    ]:
        with pytest.raises(DataError, match=says):
            figure(*scores)  # type: ignore[operator]


@pytest.mark.parametrize("tpr", [0.0, -0.1, 1.01, math.nan])
def test_a_rate_that_is_none_is_refused(tpr: float) -> None:
    with pytest.raises(ConfigError, match="tpr="):
        metrics.fpr_at_tpr(torch.zeros(2), torch.ones(3), tpr=tpr)
