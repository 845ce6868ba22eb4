"""Which sample a batch meets, and in which order data come."""

from bnn.samplers.index import SampleIndexSampler
from bnn.samplers.pairing import Pair, PairedLoader

__all__ = ["Pair", "PairedLoader", "SampleIndexSampler"]
