"""A bank larger than memory: shards read by threads into a ring of buffers, those ahead that will be wanted next.

A buffer is FREE, FILLING, READY, or IN_USE: ready and seen by views that somebody holds. It goes back to FREE when its
shard is the one wanted last; never while it is being filled or in use.
"""

from __future__ import annotations

import atexit
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any

import numpy as np
from torch import Tensor

from bnn.bank import disk
from bnn.bank import format as fmt
from bnn.bank.foresight import Plan, ReadAhead
from bnn.bank.reading import PIECE_BYTES, ShardFile, tensors_of
from bnn.bank.slots import Memory

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
        self.wanted = 0  # threads that wait for it
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

    def __init__(self, file: ShardFile, buffer: Buffer, target: Tensor, after: list[Any], *, is_large: bool) -> None:
        self.file, self.buffer, self.target, self.after = file, buffer, target, after
        self._is_large = is_large  # the bank: the page cache cannot keep it
        self.view = fmt.tensor_bytes(target)
        self.left: int = -(-file.size // PIECE_BYTES)  # pieces
        self.lock = threading.Lock()
        self.descriptor: int | None = None
        self.error: BaseException | None = None

    def read(self, start: int) -> bool:
        """Read the piece that begins at `start`; whether it was the last that was missing."""
        try:
            with self.lock:
                if self.descriptor is None and self.error is None:
                    self.descriptor = self.file.descriptor()
                    self.file.spare_cache(self.descriptor, always=self._is_large)
            if self.error is None and self.descriptor is not None:
                end = -(-self.file.size // mmap.PAGESIZE) * mmap.PAGESIZE  # for whole pages may go past the page cache
                piece = self.view[start : min(start + PIECE_BYTES, end)]
                self.file.read(self.descriptor, piece, start)
        except BaseException as error:
            self.error = error
        with self.lock:
            self.left -= 1
            return self.left == 0

    def finish(self, memory: Memory) -> None:
        """Close the file, compare checksums, and bring the bytes to their buffer; what went wrong is kept."""
        try:
            if self.descriptor is not None:
                disk.close(self.descriptor)
            if self.error is None:
                self.file.check(self.view)
        except BaseException as error:
            self.error = error
        if self.error is not None:
            memory.undo(self.target)
            return
        try:
            memory.deliver(self.target, self.buffer.memory, self.file.size, self.after)
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
        self.num_reads = self.num_waits = 0
        self._lock = threading.Condition()
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()  # may be put to where an object dies
        ring = weakref.ref(self)
        self._returned = _Returned(ring, self._jobs)
        self._threads = [
            threading.Thread(target=_serve, args=(ring, self._jobs), name="bnn-bank-reader", daemon=True)
            for _ in range(THREADS)
        ]
        for thread in self._threads:
            thread.start()
            _running[thread] = self._jobs
        self._stop = weakref.finalize(self, _dismiss, self._jobs, THREADS)

    @property
    def states(self) -> list[str]:
        """What each buffer is doing."""
        with self._lock:
            return ["in use" if buffer.is_in_use else buffer.state.value for buffer in self._buffers]

    def tensors(self, shard: int) -> dict[str, Tensor]:
        """All tensors of a shard as views of its buffer, which stays as it is while they are held.

        Raises:
            BankError: it could not be read.
        """
        with self._lock:
            buffer = self._ready(shard)
            if self._current is not buffer:
                if self._current is not None:
                    self._current.views = None
                self._current = buffer
            if buffer.views is None:
                lease = None if buffer.lease is None else buffer.lease()  # of who holds views of it still
                if lease is None:
                    lease = self._memory.lease(buffer.memory)
                    buffer.lease = weakref.ref(lease, self._returned)  # which does not keep the ring
                buffer.views = tensors_of(self._memory.seen(lease), self._files[shard].places, self._names)
            stream = self._memory.stream()
            if stream is not None:
                buffer.streams.add(stream)
            return buffer.views

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
            self._plan.note(indices, shard)
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
            self._stop()
        for thread in self._threads:
            thread.join()
        with self._lock:
            self._current = None
            self._buffers, self._where = [], {}
            self._lock.notify_all()

    def _no_plan(self) -> ReadAhead:
        return ReadAhead(len(self._files), AHEAD)

    # Under the lock

    def _ready(self, shard: int) -> Buffer:
        """The buffer that holds a shard, read now if it must be."""
        self._plan.reach(shard)
        has_waited = False  # for a buffer, all of which are held
        while True:
            if self.is_closed:
                raise Closed
            error = self._failed.pop(shard, None)
            if error is not None:
                raise error
            buffer = self._where.get(shard)
            if buffer is None:
                buffer = self._chosen(-1.0) or (self._left_to_its_holder() if has_waited else None)
                if buffer is None:  # what is being filled comes, and what another thread saw for a moment is let go
                    is_idle = not any(each.state is State.FILLING or each.wanted for each in self._buffers)
                    has_waited = not self._lock.wait(PATIENCE) and is_idle
                    continue
                self._fill(buffer, shard)
                self._schedule()
            if buffer.state is State.READY:
                self._asked += 1
                buffer.asked = self._asked
                return buffer
            buffer.wanted += 1
            self.num_waits += 1
            try:
                self._lock.wait()
            finally:
                buffer.wanted -= 1

    def _left_to_its_holder(self) -> Buffer | None:
        """A buffer with new memory, where somebody holds all there are after all: views keep what they look into."""
        held = [each for each in self._buffers if each.state is State.READY and not each.wanted]
        if len(held) < len(self._buffers):
            return None
        buffer = min(held, key=lambda each: each.asked)
        buffer.memory, buffer.lease, buffer.views = self._memory.blank(), None, None
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
            if buffer.state is State.READY and not buffer.wanted:
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
        if buffer.state is State.READY:
            del self._where[buffer.shard]
        after = self._memory.used(buffer.streams)
        buffer.state, buffer.shard, buffer.streams = State.FILLING, shard, set()
        self._where[shard] = buffer
        self.num_reads += 1
        target = self._memory.target(buffer.memory)
        fill = _Fill(self._files[shard], buffer, target, after, is_large=self._is_large)
        for start in range(0, fill.file.size, PIECE_BYTES):
            self._jobs.put((fill, start))

    # In the threads

    def _read(self, fill: _Fill, start: int) -> None:
        if not fill.read(start):
            return
        fill.finish(self._memory)
        buffer = fill.buffer
        with self._lock:
            buffer.state = State.READY
            if fill.error is not None:
                buffer.state, self._failed[buffer.shard] = State.FREE, fill.error
                del self._where[buffer.shard]
                buffer.shard = -1
            self._schedule()
            self._lock.notify_all()

    def _look_again(self) -> None:
        with self._lock:
            self._schedule()
            self._lock.notify_all()


class _Returned:
    """Called when the last view of a buffer is gone: anything may be locked where that is, so a thread sees to it."""

    def __init__(self, ring: weakref.ref[Ring], jobs: queue.SimpleQueue[Any]) -> None:
        self._ring, self._jobs = ring, jobs

    def __call__(self, lease: object) -> None:
        del lease
        ring = self._ring()
        if ring is not None and ring.is_starved and not ring.is_closed:
            ring.is_starved = False
            self._jobs.put(())


class Closed(Exception):
    """A ring that another thread closed meanwhile: take a new one."""


def _serve(ring: weakref.ref[Ring], jobs: queue.SimpleQueue[Any]) -> None:
    """What a thread does; it does not keep the ring, so that a bank that nobody has ends its threads."""
    while (job := jobs.get()) is not None:
        own = ring()
        if own is None:
            return
        if job:
            own._read(*job)
        else:
            own._look_again()
        del own, job


def _dismiss(jobs: queue.SimpleQueue[Any], count: int) -> None:
    for _ in range(count):
        jobs.put(None)


_running: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Any]] = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """Wait for every thread before Python ends: one that it stops inside of torch takes the process down."""
    running = list(_running.items())
    for _, jobs in running:
        jobs.put(None)
    for thread, _ in running:
        thread.join()


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
