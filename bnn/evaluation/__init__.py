"""Metrics over a predictive, and reports of them."""

from bnn.evaluation.report import Figure, Report, save_reports
from bnn.evaluation.scoring import evaluate

__all__ = ["Figure", "Report", "evaluate", "save_reports"]
