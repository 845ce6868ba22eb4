"""bnn predict: tables of new rows, in the target's units and under the names of the classes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnn import cli, predict
from bnn.bank import Bank
from bnn.cli import common
from bnn.data import load_data
from bnn.functional import FunctionalModel
from bnn.posthoc import Calibration

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def bnn(call: Callable[[str], tuple[int, str, str]]) -> Run:
    """Run a command line: exit code, stdout, stderr."""
    return call


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of classes and one of a regression, each of five samples of the prior, and their tables."""
    folder = tmp_path_factory.mktemp("banks")
    random = np.random.default_rng(0)
    a, b = random.normal(3.0, 2.0, 120).round(3), random.normal(-1.0, 0.5, 120).round(3)
    kinds = np.array(["oak", "elm", "fir"])[random.integers(3, size=120)]
    y = (50 + 10 * a + random.normal(0, 5, 120)).round(3)
    (folder / "trees.csv").write_text(
        "a,b,kind\n" + "".join(f"{i},{j},{k}\n" for i, j, k in zip(a, b, kinds, strict=True))
    )
    (folder / "sizes.csv").write_text("a,b,size\n" + "".join(f"{i},{j},{k}\n" for i, j, k in zip(a, b, y, strict=True)))
    (folder / "new.csv").write_text("b,a\n" + "".join(f"{j},{i}\n" for i, j in zip(a[:7], b[:7], strict=True)))
    for name, target in (("trees", "kind"), ("sizes", "size")):
        words = (
            f"fit --data {name}.csv:{target} --data-root {folder} --model mlp:4 --method prior --num-samples 5 --seed 1"
        )
        assert cli.run([*words.split(), "--out", str(folder / name)]) == 0
    return folder


def table(path: str) -> dict[str, list[str]]:
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbers(column: list[str]) -> torch.Tensor:
    return torch.tensor([float(word) for word in column], dtype=torch.float64)


def net_of(path: Path) -> FunctionalModel:
    bank = Bank.open(path)
    return FunctionalModel(common.module_of(bank), bank).settled()


def test_classes_by_name_with_their_uncertainty(bnn: Run, banks: Path) -> None:
    code, out, err = bnn(f"predict --bank {banks}/trees --data {banks}/new.csv --out found.csv")
    assert (code, err) == (0, "")
    found = table("found.csv")
    assert list(found) == [
        "row", "predicted", "probability", "p_elm", "p_fir", "p_oak", "total", "aleatoric", "epistemic", "abstain",
    ]  # fmt: skip
    assert found["row"] == [str(row) for row in range(7)]
    assert out == f"found.csv: 7 rows, {found['abstain'].count('true')} of them to abstain on\n"
    net = net_of(banks / "trees")
    whole = load_data("trees.csv:kind", root=banks, fitted=net.bank.info["data"])
    x, fitted = torch.cat([whole.train.x, whole.test.x]), net.bank.info["data"]["inputs"]
    raw = np.genfromtxt(banks / "new.csv", delimiter=",", skip_header=1)[:, ::-1]
    rows = torch.from_numpy((raw - fitted["loc"]) / fitted["scale"]).float()
    assert all((x == row).all(dim=1).any() for row in rows)  # they are rows of the fit, standardised as there
    expected = predict(net, rows)
    names = ["elm", "fir", "oak"]
    probs = torch.stack([numbers(found[f"p_{name}"]) for name in names], dim=1)
    assert torch.equal(probs, expected.probs)  # type: ignore[union-attr]
    assert found["predicted"] == [names[one] for one in probs.argmax(dim=1)]
    assert torch.equal(numbers(found["probability"]), probs.max(dim=1).values)
    torch.testing.assert_close(numbers(found["total"]), expected.entropy)  # type: ignore[union-attr]
    torch.testing.assert_close(
        numbers(found["total"]), numbers(found["aleatoric"]) + numbers(found["epistemic"]), rtol=0, atol=0
    )
    assert found["abstain"] == ["true" if p <= 0.5 else "false" for p in probs.max(dim=1).values]
    assert bnn(f"predict --bank {banks}/trees --data {banks}/trees.csv --out all.csv")[0] == 0
    every = table("all.csv")
    assert every["abstain"] == ["true" if float(word) <= 0.5 else "false" for word in every["probability"]]
    assert {"true", "false"} == set(every["abstain"])


def test_targets_in_their_own_units(bnn: Run, banks: Path) -> None:
    code, _, err = bnn(f"predict --bank {banks}/sizes --data {banks}/sizes.csv --out found.csv --level 0.8")
    assert (code, err) == (0, "")
    found = table("found.csv")
    assert list(found) == ["row", "mean", "total", "aleatoric", "epistemic", "lower", "upper", "abstain"]
    net = net_of(banks / "sizes")
    data = load_data("sizes.csv:size", root=banks, fitted=net.bank.info["data"])
    order = np.genfromtxt(banks / "sizes.csv", delimiter=",", skip_header=1)[:, :2]
    fitted = net.bank.info["data"]["inputs"]
    rows = torch.from_numpy((order - fitted["loc"]) / fitted["scale"]).float()
    expected = predict(net, rows, loc=data.units.loc, scale=data.units.scale, quantiles=(0.1, 0.9))
    assert torch.equal(numbers(found["mean"]), expected.mean[:, 0])
    assert torch.equal(numbers(found["total"]), expected.variance[:, 0])  # type: ignore[union-attr]
    torch.testing.assert_close(numbers(found["lower"]), expected.quantiles[0.1][:, 0])
    torch.testing.assert_close(numbers(found["upper"]), expected.quantiles[0.9][:, 0])
    more = numbers(found["epistemic"]) > numbers(found["aleatoric"])
    assert found["abstain"] == ["true" if one else "false" for one in more]
    limit = float(numbers(found["total"]).median())
    code, out, _ = bnn(f"predict --bank {banks}/sizes --data {banks}/sizes.csv --out other.csv --abstain-above {limit}")
    assert code == 0
    flagged = [float(word) > limit for word in found["total"]]
    assert table("other.csv")["abstain"] == ["true" if one else "false" for one in flagged]
    assert f"120 rows, {sum(flagged)} of them" in out


def test_the_calibration_beside_the_bank_is_used_when_asked(bnn: Run, banks: Path) -> None:
    for name in ("trees", "sizes"):
        shutil.copytree(banks / name, name)
        assert bnn(f"calibrate --bank {name} --data-root {banks} --level 0.8 --share 0.75")[0] == 0
        words = f"predict --bank {name} --data {banks}/new.csv"
        assert bnn(f"{words} --out plain.csv --overwrite")[0] == 0
        assert bnn(f"{words} --out found.csv --overwrite --calibrated")[0] == 0
        plain, found = table("plain.csv"), table("found.csv")
        net = net_of(Path(name))
        calibration, record = Calibration.open(net.bank), net.bank.info["data"]  # type: ignore[arg-type]
        raw = np.genfromtxt(banks / "new.csv", delimiter=",", skip_header=1)[:, ::-1]
        rows = torch.from_numpy((raw - record["inputs"]["loc"]) / record["inputs"]["scale"]).float()
        if name == "trees":
            expected = predict(net, rows, calibration=calibration)
            assert torch.equal(numbers(found["p_elm"]), expected.probs[:, 0])  # type: ignore[union-attr]
            assert found["p_elm"] != plain["p_elm"]
            assert found["total"] == plain["total"]  # of the mixture, so that the parts add up
            sets = expected.calibrated.sets  # type: ignore[union-attr]
            for number, kind in enumerate(("elm", "fir", "oak")):
                assert [word == "true" for word in found[f"in_set_{kind}"]] == sets[:, number].tolist()
            assert [int(word) for word in found["set_size"]] == sets.sum(dim=1).tolist()
            assert [word == "true" for word in found["abstain"]] == (sets.sum(dim=1) != 1).tolist()
        else:
            units = {key: torch.tensor(record["target"][key], dtype=torch.float64) for key in ("loc", "scale")}
            interval = predict(net, rows, calibration=calibration, **units).calibrated
            assert torch.equal(numbers(found["lower"]), interval.lower[:, 0])  # type: ignore[union-attr]
            assert torch.equal(numbers(found["upper"]), interval.upper[:, 0])  # type: ignore[union-attr]
            assert found["mean"] == plain["mean"]
    code, _, err = bnn(f"predict --bank sizes --data {banks}/new.csv --out o.csv --calibrated --level 0.9")
    assert code == 2
    assert "--level: want 0.8, which the bank was calibrated for, got 0.9" in err
    assert bnn(f"predict --bank sizes --data {banks}/new.csv --out o.csv --calibrated --level 0.8")[0] == 0


def test_batches_are_written_as_they_come(bnn: Run, banks: Path) -> None:
    """More rows than a batch: numbered on, under one header."""
    lines = (banks / "new.csv").read_text().splitlines()
    Path("many.csv").write_text("\n".join([lines[0], *lines[1:] * 160]) + "\n")
    assert bnn(f"predict --bank {banks}/trees --data many.csv --out found.csv")[0] == 0
    found = table("found.csv")
    assert found["row"] == [str(row) for row in range(1120)]
    assert found["p_elm"][:7] == found["p_elm"][1113:]


def test_an_archive_and_several_targets(bnn: Run) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(60, 3)), random.normal(size=(60, 2)) * [1.0, 100.0]
    np.savez("two.npz", x=x, y=y)
    np.savez("kinds.npz", x=x, y=random.integers(3, size=60))
    for name in ("two", "kinds"):
        assert bnn(f"fit --data {name}.npz --model mlp:4 --method prior --num-samples 5 --out {name}")[0] == 0
        np.savez("new.npz", x=x[:9])
        assert bnn(f"predict --bank {name} --data new.npz --out {name}.csv")[0] == 0
    found = table("two.csv")
    assert [one for one in found if one.endswith("_1")] == [
        "mean_1", "total_1", "aleatoric_1", "epistemic_1", "lower_1", "upper_1",
    ]  # fmt: skip
    assert len(found["row"]) == 9
    assert float(np.median(numbers(found["total_1"]) / numbers(found["total_0"]))) > 1000
    assert list(table("kinds.csv"))[3:6] == ["p_0", "p_1", "p_2"]


def test_parquet_holds_the_same_table(bnn: Run, banks: Path, oracle: Any) -> None:
    parquet = oracle("pyarrow.parquet")
    words = f"predict --bank {banks}/trees --data {banks}/trees.csv"
    assert bnn(f"{words} --out found.csv")[0] == 0
    assert bnn(f"{words} --out found.parquet")[0] == 0
    plain, found = table("found.csv"), parquet.read_table("found.parquet")
    assert found.column_names == list(plain)
    assert found["predicted"].to_pylist() == plain["predicted"]
    assert found["p_oak"].to_pylist() == numbers(plain["p_oak"]).tolist()
    assert found["abstain"].to_pylist() == [word == "true" for word in plain["abstain"]]
    assert found["row"].to_pylist() == list(range(120))


def test_without_pyarrow_parquet_is_refused_before_anything_is_computed(
    bnn: Run, banks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)  # what an import of it then raises is ImportError
    code, _, err = bnn(f"predict --bank {banks}/trees --data none.csv --out found.parquet")
    assert code == 2
    assert "pip install 'bnn-toolkit[parquet]'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trees --data {0}/sizes.csv --out o.csv", "want no column but a, b and kind, got 'size'"),
        ("trees --data late.csv --out o.csv", "late.csv line 604: want a finite number in column 'b', got 'tall'"),
        ("trees --data {0}/new.csv --out o.txt", "--out: want FILE.csv or FILE.parquet"),
        ("trees --data {0}/new.csv --out no/o.csv", "want a folder that is there"),
        ("trees --data {0}/new.csv --out there.csv", "there.csv: want nothing there, got a file, which is kept"),
        ("trees --data {0}/new.csv --out o.csv --calibrated", "want calibration.json beside it, got none"),
        ("trees --data {0}/new.csv --out o.csv --calibrated --base b", "got --base b"),
        ("trees --data {0}/new.csv --out o.csv --level 0.9", "want --calibrated beside it, for sets of classes"),
        ("sizes --data {0}/new.csv --out o.csv --level 90", "--level: want a number between 0 and 1"),
        ("sizes --data {0}/new.csv --out o.csv --prior-shift", "--prior-shift: want a bank fitted with --balance"),
        ("sizes --data {0}/new.csv --out o.csv --abstain-above nan", "--abstain-above: want a number"),
        ("sizes --data {0}/new.csv:kind --out o.csv", "want FILE.csv or FILE.npz"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(bnn: Run, banks: Path, words: str, message: str) -> None:
    Path("late.csv").write_text("a,b\n" + "1,2\n" * 602 + "3,tall\n")
    Path("there.csv").write_text("kept")
    before = sorted(Path().iterdir())
    code, out, err = bnn(f"predict --bank {banks}/" + words.format(banks))
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    assert Path("there.csv").read_text() == "kept"


def test_calibrating_splits_the_test_rows_and_says_so(bnn: Run, banks: Path) -> None:
    shutil.copytree(banks / "trees", "trees")
    words = f"calibrate --bank trees --data-root {banks} --level 0.8 --sets aps --seed 3"
    code, out, err = bnn(words)
    assert (code, err) == (0, "")
    assert "12 of 24 test rows, seed 3" in out
    assert "on the other 12 test rows" in out
    kept = json.loads(Path("trees/calibration.json").read_text())
    record = Bank.open("trees").info["data"]
    assert kept["data"] == {
        "spec": "trees.csv:kind", "split": 0, "sha256": record["sha256"], "part": "test", "share": 0.5, "seed": 3, "of": 24,
    }  # fmt: skip
    assert (kept["num_rows"], kept["level"], kept["score"]) == (12, 0.8, "aps")
    code, _, err = bnn(words)
    assert code == 2
    assert "a calibration, which is kept; say --overwrite" in err
    assert bnn(f"{words} --overwrite --level 0.7")[0] == 0
    assert json.loads(Path("trees/calibration.json").read_text())["level"] == 0.7
    assert bnn("bank verify trees --full")[0] == 0
    code, _, err = bnn(f"calibrate --bank {banks}/trees --data-root {banks} --level 0.99")
    assert code == 2
    assert "held-out rows: want at least 99 for a level of 0.99, got 12" in err
    assert not (banks / "trees" / "calibration.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sets raps", "--sets: want one of lac, aps"),
        ("--level 2", "want a number between 0 and 1"),
        ("--share 1", "share: want a number between 0 and 1"),
    ],
)
def test_bad_flags_of_calibrate_get_one_line(bnn: Run, banks: Path, words: str, message: str) -> None:
    code, out, err = bnn(f"calibrate --bank {banks}/trees --data-root {banks} {words}")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (banks / "trees" / "calibration.json").exists()
