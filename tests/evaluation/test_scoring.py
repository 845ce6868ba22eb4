"""evaluate: every figure recomputed with NumPy, SciPy and scikit-learn, forms of data, symmetries, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Table, random, table_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bnn
from bnn import metrics
from bnn.errors import ConfigError, DataError
from bnn.evaluation import Report, evaluate
from bnn.likelihoods import Categorical, Gaussian, Likelihood
from bnn.priors import HalfCauchy
from bnn.seeding import generator

ROWS, CLASSES = 13, 3  # N and C; S is 1, 2, 7 or 70, batches are of 5
LEARNT = Gaussian(HalfCauchy(1.0))
streamed = pytest.mark.parametrize("num_samples", [1, 2, 7, 70])
weights = pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
batches = pytest.mark.parametrize("batch_size", [1, 5, 512])
profile = settings(max_examples=10, deadline=None, derandomize=True)


def labels(rows: int = ROWS, classes: int = CLASSES, seed: int = 0) -> Tensor:
    return torch.randint(classes, (rows,), generator=generator(seed, "labels"))


def random_weights(num_samples: int, weighted: bool) -> tuple[Tensor | None, np.ndarray]:
    """Log weights of a bank, not normalised, and the shares they stand for."""
    if not weighted:
        return None, np.full(num_samples, 1 / num_samples)
    log_weight = 2 * random(num_samples, seed=8) + 5.0
    return log_weight, scipy.special.softmax(log_weight.numpy())


def classes(tables: Tensor, y: Tensor, *, log_weight: Tensor | None = None, **options: Any) -> Report:
    data = torch.arange(len(y)), y
    return evaluate(table_net(tables, log_weight=log_weight), data, likelihood=Categorical(), **options)


def values(report: Report) -> dict[str, float]:
    """Of the figures that have one."""
    return {name: figure.value for name, figure in report.metrics.items() if figure.value is not None}


def check_means(report: Report, rows: dict[str, np.ndarray], atol: float = 1e-10) -> None:
    """Figures that are means over rows: mean and standard error of the values that were recomputed."""
    for name, expected in rows.items():
        figure = report.metrics[name]
        assert figure.value == pytest.approx(expected.mean(), abs=atol), name
        assert figure.standard_error == pytest.approx(scipy.stats.sem(expected), abs=atol), name


# Classification


@streamed
@weights
@batches
def test_class_figures_equal_their_recomputation(num_samples: int, weighted: bool, batch_size: int) -> None:
    logits, y = 2 * random(num_samples, ROWS, CLASSES), labels()
    log_weight, share = random_weights(num_samples, weighted)
    report = classes(logits, y, log_weight=log_weight, batch_size=batch_size, num_bins=6)
    each = scipy.special.softmax(logits.numpy(), axis=-1)  # [S, N, C]
    probs, target, rows = np.einsum("s,snc->nc", share, each), y.numpy(), np.arange(ROWS)
    predicted, confidence = probs.argmax(axis=1), probs.max(axis=1)
    total, aleatoric = scipy.stats.entropy(probs, axis=1), share @ scipy.stats.entropy(each, axis=2)
    recomputed = {
        "accuracy": (predicted == target).astype(float),
        "nll": -np.log(probs[rows, target]),
        "gibbs_nll": share @ -np.log(each[:, rows, target]),
        "brier": ((probs - np.eye(CLASSES)[target]) ** 2).sum(axis=1),
        "predictive_entropy": total,
        "expected_entropy": aleatoric,
        "mutual_information": total - aleatoric,
    }
    votes = np.einsum("s,snc->nc", share, np.eye(CLASSES)[each.argmax(axis=2)])
    recomputed["variation_ratio"] = 1 - votes.max(axis=1)
    recomputed["disagreement"] = np.zeros(ROWS)
    if num_samples > 1:
        alone = share @ share
        recomputed["disagreement"] = (1 - (votes**2).sum(axis=1)) / (1 - alone)
        apart = each.argmax(axis=2)[:, None] != each.argmax(axis=2)[None]  # [S, S, N]
        pairs = np.einsum("s,t,stn->n", share, share, apart) / (1 - alone)  # a sample does not differ from itself
        np.testing.assert_allclose(recomputed["disagreement"], pairs, atol=1e-12)
    check_means(report, recomputed)
    found = values(report)
    calibration, selective = {"ece", "rmsce", "mce", "ace", "classwise_ece"}, {"aurc", "augrc"}
    assert set(found) == {*recomputed, *calibration, *selective, "coverage_at_risk_5", "risk_at_coverage_80"}
    assert found["accuracy"] == sklearn.metrics.accuracy_score(target, predicted)
    assert found["nll"] == pytest.approx(sklearn.metrics.log_loss(target, probs, labels=range(CLASSES)), abs=1e-10)
    accuracy, mean = sklearn.calibration.calibration_curve(predicted == target, confidence, n_bins=6)
    count = np.histogram(confidence, bins=6, range=(0, 1))[0]
    assert found["ece"] == pytest.approx(np.abs(accuracy - mean) @ count[count > 0] / ROWS, abs=1e-10)
    gap = np.zeros(6)
    np.put(gap, np.flatnonzero(count), np.abs(accuracy - mean))
    assert found["rmsce"] == pytest.approx(math.sqrt(gap**2 @ count / ROWS), abs=1e-10)
    assert found["mce"] == pytest.approx(gap.max(), abs=1e-10)
    assert report.curves["reliability"]["rows"] == count.tolist()
    wrong = torch.from_numpy(predicted != target).double()
    curve = metrics.risk_coverage(torch.from_numpy(1 - confidence), wrong)
    assert found["aurc"] == pytest.approx(float(metrics.aurc(curve)), abs=1e-10)
    assert found["augrc"] == pytest.approx(float(metrics.augrc(curve)), abs=1e-10)
    assert found["coverage_at_risk_5"] == pytest.approx(float(metrics.coverage_at_risk(curve, 0.05)), abs=1e-10)
    assert found["risk_at_coverage_80"] == pytest.approx(float(metrics.risk_at_coverage(curve, 0.8)), abs=1e-10)
    own = metrics.classwise_ece(torch.from_numpy(probs), y, num_bins=6)
    assert found["classwise_ece"] == pytest.approx(float(own), abs=1e-10)
    equal = metrics.adaptive_bins(torch.from_numpy(confidence), 1 - wrong, num_bins=6)
    assert found["ace"] == pytest.approx(float(metrics.ece(equal)), abs=1e-10)
    assert report.rows["predicted"].tolist() == predicted.tolist()
    assert torch.equal(report.rows["y"], y)
    np.testing.assert_allclose(report.rows["confidence"].numpy(), confidence, atol=1e-12)
    assert (report.num_rows, report.num_samples, report.task) == (ROWS, num_samples, "classification")


@streamed
@weights
@batches
def test_regression_figures_equal_their_recomputation(num_samples: int, weighted: bool, batch_size: int) -> None:
    """In the target's own units, under a noise scale that is part of the sample."""
    loc, unit, outputs = -40.0, 2.5, 2
    tables, scales, y = (
        random(num_samples, ROWS, outputs),
        0.3 + random(num_samples, seed=1).abs(),
        random(ROWS, outputs),
    )
    log_weight, share = random_weights(num_samples, weighted)
    net = table_net(tables, log_weight=log_weight, scales=scales)
    data = torch.arange(ROWS), y
    report = evaluate(net, data, likelihood=LEARNT, loc=loc, scale=unit, batch_size=batch_size)
    mu, sigma, target = unit * tables.numpy() + loc, unit * scales.numpy()[:, None, None], unit * y.numpy() + loc

    def distance(m: np.ndarray, s: np.ndarray) -> np.ndarray:
        return scipy.stats.foldnorm.mean(np.abs(m) / s, scale=s)  # E|X| for X ~ Normal(m, s^2)

    pairs = distance(mu[:, None] - mu[None], np.sqrt(sigma[:, None] ** 2 + sigma[None] ** 2))
    crps = np.einsum("s,snc->nc", share, distance(target - mu, np.broadcast_to(sigma, mu.shape)))
    crps = crps - 0.5 * np.einsum("s,t,stnc->nc", share, share, pairs)
    density = scipy.stats.norm.logpdf(target, mu, sigma).sum(axis=-1)  # [S, N]
    pit = np.einsum("s,snc->nc", share, scipy.stats.norm.cdf(target, mu, sigma))
    mean = np.einsum("s,snc->nc", share, mu)
    inside = {level: (np.abs(2 * pit - 1) <= level / 100).mean(axis=1) for level in (50, 90, 95)}
    recomputed = {
        "nll": -scipy.special.logsumexp(density, axis=0, b=share[:, None]),
        "gibbs_nll": -share @ density,
        "crps": crps.mean(axis=1),
        **{f"coverage_{level}": shares for level, shares in inside.items()},
        "aleatoric": np.full(ROWS, share @ sigma.flatten() ** 2),
        "epistemic": np.einsum("s,snc->nc", share, (mu - mean) ** 2).mean(axis=1),
    }

    def quantile(level: float) -> np.ndarray:
        """By bisection of the distribution function, [N, C]."""
        low, high = (mu - 40 * sigma).min(axis=0), (mu + 40 * sigma).max(axis=0)
        for _ in range(80):
            middle = (low + high) / 2
            below = np.einsum("s,snc->nc", share, scipy.stats.norm.cdf(middle, mu, sigma)) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high

    lower, upper = quantile(0.05), quantile(0.95)
    recomputed["mae"] = np.abs(target - mean).mean(axis=1)
    recomputed["width_90"] = (upper - lower).mean(axis=1)
    miss = np.maximum(np.maximum(lower - target, target - upper), 0)
    recomputed["interval_score_90"] = (upper - lower + 20 * miss).mean(axis=1)
    levels = np.arange(1, 20) / 20
    losses = [
        np.maximum(level * (target - q), (level - 1) * (target - q)) for level in levels for q in [quantile(level)]
    ]
    recomputed["pinball"] = np.mean(losses, axis=0).mean(axis=1)
    check_means(report, recomputed, atol=1e-9)
    found = values(report)
    assert set(found) == {*recomputed, "rmse", "sharpness"}
    variance = recomputed["aleatoric"] + recomputed["epistemic"]
    assert found["sharpness"] == pytest.approx(math.sqrt(variance.mean()), abs=1e-10)
    squared = (target - mean) ** 2
    assert found["rmse"] == pytest.approx(sklearn.metrics.mean_squared_error(target, mean) ** 0.5, abs=1e-10)
    by_delta = scipy.stats.sem(squared.mean(axis=1)) / (2 * found["rmse"])
    assert report.metrics["rmse"].standard_error == pytest.approx(by_delta, abs=1e-10)
    for name, expected in {"mean": mean, "y": target, "pit": pit, "crps": crps, "squared_error": squared}.items():
        np.testing.assert_allclose(report.rows[name].numpy(), expected, atol=1e-10)
    assert (report.num_rows, report.num_samples, report.task) == (ROWS, num_samples, "regression")
    assert "reliability" not in report.curves


def test_targets_without_a_column_are_one_output() -> None:
    net, y = table_net(random(7, ROWS, 1)), random(ROWS)
    flat, column = (evaluate(net, (torch.arange(ROWS), t), likelihood=Gaussian(0.5)) for t in (y, y.unsqueeze(1)))
    assert values(flat) == values(column)
    assert flat.rows["mean"].shape == (ROWS, 1)


def test_one_sample_leaves_nothing_epistemic() -> None:
    report = classes(2 * random(1, ROWS, CLASSES), labels())
    assert report.metrics["mutual_information"].value == 0.0
    assert report.metrics["gibbs_nll"].value == pytest.approx(report.metrics["nll"].value, abs=1e-14)
    normal = evaluate(table_net(random(1, ROWS, 2)), (torch.arange(ROWS), random(ROWS, 2)), likelihood=Gaussian(0.5))
    assert normal.metrics["epistemic"].value == 0.0


def test_a_single_row_has_figures_without_errors() -> None:
    for report in (
        classes(2 * random(7, 1, CLASSES), torch.tensor([2])),
        evaluate(table_net(random(7, 1, 2)), (torch.arange(1), random(1, 2)), likelihood=Gaussian(0.5)),
    ):
        assert report.num_rows == 1
        assert all(figure.standard_error is None for figure in report.metrics.values())
        assert all(figure.note is not None for figure in report.metrics.values())
        assert all(math.isfinite(value) for value in values(report).values())
        assert set(report.metrics) - set(values(report)) == {"rhat", "ess"}


def test_perfect_predictions_have_rmse_zero_and_no_error_of_it() -> None:
    y = random(ROWS, 2)
    report = evaluate(table_net(y.expand(7, -1, -1)), (torch.arange(ROWS), y), likelihood=Gaussian(0.5))
    assert report.metrics["rmse"].value < 1e-12
    exact = evaluate(table_net(y.unsqueeze(0)), (torch.arange(ROWS), y), likelihood=Gaussian(0.5))
    assert exact.metrics["rmse"].value == 0.0
    assert exact.metrics["rmse"].standard_error is None


# Data


class Rows(Dataset):
    """A data set that brings its rows one by one, and no `__getitems__`."""

    def __init__(self, *tensors: Any) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[-1])

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        return tuple(tensor[row] for tensor in self.tensors)


def forms(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Stock loaders would draw from the global stream when they start; under `evaluate` they must not."""
    whole = TensorDataset(x, y)
    return {
        "tensor data set": whole,
        "row by row": Rows(x, y),
        "loader": DataLoader(whole, batch_size=4),
        "loader of one row": DataLoader(Rows(x, y), batch_size=1),
    }


@pytest.mark.parametrize("form", ["tensor data set", "row by row", "loader", "loader of one row"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_form_of_data_gives_the_figures_of_the_pair(form: str, task: str) -> None:
    net = table_net(2 * random(7, ROWS, CLASSES))
    x, y = torch.arange(ROWS), labels() if task == "classification" else random(ROWS, CLASSES)
    likelihood = Categorical() if task == "classification" else Gaussian(0.5)
    expected = evaluate(net, (x, y), likelihood=likelihood)
    before = torch.get_rng_state()
    found = evaluate(net, forms(x, y)[form], likelihood=likelihood, batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert values(found) == pytest.approx(values(expected), abs=1e-12)
    assert torch.equal(found.rows["y"], expected.rows["y"])  # in the order of the data
    assert found.num_rows == ROWS


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_inputs_may_be_several_tensors(form: str) -> None:
    class Shifted(Table):
        def forward(self, rows: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(rows) + shift

    logits, shift, y = random(7, ROWS, CLASSES), random(ROWS, CLASSES, seed=4), labels()
    module = Shifted((ROWS, CLASSES))
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([{"table": t} for t in logits], module=module))
    x = (torch.arange(ROWS), shift) if form == "tuple" else {"shift": shift, "rows": torch.arange(ROWS)}
    found = evaluate(net, (x, y), likelihood=Categorical(), batch_size=5)
    assert values(found) == pytest.approx(values(classes(logits + shift, y)), abs=1e-12)


def test_the_likelihood_is_the_banks_unless_another_is_given() -> None:
    net, data = table_net(random(2, ROWS, 2), likelihood=Gaussian(0.25)), (torch.arange(ROWS), random(ROWS, 2))
    assert evaluate(net, data).metrics["aleatoric"].value == pytest.approx(0.25**2, abs=1e-15)
    given_one = evaluate(net, data, likelihood=Gaussian(0.5))
    assert given_one.metrics["aleatoric"].value == pytest.approx(0.5**2, abs=1e-15)
    with pytest.raises(ConfigError, match="pass likelihood="):
        evaluate(table_net(random(2, ROWS, 2)), data)


# Out of distribution


@pytest.mark.parametrize("form", ["pair", "tensor data set", "loader"])
def test_ood_figures_are_scikit_learns_on_the_predictive_entropy(form: str) -> None:
    """Logits of the rows outside are flatter; entropies overlap, rows outside are the positive class."""
    inside, outside = 2 * random(7, ROWS, CLASSES), 1.3 * random(7, 9, CLASSES, seed=1)
    net = table_net(torch.cat([inside, outside], dim=1))
    x, y = torch.arange(ROWS, ROWS + 9), torch.zeros(9, dtype=torch.int64)
    ood = (x, y) if form == "pair" else forms(x, y)[form]
    report = evaluate(net, (torch.arange(ROWS), labels()), ood=ood, likelihood=Categorical(), batch_size=5)
    probs = scipy.special.softmax(torch.cat([inside, outside], dim=1).numpy(), axis=-1).mean(axis=0)
    score, positive = scipy.stats.entropy(probs, axis=1), np.arange(ROWS + 9) >= ROWS
    false_positive, true_positive, _ = sklearn.metrics.roc_curve(positive, score)
    found = values(report)
    assert found["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(positive, score), abs=1e-12)
    assert 0.5 < found["auroc"] < 1
    assert found["fpr95"] == pytest.approx(false_positive[np.argmax(true_positive >= 0.95)], abs=1e-12)
    np.testing.assert_allclose(report.outside["predictive_entropy"].numpy(), score[ROWS:], atol=1e-12)
    assert "9 rows outside positive" in report.metrics["auroc"].definition
    plain = evaluate(net, (torch.arange(ROWS), labels()), likelihood=Categorical(), batch_size=5)
    outside = ("auroc", "aupr_in", "aupr_out", "fpr95")
    assert {name: value for name, value in found.items() if not name.startswith(outside)} == values(plain)


def test_targets_outside_are_not_looked_at() -> None:
    net, data = table_net(2 * random(7, ROWS + 9, CLASSES)), (torch.arange(ROWS), labels())
    x = torch.arange(ROWS, ROWS + 9)
    reports = [
        evaluate(net, data, ood=(x, y), likelihood=Categorical())
        for y in (torch.zeros(9), torch.full((9,), 99), torch.zeros(9, 2, dtype=torch.int64))
    ]
    assert len({report.metrics["auroc"].value for report in reports}) == 1


def test_ood_with_a_regression_is_refused() -> None:
    data = torch.arange(ROWS), random(ROWS, 2)
    with pytest.raises(DataError, match="ood: want none for a regression"):
        evaluate(table_net(random(7, ROWS, 2)), data, ood=data, likelihood=Gaussian(0.5))


# Properties


@profile
@given(
    size=st.sampled_from([(1, 6, 3), (2, 9, 4), (7, 5, 2)]), seed=st.integers(0, 2**31), batch=st.sampled_from([2, 64])
)
def test_class_figures_do_not_depend_on_order_or_copies(size: tuple[int, int, int], seed: int, batch: int) -> None:
    logits, y, log_weight = 2 * random(*size, seed=seed), labels(*size[1:], seed=seed), random(size[0], seed=seed)
    expected = pytest.approx(values(classes(logits, y, log_weight=log_weight)), abs=1e-10)
    samples, rows, columns = (torch.randperm(n, generator=generator(seed, i)) for i, n in enumerate(size))
    moved, target = logits[samples][:, rows][:, :, columns], columns.argsort()[y[rows]]
    assert values(classes(moved, target, log_weight=log_weight[samples], batch_size=batch)) == expected
    twice = classes(torch.cat([logits, logits]), y, log_weight=torch.cat([log_weight, log_weight]), batch_size=batch)
    found = values(twice)
    alone = values(classes(logits, y, log_weight=log_weight))
    # Two samples that are one and the same never disagree: with copies a pair of those may be drawn.
    assert found.pop("disagreement") <= alone.pop("disagreement", 0.0) + 1e-12
    assert found == pytest.approx(alone, abs=1e-10)
    assert found["nll"] <= found["gibbs_nll"] + 1e-12
    assert 0 <= found["mutual_information"] <= min(math.log(size[0]), math.log(size[2])) + 1e-12
    assert found["predictive_entropy"] == pytest.approx(
        found["expected_entropy"] + found["mutual_information"], abs=1e-10
    )
    assert 0 <= found["brier"] <= 2


@profile
@given(
    size=st.sampled_from([(1, 6, 3), (2, 9, 4), (7, 5, 2)]), seed=st.integers(0, 2**31), batch=st.sampled_from([2, 64])
)
def test_regression_figures_do_not_depend_on_order_or_copies(size: tuple[int, int, int], seed: int, batch: int) -> None:
    means, y, log_weight = random(*size, seed=seed), random(*size[1:], seed=seed), random(size[0], seed=seed)
    scales = 0.3 + random(size[0], seed=seed + 1).abs()

    def figures(samples: Tensor, rows: Tensor, outputs: Tensor) -> dict[str, float]:
        net = table_net(means[samples][:, rows][:, :, outputs], log_weight=log_weight[samples], scales=scales[samples])
        data = torch.arange(len(rows)), y[rows][:, outputs]
        return values(evaluate(net, data, likelihood=LEARNT, batch_size=batch))

    straight = [torch.arange(n) for n in size]
    expected = pytest.approx(figures(*straight), abs=1e-10)
    assert figures(*(torch.randperm(n, generator=generator(seed, i)) for i, n in enumerate(size))) == expected
    assert figures(torch.cat([straight[0], straight[0]]), *straight[1:]) == expected


@pytest.mark.parametrize("unit", [1e-3, 0.4, 25.0])
def test_regression_figures_follow_the_units_of_the_target(unit: float) -> None:
    """y -> a y + b: RMSE and CRPS times a, NLL plus log a an output, variances times a^2, coverage as before."""
    net, data = table_net(random(7, ROWS, 2), scales=0.3 + random(7).abs()), (torch.arange(ROWS), random(ROWS, 2))
    plain = values(evaluate(net, data, likelihood=LEARNT))
    scaled = values(evaluate(net, data, likelihood=LEARNT, loc=-3.0, scale=unit))
    factors = {"aleatoric": unit**2, "epistemic": unit**2}
    factors |= dict.fromkeys(("rmse", "mae", "crps", "width_90", "interval_score_90", "pinball", "sharpness"), unit)
    expected = {name: value * factors.get(name, 1.0) for name, value in plain.items()}
    expected["nll"] += 2 * math.log(unit)
    expected["gibbs_nll"] += 2 * math.log(unit)
    assert scaled == pytest.approx(expected, rel=1e-9)


def test_labels_drawn_from_the_predictive_give_its_entropy() -> None:
    """NLL -> H, Brier -> sum p (1 - p), accuracy -> mean confidence: the predictive is the truth."""
    rows = 4000
    logits = 2 * random(7, rows, CLASSES)
    probs = logits.softmax(dim=-1).mean(dim=0)
    y = torch.multinomial(probs, 1, generator=generator(5)).squeeze(1)
    report = classes(logits, y)
    nll, brier, accuracy = (report.metrics[name] for name in ("nll", "brier", "accuracy"))
    assert abs(nll.value - report.metrics["predictive_entropy"].value) < 4 * nll.standard_error
    assert abs(brier.value - float((probs * (1 - probs)).sum(dim=1).mean())) < 4 * brier.standard_error
    assert abs(accuracy.value - float(report.rows["confidence"].mean())) < 4 * accuracy.standard_error
    assert report.metrics["gibbs_nll"].value > nll.value + 4 * nll.standard_error
    count, confidence = (torch.tensor(report.curves["reliability"][name]) for name in ("rows", "confidence"))
    bound = (count * confidence * (1 - confidence)).sqrt().sum() / rows
    assert report.metrics["ece"].value < 2 * float(bound)  # the bound is sum_m n_m / N se_m; E|gap_m| is 0.8 se_m


def test_targets_drawn_from_the_predictive_are_covered() -> None:
    rows = 4000
    means, scales = random(7, rows, 1), 0.3 + random(7).abs()
    chosen = torch.randint(7, (rows,), generator=generator(6))
    y = means[chosen, torch.arange(rows)] + scales[chosen, None] * random(rows, 1, seed=7)
    report = evaluate(table_net(means, scales=scales), (torch.arange(rows), y), likelihood=LEARNT, loc=9.0, scale=3.0)
    for level in (0.5, 0.9, 0.95):
        figure = report.metrics[f"coverage_{100 * level:.0f}"]
        error = math.sqrt(level * (1 - level) / rows)
        assert figure.standard_error == pytest.approx(error, rel=0.1)
        assert figure.value is not None
        assert abs(figure.value - level) < 4 * error
    parts = report.metrics["aleatoric"].value + report.metrics["epistemic"].value
    squared = report.rows["squared_error"]
    assert abs(float(squared.mean()) - parts) < 4 * float(squared.std()) / math.sqrt(rows)


# Refusals


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (labels().double(), "int64 targets"),
        (labels().unsqueeze(1), r"targets \[B\]"),
        (labels() + 1, r"classes in \[0, 3\), got 1 to 3"),
        (labels() - 1, r"classes in \[0, 3\), got -1 to 1"),
        (labels()[:-1], "of the same length"),
        (labels()[:0], "of the same length"),
    ],
)
def test_class_targets_that_do_not_fit_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(table_net(random(7, ROWS, CLASSES)), (torch.arange(ROWS), y), likelihood=Categorical())


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (random(ROWS), r"want targets \[13, 2\], as the module's outputs, got \[13, 1\]"),
        (random(ROWS, 3), r"want targets \[13, 2\], as the module's outputs, got \[13, 3\]"),
        (random(ROWS, 2).index_fill(0, torch.tensor(4), math.nan), "NaN or Inf in row 4 of y"),
        (random(ROWS - 1, 2), "of the same length"),
    ],
)
def test_regression_targets_that_do_not_fit_are_refused(y: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(table_net(random(7, ROWS, 2)), (torch.arange(ROWS), y), likelihood=Gaussian(0.5))


def test_no_rows_and_inputs_that_are_not_finite_are_refused() -> None:
    module = nn.utils.skip_init(nn.Linear, 4, CLASSES)
    zeros = {"weight": torch.zeros(CLASSES, 4), "bias": torch.zeros(CLASSES)}
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([zeros] * 7, module=module))
    x = torch.zeros(ROWS, 4)
    x[9, 2] = math.inf
    with pytest.raises(DataError, match="NaN or Inf in row 9 of x"):
        evaluate(net, (x, labels()), likelihood=Categorical())
    with pytest.raises(DataError, match="at least one row"):
        evaluate(net, (x[:0], labels()[:0]), likelihood=Categorical())


@pytest.mark.parametrize("batch_size", [5, 512])
def test_a_sample_that_overflows_is_named(batch_size: int) -> None:
    class Squared(Table):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows).square()

    tables = random(7, ROWS, CLASSES)
    tables[4, 11, 1] = 1e300  # finite, as a bank wants it; its square is not, in the last batch
    module = Squared((ROWS, CLASSES))
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([{"table": t} for t in tables], module=module))
    with pytest.raises(DataError, match=r"^sample 4: want finite outputs"):
        evaluate(net, (torch.arange(ROWS), labels()), likelihood=Categorical(), batch_size=batch_size)


def test_num_bins_are_checked_and_named() -> None:
    logits = random(7, ROWS, CLASSES)
    report = classes(logits, labels(), num_bins=4)
    assert len(report.curves["reliability"]["rows"]) == 4
    assert sum(report.curves["reliability"]["rows"]) == ROWS
    assert report.metrics["ece"].bins == 4
    with pytest.raises(ConfigError, match="num_bins"):
        classes(logits, labels(), num_bins=0)


def test_a_paired_loader_is_no_data_to_judge_by() -> None:
    """Every batch of it is for one sample; a predictive takes all of them."""
    module = torch.nn.Linear(2, 3)
    bank = bnn.Bank.from_state_dicts([module.state_dict()] * 4, module=module)
    loader = bnn.PairedLoader((torch.zeros(5, 2), torch.zeros(5).long()), bnn.SampleIndexSampler(bank), batch_size=2)
    with pytest.raises(DataError, match="want a pair of tensors, a data set or a DataLoader, got a PairedLoader"):
        bnn.evaluate(bnn.FunctionalModel(module, bank), loader, likelihood=bnn.likelihoods.Categorical())


@pytest.mark.parametrize("shape", [(ROWS, 5), (ROWS, 4, 1)])
def test_rows_outside_and_shifted_rows_are_of_the_shape_of_the_data(shape: tuple[int, ...]) -> None:
    module = nn.utils.skip_init(nn.Linear, 4, CLASSES)
    zeros = {"weight": torch.zeros(CLASSES, 4), "bias": torch.zeros(CLASSES)}
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([zeros] * 7, module=module))
    data, other = (torch.zeros(ROWS, 4), labels()), (torch.zeros(shape), labels())
    got = str(list(shape[1:])).replace("[", r"\[")
    with pytest.raises(DataError, match=rf"^ood: want rows of shape \[4\], got {got}"):
        evaluate(net, data, ood=other, likelihood=Categorical())
    with pytest.raises(DataError, match=rf"^noise 2: want rows of shape \[4\], got {got}"):
        evaluate(net, data, shifts={"noise": {2: other}}, likelihood=Categorical())
    with pytest.raises(DataError, match="at least one row"):
        evaluate(net, data, ood=(torch.zeros(0, 4), torch.zeros(0)), likelihood=Categorical())
    with pytest.raises(ConfigError, match="severities from 1 on"):
        evaluate(net, data, shifts={"noise": {0: data}}, likelihood=Categorical())


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(0.5)], ids=["classes", "targets"])
def test_basic_figures_are_some_of_all(likelihood: Likelihood) -> None:
    net = table_net(2 * random(7, ROWS, CLASSES))
    data = torch.arange(ROWS), labels() if likelihood.task == "classification" else random(ROWS, CLASSES)
    every = evaluate(net, data, likelihood=likelihood)
    basic = evaluate(net, data, likelihood=likelihood, figures="basic")
    assert {"nll"} < basic.metrics.keys() < every.metrics.keys()
    for name, figure in basic.metrics.items():
        assert figure == every.metrics[name], name
    with pytest.raises(ConfigError, match="figures: want one of all, basic, got 'some'"):
        evaluate(net, data, likelihood=likelihood, figures="some")  # type: ignore[arg-type]


def test_shifted_data_have_the_figures_of_data_of_their_own() -> None:
    net, y = table_net(2 * random(7, 3 * ROWS, CLASSES)), labels()
    parts = [(torch.arange(ROWS) + level * ROWS, y) for level in range(3)]
    report = evaluate(net, parts[0], shifts={"moved": {2: parts[2], 1: parts[1]}}, likelihood=Categorical())
    alone = [evaluate(net, part, likelihood=Categorical()) for part in parts]
    found = report.curves["shift"]["moved"]
    assert found["severity"] == [0, 1, 2]
    for name, line in found["metrics"].items():
        assert line == pytest.approx([one.metrics[name].value for one in alone], abs=1e-12), name


def test_a_prior_shift_that_leaves_a_class_without_a_share_is_infinite_not_nan() -> None:
    logits, y = 2 * random(7, ROWS, CLASSES), labels()
    report = classes(logits, y, prior_shift=([1, 1, 1], [1, 0, 1]))
    figure = report.metrics["nll"]
    assert figure.value is None
    assert figure.note == f"infinite: {int((y == 1).sum())} rows give their class no chance"
    assert report.metrics["accuracy"].value is not None


def test_the_large_bank_goes_by_quadrature_and_says_so() -> None:
    tables, y = random(1001, 5, 1), random(5, 1)
    report = evaluate(table_net(tables), (torch.arange(5), y), likelihood=Gaussian(0.5))
    figure = report.metrics["crps"]
    assert "by quadrature" in str(figure.note)
    means, scales = tables, torch.full((1001, 1, 1), 0.5, dtype=torch.float64)
    first = metrics.mixture_crps(means[:1000], scales[:1000], y)  # a sum over pairs
    assert figure.value == pytest.approx(float(first.mean()), rel=5e-3)
    assert figure.monte_carlo_error is not None
