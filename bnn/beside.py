"""Threads that Ctrl-C cannot strand.

Ctrl-C raises in whatever line the main thread has come to. `threading.Condition`, and with it Python's events, futures and pools,
takes its lock in a line of Python: where KeyboardInterrupt falls right after, nobody gives that lock back, threads wait for it
for ever, and Python for them (as python/cpython#78022 describes). So here a thread shares nothing with its owner but queues and
locks of C, whose calls happen or do not. Python 3.14 may leave these too, right after `with` has taken one (python/cpython#148874).
"""

from __future__ import annotations

import atexit
import os
import weakref
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable, Generator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeAlias, TypeVar

Job: TypeAlias = Callable[[], object]
"""What a thread is to do; it must not raise."""

Gone: TypeAlias = "weakref.ref[Threads]"
"""That of an object which is gone, or None, tells a thread to end."""

Jobs: TypeAlias = "SimpleQueue[Job | Gone | None]"

Thing = TypeVar("Thing")
Found = TypeVar("Found")

PATIENCE = 0.05  # seconds after which one of several that wait for the same end looks again


class Threads:
    """Threads that take jobs in the order in which these were given, until they are ended or nobody has this object any more.

    Jobs that refer to it keep it until they are done. Where Python ends by its exit handlers, jobs that were given are done before:
    a thread that it stops inside of torch takes the process down.

    Args:
        count: of threads, at least 1.
    """

    def __init__(self, count: int = 1) -> None:
        self._jobs: Jobs = SimpleQueue()
        self._ends = [_End() for _ in range(count)]
        for end in self._ends:
            # By the queue's own method, since Ctrl-C in a line of Python that is run where an object dies would be lost.
            gone = weakref.ref(self, self._jobs.put)
            _running[end] = self._jobs, gone
            try:
                start_new_thread(_work, (self._jobs, end))
            except RuntimeError:  # there are too many
                del _running[end]
                raise

    def give(self, job: Job) -> None:
        """To the first thread that is free."""
        self._jobs.put(job)

    def giving(self, job: Job) -> Callable[[object], object]:
        """What gives this job when it is called with anything, as weak references call where an object dies.

        It does so whatever is locked, and without a line of Python, since Ctrl-C that comes there would be lost. It does not
        keep the threads.
        """
        # What it is called with takes the place of `block`, which the queue ignores.
        return partial(self._jobs.put, job)

    def end(self, *, drop: bool = False) -> None:
        """Wait until the jobs that were given are done and the threads have ended; with `drop`, no job begins any more.

        What jobs themselves give from now on is not done. A fork has no such threads, and waits for none.
        """
        while drop and not self._jobs.empty():
            try:
                self._jobs.get_nowait()
            except Empty:
                break
        for _ in self._ends:
            self._jobs.put(None)
        for end in self._ends:
            end.wait()


def mapped(work: Callable[[Thing], Found], things: Sequence[Thing], count: int) -> Generator[Found, None, None]:
    """What `work` makes of each thing, in their order, by `count` threads at once; what they raise is raised where it was due.

    Where the iteration ends early, what has begun is waited for, and no more begins. Who may leave it early closes it.
    """
    if not things:
        return
    done: SimpleQueue[tuple[int, Found | None, BaseException | None]] = SimpleQueue()

    def do(number: int, thing: Thing) -> None:
        try:
            done.put((number, work(thing), None))
        except BaseException as error:
            done.put((number, None, error))

    threads, found = Threads(min(count, len(things))), dict[int, tuple[Found | None, BaseException | None]]()
    try:
        for number, thing in enumerate(things):
            threads.give(partial(do, number, thing))
        for number in range(len(things)):
            while number not in found:
                which, value, error = done.get()
                found[which] = value, error
            value, error = found.pop(number)
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # which has this frame in its traceback
            yield value  # type: ignore[misc]  # there is one where there is no error
    finally:
        threads.end(drop=True)


def num_running() -> int:
    """How many threads there are in this process."""
    return sum(end.is_ours for end in list(_running))


class _End:
    """The end of a thread, for which any number of others may wait."""

    def __init__(self) -> None:
        self.has_come, self._process, self._lock = False, os.getpid(), allocate_lock()
        self._lock.acquire()

    @property
    def is_ours(self) -> bool:
        """Whether the thread is of this process, and not of one that this is a fork of."""
        return self._process == os.getpid()

    def come(self) -> None:
        self.has_come = True
        self._lock.release()

    def wait(self) -> None:
        while self.is_ours and not self.has_come:
            self._lock.acquire(timeout=PATIENCE)


_running: dict[_End, tuple[Jobs, Gone]] = {}


def _work(jobs: Jobs, end: _End) -> None:
    """What a thread does. It refers to nothing of its owner, except through a job while that is done."""
    try:
        while (job := jobs.get()) is not None and not isinstance(job, weakref.ref):
            job()
            del job
    finally:
        _running.pop(end, None)
        end.come()


@atexit.register
def _end_all() -> None:
    running = list(_running.items())
    for _, (jobs, _) in running:
        jobs.put(None)
    for end, _ in running:
        end.wait()
