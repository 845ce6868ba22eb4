"""Uncertainty of predictions and its parts: total = aleatoric + epistemic. Entropies in nats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def entropy(probs: Tensor) -> Tensor:
    """H[p] = -sum_c p_c log p_c, in nats, with 0 log 0 = 0.

    Args:
        probs: class probabilities [..., C], summing to 1 over C.

    Returns:
        Entropy [...], in [0, log C].

    Examples:
        >>> entropy(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
        tensor([0.0000, 0.6931])
    """
    terms: Tensor = torch.special.entr(probs)
    return terms.sum(dim=-1)


def expected_entropy(probs: Tensor) -> Tensor:
    """Aleatoric part of the predictive entropy, in nats: E_theta H[p(y | x, theta)].

    Args:
        probs: class probabilities [K, B, C].

    Returns:
        [B], in [0, log C].

    Source: Depeweg et al. (2018), arXiv:1710.07283.
    """
    return entropy(probs).mean(dim=0)  # [K, B] -> [B]


def mutual_information(probs: Tensor) -> Tensor:
    """Epistemic part of the predictive entropy, in nats.

    I[y; theta] = H[E_theta p(y | x, theta)] - E_theta H[p(y | x, theta)]

    Args:
        probs: class probabilities [K, B, C].

    Returns:
        Mutual information [B], in [0, min(log C, log K)].

    Source: Houlsby et al. (2011), arXiv:1112.5745, eq. 2.
    """
    total = entropy(probs.mean(dim=0))  # [B]
    return (total - expected_entropy(probs)).clamp_min(0)  # rounding can leave -1e-17


class Variance(NamedTuple):
    """Predictive variance and its parts, each [B, C] in squared units of the target."""

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def variance(means: Tensor, scales: Tensor) -> Variance:
    """Law of total variance of an equal-weight mixture of normals.

    aleatoric = mean_k sigma_k^2;  epistemic = mean_k (mu_k - mean mu)^2;  total = their sum, exactly

    Args:
        means: mu [K, B, C].
        scales: sigma, what broadcasts to [K, B, C].
    """
    aleatoric = scales.expand_as(means).square().mean(dim=0)
    epistemic = means.var(dim=0, correction=0)
    return Variance(aleatoric + epistemic, aleatoric, epistemic)
