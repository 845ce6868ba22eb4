"""Metrics of a posterior predictive on held-out data: streamed over samples, batch after batch of rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from bnn import metrics
from bnn.batches import full_batch, num_rows, parts_of, reweights, samplers_of
from bnn.errors import ConfigError, DataError
from bnn.evaluation.report import Report
from bnn.functional import FunctionalModel
from bnn.likelihoods import (
    Bernoulli,
    Likelihood,
    Poisson,
    as_columns,
    check_binary,
    check_counts,
    check_logit,
    check_logits,
    likelihood_from_config,
)
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture
from bnn.predictive import ClassPredictive, mixture, predict
from bnn.samplers import EpochSampler
from bnn.types import Batch, Data

LEVELS = (0.5, 0.9, 0.95)


def evaluate(
    net: FunctionalModel,
    data: Data,
    *,
    ood: Data | None = None,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    num_bins: int = 15,
    batch_size: int = 512,
    progress: bool | None = None,
) -> Report:
    """Score the posterior predictive of a bank on data that it was not fitted to.

    Classification: accuracy, NLL and Brier score of the mean predictive, its expected calibration
    error, the Gibbs NLL (mean of the samples' own), total and expected entropy, mutual information;
    with `ood`, AUROC and FPR at 95 % TPR of the predictive entropy, rows from outside being positive.
    Regression: RMSE, NLL of the exact mixture, CRPS (of normal noise), coverage of the central 50, 90 and
    95 % intervals, aleatoric and epistemic variance; all in the units that `loc` and `scale` lead to.

    Args:
        net: a module under a bank.
        data: a pair of tensors, a data set, or a loader; taken once, in its order. Loaders that draw by
            weight or with replacement are refused: they bias every figure.
        ood: out-of-distribution inputs, in the same form; their targets are not looked at.
        likelihood: what outputs mean; the one that the bank was made with by default.
        prior_shift: class shares in training and here; see `predict`.
        loc: mean that the regression targets of `data` were standardised with.
        scale: their standard deviation.
        num_bins: bins of the calibration error.
        batch_size: rows at once, where `data` is no loader.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Returns:
        A `Report`: figures with standard errors over rows, and the values of each row.

    Raises:
        DataError: targets that do not fit the task, or NaN in data or predictions.
        ConfigError: the bank names no likelihood and none is given.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()], module=module)
        >>> net = bnn.FunctionalModel(module, bank)
        >>> data = torch.zeros(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> report = evaluate(net, data, likelihood=bnn.likelihoods.Categorical())
        >>> report.metrics["accuracy"].value
        0.5
    """
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if prior_shift is not None and likelihood.task != "classification":
        raise ConfigError("prior_shift", want="none for a regression", got="some", fix="leave it out")
    began = time.perf_counter()
    rows: dict[str, list[Tensor]] = {}
    for batch in _batches(data, batch_size, "evaluate", progress):
        if likelihood.task == "classification":
            predictive = predict(net, batch.x, likelihood=likelihood, prior_shift=prior_shift)
            assert isinstance(predictive, ClassPredictive)
            y = batch.y
            if isinstance(likelihood, Bernoulli):
                check_logit(y, y)
                check_binary(y)
                y = y.flatten().long()
            check_logits(predictive.log_probs, y)
            found = _class_rows(predictive, y)
        else:
            if isinstance(likelihood, Poisson):
                check_counts(batch.y)
            mixed = mixture(net, batch.x, likelihood=likelihood, loc=loc, scale=scale)
            found = _target_rows(mixed, as_columns(batch.y).double() * scale + loc)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    seconds = time.perf_counter() - began
    if not rows:
        raise DataError("data", want="at least one row", got="none", fix="check the data set")
    kept = {name: torch.cat(values) for name, values in rows.items()}
    count = len(next(iter(kept.values())))
    report = Report(likelihood.task, {}, kept, num_rows=count, num_samples=len(net.bank), seconds=seconds)
    if likelihood.task == "classification":
        outside = None if ood is None else _entropies(net, ood, likelihood, prior_shift, batch_size, progress)
        _class_figures(report, num_bins, outside)
    else:
        if ood is not None:
            raise DataError("ood", want="none for a regression", got="some", fix="leave it out: scores are for classes")
        _target_figures(report)
    return report


def _class_rows(predictive: ClassPredictive, y: Tensor) -> dict[str, Tensor]:
    """Values of each row: what every figure is a mean, or a function, of."""
    y = y.cpu()
    metrics.check_probs(predictive.log_probs, y)
    probs, one_hot = predictive.probs, torch.nn.functional.one_hot(y, predictive.log_probs.shape[1])
    confidence, predicted = probs.max(dim=1)
    return {
        "y": y,
        "predicted": predicted,
        "confidence": confidence,
        "correct": (predicted == y).double(),
        "nll": -predictive.log_probs.gather(1, y.unsqueeze(1)).squeeze(1),
        "gibbs_nll": -predictive.expected_log_prob.gather(1, y.unsqueeze(1)).squeeze(1),
        "brier": (probs - one_hot).square().sum(dim=1),
        "total_entropy": predictive.entropy,
        "expected_entropy": predictive.expected_entropy,
        "mutual_information": predictive.mutual_information,
    }


def _class_figures(report: Report, num_bins: int, outside: Tensor | None) -> None:
    rows = report.rows
    report.add_mean("accuracy", rows["correct"], "share of rows whose most probable class is the true one")
    report.add_mean("nll", rows["nll"], "-mean log of the mean predictive at the true class, nats")
    report.add_mean("gibbs_nll", rows["gibbs_nll"], "mean over samples of their own NLL, nats")
    report.add_mean("brier", rows["brier"], "mean of sum_c (p_c - 1[y = c])^2, in [0, 2]")
    bins = metrics.calibration_bins(rows["confidence"], rows["correct"], num_bins=num_bins)
    report.bins = bins
    report.add(
        "ece", float(metrics.ece(bins)), f"expected calibration error, {num_bins} equal bins (a, b], first closed"
    )
    report.add_mean("total_entropy", rows["total_entropy"], "entropy of the mean predictive, nats")
    report.add_mean("expected_entropy", rows["expected_entropy"], "mean entropy of the samples (aleatoric), nats")
    report.add_mean("mutual_information", rows["mutual_information"], "total minus expected entropy (epistemic), nats")
    if outside is not None:
        report.ood_entropy = outside
        inside = rows["total_entropy"]
        report.add(
            "ood_auroc",
            metrics.auroc(inside, outside),
            f"AUROC of predictive entropy, {len(outside)} rows outside positive",
        )
        report.add(
            "ood_fpr95", metrics.fpr_at_tpr(inside, outside), "false positive rate at the first TPR >= 0.95, same score"
        )


def _target_rows(predictive: Mixture, y: Tensor) -> dict[str, Tensor]:
    y, mean = y.cpu(), predictive.mean
    if y.shape != mean.shape:
        raise DataError(
            "data",
            want=f"targets {list(mean.shape)}, as the module's outputs",
            got=str(list(y.shape)),
            fix="give the module one output a target",
        )
    pit = predictive.cdf(y)
    rows = {
        "y": y,
        "mean": mean,
        "squared_error": (y - mean).square(),
        "nll": -predictive.log_prob(y),
        "pit": pit,
        "pit_below": predictive.cdf(y - 1) if isinstance(predictive, PoissonMixture) else pit,  # P(Y < y)
        "aleatoric_variance": predictive.aleatoric,
        "epistemic_variance": predictive.epistemic,
    }
    if isinstance(predictive, NormalMixture):
        rows["crps"] = metrics.mixture_crps(predictive.means, predictive.scales, y, predictive.log_weight)
    return rows


def _target_figures(report: Report) -> None:
    rows = report.rows
    squared = rows["squared_error"].flatten(1).mean(dim=1)
    root = float(squared.mean().sqrt())
    # The error of a square root by the delta method: d sqrt(m) = dm / (2 sqrt(m)).
    error = float(squared.std() / len(squared) ** 0.5 / (2 * root)) if len(squared) > 1 and root > 0 else None
    report.add("rmse", root, "root mean squared error of the predictive mean, target units", error)
    report.add_mean("nll", rows["nll"], "-mean log density of the mixture over samples, nats, target units")
    if "crps" in rows:
        report.add_mean(
            "crps", rows["crps"].mean(dim=1), "continuous ranked probability score of the mixture, target units"
        )
    for level in LEVELS:
        tail = 0.5 - 0.5 * level
        inside = ((rows["pit"] >= tail) & (rows["pit_below"] <= 1.0 - tail)).double().mean(dim=1)
        report.add_mean(f"coverage_{level * 100:.0f}", inside, f"share of targets in the central {level:.0%} interval")
    for part in ("aleatoric", "epistemic"):
        values = rows[f"{part}_variance"].mean(dim=1)
        report.add_mean(
            f"{part}_variance", values, f"mean {part} part of the predictive variance, squared target units"
        )


def _entropies(
    net: FunctionalModel,
    ood: Data,
    likelihood: Likelihood,
    prior_shift: tuple[Any, Any] | None,
    batch_size: int,
    progress: bool | None,
) -> Tensor:
    found = []
    for batch in _batches(ood, batch_size, "ood", progress, targets=False):
        predictive = predict(net, batch.x, likelihood=likelihood, prior_shift=prior_shift)
        assert isinstance(predictive, ClassPredictive)
        found.append(predictive.entropy)
    return torch.cat(found)


def _batches(
    data: Data, batch_size: int, title: str, progress: bool | None, *, targets: bool = True
) -> Iterator[Batch]:
    """The data once, in order; without targets where those are not to be looked at."""
    if batch_size < 1:
        raise ConfigError("batch_size", want="at least 1", got=str(batch_size), fix="raise it")
    disable = None if progress is None else not progress
    with tqdm(total=num_rows(data), desc=title, unit="row", delay=1.0, disable=disable) as bar:
        for batch in _in_order(data, batch_size, targets):
            yield batch
            bar.update(len(batch.y))


def _check_order(loader: DataLoader[Any]) -> None:
    """Raise DataError for a loader that does not take rows alike: its figures would be of other data."""
    repeats = any(
        (isinstance(sampler, RandomSampler) and sampler.replacement)
        or (isinstance(sampler, EpochSampler) and not sampler.each_once)
        for sampler in samplers_of(loader)
    )
    if repeats or reweights(loader):
        raise DataError(
            "evaluate",
            want="rows in their natural order, each once",
            got="a loader that draws them by weight or with replacement",
            fix="pass the data set itself; probabilities after balanced training are corrected by prior_shift=",
        )


def _in_order(data: Data, batch_size: int, targets: bool) -> Iterator[Batch]:
    def batch_of(x: Any, y: Tensor) -> Batch:
        return full_batch((x, y if targets else torch.zeros(len(y))))

    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader):
        _check_order(data)
        for part in parts_of(data, 0, "evaluate"):
            yield batch_of(*part)
        return
    if not isinstance(data, (tuple, list)):
        raise DataError(
            "evaluate",
            want="a pair of tensors, a data set or a DataLoader",
            got=f"a {type(data).__name__}",
            fix="pass the data set itself",
        )
    whole = batch_of(*data[:2])
    for start in range(0, len(whole.y), batch_size):
        here = slice(start, start + batch_size)
        yield Batch(pytree.tree_map(lambda leaf: leaf[here], whole.x), whole.y[here])  # noqa: B023
