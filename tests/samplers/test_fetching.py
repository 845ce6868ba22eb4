"""How batches are fetched: tensors taken whole, random transforms by place, iterable data on arrival."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    get_worker_info,
)

from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.samplers import (
    PairedLoader,
    SampleIndexSampler,
    ShuffledSampler,
    TensorRows,
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


class Named(NamedTuple):
    x: Tensor
    name: str


def same(one: Any, other: Any) -> bool:
    """Whether two batches have one structure, types and values."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            type(one) is type(other) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        )
    return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_tensor_data_set_taken_whole_gives_what_a_stock_loader_gives(workers: int) -> None:
    x, y = torch.randn(23, 3, 2), torch.arange(23)
    dataset = TensorDataset(x, y, y.double())
    order = ShuffledSampler(23, seed=1)
    paired = PairedLoader(
        dataset,
        SampleIndexSampler(7, seed=1),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    for epoch in range(2):
        order.set_epoch(epoch)
        stock = list(DataLoader(dataset, batch_size=4, sampler=order))
        assert same([data for data, _ in paired], stock)


def test_tensors_in_memory_keep_their_nesting() -> None:
    x, mask, y = torch.randn(11, 3), torch.arange(22).view(11, 2) % 3 > 0, torch.arange(11)
    order = [[3, 1, 10], [0, 0]]
    for data in [
        (x, y),
        ({"x": x, "mask": mask}, y),
        ((x, (mask,)), {"y": y}),
        [x, y],
        [x, {"mask": mask}],
        Named(x, y),
    ]:  # type: ignore[arg-type]
        rows_of = TensorRows(data)
        paired = PairedLoader(rows_of, SampleIndexSampler(4), batch_sampler=order)  # type: ignore[arg-type]
        for rows, (found, _) in zip(order, paired, strict=True):
            assert same(found, pytree.tree_map(lambda leaf, rows=rows: leaf[rows], data))
        apart = PairedLoader(rows_of, SampleIndexSampler(4), batch_sampler=order, collate_fn=lambda rows: rows)  # type: ignore[arg-type]
        assert same(next(iter(apart)).data[1], pytree.tree_map(lambda leaf: leaf[1], data))


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(4), torch.zeros(5)),
        (torch.tensor(1.0), torch.tensor(2)),
        (np.zeros(4), np.zeros(4)),
        (np.zeros(4), torch.zeros(4)),  # an array would come whole with every batch
        (torch.zeros(4), [1, 2, 3, 4]),
        (),
    ],
    ids=["lengths", "scalars", "arrays", "an array", "a list", "nothing"],
)
def test_what_are_no_tensors_of_one_length_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match="tensors of one length"):
        TensorRows(data)


class Asked(Rows):
    """Rows that are fetched many at once."""

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, Tensor]]:
        assert type(rows) is list
        assert all(type(row) is int for row in rows)
        return [(self.x[row], torch.tensor(row + 100)) for row in rows]


def test_a_data_set_that_fetches_many_is_asked_for_many() -> None:
    paired = PairedLoader(Asked(), SampleIndexSampler(7, seed=1), batch_size=4, shuffle=True)
    assert [([row - 100 for row in rows], index) for rows, index in pairs(paired)] == pairs(loader())


@pytest.mark.parametrize("options", [{"prefetch_factor": 1}, {"prefetch_factor": 8, "persistent_workers": True}])
def test_fetching_ahead_changes_nothing(options: dict[str, Any]) -> None:
    alone, ahead = loader(), loader(num_workers=2, multiprocessing_context="fork", **options)
    for _ in range(3):
        assert pairs(alone) == pairs(ahead)
    assert len(list(itertools.islice(ahead, 2))) == 2
    resumed = loader()
    resumed.load_state_dict(ahead.state_dict())  # counts what was handed out, not what was fetched
    resumed.set_epoch(3)
    assert pairs(resumed) == pairs(alone)[2:]


# Random numbers of the data set's own.


class Noisy(Dataset[Tensor]):
    """Rows with noise from every global stream, as transforms draw it."""

    def __len__(self) -> int:
        return 13

    def __getitem__(self, row: int) -> Tensor:
        return torch.tensor([row, float(torch.rand(())), np.random.rand(), random.random()])  # noqa: NPY002


def noised(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) + 0.5 * torch.rand(()) + np.random.rand()  # noqa: NPY002


def noisy(workers: int = 0, **options: Any) -> PairedLoader:
    context = "fork" if workers else None
    options = {"batch_size": 3, "shuffle": True, "collate_fn": noised, **options}
    return PairedLoader(Noisy(), SampleIndexSampler(5), num_workers=workers, multiprocessing_context=context, **options)


def test_random_transforms_are_the_same_for_any_number_of_workers(world_untouched: None) -> None:
    """And leave the global streams of this process as they were."""
    alone = noisy()
    epochs = [[data for data, _ in alone] for _ in range(2)]
    for workers, options in [(1, {}), (2, {}), (2, {"persistent_workers": True, "prefetch_factor": 1})]:
        beside = noisy(workers, **options)
        for expected in epochs:
            assert all(torch.equal(data, one) for (data, _), one in zip(beside, expected, strict=True))
    noise = torch.cat([batch[:, 1:].frac() for epoch in epochs for batch in epoch])
    assert len(noise.unique()) == noise.numel()  # no batch repeats another's


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_are_the_same_after_a_resume(workers: int, world_untouched: None) -> None:
    whole = noisy()
    expected = [data for _ in range(2) for data, _ in whole]
    for taken in (1, 4, 5, 7):
        first = noisy()
        data = list(itertools.islice((data for _ in range(2) for data, _ in first), taken))
        resumed = noisy(workers)
        resumed.load_state_dict(first.state_dict())
        while len(data) < 10:
            data += [one for one, _ in resumed]
        assert all(map(torch.equal, data, expected))


def test_random_transforms_follow_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = [data for data, _ in noisy()]
    torch.manual_seed(2)
    assert all(map(torch.equal, first, [data for data, _ in noisy()]))
    other = [data for data, _ in noisy(shuffle=False, seed=9)]
    assert not torch.equal(first[0][:, 1:].frac(), other[0][:, 1:].frac())


# Iterable data sets.


class Stream(IterableDataset[Tensor]):
    """Numbers from epoch * 100 on, dealt out to workers, with noise from a global stream."""

    def __init__(self, size: int = 10) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, self.size, step):
            yield torch.tensor([100.0 * self.epoch + number, float(torch.rand(()))], dtype=torch.float64)


def stream(workers: int = 0, **options: Any) -> PairedLoader:
    context = "fork" if workers else None
    options = {"batch_size": 3, **options}
    return PairedLoader(
        Stream(), SampleIndexSampler(7, seed=1), num_workers=workers, multiprocessing_context=context, **options
    )


def arrivals(paired: PairedLoader) -> list[tuple[list[float], Any]]:
    return [(data[:, 0].tolist(), index if isinstance(index, int) else index.tolist()) for data, index in paired]


def test_iterable_data_are_paired_on_arrival_and_epochs_count_on() -> None:
    """4 batches an epoch in this process; with 2 workers of 5 numbers each 2 batches a worker, in turn."""
    for workers, per_epoch in [
        (0, [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]),
        (2, [[0, 2, 4], [1, 3, 5], [6, 8], [7, 9]]),
    ]:
        paired = stream(workers)
        expected = SampleIndexSampler(7, seed=1).at(range(12)).tolist()
        for epoch in range(3):
            found = arrivals(paired)
            assert [rows for rows, _ in found] == [[100.0 * epoch + row for row in rows] for rows in per_epoch]
            assert [index for _, index in found] == expected[4 * epoch : 4 * epoch + 4]


def test_iterable_data_meet_several_indices_and_have_no_length() -> None:
    paired = stream(num_indices=2)
    assert [index for _, index in arrivals(paired)] == SampleIndexSampler(7, seed=1).at(range(8)).view(4, 2).tolist()
    with pytest.raises(TypeError):
        len(paired)
    assert paired.sampler is None


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_data_resume_after_every_batch_twice_in_a_row(workers: int) -> None:
    whole = stream(workers)
    expected = [pair for _ in range(4) for pair in arrivals(whole)]
    for taken in range(1, 9):
        found: list[Any] = []
        state = stream(workers).state_dict()
        for _ in range(2):
            paired = stream(workers)
            paired.load_state_dict(json.loads(json.dumps(state)))
            stop = len(found) + taken
            while len(found) < stop:
                for data, index in paired:
                    found.append((data[:, 0].tolist(), index))
                    state = paired.state_dict()
                    if len(found) == stop:
                        break
        assert found == expected[: 2 * taken]


def test_iterable_data_with_another_number_of_workers_are_refused() -> None:
    """Their order is that of their workers; map-style data have no such tie."""
    paired = stream(2)
    next(iter(paired))
    with pytest.raises(BankMismatch, match="num_workers"):
        stream().load_state_dict(paired.state_dict())
    out_of_order = stream(2, in_order=False)
    next(iter(out_of_order))
    with pytest.raises(ConfigError, match="in_order"):
        out_of_order.state_dict()


def test_an_epoch_of_iterable_data_that_is_broken_off_begins_again() -> None:
    paired = stream()
    expected = arrivals(stream())
    for _ in range(2):
        assert [next(iter(paired)).index] == [expected[0][1]]
    assert arrivals(paired) == expected


def test_persistent_workers_of_iterable_data_learn_the_epoch() -> None:
    """They hold copies of the data set from the time they were started."""
    fresh, persistent = stream(2), stream(2, persistent_workers=True)
    for _ in range(3):
        assert arrivals(fresh) == arrivals(persistent)


@pytest.mark.parametrize(("workers", "options"), [(0, {}), (2, {}), (2, {"persistent_workers": True})])
def test_random_numbers_of_iterable_data_are_the_same_after_a_resume(
    workers: int, options: dict[str, Any], world_untouched: None
) -> None:
    """For one number of workers, as their order."""
    whole = stream(workers, **options)
    expected = [data for _ in range(2) for data, _ in whole]
    for taken in (2, 6):
        first = stream(workers, **options)
        data = list(itertools.islice((data for _ in range(2) for data, _ in first), taken))
        resumed = stream(workers, **options)
        resumed.load_state_dict(first.state_dict())
        while len(data) < 8:
            data += [one for one, _ in resumed]
        assert all(map(torch.equal, data, expected))


@pytest.mark.parametrize(
    "options",
    [
        {"shuffle": True},
        {"per_row": True},
        {"sampler": SequentialSampler(range(10))},
        {"batch_sampler": [[0]], "batch_size": 1},
    ],
)
def test_iterable_data_have_an_order_of_their_own(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="iterable"):
        stream(**options)


# Samplers of ours inside.


def test_a_state_of_another_batch_size_of_iterable_data_is_refused() -> None:
    arriving = stream()
    next(iter(arriving))
    with pytest.raises(BankMismatch, match="batch"):
        stream(batch_size=2).load_state_dict(arriving.state_dict())


def test_a_list_is_a_data_set_of_its_items() -> None:
    """A stock loader takes it so; two items of one length must not be read as two columns."""
    items = [(torch.tensor([float(row), 0.0]), row) for row in range(5)]
    paired = PairedLoader(items, SampleIndexSampler(4), batch_size=2)  # type: ignore[arg-type]
    assert len(paired) == 3
    assert [y.tolist() for (_, y), _ in paired] == [[0, 1], [2, 3], [4]]


def test_a_dict_of_tensors_is_data() -> None:
    data = {"ids": torch.arange(10).view(5, 2), "label": torch.arange(5)}
    batch, _ = next(iter(PairedLoader(data, SampleIndexSampler(4), batch_size=3)))
    assert batch["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_samplers_of_others_resume_and_leave_the_global_stream(world_untouched: None) -> None:
    def stock() -> PairedLoader:
        dataset = TensorDataset(torch.arange(11))
        return PairedLoader(dataset, SampleIndexSampler(3), batch_size=2, sampler=RandomSampler(dataset))

    def rows(paired: PairedLoader) -> list[int]:
        return [row for (x,), _ in paired for row in x.tolist()]

    whole, broken, resumed = stock(), stock(), stock()
    expected = [rows(whole), rows(whole)]
    assert expected[0] != expected[1]
    batches = iter(broken)
    begun = [row for _ in range(2) for row in next(batches).data[0].tolist()]
    resumed.load_state_dict(broken.state_dict())
    assert [begun + rows(resumed), rows(resumed)] == expected
