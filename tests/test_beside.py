"""Threads beside: jobs in order, ends that come, and nothing left where their owner is gone. Ctrl-C: `tests/bank/test_ctrl_c.py`."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from bank.test_streaming import eventually

from bnn.beside import Threads, mapped, num_running


def test_one_thread_does_jobs_in_their_order_and_end_waits_for_all() -> None:
    threads, found = Threads(), list[int]()
    for number in range(100):
        threads.give(lambda number=number: (time.sleep(1e-4), found.append(number)))
    assert num_running() == 1
    threads.end()
    assert found == list(range(100))
    assert num_running() == 0
    threads.end()  # once more does nothing


def test_several_work_at_once() -> None:
    meeting = threading.Barrier(3)
    threads = Threads(3)
    for _ in range(3):
        threads.give(lambda: meeting.wait(20))
    threads.end()
    assert not meeting.broken


def test_no_job_begins_after_an_end_that_drops() -> None:
    threads, opened, found = Threads(), threading.Event(), list[int]()
    threads.give(lambda: (opened.wait(20), found.append(0)))
    for number in range(1, 5):
        threads.give(lambda number=number: found.append(number))
    eventually(lambda: threads._jobs.qsize() == 4)  # the first has begun
    threading.Timer(0.05, opened.set).start()
    threads.end(drop=True)
    assert found == [0]


def test_threads_end_with_their_object_after_its_jobs() -> None:
    threads, found = Threads(2), list[int]()
    for number in range(4):
        threads.give(lambda number=number: (time.sleep(0.01), found.append(number)))
    del threads
    gc.collect()
    eventually(lambda: num_running() == 0)
    assert sorted(found) == [0, 1, 2, 3]


def test_a_weak_reference_gives_a_job_and_keeps_no_thread() -> None:
    class Held:
        pass

    held, found, threads = Held(), list[str](), Threads()
    reference = weakref.ref(held, threads.giving(lambda: found.append("gone")))
    del held
    eventually(lambda: found == ["gone"])
    assert reference() is None
    del threads
    gc.collect()
    eventually(lambda: num_running() == 0)


@pytest.mark.parametrize("count", [1, 3])
def test_mapped_keeps_the_order(count: int) -> None:
    def slow_for_small(number: int) -> int:
        time.sleep(0.001 * (10 - number))
        return number * number

    assert list(mapped(slow_for_small, range(10), count)) == [number * number for number in range(10)]
    assert list(mapped(slow_for_small, list[int](), count)) == []
    assert num_running() == 0


def test_mapped_raises_where_it_was_due_and_begins_no_more() -> None:
    begun = list[int]()

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise ValueError("three")
        time.sleep(0.005)
        return number

    found = list[int]()
    with pytest.raises(ValueError, match="three"):
        found.extend(mapped(work, range(1000), 2))
    assert found == [0, 1, 2]
    assert len(begun) < 100
    assert num_running() == 0


def test_mapped_that_is_left_early_leaves_no_thread() -> None:
    run = mapped(lambda number: number, range(1000), 2)
    assert next(run) == 0
    run.close()
    assert num_running() == 0


def test_a_fork_waits_for_no_thread() -> None:
    code = """
import os, time
from bnn.beside import Threads, num_running
threads = Threads()
while num_running() < 1:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    assert num_running() == 0
    threads.end()
    raise SystemExit(7)  # by way of what is done before Python ends
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
threads.end()
print("ended")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_python_ends_after_jobs_that_were_given(tmp_path: Path) -> None:
    code = """
import sys, time
from bnn.beside import Threads
threads = Threads()
threads.give(lambda: time.sleep(0.3))
threads.give(lambda: open(sys.argv[1], "w").close())
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "done")], timeout=60, check=True)
    assert os.path.exists(tmp_path / "done")
