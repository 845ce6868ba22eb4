"""Pair every batch of data with bank indices, over a stock DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

from bnn.errors import BankMismatch, ConfigError
from bnn.samplers.index import SampleIndexSampler
from bnn.seeding import derive, generator


class Pair(NamedTuple):
    """A batch of data and the bank index (int, or int64 [K]) it meets."""

    data: Any
    index: int | Tensor  # type: ignore[assignment]  # hides tuple.index, which no pair needs


class ShuffledSampler(Sampler[int]):
    """A permutation of 0..N-1 from (seed, epoch), without a global random state."""

    def __init__(self, length: int, seed: int) -> None:
        self._length, self._seed, self._epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self._length, generator=generator(self._seed, "data", self._epoch)).tolist()


class _SkippedBatches(Sampler[list[int]]):
    """The batches of a batch sampler after the first `skip`: none of the skipped rows is loaded."""

    def __init__(self, batches: Iterable[list[int]]) -> None:
        self.batches, self.skip = batches, 0

    def __len__(self) -> int:
        return len(cast(Sized, self.batches))

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batches), self.skip, None)


class PairedLoader:
    """Batches of a data set, each with the bank index it is to be run under.

    Batch b of data epoch e meets position e * len(loader) + b of the index sampler, so a new epoch
    of data goes on where the bank stands. Data order comes from (seed, epoch). Both are the same for
    any number of workers, and weights never pass through workers.

    Iterating yields the batches of the present epoch; the next iteration is the next epoch.
    `set_epoch` chooses one. `state_dict` counts the batches that were handed out, not those that
    workers fetched ahead.

    Args:
        dataset: a map-style data set.
        index_sampler: gives the bank indices.
        batch_size: rows a batch.
        shuffle: whether to draw a new order of the data each epoch.
        sampler: an order of your own; `set_epoch` is called on it if it has that.
        batch_sampler: batches of your own, in place of batch_size, shuffle, sampler and drop_last.
        num_indices: None pairs a batch with one index; K pairs it with the next K, int64 [K].
        num_workers: as in `DataLoader`, like `drop_last`, `collate_fn`, `pin_memory`,
            `prefetch_factor`, `persistent_workers`, `worker_init_fn`, `timeout` and
            `multiprocessing_context`.
        seed: of the data order; the index sampler's by default.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> loader = PairedLoader(TensorDataset(torch.arange(6)), SampleIndexSampler(4), batch_size=2)
        >>> [(x.tolist(), index) for (x,), index in loader]
        [([0, 1], 2), ([2, 3], 3), ([4, 5], 0)]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        index_sampler: SampleIndexSampler,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        batch_sampler: Sampler[list[int]] | None = None,
        num_indices: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        timeout: float = 0.0,
        multiprocessing_context: Any = None,
        seed: int | None = None,
    ) -> None:
        if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
            raise ConfigError(
                "batch_sampler",
                want="no batch_size, shuffle, sampler or drop_last beside it",
                got="one of them",
                fix="leave it out",
            )
        if sampler is not None and shuffle:
            raise ConfigError("sampler", want="no shuffle beside it", got="shuffle=True", fix="leave shuffle out")
        if num_workers < 0:
            raise ConfigError(
                "num_workers", want="at least 0", got=str(num_workers), fix="pass 0 to load in this process"
            )
        if num_indices is not None and num_indices < 1:
            raise ConfigError("num_indices", want="at least 1", got=str(num_indices), fix="leave it out for one index")
        self.index_sampler = index_sampler
        self.seed = index_sampler.seed if seed is None else seed
        self._num_indices = num_indices
        if batch_sampler is None:
            if sampler is None:
                length = len(cast(Sized, dataset))
                sampler = ShuffledSampler(length, self.seed) if shuffle else SequentialSampler(range(length))
            self._epoch_source: Any = sampler
            batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        else:
            self._epoch_source = batch_sampler
        self._batches = _SkippedBatches(batch_sampler)
        self._generator = torch.Generator()  # of the workers' base seeds
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            worker_init_fn=worker_init_fn,
            timeout=timeout,
            multiprocessing_context=multiprocessing_context,
            generator=self._generator,
        )
        self._epoch = self._batch = self._start = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Pair]:
        # A start inside an epoch holds for one iteration: one that is broken off begins its epoch again.
        epoch, start = self._epoch, self._start
        self._batch, self._start = start, 0
        if hasattr(self._epoch_source, "set_epoch"):
            self._epoch_source.set_epoch(epoch)
        self._batches.skip = start
        self._generator.manual_seed(derive(self.seed, "workers", epoch))
        for batch, data in enumerate(self._loader, start):
            # Counted before it is handed out: a state taken inside the loop's body goes on after it.
            self._epoch, self._batch = epoch, batch + 1
            yield Pair(data, self._index(epoch * len(self) + batch))
        self._epoch, self._batch = epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the first batch of this epoch."""
        self._epoch, self._batch, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out in it, with what they are valid for; plain values."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "batches": len(self),
            "seed": self.seed,
            "num_indices": self._num_indices,
            "index": self.index_sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out; a state at the end of an epoch starts the next.

        Raises:
            BankMismatch: the state is of another seed, number of batches, or bank.
        """
        mine = self.state_dict()
        for key in ("seed", "batches", "num_indices"):
            if state[key] != mine[key]:
                raise BankMismatch(
                    f"loader state '{key}'",
                    want=str(mine[key]),
                    got=str(state[key]),
                    fix="resume with the data, batch size and seed it was saved with",
                )
        self.index_sampler.load_state_dict(state["index"])
        done = state["batch"] >= len(self)
        self._epoch, self._batch = (state["epoch"] + 1, 0) if done else (state["epoch"], state["batch"])
        self._start = self._batch

    def _index(self, position: int) -> int | Tensor:
        if self._num_indices is None:
            return int(self.index_sampler.at(position))
        first = position * self._num_indices
        return self.index_sampler.at(range(first, first + self._num_indices))
