"""Windows of consecutive rows, for time series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnn.errors import ConfigError
from bnn.samplers.epochs import EpochSampler, Plan
from bnn.samplers.hashing import key_of, permutation


class WindowSampler(EpochSampler[list[int]]):
    """Windows of consecutive rows in a shuffled order, for the `batch_sampler` of a loader.

    A batch is one window: rows start, start + 1, ..., start + window - 1. Windows begin every `stride`
    rows and never cross from one series into the next. With `num_windows` a batch holds several, one
    after another: x of shape [num_windows * window, ...] becomes `x.unflatten(0, (-1, window))`.

    Args:
        lengths: rows of the series, or of each series where several stand one after another.
        window: rows of a window, at least 1.
        stride: rows between two starts, at least 1.
        num_windows: windows a batch.
        shuffle: whether starts come in a new order each epoch.
        seed, rank, world_size, drop_last, auto_epoch: as for `WeightedIndexSampler`; `drop_last` also leaves
            out a last batch of fewer windows.

    Raises:
        ConfigError: an option below 1, or no series as long as a window.

    Examples:
        >>> list(WindowSampler([4, 3], 3, seed=0))  # none crosses from row 3 to row 4
        [[1, 2, 3], [0, 1, 2], [4, 5, 6]]
    """

    block_sizes = (1, 64)
    of_batches = True

    def __init__(
        self,
        lengths: int | Sequence[int],
        window: int,
        *,
        stride: int = 1,
        num_windows: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        series = [lengths] if isinstance(lengths, int) else list(lengths)
        if not series or min(window, stride, num_windows, *series) < 1:
            raise ConfigError(
                "WindowSampler",
                want="lengths, window, stride and num_windows of at least 1",
                got=f"{series[:5]}, {window}, {stride}, {num_windows}",
                fix="raise them",
            )
        ends = np.cumsum(series)
        self._starts = np.concatenate(
            [np.arange(end - length, end - window + 1, stride) for end, length in zip(ends, series, strict=True)]
        ).astype(np.int64)
        if not len(self._starts):
            raise ConfigError(
                "WindowSampler", want=f"a series of at least {window} rows", got=str(max(series)), fix="lower window"
            )
        self.window, self.stride, self.num_windows, self._shuffle = window, stride, num_windows, shuffle
        self._series = series
        whole, rest = divmod(len(self._starts), num_windows)
        super().__init__(
            whole if drop_last or not rest else whole + 1,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            auto_epoch=auto_epoch,
        )

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        del resumed
        starts = self._starts
        if self._shuffle:
            starts = starts[permutation(key_of(self.seed, "windows", epoch), len(starts))]

        def batches(positions: np.ndarray) -> np.ndarray:
            found = np.empty(len(positions), dtype=object)
            for place, number in enumerate(positions.tolist()):
                here = starts[number * self.num_windows : (number + 1) * self.num_windows]
                found[place] = (here[:, None] + np.arange(self.window)).reshape(-1).tolist()
            return found

        return batches

    @property
    def num_rows(self) -> int:
        return sum(self._series)

    @property
    def reweights(self) -> bool:
        return self.window > 1 or self.stride > 1  # rows near the ends are in fewer windows

    @property
    def each_once(self) -> bool:
        return not self.reweights

    def identity(self) -> dict[str, Any]:
        return {
            "lengths": [int(length) for length in self._series],
            "window": self.window,
            "stride": self.stride,
            "num_windows": self.num_windows,
            "shuffle": self._shuffle,
        }

    def memory(self) -> dict[str, Any]:
        return {}

    def remember(self, memory: dict[str, Any]) -> None:
        del memory
