"""Training data as batches: all rows at once, or an endless stream of them that can start anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from itertools import count
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from bnn.errors import ConfigError, DataError
from bnn.ranks import Ranks
from bnn.samplers import Constant, DynamicClassSampler, EpochSampler, ShuffledSampler, TensorRows
from bnn.samplers.fetching import Fetcher, Request, Requests
from bnn.samplers.pairing import check_order
from bnn.seeding import isolated
from bnn.types import Batch, Data


class Sampled(NamedTuple):
    """Data whose rows are drawn by a sampler.

    Batches follow the sampler; the likelihood of each row is multiplied by its importance weight where
    that is asked for. Methods that take all rows at once get them once each, weighted by N pi_i, which is what
    batches without importance weights come to on average.
    """

    data: Data  # a pair of tensors or a data set
    sampler: Any
    importance: bool


def sampled(data: Data, sampler: Any, *, importance: bool) -> Sampled:
    """Data under one of our samplers.

    Raises:
        ConfigError: a loader, which has a sampler already; or a sampler whose chances are not known.
        DataError: weights or labels of other data.
    """
    if isinstance(data, DataLoader):
        raise ConfigError(
            "sampler", want="a pair of tensors or a data set beside it", got="a DataLoader", fix="pass its data set"
        )
    if not isinstance(sampler, EpochSampler) or not hasattr(sampler, "importance_weights"):
        raise ConfigError(
            "sampler",
            want="a WeightedIndexSampler, ClassBalancedSampler, DynamicClassSampler or StratifiedBatchSampler",
            got=type(sampler).__name__,
            fix="pass one of bnn.samplers",
        )
    check_order(sampler, num_rows(data), of_batches=sampler.of_batches)
    if importance:
        sampler.importance_weights([0])  # refuses chances of 0 now, not after an epoch
    return Sampled(data, sampler, importance)


def changes(sampler: Any) -> bool:
    """Whether the chances of rows change from epoch to epoch."""
    return isinstance(sampler, DynamicClassSampler) and not isinstance(sampler.schedule, Constant)


def reweights(data: Data) -> bool:
    """Whether rows of these data are drawn with other chances than all alike, and nothing makes up for it."""
    if isinstance(data, Sampled):
        return bool(data.sampler.reweights) and not data.importance
    return isinstance(data, DataLoader) and any(
        isinstance(sampler, WeightedRandomSampler) or (isinstance(sampler, EpochSampler) and sampler.reweights)
        for sampler in samplers_of(data)
    )


def samplers_of(loader: DataLoader[Any]) -> list[Any]:
    """The samplers that decide the order of a loader's rows."""
    outer = loader.sampler, loader.batch_sampler
    owners = *outer, *(getattr(owner, "sampler", None) for owner in outer)
    unique = {id(owner): owner for owner in owners if owner is not None}
    return list(unique.values())


def num_rows(data: Data) -> int:
    """N, the rows of a pair of tensors, a data set, or the data set of a loader.

    Raises:
        DataError: a data set without a length.
    """
    if isinstance(data, Sampled):
        return num_rows(data.data)
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
    if isinstance(data, Sampled):
        return _weighed(data)
    if isinstance(data, DataLoader):
        parts = [_as_batch(part) for part in parts_of(data, 0, "full batch")]
        x = pytree.tree_map(lambda *leaves: torch.cat(leaves), *(part.x for part in parts))
        y = torch.cat([part.y for part in parts])
        if not reweights(data) and len(y) != num_rows(data):
            raise DataError(
                "data",
                want=f"all {num_rows(data)} rows of the loader's data set",
                got=f"{len(y)}",
                fix="leave out drop_last, or pass the data set",
            )
        return check(Batch(x, y))
    if isinstance(data, Dataset):
        everything = Request(0, 0, list(range(len(cast(Sized, data)))))
        return check(_as_batch(Fetcher(data, None, 0).__getitems__(everything).data))
    return check(_as_batch(data))


class Share(NamedTuple):
    """What one of several takes of a batch: neighbouring rows."""

    batch: Batch | None  # of these rows; None where there are none
    total: int  # rows of the whole batch


def minibatches(data: Data, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Batch]:
    """Batches without end, from batch number `start` on; epoch after epoch, each in an order of its own.

    The order of tensors and data sets depends on (seed, epoch) alone, and random numbers that a data set
    draws from the global streams on (seed, epoch, batch). A `DataLoader` keeps its own batch size and
    order; where it shuffles, it does so from (seed, epoch) too.
    """
    for share in shares(data, batch_size, seed=seed, start=start):
        assert share.batch is not None, "the share of one alone is the batch"
        yield share.batch


def shares(
    data: Data, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[Share]:
    """The rows that number `rank` of `world_size` takes of `minibatches`, in as many parts that differ by one row at most.

    Others' rows are not read, but for those of a `DataLoader`, which knows whole batches alone. Where a data set draws random
    numbers, each share has its own.
    """
    if isinstance(data, DataLoader):
        for whole in _from_loader(data, seed, start):
            total = len(whole.y)
            own = Ranks(rank, world_size).share(total)
            yield Share(rows_of(whole, own) if len(own) else None, total)
        return
    source = data.data if isinstance(data, Sampled) else data
    in_memory = not isinstance(source, Dataset)
    rows = TensorRows(tuple(check(_as_batch(source))[:2])) if in_memory else source
    fetcher = Fetcher(rows, None, seed)
    requests = _requests(data, batch_size, seed, rank=rank, world_size=world_size)
    epoch, requests.start = divmod(start, len(requests))
    while True:
        requests.epoch = epoch
        for request in requests:
            fetched = fetcher.__getitems__(request)
            if fetched.data is None:
                yield Share(None, fetched.total)
                continue
            batch = _as_batch(fetched.data)
            if not in_memory:
                check(batch)
            if isinstance(data, Sampled) and data.importance:
                batch = batch._replace(weight=data.sampler.importance_weights(request.rows))
            yield Share(batch, fetched.total)
        epoch, requests.start = epoch + 1, 0


def num_batches(data: Data, batch_size: int) -> int:
    """Batches an epoch of `minibatches`."""
    return len(data) if isinstance(data, DataLoader) else len(_requests(data, batch_size, 0))


def mean_rows(data: Data, batch_size: int) -> float:
    """Mean rows of a batch of `minibatches` over an epoch: B_i / mean B weighs a batch that is shorter."""
    rows, batches = num_rows(data), num_batches(data, batch_size)
    if isinstance(data, Sampled):
        rows = int(data.sampler.batch_sizes().sum()) if data.sampler.of_batches else len(data.sampler)
    if isinstance(data, DataLoader) and data.drop_last and data.batch_size:
        rows = batches * data.batch_size
    return rows / batches


def moved(values: Any, device: torch.device) -> Any:
    """A batch, or any nesting of tensors, on a device."""
    if isinstance(values, Tensor):
        return values if values.device == device else values.to(device)
    if isinstance(values, Batch):  # the common cases, without a walk
        return Batch(moved(values.x, device), moved(values.y, device), moved(values.weight, device))
    if values is None:
        return None
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, values)


def rows_of(batch: Batch, rows: range) -> Batch:
    """Neighbouring rows of a batch."""
    return Batch(*pytree.tree_map(lambda t: t[rows.start : rows.stop] if isinstance(t, Tensor) else t, tuple(batch)))


def finite(values: Tensor) -> bool:
    """Whether all are: the least and the largest tell, in one pass without an array of flags."""
    return not values.numel() or all(math.isfinite(float(end)) for end in torch.aminmax(values))


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
        if leaf.is_floating_point() and not finite(leaf):
            row = int((~torch.isfinite(leaf.flatten(1) if leaf.dim() > 1 else leaf.unsqueeze(1))).any(1).nonzero()[0])
            raise DataError(
                "data", want="finite numbers", got=f"NaN or Inf in row {row} of {name}", fix="drop or impute such rows"
            )
    if not len(batch.y):
        raise DataError("data", want="at least one row", got="none", fix="check the data set")
    return batch


def _as_batch(data: Any) -> Batch:
    if isinstance(data, Batch):
        return data
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        return Batch(tuple(data[0]) if isinstance(data[0], list) else data[0], data[1])
    raise DataError(
        "data",
        want="rows (x, y) with y a tensor",
        got=type(data).__name__,
        fix="pass a pair of tensors, or a data set or loader of such pairs",
    )


def _requests(data: Data, batch_size: int, seed: int, *, rank: int = 0, world_size: int = 1) -> Requests:
    """The batches of an epoch: by the data's sampler, or each row once in a shuffled order."""
    sampler = data.sampler if isinstance(data, Sampled) else ShuffledSampler(num_rows(data), seed=seed)
    size = None if sampler.of_batches else min(batch_size, len(sampler))
    return Requests(sampler, size, drop_last=False, seed=seed, rank=rank, world_size=world_size)


def _weighed(data: Sampled) -> Batch:
    """All rows once, with the weights N pi_i that draws by the sampler give them on average."""
    batch = full_batch(data.data)
    if data.importance:
        return batch
    if changes(data.sampler):
        raise ConfigError(
            "sampler",
            want="chances that do not change from epoch to epoch, for a method that takes all rows at once",
            got=f"the schedule {data.sampler.schedule}",
            fix="pass a ClassBalancedSampler, or choose a method of batches",
        )
    return batch._replace(weight=len(batch.y) * data.sampler.probabilities())


def _from_loader(loader: DataLoader[Any], seed: int, start: int) -> Iterator[Batch]:
    epoch, skip = divmod(start, len(loader))
    while True:
        for number, part in enumerate(parts_of(loader, seed, "batches", epoch=epoch)):
            if number >= skip:
                yield check(_as_batch(part))
        epoch, skip = epoch + 1, 0


def parts_of(loader: DataLoader[Any], seed: int, *keys: int | str, epoch: int | None = None) -> Iterator[Any]:
    """The batches of a stock loader, in an order that depends on (seed, *keys, epoch) where it shuffles.

    What the loader, its workers or its data set draw from the global streams comes from (seed, *keys, epoch,
    number of the batch). Samplers that know epochs are told this one, or keep theirs.
    """
    for sampler in samplers_of(loader):
        if isinstance(sampler, EpochSampler):
            sampler.set_epoch(sampler.epoch if epoch is None else epoch)
        elif epoch is not None and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
    place = (*keys, *(() if epoch is None else (epoch,)))
    with isolated(seed, *place):
        iterator = iter(loader)
    for number in count():
        with isolated(seed, *place, number):
            part = next(iterator, None)
        if part is None:
            return
        yield part
