"""One writer's part of a bank on disk: claimed, begun or taken up, committed to, given up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from bnn.bank import codecs, disk, files
from bnn.bank import format as fmt
from bnn.bank.codecs import Codec
from bnn.bank.manifests import check_manifest, read_config, read_manifests
from bnn.errors import (
    BankCorrupt,
    BankError,
    BankExists,
    BankLimit,
    BankLocked,
    BankMismatch,
    BankNotFound,
    ConfigError,
)
from bnn.layout import Layout
from bnn.types import State

MOST_FILES = 10**6  # shards of a writer, and states: their numbers have six digits


def shard_metadata(layout: Layout, identity: str, writer: str, first_row: int, rows: int) -> dict[str, str]:
    """What the header of a shard says of its rows, and of the bank that they belong to."""
    return {
        "bnn_version": str(fmt.VERSION),
        "bank": identity,
        "fingerprint": layout.fingerprint,
        "writer": writer,
        "first_row": str(first_row),
        "rows": str(rows),
    }


class Part:
    """The files of one writer of a bank, and its claim to write them; see `BankWriter` for arguments and errors.

    Nothing of an existing bank is touched before the first shard or commit. Errors of the disk are the operating
    system's own where a file is not written whole or not at all.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        config: Mapping[str, Any],
        base: Mapping[str, Tensor],
        writer: str,
        *,
        resume: bool,
        overwrite: bool,
        codec: Codec | None = None,
    ) -> None:
        if not fmt.WRITER_NAME.fullmatch(writer):
            raise ConfigError("writer", want="1 to 32 small letters, digits or '_'", got=repr(writer), fix="rename it")
        self.path, self.layout, self.writer, self._codec = path, layout, writer, codec
        self.columns = fmt.more_columns(config, "bank.json")
        self._config = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "requires": [*(["codec"] if codec else []), *(["columns"] if self.columns else [])],
            "layout": layout.to_config(),
            "fingerprint": layout.fingerprint,
            **config,
        }
        self._base = {name: tensor.detach().cpu().contiguous() for name, tensor in base.items()}
        self._resume, self._overwrite = resume, overwrite
        self._check_place()
        self._check_base()
        self.shards: tuple[dict[str, Any], ...] = ()  # that the last commit names
        self.state: State | None = None  # that follows them
        self.complete = False  # whether the part that was taken up had been marked so
        self.committed_at = time.monotonic()
        self._generation = self._next_number = self._next_state = 0
        self._started = False
        self._announced = False  # whether its manifest is there
        self._made = _missing_folders(path)
        self._fresh = bool(self._made)  # whether what stands in the folder is this writer's own
        self._identity = ""  # of the bank: the checksum of its bank.json
        disk.make_folders(path)
        for folder in self._made:  # else power loss could take folder and rows with it
            disk.sync_folder(folder.parent)
        self.locks = [files.Lock(path, writer)]
        try:
            if overwrite:  # nobody else may be writing what is to go
                self._lock_others()
            if self._resume or (not overwrite and self._may_join()):
                self._restore()
        except BaseException:
            self.release()
            raise

    @property
    def is_ours(self) -> bool:
        """Whether this process claimed it, and not one that this is a fork of."""
        return self.locks[0].is_ours

    def check(self) -> None:
        """Raise BankLocked after the claim was given up, and in a fork of the process that has it."""
        self.locks[0].check()

    def begin(self) -> None:
        """The bank, and in it a manifest of this writer, before its first file: one that is missing later was lost."""
        if not self._started:
            self._start()
        if not self._announced:
            self._write_manifest(0, (), None, {}, complete=False)

    def write_shard(
        self,
        before: tuple[dict[str, Any], ...],
        image: files.Image,
        rows: int,
        crc32: Mapping[str, int] | None = None,
    ) -> dict[str, Any]:
        """Write the rows of an image as a shard; it counts once a manifest names it. `crc32` as of `files.write_tensors`."""
        self.begin()
        name, first_row = f"{self.writer}-{self._next_number:06d}.safetensors", num_rows(before)
        if self._next_number >= MOST_FILES:
            raise BankLimit(
                str(self.path / name),
                want=f"at most {MOST_FILES} shards of a writer",
                got="more",
                fix="go on under another writer name, and 'bnn bank thin --every 1' makes few of many",
            )
        self._next_number += 1  # before the file is there: a number left out is harmless, one used twice is not
        metadata = shard_metadata(self.layout, self._identity, self.writer, first_row, rows)
        tensors = {key: tensor[:rows] for key, tensor in image.tensors.items()}
        full = image if all(len(tensor) == rows for tensor in image.tensors.values()) else None
        written = files.write_tensors(self.path / name, tensors, metadata, sealed=True, image=full, crc32=crc32)
        return {"file": name, "first_row": first_row, "rows": rows, **written._asdict()}

    def commit(self, shards: tuple[dict[str, Any], ...], state: State | None, *, complete: bool) -> None:
        """Write the state that follows these shards, and the manifest that names both."""
        old_states = self._state_files()
        fact = None if state is None else self._write_state(state, num_rows(shards))
        info = {} if state is None else state.get("info", {})
        self._write_manifest(self._generation + 1, shards, fact, info, complete=complete)
        self._generation += 1
        self.shards, self.state = shards, state
        for old in old_states:  # the manifest no longer names them
            self._remove(old)
        self.committed_at = time.monotonic()

    def release(self) -> None:
        """Give the name free: what was committed stays, a folder made for nothing goes."""
        try:
            if self.is_ours and self._made and not self._started and disk.names(self.path) == [self.locks[0].path.name]:
                disk.unlink(self.locks[0].path)
                with suppress(OSError):  # somebody has put something beside it
                    for folder in self._made:
                        disk.remove_folder(folder)
        finally:
            for lock in self.locks:
                lock.close()

    def remove(self, *, rows: bool) -> None:
        """Take the bank away where it is this writer's alone, and without committed rows, or with them too."""
        if self._fresh and self._started and (self._has_all() if rows else not self.shards and self._is_alone()):
            self._remove_bank()
            self._started = False

    def _check_place(self) -> None:
        place = str(self.path)
        if disk.exists(self.path) and not disk.is_folder(self.path):
            raise BankExists(place, want="a folder or nothing", got="a file", fix="choose another name")
        is_bank = disk.exists(self.path / "bank.json")
        there = disk.names(self.path) if disk.is_folder(self.path) else []
        is_bank = is_bank or disk.exists(self.path / "bank.json")  # which another writer may have begun just now
        goes = self._overwrite or is_bank or REMOVED in there
        foreign = not all(_is_own(name) if goes else _is_left_over(name, there) for name in there)
        if self._resume and self._overwrite:
            raise ConfigError(place, want="resume or overwrite", got="both", fix="say one of them")
        if self._resume and not is_bank and not foreign and self._was_begun():
            self._resume = False  # killed before its first commit: there is nothing to take up, and nothing to lose
        if self._resume and not is_bank:
            raise BankNotFound(place, want="a bank to go on with", got="none", fix="leave resume out to start one")
        if not self._resume and is_bank and not self._overwrite and not self._may_join():
            raise BankExists(
                place,
                want="a new folder",
                got="a bank, which is kept",
                fix="go on with resume, replace it with overwrite, or choose another name",
            )
        if not is_bank and foreign:
            raise BankExists(
                place,
                want="a new or empty folder",
                got="one with other files, which are kept",
                fix="choose another name; where a bank lost its bank.json, restore that",
            )

    def _check_base(self) -> None:
        for name in self.layout.names:
            if len(name) > fmt.MAX_NAME:
                raise BankLimit(
                    f"entry '{name[:60]}...'",
                    want=f"a name of at most {fmt.MAX_NAME} characters",
                    got=f"{len(name)}",
                    fix="rename the parameter",
                )
        for name, tensor in self._base.items():
            if tensor.dtype not in fmt.DTYPE_CODES:
                raise BankError(
                    f"buffer or parameter '{name}'",
                    want=f"one of {', '.join(str(dtype).removeprefix('torch.') for dtype in fmt.DTYPE_CODES)}",
                    got=str(tensor.dtype),
                    fix="register the buffer with persistent=False, or keep it as real numbers",
                )

    def _was_begun(self) -> bool:
        """Whether a lock tells of a writer that was here, in a folder without a bank."""
        there = disk.names(self.path) if disk.is_folder(self.path) else []
        return any(fmt.LOCK_NAME.fullmatch(name) for name in there)

    def _may_join(self) -> bool:
        """Whether a bank stands there that this writer, of a name of its own, has no part in yet."""
        there = set(disk.names(self.path)) if disk.is_folder(self.path) else set[str]()
        return self.writer != "main" and "bank.json" in there and f"manifest-{self.writer}.json" not in there

    def _lock_others(self) -> None:
        held = {lock.path.name for lock in self.locks}
        for match in map(fmt.LOCK_NAME.fullmatch, disk.names(self.path)):
            if match and match.group() not in held:
                self.locks.append(files.Lock(self.path, match.group(1)))

    def _has_all(self) -> bool:
        """Claim the names of all writers, where nobody has one."""
        try:
            self._lock_others()
        except BankLocked:
            return False
        return True

    def _is_alone(self) -> bool:
        """Whether no other writer has a part in the bank or is about to."""
        if not self._has_all():
            return False
        others = {_writer_of(name) for name in disk.names(self.path)} - {self.writer, None}
        return not others

    def _start(self) -> None:
        """Write what a bank has once; a bank that is to be overwritten goes now, not before.

        Under a lock of the folder, so that of several writers one begins the bank and the others join it.
        """
        descriptor = disk.open_folder(self.path)
        try:
            disk.lock(descriptor, wait=True)
            if not self._is_begun():
                self._check_place()  # again: another writer may have begun a bank here
                if not self._overwrite and self._may_join():
                    self._restore()
                    return
                if self._overwrite:
                    self._lock_others()  # again: others may have joined the bank that is to go
                self._remove_bank()
            self._fresh = True
            fact = None
            if self._base:
                written = files.write_tensors(self.path / "base.safetensors", self._base, {})
                fact = {"file": "base.safetensors", "bytes": written.bytes, "sha256": written.sha256}
            if self._codec is not None:
                self._codec.write(self.path)
            config = fmt.seal({**self._config, "base": fact}, "bank.json")
            raw = fmt.dump_json(config, "bank.json")
            if len(raw) > fmt.MAX_JSON_BYTES:
                raise BankLimit(
                    "bank.json",
                    want=f"at most {fmt.MAX_JSON_BYTES} bytes",
                    got=f"{len(raw)}",
                    fix="make fewer parameters Bayesian, or record less",
                )
            self._identity = config["checksum"]
            files.write_atomic(self.path / "bank.json", [raw])
            self._started = True
        finally:
            disk.close(descriptor)

    def _write_manifest(
        self,
        generation: int,
        shards: Sequence[dict[str, Any]],
        state: dict[str, Any] | None,
        info: dict[str, Any],
        *,
        complete: bool,
    ) -> None:
        name = f"manifest-{self.writer}.json"
        manifest = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "bank": self._identity,
            "writer": self.writer,
            "generation": generation,
            "complete": complete,
            "rows": num_rows(shards),
            "shards": list(shards),
            "state": state,
            "info": info,
        }
        if len(fmt.dump_json(info, name)) > fmt.MAX_INFO_BYTES:
            raise BankLimit(
                name, want=f"info of at most {fmt.MAX_INFO_BYTES} bytes", got="more", fix="keep it in the state"
            )
        raw = fmt.dump_json(fmt.seal(manifest, name), name)
        check_manifest(self.path, name, len(raw), (*self.layout.names, *fmt.column_dtypes(self.columns)))
        files.write_atomic(self.path / name, [raw])
        self._announced = True

    def _is_begun(self) -> bool:
        """Whether this writer's `bank.json` is there, though the disk failed before that was sure."""
        path = self.path / "bank.json"
        return bool(self._identity) and disk.exists(path) and files.read_json(path).get("checksum") == self._identity

    def _remove_bank(self) -> None:
        """`bank.json` first and for good: killed in between, no bank is left, and never one with some of its rows."""
        if disk.exists(self.path / "bank.json"):
            disk.replace(self.path / "bank.json", self.path / REMOVED)  # tells a removal from a loss
            disk.sync_folder(self.path)
        names = [name for name in disk.names(self.path) if _is_own(name) and not fmt.LOCK_NAME.fullmatch(name)]
        for name in names:
            if name != REMOVED:
                self._remove(self.path / name)
        if REMOVED in names:
            disk.sync_folder(self.path)  # what it tells of is gone for good: else its rest would pass for a loss
            self._remove(self.path / REMOVED)  # the sync of the first commit covers it

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            disk.unlink(path)

    def _restore(self) -> None:
        """Take up the bank that is there: what this writer committed, or nothing where it joins."""
        place, described = self.path / "bank.json", read_config(self.path)
        kept = described.config
        if kept["version"] != fmt.VERSION:
            raise BankError(
                str(place),
                want=f"format version {fmt.VERSION} to go on with",
                got=f"version {kept['version']}, which is only read",
                fix="finish it with the bnn-toolkit that began it",
            )
        config = fmt.seal(self._config, "bank.json")
        for key in sorted((kept.keys() | config.keys()) - {"versions", "base", "checksum"}):
            if kept.get(key) != config.get(key):
                raise BankMismatch(
                    str(place),
                    want=f"{key} = {kept.get(key)}",
                    got=f"{config.get(key)}",
                    fix="resume with the options that the bank was begun with",
                )
        kept_base: Any = kept.get("base") or {}
        if kept_base.get("sha256") != files.tensors_sha256(self._base):
            raise BankMismatch(
                str(place),
                want="the parameters outside the sample and the buffers that the bank keeps",
                got="others",
                fix="resume with the module that the bank was begun with, in the same state",
            )
        for name in disk.names(self.path):
            temporary = files.TEMPORARY_NAME.fullmatch(name)
            of_own = temporary is not None and _writer_of(temporary.group(1)) == self.writer
            if of_own or name == REMOVED:  # of a writer that was killed, or lost power, before its first commit
                self._remove(self.path / name)
        manifests = {m["writer"]: m for m in read_manifests(self.path, described)}
        if self.writer in manifests:
            manifest = manifests[self.writer]
            self._generation, self.complete = manifest["generation"], manifest["complete"]
            if manifest["state"] is not None:
                self.state = self._read_state(manifest["state"])
            self.shards = tuple(manifest["shards"])
            self._announced = True
        else:
            self._check_lost()
        self._identity, self._started = kept["checksum"], True
        for name in disk.names(self.path):  # names are never used twice, not even those of orphans
            for pattern, attribute in ((fmt.SHARD_NAME, "_next_number"), (fmt.STATE_NAME, "_next_state")):
                match = pattern.fullmatch(name)
                if match and match.group(1) == self.writer:
                    setattr(self, attribute, max(getattr(self, attribute), int(match.group(2)) + 1))

    def _check_lost(self) -> None:
        """Raise BankCorrupt where rows or a state of this writer lie there, and no manifest that names them."""
        found = [name for name in disk.names(self.path) if _writer_of(name) == self.writer]
        if found:
            raise BankCorrupt(
                str(self.path / f"manifest-{self.writer}.json"),
                want=f"the manifest that was there before {found[0]}",
                got="none",
                fix="put it back, keep the rows with 'bnn bank repair', or begin anew with overwrite",
            )

    def _read_state(self, fact: dict[str, Any]) -> State:
        path = self.path / fact["file"]
        if not fmt.STATE_NAME.fullmatch(fact["file"]) or files.sha256_of(path) != fact["sha256"]:
            raise BankCorrupt(
                str(path),
                want="the state that the manifest names",
                got="another one",
                fix="restore the file; the rows of the bank are not affected",
            )
        mapped = files.map_tensors(path, fact["bytes"])
        tensors = {name: tensor.clone() for name, tensor in mapped.tensors.items()}
        return fmt.decode_state(tensors, mapped.metadata, str(path))

    def _state_files(self) -> list[Path]:
        found = [(self.path / name, fmt.STATE_NAME.fullmatch(name)) for name in disk.names(self.path)]
        return [path for path, match in found if match and match.group(1) == self.writer]

    def _write_state(self, state: State, rows: int) -> dict[str, Any]:
        name = f"state-{self.writer}-{self._next_state % MOST_FILES:06d}.safetensors"  # those of old are gone
        self._next_state += 1
        tensors, metadata = fmt.encode_state(state, name)
        metadata |= {"bank": self._identity, "writer": self.writer, "rows": str(rows)}
        written = files.write_tensors(self.path / name, tensors, metadata, sealed=True)
        return {"file": name, "bytes": written.bytes, "sha256": written.sha256}


REMOVED = ".tmp-removed-bank.json"  # what bank.json is called while the rest of an overwritten bank goes


def _is_left_over(name: str, there: Sequence[str]) -> bool:
    """Whether a writer that was killed before its first commit leaves such a file: no bank loses anything with it."""
    locked = any(fmt.LOCK_NAME.fullmatch(other) for other in there)
    begun = locked and (name == "curve.csv" or name.startswith("events.out.tfevents."))
    return (
        begun
        or name in ("base.safetensors", codecs.FILE)
        or name.startswith(".tmp-")
        or bool(fmt.LOCK_NAME.fullmatch(name))
    )


def _is_own(name: str) -> bool:
    """Whether a file is a bank's, or one that training, a calibration or a killed writer leaves beside it."""
    patterns = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME, fmt.LOCK_NAME)
    known = (
        "bank.json", "base.safetensors", codecs.FILE, "model.safetensors", "free.safetensors", "curve.csv", "calibration.json",
    )  # fmt: skip
    begins = (".tmp-", "events.out.tfevents.")
    return name in known or name.startswith(begins) or any(pattern.fullmatch(name) for pattern in patterns)


def _writer_of(name: str) -> str | None:
    """Whose shard, state or manifest a file of that name is."""
    patterns = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME)
    return next((match.group(1) for match in (pattern.fullmatch(name) for pattern in patterns) if match), None)


def _missing_folders(path: Path) -> list[Path]:
    """The folders that must be made for `path`, innermost first."""
    return [folder for folder in (path, *path.parents) if not disk.exists(folder)]


def num_rows(shards: Sequence[Mapping[str, Any]]) -> int:
    """Rows of shards together."""
    return sum(shard["rows"] for shard in shards)
