"""Rows drawn by weight: with replacement through cumulative sums, without it by exponential keys."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.samplers.epochs import EpochSampler, Plan, as_indices
from bnn.samplers.hashing import key_of, uniforms
from bnn.samplers.weights import digest_of, weights_of


class WeightedIndexSampler(EpochSampler[int]):
    """Rows drawn by weight, from arrays of any length.

    with replacement: i = min { j : w_0 + ... + w_j > u sum w }, u uniform in [0, 1)
    without: the n smallest of -log(u_i) / w_i, in that order

    Both in float64, where `torch.multinomial` stops at 2^24 rows. Rows of weight 0 are never drawn.
    With replacement, draw p of an epoch depends on (seed, epoch, p) and the weights alone, so that a
    resumed epoch costs one cumulative sum; without, one sort.

    **Resampling changes what a posterior is fitted to**: give the likelihood `importance_weights`, or
    say that the posterior is of the reweighted data.

    Args:
        weights: [N], at least 0, need not sum to one: an array, `FILE.npy`, `FILE.safetensors`,
            `FILE.csv` (`FILE.csv:COLUMN`), or a data set with `weights`.
        num_samples: draws an epoch, over all ranks; N by default.
        replacement: whether a row can come twice in an epoch.
        seed: any whole number.
        rank: of this process, in [0, world_size).
        world_size: processes that share the draws; they meet disjoint places of one list.
        drop_last: leave out what does not divide by the ranks, rather than repeat the list's head.
        auto_epoch: see `EpochSampler`.

    Raises:
        DataError: weights that are NaN, infinite, negative or all zero.
        ConfigError: more draws without replacement than rows of weight above 0.

    Examples:
        >>> sampler = WeightedIndexSampler([1.0, 0.0, 3.0], num_samples=8, seed=0)
        >>> list(sampler)
        [2, 0, 0, 2, 0, 2, 0, 2]

    Source: Efraimidis and Spirakis (2006), Inf. Process. Lett. 97(5), for draws without replacement.
    """

    def __init__(
        self,
        weights: Any,
        num_samples: int | None = None,
        replacement: bool = True,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        self._weights = _Weights(weights_of(weights))
        self._in_force = self._weights  # those that the present epoch was begun with
        self._replacement = replacement
        items = len(self._weights.each) if num_samples is None else num_samples
        super().__init__(items, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, auto_epoch=auto_epoch)
        self._check_supply()

    def update(self, weights: Any) -> None:
        """Other weights for the same rows, from the next iteration on."""
        former, self._weights = self._weights, _Weights(weights_of(weights, rows=len(self._weights.each)))
        try:
            self._check_supply()
        except ConfigError:
            self._weights = former
            raise

    def probabilities(self) -> Tensor:
        """Chance of each row at a draw with replacement, [N], summing to 1."""
        self._require_replacement()
        return torch.from_numpy(self._weights.each / self._weights.edges[-1])

    def expected_counts(self) -> Tensor:
        """How often each row is drawn in an epoch with replacement, on average, [N]."""
        return self.num_items * self.probabilities()

    def importance_weights(self, indices: Any) -> Tensor:
        """1 / (N pi_i) of these rows [B]: the weighted mean over draws is on average the mean over all rows.

        Raises:
            ConfigError: draws without replacement, whose chances have no closed form; or rows of weight 0,
                which no weight can bring back.
        """
        self._require_replacement()
        if not self._weights.positive:
            raise ConfigError(
                "importance_weights",
                want="weights above 0: rows that are never drawn cannot be made up for",
                got="a weight of 0",
                fix="give every row a small weight, or fit to the rows that are drawn without importance weights",
            )
        each = self._weights.each
        return torch.from_numpy(self._weights.edges[-1] / len(each) / each[as_indices(indices, len(each))])

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        del resumed  # a state of other weights was refused when it was loaded
        self._in_force = self._weights
        key = key_of(self.seed, "weighted", epoch)
        if self._replacement:
            return _Draws(self._weights.edges, key)
        return _without_replacement(self._weights.each, self.num_items, key).__getitem__

    @property
    def num_rows(self) -> int:
        return len(self._weights.each)

    @property
    def reweights(self) -> bool:
        each = self._weights.each
        return bool(each.min() < each.max())

    @property
    def each_once(self) -> bool:
        return not self._replacement and self.num_items == len(self._weights.each)

    def identity(self) -> dict[str, Any]:
        # Inside an epoch a state is one of the weights that it was begun with, whatever `update` said since.
        weights = self._in_force if 0 < self._yielded < len(self) else self._weights
        return {"weights": weights.digest, "replacement": self._replacement}

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        del memory

    def _check_supply(self) -> None:
        supply = int(np.count_nonzero(self._weights.each))
        if not self._replacement and supply < self.num_items:
            raise ConfigError(
                "num_samples",
                want=f"at most {supply}, the rows of weight above 0, without replacement",
                got=str(self.num_items),
                fix="lower it, or draw with replacement",
            )

    def _require_replacement(self) -> None:
        if not self._replacement:
            raise ConfigError(
                "WeightedIndexSampler",
                want="replacement=True: without it the chances of rows have no closed form",
                got="replacement=False",
                fix="draw with replacement",
            )


TINY = 5e-324  # the smallest number above 0: a weight may be negligible, but is not 0


class _Weights:
    """Weights of rows, and what draws need of them, made once and when it is needed."""

    def __init__(self, each: np.ndarray) -> None:
        low, high = each.min(), each.max()
        self.positive = bool(low > 0)
        # Weights near the ends of the range are brought to its middle, where sums neither overflow nor vanish.
        self.each = each if 1e-200 < high < 1e200 else np.where(each > 0, np.maximum(each / high, TINY), 0.0)  # [N]

    @cached_property
    def edges(self) -> np.ndarray:
        """w_0 + ... + w_i, [N]; by torch, whose memory is the faster to touch first."""
        edges: np.ndarray = torch.from_numpy(self.each).cumsum(dim=0).numpy()
        return edges

    @cached_property
    def digest(self) -> str:
        return digest_of(self.each)


class _Draws:
    """Positions -> rows by weight, with replacement."""

    def __init__(self, edges: np.ndarray, key: np.uint64) -> None:
        self._edges, self._key = edges, key

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        # u <= 1 - 2^-53, so u * total rounds to less than the total, and side="right" passes over
        # weights of 0, whose edges coincide. Sorted needles walk the edges instead of jumping in them.
        points = uniforms(self._key, positions) * self._edges[-1]
        order = np.argsort(points)
        rows = np.empty(len(points), dtype=np.int64)
        rows[order] = np.searchsorted(self._edges, points[order], side="right")
        return rows


def _without_replacement(weights: np.ndarray, size: int, key: np.uint64) -> np.ndarray:
    """Rows of the `size` smallest -log(u_i) / w_i, smallest first."""
    draws = uniforms(key, np.arange(len(weights), dtype=np.int64))
    draws += 2.0**-54  # never 0, whose logarithm is infinite
    np.log(draws, out=draws)
    with np.errstate(divide="ignore", over="ignore"):
        draws /= -(weights / weights.max())
    np.minimum(draws, np.finfo(np.float64).max, out=draws)  # however small its weight, a row comes before those of 0
    draws[weights == 0] = np.inf
    if size < len(draws):
        first = np.argpartition(draws, size - 1)[:size]
        return first[np.argsort(draws[first], kind="stable")]
    return np.argsort(draws, kind="stable")
