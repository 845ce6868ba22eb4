"""One temperature for a predictive over classes, fitted on rows that were held out."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError, NotConverged

MOST_SHARPNESS = 2.0**40  # 1 / T beyond which nobody looks for a minimum
NUM_STEPS = 200  # of Newton's method or halving; a few dozen are enough for the last bit


class Estimate(NamedTuple):
    """A mean over rows and its standard error, NaN of one row."""

    value: float
    standard_error: float

    @staticmethod
    def of(values: Tensor) -> Estimate:
        """Of one value a row [N]."""
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return Estimate(float(values.mean()), error)


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """A predictive over classes, sharpened by a temperature below 1 and flattened by one above.

    p_T(c) = p(c)^(1 / T) / sum_k p(k)^(1 / T), with p the mean predictive: of the mixture, not of its samples

    Args:
        log_probs: log p, [..., C].
        temperature: T > 0.

    Returns:
        log p_T [..., C]. The order of classes is that of p.

    Raises:
        ConfigError: a temperature that is not a positive number.

    Examples:
        >>> temper(torch.tensor([[0.8, 0.2]]).log(), 0.5).exp()
        tensor([[0.9412, 0.0588]])
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError("temperature", want="a positive number", got=str(temperature), fix="1 changes nothing")
    return (log_probs / temperature).log_softmax(dim=-1)


def fit_temperature(log_probs: Tensor, y: Tensor) -> float:
    """The temperature under which held-out rows have the least negative log likelihood.

    NLL(b) = mean_n [ log sum_c exp(b log p_nc) - b log p_n,y_n ],  b = 1 / T

    NLL is convex in b: its slope is mean_n (E_b[log p_n] - log p_n,y_n) and its curvature mean_n Var_b[log p_n], both under
    p_T. The root of the slope is found by Newton's method inside a bracket, which is halved where a step leaves it.

    Where there is no minimum at a positive and finite b, the temperature stays 1 and `errors.NotConverged` is warned of:
    every row is predicted right, so that the NLL falls without end as T goes to 0; or the rows are predicted no
    better than by equal probabilities.

    Args:
        log_probs: log p of the mean predictive [N, C]; rows that neither the posterior nor anybody's choice has seen.
        y: true classes, int64 [N].

    Returns:
        T.

    Raises:
        DataError: shapes, no row, classes out of range, or a true class without probability.

    Examples:
        >>> log_probs = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]).log()
        >>> round(fit_temperature(log_probs, torch.tensor([0, 0, 1, 1])), 4)  # three in four are right
        2.0

    Source: Guo et al. (2017), arXiv:1706.04599, section 4.2, on log p in the place of logits.
    """
    log_probs = check_rows(log_probs, y)
    at_truth = log_probs.gather(1, y.unsqueeze(1)).squeeze(1)  # [N]
    if not torch.isfinite(at_truth).all():
        row = int((~torch.isfinite(at_truth)).nonzero()[0])
        raise DataError(
            f"temperature, row {row}",
            want="a true class of some probability",
            got="one of none",
            fix="no temperature mends that: check the labels, or the natural shares of a prior shift",
        )

    possible = log_probs > -torch.inf
    # Against the true class, 0 log 0 = 0; differences of near numbers, so that a slope near 0 has its sign.
    apart = torch.where(possible, log_probs - at_truth.unsqueeze(1), torch.zeros_like(log_probs))  # [N, C]

    def slope(sharpness: float) -> tuple[float, float]:
        probs = (sharpness * log_probs).softmax(dim=1)
        mean = (probs * apart).sum(dim=1)  # [N]
        variance = (probs * (apart - mean.unsqueeze(1)).square()).sum(dim=1)
        return float(mean.mean()), float(variance.mean())

    at_zero = float((apart.sum(dim=1) / possible.sum(dim=1)).mean())
    all_right = bool((apart <= 0).all())
    above = 1.0
    while at_zero < 0 and not all_right and above < MOST_SHARPNESS and slope(above)[0] < 0:
        above *= 2.0
    if at_zero >= 0 or all_right or above >= MOST_SHARPNESS:
        why = (
            f"the {len(y)} rows are predicted no better than by equal probabilities"
            if at_zero >= 0
            else f"all {len(y)} rows are predicted right, so that sharper is always better"
        )
        warnings.warn(f"temperature: {why}; it stays 1: bring more held-out rows", NotConverged, stacklevel=2)
        return 1.0
    below, sharpness = 0.0, min(1.0, above)
    for _ in range(NUM_STEPS):
        first, second = slope(sharpness)
        below, above = (sharpness, above) if first < 0 else (below, sharpness)
        step = sharpness - first / second if second > 0 else 0.5 * (below + above)
        nearer = step if below < step < above else 0.5 * (below + above)
        if abs(nearer - sharpness) <= 4e-16 * sharpness or first == 0:  # neighbouring numbers
            break
        sharpness = nearer
    return 1.0 / sharpness


def nll_of_rows(log_probs: Tensor, y: Tensor) -> Tensor:
    """-log p of the true class, [N], in nats."""
    return -check_rows(log_probs, y).gather(1, y.unsqueeze(1)).squeeze(1)


def check_rows(log_probs: Tensor, y: Tensor) -> Tensor:
    """The log probabilities in float64.

    Raises:
        DataError: they are not [N, C] with N >= 1 and C >= 2, or y not int64 [N] below C.
    """
    if log_probs.dim() != 2 or y.shape != log_probs.shape[:1] or y.dtype != torch.int64 or not len(y):
        raise DataError(
            "held-out rows",
            want="log probabilities [N, C] of one row at least, and int64 y [N]",
            got=f"{list(log_probs.shape)} and {y.dtype} {list(y.shape)}",
            fix="pass y.long(), and the mean predictive",
        )
    if not 0 <= int(y.min()) <= int(y.max()) < log_probs.shape[1]:
        got = f"{int(y.min())} to {int(y.max())}"
        raise DataError("held-out rows", want=f"classes in [0, {log_probs.shape[1]})", got=got, fix="check the labels")
    return log_probs.double()
