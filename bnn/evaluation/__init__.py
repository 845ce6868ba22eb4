"""Metrics over a predictive, and reports of them."""

from bnn.evaluation.comparison import Closeness, Comparison, compare
from bnn.evaluation.convergence import diagnose, probe_rows
from bnn.evaluation.leave_one_out import Loo, Waic, loo, to_arviz, waic
from bnn.evaluation.pointwise import Pointwise, log_likelihoods
from bnn.evaluation.report import Figure, Report, save_reports
from bnn.evaluation.scoring import FIGURES, evaluate
from bnn.evaluation.stacking import Stacking, stack, stacking_weights
from bnn.evaluation.verdict import Diagnosis
from bnn.evaluation.wasserstein import wasserstein

__all__ = [
    "FIGURES",
    "Closeness",
    "Comparison",
    "Diagnosis",
    "Figure",
    "Loo",
    "Pointwise",
    "Report",
    "Stacking",
    "Waic",
    "compare",
    "diagnose",
    "evaluate",
    "log_likelihoods",
    "loo",
    "probe_rows",
    "save_reports",
    "stack",
    "stacking_weights",
    "to_arviz",
    "waic",
    "wasserstein",
]
