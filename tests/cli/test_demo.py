"""The demo, whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bnn.bank import Bank
from bnn.cli import run

pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")


def test_a_folder_with_files_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert run(["demo", "--out", str(tmp_path)]) == 2
    assert "which are kept" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo")]) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())["reports"]
    assert list(report) == ["prior", "mean-field", "hmc", "student", "plain"]
    hmc = report["hmc"]["metrics"]
    assert hmc["accuracy"]["value"] >= 0.97
    assert hmc["auroc"]["value"] >= 0.98
    for name in report:
        assert Bank.open(tmp_path / "demo" / name, verify="full").info["complete"]
    digests = [Bank.open(tmp_path / "demo" / name).digest for name in report]
    out = capsys.readouterr().out
    assert run(["demo", "--out", str(tmp_path / "demo"), "--resume"]) == 0  # all there: nothing is fitted again
    assert [Bank.open(tmp_path / "demo" / name).digest for name in report] == digests
    assert all(word in out for word in ("accuracy", "nll", "brier", "ece", "auroc", "rows/s", *report))
