"""A bank under faults: kills, full disks, limits, two writers, readers beside a writer, folders that cannot be written.

Each test names its row of the fault matrix. What needs forks runs in a process apart, see `alone`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.test_bank import LAYOUT, check, rows, write
from disk_faults import (
    PLANS,
    Forked,
    check_goes_on,
    check_survived,
    counted,
    ignore,
    intercepted,
    opened,
    run_all,
    steps,
    without_syncs,
)

from bnn.bank import Bank, BankWriter, verify_files
from bnn.errors import BankCorrupt, BankError, BankLimit, BankLocked, BankWriteError

Alone = Callable[..., Any]
Tell = Callable[[str], None]


# 1: kill -9 at random times


def append_for_ever(folder: Path, tell: Callable[[str], object]) -> None:
    """Rows in threes, each commit told; the goal is never reached."""
    bank_writer = opened(folder, resume=(folder / "bank.json").exists())
    tell(str(bank_writer.num_rows))
    run_all(steps(bank_writer, [3] * 10**6, lambda writer, count: tell(str(count))))


def unnamed(folder: Path) -> int:
    """Files that no manifest names."""
    manifest = folder / "manifest-main.json"
    text = manifest.read_text() if manifest.exists() else ""
    others = {"manifest-main.json", "bank.json", "base.safetensors", "lock-main"}
    return sum(path.name not in others and f'"{path.name}"' not in text for path in folder.glob("*"))


def kills(root: str, runs: int, seed: int) -> dict[str, int]:
    """Kill a writer again and again, eight times a bank; each goes on from where the last one ended."""
    draw, figures = random.Random(seed), {"kills": 0, "rows": 0, "orphans": 0}
    there = 0
    for number in range(runs):
        folder = Path(root) / f"bank-{number // 8}"
        before = unnamed(folder)
        child = Forked(lambda tell, folder=folder: append_for_ever(folder, tell))
        time.sleep(draw.uniform(0, 0.12))
        child.kill()
        status, told = child.end()
        assert status == -signal.SIGKILL, f"run {number}: the writer ended by itself"
        acknowledged = max([0, *map(int, told)])
        last = there if number % 8 else 0
        there = counted(Bank.open(folder, verify="full"))["main"] if (folder / "bank.json").exists() else 0
        assert there >= max(acknowledged, last), f"run {number}: {there} rows, {acknowledged} were acknowledged"
        assert there % 3 == 0, f"run {number}: {there} rows, which no commit had"
        assert there <= max(acknowledged, last) + 3
        figures["kills"] += 1
        figures["rows"] += there - last
        figures["orphans"] += max(unnamed(folder) - before, 0)
    return figures


@pytest.mark.parametrize("runs", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_9_at_random_times(tmp_path: Path, alone: Alone, tell: Tell, runs: int) -> None:
    tell(f"seed {runs}: {alone(kills, tmp_path, runs, runs)}")


# 2: a crash at every step


def crashes(root: str, name: str, every: int) -> int:
    """End the process at call 0, `every`, 2 `every`, ... of `disk`, until a run ends by itself; how many crashed."""
    plan, crashed = PLANS[name], 0
    with without_syncs():
        while True:
            folder = Path(root) / str(crashed) / "bank"
            plan.prepare(folder)
            child = Forked(lambda tell, f=folder, last=crashed * every: crash_at(f, name, last, tell))
            status, told = child.end()
            acknowledged = dict(plan.before)
            acknowledged |= {writer: int(count) for writer, count in (line.split() for line in told)}
            check_survived(folder, name, acknowledged)
            check_goes_on(folder, name)
            shutil.rmtree(folder.parent)
            if status == 0:
                return crashed
            assert status == 137
            crashed += 1


def crash_at(folder: Path, name: str, last: int, tell: Callable[[str], object]) -> None:
    seen = [0]

    def handler(call: str, real: Any, *args: Any, **options: Any) -> Any:
        if seen[0] == last:
            os._exit(137)
        seen[0] += 1
        return real(*args, **options)

    with intercepted(handler):
        PLANS[name].run(folder, lambda writer, count: tell(f"{writer} {count}"))


@pytest.mark.parametrize(
    ("name", "every"),
    [(name, 11) for name in PLANS] + [pytest.param(name, 1, marks=pytest.mark.slow) for name in PLANS],
)
def test_a_crash_at_every_call(tmp_path: Path, alone: Alone, tell: Tell, name: str, every: int) -> None:
    crashed = alone(crashes, tmp_path, name, every)
    assert crashed > 80 // every
    tell(f"{name}: {crashed} crashes")


# 5 to 8: a disk that refuses

FAULTS = {
    errno.ENOSPC: ("create", "write", "fsync", "replace", "sync_folder", "make_folders", "open_lock"),
    errno.EFBIG: ("write",),
    errno.EIO: ("write", "fsync", "close", "replace", "unlink", "sync_folder", "open_folder", "lock", "names", "read"),
    errno.EMFILE: ("create", "sync_folder", "open_lock", "open_folder", "open_read", "names"),
    errno.EROFS: ("create", "replace", "unlink", "make_folders", "open_lock"),
}


class Refusing:
    """Refuse the k-th of some calls, and all after it if it is to last."""

    def __init__(self, code: int, last: int, *, lasts: bool, calls: tuple[str, ...] | None = None) -> None:
        self.code, self.last, self.lasts, self.calls = code, last, lasts, calls or FAULTS[code]
        self.seen = 0
        self.refused: list[str] = []

    def __call__(self, name: str, real: Any, *args: Any, **options: Any) -> Any:
        if name in self.calls:
            self.seen += 1
            if self.seen == self.last or (self.lasts and self.seen > self.last):
                self.refused.append(name)
                if name == "close":
                    real(*args, **options)  # the descriptor is gone, as the kernel has it
                raise OSError(self.code, os.strerror(self.code))
        return real(*args, **options)


def refuse(folder: Path, name: str, refusing: Refusing) -> bool:
    """Run a plan on a disk that refuses a call; whether it refused one."""
    plan = PLANS[name]
    plan.prepare(folder)
    told = dict(plan.before)
    writers: list[BankWriter] = []
    error: BankError | None = None
    with pytest.MonkeyPatch.context() as patch, intercepted(refusing):
        claim = BankWriter.__init__
        patch.setattr(BankWriter, "__init__", lambda self, *a, **o: (claim(self, *a, **o), writers.append(self))[0])
        try:
            plan.run(folder, lambda writer, count: told.update({writer: count}))
        except BankError as caught:
            error = caught
        for bank_writer in writers if error is not None else []:
            release_anyhow(bank_writer)
    if not refusing.refused:
        assert error is None
        return False
    assert error is not None or refusing.refused == ["close"] or set(refusing.refused) <= {"unlink"}
    if error is not None:
        assert isinstance(error, (BankWriteError, BankLimit, BankCorrupt)), error
        assert os.strerror(refusing.code) in error.got
        assert error.place.startswith(str(folder.parent))
    check_survived(folder, name, told)
    check_goes_on(folder, name)
    return True


def release_anyhow(bank_writer: BankWriter) -> None:
    try:
        bank_writer.release()
    except BankError:
        for lock in bank_writer._part.locks:
            if lock._descriptor is None:
                continue
            with suppress(OSError):
                os.close(lock._descriptor)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_goes_on_once_the_cause_is_removed(tmp_path: Path, every: int, code: int) -> None:
    """The same writer, whose next commit is what the refused one should have been."""
    last, count = 1, 0
    while True:
        folder = tmp_path / str(last) / "bank"
        refusing = Refusing(code, last, lasts=False)
        bank_writer = opened(folder)
        with without_syncs(), intercepted(refusing):
            for first, size in ((0, 3), (3, 3), (6, 0), (6, 3)):
                bank_writer.append(rows(first, size), {"step": first + size, "num_steps": 9, "info": {}})
                told = bank_writer.num_rows
                try:
                    bank_writer.commit()
                except BankWriteError:
                    assert told == 0 or len(Bank.open(folder, verify="full")) >= told
                    bank_writer.commit()
        bank_writer.close()
        check(Bank.open(folder, verify="full"), 9)
        if not refusing.refused:
            break
        last, count = last + every, count + 1
    assert count > 10 // every


@pytest.mark.parametrize("size", [3, 10])
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
def test_a_refused_block_is_taken_whole(tmp_path: Path, size: int, lasts: bool) -> None:
    """Refused before it, at one of its shards, or after it: its rows wait, all of them, and are not appended again."""
    last, count = 1, 0
    while True:
        folder = tmp_path / str(last) / "bank"
        refusing = Refusing(
            errno.ENOSPC, last, lasts=lasts, calls=("create", "write", "fsync", "replace", "sync_folder")
        )
        bank_writer = opened(folder)
        bank_writer.append(rows(0, 2), {"step": 2, "num_steps": 12, "info": {}})
        refused = False
        with without_syncs(), intercepted(refusing):
            block = rows(2, size)
            try:
                bank_writer.append(block, {"step": 2 + size, "num_steps": 12, "info": {}})
            except BankWriteError:
                refused = True
                assert bank_writer.has_news
                for tensor in block.params.values():
                    tensor.fill_(7.0)  # whoever appended it fills the memory anew
        bank_writer.append(rows(2 + size, 1), {"step": 3 + size, "num_steps": 12, "info": {}})
        bank_writer.close()
        check(Bank.open(folder, verify="full"), 3 + size)
        again = opened(folder, resume=True)
        assert again.state is not None
        assert again.state["step"] == 3 + size
        again.release()
        if not refused:
            break
        last, count = last + 1, count + 1
    assert count > 10


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", FAULTS, ids=errno.errorcode.get)
@pytest.mark.parametrize(
    ("name", "every"),
    [("fresh", 7), ("resume", 11), ("overwrite", 11)]
    + [pytest.param(name, 3 if name == "two writers" else 1, marks=pytest.mark.slow) for name in PLANS],
)
def test_a_disk_that_refuses(tmp_path: Path, tell: Tell, name: str, every: int, code: int, lasts: bool) -> None:
    last, count = 1, 0
    with without_syncs():
        while refuse(tmp_path / str(last) / "bank", name, Refusing(code, last, lasts=lasts)):
            last, count = last + every, count + 1
    assert count
    if every < 7:
        tell(f"{name}, {errno.errorcode[code]}: {count} calls refused")


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
def test_a_disk_that_cannot_be_read(tmp_path: Path, code: int, lasts: bool) -> None:
    write(tmp_path / "bank", [5])
    calls, last, count = ("open_read", "read", "status", "map_private", "names", "regular_size", "identity"), 1, 0
    while True:
        refusing = Refusing(code, last, lasts=lasts, calls=calls)
        problem, bank = None, None
        with intercepted(refusing):
            try:
                bank = Bank.open(tmp_path / "bank", verify="full")
                bank.block(slice(None))
            except BankError as error:
                problem = error
        if not refusing.refused:
            break
        if problem is None:
            assert code == errno.EMFILE  # which closes what it can and tries again
            assert not lasts
        else:
            assert str(tmp_path / "bank") in problem.place
            assert os.strerror(code) in problem.got
            assert isinstance(
                problem, {errno.EIO: BankCorrupt, errno.EMFILE: (BankLimit, BankCorrupt)}.get(code, BankError)
            )
        check(Bank.open(tmp_path / "bank", verify="full"), 5)
        if bank is not None:
            check(bank, 5)  # a handle that met the fault goes on too
        last, count = last + 1, count + 1
    assert count > 10


@pytest.mark.parametrize("most", [1, 100, 5000])
def test_short_writes_are_continued(tmp_path: Path, most: int) -> None:
    """The kernel may take some of the bytes; what is left follows."""

    def shorten(view: memoryview) -> memoryview:
        return view[: most if most > 1 or len(view) < 100 else len(view) // 2]

    def handler(name: str, real: Any, *args: Any, **options: Any) -> Any:
        return real(args[0], shorten(args[1])) if name == "write" else real(*args, **options)

    run_all(steps(opened(tmp_path / "plain"), [3, 6], ignore))
    with intercepted(handler):
        run_all(steps(opened(tmp_path / "bank"), [3, 6], ignore))
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "bank" / path.name).read_bytes() == path.read_bytes()


# 5, 6 and 8: limits of the kernel


def write_under(folder: Path) -> tuple[dict[str, int], BankError | None]:
    """What was acknowledged of a run, and what ended it."""
    told: dict[str, int] = {}
    bank_writer = None
    try:
        bank_writer = opened(folder)
        run_all(steps(bank_writer, [3, 6, 0, 2], lambda writer, count: told.update({writer: count})))
    except BankError as error:
        if bank_writer is not None:
            bank_writer.release()
        return told, error
    return told, None


def file_sizes(root: str, limits: list[int]) -> dict[str, int]:
    """Runs under each limit of a file's size, which go on without it."""
    figures = {"refused": 0, "acknowledged": 0}
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with without_syncs():
        for limit in limits:
            folder = Path(root) / str(limit) / "bank"
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            told, error = write_under(folder)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            assert error is None or isinstance(error, BankWriteError), error
            assert error is None or error.got == os.strerror(errno.EFBIG)
            check_survived(folder, "fresh", told)
            check_goes_on(folder, "fresh")
            figures["refused"] += error is not None
            figures["acknowledged"] += told.get("main", 0)
    return figures


@pytest.mark.parametrize("step", [512, pytest.param(128, marks=pytest.mark.slow)])
def test_a_limit_of_file_sizes(tmp_path: Path, alone: Alone, tell: Tell, step: int) -> None:
    limits = list(range(0, 7000, step))
    figures = alone(file_sizes, tmp_path, limits)
    assert 0 < figures["refused"] < len(limits)
    assert figures["acknowledged"] > 0
    tell(f"{len(limits)} limits: {figures}")


def apart() -> str | None:
    """Give this process mounts of its own; why not, where the kernel forbids it."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    flags = 0x00020000 | (0x10000000 if user else 0)  # CLONE_NEWNS, and CLONE_NEWUSER for who is not root
    if libc.unshare(flags):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # MS_REC | MS_PRIVATE
        return f"mount: {os.strerror(ctypes.get_errno())}"
    return None


def mount(kind: str, source: Path, target: Path, flags: int, options: str) -> str | None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(str(source).encode(), str(target).encode(), kind.encode(), flags, options.encode()):
        return f"mount: {os.strerror(ctypes.get_errno())}"
    return None


def small_disks(root: str, pages: list[int]) -> dict[str, Any]:
    """Runs on disks of so many pages, which go on when the disk has grown."""
    why = apart()
    figures: dict[str, Any] = {"refused": 0, "acknowledged": 0}
    for size in pages:
        place = Path(root) / str(size)
        place.mkdir()
        why = why or mount("tmpfs", Path("none"), place, 0, f"size={size * 4096}")
        if why:
            return {"why": why}
        told, error = write_under(place / "bank")
        assert error is None or isinstance(error, BankWriteError), error
        assert error is None or error.got == os.strerror(errno.ENOSPC)
        check_survived(place / "bank", "fresh", told)
        mount("tmpfs", Path("none"), place, 32, "size=1000000")  # MS_REMOUNT
        check_goes_on(place / "bank", "fresh")
        figures["refused"] += error is not None
        figures["acknowledged"] += told.get("main", 0)
    return figures


def test_a_full_disk(tmp_path: Path, alone: Alone, tell: Tell) -> None:
    """The disk is full at every place of a run: its size is swept page by page."""
    pages = list(range(1, 26))
    figures = alone(small_disks, tmp_path, pages)
    if "why" in figures:
        pytest.skip(f"no small disk: {figures['why']}; test_a_disk_that_refuses has the injected fault")
    assert 0 < figures["refused"] < len(pages)
    assert figures["acknowledged"] > 0
    tell(f"{len(pages)} disks: {figures}")


def few_descriptors(root: str) -> dict[str, int]:
    figures = {"refused": 0, "acknowledged": 0}
    used = len(os.listdir("/proc/self/fd"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with without_syncs():
        for more in range(8):
            folder = Path(root) / str(more) / "bank"
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, hard))
            told, error = write_under(folder)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            assert error is None or os.strerror(errno.EMFILE) in error.got, error
            check_survived(folder, "fresh", told)
            check_goes_on(folder, "fresh")
            figures["refused"] += error is not None
            figures["acknowledged"] += told.get("main", 0)
    return figures


def test_few_descriptors(tmp_path: Path, alone: Alone, tell: Tell) -> None:
    figures = alone(few_descriptors, tmp_path)
    assert 0 < figures["refused"] < 8
    tell(f"8 limits: {figures}")


# 22: two writers of one name


def claims(root: str, rounds: int, seed: int) -> dict[str, int]:
    """One writes, a second is refused; killed, its name is free at once, and the second goes on."""
    draw, figures = random.Random(seed), {"refused": 0, "taken up": 0}
    for number in range(rounds):
        folder = Path(root) / f"bank-{number // 10}"
        child = Forked(lambda tell, folder=folder: append_for_ever(folder, tell))
        assert child.line() != ""
        try:
            opened(folder, resume=(folder / "bank.json").exists())
            raise AssertionError("a second writer was let in")
        except BankLocked:
            figures["refused"] += 1
        time.sleep(draw.uniform(0, 0.03))
        child.kill()
        _, told = child.end()
        acknowledged = max([0, *map(int, told)])
        if (folder / "bank.json").exists():
            bank_writer = opened(folder, resume=True)
            assert bank_writer.num_rows >= acknowledged
            run_all(steps(bank_writer, [3], ignore))
            counted(Bank.open(folder, verify="full"))
            figures["taken up"] += 1
        else:
            assert not acknowledged
    return figures


@pytest.mark.parametrize("rounds", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_two_writers_of_one_name(tmp_path: Path, alone: Alone, tell: Tell, rounds: int) -> None:
    figures = alone(claims, tmp_path, rounds, rounds)
    assert figures["refused"] == rounds
    tell(f"{rounds} rounds: {figures}")


def test_two_threads_of_one_name(tmp_path: Path) -> None:
    refused: list[BankLocked] = []
    first = opened(tmp_path / "bank")

    def claim() -> None:
        try:
            opened(tmp_path / "bank")
        except BankLocked as error:
            refused.append(error)

    thread = threading.Thread(target=claim)
    thread.start()
    thread.join(10)
    assert len(refused) == 1
    run_all(steps(first, [3], ignore))
    check(Bank.open(tmp_path / "bank", verify="full"), 3)


def forked_writer(root: str) -> str:
    """What a fork gets that appends to the writer of the process it came from."""
    folder = Path(root) / "bank"
    bank_writer = opened(folder)
    parts = steps(bank_writer, [3, 3], ignore)
    next(parts)

    def work(tell: Callable[[str], object]) -> None:
        try:
            bank_writer.append(rows(3, 2))
            bank_writer.commit()
            tell("written")
        except BankError as error:
            tell(type(error).__name__)

    _, told = Forked(work).end()
    run_all(parts)
    check(Bank.open(folder, verify="full"), 6)
    return told[0]


def test_a_fork_of_a_writer_cannot_write(tmp_path: Path, alone: Alone) -> None:
    assert alone(forked_writer, tmp_path) == "BankLocked"


def test_giving_up_leaves_the_rows_of_others(tmp_path: Path) -> None:
    """The writer that began the bank has no row, the one that joined has."""
    first, second = opened(tmp_path / "bank", "a"), opened(tmp_path / "bank", "b")
    first.commit()
    second.append(rows(0, 3))
    second.commit()
    first.abandon()
    second.append(rows(3, 2))
    second.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 5)


# 23: readers beside a writer


def read_beside(root: str, seconds: float) -> dict[str, int]:
    """One writer, four readers: each refreshes, and compares what it sees."""
    folder = Path(root) / "bank"
    run_all(steps(opened(folder), [3], ignore))
    end = time.monotonic() + seconds
    readers = [Forked(lambda tell, number=number: follow(folder, end, number, tell)) for number in range(4)]
    bank_writer = opened(folder, resume=True)
    bank_writer._capacity = 64
    first = bank_writer.num_rows
    while time.monotonic() < end:
        bank_writer.append(rows(first, 8), {"step": first + 8, "num_steps": 0, "info": {}})
        bank_writer.commit()
        first += 8
    bank_writer.close()
    figures = {"rows": first, "reads": 0, "refreshes": 0}
    for reader in readers:
        status, told = reader.end()
        assert status == 0, told
        reads, refreshes, seen = map(int, told[-1].split())
        assert seen > 3
        figures["reads"] += reads
        figures["refreshes"] += refreshes
    check(Bank.open(folder, verify="full"), first)
    return figures


def follow(folder: Path, end: float, seed: int, tell: Callable[[str], object]) -> None:
    draw, reads, refreshes = random.Random(seed), 0, 0
    bank = Bank.open(folder)
    while time.monotonic() < end:
        newer = bank.refresh() if seed % 2 else Bank.open(folder, verify="full" if seed else "first-use")
        refreshes += 1
        assert len(newer) >= len(bank), "backwards"
        for source in (bank, newer):
            start = draw.randrange(len(source))
            found, expected = source.block(slice(start, start + 40)), rows(start, min(40, len(source) - start))
            assert all(torch.equal(found.params[name], expected.params[name]) for name in LAYOUT.names)
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:5], expected[1:5], strict=True))
            reads += 1
        bank = newer
    tell(f"{reads} {refreshes} {len(bank)}")


@pytest.mark.parametrize("seconds", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_readers_beside_a_writer(tmp_path: Path, alone: Alone, tell: Tell, seconds: int) -> None:
    tell(f"{seconds} s: {alone(read_beside, tmp_path, seconds)}")


# 21: a folder that another takes the place of


@pytest.mark.parametrize("verify", ["first-use", "never"])
def test_a_folder_swapped_while_it_is_opened_is_read_whole_or_refused(tmp_path: Path, verify: Any) -> None:
    """Before each call in turn: the other has the same bank.json and shards of the same sizes, with other rows."""
    for name, first in (("one", 0), ("other", 20)):
        bank_writer = opened(tmp_path / name)
        for start in (0, 4, 8):
            bank_writer.append(rows(first + start, 4))
            bank_writer.commit()
        bank_writer.close()
    found: dict[str, int] = {"one": 0, "other": 0, "refused": 0}
    last = 0
    while True:
        shutil.copytree(tmp_path / "one", tmp_path / "bank")
        seen = [0]

        def handler(name: str, real: Any, *args: Any, seen: list[int] = seen, last: int = last, **options: Any) -> Any:
            if seen[0] == last:
                (tmp_path / "bank").rename(tmp_path / "moved")
                shutil.copytree(tmp_path / "other", tmp_path / "bank")
            seen[0] += 1
            return real(*args, **options)

        index = None
        with intercepted(handler):
            try:
                index = (-Bank.open(tmp_path / "bank", verify=verify).log_joint).long().tolist()
            except BankError:
                found["refused"] += 1
        if index is not None:
            assert index in (list(range(12)), list(range(20, 32))), f"rows of both at call {last}"
            found["one" if index[0] == 0 else "other"] += 1
        shutil.rmtree(tmp_path / "bank")
        if seen[0] <= last:
            break
        shutil.rmtree(tmp_path / "moved")
        last += 1
    assert found["refused"] > 10
    assert found["other"] == 1  # swapped before the first call
    assert found["one"] >= 1


# 26: a file cut while it is mapped


def touch_cut(root: str, verify: Any, touched: bool) -> str:
    """How a reader ends whose shard is cut to its header."""
    folder = Path(root) / "bank"
    shard = folder / "main-000000.safetensors"

    def work(tell: Callable[[str], object]) -> None:
        bank = Bank.open(folder, verify=verify)
        if touched:
            bank[0]
        else:
            bank._shards[0]._map()  # type: ignore[attr-defined]
        os.truncate(shard, 4096)
        try:
            check(bank, 7)
            tell("read")
        except BankCorrupt:
            tell("BankCorrupt")

    status, told = Forked(work).end()
    return signal.Signals(-status).name if status < 0 else told[0]


@pytest.mark.parametrize("verify", ["first-use", "never"])
@pytest.mark.parametrize("touched", [True, False])
def test_a_file_cut_while_it_is_mapped_gives_no_rows(tmp_path: Path, alone: Alone, verify: str, touched: bool) -> None:
    """The kernel ends the process, as the format page says; no zeros are read for rows."""
    write(tmp_path / "bank", [7])
    assert alone(touch_cut, tmp_path, verify, touched) in ("SIGBUS", "BankCorrupt")


# 27 and 28: permissions


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {path.name: path.stat() for path in (folder, *sorted(folder.iterdir()))}
    return {name: (s.st_mtime_ns, s.st_size, s.st_ino) for name, s in found.items()}


def read_only(root: str, way: str) -> dict[str, Any]:
    """Read, then try to write, where writing is forbidden by the folder's mode or by the mount."""
    folder = Path(root) / "bank"
    before = listing(folder)
    if way == "mount":
        why = apart() or mount("none", folder, folder, 4096, "") or mount("none", folder, folder, 4096 | 32 | 1, "")
        if why:
            return {"why": why}
    else:
        for path in (folder, *folder.iterdir()):
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
        os.chdir(folder.parent)
        folder.parent.chmod(0o755)
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        folder = Path("bank")
    check(Bank.open(folder, verify="full"), 7)
    assert Bank.open(folder).refresh().digest == Bank.open(folder).digest
    assert verify_files(folder) == []
    problems = []
    for options in ({"resume": True}, {"overwrite": True}, {"writer": "other"}):
        try:
            bank_writer = BankWriter(folder, layout=LAYOUT, config={"seed": 0}, **options)  # type: ignore[arg-type]
            bank_writer.append(rows(7, 2))
            bank_writer.close()
        except BankWriteError as error:
            problems.append(error.got)
    assert listing(folder) == before
    return {"problems": problems}


@pytest.mark.parametrize(("way", "code"), [("mode", errno.EACCES), ("mount", errno.EROFS)])
def test_a_folder_that_cannot_be_written_is_read(tmp_path: Path, alone: Alone, way: str, code: int) -> None:
    write(tmp_path / "bank", [7])
    answer = alone(read_only, tmp_path, way)
    if "why" in answer:
        pytest.skip(f"no mount that is only read: {answer['why']}; the mode of the folder has the same test")
    assert answer["problems"] == [os.strerror(code)] * 3


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        run_all(steps(opened(tmp_path / "bank"), [3, 6], ignore))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "bank").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~mask)
    assert stat.S_IMODE((tmp_path / "bank").stat().st_mode) == 0o777 & ~mask
    assert len(modes) > 6


# 30: handles in other processes


class Rows(torch.utils.data.Dataset):
    """The rows of a bank, each with the number of shards that its worker maps."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return len(self.bank)

    def __getitem__(self, index: int) -> tuple[int, dict[str, torch.Tensor]]:
        return os.getpid(), {name: tensor.clone() for name, tensor in self.bank[index].items()}


def load(root: str, method: str) -> int:
    """Read a bank through two workers while it grows; how many processes answered."""
    folder = Path(root) / "bank"
    bank_writer = opened(folder)
    run = steps(bank_writer, [7, 3], ignore)
    next(run)
    bank = Bank.open(folder)
    bank[0]
    loader = torch.utils.data.DataLoader(
        Rows(bank), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=60
    )
    workers = set()
    run_all(run)  # the loader's workers open the bank when it has more rows, and see those of its handle
    for index, (worker, params) in enumerate(loader):
        workers.add(worker)
        expected = rows(index, 1)
        assert all(torch.equal(params[name], expected.params[name][0]) for name in LAYOUT.names)
    assert index == 6
    assert os.getpid() not in workers
    return len(workers)


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_workers_of_a_loader_read_the_snapshot(tmp_path: Path, alone: Alone, method: str) -> None:
    assert alone(load, tmp_path, method) == 2
