"""What held-out rows correct of a predictive: a temperature, conformal sets and intervals, kept beside the bank."""

from bnn.posthoc.calibration import FILE, Calibration, ClassSets
from bnn.posthoc.conformal import (
    Interval,
    aps_scores,
    interval_margins,
    lac_scores,
    prediction_sets,
    rank,
    set_threshold,
    widened,
)
from bnn.posthoc.temperature import Estimate, fit_temperature, temper

__all__ = [
    "FILE",
    "Calibration",
    "ClassSets",
    "Estimate",
    "Interval",
    "aps_scores",
    "fit_temperature",
    "interval_margins",
    "lac_scores",
    "prediction_sets",
    "rank",
    "set_threshold",
    "temper",
    "widened",
]
