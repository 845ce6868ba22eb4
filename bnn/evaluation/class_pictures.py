"""Pictures of a report on classes: calibration, selection, scores, entropies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from bnn.evaluation import captions, svg, topics
from bnn.evaluation.captions import Facts
from bnn.evaluation.svg import Frame, Key, Plot

WIDE = 2.0  # standard errors that whiskers reach to each side


def reliability(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """Accuracy against confidence, and how many rows each bin holds."""
    rows, confidence, accuracy = curve["rows"], curve["confidence"], curve["accuracy"]
    filled = [i for i, number in enumerate(rows) if number and accuracy[i] is not None and confidence[i] is not None]
    if not filled:
        return ""

    def upper(frame: Frame) -> Iterable[str]:
        yield svg.bars(frame, curve["edges"], accuracy, "bnn-a0")
        yield svg.line(frame, [0, 1], [0, 1], "bnn-rule")
        for i in filled:
            low, high = wilson(accuracy[i], rows[i])
            yield svg.upright(frame, confidence[i], "bnn-w0", low=low, high=high)
        yield svg.points(frame, [confidence[i] for i in filled], [accuracy[i] for i in filled], "bnn-p0")

    def lower(frame: Frame) -> Iterable[str]:
        yield svg.bars(frame, curve["edges"], rows, "bnn-f5")

    most = svg.limits(*(one["rows"] for one in group), zero=True, most=2)
    return svg.compose(
        [
            Plot((0, 1), (0, 1), upper, y_label="accuracy", height=180),
            Plot((0, 1), most, lower, x_label="confidence", y_label="rows", height=48, most_y=2),
        ],
        title=captions.title("Reliability diagram", report),
        told=captions.told(report, "Reliability", "ece", "mce") + f", {sum(rows):,} rows",
        description=f"Accuracy against confidence in {len(rows)} bins, {len(filled)} of which hold rows. "
        + captions.sentence(report, "ece", "rmsce", "mce"),
        legend=[Key("bnn-p0", "accuracy ± 2 standard errors"), Key("bnn-rule", "calibrated")],
    )


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's interval of a share of `number` rows, two standard errors wide to each side.

    >>> wilson(1.0, 4)
    (0.5, 1.0)
    """
    square = WIDE**2
    middle = (share + square / (2 * number)) / (1 + square / number)
    reach = WIDE / (1 + square / number) * math.sqrt(share * (1 - share) / number + square / (4 * number**2))
    return middle - reach, middle + reach


def risk_coverage(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """The error among the rows that are kept, against their share; the oracle knows which rows are wrong."""
    if not any(map(svg.finite, curve["risk"])):
        return ""

    def plot(frame: Frame) -> Iterable[str]:
        yield svg.line(frame, curve["oracle_coverage"], curve["oracle_risk"], "bnn-l1")
        yield svg.line(frame, curve["coverage"], curve["risk"], "bnn-l0")
        if len(curve["risk"]) == 1:
            yield svg.points(frame, curve["coverage"], curve["risk"], "bnn-p0")

    top = svg.limits(*(one[part] for one in group for part in ("risk", "oracle_risk")), zero=True)
    return svg.compose(
        [Plot((0, 1), top, plot, x_label="share of rows kept, the surest first", y_label="error among those kept")],
        title=captions.title("Risk against coverage", report),
        told=captions.told(report, "Risk", "aurc", "augrc"),
        description="The error among the rows that are kept, against their share, and that of an oracle. "
        + captions.sentence(report, "aurc", "augrc"),
        legend=[Key("bnn-l0", "this bank"), Key("bnn-l1", "oracle")],
    )


def scores(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """Histograms of each score, inside and outside of the distribution, one above the other."""
    plots, ends = [], []
    outside = any(captions.count(one.get("outside")) for one in curve.values())
    for score, found in curve.items():
        everyone = [one[score] for one in group if score in one]
        edges, parts = captions.bin_edges(found["edges"]), [found["inside"], found.get("outside") or []]
        if not any(map(captions.count, parts)):
            continue
        shares = [captions.shares(one[part]) for one in everyone for part in ("inside", "outside") if one.get(part)]
        symbol = "" if score == "one_minus_max_prob" else " (nats)"
        figure = "auroc" if score == "predictive_entropy" else f"auroc_{score}"
        head = captions.told(report, topics.SCORES.get(score, score.replace("_", " ")) + symbol, figure)
        ends.append(head)

        def plot(frame: Frame, edges: list[float] = edges, parts: list[Any] = parts) -> Iterable[str]:
            yield svg.bars(frame, edges, captions.shares(parts[0]), "bnn-a0")
            yield svg.steps(frame, edges, captions.shares(parts[0]), "bnn-w0")
            if captions.count(parts[1]):
                yield svg.steps(frame, edges, captions.shares(parts[1]), "bnn-l1")

        reach = captions.reach([one["edges"] for one in everyone])
        y = svg.limits(*shares, zero=True, most=3)
        plots.append(Plot(reach, y, plot, head=head, y_label="share of rows", height=88, most_y=3))
    if not plots:
        return ""
    sizes = [captions.count(one) for one in (_first(curve)["inside"], _first(curve).get("outside") or [])]
    legend = [Key("bnn-a0", f"inside: {sizes[0]:,} rows")]
    return svg.compose(
        plots,
        title=captions.title("Scores of rows inside and outside" if outside else "Scores of rows", report),
        told="Scores inside and outside" if outside else "Scores",
        description="Histograms of scores, larger where the bank is less sure. " + "; ".join(ends) + ".",
        legend=[*legend, Key("bnn-l1", f"outside: {sizes[1]:,} rows")] if outside else legend,
    )


def entropy_split(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """What the entropy of each row is made of: noise of the data, and doubt about the weights."""
    parts = ("expected_entropy", "mutual_information")
    if not any(captions.count(curve[part]) for part in parts):
        return ""
    edges = captions.bin_edges(curve["edges"])

    def plot(frame: Frame) -> Iterable[str]:
        yield svg.bars(frame, edges, curve[parts[0]], "bnn-a0")
        yield svg.steps(frame, edges, curve[parts[0]], "bnn-w0")
        yield svg.steps(frame, edges, curve[parts[1]], "bnn-l1")

    y = svg.limits(*(one[part] for one in group for part in parts), zero=True)
    return svg.compose(
        [Plot(captions.reach([one["edges"] for one in group]), y, plot, x_label="nats", y_label="rows")],
        title=captions.title("Entropy, split", report),
        told="Entropy, split",
        description="Histograms of expected entropy and mutual information over rows. "
        + captions.sentence(report, *parts),
        legend=[Key("bnn-a0", "expected (aleatoric)"), Key("bnn-l1", "mutual information (epistemic)")],
    )


def _first(curve: Facts) -> Facts:
    found: Facts = next(iter(curve.values()))
    return found
