"""The page of a report: every figure in its table, nothing from anywhere, nothing that data can break out of."""

from __future__ import annotations

import copy
import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from typing import Any, NamedTuple

import pytest
import reported

from bnn.evaluation import page, pictures, topics

VOID = {"meta", "br", "path", "rect"}  # without an end


class Cell(NamedTuple):
    tag: str
    attributes: dict[str, str]
    text: str


class Page(HTMLParser):
    """Rows of tables, elements in order and ids; an element that is not closed in turn fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.rows: list[list[Cell]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "br" and {"td", "th"} & set(self.open):
            self.handle_data("\n")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(Cell(tag, found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words += data
        if {"td", "th"} & set(self.open):
            last = self.rows[-1].pop()
            self.rows[-1].append(last._replace(text=last.text + data))

    @property
    def ids(self) -> list[str]:
        return [found["id"] for _, found in self.tags if "id" in found]

    def metric(self, name: str) -> list[Cell]:
        """The row of a metric: its head, then a cell a bank."""
        (row,) = [row for row in self.rows if row and f"\n{name} " in row[0].text]
        return row


def report(value: float | None, error: float | None = 0.1, bank: str = "", **more: Any) -> dict[str, Any]:
    """A report of one metric."""
    figure = reported.figure(value, error, None, definition="d", higher=more.pop("higher", True), n=more.pop("n", 9))
    figure |= {name: more.pop(name) for name in ("note", "monte_carlo_error") if name in more}
    return {"bank": bank, "task": "classification", "data": "digits", "metrics": {"accuracy": figure}, **more}


@pytest.fixture(scope="module")
def two() -> dict[str, dict[str, Any]]:
    return reported.banks()


@pytest.fixture(scope="module")
def written(two: dict[str, dict[str, Any]]) -> str:
    return page.render(two)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_every_metric_of_every_bank_is_in_the_table(task: str, two: dict[str, dict[str, Any]]) -> None:
    """Each as it is in the JSON, to the last digit that is written, beside its two errors."""
    reports = two if task == "classification" else {"one": reported.regression(), "two": reported.regression(seed=5)}
    found = Page(page.render(reports))
    names = {metric for one in reports.values() for metric in one["metrics"]}
    assert len(names) > 10
    for name in names:
        head, *cells = found.metric(name)
        assert head.attributes["scope"] == "row"
        assert topics.name(name) in head.text
        for cell, one in zip(cells, reports.values(), strict=True):
            check_cell(cell.text, one["metrics"][name])


def check_cell(text: str, figure: dict[str, Any]) -> None:
    if figure["value"] is None:
        assert text.startswith("\N{EN DASH}no value")
        return
    told = re.fullmatch(
        r"(\u2212?[\d,.]+)(?: best)?\d*?(?:± ([\d,.]+))?(?:(?: · )?MC ([\d,.]+))?", text.replace("\n", "")
    )
    if figure["note"]:  # its number stands behind the value, without a space
        told = re.fullmatch(r"(\u2212?[\d,]+\.\d+?)(?: best)?\d(?:± ([\d,.]+))?(?:(?: · )?MC ([\d,.]+))?", text)
    assert told, text
    for words, key in zip(told.groups(), ("value", "standard_error", "monte_carlo_error"), strict=True):
        assert (words is None) == (figure[key] is None), (text, key)
        if words is not None:
            decimals = len(words.partition(".")[2])
            number = float(words.replace(",", "").replace("\N{MINUS SIGN}", "-"))
            assert number == pytest.approx(figure[key], abs=0.5 * 10.0**-decimals + 1e-12), (text, key)


def test_the_page_stands_alone(written: str) -> None:
    rest = written.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert written.startswith("<!doctype html>")
    assert not re.search(r"https?:|\bsrc=|<script|<link|url\(|@import|<iframe|javascript:| on\w+=", rest)
    assert len(written.encode()) < 300_000
    found = Page(written)
    ids = found.ids
    assert len(ids) == len(set(ids))
    targets = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= set(ids)


def test_the_page_is_in_order(written: str, two: dict[str, dict[str, Any]]) -> None:
    """One title, headings without a gap in level, named pictures, tables that scroll by keyboard."""
    found = Page(written)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert found.words.index("Predictive uncertainty") < found.words.index(two["hmc"]["headline"])
    assert found.words.index(two["hmc"]["headline"]) < found.words.index("What was evaluated")
    for tag, attributes in found.tags:
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "rowgroup")
    assert ("html", {"lang": "en"}) in found.tags


def test_pictures_stand_beside_each_other_by_kind(written: str, two: dict[str, dict[str, Any]]) -> None:
    labels = [attributes["aria-label"] for tag, attributes in Page(written).tags if tag == "svg"]
    drawn = pictures.draw_all(two)
    kinds = [kind for kind in page.READINGS if kind in drawn["hmc"]]
    assert set(pictures.PICTURES) == set(page.READINGS)
    expected = [ET.fromstring(drawn[bank][kind]).attrib["aria-label"] for kind in kinds for bank in two]
    assert labels == expected
    assert all(picture in written for found in drawn.values() for picture in found.values())


def test_topics_come_in_their_order_and_unknown_metrics_last(two: dict[str, dict[str, Any]]) -> None:
    reports = copy.deepcopy(two)
    reports["hmc"]["metrics"]["my_own"] = reported.figure(7.25, definition="mine")
    found = Page(page.render(reports))
    heads = [row[0].text for row in found.rows if row and row[0].attributes.get("scope") == "rowgroup"]
    wanted = [
        "Accuracy and loss",
        "Calibration",
        "Uncertainty",
        "Selective prediction",
        "Out of distribution",
        "Chains",
    ]
    assert heads == [*wanted, "Other"]
    assert [cell.text for cell in found.metric("my_own")][1:] == ["7.250", "not computed"]


# (value, error) of the first bank and of the second; whether higher is better; which is marked
CLEAR = [
    ((0.9, 0.03), (0.8, 0.03), True, 0),  # 0.1 against 2 · 0.042
    ((0.9, 0.04), (0.8, 0.04), True, None),  # 0.1 against 2 · 0.057
    ((0.9, 0.03), (0.8, 0.03), False, 1),
    ((0.9, 0.0), (0.9, 0.0), True, None),
    ((0.9, None), (0.1, 0.01), True, None),
    ((0.9, 0.01), (None, None), True, None),
    ((0.9, 0.01), (0.1, 0.01), None, None),
]


@pytest.mark.parametrize(("first", "second", "higher", "best"), CLEAR)
def test_only_a_clear_lead_is_marked(first: Any, second: Any, higher: bool | None, best: int | None) -> None:
    reports = {"a": report(*first, higher=higher), "b": report(*second, higher=higher)}
    _, *cells = Page(page.render(reports)).metric("accuracy")
    assert [cell.attributes.get("class") for cell in cells] == ["best" if i == best else None for i in range(2)]
    assert ["best" in cell.text for cell in cells] == [i == best for i in range(2)]


def test_an_error_of_rounding_does_not_ask_for_more_digits() -> None:
    report = reported.classification()
    report["metrics"]["auroc"] |= {"value": 1.0, "standard_error": 1e-17}
    other = reported.classification(seed=4)
    other["metrics"]["auroc"] |= {"value": 0.956, "standard_error": 0.0068}
    cells = Page(page.render({"one": report, "other": other})).metric("auroc")
    assert [cell.text.split(" ")[0][:6] for cell in cells[1:]] == ["1.0000", "0.9560"]


def test_narrow_intervals_are_not_called_best() -> None:
    """They may miss: of a width, no lead is marked."""
    wide, narrow = reported.regression(), reported.regression(seed=4, noise=2.0)
    found = Page(page.render({"wide": wide, "narrow": narrow}))
    assert narrow["metrics"]["width_90"]["value"] < 0.6 * wide["metrics"]["width_90"]["value"]
    assert [["best" in cell.text for cell in found.metric(name)] for name in ("width_90", "sharpness")] == [
        [False] * 3
    ] * 2
    assert "best" in found.metric("nll")[1].text


def test_a_lead_must_be_over_every_other_bank_and_beyond_the_monte_carlo_error() -> None:
    reports = {"a": report(0.9, 0.01), "b": report(0.89, 0.01), "c": report(0.1, 0.01)}
    assert marked(reports) == []
    assert marked({"a": reports["a"], "c": reports["c"]}) == ["a"]
    assert marked({"a": report(0.9, 0.01, monte_carlo_error=0.5), "c": reports["c"]}) == []


def marked(reports: dict[str, dict[str, Any]]) -> list[str]:
    _, *cells = Page(page.render(reports)).metric("accuracy")
    return [bank for bank, cell in zip(reports, cells, strict=True) if "best" in cell.text]


@pytest.mark.parametrize("other", [{"data": "other"}, {"task": "regression"}, {"num_rows": 3}])
def test_banks_on_other_data_are_not_ranked_and_a_box_says_so(other: dict[str, Any]) -> None:
    reports = {"a": report(0.9, 0.01), "b": report(0.1, 0.01, **other)}
    assert marked(reports) == []
    assert "not judged on the same rows" in Page(page.render(reports)).words
    assert marked({"a": report(0.9, 0.01), "b": report(0.1, 0.01, n=4)}) == []


def test_chains_that_disagree_are_said_first_and_in_a_box(two: dict[str, dict[str, Any]], written: str) -> None:
    boxes = [attributes for _, attributes in Page(written).tags if attributes.get("class") == "box"]
    assert len(boxes) == 1
    words = Page(written).words
    assert "Chains not to be trusted: mean-field" in words
    assert words.index("Chains not to be trusted: mean-field") < words.index("What was evaluated")
    assert two["mean-field"]["diagnosis"]["text"] in words
    good = page.render({"hmc": two["hmc"]})
    assert 'class="box"' not in good


def test_few_draws_are_told_too() -> None:
    few = report(
        0.9, diagnosis={"verdict": "too few to tell", "text": "2 chains of 9 draws", "rhat": None, "ess": None}
    )
    assert "Too few draws to judge the chains: a" in Page(page.render({"a": few})).words


def test_notes_are_footnotes_and_equal_ones_stand_once() -> None:
    reports = {
        "a": report(None, None, note="chains stand still: R-hat is infinite"),
        "b": report(0.5, note="few rows & <small>"),
        "c": report(0.5, note="chains stand still: R-hat is infinite"),
    }
    found = Page(page.render(reports))
    _, *cells = found.metric("accuracy")
    assert [cell.text for cell in cells] == ["\N{EN DASH}no value1", "0.502± 0.10", "0.501± 0.10"]
    assert found.words.count("chains stand still") == 1
    assert "few rows & <small>" in found.words
    assert {"note-1", "note-2"} <= set(found.ids)
    assert "note-3" not in found.ids


def test_nothing_from_data_becomes_markup(two: dict[str, dict[str, Any]]) -> None:
    nasty = "</style></title><script>alert(1)</script><img src=x onerror=alert(1)>'\"&\x00\x1b[31m\u202e\ud800"
    bad = copy.deepcopy(two["mean-field"])
    bad |= dict.fromkeys(("bank", "digest", "data", "ood", "headline"), nasty)
    bad["diagnosis"] |= {"text": nasty}
    for figure in bad["metrics"].values():
        figure |= {"note": nasty, "definition": nasty, "unit": nasty}
    bad["metrics"][nasty] = reported.figure(1.0, definition="d")
    bad["curves"]["scores"][nasty] = bad["curves"]["scores"]["mutual_information"]
    bad["curves"]["samples"]["metrics"][nasty] = bad["curves"]["samples"]["metrics"]["nll"]
    bad["curves"]["shift"][nasty] = bad["curves"]["shift"]["noise"]
    text = page.render({nasty: bad, "hmc": two["hmc"]})
    text.encode()
    assert not re.search(r"<script|<img|[\x00\x1b\u202e]", text)
    tags = {tag for tag, _ in Page(text).tags}
    assert tags == {tag for tag, _ in Page(page.render(two)).tags}
    assert "</style></title><script>alert(1)" in Page(text).words


def test_a_page_without_curves_has_no_pictures() -> None:
    text = page.render({"a": report(0.9)})
    assert "<svg" not in text
    assert "#pictures" not in text


@pytest.mark.parametrize(
    ("value", "decimals", "told"),
    [
        (0.97222, 4, "0.9722"),
        (-1234.56, 1, "\N{MINUS SIGN}1,234.6"),
        (3.1e-9, None, "3.10e\N{MINUS SIGN}9"),
        (0.0, None, "0"),
        (12.0, 0, "12"),
    ],
)
def test_numbers(value: float, decimals: int | None, told: str) -> None:
    assert page.number(value, decimals) == told


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (0.912345, 0.0123, "0.912± 0.012"),
        (1234.5678, 31.4, "1,235± 31"),
        (3.0e-11, 2.0e-12, "3.00e\N{MINUS SIGN}11± 2.00e\N{MINUS SIGN}12"),
        (36.19999, None, "36.20"),
        (1.0, 0.0, "1.000± 0.000"),
        (0.0, None, "0.000"),
    ],
)
def test_figures_have_the_digits_that_their_error_leaves(value: float, error: float | None, told: str) -> None:
    _, cell = Page(page.render({"a": report(value, error)})).metric("accuracy")
    assert cell.text == told
