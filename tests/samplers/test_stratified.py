"""Batches with a fixed share of every class: exact counts, rows cycled fairly, exact importance weights."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bnn.errors import ConfigError, DataError
from bnn.samplers import StratifiedBatchSampler, WeightedIndexSampler

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [60, 25, 10, 5]))


def counts_of(labels: Any, batches: list[list[int]], num_classes: int) -> np.ndarray:
    """Rows of each class in each batch, [batches, C]."""
    return np.array([np.bincount(np.asarray(labels)[rows], minlength=num_classes) for rows in batches])


def several_epochs(sampler: StratifiedBatchSampler, num_epochs: int) -> list[list[int]]:
    found: list[list[int]] = []
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        found += sampler
    return found


SHARES = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@given(SHARES, st.integers(1, 40))
def test_the_first_batch_is_rounded_by_largest_remainder(parts: list[int], size: int) -> None:
    """Against exact fractions: floor of each quota, one more for those with the largest remainders."""
    assume(any(parts))
    labels = np.arange(len(parts)).repeat(3)
    (batch,) = StratifiedBatchSampler(labels, size, per_class=parts, num_batches=1)
    counts = np.bincount(labels[batch], minlength=len(parts))
    quotas = [Fraction(part, sum(parts)) * size for part in parts]
    assert counts.sum() == size
    extra = [int(count) - math.floor(quota) for count, quota in zip(counts, quotas, strict=True)]
    assert set(extra) <= {0, 1}
    remainders = [quota - math.floor(quota) for quota in quotas]
    given_one = [rest for rest, more in zip(remainders, extra, strict=True) if more]
    given_none = [rest for rest, more in zip(remainders, extra, strict=True) if not more]
    assert min(given_one, default=Fraction(1)) >= max(given_none, default=Fraction(0))


@pytest.mark.parametrize(
    ("parts", "size", "expected"),
    [
        ([1, 1, 1], 4, [2, 1, 1]),  # ties go to the first
        ([60, 25, 10, 5], 20, [12, 5, 2, 1]),
        ([60, 25, 10, 5], 7, [4, 2, 1, 0]),  # quotas 4.2, 1.75, 0.7, 0.35
        ([0, 5, 0, 1], 3, [0, 3, 0, 0]),  # 2.5 and 0.5: a tie again
        ([1, 9], 1, [0, 1]),
        ([0.1, 0.2, 0.7], 30, [3, 6, 21]),  # 0.1 * 30 is not 3 in floating point
    ],
)
def test_known_first_batches(parts: list[float], size: int, expected: list[int]) -> None:
    labels = np.arange(len(parts)).repeat(50)
    batch = next(iter(StratifiedBatchSampler(labels, size, per_class=parts)))
    assert np.bincount(labels[batch], minlength=len(parts)).tolist() == expected


@given(SHARES, st.integers(1, 12), st.integers(1, 50))
def test_after_any_number_of_batches_a_class_is_about_a_row_from_its_share(
    parts: list[int], size: int, number: int
) -> None:
    assume(any(parts))
    labels = np.arange(len(parts)).repeat(2)
    batches = list(StratifiedBatchSampler(labels, size, per_class=parts, num_batches=number))
    counts = counts_of(labels, batches, len(parts))
    assert (counts.sum(axis=1) == size).all()
    owed = np.outer(np.arange(1, number + 1) * size, np.array(parts) / sum(parts))
    assert np.abs(counts.cumsum(axis=0) - owed).max() < 1.5


def test_natural_shares_by_default() -> None:
    sampler = StratifiedBatchSampler(LABELS, 20)
    assert counts_of(LABELS, list(sampler), 4).tolist() == [[12, 5, 2, 1]] * 5
    sampler.set_epoch(1)
    assert sorted(np.concatenate(list(sampler))) == list(range(100))
    assert not sampler.reweights


@pytest.mark.parametrize("options", [{}, {"skew": 1.0}, {"per_class": [1, 2, 3, 4]}])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_row_of_a_class_comes_once_before_any_comes_again(options: dict[str, Any], world_size: int) -> None:
    """Also from one epoch to the next, and with the batches of all ranks put together in turn."""
    ranks = [
        several_epochs(
            StratifiedBatchSampler(LABELS, 7, num_batches=18, rank=rank, world_size=world_size, **options), 6
        )
        for rank in range(world_size)
    ]
    uses, of_class = np.zeros(100, dtype=int), [chosen == LABELS for chosen in range(4)]
    for batch in (batch for batches in zip(*ranks, strict=True) for batch in batches):
        uses += np.bincount(batch, minlength=100)
        assert all(np.ptp(uses[rows]) <= 1 for rows in of_class)
    assert uses.sum() == 6 * 18 * 7
    assert uses.min() > 0


def test_rounds_of_a_class_have_orders_of_their_own() -> None:
    sampler = StratifiedBatchSampler(np.zeros(30, dtype=int), 30)
    rounds = [tuple(batch) for batch in several_epochs(sampler, 20)]
    assert len({*rounds, tuple(range(30))}) == 21


def test_a_small_class_is_cycled_within_a_batch() -> None:
    labels = [0] * 50 + [1] * 3
    batches = several_epochs(StratifiedBatchSampler(labels, 20, per_class=[1, 1], num_batches=3), 4)
    for batch in batches:
        uses = np.bincount([row for row in batch if row >= 50], minlength=53)[50:]
        assert uses.sum() == 10
        assert uses.max() - uses.min() <= 2  # a round may begin and end inside
    assert np.ptp(np.bincount([row for batch in batches for row in batch if row >= 50])[50:]) == 0  # 120 = 40 * 3


def test_classes_are_mixed_inside_a_batch() -> None:
    """Class 0 stands first in its share of the batches, within 5 standard errors."""
    sampler = StratifiedBatchSampler([0, 1] * 50, 4, num_batches=2_000)
    first = np.array([batch[0] % 2 for batch in sampler])
    assert abs(first.mean() - 0.5) < 5 * np.sqrt(0.25 / 2_000)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.5])
def test_skew_sets_the_shares(skew: float) -> None:
    sampler = StratifiedBatchSampler(LABELS, 16, skew=skew, num_batches=500)
    mass = np.array([60.0, 25.0, 10.0, 5.0]) ** (1 - skew)
    counts = counts_of(LABELS, list(sampler), 4)
    assert np.abs(counts.sum(axis=0) - 8_000 * mass / mass.sum()).max() < 1.5
    np.testing.assert_allclose(sampler.class_shares().numpy(), counts.sum(axis=0) / 8_000)
    assert sampler.expected_counts().tolist() == counts.sum(axis=0).tolist()
    np.testing.assert_allclose(sampler.natural_shares().numpy(), [0.6, 0.25, 0.1, 0.05])
    assert sampler.reweights == (skew != 0)


def test_probabilities_are_how_often_rows_come_over_epochs() -> None:
    """Shares 1/3 in 6 batches of 5: 10 rows a class and epoch, so after 2 epochs each row came equally often."""
    labels = np.array([0] * 20 + [1] * 10 + [2] * 5)
    sampler = StratifiedBatchSampler(labels, 5, skew=1.0, num_batches=6)
    rows = [row for batch in several_epochs(sampler, 2) for row in batch]
    np.testing.assert_allclose(sampler.probabilities().numpy(), np.bincount(rows, minlength=35) / 60)
    assert float(sampler.probabilities().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("per_class", [[1, 1, 1], [4, 1, 1], [2, 0.5, 0.5]])
def test_importance_weights_are_exact_where_classes_divide_evenly(per_class: list[float]) -> None:
    """Over an epoch that takes each row of a class equally often, sum w f / n is the mean of f over all rows."""
    labels = np.array([0] * 40 + [1] * 20 + [2] * 10)
    sampler = StratifiedBatchSampler(labels, 12, per_class=per_class, num_batches=20)
    rows = np.concatenate([np.array(batch) for batch in sampler])
    expected = 240 * np.array(per_class) / sum(per_class)
    assert np.bincount(labels[rows]).tolist() == expected.tolist()
    assert (expected % [40, 20, 10] == 0).all()  # the premise
    statistic = np.random.default_rng(1).normal(size=70) + labels
    weights = sampler.importance_weights(rows).numpy()
    assert float((weights * statistic[rows]).mean()) == pytest.approx(float(statistic.mean()), rel=1e-12)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-12)


def test_importance_weights_are_right_on_average_where_they_do_not_divide() -> None:
    """Within 4 standard errors of the mean over epochs."""
    statistic = np.random.default_rng(2).normal(size=100) + LABELS
    sampler = StratifiedBatchSampler(LABELS, 9, skew=0.7)
    means = []
    for epoch in range(400):
        sampler.set_epoch(epoch)
        rows = np.concatenate([np.array(batch) for batch in sampler])
        means.append(float((sampler.importance_weights(rows).numpy() * statistic[rows]).mean()))
    # Rounds carry over from epoch to epoch, so means vary less than if independent; the bound is generous.
    assert abs(np.mean(means) - statistic.mean()) < 4 * np.std(means) / np.sqrt(400)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, [30, 30, 30, 10]),
        ({"drop_last": True}, [30, 30, 30]),
        ({"num_batches": 5}, [30] * 5),
        ({"num_batches": 5, "drop_last": True}, [30] * 5),
        ({"num_batches": 1}, [30]),
    ],
)
def test_number_and_sizes_of_batches(options: dict[str, Any], sizes: list[int]) -> None:
    sampler = StratifiedBatchSampler(LABELS, 30, **options)
    assert len(sampler) == len(sizes)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert [len(batch) for batch in sampler] == sizes
    assert float(sampler.expected_counts().sum()) == sum(sizes)


def test_a_batch_larger_than_the_data_takes_all_of_them() -> None:
    assert [sorted(batch) for batch in StratifiedBatchSampler([0, 1, 1], 10)] == [[0, 1, 2]]
    with pytest.raises(ConfigError, match="at least one item"):
        StratifiedBatchSampler([0, 1, 1], 10, drop_last=True)


def test_a_short_last_batch_is_part_of_the_identity() -> None:
    """As many batches, but other rows: the state of one must not go on in the other."""
    short, full = StratifiedBatchSampler(LABELS, 30), StratifiedBatchSampler(LABELS, 30, num_batches=4)
    assert len(short) == len(full)
    with pytest.raises(DataError):
        full.load_state_dict(short.state_dict())


def test_ranks_take_disjoint_batches() -> None:
    """Without repeats in the epoch, no row is on two ranks."""
    ranks = [
        {row for batch in StratifiedBatchSampler(LABELS, 10, rank=rank, world_size=2) for row in batch}
        for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 50
    assert not ranks[0] & ranks[1]


def test_a_class_without_rows_or_share_never_comes() -> None:
    labels = np.array([0, 2, 2, 3] * 5)
    batches = list(StratifiedBatchSampler(labels, 4, per_class=[1, 0, 0, 1], num_batches=9))
    assert set(labels[np.concatenate(batches)]) == {0, 3}
    assert set(labels[np.concatenate(list(StratifiedBatchSampler(labels, 4, skew=1.0)))]) == {0, 2, 3}


def test_a_stock_loader_takes_its_batches() -> None:
    sampler = StratifiedBatchSampler(LABELS, 20, seed=3)
    loaded = [batch.tolist() for batch in DataLoader(LABELS, batch_sampler=sampler)]
    assert loaded == [LABELS[batch].tolist() for batch in StratifiedBatchSampler(LABELS, 20, seed=3)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"num_batches": 0}, ConfigError, "num_batches"),
        ({"skew": 1.0, "per_class": [1, 1, 1, 1]}, ConfigError, "no skew beside it"),
        ({"skew": float("nan")}, ConfigError, "skew"),
        ({"skew": float("inf")}, ConfigError, "skew"),
        ({"per_class": [1, 1]}, DataError, "4 weights"),
        ({"per_class": [1, 1, 1, -1]}, DataError, "at least 0"),
        ({"per_class": [0, 0, 0, 0]}, DataError, "above 0"),
        ({"labels": [0, 2, 2], "per_class": [1, 1, 1]}, DataError, "class without rows"),
        ({"labels": [0.5, 1.0]}, DataError, "labels"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        StratifiedBatchSampler(**{"labels": LABELS, "batch_size": 10, **options})


def test_batches_are_no_rows() -> None:
    """A state of rows drawn by weight means nothing here."""
    with pytest.raises(DataError, match="kind"):
        StratifiedBatchSampler(LABELS, 10).load_state_dict(WeightedIndexSampler(np.ones(10)).state_dict())
