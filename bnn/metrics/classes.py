"""Scores of class probabilities: accuracy, log loss, squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.metrics.checking import check_filled

# How far from 1 the probabilities of a row may sum: log probabilities in bfloat16 are this coarse. Logits are further off.
ROUNDING = 0.05


def accuracy(probs: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest probability is on the true class; of equal ones the first class counts.

    mean_b 1[argmax_c p_bc = y_b]

    Args:
        probs: [B, C]; only their order matters.
        y: int64 [B], in [0, C).

    Returns:
        A number in [0, 1]; more is better.

    Raises:
        DataError: no rows, NaN, shapes that do not fit, or classes outside [0, C).

    Examples:
        >>> accuracy(torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]]), torch.tensor([0, 0, 1]))
        tensor(0.6667, dtype=torch.float64)
    """
    _check("accuracy", probs, y)
    return (probs.argmax(dim=-1) == y).double().mean()


def top_k(probs: Tensor, y: Tensor, *, k: int) -> Tensor:
    """Share of rows whose true class is among the k most probable; of equal ones lower classes come first.

    mean_b 1[#{c : p_bc > p_by, or p_bc = p_by and c < y} < k]; the accuracy for k = 1

    Args:
        probs: [B, C]; only their order matters.
        y: int64 [B], in [0, C).
        k: from 1 to C.

    Returns:
        A number in [0, 1]; more is better.

    Raises:
        DataError: as of `accuracy`.
        ConfigError: k below 1 or above C.

    Examples:
        >>> top_k(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]), torch.tensor([1, 0]), k=2)
        tensor(0.5000, dtype=torch.float64)
    """
    _check("top_k", probs, y)
    if not 1 <= k <= probs.shape[1]:
        raise ConfigError(
            "top_k(k=)", want=f"1 to the number of classes, {probs.shape[1]}", got=str(k), fix="lower it, or leave it"
        )
    truth = probs.gather(1, y.unsqueeze(1))  # [B, 1]
    lower = torch.arange(probs.shape[1], device=y.device) < y.unsqueeze(1)  # [B, C]
    ahead = (probs > truth) | ((probs == truth) & lower)  # [B, C]
    return (ahead.sum(dim=1) < k).double().mean()


def nll(log_probs: Tensor, y: Tensor) -> Tensor:
    """Negative log likelihood, -mean_b log p(y_b | x_b), in nats.

    Give it the log of the mean predictive, log sum_s w_s p_s: the mean of the samples' own losses (Gibbs)
    is larger, by Jensen's inequality. That one is the same function of the mean of their logarithms.

    Args:
        log_probs: [B, C], whose exponentials sum to 1 over C, or less where logarithms were averaged.
        y: int64 [B], in [0, C).

    Returns:
        A number of at least 0, infinite where a row gives its class no chance; less is better.

    Raises:
        DataError: as of `accuracy`; and rows that are no log probabilities, such as logits.

    Examples:
        >>> nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([0, 0]))
        tensor(1.0397, dtype=torch.float64)
    """
    _check("nll", log_probs, y)
    _check_sums("nll", log_probs.double().exp(), "log_softmax", least=0.0)
    return -log_probs.gather(1, y.unsqueeze(1)).double().mean()


def brier(probs: Tensor, y: Tensor) -> Tensor:
    """Squared error of the probabilities: mean_b sum_c (p_bc - 1[y_b = c])^2, in [0, 2].

    Args:
        probs: [B, C], the mean over samples; they sum to 1 over C.
        y: int64 [B], in [0, C).

    Returns:
        A number in [0, 2]; less is better. Of two classes, twice the score of the positive class alone.

    Raises:
        DataError: as of `accuracy`; and rows that are no probabilities, such as logits.

    Examples:
        >>> brier(torch.tensor([[0.8, 0.2], [0.0, 1.0]]), torch.tensor([0, 0]))
        tensor(1.0400, dtype=torch.float64)

    Source: Brier (1950), in the multi-class form without the factor 1/2.
    """
    _check("brier", probs, y)
    wide = probs.double()
    _check_sums("brier", wide, "softmax")
    return (wide - torch.nn.functional.one_hot(y, probs.shape[1])).square().sum(dim=1).mean()


def check_probs(probs: Tensor, y: Tensor) -> None:
    """Raise DataError unless probs are [B, C] without NaN and y int64 [B] in [0, C). No rows are allowed.

    Args:
        probs: probabilities or their logarithms.
        y: classes.
    """
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
    if len(y):
        check_filled("metrics", probs=probs)


def check_distribution(place: str, probs: Tensor, y: Tensor) -> None:
    """Raise DataError unless there are rows, and each sums to 1."""
    _check(place, probs, y)
    _check_sums(place, probs.double(), "softmax")


def _check(place: str, probs: Tensor, y: Tensor) -> None:
    check_probs(probs, y)
    check_filled(place, y=y)


def _check_sums(place: str, probs: Tensor, function: str, *, least: float = 1.0) -> None:
    sums = probs.sum(dim=1)  # [B]
    wrong = (sums > 1.0 + ROUNDING) | (sums < least - ROUNDING) | (probs < -ROUNDING).any(dim=1)
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        raise DataError(
            place,
            want="probabilities of a row of at least 0 that sum to 1",
            got=f"the sum {float(sums[row]):.4g}, least {float(probs[row].min()):.4g}, in row {row}",
            fix=f"apply {function} over the classes first: nothing is guessed from values",
        )
