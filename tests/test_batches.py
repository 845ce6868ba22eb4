"""Training data as batches: all rows once an epoch, startable anywhere, whatever holds them."""

from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from bnn.batches import (
    Sampled,
    changes,
    full_batch,
    mean_rows,
    minibatches,
    num_batches,
    num_rows,
    reweights,
    sampled,
    shares,
)
from bnn.errors import ConfigError, DataError
from bnn.samplers import (
    ClassBalancedSampler,
    Constant,
    DynamicClassSampler,
    EpochSampler,
    Exponential,
    Linear,
    ShuffledSampler,
    StratifiedBatchSampler,
    WeightedIndexSampler,
    WindowSampler,
)

X, Y = torch.arange(11.0).view(11, 1), torch.arange(11)
FORMS = {
    "tensors": (X, Y),
    "dataset": TensorDataset(X, Y),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "shuffling loader": DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_full_batch_holds_every_row_once(form: str, world_untouched: None) -> None:
    batch = full_batch(FORMS[form])
    assert sorted(batch.y.tolist()) == list(range(11))
    assert torch.equal(batch.x[:, 0], batch.y.float())
    assert num_rows(FORMS[form]) == 11


@pytest.mark.parametrize("form", FORMS)
def test_every_epoch_holds_every_row_once(form: str, world_untouched: None) -> None:
    data = FORMS[form]
    assert num_batches(data, 4) == 3
    found = [batch.y.tolist() for batch in islice(minibatches(data, 4, seed=1), 9)]
    epochs = [[row for rows in found[start : start + 3] for row in rows] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert [len(rows) for rows in found[:3]] == [4, 4, 3]
    if form != "loader":
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [1, 3, 5, 8])
def test_started_anywhere_the_rest_is_the_same(form: str, start: int) -> None:
    whole = [batch.y.tolist() for batch in islice(minibatches(FORMS[form], 4, seed=1), 9)]
    rest = [batch.y.tolist() for batch in islice(minibatches(FORMS[form], 4, seed=1, start=start), 9 - start)]
    assert rest == whole[start:]


def test_batches_larger_than_the_data_hold_all_of_it() -> None:
    assert num_batches((X, Y), 100) == 1
    assert len(next(minibatches((X, Y), 100, seed=0)).y) == 11


def test_inputs_may_be_dicts_and_tuples() -> None:
    data = {"a": X, "b": (X + 1, X + 2)}, Y
    batch = next(minibatches(data, 4, seed=0))
    assert torch.equal(batch.x["b"][1][:, 0], batch.y + 2.0)
    assert full_batch(data).x["a"].shape == (11, 1)


class Counted(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([])


class Unpaired(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.zeros(2)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ((X, Y[:5]), "5 rows of x, as of y, got 11"),
        ((X.clone().fill_(torch.nan), Y), "NaN or Inf in row 0 of x"),
        ((X, torch.full((11,), torch.inf)), "NaN or Inf in row 0 of y"),
        ((X[:0], Y[:0]), "at least one row"),
        (X, "rows"),
        (Unpaired(), r"rows \(x, y\)"),
    ],
)
def test_what_is_no_data_is_refused(data: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        full_batch(data)


def test_iterable_data_sets_are_refused() -> None:
    with pytest.raises(DataError, match="a map-style data set"):
        num_rows(DataLoader(Counted(), batch_size=2))


# Under a sampler

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
WEIGHTS = [1.0, 2.0, 3.0, 1.0, 0.5, 1.0, 1.0, 4.0, 1.0, 1.0, 2.0]


def samplers() -> dict[str, EpochSampler[Any]]:
    """New ones at each call: samplers remember where they stand."""
    return {
        "rows": WeightedIndexSampler(WEIGHTS, 17, seed=3),
        "classes": ClassBalancedSampler(LABELS, seed=3),
        "dynamic": DynamicClassSampler(LABELS, Linear(1.0, 0.0, 3), num_samples=9, seed=3),
        "batches": StratifiedBatchSampler(LABELS, 4, skew=1.0, seed=3),
    }


def by_hand(name: str, num_epochs: int) -> tuple[list[list[int]], list[list[float]]]:
    """Rows and importance weights of every batch, from the sampler iterated alone."""
    sampler, rows, weights = samplers()[name], [], []
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        found = drawn if sampler.of_batches else [drawn[start : start + 4] for start in range(0, len(drawn), 4)]
        rows += found
        weights += [sampler.importance_weights(batch).tolist() for batch in found]  # type: ignore[attr-defined]
    return rows, weights


@pytest.mark.parametrize("name", samplers())
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("form", ["tensors", "dataset"])
def test_batches_follow_the_sampler_and_carry_its_importance_weights(
    name: str, importance: bool, form: str, world_untouched: None
) -> None:
    data = sampled(FORMS[form], samplers()[name], importance=importance)
    rows, weights = by_hand(name, 3)
    assert num_batches(data, 4) == len(rows) // 3
    assert num_rows(data) == 11
    found = list(islice(minibatches(data, 4, seed=1), len(rows)))
    assert [batch.y.tolist() for batch in found] == rows
    assert [batch.x[:, 0].long().tolist() for batch in found] == rows
    if importance:
        assert [batch.weight.tolist() for batch in found] == weights  # type: ignore[union-attr]
    else:
        assert all(batch.weight is None for batch in found)


@pytest.mark.parametrize("name", samplers())
@pytest.mark.parametrize("start", [1, 2, 3, 5, 8])
def test_under_a_sampler_started_anywhere_the_rest_is_the_same(name: str, start: int) -> None:
    rows, weights = by_hand(name, 4)
    data = sampled((X, Y), samplers()[name], importance=True)
    rest = list(islice(minibatches(data, 4, seed=1, start=start), len(rows) - start))
    assert [batch.y.tolist() for batch in rest] == rows[start:]
    assert [batch.weight.tolist() for batch in rest] == weights[start:]  # type: ignore[union-attr]


FORMS_OF_ROWS: dict[str, Any] = {
    **FORMS,
    "loader without a short batch": DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True),
    **{name: Sampled((X, Y), sampler, False) for name, sampler in samplers().items()},
    "batches without a short one": Sampled((X, Y), StratifiedBatchSampler(LABELS, 4, drop_last=True), False),
    "many batches": Sampled((X, Y), StratifiedBatchSampler(LABELS, 4, num_batches=7), False),
    "a rank of two": Sampled((X, Y), ClassBalancedSampler(LABELS, num_samples=21, world_size=2, rank=1), False),
    "batches of a rank of two": Sampled(
        (X, Y), StratifiedBatchSampler(LABELS, 3, num_batches=6, world_size=2, rank=1), False
    ),
}


@pytest.mark.parametrize("form", FORMS_OF_ROWS)
def test_mean_rows_are_those_of_an_epoch(form: str) -> None:
    """By which a short batch is weighed: wrong, and the likelihood is scaled against the prior."""
    data = FORMS_OF_ROWS[form]
    count = num_batches(data, 4)
    sizes = [len(batch.y) for batch in islice(minibatches(data, 4, seed=0), count)]
    assert mean_rows(data, 4) == pytest.approx(sum(sizes) / count)


@pytest.mark.parametrize("name", ["rows", "classes", "batches"])
def test_the_full_batch_under_a_sampler_weighs_rows_by_their_chances(name: str) -> None:
    """N pi_i, which has mean 1, with chances by hand; nothing with importance weights, which undo them."""
    chances = {
        "rows": torch.tensor(WEIGHTS) / sum(WEIGHTS),
        "classes": torch.tensor([1 / 21] * 7 + [1 / 9] * 3 + [1 / 3]),
        "batches": torch.tensor([4 / 77] * 7 + [4 / 33] * 3 + [3 / 11]),  # 4, 4 and 3 rows of an epoch's 11
    }[name]
    sampler = samplers()[name]
    batch = full_batch(sampled((X, Y), sampler, importance=False))
    assert batch.y.tolist() == list(range(11))
    assert batch.weight is not None
    torch.testing.assert_close(batch.weight.float(), 11 * chances)
    torch.testing.assert_close(batch.weight.mean().float(), torch.tensor(1.0))
    assert full_batch(sampled((X, Y), sampler, importance=True)).weight is None


def test_the_full_batch_of_chances_that_change_is_refused() -> None:
    data = sampled((X, Y), samplers()["dynamic"], importance=False)
    with pytest.raises(ConfigError, match="chances that do not change from epoch to epoch"):
        full_batch(data)
    assert full_batch(sampled((X, Y), samplers()["dynamic"], importance=True)).weight is None
    constant = DynamicClassSampler(LABELS, Constant(1.0))
    assert full_batch(sampled((X, Y), constant, importance=False)).weight is not None
    assert [changes(sampler) for sampler in (constant, *samplers().values())] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("data", "sampler", "importance", "error", "match"),
    [
        (FORMS["loader"], WeightedIndexSampler(WEIGHTS), False, ConfigError, "got a DataLoader; pass its data set"),
        ((X, Y), WeightedIndexSampler([1.0, 2.0, 4.0]), False, DataError, "one weight or label a row of the data, 11"),
        ((X, Y), ClassBalancedSampler(LABELS[:9]), False, DataError, "11 of them, got 9"),
        ((X, Y), ShuffledSampler(11), False, ConfigError, "want a WeightedIndexSampler, .* got ShuffledSampler"),
        ((X, Y), WindowSampler(11, 3), False, ConfigError, "got WindowSampler"),
        ((X, Y), WeightedRandomSampler(WEIGHTS, 5), False, ConfigError, "got WeightedRandomSampler"),
        ((X, Y), WeightedIndexSampler([0.0, *WEIGHTS[1:]]), True, ConfigError, "a weight of 0"),
        ((X, Y), WeightedIndexSampler(WEIGHTS, 5, False), True, ConfigError, "replacement=True"),
        ((X, Y), ClassBalancedSampler(LABELS, weights=[1.0, 0.0, 1.0]), True, ConfigError, "0 for class 1"),
        ((X, Y), StratifiedBatchSampler(LABELS, 4, per_class=[1.0, 1.0, 0.0]), True, ConfigError, "0 for class 2"),
    ],
)
def test_samplers_that_do_not_fit_are_refused(
    data: Any, sampler: Any, importance: bool, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        sampled(data, sampler, importance=importance)


def loader_of(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), **options)


REWEIGHTING: dict[str, Any] = {
    "torch's": loader_of(sampler=WeightedRandomSampler(WEIGHTS, 11), batch_size=4),
    "torch's, in batches": loader_of(batch_sampler=BatchSampler(WeightedRandomSampler(WEIGHTS, 11), 4, False)),
    "torch's, batches as a sampler": loader_of(
        sampler=BatchSampler(WeightedRandomSampler(WEIGHTS, 11), 4, False), batch_size=None
    ),
    "rows": loader_of(sampler=WeightedIndexSampler(WEIGHTS), batch_size=4),
    "classes": loader_of(sampler=ClassBalancedSampler(LABELS), batch_size=4),
    "dynamic": loader_of(sampler=DynamicClassSampler(LABELS, Exponential(1.0, 0.9)), batch_size=4),
    "batches": loader_of(batch_sampler=StratifiedBatchSampler(LABELS, 4, skew=0.5)),
    "beside the data": Sampled((X, Y), ClassBalancedSampler(LABELS), False),
}
NATURAL: dict[str, Any] = {
    **FORMS,
    "batches": loader_of(batch_sampler=StratifiedBatchSampler(LABELS, 4)),
    "shuffled": loader_of(sampler=ShuffledSampler(11), batch_size=4),
    "skew 0": loader_of(sampler=ClassBalancedSampler(LABELS, 0.0), batch_size=4),
    "equal weights": loader_of(sampler=WeightedIndexSampler([2.0] * 11), batch_size=4),
    "made up for": Sampled((X, Y), ClassBalancedSampler(LABELS), True),
}


@pytest.mark.parametrize("form", REWEIGHTING)
def test_data_that_reweight_are_known(form: str) -> None:
    assert reweights(REWEIGHTING[form])


@pytest.mark.parametrize("form", NATURAL)
def test_data_that_take_rows_alike_are_known(form: str) -> None:
    assert not reweights(NATURAL[form])


# Data sets that draw at random


SHARED: dict[str, Any] = {
    **FORMS,
    **{name: Sampled((X, Y), sampler, True) for name, sampler in samplers().items()},
}


@pytest.mark.parametrize("form", SHARED)
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_shares_are_the_batch_together(form: str, world_size: int) -> None:
    """In the order of ranks, with their importance weights; who has no rows hears of the batch all the same."""
    data = SHARED[form]
    whole = list(islice(minibatches(data, 4, seed=1, start=2), 7))
    parts = [
        list(islice(shares(data, 4, seed=1, start=2, rank=rank, world_size=world_size), 7))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        own = [part[number] for part in parts]
        held = [share.batch for share in own if share.batch is not None]
        assert all(share.total == len(batch.y) for share in own)
        assert len(held) == min(world_size, len(batch.y))
        assert torch.equal(torch.cat([each.x for each in held]), batch.x)
        assert torch.equal(torch.cat([each.y for each in held]), batch.y)
        if batch.weight is not None:
            assert torch.equal(torch.cat([each.weight for each in held if each.weight is not None]), batch.weight)


class Watched(Dataset):
    """Notes which rows are asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return 11

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        self.asked.append(row)
        return X[row], Y[row]


def test_a_share_reads_no_rows_of_others() -> None:
    data = Watched()
    found = [share.batch for share in islice(shares(data, 4, seed=1, rank=1, world_size=3), 3)]
    assert data.asked == [int(row) for batch in found if batch is not None for row in batch.y]
    assert len(data.asked) == 3  # of batches of 4, 4 and 3


class Noisy(Dataset):
    """Rows with noise from every global stream, as transforms of images have it."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = float(torch.rand(())) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return X[row] + noise, Y[row]


def test_random_rows_depend_on_seed_epoch_and_batch_alone(world_untouched: None) -> None:
    """Whatever came before them, and with the global streams as they were."""
    whole = [batch.x.tolist() for batch in islice(minibatches(Noisy(), 4, seed=1), 7)]
    assert len({value for rows in whole for (value,) in rows}) == 4 + 4 + 3 + 4 + 4 + 3 + 4
    for start in (1, 2, 3, 5):
        rest = [batch.x.tolist() for batch in islice(minibatches(Noisy(), 4, seed=1, start=start), 7 - start)]
        assert rest == whole[start:]
    assert next(minibatches(Noisy(), 4, seed=2)).x.tolist() != whole[0]
    assert torch.equal(full_batch(Noisy()).x, full_batch(Noisy()).x)
