"""A bank larger than memory: shards read by threads into a ring of buffers, those ahead that will be wanted next.

A buffer is FREE, FILLING, READY, or IN_USE: ready and seen by views that somebody holds. It goes back to FREE when its
shard is the one wanted last; never while it is being filled or in use.

Ctrl-C may come in any line of whoever asks, who can ask again after it: what changes together is changed where no call is made.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from bnn.bank import disk
from bnn.bank import format as fmt
from bnn.bank.foresight import Plan, ReadAhead
from bnn.bank.reading import PIECE_BYTES, ShardFile, tensors_of
from bnn.bank.slots import Memory
from bnn.beside import Threads
from bnn.errors import BankError

THREADS = 4  # that read; disks are fast when several pieces are asked for at once
AHEAD = 2  # shards that are read at once before anybody waits for them
LEAST_BUFFERS = 2  # one is seen while the next is filled
PATIENCE = 0.05  # seconds after which a buffer that another thread saw for a moment is looked at again


class State(Enum):
    """What a buffer is doing."""

    FREE = "free"
    FILLING = "filling"
    READY = "ready"


class Buffer:
    """Memory for one shard, and what it holds now. All of it is under the lock of its ring."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.state = memory, State.FREE
        self.shard = -1
        self.fill: _Fill | None = None  # while it is being filled
        self.asked = 0  # when it was asked for last, by the count of the ring
        self.lease: weakref.ref[Any] | None = None
        self.views: dict[str, Tensor] | None = None  # kept of the shard that was asked for last alone
        self.streams: set[Any] = set()  # that may work on views

    @property
    def is_in_use(self) -> bool:
        """Whether somebody holds a view of it."""
        return self.lease is not None and self.lease() is not None


class _Fill:
    """A shard on its way into a buffer, piece by piece."""

    def __init__(self, file: ShardFile, buffer: Buffer, memory: Memory, after: list[Any], *, is_large: bool) -> None:
        self.file, self.buffer, self._memory, self._after = file, buffer, memory, after
        self._is_large = is_large  # the bank: the page cache cannot keep it
        self.left: int = -(-file.size // PIECE_BYTES)  # pieces
        self.lock = threading.Lock()
        self.descriptor: int | None = None
        self.error: BaseException | None = None

    def begin(self) -> None:
        """Take memory to read to."""
        self._target = self._memory.target(self.buffer.memory)
        self._view = fmt.tensor_bytes(self._target)

    def read(self, start: int) -> bool:
        """Read the piece that begins at `start`; whether it was the last that was missing."""
        try:
            with self.lock:
                if self.descriptor is None and self.error is None:
                    self.descriptor = self.file.descriptor()
                    self.file.spare_cache(self.descriptor, always=self._is_large)
            if self.error is None and self.descriptor is not None:
                end = -(-self.file.size // mmap.PAGESIZE) * mmap.PAGESIZE  # for whole pages may go past the page cache
                piece = self._view[start : min(start + PIECE_BYTES, end)]
                self.file.read(self.descriptor, piece, start)
        except BaseException as error:
            self.error = error
        with self.lock:
            self.left -= 1
            return self.left == 0

    def finish(self) -> None:
        """Close the file, compare checksums, and bring the bytes to their buffer; what went wrong is kept."""
        try:
            if self.descriptor is not None:
                disk.close(self.descriptor)
            if self.error is None:
                self.file.check(self._view)
        except BaseException as error:
            self.error = error
        if self.error is not None:
            self._memory.undo(self._target)
            return
        try:
            self._memory.deliver(self._target, self.buffer.memory, self.file.size, self._after)
        except BaseException as error:
            self.error = error


class Ring:
    """Buffers for some shards of a bank, filled by threads.

    A shard that cannot be read raises where it is asked for, and is tried again when it is asked for once more.

    Args:
        files: of the bank's shards.
        firsts: the first bank index of each shard, and S, int64 [shards + 1].
        names: of the tensors of a shard.
        memory: where buffers are.
        count: of buffers, at least 2.
    """

    def __init__(
        self, files: Sequence[ShardFile], firsts: np.ndarray, names: Sequence[str], memory: Memory, count: int
    ) -> None:
        self.process = os.getpid()
        self._files, self._firsts, self._names, self._memory = files, firsts, names, memory
        self._is_large = sum(file.size for file in files) > disk.memory_bytes()
        self._buffers = [Buffer(memory.blank()) for _ in range(count)]
        self._where: dict[int, Buffer] = {}  # shard -> the buffer that has it, or is being filled with it
        self._failed: dict[int, BaseException] = {}  # shards that could not be read ahead
        self._current: Buffer | None = None
        self._asked = 0
        # Buffers that callers may hold: the others go on reading, where there is anything left to read.
        self._lendable = count if count >= len(files) else max(count - 2, 1)
        self._plan: Plan | ReadAhead = self._no_plan()
        self.is_starved = self.is_closed = False  # starved: a buffer was looked for, and those there are were held
        self._is_noting = False  # an order that is followed is being asked, under the lock
        self.num_reads = self.num_waits = 0
        self._lock = threading.RLock()
        self._waiting: dict[SimpleQueue[None], Buffer | None] = {}  # who waits, and for which buffer; None for any
        self._itself = weakref.ref(self)
        self._threads = Threads(THREADS)
        self._returned = self._threads.giving(partial(_looked_again, self._itself))

    @property
    def states(self) -> list[str]:
        """What each buffer is doing."""
        with self._lock:
            return ["in use" if buffer.is_in_use else buffer.state.value for buffer in self._buffers]

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """All tensors of a shard as views of its buffer, which stays as it is while they are held.

        Raises:
            BankError: it could not be read, or is asked for where an order that is followed is made.
        """
        with self._lock:
            if self._is_noting:
                raise BankError(
                    f"follow, {self._files[shard].shard.path}",
                    want="an order that is known without this bank",
                    got="one that reads it where it is asked",
                    fix="make the indices before, or open the bank once more for them",
                )
            self._plan.reach(shard)
            views = self._views(shard)
        return self._awaited(shard) if views is None else views

    def _awaited(self, shard: int) -> dict[str, Tensor]:
        """All tensors of a shard, once it is read. The lock is free meanwhile, and Ctrl-C leaves nothing of the waiting."""
        wake: SimpleQueue[None] = SimpleQueue()
        has_waited = False  # for a buffer, all of which are held
        try:
            while True:
                with self._lock:
                    self._waiting[wake] = None
                    views = self._views(shard, has_waited=has_waited)
                    if views is not None:
                        return views
                    buffer = self._waiting[wake] = self._where.get(shard)
                    is_idle = not any(each.state is State.FILLING or self._is_wanted(each) for each in self._buffers)
                    self.num_waits += buffer is not None
                if buffer is not None:
                    wake.get()
                    continue
                try:  # what is being filled comes, and what another thread saw for a moment is let go
                    wake.get(timeout=PATIENCE)
                    has_waited = False
                except Empty:
                    has_waited = is_idle
        finally:
            self._waiting.pop(wake, None)

    def handed(self, shard: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views of a shard as a caller may keep them: copies, where as many buffers as may be are held already."""
        with self._lock:
            others = sum(buffer.is_in_use for buffer in self._buffers if buffer.shard != shard)
        if others < self._lendable:
            return tensors
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def note(self, indices: Sequence[int], shard: int) -> None:
        """Bank indices that were asked for, the last of them in `shard`: what comes after them is read ahead."""
        with self._lock:
            self._is_noting = True
            try:
                self._plan.note(indices, shard)
            finally:
                self._is_noting = False
            if self._plan.is_lost:
                self._plan = self._no_plan()
                self._plan.reach(shard)
            self._schedule()

    def follow(self, pieces: Iterable[np.ndarray] | None, window: int) -> None:
        """Read ahead what these bank indices, piece by piece, will want; None for from first to last."""
        firsts = self._firsts
        plan = (
            self._no_plan()
            if pieces is None
            else Plan(iter(pieces), lambda indices: np.searchsorted(firsts, indices, side="right") - 1, window)
        )
        with self._lock:
            self._plan = plan
            self._schedule()

    def close(self) -> None:
        """Let the threads finish what they began and end; buffers that somebody sees stay until they are let go."""
        with self._lock:
            self.is_closed = True
            self._wake_all()
        self._threads.end()
        with self._lock:
            self._current = None
            self._buffers, self._where = [], {}

    def _no_plan(self) -> ReadAhead:
        return ReadAhead(len(self._files), AHEAD)

    # Under the lock

    def _views(self, shard: int, *, has_waited: bool = False) -> dict[str, Tensor] | None:
        """All tensors of a shard; None while it is on its way, or all buffers are held."""
        buffer = self._ready(shard, has_waited=has_waited)
        if buffer is None:
            return None
        if self._current is not buffer:
            if self._current is not None:
                self._current.views = None
            self._current = buffer
        if buffer.views is None:
            lease = None if buffer.lease is None else buffer.lease()  # of who holds views of it still
            if lease is None:
                lease = self._memory.lease(buffer.memory)
                buffer.lease = weakref.ref(lease, self._returned)
            buffer.views = tensors_of(self._memory.seen(lease), self._files[shard].places, self._names)
        stream = self._memory.stream()
        if stream is not None:
            buffer.streams.add(stream)
        return buffer.views

    def _ready(self, shard: int, *, has_waited: bool) -> Buffer | None:
        """The buffer that holds a shard, or None; it is read now if it must be, and a buffer can be had."""
        if self.is_closed:
            raise Closed
        error = self._failed.pop(shard, None)
        if error is not None:
            raise error
        buffer = self._where.get(shard)
        if buffer is None:
            buffer = self._chosen(-1.0) or (self._left_to_its_holder() if has_waited else None)
            if buffer is None:
                return None
            self._fill(buffer, shard)
            self._schedule()
        if buffer.state is not State.READY:
            return None
        self._asked += 1
        buffer.asked = self._asked
        return buffer

    def _is_wanted(self, buffer: Buffer) -> bool:
        """Whether somebody waits for what it holds."""
        return any(each is buffer for each in self._waiting.values())

    def _wake_all(self) -> None:
        for wake in list(self._waiting):  # who waits leaves without the lock
            wake.put(None)

    def _left_to_its_holder(self) -> Buffer | None:
        """A buffer with new memory, where somebody holds all there are after all: views keep what they look into."""
        held = [each for each in self._buffers if each.state is State.READY and not self._is_wanted(each)]
        if len(held) < len(self._buffers):
            return None
        buffer, memory, free = min(held, key=lambda each: each.asked), self._memory.blank(), State.FREE
        # No call from here on: a buffer that has other memory holds no shard.
        del self._where[buffer.shard]
        buffer.state, buffer.shard, buffer.memory, buffer.lease, buffer.views = free, -1, memory, None, None
        return buffer

    def _schedule(self) -> None:
        """Begin to read what will be wanted, into buffers whose shards will be wanted later."""
        while not self.is_closed and sum(b.state is State.FILLING for b in self._buffers) < AHEAD:
            found = self._plan.upcoming(self._is_known)
            if found is None:
                return
            shard, distance = found
            buffer = self._chosen(distance)
            if buffer is None:
                return
            self._fill(buffer, shard)

    def _is_known(self, shard: int) -> bool:
        return shard in self._where or shard in self._failed

    def _chosen(self, beyond: float) -> Buffer | None:
        """A buffer to fill: a free one, or of those nobody sees the one wanted last, if that is later than `beyond`."""
        filling = sum(buffer.state is State.FILLING for buffer in self._buffers)
        if self._memory.staging is not None and filling >= self._memory.staging:
            return None
        self.is_starved = False
        ready = []
        for buffer in self._buffers:
            if buffer.state is State.READY and not self._is_wanted(buffer):
                ready.append((-self._plan.next_use(buffer.shard), buffer.asked, buffer))
            elif buffer.state is State.FREE and not buffer.is_in_use:
                return buffer
        for negative, _, buffer in sorted(ready, key=lambda entry: entry[:2]):
            if -negative <= beyond:
                return None
            if buffer is self._current:
                buffer.views = self._current = None
            if not buffer.is_in_use:
                return buffer
            self.is_starved = True  # look again when it is let go
        return None

    def _fill(self, buffer: Buffer, shard: int) -> None:
        """Begin to read a shard into a buffer that nobody sees."""
        marks, streams, was, becomes = self._memory.used(buffer.streams), set[Any](), buffer.state, State.FILLING
        fill = _Fill(self._files[shard], buffer, self._memory, marks, is_large=self._is_large)
        self._threads.give(partial(_begun, self._itself, fill))
        # No call from here on: the thread, which waits for the lock, finds all of this or nothing.
        if was is State.READY:
            del self._where[buffer.shard]
        buffer.state, buffer.shard, buffer.streams, buffer.fill = becomes, shard, streams, fill
        self._where[shard] = buffer
        self.num_reads += 1

    # In the threads

    def _begin(self, fill: _Fill) -> None:
        with self._lock:
            if self.is_closed or fill.buffer.fill is not fill:  # Ctrl-C fell before it counted
                return
            fill.begin()
            for start in range(PIECE_BYTES, fill.file.size, PIECE_BYTES):  # before the end that `close` tells threads
                self._threads.give(partial(_read, self._itself, fill, start))
        _read(self._itself, fill, 0)

    def _end(self, fill: _Fill) -> None:
        buffer = fill.buffer
        with self._lock:
            buffer.state, buffer.fill = State.READY, None
            if fill.error is not None:
                buffer.state, self._failed[buffer.shard] = State.FREE, fill.error
                del self._where[buffer.shard]
                buffer.shard = -1
            self._wake_all()
            self._schedule()

    def _look_again(self) -> None:
        """A buffer that somebody held was let go."""
        with self._lock:
            if self.is_starved:
                self.is_starved = False
                self._schedule()
                self._wake_all()


# What threads do. Their jobs do not keep the ring, so that a bank that nobody has ends its threads.


def _begun(ring: weakref.ref[Ring], fill: _Fill) -> None:
    own = ring()
    if own is not None:
        own._begin(fill)


def _read(ring: weakref.ref[Ring], fill: _Fill, start: int) -> None:
    if ring() is None:
        fill.error = Closed()  # nobody asks for the rest
    if not fill.read(start):
        return
    fill.finish()
    own = ring()
    if own is not None:
        own._end(fill)


def _looked_again(ring: weakref.ref[Ring]) -> None:
    own = ring()
    if own is not None:
        own._look_again()


class Closed(Exception):
    """A ring that another thread closed meanwhile: take a new one."""


class Stream:
    """The ring of a bank in this process: made when a row is first asked for, and anew in a fork and after a release."""

    def __init__(self, make: Callable[[], Ring]) -> None:
        self._make = make
        self._ring: Ring | None = None
        self._process, self._lock = os.getpid(), threading.Lock()

    @property
    def ring(self) -> Ring:
        """The ring, with its threads."""
        if self._process != os.getpid():  # a fork has neither its threads nor a lock that can be trusted
            self._process, self._lock, self._ring = os.getpid(), threading.Lock(), None
        ring = self._ring
        if ring is None or ring.is_closed:
            with self._lock:
                if self._ring is None or self._ring.is_closed:
                    self._ring = self._make()
                ring = self._ring
        return ring

    def release(self) -> None:
        """End the threads and give the buffers back."""
        ring = self._ring
        if ring is not None and ring.process == os.getpid():
            ring.close()
        self._ring = None


class StreamedShard:
    """Rows of one file that are read when they are asked for, or before."""

    def __init__(self, file: ShardFile, number: int, stream: Stream) -> None:
        self.file, self.rows, self.writer = file, file.rows, file.shard.writer
        self._number, self._stream = number, stream

    def tensor(self, name: str) -> Tensor:
        return self.take((name,))[name]

    def column(self, name: str) -> Tensor:
        return self.file.column(name)

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        while True:
            try:
                found = self._stream.ring.tensors(self._number)
            except Closed:
                continue
            return {name: found[name] for name in names}

    def handed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors from `take`, cut to some rows, as a caller may keep them."""
        return self._stream.ring.handed(self._number, tensors)

    def note(self, indices: Sequence[int]) -> None:
        """Bank indices that were asked for."""
        self._stream.ring.note(indices, self._number)
