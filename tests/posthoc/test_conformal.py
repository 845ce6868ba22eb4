"""Split conformal prediction against slow definitions, and its coverage against the exact distribution."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.posthoc import (
    aps_scores,
    interval_margins,
    lac_scores,
    prediction_sets,
    rank,
    set_threshold,
    widened,
)
from bnn.posthoc.conformal import threshold
from bnn.seeding import generator

CLASSES = 4
REPEATS, NEW = 400, 150


def predicted(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """An overconfident predictive [N, C] and labels of a flatter one.

    The least probable class is seldom the true one: there the score of APS is always 1, and scores are equal.
    """
    source = generator(seed, "conformal", rows)
    logits = torch.randn(rows, CLASSES, generator=source, dtype=torch.float64)
    y = torch.multinomial((2.5 * logits).softmax(dim=1), 1, generator=source).squeeze(1)
    return (6.0 * logits).softmax(dim=1), y


@pytest.mark.parametrize("level", ["0.5", "0.55", "0.7", "0.8", "0.9", "0.95", "0.99"])
def test_the_place_is_the_least_that_promises_the_level(level: str) -> None:
    """k / (n + 1) >= level, in fractions; and the number of rows that an error asks for is the least."""
    exact, least = Fraction(level), None
    for num_rows in range(1, 320):
        places = [k for k in range(1, num_rows + 1) if Fraction(k, num_rows + 1) >= exact]
        if places:
            least = least or num_rows
            assert rank(num_rows, float(level)) == places[0]
        else:
            with pytest.raises(DataError, match="at least") as caught:
                rank(num_rows, float(level))
            needed = int(caught.value.want.split()[2])
            rank(needed, float(level))  # is enough
            assert needed > num_rows
    assert least is not None
    with pytest.raises(DataError, match=f"want at least {least} for a level of {level}, got {least - 1}"):
        rank(least - 1, float(level))


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 90.0, math.nan])
def test_levels_lie_between_0_and_1(level: float) -> None:
    with pytest.raises(ConfigError, match="a number between 0 and 1"):
        rank(50, level)


def test_the_threshold_is_that_score_in_order() -> None:
    scores = torch.randn(37, 3, generator=generator(0), dtype=torch.float64)
    for level in (0.5, 0.9):
        place = math.ceil(38 * Fraction(str(level)))
        expected = [sorted(scores[:, c].tolist())[place - 1] for c in range(3)]
        assert threshold(scores, level).tolist() == expected
        assert float(threshold(scores[:, 1], level)) == expected[1]
        # NumPy's way to the same: the finite-sample level of the observed scores.
        assert float(threshold(scores[:, 1], level)) == np.quantile(
            scores[:, 1].numpy(), place / 37, method="inverted_cdf"
        )
    scores[5, 0] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        threshold(scores, 0.5)


def test_scores_by_their_definitions_with_ties_and_zeros() -> None:
    probs = torch.tensor(
        [[0.5, 0.25, 0.25, 0.0], [0.125, 0.125, 0.5, 0.25], [0.25] * 4, [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64
    )
    for row in range(len(probs)):
        for c in range(CLASSES):
            slow = sum(float(p) for p in probs[row] if p >= probs[row, c])
            assert float(aps_scores(probs)[row, c]) == slow
            assert float(lac_scores(probs)[row, c]) == 1.0 - float(probs[row, c])
    other = predicted(9)[0]
    slow_scores = (other[:, None, :] * (other[:, None, :] >= other[:, :, None])).sum(dim=2)
    torch.testing.assert_close(aps_scores(other), slow_scores, rtol=0, atol=1e-15)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_hold_what_scores_no_more_than_the_limit(score: str) -> None:
    probs, y = predicted(60)
    limit = set_threshold(probs, y, level=0.8, score=score)  # type: ignore[arg-type]
    sets = prediction_sets(probs, limit, score=score)  # type: ignore[arg-type]
    assert int(sets.gather(1, y[:, None]).sum()) == math.ceil(Fraction("0.8") * 61)  # the held-out rows themselves
    larger = prediction_sets(probs, set_threshold(probs, y, level=0.95, score=score), score=score)  # type: ignore[arg-type]
    assert (larger | ~sets).all()  # nested in the level
    assert larger.sum() > sets.sum()
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(prediction_sets(probs[:, order], limit, score=score), sets[:, order])  # type: ignore[arg-type]


def test_a_set_may_be_empty() -> None:
    probs = torch.tensor([[0.4, 0.35, 0.25], [0.9, 0.05, 0.05]])
    assert prediction_sets(probs, 0.5, score="lac").tolist() == [[False, False, False], [True, False, False]]


def check_coverage(covered: np.ndarray, place: int, num_rows: int) -> None:
    """Coverage of new rows, one share a held-out set: beta-binomial, by Beta(k, n + 1 - k) over held-out sets."""
    law = scipy.stats.betabinom(NEW, place, num_rows + 1 - place)
    mean, deviation = law.mean() / NEW, law.std() / NEW
    assert mean == pytest.approx(place / (num_rows + 1))
    assert abs(covered.mean() - mean) < 4 * deviation / math.sqrt(len(covered))
    error = deviation**2 * math.sqrt((law.stats("k") + 2) / len(covered))  # of a variance, by the fourth moment
    assert abs(covered.var(ddof=1) - deviation**2) < 4 * error


@pytest.mark.parametrize("score", ["lac", "aps"])
@pytest.mark.parametrize(("num_rows", "level", "place"), [(20, 0.8, 17), (50, 0.9, 46)])
def test_sets_cover_new_rows_as_the_exact_law_says(score: str, num_rows: int, level: float, place: int) -> None:
    """Rows drawn alike are exchangeable, and scores of normal logits are never equal: so is the law exact."""
    covered = []
    for repeat in range(REPEATS):
        probs, y = predicted(num_rows + NEW, seed=repeat)
        limit = set_threshold(probs[:num_rows], y[:num_rows], level=level, score=score)  # type: ignore[arg-type]
        sets = prediction_sets(probs[num_rows:], limit, score=score)  # type: ignore[arg-type]
        covered.append(float(sets.gather(1, y[num_rows:, None]).double().mean()))
    check_coverage(np.array(covered), place, num_rows)


@pytest.mark.parametrize(("num_rows", "level", "place"), [(20, 0.8, 17), (50, 0.9, 46)])
def test_intervals_cover_new_targets_as_the_exact_law_says(num_rows: int, level: float, place: int) -> None:
    """Whatever the intervals were: too narrow and askew in output 0, far too wide in output 1."""
    covered = []
    for repeat in range(REPEATS):
        source = generator(repeat, "intervals")
        x = torch.rand(num_rows + NEW, 1, generator=source, dtype=torch.float64)
        y = x + (0.5 + x) * torch.randn(num_rows + NEW, 2, generator=source, dtype=torch.float64)
        lower, upper = torch.cat([x - 0.1, x - 9.0], dim=1), torch.cat([x + 0.6, x + 8.0], dim=1)
        held, new = slice(0, num_rows), slice(num_rows, None)
        margins = interval_margins(lower[held], upper[held], y[held], level=level)
        found = widened(lower[new], upper[new], margins)
        covered.append(((found.lower <= y[new]) & (y[new] <= found.upper)).double().mean(dim=0).numpy())
        assert float(margins[1]) < 0 < float(margins[0])
    for output in range(2):
        check_coverage(np.array(covered)[:, output], place, num_rows)


def test_margins_by_hand() -> None:
    """Five targets: the scores are -1, -1, 0.5, 2, 3, and of level 0.6 the fourth counts."""
    y = torch.tensor([[0.0], [1.0], [2.5], [4.0], [-4.0]])
    lower, upper = torch.full((5, 1), -1.0), torch.full((5, 1), 2.0)
    assert interval_margins(lower, upper, y, level=0.6).tolist() == [2.0]
    found = widened(lower, upper, torch.tensor([2.0]))
    assert (float(found.lower[0]), float(found.upper[0])) == (-3.0, 4.0)


def test_an_interval_that_is_less_than_nothing_is_its_middle() -> None:
    lower, upper = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 6.0]])
    found = widened(lower, upper, torch.tensor([-2.0, -2.0]))
    assert found.lower.tolist() == [[0.5, 2.0]]
    assert found.upper.tolist() == [[0.5, 4.0]]


def test_units_carry_over() -> None:
    source = generator(0, "units")
    y, centre = (torch.randn(30, 3, generator=source, dtype=torch.float64) for _ in range(2))
    plain = interval_margins(centre - 1, centre + 1, y, level=0.8)
    loc, scale = torch.tensor([5.0, 0.0, -2.0]), torch.tensor([10.0, 1.0, 0.1])
    other = interval_margins((centre - 1) * scale + loc, (centre + 1) * scale + loc, y * scale + loc, level=0.8)
    torch.testing.assert_close(other, plain * scale)


def test_shapes_and_scores_that_cannot_be_meant() -> None:
    probs, y = predicted(30)
    with pytest.raises(DataError, match=r"one shape \[N, C\]"):
        interval_margins(torch.zeros(30, 1), torch.ones(30, 1), torch.zeros(30), level=0.5)
    with pytest.raises(ConfigError, match="one of lac, aps"):
        set_threshold(probs, y, level=0.5, score="raps")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"at least 9 for a level of 0\.9, got 8"):
        set_threshold(probs[:8], y[:8], level=0.9)
