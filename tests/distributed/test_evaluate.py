"""Evaluation on two and three ranks against one process: every figure, error, curve and row."""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from ranked import launch

HERE = Path(__file__).parent
SCRIPT = HERE / "using.py"
sys.path.insert(0, str(HERE))

import using  # noqa: E402


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: json.loads(json.dumps(using.told(make()))) for name, make in using.REPORTS.items()}


@pytest.mark.parametrize(("world_size", "meshes"), [(2, ["2x1", "1x2"]), (3, ["3x1", "1x3"]), (4, ["2x2"])])
def test_reports_are_those_of_one_process(
    world_size: int, meshes: list[str], alone: dict[str, Any], tmp_path: Path
) -> None:
    """Where batches are taken in turn to the last bit, on every rank: four batches of 29 rows, of a data set that draws too,
    and two rows in one batch. Where samples are shared to rounding: 43 of them."""
    ended = launch(world_size, "evaluations", tmp_path, *meshes, script=SCRIPT)
    assert [process.returncode for process in ended] == [0] * world_size, "".join(p.err for p in ended)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(text(each) == text(found[0]) for each in found)
    for mesh in meshes:
        if mesh.endswith("x1"):
            assert text(found[0][mesh]) == text(alone)
        else:
            assert text(found[0][mesh]) != text(alone)
            assert_close(found[0][mesh], alone)
    assert alone["classes"]["metrics"]["rhat"]["value"] > 1
    assert alone["targets"]["metrics"]["crps"]["monte_carlo_error"] > 0


def test_ranks_that_differ_and_batches_that_cannot_be_judged_are_refused_by_all() -> None:
    ended = launch(2, "refusals", script=SCRIPT)
    assert [process.returncode for process in ended] == [0, 0], ended[0].err
    said = json.loads(ended[0].out)
    assert said == json.loads(ended[1].out)
    for message, expected in zip(
        said,
        ["data.rows.digest", "options.num_bins = 5", "bank.digest", "product is 2", "NaN or Inf", "rows of shape [3]"],
        strict=True,
    ):
        assert expected in message


def text(found: Any) -> str:
    return json.dumps(found, sort_keys=True)


def assert_close(found: Any, expected: Any, place: str = "") -> None:
    """Equal but for rounding, in every number of a nesting."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for name in expected:
            assert_close(found[name], expected[name], f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{place}[{number}]")
    elif isinstance(expected, float) and not math.isnan(expected):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), place
    elif not isinstance(expected, float):
        assert found == expected, place
