"""The shards of a bank, and the manifests that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.errors import BankError
from bnn.layout import Layout

Verify: TypeAlias = Literal["first-use", "never", "full"]


class Shard(Protocol):
    """R rows of a bank."""

    @property
    def rows(self) -> int: ...

    def tensor(self, name: str) -> Tensor:
        """All rows of one entry or column, [R, *shape]."""
        ...


@dataclass(frozen=True)
class MemoryShard:
    """Rows held as tensors."""

    rows: int
    tensors: dict[str, Tensor]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


class MappedShard:
    """Rows of one file, mapped and checked when first touched."""

    def __init__(
        self, path: Path, fact: Mapping[str, Any], layout: Layout, verify: Verify, *, columns: Sequence[str] = ()
    ) -> None:
        self.path, self.rows, self.bytes = path, fact["rows"], fact["bytes"]
        self._layout, self._columns, self._crc32 = layout, fmt.column_dtypes(columns), fact["crc32"]
        self._verify, self._checked = verify != "never", set[str]()
        self._mapped: files.MappedFile | None = None

    def tensor(self, name: str) -> Tensor:
        mapped = self._mapped or self._map()
        tensor = mapped.tensors[name]
        if self._verify and name not in self._checked:
            if mapped.crc32(name) != self._crc32.get(name):
                raise fmt.corrupt(str(self.path), f"tensor '{name}' with the crc32 of the manifest", "other bytes")
            self._checked.add(name)
        return tensor

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
        if self._mapped is not None:
            self._mapped.release()

    def _map(self) -> files.MappedFile:
        mapped = files.map_tensors(self.path, self.bytes)
        expected = {e.name: (e.dtype, (self.rows, *e.shape)) for e in self._layout.entries}
        expected |= {name: (dtype, (self.rows,)) for name, dtype in self._columns.items()}
        found = {n: (t.dtype, tuple(t.shape)) for n, t in mapped.tensors.items() if not n.startswith("@pad.")}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise fmt.corrupt(
                    str(self.path),
                    f"tensor '{name}' as {expected.get(name, 'no tensor')}",
                    f"{found.get(name, 'no tensor')}",
                )
        self._mapped = mapped
        return mapped


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of all writers in the order of their names, checked.

    Raises:
        BankCorrupt: a manifest or a file name in it is not what the format allows.
    """
    manifests = []
    for path in sorted(folder.iterdir()):
        match = fmt.MANIFEST_NAME.fullmatch(path.name)
        if not match:
            continue
        manifest: dict[str, Any] = files.read_json(path)
        fmt.check_version(manifest, str(path))
        row = 0
        try:
            for fact in manifest["shards"]:
                named = fmt.SHARD_NAME.fullmatch(fact["file"])
                legal = named is not None and named.group(1) == match.group(1) == manifest["writer"]
                legal = legal and fact["first_row"] == row and type(fact["rows"]) is int and fact["rows"] > 0
                if not (legal and type(fact["bytes"]) is int and len(fact["sha256"]) == 64 and dict(fact["crc32"])):
                    raise fmt.corrupt(str(path), f"shards in order from row {row}", repr(fact)[:200])
                row += fact["rows"]
            if manifest["rows"] != row or not isinstance(manifest["complete"], bool):
                raise fmt.corrupt(str(path), f"{row} rows", repr(manifest["rows"]))
            manifest.setdefault("info", {})
        except (KeyError, TypeError) as error:
            raise fmt.corrupt(str(path), "a manifest", f"{type(error).__name__}: {error}") from error
        manifests.append(manifest)
    return manifests


def verify_files(folder: Path) -> list[str]:
    """Compare every committed file with its sha256; one line a file that differs."""
    problems = []
    base: dict[str, Any] | None = files.read_json(folder / "bank.json").get("base")  # type: ignore[assignment]
    for manifest in [{"shards": [base] if base else [], "state": None}, *read_manifests(folder)]:
        facts = manifest["shards"] + [manifest["state"]] * (manifest["state"] is not None)
        for fact in facts:
            try:
                if files.sha256_of(folder / fact["file"]) != fact["sha256"]:
                    problems.append(f"{fact['file']}: other bytes than the manifest says")
            except BankError as error:
                problems.append(f"{fact['file']}: {error.got}")
    return problems
