"""Tables on disk, written batch by batch and whole or not at all: CSV, and Parquet where pyarrow is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from bnn.errors import ConfigError

Columns: TypeAlias = Mapping[str, np.ndarray | Sequence[str]]

GROUP_ROWS = 16_384  # of a row group of Parquet, held at once


def check_out(path: Path, *, overwrite: bool) -> None:
    """Raise an error for a file that cannot, or must not, be written, before anything is computed for it."""
    from bnn.bank.exporting import check_target

    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError("--out", want="FILE.csv or FILE.parquet", got=repr(str(path)), fix="name it so")
    if path.suffix == ".parquet":
        _pyarrow()
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}", want="a folder that is there", got=f"no {path.parent}", fix="make it first")
    check_target(path, overwrite=overwrite)


def write_table(path: Path, batches: Iterator[Columns]) -> None:
    """Write batches of columns, all of the same names, as one table.

    Raises:
        BankWriteError: the disk refused. Whatever is raised, no half of a file is left.
    """
    from bnn.bank.files import write_atomic

    write_atomic(path, _parquet(batches) if path.suffix == ".parquet" else _csv(batches))


def _csv(batches: Iterator[Columns]) -> Iterator[bytes]:
    begun = False
    for columns in batches:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not begun:
            writer.writerow(columns)
            begun = True
        writer.writerows(zip(*map(_words, columns.values()), strict=True))
        yield text.getvalue().encode()


def _words(values: np.ndarray | Sequence[str]) -> Sequence[Any]:
    if not isinstance(values, np.ndarray):
        return values
    plain: list[Any] = values.tolist()  # floats are written so that they read back as they were
    return [str(value).lower() for value in plain] if values.dtype == bool else plain


def _parquet(batches: Iterator[Columns]) -> Iterator[bytes]:
    pyarrow = _pyarrow()
    from pyarrow import parquet

    sink = _Sink()
    writer: Any = None
    waiting: list[Any] = []
    count = 0

    def write() -> None:
        nonlocal writer
        table = pyarrow.concat_tables(waiting)
        writer = writer or parquet.ParquetWriter(sink, table.schema)
        writer.write_table(table)
        waiting.clear()

    for columns in batches:
        waiting.append(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}))
        count += waiting[-1].num_rows
        if count >= GROUP_ROWS:
            write()
            count = 0
            yield sink.taken()
    if waiting:
        write()
    if writer is not None:
        writer.close()
    yield sink.taken()


class _Sink(io.RawIOBase):
    """Bytes on their way to a file."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._place = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def write(self, data: Any) -> int:
        self._waiting += data
        self._place += len(data)
        return len(data)

    def taken(self) -> bytes:
        """What was written since the last call."""
        found = bytes(self._waiting)
        self._waiting.clear()
        return found


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "--out",
            want="pyarrow, which writes Parquet",
            got="none installed",
            fix="pip install 'bnn-toolkit[parquet]', or write FILE.csv",
        ) from error
    return pyarrow
