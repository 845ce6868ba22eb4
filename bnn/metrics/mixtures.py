"""Scores of a mixture of normals over S samples: density, distribution function, continuous ranked probability score.

The CRPS is E|X - y| - 1/2 E|X - X'| for X and X' drawn from the mixture. Its first term is a sum over samples; its
second one does not depend on y, and is a sum over pairs of samples, or the integral of F (1 - F).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.metrics.checking import check_numbers

SQRT_2, SQRT_2PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)
EXACT_SAMPLES = 1000  # up to here the CRPS is a sum over pairs of samples
PAIR_VALUES = 4_000_000  # numbers held at once while pairs of samples, or nodes, are summed
STEP = 0.5  # between nodes, in the smallest scale of a row: the bound of the error is then below rounding
REACH = 8.0  # nodes end this many scales outside the means
FEW_NODES = 512  # rows that need more, and more than samples, take the sum over pairs, which costs them no more


class Bounded(NamedTuple):
    """Scores, and how far each may be from the exact one."""

    value: Tensor  # [B, C]
    error: Tensor  # [B, C]


def mixture_log_prob(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """log p(y) under a mixture of normals, log sum_s w_s N(y; mu_s, sigma_s^2), summed over outputs inside a sample.

    Args:
        means: mu [S, B, C].
        scales: sigma > 0, what broadcasts to [S, B, C].
        y: [B, C].
        log_weight: normalised log w [S]; equal weights by default.

    Returns:
        [B], in nats, of a density in the units of y.

    Raises:
        DataError: shapes that do not fit, a NaN, scales that are not positive, or weights that do not sum to 1.

    Examples:
        >>> mixture_log_prob(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor(1.0), torch.tensor([[1.0]]))
        tensor([-1.4189], dtype=torch.float64)
    """
    means, scales, y = _check("mixture_log_prob", means, scales, y)
    z = (y - means) / scales
    each = (-0.5 * z.square() - torch.log(scales * SQRT_2PI)).sum(dim=-1)  # [S, B]
    return _filled("mixture_log_prob", torch.logsumexp(each + _log_weights(means, log_weight).unsqueeze(1), dim=0))


def mixture_cdf(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Probability integral transform u = sum_s w_s Phi((y - mu_s) / sigma_s), [B, C]; arguments as above.

    Examples:
        >>> mixture_cdf(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor(1.0), torch.tensor([[1.0]]))
        tensor([[0.5000]], dtype=torch.float64)
    """
    means, scales, y = _check("mixture_cdf", means, scales, y)
    weights = _log_weights(means, log_weight).exp()[:, None, None]
    below: Tensor = torch.special.ndtr((y - means) / scales)  # [S, B, C]
    return _filled("mixture_cdf", (weights * below).sum(dim=0))


def mixture_crps(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of a mixture of normals, in units of the target.

    CRPS = sum_s w_s A(y - mu_s, sigma_s^2) - 1/2 sum_st w_s w_t A(mu_s - mu_t, sigma_s^2 + sigma_t^2)
    A(m, v) = m (2 Phi(m / sqrt v) - 1) + 2 sqrt(v) phi(m / sqrt v)

    Exactly, in time that grows as S^2; above 1,000 samples as `mixture_crps_quadrature`, whose error is rounding.

    Args:
        means: mu [S, B, C].
        scales: sigma > 0, what broadcasts to [S, B, C].
        y: [B, C].
        log_weight: normalised log w [S]; equal weights by default.

    Returns:
        [B, C], at least 0; less is better.

    Raises:
        DataError: shapes that do not fit, a NaN, scales that are not positive, or weights that do not sum to 1.

    Examples:
        >>> means, scales = torch.tensor([0.1, -0.3, 1.0]), torch.tensor([0.4, 2.1, 0.7])
        >>> weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
        >>> mixture_crps(means.view(3, 1, 1), scales.view(3, 1, 1), torch.zeros(1, 1), weights.log())
        tensor([[0.4681]], dtype=torch.float64)

    Source: Grimit et al. (2006), eq. 5.
    """
    if len(means) > EXACT_SAMPLES:
        return mixture_crps_quadrature(means, scales, y, log_weight).value
    means, scales, y = _check("mixture_crps", means, scales, y)
    weights = _log_weights(means, log_weight).exp()
    variances = scales.expand_as(means).square()
    score = _distance_to(means, variances, y, weights) - _half_spread(means, variances, weights)
    return _filled("mixture_crps", score)


def mixture_crps_quadrature(
    means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None, *, step: float = STEP
) -> Bounded:
    """The CRPS of a mixture of normals in time S times Q a row, with the bound of its error; Q is some hundred.

    CRPS = sum_s w_s A(y - mu_s, sigma_s^2) - int F(x) (1 - F(x)) dx,  F(x) = sum_s w_s Phi((x - mu_s) / sigma_s)

    The same as the integral of (F(x) - 1[x >= y])^2, but with the jump at y taken out exactly. What is left is smooth
    and falls off on both sides, so that the trapezoid rule with Q equal steps h errs by no more than

    2 M / (exp(2 pi eta / h) - 1),  M = int F (1 - F) + eta e^(a^2 / 2) + eta a e^(a^2) / sqrt(2 pi)

    for any eta = a min_s sigma_s, since M bounds the integral of |F (1 - F)| along the line at height eta above the
    real one. At eta h = pi (min_s sigma_s)^2 this is some exp(-(pi min_s sigma_s / h)^2): at half the smallest scale a
    step, 1e-15 of it. Rows that would need more nodes than samples take the sum over pairs.

    Args:
        means: mu [S, B, C].
        scales: sigma > 0, what broadcasts to [S, B, C].
        y: [B, C].
        log_weight: normalised log w [S]; equal weights by default.
        step: h in units of the smallest sigma of a row, in (0, 2].

    Returns:
        The scores, at least 0, and the bounds of their errors: discretisation, ends of the range, and an estimate of
        rounding; both [B, C].

    Raises:
        DataError: as of `mixture_crps`.
        ConfigError: a step outside (0, 2].

    Examples:
        >>> means, scales = torch.tensor([0.1, -0.3, 1.0]), torch.tensor([0.4, 2.1, 0.7])
        >>> weights = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64)
        >>> found = mixture_crps_quadrature(means.view(3, 1, 1), scales.view(3, 1, 1), torch.zeros(1, 1), weights.log())
        >>> round(float(found.value), 6), bool(found.error < 1e-12)
        (0.468069, True)

    Source: Trefethen and Weideman (2014), SIAM Rev. 56(3), theorem 5.1, for the error of the trapezoid rule.
    """
    if not 0.0 < step <= 2.0:
        raise ConfigError("mixture_crps_quadrature(step=)", want="in (0, 2]", got=repr(step), fix="leave it at 0.5")
    means, scales, y = _check("mixture_crps_quadrature", means, scales, y)
    weights = _log_weights(means, log_weight).exp()
    kept = weights > 0  # a sample of no weight has no say in where nodes lie
    weights = weights[kept] / weights.sum()
    means, scales = means[kept], scales.expand_as(means)[kept]
    distance = _distance_to(means, scales.square(), y, weights)  # [B, C]
    # Around their middle, so that rows far from 0 keep their digits.
    centred = means - 0.5 * (means.amin(dim=0) + means.amax(dim=0))
    span = (centred.abs() + REACH * scales).amax(dim=0)  # [B, C]
    _filled("mixture_crps_quadrature", span - span)  # infinite ones have no nodes
    spread, bound = _smooth_half_spread(centred.flatten(1), scales.flatten(1), weights, step)
    spread, bound = spread.view_as(y), bound.view_as(y)
    error = bound + torch.finfo(torch.float64).eps * (16.0 + math.sqrt(len(means))) * (distance + span)
    return Bounded(_filled("mixture_crps_quadrature", (distance - spread).clamp_min(0)), error)


def _smooth_half_spread(means: Tensor, scales: Tensor, weights: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """int F (1 - F) of R rows by the trapezoid rule, and the bound of its error; means and scales [S, R]."""
    low = (means - REACH * scales).amin(dim=0)  # [R]
    width = (means + REACH * scales).amax(dim=0) - low
    narrow = scales.amin(dim=0)
    steps = (width / (step * narrow)).ceil().clamp_min(1)
    found, bound = torch.zeros_like(low), torch.zeros_like(low)
    paired = steps > max(len(means), FEW_NODES)
    for row in paired.nonzero().flatten().tolist():
        one = means[:, row, None, None]
        found[row] = _half_spread(one, scales[:, row, None, None].square(), weights).squeeze()
    ordered, order = steps.masked_fill(paired, torch.inf).sort()
    begin, end_of_all = 0, len(steps) - int(paired.sum())
    while begin < end_of_all:
        # Rows in one block take as many steps as the last of them needs, at most twice what the first needs.
        most = 2 * float(ordered[begin])
        alike = int(torch.searchsorted(ordered[:end_of_all], most, right=True))
        end = min(alike, begin + max(1, PAIR_VALUES // (len(means) * int(most + 1))))
        rows, count = order[begin:end], int(ordered[end - 1])
        spacing = width[rows] / count
        found[rows] = spacing * _sum_over_nodes(means[:, rows], scales[:, rows], weights, low[rows], spacing, count)
        bound[rows] = _trapezoid_bound(narrow[rows], spacing, width[rows]) + _end_bound(scales[:, rows], weights)
        begin = end
    return found, bound


def _sum_over_nodes(means: Tensor, scales: Tensor, weights: Tensor, low: Tensor, spacing: Tensor, count: int) -> Tensor:
    """sum of F (1 - F) over the nodes low + j spacing, j from 0 to count, of each row [R]."""
    total = torch.zeros_like(low)
    at_once = max(1, PAIR_VALUES // means.numel())
    for begin in range(0, count + 1, at_once):
        numbers = torch.arange(begin, min(begin + at_once, count + 1), dtype=low.dtype, device=low.device)
        nodes = low + spacing * numbers.unsqueeze(1)  # [Q, R]
        below = torch.special.ndtr((nodes - means.unsqueeze(1)) / scales.unsqueeze(1))  # [S, Q, R]
        share = torch.tensordot(weights, below, dims=1)  # [Q, R]
        total += (share * (1.0 - share)).sum(dim=0)
    return total


def _trapezoid_bound(narrow: Tensor, spacing: Tensor, width: Tensor) -> Tensor:
    """2 M / (exp(2 pi eta / h) - 1) at eta = pi narrow^2 / h, where int F (1 - F) is at most the width of the nodes."""
    a = math.pi * narrow / spacing
    eta = a * narrow
    # Divided through by exp(2 a^2), which overflows where steps are small.
    terms = width * torch.exp(-2 * a**2) + eta * torch.exp(-1.5 * a**2) + eta * a * torch.exp(-(a**2)) / SQRT_2PI
    return 2.0 * terms / -torch.expm1(-2 * a**2)


def _end_bound(scales: Tensor, weights: Tensor) -> Tensor:
    """What nodes beyond both ends would add: int of F below them, sum_s w_s sigma_s phi(k) / k^2 at most, twice."""
    density = math.exp(-0.5 * REACH**2) / SQRT_2PI
    mean_scale: Tensor = torch.tensordot(weights, scales, dims=1)
    return 2.0 * density / REACH**2 * mean_scale


def _distance_to(means: Tensor, variances: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """E|X - y|, [B, C]."""
    distance: Tensor = torch.tensordot(weights, _expected_distance(y - means, variances), dims=1)
    return distance


def _half_spread(means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """1/2 E|X - X'|, [B, C], summed over pairs of samples."""
    size = len(means)
    # Pairs s < t count twice, s = t once: half the double sum needs only the upper triangle.
    same = _expected_distance(torch.zeros_like(means), 2 * variances)
    spread: Tensor = 0.5 * torch.tensordot(weights.square(), same, dims=1)
    step = max(1, PAIR_VALUES // max(means.numel(), 1))
    for start in range(0, size, step):
        stop = min(start + step, size)
        distance = _expected_distance(
            means[start:stop, None] - means[None, start:], variances[start:stop, None] + variances[None, start:]
        )  # [step, S - start, B, C]
        pairs = torch.triu(weights[start:stop, None] * weights[None, start:], diagonal=1)
        spread = spread + (pairs[:, :, None, None] * distance).sum(dim=(0, 1))
    return spread


def _expected_distance(m: Tensor, v: Tensor) -> Tensor:
    """A(m, v) = E|X| for X ~ Normal(m, v)."""
    scale = v.sqrt()
    z = m / scale
    return m * torch.erf(z / SQRT_2) + 2.0 * scale * torch.exp(-0.5 * z.square()) / SQRT_2PI


def _log_weights(means: Tensor, log_weight: Tensor | None) -> Tensor:
    size = len(means)
    if log_weight is None:
        return means.new_full((size,), -math.log(size))
    wide = log_weight.double()
    if wide.shape != (size,) or not abs(float(torch.logsumexp(wide, dim=0))) < 1e-3:
        raise DataError(
            "log_weight",
            want=f"{size} logarithms of weights that sum to 1",
            got=f"{list(wide.shape)} whose weights sum to {float(wide.exp().sum()):.4g}",
            fix="subtract their logsumexp",
        )
    return wide


def _check(place: str, means: Tensor, scales: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, scales and targets in float64, or DataError where their shapes do not fit."""
    rows = y.shape if means.dim() == 3 else None
    if means.shape[1:] != rows or scales.dim() > 3 or not _broadcasts(scales, means):
        raise DataError(
            place,
            want="means [S, B, C], scales that broadcast to them, and targets [B, C]",
            got=f"{list(means.shape)}, {list(scales.shape)} and {list(y.shape)}",
            fix="give targets and means one axis of rows and one of outputs",
        )
    check_numbers(place, y=y)
    if not len(means):
        raise DataError(place, want="at least one sample", got="none", fix="check the bank")
    if scales.numel() and not scales.min() > 0:
        raise DataError(place, want="scales above 0", got=f"{float(scales.min()):.4g}", fix="check the samples' noise")
    return means.double(), scales.double(), y.double()


def _broadcasts(scales: Tensor, means: Tensor) -> bool:
    sizes = zip(reversed(scales.shape), reversed(means.shape), strict=False)
    return all(mine in (1, theirs) for mine, theirs in sizes)


def _filled(place: str, score: Tensor) -> Tensor:
    """The score, unless a row of it is no number."""
    if torch.isnan(score).any():
        raise DataError(
            place,
            want="finite means and scales",
            got=f"no number for row {int(torch.isnan(score).nonzero()[0, 0])}",
            fix="find the sample that gives them",
        )
    return score
