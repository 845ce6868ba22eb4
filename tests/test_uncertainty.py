"""Uncertainty: entropies and variances against SciPy and torch.distributions, their bounds and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnn.errors import DataError
from bnn.seeding import generator
from bnn.uncertainty import disagreement, entropy, expected_entropy, mutual_information, variance, variation_ratio

SIZES = [(1, 5, 3), (2, 6, 4), (3, 4, 2), (7, 5, 6), (9, 2, 3)]  # K, B, C: no two alike
cases = given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31), spread=st.sampled_from([0.1, 1.0, 8.0]))
profile = settings(max_examples=30, deadline=None, derandomize=True)


def random_probs(size: tuple[int, ...], seed: int, spread: float = 2.0) -> Tensor:
    logits = spread * torch.randn(size, generator=generator(seed), dtype=torch.float64)
    return logits.softmax(dim=-1)


def close(actual: Tensor, expected: Tensor | np.ndarray, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=0, atol=atol)


def test_entropy_is_scipys_in_nats() -> None:
    probs = random_probs((4, 6, 3), 0)
    close(entropy(probs), scipy.stats.entropy(probs.numpy(), axis=-1))


def test_entropy_of_certain_and_of_uniform_rows() -> None:
    close(entropy(torch.eye(5, dtype=torch.float64)), np.zeros(5), atol=0)  # 0 log 0 = 0, no NaN
    close(entropy(torch.full((2, 5), 0.2, dtype=torch.float64)), np.full(2, math.log(5)))


def test_expected_entropy_averages_over_samples_not_rows_or_classes() -> None:
    probs = random_probs((4, 6, 3), 1)
    found = expected_entropy(probs)
    assert found.shape == (6,)
    close(found, scipy.stats.entropy(probs.numpy(), axis=-1).mean(axis=0))


def test_mutual_information_is_the_mean_divergence_from_the_mean_predictive() -> None:
    """I = mean_k KL(p_k || mean p): the other way to write the difference of entropies."""
    probs = random_probs((4, 6, 3), 2).numpy()
    divergence = scipy.special.rel_entr(probs, probs.mean(axis=0)).sum(axis=-1).mean(axis=0)
    close(mutual_information(torch.from_numpy(probs)), divergence)


@pytest.mark.parametrize(("num_samples", "num_classes"), [(3, 5), (6, 2)])
def test_mutual_information_reaches_its_bound_where_sure_samples_disagree(num_samples: int, num_classes: int) -> None:
    votes = torch.arange(num_samples) % num_classes
    probs = torch.eye(num_classes, dtype=torch.float64)[votes].unsqueeze(1).expand(-1, 4, -1)  # [K, B, C]
    close(mutual_information(probs), np.full(4, math.log(min(num_samples, num_classes))))


@profile
@cases
def test_mutual_information_lies_between_zero_and_its_bound(size: tuple[int, ...], seed: int, spread: float) -> None:
    probs = random_probs(size, seed, spread)
    found = mutual_information(probs)
    assert found.shape == size[1:2]
    assert bool((found >= 0).all())
    assert bool((found <= min(math.log(size[0]), math.log(size[2])) + 1e-12).all())
    assert bool((entropy(probs.mean(dim=0)) >= expected_entropy(probs) - 1e-12).all())
    close(found + expected_entropy(probs), entropy(probs.mean(dim=0)))  # total = aleatoric + epistemic


@pytest.mark.parametrize("num_samples", [1, 2])
def test_mutual_information_of_identical_samples_is_exactly_zero(num_samples: int) -> None:
    probs = random_probs((1, 500, 3), 3).expand(num_samples, -1, -1)
    assert torch.equal(mutual_information(probs), torch.zeros(500, dtype=torch.float64))


def test_mutual_information_of_identical_samples_is_never_negative() -> None:
    """The mean of seven equal numbers rounds, up or down: each row is clamped on its own."""
    probs = random_probs((1, 500, 3), 4).expand(7, -1, -1)
    raw = entropy(probs.mean(dim=0)) - expected_entropy(probs)
    assert raw.min() < 0, "the case no longer rounds below zero and tests nothing"
    found = mutual_information(probs)
    assert found.min() == 0
    assert found.max() < 1e-14


@profile
@cases
def test_order_of_samples_rows_and_classes_does_not_matter(size: tuple[int, ...], seed: int, spread: float) -> None:
    probs = random_probs(size, seed, spread)
    samples, rows, classes = (torch.randperm(n, generator=generator(seed, i)) for i, n in enumerate(size))
    moved = probs[samples][:, rows][:, :, classes]
    for score in (mutual_information, expected_entropy):
        close(score(moved), score(probs)[rows], atol=1e-10)


@profile
@cases
def test_duplicated_samples_change_nothing(size: tuple[int, ...], seed: int, spread: float) -> None:
    probs = random_probs(size, seed, spread)
    twice = torch.cat([probs, probs])
    for score in (mutual_information, expected_entropy):
        close(score(twice), score(probs), atol=1e-12)
    once, doubled = variance(probs, 0.5 + probs), variance(twice, 0.5 + twice)
    for part, expected in zip(doubled, once, strict=True):
        close(part, expected)


def random_mixture(size: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    means = 3 * torch.randn(size, generator=generator(seed, "means"), dtype=torch.float64)
    scales = 0.2 + torch.rand(size[0], 1, 1, generator=generator(seed, "scales"), dtype=torch.float64)
    return means, scales  # [K, B, C], [K, 1, 1]


def test_variance_is_that_of_the_mixture_of_normals() -> None:
    means, scales = random_mixture((4, 6, 3), 5)
    split = variance(means, scales)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(6, 3, 4, dtype=torch.float64)),
        torch.distributions.Normal(means.movedim(0, -1), scales.expand_as(means).movedim(0, -1)),
    )
    close(split.total, mixture.variance)
    close(split.aleatoric, np.full((6, 3), (scales.numpy() ** 2).mean()))
    close(split.epistemic, means.numpy().var(axis=0, ddof=0))


def test_variance_parts_add_up_to_the_last_bit() -> None:
    split = variance(*random_mixture((7, 40, 3), 6))
    assert torch.equal(split.total, split.aleatoric + split.epistemic)


def test_one_sample_has_exactly_no_epistemic_variance() -> None:
    means, scales = random_mixture((1, 6, 3), 7)
    split = variance(means, scales)
    assert torch.equal(split.epistemic, torch.zeros(6, 3, dtype=torch.float64))
    assert torch.equal(split.total, scales[0].square().expand(6, 3))


def test_variance_takes_on_the_squared_units_of_the_target() -> None:
    means, scales = random_mixture((4, 6, 3), 8)
    for part, scaled in zip(variance(means, scales), variance(2.5 * means - 40.0, 2.5 * scales), strict=True):
        close(scaled, 2.5**2 * part, atol=1e-10)


# Votes


def votes_of(size: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """The class that each sample finds most probable [S, B], and how many find each [B, C]."""
    choice = random_probs(size, seed).argmax(dim=-1)
    return choice, torch.nn.functional.one_hot(choice, size[2]).sum(dim=0)


@profile
@given(size=st.sampled_from(SIZES), seed=st.integers(0, 2**31))
def test_votes_against_counting_samples_and_their_pairs(size: tuple[int, int, int], seed: int) -> None:
    choice, votes = votes_of(size, seed)
    winner = scipy.stats.mode(choice.numpy(), axis=0).count
    close(variation_ratio(votes), 1 - winner / size[0])
    apart = choice[:, None] != choice[None]  # [S, S, B]: never where both are one sample
    pairs = max(size[0] * (size[0] - 1), 1)
    close(disagreement(votes), apart.sum(dim=(0, 1)).double() / pairs)
    order = torch.randperm(size[2], generator=generator(seed))
    for score in (variation_ratio, disagreement):
        close(score(votes[:, order]), score(votes), atol=1e-15)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_weighted_votes_are_chances_of_weighted_samples(seed: int) -> None:
    choice, _ = votes_of((7, 5, 3), seed)
    weights = torch.rand(7, generator=generator(seed, "weights"), dtype=torch.float64).softmax(dim=0)
    votes = (weights[:, None, None] * torch.nn.functional.one_hot(choice, 3)).sum(dim=0)
    close(variation_ratio(votes), 1 - votes.max(dim=1).values)
    chance = weights[:, None] * weights[None] * (1 - torch.eye(7, dtype=torch.float64))  # of a pair of two samples
    apart = choice[:, None] != choice[None]
    expected = (chance[:, :, None] * apart).sum(dim=(0, 1)) / chance.sum()
    close(disagreement(votes, squared_weights=weights.square().sum()), expected)
    close(disagreement(9 * votes, squared_weights=81 * float(weights.square().sum())), expected)


def test_equal_weights_are_counts() -> None:
    _, votes = votes_of((7, 5, 3), 3)
    shares = votes.double() / 7
    close(variation_ratio(shares), variation_ratio(votes))
    close(disagreement(shares, squared_weights=1 / 7), disagreement(votes))


def test_votes_of_one_sample_and_of_samples_that_agree() -> None:
    one = torch.tensor([[0, 1, 0], [1, 0, 0]])
    for votes, squared in ((one, None), (one.double(), 1.0), (5 * one, None), (one.double(), 0.2)):
        assert torch.equal(variation_ratio(votes), torch.zeros(2, dtype=torch.float64))
        assert torch.equal(disagreement(votes, squared_weights=squared), torch.zeros(2, dtype=torch.float64))
    spread = torch.tensor([[2, 2, 2]])
    close(variation_ratio(spread), np.array([2 / 3]))
    close(disagreement(spread), np.array([1 - 6 / 30]))
    assert float(disagreement(torch.tensor([1, 1, 1]))) == 1.0


def test_votes_that_are_none_are_refused() -> None:
    for score in (variation_ratio, disagreement):
        with pytest.raises(DataError, match="a row of none"):
            score(torch.tensor([[1, 2], [0, 0]]))
        with pytest.raises(DataError, match="negative ones or NaN"):
            score(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
        with pytest.raises(DataError, match="negative ones or NaN"):
            score(torch.tensor([[1.0, math.nan], [1.0, 1.0]]))
    with pytest.raises(DataError, match="squared_weights="):
        disagreement(torch.tensor([[0.25, 0.75]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_once(dtype: torch.dtype) -> None:
    """Sums of 1,000 terms in half precision would lose most of their digits."""
    probs = random_probs((3, 4, 1000), 9).to(dtype)
    wide = probs.float()
    for score in (entropy, expected_entropy, mutual_information):
        assert torch.equal(score(probs), score(wide))
        assert score(probs).dtype == torch.float32
    means = random_mixture((3, 4, 2), 9)[0].to(dtype)
    for half, full in zip(variance(means, means.abs()), variance(means.float(), means.float().abs()), strict=True):
        assert torch.equal(half, full)


def test_what_is_added_to_all_logits_of_a_sample_changes_nothing() -> None:
    logits = torch.randn(4, 6, 3, generator=generator(10), dtype=torch.float64)
    moved = logits + torch.tensor([-300.0, 0.0, 5.0, 700.0], dtype=torch.float64).view(4, 1, 1)
    for score in (mutual_information, expected_entropy):
        close(score(moved.softmax(dim=-1)), score(logits.softmax(dim=-1)))
        assert bool(torch.isfinite(score((1e4 * moved).softmax(dim=-1))).all())
