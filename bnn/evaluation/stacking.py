"""Weights of several banks by how well each predicts, and the bank of all their samples under these weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.bank import Bank, merge
from bnn.bank.moving import Progress
from bnn.errors import ConfigError, DataError, NotConverged

TOLERANCE = 1e-9  # nats a row that other weights could still gain
MOST_STEPS = 20_000
LEAST_STEP = 1e-6


class Stacking(NamedTuple):
    """Weights of K banks, and what they are worth."""

    weights: Tensor  # [K], at least 0, summing to 1
    elpd: float  # sum over rows of the log density of the mixture, nats
    error: float  # its standard error over rows; NaN of a single one
    gain: float  # elpd less that of the best single bank
    gap: float  # what any other weights could add to elpd at most


def stacking_weights(log_densities: Tensor, *, tolerance: float = TOLERANCE) -> Stacking:
    """Weights under which the mixture of K predictives gives rows the largest density.

    w = argmax mean_n log sum_k w_k p_k(y_n),  w_k >= 0, sum_k w_k = 1

    The function is concave. With g_k = mean_n p_k(y_n) / sum_j w_j p_j(y_n) no weights can be better by more than
    log max_k g_k, which tells when to stop; steps w_k exp(step g_k) grow while they help.

    The densities must be of rows that the bank has not learnt from: `loo(...).rows`, or `log_predictive()` on held-out rows.

    Args:
        log_densities: log p_k(y_n) of each bank and row, [K, N]; -inf where a bank excludes a row.
        tolerance: nats a row that other weights may still gain.

    Raises:
        DataError: not [K, N] with at least one bank and row, NaN or +inf, or a row that all banks exclude.
        ConfigError: a tolerance that is not positive.

    Examples:
        >>> density = torch.tensor([[0.8, 0.8, 0.8, 0.2], [0.2, 0.2, 0.2, 0.8]], dtype=torch.float64)
        >>> [round(weight, 4) for weight in stacking_weights(density.log()).weights.tolist()]
        [0.9167, 0.0833]

    Source: Yao et al. (2018), arXiv:1704.02030, eq. 4.
    """
    if not tolerance > 0:
        raise ConfigError("stacking_weights(tolerance=)", want="a positive number", got=str(tolerance), fix="try 1e-9")
    density, shift = _scaled(log_densities)  # [K, N], [N]
    weights = torch.full((len(density),), 1.0 / len(density), dtype=torch.float64)
    step, value = 1.0, _value(weights, density)
    gap = math.inf
    for _ in range(MOST_STEPS):
        gradient = (density / (weights @ density)).mean(dim=1)  # [K]
        gap = max(0.0, float(gradient.max().log()))
        if gap <= tolerance:
            break
        while True:
            tried = (weights.log() + step * (gradient - 1.0)).softmax(dim=0)
            better = _value(tried, density)
            if better >= value or step < LEAST_STEP:
                break
            step /= 4.0
        weights, value, step = tried, better, 2.0 * step
    else:
        warnings.warn(
            f"stacking: after {MOST_STEPS} steps other weights could still gain {gap:.1e} nats a row, "
            f"tolerance={tolerance:g}; the predictives may be nearly the same",
            NotConverged,
            stacklevel=2,
        )
    rows = (weights @ density).log() + shift
    single = float((density.log() + shift).sum(dim=1).max())
    error = float(rows.std(correction=0)) * math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Stacking(weights, float(rows.sum()), error, float(rows.sum()) - single, gap * len(rows))


def stack(
    banks: Sequence[Bank],
    weights: Tensor | Sequence[float],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the samples of several, so that bank k weighs w_k in total.

    log_weight_ks = own_ks + log w_k - log sum_s exp(own_ks)

    Its predictive is sum_k w_k p_k. It is `merge(banks, out, shares=weights)`, whose rules hold: one layout, one
    likelihood, and `bank.json` says in `merged` what came from where, with `share`.

    Args:
        banks: at least two, of one module.
        weights: [K], at least 0, summing to 1, such as `stacking_weights(...).weights`.
        out: folder of the new bank.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are read, and how many there are.

    Raises:
        ConfigError, BankMismatch, BankError, BankExists: as of `merge`.

    Examples:
        >>> import tempfile
        >>> modules = [torch.nn.Linear(3, 2) for _ in range(2)]
        >>> banks = [Bank.from_state_dicts([m.state_dict()] * k, module=m) for k, m in zip((1, 3), modules, strict=True)]
        >>> [round(weight, 4) for weight in stack(banks, [0.4, 0.6], tempfile.mkdtemp()).log_weight.exp().tolist()]
        [0.4, 0.2, 0.2, 0.2]
    """
    shares = weights.double().tolist() if isinstance(weights, Tensor) else [float(weight) for weight in weights]
    return merge(banks, out, shares=shares, overwrite=overwrite, progress=progress)


def _scaled(log_densities: Tensor) -> tuple[Tensor, Tensor]:
    """Densities [K, N] over the largest of each row, and the logarithm of that [N]."""
    if log_densities.dim() != 2 or not log_densities.numel():
        raise DataError(
            "stacking_weights",
            want="log densities [K, N]",
            got=str(list(log_densities.shape)),
            fix="stack them by bank",
        )
    values = log_densities.double()
    if bool((values.isnan() | values.isposinf()).any()):
        bank = int((values.isnan() | values.isposinf()).any(dim=1).nonzero()[0])
        raise DataError(
            f"stacking_weights, bank {bank}", want="numbers", got="NaN or +inf", fix="look at that bank's samples"
        )
    shift = values.amax(dim=0)
    if bool(shift.isneginf().any()):
        row = int(shift.isneginf().nonzero()[0])
        raise DataError(
            f"stacking_weights, row {row}", want="a density above 0", got="0 under every bank", fix="leave the row out"
        )
    return (values - shift).exp(), shift


def _value(weights: Tensor, density: Tensor) -> float:
    return float((weights @ density).log().mean())
