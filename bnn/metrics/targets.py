"""Scores of predictions of numbers: errors, intervals, quantiles, draws; all in the target's own units."""

from __future__ import annotations

import torch
from torch import Tensor

from bnn.errors import DataError
from bnn.metrics.checking import check_alike, check_filled, check_level, check_numbers


def rmse(mean: Tensor, y: Tensor) -> Tensor:
    """sqrt(mean (y - mean)^2), in units of the target, over rows and outputs.

    Args:
        mean: the predictive mean [B, C].
        y: [B, C].

    Returns:
        A number of at least 0; less is better.

    Raises:
        DataError: no rows, NaN, or two shapes.

    Examples:
        >>> rmse(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [-2.0]]))
        tensor(3.5355, dtype=torch.float64)
    """
    check_alike("rmse", mean=mean, y=y)
    check_filled("rmse", y=y)
    return (y.double() - mean).square().mean().sqrt()


def mae(mean: Tensor, y: Tensor) -> Tensor:
    """mean |y - mean|, in units of the target, over rows and outputs; of medians it would be least.

    Args:
        mean: the predictive mean, or another single number a target, [B, C].
        y: [B, C].

    Returns:
        A number of at least 0, at most the `rmse`; less is better.

    Raises:
        DataError: no rows, NaN, or two shapes.

    Examples:
        >>> mae(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [-2.0]]))
        tensor(3.5000, dtype=torch.float64)
    """
    check_alike("mae", mean=mean, y=y)
    check_filled("mae", y=y)
    return (y.double() - mean).abs().mean()


def coverage(pit: Tensor, level: float) -> Tensor:
    """Share of targets inside the central interval of this level, mean 1[|2u - 1| <= level].

    The interval lies between the quantiles (1 - level) / 2 and (1 + level) / 2 of the predictive, of any shape: no
    quantile is computed, and an excess of targets in one tail does not make up for a lack in the other.

    Args:
        pit: u [B, C], from `mixture_cdf`.
        level: in (0, 1).

    Returns:
        A number in [0, 1], `level` where the predictive is calibrated.

    Raises:
        DataError: no rows, NaN, or values outside [0, 1].
        ConfigError: a level outside (0, 1).

    Examples:
        >>> coverage(torch.tensor([[0.1], [0.5], [0.97]]), 0.9)
        tensor(0.6667, dtype=torch.float64)
    """
    check_level("coverage", level)
    check_filled("coverage", pit=pit)
    if pit.min() < -1e-6 or pit.max() > 1.0 + 1e-6:
        raise DataError(
            "coverage(pit=)",
            want="probabilities",
            got=f"{float(pit.min()):.4g} to {float(pit.max()):.4g}",
            fix="pass the predictive's distribution function at the targets",
        )
    return ((2.0 * pit.double() - 1.0).abs() <= level).double().mean()


def width(lower: Tensor, upper: Tensor) -> Tensor:
    """Mean width of intervals, mean (upper - lower), in units of the target.

    Args:
        lower: lower ends, the quantiles (1 - level) / 2 of the predictive, [B, C].
        upper: upper ends, the quantiles (1 + level) / 2, [B, C].

    Returns:
        A number of at least 0; less is better among predictives of one coverage.

    Raises:
        DataError: no rows, NaN, two shapes, or ends in the wrong order.

    Examples:
        >>> width(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [4.0]]))
        tensor(2.5000, dtype=torch.float64)
    """
    _check_ends("width", lower, upper)
    check_filled("width", lower=lower)
    return (upper.double() - lower).mean()


def interval_score(lower: Tensor, upper: Tensor, y: Tensor, *, level: float) -> Tensor:
    """Width of an interval, and a penalty for the target outside it; a row and output each.

    (upper - lower) + 2 / (1 - level) max(lower - y, y - upper, 0)

    Args:
        lower: the quantile (1 - level) / 2 of the predictive [B, C].
        upper: its quantile (1 + level) / 2 [B, C].
        y: [B, C].
        level: of the central interval, in (0, 1).

    Returns:
        [B, C], in units of the target; less is better.

    Raises:
        DataError: NaN, shapes that differ, or ends in the wrong order.
        ConfigError: a level outside (0, 1).

    Examples:
        >>> interval_score(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([[0.3], [1.5]]), level=0.5)
        tensor([[1.],
                [3.]], dtype=torch.float64)

    Source: Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102, eq. 43.
    """
    check_level("interval_score", level)
    check_alike("interval_score", lower=lower, upper=upper, y=y)
    _check_ends("interval_score", lower, upper)
    lower, upper, y = lower.double(), upper.double(), y.double()
    outside = torch.maximum(lower - y, y - upper).clamp_min(0)
    return (upper - lower) + 2.0 / (1.0 - level) * outside


def pinball(quantile: Tensor, y: Tensor, *, level: float) -> Tensor:
    """Loss of a quantile, (1[y < q] - level) (q - y); a row and output each.

    Its integral over levels, twice, is the CRPS.

    Args:
        quantile: q, the value with P(Y <= q) = level under the predictive, [B, C].
        y: [B, C].
        level: in (0, 1).

    Returns:
        [B, C], at least 0, in units of the target; less is better.

    Raises:
        DataError: NaN, or two shapes.
        ConfigError: a level outside (0, 1).

    Examples:
        >>> pinball(torch.tensor([[0.5], [0.5]]), torch.tensor([[0.3], [1.5]]), level=0.2)
        tensor([[0.1600],
                [0.2000]], dtype=torch.float64)

    Source: Koenker and Bassett (1978), Econometrica 46(1).
    """
    check_level("pinball", level)
    check_alike("pinball", quantile=quantile, y=y)
    quantile, y = quantile.double(), y.double()
    return ((y < quantile).double() - level) * (quantile - y)


def sharpness(variance: Tensor) -> Tensor:
    """Root mean predictive variance, sqrt(mean Var[y | x]), in units of the target: not the mean standard deviation.

    Args:
        variance: the total predictive variance [B, C], at least 0.

    Returns:
        A number of at least 0, what the `rmse` would be were the predictive true; less is better where calibrated.

    Raises:
        DataError: no rows, NaN, or a negative variance.

    Examples:
        >>> sharpness(torch.tensor([[1.0], [7.0]]))
        tensor(2., dtype=torch.float64)

    Source: Kuleshov et al. (2018), arXiv:1807.00263, whose mean variance it is the root of.
    """
    check_filled("sharpness", variance=variance)
    if variance.min() < 0:
        raise DataError(
            "sharpness(variance=)", want="at least 0", got=f"{float(variance.min()):.4g}", fix="pass variances"
        )
    return variance.double().mean().sqrt()


def crps_empirical(draws: Tensor, y: Tensor, *, fair: bool = False) -> Tensor:
    """CRPS of a predictive that is known by draws alone: E|X - y| - 1/2 E|X - X'| over draws; a row and output each.

    mean_s |x_s - y| - sum_st |x_s - x_t| / (2 S^2), by sorting, in S log S. Its second term counts each draw as a
    pair with itself, which makes the score of few draws too large; with `fair` it is divided by S (S - 1) instead.

    Args:
        draws: of the predictive [S, B, C].
        y: [B, C].
        fair: without that bias; then at least two draws, and scores that may fall below 0.

    Returns:
        [B, C], in units of the target; less is better. Of one draw, the absolute error.

    Raises:
        DataError: no draws, NaN, shapes that do not fit, or `fair` with one draw.

    Examples:
        >>> draws, y = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[1.0]])
        >>> float(crps_empirical(draws, y)), float(crps_empirical(draws, y, fair=True))
        (0.5, 0.0)

    Source: Gneiting and Raftery (2007), eq. 21, as `pyro.ops.stats.crps_empirical`; Ferro (2014), Q. J. R. Meteorol.
    Soc. 140, for `fair`.
    """
    size = len(draws) if draws.dim() else 0
    if draws.shape[1:] != y.shape or size < 1 + fair:
        raise DataError(
            "crps_empirical",
            want=f"draws [S, B, C], S at least {1 + fair}, and targets [B, C]",
            got=f"{list(draws.shape)} and {list(y.shape)}",
            fix="put draws on the first axis" if size >= 1 + fair else "make more draws",
        )
    check_numbers("crps_empirical", draws=draws.movedim(0, -1), y=y)  # the row is named, not the draw
    ordered, y = draws.double().sort(dim=0).values, y.double()
    gaps = ordered[1:] - ordered[:-1]  # [S - 1, B, C]
    left = torch.arange(1, size, dtype=torch.float64, device=draws.device)
    pairs: Tensor = torch.tensordot(left * (size - left), gaps, dims=1)  # sum over s < t of |x_s - x_t|, [B, C]
    return (ordered - y).abs().mean(dim=0) - pairs / (size * (size - 1) if fair else size**2)


def _check_ends(place: str, lower: Tensor, upper: Tensor) -> None:
    check_alike(place, lower=lower, upper=upper)
    if (lower > upper).any():
        row = int((lower > upper).nonzero()[0, 0])
        raise DataError(
            place, want="lower ends below upper ones", got=f"the other way in row {row}", fix="exchange the two"
        )
