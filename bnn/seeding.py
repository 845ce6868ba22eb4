"""Randomness by key: every draw comes from a seed and the place it is used at, never from a global stream."""

from __future__ import annotations

import hashlib
import operator
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from bnn.errors import ConfigError


def as_seed(seed: int) -> int:
    """The seed as a plain int.

    Raises:
        ConfigError: anything but a whole number: other things have no value that is the same everywhere.
    """
    try:
        return operator.index(seed)
    except TypeError as error:
        raise ConfigError("seed", want="a whole number", got=repr(seed), fix="pass seed=0, or another") from error


def derive(seed: int, *keys: int | str) -> int:
    """A seed in [0, 2^63) for the place named by `keys`; different keys give unrelated seeds."""
    text = "/".join(str(key) for key in (as_seed(seed), *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def deriving(seed: int, *keys: int | str) -> Callable[[int | str], int]:
    """`derive` of the place named by `keys` and one key more, for many of these: what they share is hashed once."""
    shared = hashlib.blake2b("".join(f"{key}/" for key in (as_seed(seed), *keys)).encode(), digest_size=8)

    def derived(key: int | str) -> int:
        hashed = shared.copy()
        hashed.update(str(key).encode())
        return int.from_bytes(hashed.digest(), "little") >> 1

    return derived


def generator(seed: int, *keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator for the place named by `keys`."""
    return torch.Generator(device=device).manual_seed(derive(seed, *keys))


GLOBAL_STATE = threading.RLock()
"""Held while global state of the process (random streams, Pyro's) is not what its owner left there."""


def seed_streams(start: int) -> None:
    """Start the global streams of torch (on the CPU), NumPy and Python from a number: for processes of our own."""
    torch.default_generator.manual_seed(start)
    np.random.seed(start % 2**32)  # noqa: NPY002
    random.seed(start)


@contextmanager
def isolated(seed: int, *keys: int | str, cuda: bool = True) -> Iterator[None]:
    """Run code that draws from the global streams of torch, NumPy and Python, and leave those as they were.

    Inside, all of them start from `(seed, *keys)`. For libraries that know no other source: Pyro,
    the initialisers of `torch.nn`, other people's data sets. Threads wait for each other here, since
    the streams are the process's. Code that runs on the CPU alone needs no `cuda`.
    """
    start = derive(seed, *keys)
    with GLOBAL_STATE, torch.random.fork_rng(devices=None if cuda else []):
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - saved, not used
        seed_streams(start)
        if cuda and torch.cuda.is_available():
            torch.cuda.manual_seed_all(start)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
