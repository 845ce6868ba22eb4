"""The samples of a bank seen in several ways: all, halves of the runs of draws, and beginnings spread over the whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.spread import groups_of
from bnn.types import DrawTable

GROUPS = 20  # runs of draws at least, where there are as many samples: their error is then known to a sixth
MOST_GROUPS = 32  # beyond, chains are joined
FEW = 4  # runs up to which each is left out in turn: their three halves would tell less
PRIMES = (7, 11, 19, 23, 31)  # one below the orders of Paley's matrices, by which runs are halved
LEAST = 1e-12  # weight beside that of the bank, below which rounding is all there is
FAR = 690.0  # nats below the largest of several sums, where its exponential begins to lose digits


class Views(NamedTuple):
    """Which samples stand in which sum, and how sums become views.

    Sums are kept for R sets of samples: G runs of draws, which together are the bank, and sets by which beginnings of
    1, 2, 4, ... samples grow. Views are V: the whole bank, H balanced halves of its runs, and the beginnings.
    """

    log_weight: Tensor  # [S], the largest of them 0
    group: Tensor  # int64 [S], below G
    level: Tensor  # int64 [S], place of the smallest beginning with the sample
    num_groups: int
    halves: Tensor  # float64 [H, G], 1 where a run stands in a half
    sizes: tuple[int, ...]  # samples of each beginning, the whole bank last

    @property
    def num_sums(self) -> int:
        """R."""
        return self.num_groups + len(self.sizes) - 1

    @property
    def left_out(self) -> slice:
        """Places of the views that leave out half of the runs of draws."""
        return slice(1, 1 + len(self.halves))

    @property
    def beginnings(self) -> slice:
        """Places of the beginnings that are shorter than the bank."""
        return slice(self.left_out.stop, self.left_out.stop + len(self.sizes) - 1)

    @property
    def num_views(self) -> int:
        """V."""
        return int(self.beginnings.stop)

    def sets(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Sums that samples [K] stand in, int64 [r], and their weights in those, float64 [r, K]."""
        # NumPy, whose calls cost less: this is asked for every few samples.
        chosen = indices.numpy()
        weight = np.exp(self.log_weight.numpy()[chosen])
        place, column = self.group.numpy()[chosen], np.arange(len(chosen))
        if len(self.sizes) > 1:
            level = self.level.numpy()[chosen]
            grown = level < len(self.sizes) - 1  # the last beginning is the whole bank, which the runs make up
            place = np.concatenate([place, self.num_groups + level[grown]])
            column = np.concatenate([column, column[grown]])
        present = np.flatnonzero(np.bincount(place))
        weights = np.zeros((len(present), len(chosen)))
        weights[np.searchsorted(present, place), column] = weight[column]
        return torch.from_numpy(present), torch.from_numpy(weights)

    def matrix(self) -> Tensor:
        """Which sums make up each view, 0 and 1, float64 [V, R]."""
        found = torch.zeros(self.num_views, self.num_sums, dtype=torch.float64)
        found[0, : self.num_groups] = 1.0
        found[self.left_out, : self.num_groups] = self.halves
        grown = len(self.sizes) - 1
        found[self.beginnings, self.num_groups :] = torch.ones(grown, grown, dtype=torch.float64).tril()
        return found

    def of(self, sums: Tensor) -> Tensor:
        """Views [..., V, B] of finite sums [..., R, B]. Sums of what is left are added up anew: differences would lose digits."""
        return self.matrix().to(sums.device) @ sums

    def of_logs(self, sums: Tensor) -> Tensor:
        """Views [..., V, B] of logarithms of sums [..., R, B], in logarithms."""
        top = sums.amax(dim=-2, keepdim=True)
        top = torch.where(top.isfinite(), top, torch.zeros_like(top))
        if bool(((sums - top < -FAR) & (sums > -torch.inf)).any()):
            rows = self.matrix().bool().to(sums.device)
            return torch.stack([sums[..., row, :].logsumexp(dim=-2) for row in rows], dim=-2)
        return self.of((sums - top).exp()).log() + top

    def monte_carlo_error(self, values: Tensor, weight: Tensor) -> float | None:
        """How much a figure would move with other samples: its spread over balanced halves of the runs of draws.

        e_h = W_h (theta_h - theta), less its part along 1 - W_h;  error^2 = sum_h e_h^2 / (sum_h W_h (1 - W_h) - L)
        L   = sum_g w_g (a_g - sum_g w_g a_g)^2 / sum_h (1 - W_h)^2,  a_g = sum of 1 - W_h over the halves with run g

        for runs of weights w_g and halves of weights W_h. A bias that falls as 1 / S lies along 1 - W_h. Where all W_h are 1/2,
        this is the variance of theta_h; of means, its expectation is their own variance whatever the w_g, if runs are
        independent and the variance of each is as 1 / w_g. Leaving out one run at a time would say the same of smooth figures,
        and too much of those that jump: jumps are rare among views that are so close to the whole, and counted G - 1 times.

        Args:
            values: of the figure in each view, [V].
            weight: of the samples in each view, [V].

        Returns:
            The error; None with a single run that weighs anything, or where a view has no value.

        Source: balanced half-samples, McCarthy (1969), Rev. Int. Stat. Inst. 37(3); leaving out many at once where figures
            jump, Shao and Wu (1989), Ann. Statist. 17(3); runs of draws, Flegal and Jones (2010), arXiv:0811.1729.
        """
        found = values[self.left_out]
        if not len(found) or not bool(found.isfinite().all()) or not math.isfinite(float(values[0])):
            return None
        share = weight[self.left_out] / weight[0]  # [H]
        rest = 1.0 - share
        squared = float(rest @ rest)
        if squared < LEAST:
            return None
        apart = share * (found - values[0])
        apart = apart - rest * (rest @ apart) / squared
        of_run = _of_runs(self.log_weight, self.group, self.num_groups)
        along = rest @ self.halves  # [G]
        free = float(share @ rest - of_run @ (along - of_run @ along).square() / squared)
        return math.sqrt(float(apart @ apart) / free) if free > LEAST else None


def views_of(bank: DrawTable, *, errors: bool = True, beginnings: bool = True) -> Views:
    """Runs of draws by chain, and beginnings of 1, 2, 4, ... samples that lie evenly over chains and draws.

    Args:
        bank: with at least one sample.
        errors: whether there are halves.
        beginnings: whether beginnings are wanted.
    """
    size = len(bank)
    log_weight = bank.log_weight.double()
    log_weight = log_weight - log_weight.max()
    group, num_groups = torch.zeros(size, dtype=torch.int64), 1
    if errors:
        group, _ = groups_of(bank, num=GROUPS)
        group = group.unique(return_inverse=True)[1]  # without runs of chains too short for them
        num_groups = int(group.max()) + 1
        if num_groups > MOST_GROUPS:
            group, num_groups = group * GROUPS // num_groups, GROUPS
    sizes, level = (size,), torch.zeros(size, dtype=torch.int64)
    if beginnings:
        sizes = tuple(2**power for power in range((size - 1).bit_length())) + (size,)
        order = np.lexsort((bank.draw.numpy(), bank.chain.numpy()))
        level = torch.empty(size, dtype=torch.int64)
        level[torch.from_numpy(order)] = _levels(size)
    halves = _halves(_of_runs(log_weight, group, num_groups))
    return Views(log_weight, group, level, num_groups, halves, sizes)


def _of_runs(log_weight: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Weights of the runs of draws [G], which sum to 1."""
    weight = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group, log_weight.exp())
    return weight / weight.sum()


def _halves(weight: Tensor) -> Tensor:
    """Halves of runs of weights [G], 0 and 1, float64 [H, G]: of five runs or more G - 1 <= H <= G + 6.

    Each is a row of a Hadamard matrix of order H + 1 >= G, but its first, of which the columns are orthogonal: any two runs
    are apart in one half more than they are together. Of G = H + 1 runs each half holds G / 2. Of fewer runs the last columns are
    used, and of the two sides of a row the heavier one, so that none is without weight.

    Source: Paley (1933), J. Math. Phys. 12, construction I; Wolter (2007), Introduction to Variance Estimation, chapter 3.
    """
    size = len(weight)
    if size <= FEW:
        return (1.0 - torch.eye(size, dtype=torch.float64))[: size if size > 1 else 0]
    prime = next(prime for prime in PRIMES if prime + 1 >= size)
    number = torch.arange(prime)
    residue = torch.zeros(prime, dtype=torch.bool)
    residue[number.square() % prime] = True  # with 0, the diagonal
    inside = torch.zeros(prime, prime + 1, dtype=torch.bool)
    inside[:, 1:] = residue[(number - number[:, None]) % prime]
    inside[::2] = ~inside[::2]  # no run is to stand in all halves, or in none
    inside = inside[:, prime + 1 - size :]
    light = inside.double() @ weight < 0.5 - LEAST  # but for rounding, halves of the same weight stay
    inside[light] = ~inside[light]
    return inside.double()


def _levels(size: int) -> Tensor:
    """Of each place in a row, the smallest power of two by which an evenly spread beginning reaches it, int64 [size]."""
    bits = max((size - 1).bit_length(), 1)
    number = np.arange(1 << bits)
    place = np.zeros_like(number)
    for bit in range(bits):
        place |= ((number >> bit) & 1) << (bits - 1 - bit)
    chosen = place[place < size]  # places in the order in which they are taken
    levels = np.empty(size, dtype=np.int64)
    levels[chosen] = np.ceil(np.log2(np.arange(1, size + 1))).astype(np.int64)
    return torch.from_numpy(levels)
