"""Which sample a batch meets, and in which order data come."""

from bnn.samplers.balanced import ClassBalancedSampler
from bnn.samplers.dynamic import ByMetric, Constant, DynamicClassSampler, Exponential, Linear, Schedule, Table
from bnn.samplers.epochs import EpochSampler
from bnn.samplers.fetching import TensorRows
from bnn.samplers.index import SampleIndexSampler
from bnn.samplers.pairing import Pair, PairedLoader
from bnn.samplers.shuffled import ShuffledSampler
from bnn.samplers.stratified import StratifiedBatchSampler
from bnn.samplers.weighted import WeightedIndexSampler
from bnn.samplers.weights import class_weights, weights_from_uncertainty
from bnn.samplers.windows import WindowSampler

__all__ = [
    "ByMetric",
    "ClassBalancedSampler",
    "Constant",
    "DynamicClassSampler",
    "EpochSampler",
    "Exponential",
    "Linear",
    "Pair",
    "PairedLoader",
    "SampleIndexSampler",
    "Schedule",
    "ShuffledSampler",
    "StratifiedBatchSampler",
    "Table",
    "TensorRows",
    "WeightedIndexSampler",
    "WindowSampler",
    "class_weights",
    "weights_from_uncertainty",
]
