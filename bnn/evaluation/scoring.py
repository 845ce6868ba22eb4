"""Metrics of a posterior predictive on held-out data: streamed over samples, batch after batch of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from bnn import metrics
from bnn.bank import Bank
from bnn.batches import full_batch, num_rows, parts_of, reweights, samplers_of
from bnn.errors import ConfigError, DataError, choose
from bnn.evaluation import curves
from bnn.evaluation.class_figures import ClassCollector, add_outside, scores_of
from bnn.evaluation.class_sums import ClassSums
from bnn.evaluation.convergence import examine
from bnn.evaluation.report import Report
from bnn.evaluation.target_figures import LEVEL, TargetCollector
from bnn.evaluation.target_sums import TargetSums
from bnn.evaluation.views import Views, views_of
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
from bnn.predictive import class_logits, joined, mixtures
from bnn.samplers import EpochSampler
from bnn.types import Batch, Data

Figures: TypeAlias = Literal["all", "basic"]
FIGURES = ("all", "basic")

PROBES = 64  # rows on which chains are judged
LEAST_PROBES = 8
JUDGED_VALUES = 2**21  # outputs of all samples that are judged
VIEW_VALUES = 2**17  # numbers of all views handled at once
SHIFTED = {
    "classification": ("accuracy", "nll", "ece", "predictive_entropy"),
    "regression": ("rmse", "nll", "coverage_90"),
}


_Shape: TypeAlias = tuple[tuple[int, ...], ...]  # of the rows of each input


class _Task(NamedTuple):
    """What is evaluated, and how."""

    net: FunctionalModel
    likelihood: Likelihood
    prior_shift: tuple[Any, Any] | None
    loc: float | Tensor
    scale: float | Tensor
    num_bins: int
    batch_size: int
    progress: bool | None


def evaluate(
    net: FunctionalModel,
    data: Data,
    *,
    ood: Data | None = None,
    shifts: Mapping[str, Mapping[int, Data]] | None = None,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    num_bins: int = 15,
    figures: Figures = "all",
    batch_size: int = 512,
    progress: bool | None = None,
) -> Report:
    """Score the posterior predictive of a bank on data that it was not fitted to.

    Samples are streamed: memory does not grow with S, but for the mixtures of one batch of a regression. Every figure has
    its standard error over rows, and its Monte Carlo error over samples: runs of draws of the chains are left out, one
    after the other, and the whole figure made anew (`Views.jackknife`). The page of definitions has the equations.

    Classification: accuracy, NLL and Brier score of the mean predictive, Gibbs NLL, calibration errors (ECE, RMSCE, MCE,
    adaptive, class-wise), predictive and expected entropy, mutual information, variation ratio, disagreement, and risk
    against coverage; with `ood`, AUROC, both AUPRs and FPR at 95 % TPR of four scores, rows from outside being positive.
    Regression: RMSE, MAE, NLL of the exact mixture, CRPS (of normal noise), interval and pinball scores, coverage and
    width, sharpness, aleatoric and epistemic variance; all in the units that `loc` and `scale` lead to.
    Banks of Markov chains are judged on probe rows of the data as `diagnose` does: where chains disagree, the headline of
    the report begins with it.

    Args:
        net: a module under a bank.
        data: a pair of tensors, a data set, or a loader; taken once, in its order. Loaders that draw by
            weight or with replacement are refused: they bias every figure.
        ood: out-of-distribution inputs, in the same form; their targets are not looked at.
        shifts: by name of a corruption, data by severity from 1 on: main figures of each are put beside those of
            `data`, which is severity 0.
        likelihood: what outputs mean; the one that the bank was made with by default.
        prior_shift: class shares in training and here; see `predict`.
        loc: mean that the regression targets of `data` were standardised with.
        scale: their standard deviation.
        num_bins: bins of the calibration errors.
        figures: "all", or "basic" for accuracy, NLL, Brier score, ECE and entropies, or RMSE, MAE, NLL, coverage and
            variances, without curves and without judging chains.
        batch_size: rows at once, where `data` is no loader.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Returns:
        A `Report`: figures with both errors, curves, and the values of each row.

    Raises:
        DataError: targets that do not fit the task, NaN in data or predictions (the sample is named), no rows, or rows
            outside or shifted of another shape.
        ConfigError: the bank names no likelihood and none is given; an option out of range.

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
    choose("figures", figures, FIGURES)
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if num_bins < 1:
        raise ConfigError("num_bins", want="at least 1", got=str(num_bins), fix="pass 15")
    if likelihood.task == "regression":
        if prior_shift is not None:
            raise ConfigError("prior_shift", want="none for a regression", got="some", fix="leave it out")
        if ood is not None:
            raise DataError("ood", want="none for a regression", got="some", fix="leave it out: scores are for classes")
    if not len(net.bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    began, whole = time.perf_counter(), figures == "all"
    task = _Task(net, likelihood, prior_shift, loc, scale, num_bins, batch_size, progress)
    views = views_of(net.bank, beginnings=whole)
    probes = _Probes(num_rows(data), net) if whole else None
    collector, like = _collect(task, data, views, "data", whole=whole, ranked=ood is not None, probes=probes)
    report = Report(
        likelihood.task, collector.count, len(net.bank), len(net.bank.chain.unique()), time.perf_counter() - began
    )
    collector.report(report)
    if isinstance(collector, ClassCollector):
        outside = None if ood is None else _outside(task, ood, views, like)
        _add_class_curves(report, collector, outside, whole)
    elif whole:
        _add_target_curves(report)
    if probes is not None:
        report.curves["samples"] = curves.samples(report, views, collector.beginnings())
        _add_chains(report, task, probes)
    for name, severities in (shifts or {}).items():
        report.curves.setdefault("shift", {})[name] = _shift(task, name, severities, report, like)
    return report


def _collect(
    task: _Task,
    data: Data,
    views: Views,
    title: str,
    *,
    whole: bool,
    ranked: bool = False,
    probes: _Probes | None = None,
    like: _Shape | None = None,
) -> tuple[ClassCollector | TargetCollector, _Shape]:
    """All batches of a data set, streamed over the samples of the bank, and the shape of its rows."""
    collector: ClassCollector | TargetCollector
    if task.likelihood.task == "classification":
        collector = ClassCollector(views, num_bins=task.num_bins, whole=whole, ranked=whole or ranked)
    else:
        collector = TargetCollector(views, whole=whole)
    for batch in _batches(data, task.batch_size, title, task.progress):
        like = _checked_shape(title, batch.x, like)
        if isinstance(collector, ClassCollector):
            y = _classes_of(batch.y, task.likelihood)
            sums = ClassSums(views, y, whole=whole)
            for indices, logits in class_logits(
                task.net, batch.x, likelihood=task.likelihood, prior_shift=task.prior_shift
            ):
                if not sums.started:
                    check_logits(logits[0], y)
                    metrics.check_probs(logits[0].cpu(), y.cpu())
                sums.add(indices, logits)
            for part in sums.parts(VIEW_VALUES):
                collector.add(sums.rows(part), y[part].cpu())
        else:
            _add_targets(task, batch, views, collector)
        if probes is not None:
            probes.add(batch)
    if not collector.count:
        raise DataError(title, want="at least one row", got="none", fix="check the data set")
    assert like is not None
    return collector, like


def _classes_of(y: Tensor, likelihood: Likelihood) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        check_logit(y, y)
        check_binary(y)
        return y.flatten().long()
    return y


def _add_targets(task: _Task, batch: Batch, views: Views, collector: TargetCollector) -> None:
    if isinstance(task.likelihood, Poisson):
        check_counts(batch.y)
    y = as_columns(batch.y).double().cpu() * task.scale + task.loc
    sums, kept = TargetSums(views, y), []
    for indices, part in mixtures(task.net, batch.x, likelihood=task.likelihood, loc=task.loc, scale=task.scale):
        if y.shape != part.centres.shape[1:]:
            raise DataError(
                "data",
                want=f"targets {list(part.centres.shape[1:])}, as the module's outputs",
                got=str(list(y.shape)),
                fix="give the module one output a target",
            )
        sums.add(indices, part)
        kept += [part] if collector.whole else []
    mixture = joined(kept, task.net.bank.log_weight.double()) if kept else None
    collector.add(sums.rows(), y, mixture)


def _outside(task: _Task, ood: Data, views: Views, like: _Shape) -> dict[str, Tensor]:
    """Scores [1 + G, M] of rows outside, whose targets are not looked at."""
    found: dict[str, list[Tensor]] = {}
    for batch in _batches(ood, task.batch_size, "ood", task.progress, targets=False):
        _checked_shape("ood", batch.x, like)
        sums = ClassSums(views, None, whole=False)
        for indices, logits in class_logits(
            task.net, batch.x, likelihood=task.likelihood, prior_shift=task.prior_shift
        ):
            sums.add(indices, logits)
        for part in sums.parts(VIEW_VALUES):
            for name, values in scores_of(sums.rows(part)).items():
                found.setdefault(name, []).append(values[: views.left_out.stop].cpu().clone())
    if not found:
        raise DataError("ood", want="at least one row", got="none", fix="check the data set")
    return {name: torch.cat(parts, dim=1) for name, parts in found.items()}


def _add_class_curves(
    report: Report, collector: ClassCollector, outside: dict[str, Tensor] | None, whole: bool
) -> None:
    report.curves["reliability"] = curves.reliability(collector.bins())
    inside = collector.scores()
    if outside is not None:
        assert collector.weight is not None
        report.outside = {name: values[0] for name, values in outside.items()}
        add_outside(report, collector.views, collector.weight, inside, outside)
    if not whole:
        return
    own = {name: values[0] for name, values in inside.items()}
    report.curves["risk_coverage"] = curves.risk_against_coverage(
        own["one_minus_max_prob"], 1.0 - report.rows["correct"]
    )
    report.curves["scores"] = curves.scores(own, report.outside or None)
    report.curves["entropy_split"] = curves.entropy_split(own["expected_entropy"], own["mutual_information"])


def _add_target_curves(report: Report) -> None:
    rows = report.rows
    columns = (rows[name][:, 0] for name in ("y", "mean", "lower", "upper"))
    report.curves["band"] = curves.band(*columns, level=LEVEL)
    report.curves["pit"] = curves.pit(rows["pit_below"], rows["pit"])
    report.curves["calibration"] = curves.calibration(rows["pit_below"], rows["pit"])


class _Probes:
    """Rows of the data, evenly spread, on which chains are judged; as many as the number of samples leaves room for."""

    def __init__(self, size: int, net: FunctionalModel) -> None:
        most = max(LEAST_PROBES, min(PROBES, JUDGED_VALUES // (16 * len(net.bank))))
        self._wanted = torch.linspace(0, max(size - 1, 0), min(most, max(size, 1)), dtype=torch.float64).round().long()
        self._seen = 0
        self._kept: list[Any] = []

    def add(self, batch: Batch) -> None:
        here = self._wanted[(self._wanted >= self._seen) & (self._wanted < self._seen + len(batch.y))] - self._seen
        if len(here):
            self._kept.append(pytree.tree_map(lambda leaf: leaf[here.to(leaf.device)], batch.x))
        self._seen += len(batch.y)

    def x(self) -> Any:
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *self._kept)


def _add_chains(report: Report, task: _Task, probes: _Probes) -> None:
    """R-hat and ESS of the predictions, where samples are steps of chains, and the verdict on those."""
    bank, found = task.net.bank, None
    if isinstance(bank, Bank):
        found = examine(
            bank, net=task.net, x=probes.x(), likelihood=task.likelihood, num_parameters=0, progress=task.progress
        )
        report.diagnosis = found.diagnosis
    worst = None if found is None else found.diagnosis.predictions
    if found is None or worst is None or found.figures is None:
        why = "no bank whose chains are known" if found is None else found.diagnosis.text
        for name in ("rhat", "ess"):
            report.add(name, math.nan, n=0, note=why)
        return
    for name, value, figures in (("rhat", worst.rhat, found.figures[0]), ("ess", worst.ess_bulk, found.figures[1])):
        note = f"the worst of {worst.num} outputs" + (f": {worst.worst}" if name == "rhat" else "")
        report.add(name, value, n=worst.num, note=note if math.isfinite(value) else f"infinite: {note}")
        if bool(figures.isfinite().any()):
            report.curves[name] = curves.mixing(figures, logarithmic=name == "ess")


def _shift(task: _Task, name: str, severities: Mapping[int, Data], report: Report, like: _Shape) -> dict[str, Any]:
    """Main figures at each severity, the clean data first."""
    names = SHIFTED[report.task]
    found: dict[str, list[float | None]] = {key: [report.metrics[key].value] for key in names}
    views, levels = views_of(task.net.bank, errors=False, beginnings=False), sorted(severities)
    if any(level < 1 for level in levels):
        raise ConfigError(
            f"shifts[{name!r}]", want="severities from 1 on", got=str(levels), fix="the data are severity 0"
        )
    for level in levels:
        collector, _ = _collect(task, severities[level], views, f"{name} {level}", whole=False, like=like)
        one = Report(report.task, collector.count, report.num_samples, report.num_chains, 0.0)
        collector.report(one)
        for key in names:
            found[key].append(one.metrics[key].value)
    return {"severity": [0, *levels], "metrics": found}


def _checked_shape(place: str, x: Any, like: _Shape | None) -> _Shape:
    """Shapes of one row of each input; DataError where those of the data before were others."""
    found = tuple(tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor))
    if like is not None and found != like:
        want, got = (", ".join(str(list(shape)) for shape in shapes) for shapes in (like, found))
        raise DataError(place, want=f"rows of shape {want}", got=got, fix="choose data of the same shape")
    return found


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
