"""What each figure of a report means: one line, its unit, and which way is better."""

from __future__ import annotations

from typing import NamedTuple

SCORES = {
    "predictive_entropy": "predictive entropy",
    "expected_entropy": "expected entropy",
    "mutual_information": "mutual information",
    "one_minus_max_prob": "1 - largest probability",
}
"""Uncertainties by which rows are ranked: larger means less sure."""

LEVELS = (0.5, 0.9, 0.95)  # of central intervals
PINBALL_LEVELS = tuple(round(0.05 * place, 2) for place in range(1, 20))


class Definition(NamedTuple):
    """One metric: its meaning, its unit, whether more of it is better (None where neither way is)."""

    text: str
    unit: str = ""
    higher_is_better: bool | None = None


_INFLUENCE = "error over rows by the infinitesimal jackknife"
_RESAMPLED = "error over rows by 200 resamples"
_ENTROPY = "entropy of the mean predictive"

DEFINITIONS: dict[str, Definition] = {
    "accuracy": Definition("share of rows whose most probable class is the true one", "", True),
    "top_5": Definition("share of rows whose true class is among the five most probable", "", True),
    "nll": Definition("-mean log of the mean predictive at the target", "nats", False),
    "gibbs_nll": Definition("mean over samples of their own NLL", "nats", False),
    "brier": Definition("mean of sum_c (p_c - 1[y = c])^2, in [0, 2]", "", False),
    "ece": Definition(f"expected calibration error, equal bins (a, b], the first closed; {_INFLUENCE}", "", False),
    "rmsce": Definition(f"root mean square calibration error, the same bins; {_INFLUENCE}", "", False),
    "mce": Definition(f"maximum calibration error over filled bins, the same bins; {_RESAMPLED}", "", False),
    "ace": Definition(f"adaptive calibration error, bins of equally many rows, ties together; {_INFLUENCE}", "", False),
    "classwise_ece": Definition(
        f"mean over classes of the calibration error of their own probability, equal bins; {_INFLUENCE}", "", False
    ),
    "predictive_entropy": Definition(f"{_ENTROPY}, total uncertainty", "nats"),
    "expected_entropy": Definition("mean entropy of the samples, aleatoric uncertainty", "nats"),
    "mutual_information": Definition("predictive less expected entropy, epistemic uncertainty", "nats"),
    "variation_ratio": Definition("mean of 1 - the largest share of the samples' votes"),
    "disagreement": Definition("mean probability that two different samples vote for different classes"),
    "aurc": Definition(
        f"area under risk (share of errors) against coverage, rows ranked by 1 - largest probability; {_INFLUENCE}",
        "",
        False,
    ),
    "augrc": Definition(f"area under risk times coverage against coverage, the same order; {_INFLUENCE}", "", False),
    "coverage_at_risk_5": Definition(
        f"largest coverage with at most 5 % errors, the same order; {_RESAMPLED}", "", True
    ),
    "risk_at_coverage_80": Definition(f"share of errors in the surest 80 % of rows; {_RESAMPLED}", "", False),
    "rmse": Definition(
        "root mean squared error of the predictive mean; error over rows by the delta method", "target", False
    ),
    "mae": Definition("mean absolute error of the predictive mean", "target", False),
    "crps": Definition("continuous ranked probability score of the mixture over samples", "target", False),
    "coverage_50": Definition("share of targets in the central 50 % interval"),
    "coverage_90": Definition("share of targets in the central 90 % interval"),
    "coverage_95": Definition("share of targets in the central 95 % interval"),
    "width_90": Definition("mean width of the central 90 % interval", "target"),
    "interval_score_90": Definition(
        "width of the central 90 % interval and 20 times the distance of targets outside it", "target", False
    ),
    "pinball": Definition("mean loss of the quantiles 0.05, 0.10, ..., 0.95", "target", False),
    "sharpness": Definition("root of the mean predictive variance; error over rows by the delta method", "target"),
    "aleatoric": Definition("mean noise variance of the samples", "target^2"),
    "epistemic": Definition("mean variance of the samples' means", "target^2"),
    "rhat": Definition("largest rank-normalised split R-hat of the predictions on probe rows", "", False),
    "ess": Definition("least bulk effective sample size of the predictions on probe rows", "samples", True),
}

_OUTSIDE = {
    "auroc": Definition(f"AUROC of the {{}}, {{}} rows outside positive, ties half; {_INFLUENCE}", "", True),
    "aupr_in": Definition(f"average precision of the {{}}, rows inside positive, {{}} outside; {_INFLUENCE}", "", True),
    "aupr_out": Definition(f"average precision of the {{}}, {{}} rows outside positive; {_INFLUENCE}", "", True),
    "fpr95": Definition(
        f"share of rows inside flagged at the first threshold on the {{}} that flags 95 % of {{}} rows outside; {_RESAMPLED}",
        "",
        False,
    ),
}


def definition_of(name: str, outside: int = 0) -> Definition:
    """The definition of a metric; of one that tells rows outside apart, by which score and how many they are.

    >>> definition_of("auroc_mutual_information", 9).text
    'AUROC of the mutual information, 9 rows outside positive, ties half; error over rows by the infinitesimal jackknife'
    """
    for kind, found in _OUTSIDE.items():
        if name == kind or name.startswith(f"{kind}_"):
            score = name.removeprefix(kind).removeprefix("_") or "predictive_entropy"
            return found._replace(text=found.text.format(SCORES[score], outside))
    return DEFINITIONS[name]
