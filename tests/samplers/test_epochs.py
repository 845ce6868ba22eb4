"""What every data sampler promises: one list an epoch from (seed, epoch, ranks, weights), whoever asks and whenever."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from bnn.errors import ConfigError, DataError
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    Constant,
    DynamicClassSampler,
    EpochSampler,
    ShuffledSampler,
    StratifiedBatchSampler,
    WeightedIndexSampler,
    WindowSampler,
)

ROWS = range(41)  # serves as the data set: its rows are their own numbers
LABELS = [0] * 20 + [1] * 13 + [2] * 7
WEIGHTS = [1.0 + row % 5 for row in range(40)]
LOSSES = {"loss": [0.1, 2.0, 5.0]}

Maker = Callable[..., EpochSampler[Any]]

# 25 rows in batches of 2, or 13 batches: neither divides by 2 or 3.
MAKERS: dict[str, Maker] = {
    "shuffled": lambda **options: ShuffledSampler(25, **options),
    "weighted": lambda **options: WeightedIndexSampler(WEIGHTS, 25, **options),
    "without replacement": lambda **options: WeightedIndexSampler(WEIGHTS, 25, False, **options),
    "balanced": lambda **options: ClassBalancedSampler(LABELS, num_samples=25, **options),
    "dynamic": lambda **options: DynamicClassSampler(LABELS, ByMetric("loss"), num_samples=25, **options),
    "stratified": lambda **options: StratifiedBatchSampler(LABELS, 4, skew=0.5, num_batches=13, **options),
    "windows": lambda **options: WindowSampler([20, 21], 3, num_windows=3, **options),
}
UPDATES: dict[str, Any] = {
    "weighted": [3.0 if row < 8 else 1.0 for row in range(40)],
    "without replacement": [3.0 if row < 8 else 1.0 for row in range(40)],
    "dynamic": LOSSES,
}

with_update = pytest.mark.parametrize("name", UPDATES)


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


def epoch_of(make: Maker, epoch: int, **options: Any) -> list[Any]:
    """The list of an epoch, from a sampler that did nothing else."""
    sampler = make(**options)
    sampler.set_epoch(epoch)
    return list(sampler)


def batches_of(make: Maker, epoch: int) -> list[list[int]]:
    items = epoch_of(make, epoch)
    return items if isinstance(items[0], list) else [items[first : first + 2] for first in range(0, len(items), 2)]


def loader_of(sampler: EpochSampler[Any], kind: Any = DataLoader, workers: int = 0, **options: Any) -> Any:
    rows = isinstance(sampler, (StratifiedBatchSampler, WindowSampler))
    order = {"batch_sampler": sampler} if rows else {"sampler": sampler, "batch_size": 2}
    options["multiprocessing_context"] = "fork" if workers else None
    return kind(ROWS, num_workers=workers, **order, **options)


def as_json(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


def test_the_list_depends_on_seed_and_epoch_alone(make: Maker) -> None:
    first, later = epoch_of(make, 0), epoch_of(make, 3)
    sampler = make(seed=0)
    for epoch in (3, 1, 0, 3):  # whatever was visited before
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler) == len(first)
        if epoch in (0, 3):
            assert found == (first if epoch == 0 else later)
    assert first != later
    assert first != epoch_of(make, 0, seed=1)


def test_fifty_epochs_and_seeds_of_equal_sum_differ(make: Maker) -> None:
    """`seed + epoch` as the key would give epoch 1 of seed 0 the list of epoch 0 of seed 1."""
    lists = [epoch_of(make, epoch) for epoch in range(50)]
    lists += [epoch_of(make, 6 - seed, seed=seed) for seed in range(1, 7)]
    assert len({json.dumps(one) for one in lists}) == 56


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stock_loader_gives_the_bare_list(make: Maker, workers: int) -> None:
    for options in [{}, {"persistent_workers": True, "prefetch_factor": 8}][: 2 if workers else 1]:
        sampler = make()
        loader = loader_of(sampler, workers=workers, **options)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            assert [batch.tolist() for batch in loader] == batches_of(make, epoch)


def test_interleaved_samplers_do_not_meet(make: Maker) -> None:
    pairs = list(zip(make(seed=3), make(seed=4), strict=True))
    assert [pair[0] for pair in pairs] == epoch_of(make, 0, seed=3)
    assert [pair[1] for pair in pairs] == epoch_of(make, 0, seed=4)


def test_global_streams_are_neither_read_nor_changed(make: Maker, world_untouched: None) -> None:
    sampler = make()
    assert list(itertools.islice(sampler, 3)) == epoch_of(make, 0)[:3]
    make().load_state_dict(sampler.state_dict())


def test_drawing_in_smaller_blocks_changes_nothing(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = epoch_of(make, 2, rank=1, world_size=2)
    monkeypatch.setattr(type(make()), "block_sizes", (1, 3))
    assert epoch_of(make, 2, rank=1, world_size=2) == expected


def test_the_list_and_its_length_are_frozen_by_iter(make: Maker) -> None:
    sampler = make()
    length = len(sampler)
    running = iter(sampler)
    sampler.set_epoch(4)
    found = [next(running) for _ in range(6)]
    sampler.set_epoch(2)
    assert len(sampler) == length
    assert found + list(running) == epoch_of(make, 0)
    assert list(sampler) == epoch_of(make, 2)


@with_update
def test_an_update_in_mid_epoch_holds_from_the_next_one_on(name: str) -> None:
    make = MAKERS[name]
    sampler = make()
    length = len(sampler)
    running = iter(sampler)
    sampler.update(UPDATES[name])
    assert len(sampler) == length
    assert list(running) == epoch_of(make, 0)
    updated = make()
    updated.update(UPDATES[name])
    for other in (sampler, updated):
        other.set_epoch(1)
    found = list(sampler)
    assert found == list(updated)
    assert found != epoch_of(make, 1)


def test_peeking_changes_nothing(make: Maker) -> None:
    for options in ({}, {"auto_epoch": True}):
        sampler = make(**options)
        assert [next(iter(sampler)) for _ in range(3)] == epoch_of(make, 0)[:1] * 3
        iter(sampler)
        assert sampler.epoch == 0
        assert list(sampler) == epoch_of(make, 0)


def test_peeking_leaves_a_running_iteration_alone(make: Maker) -> None:
    sampler = make()
    running = iter(sampler)
    found = [next(running), next(running)]
    next(iter(sampler))
    assert found + list(running) == epoch_of(make, 0)


def test_a_forgotten_set_epoch_warns_once(make: Maker) -> None:
    sampler = make()
    first = list(sampler)
    with pytest.warns(UserWarning, match="epoch 0 is iterated again") as caught:
        assert list(sampler) == first
    assert caught[0].filename == __file__
    assert list(sampler) == first  # a second warning would be an error here


def test_set_epoch_before_each_epoch_never_warns(make: Maker) -> None:
    sampler = make()
    for epoch in (0, 1, 1, 0):
        sampler.set_epoch(epoch)
        assert list(sampler) == epoch_of(make, epoch)


def test_auto_epoch_advances_after_a_finished_epoch(make: Maker) -> None:
    sampler = make(auto_epoch=True)
    found = [list(sampler)]
    next(iter(sampler))
    found += [list(sampler), list(sampler)]
    assert found == [epoch_of(make, epoch) for epoch in range(3)]
    assert sampler.epoch == 2


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_take_disjoint_places_of_one_list(make: Maker, world_size: int, drop_last: bool) -> None:
    """Dealt out in turn; what does not divide is left out, or made up for by the list's head."""
    whole = epoch_of(make, 1, drop_last=drop_last)
    ranks = [epoch_of(make, 1, rank=rank, world_size=world_size, drop_last=drop_last) for rank in range(world_size)]
    rounds = len(whole) // world_size if drop_last else -(-len(whole) // world_size)
    together = [item for items in zip(*ranks, strict=True) for item in items]
    assert together == (whole + whole)[: rounds * world_size]
    assert len(make(rank=world_size - 1, world_size=world_size, drop_last=drop_last)) == rounds


@pytest.mark.parametrize("options", [{}, {"rank": 1, "world_size": 2}])
def test_resume_after_every_item_twice_in_a_row(make: Maker, options: dict[str, Any]) -> None:
    expected = epoch_of(make, 5, **options)
    for taken in range(len(expected) + 1):
        sampler = make(**options)
        sampler.set_epoch(5)
        found = list(itertools.islice(sampler, taken))
        for _ in range(2):
            resumed = make(**options)
            resumed.load_state_dict(as_json(sampler.state_dict()))
            assert resumed.epoch == 5
            found += list(itertools.islice(resumed, 3))
            sampler = resumed
        assert found == expected[: taken + 6]
        last = make(**options)
        last.load_state_dict(as_json(sampler.state_dict()))
        assert found + list(last) == expected


@with_update
def test_a_resumed_sampler_goes_on_to_the_epochs_of_the_unbroken_one(name: str) -> None:
    unbroken = MAKERS[name]()
    unbroken.update(UPDATES[name])
    running = iter(unbroken)
    for _ in range(7):
        next(running)
    state = as_json(unbroken.state_dict())
    resumed = MAKERS[name]()
    if name != "dynamic":  # weights are too long for a state: it knows them by a digest
        resumed.update(UPDATES[name])
    resumed.load_state_dict(state)
    assert list(resumed) == list(running)
    for other in (unbroken, resumed):
        other.set_epoch(1)
    assert list(resumed) == list(unbroken)


def test_a_state_of_the_end_of_an_epoch_leads_to_the_next(make: Maker) -> None:
    for auto_epoch in (False, True):
        sampler = make(auto_epoch=auto_epoch)
        list(sampler)
        resumed = make(auto_epoch=auto_epoch)
        resumed.load_state_dict(as_json(sampler.state_dict()))
        if not auto_epoch:
            assert list(resumed) == []  # nothing is left of epoch 0
            resumed.set_epoch(1)
        assert list(resumed) == epoch_of(make, 1)


def test_set_epoch_after_a_resume_keeps_the_place_in_the_same_epoch(make: Maker) -> None:
    sampler = make()
    sampler.set_epoch(2)
    list(itertools.islice(sampler, 5))
    state = sampler.state_dict()
    for epoch, start, expected in [
        (2, None, epoch_of(make, 2)[5:]),
        (2, 0, epoch_of(make, 2)),
        (2, 9, epoch_of(make, 2)[9:]),
        (3, None, epoch_of(make, 3)),
    ]:
        resumed = make()
        resumed.load_state_dict(state)
        resumed.set_epoch(epoch, start=start)
        assert list(resumed) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stock_loader_resumes_by_hand_with_any_number_of_workers(make: Maker, workers: int) -> None:
    """The caller counts batches, since workers fetch ahead of them; a loader may ask for an iterator twice."""
    sampler = make()
    rows = 1 if isinstance(sampler, (StratifiedBatchSampler, WindowSampler)) else 2
    sampler.set_epoch(3, start=5 * rows)
    assert [batch.tolist() for batch in loader_of(sampler, workers=workers)] == batches_of(make, 3)[5:]
    counted = make()
    counted.set_epoch(3)
    list(itertools.islice(counted, 5 * rows))
    resumed = make()
    resumed.load_state_dict(counted.state_dict())
    assert [batch.tolist() for batch in loader_of(resumed, workers=workers)] == batches_of(make, 3)[5:]


def test_a_state_after_set_epoch_in_mid_iteration_skips_nothing(make: Maker) -> None:
    """It stands in the list that goes on, or at the head of the one to come; never inside the latter."""
    sampler = make()
    running = iter(sampler)
    next(running)
    sampler.set_epoch(1)
    next(running)
    resumed = make()
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) in (epoch_of(make, 0)[2:], epoch_of(make, 1))


@pytest.mark.parametrize("name", ["weighted", "without replacement"])
def test_a_state_after_an_update_in_mid_epoch_belongs_to_the_weights_in_force(name: str) -> None:
    sampler = MAKERS[name]()
    running = iter(sampler)
    next(running)
    sampler.update(UPDATES[name])
    state = sampler.state_dict()
    updated = MAKERS[name]()
    updated.update(UPDATES[name])
    with pytest.raises(DataError, match="weights"):
        updated.load_state_dict(state)
    resumed = MAKERS[name]()
    resumed.load_state_dict(state)
    assert list(resumed) == list(running)


OTHERS: list[tuple[str, str, Maker]] = [
    *((name, "seed", lambda name=name: MAKERS[name](seed=1)) for name in MAKERS),
    *((name, "world_size", lambda name=name: MAKERS[name](world_size=2)) for name in MAKERS),
    ("shuffled", "items", lambda: ShuffledSampler(26)),
    ("shuffled", "shuffle", lambda: ShuffledSampler(25, shuffle=False)),
    ("weighted", "weights", lambda: WeightedIndexSampler(WEIGHTS[::-1], 25)),
    ("weighted", "replacement", MAKERS["without replacement"]),
    ("weighted", "kind", MAKERS["balanced"]),
    ("balanced", "weights", lambda: ClassBalancedSampler(LABELS, 0.5, num_samples=25)),
    ("balanced", "labels", lambda: ClassBalancedSampler(LABELS[::-1], num_samples=25)),
    ("dynamic", "schedule", lambda: DynamicClassSampler(LABELS, Constant(), num_samples=25)),
    ("dynamic", "schedule", lambda: DynamicClassSampler(LABELS, ByMetric("loss", strength=2.0), num_samples=25)),
    ("dynamic", "labels", lambda: DynamicClassSampler(LABELS[::-1], ByMetric("loss"), num_samples=25)),
    ("stratified", "shares", lambda: StratifiedBatchSampler(LABELS, 4, num_batches=13)),
    ("stratified", "batch_size", lambda: StratifiedBatchSampler(LABELS, 5, skew=0.5, num_batches=13)),
    ("stratified", "labels", lambda: StratifiedBatchSampler(LABELS[::-1], 4, skew=0.5, num_batches=13)),
    ("windows", "lengths", lambda: WindowSampler([21, 20], 3, num_windows=3)),
    ("windows", "shuffle", lambda: WindowSampler([20, 21], 3, num_windows=3, shuffle=False)),
]


@pytest.mark.parametrize(("name", "key", "other"), OTHERS, ids=[f"{name}-{key}" for name, key, _ in OTHERS])
def test_a_state_of_something_else_is_refused(name: str, key: str, other: Maker) -> None:
    sampler = MAKERS[name]()
    list(itertools.islice(sampler, 3))
    found = other()
    before = found.state_dict()
    with pytest.raises(DataError, match=key):
        found.load_state_dict(as_json(sampler.state_dict()))
    assert found.state_dict() == before


def test_a_state_is_small_whatever_the_number_of_rows() -> None:
    labels, num_rows = np.arange(50_000) % 3, 50_000
    for sampler in (
        ShuffledSampler(num_rows),
        WeightedIndexSampler(np.ones(num_rows)),
        ClassBalancedSampler(labels),
        DynamicClassSampler(labels, Constant()),
        StratifiedBatchSampler(labels, 100),
        WindowSampler(num_rows, 5),
    ):
        next(iter(sampler))
        assert len(json.dumps(sampler.state_dict())) < 600


def test_bad_epochs_ranks_and_lengths_are_refused(make: Maker) -> None:
    sampler = make()
    for epoch, start in [(-1, None), (0, -1), (0, len(sampler) + 1)]:
        with pytest.raises(ConfigError, match="set_epoch"):
            sampler.set_epoch(epoch, start=start)
    for rank, world_size in [(-1, 2), (2, 2), (0, 0)]:
        with pytest.raises(ConfigError, match="rank"):
            make(rank=rank, world_size=world_size)
    with pytest.raises(ConfigError, match="one a rank"):
        make(rank=0, world_size=26, drop_last=True)
    for num_samples in (0, -3):
        with pytest.raises(ConfigError, match="at least one item"):
            WeightedIndexSampler(WEIGHTS, num_samples)


def in_steps(make_loader: Callable[[], Any], step: int, count: int) -> list[list[int]]:
    """The first `count` batches of a run that is stopped after every `step` of them and resumed from its state."""
    found: list[list[int]] = []
    state: dict[str, Any] = {}
    for _ in range(4 * count):
        loader = make_loader()
        loader.load_state_dict(copy.deepcopy(state))
        for taken, batch in enumerate(loader, 1):
            found.append(batch.tolist())
            if taken == step or len(found) == count:
                break
        if len(found) == count:
            return found
        state = loader.state_dict()
    raise AssertionError(f"no more than {len(found)} batches came")


@pytest.fixture
def stateful(oracle: Any) -> Any:
    return oracle("torchdata.stateful_dataloader").StatefulDataLoader


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 calls it
def test_a_stateful_loader_resumes_after_every_batch(make: Maker, stateful: Any) -> None:
    """Two epochs of 13 batches in steps that end inside an epoch, at its end, and one after the other."""
    expected = batches_of(make, 0) + batches_of(make, 1)
    assert len(expected) == 26
    for step in range(1, 14):
        assert in_steps(lambda: loader_of(make(auto_epoch=True), stateful), step, 26) == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("name", ["weighted", "dynamic", "stratified"])
@pytest.mark.parametrize("step", [1, 5, 13])
def test_a_stateful_loader_with_workers_resumes(name: str, step: int, stateful: Any) -> None:
    """Two workers fetch ahead; the state counts what was handed out."""
    expected = batches_of(MAKERS[name], 0) + batches_of(MAKERS[name], 1)
    found = in_steps(lambda: loader_of(MAKERS[name](auto_epoch=True), stateful, workers=2), step, 26)
    assert found == expected


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("default:.* is iterated again")  # as an error it would leave workers behind
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [5, 13, 14])
def test_a_stateful_loader_resumes_in_a_loop_that_sets_the_epoch(
    make: Maker, workers: int, taken: int, stateful: Any
) -> None:
    """`set_epoch` comes before the loader gives its state back; after a finished epoch (14) it is that of the next."""
    sampler = make()
    loader = loader_of(sampler, stateful, workers)
    for number, _ in enumerate(loader, 1):
        if number == taken:
            break
    resumed = make()
    again = loader_of(resumed, stateful, workers)
    again.load_state_dict(copy.deepcopy(loader.state_dict()))
    whole = [batches_of(make, epoch) for epoch in range(3)]
    for epoch in range(int(taken > 13), 3):
        resumed.set_epoch(epoch)
        found = [batch.tolist() for batch in again]
        assert found == (whole[epoch][taken:] if epoch == 0 else whole[epoch])
