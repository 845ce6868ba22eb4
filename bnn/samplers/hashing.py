"""Random numbers by counter: what stands at a position depends on a key and the position alone."""

from __future__ import annotations

import numpy as np

from bnn.seeding import derive

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: steps of a Weyl sequence
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hash64(values: np.ndarray | np.uint64) -> np.ndarray:
    """A 64-bit mix in which every input bit reaches every output bit.

    z = x + 0x9E37..; z = (z ^ z >> 30) * 0xBF58..; z = (z ^ z >> 27) * 0x94D0..; z ^ z >> 31

    Args:
        values: uint64, any shape.

    Source: Steele, Lea and Flood (2014), Fast splittable pseudorandom number generators (SplitMix64).
    """
    with np.errstate(over="ignore"):
        z = np.array(values, dtype=np.uint64)  # a copy, worked on in place: arrays may be of N
        z += _GOLDEN
        z ^= z >> np.uint64(30)
        z *= _FIRST
        z ^= z >> np.uint64(27)
        z *= _SECOND
        z ^= z >> np.uint64(31)
        return z


def key_of(seed: int, *keys: int | str) -> np.uint64:
    """A key for the place named by `keys`; different ones give unrelated numbers."""
    return np.uint64(derive(seed, *keys))


def keyed(key: np.uint64, positions: np.ndarray) -> np.ndarray:
    """One uint64 for each position, int64 of any shape."""
    mixed = hash64(positions.astype(np.uint64))
    mixed ^= key
    return hash64(mixed)


def uniforms(key: np.uint64, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for each position, a multiple of 2^-53."""
    bits: np.ndarray = keyed(key, positions) >> np.uint64(11)
    return bits * 2.0**-53


def exponentials(key: np.uint64, size: int) -> np.ndarray:
    """Waiting times of mean 1, float64 [size].

    Of uniforms U1 > U2 > ... up to the first that is larger than the one before it, U1 is kept where their number is
    even, and 1 is added and it is begun anew where it is not. Nothing but comparisons and sums: no logarithm whose last
    bit is another on another machine.

    Source: von Neumann (1951), Various techniques used in connection with random digits.
    """
    found = np.zeros(size)
    left, counter = np.arange(size, dtype=np.int64), 0

    def fresh(places: np.ndarray) -> np.ndarray:
        nonlocal counter
        counter += 1
        return uniforms(np.uint64(hash64(key ^ np.uint64(counter))), places)

    while len(left):
        first = last = fresh(left)
        is_even, running = np.zeros(len(left), dtype=bool), np.arange(len(left))
        while len(running):  # which of `left` have fallen so far; each ends with the first that rises
            following = fresh(left[running])
            falls = following < last
            is_even[running] = ~is_even[running]
            running, last = running[falls], following[falls]
        found[left[is_even]] += first[is_even]
        left = left[~is_even]
        found[left] += 1.0
    return found


def permutation(key: np.uint64, length: int) -> np.ndarray:
    """An order of 0..length-1, int64: places sorted by their numbers under the key."""
    return np.argsort(keyed(key, np.arange(length, dtype=np.int64)), kind="stable")
