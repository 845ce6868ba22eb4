"""Rows drawn so that classes come as balanced as is wanted."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.samplers.epochs import EpochSampler, Plan, as_indices
from bnn.samplers.hashing import key_of, uniforms
from bnn.samplers.weights import class_weights, digest_of, labels_of, weights_of, weights_of_counts


class ClassBalancedSampler(EpochSampler[int]):
    """Rows drawn with replacement so that classes come as balanced as the skew says.

    P(class c) proportional to n_c^(1 - skew), rows of a class all alike

    **Resampling changes what a posterior is fitted to**; see `WeightedIndexSampler`. After training on
    balanced classes `prior_shift` brings probabilities back to natural shares.

    Args:
        labels: class of each row [N], whole numbers from 0, or a data set of such rows.
        skew: 0 natural, 0.5 by the square root of counts, 1 all classes alike (the default), above 1 rare ones most.
        weights: of a row of each class [C], in place of the skew; see `class_weights`.
        num_samples, seed, rank, world_size, drop_last, auto_epoch: as for `WeightedIndexSampler`.

    Raises:
        DataError: labels that are no whole numbers from 0, or weights not one a class.

    Examples:
        >>> sampler = ClassBalancedSampler([0] * 90 + [1] * 10, seed=0)
        >>> sampler.natural_shares().tolist(), [round(share, 3) for share in sampler.class_shares().tolist()]
        ([0.9, 0.1], [0.5, 0.5])
    """

    def __init__(
        self,
        labels: Any,
        skew: float | None = None,
        *,
        weights: Any = None,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        self._rows = ClassRows(labels_of(labels))
        if skew is not None and weights is not None:
            raise ConfigError("weights", want="no skew beside them", got=f"skew={skew}", fix="leave one out")
        counts = self._rows.counts
        self._weights = (
            class_weights(self._rows.labels, 1.0 if skew is None else skew).numpy()
            if weights is None
            else weights_of(weights, rows=len(counts))
        )
        self._shares = shares(counts, self._weights)
        items = len(self._rows.labels) if num_samples is None else num_samples
        super().__init__(items, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, auto_epoch=auto_epoch)

    def class_shares(self) -> Tensor:
        """Chance of each class at a draw, [C]."""
        return torch.from_numpy(self._shares.copy())

    def natural_shares(self) -> Tensor:
        """Share of each class among the rows, [C]."""
        return torch.from_numpy(self._rows.counts / len(self._rows.labels))

    def probabilities(self) -> Tensor:
        """Chance of each row at a draw, [N]."""
        return torch.from_numpy(self._rows.probabilities(self._shares))

    def expected_counts(self) -> Tensor:
        """How often each class is drawn in an epoch, on average, [C]."""
        return self.num_items * self.class_shares()

    def importance_weights(self, indices: Any) -> Tensor:
        """1 / (N pi_i) of these rows [B]; see `WeightedIndexSampler.importance_weights`."""
        return torch.from_numpy(self._rows.importance(indices, self._shares))

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        del resumed
        return self._rows.draws(self._shares, key_of(self.seed, "classes", epoch))

    @property
    def num_rows(self) -> int:
        return len(self._rows.labels)

    @property
    def reweights(self) -> bool:
        return not np.allclose(self._shares, self._rows.counts / len(self._rows.labels), rtol=1e-9, atol=0)

    @property
    def each_once(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        return {"labels": self._rows.digest, "weights": [float(weight) for weight in self._weights]}

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        del memory


class ClassRows:
    """Rows sorted by class, and draws from them by class shares: memory of one array of N."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.counts = np.bincount(labels)  # [C]
        # NumPy sorts 16-bit numbers by radix, much faster than 64-bit ones.
        short = labels.astype(np.uint16) if len(self.counts) <= 2**16 else labels
        self.by_class = np.argsort(short, kind="stable")
        self.first = np.concatenate([[0], self.counts.cumsum()[:-1]])  # of each class in by_class

    @cached_property
    def digest(self) -> str:
        return digest_of(self.labels)

    def weights_of_skew(self, skew: float) -> np.ndarray:
        """n_c^-skew, summing to 1 over classes."""
        return weights_of_counts(self.counts, skew)

    def draws(self, class_shares: np.ndarray, key: np.uint64) -> Plan:
        """With replacement: a class by its share, then a row of it; one uniform number serves both.

        u in [c_k, c_k + s_k) is class k, and (u - c_k) / s_k again uniform: row floor(n_k (u - c_k) / s_k).
        """
        edges = np.cumsum(class_shares)

        def draw(positions: np.ndarray) -> np.ndarray:
            scaled = uniforms(key, positions) * edges[-1]
            chosen = np.searchsorted(edges, scaled, side="right")  # [n]
            inside = (scaled - (edges[chosen] - class_shares[chosen])) / class_shares[chosen]
            place = np.minimum((inside * self.counts[chosen]).astype(np.int64), self.counts[chosen] - 1)
            rows: np.ndarray = self.by_class[self.first[chosen] + np.maximum(place, 0)]  # rounding can leave -1e-17
            return rows

        return draw

    def probabilities(self, class_shares: np.ndarray) -> np.ndarray:
        """pi_i = share of the class / rows of the class, [N]."""
        found: np.ndarray = (class_shares / np.maximum(self.counts, 1))[self.labels]
        return found

    def importance(self, indices: Any, class_shares: np.ndarray) -> np.ndarray:
        """1 / (N pi_i) = natural share of the class / its share at a draw, [B]."""
        natural = self.counts / len(self.labels)
        if ((class_shares == 0) & (self.counts > 0)).any():
            never = int(np.argmax((class_shares == 0) & (self.counts > 0)))
            raise ConfigError(
                "importance_weights",
                want="a share above 0 for every class that has rows",
                got=f"0 for class {never}",
                fix="rows that are never drawn cannot be made up for: give the class a small weight",
            )
        rows = as_indices(indices, len(self.labels))
        ratio = natural / np.where(class_shares > 0, class_shares, 1.0)
        found: np.ndarray = ratio[self.labels[rows]]
        return found


def shares(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Chance of each class at a draw: n_c w_c, normalised, [C]."""
    mass = counts * (weights / weights.max())
    if not mass.any():
        raise DataError("weights", want="a weight above 0 for a class with rows", got="none", fix="give it one")
    total: np.ndarray = mass / mass.sum()
    return total
