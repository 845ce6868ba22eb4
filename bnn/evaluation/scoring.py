"""Metrics of a posterior predictive on held-out data: streamed over samples, batch after batch of rows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from bnn import metrics
from bnn.bank import Bank
from bnn.batches import num_rows
from bnn.distributed import ranks
from bnn.errors import ConfigError, DataError, choose
from bnn.evaluation import curves
from bnn.evaluation.batches import Part, Probes, Shape, checked_shape, disabled, parts_in_order, same_shape
from bnn.evaluation.class_figures import ClassCollector, add_outside, named, scores_of
from bnn.evaluation.class_sums import ClassSums
from bnn.evaluation.convergence import examine
from bnn.evaluation.mesh import Mesh, check_ranks, merged, mesh_of, mixture_of, mixture_state
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
from bnn.turns import by_all, in_turn
from bnn.types import Batch, Data

Figures: TypeAlias = Literal["all", "basic"]
FIGURES = ("all", "basic")

VIEW_VALUES = 2**17  # numbers of all views handled at once
SHIFTED = {
    "classification": ("accuracy", "nll", "ece", "predictive_entropy"),
    "regression": ("rmse", "nll", "coverage_90"),
}


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
    numbers: Iterator[int]  # of batches, for layers that draw
    mesh: Mesh


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
    mesh: tuple[int, int] | None = None,
    progress: bool | None = None,
) -> Report:
    """Score the posterior predictive of a bank on data that it was not fitted to.

    Samples are streamed: memory does not grow with S, but for the mixtures of one batch of a regression. Every figure has
    its standard error over rows, and its Monte Carlo error over samples: the whole figure is made anew from halves of the
    runs of draws of the chains (`Views.monte_carlo_error`). The page of definitions has the equations.

    Classification: accuracy, NLL and Brier score of the mean predictive, Gibbs NLL, calibration errors (ECE, RMSCE, MCE,
    adaptive, class-wise), predictive and expected entropy, mutual information, variation ratio, disagreement, and risk
    against coverage; with `ood`, AUROC, both AUPRs and FPR at 95 % TPR of four scores, rows from outside being positive.
    Regression: RMSE, MAE, NLL of the exact mixture, CRPS (of normal noise), interval and pinball scores, coverage and
    width, sharpness, aleatoric and epistemic variance; all in the units that `loc` and `scale` lead to.
    Banks of Markov chains are judged on probe rows of the data as `diagnose` does: where chains disagree, the headline of
    the report begins with it.

    **On several ranks**, inside `bnn.distributed.joined()`, every rank calls `evaluate` with the same arguments, and has the same
    report: ranks take the batches in turn, and what each batch says is added up in the order of the data, so that
    figures are those of one process to the last bit. With a mesh each batch is shared by ranks that take a part of the
    samples each, whose sums are merged; that changes figures in their last bits.

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
        mesh: on several ranks, (data, samples): how many rows of ranks take batches in turn, and how many ranks of a row share
            the samples; by default all ranks take batches.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Returns:
        A `Report`: figures with both errors, curves, and the values of each row.

    Raises:
        DataError: targets that do not fit the task, NaN in data or predictions (the sample is named), no rows, or rows
            outside or shifted of another shape.
        ConfigError: the bank names no likelihood and none is given; an option out of range; a mesh of another number of
            ranks, or ranks that differ in versions, bank, module, data or options.
        RankLost: another rank ended, or was silent for longer than the timeout.

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
    together = ranks()
    place = mesh_of(mesh, together, len(net.bank))
    if together.several:
        given: dict[str, Data | None] = {"rows": data, "ood": ood}
        given |= {f"{name} {level}": one for name, levels in (shifts or {}).items() for level, one in levels.items()}
        options: dict[str, Any] = {
            "prior_shift": prior_shift,
            "loc": loc,
            "scale": scale,
            "num_bins": num_bins,
            "figures": figures,
        }
        options |= {"batch_size": batch_size, "mesh": mesh, "likelihood": likelihood.to_config()}
        check_ranks(net, given, options, together)
    task = _Task(net, likelihood, prior_shift, loc, scale, num_bins, batch_size, progress, count(), place)
    views = views_of(net.bank, beginnings=whole)
    probes = Probes(num_rows(data), net, several=task.mesh.several) if whole else None
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
    probes: Probes | None = None,
    like: Shape | None = None,
) -> tuple[ClassCollector | TargetCollector, Shape]:
    """All batches of a data set, streamed over the samples of the bank, and the shape of its rows."""
    collector: ClassCollector | TargetCollector
    if task.likelihood.task == "classification":
        collector = ClassCollector(views, num_bins=task.num_bins, whole=whole, ranked=whole or ranked)
    else:
        collector = TargetCollector(views, whole=whole)

    def judged(part: Part) -> dict[str, Any]:
        batch, one = part.take(), collector.fresh()
        shape = checked_shape(title, batch.x, like)
        if isinstance(one, ClassCollector):
            _add_classes(task, part, batch, one)
        else:
            _add_targets(task, part, batch, one)
        return {**one.state(), "shape": shape, **({} if probes is None else probes.of(part, batch))}

    for state in _said(task, data, title, judged):
        like = same_shape(title, state["shape"], like)
        collector.merge(state)
        if probes is not None:
            probes.add(state)
    if not collector.count:
        raise DataError(title, want="at least one row", got="none", fix="check the data set")
    assert like is not None
    return collector, like


def _said(
    task: _Task, data: Data, title: str, judge: Callable[[Part], dict[str, Any]], *, targets: bool = True
) -> Iterator[dict[str, Any]]:
    """What is found in each batch, in their order, whichever rank found it, with a bar."""
    mesh = task.mesh
    parts = parts_in_order(data, task.batch_size, task.numbers, targets=targets, several=mesh.several)
    disable = disabled(task.progress) if mesh.shown else True
    with tqdm(total=num_rows(data), desc=title, unit="row", delay=1.0, disable=disable) as bar:
        for state in in_turn(parts, judge, mesh.column, mesh.row):
            yield dict(state)
            bar.update(state["count"])


def _class_sums(task: _Task, part: Part, x: Any, sums: ClassSums) -> ClassSums:
    """Sums over all samples of one batch, each rank of a row adding those of its own."""

    def own() -> dict[str, Tensor]:
        for indices, logits in class_logits(
            task.net, x, likelihood=task.likelihood, prior_shift=task.prior_shift, batch=part.number, samples=task.mesh.samples
        ):  # fmt: skip
            if not sums.started and sums.y is not None:
                check_logits(logits[0], sums.y)
                metrics.check_probs(logits[0].cpu(), sums.y.cpu())
            sums.add(indices, logits)
        return sums.state() if task.mesh.row.several else {}

    states = by_all(own, task.mesh.row)
    return merged(sums, states) if task.mesh.row.several else sums


def _add_classes(task: _Task, part: Part, batch: Batch, collector: ClassCollector) -> None:
    y = _classes_of(batch.y, task.likelihood)
    sums = _class_sums(task, part, batch.x, ClassSums(collector.views, y, whole=collector.whole))
    for rows in sums.parts(VIEW_VALUES):
        collector.add(sums.rows(rows), y[rows].cpu())


def _classes_of(y: Tensor, likelihood: Likelihood) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        check_logit(y, y)
        check_binary(y)
        return y.flatten().long()
    return y


def _add_targets(task: _Task, part: Part, batch: Batch, collector: TargetCollector) -> None:
    if isinstance(task.likelihood, Poisson):
        check_counts(batch.y)
    y = as_columns(batch.y).double().cpu() * task.scale + task.loc
    sums, kept, row = TargetSums(collector.views, y), [], task.mesh.row
    log_weight = task.net.bank.log_weight.double()

    def own() -> dict[str, Any]:
        for indices, some in mixtures(
            task.net, batch.x, likelihood=task.likelihood, loc=task.loc, scale=task.scale, batch=part.number,
            samples=task.mesh.samples,
        ):  # fmt: skip
            if y.shape != some.centres.shape[1:]:
                raise DataError(
                    "data",
                    want=f"targets {list(some.centres.shape[1:])}, as the module's outputs",
                    got=str(list(y.shape)),
                    fix="give the module one output a target",
                )
            sums.add(indices, some)
            kept.extend([some] if collector.whole else [])
        if not row.several:
            return {}
        return {
            **sums.state(),
            **(mixture_state(joined(kept, log_weight[list(task.mesh.samples or ())])) if kept else {}),
        }

    states = by_all(own, row)
    whole = merged(sums, states) if row.several else sums
    if row.several:
        kept = [found for state in states if (found := mixture_of(state)) is not None]
    collector.add(whole.rows(), y, joined(kept, log_weight) if kept else None)


def _outside(task: _Task, ood: Data, views: Views, like: Shape) -> dict[str, Tensor]:
    """Scores [1 + H, M] of rows outside, whose targets are not looked at."""
    found: dict[str, list[Tensor]] = {}

    def judged(part: Part) -> dict[str, Any]:
        batch = part.take()
        checked_shape("ood", batch.x, like)
        sums = _class_sums(task, part, batch.x, ClassSums(views, None, whole=False))
        own: dict[str, list[Tensor]] = {}
        for rows in sums.parts(VIEW_VALUES):
            for name, values in scores_of(sums.rows(rows)).items():
                own.setdefault(name, []).append(values[: views.left_out.stop].cpu().clone())
        return {**{f"kept.{n}": torch.cat(values, dim=1) for n, values in own.items()}, "count": len(batch.y)}

    for state in _said(task, ood, "ood", judged, targets=False):
        for name, values in named(state, "kept").items():
            found.setdefault(name, []).append(values)
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


def _add_chains(report: Report, task: _Task, probes: Probes) -> None:
    """R-hat and ESS of the predictions, where samples are steps of chains, and the verdict on those."""
    bank, found = task.net.bank, None
    if isinstance(bank, Bank):
        found = examine(
            bank,
            net=task.net,
            x=probes.x(),
            likelihood=task.likelihood,
            num_parameters=0,
            progress=task.progress if task.mesh.shown else False,
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


def _shift(task: _Task, name: str, severities: Mapping[int, Data], report: Report, like: Shape) -> dict[str, Any]:
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
