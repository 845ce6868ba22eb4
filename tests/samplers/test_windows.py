"""Windows of consecutive rows: each start once an epoch, none across two series."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from bnn.errors import ConfigError, DataError
from bnn.samplers import WindowSampler


def windows_of(lengths: list[int], window: int, stride: int) -> list[list[int]]:
    """The slow obvious version: every start of every series, if the window ends inside."""
    found, first = [], 0
    for length in lengths:
        for start in range(0, length, stride):
            if start + window <= length:
                found.append(list(range(first + start, first + start + window)))
        first += length
    return found


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.booleans(),
)
def test_every_window_once_an_epoch_and_none_across_series(
    lengths: list[int], window: int, stride: int, num_windows: int, shuffle: bool
) -> None:
    expected = windows_of(lengths, window, stride)
    assume(expected)
    sampler = WindowSampler(lengths, window, stride=stride, num_windows=num_windows, shuffle=shuffle)
    batches = list(sampler)
    rows = np.concatenate([np.array(batch) for batch in batches]).reshape(-1, window).tolist()
    assert (sorted(rows) if shuffle else rows) == expected
    sizes = [len(batch) // window for batch in batches]
    assert all(size == num_windows for size in sizes[:-1])
    assert len(sampler) == len(sizes) == -(-len(expected) // num_windows)
    assert all(isinstance(row, int) for row in batches[0])


def test_one_series_may_be_given_by_its_length() -> None:
    assert list(WindowSampler(9, 3, shuffle=False)) == list(WindowSampler([9], 3, shuffle=False))
    assert list(WindowSampler(np.array([9]), 3)) == list(WindowSampler(9, 3))  # type: ignore[arg-type]


def test_known_windows() -> None:
    assert list(WindowSampler([5, 2, 4], 3, stride=2, shuffle=False)) == [[0, 1, 2], [2, 3, 4], [7, 8, 9]]
    assert list(WindowSampler(4, 4)) == [[0, 1, 2, 3]]
    assert list(WindowSampler(5, 2, num_windows=3, shuffle=False)) == [[0, 1, 1, 2, 2, 3], [3, 4]]


def test_epochs_shuffle_the_starts_and_no_shuffle_keeps_them() -> None:
    shuffled, plain = WindowSampler(40, 5, seed=1), WindowSampler(40, 5, seed=1, shuffle=False)
    orders = []
    for epoch in range(10):
        shuffled.set_epoch(epoch)
        plain.set_epoch(epoch)
        orders.append(tuple(batch[0] for batch in shuffled))
        assert [batch[0] for batch in plain] == list(range(36))
    assert len({*orders, tuple(range(36))}) == 11


def test_every_start_comes_first_equally_often() -> None:
    """Chi-square over 4,000 epochs of 8 starts, at 5 standard deviations."""
    sampler, counts = WindowSampler(10, 3, seed=2), np.zeros(8)
    for epoch in range(4_000):
        sampler.set_epoch(epoch)
        counts[next(iter(sampler))[0]] += 1
    assert float(((counts - 500) ** 2 / 500).sum()) < 7 + 5 * np.sqrt(14)


def test_drop_last_leaves_out_a_batch_of_fewer_windows() -> None:
    for num_windows, kept in [(3, 2), (4, 2), (8, 1)]:  # of 8 windows
        sampler = WindowSampler(10, 3, num_windows=num_windows, drop_last=True)
        assert [len(batch) for batch in sampler] == [3 * num_windows] * kept
        assert len(sampler) == kept
    with pytest.raises(ConfigError, match="at least one item"):
        WindowSampler(10, 3, num_windows=9, drop_last=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_meet_disjoint_windows(world_size: int) -> None:
    starts = [
        [batch[0] for batch in WindowSampler(26, 3, rank=rank, world_size=world_size, seed=4)]
        for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*starts)) == list(range(24))  # 24 divides by 2 and 3


def test_a_batch_unflattens_into_its_windows() -> None:
    x = torch.randn(12, 2)
    sampler = WindowSampler(12, 4, num_windows=3, seed=5)
    (found,) = next(iter(DataLoader(TensorDataset(x), batch_sampler=sampler)))
    rows = next(iter(WindowSampler(12, 4, num_windows=3, seed=5)))
    windows = found.unflatten(0, (-1, 4))  # [12, 2] -> [3, 4, 2]
    for place in range(3):
        first = rows[4 * place]
        assert torch.equal(windows[place], x[first : first + 4])


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("lengths", {"lengths": [21, 19]}),
        ("window", {"window": 4}),
        ("stride", {"stride": 2}),
        ("num_windows", {"num_windows": 99}),
        ("shuffle", {"shuffle": False}),
    ],
)
def test_a_state_of_other_windows_is_refused(key: str, other: dict[str, Any]) -> None:
    """One batch holds all windows, so that nothing else differs."""
    options: dict[str, Any] = {"lengths": [20, 20], "window": 3, "stride": 1, "num_windows": 100, "shuffle": True}
    state = json.loads(json.dumps(WindowSampler(**options).state_dict()))
    WindowSampler(**options).load_state_dict(state)
    with pytest.raises(DataError, match=key):
        WindowSampler(**{**options, **other}).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"window": 0}, "window"),
        ({"stride": 0}, "stride"),
        ({"num_windows": 0}, "num_windows"),
        ({"lengths": 0}, "lengths"),
        ({"lengths": [5, -1]}, "lengths"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [2, 3, 3], "window": 4}, "at least 4 rows"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        WindowSampler(**{"lengths": [9, 9], "window": 3, **options})


def test_windows_longer_than_a_row_reweight() -> None:
    """Rows near the ends of a series are in fewer windows."""
    assert WindowSampler(9, 3).reweights
    assert not WindowSampler(9, 1).reweights
