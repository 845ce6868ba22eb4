"""Risk and coverage against the slow obvious version and closed forms, and ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predictions import close, profile, random_errors
from torch import Tensor

from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.seeding import generator


def areas(uncertainty: Tensor, loss: Tensor) -> tuple[float, float]:
    """AURC and AUGRC by counting at each threshold, from all rows down to none, as fd-shifts does."""
    u, lost = uncertainty.double().numpy(), loss.double().numpy()
    coverages, risks, generalised = [], [], []
    for threshold in np.unique(u)[::-1]:
        kept = u <= threshold
        coverages.append(kept.mean())
        risks.append(lost[kept].mean())
        generalised.append(lost[kept].sum() / len(lost))
    falling = np.array([*coverages, 0.0])
    return (
        -float(np.trapezoid([*risks, risks[-1]], falling)),
        -float(np.trapezoid([*generalised, 0.0], falling)),
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_curve_and_areas_are_those_of_counting(seed: int, ties: bool) -> None:
    uncertainty, wrong = random_errors(60, seed, ties)
    curve = metrics.risk_coverage(uncertainty, wrong)
    thresholds = uncertainty.unique()
    assert torch.equal(curve.threshold, thresholds)
    assert (len(thresholds) < 10) == ties
    for place, threshold in enumerate(thresholds):
        kept = uncertainty <= threshold
        close(curve.coverage[place], kept.double().mean())
        close(curve.risk[place], wrong[kept].double().mean())
        close(curve.generalised_risk[place], (wrong & kept).double().mean())
    aurc, augrc = areas(uncertainty, wrong)
    close(metrics.aurc(curve), aurc)
    close(metrics.augrc(curve), augrc)


def test_areas_of_losses_other_than_errors() -> None:
    uncertainty, _ = random_errors(50, 3, ties=True)
    loss = torch.randn(50, generator=generator(3), dtype=torch.float64) * 4
    curve = metrics.risk_coverage(uncertainty, loss)
    aurc, augrc = areas(uncertainty, loss)
    close(metrics.aurc(curve), aurc)
    close(metrics.augrc(curve), augrc)


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_nothing_lost_is_no_area(rows: int) -> None:
    uncertainty = random_errors(rows, 4, ties=False)[0]
    curve = metrics.risk_coverage(uncertainty, torch.zeros(rows))
    assert float(metrics.aurc(curve)) == float(metrics.augrc(curve)) == 0.0
    assert float(metrics.coverage_at_risk(curve, 0.0)) == 1.0


@pytest.mark.parametrize(("wrong", "rows"), [(1, 3), (7, 10), (3, 7), (5, 5), (0, 4)])
def test_equal_uncertainties_have_the_error_rate_exactly(wrong: int, rows: int) -> None:
    loss = (torch.arange(rows) < wrong).double()
    curve = metrics.risk_coverage(torch.full((rows,), 0.3), loss)
    assert float(metrics.aurc(curve)) == wrong / rows
    assert float(metrics.augrc(curve)) == wrong / rows / 2
    assert len(curve.coverage) == 1


def test_uncertainty_at_random_has_the_error_rate() -> None:
    """Row i of N weighs sum_(k >= i) 1 / (k N), so that the standard error is sqrt(2 e (1 - e) / N)."""
    rows, rate = 20_000, 0.3
    uncertainty = torch.rand(rows, generator=generator(5, "u"), dtype=torch.float64)
    wrong = (torch.rand(rows, generator=generator(5, "wrong")) < rate).double()
    curve = metrics.risk_coverage(uncertainty, wrong)
    assert abs(float(metrics.aurc(curve)) - rate) < 4 * math.sqrt(2 * rate * (1 - rate) / rows)
    assert abs(float(metrics.augrc(curve)) - rate / 2) < 4 * math.sqrt(rate / rows)


@pytest.mark.parametrize("wrong", [0, 1_000, 9_000, 19_000])
def test_the_oracle_reaches_the_optimum(wrong: int) -> None:
    rows = 20_000
    e = wrong / rows
    loss = (torch.randperm(rows, generator=generator(6)) < wrong).double()
    curve = metrics.oracle_curve(loss)
    close(metrics.augrc(curve), e**2 / 2)
    close(metrics.aurc(curve), e + (1 - e) * math.log(1 - e), atol=2 / rows)
    assert curve.coverage.shape == (rows,)
    assert torch.equal(curve.coverage, torch.arange(1, rows + 1, dtype=torch.float64) / rows)


@profile
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 2, 7, 40]), real=st.booleans())
def test_no_order_beats_the_oracle(seed: int, rows: int, real: bool) -> None:
    uncertainty, wrong = random_errors(rows, seed, ties=False)
    loss = torch.rand(rows, generator=generator(seed, "loss"), dtype=torch.float64) if real else wrong.double()
    curve, oracle = metrics.risk_coverage(uncertainty, loss), metrics.oracle_curve(loss)
    assert bool((oracle.risk <= curve.risk + 1e-12).all())
    assert metrics.aurc(oracle) <= metrics.aurc(curve) + 1e-12
    assert metrics.augrc(oracle) <= metrics.augrc(curve) + 1e-12


@profile
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 2, 7, 40]), ties=st.booleans())
def test_only_the_order_of_uncertainties_counts_and_not_that_of_rows(seed: int, rows: int, ties: bool) -> None:
    uncertainty, wrong = random_errors(rows, seed, ties)
    curve = metrics.risk_coverage(uncertainty, wrong)
    order = torch.randperm(rows, generator=generator(seed))
    moved = metrics.risk_coverage((5 * uncertainty[order]).exp(), wrong[order])
    for before, after in zip(curve[:3], moved[:3], strict=True):
        close(after, before)
    twice = metrics.risk_coverage(torch.cat([uncertainty, uncertainty]), torch.cat([wrong, wrong]))
    for before, after in zip(curve, twice, strict=True):
        close(after, before)


def test_an_uncertainty_read_the_wrong_way_costs_more() -> None:
    uncertainty, wrong = random_errors(2_000, 7, ties=False)
    right, reverse = (metrics.aurc(metrics.risk_coverage(sign * uncertainty, wrong)) for sign in (1, -1))
    assert right < wrong.double().mean() - 0.05 < reverse - 0.1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_points_on_the_curve_are_those_of_counting(seed: int, ties: bool) -> None:
    uncertainty, wrong = random_errors(40, seed, ties)
    curve = metrics.risk_coverage(uncertainty, wrong)
    kept = [uncertainty <= t for t in uncertainty.unique()]
    for risk in (0.0, 0.05, 0.2, 0.4, 1.0):
        fine = [float(k.double().mean()) for k in kept if float(wrong[k].double().mean()) <= risk]
        assert float(metrics.coverage_at_risk(curve, risk)) == pytest.approx(max(fine, default=0.0), abs=1e-12)
    for coverage in (0.01, 0.3, 0.8, 1.0):
        first = next(k for k in kept if float(k.double().mean()) >= coverage)
        close(metrics.risk_at_coverage(curve, coverage), wrong[first].double().mean())


def test_shares_that_are_hit_exactly_count_as_reached() -> None:
    curve = metrics.risk_coverage(torch.arange(20), (torch.arange(20) == 19).double())
    assert float(metrics.coverage_at_risk(curve, 0.05)) == 1.0
    for kept in range(1, 21):
        assert float(metrics.risk_at_coverage(curve, kept / 20)) == (0.05 if kept == 20 else 0.0)


def test_infinite_uncertainties_are_refused_first() -> None:
    uncertainty = torch.tensor([1.0, math.inf, 0.0, -math.inf])
    assert metrics.risk_coverage(uncertainty, torch.tensor([0, 1, 0, 0])).risk.tolist() == [0.0, 0.0, 0.0, 0.25]


def test_rows_that_have_no_curve_are_refused() -> None:
    some, loss = torch.rand(5, generator=generator(8)), torch.ones(5)
    for arguments, says in [
        ((some[:0], loss[:0]), "at least one row"),
        ((some, loss[:4]), r"\[5\] and \[4\]"),
        ((some.view(5, 1), loss.view(5, 1)), "one shape"),
        ((some * math.nan, loss), r"uncertainty=\): want numbers, got NaN in row 0"),
        ((some, loss / 0), "got inf in row 0"),
    ]:
        with pytest.raises(DataError, match=says):
            metrics.risk_coverage(*arguments)
    for bad, says in ((loss[:0], "at least one row"), (loss / 0, "got inf"), (loss * math.nan, "NaN")):
        with pytest.raises(DataError, match=says):
            metrics.oracle_curve(bad)
    curve = metrics.risk_coverage(some, loss)
    for coverage in (0.0, 1.01, -0.5, math.nan):
        with pytest.raises(ConfigError, match="coverage="):
            metrics.risk_at_coverage(curve, coverage)
    with pytest.raises(ConfigError, match="risk="):
        metrics.coverage_at_risk(curve, math.nan)
