"""Ranked figures of many lists at once against bnn.metrics and scikit-learn, and their errors over rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from bnn import metrics
from bnn.evaluation.ranking import Kept, Outside, by_influence, by_resampling, ranked
from bnn.seeding import generator

INSIDE, OUTSIDE, LISTS = 17, 12, 5


def lists(ties: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = generator(seed, ties)
    inside = torch.randn(LISTS, INSIDE, generator=source, dtype=torch.float64)
    outside = 0.8 + torch.randn(LISTS, OUTSIDE, generator=source, dtype=torch.float64)
    return ((2 * inside).round(), (2 * outside).round()) if ties else (inside, outside)


def outside_figures(inside: Tensor, outside: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    both = torch.cat([inside, outside], dim=1)
    weight = torch.ones_like(both) if weight is None else weight
    is_outside = torch.arange(both.shape[1]) >= inside.shape[1]
    falling, rising = ranked(both), ranked(-both)
    one = Outside.of(weight.gather(1, falling.order), is_outside[falling.order], falling.last)
    other = Outside.of(weight.gather(1, rising.order), ~is_outside[rising.order], rising.last)
    return {
        "auroc": one.auroc(),
        "aupr_out": one.average_precision(),
        "aupr_in": other.average_precision(),
        "fpr95": one.fpr(),
    }


@pytest.mark.parametrize("ties", [False, True])
def test_rows_outside_are_told_apart_as_scikit_learn_does(ties: bool) -> None:
    inside, outside = lists(ties)
    found = outside_figures(inside, outside)
    for each in range(LISTS):
        pair = inside[each], outside[each]
        assert found["auroc"][each].item() == pytest.approx(metrics.auroc(*pair), abs=1e-12)
        assert found["aupr_in"][each].item() == pytest.approx(metrics.aupr_in(*pair), abs=1e-12)
        assert found["aupr_out"][each].item() == pytest.approx(metrics.aupr_out(*pair), abs=1e-12)
        assert found["fpr95"][each].item() == pytest.approx(metrics.fpr_at_tpr(*pair), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_weights_are_rows_drawn_again(ties: bool) -> None:
    """scikit-learn takes weights of rows too; some are 0."""
    inside, outside = lists(ties)
    weight = torch.randint(0, 3, (LISTS, INSIDE + OUTSIDE), generator=generator(4)).double()
    found = outside_figures(inside, outside, weight)
    label = np.arange(INSIDE + OUTSIDE) >= INSIDE
    for each in range(LISTS):
        score, of_row = torch.cat([inside[each], outside[each]]).numpy(), weight[each].numpy()
        auroc = sklearn.metrics.roc_auc_score(label, score, sample_weight=of_row)
        precision = sklearn.metrics.average_precision_score(label, score, sample_weight=of_row)
        assert found["auroc"][each].item() == pytest.approx(auroc, abs=1e-12)
        assert found["aupr_out"][each].item() == pytest.approx(precision, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_risk_against_coverage_is_that_of_the_metrics(ties: bool, weighted: bool) -> None:
    score, _ = lists(ties)
    loss = (torch.rand(LISTS, INSIDE, generator=generator(5)) < 0.4).double()
    weight = torch.ones_like(score)
    if weighted:
        weight = torch.randint(0, 3, (LISTS, INSIDE), generator=generator(6)).double()
    order, last = ranked(-score)
    every = Kept.of(weight.gather(1, order), loss.gather(1, order), last)
    for each in range(LISTS):
        again = weight[each].long()
        curve = metrics.risk_coverage(score[each].repeat_interleave(again), loss[each].repeat_interleave(again))
        assert every.aurc()[each].item() == pytest.approx(float(metrics.aurc(curve)), abs=1e-12)
        assert every.augrc()[each].item() == pytest.approx(float(metrics.augrc(curve)), abs=1e-12)
        assert every.coverage_at_risk(0.3)[each].item() == pytest.approx(float(metrics.coverage_at_risk(curve, 0.3)))
        assert every.risk_at_coverage()[each].item() == pytest.approx(float(metrics.risk_at_coverage(curve, 0.8)))


def test_constant_scores_say_nothing() -> None:
    found = outside_figures(torch.zeros(1, INSIDE).double(), torch.zeros(1, OUTSIDE).double())
    assert found["auroc"].item() == 0.5
    assert found["fpr95"].item() == 1.0


# Errors over rows


def test_the_error_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(40, generator=generator(7), dtype=torch.float64)

    def mean(weight: Tensor) -> Tensor:
        return (weight * values).sum(dim=1) / weight.sum(dim=1)

    exact = float(values.std()) / 40**0.5
    assert by_influence(mean, (40,)) == pytest.approx(exact, rel=1e-12)
    assert by_resampling(mean, (40,)) == pytest.approx(exact, rel=4 * 0.05)  # of 200 resamples: 5 % each way
    assert by_resampling(mean, (40,)) == by_resampling(mean, (40,))


def delong(inside: Tensor, outside: Tensor) -> float:
    """Standard error of the AUROC by the placements of each row among the other side."""
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()  # [M, N]
    return float((wins.mean(dim=1).var() / len(outside) + wins.mean(dim=0).var() / len(inside)).sqrt())


@pytest.mark.parametrize("ties", [False, True])
def test_the_error_of_the_auroc_is_delongs(ties: bool) -> None:
    inside, outside = (side[:1] for side in lists(ties))
    both = torch.cat([inside, outside], dim=1)
    order, last = ranked(both)
    is_outside = (torch.arange(INSIDE + OUTSIDE) >= INSIDE)[order]

    def auroc(weight: Tensor) -> Tensor:
        return Outside.of(weight.gather(1, order), is_outside, last).auroc()

    assert by_influence(auroc, (INSIDE, OUTSIDE)) == pytest.approx(delong(inside[0], outside[0]), rel=1e-10)


@pytest.mark.parametrize("name", ["aurc", "augrc", "aupr_out", "aupr_in"])
def test_errors_by_influence_are_the_spread_over_data_sets(name: str) -> None:
    """Over 400 data sets of the same kind: within 4 standard errors of that spread, and of the mean of the errors."""
    size, sets = 150, 400
    source = generator(9, name)
    errors, values = [], []
    for _ in range(sets):
        inside = torch.randn(1, size, generator=source, dtype=torch.float64)
        outside = 0.8 + torch.randn(1, size // 2, generator=source, dtype=torch.float64)
        if name.startswith("aupr"):
            both = torch.cat([inside, outside], dim=1) * (-1 if name == "aupr_in" else 1)
            order, last = ranked(both)
            positive = ((torch.arange(both.shape[1]) >= size) ^ (name == "aupr_in"))[order]
            figure: Callable[[Tensor], Tensor] = lambda w, o=order, p=positive, e=last: Outside.of(  # noqa: E731
                w.gather(1, o), p, e
            ).average_precision()
            sizes: tuple[int, ...] = (size, size // 2)
        else:
            loss = (torch.rand(1, size, generator=source) < torch.sigmoid(inside)).double()
            order, last = ranked(-inside)
            kind = Kept.aurc if name == "aurc" else Kept.augrc
            figure = lambda w, o=order, d=loss, e=last, k=kind: k(Kept.of(w.gather(1, o), d.gather(1, o), e))  # noqa: E731
            sizes = (size,)
        errors.append(by_influence(figure, sizes))
        values.append(float(figure(torch.ones(1, sum(sizes), dtype=torch.float64))))
    spread = np.std(values, ddof=1)
    tolerance = 4 * (spread / np.sqrt(2 * sets) + np.std(errors) / np.sqrt(sets))
    assert abs(np.mean(errors) - spread) < tolerance
