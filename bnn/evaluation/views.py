"""The samples of a bank seen in several ways: all, without one run of draws, and beginnings of it spread over the whole."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.functional import SampleSource
from bnn.spread import groups_of

GROUPS = 20  # runs of draws at least, where there are as many samples: their error is then known to a sixth
MOST_GROUPS = 32  # beyond, chains are joined


class Views(NamedTuple):
    """Which samples stand in which sum, and how sums become views.

    Sums are kept for R sets of samples: G runs of draws, which together are the bank, and sets by which beginnings of
    1, 2, 4, ... samples grow. Views are V: the whole bank, the bank without each run, and the beginnings.
    """

    log_weight: Tensor  # [S], the largest of them 0
    group: Tensor  # int64 [S], below G
    level: Tensor  # int64 [S], place of the smallest beginning with the sample
    num_groups: int
    sizes: tuple[int, ...]  # samples of each beginning, the whole bank last

    @property
    def num_sums(self) -> int:
        """R."""
        return self.num_groups + len(self.sizes) - 1

    @property
    def left_out(self) -> slice:
        """Places of the views without a run of draws."""
        return slice(1, 1 + (self.num_groups if self.num_groups > 1 else 0))

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
        if self.num_groups > 1:
            found[self.left_out, : self.num_groups] = 1.0 - torch.eye(self.num_groups, dtype=torch.float64)
        grown = len(self.sizes) - 1
        found[self.beginnings, self.num_groups :] = torch.ones(grown, grown, dtype=torch.float64).tril()
        return found

    def of(self, sums: Tensor) -> Tensor:
        """Views [..., V, B] of finite sums [..., R, B]. Sums of what is left are added up anew: differences would lose digits."""
        return self.matrix().to(sums.device) @ sums

    def of_logs(self, sums: Tensor) -> Tensor:
        """Views [..., V, B] of logarithms of sums [..., R, B], in logarithms."""
        runs, grown = sums[..., : self.num_groups, :], sums[..., self.num_groups :, :]
        forward = runs.logcumsumexp(dim=-2)
        views = [forward[..., -1:, :]]
        if self.num_groups > 1:
            backward = runs.flip(-2).logcumsumexp(dim=-2).flip(-2)
            inner = torch.logaddexp(forward[..., :-2, :], backward[..., 2:, :])
            views += [backward[..., 1:2, :], inner, forward[..., -2:-1, :]]
        return torch.cat([*views, grown.logcumsumexp(dim=-2)], dim=-2)

    def jackknife(self, values: Tensor, weight: Tensor) -> float | None:
        """Monte Carlo error of a figure, by leaving out one run of draws after the other.

        d_g = (1 - w_g) (theta - theta_-g);  error^2 = sum_g (d_g - mean d)^2 / (1 - sum_g w_g^2)

        which for runs of equal weights w_g = 1 / G is the delete-one jackknife, (G - 1) / G sum (theta_-g - mean)^2.

        Args:
            values: of the figure in each view, [V].
            weight: of the samples in each view, [V].

        Returns:
            The error; None with a single run, or where a view has no value.

        Source: batch means, Flegal and Jones (2010), arXiv:0811.1729; Efron and Stein (1981), Ann. Statist. 9(3).
        """
        without = values[self.left_out]
        if len(without) < 2 or not bool(without.isfinite().all()) or not math.isfinite(float(values[0])):
            return None
        share = 1.0 - weight[self.left_out] / weight[0]  # [G]
        apart = (1.0 - share) * (values[0] - without)
        spread = (apart - apart.mean()).square().sum() / (1.0 - share.square().sum())
        return float(spread.sqrt()) if math.isfinite(float(spread)) else None


def views_of(bank: SampleSource, *, errors: bool = True, beginnings: bool = True) -> Views:
    """Runs of draws by chain, and beginnings of 1, 2, 4, ... samples that lie evenly over chains and draws.

    Args:
        bank: with at least one sample.
        errors: whether there are runs to leave out.
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
    return Views(log_weight, group, level, num_groups, sizes)


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
