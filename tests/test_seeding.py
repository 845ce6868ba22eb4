"""Randomness by key: unrelated seeds for unlike places, and global streams left as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from bnn.errors import ConfigError
from bnn.seeding import derive, deriving, generator, isolated


def test_seeds_are_golden_and_differ_by_place() -> None:
    assert derive(0, "chain", 1, 2) == 4939876256570120926
    places = {derive(seed, name, i) for seed in range(20) for name in ("a", "b") for i in range(20)}
    assert len(places) == 800
    assert derive(1, 23) != derive(12, 3)
    assert all(0 <= derive(seed, "x") < 2**63 for seed in (0, -1, 2**70))


def test_generators_repeat() -> None:
    assert torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "a")))
    assert not torch.equal(torch.rand(3, generator=generator(1, "a")), torch.rand(3, generator=generator(1, "b")))


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_isolated_streams_repeat_and_leave_the_outer_ones_alone(world_untouched: None) -> None:
    with isolated(3, "x"):
        first = draw()
        with isolated(4):
            inner = draw()
        after = draw()
    with isolated(3, "x"):
        assert draw() == first
        assert draw() == after
    assert len({*first, *inner, *after}) == 9


def test_isolated_restores_after_an_error(world_untouched: None) -> None:
    def fail() -> None:
        with isolated(1):
            draw()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()


def test_deriving_is_derive_with_one_key_more() -> None:
    for seed, keys in ((0, ()), (7, ("draw",)), (-3, ("chain", 2))):
        derived = deriving(seed, *keys)
        assert [derived(key) for key in (5, "x", 0, 5)] == [derive(seed, *keys, key) for key in (5, "x", 0, 5)]
    with pytest.raises(ConfigError):
        deriving(1.5, "draw")  # type: ignore[arg-type]
