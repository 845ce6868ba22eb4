"""Rows from outside the distribution told from those inside, by a score that is larger where less is sure.

All four figures depend on the order of the scores alone; rows that tie cross a threshold together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.metrics.checking import check_rows


def auroc(score_in: Tensor, score_out: Tensor) -> float:
    """Probability that a row from outside has the larger uncertainty score; ties count half.

    Args:
        score_in: an uncertainty (larger means less sure) of in-distribution rows [N].
        score_out: the same of out-of-distribution rows [M], the positive class.

    Returns:
        A number in [0, 1], 1/2 where all scores are equal; more is better.

    Raises:
        DataError: no rows on one side, NaN, or scores that are not one a row.

    Examples:
        >>> round(auroc(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([0.4, 0.9])), 6)
        0.916667

    Source: Hendrycks and Gimpel (2017), arXiv:1610.02136.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_labelled("auroc", score_in, score_out)))


def aupr_out(score_in: Tensor, score_out: Tensor) -> float:
    """Average precision with the rows outside as positives: sum_n (R_n - R_(n-1)) P_n, over falling thresholds.

    P_n is the precision and R_n the recall at threshold n; no line is drawn between points, as the trapezoid rule
    does. A score without any information reaches the share of rows outside, M / (N + M).

    Args:
        score_in: an uncertainty of in-distribution rows [N].
        score_out: the same of out-of-distribution rows [M], the positive class.

    Returns:
        A number in (0, 1]; more is better. It changes with the ratio of N to M: state both.

    Raises:
        DataError: no rows on one side, NaN, or scores that are not one a row.

    Examples:
        >>> round(aupr_out(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.4, 0.9])), 6)
        0.833333

    Source: scikit-learn, `average_precision_score`; both directions, Hendrycks and Gimpel (2017), arXiv:1610.02136.
    """
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_labelled("aupr_out", score_in, score_out)))


def aupr_in(score_in: Tensor, score_out: Tensor) -> float:
    """Average precision with the rows inside as positives, which are to have the smaller scores; see `aupr_out`.

    Args:
        score_in: an uncertainty of in-distribution rows [N], the positive class.
        score_out: the same of out-of-distribution rows [M].

    Returns:
        A number in (0, 1], N / (N + M) without information; more is better.

    Raises:
        DataError: no rows on one side, NaN, or scores that are not one a row.

    Examples:
        >>> round(aupr_in(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.4, 0.9])), 6)
        0.916667
    """
    from sklearn.metrics import average_precision_score

    outside, rank = _labelled("aupr_in", score_in, score_out)
    return float(average_precision_score(1 - outside, -rank))


def fpr_at_tpr(score_in: Tensor, score_out: Tensor, *, tpr: float = 0.95) -> float:
    """Share of in-distribution rows flagged where the first threshold flags at least `tpr` of those outside.

    Args:
        score_in: an uncertainty of in-distribution rows [N].
        score_out: the same of out-of-distribution rows [M], the positive class.
        tpr: in (0, 1].

    Returns:
        A number in [0, 1]; less is better.

    Raises:
        DataError: no rows on one side, NaN, or scores that are not one a row.
        ConfigError: a rate outside (0, 1].

    Examples:
        >>> fpr_at_tpr(torch.tensor([0.1, 0.2, 0.5, 0.8]), torch.tensor([0.4, 0.9]))
        0.5

    Source: OpenOOD (Yang et al., 2022, arXiv:2210.07242) and Uncertainty Baselines, which take the same threshold.
    """
    from sklearn.metrics import roc_curve

    if not 0.0 < tpr <= 1.0:
        raise ConfigError("fpr_at_tpr(tpr=)", want="in (0, 1]", got=repr(tpr), fix="pass 0.95")
    false_positive, true_positive, _ = roc_curve(*_labelled("fpr_at_tpr", score_in, score_out), drop_intermediate=False)
    return float(false_positive[(true_positive >= tpr).argmax()])


def _labelled(place: str, score_in: Tensor, score_out: Tensor) -> tuple[Any, Any]:
    """1 for rows outside [N + M], and the dense ranks of all scores, so that infinite ones count as others do."""
    check_rows(place, score_in=score_in)
    check_rows(place, score_out=score_out)
    outside = torch.cat([torch.zeros_like(score_in, dtype=torch.int64), torch.ones_like(score_out, dtype=torch.int64)])
    rank = torch.cat([score_in.double(), score_out.double()]).unique(return_inverse=True)[1]
    return outside.cpu().numpy(), rank.cpu().numpy()
