"""Pairs of data and bank index: the same for any number of workers, resumable after any batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, RandomSampler, SequentialSampler, TensorDataset

from bnn.errors import BankMismatch, ConfigError
from bnn.samplers import PairedLoader, SampleIndexSampler


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
