"""Each row once an epoch, in a new order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bnn.samplers.epochs import EpochSampler, Plan
from bnn.seeding import generator


class ShuffledSampler(EpochSampler[int]):
    """A permutation of 0..N-1 from (seed, epoch), without a global random state.

    Args:
        num_rows: N, at least 1.
        shuffle: False gives the rows as they stand.
        seed, rank, world_size, drop_last, auto_epoch: as for `WeightedIndexSampler`.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        self._shuffle = shuffle
        super().__init__(
            num_rows, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, auto_epoch=auto_epoch
        )

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        del resumed
        if not self._shuffle:
            return np.asarray
        order: np.ndarray = torch.randperm(self.num_items, generator=generator(self.seed, "data", epoch)).numpy()
        return order.__getitem__

    @property
    def num_rows(self) -> int:
        return self.num_items

    @property
    def reweights(self) -> bool:
        return False

    @property
    def each_once(self) -> bool:
        return True

    def identity(self) -> dict[str, Any]:
        return {"shuffle": self._shuffle}

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        del memory
