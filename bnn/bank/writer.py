"""Write a bank: rows are buffered, shards committed atomically together with the producer's state."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.shards import check_manifest, read_config, read_manifests
from bnn.errors import (
    BankCorrupt,
    BankError,
    BankExists,
    BankLimit,
    BankLocked,
    BankMismatch,
    BankNotFound,
    BankWriteError,
    ConfigError,
)
from bnn.layout import Layout
from bnn.types import Block, State

SHARD_BYTES = 256 * 1024 * 1024
MOST_FILES = 10**6  # shards of a writer, and states: their numbers have six digits
ROW_SECONDS = 10.0  # a row waits at most so long for its commit
STATE_SECONDS = 30.0  # a state without new rows waits at most so long
BESIDE_BYTES = 32 * 1024 * 1024  # a full shard of so many is committed by a thread, while the next one fills


def rows_per_shard(row_bytes: int) -> int:
    """The largest multiple of 64 under 256 MiB; for very large samples as many as fit, at least 1.

    With 64 rows every stacked float32 tensor is a multiple of 256 bytes long: no pads are needed.
    """
    fit = SHARD_BYTES // max(row_bytes, 1)
    return max(fit // 64 * 64 if fit >= 64 else fit, 1)


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


P = ParamSpec("P")
R = TypeVar("R")


def _refusals_told(method: Callable[Concatenate[BankWriter, P], R]) -> Callable[Concatenate[BankWriter, P], R]:
    """What the disk refuses anywhere in a method becomes a BankWriteError that names the file, or else the bank."""

    @functools.wraps(method)
    def told(self: BankWriter, /, *args: P.args, **options: P.kwargs) -> R:
        try:
            return method(self, *args, **options)
        except OSError as error:
            raise files.refused(Path(error.filename or self.path), error) from error

    return told


class _Beside:
    """A full shard that a thread commits. Nothing else of the writer touches the disk before that has ended."""

    def __init__(self, ready: _Ready, image: files.Image) -> None:
        self.before, self.rows, self.state, self.image = ready.shards, ready.buffered, ready.state, image
        self.lock = threading.Lock()  # of whoever writes it: the thread, or who needs it and was first
        self.fact: dict[str, Any] | None = None  # of the shard, once it is written
        self.error: BaseException | None = None  # what the disk refused, until it is told


class _Ready(NamedTuple):
    """What the next commit makes durable. Replaced as a whole, so that Ctrl-C sees all of a block or nothing of it."""

    shards: tuple[dict[str, Any], ...]  # written, in order
    buffered: int  # rows gathered, which follow them and the shard beside
    state: State | None  # of the producer after those rows
    waiting: tuple[tuple[Block, State | None], ...] = ()  # blocks that follow, with the states after them
    image: files.Image | None = None  # of a full shard, which rows are gathered in
    beside: _Beside | None = None  # the shard before those rows
    spare: files.Image | None = None  # of the last shard beside, for the rows after the next


class BankWriter:
    """The one writer of its name in a bank. `append` blocks, then `close`.

    Nothing of an existing bank is touched before the first commit. A commit is one manifest that
    replaces the last one: it names all rows so far and the state that follows them, so that a crash
    at any moment leaves a prefix of the rows and the state to go on from. A full shard of 32 MiB or more is committed
    by a thread, while the next one fills.

    Args:
        path: the folder; made if missing.
        layout: of the rows.
        config: what `bank.json` says, apart from format, layout and versions.
        base: parameters outside the sample and buffers, kept once.
        writer: a name of small letters, digits and `_`. Several processes may fill one bank at once, each under
            a name of its own: the first to commit begins the bank, the others of the same configuration join it.
        resume: go on with an unfinished bank of the same configuration; begin one where a writer was killed before
            its first commit.
        overwrite: replace a bank that is there.
        shard_rows: samples of a shard, at most; by default as many as fit into 256 MiB.

    Raises:
        BankExists: the folder is there and neither `resume` nor `overwrite` was said.
        BankNotFound: nothing is there to resume.
        BankMismatch: the bank to resume was made with another configuration; the difference is named.
        BankLocked: another process writes under this name.
        BankLimit: what `bank.json` would hold is more than a reader takes.
        BankWriteError: the folder cannot be made or written to.
    """

    @_refusals_told
    def __init__(
        self,
        path: str | Path,
        *,
        layout: Layout,
        config: Mapping[str, Any],
        base: Mapping[str, Tensor] | None = None,
        writer: str = "main",
        resume: bool = False,
        overwrite: bool = False,
        shard_rows: int | None = None,
    ) -> None:
        if not fmt.WRITER_NAME.fullmatch(writer):
            raise ConfigError("writer", want="1 to 32 small letters, digits or '_'", got=repr(writer), fix="rename it")
        self.path, self.layout, self.writer = Path(path), layout, writer
        self._columns = fmt.more_columns(config, "bank.json")
        self._config = {
            "format": fmt.FORMAT,
            "version": fmt.VERSION,
            "requires": ["columns"] if self._columns else [],
            "layout": layout.to_config(),
            "fingerprint": layout.fingerprint,
            **config,
        }
        self._base = {name: tensor.detach().cpu().contiguous() for name, tensor in (base or {}).items()}
        self._resume, self._overwrite = resume, overwrite
        self._check_place()
        self._check_base()
        self._ready = _Ready((), 0, None)
        self._num_rows = 0
        self._generation = self._next_number = self._next_state = 0
        self.state: State | None = None  # after the last committed row
        self.complete = False  # whether the part that was resumed had been marked so
        self._started = False
        self._announced = False  # whether its manifest is there
        self._capacity = rows_per_shard(layout.num_bytes) if shard_rows is None else shard_rows
        self._thread: ThreadPoolExecutor | None = None  # that commits full shards
        self._dtypes = fmt.column_dtypes(self._columns)
        self._first_row_at = self._last_commit_at = time.monotonic()
        self._made = _missing_folders(self.path)
        self._fresh = bool(self._made)  # whether what stands in the folder is this writer's own
        self._identity = ""  # of the bank: the checksum of its bank.json
        disk.make_folders(self.path)
        for folder in self._made:  # else power loss could take folder and rows with it
            disk.sync_folder(folder.parent)
        self._locks = [files.Lock(self.path, writer)]
        try:
            if overwrite:  # nobody else may be writing what is to go
                self._lock_others()
            if self._resume or (not overwrite and self._may_join()):
                self._restore()
        except BaseException:
            self.release()
            raise

    @property
    def num_rows(self) -> int:
        """Rows committed."""
        return self._num_rows

    @property
    def has_news(self) -> bool:
        """Whether rows or a state wait for their commit."""
        ready = self._ready
        gathered = bool(ready.buffered or ready.waiting or ready.beside)
        return gathered or _count(ready.shards) > self._num_rows or ready.state is not self.state

    @_refusals_told
    def append(self, block: Block, state: State | None = None) -> None:
        """Take K rows and the state that follows them; commit when a shard is full or time has come.

        A large shard that is full is durable some time after; `num_rows` tells. Where the disk refuses a shard or a
        commit, also an earlier one beside (BankWriteError), all rows are taken all the same and wait in memory for the
        next commit: they must not be appended again.

        Raises:
            BankError: a sample holds NaN or Inf; none of the block's rows is taken.
            BankMismatch: the block has another layout; none of its rows is taken.
        """
        self._locks[0].check()
        if block.num_samples:
            self._check_block(block)
        self._ready = self._ready._replace(waiting=(*self._ready.waiting, (block, state)))
        try:
            self._settle()
        except (OSError, BankWriteError):
            copies = tuple((_copied(kept), after) for kept, after in self._ready.waiting)
            self._ready = self._ready._replace(waiting=copies)  # who appended them may use their memory again
            raise
        except BaseException:  # Ctrl-C: none of its rows
            self._ready = self._ready._replace(waiting=tuple(w for w in self._ready.waiting if w[0] is not block))
            raise
        now = time.monotonic()
        buffered = self._ready.buffered
        row_waits = buffered > 0 and now - self._first_row_at > ROW_SECONDS
        if buffered == self._capacity:
            self._commit_full()
        elif row_waits or now - self._last_commit_at > STATE_SECONDS:
            self.commit()

    def _settle(self) -> None:
        """Copy the rows that wait to where they are gathered, and write what is full; a block counts whole or not yet."""
        while self._ready.waiting:
            (block, state), *following = self._ready.waiting
            size = block.num_samples
            if size and self._ready.buffered and self._ready.buffered + size > self._capacity:
                self._commit_full()
            if size > self._capacity:
                self._land()
            ready = self._ready
            shards, buffered, image = ready.shards, ready.buffered, ready.image or (self._blank() if size else None)
            if size and not buffered:
                self._first_row_at = time.monotonic()
            for start in range(0, size, self._capacity):
                stop = min(start + self._capacity, size)
                assert image is not None
                if buffered + stop - start > self._capacity:
                    shards, buffered = (*shards, self._write_shard(shards, image, buffered)), 0
                self._copy_rows(block, start, stop, image, buffered)
                buffered += stop - start
            self._ready = ready._replace(
                shards=shards, buffered=buffered, state=state, waiting=tuple(following), image=image
            )

    @_refusals_told
    def commit(self, *, complete: bool = False) -> None:
        """Make all rows appended so far durable, with the state that follows them."""
        self._locks[0].check()
        self._settle()
        self._commit_gathered(complete=complete)

    def _commit_full(self) -> None:
        """Commit the shard that is full: beside, where it is worth a thread and memory for another."""
        image = self._ready.image
        assert image is not None
        if len(image.raw) < BESIDE_BYTES:
            self._commit_gathered(complete=False)
            return
        self._land()
        self._begin()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "bnn-bank-writer")
        ready = self._ready
        beside = _Beside(ready, image)
        self._ready = ready._replace(buffered=0, image=ready.spare, beside=beside, spare=None)
        self._thread.submit(self._commit_beside, beside)

    def _commit_beside(self, beside: _Beside) -> None:
        with beside.lock:
            if beside.fact is not None or beside.error is not None:
                return
            try:
                beside.fact = self._write_shard(beside.before, beside.image, beside.rows)
                self._commit_shards((*beside.before, beside.fact), beside.state, complete=False)
            except BaseException as error:
                beside.error = error

    def _land(self) -> None:
        """Wait for the commit beside, and tell what the disk refused; a shard that it refused is tried again then."""
        beside = self._ready.beside
        if beside is None:
            return
        self._commit_beside(beside)
        error, beside.error = beside.error, None
        if beside.fact is not None:  # without its state or manifest, the next commit writes them
            shards = (*beside.before, beside.fact)
            self._ready = self._ready._replace(shards=shards, beside=None, spare=beside.image)
        if error is not None:
            raise error

    def _commit_gathered(self, *, complete: bool) -> None:
        self._land()
        self._begin()
        ready = self._ready
        if ready.buffered:
            assert ready.image is not None
            shards = (*ready.shards, self._write_shard(ready.shards, ready.image, ready.buffered))
            self._ready = ready._replace(shards=shards, buffered=0)
        self._commit_shards(self._ready.shards, ready.state, complete=complete)

    def _commit_shards(self, shards: tuple[dict[str, Any], ...], state: State | None, *, complete: bool) -> None:
        """Write the state that follows these shards, and the manifest that names both."""
        old_states = self._state_files()
        fact = None if state is None else self._write_state(state, _count(shards))
        info = {} if state is None else state.get("info", {})
        self._write_manifest(self._generation + 1, shards, fact, info, complete=complete)
        self._generation += 1
        self._num_rows, self.state = _count(shards), state
        for old in old_states:  # the manifest no longer names them
            self._remove(old)
        self._last_commit_at = time.monotonic()

    def close(self, *, complete: bool = True) -> None:
        """Commit what is pending, mark the writer's part complete, and give the name free."""
        self.commit(complete=complete)
        self.release()

    @_refusals_told
    def release(self) -> None:
        """Give the name free without a commit: what was committed stays, a folder made for nothing goes.

        A commit beside that has begun is waited for.
        """
        self._stop_thread()
        self._ready = _Ready(self._ready.shards, 0, self._ready.state)
        try:
            if (
                self._locks[0].is_ours
                and self._made
                and not self._started
                and disk.names(self.path) == [self._locks[0].path.name]
            ):
                disk.unlink(self._locks[0].path)
                with suppress(OSError):  # somebody has put something beside it
                    for folder in self._made:
                        disk.remove_folder(folder)
        finally:
            for lock in self._locks:
                lock.close()

    @_refusals_told
    def abandon(self, *, rows: bool = False) -> None:
        """Give up after an error that would come again: a bank of this writer without any row goes, states and all.

        With `rows` it goes with those that were committed: half a copy is of use to nobody.
        """
        self._locks[0].check()
        self._stop_thread()
        if self._fresh and self._started and (self._has_all() if rows else not self._num_rows and self._is_alone()):
            self._remove_bank()
            self._started = False
        self.release()

    def _stop_thread(self) -> None:
        """Wait for the commit beside, whatever becomes of it; a fork has no such thread."""
        if self._thread is not None and self._locks[0].is_ours:
            self._thread.shutdown()
        self._thread = None

    def _check_place(self) -> None:
        place = str(self.path)
        if disk.exists(self.path) and not disk.is_folder(self.path):
            raise BankExists(place, want="a folder or nothing", got="a file", fix="choose another name")
        is_bank = disk.exists(self.path / "bank.json")
        there = disk.names(self.path) if disk.is_folder(self.path) else []
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
        held = {lock.path.name for lock in self._locks}
        for match in map(fmt.LOCK_NAME.fullmatch, disk.names(self.path)):
            if match and match.group() not in held:
                self._locks.append(files.Lock(self.path, match.group(1)))

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

    def _begin(self) -> None:
        """The bank, and in it a manifest of this writer, before its first file: one that is missing later was lost."""
        if not self._started:
            self._start()
        if not self._announced:
            self._write_manifest(0, (), None, {}, complete=False)

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
            "rows": _count(shards),
            "shards": list(shards),
            "state": state,
            "info": info,
        }
        if len(fmt.dump_json(info, name)) > fmt.MAX_INFO_BYTES:
            raise BankLimit(
                name, want=f"info of at most {fmt.MAX_INFO_BYTES} bytes", got="more", fix="keep it in the state"
            )
        raw = fmt.dump_json(fmt.seal(manifest, name), name)
        check_manifest(self.path, name, len(raw), (*self.layout.names, *self._dtypes))
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
            self._ready = _Ready(tuple(manifest["shards"]), 0, self.state)
            self._num_rows = _count(manifest["shards"])
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

    def _check_block(self, block: Block) -> None:
        for entry in self.layout.entries:
            tensor = block.params.get(entry.name)
            want = (block.num_samples, *entry.shape)
            if tensor is None or tuple(tensor.shape) != want or tensor.dtype != entry.dtype:
                got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise BankMismatch(
                    f"block entry '{entry.name}'",
                    want=f"{entry.dtype} {list(want)}",
                    got=got,
                    fix="stack the samples in the layout's shapes and dtypes",
                )
        if block.params.keys() - set(self.layout.names):
            extra = sorted(block.params.keys() - set(self.layout.names))[0]
            raise BankMismatch("block", want="the entries of the layout", got=f"'{extra}' too", fix="leave it out")
        if set(block.columns) != set(self._columns):
            raise BankMismatch(
                "block columns",
                want=f"{', '.join(self._columns) or 'none'}, as bank.json says",
                got=", ".join(block.columns) or "none",
                fix="name them in the method's `columns`",
            )
        fmt.check_weights(block.log_weight, "block log_weight")
        ready = self._ready
        before = _count(ready.shards) + ready.buffered + sum(block.num_samples for block, _ in ready.waiting)
        before += 0 if ready.beside is None else ready.beside.rows
        fmt.check_rows(block.params, str(self.path), before)

    def _blank(self) -> files.Image:
        """Memory for a full shard."""
        shapes = {e.name: (e.dtype, (self._capacity, *e.shape)) for e in self.layout.entries}
        shapes |= {name: (dtype, (self._capacity,)) for name, dtype in self._dtypes.items()}
        metadata = shard_metadata(self.layout, "0" * 64, self.writer, self._num_rows, self._capacity)
        return files.blank_image(shapes, metadata)

    def _copy_rows(self, block: Block, start: int, stop: int, image: files.Image, place: int) -> None:
        """Rows start to stop of a block into the image at `place`, after the rows that count so far."""
        here = slice(place, place + stop - start)
        for name, tensor in {**block.params, **fmt.columns_of(block)}.items():
            image.tensors[name][here].copy_(tensor[start:stop].detach())

    def _write_shard(self, before: tuple[dict[str, Any], ...], image: files.Image, rows: int) -> dict[str, Any]:
        """Write the rows of an image as a shard; it counts once a manifest names it."""
        self._begin()
        name, first_row = f"{self.writer}-{self._next_number:06d}.safetensors", _count(before)
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
        full = image if rows == self._capacity else None
        written = files.write_tensors(self.path / name, tensors, metadata, sealed=True, image=full)
        return {"file": name, "first_row": first_row, "rows": rows, **written._asdict()}

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
    return begun or name == "base.safetensors" or name.startswith(".tmp-") or bool(fmt.LOCK_NAME.fullmatch(name))


def _is_own(name: str) -> bool:
    """Whether a file is a bank's, or one that training or a killed writer leaves beside it."""
    patterns = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME, fmt.LOCK_NAME)
    known = ("bank.json", "base.safetensors", "model.safetensors", "free.safetensors", "curve.csv")
    begins = (".tmp-", "events.out.tfevents.")
    return name in known or name.startswith(begins) or any(pattern.fullmatch(name) for pattern in patterns)


def _writer_of(name: str) -> str | None:
    """Whose shard, state or manifest a file of that name is."""
    patterns = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME)
    return next((match.group(1) for match in (pattern.fullmatch(name) for pattern in patterns) if match), None)


def _missing_folders(path: Path) -> list[Path]:
    """The folders that must be made for `path`, innermost first."""
    return [folder for folder in (path, *path.parents) if not disk.exists(folder)]


def _copied(block: Block) -> Block:
    """A block of the same rows in memory of its own."""
    return Block(
        params={name: tensor.detach().clone() for name, tensor in block.params.items()},
        chain=block.chain.clone(),
        draw=block.draw.clone(),
        log_joint=block.log_joint.clone(),
        log_weight=block.log_weight.clone(),
        columns={name: column.clone() for name, column in block.columns.items()},
    )


def _count(shards: Sequence[dict[str, Any]]) -> int:
    return sum(shard["rows"] for shard in shards)
