"""Samples of a bank applied to data: (bank index, x) -> outputs, without ever touching the module."""

from bnn.functional.model import FunctionalModel, SampleSource
from bnn.functional.skeleton import Outputs, Skeleton, check_copyable, check_mode, device_of
from bnn.functional.ways import Strategy

__all__ = [
    "FunctionalModel",
    "Outputs",
    "SampleSource",
    "Skeleton",
    "Strategy",
    "check_copyable",
    "check_mode",
    "device_of",
]
