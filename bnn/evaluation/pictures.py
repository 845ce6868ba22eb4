"""Pictures of a report, as SVG text, from what `report.json` holds and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from bnn.diagnostics import MAX_RHAT
from bnn.evaluation import captions, svg, topics
from bnn.evaluation.captions import Facts
from bnn.evaluation.class_pictures import entropy_split, reliability, risk_coverage, scores
from bnn.evaluation.svg import Frame, Key, Plot, Value
from bnn.evaluation.target_pictures import band, calibration, pit
from bnn.evaluation.verdict import MIN_ESS, NOTICED_RHAT


def draw(report: Facts, *, beside: Sequence[Facts] = ()) -> dict[str, str]:
    """All pictures that a report has curves for.

    Args:
        report: one report, as `Report.to_dict` gives it.
        beside: reports of other banks. Pictures of one kind then have equal axes, so that they can be compared.

    Returns:
        Name of the curve -> one `svg` element. A curve that is missing or holds no rows gives no picture.

    >>> curve = {"edges": [0.0, 0.5, 1.0], "rows": [0, 4], "confidence": [None, 0.8], "accuracy": [None, 0.75]}
    >>> list(draw({"bank": "mine", "curves": {"reliability": curve, "pit": None}}))
    ['reliability']
    """
    curves = report.get("curves") or {}
    pictures = {}
    for kind, picture in PICTURES.items():
        if curves.get(kind):
            group = [found for one in (report, *beside) if (found := (one.get("curves") or {}).get(kind))]
            drawn = picture(report, curves[kind], group)
            if drawn:
                pictures[kind] = drawn
    return pictures


def draw_all(reports: Mapping[str, Facts]) -> dict[str, dict[str, str]]:
    """Pictures of several banks on equal axes: name of the bank -> name of the curve -> one `svg` element."""
    return {
        bank: draw({**report, "bank": bank}, beside=[other for name, other in reports.items() if name != bank])
        for bank, report in reports.items()
    }


def samples(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """Each metric against the number of samples, and where its Monte Carlo error is 1 %."""
    numbers, plots, ends = curve["num_samples"], [], []
    high = max(max(one["num_samples"]) for one in group)
    drawn = [metric for metric, values in curve["metrics"].items() if any(map(svg.finite, values))]
    for metric in drawn:
        values, needed = curve["metrics"][metric], (curve.get("needed") or {}).get(metric)

        def plot(frame: Frame, values: list[Value] = values, needed: int | None = needed) -> Iterable[str]:
            if needed is not None and 1 <= needed <= frame.x[1]:
                yield svg.upright(frame, needed)
            yield svg.line(frame, numbers, values, "bnn-l0")
            yield svg.points(frame, numbers, values, "bnn-p0")

        short = f"{topics.name(metric)}"
        head = short if needed is None else f"{short}: 1 % error from {needed:,} samples"
        ends.append(head)
        y = svg.limits(*(one["metrics"].get(metric, []) for one in group), most=3)
        x_label = "samples" if metric == drawn[-1] else ""
        x = (1.0, float(max(high, 2)))
        marks = [2.0**power for power in range(int(math.log2(x[1])) + 1)]
        plots.append(Plot(x, y, plot, x_label, "", head, 72, log=True, x_ticks=marks, most_y=3))
    if not plots:
        return ""
    return svg.compose(
        plots,
        title=captions.title("Metrics against the number of samples", report),
        told=f"Metrics of the first 1 to {max(numbers):,} samples",
        description="; ".join(ends) + ".",
        legend=[Key("bnn-rule", "Monte Carlo error of 1 %")],
    )


def shift(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """Each metric against the severity of a corruption; 0 is the data as they are."""
    metrics = list(dict.fromkeys(metric for found in curve.values() for metric in found["metrics"]))
    drawn = [m for m in metrics if any(svg.finite(v) for one in curve.values() for v in one["metrics"].get(m, []))]
    if not drawn:
        return ""
    severities = [value for one in group for found in one.values() for value in found["severity"]]
    x = (float(min(severities)), float(max(severities))) if len(set(severities)) > 1 else (0.0, 1.0)
    plots = []
    for metric in drawn:

        def plot(frame: Frame, metric: str = metric) -> Iterable[str]:
            for number, found in enumerate(curve.values()):
                values, css = found["metrics"].get(metric, []), number % svg.SERIES
                if values:
                    yield svg.line(frame, found["severity"], values, f"bnn-l{css}")
                    yield svg.points(frame, found["severity"], values, f"bnn-p{css}", size=2.5)

        y = svg.limits(*(found["metrics"].get(metric, []) for one in group for found in one.values()), most=4)
        x_label = "severity, 0: as they are" if metric == drawn[-1] else ""
        marks = sorted({float(value) for value in severities})
        plots.append(Plot(x, y, plot, x_label, "", topics.name(metric), 96, x_ticks=marks, most_y=4))
    return svg.compose(
        plots,
        title=captions.title("Metrics under shift", report),
        told="Metrics under corruptions of the data",
        description=f"{', '.join(map(topics.name, drawn))} against the severity of: {', '.join(curve)}.",
        legend=[Key(f"bnn-l{number % svg.SERIES}", kind) for number, kind in enumerate(curve)],
    )


def rhat(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """How far chains disagree, over the probed predictions."""
    return _thresholds(report, curve, group, "rhat", {NOTICED_RHAT: "noticed", MAX_RHAT: "refused"}, "Above")


def ess(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """What the draws are worth, over the probed predictions."""
    return _thresholds(report, curve, group, "ess", {MIN_ESS: "wanted"}, "Below")


def _thresholds(
    report: Facts, curve: Facts, group: Sequence[Facts], metric: str, marks: dict[float, str], side: str
) -> str:
    edges, numbers = captions.bin_edges(curve["edges"]), curve["quantities"]
    total = captions.count(numbers)
    if not total:
        return ""

    def plot(frame: Frame) -> Iterable[str]:
        yield svg.bars(frame, edges, numbers, "bnn-f0")
        for number, mark in enumerate(marks):
            yield svg.upright(frame, mark, f"bnn-l{number + 1}")

    label = {"rhat": "R-hat", "ess": "effective sample size"}[metric]
    floor = 1.0 if metric == "rhat" else 0.0
    reach = captions.reach([one["edges"] for one in group])
    low, high = min(floor, reach[0]), max(reach[1], max(marks) + 0.2 * (max(marks) - floor))
    beyond = ", the last bar: that and more" if curve["edges"][-1] is None else ""
    worst = {"rhat": "largest", "ess": "least"}[metric]
    value = captions.value_of(report, metric)
    return svg.compose(
        [
            Plot(
                (low, high),
                svg.limits(*(one["quantities"] for one in group), zero=True),
                plot,
                x_label=label + beyond,
                y_label="predictions",
            )
        ],
        title=captions.title(label[0].upper() + label[1:], report),
        told=f"{label[0].upper()}{label[1:]} of {total:,} predictions"
        + (f", {worst} {captions.shown(value)}" if value is not None else ""),
        description=f"Histogram of the {label} of {total} predictions. {side} a line, chains are not to be trusted.",
        legend=[Key(f"bnn-l{i + 1}", f"{mark:g}: {word}") for i, (mark, word) in enumerate(marks.items())],
    )


PICTURES: dict[str, Callable[[Facts, Facts, Sequence[Facts]], str]] = {
    "reliability": reliability,
    "risk_coverage": risk_coverage,
    "scores": scores,
    "entropy_split": entropy_split,
    "band": band,
    "calibration": calibration,
    "pit": pit,
    "shift": shift,
    "samples": samples,
    "rhat": rhat,
    "ess": ess,
}
