"""Use a bank in training: train the parameters outside it, or distil it into one module."""

from bnn.training.distillation import distil, divergence
from bnn.training.free import train

__all__ = ["distil", "divergence", "train"]
