"""New rows for a bank: columns by name, units of the fit, batch after batch, and one line for what is wrong."""

from __future__ import annotations

import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnn.errors import BnnError, ConfigError, DataError
from bnn.newrows import new_rows

RECORD = {
    "spec": "fit.csv:y",
    "columns": ["a", "b", "c"],
    "inputs": {"loc": [1.0, 0.0, -2.0], "scale": [2.0, 1.0, 0.5]},
}
UNNAMED = {"spec": "fit.npz", "columns": None, "inputs": None}


def read(path: Path, record: dict[str, Any] = RECORD, *, shape: tuple[int, ...] = (3,), size: int = 4) -> torch.Tensor:
    batches = list(new_rows(path, record, input_shape=shape, batch_size=size).batches)
    assert all(len(batch) == size for batch in batches[:-1])
    return torch.cat(batches)


def values(rows: int = 11) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 3)).round(3)


def standardised(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((x - [1.0, 0.0, -2.0]) / [2.0, 1.0, 0.5]).float()


def write_csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text(header + "\n" + "\n".join(rows) + "\n")
    return path


def test_columns_are_matched_by_name_and_the_target_is_not_looked_at(tmp_path: Path) -> None:
    x = values()
    plain = write_csv(tmp_path / "plain.csv", "a,b,c", [f"{a},{b},{c}" for a, b, c in x])
    assert torch.equal(read(plain), standardised(x))
    moved = write_csv(tmp_path / "moved.csv", "c,y,a,b", [f"{c},?,{a},{b}" for a, b, c in x])
    assert torch.equal(read(moved), standardised(x))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert torch.equal(read(tmp_path / "bom.csv"), standardised(x))


def test_archives_of_either_order_and_any_numbers(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(11, 2, 3))
    for name, array in {
        "plain": x, "fortran": np.asfortranarray(x), "float32": x.astype(np.float32), "whole": (9 * x).astype(np.int16),
    }.items():  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", x=array, y=np.ones(11))
        np.savez_compressed(tmp_path / f"{name}-small.npz", x=array)
        for path in (tmp_path / f"{name}.npz", tmp_path / f"{name}-small.npz"):
            assert torch.equal(read(path, UNNAMED, shape=(2, 3)), torch.from_numpy(array.astype(np.float32)))
            assert new_rows(path, UNNAMED, input_shape=(2, 3)).total == 11
    np.savez(tmp_path / "line.npz", x=x[:, 0, 0])
    assert read(tmp_path / "line.npz", UNNAMED, shape=(1,)).shape == (11, 1)
    np.savez(tmp_path / "named.npz", x=values())
    assert torch.equal(read(tmp_path / "named.npz"), standardised(values()))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "want the columns a, b, c, as the bank was fitted to, got none of the name 'c'"),
        ("", "got no header"),
        ("a,b,c,d\n1,2,3,4\n", "want no column but a, b, c and y, got 'd'; drop it"),
        ("a,b,c,a\n1,2,3,4\n", "'a' twice"),
        ("a;b;c\n1;2;3\n", "check the separator"),
        ("a,b,c\n", "want at least one row"),
        ("a,b,c\n1,2,3\n1,2\n", "line 3: want 3 fields, got 2"),
        ("a,b,c\n1,2,3\n\n1,tall,3\n", "line 4: want a finite number in column 'b', got 'tall'"),
        ("a,b,c\n1,2,nan\n", "line 2: want a finite number in column 'c', got 'nan'"),
        ("a,b,c\n1,,3\n", "line 2: want a finite number in column 'b', got ''"),
    ],
)
def test_what_is_wrong_with_a_table_gets_one_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        read(tmp_path / "d.csv")
    assert "\n" not in str(caught.value)


def broken(folder: Path, name: str) -> Path:
    """An archive that is wrong in one way."""
    path, x = folder / f"{name}.npz", np.ones((5, 3))
    arrays: dict[str, Callable[[], Any]] = {
        "other": lambda: np.savez(path, z=x),
        "test": lambda: np.savez(path, x=x, x_test=x),
        "objects": lambda: np.savez(path, x=np.array([{}, 1], dtype=object)),
        "words": lambda: np.savez(path, x=np.array(["a", "b"])),
        "scalar": lambda: np.savez(path, x=np.float64(3)),
        "shape": lambda: np.savez(path, x=np.ones((5, 4))),
        "nan": lambda: np.savez(path, x=np.where(np.arange(15).reshape(5, 3) == 13, np.nan, x)),
        "none": lambda: np.savez(path, x=x[:0]),
        "text": lambda: path.write_text("no archive"),
    }
    if name in arrays:
        arrays[name]()
        return path
    with zipfile.ZipFile(path, "w") as archive:  # cut: fewer bytes than the header says
        np.savez(folder / "whole.npz", x=x)
        archive.writestr("x.npy", zipfile.ZipFile(folder / "whole.npz").read("x.npy")[:-8])
    return path


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("other", "want an .npz archive of an array x of numbers, and perhaps y, got z.npy"),
        ("test", "got x_test.npy"),
        ("objects", "got x of object"),
        ("words", "got x of <U1"),
        ("scalar", r"got x of float64 \[\]"),
        ("shape", r"want rows of shape \[3\], as the bank was fitted to, got \[4\]"),
        ("nan", "NaN or Inf in row 4 of x"),
        ("none", "want at least one row"),
        ("text", "want an .npz archive"),
        ("cut", "want an .npz archive"),
    ],
)
def test_what_is_wrong_with_an_archive_gets_one_line(tmp_path: Path, name: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        read(broken(tmp_path, name))


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "d.csv", "a,b,c", ["1,2,3"])
    cases: list[tuple[str, dict[str, Any], type[BnnError], str]] = [
        ("d.csv", UNNAMED, ConfigError, "want FILE.npz: the bank was fitted to data whose columns have no names"),
        ("d.txt", RECORD, ConfigError, "want FILE.csv or FILE.npz"),
        ("none.csv", RECORD, DataError, "want a file, got none"),
    ]
    for name, record, kind, match in cases:
        with pytest.raises(kind, match=match):
            read(tmp_path / name, record)
    (tmp_path / "latin.csv").write_bytes("a,b,c\n1,2,ß\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read(tmp_path / "latin.csv")


@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    peaks = []
    for rows in (2_000, 40_000):
        path = tmp_path / f"{rows}.{suffix}"
        if suffix == "npz":
            np.savez(path, x=np.ones((rows, 3)))
        else:
            write_csv(path, "a,b,c", ["1.5,2.5,3.5"] * rows)
        tracemalloc.start()
        seen = sum(len(batch) for batch in new_rows(path, RECORD, input_shape=(3,), batch_size=100).batches)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == rows
    assert peaks[1] < 1.5 * peaks[0] + 50_000  # the file itself has 20 times as much
