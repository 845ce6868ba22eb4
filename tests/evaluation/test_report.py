"""Reports: standard errors, what report.json and report.html hold, and that nothing else is left in the folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
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
    """JSON as the standard has it: without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_mean_comes_with_its_standard_error() -> None:
    report, values = report_of(Categorical()), torch.tensor([1.0, 4.0, 4.5, 9.0])
    report.add_mean("score", values, "what it means")
    assert report.metrics["score"] == Figure(4.625, pytest.approx(scipy.stats.sem(values.numpy())), "what it means")


def test_a_mean_over_one_row_has_no_standard_error() -> None:
    report = report_of(Categorical())
    report.add_mean("score", torch.tensor([2.5]), "what it means")
    assert report.metrics["score"] == Figure(2.5, None, "what it means")


def test_the_folder_holds_report_page_and_pictures_and_nothing_else(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    report.save(folder)
    drawn = {
        f"bank-{kind}.svg": picture for kind, picture in pictures.draw_all({"bank": report.to_dict()})["bank"].items()
    }
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html"} | set(drawn)
    assert {path.name for path in tmp_path.iterdir()} == {"not"}
    assert {name: (folder / name).read_text() for name in drawn} == drawn


def test_json_holds_every_figure_as_it_is(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path)
    facts = strict_json(tmp_path / "report.json")
    assert set(facts) == {"bank"}
    found = facts["bank"]
    assert {name: Figure(**_renamed(figure)) for name, figure in found["metrics"].items()} == report.metrics
    assert (found["task"], found["num_rows"], found["num_samples"]) == (report.task, ROWS, SAMPLES)
    assert found["seconds"] == report.seconds
    assert found["rows_per_second"] == ROWS / report.seconds
    if report.bins is None:
        assert found["calibration_bins"] is None
        assert "crps" in found["metrics"]
    else:
        assert found["calibration_bins"] == {name: column.tolist() for name, column in report.bins._asdict().items()}
        assert sum(found["calibration_bins"]["rows"]) == ROWS
        assert ("ood_auroc" in found["metrics"]) == (report.ood_entropy is not None)


def _renamed(figure: dict[str, Any]) -> dict[str, Any]:
    return {"value": figure["value"], "error": figure["standard_error"], "definition": figure["definition"]}


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
    assert all(after[name] != before[name] for name in after)
    assert strict_json(tmp_path / "report.json")["bank"]["metrics"]["nll"]["value"] == second.metrics["nll"].value


def test_several_banks_stand_side_by_side(tmp_path: Path) -> None:
    """A figure that one of them lacks is an empty cell, not a missing column."""
    reports = {"hmc <8>": report_of(Categorical(), ood=True), "map": report_of(Categorical(), seed=1)}
    save_reports(reports, tmp_path)
    facts = strict_json(tmp_path / "report.json")
    assert {name: facts[name]["metrics"]["nll"]["value"] for name in facts} == {
        name: report.metrics["nll"].value for name, report in reports.items()
    }
    html = (tmp_path / "report.html").read_text()
    assert "hmc &lt;8&gt;" in html
    assert "<8>" not in html
    assert html.count("not computed") == 2  # the AUROC and FPR of the bank without rows outside


def test_facts_about_the_run_go_into_the_json(tmp_path: Path) -> None:
    report = report_of(Categorical())
    report.about = {"data": "digits", "bank": tmp_path}
    report.save(tmp_path / "out")
    found = strict_json(tmp_path / "out" / "report.json")["bank"]
    assert (found["data"], found["bank"]) == ("digits", str(tmp_path))


def test_text_names_every_figure_with_its_error(report: Report) -> None:
    text = str(report).splitlines()
    assert text[0] == "13 rows, 5 samples"
    assert [line.split()[0] for line in text[1:]] == list(report.metrics)
    for line, figure in zip(text[1:], report.metrics.values(), strict=True):
        assert f"{figure.value:.4f}" in line
        assert ("±" in line) == (figure.error is not None)
    assert math.isclose(float(text[1].split()[1]), next(iter(report.metrics.values())).value, abs_tol=1e-4)
