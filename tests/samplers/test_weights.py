"""Weights of classes and rows: by skew, by what a predictive is unsure of, and labels from wherever they stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from bnn.errors import ConfigError, DataError
from bnn.mixtures import NormalMixture
from bnn.predictive import ClassPredictive
from bnn.samplers import (
    ClassBalancedSampler,
    TensorRows,
    WeightedIndexSampler,
    class_weights,
    weights_from_uncertainty,
)
from bnn.samplers.weights import labels_of
from bnn.uncertainty import entropy

LABELS = [0] * 64 + [1] * 16 + [2] * 4


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.floats(-3, 3))
def test_weights_of_classes_are_counts_to_minus_the_skew(labels: list[int], skew: float) -> None:
    counts = np.bincount(labels).astype(float)
    raw = np.array([count**-skew if count else 0.0 for count in counts])
    np.testing.assert_allclose(class_weights(labels, skew).numpy(), raw / raw.sum(), rtol=1e-12)


def test_known_skews() -> None:
    for skew, expected in [(0.0, [1, 1, 1]), (0.5, [1, 2, 4]), (1.0, [1, 4, 16]), (2.0, [1, 16, 256])]:
        weights = class_weights(LABELS, skew)
        assert weights.dtype == torch.float64
        np.testing.assert_allclose(weights.numpy(), np.array(expected) / sum(expected), rtol=1e-12)
    temperature = 4.0  # p_c ~ n_c^(1/T)
    chances = torch.tensor([64.0, 16.0, 4.0]) * class_weights(LABELS, 1 - 1 / temperature)
    np.testing.assert_allclose((chances / chances.sum()).numpy(), np.array([2, 2**0.5, 1]) / (3 + 2**0.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("max_ratio", "expected"), [(1.0, [1, 1, 1]), (3.0, [1, 3, 3]), (9.0, [1, 4, 9]), (99, [1, 4, 16])]
)
def test_max_ratio_cuts_the_largest_weights(max_ratio: float, expected: list[int]) -> None:
    np.testing.assert_allclose(
        class_weights(LABELS, max_ratio=max_ratio).numpy(), np.array(expected) / sum(expected), rtol=1e-12
    )


def test_max_ratio_leaves_classes_without_rows_out() -> None:
    np.testing.assert_allclose(class_weights([0, 0, 0, 0, 2], max_ratio=2.0).numpy(), [1 / 3, 0, 2 / 3], rtol=1e-12)


@pytest.mark.parametrize("skew", [400.0, -400.0])
def test_extreme_skews_neither_overflow_nor_lose_the_ratio(skew: float) -> None:
    expected = [0, 0, 1] if skew > 0 else [1, 0, 0]
    np.testing.assert_allclose(class_weights(LABELS, skew).numpy(), expected, atol=1e-12)
    cut = [1, 5, 5] if skew > 0 else [5, 5, 1]
    np.testing.assert_allclose(class_weights(LABELS, skew, max_ratio=5.0).numpy(), np.array(cut) / 11, rtol=1e-12)


def test_bad_options_are_refused() -> None:
    for skew in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="skew"):
            class_weights(LABELS, skew)
    for max_ratio in (0.5, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="max_ratio"):
            class_weights(LABELS, max_ratio=max_ratio)


@pytest.mark.parametrize(
    "source",
    [
        [2, 0, 1],
        (2, 0, 1),
        np.array([2, 0, 1], dtype=np.uint8),
        torch.tensor([2, 0, 1], dtype=torch.int32),
        TensorDataset(torch.zeros(3, 5), torch.tensor([2, 0, 1])),
        SimpleNamespace(targets=[2, 0, 1]),
        SimpleNamespace(labels=torch.tensor([2, 0, 1])),
        SimpleNamespace(y=np.array([2, 0, 1])),
    ],
    ids=["list", "tuple", "uint8", "int32", "TensorDataset", "targets", "labels", "y"],
)
def test_labels_are_found_where_they_stand(source: Any) -> None:
    labels = labels_of(source)
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


BAD_LABELS: dict[str, Any] = {
    "floats": [0.0, 1.0],
    "bool": [True, False],
    "text": ["cat", "dog"],
    "one-hot": [[1, 0], [0, 1]],
    "empty": [],
    "negative": [0, -1],
    "ragged": [[0], [1, 2]],
    "none": None,
    "number": 3,
    "missing": [0, None],
    "dict": {"labels": [0, 1]},
    "NaN": torch.tensor([0.0, float("nan")]),
    "no labels": TensorDataset(torch.zeros(3, 5)),
}


@pytest.mark.parametrize("source", BAD_LABELS.values(), ids=BAD_LABELS)
def test_anything_but_whole_numbers_from_0_is_refused(source: Any) -> None:
    with pytest.raises(DataError, match="labels"):
        labels_of(source)


def class_predictive() -> ClassPredictive:
    """Three samples of seven rows and four classes; the first row is alike in all samples."""
    logits = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 0] = logits[0, 0]
    log_probs = logits.log_softmax(dim=-1)  # [K, B, C]
    mixed = log_probs.logsumexp(dim=0) - np.log(3)  # [B, C]
    aleatoric, used = entropy(log_probs.exp()).mean(dim=0), torch.full((len(mixed),), len(log_probs))
    variance = log_probs.exp().var(dim=0, correction=0)
    return ClassPredictive(mixed, aleatoric, log_probs.mean(dim=0), variance, used, torch.zeros_like(mixed))


def normal_predictive() -> NormalMixture:
    """Three samples of seven rows and two outputs."""
    means = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    return NormalMixture(means, scales, torch.full((3,), -np.log(3), dtype=torch.float64))


@pytest.mark.parametrize("score", ["mutual_information", "expected_entropy", "entropy"])
@pytest.mark.parametrize("uniform", [0.1, 0.4, 1.0])
def test_weights_mix_the_score_with_a_uniform_share(score: Any, uniform: float) -> None:
    """(1 - a) s_i / mean(s) + a."""
    predictive = class_predictive()
    values = getattr(predictive, score).numpy()
    weights = weights_from_uncertainty(predictive, score, uniform=uniform)
    assert weights.dtype == torch.float64
    np.testing.assert_allclose(weights.numpy(), (1 - uniform) * values / values.mean() + uniform, rtol=1e-12)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-12)


def test_a_row_that_all_samples_agree_on_keeps_the_uniform_share() -> None:
    weights = weights_from_uncertainty(class_predictive())
    assert float(weights[0]) == pytest.approx(0.1, rel=1e-9)
    sampler = WeightedIndexSampler(weights)
    assert float(sampler.importance_weights(range(7)).max()) <= 1 / 0.1 + 1e-9  # the bound that the share gives


@pytest.mark.parametrize("score", ["epistemic", "aleatoric"])
def test_variances_are_summed_over_outputs(score: Any) -> None:
    predictive = normal_predictive()
    if score == "epistemic":
        values = predictive.means.numpy().var(axis=0).sum(axis=1)
    else:
        values = np.full(7, 2 * (0.25 + 1 + 4) / 3)
    expected = 0.7 * values / values.mean() + 0.3
    weights = weights_from_uncertainty(predictive, score, uniform=0.3)
    assert weights.shape == (7,)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)


def test_no_uncertainty_anywhere_draws_all_alike() -> None:
    """One sample: the mutual information is 0 in every row."""
    certain = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 1]].log()
    zero, used = torch.zeros_like(certain), torch.ones(5, dtype=torch.int64)
    one = ClassPredictive(certain, torch.zeros(5, dtype=torch.float64), certain, zero, used, zero)
    assert weights_from_uncertainty(one).tolist() == [1.0] * 5
    mean = NormalMixture(torch.randn(1, 6, 2).double(), torch.ones(1, 1, 1).double(), torch.zeros(1).double())
    assert weights_from_uncertainty(mean, "epistemic").tolist() == [1.0] * 6


def test_scores_and_shares_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="mutual_information or entropy or expected_entropy"):
        weights_from_uncertainty(class_predictive(), "epistemic")
    with pytest.raises(ConfigError, match="epistemic or aleatoric"):
        weights_from_uncertainty(normal_predictive())
    with pytest.raises(ConfigError, match="one of mutual_information"):
        weights_from_uncertainty(class_predictive(), "variance")  # type: ignore[arg-type]
    for uniform in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="uniform"):
            weights_from_uncertainty(class_predictive(), uniform=uniform)


def test_a_predictive_with_nan_is_refused() -> None:
    """NaN in one row would become NaN in every row's weight."""
    predictive = class_predictive()
    predictive.expected_entropy[3] = float("nan")
    with pytest.raises(DataError):
        weights_from_uncertainty(predictive)


class Unlabelled(Dataset[int]):
    """Counts how often it is read."""

    reads = 0

    def __len__(self) -> int:
        return 5

    def __getitem__(self, row: int) -> int:
        self.reads += 1
        return row


def test_a_data_set_is_not_read_for_labels_or_weights_it_does_not_name() -> None:
    rows = Unlabelled()
    for make in (ClassBalancedSampler, WeightedIndexSampler):
        with pytest.raises(DataError, match=r"a data set that has (labels|weights) as an attribute, got a Unlabelled"):
            make(rows)
    assert rows.reads == 0


def test_labels_are_found_through_parts_of_data_sets() -> None:
    whole = TensorDataset(torch.zeros(6, 2), torch.tensor([0, 1, 2, 0, 1, 1]))
    part = Subset(whole, [5, 0, 2])
    assert labels_of(part).tolist() == [1, 0, 2]
    assert labels_of(ConcatDataset([whole, part])).tolist() == [0, 1, 2, 0, 1, 1, 1, 0, 2]
    assert labels_of(TensorRows((torch.zeros(2, 3), torch.tensor([1, 0])))).tolist() == [1, 0]


def test_options_that_mean_nothing_are_refused_in_words() -> None:
    for make, says in [
        (lambda: WeightedIndexSampler([1.0, 2.0], seed=torch.Generator()), "seed: want a whole number"),
        (lambda: WeightedIndexSampler([1.0, 2.0], seed=1.0), "seed: want a whole number"),
        (lambda: WeightedIndexSampler([1.0, 2.0], 2.5), "whole number of items, got 2.5"),
        (lambda: ClassBalancedSampler([0, 1], "1.0"), "skew: want a finite number, got '1.0'"),
        (lambda: ClassBalancedSampler([0, 1], 0.5, weights=[1.0, 1.0]), "weights: want no skew beside them"),
    ]:
        with pytest.raises(ConfigError, match=says):
            make()  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="without wide gaps"):
        ClassBalancedSampler([0, 10**12])
    assert list(WeightedIndexSampler([1.0, 2.0], seed=np.int64(5))) == list(WeightedIndexSampler([1.0, 2.0], seed=5))
