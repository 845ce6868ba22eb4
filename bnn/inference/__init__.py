"""Producers: each turns a model and data into blocks of samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bnn.inference.ensemble import Ensemble
from bnn.inference.guide import Guide
from bnn.inference.hmc import HMC
from bnn.inference.ivon import IVON
from bnn.inference.laplace import Laplace
from bnn.inference.nuts import NUTS
from bnn.inference.prior import Prior
from bnn.inference.sgmcmc import SGHMC, SGLD
from bnn.inference.swag import SWAG
from bnn.types import Method

METHODS: dict[str, Callable[..., Method]] = {
    "prior": Prior,
    "mean-field": partial(Guide, family="mean-field"),
    "low-rank": partial(Guide, family="low-rank"),
    "full-rank": partial(Guide, family="full-rank"),
    "flow": partial(Guide, family="flow"),
    "map": partial(Guide, family="map"),
    "guide": partial(Guide, family="AutoNormal"),
    "laplace": Laplace,
    "ensemble": Ensemble,
    "swag": SWAG,
    "ivon": IVON,
    "sgld": SGLD,
    "sghmc": SGHMC,
    "hmc": HMC,
    "nuts": NUTS,
}
"""The table of methods: what the command line calls them, and how they are made from options."""

__all__ = ["HMC", "IVON", "METHODS", "NUTS", "SGHMC", "SGLD", "SWAG", "Ensemble", "Guide", "Laplace", "Prior"]
