"""Pictures of a report on targets: intervals, coverage, the probability integral transform."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from bnn.evaluation import captions, svg
from bnn.evaluation.captions import Facts
from bnn.evaluation.svg import Frame, Key, Plot, Value

WIDE = 2.0  # standard errors that the band of the coverage reaches to each side


def band(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """Targets beside their predictive intervals, rows ordered by the predictive mean."""
    names = ("target", "mean", "lower", "upper")
    rows = [row for row in zip(*(curve[name] for name in names), strict=True) if all(map(svg.finite, row))]
    if not rows:
        return ""
    target, mean, lower, upper = (list(column) for column in zip(*rows, strict=True))
    places = list(range(1, len(rows) + 1))
    inside = [low <= y <= high for y, low, high in zip(target, lower, upper, strict=True)]

    def plot(frame: Frame) -> Iterable[str]:
        yield svg.area(frame, places, lower, upper, "bnn-a0")
        yield svg.line(frame, places, mean, "bnn-l0")
        yield svg.points(frame, *_where(places, target, inside, True), "bnn-p5", size=2.25)
        yield svg.points(frame, *_where(places, target, inside, False), "bnn-p1", size=2.75, square=True)

    percent = f"{100 * curve['level']:g} %"
    y = svg.limits(*(one[name] for one in group for name in names))
    x = (0.0, max(float(len(rows) + 1), *(float(len(one["mean"]) + 1) for one in group)))
    return svg.compose(
        [Plot(x, y, plot, x_label="rows, by predictive mean", y_label="target", height=190)],
        title=captions.title("Targets and predictive intervals", report),
        told=f"{sum(inside)} of {len(rows)} targets in their {percent} interval",
        description=f"{len(rows)} targets beside their {percent} predictive intervals; {sum(inside)} lie inside.",
        legend=[
            Key("bnn-l0", "mean"),
            Key("bnn-a0", f"{percent} interval"),
            Key("bnn-p5", "inside"),
            Key("bnn-s1", "outside"),
        ],
    )


def _where(xs: list[int], ys: list[float], flags: list[bool], wanted: bool) -> tuple[list[Value], list[Value]]:
    kept = [(x, y) for x, y, flag in zip(xs, ys, flags, strict=True) if flag is wanted]
    return [x for x, _ in kept], [y for _, y in kept]


def pit(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """The histogram of the probability integral transform, and where all bars of a calibrated one lie."""
    rows, total = curve["rows"], captions.count(curve["rows"])
    if not total:
        return ""
    low, high = curve.get("lower"), curve.get("upper")
    apart = [not _within(number, low, high) for number in rows]

    def plot(frame: Frame) -> Iterable[str]:
        if svg.finite(low) and svg.finite(high):
            yield svg.area(frame, [0, 1], [low] * 2, [high] * 2, "bnn-a2")
        yield svg.bars(frame, curve["edges"], [0 if out else n for n, out in zip(rows, apart, strict=True)], "bnn-f0")
        yield svg.bars(frame, curve["edges"], [n if out else 0 for n, out in zip(rows, apart, strict=True)], "bnn-f1")
        yield svg.level(frame, total / len(rows))
        if svg.finite(low) and svg.finite(high):
            yield svg.level(frame, low, "bnn-w2")
            yield svg.level(frame, high, "bnn-w2")

    y = svg.limits(*(one["rows"] for one in group), *([one.get("upper")] for one in group), zero=True)
    return svg.compose(
        [Plot((0, 1), y, plot, x_label="predictive probability below the target (PIT)", y_label="rows")],
        title=captions.title("Probability integral transform", report),
        told=f"PIT: {sum(apart)} of {len(rows)} bars beyond the band",
        description=f"Histogram of the probability integral transform; {sum(apart)} of {len(rows)} bars lie beyond the band.",
        legend=[
            Key("bnn-f0", "within"),
            Key("bnn-f1", "beyond"),
            Key("bnn-a2", "simultaneous 95 % band"),
            Key("bnn-rule", "flat"),
        ],
    )


def _within(number: Value, low: Value, high: Value) -> bool:
    return number is None or not ((low is not None and number < low) or (high is not None and number > high))


def calibration(report: Facts, curve: Facts, group: Sequence[Facts]) -> str:
    """The share of targets in central intervals, against the level of the intervals."""
    del group  # both axes are shares
    levels, coverage = curve["level"], curve["coverage"]
    if not any(map(svg.finite, coverage)):
        return ""
    gaps = [abs(share - level) for share, level in zip(coverage, levels, strict=True) if svg.finite(share)]
    size = report.get("num_rows") or 0
    grid = [number / 40 for number in range(41)]
    reach = [WIDE * math.sqrt(level * (1 - level) / size) if size else 0.0 for level in grid]

    def plot(frame: Frame) -> Iterable[str]:
        low = [max(0.0, level - wide) for level, wide in zip(grid, reach, strict=True)]
        yield svg.area(frame, grid, low, [min(1.0, a + b) for a, b in zip(grid, reach, strict=True)], "bnn-a5")
        yield svg.line(frame, [0, 1], [0, 1], "bnn-rule")
        yield svg.line(frame, levels, coverage, "bnn-l0")
        yield svg.points(frame, levels, coverage, "bnn-p0")

    return svg.compose(
        [Plot((0, 1), (0, 1), plot, x_label="level of the interval", y_label="share of targets inside", height=190)],
        title=captions.title("Coverage of intervals", report),
        told=f"Coverage: at most {captions.shown(max(gaps))} from the level",
        description="The share of targets in central intervals against their level. "
        + captions.sentence(report, "coverage_50", "coverage_90", "coverage_95"),
        legend=[Key("bnn-p0", "this bank"), Key("bnn-a5", "calibrated ± 2 standard errors")],
    )
