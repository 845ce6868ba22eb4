"""Producers: each turns a model and data into blocks of samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bnn.inference.guide import Guide
from bnn.inference.hmc import HMC
from bnn.inference.prior import Prior
from bnn.types import Method

METHODS: dict[str, Callable[..., Method]] = {
    "prior": Prior,
    "mean-field": partial(Guide, "mean-field"),
    "low-rank": partial(Guide, "low-rank"),
    "full-rank": partial(Guide, "full-rank"),
    "flow": partial(Guide, "flow"),
    "map": partial(Guide, "map"),
    "guide": partial(Guide, "AutoNormal"),
    "hmc": HMC,
}
"""The table of methods: what the command line calls them, and how they are made from options."""

__all__ = ["HMC", "METHODS", "Guide", "Prior"]
