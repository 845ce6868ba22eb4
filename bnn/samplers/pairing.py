"""Pair every batch of data with bank indices, over a stock DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.samplers.epochs import EpochSampler
from bnn.samplers.fetching import Fetched, Fetcher, Requests, Stream, TensorRows, as_fetched
from bnn.samplers.index import SampleIndexSampler
from bnn.samplers.shuffled import ShuffledSampler
from bnn.seeding import derive


class Pair(NamedTuple):
    """A batch of data and the bank index it meets: an int, or int64 [K], or int64 [B] with one a row."""

    data: Any
    index: int | Tensor  # type: ignore[assignment]  # hides tuple.index, which no pair needs


class PairedLoader:
    """Batches of a data set, each with the bank index it is to be run under.

    Batch b of data epoch e meets position e * len(loader) + b of the index sampler, so a new epoch
    of data goes on where the bank stands. Data order comes from (seed, epoch), and random numbers that
    a data set or collation draws from the global streams from (seed, epoch, batch). All are the same
    for any number of workers. The number of a batch travels with it, and weights never pass through workers.

    Iterating yields the batches of the present epoch; the next iteration is the next epoch, and one
    that is broken off begins its epoch again. `set_epoch` chooses one. `state_dict` counts the batches that
    were handed out, not those that workers fetched ahead, and holds the state of the data sampler.

    Data sets in memory (`TensorDataset`, or a pair of tensors) are indexed by whole batches. Batches of an
    iterable data set meet positions in the order of their arrival, counted on from epoch to epoch; that
    order is the data set's, and promised for one number of workers only.

    Args:
        dataset: a map-style or iterable data set, or a tuple or dict of tensors such as `(x, y)`.
        index_sampler: gives the bank indices.
        batch_size: rows a batch.
        shuffle: whether to draw a new order of the data each epoch.
        sampler: an order of the rows, such as a `ClassBalancedSampler`; `set_epoch` is called on it if it has that.
        batch_sampler: batches, such as of a `StratifiedBatchSampler`, in place of batch_size, shuffle,
            sampler and drop_last.
        num_indices: None pairs a batch with one index; K pairs it with the next K, int64 [K].
        per_row: pair each row with an index of its own, int64 [B], for `net(x, rows=index)`.
        num_workers: as in `DataLoader`, like `drop_last`, `collate_fn`, `pin_memory`, `prefetch_factor`,
            `persistent_workers`, `worker_init_fn`, `timeout`, `multiprocessing_context` and `in_order`.
        seed: of the data order; the index sampler's by default.
        rank: of this process, in [0, world_size).
        world_size: processes that share each batch: a rank gets its neighbours among the rows, those of all ranks being the
            batch of one process. A share without rows comes with None as its data. Which indices it meets the index
            sampler says, which may be shared or not.

    Raises:
        ConfigError: options that contradict each other.

    Examples:
        >>> x = torch.arange(6)
        >>> loader = PairedLoader((x, x % 2), SampleIndexSampler(4), batch_size=2)
        >>> [(x.tolist(), index) for (x, y), index in loader]
        [([0, 1], 2), ([2, 3], 3), ([4, 5], 0)]
    """

    def __init__(
        self,
        dataset: Dataset[Any] | tuple[Any, ...] | dict[str, Any],
        index_sampler: SampleIndexSampler,
        *,
        batch_size: int = 1,
        shuffle: bool = False,
        sampler: Sampler[int] | None = None,
        batch_sampler: Sampler[list[int]] | None = None,
        num_indices: int | None = None,
        per_row: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        timeout: float = 0.0,
        multiprocessing_context: Any = None,
        in_order: bool = True,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._iterable = isinstance(dataset, IterableDataset)
        self.dataset: Any = TensorRows(dataset) if isinstance(dataset, (tuple, dict)) else dataset
        _check_options(self._iterable, batch_size, shuffle, sampler, batch_sampler, num_indices, per_row, drop_last)
        _check_share(self._iterable, sampler if batch_sampler is None else batch_sampler, rank, world_size)
        if num_workers < 0:
            raise ConfigError(
                "num_workers", want="at least 0", got=str(num_workers), fix="pass 0 to load in this process"
            )
        self.index_sampler = index_sampler
        self.seed = index_sampler.seed if seed is None else seed
        self.num_workers, self._in_order = num_workers, in_order or num_workers == 0
        self._num_indices, self._per_row = num_indices, per_row
        self._generator = torch.Generator()  # of the workers' base seeds
        shared: dict[str, Any] = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": persistent_workers,
            "worker_init_fn": worker_init_fn,
            "timeout": timeout,
            "multiprocessing_context": multiprocessing_context,
            "in_order": in_order,
            "generator": self._generator,
        }
        self._batch_size = batch_size if batch_sampler is None else getattr(batch_sampler, "batch_size", None)
        self._requests: Requests | None = None
        if isinstance(dataset, IterableDataset):
            self._stream = Stream(
                self.dataset,
                batch_size=batch_size,
                drop_last=drop_last,
                collate_fn=collate_fn,
                seed=self.seed,
                shared=num_workers > 0,
            )
            self._loader: DataLoader[Any] = DataLoader(self._stream, batch_size=None, **shared)
        else:
            rows = self.dataset
            if batch_sampler is None and sampler is None:
                sampler = ShuffledSampler(len(cast(Sized, rows)), shuffle=shuffle, seed=self.seed)
            order = sampler if batch_sampler is None else batch_sampler
            check_order(order, len(cast(Sized, rows)), of_batches=batch_sampler is not None)
            self._requests = Requests(
                order,
                batch_size if batch_sampler is None else None,
                drop_last,
                self.seed,
                rank=rank,
                world_size=world_size,
            )
            fetcher = Fetcher(rows, collate_fn, self.seed)
            self._loader = DataLoader(
                fetcher, batch_sampler=cast("Sampler[list[int]]", self._requests), collate_fn=as_fetched, **shared
            )
        self.rows: Any = None
        """Row numbers of the batch that was handed out last, for importance weights; None for iterable data sets."""
        self.total = 0
        """Rows of the whole batch that was handed out last, of which `rows` are this rank's; 0 for iterable data sets."""
        self._epoch = self._batch = self._start = 0
        self._sets = 0  # how often the epoch was chosen: an iteration that runs meanwhile counts no more
        self._arrived = 0  # batches of an iterable data set before the present epoch

    @property
    def sampler(self) -> Any:
        """The sampler of rows or batches; None for an iterable data set."""
        return None if self._requests is None else self._requests.sampler

    @property
    def _own_sampler(self) -> EpochSampler[Any] | None:
        """The sampler of ours that decides the order, also inside a stock BatchSampler."""
        owners = self.sampler, getattr(self.sampler, "sampler", None)
        return next((owner for owner in owners if isinstance(owner, EpochSampler)), None)

    def __len__(self) -> int:
        """Batches an epoch.

        Raises:
            TypeError: an iterable data set without a length.
        """
        return len(self._loader) if self._requests is None else len(self._requests)

    def __iter__(self) -> Iterator[Pair]:
        # A start inside an epoch holds for one iteration: one that is broken off begins its epoch again.
        epoch, start, sets = self._epoch, self._start, self._sets
        self._batch, self._start = start, 0
        self._generator.manual_seed(derive(self.seed, "workers", epoch))
        self._foretell(self._arrived + start if self._requests is None else epoch * len(self) + start)
        if self._requests is None:
            yield from self._arriving(epoch, start)
        else:
            self._requests.epoch, self._requests.start = epoch, start
            length = len(self)
            for taken, fetched in enumerate(self._loader, start + 1):
                number, self.rows, data, first, self.total = Fetched(*fetched)
                # Counted before it is handed out: a state taken inside the loop's body goes on after it.
                if sets == self._sets:
                    self._epoch, self._batch = epoch, taken
                yield Pair(data, self._index(epoch * length + number, len(self.rows), first))
        if sets == self._sets:
            self._epoch, self._batch = epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the first batch of this epoch, or, after `load_state_dict`, where the state stands."""
        if epoch != self._epoch:
            self._batch = self._start = 0
        self._epoch, self._sets = epoch, self._sets + 1

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches handed out in it, with what they are valid for; plain values.

        Raises:
            ConfigError: inside an epoch with `in_order=False`: which batches have come is chance.
        """
        if not self._in_order and self._batch:
            raise ConfigError(
                "PairedLoader.state_dict",
                want="in_order=True, or a state between two epochs",
                got="in_order=False inside an epoch, in which batches come in no order to go on with",
                fix="leave in_order out where a run is to be resumed",
            )
        own = self._own_sampler
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            **self._identity(),
            "arrived": self._arrived,
            "index": self.index_sampler.state_dict(),
            "sampler": None if own is None else own.state_dict(yielded=self._items_of(own)),
        }

    def _items_of(self, own: EpochSampler[Any]) -> int:
        """Items of a sampler of ours behind the batches that were handed out."""
        size = 1 if own.of_batches else self._batch_size or 1
        return min(self._batch * size, len(own))

    def _identity(self) -> dict[str, Any]:
        """What a state is valid for, beside bank and sampler."""
        return {
            "batches": None if self._iterable else len(self),
            "batch_size": self._batch_size,
            "seed": self.seed,
            "num_indices": self._num_indices,
            "per_row": self._per_row,
            "num_workers": self.num_workers if self._iterable else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the last batch that was handed out; a state at the end of an epoch starts the next.

        Raises:
            BankMismatch: the state is of another seed, number of batches, bank, or, for an iterable data
                set, number of workers.
            DataError: it is of other weights or labels.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise BankMismatch(
                    f"loader state '{key}'",
                    want=str(mine),
                    got=str(state[key]),
                    fix="resume with the data, batch size, seed and workers it was saved with",
                )
        self.index_sampler.load_state_dict(state["index"])
        if self._own_sampler is not None:
            self._own_sampler.load_state_dict(state["sampler"])
        done = not self._iterable and state["batch"] >= len(self)
        self._epoch, self._batch = (state["epoch"] + 1, 0) if done else (state["epoch"], state["batch"])
        self._start, self._arrived = self._batch, state["arrived"]

    def _arriving(self, epoch: int, start: int) -> Iterator[Pair]:
        """The batches of an iterable data set from number `start` on, in the order of their arrival."""
        self._stream.set_epoch(epoch)
        number, sets = 0, self._sets
        for number, data in enumerate(self._loader, 1):
            if number <= start:
                continue  # handed out before the resume
            if sets == self._sets:
                self._epoch, self._batch = epoch, number
            yield Pair(data, self._index(self._arrived + number - 1, 0))
        self._arrived += number

    def _foretell(self, batch: int) -> None:
        """Tell a bank that is streamed which samples will be asked for, from this batch on."""
        bank: Any = self.index_sampler.bank
        if getattr(bank, "residency", None) == "streamed":
            each = (self._batch_size or 1) if self._per_row else (self._num_indices or 1)
            bank.follow(self.index_sampler, start=batch * each)

    def _index(self, position: int, num_rows: int, place: int = 0) -> int | Tensor:
        if self._per_row:
            if self._batch_size is None or num_rows > self._batch_size:
                raise ConfigError(
                    "per_row",
                    want="a batch_sampler with a batch_size that no batch exceeds",
                    got=f"batch_size {self._batch_size} and a batch of {num_rows} rows",
                    fix="give it the attribute batch_size",
                )
            first = position * self._batch_size + place
            return self.index_sampler.at(range(first, first + num_rows))
        if self._num_indices is None:
            return int(self.index_sampler.at(position))
        first = position * self._num_indices
        return self.index_sampler.at(range(first, first + self._num_indices))


def check_order(order: Any, num_rows: int, *, of_batches: bool) -> None:
    """Raise unless one of our samplers is for as many rows as the data have, and of rows or batches as asked.

    Raises:
        DataError: weights or labels of other data, such as of classes.
        ConfigError: a sampler of batches where one of rows is asked for, or the other way round.
    """
    if not isinstance(order, EpochSampler):
        return
    name = type(order).__name__
    if order.num_rows != num_rows:
        raise DataError(
            name,
            want=f"one weight or label a row of the data, {num_rows} of them",
            got=str(order.num_rows),
            fix="make it from these data; weights of classes become weights of rows as weights[labels]",
        )
    if order.of_batches != of_batches:
        role = "batch_sampler" if order.of_batches else "sampler"
        raise ConfigError(name, want=f"it as {role}=", got="the other", fix=f"pass {role}={name}(...)")


def _check_share(iterable: bool, order: Any, rank: int, world_size: int) -> None:
    """Raise ConfigError where ranks cannot share batches, or an order is a rank's own already."""
    if not 0 <= rank < world_size:
        raise ConfigError(
            "rank", want=f"at least 0 and below world_size={world_size}", got=str(rank), fix="count ranks from 0"
        )
    if world_size > 1 and iterable:
        raise ConfigError(
            "world_size",
            want="a map-style data set, whose batches ranks share",
            got="an iterable one",
            fix="split it inside the data set, or give it __len__ and __getitem__",
        )
    split = getattr(order, "world_size", 1)
    if world_size > 1 and split != 1:
        raise ConfigError(
            "sampler",
            want="the order of all ranks, whose batches are shared here",
            got=f"one of world_size={split}",
            fix="leave rank and world_size out of the sampler",
        )


def _check_options(
    iterable: bool,
    batch_size: int,
    shuffle: bool,
    sampler: Any,
    batch_sampler: Any,
    num_indices: int | None,
    per_row: bool,
    drop_last: bool,
) -> None:
    if batch_size < 1:
        raise ConfigError("batch_size", want="at least 1", got=str(batch_size), fix="raise it")
    if batch_sampler is not None and (batch_size != 1 or shuffle or sampler is not None or drop_last):
        raise ConfigError(
            "batch_sampler",
            want="no batch_size, shuffle, sampler or drop_last beside it",
            got="one of them",
            fix="leave it out",
        )
    if sampler is not None and shuffle:
        raise ConfigError("sampler", want="no shuffle beside it", got="shuffle=True", fix="leave shuffle out")
    if iterable and (shuffle or sampler is not None or batch_sampler is not None or per_row):
        raise ConfigError(
            "dataset",
            want="a map-style data set for shuffle, sampler, batch_sampler or per_row",
            got="an iterable one, which has an order of its own",
            fix="shuffle inside the data set, or give it __len__ and __getitem__",
        )
    if num_indices is not None and (num_indices < 1 or per_row):
        raise ConfigError(
            "num_indices", want="at least 1, and no per_row beside it", got=str(num_indices), fix="leave it out"
        )
