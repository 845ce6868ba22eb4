"""Metrics over a predictive, and reports of them."""

from bnn.evaluation.convergence import diagnose, probe_rows
from bnn.evaluation.report import Figure, Report, save_reports
from bnn.evaluation.scoring import FIGURES, evaluate
from bnn.evaluation.verdict import Diagnosis

__all__ = ["FIGURES", "Diagnosis", "Figure", "Report", "diagnose", "evaluate", "probe_rows", "save_reports"]
