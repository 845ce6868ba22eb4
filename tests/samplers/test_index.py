"""Bank indices: a pure function of seed and position, each sample once a pass, golden across versions."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError
from bnn.samplers import SampleIndexSampler
from bnn.samplers.hashing import exponentials, hash64
from bnn.samplers.index import STRATEGIES


def test_golden_values() -> None:
    """These never change: a seed means the same order for as long as the project lives."""
    assert [int(v) for v in hash64(np.arange(3, dtype=np.uint64))] == [
        16294208416658607535,
        10451216379200822465,
        10905525725756348110,
    ]
    assert SampleIndexSampler(10, seed=0).at(range(20)).tolist() == [
        2,
        6,
        5,
        3,
        0,
        4,
        7,
        1,
        8,
        9,
        3,
        2,
        7,
        5,
        4,
        1,
        8,
        6,
        9,
        0,
    ]
    assert SampleIndexSampler(10, seed=7, strategy="random").at(range(10)).tolist() == [3, 2, 2, 7, 6, 4, 7, 5, 1, 2]


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 50))
def test_shuffle_takes_each_sample_once_a_pass(length: int, seed: int, number: int) -> None:
    indices = SampleIndexSampler(length, seed=seed).at(range(number * length, (number + 1) * length))
    assert sorted(indices.tolist()) == list(range(length))


@given(st.sampled_from(["sequential", "shuffle", "random"]), st.lists(st.integers(0, 400), max_size=30))
def test_at_does_not_depend_on_what_is_asked_beside_it(strategy: str, positions: list[int]) -> None:
    sampler = SampleIndexSampler(37, strategy=strategy, seed=5)
    one_by_one = [int(SampleIndexSampler(37, strategy=strategy, seed=5).at(p)) for p in positions]
    assert sampler.at(positions).tolist() == one_by_one
    assert sampler.at(np.array(positions, dtype=np.int64).reshape(1, -1)).tolist() == [one_by_one]


def test_sequential_counts_round() -> None:
    assert SampleIndexSampler(4, strategy="sequential").at(range(10)).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_passes_and_seeds_differ() -> None:
    orders = {
        tuple(SampleIndexSampler(12, seed=seed).at(range(12 * number, 12 * number + 12)).tolist())
        for seed in range(20)
        for number in range(20)
    }
    assert len(orders) == 400  # seed + pass would repeat


@pytest.mark.parametrize("strategy", ["shuffle", "random"])
def test_places_are_uniform(strategy: str) -> None:
    """Chi-square of the first place of 20,000 passes over 8 samples, at 5 standard deviations."""
    first = SampleIndexSampler(8, strategy=strategy, seed=3).at(np.arange(20_000) * 8)
    counts = torch.bincount(first, minlength=8).double()
    chi_square = float(((counts - 2500) ** 2 / 2500).sum())
    assert chi_square < 7 + 5 * np.sqrt(14)


def test_neighbours_are_independent() -> None:
    """How often i is followed by j, over all pairs of a pass: each equally often within 5 deviations."""
    order = SampleIndexSampler(5, seed=1).at(range(5 * 20_000)).view(-1, 5)
    pairs = torch.stack([order[:, 0], order[:, 1]], dim=1)
    counts = torch.zeros(5, 5).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(20_000), accumulate=True)
    off = counts[~torch.eye(5, dtype=torch.bool)]
    assert float(counts.diagonal().sum()) == 0
    assert float((off - 1000).abs().max()) < 5 * np.sqrt(1000)


def test_iteration_goes_pass_after_pass_and_set_epoch_chooses_one() -> None:
    sampler = SampleIndexSampler(6, seed=2)
    expected = sampler.at(range(18)).view(3, 6).tolist()
    assert [list(sampler), list(sampler)] == expected[:2]
    sampler.set_epoch(2)
    assert list(sampler) == expected[2]
    sampler.set_epoch(0)
    assert list(sampler) == expected[0]
    assert len(sampler) == 6


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 11, 12])
def test_state_resumes_anywhere_and_is_small(taken: int) -> None:
    sampler = SampleIndexSampler(6, seed=2)
    expected = sampler.at(range(18)).tolist()
    seen: list[int] = []
    while len(seen) < taken:
        for index in sampler:
            seen.append(index)
            if len(seen) == taken:
                break
    state = sampler.state_dict()
    assert all(isinstance(value, (int, str)) for value in state.values())
    resumed = SampleIndexSampler(6, seed=2)
    resumed.load_state_dict(state)
    assert seen == expected[:taken]
    assert list(resumed) == expected[taken : (taken // 6 + 1) * 6]


def test_state_of_another_bank_is_refused() -> None:
    module = nn.Linear(2, 1)
    banks = [Bank.from_state_dicts([nn.Linear(2, 1).state_dict()] * 3, module=module) for _ in range(2)]
    state = SampleIndexSampler(banks[0]).state_dict()
    SampleIndexSampler(banks[0]).load_state_dict(state)
    for other, key in [
        (SampleIndexSampler(banks[1]), "digest"),
        (SampleIndexSampler(4), "length"),
        (SampleIndexSampler(banks[0], seed=1), "seed"),
        (SampleIndexSampler(banks[0], strategy="random"), "strategy"),
    ]:
        with pytest.raises(BankMismatch, match=key):
            other.load_state_dict(state)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        SampleIndexSampler(0)
    with pytest.raises(ConfigError, match="sequential, shuffle, random"):
        SampleIndexSampler(3, strategy="sobol")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 0"):
        SampleIndexSampler(3).at([-1])


def test_global_streams_are_untouched(world_untouched: None) -> None:
    assert len(list(SampleIndexSampler(50, seed=1))) == 50


@dataclass(frozen=True)
class Columns:
    """A bank as the sampler sees one: columns, a record and a name."""

    chain: Tensor
    log_weight: Tensor
    info: dict[str, Any]
    digest: str = "columns"

    def __len__(self) -> int:
        return len(self.log_weight)


def columns(chains: list[int], log_weight: Any = None, draws: str = "antithetic") -> Columns:
    """A bank of chains of these lengths."""
    chain = torch.arange(len(chains)).repeat_interleave(torch.tensor(chains))
    weight = torch.zeros(len(chain)) if log_weight is None else torch.as_tensor(log_weight, dtype=torch.float64)
    return Columns(chain, weight, {"method": {"name": "guide", "options": {"draws": draws}}})


BANK = columns([5, 3, 4, 1], torch.linspace(-2, 1, 13))
OPTIONS: dict[str, dict[str, Any]] = {strategy: {} for strategy in STRATEGIES} | {"fixed": {"index": 7}}

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


@each_strategy
def test_every_strategy_is_a_function_of_seed_and_position(strategy: Any) -> None:
    whole = SampleIndexSampler(BANK, strategy=strategy, seed=3, **OPTIONS[strategy]).at(range(60)).tolist()
    assert set(whole) <= set(range(13))
    for position in (59, 0, 26, 13, 25, 40, 12):
        other = SampleIndexSampler(BANK, strategy=strategy, seed=3, **OPTIONS[strategy])
        assert int(other.at(position)) == whole[position]
    if strategy not in ("sequential", "fixed"):
        assert whole[:13] != whole[13:26]
        assert SampleIndexSampler(BANK, strategy=strategy, seed=4).at(range(60)).tolist() != whole


@each_strategy
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_meet_disjoint_positions_or_share_them(strategy: Any, world_size: int) -> None:
    options = {"strategy": strategy, "seed": 3, "world_size": world_size, **OPTIONS[strategy]}
    whole = SampleIndexSampler(BANK, **{**options, "world_size": 1}).at(range(20 * world_size))
    ranks = [SampleIndexSampler(BANK, rank=rank, **options) for rank in range(world_size)]
    assert torch.equal(torch.stack([one.at(range(20)) for one in ranks], dim=1).view(-1), whole)
    assert torch.equal(ranks[1].at([3, 8]), whole[[3 * world_size + 1, 8 * world_size + 1]])
    for rank in range(world_size):
        shared = SampleIndexSampler(BANK, rank=rank, shared=True, **options)
        assert torch.equal(shared.at(range(20)), whole[:20])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 2**40), st.data())
def test_stratified_gives_each_chain_its_share_in_every_window(chains: list[int], seed: int, data: Any) -> None:
    """Of p neighbours p n_c / S are of chain c, to within the bound that one jitter a sample allows.

    The first p places hold the samples of a key below some t: n_c t + e_c of chain c, e_c in (-1, 1], so
    p = S t + sum e, and the count is off by at most (1 - s) + s (C - 1), with s = n_c / S; twice for a window.
    """
    bank = columns(chains)
    size = len(bank)
    indices = SampleIndexSampler(bank, strategy="stratified", seed=seed).at(range(3 * size))
    assert all(sorted(one.tolist()) == list(range(size)) for one in indices.split(size))
    first = data.draw(st.integers(0, 3 * size - 1))
    stop = data.draw(st.integers(first + 1, 3 * size))
    counts = torch.bincount(bank.chain[indices[first:stop]], minlength=len(chains))
    share = torch.tensor(chains) / size
    allowed = 2 * ((1 - share) + share * (len(chains) - 1)) if len(chains) > 1 else torch.zeros(1)
    assert ((counts - (stop - first) * share).abs() <= allowed + 1e-4).all()


def test_stratified_takes_chains_of_one_length_in_turn() -> None:
    """Four chains, in whatever order they stand: any four places from a multiple of four hold one of each."""
    bank = replace(columns([25] * 4), chain=torch.arange(100) % 4)
    indices = SampleIndexSampler(bank, strategy="stratified", seed=1).at(range(300))
    turns = bank.chain[indices].view(-1, 4)  # [75, 4]
    assert (turns.sort(dim=1).values == torch.arange(4)).all()
    assert len(set(map(tuple, turns.tolist()))) > 10  # not always the same turn
    assert len({tuple(one.tolist()) for one in indices.split(100)}) == 3


def test_stratified_draws_each_chain_in_an_order_of_its_own() -> None:
    """A sample of a chain comes first in a pass as often as any other, within 5 standard deviations."""
    bank = columns([6, 3])
    indices = SampleIndexSampler(bank, strategy="stratified", seed=2).at(range(9 * 3_000)).view(-1, 9)
    long = indices[indices < 6].view(-1, 6)
    counts = torch.bincount(long[:, 0], minlength=6).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < 5 + 5 * np.sqrt(10)


@given(st.lists(st.one_of(st.floats(-8, 8), st.just(-math.inf)), min_size=1, max_size=30), st.integers(0, 2**40))
def test_weighted_counts_are_exact_to_rounding(log_weight: list[float], seed: int) -> None:
    """In every pass sample i comes floor(S w_i) or ceil(S w_i) times: systematic resampling."""
    assume(max(log_weight) > -math.inf)
    bank = columns([len(log_weight)], log_weight)
    expected = len(log_weight) * bank.log_weight.softmax(dim=0)
    sampler = SampleIndexSampler(bank, strategy="weighted", seed=seed)
    for indices in sampler.at(range(3 * len(log_weight))).split(len(log_weight)):
        counts = torch.bincount(indices, minlength=len(log_weight))
        assert (counts >= (expected - 1e-9).floor()).all()
        assert (counts <= (expected + 1e-9).ceil()).all()
        assert (counts[torch.tensor(log_weight) == -math.inf] == 0).all()


def test_weighted_counts_are_right_on_average_and_shuffled() -> None:
    """Counts of 4,000 passes, and which sample comes first in one, within 5 standard errors."""
    weights = torch.tensor([0.5, 2.2, 0.05, 1.25], dtype=torch.float64)  # expected counts, summing to S = 4
    sampler = SampleIndexSampler(columns([4], weights.log()), strategy="weighted", seed=3)
    passes = sampler.at(range(4 * 4_000)).view(-1, 4)
    means = torch.stack([(passes == index).sum(dim=1) for index in range(4)]).double().mean(dim=1)
    rest = weights - weights.floor()
    assert ((means - weights).abs() < 5 * (rest * (1 - rest) / 4_000).sqrt()).all()
    first = torch.bincount(passes[:, 0], minlength=4) / 4_000
    share = weights / 4
    assert ((first - share).abs() < 5 * (share * (1 - share) / 4_000).sqrt()).all()


def test_weighted_by_weights_all_alike_is_a_shuffle() -> None:
    sampler = SampleIndexSampler(columns([9], torch.full((9,), -700.0)), strategy="weighted", seed=1)
    assert all(sorted(one.tolist()) == list(range(9)) for one in sampler.at(range(45)).split(9))


@given(st.integers(1, 31), st.integers(0, 2**40))
def test_antithetic_keeps_pairs_together(size: int, seed: int) -> None:
    sampler = SampleIndexSampler(columns([size]), strategy="antithetic", seed=seed)
    for indices in sampler.at(range(2 * size)).split(size):
        assert sorted(indices.tolist()) == list(range(size))
        pairs = indices[: size // 2 * 2].view(-1, 2)
        assert (pairs[:, 0] % 2 == 0).all()
        assert (pairs[:, 1] == pairs[:, 0] + 1).all()
        if size % 2:
            assert int(indices[-1]) == size - 1  # without a partner


def test_antithetic_shuffles_the_pairs() -> None:
    first = SampleIndexSampler(columns([8]), strategy="antithetic", seed=5).at(np.arange(4_000) * 8)
    counts = torch.bincount(first, minlength=8)[::2].double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 3 + 5 * np.sqrt(6)


def test_fixed_is_one_index_always() -> None:
    sampler = SampleIndexSampler(6, strategy="fixed", index=4, rank=1, world_size=3)
    assert sampler.at([[0, 5], [11, 2]]).tolist() == [[4, 4], [4, 4]]
    assert list(sampler) == [4] * 6
    assert int(SampleIndexSampler(6, strategy="fixed", index=0).at(9)) == 0


def test_strategies_that_the_bank_does_not_allow_are_refused() -> None:
    for strategy in ("stratified", "weighted", "antithetic"):
        with pytest.raises(ConfigError, match="want a bank"):
            SampleIndexSampler(8, strategy=strategy)  # type: ignore[arg-type]
    for bank in (
        columns([8], draws="random"),
        replace(columns([8]), info={}),
        replace(columns([8]), info={"method": None}),
    ):
        with pytest.raises(ConfigError, match="antithetic"):
            SampleIndexSampler(bank, strategy="antithetic")
    for options in ({"strategy": "fixed"}, {"index": 2}, {"strategy": "weighted", "index": 2}):
        with pytest.raises(ConfigError, match="index"):
            SampleIndexSampler(BANK, **options)  # type: ignore[arg-type]
    for index in (-1, 13):
        with pytest.raises(ConfigError, match="below 13"):
            SampleIndexSampler(BANK, strategy="fixed", index=index)
    for rank, world_size in [(-1, 2), (2, 2), (0, 0)]:
        with pytest.raises(ConfigError, match="rank"):
            SampleIndexSampler(BANK, rank=rank, world_size=world_size)


@each_strategy
def test_states_of_every_strategy_resume_and_of_others_are_refused(strategy: Any) -> None:
    options = {"strategy": strategy, "seed": 3, "world_size": 2, **OPTIONS[strategy]}
    sampler = SampleIndexSampler(BANK, rank=1, **options)
    running = iter(sampler)
    head = [next(running) for _ in range(9)]
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = SampleIndexSampler(BANK, rank=1, **options)
    resumed.load_state_dict(state)
    assert head + list(resumed) == sampler.at(range(13)).tolist()
    assert len(json.dumps(state)) < 300
    SampleIndexSampler(BANK, rank=0, **options).load_state_dict(state)  # ranks are at the same place
    for key, other in [("world_size", {"world_size": 3}), ("shared", {"shared": True}), ("seed", {"seed": 4})]:
        with pytest.raises(BankMismatch, match=key):
            SampleIndexSampler(BANK, **{**options, **other}).load_state_dict(state)
    with pytest.raises(BankMismatch, match="digest"):
        SampleIndexSampler(replace(BANK, digest="another"), **options).load_state_dict(state)
    if strategy == "fixed":
        with pytest.raises(BankMismatch, match="index"):
            SampleIndexSampler(BANK, **{**options, "index": 6}).load_state_dict(state)


def test_columns_of_a_bank_in_memory_serve() -> None:
    module = nn.Linear(2, 1)
    bank = Bank.from_state_dicts([nn.Linear(2, 1).state_dict() for _ in range(5)], module=module)
    for strategy in ("stratified", "weighted"):
        indices = SampleIndexSampler(bank, strategy=strategy).at(range(5)).tolist()  # type: ignore[arg-type]
        assert sorted(indices) == list(range(5))
    with pytest.raises(ConfigError, match="antithetic"):
        SampleIndexSampler(bank, strategy="antithetic")


# Few shards at once


@dataclass(frozen=True)
class Sharded:
    """A bank as a window sees it: the samples of each of its shards."""

    shard_rows: tuple[int, ...]
    digest: str = "sharded"

    def __len__(self) -> int:
        return sum(self.shard_rows)

    @property
    def shard(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.shard_rows)), self.shard_rows)


def test_golden_values_of_a_window() -> None:
    sampler = SampleIndexSampler(Sharded((3, 1, 4, 2)), window=2, seed=0)  # type: ignore[arg-type]
    assert sampler.at(range(20)).tolist() == [9, 5, 8, 2, 1, 4, 0, 3, 6, 7, 8, 9, 7, 5, 6, 4, 2, 3, 0, 1]
    found = exponentials(np.uint64(12345), 4).tolist()
    assert found == [1.1204167284509614, 1.5702458403371176, 0.19748746961140318, 0.3053545589486307]


shards = st.lists(st.integers(1, 9), min_size=1, max_size=9)


@given(shards, st.integers(1, 11), st.integers(0, 2**40))
def test_a_window_takes_each_sample_once_from_few_shards(rows: list[int], window: int, seed: int) -> None:
    """A shard is open from its first sample to its last: never more than the window, and as many as there are."""
    bank = Sharded(tuple(rows))
    sampler = SampleIndexSampler(bank, window=window, seed=seed)  # type: ignore[arg-type]
    for indices in sampler.at(range(2 * len(bank))).split(len(bank)):
        assert sorted(indices.tolist()) == list(range(len(bank)))
        shard = bank.shard[indices.numpy()]
        left, opened = dict(enumerate(rows)), set[int]()
        for one in shard.tolist():
            opened.add(one)
            assert len(opened) <= window
            left[one] -= 1
            if not left[one]:
                opened.remove(one)


def test_a_window_over_all_shards_is_a_shuffle() -> None:
    """Each sample is at each place equally often, and before each other half the time, within 5 standard errors."""
    bank, passes = Sharded((1, 4, 2)), 8_000
    order = SampleIndexSampler(bank, window=3, seed=2).at(range(7 * passes)).view(passes, 7)  # type: ignore[arg-type]
    place = order.argsort(dim=1)  # [passes, S]
    for sample in range(7):
        counts = torch.bincount(place[:, sample], minlength=7).double()
        assert float(((counts - passes / 7) ** 2 / (passes / 7)).sum()) < 6 + 5 * np.sqrt(12)
        for other in range(sample):
            before = float((place[:, sample] < place[:, other]).double().mean())
            assert abs(before - 0.5) < 5 * 0.5 / np.sqrt(passes)


def test_a_window_draws_from_what_is_open_uniformly() -> None:
    """The second sample of a pass, given the first and the shards that are open, against the slow obvious process.

    Shards of 2, 2 and 1 rows, two open: how often each order of shards comes, by counting all that can happen.
    """
    bank, passes = Sharded((2, 2, 1)), 10_000

    def chances(
        left: tuple[int, ...], opened: tuple[int, ...], waiting: tuple[int, ...], path: tuple[int, ...], p: float
    ) -> None:
        if not sum(left):
            expected[path] = expected.get(path, 0.0) + p
            return
        pool = sum(left[shard] for shard in opened)
        for shard in opened:
            after = tuple(n - (s == shard) for s, n in enumerate(left))
            rest, more = opened, waiting
            if not after[shard]:
                rest = tuple(s for s in opened if s != shard) + waiting[:1]
                more = waiting[1:]
            chances(after, rest, more, (*path, shard), p * left[shard] / pool)

    expected: dict[tuple[int, ...], float] = {}
    for shuffled in itertools.permutations(range(3)):
        chances(bank.shard_rows, shuffled[:2], shuffled[2:], (), 1 / 6)
    order = SampleIndexSampler(bank, window=2, seed=5).at(range(5 * passes)).view(passes, 5)  # type: ignore[arg-type]
    paths = bank.shard[order.numpy()]
    found: dict[tuple[int, ...], int] = {}
    for path in map(tuple, paths.tolist()):
        found[path] = found.get(path, 0) + 1
    assert found.keys() == expected.keys()
    assert abs(sum(expected.values()) - 1) < 1e-12
    chi_square = sum((found[path] - passes * p) ** 2 / (passes * p) for path, p in expected.items())
    assert chi_square < len(expected) - 1 + 5 * np.sqrt(2 * (len(expected) - 1))


def test_waiting_times_are_exponential() -> None:
    """Mean, variance and share above 2 of 200,000, within 5 standard errors; of 1, 1 and exp(-2)."""
    size = 200_000
    found = exponentials(np.uint64(7), size)
    assert abs(found.mean() - 1) < 5 / np.sqrt(size)
    assert abs(found.var() - 1) < 5 * np.sqrt(8 / size)  # the fourth central moment is 9
    share = np.exp(-2.0)
    assert abs((found > 2).mean() - share) < 5 * np.sqrt(share * (1 - share) / size)
    assert (np.sort(found)[1:] > np.sort(found)[:-1]).all()


def test_a_window_is_part_of_the_state_and_resumes() -> None:
    bank = Sharded((3, 5, 2, 4))
    whole = SampleIndexSampler(bank, window=2, seed=1)  # type: ignore[arg-type]
    first = iter(whole)
    seen = [next(first) for _ in range(6)]
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["window"] == 2
    resumed = SampleIndexSampler(bank, window=2, seed=1)  # type: ignore[arg-type]
    resumed.load_state_dict(state)
    assert seen + list(resumed) == whole.at(range(14)).tolist()
    with pytest.raises(BankMismatch, match="window"):
        SampleIndexSampler(bank, window=3, seed=1).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(BankMismatch, match="window"):
        SampleIndexSampler(bank, seed=1).load_state_dict(state)  # type: ignore[arg-type]
    old = {key: value for key, value in SampleIndexSampler(bank, seed=1).state_dict().items() if key != "window"}  # type: ignore[arg-type]
    SampleIndexSampler(bank, seed=1).load_state_dict(old)  # type: ignore[arg-type]
    ranks = [SampleIndexSampler(bank, window=2, seed=1, rank=rank, world_size=3) for rank in range(3)]  # type: ignore[arg-type]
    assert torch.equal(torch.stack([one.at(range(9)) for one in ranks], dim=1).view(-1), whole.at(range(27)))


def test_windows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 shard"):
        SampleIndexSampler(Sharded((3,)), window=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="want a bank, whose shards it opens, got a length"):
        SampleIndexSampler(9, window=2)
    with pytest.raises(ConfigError, match="got one that has none"):
        SampleIndexSampler(columns([3, 4]), window=2)
    with pytest.raises(ConfigError, match="strategy 'shuffle' with it"):
        SampleIndexSampler(Sharded((3,)), strategy="random", window=1)  # type: ignore[arg-type]


def test_antithetic_pairs_of_rows_that_were_spread_are_refused() -> None:
    with pytest.raises(ConfigError, match="spread over its shards"):
        SampleIndexSampler(replace(BANK, info={**BANK.info, "row_order": "striped"}), strategy="antithetic")
