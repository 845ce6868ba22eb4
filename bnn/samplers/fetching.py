"""How a loader gets a batch: rows asked for with the number of their batch, which comes back with the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from bnn.errors import DataError
from bnn.samplers.epochs import EpochSampler
from bnn.seeding import derive, isolated, seed_streams


class Request(NamedTuple):
    """Rows of a batch, and which batch of which epoch they are."""

    epoch: int
    number: int
    rows: Any  # int64 array, or a list as a batch sampler of the user's gave it
    first: int = 0  # place in the batch of the first of them, where they are a rank's share
    total: int | None = None  # rows of the whole batch; None where they are all


class Fetched(NamedTuple):
    """A batch of data with its number and rows, so that no order of arrival can mispair it."""

    number: int
    rows: Any  # as they were asked for
    data: Any  # None of a share without rows
    first: int = 0
    total: int = 0


class TensorRows(Dataset[Any]):
    """Tensors in memory, or any nesting of them, as a data set whose batches are taken whole.

    Args:
        data: such as `(x, y)`; x may be a tensor, or a tuple or dict of tensors, [N, ...].

    Raises:
        DataError: tensors of different lengths.
    """

    def __init__(self, data: Any) -> None:
        leaves = pytree.tree_leaves(data)
        lengths = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else type(leaf).__name__ for leaf in leaves]
        if len(set(lengths)) != 1 or not isinstance(lengths[0], int):
            raise DataError(
                "data", want="tensors of one length", got=str(lengths)[:100], fix="pass inputs and targets [N, ...]"
            )
        self._flat = type(data) in (list, tuple) and all(isinstance(leaf, Tensor) for leaf in data)
        self._data, self._length = data, lengths[0]

    def __len__(self) -> int:
        return self._length

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of the nesting."""
        return list(pytree.tree_leaves(self._data))

    def __getitem__(self, row: int) -> Any:
        return pytree.tree_map(lambda leaf: leaf[row], self._data)

    def batch(self, rows: Tensor) -> Any:
        """The rows int64 [B] of every tensor, in the structure of the data."""
        if self._flat:  # the common case, without a walk
            return type(self._data)([_rows_of(tensor, rows) for tensor in self._data])
        return pytree.tree_map(lambda leaf: _rows_of(leaf, rows), self._data)


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows.to(tensor.device))  # faster than tensor[rows] for a batch


class Fetcher(Dataset[Any]):
    """The user's data set as a loader sees it: a `Request` in, `Fetched` out.

    Tensors in memory are indexed by the whole batch. Other data sets are asked for their rows
    (`__getitems__` where they have it) and collated, with the global streams of the process that does
    it started from (seed, epoch, number): random transforms give the same values for any number of workers
    and after a resume.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None, seed: int) -> None:
        self.dataset = dataset
        self._collate, self._seed = collate_fn or default_collate, seed
        self._whole: TensorRows | None = None
        if collate_fn is None and type(dataset) is TensorDataset:
            self._whole = TensorRows(list(dataset.tensors))  # a list, as the default collation makes of rows
        elif collate_fn is None and isinstance(dataset, TensorRows):
            self._whole = dataset

    def __getitems__(self, request: Request) -> Fetched:
        rows, first = request.rows, request.first
        total = len(rows) if request.total is None else request.total
        if not len(rows):
            return Fetched(request.number, rows, None, first, total)
        if self._whole is not None:
            data = self._whole.batch(torch.as_tensor(rows, dtype=torch.int64))
            return Fetched(request.number, rows, data, first, total)
        rows = rows.tolist() if isinstance(rows, np.ndarray) else list(rows)
        place = (request.number, first) if first else (request.number,)  # shares of a batch draw apart
        with _streams(self._seed, "fetch", request.epoch, *place):
            return Fetched(request.number, request.rows, self._rows(rows), first, total)

    def _rows(self, rows: list[int]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self._collate(self.dataset.__getitems__(rows))
        return self._collate([self.dataset[row] for row in rows])


class Stream(IterableDataset[Any]):
    """The batches of the user's iterable data set, in the process that reads it.

    The data set is told the epoch, where it has `set_epoch`, in whichever process its copy lives. The global streams start
    from (seed, epoch, worker, number) at each batch.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        batch_size: int,
        drop_last: bool,
        collate_fn: Callable[[list[Any]], Any] | None,
        seed: int,
        shared: bool,
    ) -> None:
        self.dataset = dataset
        self._batch_size, self._drop_last, self._seed = batch_size, drop_last, seed
        self._collate = collate_fn or default_collate
        self._epoch = torch.zeros((), dtype=torch.int64)
        if shared:  # persistent workers keep their copy of the data set: memory is how they learn the epoch
            self._epoch.share_memory_()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Batches, where the data set knows its rows; a TypeError otherwise."""
        rows = len(self.dataset)
        return rows // self._batch_size if self._drop_last else -(-rows // self._batch_size)

    def __iter__(self) -> Iterator[Any]:
        epoch, worker = int(self._epoch), get_worker_info()
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        rows: Iterator[Any] | None = None
        for number in count():
            with _streams(self._seed, "fetch", epoch, 0 if worker is None else worker.id, number):
                rows = iter(self.dataset) if rows is None else rows
                taken = list(islice(rows, self._batch_size))
                if not taken or (self._drop_last and len(taken) < self._batch_size):
                    return
                batch = self._collate(taken)
            yield batch


@contextmanager
def _streams(seed: int, *keys: int | str) -> Iterator[None]:
    """Start the global streams from a place; a process that is not a worker's gets its own back."""
    if get_worker_info() is not None:  # a process of the loader's own, whose streams nobody else reads
        seed_streams(derive(seed, *keys))
        yield
        return
    with isolated(seed, *keys, cuda=False):
        yield


class Requests(Sampler[Request]):
    """The batches of an epoch from number `start` on, frozen when an iteration begins; none of those skipped is loaded.

    Args:
        sampler: of rows, to be cut into batches, or of batches where `batch_size` is None.
        batch_size: B.
        drop_last: leave out a short last batch.
        seed: of what samplers that are not ours draw from the global streams.
        rank: whose share of each batch is asked for, in [0, world_size).
        world_size: ranks that share a batch.
    """

    def __init__(
        self, sampler: Any, batch_size: int | None, drop_last: bool, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.sampler, self.batch_size, self._drop_last, self._seed = sampler, batch_size, drop_last, seed
        self._rank, self._world_size = rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        length = len(self.sampler)
        if self.batch_size is None:
            return length
        return length // self.batch_size if self._drop_last else -(-length // self.batch_size)

    def __iter__(self) -> Iterator[Request]:
        return self._shares(self.epoch, self.start, self._batches(self.epoch, self.start))

    def _shares(self, epoch: int, start: int, batches: Iterable[Any]) -> Iterator[Request]:
        for number, rows in enumerate(batches, start):
            first, stop = (len(rows) * rank // self._world_size for rank in (self._rank, self._rank + 1))
            yield Request(epoch, number, rows[first:stop], first, len(rows))

    def _batches(self, epoch: int, start: int) -> Iterable[Any]:
        if isinstance(self.sampler, EpochSampler):
            size = self.batch_size or 1
            self.sampler.set_epoch(epoch, start=min(start * size, len(self.sampler)))
            if self.batch_size is None:
                return iter(self.sampler)
            return _cut(self.sampler.blocks(), self.batch_size, self._drop_last)
        sampler, inner = self.sampler, getattr(self.sampler, "sampler", None)
        if type(sampler) is BatchSampler and isinstance(inner, EpochSampler):
            inner.set_epoch(epoch, start=min(start * sampler.batch_size, len(inner)))
            return iter(sampler)
        for owner in (sampler, inner):  # a stock BatchSampler knows no epochs
            if owner is not None and hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        if self.batch_size is not None:
            sampler = BatchSampler(cast("Sampler[int]", sampler), self.batch_size, self._drop_last)
        # Whole and at once: samplers of others draw from the global streams, where they begin and as they go on.
        with isolated(self._seed, "sampler", epoch, cuda=False):
            batches = list(islice(iter(sampler), len(self)))
        return islice(batches, start, None)


def _cut(blocks: Iterator[np.ndarray], size: int, drop_last: bool) -> Iterator[np.ndarray]:
    """Arrays of `size` from arrays of any length; a shorter last one unless dropped."""
    left = np.empty(0, dtype=np.int64)
    for block in blocks:
        joined = np.concatenate([left, block]) if len(left) else block
        whole = len(joined) // size * size
        for begin in range(0, whole, size):
            yield joined[begin : begin + size]
        left = joined[whole:]
    if len(left) and not drop_last:
        yield left


def as_fetched(fetched: Any) -> Any:
    """The collation of a `Fetcher`'s batch: done already, where its rows were read."""
    return fetched
