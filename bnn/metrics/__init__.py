"""Scores of predictions against targets: pure functions, natural logarithms, float64, means over rows.

Each figure has its equation, range and source on the page of definitions.
"""

from bnn.metrics.calibration import Bins, adaptive_bins, calibration_bins, classwise_ece, ece, mce, rmsce
from bnn.metrics.classes import accuracy, brier, check_probs, nll, top_k
from bnn.metrics.mixtures import Bounded, mixture_cdf, mixture_crps, mixture_crps_quadrature, mixture_log_prob
from bnn.metrics.outside import aupr_in, aupr_out, auroc, fpr_at_tpr
from bnn.metrics.selective import (
    RiskCoverage,
    augrc,
    aurc,
    coverage_at_risk,
    oracle_curve,
    risk_at_coverage,
    risk_coverage,
)
from bnn.metrics.targets import coverage, crps_empirical, interval_score, mae, pinball, rmse, sharpness, width

__all__ = [
    "Bins",
    "Bounded",
    "RiskCoverage",
    "accuracy",
    "adaptive_bins",
    "augrc",
    "aupr_in",
    "aupr_out",
    "aurc",
    "auroc",
    "brier",
    "calibration_bins",
    "check_probs",
    "classwise_ece",
    "coverage",
    "coverage_at_risk",
    "crps_empirical",
    "ece",
    "fpr_at_tpr",
    "interval_score",
    "mae",
    "mce",
    "mixture_cdf",
    "mixture_crps",
    "mixture_crps_quadrature",
    "mixture_log_prob",
    "nll",
    "oracle_curve",
    "pinball",
    "risk_at_coverage",
    "risk_coverage",
    "rmsce",
    "rmse",
    "sharpness",
    "top_k",
    "width",
]
