"""Honest Bayes: what resampling does to the log joint, the posterior, its record, and to judging it afterwards."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scenarios import LinearRegression, classifier, effective_sample_size, linear_regression
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from bnn import priors
from bnn.bank import Bank
from bnn.batches import full_batch, mean_rows, minibatches, num_batches, sampled
from bnn.errors import BankMismatch, BnnError, ConfigError, DataError
from bnn.evaluation import evaluate
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import HMC, Guide, Prior
from bnn.layout import layout_of
from bnn.likelihoods import Categorical
from bnn.metrics import auroc
from bnn.model import BayesianModel
from bnn.predictive import ClassPredictive, predict
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    DynamicClassSampler,
    EpochSampler,
    Linear,
    ShuffledSampler,
    StratifiedBatchSampler,
    WeightedIndexSampler,
)
from bnn.types import Batch, make_block
from bnn.uncertainty import prior_shift

# The log joint of batches


def imbalanced() -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """The small classifier on 22 rows: 12 of class 0, 6 of class 1 and 4 of class 2."""
    model, (x, y) = classifier(num_rows=60)
    rows = torch.cat([(y == number).nonzero().flatten()[:size] for number, size in ((0, 12), (1, 6), (2, 4))])
    model = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=22)
    return model, (x[rows], y[rows])


LABELS = imbalanced()[1][1]
ROW_WEIGHTS = torch.tensor([1.0, 4.0, 0.5])[LABELS] * (1 + torch.arange(22) % 3)

# Batches of 7 rows, which do not divide the 40 draws of an epoch: the last batch has 5.
DRAWN: dict[str, Callable[[], EpochSampler[Any]]] = {
    "rows": lambda: WeightedIndexSampler(ROW_WEIGHTS, 40, seed=1),
    "classes": lambda: ClassBalancedSampler(LABELS, 1.2, num_samples=40, seed=1),
    "dynamic": lambda: DynamicClassSampler(LABELS, Linear(2.0, 0.5, 80), num_samples=40, seed=1),
}


def log_joints(model: BayesianModel, data: Any, batches: int) -> Tensor:
    """Log joint and its gradient [P] of each batch, weighed by its rows as steps of a fit are: [batches, 1 + P]."""
    flat = model.unconstrain(model.sample_prior(3))
    found = []
    for batch in islice(minibatches(data, 7, seed=0), batches):
        weight = len(batch.y) / mean_rows(data, 7)
        gradient, value = torch.func.grad_and_value(lambda u: model.log_density(u, batch, weight=weight)[0])(flat)  # noqa: B023
        found.append(torch.cat([value.view(1), gradient]).double())
    return torch.stack(found)


def log_joint(model: BayesianModel, batch: Batch) -> Tensor:
    """Log joint and gradient of all rows, [1 + P]."""
    flat = model.unconstrain(model.sample_prior(3))
    gradient, value = torch.func.grad_and_value(lambda u: model.log_density(u, batch)[0])(flat)
    return torch.cat([value.view(1), gradient]).double()


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """How far the mean over independent batches lies from what is expected, in standard errors, [1 + P]."""
    spread = found.std(dim=0) / math.sqrt(len(found))
    moving = spread > 1e-9
    torch.testing.assert_close(found.mean(dim=0)[~moving], expected[~moving])
    return ((found.mean(dim=0) - expected).abs() / spread)[moving]


@pytest.mark.parametrize("name", DRAWN)
def test_importance_weights_keep_the_log_joint_and_its_gradient_on_average(name: str) -> None:
    """Within 4 standard errors; without them far from it, and near that of the reweighted data."""
    model, data = imbalanced()
    full = log_joint(model, Batch(*data))
    batches = 480 // 6 * 6  # whole epochs of 6
    with_weights = log_joints(model, sampled(data, DRAWN[name](), importance=True), batches)
    assert with_weights.shape == (480, 1 + 43)
    assert float(errors(with_weights, full).max()) < 4
    without = log_joints(model, sampled(data, DRAWN[name](), importance=False), batches)
    off = errors(without, full)
    assert float(off[0]) > 8  # the log joint itself
    assert float(off[1:].max()) > 8
    if name != "dynamic":
        reweighted = log_joint(model, full_batch(sampled(data, DRAWN[name](), importance=False)))
        assert float(errors(without, reweighted).max()) < 4


def test_stratified_batches_average_to_the_log_joint_exactly() -> None:
    """Four batches of 6 take 8 rows a class: after three epochs each row of 12, 6 and 4 has come equally often."""
    model, data = imbalanced()

    def sampler() -> StratifiedBatchSampler:
        return StratifiedBatchSampler(LABELS, 6, per_class=[1.0, 1.0, 1.0], num_batches=4, seed=2)

    full = log_joint(model, Batch(*data))
    found = log_joints(model, sampled(data, sampler(), importance=True), 12)
    torch.testing.assert_close(found.mean(dim=0), full, rtol=1e-4, atol=1e-3)
    without = log_joints(model, sampled(data, sampler(), importance=False), 12)
    reweighted = log_joint(model, full_batch(sampled(data, sampler(), importance=False)))
    torch.testing.assert_close(without.mean(dim=0), reweighted, rtol=1e-4, atol=1e-3)
    assert float((reweighted - full).abs().max()) > 1.0


def test_stratified_batches_that_do_not_divide_average_to_the_log_joint() -> None:
    """Batches of 5, 5, 5, 5 and 2 rows, weighed by their rows; the same number of cycles of every class."""
    model, data = imbalanced()

    def sampler() -> StratifiedBatchSampler:
        return StratifiedBatchSampler(LABELS, 5, per_class=[3.0, 4.0, 4.0], seed=2)

    assert sampler().expected_counts().tolist() == [6, 8, 8]
    under = sampled(data, sampler(), importance=True)
    assert num_batches(under, 7) == 5
    found = log_joints(model, under, 5 * 12)
    torch.testing.assert_close(found.mean(dim=0), log_joint(model, Batch(*data)), rtol=1e-4, atol=1e-3)


# Posteriors in closed form


class Regression(NamedTuple):
    """A conjugate regression whose rows count by N pi_i in one posterior, and alike in the other."""

    case: LinearRegression
    weights: Tensor  # of rows [N]
    groups: Tensor  # 0 or 1 a row [N], which have these weights


def regression() -> Regression:
    """The rows of large targets, 8 of 30, come 10 times as often: the posterior is elsewhere, and of another width."""
    case = linear_regression()
    groups = (case.data[1][:, 0] > 1.8).long()
    assert int(groups.sum()) == 8
    return Regression(case, torch.where(groups == 1, 10.0, 1.0), groups)


def posterior(case: LinearRegression, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and precision of theta where row i counts w_i times, with the noise and prior of the scenario.

    precision = X^T W X / noise^2 + I / prior^2, mean = precision^-1 X^T W y / noise^2
    """
    x, y = case.data
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    weighed = design.T * weight.double()
    precision = weighed @ design / 0.5**2 + torch.eye(5, dtype=torch.float64) / 1.5**2
    return torch.linalg.solve(precision, weighed @ y[:, 0].double() / 0.5**2), precision


def chances(weights: Tensor) -> Tensor:
    """N pi_i."""
    return len(weights) * weights.double() / weights.double().sum()


def test_the_closed_form_is_that_of_the_scenario_where_rows_count_alike() -> None:
    case, weights, _ = regression()
    mean, precision = posterior(case, torch.ones(30))
    torch.testing.assert_close(mean, case.mean)
    torch.testing.assert_close(torch.linalg.inv(precision), case.covariance)
    other, _ = posterior(case, chances(weights))
    assert float(((other - mean) / case.covariance.diagonal().sqrt()).abs().max()) > 1.0  # there is something to see


def balanced(kind: str, seed: int = 0) -> EpochSampler[Any]:
    """The weights of the regression as a sampler of rows, of classes or of batches."""
    _, weights, groups = regression()
    if kind == "rows":
        return WeightedIndexSampler(weights, 2400, seed=seed)
    shares = torch.tensor([float(weights[groups == number].sum()) for number in (0, 1)])
    if kind == "classes":
        return ClassBalancedSampler(groups, weights=[1.0, 10.0], num_samples=2400, seed=seed)
    return StratifiedBatchSampler(groups, 180, per_class=shares, num_batches=12, seed=seed)


@pytest.mark.parametrize(
    ("kind", "importance"), [("rows", True), ("rows", False), ("classes", True), ("batches", True)]
)
def test_svi_under_a_sampler_has_the_posterior_that_it_says(kind: str, importance: bool) -> None:
    """Mean-field on batches of many draws: the posterior's mean, and the variances 1 / precision_ii."""
    case, weights, _ = regression()
    bank = fit(
        case.model, case.data, method=Guide("mean-field", num_steps=2000, batch_size=600, lr=0.03), num_samples=4000,
        sampler=balanced(kind), importance_weights=importance, seed=1,
    )  # fmt: skip
    flat = case.model.layout.flatten(bank.block(slice(None)).params).double()
    means = {True: posterior(case, torch.ones(30)), False: posterior(case, chances(weights))}
    mean, precision = means[importance]
    variance = 1 / precision.diagonal()
    # 4 standard errors of 4,000 draws, and as much again for what is left of the noise of batches.
    assert float(((flat.mean(dim=0) - mean) / variance.sqrt()).abs().max()) < 8 / math.sqrt(4000)
    assert float((flat.var(dim=0) / variance - 1).abs().max()) < 8 * math.sqrt(2 / 4000)
    assert float(((flat.mean(dim=0) - means[not importance][0]) / variance.sqrt()).abs().max()) > 0.5
    assert bank.info["sampling"]["posterior"] == ("natural" if importance else "balanced")


@pytest.mark.parametrize("kind", ["rows", "batches"])
def test_hmc_under_a_sampler_without_importance_weights_has_the_weighted_posterior(kind: str) -> None:
    """Of all rows with weights N pi_i: means and variances within 4 standard errors, gated by ESS."""
    case, weights, _ = regression()
    bank = fit(
        case.model, case.data, method=HMC(num_chains=4, num_warmup=120, num_steps=8), num_samples=1000,
        sampler=balanced(kind), importance_weights=False, seed=2,
    )  # fmt: skip
    flat = case.model.layout.flatten(bank.block(slice(None)).params).double()
    mean, precision = posterior(case, chances(weights))
    covariance = torch.linalg.inv(precision)
    for place in range(5):
        for values, expected in (
            (flat[:, place], mean[place]),
            ((flat[:, place] - mean[place]).square(), covariance[place, place]),
        ):
            chains = values.view(-1, 4).T  # [C, D]
            ess = effective_sample_size(chains)
            assert ess > 200, f"not mixed: ESS {ess:.0f}"
            assert abs(float(chains.mean() - expected)) < 4 * float(chains.std()) / math.sqrt(ess)


@pytest.mark.parametrize("kind", ["rows", "classes", "batches"])
@pytest.mark.parametrize("importance", [False, True])
def test_log_joints_of_hmc_are_those_of_the_target_that_it_says(kind: str, importance: bool) -> None:
    case, weights, _ = regression()
    bank = fit(
        case.model, case.data, method=HMC(num_chains=2, num_warmup=5, num_steps=3, init="prior"), num_samples=4,
        sampler=balanced(kind), importance_weights=importance,
    )  # fmt: skip
    weight = None if importance else chances(weights)
    for index in range(4):
        expected = float(case.model.log_joint(bank[index], Batch(*case.data, weight)))
        assert float(bank.log_joint[index]) == pytest.approx(expected, rel=1e-3)  # batches round shares to whole rows
        other = float(case.model.log_joint(bank[index], Batch(*case.data, chances(weights) if importance else None)))
        assert abs(expected - other) > 0.01 * abs(expected)


# What a fit says of it

QUICK = Guide("mean-field", num_steps=3, batch_size=7)


def fitted(sampler: EpochSampler[Any] | None, importance: bool | None, data: Any = None, **options: Any) -> Bank:
    model, rows = imbalanced()
    given = {"method": QUICK, "num_samples": 2, **options}
    return fit(model, rows if data is None else data, sampler=sampler, importance_weights=importance, **given)


def told(run: Callable[[], Bank]) -> tuple[Bank, list[str]]:
    """A bank, and what was said aloud on the way."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        bank = run()
    return bank, [str(one.message) for one in heard]


SAMPLERS: dict[str, Callable[[], EpochSampler[Any]]] = {
    **DRAWN,
    "batches": lambda: StratifiedBatchSampler(LABELS, 7, skew=1.0, seed=1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_fit_under_a_sampler_says_once_what_becomes_of_the_posterior(name: str) -> None:
    bank, heard = told(lambda: fitted(SAMPLERS[name](), None))
    assert len(heard) == 1
    assert "fit: rows are not drawn alike, so that this is a balanced posterior" in heard[0]
    assert "importance_weights=True" in heard[0]
    assert bank.info["sampling"]["posterior"] == "balanced"
    bank, heard = told(lambda: fitted(SAMPLERS[name](), False))
    assert heard == []
    assert bank.info["sampling"]["posterior"] == "balanced"
    bank, heard = told(lambda: fitted(SAMPLERS[name](), True))
    assert heard == []
    assert bank.info["sampling"]["posterior"] == "natural"
    assert bank.info["sampling"]["importance_weights"] is True


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassBalancedSampler(LABELS, 0.0),
        lambda: WeightedIndexSampler([3.0] * 22),
        lambda: StratifiedBatchSampler(LABELS, 11),
    ],
    ids=["skew 0", "equal weights", "natural shares"],
)
def test_a_sampler_that_draws_alike_leaves_the_posterior_natural(make: Callable[[], EpochSampler[Any]]) -> None:
    bank, heard = told(lambda: fitted(make(), None))
    assert heard == []
    assert bank.info["sampling"]["posterior"] == "natural"


def test_the_record_of_the_sampling(tmp_path: Path) -> None:
    bank = fitted(ClassBalancedSampler(LABELS, 1.0, seed=9), False, out=tmp_path / "bank")
    record = Bank.open(tmp_path / "bank").info["sampling"]
    assert record == bank.info["sampling"]
    assert (record["sampler"], record["seed"], record["importance_weights"]) == ("ClassBalancedSampler", 9, False)
    assert record["class_shares"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert record["natural_shares"] == pytest.approx([12 / 22, 6 / 22, 4 / 22])
    changing = fitted(DRAWN["dynamic"](), False).info["sampling"]
    assert "class_shares" not in changing  # they are not the same in any two epochs
    assert fitted(None, None).info["sampling"] == {"sampler": None, "posterior": "natural"}
    assert fitted(DRAWN["rows"](), True).info["sampling"]["sampler"] == "WeightedIndexSampler"


def weighted_loader() -> DataLoader[Any]:
    _, (x, y) = imbalanced()
    sampler = WeightedRandomSampler(ROW_WEIGHTS.tolist(), 22, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, y), batch_size=7, sampler=sampler)


def test_a_loader_of_torch_that_draws_by_weight_is_told_too() -> None:
    bank, heard = told(lambda: fitted(None, None, weighted_loader()))
    assert len(heard) == 1
    assert "balanced posterior" in heard[0]
    assert bank.info["sampling"] == {"sampler": None, "posterior": "balanced"}
    bank, heard = told(lambda: fitted(None, False, weighted_loader()))
    assert heard == []
    assert bank.info["sampling"]["posterior"] == "balanced"


def test_importance_weights_of_a_loader_are_refused() -> None:
    """Whose chances nobody knows: to take the option and do nothing would leave a balanced posterior unsaid."""
    with pytest.raises(
        ConfigError, match="importance_weights: want sampler=, whose chances they make up for, got none"
    ):
        told(lambda: fitted(None, True, weighted_loader()))


def test_a_loader_under_one_of_our_samplers_is_told_too() -> None:
    _, (x, y) = imbalanced()
    loaders = [
        DataLoader(TensorDataset(x, y), batch_size=7, sampler=ClassBalancedSampler(LABELS)),
        DataLoader(TensorDataset(x, y), batch_sampler=StratifiedBatchSampler(LABELS, 7, skew=1.0)),
    ]
    for loader in loaders:
        bank, heard = told(lambda: fitted(None, None, loader))  # noqa: B023
        assert "balanced posterior" in heard[0]
        assert bank.info["sampling"]["posterior"] == "balanced"


@pytest.mark.parametrize(
    ("sampler", "importance", "options", "error", "match"),
    [
        (lambda: DynamicClassSampler(LABELS, ByMetric()), False, {}, ConfigError, "want a schedule by epoch, got one by"),
        (DRAWN["dynamic"], False, {"method": HMC(num_chains=2)}, ConfigError, "chances that do not change from epoch"),
        (lambda: WeightedIndexSampler([0.0] + [1.0] * 21), True, {}, ConfigError, "want weights above 0"),
        (lambda: ClassBalancedSampler(LABELS, weights=[1.0, 1.0, 0.0]), True, {}, ConfigError, "got 0 for class 2"),
        (DRAWN["classes"], True, {"data": "loader"}, ConfigError, "got a DataLoader; pass its data set"),
        (lambda: WeightedIndexSampler([1.0, 2.0, 3.0]), False, {}, DataError, r"become weights of rows as weights\[lab"),
        (lambda: ShuffledSampler(22), False, {}, ConfigError, "got ShuffledSampler; pass one of bnn.samplers"),
    ],
    ids=["by metric", "changing", "a row never", "a class never", "loader", "classes as rows", "no chances"],
)  # fmt: skip
def test_samplings_that_no_fit_can_take_are_refused(
    tmp_path: Path, sampler: Any, importance: bool, options: dict[str, Any], error: type[BnnError], match: str
) -> None:
    _, rows = imbalanced()
    if options.get("data") == "loader":
        options = {"data": DataLoader(TensorDataset(*rows), batch_size=7)}
    with pytest.raises(error, match=match):
        told(lambda: fitted(sampler(), importance, out=tmp_path / "bank", **options))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_are_never_drawn_may_be_left_out_on_purpose() -> None:
    """Without importance weights a weight of 0 is a row that does not count: HMC's full batch says so."""
    model, data = imbalanced()
    weights = torch.cat([torch.zeros(5), torch.ones(17)])
    bank = fitted(
        WeightedIndexSampler(weights), False, method=HMC(num_chains=2, num_warmup=5, num_steps=3), num_samples=4
    )
    x, y = data
    part = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=22)
    assert float(bank.log_joint[2]) == pytest.approx(float(part.log_joint(bank[2], Batch(x[5:], y[5:]))), rel=1e-5)


# Resume


class Noisy(Dataset):
    """Rows with noise from every global stream, as transforms of images have it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        shift = random.random() + float(np.random.rand())  # noqa: NPY002
        return self.x[row] + 0.1 * torch.randn(self.x.shape[1]) + 0.1 * shift, self.y[row]


def cut_fit(folder: Path, states: int, run: Callable[..., Bank]) -> Bank:
    """A fit that Ctrl-C stops once so many states have come, then resumed."""

    def cut(producer: Any, *_: Any) -> Iterator[Any]:
        for count, found in enumerate(producer):
            if count == states:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", cut)
        with pytest.raises(KeyboardInterrupt):
            run(out=folder)
    assert len(Bank.open(folder)) == 0  # in the middle of the optimisation
    return run(out=folder, resume=True)


@pytest.mark.parametrize("form", ["rows", "classes", "dynamic", "batches", "random rows", "random rows, balanced"])
@pytest.mark.parametrize("states", [1, 2])
def test_a_fit_on_sampled_or_random_rows_resumes_to_the_same_bits(tmp_path: Path, form: str, states: int) -> None:
    """States come every 50 steps, which is no number of epochs of 4 to 6 batches."""
    _, rows = imbalanced()
    data = Noisy(*rows) if "random" in form else rows
    make = SAMPLERS.get("classes" if "balanced" in form else form)

    def run(**options: Any) -> Bank:
        sampler = None if make is None else make()
        importance = None if sampler is None else True
        return fitted(sampler, importance, data, method=Guide(num_steps=133, batch_size=7), seed=5, **options)

    whole = run(out=tmp_path / "whole").block(slice(None)).params
    resumed = cut_fit(tmp_path / "broken", states, run).block(slice(None)).params
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_fit_on_a_loader_of_random_rows_resumes_to_the_same_bits(tmp_path: Path, shuffle: bool) -> None:
    _, rows = imbalanced()

    def run(**options: Any) -> Bank:
        loader = DataLoader(Noisy(*rows), batch_size=7, shuffle=shuffle)
        return fitted(None, None, loader, method=Guide(num_steps=133), seed=5, **options)

    whole = run(out=tmp_path / "whole").block(slice(None)).params
    resumed = cut_fit(tmp_path / "broken", 1, run).block(slice(None)).params
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("sampler", "importance"),
    [
        (lambda: ClassBalancedSampler(LABELS, 0.5, seed=1), True),
        (lambda: ClassBalancedSampler(LABELS, 1.2, num_samples=40, seed=2), True),
        (lambda: DynamicClassSampler(LABELS, Linear(1.2, 1.2, 9), num_samples=40, seed=1), True),
        (DRAWN["classes"], False),
        (lambda: None, None),
    ],
    ids=["skew", "seed", "kind", "importance", "none"],
)
def test_a_resume_under_another_sampler_is_refused(tmp_path: Path, sampler: Any, importance: bool | None) -> None:
    fitted(DRAWN["classes"](), True, out=tmp_path / "bank")
    fitted(DRAWN["classes"](), True, out=tmp_path / "bank", resume=True, num_samples=3)
    with pytest.raises(BankMismatch, match=r"bank\.json: want sampling ="):
        fitted(sampler(), importance, out=tmp_path / "bank", resume=True)


# Judging


def judged() -> tuple[FunctionalModel, tuple[Tensor, Tensor]]:
    model, data = imbalanced()
    return FunctionalModel(model.module, fit(model, data, method=Prior(), num_samples=3)), data


REFUSED: dict[str, Callable[[Any], DataLoader[Any]]] = {
    "torch's weights": lambda rows: DataLoader(rows, batch_size=7, sampler=WeightedRandomSampler(ROW_WEIGHTS, 22)),
    "torch's, equal": lambda rows: DataLoader(rows, batch_size=7, sampler=WeightedRandomSampler([1.0] * 22, 22)),
    "with replacement": lambda rows: DataLoader(rows, batch_size=7, sampler=RandomSampler(rows, replacement=True)),
    "with replacement, in batches": lambda rows: DataLoader(
        rows, batch_sampler=torch.utils.data.BatchSampler(RandomSampler(rows, replacement=True), 7, False)
    ),
    "rows": lambda rows: DataLoader(rows, batch_size=7, sampler=DRAWN["rows"]()),
    "classes": lambda rows: DataLoader(rows, batch_size=7, sampler=DRAWN["classes"]()),
    "dynamic": lambda rows: DataLoader(rows, batch_size=7, sampler=DRAWN["dynamic"]()),
    "batches": lambda rows: DataLoader(rows, batch_sampler=StratifiedBatchSampler(LABELS, 7, skew=1.0)),
    "classes, alike but with replacement": lambda rows: DataLoader(
        rows, batch_size=7, sampler=ClassBalancedSampler(LABELS, 0.0)
    ),
    "rows, alike but with replacement": lambda rows: DataLoader(
        rows, batch_size=7, sampler=WeightedIndexSampler([1.0] * 22)
    ),
}
ACCEPTED: dict[str, Callable[[Any], DataLoader[Any]]] = {
    "in order": lambda rows: DataLoader(rows, batch_size=7),
    "shuffled": lambda rows: DataLoader(rows, batch_size=7, shuffle=True),
    "shuffled by us": lambda rows: DataLoader(rows, batch_size=7, sampler=ShuffledSampler(22)),
    "natural batches": lambda rows: DataLoader(rows, batch_sampler=StratifiedBatchSampler(LABELS, 11)),
    "each once": lambda rows: DataLoader(rows, batch_size=7, sampler=WeightedIndexSampler([1.0] * 22, 22, False)),
    "chosen rows": lambda rows: DataLoader(rows, batch_size=7, sampler=SubsetRandomSampler(range(22))),
}


@pytest.mark.parametrize("form", REFUSED)
def test_evaluation_refuses_loaders_that_do_not_take_rows_alike(form: str) -> None:
    net, data = judged()
    with pytest.raises(DataError, match="want rows in their natural order, each once, got a loader that draws them by"):
        evaluate(net, REFUSED[form](TensorDataset(*data)))
    with pytest.raises(DataError, match="each once"):
        evaluate(net, data, ood=REFUSED[form](TensorDataset(*data)))


@pytest.mark.parametrize("form", ACCEPTED)
def test_evaluation_takes_loaders_that_show_each_row_once(form: str) -> None:
    net, data = judged()
    expected = evaluate(net, data).metrics
    found = evaluate(net, ACCEPTED[form](TensorDataset(*data))).metrics
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {name: figure.value for name, figure in expected.items()}
    )


# Prior shift

LOC = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)  # of x in each of three classes, with variance 1


def discriminant(shares: Tensor) -> nn.Linear:
    """p(c | x) of three normals: logits x mu_c - mu_c^2 / 2 + log pi_c."""
    module = nn.Linear(1, 3, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(LOC.unsqueeze(1))
        module.bias.copy_(-LOC.square() / 2 + shares.log())
    return module


def exact(x: Tensor, shares: Tensor) -> Tensor:
    """Bayes' rule with the densities themselves, [B, C]."""
    joint = shares * torch.distributions.Normal(LOC, torch.ones(3, dtype=torch.float64)).log_prob(x).exp()
    return joint / joint.sum(dim=1, keepdim=True)


EQUAL = torch.full((3,), 1 / 3, dtype=torch.float64)
NATURE = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)
POINTS = torch.linspace(-3, 4, 8, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("train", [EQUAL, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)], ids=["equal", "unequal"])
@pytest.mark.parametrize("natural", [NATURE, torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)], ids=["rare", "never"])
def test_prior_shift_is_bayes_rule_of_a_discriminant(train: Tensor, natural: Tensor) -> None:
    logits = discriminant(train)(POINTS).detach()
    torch.testing.assert_close(prior_shift(logits, train=train, natural=natural).exp(), exact(POINTS, natural))
    # Shares need not sum to one, may come as lists, and logits need not be normalised.
    found = prior_shift(logits + 3.0, train=(60 * train).tolist(), natural=(7 * natural).tolist())
    torch.testing.assert_close(found.exp(), exact(POINTS, natural))
    back = prior_shift(prior_shift(logits, train=train, natural=NATURE), train=NATURE, natural=train)
    torch.testing.assert_close(back.exp(), exact(POINTS, train))


def shifted_bank(log_weight: list[float] | None = None) -> tuple[FunctionalModel, Tensor]:
    """Two samples: the exact discriminant and one that is off; and their probabilities before the shift [S, B, C]."""
    module = discriminant(EQUAL)
    other = {"weight": -0.5 * module.weight.detach(), "bias": torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)}
    params = {name: torch.stack([value.detach(), other[name]]) for name, value in module.named_parameters()}
    weights = None if log_weight is None else torch.tensor(log_weight, dtype=torch.float64)
    block = make_block(params, chain=torch.zeros(2), draw=torch.arange(2), log_weight=weights)
    info = {"likelihood": Categorical().to_config()}
    net = FunctionalModel(module, Bank.from_blocks([block], layout=layout_of(module), info=info))
    each = torch.stack([POINTS @ params["weight"][k].T + params["bias"][k] for k in range(2)]).softmax(dim=-1)
    return net, each


@pytest.mark.parametrize("log_weight", [None, [0.0, 1.5]], ids=["equal", "weighted"])
def test_each_sample_is_corrected_before_the_mean_is_taken(log_weight: list[float] | None) -> None:
    net, each = shifted_bank(log_weight)
    found = predict(net, POINTS, prior_shift=(EQUAL, NATURE))
    assert isinstance(found, ClassPredictive)
    corrected = each * NATURE / EQUAL
    corrected = corrected / corrected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(corrected[0], exact(POINTS, NATURE))
    share = torch.tensor(log_weight or [0.0, 0.0], dtype=torch.float64).softmax(dim=0).view(2, 1, 1)
    torch.testing.assert_close(found.probs, (share * corrected).sum(dim=0))
    torch.testing.assert_close(found.expected_entropy, (share * torch.special.entr(corrected)).sum(dim=(0, 2)))
    torch.testing.assert_close(found.expected_log_prob, (share * corrected.log()).sum(dim=0))
    after = prior_shift((share * each).sum(dim=0).log(), train=EQUAL, natural=NATURE).exp()
    assert float((after - found.probs).abs().max()) > 0.02  # the other order is another thing


def test_evaluation_corrects_rows_inside_and_outside() -> None:
    net, each = shifted_bank()
    y = torch.tensor([0, 0, 0, 1, 0, 2, 0, 2])
    outside = 0.3 * POINTS[:5] + 0.05
    corrected = each * NATURE / EQUAL
    probs = (corrected / corrected.sum(dim=-1, keepdim=True)).mean(dim=0)
    report = evaluate(net, (POINTS, y), ood=(outside, torch.zeros(5)), prior_shift=(EQUAL, NATURE), batch_size=3)
    assert report.metrics["nll"].value == pytest.approx(float(nn.functional.nll_loss(probs.log(), y)))
    assert report.metrics["accuracy"].value == float((probs.argmax(dim=1) == y).double().mean())
    inner = torch.special.entr(probs).sum(dim=1)
    outer = predict(net, outside, prior_shift=(EQUAL, NATURE)).entropy  # type: ignore[union-attr]
    assert report.metrics["auroc"].value == pytest.approx(auroc(inner, outer))
    assert report.metrics["nll"].value != pytest.approx(evaluate(net, (POINTS, y)).metrics["nll"].value, rel=0.01)


def test_a_balanced_fit_corrected_is_the_natural_one() -> None:
    """Two normals, 1 row of 12 in class 1: the balanced posterior's predictive is far from the natural exact one, and
    corrected it is near."""
    source = torch.Generator().manual_seed(0)
    size = 2400
    y = (torch.rand(size, generator=source) < 1 / 12).long()
    x = torch.randn(size, 1, generator=source) + 1.5 * y.unsqueeze(1)
    module = nn.Linear(1, 2)
    model = BayesianModel(module, prior=priors.Normal(0.0, 3.0), likelihood=Categorical(), num_data=size)
    sampler = ClassBalancedSampler(y, 1.0, seed=0)
    bank = fit(
        model, (x, y), method=Guide(num_steps=1000, batch_size=300, lr=0.03), num_samples=50, sampler=sampler,
        importance_weights=False,
    )  # fmt: skip
    points = torch.linspace(-2, 4, 9).unsqueeze(1)
    shares = torch.bincount(y) / size
    joint = shares * torch.distributions.Normal(torch.tensor([0.0, 1.5]), 1.0).log_prob(points).exp()
    truth = (joint / joint.sum(dim=1, keepdim=True))[:, 1].double()
    net, record = FunctionalModel(module, bank), bank.info["sampling"]
    plain = predict(net, points).probs[:, 1]  # type: ignore[union-attr]
    corrected = predict(net, points, prior_shift=(record["class_shares"], record["natural_shares"])).probs[:, 1]  # type: ignore[union-attr]
    assert float((plain - truth).abs().max()) > 0.3
    assert float((corrected - truth).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("train", "natural", "match"),
    [
        ([0.5, 0.5], NATURE, r"prior_shift\(train=\): want 3 finite shares above 0, one a class"),
        ([1.0, 0.0, 1.0], NATURE, r"prior_shift\(train=\)"),
        ([1.0, math.nan, 1.0], NATURE, r"prior_shift\(train=\)"),
        (EQUAL, [1.0, -0.1, 0.1], r"prior_shift\(natural=\): want 3 finite shares of at least 0"),
        (EQUAL, [0.0, 0.0, 0.0], r"prior_shift\(natural=\)"),
        (EQUAL, [1.0, math.inf, 0.0], r"prior_shift\(natural=\)"),
        (EQUAL, [[0.1, 0.2, 0.7]], r"prior_shift\(natural=\)"),
    ],
)
def test_shares_that_are_none_are_refused(train: Any, natural: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        prior_shift(torch.zeros(5, 3), train=train, natural=natural)
    net, _ = shifted_bank()
    with pytest.raises(DataError, match=match):
        predict(net, POINTS, prior_shift=(train, natural))


def test_a_regression_has_no_classes_to_shift() -> None:
    case = linear_regression()
    net = FunctionalModel(case.model.module, fit(case.model, case.data, method=Prior(), num_samples=2))
    with pytest.raises(ConfigError, match="prior_shift: want none for a regression"):
        predict(net, case.data[0], prior_shift=([1.0], [1.0]))
