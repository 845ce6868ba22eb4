"""Calibration of class probabilities: rows in bins of confidence, and the gap between confidence and accuracy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.metrics.checking import check_rows
from bnn.metrics.classes import check_distribution

BEYOND = 1e-3  # how far outside [0, 1] a confidence may lie by rounding


class Bins(NamedTuple):
    """A reliability diagram: for each of M bins the number of rows in it, their mean confidence and accuracy (0 if empty)."""

    rows: Tensor  # [M] int64
    confidence: Tensor  # [M]
    accuracy: Tensor  # [M]


def calibration_bins(confidence: Tensor, correct: Tensor, *, num_bins: int = 15) -> Bins:
    """Rows by confidence, in equal bins (a, b] of which the first also holds 0.

    Args:
        confidence: probability of the predicted class, max_c p_c, [B], in [0, 1].
        correct: whether that class is the true one, bool or 0 / 1 [B].
        num_bins: M, at least 1.

    Returns:
        Bins whose counts sum to B: no confidence, not even 0 or 1, falls outside.

    Raises:
        DataError: no rows, NaN, two shapes, or numbers outside [0, 1].
        ConfigError: no bins.

    Examples:
        >>> calibration_bins(torch.tensor([0.0, 0.5, 0.6, 1.0]), torch.tensor([0, 1, 0, 1]), num_bins=2).rows
        tensor([2, 2])
    """
    _check(confidence, correct, num_bins)
    return _collect(_equal_width(confidence.double(), num_bins), confidence, correct, num_bins)


def adaptive_bins(confidence: Tensor, correct: Tensor, *, num_bins: int = 15) -> Bins:
    """Rows by confidence, in bins of equally many; rows of one confidence stay together, whatever their order.

    Sorted rows are cut into M parts as `torch.tensor_split` cuts them. Rows that tie all go where the middle one
    of them falls, so that bins differ in size by the ties, and some may be empty.

    Args:
        confidence: probability of the predicted class, max_c p_c, [B], in [0, 1].
        correct: whether that class is the true one, bool or 0 / 1 [B].
        num_bins: M, at least 1.

    Returns:
        Bins from the least to the most confident, whose counts sum to B.

    Raises:
        DataError: no rows, NaN, two shapes, or numbers outside [0, 1].
        ConfigError: no bins.

    Examples:
        >>> adaptive_bins(torch.tensor([0.9, 0.7, 0.99, 0.8]), torch.tensor([1, 0, 1, 1]), num_bins=2).accuracy
        tensor([0.5000, 1.0000], dtype=torch.float64)

    Source: Nixon et al. (2019), arXiv:1904.01685, of the predicted class alone.
    """
    _check(confidence, correct, num_bins)
    _, group, size = confidence.double().unique(return_inverse=True, return_counts=True)
    end = size.cumsum(0)
    middle = end - size + (size - 1) // 2  # [groups] rank of the middle row of each
    least, larger = divmod(len(confidence), num_bins)  # the first `larger` parts hold least + 1 rows
    border = larger * (least + 1)
    place = torch.where(middle < border, middle // (least + 1), larger + (middle - border) // max(least, 1))
    return _collect(place[group], confidence, correct, num_bins)


def ece(bins: Bins) -> Tensor:
    """Expected calibration error, sum_m rows_m / B |accuracy_m - confidence_m|, in [0, 1]; of adaptive bins, the ACE.

    Args:
        bins: from `calibration_bins` or `adaptive_bins`.

    Examples:
        >>> ece(calibration_bins(torch.tensor([0.7, 0.9]), torch.tensor([0, 1]), num_bins=1))
        tensor(0.3000, dtype=torch.float64)

    Source: Guo et al. (2017), arXiv:1706.04599, eq. 3.
    """
    return (_shares(bins) * _gaps(bins)).sum()


def rmsce(bins: Bins) -> Tensor:
    """Root mean square calibration error, sqrt(sum_m rows_m / B (accuracy_m - confidence_m)^2), in [0, 1].

    At least the `ece` of the same bins, at most their `mce`; without a correction for the noise in each bin.

    Args:
        bins: from `calibration_bins` or `adaptive_bins`.

    Source: Kumar et al. (2019), arXiv:1909.10155, who correct it for the noise.
    """
    return (_shares(bins) * _gaps(bins).square()).sum().sqrt()


def mce(bins: Bins) -> Tensor:
    """Maximum calibration error, max_m |accuracy_m - confidence_m| over bins with rows, in [0, 1].

    Args:
        bins: from `calibration_bins` or `adaptive_bins`.

    Source: Guo et al. (2017), arXiv:1706.04599, eq. 5.
    """
    return (_gaps(bins) * (_shares(bins) > 0)).max()


def classwise_ece(probs: Tensor, y: Tensor, *, num_bins: int = 15) -> Tensor:
    """Mean over classes of the calibration error of each class's own probability, in [0, 1].

    1 / C sum_c sum_m rows_cm / B |mean 1[y = c] - mean p_c|, bin m of class c holding the rows with p_c in it

    Args:
        probs: [B, C], summing to 1 over C.
        y: int64 [B], in [0, C).
        num_bins: M equal bins (a, b] a class, the first of which also holds 0.

    Raises:
        DataError: no rows, NaN, shapes that do not fit, classes outside [0, C), or no probabilities.
        ConfigError: no bins.

    Examples:
        >>> classwise_ece(torch.tensor([[0.8, 0.2], [0.7, 0.3]]), torch.tensor([0, 1]), num_bins=1)
        tensor(0.2500, dtype=torch.float64)

    Source: Kull et al. (2019), arXiv:1910.12656.
    """
    check_distribution("classwise_ece", probs, y)
    _check_bins(num_bins)
    classes = probs.shape[1]
    confidence = probs.double()
    own = torch.arange(classes, device=probs.device) * num_bins  # each class has bins of its own
    place = _equal_width(confidence, num_bins) + own  # [B, C]
    truth = torch.nn.functional.one_hot(y, classes)
    bins = _collect(place.flatten(), confidence.flatten(), truth.flatten(), classes * num_bins)
    return ece(bins)  # counts sum to B C: the mean over classes


def _equal_width(confidence: Tensor, num_bins: int) -> Tensor:
    """Place of each float64 confidence among equal bins, from 0 to M - 1."""
    edges = torch.arange(1, num_bins, dtype=torch.float64, device=confidence.device) / num_bins  # inner upper edges
    return torch.bucketize(confidence, edges)  # right=False: (a, b]


def _collect(place: Tensor, confidence: Tensor, correct: Tensor, num_bins: int) -> Bins:
    count = torch.bincount(place, minlength=num_bins)
    filled = count.clamp_min(1)
    mean_confidence = torch.bincount(place, weights=confidence.double(), minlength=num_bins) / filled
    mean_accuracy = torch.bincount(place, weights=correct.double(), minlength=num_bins) / filled
    return Bins(count, mean_confidence, mean_accuracy)


def _shares(bins: Bins) -> Tensor:
    total = bins.rows.sum()
    if not total:
        raise DataError("bins", want="at least one row", got="none", fix="check the data set")
    return bins.rows / total.double()


def _gaps(bins: Bins) -> Tensor:
    return (bins.accuracy - bins.confidence).double().abs()


def _check(confidence: Tensor, correct: Tensor, num_bins: int) -> None:
    _check_bins(num_bins)
    check_rows("calibration", confidence=confidence, correct=correct)
    for name, values in (("confidence", confidence), ("correct", correct)):
        low, high = float(values.min()), float(values.max())
        if low < -BEYOND or high > 1.0 + BEYOND:
            raise DataError(
                f"calibration({name}=)",
                want="numbers between 0 and 1",
                got=f"{low:.4g} to {high:.4g}",
                fix="pass probabilities, the largest of each row",
            )


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ConfigError("num_bins", want="at least 1", got=str(num_bins), fix="pass 15")
