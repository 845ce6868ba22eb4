"""The shards of a bank, and the manifests that name them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.codecs import Coding, coding_of
from bnn.errors import BankError, BankLimit, BankMismatch, BankNotFound
from bnn.layout import Layout

MANIFEST_KEYS = ("writer", "generation", "complete", "rows", "shards", "state", "info")

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


class Described(NamedTuple):
    """What `bank.json` says, checked."""

    config: dict[str, Any]
    layout: Layout
    columns: tuple[str, ...]
    coding: Coding | None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors of a shard."""
        return (*self.layout.names, *fmt.column_dtypes(self.columns))

    @property
    def identity(self) -> str | None:
        """The checksum of `bank.json`, by which its files know it; None in version 1."""
        return self.config.get("checksum")

    @property
    def stored(self) -> Layout:
        """The layout of the shards: in other dtypes where samples are coded."""
        return self.layout if self.coding is None else self.coding.stored

    @property
    def beside(self) -> list[dict[str, Any]]:
        """What `bank.json` says of the files that a bank has once."""
        return [fact for fact in (self.config.get("base"), self.config.get("codec")) if fact is not None]

    def origin(self, writer: str) -> Origin:
        """What the shards of a writer must say of themselves."""
        return Origin(self.stored, self.columns, writer, self.identity)

    def base(self, folder: Path) -> dict[str, Tensor]:
        """Parameters outside the sample and buffers.

        Raises:
            BankCorrupt: `base.safetensors` is missing or altered.
        """
        fact = self.config.get("base")
        if fact is None:
            return {}
        path = folder / fact["file"]
        if files.sha256_of(path) != fact["sha256"]:
            raise fmt.corrupt(str(path), "the sha256 that bank.json names", "other bytes")
        tensors = files.map_tensors(path).tensors
        return {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith("@pad.")}


def read_config(folder: Path) -> Described:
    """Read and check `bank.json`.

    Raises:
        BankNotFound: it is not there.
        BankCorrupt: it is cut, altered or contradicts itself.
        BankError: a newer format.
    """
    path = folder / "bank.json"
    if not disk.exists(path):
        got = "a folder without bank.json" if disk.is_folder(folder) else "nothing there"
        raise BankNotFound(str(folder), want="a bank", got=got, fix="make one with bnn.fit or 'bnn fit --out'")
    config: dict[str, Any] = files.read_json(path)
    fmt.check_version(config, str(path))
    layout = _layout_of(config.get("layout"), str(path))
    if layout.fingerprint != config.get("fingerprint"):
        raise fmt.corrupt(str(path), "the fingerprint of its layout", repr(config.get("fingerprint"))[:100])
    for key in (
        "method",
        "model",
        "data",
        "prior",
        "likelihood",
        "base",
        "sampling",
        "provenance",
        "versions",
        "virtual",
    ):
        if not isinstance(config.get(key), (dict, type(None))):
            raise fmt.corrupt(str(path), f"an object or null as '{key}'", repr(config[key])[:100])
    for key, inner in (
        ("method", "name"),
        ("prior", "name"),
        ("likelihood", "name"),
        ("model", "spec"),
        ("data", "spec"),
    ):
        named, options = ((config.get(key) or {}).get(word) for word in (inner, "options"))
        if not isinstance(named, (str, type(None))) or not isinstance(options, (dict, type(None))):
            raise fmt.corrupt(
                str(path), f"a text as '{inner}' of '{key}', and an object of options", repr(config[key])[:100]
            )
    base = config.get("base")
    if base is not None and (
        base.get("file") != "base.safetensors"
        or not is_sha256(base.get("sha256"))
        or type(base.get("bytes")) is not int
    ):
        raise fmt.corrupt(str(path), "base.safetensors and its sha256 as 'base'", repr(base)[:100])
    coding = coding_of(config, layout, str(path))
    described = Described(config, layout, fmt.more_columns(config, str(path)), coding)
    if len(set(described.names)) < len(described.names):
        raise fmt.corrupt(str(path), "entries that are no columns", repr(described.names)[:200])
    return described


def _layout_of(config: Any, place: str) -> Layout:
    try:
        for name, shape, dtype in config["entries"]:
            legal = isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= 64
            legal = legal and len(name) <= fmt.MAX_NAME and not name.startswith("@pad.") and name != fmt.HEADER
            if not (legal and all(type(size) is int and 0 <= size < 2**48 for size in shape)):
                raise fmt.corrupt(place, "entries of name, shape and dtype", repr([name, shape, dtype])[:200])
        layout = Layout.from_config(config)
        if not layout.entries or len(set(layout.names)) < len(layout.names):
            raise fmt.corrupt(place, "entries with names of their own", repr(layout.names)[:200])
        if set(layout.aliases) & set(layout.names) or not set(layout.aliases.values()) <= set(layout.names):
            raise fmt.corrupt(place, "aliases of entries", repr(config["aliases"])[:200])
        return layout
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise fmt.corrupt(place, "a layout", f"{type(error).__name__}: {error}"[:200]) from error


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
    mapped = files.map_tensors(path, size, max_header=fmt.header_limit(origin.tensors(rows)))
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


def read_manifests(folder: Path, described: Described, *, elsewhere: int = 0) -> list[dict[str, Any]]:
    """The manifests of all writers in the order of their names, checked; of a bank at an address shards are elsewhere.

    Raises:
        BankCorrupt: a manifest or a file name in it is not what the format allows.
        BankMismatch: a manifest of another bank.
        BankLimit: a manifest larger than the shards that are there account for.
    """
    try:
        sizes, facts = _manifests(folder, described.names)
    except OSError as error:
        raise files.unreadable(Path(error.filename or folder), error) from error
    facts = max(facts, fmt.facts_limit(described.names, elsewhere))
    limit = fmt.MAX_MANIFEST_BYTES + facts
    if all(size <= limit for size in sizes.values()):  # a larger one is refused by its own name
        _check_together(folder, sizes, facts)
    found = [(name, fmt.MANIFEST_NAME.fullmatch(name)) for name in sizes]
    return [read_manifest(folder / name, match.group(1), described, limit) for name, match in found if match]


def check_manifest(folder: Path, name: str, size: int, names: Sequence[str]) -> None:
    """Raise BankLimit where a reader would refuse the manifests of a folder with this one of so many bytes.

    Args:
        folder: of the bank.
        name: of the manifest that is to be written.
        size: its bytes.
        names: of the tensors of a shard.
    """
    sizes, facts = _manifests(folder, names)
    _check_together(folder, sizes | {name: size}, facts)


def _manifests(folder: Path, names: Sequence[str]) -> tuple[dict[str, int], int]:
    """The bytes of each manifest that is there, and those that shards account for in them."""
    there = disk.names(folder)
    shards = [disk.regular_size(folder / name) or 0 for name in there if fmt.SHARD_NAME.fullmatch(name)]
    facts = fmt.facts_limit(names, sum(size >= fmt.DATA_ALIGNMENT for size in shards))
    manifests = [name for name in there if fmt.MANIFEST_NAME.fullmatch(name)]
    return {name: disk.regular_size(folder / name) or 0 for name in manifests}, facts


def _check_together(folder: Path, sizes: Mapping[str, int], facts: int) -> None:
    """Raise BankLimit where manifests are too many, or larger together than the shards that are there account for."""
    most = fmt.MAX_MANIFESTS_BYTES + facts
    if len(sizes) > fmt.MAX_WRITERS:
        raise BankLimit(
            str(folder),
            want=f"manifests of at most {fmt.MAX_WRITERS} writers",
            got=f"{len(sizes)}",
            fix="fill several banks and merge them",
        )
    if sum(sizes.values()) > most:
        raise BankLimit(
            str(folder),
            want=f"manifests of at most {most} bytes together",
            got=f"{sum(sizes.values())}",
            fix="get the bank from its source again, or keep less in the info of each writer's state",
        )


def read_manifest(path: Path, writer: str, described: Described, limit: int) -> dict[str, Any]:
    """One writer's manifest, checked, and of its keys those that are known; see `read_manifests`."""
    manifest: dict[str, Any] = files.read_json(path, limit)
    fmt.check_version(manifest, str(path))
    if manifest["version"] != described.config["version"] or manifest.get("bank") != described.identity:
        raise BankMismatch(
            str(path),
            want=f"the bank {described.identity}",
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
            legal = named is not None and named.group(1) == writer and is_sha256(state["sha256"])
            if not legal or type(state["bytes"]) is not int:
                raise fmt.corrupt(str(path), f"a state of {writer}", repr(state)[:200])
        info = manifest.setdefault("info", {})
        manifest = {key: manifest[key] for key in MANIFEST_KEYS}  # others may be large
        if not isinstance(info, dict) or not all(isinstance(value, (int, float)) for value in info.values()):
            raise fmt.corrupt(str(path), "numbers as info", repr(info)[:100])
        if type(manifest["generation"]) is not int:
            raise fmt.corrupt(str(path), "a whole number as generation", repr(manifest["generation"])[:100])
    except (AttributeError, KeyError, TypeError) as error:
        raise fmt.corrupt(str(path), "a manifest", f"{type(error).__name__}: {error}"[:200]) from error
    return manifest


def is_sha256(text: Any) -> bool:
    """Whether a value from a file is the hexadecimal text of a sha256."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


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
        and is_sha256(fact["sha256"])
    )


def unnamed_shards(folder: Path) -> list[str]:
    """Shards that no manifest names though their writer has one: a crash leaves some, which nothing reads."""
    manifests = {manifest["writer"]: manifest["shards"] for manifest in read_manifests(folder, read_config(folder))}
    named = {fact["file"] for shards in manifests.values() for fact in shards}
    matches = [match for match in map(fmt.SHARD_NAME.fullmatch, files.names(folder)) if match]
    return [match.group() for match in matches if match.group(1) in manifests and match.group() not in named]


def lost_shards(folder: Path) -> list[str]:
    """One line for each shard whose writer has no manifest: that is written before the first shard, so it was lost."""
    there = files.names(folder)
    shards = [match for match in map(fmt.SHARD_NAME.fullmatch, there) if match]
    there = files.names(folder)  # again: whoever has a shard had a manifest before
    writers = {match.group(1) for match in map(fmt.MANIFEST_NAME.fullmatch, there) if match}
    lost = [match for match in shards if match.group(1) not in writers]
    return [
        f"{match.group()}: manifest-{match.group(1)}.json, which named it, is gone; 'bnn bank repair' adopts it"
        for match in lost
    ]


def wrong_sizes(folder: Path) -> list[str]:
    """One line for each base, codec or state that has not the size that `bank.json` or its manifest says."""
    described = read_config(folder)
    problems = [line for fact in described.beside for line in _of_other_size(folder, fact)]
    for manifest in read_manifests(folder, described):
        state = manifest["state"]
        while state is not None and (found := _of_other_size(folder, state)):
            now = {m["writer"]: m["state"] for m in read_manifests(folder, described)}.get(manifest["writer"])
            if now == state:
                problems += found
                break
            state = now  # its writer has committed since and removed the old one
    return problems


def _of_other_size(folder: Path, fact: Mapping[str, Any]) -> list[str]:
    size = files.regular_size(folder / fact["file"])
    if size == fact["bytes"]:
        return []
    return [f"{fact['file']}: {'no regular file' if size is None else f'{size} bytes'} instead of {fact['bytes']}"]


def verify_files(folder: Path, progress: Callable[[int, int], object] | None = None) -> list[str]:
    """Compare every committed file with its sha256; one line a file that differs, or that no manifest is left to name.

    Args:
        folder: of the bank.
        progress: told after each step how many bytes are read, and how many there are.
    """
    described = read_config(folder)
    manifests = read_manifests(folder, described)
    done, total = 0, sum(fact["bytes"] for manifest in manifests for fact in manifest["shards"])

    def told(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(min(done, total), total)

    problems = _differing(folder, described.beside, told)
    for manifest in manifests:
        problems += _differing(folder, manifest["shards"], told)
        state, found = manifest["state"], list[str]()
        while state is not None and (found := _differing(folder, [state], told)):
            now = {m["writer"]: m["state"] for m in read_manifests(folder, described)}.get(manifest["writer"])
            if now == state:
                break
            state = now  # its writer has committed since and removed the old one
        problems += found
    return problems + lost_shards(folder)


def _differing(folder: Path, facts: Sequence[dict[str, Any]], told: Callable[[int], object]) -> list[str]:
    """One line for each file that is not what its fact says."""
    problems = []
    for fact in facts:
        try:
            if files.sha256_of(folder / fact["file"], told) != fact["sha256"]:
                problems.append(f"{fact['file']}: other bytes than the manifest says")
        except BankError as error:
            problems.append(f"{fact['file']}: {error.got}")
    return problems
