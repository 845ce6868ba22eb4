"""Uncertainty of predictions and its parts: total = aleatoric + epistemic. Entropies in nats.

Every score is larger where less is sure. Half precision is widened to float32 once, at the door.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.errors import DataError


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
    terms: Tensor = torch.special.entr(_wide(probs))
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
    probs = _wide(probs)
    total = entropy(probs.mean(dim=0))  # [B]
    return (total - expected_entropy(probs)).clamp_min(0)  # rounding can leave -1e-17


def variation_ratio(votes: Tensor) -> Tensor:
    """Share of samples that do not vote for the most frequent class: 1 - max_c v_c / sum_c v_c.

    Args:
        votes: for each class the number, or the weight, of samples that find it the most probable, [..., C]:
            samples are counted already, and have no axis of their own.

    Returns:
        [...], in [0, 1 - 1 / C].

    Raises:
        DataError: votes that are negative or NaN, or a row without any.

    Examples:
        >>> variation_ratio(torch.tensor([[7, 3, 0], [4, 6, 0]]))
        tensor([0.3000, 0.4000], dtype=torch.float64)

    Source: Freeman (1965), Elementary Applied Statistics; Gal (2016), section 3.3.1.
    """
    votes = _checked_votes("variation_ratio", votes)
    return 1.0 - votes.amax(dim=-1) / votes.sum(dim=-1)


def disagreement(votes: Tensor, *, squared_weights: float | Tensor | None = None) -> Tensor:
    """Probability that two different samples vote for different classes.

    1 - sum_c v_c (v_c - 1) / (S (S - 1)) of counts v_c, S their sum
    1 - (sum_c v_c^2 - q) / (V^2 - q) of weights, V the sum of v_c, and q = sum_s w_s^2 the chance of one sample twice

    Args:
        votes: for each class the number, or the weight, of samples that find it the most probable, [..., C].
        squared_weights: q, a number or [...]; needed where votes are weights, as only counts tell it.

    Returns:
        [...], in [0, 1]; 0 where there is one sample, and so no two.

    Raises:
        DataError: votes that are negative or NaN, a row without any, or shares of votes without `squared_weights`.

    Examples:
        >>> disagreement(torch.tensor([[3, 0], [2, 1]]))
        tensor([0.0000, 0.6667], dtype=torch.float64)
        >>> disagreement(torch.tensor([[1.0, 0.0], [2 / 3, 1 / 3]]), squared_weights=1 / 3)
        tensor([0.0000, 0.6667], dtype=torch.float64)
    """
    votes = _checked_votes("disagreement", votes)
    total = votes.sum(dim=-1)
    if squared_weights is None:
        if not torch.equal(votes, votes.round()):
            raise DataError(
                "disagreement(votes=)",
                want="counts of samples, or squared_weights= beside their weights",
                got="votes that are no whole numbers",
                fix="pass the sum of the samples' squared weights",
            )
        same = total  # each sample weighs 1
    else:
        same = torch.as_tensor(squared_weights, dtype=torch.float64, device=votes.device)
    pairs = total.square() - same
    agree = (votes.square().sum(dim=-1) - same) / pairs
    one = pairs <= 1e-12 * total.square()  # all weight on one sample, up to rounding
    return torch.where(one, torch.zeros_like(agree), (1.0 - agree).clamp(0.0, 1.0))


def prior_shift(log_probs: Tensor, *, train: Any, natural: Any) -> Tensor:
    """Probabilities of a model that was trained on other class shares than it meets, in logarithms.

    log p'(c | x) = log p(c | x) + log pi'_c - log pi_c - log Z(x), with Z making them sum to 1

    Exact where the two populations differ in their class shares alone. For a mixture over samples correct
    each sample before averaging: the correction is not linear.

    Args:
        log_probs: logits or log probabilities [..., C].
        train: pi, shares of the classes that were trained on [C], above 0, need not sum to one.
        natural: pi', shares where predictions are made [C], at least 0.

    Returns:
        Log probabilities [..., C].

    Raises:
        DataError: shares that are not one finite number a class in that range.

    Examples:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> prior_shift(half, train=[0.5, 0.5], natural=[0.9, 0.1]).exp()
        tensor([0.9000, 0.1000])

    Source: Saerens, Latinne and Decaestecker (2002), Neural Comput. 14(1), eq. 2.4.
    """
    shares = {}
    for name, given, least in (("train", train, "above 0"), ("natural", natural, "of at least 0")):
        share = torch.as_tensor(given, dtype=torch.float64, device=log_probs.device)
        legal = torch.isfinite(share) & ((share > 0) if name == "train" else (share >= 0))
        if share.shape != log_probs.shape[-1:] or not legal.all() or not share.sum() > 0:
            raise DataError(
                f"prior_shift({name}=)",
                want=f"{log_probs.shape[-1]} finite shares {least}, one a class",
                got=str(share.tolist())[:100],
                fix="count the classes of the data",
            )
        shares[name] = share / share.sum()
    ratio = (shares["natural"].log() - shares["train"].log()).to(log_probs)  # [C]
    return (log_probs + ratio).log_softmax(dim=-1)


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

    Returns:
        The three; of one sample the epistemic part is 0.
    """
    means, scales = _wide(means), _wide(scales)
    aleatoric = scales.expand_as(means).square().mean(dim=0)
    epistemic = means.var(dim=0, correction=0)
    return Variance(aleatoric + epistemic, aleatoric, epistemic)


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _checked_votes(place: str, votes: Tensor) -> Tensor:
    votes = votes.double()
    fine = (votes >= 0).all(dim=-1) & (votes.sum(dim=-1) > 0)  # [...]; a NaN compares as False
    if votes.dim() < 1 or not fine.all():
        raise DataError(
            f"{place}(votes=)",
            want="votes of at least 0, some in each row",
            got="a row of none" if votes.dim() and bool((votes == 0).all(dim=-1).any()) else "negative ones or NaN",
            fix="count the samples whose most probable class it is",
        )
    return votes
