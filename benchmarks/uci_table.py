"""Published figures on UCI regressions, and tables of ours beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

SETS = ("yacht", "energy", "concrete", "wine-quality-red", "power-plant")

Row: TypeAlias = dict[str, Any]
"""A result: set, split, method, digest of the choice, and figures."""


class Published(NamedTuple):
    """Figures of others on all 20 splits: means and, where they were given, standard errors."""

    rmse: float | None
    rmse_error: float | None
    log_likelihood: float
    log_likelihood_error: float | None


SOURCES = {
    "MC dropout": "grid search of 2018 in the code of Gal and Ghahramani (2016), arXiv:1506.02142",
    "PBP": "Hernandez-Lobato and Adams (2015), arXiv:1502.05336",
    "deep ensembles": "Lakshminarayanan et al. (2017), arXiv:1612.01474",
    "VI": "variational inference in Uncertainty Baselines, Nado et al. (2021), arXiv:2106.04015",
}
PUBLISHED = {
    "concrete": {
        "MC dropout": Published(4.82, 0.16, -2.93, 0.02),
        "PBP": Published(5.67, None, -3.16, None),
        "deep ensembles": Published(6.03, None, -3.06, None),
        "VI": Published(None, None, -3.22, None),
    },
    "energy": {
        "MC dropout": Published(0.54, 0.06, -1.21, 0.01),
        "PBP": Published(1.80, None, -2.04, None),
        "deep ensembles": Published(2.09, None, -1.38, None),
        "VI": Published(None, None, -0.93, None),
    },
    "power-plant": {
        "MC dropout": Published(4.01, 0.04, -2.80, 0.01),
        "PBP": Published(4.12, None, -2.84, None),
        "deep ensembles": Published(4.11, None, -2.79, None),
        "VI": Published(None, None, -2.85, None),
    },
    "wine-quality-red": {
        "MC dropout": Published(0.62, 0.01, -0.93, 0.01),
        "PBP": Published(0.64, None, -0.97, None),
        "deep ensembles": Published(0.64, None, -0.94, None),
        "VI": Published(None, None, -1.00, None),
    },
    "yacht": {
        "MC dropout": Published(0.67, 0.05, -1.25, 0.01),
        "PBP": Published(1.02, None, -1.63, None),
        "deep ensembles": Published(1.58, None, -1.18, None),
        "VI": Published(None, None, -2.01, None),
    },
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over splits, and its standard error where there are two."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def best_published(name: str, figure: str) -> tuple[str, float, float]:
    """The best published column of a set: its name, value and standard error, 0 where none was given."""
    known = {column: each for column, each in PUBLISHED[name].items() if getattr(each, figure) is not None}
    sign = -1 if figure == "rmse" else 1
    best = max(known, key=lambda column: sign * getattr(known[column], figure))
    return best, getattr(known[best], figure), getattr(known[best], f"{figure}_error") or 0.0


def verdict(name: str, figure: str, mean: float, error: float | None) -> str:
    """Whether a mean is better than the best published one, or within a standard error of the two together."""
    _, best, best_error = best_published(name, figure)
    behind = mean - best if figure == "rmse" else best - mean
    margin = math.hypot(error or 0.0, best_error)
    if behind <= 0:
        return "better"
    return "within" if behind <= margin else f"behind by {behind:.3f}"


def told(value: float | None, error: float | None, digits: int = 2) -> str:
    """A figure with its standard error as far as they are known."""
    if value is None:
        return "—"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(rows: Sequence[Row]) -> list[str]:
    """All figures as a table: means and standard errors over splits, published ones below those of their set."""
    lines = [
        "| set | method | splits | RMSE | log likelihood | coverage of 90 % | R-hat, median and largest | divergent | seconds |",
        "|---" * 9 + "|",
    ]
    for name in (name for name in SETS if any(row["set"] == name for row in rows)):
        digits = 3 if name == "wine-quality-red" else 2
        for method in dict.fromkeys(row["method"] for row in rows):
            of = [row for row in rows if row["set"] == name and row["method"] == method]
            if not of:
                continue
            mixing = divergent = "—"
            if "rhat_max" in of[0]:
                median, largest = statistics.fmean(row["rhat_median"] for row in of), max(row["rhat_max"] for row in of)
                mixing, divergent = f"{median:.2f}, {largest:.2f}", f"{sum(row['divergences'] for row in of):.0f}"
            cells = (
                told(*mean_and_error([row["rmse"] for row in of]), digits),
                told(*mean_and_error([row["log_likelihood"] for row in of]), digits),
                told(*mean_and_error([row["coverage_90"] for row in of])),
            )
            seconds = statistics.fmean(row["seconds"] for row in of)
            lines.append(
                f"| {name} | {method} | {len(of)} | {' | '.join(cells)} | {mixing} | {divergent} | {seconds:.0f} |"
            )
        for column, one in PUBLISHED[name].items():
            root, log = told(one.rmse, one.rmse_error), told(one.log_likelihood, one.log_likelihood_error)
            lines.append(f"| {name} | {column}, published | 20 | {root} | {log} | — | — | — | — |")
    return lines


def beside(rows: Sequence[Row]) -> list[str]:
    """The table of the page on HMC: methods beside each other, and the best published column in a row of its own."""
    lines = [
        "| set | method | RMSE | log likelihood | coverage of 90 % | R-hat, median and largest | seconds |",
        "|---" * 7 + "|",
    ]
    for line in table(rows):
        cells = line.strip("| ").split(" | ")
        if len(cells) == 9 and cells[0] in SETS and "published" not in cells[1]:
            name, method, _, root, log, covered, mixing, _, seconds = cells
            lines.append(f"| {name} | {method} | {root} | {log} | {covered} | {mixing} | {seconds} |")
    for name in SETS:
        (one, root, _), (other, log, _) = best_published(name, "rmse"), best_published(name, "log_likelihood")
        place = max((n for n, line in enumerate(lines) if line.startswith(f"| {name} |")), default=None)
        if place is not None:
            lines.insert(place + 1, f"| {name} | published: {one}; {other} | {root} | {log} | — | — | — |")
    return lines


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Of each set and method: RMSE and log likelihood against the best published column."""
    found = []
    for name, method in dict.fromkeys((row["set"], row["method"]) for row in rows):
        of = [row for row in rows if (row["set"], row["method"]) == (name, method)]
        words = []
        for figure in ("rmse", "log_likelihood"):
            mean, error = mean_and_error([row[figure] for row in of])
            column, best, _ = best_published(name, figure)
            words.append(f"{figure} {mean:.3f} {verdict(name, figure, mean, error)} ({column} {best})")
        found.append(f"{name}, {method}: {', '.join(words)}")
    return found
