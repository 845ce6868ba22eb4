"""Class balance by epoch and by metric: closed forms of every schedule, and what is in force when."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from bnn.errors import ConfigError, DataError
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    Constant,
    DynamicClassSampler,
    Exponential,
    Linear,
    Schedule,
    Table,
)

COUNTS = np.array([60.0, 25.0, 10.0, 5.0])
LABELS = np.repeat(np.arange(4), COUNTS.astype(int))


def shares_of(weights: Any) -> np.ndarray:
    mass = COUNTS * np.asarray(weights)
    shares: np.ndarray = mass / mass.sum()
    return shares


SKEWS: list[tuple[Schedule, Callable[[int], float]]] = [
    (Constant(), lambda epoch: 1.0),
    (Constant(0.3), lambda epoch: 0.3),
    (Linear(1.0, 0.0, num_epochs=5), lambda epoch: [1, 0.75, 0.5, 0.25, 0, 0, 0, 0][epoch]),
    (Linear(-0.5, 1.5, num_epochs=3), lambda epoch: [-0.5, 0.5, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5][epoch]),
    (Linear(0.2, 0.9, num_epochs=1), lambda epoch: 0.2 if epoch == 0 else 0.9),
    (Exponential(1.0, 0.5), lambda epoch: 0.5**epoch),
    (Exponential(2.0, 1.0), lambda epoch: 2.0),
    (Table({0: 1.0, 2: 0.5, 6: 0.0}), lambda epoch: [1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0][epoch]),
]


@pytest.mark.parametrize(("schedule", "skew"), SKEWS, ids=[repr(schedule) for schedule, _ in SKEWS])
def test_schedules_follow_their_closed_forms(schedule: Schedule, skew: Callable[[int], float]) -> None:
    """P(class c at epoch e) proportional to n_c^(1 - skew(e)), whatever the order in which epochs are asked for."""
    sampler = DynamicClassSampler(LABELS, schedule)
    for epoch in (7, 0, 4, 1, 6, 2, 5, 3):
        expected = shares_of(COUNTS ** -skew(epoch))
        np.testing.assert_allclose(sampler.class_shares(epoch).numpy(), expected, rtol=1e-12)
        sampler.set_epoch(epoch)
        np.testing.assert_allclose(sampler.class_shares().numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(sampler.expected_counts().numpy(), 100 * expected, rtol=1e-12)
        chances = (expected / COUNTS)[LABELS]
        np.testing.assert_allclose(sampler.probabilities().numpy(), chances, rtol=1e-12)
        np.testing.assert_allclose(sampler.importance_weights(range(100)).numpy(), 1 / (100 * chances), rtol=1e-12)
    np.testing.assert_allclose(sampler.natural_shares().numpy(), COUNTS / 100, rtol=1e-12)


def test_draws_follow_the_shares_of_their_epoch() -> None:
    """Counts of 50,000 draws an epoch, within 5 standard errors."""
    sampler = DynamicClassSampler(LABELS, Linear(1.5, 0.0, num_epochs=4), num_samples=50_000)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        found = np.bincount(LABELS[list(sampler)], minlength=4) / 50_000
        expected = shares_of(COUNTS ** -(1.5 - 0.5 * epoch))
        assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / 50_000)).all()


def test_a_constant_schedule_is_class_balanced_sampling() -> None:
    for epoch in range(3):
        dynamic, balanced = (
            DynamicClassSampler(LABELS, Constant(0.7), seed=4),
            ClassBalancedSampler(LABELS, 0.7, seed=4),
        )
        dynamic.set_epoch(epoch)
        balanced.set_epoch(epoch)
        assert list(dynamic) == list(balanced)


@pytest.mark.parametrize(("metric", "values"), [("recall", [0.9, 0.4, 1.0, 0.7]), ("loss", [0.1, 0.6, 0.0, 0.3])])
def test_by_metric_follows_its_closed_form(metric: Any, values: list[float]) -> None:
    """n_c^-skew (floor + need_c / mean need)^strength, need = 1 - recall or the loss: the same here for both."""
    schedule = ByMetric(metric, skew=0.5, strength=2.0, floor=0.3)
    sampler = DynamicClassSampler(LABELS, schedule)
    np.testing.assert_allclose(sampler.class_shares(0).numpy(), shares_of(COUNTS**-0.5), rtol=1e-12)
    sampler.update({metric: values})
    need = np.array([0.1, 0.6, 0.0, 0.3])
    expected = shares_of(COUNTS**-0.5 * (0.3 + need / 0.25) ** 2)
    np.testing.assert_allclose(sampler.class_shares(1).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("metric", "worst"), [("recall", [0.9, 0.9, 0.1, 0.9]), ("loss", [0.1, 0.1, 9.0, 0.1])])
def test_what_is_learnt_worst_is_drawn_most(metric: Any, worst: list[float]) -> None:
    sampler = DynamicClassSampler(LABELS, ByMetric(metric), num_samples=5_000)
    before = np.bincount(LABELS[list(sampler)], minlength=4)
    sampler.update({metric: worst})
    sampler.set_epoch(1)
    after = np.bincount(LABELS[list(sampler)], minlength=4)
    assert after[2] > 1.5 * before[2]
    assert all(after[other] < before[other] for other in (0, 1, 3))
    assert after.min() > 0  # the floor keeps the others in play


def test_all_classes_learnt_alike_leave_the_balance() -> None:
    for metric, values in [("recall", [1.0] * 4), ("recall", [0.3] * 4), ("loss", [0.0] * 4), ("loss", [7.0] * 4)]:
        sampler = DynamicClassSampler(LABELS, ByMetric(metric, skew=0.8))  # type: ignore[arg-type]
        sampler.update({metric: values})
        np.testing.assert_allclose(sampler.class_shares(1).numpy(), shares_of(COUNTS**-0.8), rtol=1e-12)
    without = DynamicClassSampler(LABELS, ByMetric(strength=0.0))
    without.update({"recall": [0.1, 0.9, 0.5, 0.7]})
    np.testing.assert_allclose(without.class_shares(1).numpy(), [0.25] * 4, rtol=1e-12)


def test_metrics_may_be_arrays_or_tensors_and_the_last_ones_hold() -> None:
    sampler = DynamicClassSampler(LABELS, ByMetric("loss"))
    sampler.update({"loss": np.array([9.0, 9.0, 0.1, 0.1])})
    sampler.update({"loss": torch.tensor([0.5, 1.0, 1.5, 1.0])})
    expected = shares_of((0.1 + np.array([0.5, 1, 1.5, 1])) / COUNTS)
    np.testing.assert_allclose(sampler.class_shares(1).numpy(), expected, rtol=1e-12)


def test_a_class_without_rows_takes_no_part_in_the_mean() -> None:
    """Class 1 of 3 has no rows, and no recall that means anything."""
    sampler = DynamicClassSampler([0, 0, 2], ByMetric(floor=1.0))
    sampler.update({"recall": [0.5, 0.0, 0.0]})
    lift = 1 + np.array([0.5, 1.0]) / 0.75
    np.testing.assert_allclose(sampler.class_shares(1).numpy(), [lift[0] / lift.sum(), 0, lift[1] / lift.sum()])


def test_an_update_in_mid_epoch_takes_effect_with_the_next() -> None:
    """Shares and importance weights of the running epoch stay those that its rows were drawn by."""
    sampler = DynamicClassSampler(LABELS, ByMetric("loss"))
    expected = list(sampler)
    sampler.set_epoch(0)
    running = iter(sampler)
    found = [next(running) for _ in range(40)]
    balanced = sampler.class_shares(), sampler.importance_weights([0, 99]), sampler.expected_counts()
    sampler.update({"loss": [9.0, 0.1, 0.1, 0.1]})
    after = sampler.class_shares(), sampler.importance_weights([0, 99]), sampler.expected_counts()
    assert all(torch.equal(one, other) for one, other in zip(balanced, after, strict=True))
    assert float(sampler.class_shares(1)[0]) > 0.6  # the next epoch's are known already
    assert found + list(running) == expected
    sampler.set_epoch(1)
    rows = list(sampler)
    assert float(sampler.class_shares()[0]) > 0.6
    assert np.bincount(LABELS[rows])[0] > 50


@pytest.mark.parametrize("taken", [1, 40, 99])
def test_resume_in_mid_epoch_keeps_the_metrics_in_force_and_those_to_come(taken: int) -> None:
    sampler = DynamicClassSampler(LABELS, ByMetric("loss"))
    sampler.update({"loss": [0.1, 9.0, 0.1, 0.1]})
    running = iter(sampler)
    list(itertools.islice(running, taken))
    sampler.update({"loss": [9.0, 0.1, 0.1, 0.1]})
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = DynamicClassSampler(LABELS, ByMetric("loss"))
    resumed.load_state_dict(state)
    assert torch.equal(resumed.class_shares(), sampler.class_shares())
    again = DynamicClassSampler(LABELS, ByMetric("loss"))
    rest = iter(resumed)
    first = next(rest, None)
    again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))  # and once more
    assert [row for row in [first, *again] if row is not None] == list(running)
    for other in (sampler, resumed, again):
        other.set_epoch(1)
    assert list(sampler) == list(resumed) == list(again)
    assert float(again.class_shares()[0]) > 0.6


class Alternating:
    """A schedule of the user's own: class 0 and class 3 in turn, class 2 once a loss is known."""

    def weights(self, rows: Any, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        weights = np.zeros(len(rows.counts))
        weights[2 if "loss" in metrics else 3 * (epoch % 2)] = 1.0
        return weights


def test_a_schedule_of_ones_own() -> None:
    sampler = DynamicClassSampler(LABELS, Alternating(), num_samples=50)
    for epoch, only in [(0, 0), (1, 3), (2, 0)]:
        sampler.set_epoch(epoch)
        assert set(LABELS[list(sampler)]) == {only}
    sampler.update({"loss": [1.0] * 4})
    sampler.set_epoch(3)
    assert set(LABELS[list(sampler)]) == {2}
    DynamicClassSampler(LABELS, Alternating(), num_samples=50).load_state_dict(sampler.state_dict())
    with pytest.raises(DataError, match="schedule"):
        DynamicClassSampler(LABELS, Constant(), num_samples=50).load_state_dict(sampler.state_dict())
    with pytest.raises(ConfigError, match="class 0"):  # never drawn in this epoch
        sampler.importance_weights([99])


@pytest.mark.parametrize(
    "weights",
    [[1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [float("nan")] * 4, [float("inf"), 1, 1, 1], [0.0] * 4, [[1.0] * 4]],
    ids=["short", "negative", "nan", "inf", "zero", "2-D"],
)
def test_a_schedule_that_gives_no_weights_is_refused(weights: Any) -> None:
    schedule = SimpleNamespace(weights=lambda rows, epoch, metrics: np.array(weights))
    with pytest.raises(DataError, match="want 4 finite weights"):
        DynamicClassSampler(LABELS, schedule)


def test_weights_for_classes_without_rows_alone_are_refused() -> None:
    schedule = SimpleNamespace(weights=lambda rows, epoch, metrics: np.array([0.0, 1.0, 0.0]))
    with pytest.raises(DataError, match="one of a class with rows"):
        DynamicClassSampler([0, 2, 2], schedule)


def test_bad_metrics_are_refused_and_change_nothing() -> None:
    sampler = DynamicClassSampler(LABELS, ByMetric("recall"))
    sampler.update({"recall": [0.2, 0.4, 0.6, 0.8]})
    before = sampler.memory(), sampler.class_shares(1)
    for metrics, says in [
        ({"recall": [0.5, 0.5]}, "4 finite numbers"),
        ({"recall": [0.5, 0.5, 0.5, 1.2]}, "at most 1"),
        ({"recall": [0.5, 0.5, 0.5, float("nan")]}, "finite"),
        ({"recall": [0.5, 0.5, 0.5, -0.1]}, "finite"),
        ({"recall": [[0.5]] * 4}, "one a class"),
        ({"recall": 0.5}, "one a class"),
        ({"loss": [0.1] * 4}, "'recall' of each class"),
    ]:
        with pytest.raises(DataError, match=says):
            sampler.update(metrics)
        assert sampler.memory() == before[0]
        assert torch.equal(sampler.class_shares(1), before[1])
    with pytest.raises(DataError, match="finite"):
        DynamicClassSampler(LABELS, ByMetric("loss")).update({"loss": [float("inf"), 1.0, 1.0, 1.0]})


def test_bad_options_of_schedules_are_refused() -> None:
    for call, says in [
        (lambda: Linear(1.0, 0.0, num_epochs=0), "num_epochs"),
        (lambda: Exponential(1.0, 0.0), "rate"),
        (lambda: Exponential(1.0, 1.5), "rate"),
        (lambda: Exponential(1.0, float("nan")), "rate"),
        (lambda: Table({}), "epoch 0"),
        (lambda: Table({1: 1.0}), "epoch 0"),
        (lambda: Table({-1: 1.0, 0: 1.0}), "none before"),
        (lambda: ByMetric("accuracy"), "recall, loss"),  # type: ignore[arg-type]
        (lambda: ByMetric(floor=0.0), "floor"),
        (lambda: ByMetric(strength=-1.0), "strength"),
    ]:
        with pytest.raises(ConfigError, match=says):
            call()
    for schedule in (Constant(float("nan")), Linear(float("inf"), 0.0, 3)):
        with pytest.raises(DataError, match="finite weights"):
            DynamicClassSampler(LABELS, schedule)


def test_labels_come_from_data_sets_too() -> None:
    data = TensorDataset(torch.zeros(100, 2), torch.from_numpy(LABELS))
    assert list(DynamicClassSampler(data, Constant())) == list(DynamicClassSampler(LABELS, Constant()))
    with pytest.raises(DataError, match="labels"):
        DynamicClassSampler(["a", "b"], Constant())
