"""Streamed sums against the full [S, N, C] reference: any split and order of samples, merges, and extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnn
from bnn.errors import DataError
from bnn.evaluation import class_sums
from bnn.evaluation.class_sums import ClassRows, ClassSums
from bnn.evaluation.target_sums import TargetRows, TargetSums
from bnn.evaluation.views import Views, views_of
from bnn.layout import layout_of
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture
from bnn.seeding import generator
from bnn.types import make_block

ROWS, CLASSES = 11, 3  # B and C; S is 1, 2, 7 or 70
streamed = pytest.mark.parametrize("num_samples", [1, 2, 7, 70])
weights = pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
profile = settings(max_examples=25, deadline=None, derandomize=True)


def views(num_samples: int, log_weight: Tensor | None = None) -> Views:
    params = {"weight": torch.zeros(num_samples, 1, 1), "bias": torch.zeros(num_samples, 1)}
    index = torch.arange(num_samples)
    block = make_block(params, chain=index % 2, draw=index // 2, log_weight=log_weight)
    return views_of(bnn.Bank.from_blocks([block], layout=layout_of(nn.Linear(1, 1)), info={}))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64)


def random_weights(num_samples: int, weighted: bool) -> Tensor | None:
    return 2 * random(num_samples, seed=8) + 5.0 if weighted else None


def members(plan: Views) -> np.ndarray:
    """Which samples stand in which view, as weights that sum to 1, [V, S]."""
    weight = plan.log_weight.exp().numpy()
    masks = [np.ones(len(weight), dtype=bool)]
    masks += [half[plan.group.numpy()] > 0 for half in plan.halves.numpy()]
    masks += [plan.level.numpy() <= place for place in range(len(plan.sizes) - 1)]
    held = np.stack(masks) * weight
    return held / held.sum(axis=1, keepdims=True)


def of_classes(plan: Views, logits: Tensor, y: Tensor, split: list[int], order: Tensor) -> ClassRows:
    sums = ClassSums(plan, y)
    for some in order.split(split):
        sums.add(some, logits[some])
    return sums.rows()


def check_classes(found: ClassRows, plan: Views, logits: Tensor, y: Tensor, atol: float = 1e-12) -> None:
    """Compare with sums over the full [S, N, C], view by view."""
    share, rows = members(plan), np.arange(len(y))
    each = scipy.special.log_softmax(logits.numpy(), axis=-1)
    votes = np.eye(logits.shape[2])[each.argmax(axis=2)]
    with np.errstate(divide="ignore", invalid="ignore"):
        for view, held in enumerate(share):
            log_mean = scipy.special.logsumexp(each, axis=0, b=held[:, None, None])  # [N, C]
            entropy = scipy.special.entr(np.exp(log_mean)).sum(axis=-1)
            expected = held @ scipy.special.entr(np.exp(each)).sum(axis=-1)
            pairs = {
                "probs": (found.probs[:, view].T, np.exp(log_mean)),
                "log_prob": (found.log_prob[view], log_mean[rows, y]),  # type: ignore[index]
                "entropy": (found.entropy[view], entropy),
                "expected_entropy": (found.expected_entropy[view], expected),
                "mutual_information": (found.mutual_information[view], np.maximum(entropy - expected, 0)),
                "gibbs": (
                    found.expected_log_prob[view],
                    np.where(held[:, None] > 0, held[:, None] * each[:, rows, y], 0).sum(axis=0),
                ),  # type: ignore[index]
                "votes": (found.votes[:, view].T, np.einsum("s,snc->nc", held, votes)),  # type: ignore[index]
            }
            for name, (actual, wanted) in pairs.items():
                np.testing.assert_allclose(
                    actual.numpy(), wanted, rtol=1e-11, atol=atol, err_msg=f"{name}, view {view}"
                )


@streamed
@weights
def test_classes_equal_the_full_reference_in_every_view(num_samples: int, weighted: bool) -> None:
    logits, y = 3 * random(num_samples, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan = views(num_samples, random_weights(num_samples, weighted))
    found = of_classes(plan, logits, y, [num_samples], torch.arange(num_samples))
    check_classes(found, plan, logits, y)


@profile
@given(
    num_samples=st.sampled_from([2, 7, 30]), seed=st.integers(0, 2**31), weighted=st.booleans(), values=st.sampled_from([1, 100, 2**15])
)  # fmt: skip
def test_any_split_and_order_of_samples_gives_the_same(
    num_samples: int, seed: int, weighted: bool, values: int
) -> None:
    logits, y = 3 * random(num_samples, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan = views(num_samples, random_weights(num_samples, weighted))
    source = generator(seed)
    order = torch.randperm(num_samples, generator=source)
    cut = int(torch.randint(1, num_samples, (1,), generator=source))
    before = class_sums.VALUES
    class_sums.VALUES = values  # samples at once
    try:
        found = of_classes(plan, logits, y, [cut, num_samples - cut], order)
    finally:
        class_sums.VALUES = before
    check_classes(found, plan, logits, y)


@pytest.mark.parametrize("scale", [1e4, 400.0, 30.0])
@weights
def test_logits_of_any_size_keep_their_log_probabilities(scale: float, weighted: bool) -> None:
    """e^-20000 is no number, its logarithm is; also where a run of draws holds all that a plain sum can see."""
    logits, y = scale * random(7, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan = views(7, random_weights(7, weighted))
    found = of_classes(plan, logits, y, [3, 4], torch.arange(7))
    assert found.log_prob is not None
    assert bool(found.log_prob.isfinite().all())
    check_classes(found, plan, logits, y)


def test_a_constant_added_to_the_logits_of_a_sample_changes_nothing() -> None:
    logits, y = 3 * random(7, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan, order = views(7), torch.arange(7)
    plain = of_classes(plan, logits, y, [7], order)
    moved = of_classes(plan, logits + 100 * random(7, ROWS, 1, seed=3), y, [7], order)
    for one, other in zip(plain, moved, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-11)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_outputs_are_widened_once(dtype: torch.dtype) -> None:
    logits, y = (3 * random(7, ROWS, CLASSES)).to(dtype), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan, order = views(7), torch.arange(7)
    narrow, wide = (of_classes(plan, some, y, [7], order) for some in (logits, logits.double()))
    assert all(torch.equal(one, other) for one, other in zip(narrow, wide, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_samples", [1, 2, 7, 70])
def test_samples_that_agree_share_no_information(num_samples: int) -> None:
    """Exactly none, in every view and for any probabilities."""
    logits = 3 * random(1, ROWS, CLASSES).expand(num_samples, -1, -1)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(1))
    for some in (logits, 1e4 * logits, torch.zeros_like(logits)):
        found = of_classes(views(num_samples), some, y, [num_samples], torch.arange(num_samples))
        assert bool((found.mutual_information == 0).all())
    hard = 1e4 * torch.nn.functional.one_hot(y, CLASSES).double().expand(num_samples, -1, -1)
    found = of_classes(views(num_samples), hard, y, [num_samples], torch.arange(num_samples))
    assert bool((found.entropy == 0).all())
    assert bool((found.log_prob == 0).all())  # type: ignore[union-attr]


def test_a_tie_of_classes_is_one_vote_for_the_first() -> None:
    logits = torch.zeros(4, ROWS, CLASSES)
    logits[:2, :, 2] = 1.0
    found = of_classes(views(4), logits, torch.zeros(ROWS, dtype=torch.int64), [4], torch.arange(4))
    assert found.votes is not None
    assert found.votes[:, 0].T.tolist() == [[0.5, 0.0, 0.5]] * ROWS


def test_a_class_without_a_chance_is_told_in_logarithms() -> None:
    logits = random(5, ROWS, CLASSES)
    logits[:, :, 1] = -math.inf
    y = torch.arange(ROWS) % CLASSES
    plan = views(5)
    check_classes(of_classes(plan, logits, y, [5], torch.arange(5)), plan, logits, y)


def test_nan_and_inf_name_their_sample() -> None:
    y = torch.zeros(ROWS, dtype=torch.int64)
    for bad in (math.nan, math.inf):
        logits = random(7, ROWS, CLASSES)
        logits[4, 3, 1] = bad
        with pytest.raises(DataError, match=r"^sample 4: want finite outputs"):
            of_classes(views(7), logits, y, [2, 5], torch.arange(7))


@weights
def test_two_parts_merge_to_the_whole(weighted: bool) -> None:
    for scale in (3.0, 1e4):
        logits, y = scale * random(7, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
        plan = views(7, random_weights(7, weighted))
        parts = [ClassSums(plan, y) for _ in range(3)]  # the last one sees no sample
        order = torch.tensor([6, 0, 3, 5, 1, 2, 4])
        for part, some in zip(parts, order.split([3, 4]), strict=False):
            part.add(some, logits[some])
        whole = ClassSums(plan, y)
        for part in parts:
            whole.merge(part)
        check_classes(whole.rows(), plan, logits, y)


def test_batches_of_rows_are_parts_of_the_whole() -> None:
    logits, y = 3 * random(7, ROWS, CLASSES), torch.randint(CLASSES, (ROWS,), generator=generator(1))
    plan, order = views(7), torch.arange(7)
    whole = of_classes(plan, logits, y, [7], order)
    for rows in torch.arange(ROWS).split(4):
        part = of_classes(plan, logits[:, rows], y[rows], [7], order)
        np.testing.assert_allclose(part.probs.numpy(), whole.probs[..., rows].numpy(), atol=1e-15)
    sums = ClassSums(plan, y)
    sums.add(order, logits)
    parts = list(sums.parts(4 * CLASSES * plan.num_views))
    assert [len(range(ROWS)[part]) for part in parts] == [4, 4, 3]
    assert torch.equal(torch.cat([sums.rows(part).probs for part in parts], dim=2), whole.probs)


# Regression

KINDS = ("normal", "student", "poisson")


def mixture(kind: str, indices: Tensor, num_samples: int, outputs: int = 2) -> Mixture:
    """Samples `indices` of one fixed bank."""
    places = random(num_samples, ROWS, outputs)[indices]
    scales = (0.3 + random(num_samples, 1, 1, seed=1).abs())[indices]
    log_weight = torch.full((len(indices),), -math.log(len(indices)), dtype=torch.float64)
    if kind == "poisson":
        return PoissonMixture(places, log_weight)
    if kind == "student":
        return StudentTMixture(places, scales, log_weight, 4.0)
    return NormalMixture(places, scales, log_weight)


def targets(kind: str) -> Tensor:
    y = random(ROWS, 2, seed=5)
    return (2 * y.abs()).round() if kind == "poisson" else y


def check_targets(found: TargetRows, plan: Views, kind: str, num_samples: int) -> None:
    part, y = mixture(kind, torch.arange(num_samples), num_samples), targets(kind).numpy()
    if isinstance(part, PoissonMixture):
        of_sample = scipy.stats.poisson(part.log_rates.exp().numpy())
    elif isinstance(part, StudentTMixture):
        of_sample = scipy.stats.t(4.0, part.locs.numpy(), part.scales.numpy())
    else:
        of_sample = scipy.stats.norm(part.means.numpy(), part.scales.numpy())
    means, variances = np.broadcast_arrays(*of_sample.stats("mv"))
    log_prob = (of_sample.logpmf if kind == "poisson" else of_sample.logpdf)(y).sum(axis=2)
    for view, held in enumerate(members(plan)):
        mean = np.einsum("s,snc->nc", held, means)
        below = of_sample.cdf(y - 1) if kind == "poisson" else of_sample.cdf(y)
        pairs = {
            "mean": (found.mean, mean),
            "aleatoric": (found.aleatoric, np.einsum("s,snc->nc", held, variances)),
            "epistemic": (found.epistemic, np.einsum("s,snc->nc", held, (means - mean) ** 2)),
            "log_prob": (found.log_prob, scipy.special.logsumexp(log_prob, axis=0, b=held[:, None])),
            "gibbs": (found.expected_log_prob, held @ log_prob),
            "pit": (found.pit, np.einsum("s,snc->nc", held, of_sample.cdf(y))),
            "pit_below": (found.pit_below, np.einsum("s,snc->nc", held, below)),
        }
        for name, (actual, wanted) in pairs.items():
            np.testing.assert_allclose(
                actual[view].numpy(), wanted, rtol=1e-10, atol=1e-11, err_msg=f"{name}, view {view}"
            )


@streamed
@weights
@pytest.mark.parametrize("kind", KINDS)
def test_targets_equal_the_full_reference_in_every_view(kind: str, num_samples: int, weighted: bool) -> None:
    plan = views(num_samples, random_weights(num_samples, weighted))
    sums = TargetSums(plan, targets(kind))
    order = torch.randperm(num_samples, generator=generator(2))
    for some in order.split(3):
        sums.add(some, mixture(kind, some, num_samples))
    check_targets(sums.rows(), plan, kind, num_samples)


@weights
@pytest.mark.parametrize("kind", KINDS)
def test_two_parts_of_a_regression_merge_to_the_whole(kind: str, weighted: bool) -> None:
    plan = views(7, random_weights(7, weighted))
    parts = [TargetSums(plan, targets(kind)) for _ in range(3)]
    for part, some in zip(parts, torch.tensor([6, 0, 3, 5, 1, 2, 4]).split([3, 4]), strict=False):
        part.add(some, mixture(kind, some, 7))
    whole = TargetSums(plan, targets(kind))
    for part in parts:
        whole.merge(part)
    check_targets(whole.rows(), plan, kind, 7)


def test_far_from_zero_variances_keep_their_digits() -> None:
    """Means of 1e8 that spread by 1e-3."""
    plan, y = views(7), torch.full((ROWS, 1), 1e8, dtype=torch.float64)
    centres = 1e8 + 1e-3 * random(7, ROWS, 1)
    sums = TargetSums(plan, y)
    log_weight = torch.zeros(7, dtype=torch.float64)
    sums.add(torch.arange(7), NormalMixture(centres, torch.ones(7, 1, 1, dtype=torch.float64), log_weight))
    expected = centres.numpy().var(axis=0)
    np.testing.assert_allclose(sums.rows().epistemic[0].numpy(), expected, rtol=1e-6)


def test_identical_samples_leave_nothing_epistemic() -> None:
    plan = views(7)
    sums = TargetSums(plan, targets("normal"))
    one = mixture("normal", torch.tensor([3]).expand(7), 7)
    sums.add(torch.arange(7), one)
    assert bool((sums.rows().epistemic == 0).all())
