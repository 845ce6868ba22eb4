"""Bank indices: a pure function of seed and position, each sample once a pass, golden across versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError
from bnn.samplers import SampleIndexSampler
from bnn.samplers.index import hash64


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
