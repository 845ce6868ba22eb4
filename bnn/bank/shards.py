"""The shards of a bank: rows in memory, or in a file that says what it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.errors import BankMismatch
from bnn.layout import Layout

LARGE_SAMPLE = 1024 * 1024  # bytes from which on it pays to read 2 MiB where a page is asked for

Verify: TypeAlias = Literal["first-use", "never", "full"]
TensorFact: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""dtype and shape of a tensor."""


class Shard(Protocol):
    """R rows of a bank."""

    @property
    def rows(self) -> int: ...

    @property
    def writer(self) -> str | None:
        """Who wrote them; None in memory."""
        ...

    def tensor(self, name: str) -> Tensor:
        """All rows of one entry or column, [R, *shape]."""
        ...

    def column(self, name: str) -> Tensor:
        """A column [R] on the CPU, without reading more than that where it can be."""
        ...

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        """All rows of entries and columns, from one reading of the shard."""
        ...


@dataclass(frozen=True)
class MemoryShard:
    """Rows held as tensors."""

    rows: int
    tensors: dict[str, Tensor]
    writer: str | None = None

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def column(self, name: str) -> Tensor:
        return self.tensors[name]

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}


class Origin(NamedTuple):
    """What the shards of one writer must say of themselves."""

    layout: Layout  # as it is stored
    columns: tuple[str, ...]
    writer: str
    bank: str | None  # the checksum of bank.json; None in banks of version 1, whose shards do not name it

    def tensors(self, rows: int) -> dict[str, TensorFact]:
        """What a shard of so many rows holds, apart from pads."""
        entries = {e.name: (e.dtype, (rows, *e.shape)) for e in self.layout.entries}
        return entries | {name: (dtype, (rows,)) for name, dtype in fmt.column_dtypes(self.columns).items()}


class MappedShard:
    """Rows of one file, mapped and checked when first touched."""

    def __init__(
        self, path: Path, fact: Mapping[str, Any], origin: Origin, verify: Verify, folder: tuple[int, int] | None
    ) -> None:
        self.path, self.rows, self.bytes, self.first_row = path, fact["rows"], fact["bytes"], fact["first_row"]
        self.writer, self.folder = origin.writer, folder
        self.origin, self.crc32 = origin, fact["crc32"]
        self.verify, self._checked = verify != "never", set[str]()
        self._mapped: files.MappedFile | None = None
        # Of a bank at an address: has the file here, before it is touched.
        self.fetch: Callable[[], object] | None = None

    def tensor(self, name: str) -> Tensor:
        mapped = self._mapped or self._map()
        if self.verify and name not in self._checked:
            self._check(mapped, name)
        return mapped.tensors[name]

    def column(self, name: str) -> Tensor:
        return self.tensor(name)

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.tensor(name) for name in names}

    def _check(self, mapped: files.MappedFile, name: str) -> None:
        self.check_crc32(name, mapped.crc32(name))
        self._checked.add(name)

    def check_crc32(self, name: str, found: int) -> None:
        """Raise BankCorrupt unless a tensor, or the header, has the checksum of the manifest."""
        if found != self.crc32.get(name):
            what = "its header" if name == fmt.HEADER else f"tensor '{name}'"
            raise fmt.corrupt(str(self.path), f"{what} with the crc32 of the manifest", "other bytes")

    def check_header(self) -> None:
        """Raise BankCorrupt unless names, shapes and dtypes are those of manifest and layout.

        The safetensors library is asked too: any tool must be able to read the shard.
        """
        if self._mapped is None:
            self._map()
        try:
            with safe_open(self.path, framework="pt") as shard:
                shard.keys()
        except SafetensorError as error:
            raise fmt.corrupt(str(self.path), "a file that safetensors opens", str(error)) from error

    def release(self) -> None:
        """Give the pages back."""
        if self._mapped is not None:
            self._mapped.release()

    def close(self) -> None:
        """Give the map and its file descriptor back, once no view looks into it; it is made again when touched."""
        self._mapped = None

    def _map(self) -> files.MappedFile:
        if self.fetch is not None:
            self.fetch()
        mapped = open_shard(self.path, self.origin, rows=self.rows, first_row=self.first_row, size=self.bytes)
        files.check_same(self.path.parent, self.folder)
        if self.verify and self.origin.bank is not None and fmt.HEADER not in self._checked:
            self._check(mapped, fmt.HEADER)
        self._mapped = mapped
        return mapped


def open_shard(path: Path, origin: Origin, *, rows: int, first_row: int, size: int | None = None) -> files.MappedFile:
    """Map a shard whose header says what it must.

    Raises:
        BankCorrupt: it is cut or altered, or its tensors are not those of layout and columns.
        BankMismatch: it belongs to another bank, writer or place.
    """
    limit, huge = fmt.header_limit(origin.tensors(rows)), origin.layout.num_bytes >= LARGE_SAMPLE
    mapped = files.map_tensors(path, size, max_header=limit, huge=huge)
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in mapped.tensors.items()}
    check_shard(path, origin, found, mapped.metadata, rows=rows, first_row=first_row)
    return mapped


def check_shard(
    path: Path,
    origin: Origin,
    found: Mapping[str, TensorFact],
    metadata: Mapping[str, str],
    *,
    rows: int,
    first_row: int,
) -> None:
    """Raise unless the header of a shard, its tensors and metadata, says what it must; see `open_shard`."""
    said = {
        "fingerprint": origin.layout.fingerprint,
        "writer": origin.writer,
        "first_row": str(first_row),
        "rows": str(rows),
    }
    if origin.bank is not None:
        said["bank"] = origin.bank
    for key, want in said.items():
        got = metadata.get(key)
        if got != want:
            raise BankMismatch(
                str(path), want=f"{key} {want}", got=f"{got}"[:100], fix="put the shard of this name and bank back"
            )
    expected = origin.tensors(rows)
    named = {name: fact for name, fact in found.items() if not name.startswith("@pad.")}
    for name in sorted(expected.keys() | named.keys()):
        if expected.get(name) != named.get(name):
            raise fmt.corrupt(
                str(path), f"tensor '{name}' as {expected.get(name, 'no tensor')}", f"{named.get(name, 'no tensor')}"
            )
