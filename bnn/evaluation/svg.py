"""Axes, marks and colours of pictures, as SVG text: nothing is loaded, and both colour schemes are inside."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias, TypeGuard

Value: TypeAlias = float | None  # None where a figure is not finite: JSON has no NaN
Limits: TypeAlias = tuple[float, float]

MINUS = "\N{MINUS SIGN}"  # as wide as a digit, unlike the hyphen
WIDTH = 360.0
TEXT = 11.0  # height of letters in pixels; WIDE is the width of one of them, roughly
WIDE = 6.2
TINY = 1e-300  # below it, quotients are not to be had
RIGHT = 16.0  # room beside the plots for half of the last tick's label

# Okabe and Ito's blue, vermilion, green and purple, darkened or lightened until they stand 3:1 from the paper.
LIGHT = {
    "paper": "#ffffff", "ink": "#1f2328", "muted": "#57606a", "grid": "#e3e7eb",
    "c0": "#0072b2", "c1": "#c24a00", "c2": "#00805e", "c3": "#9b4a8c", "c4": "#7a6200", "c5": "#57606a",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "ink": "#e6edf3", "muted": "#a3adb8", "grid": "#2b323a",
    "c0": "#56b4e9", "c1": "#f0a030", "c2": "#3cc9a0", "c3": "#e39ac7", "c4": "#e6dc55", "c5": "#a3adb8",
}  # fmt: skip
SERIES = 6  # colours of series; each has a dash of its own too, for eyes and printers without colour
DASHES = ("", "6 3", "2 2", "8 2 2 2", "10 4", "1 3")


def _rules(colours: dict[str, str]) -> str:
    """The colours of one scheme, by class: viewers that know no CSS variables draw them too."""
    rules = [
        f".bnn-paper{{fill:{colours['paper']}}}.bnn-svg text{{fill:{colours['ink']}}}.bnn-svg .bnn-quiet{{fill:{colours['muted']}}}",
        f".bnn-grid{{stroke:{colours['grid']}}}.bnn-axis,.bnn-rule{{stroke:{colours['muted']}}}",
    ]
    for i in range(SERIES):
        colour = colours[f"c{i}"]
        rules.append(f".bnn-f{i},.bnn-a{i},.bnn-p{i}{{fill:{colour}}}.bnn-l{i},.bnn-w{i}{{stroke:{colour}}}")
        rules.append(f".bnn-p{i}{{stroke:{colours['paper']}}}")
    return "".join(rules)


_SHAPES = (
    ".bnn-svg text{font:11px system-ui,sans-serif;font-variant-numeric:tabular-nums}"
    ".bnn-svg .bnn-title{font-size:12px;font-weight:600}.bnn-svg .bnn-head{font-weight:600}"
    ".bnn-grid,.bnn-axis,.bnn-rule{fill:none;stroke-width:1}.bnn-rule{stroke-dasharray:4 3}"
    + "".join(
        f".bnn-l{i},.bnn-w{i}{{fill:none;stroke-width:1.75;stroke-linejoin:round}}"
        + (f".bnn-l{i}{{stroke-dasharray:{dash}}}" if dash else "")
        + f".bnn-a{i}{{fill-opacity:.22;stroke:none}}.bnn-f{i}{{fill-opacity:.75}}.bnn-p{i}{{stroke-width:.75}}"
        for i, dash in enumerate(DASHES)
    )
)
STYLE = f"{_SHAPES}{_rules(LIGHT)}@media (prefers-color-scheme:dark){{{_rules(DARK)}}}"


class Frame(NamedTuple):
    """Where a plot lies in its picture, in pixels, and the values at its edges."""

    left: float
    top: float
    width: float
    height: float
    x: Limits
    y: Limits
    log: bool = False

    def across(self, value: float) -> float:
        """The pixel of a value of x."""
        low, high, value = (map(math.log, (*self.x, value))) if self.log else (*self.x, value)
        return self.left + self.width * (value - low) / (high - low)

    def down(self, value: float) -> float:
        """The pixel of a value of y."""
        return self.top + self.height * (self.y[1] - value) / (self.y[1] - self.y[0])


class Plot(NamedTuple):
    """One pair of axes, and what draws within them. Limits must differ; with `log` those of x are positive."""

    x: Limits
    y: Limits
    draw: Callable[[Frame], Iterable[str]]
    x_label: str = ""
    y_label: str = ""
    head: str = ""
    height: float = 160.0
    log: bool = False
    x_ticks: Sequence[float] | None = None
    most_y: int = 5  # steps of the y axis


class Key(NamedTuple):
    """A line of a legend: the class of its mark, and what it stands for."""

    css: str
    label: str


def escape(value: object) -> str:
    """Text for HTML and SVG: markup, and letters that XML forbids or that turn the line around, are written out.

    >>> escape("<b> & \\x1b[31m")
    '&lt;b&gt; &amp; \\\\x1b[31m'
    """
    told = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in str(value))
    return html.escape(told)


def ticks(low: float, high: float, *, most: int = 5) -> list[float]:
    """Round values from low to high, at most `most` steps of 1, 2, 2.5 or 5 times a power of ten.

    >>> ticks(0.0, 0.3)
    [0.0, 0.1, 0.2, 0.3]
    >>> ticks(-3.0, 18.0)
    [0.0, 5.0, 10.0, 15.0]
    """
    step = _step(low, high, most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _step(low: float, high: float, most: int) -> float:
    rough = (high - low) / most
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(times * power for times in (1, 2, 2.5, 5, 10, 20) if times * power >= rough * (1 - 1e-9))


def limits(*series: Iterable[Value], zero: bool = False, most: int = 5) -> Limits:
    """Round limits around all values of several series, and around 0 where asked; they always differ.

    >>> limits([0.13, None, 0.71], zero=True)
    (0.0, 0.8)
    >>> limits([2.0])
    (1.0, 3.0)
    """
    values = [value for one in series for value in one if finite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    largest = max(abs(low), abs(high))
    if high - low <= max(1e-9 * largest, TINY):
        room = largest / 2 if largest > TINY else 1.0
        low, high = (0.0, room) if zero and largest <= TINY else (low - room, high + room)
    for _ in range(4):  # rounding widens, and may so ask for longer steps
        step = _step(low, high, most)
        low = float(f"{math.floor(low / step + 1e-9) * step:.12g}")
        high = float(f"{math.ceil(high / step - 1e-9) * step:.12g}")
    return low, high


def finite(value: Value) -> TypeGuard[float]:
    """Whether there is a number to draw."""
    return value is not None and math.isfinite(value)


def labels(values: Sequence[float]) -> list[str]:
    """The same number of decimals for all ticks of an axis.

    >>> labels([0.0, 2.5, 5.0]), labels([0.0, 200000.0])
    (['0.0', '2.5', '5.0'], ['0', '2e5'])
    """
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return ["0" if not value else _power(value) for value in values]
    decimals = next(d for d in range(13) if all(abs(v - round(v, d)) <= 1e-9 * largest for v in values))
    return [f"{value:.{decimals}f}".replace("-", MINUS) for value in values]


def _power(value: float) -> str:
    digits, power = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(power)}".replace("-", MINUS)


def text(x: float, y: float, told: object, *, css: str = "", anchor: str = "") -> str:
    """Text at a pixel; `anchor` is `middle` or `end`."""
    more = (f' class="{css}"' if css else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{_at(x)}" y="{_at(y)}"{more}>{escape(told)}</text>'


def bars(frame: Frame, edges: Sequence[float], heights: Sequence[Value], css: str) -> str:
    """Bars from 0 over bins; those without height or value are not drawn."""
    zero, path = frame.down(max(frame.y[0], 0.0)), ""
    for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
        if finite(height) and height:
            start, end = frame.across(left) + 0.5, frame.across(right) - 0.5
            path += f"M{_at(start)} {_at(zero)}V{_at(frame.down(height))}H{_at(max(end, start + 1))}V{_at(zero)}Z"
    return _path(path, css)


def steps(frame: Frame, edges: Sequence[float], heights: Sequence[Value], css: str) -> str:
    """The outline of a histogram."""
    path = f"M{_at(frame.across(edges[0]))} {_at(frame.down(0.0))}"
    for right, height in zip(edges[1:], heights, strict=True):
        path += f"V{_at(frame.down(height or 0.0))}H{_at(frame.across(right))}"
    return _path(path + f"V{_at(frame.down(0.0))}", css)


def line(frame: Frame, xs: Sequence[Value], ys: Sequence[Value], css: str) -> str:
    """A line through points, with a gap where one has no value."""
    path, pen = "", "M"
    for x, y in zip(xs, ys, strict=True):
        if finite(x) and finite(y):
            path, pen = path + f"{pen}{_at(frame.across(x))} {_at(frame.down(y))}", "L"
        else:
            pen = "M"
    return _path(path, css)


def area(frame: Frame, xs: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> str:
    """What lies between two lines over the same x."""
    there = [f"{_at(frame.across(x))} {_at(frame.down(y))}" for x, y in zip(xs, high, strict=True)]
    back = [f"{_at(frame.across(x))} {_at(frame.down(y))}" for x, y in zip(xs, low, strict=True)]
    return _path("M" + "L".join(there + back[::-1]) + "Z", css) if there else ""


def points(
    frame: Frame, xs: Sequence[Value], ys: Sequence[Value], css: str, *, size: float = 3.0, square: bool = False
) -> str:
    """Discs, or squares, at points that have values."""
    path = ""
    for x, y in zip(xs, ys, strict=True):
        if finite(x) and finite(y):
            path += _mark(frame.across(x), frame.down(y), size, square)
    return _path(path, css)


def _mark(x: float, y: float, size: float, square: bool) -> str:
    if square:
        return f"M{_at(x - size)} {_at(y - size)}h{_at(2 * size)}v{_at(2 * size)}h{_at(-2 * size)}Z"
    arc = f"a{_at(size)} {_at(size)} 0 1 0"
    return f"M{_at(x - size)} {_at(y)}{arc} {_at(2 * size)} 0{arc} {_at(-2 * size)} 0Z"


def upright(
    frame: Frame, x: float, css: str = "bnn-rule", *, low: float | None = None, high: float | None = None
) -> str:
    """A vertical line at x, over the whole plot or from one value of y to another."""
    top, bottom = frame.y[1] if high is None else high, frame.y[0] if low is None else low
    return _path(f"M{_at(frame.across(x))} {_at(frame.down(top))}V{_at(frame.down(bottom))}", css)


def level(frame: Frame, y: float, css: str = "bnn-rule") -> str:
    """A horizontal line at y over the whole plot."""
    return _path(f"M{_at(frame.left)} {_at(frame.down(y))}h{_at(frame.width)}", css)


def _path(path: str, css: str) -> str:
    return f'<path class="{css}" d="{path}"/>' if path else ""


def _at(pixel: float) -> str:
    return f"{pixel:.1f}".removesuffix(".0")


def compose(plots: Sequence[Plot], *, title: str, told: str, description: str, legend: Sequence[Key] = ()) -> str:
    """A picture of plots one above the other, on axes that begin at the same pixel.

    Args:
        plots: from above.
        title: what the picture is, for those who hear it.
        told: the line above the plots.
        description: what the picture shows, for those who hear it.
        legend: what the marks stand for.

    Returns:
        One `svg` element, which stands in a page or in a file of its own.
    """
    parts, top = [], 2.0
    for words in textwrap.wrap(told, 54):
        top += 15
        parts.append(text(8, top, words, css="bnn-title"))
    keys, top = _legend(legend, top + 5)
    parts += keys
    y_ticks = [ticks(*plot.y, most=plot.most_y) for plot in plots]
    left = 14 + WIDE * max(len(label) for values in y_ticks for label in labels(values))
    for plot, values in zip(plots, y_ticks, strict=True):
        top += 6 if plot.head else 0
        for words in (*textwrap.wrap(plot.head, 58), plot.y_label):
            if words:
                top += 16
                parts.append(text(8, top, words, css="bnn-quiet" if words == plot.y_label else "bnn-head"))
        frame = Frame(left, top + 9, WIDTH - left - RIGHT, plot.height, plot.x, plot.y, plot.log)
        parts += [*_axes(frame, plot, values), *plot.draw(frame)]
        parts.append(_path(f"M{_at(left)} {_at(frame.top + frame.height)}h{_at(frame.width)}", "bnn-axis"))
        top = frame.top + frame.height + (38 if plot.x_label else 22)
    name, size = escape(title), f"{_at(WIDTH)} {_at(top)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="bnn-svg" role="img" aria-label="{name}. {escape(description)}" '
        f'viewBox="0 0 {size}" width="{_at(WIDTH)}" height="{_at(top)}"><title>{name}</title>'
        f"<desc>{escape(description)}</desc><style>{STYLE}</style>"
        f'<rect class="bnn-paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def _axes(frame: Frame, plot: Plot, y_ticks: Sequence[float]) -> Iterable[str]:
    """Lines at the ticks of y, ticks of x, and their labels."""
    grid = "".join(f"M{_at(frame.left)} {_at(frame.down(y))}h{_at(frame.width)}" for y in y_ticks)
    yield _path(grid, "bnn-grid")
    for y, label in zip(y_ticks, labels(y_ticks), strict=True):
        yield text(frame.left - 6, frame.down(y) + 4, label, anchor="end", css="bnn-quiet")
    bottom = frame.top + frame.height
    x_ticks = ticks(*frame.x, most=6) if plot.x_ticks is None else plot.x_ticks
    told = labels(x_ticks)
    # As many labels as have room: every one, every second, ...
    widest = WIDE * max((len(label) for label in told), default=0) + 8
    apart = min((abs(frame.across(b) - frame.across(a)) for a, b in pairwise(x_ticks)), default=99)
    every = max(1, math.ceil(widest / max(apart, 1e-9)))
    yield _path("".join(f"M{_at(frame.across(x))} {_at(bottom)}v4" for x in x_ticks), "bnn-axis")
    for x, label in list(zip(x_ticks, told, strict=True))[::every]:
        yield text(frame.across(x), bottom + 16, label, anchor="middle", css="bnn-quiet")
    if plot.x_label:
        yield text(frame.left + frame.width / 2, bottom + 32, plot.x_label, anchor="middle", css="bnn-quiet")


def _legend(legend: Sequence[Key], top: float) -> tuple[list[str], float]:
    """Keys in as many lines as they need, and where they end."""
    parts: list[str] = []
    x = 8.0
    for number, key in enumerate(legend):
        wide = 24 + WIDE * len(key.label) + 12
        if number == 0 or x + wide > WIDTH:
            x, top = 8.0, top + 16
        y = top - 4
        kinds = {  # by the letter after "bnn-"
            "f": f"M{_at(x)} {_at(y - 4)}h18v8h-18Z",
            "a": f"M{_at(x)} {_at(y - 4)}h18v8h-18Z",
            "p": _mark(x + 9, y, 3.5, square=False),
            "s": _mark(x + 9, y, 3.5, square=True),
        }
        kind = key.css.removeprefix("bnn-")[0]
        css = f"bnn-p{key.css[-1]}" if kind == "s" else key.css
        parts.append(_path(kinds.get(kind, f"M{_at(x)} {_at(y)}h18"), css))
        parts.append(text(x + 24, top, key.label))
        x += wide
    return parts, top
