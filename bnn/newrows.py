"""New rows for a bank to predict: read batch by batch, brought into the order and units that it was fitted in."""

from __future__ import annotations

import csv
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError


class NewRows(NamedTuple):
    """Inputs [B, ...] a batch as the bank's module takes them, and how many rows there are where the file says so."""

    batches: Iterator[Tensor]
    total: int | None


def new_rows(
    path: str | Path, record: Mapping[str, Any], *, input_shape: Sequence[int], batch_size: int = 512
) -> NewRows:
    """Rows without targets from a file, streamed: memory does not grow with the file.

    Args:
        path: `FILE.csv` with a header: columns are matched by name with those of the fit, in whatever order; that
            of the target may be there, and is not looked at. Or `FILE.npz` with an array x, and perhaps y, which is not
            looked at either.
        record: what the bank keeps of its data: names of columns, mean and standard deviation of the inputs.
        input_shape: of one row, as the module was built for.
        batch_size: rows at once.

    Returns:
        float32 inputs, standardised as those of the fit. A fault in a row is met when its batch is asked for.

    Raises:
        DataError: no such file, no row, a column that is missing, unknown or no number, NaN or Inf: place and line are named.
        ConfigError: another kind of file, or a CSV file for a bank that knows no names of columns.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".npz"):
        raise ConfigError("--data", want="FILE.csv or FILE.npz", got=repr(str(path)), fix="write the rows to one")
    if not path.is_file():
        raise DataError(
            str(path), want="a file", got="none", fix="check the path, or say where paths begin with --data-root"
        )
    if path.suffix == ".csv":
        places = _places(path, record)
        return NewRows(_prepared(_csv_rows(path, places, batch_size), record, input_shape, path), None)
    total = _array_header(path)[0][0]
    return NewRows(_prepared(_npz_rows(path, batch_size), record, input_shape, path), total)


def _prepared(
    arrays: Iterator[np.ndarray], record: Mapping[str, Any], input_shape: Sequence[int], path: Path
) -> Iterator[Tensor]:
    """Float32 rows in the shape and the units of the fit."""
    inputs = record["inputs"]
    seen = 0
    for array in arrays:
        x = torch.from_numpy(np.array(array, dtype=np.float64, order="C"))
        x = x.unsqueeze(1) if x.dim() == 1 else x
        if list(x.shape[1:]) != list(input_shape):
            raise DataError(
                str(path),
                want=f"rows of shape {list(input_shape)}, as the bank was fitted to",
                got=str(list(x.shape[1:])),
                fix="bring the same columns",
            )
        bad = ~torch.isfinite(x.flatten(1)).all(dim=1)
        if bad.any():
            row = seen + int(bad.nonzero()[0])
            raise DataError(
                str(path), want="finite numbers", got=f"NaN or Inf in row {row} of x", fix="drop or impute such rows"
            )
        if inputs is not None:
            loc, scale = (torch.tensor(inputs[key], dtype=torch.float64).view(x.shape[1:]) for key in ("loc", "scale"))
            x = (x - loc) / scale
        seen += len(x)
        yield x.to(torch.float32)
    if not seen:
        raise DataError(str(path), want="at least one row", got="none", fix="check the file")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The lines of a CSV file that hold anything, with their numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(path), want="comma-separated text in UTF-8", got=str(error), fix="convert it") from error


def _places(path: Path, record: Mapping[str, Any]) -> dict[str, int]:
    """Where in a line the columns of the fit stand, by name, in the fit's order."""
    columns = record.get("columns")
    if columns is None:
        raise ConfigError(
            f"--data {path}",
            want="FILE.npz: the bank was fitted to data whose columns have no names",
            got="a CSV file",
            fix="write the rows with numpy.savez(FILE, x=...)",
        )
    _, header = next(_lines(path), (1, []))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            str(path), want="columns of different names", got=f"'{twice[0]}' twice", fix="rename one of them"
        )
    missing = [name for name in columns if name not in header]
    if missing:
        raise DataError(
            str(path),
            want=f"the columns {', '.join(columns)}, as the bank was fitted to",
            got=f"none of the name '{missing[0]}'" if header else "no header",
            fix="add it, or check the separator: it is a comma",
        )
    source, _, target = str(record["spec"]).rpartition(":")
    known = {*columns, target} if source.endswith(".csv") else set(columns)
    extra = [name for name in header if name not in known]
    if extra:
        raise DataError(
            str(path),
            want=f"no column but {', '.join(columns)}" + (f" and {target}" if source.endswith(".csv") else ""),
            got=f"'{extra[0]}'",
            fix="drop it",
        )
    return {name: header.index(name) for name in columns}


def _csv_rows(path: Path, places: Mapping[str, int], batch_size: int) -> Iterator[np.ndarray]:
    lines = _lines(path)
    _, header = next(lines)
    rows: list[list[float]] = []
    for number, line in lines:
        if len(line) != len(header):
            raise DataError(
                f"{path} line {number}", want=f"{len(header)} fields", got=str(len(line)), fix="mend the line"
            )
        rows.append([_number(path, number, name, line[place]) for name, place in places.items()])
        if len(rows) == batch_size:
            yield np.array(rows)
            rows = []
    if rows:
        yield np.array(rows)


def _number(path: Path, line: int, column: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{path} line {line}",
            want=f"a finite number in column '{column}'",
            got=repr(word)[:100],
            fix="mend the line, or drop it",
        )
    return value


def _array_header(path: Path, file: IO[bytes] | None = None) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype of x in an .npz archive; of an open member it is read past."""
    if file is None:
        with _member(path) as opened:
            return _array_header(path, opened)
    try:
        version = np.lib.format.read_magic(file)
        reads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = reads[version](file)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _no_archive(path, str(error)) from error
    if dtype.kind not in "fiub" or not shape:
        raise _no_archive(path, f"x of {dtype} {list(shape)}")
    return shape, fortran, dtype


def _npz_rows(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    with _member(path) as file:
        shape, fortran, dtype = _array_header(path, file)
        row = dtype.itemsize * math.prod(shape[1:])
        step = max(1, shape[0]) if fortran else batch_size  # columns first: rows lie all over the file
        for start in range(0, shape[0], step):
            count = min(step, shape[0] - start)
            try:
                raw = file.read(count * row)
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise _no_archive(path, str(error)) from error
            if len(raw) != count * row:
                raise _no_archive(path, f"{len(raw)} bytes of rows {start} to {start + count}")
            flat = np.frombuffer(raw, dtype)
            whole = flat.reshape(shape[::-1]).T if fortran else flat.reshape(count, *shape[1:])
            for first in range(0, count, batch_size):
                yield whole[first : first + batch_size]


def _member(path: Path) -> IO[bytes]:
    """The array x of an archive, open for reading."""
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        strange = sorted(set(names) - {"x.npy", "y.npy"})
        if "x.npy" not in names or strange:
            raise _no_archive(path, ", ".join(strange or names)[:100] or "nothing")
        with archive:  # what is open in it stays so
            return archive.open("x.npy")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise _no_archive(path, str(error)) from error


def _no_archive(path: Path, got: str) -> DataError:
    return DataError(
        str(path),
        want="an .npz archive of an array x of numbers, and perhaps y",
        got=got,
        fix="write it with numpy.savez(FILE, x=...)",
    )
