"""Predictions on two and three ranks against one process, from Python and as tables; the other verbs on the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranked import launch

from bnn import cli, distributed

HERE = Path(__file__).parent
SCRIPT = HERE / "using.py"
sys.path.insert(0, str(HERE))

import using  # noqa: E402

ROWS = 1300  # three batches of 512, of which the last is short


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "1x2"), (3, "1x3"), (4, "2x2")])
def test_rows_and_samples_that_ranks_share_are_those_of_one_process(world_size: int, mesh: str, tmp_path: Path) -> None:
    """Rows alone, and under a mesh 43 samples too."""
    ended = launch(world_size, "predictions", tmp_path, mesh, script=SCRIPT)
    assert [process.returncode for process in ended] == [0] * world_size, "".join(p.err for p in ended)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(each == found[0] for each in found)
    assert "rows decide together" in found[0].pop("tolerance")
    assert "product is" in found[0].pop(f"{mesh} refused")
    shared = found[0].pop(mesh)
    assert shared["batch"]["log_probs"] != found[0]["batch"]["log_probs"]  # to the last bit
    assert_close(shared, predictives((1, 1)))
    alone = predictives(None)
    assert_close(found[0], alone)
    assert found[0]["data set"] == alone["data set"]  # whole batches: to the last bit


def predictives(mesh: tuple[int, int] | None) -> dict[str, Any]:
    """Those of one process."""
    return {name: using.plain(predictive) for name, predictive in using.of_rows(distributed.ALONE, mesh).items()}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, fields in expected.items():
        assert found[name].keys() == fields.keys()
        for field, values in fields.items():
            np.testing.assert_allclose(found[name][field], values, rtol=1e-10, atol=1e-13, err_msg=f"{name} {field}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of classes, and rows to predict."""
    found = tmp_path_factory.mktemp("tables")
    random = np.random.default_rng(0)
    a, b = random.normal(3.0, 2.0, 130).round(3), random.normal(-1.0, 0.5, 130).round(3)
    kinds = np.array(["oak", "elm", "fir"])[random.integers(3, size=130)]
    lines = [f"{i},{j},{k}\n" for i, j, k in zip(a, b, kinds, strict=True)]
    (found / "trees.csv").write_text("a,b,kind\n" + "".join(lines))
    x = random.normal(size=(ROWS, 2)).round(3)
    (found / "new.csv").write_text("b,a\n" + "".join(f"{i},{j}\n" for i, j in x))
    words = "fit --data trees.csv:kind --model mlp:4 --method prior --num-samples 7 --seed 1"
    assert cli.run([*words.split(), "--data-root", str(found), "--out", str(found / "trees")]) == 0
    return found


def test_verbs_under_ranks_leave_the_files_of_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table byte for byte, the report's figures, and a student; rank 0 speaks for all."""
    ended = launch(2, "command_lines", *lines(folder, tmp_path / "two"), script=SCRIPT)
    assert [process.returncode for process in ended] == [0, 0], "".join(p.err for p in ended)
    capsys.readouterr()
    for line in lines(folder, tmp_path / "one"):
        assert cli.run(line.split()) == 0
    told = capsys.readouterr().out.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert "1300 rows" in told
    assert without_times(ended[0].out) == without_times(told)
    assert ended[1].out == ""
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "found.csv").read_bytes() == (two / "found.csv").read_bytes()
    assert len((one / "found.csv").read_text().splitlines()) == ROWS + 1
    assert figures(one) == figures(two)
    assert (one / "student" / "curve.csv").read_text().count("\n") == 3
    assert (two / "student" / "curve.csv").read_text().count("\n") == 3


def test_samples_of_a_virtual_bank_are_made_by_each_rank(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are split, and in a second table samples: to rounding, which the table shows."""
    made = folder / "virtual"
    words = (
        "fit --data trees.csv:kind --model mlp:4 --method mean-field --num-steps 20 --num-samples 9 --seed 1 --virtual"
    )
    assert cli.run([*words.split(), "--data-root", str(folder), "--out", str(made)]) == 0

    def of(out: Path) -> list[str]:
        out.mkdir()
        bank = f"--bank {made} --data-root {folder}"
        table = f"predict {bank} --data new.csv --out {out}"
        return [f"evaluate {bank} --report {out}/report", f"{table}/rows.csv", f"{table}/samples.csv"]

    split = of(tmp_path / "two")
    ended = launch(2, "command_lines", *split[:2], f"{split[2]} --mesh 1x2", script=SCRIPT)
    assert [process.returncode for process in ended] == [0, 0], "".join(p.err for p in ended)
    for line in of(tmp_path / "one"):
        assert cli.run(line.split()) == 0
    capsys.readouterr()
    one, two = tmp_path / "one", tmp_path / "two"
    assert (one / "rows.csv").read_bytes() == (two / "rows.csv").read_bytes()
    assert figures(one) == figures(two)
    shared, whole = (np.genfromtxt(out / "samples.csv", delimiter=",", names=True, dtype=None) for out in (two, one))
    assert shared.dtype.names == whole.dtype.names
    assert len(shared) == ROWS
    for name in ("probability", "total", "aleatoric", "epistemic"):
        np.testing.assert_allclose(shared[name], whole[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_a_restart_replaces_no_file_that_was_there(folder: Path, tmp_path: Path) -> None:
    """One that the first start refused to replace: torchrun starts again whatever ended it."""
    out = tmp_path / "found.csv"
    out.write_text("mine\n")
    line = f"predict --bank {folder}/trees --data-root {folder} --data new.csv --out {out}"
    ended = launch(2, "command_lines", line, script=SCRIPT, TORCHELASTIC_RESTART_COUNT="1")
    assert all(process.returncode for process in ended)
    assert "got a file, which is kept" in ended[0].err
    assert out.read_text() == "mine\n"


def lines(folder: Path, out: Path) -> list[str]:
    out.mkdir()
    bank = f"--bank {folder}/trees --data-root {folder}"
    return [
        f"evaluate {bank} --report {out}/report",
        f"train {bank} --out {out}/student --num-epochs 2",
        f"predict {bank} --data new.csv --out {out}/found.csv",
    ]


def figures(out: Path) -> Any:
    found = json.loads((out / "report" / "report.json").read_text())
    return [bank["metrics"] for bank in found["reports"].values()]


def without_times(told: str) -> list[str]:
    return [line for line in told.splitlines() if "second" not in line]


@pytest.mark.parametrize("mesh", ["2", "1x", "ax1"])
def test_a_mesh_is_two_numbers(mesh: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["evaluate", "--bank", str(folder / "trees"), "--mesh", mesh]) == 2
    assert "DATAxSAMPLES" in capsys.readouterr().err
