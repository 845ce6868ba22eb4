"""Which sample of a bank comes next: bank indices as a pure function of seed and position."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from bnn.errors import BankMismatch, ConfigError, choose

Strategy: TypeAlias = Literal["sequential", "shuffle", "random"]
STRATEGIES: tuple[str, ...] = ("sequential", "shuffle", "random")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: steps of a Weyl sequence
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@runtime_checkable
class HasDigest(Sized, Protocol):
    """A bank, as far as the sampler knows: a length and a name for its content."""

    @property
    def digest(self) -> str: ...


def hash64(values: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit mix in which every input bit reaches every output bit.

    z = x + 0x9E37..; z = (z ^ z >> 30) * 0xBF58..; z = (z ^ z >> 27) * 0x94D0..; z ^ z >> 31

    Args:
        values: uint64, any shape.

    Source: Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators (SplitMix64).
    """
    with np.errstate(over="ignore"):
        z = np.asarray(values, dtype=np.uint64) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


class SampleIndexSampler(Sampler[int]):
    """Bank indices pass after pass, in an order that depends on the seed and the position alone.

    Position p is place p mod S of pass p div S. `"sequential"` takes the samples as they stand,
    `"shuffle"` each once a pass in an order drawn anew for every pass, `"random"` independent draws
    with replacement. No global random state is read or changed.

    As an iterable it yields the rest of the present pass; the next iteration is the next pass.

    Args:
        bank_or_length: a bank, or S itself, at least 1.
        strategy: the order.
        seed: any whole number.

    Raises:
        ConfigError: an empty bank or an unknown strategy.

    Examples:
        >>> sampler = SampleIndexSampler(5, seed=0)
        >>> list(sampler), list(sampler)
        ([2, 3, 0, 4, 1], [3, 2, 4, 1, 0])
        >>> sampler.at([0, 5, 9]).tolist()
        [2, 3, 0]
    """

    def __init__(self, bank_or_length: HasDigest | int, *, strategy: Strategy = "shuffle", seed: int = 0) -> None:
        choose("strategy", strategy, STRATEGIES)
        length = bank_or_length if isinstance(bank_or_length, int) else len(bank_or_length)
        if length < 1:
            raise ConfigError(
                "SampleIndexSampler", want="a bank of at least one sample", got=str(length), fix="fit the bank first"
            )
        self.length, self.strategy, self.seed = length, strategy, seed
        self._bank = None if isinstance(bank_or_length, int) else bank_or_length
        self._position = 0
        self._order: tuple[int, np.ndarray] | None = None  # the pass that was asked for last
        self._seed_key = hash64(np.uint64(seed % 2**64))

    @property
    def digest(self) -> str:
        """The digest of the bank, or its length where only that was given."""
        return f"length:{self.length}" if self._bank is None else self._bank.digest

    def at(self, positions: int | list[int] | np.ndarray | Tensor | range) -> Tensor:
        """Bank indices at these positions, int64 of the same shape; positions are at least 0."""
        places = np.asarray(positions, dtype=np.int64)
        if places.size and places.min() < 0:
            raise ConfigError("positions", want="numbers of at least 0", got=str(places.min()), fix="count from 0")
        if self.strategy == "sequential":
            return torch.from_numpy(np.asarray(places % self.length))
        if self.strategy == "random":
            keys = hash64(self._seed_key ^ hash64(places.astype(np.uint64)))
            return torch.from_numpy(np.asarray((keys % np.uint64(self.length)).astype(np.int64)))
        passes, inside = places // self.length, places % self.length
        indices = np.empty(places.shape, dtype=np.int64)
        for number in np.unique(passes).tolist():
            here = passes == number
            indices[here] = self._pass_order(number)[inside[here]]
        return torch.from_numpy(indices)

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
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of a sampler with the same options over the same bank.

        Raises:
            BankMismatch: the state is of another bank, seed or strategy.
        """
        mine = self.state_dict()
        for key in ("length", "digest", "strategy", "seed"):
            if state[key] != mine[key]:
                raise BankMismatch(
                    f"sampler state '{key}'",
                    want=str(mine[key]),
                    got=str(state[key]),
                    fix="resume with the bank, strategy and seed it was saved with",
                )
        self._position = int(state["position"])

    def _pass_order(self, number: int) -> np.ndarray:
        """The order of pass `number`: samples sorted by a key hashed from (seed, pass, i)."""
        if self._order is None or self._order[0] != number:
            pass_key = hash64(self._seed_key ^ np.uint64(number))
            keys = hash64(pass_key ^ hash64(np.arange(self.length, dtype=np.uint64)))
            self._order = number, np.argsort(keys, kind="stable")
        return self._order[1]
