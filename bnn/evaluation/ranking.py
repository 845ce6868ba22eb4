"""Figures that depend on the order of rows by a score, for many score lists at once and with weights of rows.

Scores of R lists [R, N] are sorted once; weights [R, N] are whole numbers where rows are drawn again, and 1 where they
are not. Rows that tie cross a threshold together. The values are those of `bnn.metrics`, which has the definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.seeding import generator

RESAMPLES = 200  # of the rows: a standard deviation over so many is known to a twentieth
DRAWN_VALUES = 2**21  # rows drawn again at once
RESAMPLED_VALUES = 2**16  # of which so many are handled at once: several arrays of them fit into a cache


class Ranked(NamedTuple):
    """Rows by a score, the largest first."""

    order: Tensor  # int64 [R, N]
    last: Tensor  # bool [R, N] whether the place is the last one of equal scores


def ranked(score: Tensor) -> Ranked:
    """Scores [R, N], sorted from the largest to the least."""
    ordered, order = score.sort(dim=-1, descending=True, stable=True)
    last = torch.ones_like(order, dtype=torch.bool)
    last[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    return Ranked(order, last)


class Outside(NamedTuple):
    """Weights of rows from inside and outside that a falling threshold has flagged, at each place [R, N + M]."""

    inside: Tensor
    outside: Tensor
    last: Tensor

    @staticmethod
    def of(weight: Tensor, is_outside: Tensor, last: Tensor) -> Outside:
        """From weights [R, N + M] in the order of the scores, and which rows are from outside."""
        zero = torch.zeros_like(weight)
        inside, outside = (torch.where(side, weight, zero).cumsum(dim=-1) for side in (~is_outside, is_outside))
        return Outside(inside, outside, last)

    def auroc(self) -> Tensor:
        """P(score outside > score inside) + P(equal) / 2, [R]."""
        inside, outside = _before(self.inside, self.last), _before(self.outside, self.last)
        area = ((self.inside - inside) * (self.outside + outside) * 0.5 * self.last).sum(dim=-1)
        return area / (self.inside[..., -1] * self.outside[..., -1])

    def average_precision(self) -> Tensor:
        """sum_n (R_n - R_(n-1)) P_n with the rows outside as positives, [R]."""
        flagged = (self.inside + self.outside).clamp_min(1e-12)  # rows of no weight may come first
        gained = self.outside - _before(self.outside, self.last)
        return (gained * self.outside / flagged * self.last).sum(dim=-1) / self.outside[..., -1]

    def fpr(self, tpr: float = 0.95) -> Tensor:
        """Share inside that is flagged where first at least `tpr` outside are, [R]."""
        enough = self.last & (self.outside / self.outside[..., -1:] >= tpr)
        first = enough.int().argmax(dim=-1, keepdim=True)
        return (self.inside.gather(-1, first) / self.inside[..., -1:]).squeeze(-1)


class Kept(NamedTuple):
    """Weights and losses of the rows that are kept while the least sure ones are refused, at each place [R, N]."""

    kept: Tensor
    lost: Tensor
    last: Tensor

    @staticmethod
    def of(weight: Tensor, loss: Tensor, last: Tensor) -> Kept:
        """From weights and losses [R, N] in the order of confidence, the surest row first."""
        return Kept(weight.cumsum(dim=-1), (weight * loss).cumsum(dim=-1), last)

    def aurc(self) -> Tensor:
        """Area under the risk over coverages from 0 to 1: trapezia, and the first risk down to coverage 0, [R]."""
        kept = self.kept.clamp_min(1e-12)
        before = _before(self.kept, self.last)
        risk = self.lost / kept
        earlier = torch.where(before > 0, _before(self.lost, self.last) / before.clamp_min(1e-12), risk)
        area = ((self.kept - before) * (risk + earlier) * 0.5 * self.last).sum(dim=-1)
        return area / self.kept[..., -1]

    def augrc(self) -> Tensor:
        """Area under the risk times coverage, trapezia from the origin, [R]."""
        width = self.kept - _before(self.kept, self.last)
        area = (width * (self.lost + _before(self.lost, self.last)) * 0.5 * self.last).sum(dim=-1)
        return area / self.kept[..., -1].square()

    def coverage_at_risk(self, risk: float = 0.05) -> Tensor:
        """Largest coverage whose risk is at most this, or 0, [R]."""
        fine = (self.lost / self.kept.clamp_min(1e-12) <= risk) & self.last
        return torch.where(fine, self.kept, 0.0).amax(dim=-1) / self.kept[..., -1]

    def risk_at_coverage(self, coverage: float = 0.8) -> Tensor:
        """Risk at the first threshold that keeps so much, [R]."""
        enough = (self.kept / self.kept[..., -1:] >= coverage) & self.last
        # Both only grow, so that the least of them are those of the first threshold.
        kept, lost = (torch.where(enough, sums, torch.inf).amin(dim=-1) for sums in (self.kept, self.lost))
        return lost / kept


class Surest(NamedTuple):
    """Rows in the order of their confidence, the surest first, in the bank and in each half of its runs of draws."""

    lost: Tensor  # [1 + H, N] whether each is wrong
    last: Tensor  # bool [1 + H, N] whether it is the last of those that tie

    @staticmethod
    def of(score: Tensor, correct: Tensor) -> Surest:
        """From scores that are less of surer rows, and whether these are right, both [1 + H, N]."""
        order, last = ranked(-score)
        return Surest(1.0 - correct.gather(1, order), last)

    def kept(self, weight: Tensor) -> Kept:
        """Of the whole bank, with weights [R, N] of the rows."""
        return Kept.of(weight, self.lost[:1], self.last[:1])


def by_influence(figure: Callable[[Tensor], Tensor], sizes: tuple[int, ...]) -> float:
    """Standard error over rows of a smooth figure, by the infinitesimal jackknife.

    error^2 = sum over sides of N / (N - 1) sum_n (u_n - mean u)^2,  u_n = d figure / d w_n at the weights w = 1

    Args:
        figure: weights [1, N] -> [1].
        sizes: rows of each side, drawn apart; N in all. Weights of the first side come first.

    Source: Jaeckel (1972), Bell Labs memorandum MM 72-1215-11; Efron (1982), The Jackknife, chapter 6.
    """
    with torch.enable_grad():
        weight = torch.ones(1, sum(sizes), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(figure(weight).sum(), weight)
    sides = slope[0].split(list(sizes))
    return math.sqrt(sum(float(side.var(correction=0)) * len(side) ** 2 / (len(side) - 1) for side in sides))


def by_resampling(figure: Callable[[Tensor], Tensor], sizes: tuple[int, ...], *, seed: int = 0) -> float:
    """Standard error over rows of a figure with jumps: the spread of it on rows drawn again with replacement.

    Args:
        figure: weights [R, N] -> [R].
        sizes: rows of each side, drawn apart; N in all. Weights of the first side come first.
        seed: of the draws.

    Source: Efron (1979), Ann. Statist. 7(1).
    """
    (error,) = all_by_resampling([figure], sizes, seed=seed)
    return error


def all_by_resampling(
    figures: Sequence[Callable[[Tensor], Tensor]], sizes: tuple[int, ...], *, seed: int = 0
) -> list[float]:
    """The same of several figures [R], or [..., R], of rows that are drawn once; an error for each number but R."""
    source, found = generator(seed, "resample", *sizes), []
    for drawn in torch.arange(RESAMPLES).split(max(1, DRAWN_VALUES // sum(sizes))):
        sides = [torch.randint(size, (len(drawn), size), generator=source) for size in sizes]
        step = max(1, RESAMPLED_VALUES // sum(sizes))
        for some in zip(*(side.split(step) for side in sides), strict=True):
            weight = torch.cat([_times(side) for side in some], dim=1)  # [r, N]
            found.append(torch.cat([figure(weight).reshape(-1, len(weight)) for figure in figures]))
    errors: list[float] = torch.cat(found, dim=1).std(dim=1).tolist()
    return errors


def _times(drawn: Tensor) -> Tensor:
    """How often each row was drawn, float64 [R, N], from as many numbers of rows, which are written over."""
    drawn += drawn.shape[1] * torch.arange(len(drawn))[:, None]
    return drawn.flatten().bincount(minlength=drawn.numel()).view_as(drawn).double()


def _before(values: Tensor, last: Tensor) -> Tensor:
    """Of sums that grow [R, N], what they were at the threshold before the one of each place; 0 at the first."""
    reached = torch.where(last, values, torch.zeros_like(values)).cummax(dim=-1).values
    return torch.nn.functional.pad(reached[..., :-1], (1, 0))
