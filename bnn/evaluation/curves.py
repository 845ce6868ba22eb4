"""What the pictures of a report are drawn from: plain lists of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bnn.evaluation.report import Report
from bnn.evaluation.views import Views
from bnn.metrics import Bins, oracle_curve, risk_coverage

POINTS = 200  # of a line at most
PLACES = 30  # of a histogram
PIT_PLACES = 20
BAND = 0.95  # simultaneous, over all places of the histogram of the PIT
CLOSE = 0.01  # Monte Carlo error, as a share of the value, that "samples needed" are for


def reliability(bins: Bins) -> dict[str, list[float]]:
    """Rows, mean confidence and accuracy of each bin."""
    edges = torch.linspace(0, 1, len(bins.rows) + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), **{name: values.tolist() for name, values in bins._asdict().items()}}


def risk_against_coverage(uncertainty: Tensor, loss: Tensor) -> dict[str, list[float]]:
    """The curve of a score, and that of an oracle which knows the errors."""
    curve, oracle = risk_coverage(uncertainty, loss), oracle_curve(loss)
    own, best = _thinned(len(curve.coverage)), _thinned(len(oracle.coverage))
    return {
        "coverage": curve.coverage[own].tolist(),
        "risk": curve.risk[own].tolist(),
        "oracle_coverage": oracle.coverage[best].tolist(),
        "oracle_risk": oracle.risk[best].tolist(),
    }


def scores(inside: dict[str, Tensor], outside: dict[str, Tensor] | None) -> dict[str, dict[str, list[float]]]:
    """Histograms of each score [N], and [M] of rows outside, over one range."""
    found = {}
    for name, values in inside.items():
        sides = {"inside": values} if outside is None else {"inside": values, "outside": outside[name]}
        edges = _edges(torch.cat(list(sides.values())))
        found[name] = {"edges": edges.tolist()} | {side: _counts(some, edges) for side, some in sides.items()}
    return found


def entropy_split(expected_entropy: Tensor, mutual_information: Tensor) -> dict[str, list[float]]:
    """Histograms of both parts of the predictive entropy over one range."""
    edges = _edges(torch.cat([expected_entropy, mutual_information]))
    return {
        "edges": edges.tolist(),
        "expected_entropy": _counts(expected_entropy, edges),
        "mutual_information": _counts(mutual_information, edges),
    }


def samples(report: Report, views: Views, figures: Iterator[tuple[str, list[float]]]) -> dict[str, Any]:
    """Metrics against the number of samples, and the samples needed for a Monte Carlo error of 1 % of the value.

    needed = S (error / (0.01 |value|))^2
    """
    lines = {name: [value if math.isfinite(value) else None for value in values] for name, values in figures}
    needed: dict[str, int | None] = {}
    for name in lines:
        figure = report.metrics[name]
        needed[name] = None
        if figure.monte_carlo_error is not None and figure.value:
            ratio = figure.monte_carlo_error / (CLOSE * abs(figure.value))
            needed[name] = max(1, math.ceil(min(report.num_samples * ratio**2, 1e15)))
    return {"num_samples": list(views.sizes), "metrics": lines, "needed": needed}


def band(target: Tensor, mean: Tensor, lower: Tensor, upper: Tensor, *, level: float) -> dict[str, Any]:
    """Targets and central intervals of at most 200 rows of one output, each [N], ordered by the predictive mean."""
    order = mean.argsort(stable=True)
    order = order[_thinned(len(order))]
    found = {"target": target, "mean": mean, "lower": lower, "upper": upper}
    return {name: values[order].tolist() for name, values in found.items()} | {"level": level}


def pit(below: Tensor, upto: Tensor) -> dict[str, Any]:
    """Histogram of the probability integral transform; of counts, each row's mass P(Y < y) to P(Y <= y) is spread evenly.

    Source: Czado, Gneiting and Held (2009), Biometrics 65(4), eq. 2, for counts.
    """
    below, upto = below.flatten(), upto.flatten()
    size = len(upto)
    edges = torch.linspace(0, 1, PIT_PLACES + 1, dtype=torch.float64)
    wide = upto > below
    place = (upto[~wide] * PIT_PLACES).long().clamp(0, PIT_PLACES - 1)
    rows = torch.bincount(place, minlength=PIT_PLACES).double()
    if wide.any():
        low, high = below[wide, None], upto[wide, None]
        rows += ((edges - low) / (high - low)).clamp(0, 1).sum(dim=0).diff()
    lower, upper = binomial_band(size, PIT_PLACES)
    return {"edges": edges.tolist(), "rows": rows.tolist(), "lower": lower, "upper": upper}


def binomial_band(size: int, places: int) -> tuple[float, float]:
    """Counts between which all places of a flat histogram of `size` rows lie with a chance of 95 % at least (Bonferroni)."""
    tail = 0.5 * (1.0 - BAND) / places
    count = torch.arange(size + 1, dtype=torch.float64)
    log_mass = (
        math.lgamma(size + 1) - torch.lgamma(count + 1) - torch.lgamma(size - count + 1)
        - count * math.log(places) + (size - count) * math.log1p(-1.0 / places)
    )  # fmt: skip
    reached = log_mass.exp().cumsum(0)
    lower, upper = (int((reached < share).sum()) for share in (tail, 1.0 - tail))
    return float(min(lower, size)), float(min(upper, size))


def calibration(below: Tensor, upto: Tensor) -> dict[str, list[float]]:
    """Observed coverage of central intervals of 19 nominal levels."""
    levels = [round(0.05 * place, 2) for place in range(1, 20)]
    found = []
    for level in levels:
        tail = 0.5 - 0.5 * level
        found.append(float(((upto >= tail) & (below <= 1.0 - tail)).double().mean()))
    return {"level": levels, "coverage": found}


def mixing(values: Tensor, *, logarithmic: bool) -> dict[str, list[float]]:
    """Histogram of R-hat or of effective sample sizes over quantities."""
    values = values[values.isfinite()]
    low, high = float(values.min()), float(values.max())
    if logarithmic and low > 0:
        edges = torch.logspace(math.log10(low), math.log10(high * (1 + 1e-9) + 1e-9), PLACES + 1, dtype=torch.float64)
    else:
        edges = torch.linspace(low, high + 1e-9 * (1.0 + abs(high)), PLACES + 1, dtype=torch.float64)
    edges[0] = min(float(edges[0]), low)
    return {"edges": edges.tolist(), "quantities": _counts(values, edges)}


def _edges(values: Tensor) -> Tensor:
    """From 0 to the largest value."""
    return torch.linspace(0.0, max(float(values.max()), 1e-9), PLACES + 1, dtype=torch.float64)


def _counts(values: Tensor, edges: Tensor) -> list[float]:
    """Values in each place [a, b), the last of which is closed."""
    place = (torch.bucketize(values, edges, right=True) - 1).clamp(0, len(edges) - 2)
    return torch.bincount(place, minlength=len(edges) - 1).tolist()


def _thinned(size: int) -> Tensor:
    """At most 200 places, evenly spread, with both ends."""
    if size <= POINTS:
        return torch.arange(size)
    return torch.linspace(0, size - 1, POINTS, dtype=torch.float64).round().long()
