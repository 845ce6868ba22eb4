"""Which sample of a bank comes next: bank indices as a pure function of seed and position."""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Iterator, Mapping, Sized
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from bnn.errors import BankMismatch, ConfigError, choose
from bnn.samplers.hashing import exponentials, hash64, keyed
from bnn.seeding import as_seed

Strategy: TypeAlias = Literal["sequential", "shuffle", "random", "stratified", "weighted", "antithetic", "fixed"]


@runtime_checkable
class BankColumns(Sized, Protocol):
    """A bank, as far as the sampler knows: its length, columns and record, and a name for its content."""

    @property
    def digest(self) -> str: ...

    @property
    def chain(self) -> Tensor: ...

    @property
    def log_weight(self) -> Tensor: ...

    @property
    def info(self) -> Mapping[str, Any]: ...


class SampleIndexSampler(Sampler[int]):
    """Bank indices pass after pass, in an order that depends on the seed and the position alone.

    Position p is place p mod S of pass p div S. A pass is, by strategy:

    - `"sequential"`: the samples as they stand;
    - `"shuffle"`: each once, in an order drawn anew for every pass;
    - `"stratified"`: each once, the chains in turn, so that among any few neighbours each chain has its share;
    - `"antithetic"`: each once, the two samples of a pair next to each other, for banks drawn in such pairs;
    - `"weighted"`: S draws by the bank's log weights, sample i floor(S w_i) or ceil(S w_i) times
      (systematic resampling), shuffled;
    - `"random"`: S independent draws, all samples alike;
    - `"fixed"`: `index`, always.

    With a `window` a shuffled pass goes through few shards at once: shards come in an order drawn anew for every pass,
    `window` of them are open, rows are drawn from those uniformly without replacement, and where one is used up the next
    is opened. What is larger than memory is then read once a pass.

    No global random state is read or changed. As an iterable it yields the rest of the present pass;
    the next iteration is the next pass. With several ranks, rank r meets every `world_size`-th position
    from r on, so no two ranks have the same one; with `shared` all ranks meet the same.

    Args:
        bank_or_length: a bank, or S itself, at least 1.
        strategy: the order.
        seed: any whole number.
        index: the one index of `"fixed"`.
        rank: of this process, in [0, world_size).
        world_size: processes that share the positions.
        shared: whether every rank meets the same indices.
        window: shards of the bank that a pass of `"shuffle"` draws from at once, at least 1; None for all.

    Raises:
        ConfigError: an empty bank, an unknown strategy, or one that the bank does not allow.

    Examples:
        >>> sampler = SampleIndexSampler(5, seed=0)
        >>> list(sampler), list(sampler)
        ([2, 3, 0, 4, 1], [3, 2, 4, 1, 0])
        >>> sampler.at([0, 5, 9]).tolist()
        [2, 3, 0]

    Source: of systematic resampling, Kitagawa (1996), J. Comput. Graph. Stat. 5(1).
    """

    def __init__(
        self,
        bank_or_length: BankColumns | int,
        *,
        strategy: Strategy = "shuffle",
        seed: int = 0,
        index: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        shared: bool = False,
        window: int | None = None,
    ) -> None:
        choose("strategy", strategy, STRATEGIES)
        length = bank_or_length if isinstance(bank_or_length, int) else len(bank_or_length)
        if length < 1:
            raise ConfigError(
                "SampleIndexSampler", want="a bank of at least one sample", got=str(length), fix="fit the bank first"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(
                "rank", want=f"at least 0 and below world_size={world_size}", got=str(rank), fix="count ranks from 0"
            )
        self.length, self.strategy, self.seed = length, strategy, as_seed(seed)
        self.rank, self.world_size, self.shared = rank, world_size, shared
        self._bank = None if isinstance(bank_or_length, int) else bank_or_length
        self._index: int = _check_index(index, strategy, length)
        self.window = _check_window(window, strategy)
        self._seed_key = np.uint64(hash64(np.uint64(self.seed % 2**64)))
        self._order_of: Callable[[np.uint64, int], np.ndarray] | None = self._orders()
        self._position = 0
        self._order: tuple[int, np.ndarray] | None = None  # the pass that was asked for last

    @property
    def bank(self) -> BankColumns | None:
        """The bank, or None where only its length was given."""
        return self._bank

    @property
    def position(self) -> int:
        """Of this rank, that the next index comes from."""
        return self._position

    @property
    def digest(self) -> str:
        """The digest of the bank, or its length where only that was given."""
        return f"length:{self.length}" if self._bank is None else self._bank.digest

    def at(self, positions: int | list[int] | np.ndarray | Tensor | range) -> Tensor:
        """Bank indices at these positions of this rank, int64 of the same shape; positions are at least 0."""
        places = np.asarray(positions, dtype=np.int64)
        if places.size and places.min() < 0:
            raise ConfigError("positions", want="numbers of at least 0", got=str(places.min()), fix="count from 0")
        if not self.shared:
            places = places * self.world_size + self.rank
        if self.strategy == "fixed":
            return torch.full(places.shape, self._index, dtype=torch.int64)
        if self.strategy == "random":
            keys = keyed(self._seed_key, places)
            return torch.from_numpy(np.asarray((keys % np.uint64(self.length)).astype(np.int64)))
        passes, inside = places // self.length, places % self.length
        if self._order_of is None:
            return torch.from_numpy(np.asarray(inside))
        indices = np.empty(places.shape, dtype=np.int64)
        for number in np.unique(passes).tolist():
            here = passes == number
            indices[here] = self._pass_order(number)[inside[here]]
        return torch.from_numpy(indices)

    def detached(self) -> SampleIndexSampler:
        """The same indices, for whoever looks ahead: without a hold on the bank, and with a pass of its own in memory."""
        other = copy.copy(self)
        other._bank = other._order = None
        return other

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        stop = (self._position // self.length + 1) * self.length
        while self._position < stop:
            index = int(self.at(self._position))
            self._position += 1
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Start the next iteration at the beginning of pass `epoch`."""
        self._position = epoch * self.length

    def state_dict(self) -> dict[str, Any]:
        """Where iteration stands; plain values, whatever S is."""
        return {
            "position": self._position,
            "seed": self.seed,
            "strategy": self.strategy,
            "length": self.length,
            "digest": self.digest,
            "index": self._index,
            "world_size": self.world_size,
            "shared": self.shared,
            "window": self.window or 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a sampler with the same options over the same bank.

        Raises:
            BankMismatch: the state is of another bank, seed, strategy or number of ranks.
        """
        mine = self.state_dict()
        for key in ("length", "digest", "strategy", "seed", "index", "world_size", "shared", "window"):
            found = state.get(key, 0) if key == "window" else state[key]  # states of old know of no window
            if found != mine[key]:
                raise BankMismatch(
                    f"sampler state '{key}'",
                    want=str(mine[key]),
                    got=str(found),
                    fix="resume with the bank, options and number of ranks it was saved with",
                )
        self._position = int(state["position"])

    def _pass_order(self, number: int) -> np.ndarray:
        """The indices of pass `number`, [S]."""
        assert self._order_of is not None
        if self._order is None or self._order[0] != number:
            pass_key = np.uint64(hash64(self._seed_key ^ np.uint64(number)))
            self._order = number, self._order_of(pass_key, self.length)
        return self._order[1]

    def _orders(self) -> Callable[[np.uint64, int], np.ndarray] | None:
        """(key of a pass, S) -> its indices; None where no pass differs from another."""
        if self.strategy == "shuffle":
            if self.window is None:
                return _shuffled
            return partial(_windowed, rows=self._shard_rows(), window=self.window)
        if self.strategy not in ("stratified", "weighted", "antithetic"):
            return None
        if self._bank is None:
            raise ConfigError(
                f"strategy '{self.strategy}'",
                want="a bank, whose columns it reads",
                got="a length",
                fix="pass the bank",
            )
        if self.strategy == "stratified":
            number, length = _chains(self._bank.chain.numpy())
            return partial(_stratified, chain=number, length=length)
        if self.strategy == "weighted":
            share = self._bank.log_weight.double().softmax(dim=0).numpy().cumsum()
            return partial(_systematic, cumulative=share / share[-1])
        if self._bank.info.get("row_order") == "striped":
            raise ConfigError(
                "strategy 'antithetic'",
                want="samples in the order of their draws",
                got="a bank whose rows are spread over its shards",
                fix="use 'shuffle', or put them in order with 'bnn bank compact --order chain'",
            )
        draws = (self._bank.info.get("method") or {}).get("options", {}).get("draws")
        if draws != "antithetic":
            raise ConfigError(
                "strategy 'antithetic'",
                want="a bank drawn in antithetic pairs",
                got=f"draws={draws!r}",
                fix="fit it with Guide(..., draws='antithetic')",
            )
        return _in_pairs

    def _shard_rows(self) -> np.ndarray:
        rows = getattr(self._bank, "shard_rows", None)
        if rows is None:
            raise ConfigError(
                f"window={self.window}",
                want="a bank, whose shards it opens",
                got="a length" if self._bank is None else "one that has none",
                fix="pass the bank",
            )
        return np.asarray(rows, dtype=np.int64)


STRATEGIES: tuple[str, ...] = ("sequential", "shuffle", "random", "stratified", "weighted", "antithetic", "fixed")


def _check_index(index: int | None, strategy: str, length: int) -> int:
    if (index is not None) != (strategy == "fixed"):
        raise ConfigError("index", want="one for strategy 'fixed', and for no other", got=repr(index), fix="see both")
    if index is not None and not 0 <= index < length:
        raise ConfigError("index", want=f"at least 0 and below {length}", got=str(index), fix="pick one of the bank")
    return -1 if index is None else index


def _check_window(window: int | None, strategy: str) -> int | None:
    if window is not None and strategy != "shuffle":
        raise ConfigError("window", want="strategy 'shuffle' with it", got=repr(strategy), fix="leave it out")
    if window is not None and window < 1:
        raise ConfigError("window", want="at least 1 shard", got=str(window), fix="raise it, or leave it out for all")
    return window


def _shuffled(key: np.uint64, size: int) -> np.ndarray:
    """Samples sorted by a number hashed from (seed, pass, i)."""
    return np.argsort(keyed(key, np.arange(size, dtype=np.int64)), kind="stable")


def _windowed(key: np.uint64, size: int, rows: np.ndarray, window: int) -> np.ndarray:
    """Each sample once, drawn from `window` open shards, which come in a shuffled order.

    A row comes up at the time its shard is opened plus a wait, exponential and its own: of the rows that are left each is
    then the next with the same probability, whenever its shard was opened. A shard is opened when one is used up.

    Args:
        key: of the pass.
        size: S.
        rows: of each shard, at least 1, summing to S.
        window: shards open at once.
    """
    order = _shuffled(key, len(rows))  # of the shards
    waits = exponentials(np.uint64(hash64(key)), size)  # [S]
    starts = np.concatenate([[0], rows.cumsum()])
    longest = np.maximum.reduceat(waits, starts[:-1])  # [shards]
    opened = np.zeros(len(rows))
    ends: list[float] = []  # a heap: when the shards that are open are used up
    for shard in order.tolist():
        opened[shard] = heapq.heappop(ends) if len(ends) == window else 0.0
        heapq.heappush(ends, opened[shard] + longest[shard])
    place = np.empty(len(rows), dtype=np.int64)
    place[order] = np.arange(len(rows))
    shard_of = np.repeat(np.arange(len(rows)), rows)  # [S]
    # Where rounding gives two rows one time, the shard that was opened first comes first: never one too many is open.
    found: np.ndarray = np.lexsort((place[shard_of], opened[shard_of] + waits))
    return found


def _chains(chain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chain of each sample as a number from 0, and the length of each chain."""
    _, number, length = np.unique(chain, return_inverse=True, return_counts=True)
    return number.astype(np.int64), length.astype(np.int64)


def _stratified(key: np.uint64, size: int, chain: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Shuffled within each chain; the j-th sample of a chain of n falls at a random place of [j / n, (j + 1) / n)."""
    shuffled = _shuffled(key, size)
    by_chain = shuffled[np.argsort(chain[shuffled], kind="stable")]  # chain after chain, each shuffled
    first = np.concatenate([[0], length.cumsum()[:-1]])
    place = np.arange(size) - first[chain[by_chain]]  # j
    jitter = (keyed(np.uint64(hash64(key)), np.arange(size, dtype=np.int64)) >> np.uint64(11)) * 2.0**-53
    return by_chain[np.argsort((place + jitter) / length[chain[by_chain]], kind="stable")]


def _systematic(key: np.uint64, size: int, cumulative: np.ndarray) -> np.ndarray:
    """S evenly spaced points from one random offset, through the cumulative weights; then shuffled."""
    offset = float(np.uint64(hash64(key)) >> np.uint64(11)) * 2.0**-53
    points = (np.arange(size) + offset) / size
    # Rounding can lift the last point to 1: it belongs to the last sample of any weight.
    chosen = np.minimum(np.searchsorted(cumulative, points, side="right"), np.searchsorted(cumulative, 1.0))
    shuffled: np.ndarray = chosen[_shuffled(key, size)]
    return shuffled


def _in_pairs(key: np.uint64, size: int) -> np.ndarray:
    """Samples 2j and 2j + 1 together, pairs in a shuffled order; a last one without a partner comes last."""
    pairs = _shuffled(key, size // 2)
    order = (2 * pairs[:, None] + np.arange(2)).reshape(-1)
    return np.concatenate([order, np.arange(size // 2 * 2, size)])
