"""Scores of predictions against targets: pure functions, natural logarithms, means over rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError

SQRT_2, SQRT_2PI = math.sqrt(2.0), math.sqrt(2.0 * math.pi)
PAIR_VALUES = 4_000_000  # numbers held at once while pairs of mixture components are summed


def accuracy(probs: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest probability is on the true class.

    Args:
        probs: [B, C].
        y: int64 [B].
    """
    check_probs(probs, y)
    return (probs.argmax(dim=-1) == y).double().mean()


def nll(log_probs: Tensor, y: Tensor) -> Tensor:
    """Negative log likelihood, -mean_b log p(y_b | x_b), in nats.

    Give it the log of the mean predictive, log mean_k p_k: the mean of the samples' own losses (Gibbs)
    is larger, by Jensen's inequality.

    Args:
        log_probs: [B, C].
        y: int64 [B].
    """
    check_probs(log_probs, y)
    return -log_probs.gather(1, y.unsqueeze(1)).mean()


def brier(probs: Tensor, y: Tensor) -> Tensor:
    """mean_b sum_c (p_bc - 1[y_b = c])^2, in [0, 2].

    Args:
        probs: [B, C].
        y: int64 [B].

    Source: Brier (1950), in the multi-class form without the factor 1/2.
    """
    check_probs(probs, y)
    return (probs - torch.nn.functional.one_hot(y, probs.shape[1])).square().sum(dim=1).mean()


class Bins(NamedTuple):
    """A reliability diagram: for each of M bins the number of rows in it, their mean confidence and accuracy (0 if empty)."""

    rows: Tensor  # [M] int64
    confidence: Tensor  # [M]
    accuracy: Tensor  # [M]


def calibration_bins(confidence: Tensor, correct: Tensor, *, num_bins: int = 15) -> Bins:
    """Rows by confidence, in equal bins (a, b] of which the first also holds 0.

    Args:
        confidence: probability of the predicted class, max_c p_c, [B].
        correct: whether that class is the true one, bool or 0 / 1 [B].
        num_bins: M, at least 1.

    Returns:
        Bins whose counts sum to B: no confidence, not even 0 or 1, falls outside.
    """
    if num_bins < 1:
        raise ConfigError("num_bins", want="at least 1", got=str(num_bins), fix="pass 15")
    if confidence.dim() != 1 or confidence.shape != correct.shape:
        raise DataError(
            "metrics",
            want="confidence and correct of one shape [B]",
            got=f"{list(confidence.shape)} and {list(correct.shape)}",
            fix="take the maximum over classes",
        )
    confidence = confidence.double()
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=confidence.device) / num_bins  # inner upper edges
    place = torch.bucketize(confidence, edges)  # right=False: (a, b]
    count = torch.bincount(place, minlength=num_bins)
    filled = count.clamp_min(1)
    mean_confidence = torch.bincount(place, weights=confidence, minlength=num_bins) / filled
    mean_accuracy = torch.bincount(place, weights=correct.double(), minlength=num_bins) / filled
    return Bins(count, mean_confidence, mean_accuracy)


def ece(bins: Bins) -> Tensor:
    """Expected calibration error, sum_m rows_m / B |accuracy_m - confidence_m|, in [0, 1].

    Source: Guo et al. (2017), arXiv:1706.04599, eq. 3.
    """
    return (bins.rows * (bins.accuracy - bins.confidence).abs()).sum() / bins.rows.sum()


def auroc(score_in: Tensor, score_out: Tensor) -> float:
    """Probability that a row from outside has the larger uncertainty score; ties count half.

    Args:
        score_in: an uncertainty (larger means less sure) of in-distribution rows [N].
        score_out: the same of out-of-distribution rows [M], the positive class.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled(score_in, score_out)))


def fpr_at_tpr(score_in: Tensor, score_out: Tensor, *, tpr: float = 0.95) -> float:
    """Share of in-distribution rows flagged where the first threshold flags at least `tpr` of those outside.

    Args:
        score_in: an uncertainty of in-distribution rows [N].
        score_out: the same of out-of-distribution rows [M], the positive class.
        tpr: in (0, 1].
    """
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(*_labelled(score_in, score_out), drop_intermediate=False)
    return float(false_positive[(true_positive >= tpr).argmax()])


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    """sqrt(mean (y - mean)^2), in units of the target; both [B, C]."""
    if mean.shape != y.shape:
        raise DataError(
            "rmse", want=f"targets {list(mean.shape)}, as the means", got=str(list(y.shape)), fix="reshape one of them"
        )
    return (y - mean).square().mean().sqrt()


def mixture_log_prob(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """log p(y) under a mixture of normals, log sum_s w_s N(y; mu_s, sigma_s^2), summed over outputs inside a sample.

    Args:
        means: mu [S, B, C].
        scales: sigma > 0, what broadcasts to [S, B, C].
        y: [B, C].
        log_weight: normalised log w [S]; equal weights by default.

    Returns:
        [B], in nats, of a density in the units of y.
    """
    z = (y - means) / scales
    each = (-0.5 * z.square() - torch.log(scales * SQRT_2PI)).sum(dim=-1)  # [S, B]
    return torch.logsumexp(each + _log_weights(means, log_weight).unsqueeze(1), dim=0)  # [B]


def mixture_cdf(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Probability integral transform u = sum_s w_s Phi((y - mu_s) / sigma_s), [B, C]; arguments as above."""
    weights = _log_weights(means, log_weight).exp()[:, None, None]
    below: Tensor = torch.special.ndtr((y - means) / scales)  # [S, B, C]
    return (weights * below).sum(dim=0)


def coverage(pit: Tensor, level: float) -> Tensor:
    """Share of targets inside the central interval of this level, mean 1[|2u - 1| <= level].

    Args:
        pit: u [B, C], from `mixture_cdf`.
        level: in (0, 1).
    """
    return ((2.0 * pit - 1.0).abs() <= level).double().mean()


def mixture_crps(means: Tensor, scales: Tensor, y: Tensor, log_weight: Tensor | None = None) -> Tensor:
    """Continuous ranked probability score of a mixture of normals, exactly, in units of the target.

    CRPS = sum_s w_s A(y - mu_s, sigma_s^2) - 1/2 sum_st w_s w_t A(mu_s - mu_t, sigma_s^2 + sigma_t^2)
    A(m, v) = m (2 Phi(m / sqrt v) - 1) + 2 sqrt(v) phi(m / sqrt v)

    Args:
        means: mu [S, B, C].
        scales: sigma > 0, what broadcasts to [S, B, C].
        y: [B, C].
        log_weight: normalised log w [S]; equal weights by default.

    Returns:
        [B, C], at least 0; less is better. Time grows as S^2.

    Source: Grimit et al. (2006), eq. 5.
    """
    size = len(means)
    variances = scales.expand_as(means).square()
    weights = _log_weights(means, log_weight).exp()
    by_sample = weights[:, None, None]
    score = (by_sample * _expected_distance(y - means, variances)).sum(dim=0)  # [B, C]
    # Pairs s < t count twice, s = t once: half the double sum needs only the upper triangle.
    score = score - 0.5 * (by_sample.square() * _expected_distance(torch.zeros_like(means), 2 * variances)).sum(dim=0)
    step = max(1, PAIR_VALUES // max(means.numel(), 1))
    for start in range(0, size, step):
        stop = min(start + step, size)
        distance = _expected_distance(
            means[start:stop, None] - means[None, start:], variances[start:stop, None] + variances[None, start:]
        )  # [step, S - start, B, C]
        pairs = torch.triu(weights[start:stop, None] * weights[None, start:], diagonal=1)
        score = score - (pairs[:, :, None, None] * distance).sum(dim=(0, 1))
    return score


def check_probs(probs: Tensor, y: Tensor) -> None:
    """Raise DataError unless probs are [B, C] and y int64 [B] below C."""
    if probs.dim() != 2 or y.shape != probs.shape[:1] or y.dtype != torch.int64:
        raise DataError(
            "metrics",
            want="probs [B, C] and int64 y [B]",
            got=f"{list(probs.shape)} and {y.dtype} {list(y.shape)}",
            fix="average over samples first; pass y.long()",
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < probs.shape[1]:
        raise DataError(
            "metrics",
            want=f"classes in [0, {probs.shape[1]})",
            got=f"{int(y.min())} to {int(y.max())}",
            fix="check the labels",
        )


def _expected_distance(m: Tensor, v: Tensor) -> Tensor:
    """A(m, v) = E|X| for X ~ Normal(m, v)."""
    scale = v.sqrt()
    z = m / scale
    return m * torch.erf(z / SQRT_2) + 2.0 * scale * torch.exp(-0.5 * z.square()) / SQRT_2PI


def _log_weights(means: Tensor, log_weight: Tensor | None) -> Tensor:
    size = len(means)
    return means.new_full((size,), -math.log(size)) if log_weight is None else log_weight


def _labelled(score_in: Tensor, score_out: Tensor) -> tuple[list[int], list[float]]:
    return [0] * len(score_in) + [1] * len(score_out), torch.cat([score_in, score_out]).double().tolist()
