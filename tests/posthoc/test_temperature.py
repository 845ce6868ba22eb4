"""Temperature scaling against SciPy's optimisers, closed forms, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError, NotConverged
from bnn.posthoc import Estimate, fit_temperature, temper
from bnn.seeding import generator

ROWS, CLASSES = 70, 4


def held_out(rows: int = ROWS, classes: int = CLASSES, *, truth: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A predictive [N, C], and labels drawn from it at a temperature."""
    source = generator(seed, "held out", rows, classes)
    log_probs = (3.0 * torch.randn(rows, classes, generator=source, dtype=torch.float64)).log_softmax(dim=1)
    y = torch.multinomial((log_probs / truth).softmax(dim=1), 1, generator=source).squeeze(1)
    return log_probs, y


def nll(log_probs: Tensor, y: Tensor, temperature: float) -> float:
    """By NumPy and in so many words."""
    probs = np.exp(log_probs.numpy() / temperature)
    probs /= probs.sum(axis=1, keepdims=True)
    return float(-np.log(probs[np.arange(len(y)), y.numpy()]).mean())


@pytest.mark.parametrize(("truth", "seed"), [(0.3, 0), (1.0, 1), (2.5, 2), (9.0, 3)])
def test_it_is_the_minimum_that_scipy_finds(truth: float, seed: int) -> None:
    log_probs, y = held_out(truth=truth, seed=seed)
    found = fit_temperature(log_probs, y)
    best = scipy.optimize.minimize_scalar(
        lambda b: nll(log_probs, y, 1 / b), bounds=(1e-3, 1e2), method="bounded", options={"xatol": 1e-12}
    )
    assert nll(log_probs, y, found) <= best.fun + 1e-14
    assert found == pytest.approx(1 / best.x, rel=1e-5)  # a minimum is flat: SciPy sees half of the digits

    def slope(b: float) -> float:
        logits = b * log_probs.numpy()
        mean = (scipy.special.softmax(logits, axis=1) * log_probs.numpy()).sum(axis=1)
        return float((mean - log_probs.numpy()[np.arange(ROWS), y.numpy()]).mean())

    assert found == pytest.approx(1 / scipy.optimize.brentq(slope, 1e-3, 1e2, xtol=1e-15, rtol=1e-14), rel=1e-12)


@pytest.mark.parametrize(("confidence", "right", "rows"), [(0.9, 3, 4), (0.6, 9, 10), (0.999999, 51, 100)])
def test_of_one_confidence_it_is_a_ratio_of_logits(confidence: float, right: int, rows: int) -> None:
    """All rows say class 0 with probability p, a share r is right: p_T = r, so that T = logit p / logit r."""
    log_probs = torch.tensor([confidence, 1 - confidence], dtype=torch.float64).log().expand(rows, 2)
    y = torch.tensor([0] * right + [1] * (rows - right))
    expected = scipy.special.logit(confidence) / scipy.special.logit(right / rows)
    assert fit_temperature(log_probs, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(truth: float) -> None:
    log_probs, y = held_out(4000, 5, truth=truth)
    probs = (log_probs / truth).softmax(dim=1)
    mean = (probs * log_probs).sum(dim=1, keepdim=True)
    information = float((probs * (log_probs - mean).square()).sum())  # of b = 1 / T, over the rows
    found = fit_temperature(log_probs, y)
    assert abs(1 / found - 1 / truth) < 4 / math.sqrt(information)


def test_a_tempered_predictive_has_that_much_less_to_gain() -> None:
    log_probs, y = held_out(truth=2.0)
    whole = fit_temperature(log_probs, y)
    assert fit_temperature(temper(log_probs, 1.7), y) == pytest.approx(whole / 1.7, rel=1e-10)
    assert fit_temperature(temper(log_probs, whole), y) == pytest.approx(1.0, rel=1e-10)


def test_the_order_of_rows_and_classes_does_not_matter() -> None:
    log_probs, y = held_out()
    rows, classes = torch.randperm(ROWS, generator=generator(1)), torch.tensor([2, 0, 3, 1])
    moved = fit_temperature(log_probs[rows][:, classes], classes.argsort()[y[rows]])
    assert moved == pytest.approx(fit_temperature(log_probs, y), rel=1e-12)


def test_classes_without_probability_have_no_say() -> None:
    log_probs, y = held_out()
    wider = torch.cat([torch.full((ROWS, 1), -torch.inf, dtype=torch.float64), log_probs], dim=1)
    assert fit_temperature(wider, y + 1) == pytest.approx(fit_temperature(log_probs, y), rel=1e-12)
    probs = temper(wider, 2.0).exp()
    assert (probs[:, 0] == 0).all()
    torch.testing.assert_close(probs[:, 1:], temper(log_probs, 2.0).exp())


def test_tempering_by_numpy_and_at_its_ends() -> None:
    log_probs, _ = held_out()
    for temperature in (0.4, 1.0, 6.0):
        powers = log_probs.exp().numpy() ** (1 / temperature)
        expected = powers / powers.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(temper(log_probs, temperature).exp().numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(temper(log_probs, 1.0), log_probs, rtol=0, atol=1e-14)
    np.testing.assert_allclose(temper(log_probs, 1e9).exp().numpy(), 1 / CLASSES, rtol=1e-7)
    assert torch.equal(temper(log_probs, 1e-4).exp().argmax(dim=1), log_probs.argmax(dim=1))


def test_rows_that_are_all_right_say_nothing_of_a_temperature() -> None:
    log_probs, _ = held_out()
    with pytest.warns(NotConverged, match=f"all {ROWS} rows are predicted right"):
        assert fit_temperature(log_probs, log_probs.argmax(dim=1)) == 1.0


def test_rows_that_are_worse_than_guessed_say_nothing_either() -> None:
    log_probs, _ = held_out()
    with pytest.warns(NotConverged, match="no better than by equal probabilities"):
        assert fit_temperature(log_probs, log_probs.argmin(dim=1)) == 1.0
    flat = torch.full((5, 3), math.log(1 / 3), dtype=torch.float64)
    with pytest.warns(NotConverged, match="no better than"):
        assert fit_temperature(flat, torch.tensor([0, 1, 2, 0, 1])) == 1.0


def test_a_true_class_without_probability_is_named() -> None:
    log_probs, y = held_out()
    log_probs[7, y[7]] = -torch.inf
    with pytest.raises(DataError, match="row 7: want a true class of some probability"):
        fit_temperature(log_probs, y)


@pytest.mark.parametrize(
    ("log_probs", "y", "match"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "one row at least"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"\[N, C\]"),
        (torch.zeros(4, 3), torch.zeros(4), "int64"),
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64), r"\[5\]"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), r"classes in \[0, 3\), got 0 to 3"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(log_probs: Tensor, y: Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        fit_temperature(log_probs, y)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ConfigError, match="a positive number"):
        temper(torch.zeros(2, 3), temperature)


def test_estimates_are_means_with_their_standard_errors() -> None:
    values = torch.tensor([1.0, 4.0, 2.5, 7.0], dtype=torch.float64)
    found = Estimate.of(values)
    assert found.value == pytest.approx(np.mean(values.numpy()))
    assert found.standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / 2)
    assert math.isnan(Estimate.of(values[:1]).standard_error)
