"""Arrays from files that somebody else wrote: whatever is wrong with them is a DataError that names the file."""

from __future__ import annotations

import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors

from bnn.arrays import read_array
from bnn.errors import DataError


def test_npy_keeps_its_type_and_shape(tmp_path: Path) -> None:
    for array in (np.arange(6).reshape(2, 3), np.array([0.1, np.nan]), np.zeros(0, dtype=np.float32)):
        np.save(tmp_path / "a.npy", array)
        found = read_array(tmp_path / "a.npy")
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_safetensors_by_name_or_alone(tmp_path: Path) -> None:
    save_file({"w": np.array([1.5, 2.5]), "v": np.array([7])}, tmp_path / "two.safetensors")
    save_file({"w": np.array([1.5, 2.5])}, tmp_path / "one.safetensors")
    assert read_array(f"{tmp_path}/two.safetensors:v").tolist() == [7]
    assert read_array(f"{tmp_path}/two.safetensors:w").tolist() == [1.5, 2.5]
    assert read_array(str(tmp_path / "one.safetensors")).tolist() == [1.5, 2.5]


def test_safetensors_of_types_that_numpy_lacks_are_refused(tmp_path: Path) -> None:
    save_tensors({"w": torch.tensor([1.0, 2.0], dtype=torch.float16)}, tmp_path / "half.safetensors")
    assert read_array(tmp_path / "half.safetensors").tolist() == [1.0, 2.0]
    save_tensors({"w": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, tmp_path / "brain.safetensors")
    with pytest.raises(DataError, match=r"brain\.safetensors"):
        read_array(tmp_path / "brain.safetensors")


def test_csv_by_column_or_alone(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id, weight ,"a, b"\nx,1,-2\ny,2.5e1,4\n', encoding="utf-8")
    assert read_array(f"{tmp_path}/a.csv:weight").tolist() == [1.0, 25.0]
    assert read_array(f"{tmp_path}/a.csv:a, b").tolist() == [-2.0, 4.0]
    (tmp_path / "b.csv").write_bytes(b"w\r\n1\r\n2\r\n")
    found = read_array(tmp_path / "b.csv")
    assert found.dtype == np.float64
    assert found.tolist() == [1.0, 2.0]


def test_a_colon_in_a_file_name_is_part_of_it_where_such_a_file_exists(tmp_path: Path) -> None:
    np.save(tmp_path / "run:1.npy", np.arange(3))
    assert read_array(tmp_path / "run:1.npy").tolist() == [0, 1, 2]


BAD_CSV: dict[str, tuple[bytes, str, str]] = {
    "no column named": (b"a,b\n1,2\n", "", "a, b"),
    "missing column": (b"a,b\n1,2\n", ":w", "a, b"),
    "text": (b"w\n1\nmany\n", "", "line 3"),
    "empty cell": (b"v,w\n1,1\n1,\n", ":w", "line 3"),
    "short line": (b"v,w\n1,1\n1\n", ":w", "line 3"),
    "empty": (b"", "", "nothing"),
    "not UTF-8": (b"w\n\xe9\n", "", "utf-8"),
    "NUL": (b"w\n1\n\x002\n", "", "bad.csv"),
    "endless cell": (b'w\n"' + b"1" * 200_000, "", "bad.csv"),
}


@pytest.mark.parametrize(("content", "column", "says"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv_is_refused(tmp_path: Path, content: bytes, column: str, says: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"bad.csv.*{says}"):
        read_array(f"{tmp_path}/bad.csv{column}")


class Sentinel:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_pickles_are_refused_and_not_run(tmp_path: Path) -> None:
    sentinel = Sentinel(str(tmp_path / "run"))
    np.save(tmp_path / "object.npy", np.array([sentinel, 1], dtype=object), allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(sentinel))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(sentinel))
    for name in ("object.npy", "pickle.npy", "pickle.safetensors"):
        with pytest.raises(DataError, match=name):
            read_array(tmp_path / name)
    assert not (tmp_path / "run").exists()


def test_an_archive_of_arrays_is_no_array(tmp_path: Path) -> None:
    """`numpy.load` goes by the content, and gives a mapping for it."""
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    content = (tmp_path / "a.npz").read_bytes()
    for size in (len(content), len(content) // 2, 10):
        (tmp_path / "a.npy").write_bytes(content[:size])
        with pytest.raises(DataError, match=r"a\.npy"):
            read_array(tmp_path / "a.npy")


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    for numbers in (100, 10**15):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": (numbers,)})
        (tmp_path / "a.npy").write_bytes(head.getvalue() + bytes(80))
        with pytest.raises(DataError, match=r"a\.npy"):
            read_array(tmp_path / "a.npy")


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".npy":
        np.save(whole, np.arange(5.0))
    else:
        save_file({"w": np.arange(5.0)}, whole)
    content = whole.read_bytes()
    for size in range(len(content)):
        cut.write_bytes(content[:size])
        with pytest.raises(DataError, match="cut"):
            read_array(cut)


def test_names_that_are_not_in_the_file(tmp_path: Path) -> None:
    save_file({"w": np.ones(2), "v": np.ones(2)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "a.npy", np.ones(2))
    for spec, says in [("a.safetensors", "v, w"), ("a.safetensors:u", "v, w"), ("a.npy:w", "no names")]:
        with pytest.raises(DataError, match=says):
            read_array(f"{tmp_path}/{spec}")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "a.txt").write_text("1\n")
    for name, says in [
        ("missing.npy", "want a file"),
        ("missing.csv:w", "want a file"),
        ("folder.npy", "want a file"),
        ("a.txt", ".npy, .safetensors, .csv"),
        ("bare", "no suffix"),
    ]:
        with pytest.raises(DataError, match=re.escape(says)):
            read_array(tmp_path / name)
