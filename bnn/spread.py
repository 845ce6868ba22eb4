"""What samples say on average, how far apart they are, and how much the average would move with other samples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bnn.errors import NotConverged
from bnn.functional import SampleSource
from bnn.types import DrawTable

GROUPS = 16  # runs of draws, of all chains together, whose means tell how much draws are alike
LEAST_SAMPLES, LEAST_EFFECTIVE = (
    32,
    16,
)  # samples, and what they are worth by their weights, before an error is believed
HEAVY = 10.0  # times the mean weight of the samples used


class Spread:
    """Weighted moments of what samples say, and the Monte Carlo error of their mean; [B, C] each, float64."""

    def __init__(self, bank: SampleSource, tolerance: float | None) -> None:
        log_weight = bank.log_weight.double()
        self.log_weight, self._tolerance = log_weight - log_weight.max(), tolerance
        self._alike = bool((self.log_weight == 0).all())  # then squared weights are the weights
        self._groups: Tensor | None = None
        self._num_groups = 0
        if tolerance is not None:
            self._groups, self._num_groups = groups_of(bank)
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)  # of the weights
        self._indices: list[Tensor] = []

    def add(self, indices: Tensor, values: Tensor) -> None:
        """What samples [K] say, [K, B, C]."""
        weight = self.log_weight[indices].exp().to(values.device)
        if not self.count:
            self._shift = values.mean(dim=0)  # moments about a value close by: their differences keep their digits
            zero = torch.zeros_like(self._shift)
            self._first, self._second = zero, zero
            self._square_first, self._square_second = zero, zero  # with squared weights
            self._squares = torch.zeros((), dtype=torch.float64)
            if self._groups is not None:
                self._group_weight = torch.zeros(self._num_groups, dtype=torch.float64, device=values.device)
                self._group_first = zero.expand(self._num_groups, *zero.shape).clone()
        centred = values - self._shift
        squared = centred.square()
        self._first = self._first + torch.einsum("k,kbc->bc", weight, centred)
        self._second = self._second + torch.einsum("k,kbc->bc", weight, squared)
        if not self._alike:
            self._square_first = self._square_first + torch.einsum("k,kbc->bc", weight.square(), centred)
            self._square_second = self._square_second + torch.einsum("k,kbc->bc", weight.square(), squared)
        self._squares = self._squares + weight.square().sum().cpu()
        if self._groups is not None:
            group = self._groups[indices].to(values.device)
            self._group_weight.index_add_(0, group, weight)
            self._group_first.index_add_(0, group, weight[:, None, None] * centred)
        self.total = self.total + weight.sum().cpu()
        self.count += len(indices)
        self._indices.append(indices)

    def mean(self) -> Tensor:
        return self._shift + self._first / self.total.to(self._first.device)

    def variance(self) -> Tensor:
        """sum_s w_s (v_s - mean)^2."""
        total = self.total.to(self._first.device)
        return (self._second / total - (self._first / total).square()).clamp_min(0)

    def standard_error(self) -> Tensor:
        """Of the mean: that of independent draws, times how much more runs of draws differ than those would."""
        if self.count < 2:
            return torch.full_like(self._first, torch.nan)
        total = self.total.to(self._first.device)
        mean = self._first / total
        squares = self._squares.to(mean.device)
        first, second = (self._first, self._second) if self._alike else (self._square_first, self._square_second)
        # sum_s w_s^2 (v_s - mean)^2, of weights that sum to 1
        free = (second - 2 * mean * first + squares * mean.square()) / total.square()
        free = free.clamp_min(0) * self.count / (self.count - 1)
        if self._groups is None:
            return free.sqrt()
        present = self._group_weight > 0
        number = int(present.sum())
        if number < 2:
            return free.sqrt()
        apart = (self._group_first - self._group_weight[:, None, None] * mean) / total  # [G, B, C]
        grouped = apart.square().sum(dim=0) * number / (number - 1)
        ratio = grouped.mean() / free.mean() if float(free.mean()) > 0 else torch.ones(())
        return (free * ratio.clamp_min(1.0)).sqrt()

    def enough(self) -> bool:
        """Whether the tolerance is kept; warns where all samples are used and it is not."""
        if self._tolerance is None or self.count < min(LEAST_SAMPLES, len(self.log_weight)):
            return False
        left = self.count < len(self.log_weight)
        if left and not self._alike and not self._weights_are_met():
            return False
        worst = float(self.standard_error().max())
        effective = float(self.total.square() / self._squares)
        if worst <= self._tolerance and (self._alike or effective >= LEAST_EFFECTIVE):
            return True
        if not left:
            few = (
                ""
                if self._alike or effective >= LEAST_EFFECTIVE
                else f", and are worth {effective:.1f} by their weights"
            )
            warnings.warn(
                f"all {self.count} samples leave a standard error of {worst:.2g}{few}; tolerance={self._tolerance:g} is not "
                "kept: draw more",
                NotConverged,
                stacklevel=7,
            )
        return False

    def _weights_are_met(self) -> bool:
        """Whether no sample that is left weighs much more than those used do on average: weights are known beforehand."""
        unused = torch.ones(len(self.log_weight), dtype=torch.bool)
        unused[torch.cat(self._indices)] = False
        return float(self.log_weight[unused].max().exp()) <= HEAVY * float(self.total) / self.count

    def state(self) -> dict[str, Tensor]:
        """The sums, for other ranks; of no tolerance, whose runs of draws all samples share."""
        if not self.count:
            return {}
        names = ["shift", "first", "second", "squares", *([] if self._alike else ["square_first", "square_second"])]
        sums = {f"spread.{name}": getattr(self, f"_{name}") for name in names}
        return {**sums, "spread.total": self.total, "spread.indices": torch.cat(self._indices)}

    def take(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Become the sums of the samples of several ranks, in their order, about the value close by of the first.

        With d from that value to another rank's: sum w (v - d)^2 = sum w v^2 + 2 d sum w v + d^2 sum w.
        """
        parts = [{name.removeprefix("spread."): value for name, value in state.items()} for state in states]
        self._shift = parts[0]["shift"]
        self._indices = [part["indices"] for part in parts]
        self.count = sum(map(len, self._indices))
        self.total = torch.stack([part["total"] for part in parts]).sum()
        self._squares = torch.stack([part["squares"] for part in parts]).sum()
        for name, weights in (("", "total"), ("square_", "squares")):
            if name and self._alike:
                continue
            first, second = torch.zeros_like(self._shift), torch.zeros_like(self._shift)
            for part in parts:
                apart, weight = part["shift"] - self._shift, part[weights]
                own = part[f"{name}first"]
                first = first + own + weight * apart
                second = second + part[f"{name}second"] + 2 * apart * own + weight * apart.square()
            setattr(self, f"_{name}first", first)
            setattr(self, f"_{name}second", second)

    def used_weights(self) -> Tensor:
        return self.log_weight[torch.cat(self._indices)].log_softmax(dim=0)


def groups_of(bank: DrawTable, *, num: int = GROUPS) -> tuple[Tensor, int]:
    """A number of a run of draws for each sample, int64 [S], and how many runs, at least `num`: each chain is cut into as many."""
    chain, draw = bank.chain.numpy(), bank.draw.numpy()
    _, chain = np.unique(chain, return_inverse=True)
    lengths = np.bincount(chain)
    pieces = max(1, -(-num // len(lengths)))
    order = np.lexsort((draw, chain))
    place = np.empty(len(chain), dtype=np.int64)
    place[order] = np.arange(len(chain)) - np.repeat(np.cumsum(lengths) - lengths, lengths)  # in its chain
    return torch.from_numpy(chain * pieces + place * pieces // lengths[chain]), len(lengths) * pieces
