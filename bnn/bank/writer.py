"""Write a bank: rows are gathered, full shards committed atomically together with the producer's state."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.bank.codecs import Codec
from bnn.bank.part import Part, num_rows, shard_metadata
from bnn.beside import Threads
from bnn.errors import BankMismatch, BankWriteError
from bnn.layout import Layout
from bnn.types import Block, State

SHARD_BYTES = 256 * 1024 * 1024
ROW_SECONDS = 10.0  # a row waits at most so long for its commit
STATE_SECONDS = 30.0  # a state without new rows waits at most so long
BESIDE_BYTES = 32 * 1024 * 1024  # a full shard of so many is committed by a thread, while the next one fills


def rows_per_shard(row_bytes: int) -> int:
    """The largest multiple of 64 under 256 MiB; for very large samples as many as fit, at least 1.

    With 64 rows every stacked float32 tensor is a multiple of 256 bytes long: no pads are needed.
    """
    fit = SHARD_BYTES // max(row_bytes, 1)
    return max(fit // 64 * 64 if fit >= 64 else fit, 1)


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

    def __init__(self, ready: _Ready, image: files.Image, crc32: Mapping[str, int]) -> None:
        self.before, self.rows, self.state, self.image = ready.shards, ready.buffered, ready.state, image
        self.crc32 = crc32
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
        codec: by which the blocks that are appended were coded; `config` has what `bank.json` says of it under `codec`.
        shard_rows: samples of a shard, at most; by default as many as fit into 256 MiB.
        beside: whether large shards that are full are committed by a thread while the next one fills, which takes
            memory for two.

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
        codec: Codec | None = None,
        shard_rows: int | None = None,
        beside: bool = True,
    ) -> None:
        self.path, self.writer = Path(path), writer
        self.layout = layout if codec is None else codec.stored  # of the blocks
        self._part = Part(
            self.path, layout, config, base or {}, writer, resume=resume, overwrite=overwrite, codec=codec
        )
        self._ready = _Ready(self._part.shards, 0, self._part.state)
        self._capacity = rows_per_shard(self.layout.num_bytes) if shard_rows is None else shard_rows
        self._beside = beside
        self._thread: Threads | None = None  # one, that commits full shards
        self._first_row_at = time.monotonic()

    @property
    def num_rows(self) -> int:
        """Rows committed."""
        return num_rows(self._part.shards)

    @property
    def state(self) -> State | None:
        """The state after the last committed row."""
        return self._part.state

    @property
    def complete(self) -> bool:
        """Whether the part that was resumed had been marked so."""
        return self._part.complete

    @property
    def has_news(self) -> bool:
        """Whether rows or a state wait for their commit."""
        ready = self._ready
        gathered = bool(ready.buffered or ready.waiting or ready.beside)
        return gathered or num_rows(ready.shards) > self.num_rows or ready.state is not self.state

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
        self._part.check()
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
        elif row_waits or now - self._part.committed_at > STATE_SECONDS:
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
                    shards, buffered = (*shards, self._part.write_shard(shards, image, buffered)), 0
                self._copy_rows(block, start, stop, image, buffered)
                buffered += stop - start
            self._ready = ready._replace(
                shards=shards, buffered=buffered, state=state, waiting=tuple(following), image=image
            )

    @_refusals_told
    def commit(self, *, complete: bool = False) -> None:
        """Make all rows appended so far durable, with the state that follows them."""
        self._part.check()
        self._settle()
        self._commit_gathered(complete=complete)

    def spare_memory(self) -> None:
        """After a commit: give back the memory of a shard, which the next row takes anew."""
        if not self.has_news:
            self._ready = self._ready._replace(image=None, spare=None)

    def _commit_full(self) -> None:
        """Commit the shard that is full: beside, where it is worth a thread and memory for another."""
        image = self._ready.image
        assert image is not None
        if not self._beside or len(image.raw) < BESIDE_BYTES:
            self._commit_gathered(complete=False)
            return
        rows = self._ready.buffered
        crc32 = files.crc32_of({name: tensor[:rows] for name, tensor in image.tensors.items()})  # while the disk works
        self._land()
        self._part.begin()
        if self._thread is None:
            self._thread = Threads()
        ready = self._ready
        beside = _Beside(ready, image, crc32)
        self._ready = ready._replace(buffered=0, image=ready.spare, beside=beside, spare=None)
        self._thread.give(functools.partial(self._commit_beside, beside))

    def _commit_beside(self, beside: _Beside) -> None:
        with beside.lock:
            if beside.fact is not None or beside.error is not None:
                return
            try:
                beside.fact = self._part.write_shard(beside.before, beside.image, beside.rows, beside.crc32)
                self._part.commit((*beside.before, beside.fact), beside.state, complete=False)
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
            try:
                raise error
            finally:
                del error  # which has this frame in its traceback, and would keep all that it saw

    def _commit_gathered(self, *, complete: bool) -> None:
        self._land()
        self._part.begin()
        ready = self._ready
        if ready.buffered:
            assert ready.image is not None
            shards = (*ready.shards, self._part.write_shard(ready.shards, ready.image, ready.buffered))
            self._ready = ready._replace(shards=shards, buffered=0)
        self._part.commit(self._ready.shards, ready.state, complete=complete)

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
        self._part.release()

    @_refusals_told
    def abandon(self, *, rows: bool = False) -> None:
        """Give up after an error that would come again: a bank of this writer without any row goes, states and all.

        With `rows` it goes with those that were committed: half a copy is of use to nobody.
        """
        self._part.check()
        self._stop_thread()
        self._part.remove(rows=rows)
        self.release()

    def _stop_thread(self) -> None:
        """Wait for the commit beside, whatever becomes of it; a fork has no such thread."""
        if self._thread is not None:
            self._thread.end()
        self._thread = None

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
        if set(block.columns) != set(self._part.columns):
            raise BankMismatch(
                "block columns",
                want=f"{', '.join(self._part.columns) or 'none'}, as bank.json says",
                got=", ".join(block.columns) or "none",
                fix="name them in the method's `columns`",
            )
        fmt.check_weights(block.log_weight, "block log_weight")
        ready = self._ready
        before = num_rows(ready.shards) + ready.buffered + sum(block.num_samples for block, _ in ready.waiting)
        before += 0 if ready.beside is None else ready.beside.rows
        fmt.check_rows(block.params, str(self.path), before)

    def _blank(self) -> files.Image:
        """Memory for a full shard."""
        shapes = {e.name: (e.dtype, (self._capacity, *e.shape)) for e in self.layout.entries}
        shapes |= {name: (dtype, (self._capacity,)) for name, dtype in fmt.column_dtypes(self._part.columns).items()}
        metadata = shard_metadata(self.layout, "0" * 64, self.writer, self.num_rows, self._capacity)
        return files.blank_image(shapes, metadata)

    def _copy_rows(self, block: Block, start: int, stop: int, image: files.Image, place: int) -> None:
        """Rows start to stop of a block into the image at `place`, after the rows that count so far."""
        here = slice(place, place + stop - start)
        for name, tensor in {**block.params, **fmt.columns_of(block)}.items():
            image.tensors[name][here].copy_(tensor[start:stop].detach())


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
