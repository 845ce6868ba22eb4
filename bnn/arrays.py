"""Arrays from files that are no banks: `.npy`, `.npz`, `.safetensors` or `.csv`. Nothing in them is run."""

from __future__ import annotations

import csv
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bnn.errors import DataError


def read_array(spec: str | Path) -> np.ndarray:
    """The array that a file holds; nothing in the file is run.

    Args:
        spec: `FILE.npy`; `FILE.safetensors` or `FILE.csv` with one tensor or column, or
            `FILE.csv:NAME` to choose one of several. A `.csv` begins with a row of names.

    Raises:
        DataError: the file is missing or malformed, holds several arrays and none is named, or text
            in the place of a number.
    """
    text = str(spec)
    path, _, name = text.rpartition(":") if ":" in text and not Path(text).exists() else (text, "", "")
    suffix = Path(path).suffix
    if suffix not in _READERS:
        raise DataError(text, want=f"one of {', '.join(_READERS)}", got=suffix or "no suffix", fix="convert the file")
    if not Path(path).is_file():
        raise DataError(text, want="a file", got="none", fix="check the path")
    try:
        return _READERS[suffix](Path(path), name or None)
    except (ValueError, TypeError, MemoryError, SafetensorError, csv.Error, EOFError) as error:
        raise DataError(
            text, want=f"a {suffix} file of numbers", got=str(error)[:200], fix="mend the file, or name one array of it"
        ) from error


def read_npz(path: Path, *, fix: str) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` archive, by name; nothing in the file is run.

    Raises:
        DataError: no such archive, or one of pickled objects; `fix` says what to do.
    """
    try:
        if not zipfile.is_zipfile(path):  # of which NumPy says that it be unpickled
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(str(path), want="an .npz archive of plain arrays", got=str(error)[:200], fix=fix) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by name, padding left out.

    Raises:
        DataError: the file is missing or malformed.
    """
    if not path.is_file():
        raise DataError(str(path), want="a safetensors file", got="none", fix="check the path")
    try:
        return {name: tensor for name, tensor in load_file(path).items() if not name.startswith("@")}
    except (SafetensorError, ValueError) as error:
        raise DataError(str(path), want="a safetensors file", got=str(error)[:200], fix="check the path") from error


def tensor_facts(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (`F32`, as safetensors says it) and shape of every tensor of a safetensors file; its values are not read.

    Raises:
        DataError: the file is missing or malformed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
            return {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            str(path), want="a safetensors file", got=str(error)[:200], fix="mend it, or take it away"
        ) from error


def chosen_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, each read into memory of its own.

    Raises:
        DataError: the file is missing or malformed, or has no such tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            str(path), want="a safetensors file", got=str(error)[:200], fix="mend it, or take it away"
        ) from error


def _read_npy(path: Path, name: str | None) -> np.ndarray:
    if name is not None:
        raise ValueError(f"a .npy file has no names, but {name!r} was asked for")
    with path.open("rb") as file:  # not `np.load`, which opens archives of arrays, too
        array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _read_safetensors(path: Path, name: str | None) -> np.ndarray:
    with safe_open(path, framework="numpy") as file:
        array: np.ndarray = file.get_tensor(_choose(list(file.keys()), name))
    return array


def _read_csv(path: Path, name: str | None) -> np.ndarray:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin theirs with a mark
        rows = csv.reader(file)
        header = [column.strip() for column in next(rows, [])]
        if header and all(_is_number(column) for column in header):
            raise ValueError("its first line holds numbers, where the names of the columns belong")
        column = header.index(_choose(header, name))
        values = []
        for line, row in enumerate(rows, start=2):
            try:
                values.append(float(row[column]))
            except (ValueError, IndexError) as error:
                raise ValueError(f"line {line} has no number in column {header[column]!r}") from error
    return np.array(values, dtype=np.float64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _choose(names: list[str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name is None or name not in names:
        raise ValueError(f"it holds {', '.join(names[:10]) or 'nothing'}: name one of them as FILE:NAME")
    return name


_READERS = {".npy": _read_npy, ".safetensors": _read_safetensors, ".csv": _read_csv}
