"""Batches of held-out data in their order, each loaded by the rank whose turn it is, and the rows on which chains are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import tqdm

from bnn.batches import full_batch, num_rows, parts_of, reweights, samplers_of
from bnn.errors import ConfigError, DataError
from bnn.functional import FunctionalModel
from bnn.samplers import EpochSampler
from bnn.seeding import isolated
from bnn.types import Batch, Data

PROBES = 64  # rows on which chains are judged
LEAST_PROBES = 8
JUDGED_VALUES = 2**21  # outputs of all samples that are judged

Shape: TypeAlias = list[list[int]]  # of the rows of each input


class Part(NamedTuple):
    """A batch that can be asked for."""

    number: int  # among all batches of an evaluation, for layers that draw
    first: int  # row of the data
    take: Callable[[], Batch]


def batches(data: Data, batch_size: int, title: str, progress: bool | None, *, targets: bool = True) -> Iterator[Batch]:
    """The data once, in order, with a bar; without targets where those are not to be looked at."""
    parts = parts_in_order(data, batch_size, count(), targets=targets, place=title)
    with tqdm(total=num_rows(data), desc=title, unit="row", delay=1.0, disable=disabled(progress)) as bar:
        for part in parts:
            batch = part.take()
            yield batch
            bar.update(len(batch.y))


def disabled(progress: bool | None) -> bool | None:
    """What tqdm takes for it: None is by whether stderr is a terminal."""
    return None if progress is None else not progress


def parts_in_order(
    data: Data,
    batch_size: int,
    numbers: Iterator[int],
    *,
    targets: bool = True,
    several: bool = False,
    place: str = "evaluate",
) -> Iterator[Part]:
    """The data once, in order; without targets where those are not to be looked at.

    Args:
        data: as of `evaluate`.
        batch_size: rows at once, where `data` is no loader.
        numbers: of the batches.
        targets: whether they are to be looked at.
        several: whether other ranks take parts too: then a data set is asked for the rows of those alone that are taken.
        place: that errors name.

    Raises:
        DataError: what is no data, or a loader that takes some rows more often than others.
    """
    if batch_size < 1:
        raise ConfigError("batch_size", want="at least 1", got=str(batch_size), fix="raise it")

    def batch_of(x: Any, y: Tensor) -> Batch:
        return full_batch((x, y if targets else torch.zeros(len(y))))

    if isinstance(data, Dataset) and several:
        for number, start in enumerate(range(0, num_rows(data), batch_size)):
            rows = range(start, min(start + batch_size, num_rows(data)))
            yield Part(next(numbers), start, lambda: batch_of(*_rows_of(data, rows, number)))  # noqa: B023
        return
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader):
        _check_order(data, place)
        first = 0
        for part in parts_of(data, 0, place):
            yield Part(next(numbers), first, lambda: batch_of(*part))  # noqa: B023
            first += len(part[1])
        return
    if not isinstance(data, (tuple, list)):
        raise DataError(
            place,
            want="a pair of tensors, a data set or a DataLoader",
            got=f"a {type(data).__name__}",
            fix="pass the data set itself",
        )
    whole = batch_of(*data[:2])
    for start in range(0, len(whole.y), batch_size):
        here = slice(start, start + batch_size)
        yield Part(
            next(numbers),
            start,
            lambda: Batch(pytree.tree_map(lambda leaf: leaf[here], whole.x), whole.y[here]),  # noqa: B023
        )


def _rows_of(data: Dataset[Any], rows: range, place: int) -> Any:
    """Batch number `place` of a data set, with the draws that it meets where all batches are taken."""
    with isolated(0, "evaluate", place):
        return next(iter(DataLoader(data, batch_sampler=[list(rows)], generator=torch.Generator())))


def _check_order(loader: DataLoader[Any], place: str) -> None:
    """Raise DataError for a loader that does not take rows alike: its figures would be of other data."""
    repeats = any(
        (isinstance(sampler, RandomSampler) and sampler.replacement)
        or (isinstance(sampler, EpochSampler) and not sampler.each_once)
        for sampler in samplers_of(loader)
    )
    if repeats or reweights(loader):
        raise DataError(
            place,
            want="rows in their natural order, each once",
            got="a loader that draws them by weight or with replacement",
            fix="pass the data set itself; probabilities after balanced training are corrected by prior_shift=",
        )


def checked_shape(place: str, x: Any, like: Shape | None) -> Shape:
    """Shapes of one row of each input; DataError where those of the data before were others."""
    found = [list(leaf.shape[1:]) for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
    return same_shape(place, found, like)


def same_shape(place: str, found: Shape, like: Shape | None) -> Shape:
    """The shapes, if they are as those before."""
    if like is not None and found != like:
        want, got = (", ".join(map(str, shapes)) for shapes in (like, found))
        raise DataError(place, want=f"rows of shape {want}", got=got, fix="choose data of the same shape")
    return found


class Probes:
    """Rows of the data, evenly spread, on which chains are judged; as many as the number of samples leaves room for."""

    def __init__(self, size: int, net: FunctionalModel, *, several: bool) -> None:
        most = max(LEAST_PROBES, min(PROBES, JUDGED_VALUES // (16 * len(net.bank))))
        self._wanted = torch.linspace(0, max(size - 1, 0), min(most, max(size, 1)), dtype=torch.float64).round().long()
        self._several = several
        self._kept: list[Any] = []

    def of(self, part: Part, batch: Batch) -> dict[str, Any]:
        """The rows of a batch that are wanted, as a state."""
        mine = (self._wanted >= part.first) & (self._wanted < part.first + len(batch.y))
        here = self._wanted[mine] - part.first
        if not len(here):
            return {}
        x = pytree.tree_map(lambda leaf: leaf[here.to(leaf.device)], batch.x)
        if not self._several:
            return {"probe": x}
        leaves, structure = pytree.tree_flatten(x)
        named = {f"probe.{place}": leaf for place, leaf in enumerate(leaves)}
        return {"probe": pytree.treespec_dumps(structure), **named}

    def add(self, state: Mapping[str, Any]) -> None:
        """Keep what `of` found in a batch; batches come in their order."""
        if "probe" not in state:
            return
        x = state["probe"]
        if self._several:
            structure = pytree.treespec_loads(x)
            x = pytree.tree_unflatten([state[f"probe.{place}"] for place in range(structure.num_leaves)], structure)
        self._kept.append(x)

    def x(self) -> Any:
        return pytree.tree_map(lambda *leaves: torch.cat(leaves), *self._kept)
