"""What pictures read of a report: figures for their captions, bins for their bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from bnn.evaluation import svg, topics
from bnn.evaluation.svg import Value

Facts: TypeAlias = Mapping[str, Any]  # a report, or one of its curves


def shown(value: float) -> str:
    """A figure in a caption: three digits.

    >>> shown(0.01234), shown(-1203.4), shown(1.0)
    ('0.0123', '−1,203', '1.00')
    """
    told = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return told.replace("-", svg.MINUS)


def value_of(report: Facts, metric: str) -> Value:
    """The value of a metric; None where there is none."""
    value: Value = ((report.get("metrics") or {}).get(metric) or {}).get("value")
    return value


def told(report: Facts, head: str, *metrics: str) -> str:
    """A heading, and the figures that the report has of it.

    >>> told({"metrics": {"ece": {"value": 0.0123}, "mce": {"value": None}}}, "Reliability", "ece", "mce")
    'Reliability: ECE 0.0123'
    """
    figures = [(topics.family(metric).upper(), value_of(report, metric)) for metric in metrics]
    found = [f"{name} {shown(value)}" for name, value in figures if value is not None]
    return f"{head}: {', '.join(found)}" if found else head


def sentence(report: Facts, *metrics: str) -> str:
    """The figures that a report has, by their names in words."""
    figures = [(topics.name(metric), value_of(report, metric)) for metric in metrics]
    found = ", ".join(f"{name} {shown(value)}" for name, value in figures if value is not None)
    return f"{found[0].upper()}{found[1:]}." if found else ""


def title(what: str, report: Facts) -> str:
    """What a picture is, and of which bank."""
    return f"{what}, {report['bank']}" if report.get("bank") else what


def count(numbers: Sequence[Value] | None) -> int:
    """How many there are in all bins."""
    return int(sum(number or 0 for number in numbers or ()))


def shares(numbers: Sequence[Value]) -> list[Value]:
    """Numbers of bins over their sum; 0 where there are none."""
    total = sum(number or 0 for number in numbers)
    return [(number or 0) / total if total else 0.0 for number in numbers]


def bin_edges(edges: Sequence[Value]) -> list[float]:
    """Edges of bins, a last one without end drawn as far away as the one before it."""
    known = [edge for edge in edges if edge is not None]
    if len(known) < len(edges):
        known.append(2 * known[-1] - known[-2] if len(known) > 1 else known[-1] + 1.0)
    return known


def reach(several: Sequence[Sequence[Value]]) -> svg.Limits:
    """From the first edge to the last of several histograms; a width of 0 is drawn as 1."""
    everyone = [bin_edges(edges) for edges in several]
    low, high = min(edges[0] for edges in everyone), max(edges[-1] for edges in everyone)
    return (low, high) if high > low else (low, low + 1.0)
