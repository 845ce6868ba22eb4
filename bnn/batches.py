"""Training data as batches: all rows at once, or an endless stream of them that can start anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from bnn.errors import DataError
from bnn.seeding import generator, isolated
from bnn.types import Batch, Data


def num_rows(data: Data) -> int:
    """N, the rows of a pair of tensors, a data set, or the data set of a loader.

    Raises:
        DataError: a data set without a length.
    """
    source = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(source, IterableDataset):
        raise DataError(
            "data",
            want="a map-style data set",
            got="an iterable one, whose length nobody knows",
            fix="give it __len__ and __getitem__, or read it into tensors",
        )
    return len(source[1]) if isinstance(source, (tuple, list)) else len(cast(Sized, source))


def full_batch(data: Data) -> Batch:
    """All rows as one batch.

    Raises:
        DataError: NaN or Inf, or inputs and targets of different lengths.
    """
    if isinstance(data, DataLoader):
        parts = [_as_batch(part) for part in parts_of(data, 0, "full batch")]
        x = pytree.tree_map(lambda *leaves: torch.cat(leaves), *(part.x for part in parts))
        return check(Batch(x, torch.cat([part.y for part in parts])))
    if isinstance(data, Dataset):
        rows = len(cast(Sized, data))
        return check(_as_batch(_fetch(data, list(range(rows)))))
    return check(_as_batch(data))


def minibatches(data: Data, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Batch]:
    """Batches without end, from batch number `start` on; epoch after epoch, each in an order of its own.

    The order of tensors and data sets depends on (seed, epoch) alone. A `DataLoader` keeps its own
    batch size and order; where it shuffles, it does so from (seed, epoch) too.
    """
    if isinstance(data, DataLoader):
        yield from _from_loader(data, seed, start)
        return
    batch = None if isinstance(data, Dataset) else check(_as_batch(data))
    rows = num_rows(data)
    size = min(batch_size, rows)
    per_epoch = math.ceil(rows / size)
    epoch, skip = divmod(start, per_epoch)
    while True:
        order = torch.randperm(rows, generator=generator(seed, "batches", epoch))
        for number in range(skip, per_epoch):
            chosen = order[number * size : (number + 1) * size]
            if batch is None:
                yield check(_as_batch(_fetch(data, chosen.tolist())))
            else:
                yield Batch(pytree.tree_map(lambda leaf: leaf[chosen], batch.x), batch.y[chosen])  # noqa: B023
        epoch, skip = epoch + 1, 0


def num_batches(data: Data, batch_size: int) -> int:
    """Batches an epoch of `minibatches`."""
    return len(data) if isinstance(data, DataLoader) else math.ceil(num_rows(data) / min(batch_size, num_rows(data)))


def mean_rows(data: Data, batch_size: int) -> float:
    """Mean rows of a batch of `minibatches` over an epoch: B_i / mean B weighs a batch that is shorter."""
    rows, batches = num_rows(data), num_batches(data, batch_size)
    if isinstance(data, DataLoader) and data.drop_last and data.batch_size:
        rows = batches * data.batch_size
    return rows / batches


def moved(values: Any, device: torch.device) -> Any:
    """A batch, or any nesting of tensors, on a device."""
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, values)


def check(batch: Batch) -> Batch:
    """The batch itself, if its values are finite and its lengths agree.

    Raises:
        DataError: otherwise, with the first row concerned.
    """
    leaves = [("x", leaf) for leaf in pytree.tree_leaves(batch.x) if isinstance(leaf, Tensor)]
    for name, leaf in [*leaves, ("y", batch.y)]:
        if len(leaf) != len(batch.y):
            raise DataError(
                "data",
                want=f"{len(batch.y)} rows of {name}, as of y",
                got=str(len(leaf)),
                fix="pass inputs and targets of the same length",
            )
        if leaf.is_floating_point() and not torch.isfinite(leaf).all():
            row = int((~torch.isfinite(leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1))).any(1).nonzero()[0])
            raise DataError(
                "data", want="finite numbers", got=f"NaN or Inf in row {row} of {name}", fix="drop or impute such rows"
            )
    if not len(batch.y):
        raise DataError("data", want="at least one row", got="none", fix="check the data set")
    return batch


def _as_batch(data: Any) -> Batch:
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return Batch(tuple(data[0]) if isinstance(data[0], list) else data[0], data[1])
    raise DataError(
        "data",
        want="rows (x, y) with y a tensor",
        got=type(data).__name__,
        fix="pass a pair of tensors, or a data set or loader of such pairs",
    )


def _fetch(dataset: Any, rows: list[int]) -> Any:
    fetched = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]
    return default_collate(fetched)


def _from_loader(loader: DataLoader[Any], seed: int, start: int) -> Iterator[Batch]:
    epoch, skip = divmod(start, len(loader))
    while True:
        for number, part in enumerate(parts_of(loader, seed, "batches", epoch)):
            if number >= skip:
                yield check(_as_batch(part))
        epoch, skip = epoch + 1, 0


def parts_of(loader: DataLoader[Any], seed: int, *keys: int | str) -> Iterator[Any]:
    """The batches of a stock loader, in an order that depends on (seed, *keys) where it shuffles.

    A loader draws from the global stream when it starts, that is until its first batch is there.
    """
    with isolated(seed, *keys):
        iterator = iter(loader)
        first = next(iterator, None)
    if first is not None:
        yield first
        yield from iterator
