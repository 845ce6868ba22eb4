"""The data sets and file formats of the command line, and what each says of bad files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bnn.data import Standardiser, held_out, load_data, load_outside
from bnn.errors import BnnError, ConfigError, DataError
from bnn.types import Batch

pytest.importorskip("sklearn", reason="scikit-learn (extra 'demo') is not installed")


def csv(folder: Path, text: str, name: str = "d.csv") -> Path:
    (folder / name).write_text(text)
    return folder


ROWS = "a,b,y\n" + "".join(f"{i},{i * i % 7},{2.5 * i}\n" for i in range(20))


def test_digits_are_images_in_the_unit_interval() -> None:
    data = load_data("digits")
    assert data.train.x.shape == (1438, 1, 8, 8)
    assert data.test.x.shape == (359, 1, 8, 8)
    assert float(data.train.x.min()) == 0.0
    assert float(data.train.x.max()) == 1.0
    assert data.num_outputs == 10
    assert data.inputs is None
    assert data.train.y.dtype == torch.int64


def test_shuffled_digits_hold_the_same_pixels_elsewhere() -> None:
    data = load_data("digits")
    outside = load_outside("digits-shuffled", data)
    assert outside.x.shape == data.test.x.shape
    assert torch.equal(outside.x.flatten(1).sort(dim=1).values, data.test.x.flatten(1).sort(dim=1).values)
    assert float((outside.x != data.test.x).float().mean()) > 0.3


def test_diabetes_is_standardised_with_its_training_rows() -> None:
    data = load_data("diabetes")
    assert data.task == "regression"
    torch.testing.assert_close(data.train.x.mean(dim=0), torch.zeros(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.y.std(correction=0), torch.tensor(1.0))
    assert float(data.test.x.mean().abs()) > 1e-4
    restored = data.train.y.double() * data.units.scale + data.units.loc
    assert 25 <= float(restored.min()) <= float(restored.max()) <= 346


def test_splits_are_seeded_disjoint_and_recorded() -> None:
    first, again, other = load_data("diabetes"), load_data("diabetes"), load_data("diabetes", split=1)
    assert torch.equal(first.test.x, again.test.x)
    assert not torch.equal(first.test.x, other.test.x)
    assert len(first.train.y) + len(first.test.y) == 442
    assert (first.record["split"], other.record["split"]) == (0, 1)
    assert first.record["sha256"] == other.record["sha256"]


def test_csv_regression_and_classes(tmp_path: Path) -> None:
    csv(tmp_path, ROWS)
    data = load_data("d.csv:y", root=tmp_path)
    assert data.task == "regression"
    assert data.input_shape == [2]
    csv(tmp_path, "size,kind\n" + "".join(f"{i},{'oak' if i % 3 else 'pine'}\n" for i in range(12)), "t.csv")
    trees = load_data("t.csv:kind", root=tmp_path)
    assert trees.task == "classification"
    assert trees.record["classes"] == ["oak", "pine"]
    csv(tmp_path, "a,c\n" + "".join(f"{i},{10 * (i % 3)}\n" for i in range(12)), "c.csv")
    assert load_data("c.csv:c", root=tmp_path).task == "regression"
    classes = load_data("c.csv:c", root=tmp_path, task="classification")
    assert classes.record["classes"] == ["0", "10", "20"]
    assert set(classes.train.y.tolist()) <= {0, 1, 2}


def test_npz_and_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).normal(size=(15, 4)), np.arange(15) % 3
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x, y=y.astype(float), x_test=x[:5], y_test=y[:5].astype(float))
    assert load_data("a.npz", root=tmp_path).task == "classification"
    brought = load_data("b.npz", root=tmp_path)
    assert brought.task == "regression"
    assert (len(brought.train.y), len(brought.test.y)) == (15, 5)
    (tmp_path / "my_rows_module.py").write_text(
        "import numpy as np\ndef rows():\n    return {'x': np.ones((9, 2)), 'y': np.arange(9) % 2}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = load_data("my_rows_module:rows")
    sys.modules.pop("my_rows_module")
    assert found.input_shape == [2]
    assert str(tmp_path) not in sys.path


def uci(folder: Path) -> Path:
    folder.mkdir()
    table = np.random.default_rng(1).normal(size=(30, 4))
    np.savetxt(folder / "data.txt", table)
    (folder / "data.txt").write_text((folder / "data.txt").read_text() + "\n")
    (folder / "index_features.txt").write_text("0\n2\n3\n")
    (folder / "index_target.txt").write_text("1\n")
    for k in range(2):
        np.savetxt(folder / f"index_train_{k}.txt", np.arange(27) + k)
        np.savetxt(folder / f"index_test_{k}.txt", (np.arange(3) + 27 + k) % 30)
    return folder


def test_uci_folders_bring_their_splits(tmp_path: Path) -> None:
    uci(tmp_path / "set")
    data = load_data("set", split=1, root=tmp_path)
    assert (len(data.train.y), len(data.test.y)) == (27, 3)
    table = np.loadtxt(tmp_path / "set" / "data.txt")
    expected = table[[28, 29, 0]][:, 1]
    np.testing.assert_allclose(
        (data.test.y * data.units.scale + data.units.loc).numpy(), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(DataError, match="a split from 0 to 1, got 7"):
        load_data("set", split=7, root=tmp_path)


REAL = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real data sets is not here")
def test_real_folders() -> None:
    yacht = load_data("uci/yacht", split=3, root=REAL)
    assert yacht.train.x.shape == (277, 6)
    assert yacht.test.x.shape == (31, 6)
    digits = load_data("mnist10k", root=REAL)
    assert digits.train.x.shape == (8000, 1, 28, 28)
    assert digits.num_outputs == 10


@pytest.mark.parametrize(
    ("spec", "text", "match"),
    [
        ("d.csv:z", ROWS, "a column 'z', got columns a, b, y"),
        ("d.csv", ROWS, "no target"),
        ("d.csv:y", "a,y\n1,2\n3\n", r"d\.csv line 3: want 2 fields, got 1"),
        ("d.csv:y", "a,y\nred,2\nblue,3\n", r"line 2: want a number in column 'a', got 'red'"),
        ("d.csv:y", "a,y\n1,2\nnan,3\n", "NaN or Inf in row 1 of x"),
        ("d.csv:y", "a,y\n1,inf\n2,3\n", "NaN or Inf in row 0 of y"),
        ("d.csv:y", "a,y\n", "a header and rows"),
        ("d.csv:y", "y\n1\n2\n", "at least one feature column"),
        ("missing.csv:y", ROWS, r"missing\.csv: want a file"),
        ("d.npz", ROWS, r"d\.npz: want a file"),
        ("digitz", ROWS, "digits, digits-shuffled, diabetes"),
        ("no.module:function", ROWS, "an importable function"),
        (".", ROWS, "a UCI folder"),
    ],
)
def test_bad_files_say_where_and_what(tmp_path: Path, spec: str, text: str, match: str) -> None:
    csv(tmp_path, text)
    with pytest.raises(BnnError, match=match):
        load_data(spec, root=tmp_path)


def test_a_target_that_is_not_numeric_is_refused_for_regression(tmp_path: Path) -> None:
    csv(tmp_path, "a,y\n1,2\n2,tall\n3,4\n")
    with pytest.raises(DataError, match=r"line 3: want a number in column 'y' for regression, got 'tall'"):
        load_data("d.csv:y", root=tmp_path, task="regression")


def test_archives_with_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", x=np.array([{"a": 1}], dtype=object), y=np.zeros(1))
    with pytest.raises(DataError, match="archive of plain arrays"):
        load_data("p.npz", root=tmp_path)
    np.savez(tmp_path / "q.npz", x=np.zeros((3, 2)))
    with pytest.raises(DataError, match="arrays x and y, got x"):
        load_data("q.npz", root=tmp_path)
    np.savez(tmp_path / "r.npz", x=np.zeros((3, 2)), y=np.array([-1, 0, 1]))
    with pytest.raises(DataError, match="classes numbered from 0"):
        load_data("r.npz", root=tmp_path)


def test_other_data_go_through_the_standardiser_of_the_fit(tmp_path: Path) -> None:
    csv(tmp_path, ROWS)
    fitted = load_data("d.csv:y", root=tmp_path)
    csv(tmp_path, "a,b,y\n100,1,7\n200,2,9\n", "new.csv")
    new = load_data("new.csv:y", root=tmp_path, fitted=fitted.record)
    assert (len(new.train.y), len(new.test.y)) == (0, 2)
    assert new.units == fitted.units
    assert fitted.inputs is not None
    expected = fitted.inputs(torch.tensor([[100.0, 1.0], [200.0, 2.0]], dtype=torch.float64)).float()
    torch.testing.assert_close(new.test.x, expected)
    same = load_data("d.csv:y", root=tmp_path, fitted=fitted.record)
    assert torch.equal(same.test.x, fitted.test.x)
    np.savez(tmp_path / "wide.npz", x=np.ones((4, 3)), y=np.arange(4.0))
    with pytest.raises(DataError, match="rows of 2 values, as the bank was fitted to"):
        load_data("wide.npz", root=tmp_path, fitted=fitted.record)


def test_classes_of_the_fit_number_those_of_other_data(tmp_path: Path) -> None:
    csv(tmp_path, "a,k\n" + "".join(f"{i},{'xyz'[i % 3]}\n" for i in range(12)))
    fitted = load_data("d.csv:k", root=tmp_path)
    csv(tmp_path, "a,k\n1,z\n2,y\n", "new.csv")
    assert load_data("new.csv:k", root=tmp_path, fitted=fitted.record).test.y.tolist() == [2, 1]
    csv(tmp_path, "a,k\n1,w\n2,y\n", "odd.csv")
    with pytest.raises(DataError, match="classes x, y, z in 'k', got 'w'"):
        load_data("odd.csv:k", root=tmp_path, fitted=fitted.record)


def test_outside_rows_must_have_the_same_shape() -> None:
    with pytest.raises(DataError, match=r"rows of shape \[1, 8, 8\], got \[10\]"):
        load_outside("diabetes", load_data("digits"))


def test_a_constant_column_keeps_its_scale() -> None:
    standardiser = Standardiser.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64))
    assert standardiser.scale.tolist() == [1.0, 1.0]
    assert standardiser(torch.tensor([[2.0, 5.0]])).tolist() == [[0.0, 0.0]]
    again = Standardiser.from_config(standardiser.to_config(), torch.zeros(2, 2))
    assert again is not None
    assert torch.equal(again.loc, standardiser.loc)


def test_an_unknown_data_set_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="check the name and the path"):
        load_data("cifar")


def test_test_rows_are_held_out_by_share_and_seed() -> None:
    data = load_data("diabetes")  # 88 test rows
    held, rest = held_out(data, share=0.25, seed=2)
    assert (len(held.y), len(rest.y)) == (22, 66)
    rows = torch.cat([held.x, rest.x])
    order = [int((data.test.x == row).all(dim=1).nonzero()[0]) for row in rows]
    assert sorted(order) == list(range(88))  # each once
    assert order != list(range(88))
    assert torch.equal(data.test.y[order], torch.cat([held.y, rest.y]))
    again, other = held_out(data, share=0.25, seed=2)[0], held_out(data, share=0.25, seed=3)[0]
    assert torch.equal(held.x, again.x)
    assert not torch.equal(held.x, other.x)
    assert [len(part.y) for part in held_out(data, share=0.001)] == [1, 87]
    with pytest.raises(ConfigError, match="share: want a number between 0 and 1"):
        held_out(data, share=1.0)
    with pytest.raises(DataError, match="at least 2 test rows"):
        held_out(data._replace(test=Batch(data.test.x[:1], data.test.y[:1])))
