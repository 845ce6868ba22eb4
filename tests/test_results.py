"""Committed runs of benchmarks: whole, possible, and what the docs say of them."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from bnn.inference import METHODS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def found(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_run_names_its_machine_and_has_a_script(path: Path) -> None:
    machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
    assert machine["torch"]
    assert (ROOT / "benchmarks" / f"{path.stem}.py").is_file() or path.stem == "bench"


def test_figures_of_the_methods_are_possible() -> None:
    """A published table once had an accuracy of 100 % for dropout where all others reached 72 to 78 %."""
    rows = found("posteriors")["rows"]
    assert {row["task"] for row in rows} == {"digits", "energy", "yacht"}
    for row in rows:
        mean, place = row["mean"], f"{row['task']}, {row['method']}"
        assert all(math.isfinite(value) for value in mean.values()), place
        for name in ("accuracy", "ece", "auroc", "coverage_90"):
            assert 0 <= mean.get(name, 0.5) <= 1, place
        prior = next(r["mean"] for r in rows if (r["task"], r["method"]) == (row["task"], "prior"))
        if row["task"] == "digits":
            assert mean["nll"] <= math.log(10), place
            assert row["method"] == "prior" or 0.9 < mean["accuracy"] < 0.995, place
        else:
            assert row["method"] == "prior" or mean["rmse"] < prior["rmse"], place


def test_every_method_has_its_figures() -> None:
    """Of each task; the guide of Pyro is a mean-field like ours, and its NUTS draws from what HMC draws from."""
    for task in ("digits", "energy", "yacht"):
        names = {row["method"].split(",")[0] for row in found("posteriors")["rows"] if row["task"] == task}
        assert names >= METHODS.keys() - {"guide", "nuts"}


@pytest.mark.parametrize("task", ["digits", "energy", "yacht"])
def test_the_page_shows_the_committed_figures(task: str) -> None:
    lines = runpy.run_path(str(ROOT / "benchmarks" / "posteriors.py"))["table"](found("posteriors"), task)
    page = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page


def test_figures_of_hmc_on_real_data_are_those_of_its_page() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks" / "uci_table.py"))
    methods = ["hmc", "mean-field", "ensemble"]
    everything = sorted(found("uci")["rows"], key=lambda row: methods.index(row["method"]))
    rows = [row for row in everything if row["method"] == "hmc"]
    page = (ROOT / "docs" / "methods" / "hmc.md").read_text(encoding="utf-8")
    for name in ("yacht", "energy", "concrete", "wine-quality-red", "power-plant"):
        of = [row for row in rows if row["set"] == name]
        assert sorted(row["split"] for row in of) == [0, 1, 2, 3, 4]
        assert all(0 <= row["coverage_90"] <= 1 and math.isfinite(row["log_likelihood"]) for row in of)
    assert "\n".join(tables["beside"](everything)) in page
    assert f"was {max(row['rhat_max'] for row in rows):.2f} there" in page


SPEEDS = {
    "AMD EPYC, 2 cores, 1 threads": ("AMD EPYC", (2701, 9001, 100501)),
    "Intel(R) Xeon(R) Processor, 2 cores, 1 threads": ("Intel Xeon", (2701, 9001)),
}


@pytest.mark.parametrize("machine", SPEEDS)
def test_speeds_of_hmc_are_those_of_its_page(machine: str) -> None:
    processor, sizes = SPEEDS[machine]
    rows = [row for row in found("hmc")["rows"] if row["part"] == "speed" and row["machine"] == machine]
    took = {(row["weights"], row["chains"], row["way"]): row["microseconds"] for row in rows}
    page = (ROOT / "docs" / "methods" / "hmc.md").read_text(encoding="utf-8")
    for weights in sizes:
        for chains in (1, 16, 64):
            ours = took[weights, chains, "bnn"]
            numpyro, pyro = took[weights, chains, "NumPyro"] / ours, took[weights, 1, "Pyro, module"] / ours
            alone = took[weights, chains, "matrix products alone"]
            figures = f"{ours:,.0f} | {numpyro:.2f} | {pyro:.1f} | {alone:,.0f} |"
            assert f"| {processor} | {weights:,} | {chains} | {figures}" in page


@pytest.mark.parametrize("machine", SPEEDS)
def test_worth_of_hmc_is_that_of_its_page(machine: str) -> None:
    page = (ROOT / "docs" / "methods" / "hmc.md").read_text(encoding="utf-8")
    rows = [row for row in found("hmc")["rows"] if row["part"] == "worth" and row["machine"] == machine]
    assert rows
    for row in rows:
        way = "HMC" if row["way"] == "bnn" else row["way"]
        figures = f"{row['ess_median']:.0f} | {row['ess_least']:.0f} | {row['rhat']:.2f} | {row['ess_per_second']:.1f}"
        assert f"| {SPEEDS[machine][0]} | {row['chains']} | {way} | {figures} |" in page


def test_shares_of_a_leapfrog_step_are_those_of_its_page() -> None:
    page = (ROOT / "docs" / "methods" / "hmc.md").read_text(encoding="utf-8")
    rows = [row for row in found("hmc")["rows"] if row["part"] == "profile"]
    assert {(row["weights"], row["chains"]) for row in rows} == {(w, c) for w in (2701, 9001) for c in (16, 64)}
    for row in rows:
        shares = list(row["shares"].values())
        assert sum(shares) == pytest.approx(1.0)
        cells = " | ".join(f"{share:.0%}" for share in shares)
        assert f"| {row['weights']:,} | {row['chains']} | {cells} |" in page


def test_the_trial_of_mclmc_is_told_as_it_was() -> None:
    page = (ROOT / "docs" / "methods" / "hmc.md").read_text(encoding="utf-8")
    told = found("mclmc")
    ours, theirs = (row["variance_ratio"] for row in told["check"])
    assert abs(ours - theirs) < 0.01  # one step and one length: one bias
    for row in told["rows"]:
        figures = (
            f"{row['rmse']:.2f} | {row['log_likelihood']:.2f} | {row['coverage_90']:.2f} | {row['rhat_median']:.2f}, "
        )
        figures += f"{row['rhat_max']:.2f} | {row['ess_per_second']:.1f}, {row['least_ess_per_second']:.1f} |"
        assert f"| {row['set']} | {row['split']} | {row['method']} | {figures}" in page


def test_the_page_on_residency_shows_what_row_orders_cost() -> None:
    run = found("bank_order")
    lines = runpy.run_path(str(ROOT / "benchmarks" / "bank_order.py"))["table"](run)
    assert "\n".join(lines) in (ROOT / "docs" / "residency.md").read_text(encoding="utf-8")
    for row in run["rows"]:
        assert row["formula"] == pytest.approx(1 + (row["draws"] - 1) * row["rho"])
        assert row["measured"] == pytest.approx(row["formula"], rel=0.1)


@pytest.mark.parametrize(
    ("script", "page"),
    [
        ("bank_read", "residency"),
        ("bank_growth", "residency"),
        ("virtual", "virtual-banks"),
        ("codecs", "smaller-banks"),
    ],
)
def test_pages_on_where_samples_are_show_the_committed_runs(
    script: str, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where scripts find what they share
    lines = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["table"](found(script))
    assert len(lines) > 4
    assert "\n".join(lines) in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def test_the_page_on_applying_shows_the_committed_grid() -> None:
    run = found("apply")
    lines = runpy.run_path(str(ROOT / "benchmarks" / "apply_table.py"))["table"](run)
    page = (ROOT / "docs" / "applying.md").read_text(encoding="utf-8")
    assert "\n".join(lines) in page
    assert {(row["rows"], row["samples"]) for row in run["compared"]} == {
        (b, s) for b in (1, 128, 1024) for s in (1, 10, 100, 1000)
    }
    for row in run["compared"]:
        assert 0 < row["share_of_ceiling"] < 2.5, row  # above 1 where biases go inside products, or blocks are smaller
    deep = run["sixty_layers_over_plain"]
    assert f'{deep["bnn, loop"]:.2f} times its plain call by loop, {deep["bnn, auto"]:.2f} by `"auto"`' in page


def test_the_page_on_evaluating_shows_what_it_costs() -> None:
    run = found("evaluate")
    lines = runpy.run_path(str(ROOT / "benchmarks" / "evaluate.py"))["table"](run)
    assert "\n".join(lines) in (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert all(cell["why"] for cell in run["left_out"])
    for row in run["rows"]:
        assert row["seconds"] > 0, row
        assert row["way"] != "forward passes" or row["over_forward_passes"] == 1, row


def test_the_page_on_ranks_shows_the_committed_run() -> None:
    run = found("scaling")
    lines = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))["table"](run)
    assert "\n".join(lines) in (ROOT / "docs" / "beyond-one-machine.md").read_text(encoding="utf-8")
    for row in run["rows"]:
        assert row["sent_a_step"] == row["model_a_step"], row["work"]


def test_the_page_of_definitions_shows_how_close_errors_come() -> None:
    run = found("errors")
    page = (ROOT / "docs" / "definitions.md").read_text(encoding="utf-8")
    for what in ("over_samples", "over_rows"):
        lines = runpy.run_path(str(ROOT / "benchmarks" / "errors.py"))["table"](run, what)
        assert "\n".join(lines) in page
        for column in run[what]:
            assert all(0.5 < figure["ratio"] < 2.5 for figure in column["ratios"].values()), column
