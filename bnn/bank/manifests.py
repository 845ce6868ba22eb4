"""What a bank says of itself: `bank.json`, and the manifests that name the shards of each writer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.codecs import Coding, coding_of
from bnn.bank.shards import Origin
from bnn.errors import BankLimit, BankMismatch, BankNotFound
from bnn.layout import Layout

MANIFEST_KEYS = ("writer", "generation", "complete", "rows", "shards", "state", "info")


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
        there = "a file" if disk.exists(folder) else "nothing there"
        got = "a folder without bank.json" if disk.is_folder(folder) else there
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
