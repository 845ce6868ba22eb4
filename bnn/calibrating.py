"""Calibrate the predictive of a bank on held-out rows, and judge what came of it on others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.errors import DataError, choose
from bnn.evaluation.batches import batches
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
from bnn.posthoc import Calibration, Estimate, conformal, fit_temperature, temper
from bnn.posthoc.calibration import as_shares, quantiles_of
from bnn.posthoc.temperature import nll_of_rows
from bnn.predictive import BATCH_SIZE, ClassPredictive, TargetPredictive, predict
from bnn.types import Data


class Judged(NamedTuple):
    """A calibrated predictive on rows that had no say in it, each figure with its standard error over rows."""

    num_rows: int
    coverage: Estimate  # share of rows whose set, or of targets whose interval, holds the truth
    size: Estimate  # classes in a set, or width of an interval in units of the target
    uncalibrated_coverage: Estimate | None  # of a regression: the predictive's own central intervals
    uncalibrated_size: Estimate | None
    before: Estimate | None  # of classes: NLL of the mixture, in nats
    after: Estimate | None  # of classes: NLL of the tempered predictive


def calibrate(
    net: FunctionalModel,
    data: Data,
    *,
    level: float = 0.9,
    score: conformal.SetScore = "lac",
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool | None = None,
) -> Calibration:
    """Fit a temperature and conformal sets, or conformal intervals, to rows that were held out.

    Of classes: the temperature T of least NLL, p_T proportional to p^(1 / T) with p the mean predictive
    (`posthoc.fit_temperature`), and the limit of the scores that a set of classes holds (`posthoc.set_threshold`). Scores are of
    p and not of p_T, for T was chosen by the same rows, and would make their scores smaller than those of new rows.
    Of targets: by how much the predictive's central interval of this level is widened or narrowed, each output for
    itself (`posthoc.interval_margins`), in the units of `data`.

    Sets and intervals hold the truth of a new row with probability `level` at least, over held-out rows and new
    rows that are exchangeable: rows of one population, none of which the bank was fitted to, nor anybody chose a bank
    by. See `posthoc.conformal` for what that does not promise.

    Args:
        net: a module under a bank.
        data: held-out rows, as for `evaluate`: a pair of tensors, a data set or a loader, which is taken once. Targets of a
            regression are in the units that the bank was fitted in; `predict(..., loc=, scale=)` changes them afterwards.
        level: share of new rows that a set or interval is to hold, in (0, 1).
        score: of a set of classes, `"lac"`, which makes small ones, or `"aps"`, which makes larger ones where a row is hard.
        likelihood: what outputs mean; the one that the bank was made with by default.
        prior_shift: as for `predict`; predictions must then be made with the same.
        batch_size: rows at once, where `data` is no loader.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Returns:
        A `Calibration`; `save(bank)` keeps it beside the bank.

    Raises:
        DataError: fewer rows than the level needs, ceil(level / (1 - level)); or rows that do not fit the likelihood.
        ConfigError: a level outside (0, 1), another score, or nobody names a likelihood.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()], module=module)
        >>> net, random = bnn.FunctionalModel(module, bank), torch.Generator().manual_seed(0)
        >>> data = torch.randn(40, 3, generator=random), torch.randint(2, (40,), generator=random)
        >>> found = calibrate(net, data, level=0.8, likelihood=bnn.likelihoods.Categorical())
        >>> found.after.value <= found.before.value
        True
        >>> predict(net, data[0], likelihood=bnn.likelihoods.Categorical(), calibration=found).calibrated.sets.shape
        torch.Size([40, 2])

    Source: Guo et al. (2017), arXiv:1706.04599; Angelopoulos and Bates (2021), arXiv:2107.07511.
    """
    level = conformal.check_level(level)
    choose("score", score, tuple(conformal.SCORES))
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    first: list[Tensor] = []  # log probabilities, or lower ends
    second: list[Tensor] = []  # upper ends
    truth: list[Tensor] = []
    levels: tuple[float, ...] = () if likelihood.task == "classification" else quantiles_of(level)
    for batch in batches(data, batch_size, "calibrate", progress):
        found = predict(net, batch.x, likelihood=likelihood, prior_shift=prior_shift, quantiles=levels)
        if isinstance(found, ClassPredictive):
            first.append(found.log_probs)
            truth.append(_classes(batch.y, likelihood, found.log_probs))
        else:
            first.append(found.quantiles[levels[0]])
            second.append(found.quantiles[levels[1]])
            truth.append(_targets(batch.y, likelihood, found))
    y, config, about = torch.cat(truth), likelihood.to_config(), net.bank.digest
    conformal.rank(len(y), level)  # before anything is fitted
    if second:
        margins = conformal.interval_margins(torch.cat(first), torch.cat(second), y, level=level)
        return Calibration(about, config, len(y), level, margins=tuple(margins.tolist()))
    log_probs = torch.cat(first)
    temperature = fit_temperature(log_probs, y)
    return Calibration(
        about,
        config,
        len(y),
        level,
        temperature=temperature,
        before=Estimate.of(nll_of_rows(log_probs, y)),
        after=Estimate.of(nll_of_rows(temper(log_probs, temperature), y)),
        score=score,
        limit=conformal.set_threshold(log_probs.exp(), y, level=level, score=score),
        prior_shift=as_shares(prior_shift),
    )


def judge(
    net: FunctionalModel,
    data: Data,
    calibration: Calibration,
    *,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    batch_size: int = BATCH_SIZE,
    progress: bool | None = None,
) -> Judged:
    """What a calibration is worth on rows that had no say in it.

    Args:
        net: the module under the bank that was calibrated.
        data: rows that were neither trained nor calibrated on, as for `calibrate`.
        calibration: of `calibrate`.
        likelihood: as for `calibrate`.
        prior_shift: as for `calibrate`.
        loc: mean that the regression targets of `data` were standardised with.
        scale: their standard deviation: widths are in the target's own units.
        batch_size: rows at once, where `data` is no loader.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Raises:
        BankMismatch: the calibration is of other samples.
        DataError: rows that do not fit the likelihood.
    """
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    rows: dict[str, list[Tensor]] = {}
    levels = calibration.quantiles
    for batch in batches(data, batch_size, "judge", progress):
        found = predict(
            net, batch.x, likelihood=likelihood, prior_shift=prior_shift, loc=loc, scale=scale, quantiles=levels,
            calibration=calibration,
        )  # fmt: skip
        if isinstance(found, ClassPredictive):
            assert found.calibrated is not None
            assert calibration.temperature is not None
            y, sets = _classes(batch.y, likelihood, found.log_probs), found.calibrated.sets
            # p is p_T with the temperature 1 / T: no second forward.
            before = nll_of_rows(temper(found.log_probs, 1.0 / calibration.temperature), y)
            values = {
                "coverage": sets.gather(1, y.unsqueeze(1)).squeeze(1).double(),
                "size": sets.sum(dim=1).double(),
                "before": before,
                "after": nll_of_rows(found.log_probs, y),
            }
        else:
            assert found.calibrated is not None
            y = _targets(batch.y, likelihood, found) * scale + loc
            plain = conformal.Interval(found.quantiles[levels[0]], found.quantiles[levels[1]])
            values = {}
            for name, interval in (("", found.calibrated), ("uncalibrated_", plain)):
                inside = (interval.lower <= y) & (y <= interval.upper)
                values[f"{name}coverage"] = inside.double().mean(dim=1)  # over outputs
                values[f"{name}size"] = (interval.upper - interval.lower).mean(dim=1)
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    figures = {name: Estimate.of(torch.cat(parts)) for name, parts in rows.items()}
    count = sum(len(part) for part in rows["coverage"])
    missing = dict.fromkeys(name for name in Judged._fields[1:] if name not in figures)
    return Judged(count, **figures, **missing)  # type: ignore[arg-type]


def _classes(y: Tensor, likelihood: Likelihood, log_probs: Tensor) -> Tensor:
    if isinstance(likelihood, Bernoulli):
        check_logit(y, y)
        check_binary(y)
        y = y.flatten().long()
    check_logits(log_probs, y)
    return y.cpu()


def _targets(y: Tensor, likelihood: Likelihood, found: TargetPredictive) -> Tensor:
    if isinstance(likelihood, Poisson):
        check_counts(y)
    columns = as_columns(y).double().cpu()
    if columns.shape != found.mean.shape:
        raise DataError(
            "data",
            want=f"targets {list(found.mean.shape)}, as the module's outputs",
            got=str(list(columns.shape)),
            fix="give the module one output a target",
        )
    return columns
