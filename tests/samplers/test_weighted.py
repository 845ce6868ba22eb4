"""Rows drawn by weight and by class: frequencies, extremes, files, and weights that undo the resampling."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch.utils.data import TensorDataset, WeightedRandomSampler

from bnn.errors import ConfigError, DataError
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    DynamicClassSampler,
    EpochSampler,
    StratifiedBatchSampler,
    WeightedIndexSampler,
    class_weights,
)
from bnn.samplers.balanced import ClassRows

WEIGHTS = [0.0, 0.5, 3.0, 0.0, 1.0, 2.0, 0.25, 0.0]
LABELS = np.array([0] * 60 + [1] * 25 + [2] * 10 + [3] * 5)


def drawn(sampler: EpochSampler[int]) -> np.ndarray:
    """The list of an epoch in one array."""
    return np.concatenate(list(sampler.blocks()))


def excess(counts: np.ndarray, probabilities: Any) -> float:
    """Pearson's chi-square of counts, in standard deviations above what it is on average."""
    chances = np.asarray(probabilities, dtype=np.float64)
    seen, total = chances > 0, counts.sum()
    assert not counts[~seen].any(), "drawn, with no chance to be"
    counts, chances = counts[seen], chances[seen]
    chi_square = float(((counts - total * chances) ** 2 / (total * chances)).sum())
    size = len(counts)
    variance = 2 * (size - 1) + ((1 / chances).sum() - size**2 - 2 * size + 2) / total
    return (chi_square - (size - 1)) / float(np.sqrt(variance))


@pytest.mark.parametrize("scale", [1.0, 7.0, 1e-310, 1e300])
def test_frequencies_are_the_weights_shares(scale: float) -> None:
    sampler = WeightedIndexSampler(np.array(WEIGHTS) * scale, 200_000, seed=1)
    chances = np.array(WEIGHTS) / sum(WEIGHTS)
    counts = np.bincount(drawn(sampler), minlength=8)
    assert excess(counts, chances) < 5
    np.testing.assert_allclose(sampler.probabilities().numpy(), chances, rtol=1e-12)
    np.testing.assert_allclose(sampler.expected_counts().numpy(), 200_000 * chances, rtol=1e-12)


def test_draws_are_independent_of_the_one_before() -> None:
    rows = drawn(WeightedIndexSampler([1.0, 2.0, 5.0], 300_000, seed=2))
    pairs = np.bincount(3 * rows[::2] + rows[1::2], minlength=9)
    assert excess(pairs, np.outer([1, 2, 5], [1, 2, 5]).reshape(-1) / 64) < 5


def test_the_first_draws_of_epochs_have_the_weights_shares() -> None:
    """Within an epoch draws could be right while epochs begin alike."""
    sampler = WeightedIndexSampler([1.0, 2.0, 5.0], 1, seed=3)
    counts = np.zeros(3)
    for epoch in range(8_000):
        sampler.set_epoch(epoch)
        counts[next(iter(sampler))] += 1
    assert excess(counts, np.array([1, 2, 5]) / 8) < 5


def test_the_same_distribution_as_torch() -> None:
    """Chi-square of two samples, ours and `WeightedRandomSampler`'s."""
    peer = WeightedRandomSampler(WEIGHTS, 100_000, generator=torch.Generator().manual_seed(0))
    theirs = np.bincount(np.array(list(peer)), minlength=8)
    ours = np.bincount(drawn(WeightedIndexSampler(WEIGHTS, 100_000, seed=0)), minlength=8)
    seen = np.array(WEIGHTS) > 0
    assert not ours[~seen].any()
    chi_square = float(((ours - theirs)[seen] ** 2 / (ours + theirs)[seen]).sum())
    assert chi_square < 4 + 5 * np.sqrt(8)


@pytest.mark.parametrize("where", [[0], [9], [4], [0, 9], [0, 1, 8, 9], list(range(9)), list(range(1, 10))])
def test_weights_of_zero_are_never_drawn(where: list[int]) -> None:
    weights = np.ones(10)
    weights[where] = 0
    rows = drawn(WeightedIndexSampler(weights, 1_000_000, seed=5))
    assert set(np.unique(rows).tolist()) == set(range(10)) - set(where)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=9).filter(any), st.integers(-300, 0))
def test_the_ends_of_the_unit_interval_draw_rows_of_some_weight(weights: list[float], power: int) -> None:
    """u = 0 passes over weights of zero at the head, and the largest u over those at the end."""
    scaled = np.array(weights) * 10.0**power
    if not scaled.any():
        return
    ends = np.array([0.0, 1 - 2.0**-53])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.samplers.weighted.uniforms", lambda key, positions: np.resize(ends, positions.shape))
        rows = list(WeightedIndexSampler(scaled, 2))
    assert all(scaled[row] > 0 for row in rows)


def test_denormal_weights_keep_their_shares() -> None:
    sampler = WeightedIndexSampler([5e-324, 0.0, 1.5e-323, 5e-324], 100_000, seed=1)
    assert excess(np.bincount(drawn(sampler), minlength=4), [0.2, 0.0, 0.6, 0.2]) < 5
    np.testing.assert_allclose(sampler.probabilities().numpy(), [0.2, 0.0, 0.6, 0.2])


def test_weights_whose_sum_overflows_keep_their_shares() -> None:
    sampler = WeightedIndexSampler([1e308, 1.5e308, 1e308, 0.5e308], 100_000, seed=1)
    assert excess(np.bincount(drawn(sampler), minlength=4), [0.25, 0.375, 0.25, 0.125]) < 5
    np.testing.assert_allclose(sampler.probabilities().numpy(), [0.25, 0.375, 0.25, 0.125])
    np.testing.assert_allclose(sampler.importance_weights([0, 1, 3]).numpy(), [1, 2 / 3, 2])


def test_more_rows_than_torch_can_draw_from() -> None:
    """2^24 + 3 rows, a third of the mass on the last three: `torch.multinomial` refuses them."""
    num_rows = 2**24 + 3
    weights = np.ones(num_rows, dtype=np.float32)
    weights[-3:] = [num_rows / 9, num_rows / 6, num_rows / 18]
    rows = drawn(WeightedIndexSampler(weights, 300_000, seed=4))
    exact = weights.astype(np.float64)
    edges = np.append(np.arange(0, num_rows - 3, num_rows // 50), [num_rows - 3, num_rows - 2, num_rows - 1])
    counts = np.bincount(np.searchsorted(edges, rows, side="right") - 1, minlength=len(edges))
    assert excess(counts, np.add.reduceat(exact, edges) / exact.sum()) < 5
    assert abs(float((rows % 2).mean()) - float(exact[1::2].sum() / exact.sum())) < 5 * np.sqrt(0.25 / len(rows))


@pytest.mark.slow
def test_every_one_of_2_to_the_25_rows_has_its_share() -> None:
    """Chi-square over all rows, about one draw a row."""
    num_rows = 2**25
    weights = 1.0 + np.arange(num_rows) % 4
    counts = np.bincount(drawn(WeightedIndexSampler(weights, num_rows, seed=6)), minlength=num_rows)
    assert abs(excess(counts, weights / weights.sum())) < 5


def test_without_replacement_each_row_comes_once() -> None:
    weights = np.arange(1.0, 41.0)
    rows = drawn(WeightedIndexSampler(weights, replacement=False, seed=1))
    assert sorted(rows.tolist()) == list(range(40))
    assert rows.tolist() != list(range(40))


def test_without_replacement_rows_of_weight_zero_never_come() -> None:
    for epoch in range(200):
        sampler = WeightedIndexSampler(WEIGHTS, 5, False)
        sampler.set_epoch(epoch)
        assert sorted(sampler) == [1, 2, 4, 5, 6]


def test_without_replacement_any_weight_comes_before_zero() -> None:
    """Even one that vanishes beside the largest."""
    assert list(WeightedIndexSampler([0.0, 1e-320, 1e300], 2, False)) == [2, 1]


@pytest.mark.parametrize("weights", [[1.0, 2.0, 3.0, 4.0], [8.0, 0.0, 1.0, 1.0]])
def test_without_replacement_is_drawing_one_after_the_other(weights: list[float]) -> None:
    """Ordered pairs from 4 rows against all of them enumerated: p_i p_j / (1 - p_i)."""
    shares = np.array(weights) / sum(weights)
    chances = np.zeros((4, 4))
    for first, second in itertools.permutations(range(4), 2):
        chances[first, second] = shares[first] * shares[second] / (1 - shares[first])
    sampler = WeightedIndexSampler(weights, 2, False, seed=7)
    counts = np.zeros((4, 4))
    for epoch in range(12_000):
        sampler.set_epoch(epoch)
        counts[tuple(sampler)] += 1
    assert excess(counts.sum(axis=1), shares) < 5  # the first draw
    assert excess(counts.reshape(-1), chances.reshape(-1)) < 5
    included = (counts + counts.T).sum(axis=1) / 12_000
    expected = (chances + chances.T).sum(axis=1)
    assert (np.abs(included - expected) <= 5 * np.sqrt(expected * (1 - expected) / 12_000) + 1e-12).all()


BAD_WEIGHTS: list[tuple[Any, str]] = [
    ([1.0, float("nan")], "nan in row 1"),
    ([1.0, float("inf")], "inf in row 1"),
    ([float("-inf"), 1.0], "-inf in row 0"),
    ([1.0, 2.0, -1e-9], "row 2"),
    ([0.0, 0.0], "above 0"),
    ([True, False], "bool"),
    (["1", "2"], "one a row"),
    ([[1.0, 2.0]], r"\[1, 2\]"),
    ([], "one a row"),
    (3.0, "one a row"),
    (None, "one a row"),
    ([1 + 2j], "complex"),
    ([[1.0], [2.0, 3.0]], "one a row"),
    (torch.tensor([True, True]), "bool"),
]


@pytest.mark.parametrize(("weights", "says"), BAD_WEIGHTS, ids=[says for _, says in BAD_WEIGHTS])
def test_bad_weights_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        WeightedIndexSampler(weights)


def test_weights_of_classes_are_refused_as_weights_of_rows() -> None:
    """Taken for rows they would draw the first rows only, and say nothing."""
    sampler = WeightedIndexSampler(np.ones(len(LABELS)))
    with pytest.raises(DataError, match=r"want 100 weights.*got 4; .*weights\[labels\]"):
        sampler.update(class_weights(LABELS))
    sampler.update(class_weights(LABELS)[torch.from_numpy(LABELS)])
    np.testing.assert_allclose(sampler.probabilities(), ClassBalancedSampler(LABELS).probabilities(), rtol=1e-12)


def test_a_refused_update_changes_nothing() -> None:
    for weights, options in [([1.0, 0.0, 0.0], (2, False)), ([1.0, -1.0, 2.0], (2,)), ([1.0, 2.0], (2,))]:
        sampler = WeightedIndexSampler([1.0, 2.0, 3.0], *options)
        before = list(sampler), sampler.identity()
        with pytest.raises((DataError, ConfigError)):
            sampler.update(weights)
        sampler.set_epoch(0)
        assert (list(sampler), sampler.identity()) == before


def test_weights_are_the_samplers_own() -> None:
    """Writing to the array that they came from is no update: the order would change under the same digest."""
    source = np.array([1.0, 2.0, 3.0, 4.0])
    for kind in (np.asarray, torch.from_numpy):
        samplers = [WeightedIndexSampler(kind(source), 3, replacement) for replacement in (True, False)]
        chances, lists = samplers[0].probabilities(), [list(sampler) for sampler in samplers]
        source[:] = [400.0, 0.0, 0.0, 1.0]
        for sampler, former in zip(samplers, lists, strict=True):
            sampler.set_epoch(0)
            assert list(sampler) == former
        assert torch.equal(samplers[0].probabilities(), chances)
        source[:] = [1.0, 2.0, 3.0, 4.0]


def test_arrays_that_may_not_be_written_to_serve() -> None:
    """Such as those of mapped files; other byte orders and strides too."""
    weights, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 1, 1, 2])
    expected = list(WeightedIndexSampler(weights, 9)), list(ClassBalancedSampler(labels, num_samples=9))
    weights.setflags(write=False)
    labels.setflags(write=False)
    for change in (
        np.asarray,
        lambda array: array.astype(array.dtype.newbyteorder(">")),
        lambda array: array[::-1][::-1],
    ):
        found = (
            list(WeightedIndexSampler(change(weights), 9)),
            list(ClassBalancedSampler(change(labels), num_samples=9)),
        )
        assert found == expected


def test_more_draws_than_rows_of_some_weight_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 5"):
        WeightedIndexSampler(WEIGHTS, 6, False)
    with pytest.raises(ConfigError, match="at most 5"):
        WeightedIndexSampler(WEIGHTS, replacement=False)
    assert len(WeightedIndexSampler(WEIGHTS, 60)) == 60


def test_weights_come_from_arrays_files_and_data_sets(tmp_path: Path) -> None:
    weights = np.array([0.5, 0.0, 4.0])
    np.save(tmp_path / "w.npy", weights)
    save_file({"importance": weights.astype(np.float32)}, tmp_path / "w.safetensors")
    (tmp_path / "w.csv").write_text("name, weight\na,0.5\nb,0\nc,4e0\n")
    (tmp_path / "one.csv").write_text("weight\n0.5\n0\n4\n")
    expected = WeightedIndexSampler(weights, 50).state_dict(), list(WeightedIndexSampler(weights, 50))
    for source in [
        weights.tolist(),
        torch.tensor(weights, dtype=torch.float16, requires_grad=True),
        tmp_path / "w.npy",
        str(tmp_path / "w.npy"),
        tmp_path / "w.safetensors",
        f"{tmp_path / 'w.safetensors'}:importance",
        f"{tmp_path / 'w.csv'}:weight",
        tmp_path / "one.csv",
        SimpleNamespace(weights=torch.tensor(weights)),
    ]:
        sampler = WeightedIndexSampler(source, 50)
        assert (sampler.state_dict(), list(sampler)) == expected
    assert WeightedIndexSampler(np.array([1, 0, 8], dtype=np.uint8), 50).probabilities()[2] == 8 / 9


def test_files_that_hold_no_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("name,weight\na,0.5\nb,-1\n")
    for source, says in [("w.csv", "name, weight"), ("w.csv:name", "line 2"), ("w.csv:weight", "-1.0 in row 1")]:
        with pytest.raises(DataError, match=f"w.csv.*{says}"):
            WeightedIndexSampler(f"{tmp_path}/{source}")


def resampled() -> list[EpochSampler[int]]:
    statistic = np.random.default_rng(0).uniform(0.2, 3.0, len(LABELS))
    dynamic = DynamicClassSampler(LABELS, ByMetric("loss"), num_samples=200_000)
    dynamic.update({"loss": [0.1, 0.2, 3.0, 9.0]})
    return [
        WeightedIndexSampler(statistic, 200_000),
        ClassBalancedSampler(LABELS, num_samples=200_000),
        ClassBalancedSampler(LABELS, weights=[1.0, 5.0, 0.1, 2.0], num_samples=200_000),
        dynamic,
    ]


@pytest.mark.parametrize("sampler", resampled(), ids=["rows", "classes", "class weights", "dynamic"])
def test_importance_weights_undo_the_resampling(sampler: Any) -> None:
    """The weighted mean of any statistic over the draws is its mean over all rows, within 4 standard errors."""
    rows = drawn(sampler)
    weights = sampler.importance_weights(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(weights, 1 / (100 * sampler.probabilities().numpy()[rows]), rtol=1e-12)
    statistics = np.random.default_rng(1).normal(1.0, 2.0, (3, 100)) + LABELS
    for statistic in [np.ones(100), *statistics]:
        terms = weights * statistic[rows]
        error = terms.std() / np.sqrt(len(rows))
        assert abs(terms.mean() - statistic.mean()) < 4 * error
    unweighted = statistics[0][rows].mean()
    assert abs(unweighted - statistics[0].mean()) > 4 * error  # the resampling does matter here


def test_importance_weights_are_refused_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match="a weight of 0"):
        WeightedIndexSampler(WEIGHTS).importance_weights([1])
    sampler = WeightedIndexSampler([1.0, 2.0, 3.0], 2, False)
    for call in (lambda: sampler.importance_weights([1]), sampler.probabilities, sampler.expected_counts):
        with pytest.raises(ConfigError, match="replacement=True"):
            call()
    with pytest.raises(ConfigError, match="class 1"):
        ClassBalancedSampler([0, 1, 1], weights=[1.0, 0.0]).importance_weights([0])


@pytest.mark.parametrize("indices", [[100], [-1], [0.5], [[1]], 3, [True], ["a"]])
@pytest.mark.parametrize(
    "sampler",
    [
        WeightedIndexSampler(np.ones(100)),
        ClassBalancedSampler(LABELS),
        StratifiedBatchSampler(LABELS, 10),
        DynamicClassSampler(LABELS, ByMetric()),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_importance_weights_of_no_rows_are_refused(sampler: Any, indices: Any) -> None:
    with pytest.raises(DataError, match="indices"):
        sampler.importance_weights(indices)


@pytest.mark.parametrize("skew", [0.0, 0.5, 1.0, 1.5])
def test_classes_come_by_the_skew(skew: float) -> None:
    """P(c) proportional to n_c^(1 - skew), rows of a class all alike."""
    sampler = ClassBalancedSampler(LABELS, skew, num_samples=200_000, seed=2)
    mass = np.array([60.0, 25.0, 10.0, 5.0]) ** (1 - skew)
    np.testing.assert_allclose(sampler.class_shares().numpy(), mass / mass.sum(), rtol=1e-12)
    np.testing.assert_allclose(sampler.natural_shares().numpy(), [0.6, 0.25, 0.1, 0.05], rtol=1e-12)
    np.testing.assert_allclose(sampler.expected_counts().numpy(), 200_000 * mass / mass.sum(), rtol=1e-12)
    rows = drawn(sampler)
    assert excess(np.bincount(LABELS[rows]), mass / mass.sum()) < 5
    chances = (mass / mass.sum() / [60, 25, 10, 5])[LABELS]
    assert excess(np.bincount(rows, minlength=100), chances) < 5
    np.testing.assert_allclose(sampler.probabilities().numpy(), chances, rtol=1e-12)


def test_labels_need_not_stand_in_order() -> None:
    mixed = np.random.default_rng(3).permutation(LABELS)
    for source in (mixed.tolist(), torch.from_numpy(mixed), SimpleNamespace(targets=mixed)):
        rows = drawn(ClassBalancedSampler(source, num_samples=40_000))
        assert excess(np.bincount(mixed[rows]), np.full(4, 0.25)) < 5
    data = TensorDataset(torch.zeros(100, 3), torch.from_numpy(mixed))
    assert list(ClassBalancedSampler(data)) == list(ClassBalancedSampler(mixed))


def test_a_class_without_rows_has_no_share() -> None:
    sampler = ClassBalancedSampler([0, 2, 2, 5], num_samples=30_000)
    np.testing.assert_allclose(sampler.class_shares().numpy(), [1 / 3, 0, 1 / 3, 0, 0, 1 / 3])
    assert excess(np.bincount(drawn(sampler), minlength=4), [1 / 3, 1 / 6, 1 / 6, 1 / 3]) < 5
    np.testing.assert_allclose(sampler.importance_weights([0, 1, 3]).numpy(), [0.75, 1.5, 0.75])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=6, max_size=6))
def test_the_ends_of_the_unit_interval_draw_a_row_of_a_class_with_a_share(labels: list[int], each: list[float]) -> None:
    rows = ClassRows(np.array(labels))
    mass = rows.counts * np.array(each[: len(rows.counts)])
    if mass.sum() < 1e-6:
        return
    shares = mass / mass.sum()
    with pytest.MonkeyPatch.context() as patch:
        for u in (0.0, 2.0**-53, 0.5, 1 - 2.0**-53):
            patch.setattr("bnn.samplers.weighted.uniforms", lambda key, positions, u=u: np.full(positions.shape, u))
            row = int(rows.draws(shares, np.uint64(0))(np.array([0]))[0])
            assert shares[labels[row]] > 0


def test_weights_of_classes_take_the_place_of_the_skew() -> None:
    sampler = ClassBalancedSampler(LABELS, weights=[1.0, 2.0, 0.0, 4.0], num_samples=50_000)
    shares = np.array([60, 50, 0, 20]) / 130
    np.testing.assert_allclose(sampler.class_shares().numpy(), shares)
    assert excess(np.bincount(LABELS[drawn(sampler)], minlength=4), shares) < 5


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ([1.0, 2.0], "4 weights"),
        (np.ones(100), "4 weights"),
        ([1.0, 2.0, -1.0, 0.0], "-1.0 in row 2"),
        ([0] * 4, "above 0"),
    ],
    ids=["short", "of rows", "negative", "zero"],
)
def test_bad_weights_of_classes_are_refused(weights: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        ClassBalancedSampler(LABELS, weights=weights)


def test_weights_of_classes_without_rows_alone_are_refused() -> None:
    with pytest.raises(DataError, match="weights"):
        ClassBalancedSampler([0, 2, 2], weights=[0.0, 1.0, 0.0])


def test_a_skew_that_is_no_number_is_refused() -> None:
    for skew in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="skew"):
            ClassBalancedSampler(LABELS, skew)


def test_what_reweights_says_so() -> None:
    """So that a fit can warn that the posterior is of the reweighted data."""
    assert not WeightedIndexSampler(np.full(9, 0.3)).reweights
    assert not WeightedIndexSampler(np.full(9, 0.3), replacement=False).reweights
    assert WeightedIndexSampler([1.0, 2.0]).reweights
    assert not ClassBalancedSampler(LABELS, 0.0).reweights
    assert ClassBalancedSampler(LABELS, 0.5).reweights
    assert not ClassBalancedSampler([0, 1, 0, 1]).reweights
