"""What every data sampler shares: epochs, ranks, places inside an epoch, and states."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from bnn.errors import ConfigError, DataError
from bnn.seeding import as_seed

Item = TypeVar("Item")

Plan: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Positions in an epoch's whole list, int64 [n] -> what stands there, [n] or [n, ...]."""


class EpochSampler(Sampler[Item], ABC, Generic[Item]):
    """One list an epoch, the same for every rank and every number of workers.

    The list is a function of (seed, epoch, weights) alone; rank r takes its places r, r + W, ....
    What decides the list is frozen when an iteration begins: `set_epoch` and `update` during one
    hold from the next on. No global random state is read or changed.

    `set_epoch(e)` is a state, not a step: iterating again without it gives the same list again, and
    warns once; `auto_epoch=True` makes each iteration that follows a finished one the next epoch.
    `PairedLoader`, `fit` and `train` call `set_epoch` themselves.
    """

    block_sizes: ClassVar[tuple[int, int]] = (2**12, 2**18)
    """Items drawn at once: few for the first batch, then many for speed."""

    of_batches: ClassVar[bool] = False
    """Whether an item is a whole batch of rows, for the `batch_sampler` of a loader."""

    def __init__(
        self, num_items: int, *, seed: int, rank: int, world_size: int, drop_last: bool, auto_epoch: bool
    ) -> None:
        name = type(self).__name__
        seed = as_seed(seed)
        if not isinstance(num_items, (int, np.integer)):
            raise ConfigError(name, want="a whole number of items", got=repr(num_items), fix="round it")
        if num_items < 1:
            raise ConfigError(name, want="at least one item an epoch", got=str(num_items), fix="check its options")
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"{name}(rank=)",
                want=f"at least 0 and below world_size={world_size}",
                got=str(rank),
                fix="count from 0",
            )
        if drop_last and num_items < world_size:
            raise ConfigError(name, want=f"{world_size} items, one a rank", got=str(num_items), fix="drop_last=False")
        self.seed, self.rank, self.world_size, self.drop_last = seed, rank, world_size, drop_last
        self.num_items = int(num_items)  # of all ranks together
        self._auto_epoch = auto_epoch
        self._epoch = self._start = self._yielded = 0
        self._finished: int | None = None  # the epoch that was iterated to its end last
        self._warned = False
        self._iterations = 0

    @abstractmethod
    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        """The list of an epoch; nothing that happens later changes it.

        Args:
            epoch: at least 0.
            resumed: whether the epoch was begun earlier: what was in force then is in force now.
        """

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """N, the rows of the data that are drawn from."""

    @property
    @abstractmethod
    def reweights(self) -> bool:
        """Whether rows are drawn with other chances than all alike, which changes what a posterior is fitted to."""

    @property
    @abstractmethod
    def each_once(self) -> bool:
        """Whether the ranks together take each row exactly once an epoch, as an evaluation does."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values that decide the list beside the epoch: a state with others is refused."""

    @abstractmethod
    def memory(self) -> dict[str, Any]:
        """Plain values that change as training goes on, to be kept in a state."""

    @abstractmethod
    def remember(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""

    @property
    def epoch(self) -> int:
        """The epoch of the present or next iteration."""
        return self._epoch

    def __len__(self) -> int:
        """Items of this rank an epoch."""
        rounds, rest = divmod(self.num_items, self.world_size)
        return rounds if self.drop_last or not rest else rounds + 1

    def set_epoch(self, epoch: int, *, start: int | None = None) -> None:
        """Choose the epoch of the next iteration, and the item of this rank that it begins with.

        Without `start` it begins with the first; after `load_state_dict`, the epoch of the state
        goes on where the state stands.
        """
        if epoch < 0 or (start is not None and not 0 <= start <= len(self)):
            raise ConfigError(
                "set_epoch",
                want=f"an epoch of at least 0, start in [0, {len(self)}]",
                got=f"{epoch}, {start}",
                fix="count both from 0",
            )
        if epoch != self._epoch:
            self._start = self._yielded = 0
            self._iterations += 1  # one that still runs counts no more
        if start is not None:
            self._start = self._yielded = start
        self._epoch = epoch
        self._finished = None

    def blocks(self) -> Iterator[np.ndarray]:
        """The rest of the epoch as arrays of items, drawn as they are asked for; frozen now."""
        plan, start, length = self._begin(), self._yielded, len(self)
        return self._blocks(plan, self._iterations, self._epoch, start, length)

    def __iter__(self) -> Iterator[Item]:
        blocks = self.blocks()
        iteration, start = self._iterations, self._yielded

        def items() -> Iterator[Item]:
            yielded = start
            for block in blocks:
                for item in block.tolist():
                    yielded += 1
                    if iteration == self._iterations:
                        self._yielded = yielded
                    yield item

        return items()

    def state_dict(self, *, yielded: int | None = None) -> dict[str, Any]:
        """Where iteration stands: plain values, however many rows there are.

        A loader that fetches ahead says how many items were `yielded` to its user.
        """
        if yielded is not None:
            self._yielded = yielded
        return {
            "epoch": self._epoch,
            "yielded": self._yielded,
            "identity": self._whole_identity(),
            "memory": self.memory(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the items that had been handed out; the next iteration gives the rest of that epoch.

        Raises:
            DataError: the state is of other weights, labels, options, or another number of ranks.
        """
        mine, theirs = self._whole_identity(), state["identity"]
        for key in mine:
            if theirs.get(key) != mine[key]:
                raise DataError(
                    f"{type(self).__name__} state '{key}'",
                    want=str(mine[key]),
                    got=str(theirs.get(key)),
                    fix="resume with the data, options and number of ranks it was saved with",
                )
        self.remember(state["memory"])
        epoch, yielded = int(state["epoch"]), int(state["yielded"])
        done = yielded >= len(self)
        # Loaders take up a state when their iteration begins, that is after the loop's `set_epoch` of the next epoch.
        if done and (self._auto_epoch or self._epoch == epoch + 1):
            epoch, yielded, done = epoch + 1, 0, False
        self._epoch, self._start, self._yielded = epoch, yielded, yielded
        self._finished = epoch if done else None
        self._iterations += 1

    def _begin(self) -> Plan:
        """Freeze the list of this iteration."""
        if self._finished == self._epoch and not self._start:
            if self._auto_epoch:
                self._epoch += 1
            elif not self._warned:
                self._warned = True
                warnings.warn(
                    f"{type(self).__name__}: epoch {self._epoch} is iterated again, in the same order; call "
                    "set_epoch(epoch) before each epoch, or pass auto_epoch=True",
                    stacklevel=4,
                )
        plan = self.freeze(self._epoch, resumed=self._start > 0)
        self._yielded = self._start
        self._iterations += 1
        return plan

    def _blocks(self, plan: Plan, iteration: int, epoch: int, start: int, length: int) -> Iterator[np.ndarray]:
        if iteration == self._iterations:
            self._start = 0  # not when the iteration was made: loaders with workers make one that they throw away
        size, largest = self.block_sizes
        while start < length:
            stop = min(start + size, length)
            positions = np.arange(start, stop, dtype=np.int64) * self.world_size + self.rank
            positions %= self.num_items  # a rank that is one short repeats the list's head
            yield plan(positions)
            start, size = stop, min(4 * size, largest)
        if iteration == self._iterations:
            self._finished = epoch

    def _whole_identity(self) -> dict[str, Any]:
        common = {"kind": type(self).__name__, "seed": self.seed, "items": self.num_items}
        return {**common, "world_size": self.world_size, "drop_last": self.drop_last, **self.identity()}


def as_indices(indices: Any, length: int) -> np.ndarray:
    """Row numbers as int64 [B].

    Raises:
        DataError: numbers that are no rows.
    """
    found = np.asarray(indices.cpu() if isinstance(indices, Tensor) else indices)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise DataError("indices", want="whole numbers [B]", got=f"{found.dtype} {list(found.shape)}", fix="pass rows")
    if found.size and not 0 <= found.min() <= found.max() < length:
        raise DataError(
            "indices", want=f"rows in [0, {length})", got=f"{found.min()} to {found.max()}", fix="pass rows of the data"
        )
    return found.astype(np.int64)
