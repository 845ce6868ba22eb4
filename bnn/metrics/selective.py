"""Selective prediction: what is lost on the rows that are kept, where the least sure ones are refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.metrics.checking import check_rows


class RiskCoverage(NamedTuple):
    """Loss against coverage, at each of the T distinct uncertainties, from the surest rows to all of them."""

    coverage: Tensor  # [T] share of rows kept, those of at most the threshold; the last is 1
    risk: Tensor  # [T] mean loss of the rows kept
    generalised_risk: Tensor  # [T] their loss over the number of all rows: risk times coverage
    threshold: Tensor  # [T] increasing


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    """The curve of risk against coverage; rows of one uncertainty are kept or refused together.

    coverage(t) = mean_n 1[u_n <= t];  generalised risk(t) = mean_n loss_n 1[u_n <= t];  risk = their ratio

    Args:
        uncertainty: u [N], larger where less sure: a confidence must be negated. Only its order matters.
        loss: of each row [N], finite: 0 / 1 for a wrong class, or any other.

    Raises:
        DataError: no rows, NaN, two shapes, or a loss that is not finite.

    Examples:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.9, 0.9, 0.4]), torch.tensor([0, 1, 0, 0]))
        >>> curve.coverage.tolist(), curve.risk.tolist()
        ([0.25, 0.5, 1.0], [0.0, 0.0, 0.25])

    Source: Geifman and El-Yaniv (2017), arXiv:1705.08500; Traub et al. (2024), arXiv:2407.01032.
    """
    check_rows("risk_coverage", uncertainty=uncertainty, loss=loss)
    _check_finite(loss)
    threshold, group, size = uncertainty.double().unique(return_inverse=True, return_counts=True)
    lost = torch.zeros_like(threshold).index_add_(0, group, loss.double())
    return _curve(size, lost, threshold)


def oracle_curve(loss: Tensor) -> RiskCoverage:
    """The curve of an uncertainty that puts rows into the order of their losses, each at a threshold of its own.

    Of losses of 0 and 1 with the error rate e and many rows: AURC = e + (1 - e) log(1 - e), AUGRC = e^2 / 2.
    An uncertainty with ties can have an area below, since lines between few points lie under the curve.

    Args:
        loss: [N], finite.

    Returns:
        A curve of N points, whose thresholds are the sorted losses.

    Raises:
        DataError: no rows, NaN, or a loss that is not finite.

    Examples:
        >>> oracle_curve(torch.tensor([1, 0, 0, 1])).risk.tolist()
        [0.0, 0.0, 0.3333333333333333, 0.5]
    """
    check_rows("oracle_curve", loss=loss)
    _check_finite(loss)
    ordered = loss.double().sort().values
    return _curve(torch.ones_like(ordered, dtype=torch.int64), ordered, ordered)


def aurc(curve: RiskCoverage) -> Tensor:
    """Area under risk against coverage, over coverages from 0 to 1: trapezia, and the first risk down to coverage 0.

    0 where nothing is lost; the mean loss where all rows are equally sure, or sure at random.

    Args:
        curve: from `risk_coverage` or `oracle_curve`.

    Returns:
        A number, of 0 / 1 losses in [0, 1]; less is better.

    Examples:
        >>> aurc(risk_coverage(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0, 1, 0, 0])))
        tensor(0.2500, dtype=torch.float64)

    Source: Geifman et al. (2019), arXiv:1805.08206; ends and ties as in fd-shifts (Jaeger et al., 2023, arXiv:2211.15259).
    """
    return _area(curve.coverage, curve.risk, curve.risk[:1])


def augrc(curve: RiskCoverage) -> Tensor:
    """Area under generalised risk against coverage, over coverages from 0 to 1, by trapezia from the origin.

    Args:
        curve: from `risk_coverage` or `oracle_curve`.

    Returns:
        A number, of 0 / 1 losses in [0, 1/2] up to the last row; less is better. Half the mean loss where all rows
        are equally sure.

    Examples:
        >>> augrc(risk_coverage(torch.tensor([0.5, 0.5, 0.5, 0.5]), torch.tensor([0, 1, 0, 0])))
        tensor(0.1250, dtype=torch.float64)

    Source: Traub et al. (2024), arXiv:2407.01032.
    """
    return _area(curve.coverage, curve.generalised_risk, torch.zeros_like(curve.generalised_risk[:1]))


def coverage_at_risk(curve: RiskCoverage, risk: float) -> Tensor:
    """The largest coverage at which the risk is at most this; 0 where no threshold keeps it.

    Args:
        curve: from `risk_coverage`.
        risk: the mean loss that is allowed on the rows kept, such as 0.05.

    Returns:
        A number in [0, 1]; more is better.

    Raises:
        ConfigError: a risk that is no number.

    Examples:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1, 0, 0, 0]))
        >>> float(coverage_at_risk(curve, 0.3)), float(coverage_at_risk(curve, 0.2))
        (1.0, 0.0)
    """
    if not risk == risk:
        raise ConfigError("coverage_at_risk(risk=)", want="a number", got="NaN", fix="pass 0.05")
    return torch.where(curve.risk <= risk, curve.coverage, torch.zeros_like(curve.coverage)).max()


def risk_at_coverage(curve: RiskCoverage, coverage: float) -> Tensor:
    """The risk at the first threshold that keeps at least this share of rows.

    Args:
        curve: from `risk_coverage`.
        coverage: in (0, 1], such as 0.8.

    Returns:
        The mean loss of the rows kept; less is better.

    Raises:
        ConfigError: a coverage outside (0, 1].

    Examples:
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 1, 0, 1]))
        >>> float(risk_at_coverage(curve, 0.5)), float(risk_at_coverage(curve, 0.8))
        (0.5, 0.5)
    """
    if not 0.0 < coverage <= 1.0:
        raise ConfigError("risk_at_coverage(coverage=)", want="in (0, 1]", got=repr(coverage), fix="pass 0.8")
    return curve.risk[(curve.coverage >= coverage).int().argmax()]


def _curve(size: Tensor, lost: Tensor, threshold: Tensor) -> RiskCoverage:
    """From the number of rows at each threshold [T], and the sum of their losses [T]."""
    kept, total = size.cumsum(0).double(), lost.cumsum(0)  # [T]
    return RiskCoverage(kept / kept[-1], total / kept, total / kept[-1], threshold)


def _area(coverage: Tensor, risk: Tensor, first: Tensor) -> Tensor:
    """Trapezia under risk against coverage, from `first` at coverage 0."""
    return torch.trapezoid(torch.cat([first, risk]), torch.cat([torch.zeros_like(coverage[:1]), coverage]))


def _check_finite(loss: Tensor) -> None:
    if not torch.isfinite(loss).all():
        row = int((~torch.isfinite(loss)).nonzero()[0, 0])
        raise DataError(
            "risk_coverage(loss=)",
            want="finite losses",
            got=f"{float(loss[row])} in row {row}",
            fix="bound the loss, or score 0 / 1 errors",
        )
