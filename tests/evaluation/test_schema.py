"""report.json against the schema of docs/evaluate.md, in plain checks: every key, length, range and note."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation import evaluate, save_reports
from bnn.evaluation.definitions import SCORES
from bnn.layout import Entry, layout_of
from bnn.likelihoods import SCALE, Bernoulli, Categorical, Gaussian, Likelihood, Poisson, StudentT
from bnn.priors import HalfCauchy
from bnn.seeding import generator
from bnn.types import make_block

ROWS, CLASSES, OUTSIDE, CHAINS, DRAWS = 13, 7, 8, 2, 110
SAMPLES = CHAINS * DRAWS

ALWAYS = {
    "bank", "digest", "data", "ood", "task", "num_rows", "num_samples", "num_chains", "seconds", "rows_per_second",
    "headline", "diagnosis", "metrics", "curves",
}  # fmt: skip
FIGURE = {
    "value", "standard_error", "monte_carlo_error", "n", "definition", "bins", "higher_is_better", "unit", "note",
}  # fmt: skip
CLASS_METRICS = {
    "accuracy", "top_5", "nll", "gibbs_nll", "brier", "ece", "rmsce", "mce", "ace", "classwise_ece",
    "predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio", "disagreement", "aurc", "augrc",
    "coverage_at_risk_5", "risk_at_coverage_80", "rhat", "ess",
}  # fmt: skip
OUTSIDE_METRICS = {
    kind if score == "predictive_entropy" else f"{kind}_{score}"
    for kind in ("auroc", "aupr_in", "aupr_out", "fpr95")
    for score in SCORES
}
TARGET_METRICS = {
    "rmse", "mae", "nll", "gibbs_nll", "crps", "coverage_50", "coverage_90", "coverage_95", "width_90", "interval_score_90",
    "pinball", "sharpness", "aleatoric", "epistemic", "rhat", "ess",
}  # fmt: skip
UNITS = {"", "nats", "target", "target^2", "samples"}


def lengths(curve: dict[str, Any], **wanted: int) -> None:
    assert {name: len(curve[name]) for name in wanted} == wanted


def check_histogram(edges: list[float], *counts: list[float], total: float | None = None) -> None:
    assert edges == sorted(edges)
    for count in counts:
        assert len(count) == len(edges) - 1
        assert all(number >= 0 for number in count)
        if total is not None:
            assert sum(count) == pytest.approx(total)


def check_report(report: dict[str, Any], shifts: bool = False) -> None:
    assert set(report) == ALWAYS
    assert report["task"] in ("classification", "regression")
    assert all(
        isinstance(report[name], int) and report[name] >= 1 for name in ("num_rows", "num_samples", "num_chains")
    )
    assert report["seconds"] > 0
    assert report["rows_per_second"] > 0
    assert isinstance(report["headline"], str)
    assert report["headline"]
    if report["diagnosis"] is not None:
        assert set(report["diagnosis"]) == {"verdict", "text", "rhat", "ess"}
    for name, figure in report["metrics"].items():
        assert set(figure) == FIGURE, name
        assert figure["unit"] in UNITS
        assert figure["definition"]
        assert isinstance(figure["n"], int)
        assert figure["higher_is_better"] in (True, False, None)
        assert (figure["bins"] is None) == (name not in ("ece", "rmsce", "mce", "ace", "classwise_ece"))
        missing = [figure[part] is None for part in ("value", "standard_error", "monte_carlo_error")]
        assert not any(missing) or figure["note"], f"{name} lacks something and does not say why"
        if figure["value"] is None:
            assert all(missing), name
        for part in ("standard_error", "monte_carlo_error"):
            assert figure[part] is None or figure[part] >= 0
    check_curves(report, shifts)


def check_curves(report: dict[str, Any], shifts: bool) -> None:
    curves, classes, rows = report["curves"], report["task"] == "classification", report["num_rows"]
    expected = (
        {"reliability", "risk_coverage", "scores", "entropy_split"} if classes else {"band", "pit", "calibration"}
    )
    chains = {"rhat", "ess"} if report["metrics"]["rhat"]["value"] is not None else set()
    assert set(curves) == expected | {"samples"} | chains | ({"shift"} if shifts else set())
    line = curves["samples"]
    assert line["num_samples"][-1] == report["num_samples"]
    assert line["num_samples"][:-1] == [2**k for k in range(len(line["num_samples"]) - 1)]
    assert line["metrics"].keys() == line["needed"].keys()
    for name, values in line["metrics"].items():
        assert len(values) == len(line["num_samples"])
        assert values[-1] == pytest.approx(report["metrics"][name]["value"])
        assert line["needed"][name] is None or line["needed"][name] >= 1
    if classes:
        check_class_curves(report)
    else:
        level = curves["band"].pop("level")
        assert level == 0.9
        size = min(rows, 200)
        lengths(curves["band"], target=size, mean=size, lower=size, upper=size)
        assert curves["band"]["mean"] == sorted(curves["band"]["mean"])
        assert all(low <= high for low, high in zip(curves["band"]["lower"], curves["band"]["upper"], strict=True))
        lengths(curves["pit"], edges=21, rows=20)
        assert sum(curves["pit"]["rows"]) % rows == pytest.approx(0, abs=1e-9)
        assert curves["pit"]["lower"] <= sum(curves["pit"]["rows"]) / 20 <= curves["pit"]["upper"]
        lengths(curves["calibration"], level=19, coverage=19)
        assert curves["calibration"]["coverage"] == sorted(curves["calibration"]["coverage"])
    for name in chains:
        check_histogram(curves[name]["edges"], curves[name]["quantities"], total=report["metrics"][name]["n"])
    for kind in curves.get("shift", {}).values():
        assert kind["severity"] == sorted(kind["severity"])
        assert kind["severity"][0] == 0
        wanted = {"accuracy", "nll", "ece", "predictive_entropy"} if classes else {"rmse", "nll", "coverage_90"}
        assert set(kind["metrics"]) == wanted
        for name, values in kind["metrics"].items():
            assert len(values) == len(kind["severity"])
            assert values[0] == report["metrics"][name]["value"]


def check_class_curves(report: dict[str, Any]) -> None:
    curves, rows = report["curves"], report["num_rows"]
    bins = report["metrics"]["ece"]["bins"]
    lengths(curves["reliability"], edges=bins + 1, rows=bins, confidence=bins, accuracy=bins)
    check_histogram(curves["reliability"]["edges"], curves["reliability"]["rows"], total=rows)
    risk = curves["risk_coverage"]
    for which in ("", "oracle_"):
        coverage, lost = risk[f"{which}coverage"], risk[f"{which}risk"]
        assert len(coverage) == len(lost) <= 200
        assert coverage == sorted(coverage)
        assert coverage[-1] == 1.0
        assert lost[-1] == pytest.approx(1 - report["metrics"]["accuracy"]["value"])
    assert set(curves["scores"]) == set(SCORES)
    for histogram in curves["scores"].values():
        lengths(histogram, edges=31, inside=30)
        check_histogram(histogram["edges"], histogram["inside"], total=rows)
        assert ("outside" in histogram) == ("auroc" in report["metrics"])
        if "outside" in histogram:
            check_histogram(histogram["edges"], histogram["outside"], total=OUTSIDE)
    split = curves["entropy_split"]
    lengths(split, edges=31, expected_entropy=30, mutual_information=30)
    check_histogram(split["edges"], split["expected_entropy"], split["mutual_information"], total=rows)


def net_of(likelihood: Likelihood, outputs: int, *, method: str, samples: int = SAMPLES) -> bnn.FunctionalModel:
    module = nn.utils.skip_init(nn.Linear, 4, outputs)
    source = generator(0, outputs, method)
    params: dict[str, Tensor] = {
        "weight": torch.randn(samples, outputs, 4, generator=source), "bias": torch.randn(samples, outputs, generator=source)
    }  # fmt: skip
    extra = []
    if isinstance(likelihood, Gaussian):
        params[SCALE] = 0.3 + torch.rand(samples, generator=source)
        extra = [Entry(SCALE, (), torch.float32)]
    index = torch.arange(samples)
    block = make_block(
        params, chain=index % CHAINS, draw=index // CHAINS, log_joint=torch.randn(samples, generator=source)
    )
    info = {"likelihood": likelihood.to_config(), "method": {"name": method, "options": {}}}
    bank = bnn.Bank.from_blocks([block], layout=layout_of(module, extra=extra), info=info)
    return bnn.FunctionalModel(module, bank, strategy="vmap", compile=False)


def saved(report: bnn.Report, folder: Path) -> dict[str, Any]:
    """What a strict reader finds: JSON without NaN and Infinity."""
    save_reports({"one": report}, folder)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    whole = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert {name: whole[name] for name in ("format", "version")} == {"format": "bnn-report", "version": 1}
    assert set(whole["reports"]) == {"one"}
    found: dict[str, Any] = whole["reports"]["one"]
    return found


X = torch.randn(ROWS, 4, generator=generator(1))


@pytest.mark.parametrize("ood", [False, True])
@pytest.mark.parametrize("method", ["mean-field", "hmc"])
def test_a_report_on_classes(ood: bool, method: str, tmp_path: Path) -> None:
    y = torch.randint(CLASSES, (ROWS,), generator=generator(2))
    outside = (0.1 * X[:OUTSIDE], torch.zeros(OUTSIDE)) if ood else None
    shifts = {"noise": {3: (X + 2, y), 1: (X + 0.5, y)}} if ood else None
    report = evaluate(net_of(Categorical(), CLASSES, method=method), (X, y), ood=outside, shifts=shifts)
    report.about = {"bank": tmp_path / "bank", "digest": "abc", "data": "digits"}
    found = saved(report, tmp_path)
    check_report(found, shifts=ood)
    assert set(found["metrics"]) == CLASS_METRICS | (OUTSIDE_METRICS if ood else set())
    assert (found["bank"], found["digest"], found["ood"]) == (str(tmp_path / "bank"), "abc", None)
    assert (found["num_rows"], found["num_samples"], found["num_chains"]) == (ROWS, SAMPLES, CHAINS)
    assert (found["metrics"]["rhat"]["value"] is not None) == (method == "hmc")
    if ood:
        assert found["curves"]["shift"]["noise"]["severity"] == [0, 1, 3]


KINDS = {
    "gaussian": Gaussian(HalfCauchy()),
    "student": StudentT(5.0, 0.5),
    "cauchy": StudentT(1.0, 0.5),
    "counts": Poisson(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["mean-field", "hmc"])
def test_a_report_on_targets(kind: str, method: str, tmp_path: Path) -> None:
    y = torch.randn(ROWS, 2, generator=generator(3))
    y = y.abs().round() if kind == "counts" else y
    net = net_of(KINDS[kind], 2, method=method)
    report = evaluate(net, (X, y), shifts={"moved": {1: (X + 1, y)}})
    found = saved(report, tmp_path)
    check_report(found, shifts=True)
    assert set(found["metrics"]) == TARGET_METRICS


def test_every_id_of_the_issue_is_there() -> None:
    ids = (
        "accuracy nll gibbs_nll brier ece rmsce mce ace predictive_entropy expected_entropy mutual_information "
        "variation_ratio disagreement auroc aupr_in aupr_out fpr95 aurc augrc rmse mae crps coverage_90 width_90 "
        "sharpness aleatoric epistemic rhat ess"
    )
    assert set(ids.split()) <= CLASS_METRICS | OUTSIDE_METRICS | TARGET_METRICS


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_few_samples_and_rows_leave_notes_not_nan(samples: int, rows: int, tmp_path: Path) -> None:
    y = torch.zeros(rows, dtype=torch.int64)  # of one class alone
    outside = (X[:OUTSIDE], torch.zeros(OUTSIDE))
    net = net_of(Categorical(), CLASSES, method="hmc", samples=samples)
    found = saved(evaluate(net, (X[:rows], y), ood=outside), tmp_path / "a")
    assert "NaN" not in (tmp_path / "a" / "report.html").read_text()
    check_report(found)
    if samples == 1:
        assert found["metrics"]["mutual_information"]["value"] == 0.0
        assert found["metrics"]["disagreement"]["value"] == 0.0
        assert all(figure["monte_carlo_error"] is None for figure in found["metrics"].values())
    net = net_of(Gaussian(HalfCauchy()), 2, method="mean-field", samples=samples)
    check_report(saved(evaluate(net, (X[:rows], torch.zeros(rows, 2))), tmp_path / "b"))
    net = net_of(Bernoulli(), 1, method="mean-field", samples=samples)
    found = saved(evaluate(net, (X[:rows], y), ood=outside), tmp_path / "c")
    check_report(found)
    assert "top_5" not in found["metrics"]


def test_chains_that_disagree_come_first() -> None:
    net = net_of(Categorical(), CLASSES, method="hmc")
    bank = net.bank
    block = bank.block(slice(None))
    apart = block.params["bias"].clone()
    apart[:, 0] += 4.0 * block.chain
    moved = block._replace(params=block.params | {"bias": apart})
    net = bnn.FunctionalModel(net.module, bnn.Bank.from_blocks([moved], layout=bank.layout, info=dict(bank.info)))
    y = torch.randint(CLASSES, (ROWS,), generator=generator(2))
    report = evaluate(net, (X, y))
    assert report.headline.startswith("not to be trusted, bad: chains disagree, R-hat")
    assert str(report).splitlines()[0] == report.headline
    rhat = report.metrics["rhat"].value
    assert rhat is not None
    assert rhat > 1.1
    fine = evaluate(net_of(Categorical(), CLASSES, method="hmc"), (X, y))
    assert fine.diagnosis is not None
    assert fine.diagnosis.verdict == "good"
    assert fine.headline.startswith(f"{ROWS} rows, {SAMPLES} samples, {CHAINS} chains: accuracy")


def test_the_schema_of_the_docs_names_what_reports_hold() -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    for name in sorted(ALWAYS | FIGURE | CLASS_METRICS | TARGET_METRICS | set(SCORES)):
        assert re.search(rf"`{name}`", page), name
    for name in (
        "reliability",
        "risk_coverage",
        "scores",
        "entropy_split",
        "samples",
        "band",
        "pit",
        "calibration",
        "shift",
    ):
        assert f"`{name}`" in page, name
