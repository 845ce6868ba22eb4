"""Batches with a fixed share of every class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.samplers.balanced import ClassRows, shares
from bnn.samplers.epochs import EpochSampler, Plan
from bnn.samplers.hashing import key_of, keyed, permutation
from bnn.samplers.weights import check_skew, labels_of, weights_of


class StratifiedBatchSampler(EpochSampler[list[int]]):
    """Batches in which every class has its share, to within a row, for the `batch_sampler` of a loader.

    A batch takes B s_c rows of class c, rounded by largest remainder; what rounding gave or took is
    carried to the next batch, so that after any number of batches a class is within a row or so of
    its share. Rows of a class come in the order of a permutation, each once before any comes again,
    also across epochs.

    **Shares other than the natural ones change what a posterior is fitted to**; see `WeightedIndexSampler`.

    Args:
        labels: class of each row [N], whole numbers from 0, or a data set of such rows.
        batch_size: B, at least 1.
        per_class: share of each class [C], at least 0, need not sum to one; the natural shares by default.
        skew: in place of `per_class`: s_c proportional to n_c^(1 - skew).
        num_batches: batches an epoch, over all ranks; by default as many as N rows fill, the last one short.
        seed, rank, world_size, auto_epoch: as for `WeightedIndexSampler`; ranks take disjoint batches.
        drop_last: leave out a short last batch, and batches that do not divide by the ranks.

    Raises:
        DataError: labels that are no whole numbers from 0; a share for a class without rows.
        ConfigError: an option out of range.

    Examples:
        >>> labels = torch.tensor([0] * 90 + [1] * 10)
        >>> batches = list(StratifiedBatchSampler(labels, 20, seed=0))
        >>> [int(labels[rows].sum()) for rows in batches]
        [2, 2, 2, 2, 2]
    """

    block_sizes = (1, 64)
    of_batches = True

    def __init__(
        self,
        labels: Any,
        batch_size: int,
        *,
        per_class: Any = None,
        skew: float | None = None,
        num_batches: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        if batch_size < 1 or (num_batches is not None and num_batches < 1):
            raise ConfigError(
                "StratifiedBatchSampler",
                want="batch_size and num_batches of at least 1",
                got=f"{batch_size}, {num_batches}",
                fix="raise them",
            )
        if skew is not None:
            check_skew(skew)
        if per_class is not None and skew is not None:
            raise ConfigError("per_class", want="no skew beside it", got=f"skew={skew}", fix="leave one out")
        self._rows, self.batch_size = ClassRows(labels_of(labels)), batch_size
        self._shares = _class_shares(self._rows, per_class, skew)
        rows = len(self._rows.labels)
        whole = rows // batch_size if drop_last else -(-rows // batch_size)
        sizes = np.full(whole if num_batches is None else num_batches, batch_size, dtype=np.int64)
        if num_batches is None and not drop_last and rows % batch_size:
            sizes[-1] = rows % batch_size
        super().__init__(
            len(sizes), seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, auto_epoch=auto_epoch
        )
        self._counts = apportion(self._shares, sizes)  # [batches, C]

    def batch_sizes(self) -> Tensor:
        """Rows of each batch of this rank, int64."""
        own = (np.arange(len(self)) * self.world_size + self.rank) % self.num_items
        return torch.from_numpy(self._counts.sum(axis=1)[own])

    def class_shares(self) -> Tensor:
        """Share of each class in an epoch, [C]."""
        return torch.from_numpy(self._counts.sum(axis=0) / self._counts.sum())

    def natural_shares(self) -> Tensor:
        """Share of each class among the rows, [C]."""
        return torch.from_numpy(self._rows.counts / len(self._rows.labels))

    def probabilities(self) -> Tensor:
        """Share of each row among those drawn, on average over epochs, [N]."""
        return torch.from_numpy(self._rows.probabilities(self.class_shares().numpy()))

    def expected_counts(self) -> Tensor:
        """Rows of each class in an epoch, [C]."""
        return torch.from_numpy(self._counts.sum(axis=0))

    def importance_weights(self, indices: Any) -> Tensor:
        """1 / (N pi_i) of these rows [B]: natural share of the class over its share in an epoch."""
        return torch.from_numpy(self._rows.importance(indices, self.class_shares().numpy()))

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        del resumed
        per_epoch = self._counts.sum(axis=0)  # [C]
        before = np.concatenate([np.zeros((1, len(per_epoch)), np.int64), self._counts.cumsum(axis=0)])
        orders: dict[int, tuple[int, np.ndarray]] = {}

        def batch(number: int) -> np.ndarray:
            rows = []
            for chosen in np.flatnonzero(self._counts[number]).tolist():
                first = epoch * per_epoch[chosen] + before[number, chosen]
                uses = first + np.arange(self._counts[number, chosen])
                rows.append(self._uses(chosen, uses, orders))
            together = np.concatenate(rows)
            mixed = keyed(key_of(self.seed, "batch", epoch, number), np.arange(len(together)))
            return together[np.argsort(mixed, kind="stable")]

        def batches(positions: np.ndarray) -> np.ndarray:
            found = np.empty(len(positions), dtype=object)
            for place, number in enumerate(positions.tolist()):
                found[place] = batch(number).tolist()
            return found

        return batches

    @property
    def num_rows(self) -> int:
        return len(self._rows.labels)

    @property
    def reweights(self) -> bool:
        return not np.allclose(self._shares, self._rows.counts / len(self._rows.labels), rtol=1e-9, atol=0)

    @property
    def each_once(self) -> bool:
        return not self.reweights and int(self._counts.sum()) == self.num_rows

    def identity(self) -> dict[str, Any]:
        return {
            "labels": self._rows.digest,
            "batch_size": self.batch_size,
            "rows": int(self._counts.sum()),
            "shares": [float(share) for share in self._shares],
        }

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        del memory

    def _uses(self, chosen: int, uses: np.ndarray, orders: dict[int, tuple[int, np.ndarray]]) -> np.ndarray:
        """The rows that stand at these uses of a class, counted from the first epoch on."""
        rounds, places = np.divmod(uses, self._rows.counts[chosen])
        rows = np.empty(len(uses), dtype=np.int64)
        for number in np.unique(rounds).tolist():
            if orders.get(chosen, (-1, None))[0] != number:  # one permutation a class is kept
                key = key_of(self.seed, "class", chosen, number)
                orders[chosen] = number, permutation(key, int(self._rows.counts[chosen]))
            here = rounds == number
            first = self._rows.first[chosen]
            rows[here] = self._rows.by_class[first + orders[chosen][1][places[here]]]
        return rows


def apportion(class_shares: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Rows of each class in each batch, [batches, C]: whole numbers that sum to the batch's size.

    Batch b takes floor(r_c) of class c and one more of those with the largest remainders, where r_c is
    what class c is owed after the batches before it: s_c (B_0 + ... + B_b) less what it was given.

    Source: the method of largest remainder (Hamilton), with the error carried on.
    """
    counts = np.empty((len(sizes), len(class_shares)), dtype=np.int64)
    owed = np.zeros(len(class_shares))
    for number, size in enumerate(sizes.tolist()):
        owed += class_shares * size
        whole = np.floor(np.maximum(owed, 0) + 1e-9).astype(np.int64)  # 2.9999999 is 3
        missing = size - int(whole.sum())
        remainder = owed - whole
        if missing > 0:
            order = np.lexsort((np.arange(len(owed)), -np.where(class_shares > 0, remainder, -np.inf)))
            whole[order[:missing]] += 1
        for _ in range(-missing):  # a class that is ahead lends from those that are owed least
            whole[np.argmin(np.where(whole > 0, remainder, np.inf))] -= 1
        counts[number] = whole
        owed -= whole
    return counts


def _class_shares(rows: ClassRows, per_class: Any, skew: float | None) -> np.ndarray:
    if per_class is None:
        return shares(rows.counts, rows.weights_of_skew(skew or 0.0))
    found = weights_of(per_class, rows=len(rows.counts))
    empty = (found > 0) & (rows.counts == 0)
    if empty.any():
        raise DataError(
            "per_class",
            want="a share of 0 for a class without rows",
            got=f"{found[empty.argmax()]} for class {empty.argmax()}",
            fix="leave the class out",
        )
    total: np.ndarray = found / found.sum()
    return total
