"""Pictures of a report: drawn from its JSON alone, whole, true to the figures, and told apart by every eye."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
import reported
from hypothesis import given
from hypothesis import strategies as st

from bnn.evaluation import class_pictures, pictures, svg
from bnn.evaluation.svg import Frame, Plot

SVG = "{http://www.w3.org/2000/svg}"
CLASSES = {"reliability", "risk_coverage", "scores", "entropy_split", "samples", "shift", "rhat", "ess"}
TARGETS = {"band", "pit", "calibration", "samples", "rhat", "ess"}


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    return reported.classification()


@pytest.fixture(scope="module")
def targets() -> dict[str, Any]:
    return reported.regression(verdict="good")


def only(kind: str, curve: Any, **report: Any) -> str:
    """The one picture of a report with one curve."""
    drawn = pictures.draw({"bank": "bank", "num_rows": 40, "curves": {kind: curve}, **report})
    assert set(drawn) == {kind}
    return drawn[kind]


def paths(picture: str, css: str) -> list[str]:
    return [path.attrib["d"] for path in ET.fromstring(picture).iter(f"{SVG}path") if path.get("class") == css]


def texts(picture: str) -> list[str]:
    return ["".join(one.itertext()) for one in ET.fromstring(picture).iter(f"{SVG}text")]


def starts(path: str) -> list[tuple[float, float]]:
    """Where the pen goes down."""
    return [(float(x), float(y)) for x, y in re.findall(r"M(-?[\d.]+) (-?[\d.]+)", path)]


def check(picture: str) -> None:
    """One svg element that stands alone: named, sized, without references, every number finite and inside."""
    root = ET.fromstring(picture)
    assert root.tag == f"{SVG}svg"
    assert [child.tag for child in root][:3] == [f"{SVG}{tag}" for tag in ("title", "desc", "style")]
    assert all(child.text for child in list(root)[:3])
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"].startswith(root[0].text or "-")
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert (width, height) == (float(root.attrib["width"]), float(root.attrib["height"]))
    rest = picture.replace('xmlns="http://www.w3.org/2000/svg"', "", 1)
    assert not re.search(r"https?:|href|url\(|@import|<script|<image|<foreignObject", rest)
    for path in root.iter(f"{SVG}path"):
        assert re.fullmatch(r"[MLHVhvaZ\d. -]+", path.attrib["d"]), path.attrib["d"]
        for x, y in starts(path.attrib["d"]):
            assert -1 <= x <= width + 1
            assert -1 <= y <= height + 1
    for one in root.iter(f"{SVG}text"):
        wide, anchor = svg.WIDE * len("".join(one.itertext())), one.get("text-anchor")
        left = float(one.attrib["x"]) - {"end": wide, "middle": wide / 2, None: 0.0}[anchor]
        assert left >= 0, f"cut: {one.text}"
        assert left + wide <= width, f"cut: {one.text}"
        assert 0 < float(one.attrib["y"]) < height


@pytest.mark.parametrize("verdict", ["good", "bad"])
@pytest.mark.parametrize("ood", [True, False])
def test_a_report_of_classes_has_its_pictures(verdict: str, ood: bool) -> None:
    drawn = pictures.draw(reported.classification("a bank", ood=ood, verdict=verdict))
    assert set(drawn) == CLASSES
    for picture in drawn.values():
        check(picture)
        assert (ET.fromstring(picture)[0].text or "").endswith(", a bank")


def test_a_report_of_targets_has_its_pictures(targets: dict[str, Any]) -> None:
    drawn = pictures.draw(targets)
    assert set(drawn) == TARGETS
    for picture in drawn.values():
        check(picture)


def test_the_same_report_gives_the_same_bytes(classes: dict[str, Any]) -> None:
    before = copy.deepcopy(classes)
    assert pictures.draw(classes) == pictures.draw(copy.deepcopy(classes))
    assert classes == before


def test_a_curve_that_is_not_there_gives_no_picture(classes: dict[str, Any]) -> None:
    curves = classes["curves"]
    for kind in curves:
        without = {**classes, "curves": {k: v for k, v in curves.items() if k != kind}}
        assert set(pictures.draw(without)) == CLASSES - {kind}
        assert set(pictures.draw({**classes, "curves": {**curves, kind: None}})) == CLASSES - {kind}
    assert pictures.draw({"bank": "x", "metrics": {}}) == {}
    assert pictures.draw({"bank": "x", "metrics": {}, "curves": {}}) == {}


EMPTY = {
    "reliability": {"edges": [0, 0.5, 1], "rows": [0, 0], "confidence": [None, None], "accuracy": [None, None]},
    "risk_coverage": {"coverage": [], "risk": [], "oracle_coverage": [], "oracle_risk": []},
    "scores": {"mutual_information": {"edges": [0, 1, 2], "inside": [0, 0]}},
    "entropy_split": {"edges": [0, 1, 2], "expected_entropy": [0, 0], "mutual_information": [0, 0]},
    "samples": {"num_samples": [1, 2], "metrics": {"nll": [None, None]}, "needed": {"nll": None}},
    "band": {"target": [], "mean": [], "lower": [], "upper": [], "level": 0.9},
    "pit": {"edges": [0, 0.5, 1], "rows": [0, 0], "lower": None, "upper": None},
    "calibration": {"level": [0.5], "coverage": [None]},
    "rhat": {"edges": [1.0, 1.1, None], "quantities": [0, 0]},
    "ess": {"edges": [0.0, 10.0], "quantities": [0]},
    "shift": {"noise": {"severity": [0, 1], "metrics": {"nll": [None, None]}}},
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_curve_without_rows_gives_no_picture(kind: str) -> None:
    assert pictures.draw({"bank": "x", "curves": {kind: EMPTY[kind]}}) == {}


ODD = {  # one row, one sample, one value for all, values that are not finite
    "reliability": {"edges": [0, 0.5, 1], "rows": [0, 1], "confidence": [None, 1.0], "accuracy": [None, 0.0]},
    "risk_coverage": {"coverage": [1.0], "risk": [0.0], "oracle_coverage": [1.0], "oracle_risk": [0.0]},
    "scores": {"mutual_information": {"edges": [0.0] * 4, "inside": [0, 0, 7], "outside": [0, 0, 0]}},
    "entropy_split": {"edges": [0, 1, 2], "expected_entropy": [1, 0], "mutual_information": [1, 0]},
    "samples": {"num_samples": [1], "metrics": {"nll": [2.0], "rmse": [None]}, "needed": {"nll": None}},
    "band": {"target": [1, None], "mean": [1, 2], "lower": [1, 2], "upper": [1, 2], "level": 0.9},
    "pit": {"edges": [0, 0.5, 1], "rows": [1, 0], "lower": None, "upper": None},
    "calibration": {"level": [0.25, 0.5], "coverage": [1.0, None]},
    "rhat": {"edges": [1.0, 1.1, None], "quantities": [3, 2]},
    "ess": {"edges": [4.0, 4.0], "quantities": [9]},
    "shift": {"noise": {"severity": [0], "metrics": {"nll": [1e-9], "mae": [3e7]}}},
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_curves_are_drawn(kind: str) -> None:
    check(only(kind, ODD[kind]))


def test_points_of_the_reliability_diagram_stand_where_they_belong() -> None:
    """The diagonal gives the scale; the second bin is 0.2 too sure, and its point as much below."""
    curve = {"edges": [0, 0.5, 1], "rows": [30, 90], "confidence": [0.4, 0.9], "accuracy": [0.4, 0.7]}
    picture = only("reliability", curve)
    (x0, y0), (x1, y1) = ends(paths(picture, "bnn-rule")[-1])
    found = [((x + 3 - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in starts(paths(picture, "bnn-p0")[-1])]
    assert np.allclose(found, [(0.4, 0.4), (0.9, 0.7)], atol=1e-3)
    heights = [float(y) for y in re.findall(r"V([\d.]+)H", paths(picture, "bnn-f5")[0])]
    bottom = starts(paths(picture, "bnn-f5")[0])[0][1]
    assert (bottom - heights[1]) / (bottom - heights[0]) == pytest.approx(90 / 30, rel=0.02)


def ends(path: str) -> tuple[tuple[float, float], tuple[float, float]]:
    found = re.fullmatch(r"M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)", path)
    assert found
    x0, y0, x1, y1 = map(float, found.groups())
    return (x0, y0), (x1, y1)


@pytest.mark.parametrize(("share", "number"), [(0.0, 5), (0.3, 10), (1.0, 7)])
def test_whiskers_are_wilsons_interval(share: float, number: int) -> None:
    """Its ends are the shares p at which the share seen lies two standard errors of p away."""
    for end in class_pictures.wilson(share, number):
        assert (share - end) ** 2 == pytest.approx(4 * end * (1 - end) / number, abs=1e-12)


def test_bars_beyond_the_band_are_told_apart() -> None:
    rows = [5, 30, 4, 1]
    picture = only("pit", {"edges": [0, 0.25, 0.5, 0.75, 1], "rows": rows, "lower": 3.0, "upper": 20.0})
    assert "PIT: 2 of 4 bars beyond the band" in texts(picture)
    assert len(starts(paths(picture, "bnn-f0")[-1])) == 2
    assert len(starts(paths(picture, "bnn-f1")[-1])) == 2


def test_targets_outside_their_interval_are_counted_and_square() -> None:
    curve = {"target": [0, 5, 9], "mean": [1, 2, 3], "lower": [0, 1, 2], "upper": [2, 3, 4], "level": 0.9}
    picture = only("band", curve)
    assert "1 of 3 targets in their 90 % interval" in texts(picture)
    assert paths(picture, "bnn-p1")[-1].count("h-") == 2  # squares, not arcs
    assert "a" not in paths(picture, "bnn-p1")[-1]


def test_histograms_of_unlike_sizes_are_shares() -> None:
    """Ten times the rows outside in the same bins give the same outline."""
    few = {"score": {"edges": [0, 1, 2], "inside": [3, 1], "outside": [1, 3]}}
    many = {"score": {"edges": [0, 1, 2], "inside": [3, 1], "outside": [10, 30]}}
    assert paths(only("scores", few), "bnn-l1")[-1] == paths(only("scores", many), "bnn-l1")[-1]
    assert "outside: 40 rows" in texts(only("scores", many))


@pytest.mark.parametrize("needed", [None, 1, 8, 9])
def test_samples_needed_are_marked_where_they_are_on_the_axis(needed: int | None) -> None:
    curve = {"num_samples": [1, 2, 4, 8], "metrics": {"nll": [3, 2, 1.5, 1]}, "needed": {"nll": needed}}
    picture = only("samples", curve)
    assert len(paths(picture, "bnn-rule")) == 1 + (needed in (1, 8))  # the legend's own
    told = f"negative log likelihood: 1 % error from {needed} samples"
    assert (told in texts(picture)) == (needed is not None)


def test_an_axis_of_samples_is_in_powers_of_two() -> None:
    curve = {"num_samples": [1, 2, 4, 8], "metrics": {"nll": [3, 2, 1.5, 1]}, "needed": {}}
    at = [x for x, _ in starts(paths(only("samples", curve), "bnn-p0")[0])]
    assert np.allclose(np.diff(at), np.diff(at)[0], atol=0.15)


def test_pictures_of_two_banks_have_equal_axes() -> None:
    first, second = reported.classification(), reported.classification(seed=3, skill=1.2, verdict="bad")
    left, right = pictures.draw(first, beside=[second]), pictures.draw(second, beside=[first])
    assert left.keys() == right.keys() == CLASSES
    for kind in CLASSES:
        assert quiet(left[kind]) == quiet(right[kind]), kind
    assert quiet(pictures.draw(first)["risk_coverage"]) != quiet(left["risk_coverage"])


def quiet(picture: str) -> list[tuple[str, str, str]]:
    """Labels of axes, and where they stand."""
    found = [one for one in ET.fromstring(picture).iter(f"{SVG}text") if one.get("class") == "bnn-quiet"]
    return [(one.attrib["x"], one.attrib["y"], one.text or "") for one in found]


def test_names_cannot_break_out_of_a_picture(classes: dict[str, Any]) -> None:
    nasty = "<script>alert('x')</script> \"&\x1b[31m\u202e\ud800"
    curves = {**classes["curves"], "shift": {nasty: classes["curves"]["shift"]["noise"]}}
    for kind, picture in pictures.draw({**classes, "bank": nasty, "curves": curves}).items():
        check_escaped(picture.encode().decode(), kind)


def check_escaped(picture: str, kind: str) -> None:
    root = ET.fromstring(picture)
    assert "<script>" not in picture, kind
    assert not root.findall(f".//{SVG}script")
    assert "<script>alert('x')</script> \"&\\x1b[31m\\u202e\\ud800" in (root[0].text or "")


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e6), st.integers(2, 9))
def test_ticks_are_round_few_and_inside(place: float, width: float, most: int) -> None:
    low = place * width
    found = svg.ticks(low, low + width, most=most)
    assert most // 3 <= len(found) <= most + 1
    assert all(low - 1e-6 * width <= value <= low + (1 + 1e-6) * width for value in found)
    if len(found) > 1:
        apart = np.diff(found)
        assert np.allclose(apart, apart[0], rtol=1e-5)
        assert f"{apart[0]:.2e}"[:4] in ("1.00", "2.00", "2.50", "5.00")
        assert np.allclose(np.array(found) / apart[0], np.round(np.array(found) / apart[0]), atol=1e-3)


@given(st.lists(st.one_of(st.none(), st.floats(-1e5, 1e5)), max_size=5), st.booleans())
def test_limits_hold_all_values_and_differ(values: list[float | None], zero: bool) -> None:
    low, high = svg.limits(values, zero=zero)
    assert low < high
    known = [value for value in values if value is not None] + ([0.0] if zero else [])
    slack = 1e-8 * (high - low)
    assert all(low - slack <= value <= high + slack for value in known)


def test_a_frame_maps_values_to_pixels() -> None:
    frame = Frame(left=50, top=10, width=200, height=100, x=(1, 16), y=(-1, 3), log=True)
    assert [frame.across(value) for value in (1, 4, 16)] == pytest.approx([50, 150, 250])
    assert [frame.down(value) for value in (-1, 0, 3)] == pytest.approx([110, 85, 10])


def test_a_line_has_a_gap_where_a_value_is_missing() -> None:
    frame = Frame(0, 0, 30, 10, (0, 3), (0, 1))
    assert svg.line(frame, [0, 1, 2, 3], [0, 1, None, 1], "x") == '<path class="x" d="M0 10L10 0M30 0"/>'
    assert svg.line(frame, [0], [None], "x") == ""


def test_labels_that_would_touch_are_left_out() -> None:
    marks = [float(value) for value in range(1000, 1100)]
    picture = svg.compose(
        [Plot((1000, 1099), (0, 1), lambda frame: [], x_ticks=marks)], title="t", told="t", description="d"
    )
    told = [text for text in texts(picture) if len(text) == 4 and text.startswith("1")]
    assert 4 <= len(told) <= 10


def luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one: str, other: str) -> float:
    """As the Web Content Accessibility Guidelines have it."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [svg.LIGHT, svg.DARK], ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(scheme: dict[str, str]) -> None:
    for name in ("ink", "muted"):
        assert contrast(scheme[name], scheme["paper"]) >= 4.5, name
    for number in range(svg.SERIES):
        assert contrast(scheme[f"c{number}"], scheme["paper"]) >= 3, number
    assert all(colour in svg.STYLE for colour in scheme.values())


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("scheme", [svg.LIGHT, svg.DARK], ids=["light", "dark"])
def test_two_series_are_told_apart_by_colour_blind_eyes(scheme: dict[str, str], kind: str) -> None:
    """Inside and outside, this bank and the oracle: at least 20 apart in CIELAB, where 2.3 can just be seen."""
    first, second = (lab(np.array(BLIND[kind]) @ linear(scheme[name])) for name in ("c0", "c1"))
    assert np.linalg.norm(first - second) > 20
    assert len(set(svg.DASHES)) == svg.SERIES


def linear(colour: str) -> Any:
    values = np.array(rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(values: Any) -> Any:
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = matrix @ np.clip(values, 0, 1) / [0.9505, 1.0, 1.089]
    f = [v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in (x, y, z)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
