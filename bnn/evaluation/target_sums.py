"""Sums over samples that figures of a regression are made of, for one batch of rows, in memory that does not grow with S."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.evaluation.views import Views
from bnn.mixtures import Mixture, PoissonMixture


class TargetRows(NamedTuple):
    """What each view of a bank says of each row, in units of the target, float64."""

    mean: Tensor  # [V, B, C]
    aleatoric: Tensor  # [V, B, C] expected noise variance
    epistemic: Tensor  # [V, B, C] variance of the samples' means
    log_prob: Tensor  # [V, B] of the mixture at the target, in nats
    expected_log_prob: Tensor  # [V, B] of the samples at the target, for the Gibbs loss
    pit: Tensor  # [V, B, C] P(Y <= y)
    pit_below: Tensor  # [V, B, C] P(Y < y)
    weight: Tensor  # [V] of the samples


class TargetSums:
    """Moments, log densities and distribution functions of samples, summed by the sets of `Views`.

    Samples may come in any order and any blocks, and sums of some be merged with those of others.

    Args:
        views: the sets of samples to keep apart.
        y: targets [B, C], float64.
    """

    def __init__(self, views: Views, y: Tensor) -> None:
        size = views.num_sums
        self.views, self.y = views, y
        self.weight = torch.zeros(size, dtype=torch.float64)
        self._shift: Tensor | None = None  # moments about a value close by: their differences keep their digits
        self._first, self._second, self._noise, self._pit = (y.new_zeros(size, *y.shape) for _ in range(4))
        self._infinite = False  # noise of Student's t with few degrees of freedom, which has no variance
        self._below: Tensor | None = None  # where it differs: for counts
        self._gibbs, self._log_prob = y.new_zeros(size, len(y)), y.new_full((size, len(y)), -torch.inf)

    def add(self, indices: Tensor, part: Mixture) -> None:
        """What samples [K] say: a mixture of K, whose own weights are not looked at."""
        present, weights = self.views.sets(indices)
        centres = part.centres  # [K, B, C]
        if self._shift is None:
            self._shift = centres[0].clone()
        self.weight.index_add_(0, present, weights.sum(dim=1))
        centred = centres - self._shift
        self._first.index_add_(0, present, _summed(weights, centred))
        self._second.index_add_(0, present, _summed(weights, centred.square()))
        if bool(part.variances.isinf().any()):
            self._infinite = True
        else:
            self._noise.index_add_(0, present, _summed(weights, part.variances).expand(-1, *self.y.shape))
        self._pit.index_add_(0, present, _summed(weights, part.cdfs(self.y)))
        if isinstance(part, PoissonMixture):
            if self._below is None:
                self._below = torch.zeros_like(self._pit)
            self._below.index_add_(0, present, _summed(weights, part.cdfs(self.y - 1)))
        log_probs = part.log_probs(self.y)  # [K, B]
        self._gibbs.index_add_(0, present, _summed(weights, log_probs))
        for place, row in zip(present.tolist(), weights, strict=True):
            mine = row > 0
            if mine.any():
                block = torch.logsumexp(log_probs[mine] + row[mine].log()[:, None], dim=0)  # [B]
                self._log_prob[place] = torch.logaddexp(self._log_prob[place], block)

    def merge(self, other: TargetSums) -> None:
        """Add the sums of other samples of the same bank on the same rows."""
        if other._shift is None:
            return
        if self._shift is None:
            self._shift = other._shift.clone()
        apart = other._shift - self._shift
        weight = other.weight[:, None, None]
        self._second += other._second + 2.0 * apart * other._first + weight * apart.square()
        self._first += other._first + weight * apart
        self.weight += other.weight
        self._noise += other._noise
        self._infinite |= other._infinite
        self._pit += other._pit
        self._gibbs += other._gibbs
        self._log_prob = torch.logaddexp(self._log_prob, other._log_prob)
        if other._below is not None:
            self._below = other._below.clone() if self._below is None else self._below + other._below

    def state(self) -> dict[str, Any]:
        """All sums by name, for `merge` on another rank; empty where no sample has come."""
        if self._shift is None:
            return {}
        found = {
            "weight": self.weight,
            "shift": self._shift,
            "first": self._first,
            "second": self._second,
            "noise": self._noise,
            "pit": self._pit,
            "gibbs": self._gibbs,
            "log_prob": self._log_prob,
            "infinite": self._infinite,
        }
        return found if self._below is None else {**found, "below": self._below}

    def of(self, state: Mapping[str, Any]) -> TargetSums:
        """Sums of the same rows from the `state` of others."""
        found = TargetSums(self.views, self.y)
        if state:
            found.weight, found._shift = state["weight"], state["shift"]
            found._first, found._second, found._noise = state["first"], state["second"], state["noise"]
            found._pit, found._below, found._gibbs = state["pit"], state.get("below"), state["gibbs"]
            found._log_prob, found._infinite = state["log_prob"], state["infinite"]
        return found

    def rows(self) -> TargetRows:
        """What each view says of each row; NaN of views whose samples have no weight."""
        assert self._shift is not None
        weight = self.views.of(self.weight[:, None])[:, 0]
        total = torch.where(weight > 0, weight, torch.nan)

        def average(sums: Tensor) -> Tensor:  # [R, B, C] -> [V, B, C]
            return self.views.of(sums.flatten(1)).view(-1, *self.y.shape) / total[:, None, None]

        first, pit = average(self._first), average(self._pit)
        return TargetRows(
            self._shift + first,
            torch.full_like(first, torch.inf) if self._infinite else average(self._noise),
            (average(self._second) - first.square()).clamp_min(0),
            self.views.of_logs(self._log_prob) - total.log()[:, None],
            self.views.of(self._gibbs) / total[:, None],
            pit,
            pit if self._below is None else average(self._below),
            weight,
        )


def _summed(weights: Tensor, values: Tensor) -> Tensor:
    """[r, K] and [K, ...] -> [r, ...]."""
    found: Tensor = torch.tensordot(weights, values, dims=1)
    return found
