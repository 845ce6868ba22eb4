"""Pairs of data and bank index: the same for any number of workers, resumable after any batch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    DynamicClassSampler,
    EpochSampler,
    PairedLoader,
    SampleIndexSampler,
    StratifiedBatchSampler,
    WeightedIndexSampler,
    WindowSampler,
)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, size: int = 23) -> None:
        self.x = torch.arange(size).float().view(-1, 1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], torch.tensor(row)


def loader(size: int = 23, **options: Any) -> PairedLoader:
    return PairedLoader(Rows(size), SampleIndexSampler(7, seed=1), **{"batch_size": 4, "shuffle": True, **options})


def pairs(paired: PairedLoader) -> list[tuple[list[int], Any]]:
    found = []
    for (_, y), index in paired:
        found.append((y.tolist(), index if isinstance(index, int) else index.tolist()))
    return found


def test_position_is_epoch_times_length_plus_batch() -> None:
    paired = loader()
    expected = SampleIndexSampler(7, seed=1).at(range(18)).tolist()
    assert len(paired) == 6
    assert [index for _ in range(3) for _, index in pairs(paired)] == expected


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"shuffle": False, "drop_last": True}])
def test_the_same_pairs_for_any_number_of_workers(workers: int, options: dict[str, Any]) -> None:
    alone = loader(**{**options, "persistent_workers": False})
    beside = loader(num_workers=workers, multiprocessing_context="fork", **options)
    for _ in range(2):
        assert pairs(alone) == pairs(beside)


def test_shuffling_takes_each_row_once_in_an_order_of_its_epoch() -> None:
    paired = loader()
    orders = [[row for rows, _ in pairs(paired) for row in rows] for _ in range(3)]
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    paired.set_epoch(1)
    assert [row for rows, _ in pairs(paired) for row in rows] == orders[1]
    other = PairedLoader(Rows(), SampleIndexSampler(7, seed=1), batch_size=4, shuffle=True, seed=5)
    assert [row for rows, _ in pairs(other) for row in rows] != orders[0]


@pytest.mark.parametrize(("drop_last", "batches"), [(True, 5), (False, 6)])
def test_drop_last(drop_last: bool, batches: int) -> None:
    paired = loader(drop_last=drop_last)
    assert len(paired) == len(pairs(paired)) == batches == (23 // 4 if drop_last else math.ceil(23 / 4))


def test_several_indices_a_batch() -> None:
    paired = loader(num_indices=3)
    expected = SampleIndexSampler(7, seed=1).at(range(18)).view(6, 3).tolist()
    batch = next(iter(paired))
    assert isinstance(batch.index, Tensor)
    assert batch.index.dtype == torch.int64
    assert [index for _, index in pairs(paired)] == expected


def test_collate_fn_is_the_users() -> None:
    paired = loader(collate_fn=lambda rows: [float(x) for x, _ in rows], shuffle=False)
    assert next(iter(paired)).data == [0.0, 1.0, 2.0, 3.0]


class Reversed(SequentialSampler):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(row + self.epoch) % 23 for row in reversed(range(23))])


def test_own_samplers_get_their_epoch() -> None:
    paired = loader(shuffle=False, sampler=Reversed(Rows()))
    assert pairs(paired)[0][0] == [22, 21, 20, 19]
    assert pairs(paired)[0][0] == [0, 22, 21, 20]
    batches = BatchSampler(Reversed(Rows()), 10, drop_last=False)
    own = PairedLoader(Rows(), SampleIndexSampler(7), batch_sampler=batches)
    assert [len(rows) for rows, _ in pairs(own)] == [10, 10, 3]


@pytest.mark.parametrize(
    ("taken", "workers"), [(taken, 0) for taken in range(1, 14)] + [(taken, 2) for taken in (1, 6, 9)]
)
def test_resume_after_any_batch_twice(taken: int, workers: int) -> None:
    whole = loader()
    expected = [pair for _ in range(5) for pair in pairs(whole)][: 2 * taken]
    found: list[Any] = []
    state = loader().state_dict()
    for _ in range(2):
        paired = loader(num_workers=workers, multiprocessing_context="fork" if workers else None)
        paired.load_state_dict(state)
        stop = len(found) + taken
        while len(found) < stop:
            for (_, y), index in paired:
                found.append((y.tolist(), index))
                state = paired.state_dict()
                if len(found) == stop:
                    break
    assert found == expected


def test_an_epoch_that_is_broken_off_begins_again() -> None:
    paired = loader()
    first = pairs(loader())[0]
    for _ in range(3):
        (_, y), index = next(iter(paired))
        assert (y.tolist(), index) == first


def test_set_epoch_in_mid_epoch_holds_from_the_next_one_on() -> None:
    paired, expected = loader(), loader()
    found = []
    for (_, y), index in paired:
        found.append((y.tolist(), index))
        paired.set_epoch(4)
    assert found == pairs(expected)
    expected.set_epoch(4)
    assert pairs(paired) == pairs(expected)


def test_a_state_of_other_data_or_another_bank_is_refused() -> None:
    state = loader().state_dict()
    with pytest.raises(BankMismatch, match="batches"):
        loader(size=40).load_state_dict(state)
    with pytest.raises(BankMismatch, match="seed"):
        loader(seed=9).load_state_dict(state)
    other = PairedLoader(Rows(), SampleIndexSampler(8, seed=1), batch_size=4, shuffle=True)
    with pytest.raises(BankMismatch, match="length"):
        other.load_state_dict(state)


def test_options_that_contradict_are_refused() -> None:
    batches = BatchSampler(RandomSampler(range(23)), 4, drop_last=False)
    with pytest.raises(ConfigError, match="batch_sampler"):
        loader(batch_sampler=batches)
    with pytest.raises(ConfigError, match="sampler: want no shuffle"):
        loader(sampler=SequentialSampler(range(23)))
    with pytest.raises(ConfigError, match="num_indices"):
        loader(num_indices=0)


def test_global_streams_are_untouched(world_untouched: None) -> None:
    dataset = TensorDataset(torch.arange(9.0))
    paired = PairedLoader(dataset, SampleIndexSampler(4), batch_size=2, shuffle=True)
    assert len(list(paired)) == 5


@pytest.mark.gpu
def test_pinned_batches(device: str) -> None:
    (x, _), index = next(iter(loader(pin_memory=device == "cuda")))
    assert x.is_pinned() == (device == "cuda")
    assert isinstance(index, int)


# What a batch is, whoever makes it.


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"num_workers": 2, "multiprocessing_context": "fork"}])
def test_an_index_for_each_row(options: dict[str, Any]) -> None:
    """Batch b meets positions 4 b to 4 b + 3, a short one as many of them as it has rows."""
    paired = loader(per_row=True, **options)
    expected = SampleIndexSampler(7, seed=1).at(range(4 * 2 * len(paired))).view(-1, 4).tolist()
    found = [pair for _ in range(2) for pair in pairs(paired)]
    assert [len(index) for _, index in found] == [len(rows) for rows, _ in found]
    assert [index for _, index in found] == [full[: len(rows)] for full, (rows, _) in zip(expected, found, strict=True)]
    batch = next(iter(loader(per_row=True)))
    assert isinstance(batch.index, Tensor)
    assert batch.index.dtype == torch.int64


def test_an_index_for_each_row_needs_to_know_how_long_batches_are() -> None:
    batches = BatchSampler(SequentialSampler(Rows()), 5, drop_last=False)
    own = PairedLoader(Rows(), SampleIndexSampler(7, seed=1), batch_sampler=batches, per_row=True)
    assert [len(index) for _, index in pairs(own)] == [5, 5, 5, 5, 3]
    lists = PairedLoader(Rows(), SampleIndexSampler(7), batch_sampler=[[0, 1], [2]], per_row=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_size"):
        next(iter(lists))


class Slow(Rows):
    """Rows whose first batch keeps its worker busy while the other one goes on."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        if row == 0:
            time.sleep(0.4)
        return super().__getitem__(row)


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"num_indices": 3}])
def test_batches_out_of_order_keep_their_index(options: dict[str, Any]) -> None:
    workers: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork", "in_order": False}
    paired = PairedLoader(Slow(), SampleIndexSampler(7, seed=1), batch_size=4, **options, **workers)
    expected, found = pairs(loader(shuffle=False, **options)), pairs(paired)
    assert found != expected  # they did come out of order
    assert sorted(found) == sorted(expected)


def test_a_state_out_of_order_is_taken_between_epochs_only() -> None:
    options: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork", "in_order": False}
    paired = loader(**options)
    for number, _ in enumerate(paired):
        if number == 2:
            with pytest.raises(ConfigError, match="in_order"):
                paired.state_dict()
    state = paired.state_dict()
    resumed = loader(**options)
    next(iter(resumed))  # broken off
    resumed.load_state_dict(state)
    unbroken = loader()
    unbroken.set_epoch(1)
    assert sorted(pairs(unbroken)) == sorted(pairs(resumed))
    alone = loader(in_order=False)  # in this process batches come in order anyway
    next(iter(alone))
    assert alone.state_dict()["batch"] == 1


TEXTS = [["a", "bank", "of", "samples"][: 1 + row % 4] for row in range(13)]


class Texts(Dataset[tuple[list[int], int]]):
    def __len__(self) -> int:
        return 13

    def __getitem__(self, row: int) -> tuple[list[int], int]:
        return [len(word) for word in TEXTS[row]], row


def padded(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    words = pad_sequence([torch.tensor(word) for word, _ in rows], batch_first=True, padding_value=-1)
    return {"words": words, "lengths": (words >= 0).sum(dim=1), "rows": torch.tensor([row for _, row in rows])}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_collation_that_pads_text_of_any_length(workers: int) -> None:
    context = "fork" if workers else None
    paired = PairedLoader(
        Texts(),
        SampleIndexSampler(5),
        batch_size=3,
        shuffle=True,
        collate_fn=padded,
        num_workers=workers,
        multiprocessing_context=context,
    )
    rows: list[int] = []
    for batch, index in paired:
        lengths = [1 + row % 4 for row in batch["rows"].tolist()]
        assert batch["lengths"].tolist() == lengths
        assert batch["words"].shape == (len(lengths), max(lengths))
        assert isinstance(index, int)
        rows += batch["rows"].tolist()
    assert sorted(rows) == list(range(13))


class Named(NamedTuple):
    x: Tensor
    name: str


class Own:
    """A batch of the user's own kind, without a method that a loader might call."""

    def __init__(self, rows: list[Any]) -> None:
        self.total = sum(float(x) for x, _ in rows)


class Listed(Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_the_structure_of_their_rows(workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 2, "num_workers": workers}
    options["multiprocessing_context"] = "fork" if workers else None
    named = PairedLoader(
        Listed([Named(torch.tensor(float(row)), f"row {row}") for row in range(3)]), SampleIndexSampler(4), **options
    )
    first, last = [batch.data for batch in named]
    assert isinstance(first, Named)
    assert (first.x.tolist(), list(first.name)) == ([0.0, 1.0], ["row 0", "row 1"])
    assert last.x.tolist() == [2.0]
    deep = Listed([{"x": torch.tensor(row), "pair": (row, {"y": -row})} for row in range(3)])
    batch = next(iter(PairedLoader(deep, SampleIndexSampler(4), **options))).data
    assert batch["x"].tolist() == batch["pair"][0].tolist() == [0, 1]
    assert batch["pair"][1]["y"].tolist() == [0, -1]
    own = next(iter(PairedLoader(Rows(), SampleIndexSampler(4), collate_fn=Own, **options)))
    assert isinstance(own.data, Own)
    assert own.data.total == 1.0
    assert isinstance(own.index, int)


# Data in memory.


LABELS = [0] * 14 + [1] * 6 + [2] * 3

ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "balanced": lambda: {"sampler": ClassBalancedSampler(LABELS, num_samples=26), "batch_size": 2},
    "weighted": lambda: {"sampler": WeightedIndexSampler(list(range(23)), 26), "batch_size": 2},
    "dynamic": lambda: {"sampler": DynamicClassSampler(LABELS, ByMetric("loss"), num_samples=26), "batch_size": 2},
    "stratified": lambda: {"batch_sampler": StratifiedBatchSampler(LABELS, 4, skew=0.5, num_batches=13)},
    "windows": lambda: {"batch_sampler": WindowSampler(23, 3, num_windows=2, shuffle=True)},
    "stock batches of balanced": lambda: {
        "batch_sampler": BatchSampler(ClassBalancedSampler(LABELS, num_samples=26), 2, drop_last=False)
    },
    "stock batches of dynamic": lambda: {
        "batch_sampler": BatchSampler(DynamicClassSampler(LABELS, ByMetric("loss"), num_samples=26), 2, drop_last=False)
    },
}


def with_order(name: str, workers: int = 0, **options: Any) -> PairedLoader:
    context = "fork" if workers else None
    order = ORDERS[name]()
    return PairedLoader(
        Rows(), SampleIndexSampler(7, seed=1), num_workers=workers, multiprocessing_context=context, **order, **options
    )


def update(paired: PairedLoader, losses: list[float]) -> None:
    sampler = getattr(paired.sampler, "sampler", paired.sampler)
    if isinstance(sampler, DynamicClassSampler):
        sampler.update({"loss": losses})


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_those_of_the_samplers_alone(name: str) -> None:
    order = ORDERS[name]()
    alone = order.get("batch_sampler") or BatchSampler(order["sampler"], 2, drop_last=False)
    sampler = alone if isinstance(alone, EpochSampler) else alone.sampler
    for workers in (0, 2):
        paired = with_order(name, workers)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert [rows for rows, _ in pairs(paired)] == list(alone)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_with_samplers_inside(name: str, workers: int) -> None:
    """A run with an update in the middle of each epoch, stopped after batches of the first and the second epoch."""

    def run(paired: PairedLoader, stop: int, found: list[Any]) -> None:
        while True:
            for (_, y), index in paired:
                found.append((y.tolist(), index))
                if len(found) % 7 == 3:
                    update(paired, [float(len(found)), 0.1, 0.1])
                if len(found) == stop:
                    return

    expected: list[Any] = []
    run(with_order(name), 36, expected)
    for taken in (4, 13, 16):
        found: list[Any] = []
        state = with_order(name).state_dict()
        for stop in (taken, taken + 5, 36):
            paired = with_order(name, workers)
            paired.load_state_dict(json.loads(json.dumps(state)))
            run(paired, stop, found)
            state = paired.state_dict()
        assert found == expected


@pytest.mark.parametrize("name", ["weighted", "stratified"])
def test_samplers_of_two_ranks_meet_disjoint_rows_and_samples(name: str) -> None:
    found: list[Any] = []
    for rank in range(2):
        options: dict[str, Any] = {"rank": rank, "world_size": 2}
        order: dict[str, Any] = (
            {"sampler": WeightedIndexSampler([1.0] * 23, 22, False, **options), "batch_size": 3}
            if name == "weighted"
            else {"batch_sampler": StratifiedBatchSampler(LABELS, 3, drop_last=True, **options)}
        )
        found.append(pairs(PairedLoader(Rows(), SampleIndexSampler(50, **options), **order)))
    assert len(found[0]) == len(found[1]) > 2
    rows = [row for one in found for batch, _ in one for row in batch]
    indices = [index for one in found for _, index in one]
    assert len(set(rows)) == len(rows)
    assert len(set(indices)) == len(indices)


def test_states_of_other_samplers_inside_are_refused() -> None:
    state = with_order("balanced").state_dict()
    other = PairedLoader(
        Rows(),
        SampleIndexSampler(7, seed=1),
        sampler=ClassBalancedSampler(LABELS, 0.5, num_samples=26),
        batch_size=2,
    )
    with pytest.raises(DataError, match="weights"):
        other.load_state_dict(state)
    with pytest.raises(DataError, match="kind"):
        with_order("dynamic").load_state_dict(state)


def test_states_of_other_samplers_inside_stock_batches_are_refused() -> None:
    other = BatchSampler(ClassBalancedSampler(LABELS, 0.5, num_samples=26), 2, drop_last=False)
    paired = PairedLoader(Rows(), SampleIndexSampler(7, seed=1), batch_sampler=other)
    with pytest.raises(DataError, match="weights"):
        paired.load_state_dict(with_order("stock batches of balanced").state_dict())


def test_a_state_of_another_batch_size_is_refused() -> None:
    """23 rows are two batches of 12, and of 20: going on after one of them would leave rows out."""
    paired = loader(batch_size=12)
    next(iter(paired))
    with pytest.raises(BankMismatch, match="batch"):
        loader(batch_size=20).load_state_dict(paired.state_dict())


def test_samplers_for_other_data_or_in_the_wrong_place_are_refused() -> None:
    index = SampleIndexSampler(7)
    with pytest.raises(DataError, match="23 of them"):
        PairedLoader(Rows(), index, sampler=WeightedIndexSampler([1.0, 2.0, 3.0]))  # weights of classes
    with pytest.raises(DataError, match="24 of them"):
        PairedLoader(Rows(24), index, batch_sampler=StratifiedBatchSampler(LABELS, 4))
    with pytest.raises(ConfigError, match="sampler="):
        PairedLoader(Rows(), index, batch_sampler=ClassBalancedSampler(LABELS))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batch_sampler="):
        PairedLoader(Rows(), index, sampler=StratifiedBatchSampler(LABELS, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_of_a_batch_are_known_for_importance_weights(workers: int) -> None:
    paired = with_order("balanced", workers)
    weights = ClassBalancedSampler(LABELS).importance_weights(range(23))
    for (_, y), _ in paired:
        assert list(paired.rows) == y.tolist()
        assert torch.equal(paired.sampler.importance_weights(paired.rows), weights[y])


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a stock BatchSampler"])
def test_a_state_inside_an_epoch_is_of_the_weights_it_was_begun_with(inside: bool) -> None:
    """Also after an update in its midst: a sampler of the new weights has another list, and is refused."""
    before, after = np.arange(1.0, 24.0), np.arange(23.0, 0.0, -1.0)

    def made(weights: np.ndarray) -> tuple[PairedLoader, WeightedIndexSampler]:
        sampler = WeightedIndexSampler(weights, seed=2)
        if inside:
            return loader(shuffle=False, batch_size=1, batch_sampler=BatchSampler(sampler, 4, drop_last=False)), sampler
        return loader(shuffle=False, sampler=sampler), sampler

    whole = pairs(made(before)[0])
    paired, sampler = made(before)
    batches = iter(paired)
    next(batches), next(batches)
    sampler.update(after)
    state = json.loads(json.dumps(paired.state_dict()))
    with pytest.raises(DataError, match="weights"):
        made(after)[0].load_state_dict(state)
    resumed, _ = made(before)
    resumed.load_state_dict(state)
    assert pairs(resumed) == whole[2:]
    list(batches)
    made(after)[0].load_state_dict(paired.state_dict())  # between epochs it is of those that come
