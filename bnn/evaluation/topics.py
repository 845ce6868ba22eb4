"""What metrics are called in reports, and under which heading each stands."""

from __future__ import annotations

import re

NAMES = {
    "accuracy": "accuracy",
    "nll": "negative log likelihood",
    "gibbs_nll": "Gibbs negative log likelihood",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "rmsce": "root mean square calibration error",
    "mce": "maximum calibration error",
    "ace": "adaptive calibration error",
    "classwise_ece": "class-wise calibration error",
    "predictive_entropy": "predictive entropy (total)",
    "expected_entropy": "expected entropy (aleatoric)",
    "mutual_information": "mutual information (epistemic)",
    "variation_ratio": "variation ratio",
    "disagreement": "disagreement of samples",
    "aleatoric": "aleatoric variance",
    "epistemic": "epistemic variance",
    "aurc": "area under the risk-coverage curve",
    "augrc": "area under the generalised risk-coverage curve",
    "auroc": "area under the ROC curve",
    "aupr_in": "area under precision-recall, inside",
    "aupr_out": "area under precision-recall, outside",
    "fpr95": "false positives at 95 % true ones",
    "rmse": "root mean square error",
    "mae": "mean absolute error",
    "crps": "continuous ranked probability score",
    "pinball": "pinball score",
    "sharpness": "sharpness",
    "rhat": "largest R-hat",
    "ess": "least effective sample size",
}
SCORES = {
    "predictive_entropy": "predictive entropy",
    "expected_entropy": "expected entropy",
    "mutual_information": "mutual information",
    "one_minus_max_prob": "1 \N{MINUS SIGN} largest probability",
}
NUMBERED = {  # names that end in a number: its place is {}
    "top": "top-{} accuracy",
    "coverage_at_risk": "coverage at {} % risk",
    "risk_at_coverage": "risk at {} % coverage",
    "coverage": "coverage of {} % intervals",
    "width": "width of {} % intervals",
    "interval_score": "interval score, {} %",
}
OUTSIDE = ("auroc", "aupr_in", "aupr_out", "fpr95")
TOPICS = {
    "Accuracy and loss": ("accuracy", "top", "nll", "gibbs_nll", "brier", "rmse", "mae"),
    "Calibration": ("ece", "rmsce", "mce", "ace", "classwise_ece"),
    "Uncertainty": (
        *("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio", "disagreement"),
        *("aleatoric", "epistemic"),
    ),
    "Selective prediction": ("aurc", "augrc", "coverage_at_risk", "risk_at_coverage"),
    "Out of distribution": OUTSIDE,
    "Regression": ("crps", "coverage", "width", "interval_score", "pinball", "sharpness"),
    "Chains": ("rhat", "ess"),
}
OTHER = "Other"


def family(metric: str) -> str:
    """A metric's id without the number or the score that it ends in.

    >>> family("coverage_90"), family("auroc_mutual_information"), family("classwise_ece")
    ('coverage', 'auroc', 'classwise_ece')
    """
    for kind in OUTSIDE:
        if metric.startswith(kind + "_"):
            return kind
    found = re.fullmatch(r"(\w+?)_\d+", metric)
    return found[1] if found and found[1] in NUMBERED else metric


def topic(metric: str) -> str:
    """The heading under which a metric stands.

    >>> topic("coverage_at_risk_5"), topic("coverage_95"), topic("mine")
    ('Selective prediction', 'Regression', 'Other')
    """
    return next((name for name, families in TOPICS.items() if family(metric) in families), OTHER)


def name(metric: str) -> str:
    """What people call a metric; for one that has no name here, its id in words.

    >>> name("width_90"), name("fpr95_mutual_information"), name("my_score")
    ('width of 90 % intervals', 'false positives at 95 % true ones, by mutual information', 'my score')
    """
    kind = family(metric)
    if metric in NAMES:
        return NAMES[metric]
    rest = metric.removeprefix(kind).removeprefix("_")
    if kind in OUTSIDE and rest:
        return f"{NAMES[kind]}, by {SCORES.get(rest, rest.replace('_', ' '))}"
    return NUMBERED[kind].format(rest) if kind in NUMBERED and rest else metric.replace("_", " ")


def grouped(metrics: list[str]) -> dict[str, list[str]]:
    """Metrics by topic, topics and metrics in the order of this file; those that it does not know last."""
    groups: dict[str, list[str]] = {}
    for heading in (*TOPICS, OTHER):
        order = TOPICS.get(heading, ())
        found = [metric for metric in metrics if topic(metric) == heading]
        if found:
            groups[heading] = sorted(found, key=lambda metric: order.index(family(metric)) if order else 0)
    return groups


def unit(symbol: str) -> str:
    """A unit in words; empty where there is none."""
    return {"target": "in the target's unit", "target^2": "in the target's unit squared"}.get(symbol, symbol)
