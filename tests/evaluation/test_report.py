"""Reports: figures with their notes, what report.json and the folder hold, and what people read first."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation import Figure, Report, evaluate, page, pictures, save_reports
from bnn.likelihoods import Categorical, Gaussian
from bnn.seeding import generator

SAMPLES, ROWS, CLASSES, OUTSIDE = 5, 13, 3, 8


def report_of(likelihood: Categorical | Gaussian, seed: int = 0, ood: bool = False) -> Report:
    """A report of five linear samples on thirteen rows of four inputs."""
    source = generator(seed, "report")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    module = nn.utils.skip_init(nn.Linear, 4, CLASSES)
    values = [{"weight": draw(CLASSES, 4), "bias": draw(CLASSES)} for _ in range(SAMPLES)]
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts(values, module=module))
    classes = torch.randint(CLASSES, (ROWS,), generator=source)
    data = draw(ROWS, 4), classes if isinstance(likelihood, Categorical) else draw(ROWS, CLASSES)
    outside = (0.1 * draw(OUTSIDE, 4), torch.zeros(OUTSIDE)) if ood else None
    return evaluate(net, data, ood=outside, likelihood=likelihood)


@pytest.fixture(params=["classification", "with ood", "regression"])
def report(request: pytest.FixtureRequest) -> Report:
    likelihood = Gaussian(0.5) if request.param == "regression" else Categorical()
    return report_of(likelihood, ood=request.param == "with ood")


def strict_json(path: Path) -> dict[str, Any]:
    """Reports of a file that is JSON as the standard has it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)["reports"]
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_has_a_note_and_no_errors(value: float) -> None:
    report = Report("classification", 13, 5, 1, 0.1)
    report.add("nll", value, n=13, standard_error=0.5, monte_carlo_error=0.1)
    figure = report.metrics["nll"]
    assert figure[:3] == (None, None, None)
    assert figure.note == ("no number" if math.isnan(value) else "infinite")
    report.add("nll", value, n=13, note="why")
    assert report.metrics["nll"].note == "why"


def test_a_missing_error_has_a_note() -> None:
    report = Report("classification", 13, 1, 1, 0.1)
    report.add("nll", 0.5, n=1)
    assert report.metrics["nll"].note == "one row: no error over rows; one sample: no error over samples"
    report.add("nll", 0.5, n=13, standard_error=math.nan, monte_carlo_error=0.1)
    assert report.metrics["nll"].standard_error is None
    assert report.metrics["nll"].note == "no error over rows"
    report.add("nll", 0.5, n=13, standard_error=0.2, monte_carlo_error=0.1)
    assert report.metrics["nll"][:4] == (0.5, 0.2, 0.1, 13)
    assert report.metrics["nll"].note is None
    assert report.metrics["nll"].unit == "nats"
    assert report.metrics["nll"].higher_is_better is False


def test_the_folder_holds_report_page_and_pictures_and_nothing_else(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    report.save(folder)
    drawn = pictures.draw_all(strict_json(folder / "report.json"))["bank"]
    assert drawn
    assert {path.name for path in folder.iterdir()} == {
        "report.json", "report.html", *(f"bank-{name}.svg" for name in drawn)
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"not"}
    for name, picture in drawn.items():
        assert (folder / f"bank-{name}.svg").read_text() == picture
        assert picture.startswith("<svg")


def test_json_holds_every_figure_as_it_is(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    found = strict_json(tmp_path / "report.json")["bank"]
    assert {name: Figure(**figure) for name, figure in found["metrics"].items()} == report.metrics
    assert (found["task"], found["num_rows"], found["num_samples"]) == (report.task, ROWS, SAMPLES)
    assert found["seconds"] == report.seconds
    assert found["rows_per_second"] == ROWS / report.seconds
    assert found["headline"] == report.headline


def test_the_page_is_drawn_from_the_json(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert html == page.render(strict_json(tmp_path / "report.json"))
    assert all(f"<code>{name}</code>" in html for name in report.metrics)


def test_saving_again_replaces_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    report_of(Categorical(), seed=0).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = report_of(Categorical(), seed=1)
    second.save(tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(after) == set(before)
    assert after.pop("notes.txt") == b"mine"
    assert after["report.json"] != before["report.json"]
    assert strict_json(tmp_path / "report.json")["bank"]["metrics"]["nll"]["value"] == second.metrics["nll"].value


def test_several_banks_stand_side_by_side(tmp_path: Path) -> None:
    reports = {"hmc <8>": report_of(Categorical(), ood=True), "runs/map": report_of(Categorical(), seed=1)}
    save_reports(reports, tmp_path)
    facts = strict_json(tmp_path / "report.json")
    assert {name: facts[name]["metrics"]["nll"]["value"] for name in facts} == {
        name: report.metrics["nll"].value for name, report in reports.items()
    }
    names = {path.name for path in tmp_path.iterdir()}
    assert {"hmc <8>-reliability.svg", "runs-map-reliability.svg"} <= names
    html = (tmp_path / "report.html").read_text()
    assert "hmc &lt;8&gt;" in html
    assert "<8>" not in html


def test_facts_about_the_run_go_into_the_json(tmp_path: Path) -> None:
    report = report_of(Categorical())
    report.about = {"data": "digits", "bank": tmp_path, "split": 3}
    report.save(tmp_path / "out")
    found = strict_json(tmp_path / "out" / "report.json")["bank"]
    assert (found["data"], found["bank"], found["ood"], found["split"]) == ("digits", str(tmp_path), None, 3)


def test_text_names_every_figure_with_its_errors(report: Report) -> None:
    text = str(report).splitlines()
    assert text[0] == report.headline
    assert text[0].startswith("13 rows, 5 samples")
    assert [line.split()[0] for line in text[1:]] == list(report.metrics)
    for line, figure in zip(text[1:], report.metrics.values(), strict=True):
        shown = [float(number) for number in re.findall(r"\d+\.\d{4}", line)]
        errors = [error for error in (figure.standard_error, figure.monte_carlo_error) if error is not None]
        if figure.value is None:
            assert line.split()[1] == "none"
        else:
            assert shown == pytest.approx([figure.value, *errors], abs=6e-5)
