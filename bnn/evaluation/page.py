"""One page of one or more reports, for people: it needs nothing but itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from bnn.evaluation import pictures, topics
from bnn.evaluation.svg import MINUS, escape

Facts: TypeAlias = Mapping[str, Any]  # a report, as `Report.to_dict` gives it

APART = 2.0  # standard errors of a difference beyond which one bank is marked as the best
ROUNDING = 1e-12  # of a figure: an error of less is that of sums
UNRANKED = ("width", "sharpness")  # narrow is good only where it covers

READINGS = {  # of each picture: its heading, and how to read it
    "reliability": (
        "Reliability",
        "Points on the broken line are calibrated; below it the bank is too sure, above it not sure enough. "
        "The lower bars tell how many rows each bin holds: a point of few rows says little.",
    ),
    "risk_coverage": (
        "Risk against coverage",
        "What is wrong among the rows that are kept when the least sure are given to somebody else. The oracle gives away "
        "the wrong rows first; nothing can lie below it. A line that is level says that the uncertainty does not know the errors.",
    ),
    "scores": (
        "Scores inside and outside",
        "The less the two histograms overlap, the better the score tells rows from outside of the distribution.",
    ),
    "entropy_split": (
        "Entropy, split",
        "Expected entropy is doubt that more samples of the same posterior keep: noise in the data. Mutual information is what the "
        "samples disagree on: more data would take it away.",
    ),
    "band": (
        "Targets and predictive intervals",
        "Rows ordered by the predictive mean, at most 200 of them. Squares are targets outside of their interval.",
    ),
    "calibration": (
        "Coverage of intervals",
        "A line below the broken one says that intervals are too narrow, above it that they are too wide.",
    ),
    "pit": (
        "Probability integral transform",
        "Flat where the predictive is calibrated. High at both ends: too narrow. High in the middle: too wide. "
        "A slope: the mean is off. All bars of a calibrated predictive lie within the band 95 times in 100.",
    ),
    "shift": (
        "Under shift",
        "What is left when the data are corrupted more and more. Loss should rise slowly and calibration should hold.",
    ),
    "samples": (
        "How many samples",
        "Each metric from the first 1, 2, 4, ... samples of the bank. A line that is still falling at its end asks for more samples.",
    ),
    "rhat": (
        "R-hat",
        "How much wider all chains are together than each of them, of the predictions. 1 where chains agree.",
    ),
    "ess": (
        "Effective sample size",
        "How many independent samples the chains are worth, of the predictions.",
    ),
}

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1f2328;--muted:#57606a;--line:#d0d7de;--soft:#f6f8fa;--link:#0969da;
--best:#0b5fae;--best-soft:#e3effb;--warn:#8a2a00;--warn-soft:#fff3e8}
@media (prefers-color-scheme:dark){:root{--paper:#0d1117;--ink:#e6edf3;--muted:#a3adb8;--line:#3a424c;--soft:#161b22;--link:#79b8ff;
--best:#9bd0ff;--best-soft:#12304d;--warn:#ffb37a;--warn-soft:#33200f}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.25rem 1rem 3rem;max-width:75rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem}h2{font-size:1.2rem;margin:2.25rem 0 .5rem}h3{font-size:1rem;margin:1.75rem 0 .25rem}
h4{font-size:.95rem;margin:0}p{margin:.35rem 0;max-width:48rem}a{color:var(--link)}small,.quiet{color:var(--muted)}small{font-size:.8rem}
sup{line-height:0;margin-left:.15rem}code{font-size:.85em;font-family:ui-monospace,monospace}nav a{margin-right:1rem}
.headline{font-size:1.05rem}.headline b{margin-right:.25rem}
.box{border:1px solid var(--warn);border-left-width:5px;background:var(--warn-soft);padding:.6rem .8rem;margin:.75rem 0;border-radius:4px}
.box h2{margin:0;font-size:1rem;color:var(--warn)}
.scroll{position:relative;width:fit-content;max-width:100%;overflow-x:auto;border:1px solid var(--line);border-radius:4px;margin:.5rem 0}
.scroll:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;overflow-wrap:normal}
thead th:first-child{text-align:left}thead th{vertical-align:bottom;min-width:7rem;max-width:16rem;overflow-wrap:anywhere}
th[scope=row]{text-align:left;font-weight:400;position:sticky;left:0;background:var(--paper);min-width:9.5rem;max-width:19rem;
border-right:1px solid var(--line);overflow-wrap:anywhere}
th[scope=rowgroup]{text-align:left;background:var(--soft);font-size:.9rem}th[scope=rowgroup] span{position:sticky;left:.8rem}
tbody:last-child tr:last-child>*{border-bottom:0}
td{white-space:nowrap}td.words{white-space:normal;min-width:7.75rem;max-width:20rem;overflow-wrap:anywhere}td small{display:block}
td.best{background:var(--best-soft)}td.best b{color:var(--best)}td.best span{font-size:.75rem}
.pictures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),28rem))}
.alone{display:grid;gap:0 1.5rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr))}
figure{margin:.5rem 0 0;min-width:0;max-width:28rem;border:1px solid var(--line);border-radius:4px;padding:.5rem;break-inside:avoid}
figcaption{font-weight:600;font-size:.9rem;padding:0 .25rem}figure svg{display:block;width:100%;height:auto}
dt{font-weight:600;margin-top:.7rem}dd{margin:.1rem 0 0 1rem}ol{padding-left:1.5rem}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media (max-width:30rem){th,td{padding:.35rem .55rem}th[scope=row]{min-width:8rem;max-width:9rem}thead th{min-width:6rem}}
"""


def render(reports: Mapping[str, Facts]) -> str:
    """A self-contained page of HTML: no network, no script, light and dark, as narrow as a phone.

    Args:
        reports: by name of the bank, each as `Report.to_dict` gives it.

    Returns:
        HTML with warnings, the table of metrics over banks, pictures side by side and definitions.

    >>> metric = {"value": 0.9, "standard_error": 0.01, "definition": "share of rows that are right"}
    >>> page = render({"mine": {"task": "classification", "metrics": {"accuracy": metric}}})
    >>> page.count("<h1>"), "0.900" in page, "http" in page
    (1, True, False)
    """
    names = list(dict.fromkeys(metric for report in reports.values() for metric in report["metrics"]))
    groups = topics.grouped(names)
    anchors = {metric: f"metric-{number}" for number, metric in enumerate(names)}
    notes = _notes(reports, groups)
    drawn = _drawn(reports)
    to_pictures = '<a href="#pictures">Pictures</a>' if drawn else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>Predictive uncertainty: {escape(', '.join(reports))}</title><style>{STYLE}</style></head>\n<body>\n"
        f"<header><h1>Predictive uncertainty</h1>{_headlines(reports)}{_warnings(reports)}"
        '<nav aria-label="On this page"><a href="#metrics">Metrics</a>'
        f"{to_pictures}<a href='#definitions'>Definitions</a></nav></header>\n<main>\n"
        f"{_about(reports)}{_table(reports, groups, anchors, notes)}{_gallery(reports, drawn)}"
        f"{_definitions(reports, groups, anchors)}</main>\n</body></html>\n"
    )


def _headlines(reports: Mapping[str, Facts]) -> str:
    """What each bank comes to, in a line."""
    alone = len(reports) == 1
    named = {bank: "" if alone else f"<b>{escape(bank)}:</b> " for bank in reports}
    return "".join(
        f'<p class="headline">{named[bank]}{escape(report["headline"])}</p>\n'
        for bank, report in reports.items()
        if report.get("headline")
    )


def _warnings(reports: Mapping[str, Facts]) -> str:
    """A box for each bank whose chains are bad or too few, and one where banks cannot be compared."""
    boxes = []
    for bank, report in reports.items():
        diagnosis = report.get("diagnosis") or {}
        head = {"bad": "Chains not to be trusted", "too few to tell": "Too few draws to judge the chains"}.get(
            diagnosis.get("verdict", "")
        )
        if head:
            boxes.append((f"{head}: {bank}", diagnosis.get("text", "")))
    if not _comparable(reports.values()):
        boxes.append(
            ("Different data", "The banks were not judged on the same rows, so that no figure is marked as the best.")
        )
    return "".join(
        f'<section class="box" role="note"><h2>{escape(head)}</h2><p>{escape(told)}</p></section>\n'
        for head, told in boxes
    )


def _comparable(reports: Any) -> bool:
    """Whether all banks were judged on the same rows, as far as the reports tell."""
    return len({tuple(report.get(key) for key in ("task", "data", "ood", "num_rows")) for report in reports}) <= 1


def _about(reports: Mapping[str, Facts]) -> str:
    """What was evaluated: a table with a column for each bank."""
    facts = {
        "data": "data",
        "rows outside": "ood",
        "task": "task",
        "rows": "num_rows",
        "samples": "num_samples",
        "chains": "num_chains",
        "rows a second": "rows_per_second",
        "bank": "bank",
        "digest": "digest",
    }
    rows = ""
    for label, key in facts.items():
        found = [report.get(key) for report in reports.values()]
        if any(value is not None for value in found):
            cells = "".join(f'<td class="words">{_fact(key, value)}</td>' for value in found)
            rows += f'<tr><th scope="row">{label}</th>{cells}</tr>\n'
    return (
        '<section aria-labelledby="about"><h2 id="about">What was evaluated</h2>'
        f"{_scroll('What was evaluated', _head(reports, '') + f'<tbody>{rows}</tbody>')}</section>\n"
    )


def _fact(key: str, value: Any) -> str:
    if value is None:
        return "&ndash;"
    if key == "digest":
        return f"<code>{escape(str(value)[:16])}</code>"
    return f"{value:,.0f}" if isinstance(value, int | float) else escape(value)


def _scroll(label: str, table: str) -> str:
    """A table in a box of its own, which scrolls with the keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{table}</table></div>\n'


def _head(reports: Mapping[str, Facts], corner: str) -> str:
    banks = "".join(f'<th scope="col">{escape(bank)}</th>' for bank in reports)
    first = f'<th scope="col">{corner}</th>' if corner else "<td></td>"
    return f"<thead><tr>{first}{banks}</tr></thead>"


def _table(
    reports: Mapping[str, Facts],
    groups: Mapping[str, Sequence[str]],
    anchors: Mapping[str, str],
    notes: Mapping[str, int],
) -> str:
    """Rows of metrics by topic, a column for each bank, and the notes below."""
    bodies, comparable = "", _comparable(reports.values())
    for topic, metrics in groups.items():
        bodies += (
            f'<tbody><tr><th scope="rowgroup" colspan="{len(reports) + 1}"><span>{topic}</span></th></tr>\n'
            + "".join(_row(metric, reports, anchors[metric], notes, comparable) for metric in metrics)
            + "</tbody>"
        )
    listed = "".join(f'<li id="note-{number}">{escape(note)}</li>\n' for note, number in notes.items())
    compared = f" A figure is marked as best where it leads every other by more than {APART:g} standard errors of the difference."
    return (
        '<section aria-labelledby="metrics"><h2 id="metrics">Metrics</h2>'
        "<p>Value ± standard error over rows of data; MC is the Monte Carlo error, from the number of samples. "
        f"↑ higher is better, ↓ lower is better.{compared if len(reports) > 1 else ''}</p>"
        f"{_scroll('Metrics', _head(reports, 'metric') + bodies)}"
        + (f'<h3 id="notes">Notes</h3><ol class="quiet">{listed}</ol>' if notes else "")
        + "</section>\n"
    )


def _row(metric: str, reports: Mapping[str, Facts], anchor: str, notes: Mapping[str, int], comparable: bool) -> str:
    found = {bank: report["metrics"].get(metric) for bank, report in reports.items()}
    one = next(figure for figure in found.values() if figure is not None)
    decimals = _decimals([figure for figure in found.values() if figure is not None])
    best = _best(found) if comparable and topics.family(metric) not in UNRANKED else None
    unit = topics.unit(one.get("unit") or "")
    orientation = _orientation(one.get("higher_is_better"))
    return (
        f'<tr><th scope="row"><a href="#{anchor}">{escape(topics.name(metric))}</a>{orientation}'
        f"<br><small><code>{escape(metric)}</code> {escape(unit)}</small></th>"
        + "".join(_cell(figure, decimals, bank == best, notes) for bank, figure in found.items())
        + "</tr>\n"
    )


def _orientation(higher_is_better: bool | None) -> str:
    if higher_is_better is None:
        return ""
    mark, words = ("↑", "higher is better") if higher_is_better else ("↓", "lower is better")
    return (
        f'&nbsp;<span title="{words}"><span aria-hidden="true">{mark}</span><span class="unseen">{words}</span></span>'
    )


def _cell(figure: Facts | None, decimals: int | None, best: bool, notes: Mapping[str, int]) -> str:
    if figure is None:
        return '<td><span class="unseen">not computed</span></td>'
    note = figure.get("note")
    mark = f'<sup><a href="#note-{notes[note]}">{notes[note]}</a></sup>' if note else ""
    value, error, monte_carlo = (figure.get(key) for key in ("value", "standard_error", "monte_carlo_error"))
    if value is None:
        return f'<td><span aria-hidden="true">&ndash;</span><span class="unseen">no value</span>{mark}</td>'
    told = number(value, decimals)
    errors = [f"± {number(error, decimals)}"] if error is not None else []
    errors += [f"MC {number(monte_carlo, decimals)}"] if monte_carlo is not None else []
    small = f"<small>{' · '.join(errors)}</small>" if errors else ""
    if best:
        return f'<td class="best"><b>{told} <span>best</span></b>{mark}{small}</td>'
    return f"<td>{told}{mark}{small}</td>"


def number(value: float, decimals: int | None) -> str:
    """A figure with so many decimals, or as a power of ten where those would not tell it.

    >>> number(0.97222, 4), number(-1234.56, 1), number(0.0000031, None)
    ('0.9722', '−1,234.6', '3.10e−6')
    """
    if decimals is None:
        digits, power = f"{value:.2e}".split("e")
        told = f"{digits}e{int(power)}" if value else "0"
    else:
        told = f"{value:,.{decimals}f}"
    return told.replace("-", MINUS)


def _decimals(figures: Sequence[Facts]) -> int | None:
    """Two digits of the least standard error, or four of the largest value; None where that takes too many."""
    errors = [figure.get("standard_error") for figure in figures]
    values = [abs(figure["value"]) for figure in figures if figure.get("value")]
    positive = [error for error in errors if error and error > ROUNDING * max(values, default=0.0)]
    if positive:
        decimals = 1 - math.floor(math.log10(min(positive)))
    elif values:
        decimals = 3 - math.floor(math.log10(max(values)))
    else:
        decimals = 3
    if decimals > 8 or (values and max(values) >= 1e7):
        return None
    return max(0, decimals)


def _best(found: Mapping[str, Facts | None]) -> str | None:
    """The bank that leads all others by more than `APART` standard errors of the difference, if there is one.

    The rows are the same, so that errors of two banks go together: their squares' sum is a careful bound.
    """
    figures = {bank: figure for bank, figure in found.items() if figure is not None}
    judged = {bank: f for bank, f in figures.items() if f.get("value") is not None}
    if len(judged) < 2 or len(judged) < len(figures):
        return None
    higher = {figure.get("higher_is_better") for figure in judged.values()}
    if len(higher) > 1 or None in higher or len({figure.get("n") for figure in judged.values()}) > 1:
        return None
    sign = 1.0 if higher == {True} else -1.0
    order = sorted(judged, key=lambda bank: sign * judged[bank]["value"], reverse=True)
    first = judged[order[0]]
    for bank in order[1:]:
        pair = (first, judged[bank])
        errors = [error for figure in pair if (error := figure.get("standard_error")) is not None]
        if len(errors) < len(pair):
            return None
        errors += [figure.get("monte_carlo_error") or 0.0 for figure in pair]
        if not sign * (first["value"] - judged[bank]["value"]) > APART * math.hypot(*errors):
            return None
    return order[0]


def _notes(reports: Mapping[str, Facts], groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Notes in the order in which the table meets them, numbered; equal ones once."""
    notes: dict[str, int] = {}
    for metric in (metric for metrics in groups.values() for metric in metrics):
        for report in reports.values():
            note = (report["metrics"].get(metric) or {}).get("note")
            if note:
                notes.setdefault(note, len(notes) + 1)
    return notes


def _drawn(reports: Mapping[str, Facts]) -> dict[str, dict[str, str]]:
    """Pictures of all banks: kind -> bank -> SVG, on equal axes."""
    found: dict[str, dict[str, str]] = {}
    for bank, drawn in pictures.draw_all(reports).items():
        for kind, picture in drawn.items():
            found.setdefault(kind, {})[bank] = picture
    return {kind: found[kind] for kind in READINGS if kind in found}


def _gallery(reports: Mapping[str, Facts], drawn: Mapping[str, Mapping[str, str]]) -> str:
    """A row of pictures for each kind, banks beside each other."""
    if not drawn:
        return ""
    rows = ""
    captions = {bank: f"<figcaption>{escape(bank)}</figcaption>" if len(reports) > 1 else "" for bank in reports}
    for kind, banks in drawn.items():
        head, reading = READINGS[kind]
        figures = "".join(f"<figure>{captions[bank]}{picture}</figure>\n" for bank, picture in banks.items())
        rows += (
            f'<section aria-labelledby="picture-{kind}"><h3 id="picture-{kind}">{head}</h3><p class="quiet">{reading}</p>'
            f'<div class="pictures">{figures}</div></section>\n'
        )
    rows = f'<div class="alone">{rows}</div>' if len(reports) == 1 else rows
    return f'<section aria-labelledby="pictures"><h2 id="pictures">Pictures</h2>{rows}</section>\n'


def _definitions(reports: Mapping[str, Facts], groups: Mapping[str, Sequence[str]], anchors: Mapping[str, str]) -> str:
    """What ± means, then each metric's equation."""
    listed = ""
    for metric in (metric for metrics in groups.values() for metric in metrics):
        figures = [report["metrics"][metric] for report in reports.values() if metric in report["metrics"]]
        listed += (
            f'<dt id="{anchors[metric]}">{escape(topics.name(metric))} <code>{escape(metric)}</code></dt>'
            + "".join(f"<dd>{told}</dd>\n" for told in dict.fromkeys(_defined(figures)))
        )
    return (
        '<section aria-labelledby="definitions"><h2 id="definitions">Definitions</h2>'
        "<p>± is one standard error over the rows of data: how far the figure would move with other rows of the same kind. "
        "MC is the Monte Carlo error: how far it would move with other samples of the same posterior, as many as the bank has; "
        "it is made of the figure's spread over balanced halves of the draws. "
        "Neither tells how far it would move with another fit, or other training data. Logarithms are natural; entropies are in nats.</p>"
        f"<dl>{listed}</dl></section>\n"
    )


def _defined(figures: Sequence[Facts]) -> Iterator[str]:
    for figure in figures:
        bins, rows = figure.get("bins"), figure.get("n")
        more = [f"{bins} bins"] if bins is not None else []
        more += [f"{rows:,} values"] if rows is not None else []
        yield escape(figure["definition"]) + (
            f' <span class="quiet">({escape(", ".join(more))})</span>' if more else ""
        )
