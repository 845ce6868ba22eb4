"""Banks at an address: copies of their files in a cache folder, each checked before it takes its name there.

The cache holds one ordinary bank folder for each address and bank: `CACHE/<of the address>/<of bank.json>/`, which the
ordinary reader opens. Nothing is ever written to the address, and no file of a bank is removed, at the address or here.
Whoever fetches shares a lock of `CACHE/<of the address>/lock` meanwhile: who has it alone knows that what is half fetched
was left by a process that was killed, on whatever machine.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.address import check_address, listed, pieces, read_small, shown
from bnn.bank.manifests import Described, read_config, read_manifests
from bnn.errors import BankCorrupt, BankError, BankMismatch, BankNotFound, BankWriteError, ConfigError

STAGE_NAME = re.compile(r"(\.tmp-)?fetched-[0-9]+-[0-9]+-")  # of a copy that is being written, or compared


@dataclass(frozen=True)
class Source:
    """Where the files of an opened bank come from, and the folder of their copies. It travels with the bank by pickle."""

    address: str
    cache: Path
    folder: Path
    num_shards: int  # that stand at the address, which account for the bytes of manifests
    offline: bool

    def fetch(self, fact: Mapping[str, Any]) -> None:
        """Have a file's copy in the folder: it is there in its size, or comes now and has the sha256 that is said of it.

        Raises:
            BankMismatch: at the address stands another file now than when the bank was opened.
            BankCorrupt: it is gone, cut or altered there, or on its way.
            BankError: the address cannot be read, or must not be asked.
            BankWriteError: the cache folder does not take it.
        """
        name, size = fact["file"], fact["bytes"]
        path = self.folder / name
        if files.regular_size(path) == size:
            return
        if self.offline:
            raise BankError(
                str(path), want="its copy, for nothing is asked offline", got="none, or one of another size",
                fix="open the bank once with prefetch=True and not offline",
            )  # fmt: skip
        stage = self.folder / _stage_name(name)
        with _refusals_told(self.cache), _fetching(self.folder.parent):
            free = disk.free_bytes(self.folder)
            if free < size:
                raise OSError(errno.ENOSPC, f"{free} bytes free of {size} for {name}")
            found = files.write_atomic(stage, pieces(self.address, name, size))
            if found == (size, fact["sha256"]):
                disk.replace(stage, path)
                disk.sync_folder(self.folder)
                return
            disk.unlink(stage)
        raise self._differs(name, fact, found)

    def fetch_all(self, facts: Sequence[Mapping[str, Any]]) -> None:
        """Have the copies of many files, with a bar of their bytes."""
        with tqdm(total=sum(f["bytes"] for f in facts), desc="fetch", unit="B", unit_scale=True, delay=1.0, disable=None) as bar:  # fmt: skip
            for fact in facts:
                self.fetch(fact)
                bar.update(fact["bytes"])

    def missing(self, facts: Sequence[Mapping[str, Any]]) -> str | None:
        """The first file of which no copy is here."""
        absent = (fact["file"] for fact in facts if files.regular_size(self.folder / fact["file"]) != fact["bytes"])
        return next(absent, None)

    def update(self) -> Source:
        """The bank as it is at the address now, its manifests copied anew."""
        return self if self.offline else prepare(self.address, cache=self.cache, offline=False)

    def _differs(self, name: str, fact: Mapping[str, Any], found: tuple[int, str]) -> BankError:
        """The error for a file that is not what was said of it: it was replaced, or it is damaged."""
        want, got = f"{fact['bytes']} bytes of sha256 {fact['sha256'][:12]}", f"{found[0]} bytes"
        got = got if found[0] != fact["bytes"] else f"sha256 {found[1][:12]}"
        described = read_config(self.folder)
        is_other = _identity(described.config) != _identity(_read_config_of(self.address))
        limit = fmt.MAX_MANIFEST_BYTES + fmt.facts_limit(described.names, self.num_shards)
        if is_other or str(fact["sha256"]).encode() not in read_small(self.address, _manifest_of(name), limit):
            return BankMismatch(
                f"{shown(self.address)}/{name}", want=f"{want}, as when the bank was opened", got=f"{got}: it was replaced",
                fix="open the bank anew with Bank.open, and another cache folder",
            )  # fmt: skip
        return BankCorrupt(
            f"{shown(self.address)}/{name}",
            want=f"{want}, as its manifest says",
            got=got,
            fix="try again; where it stays so, restore the file at the address",
        )


def prepare(address: str, *, cache: str | Path | None, offline: bool) -> Source:
    """The folder of copies for the bank at an address, with `bank.json`, manifests and what the bank keeps once.

    Raises:
        ConfigError: no cache folder, no such scheme, or fsspec is not installed.
        BankNotFound: no bank there; or offline, none of it here.
        BankMismatch: a file has another content than the copies that were made of it.
        BankError, BankCorrupt, BankLimit: as of a bank that is here.
        BankWriteError: the cache folder cannot be written to.
    """
    address = address.rstrip("/")
    if cache is None:
        raise ConfigError(
            "cache",
            want="a folder for copies of the bank's files",
            got="none",
            fix="pass cache=FOLDER (--cache FOLDER)",
        )
    check_address(address)
    home = Path(cache) / hashlib.sha256(address.encode()).hexdigest()[:24]
    if offline:
        return Source(address, Path(cache), _last_opened(home, address), 0, offline)
    config = _read_config_of(address)
    names, num_shards = listed(address)
    folder = home / _identity(config)[:24]
    with _refusals_told(Path(cache)):
        disk.make_folders(folder)
    _remove_left(home, folder)
    _keep(folder, "bank.json", read_small(address, "bank.json", fmt.MAX_JSON_BYTES), Path(cache), home)
    source = Source(address, Path(cache), folder, num_shards, offline)
    described = read_config(folder)
    limit = fmt.MAX_MANIFEST_BYTES + fmt.facts_limit(described.names, num_shards)
    gone = sorted(set(_manifests_in(folder)) - set(names))
    if gone:
        raise _replaced(address, gone[0], folder)
    for name in names:
        raw = read_small(address, name, limit)
        _check_manifest(raw, f"{shown(address)}/{name}", described.identity)
        _check_unchanged(address, folder, name, raw, limit)
        _keep(folder, name, raw, Path(cache), home)
    manifests = read_manifests(folder, described, elsewhere=num_shards)
    states = [m["state"] for m in manifests if not m["rows"] and m["state"] is not None]  # all that such a bank keeps
    source.fetch_all([*described.beside, *states])
    _keep(home, "last", folder.name.encode(), Path(cache), home)
    return source


def have(
    source: Source,
    described: Described,
    manifests: Sequence[Mapping[str, Any]],
    *,
    states: bool,
    prefetch: bool,
) -> None:
    """Have now what the reader asks for now: all shards where they are wanted, and for `states` the producers' states.

    Raises:
        BankNotFound: offline, and a copy is not here; the file is named.
    """
    facts = [*described.beside, *(f for m in manifests for f in m["shards"])]
    if states:
        facts += [m["state"] for m in manifests if m["state"] is not None]
    absent = source.missing(facts) if source.offline else None
    if absent is not None:
        raise BankNotFound(
            str(source.folder),
            want="all files of the bank, to open it offline",
            got=f"no copy of {absent}",
            fix="open it once with prefetch=True, not offline",
        )
    if prefetch or states:
        source.fetch_all(facts)


def _read_config_of(address: str) -> dict[str, Any]:
    """`bank.json` at the address, as far as its format and checksum go."""
    place = f"{shown(address)}/bank.json"
    try:
        raw = read_small(address, "bank.json", fmt.MAX_JSON_BYTES)
    except BankCorrupt as error:
        raise BankNotFound(
            shown(address), want="a bank", got="no bank.json there", fix="check the address: it is that of the folder"
        ) from error
    config = fmt.parse_json(raw, place)
    fmt.check_version(config, place)
    return config


def _identity(config: Mapping[str, Any]) -> str:
    return str(config["checksum"]) if config["version"] > 1 else fmt.checksum(config)  # of version 1 it is not checked


def _check_manifest(raw: bytes, place: str, identity: str | None) -> None:
    """Raise unless these are the bytes of a whole manifest of this bank; the reader asks the rest of the copy."""
    manifest = fmt.parse_json(raw, place)
    fmt.check_version(manifest, place)
    if manifest.get("bank") != identity:
        raise BankMismatch(
            place,
            want=f"the bank {identity}",
            got=f"{manifest.get('bank')}"[:100],
            fix="try again: it is being replaced",
        )


# In the cache


def _stage_name(name: str) -> str:
    """What a copy is called until it is known to be the file."""
    return f"fetched-{os.getpid()}-{threading.get_ident()}-{name}"


@contextmanager
def _fetching(home: Path) -> Iterator[None]:
    """Files that are being fetched below `home` are nobody else's to remove."""
    try:
        descriptor = disk.open_lock(home / "lock")
    except PermissionError:  # another user's: to share it, reading is enough
        descriptor = disk.open_read(home / "lock")
    try:
        with suppress(OSError):  # a file system without locks: then none is had alone, and nothing removed
            disk.lock(descriptor, wait=True, shared=True)
        yield
    finally:
        disk.close(descriptor)


def _remove_left(home: Path, folder: Path) -> None:
    """Remove what fetches left that were killed: where nothing is being fetched, whatever is half fetched is of such."""
    with suppress(OSError):  # somebody is fetching, or the cache is read-only: another time
        left = [place / name for place in (home, folder) for name in disk.names(place) if STAGE_NAME.match(name)]
        if not left:
            return
        descriptor = disk.open_lock(home / "lock")
        try:
            disk.lock(descriptor, wait=False)
            for path in left:
                with suppress(FileNotFoundError):  # fetched in the meantime, or removed by another
                    disk.unlink(path)
        finally:
            disk.close(descriptor)


@contextmanager
def _refusals_told(cache: Path) -> Iterator[None]:
    """What the disk refuses becomes one line about the cache folder."""
    try:
        yield
    except (OSError, BankWriteError) as error:
        said = error.got if isinstance(error, BankWriteError) else error.strerror or str(error)
        raise BankWriteError(
            str(cache),
            want="a cache folder that takes files",
            got=said,
            fix="make room or get the permission, or name another with cache=",
        ) from error


def _keep(folder: Path, name: str, raw: bytes, cache: Path, home: Path) -> None:
    """Have a small file in the folder; one that has these bytes is left as it is, so that nothing need be writable."""
    path = folder / name
    if files.regular_size(path) == len(raw) and files.sha256_of(path) == hashlib.sha256(raw).hexdigest():
        return
    stage = folder / _stage_name(name)
    with _refusals_told(cache), _fetching(home):
        files.write_atomic(stage, [raw])
        disk.replace(stage, path)
        disk.sync_folder(folder)


def _manifest_of(shard: str) -> str:
    """The manifest, or bank.json, that names a file."""
    named = fmt.SHARD_NAME.fullmatch(shard) or fmt.STATE_NAME.fullmatch(shard)
    return f"manifest-{named.group(1)}.json" if named else "bank.json"


def _manifests_in(folder: Path) -> list[str]:
    return [name for name in files.names(folder) if fmt.MANIFEST_NAME.fullmatch(name)]


def _check_unchanged(address: str, folder: Path, name: str, raw: bytes, limit: int) -> None:
    """Raise BankMismatch where a manifest says something else of a shard than the copy of an older one does.

    Names of committed shards are never used again, so that then the bank was made anew under its old name, and copies of
    both would be mixed.
    """
    if files.regular_size(folder / name) is None:
        return
    old = files.read_json(folder / name, limit).get("shards")
    new = fmt.parse_json(raw, name).get("shards")
    known = {f["file"]: f["sha256"] for f in old if isinstance(f, dict)} if isinstance(old, list) else {}
    for fact in new if isinstance(new, list) else []:
        if isinstance(fact, dict) and known.get(fact.get("file"), fact.get("sha256")) != fact.get("sha256"):
            raise _replaced(address, str(fact["file"])[:100], folder)


def _replaced(address: str, name: str, folder: Path) -> BankMismatch:
    return BankMismatch(
        f"{shown(address)}/{name}",
        want="the file that copies were made of",
        got="none of that name, or another: the bank was made anew",
        fix=f"name another cache folder, or remove {folder}",
    )


def _last_opened(home: Path, address: str) -> Path:
    """The folder of copies that was opened last from an address."""
    named = home / "last"
    size = files.regular_size(named)
    if size is None or size > 100:
        raise BankNotFound(
            shown(address), want=f"copies of it in {home.parent}", got="none", fix="open it once, not offline"
        )
    descriptor, _ = files.open_regular(named)
    try:
        name = disk.read(descriptor, 100).decode(errors="replace")
    finally:
        disk.close(descriptor)
    if not re.fullmatch(r"[0-9a-f]{24}", name):
        raise fmt.corrupt(str(named), "the name of a folder of copies", repr(name))
    return home / name
