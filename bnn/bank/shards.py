"""The shards of a bank, and the manifests that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.errors import BankError, BankMismatch
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


class Origin(NamedTuple):
    """What the shards of one writer must say of themselves."""

    layout: Layout
    columns: tuple[str, ...]
    writer: str
    bank: str | None  # the checksum of bank.json; None in banks of version 1, whose shards do not name it


class MappedShard:
    """Rows of one file, mapped and checked when first touched."""

    def __init__(self, path: Path, fact: Mapping[str, Any], origin: Origin, verify: Verify) -> None:
        self.path, self.rows, self.bytes, self.first_row = path, fact["rows"], fact["bytes"], fact["first_row"]
        self.sha256: str = fact["sha256"]
        self._origin, self._crc32 = origin, fact["crc32"]
        self._verify, self._checked = verify != "never", set[str]()
        self._mapped: files.MappedFile | None = None

    def tensor(self, name: str) -> Tensor:
        mapped = self._mapped or self._map()
        if self._verify and name not in self._checked:
            self._check(mapped, name)
        return mapped.tensors[name]

    def _check(self, mapped: files.MappedFile, name: str) -> None:
        if mapped.crc32(name) != self._crc32.get(name):
            what = "its header" if name == fmt.HEADER else f"tensor '{name}'"
            raise fmt.corrupt(str(self.path), f"{what} with the crc32 of the manifest", "other bytes")
        self._checked.add(name)

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
        mapped = open_shard(self.path, self._origin, rows=self.rows, first_row=self.first_row, size=self.bytes)
        if self._verify and self._origin.bank is not None and fmt.HEADER not in self._checked:
            self._check(mapped, fmt.HEADER)
        self._mapped = mapped
        return mapped


def open_shard(path: Path, origin: Origin, *, rows: int, first_row: int, size: int | None = None) -> files.MappedFile:
    """Map a shard whose header says what it must.

    Raises:
        BankCorrupt: it is cut or altered, or its tensors are not those of layout and columns.
        BankMismatch: it belongs to another bank, writer or place.
    """
    layout = origin.layout
    expected = {e.name: (e.dtype, (rows, *e.shape)) for e in layout.entries}
    expected |= {name: (dtype, (rows,)) for name, dtype in fmt.column_dtypes(origin.columns).items()}
    mapped = files.map_tensors(path, size, max_header=fmt.header_limit(expected))
    said = {"fingerprint": layout.fingerprint, "writer": origin.writer, "first_row": str(first_row), "rows": str(rows)}
    if origin.bank is not None:
        said["bank"] = origin.bank
    for key, want in said.items():
        got = mapped.metadata.get(key)
        if got != want:
            raise BankMismatch(
                str(path), want=f"{key} {want}", got=f"{got}"[:100], fix="put the shard of this name and bank back"
            )
    found = {n: (t.dtype, tuple(t.shape)) for n, t in mapped.tensors.items() if not n.startswith("@pad.")}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise fmt.corrupt(
                str(path), f"tensor '{name}' as {expected.get(name, 'no tensor')}", f"{found.get(name, 'no tensor')}"
            )
    return mapped


SHA256 = re.compile(r"[0-9a-f]{64}")


def read_manifests(folder: Path, config: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The manifests of all writers in the order of their names, checked.

    Args:
        folder: of the bank.
        config: its `bank.json`, to which manifests of version 2 belong.
        names: of the tensors of a shard.

    Raises:
        BankCorrupt: a manifest or a file name in it is not what the format allows.
        BankMismatch: a manifest of another bank.
        BankLimit: a manifest larger than the shards that are there account for.
    """
    there = disk.names(folder)
    limit = fmt.manifest_limit(names, sum(fmt.SHARD_NAME.fullmatch(name) is not None for name in there))
    manifests = []
    for name in there:
        match = fmt.MANIFEST_NAME.fullmatch(name)
        if match:
            manifests.append(read_manifest(folder / name, match.group(1), config, limit))
    return manifests


def read_manifest(path: Path, writer: str, config: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """One writer's manifest, checked; see `read_manifests`."""
    manifest: dict[str, Any] = files.read_json(path, limit)
    fmt.check_version(manifest, str(path))
    if manifest["version"] != config["version"] or manifest.get("bank") != config.get("checksum"):
        raise BankMismatch(
            str(path),
            want=f"the bank {config.get('checksum')}",
            got=f"{manifest.get('bank')}"[:100],
            fix="put the manifest of this bank back, or repair the bank",
        )
    row = 0
    try:
        for fact in manifest["shards"]:
            if not _is_fact(fact, writer, row):
                raise fmt.corrupt(str(path), f"shards in order from row {row}", repr(fact)[:200])
            row += fact["rows"]
        if manifest["rows"] != row or not isinstance(manifest["complete"], bool) or manifest["writer"] != writer:
            raise fmt.corrupt(str(path), f"{row} rows of {writer}", f"{manifest['rows']} of {manifest['writer']}"[:100])
        state = manifest["state"]
        if state is not None:
            named = fmt.STATE_NAME.fullmatch(state["file"])
            if named is None or named.group(1) != writer or not SHA256.fullmatch(state["sha256"]):
                raise fmt.corrupt(str(path), f"a state of {writer}", repr(state)[:200])
        if type(manifest["generation"]) is not int or not isinstance(manifest.setdefault("info", {}), dict):
            raise fmt.corrupt(str(path), "a generation and info", repr(manifest["generation"])[:100])
    except (KeyError, TypeError) as error:
        raise fmt.corrupt(str(path), "a manifest", f"{type(error).__name__}: {error}"[:200]) from error
    return manifest


def _is_fact(fact: Any, writer: str, row: int) -> bool:
    """Whether a manifest may say this of the shard that begins at `row`."""
    named = fmt.SHARD_NAME.fullmatch(fact["file"])
    numbers = [fact["first_row"], fact["rows"], fact["bytes"], *fact["crc32"].values()]
    return (
        named is not None
        and named.group(1) == writer
        and all(type(number) is int and 0 <= number < 2**48 for number in numbers)
        and fact["first_row"] == row
        and fact["rows"] > 0
        and SHA256.fullmatch(fact["sha256"]) is not None
    )


def verify_files(folder: Path, told: Callable[[int], object] = lambda size: None) -> list[str]:
    """Compare every committed file with its sha256; one line a file that differs.

    Args:
        folder: of the bank.
        told: gets the number of bytes of each step, for a bar.
    """
    problems = []
    config: dict[str, Any] = files.read_json(folder / "bank.json")
    base = config.get("base")
    entries = Layout.from_config(config["layout"]).names
    names = (*entries, *fmt.column_dtypes(fmt.more_columns(config, "bank.json")))
    for manifest in [{"shards": [base] if base else [], "state": None}, *read_manifests(folder, config, names)]:
        facts = manifest["shards"] + [manifest["state"]] * (manifest["state"] is not None)
        for fact in facts:
            try:
                if files.sha256_of(folder / fact["file"], told) != fact["sha256"]:
                    problems.append(f"{fact['file']}: other bytes than the manifest says")
            except BankError as error:
                problems.append(f"{fact['file']}: {error.got}")
    return problems
