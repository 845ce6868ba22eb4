"""bnn: posteriors over the weights of any torch module, kept as banks of weight samples.

Fit a posterior (`fit`), keep it as a `Bank`, apply its samples with a `FunctionalModel`, pair them
with data (`SampleIndexSampler`, `PairedLoader`), and measure what they are worth (`evaluate`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnn import diagnostics, errors, importing, inference, likelihoods, metrics, priors, samplers, uncertainty
    from bnn.bank import Bank, materialise
    from bnn.calibrating import calibrate
    from bnn.evaluation import Report, diagnose, evaluate
    from bnn.fitting import fit
    from bnn.functional import FunctionalModel
    from bnn.model import BayesianModel
    from bnn.posthoc import Calibration
    from bnn.predictive import predict
    from bnn.samplers import PairedLoader, SampleIndexSampler
    from bnn.training import distil, train

__all__ = [
    "Bank",
    "BayesianModel",
    "Calibration",
    "FunctionalModel",
    "PairedLoader",
    "Report",
    "SampleIndexSampler",
    "calibrate",
    "diagnose",
    "diagnostics",
    "distil",
    "errors",
    "evaluate",
    "fit",
    "importing",
    "inference",
    "likelihoods",
    "materialise",
    "metrics",
    "predict",
    "priors",
    "samplers",
    "train",
    "uncertainty",
]

# Where each name lives; loaded on first use, so that `import bnn` costs next to nothing.
_HOMES = {
    "Bank": "bnn.bank",
    "BayesianModel": "bnn.model",
    "Calibration": "bnn.posthoc",
    "FunctionalModel": "bnn.functional",
    "PairedLoader": "bnn.samplers",
    "Report": "bnn.evaluation",
    "SampleIndexSampler": "bnn.samplers",
    "calibrate": "bnn.calibrating",
    "diagnose": "bnn.evaluation",
    "distil": "bnn.training",
    "evaluate": "bnn.evaluation",
    "fit": "bnn.fitting",
    "materialise": "bnn.bank",
    "predict": "bnn.predictive",
    "train": "bnn.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"bnn.{name}")
    raise AttributeError(f"module 'bnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
