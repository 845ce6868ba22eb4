"""Loss of power: every call that a run made is written down, and every folder that a crash can leave is made from it.

After SQLite's test6: what no fsync covers may be there, may be missing or may be torn, each thing on its own.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from disk_faults import PLANS, check_goes_on, check_survived, intercepted, without_syncs

SECTOR = 512
EXHAUSTIVE = 2**12  # as many combinations of what no sync covers are all tried
FOLDER = -1  # in place of a file's number


class Step(NamedTuple):
    """One thing that a run did."""

    kind: str  # names, write, fsync, sync_folder or told
    names: tuple[tuple[str, int | None], ...] = ()  # paths, and the file or folder that each has now
    file: int = 0
    raw: bytes = b""
    folder: str = ""
    told: tuple[str, int] = ("", 0)


class Recording(NamedTuple):
    plan: str
    before: dict[str, bytes | None]  # what is durable at the beginning; None for a folder
    steps: list[Step]


@cache
def recorded(plan: str) -> Recording:
    """What a run of a plan does to the disk."""
    import tempfile

    with tempfile.TemporaryDirectory() as root, without_syncs():
        folder = Path(root) / "deep" / "bank"
        PLANS[plan].prepare(folder)
        before = {
            str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
            for path in sorted(Path(root).rglob("*"))
        }
        with recording(Path(root)) as steps:
            PLANS[plan].run(folder, lambda writer, count: steps.append(Step("told", told=(writer, count))))
    return Recording(plan, before, steps)


@contextmanager
def recording(root: Path) -> Iterator[list[Step]]:
    steps: list[Step] = []
    numbers = itertools.count()
    files: dict[str, int] = {}  # path -> number
    descriptors: dict[int, int] = {}

    def short(path: Path) -> str:
        return str(Path(path).relative_to(root))

    def handler(name: str, real: Any, *args: Any, **options: Any) -> Any:
        missing = []
        if name == "make_folders":
            missing = [f for f in (args[0], *args[0].parents) if not f.exists()]
        is_new = name == "create" or (name == "open_lock" and not args[0].exists())
        result = real(*args, **options)
        if is_new:
            files[short(args[0])] = next(numbers)
            steps.append(Step("names", names=((short(args[0]), files[short(args[0])]),)))
        if name == "create":
            descriptors[result] = files[short(args[0])]
        elif name == "write":
            steps.append(Step("write", file=descriptors[args[0]], raw=bytes(args[1][:result])))
        elif name == "fsync":
            steps.append(Step("fsync", file=descriptors[args[0]]))
        elif name == "close":
            descriptors.pop(args[0], None)
        elif name == "replace":
            source, target = short(args[0]), short(args[1])
            if source not in files:  # there before the run, and durable
                files[source] = next(numbers)
                steps.append(Step("write", file=files[source], raw=args[1].read_bytes()))
                steps.append(Step("fsync", file=files[source]))
            files[target] = files.pop(source)
            steps.append(Step("names", names=((target, files[target]), (source, None))))
        elif name == "unlink":
            steps.append(Step("names", names=((short(args[0]), None),)))
        elif name == "sync_folder":
            steps.append(Step("sync_folder", folder=short(args[0])))
        elif name == "make_folders":
            steps.extend(Step("names", names=((short(f), FOLDER),)) for f in reversed(missing))
        return result

    with intercepted(handler):
        yield steps


class Pending(NamedTuple):
    """A moment of a run, and what no sync had covered by then."""

    names: list[tuple[Step, bool]]  # changes of names in order, and whether each is durable
    whole: dict[int, bytes]  # what was written to each file
    durable: dict[int, int]  # how many of its bytes an fsync covers
    told: dict[str, int]

    @property
    def loose_names(self) -> list[int]:
        return [place for place, (_, fixed) in enumerate(self.names) if not fixed]

    @property
    def loose_files(self) -> list[int]:
        return [file for file, raw in self.whole.items() if self.durable.get(file, 0) < len(raw)]


def moments(steps: list[Step]) -> Iterator[Pending]:
    """The run after each step that changes what a crash can leave."""
    now = Pending([], {}, {}, {})
    yield now
    for step in steps:
        names, whole, durable, told = list(now.names), dict(now.whole), dict(now.durable), dict(now.told)
        if step.kind == "names":
            names.append((step, False))
        elif step.kind == "write":
            whole[step.file] = whole.get(step.file, b"") + step.raw
        elif step.kind == "fsync":
            durable[step.file] = len(whole.get(step.file, b""))
        elif step.kind == "sync_folder":
            names = [(s, fixed or str(Path(s.names[0][0]).parent) == step.folder) for s, fixed in names]
        else:
            told[step.told[0]] = step.told[1]
        now = Pending(names, whole, durable, told)
        yield now


def torn(raw: bytes, durable: int, draw: random.Random) -> bytes:
    """Bytes of which those after the durable ones came by sectors: some whole, some zero, some of another file."""
    found = bytearray(raw)
    for start in range(durable, len(raw), SECTOR):
        size = min(SECTOR, len(raw) - start)
        kind = draw.randrange(3)
        if kind:
            found[start : start + size] = bytes(size) if kind == 1 else draw.randbytes(size)
    return bytes(found)


def folders(before: dict[str, bytes | None], now: Pending, draw: random.Random) -> Iterator[dict[str, bytes | None]]:
    """What a crash at this moment can leave: all of it, or a sample of 200 where much is pending."""
    names, files = now.loose_names, now.loose_files
    options = [(False, True)] * len(names) + [("kept", "dropped", "torn")] * len(files)
    choices: Any = itertools.product(*options)
    if math.prod(map(len, options)) > EXHAUSTIVE:
        choices = [tuple(draw.choice(option) for option in options) for _ in range(200)]
    for choice in choices:
        kept = {place for place, keep in zip(names, choice, strict=False) if keep}
        contents = dict(now.whole)
        for file, how in zip(files, choice[len(names) :], strict=True):
            durable = now.durable.get(file, 0)
            if how == "dropped":
                contents[file] = contents[file][:durable]
            elif how == "torn":
                contents[file] = torn(contents[file], durable, draw)
        found = dict(before)
        for place, (step, fixed) in enumerate(now.names):
            if fixed or place in kept:
                for path, file in step.names:
                    if file is None:
                        found.pop(path, None)
                    else:
                        found[path] = None if file == FOLDER else contents.get(file, b"")
        yield {path: raw for path, raw in found.items() if all(str(p) in found for p in list(Path(path).parents)[:-1])}


Tell = Callable[[str], None]
State = tuple[dict[str, bytes | None], dict[str, int]]


def states(record: Recording, steps: list[Step], seed: int) -> Iterator[State]:
    """Every folder that a crash can leave, each once for each list of what was acknowledged; moments at random."""
    draw = random.Random(seed)
    found = set()
    for now in draw.sample(order := list(moments(steps)), len(order)):
        for files in folders(record.before, now, draw):
            named = frozenset((path, raw and hashlib.sha256(raw).digest()) for path, raw in files.items())
            if (named, tuple(now.told.items())) not in found:
                found.add((named, tuple(now.told.items())))
                yield files, now.told


def make(root: Path, files: dict[str, bytes | None]) -> Path:
    """The folder of a bank as a crash left it."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, raw in sorted(files.items()):
        if raw is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(raw)
    return root / "deep" / "bank"


def violation(root: Path, plan: str, state: State) -> str | None:
    """What is wrong with a folder that a crash left: nothing, if the bank keeps its word."""
    files, told = state
    folder = make(root, files)
    try:
        check_survived(folder, plan, told)
        check_goes_on(folder, plan)
    except Exception as error:
        there = {path: len(raw) if raw is not None else "folder" for path, raw in files.items()}
        return f"{type(error).__name__}: {error}\nacknowledged {told}, left {there}"
    return None


def replay(root: Path, plan: str, found: list[State]) -> None:
    with without_syncs():
        for state in found:
            problem = violation(root, plan, state)
            assert problem is None, problem


@pytest.mark.parametrize("plan", PLANS)
def test_power_lost_at_any_moment(tmp_path: Path, plan: str, tell: Tell) -> None:
    record = recorded(plan)
    found = list(states(record, record.steps, seed=0))
    replay(tmp_path / "state", plan, random.Random(0).sample(found, 100))
    tell(f"{plan}: 100 of {len(found)} states of {len(record.steps)} steps replayed")


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_power_lost_at_any_moment_in_every_way(tmp_path: Path, plan: str, tell: Tell) -> None:
    record = recorded(plan)
    found = list(states(record, record.steps, seed=1))
    replay(tmp_path / "state", plan, found)
    tell(f"{plan}: {len(found)} states of {len(record.steps)} steps replayed")


# A sync less

KINDS = {
    "shard": r"[a-z]+-\d{6}\.safetensors",
    "state": r"state-.*",
    "manifest": r"manifest-.*",
    "bank": r"bank\.json",
    "base": r"base\.safetensors",
    "removed": r"\.tmp-removed-bank\.json",  # what bank.json is called while an overwritten bank goes
}


def kind_of(path: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, Path(path).name))


def without(steps: list[Step], sync: str, kind: str) -> list[Step]:
    """The steps of a writer that leaves out one sync: the fsync of a kind of file, or its folder's after the rename."""
    renamed = {step.names[0][1]: kind_of(step.names[0][0]) for step in steps if len(step.names) == 2}
    last, kept = "", []
    for step in steps:
        if len(step.names) == 2:
            last = kind_of(step.names[0][0])
        elif step.names and step.names[0][1] is None:
            last = "unlinked"
        if step.kind != sync or kind != (renamed[step.file] if sync == "fsync" else last or "parents"):
            kept.append(step)
    return kept


@pytest.mark.parametrize(
    ("sync", "kind", "plan"),
    [
        ("fsync", "shard", "fresh"),
        ("fsync", "state", "fresh"),
        ("fsync", "manifest", "fresh"),
        ("fsync", "bank", "fresh"),
        ("fsync", "base", "fresh"),
        ("sync_folder", "shard", "stateless"),  # a state's covers it, where there is one
        ("sync_folder", "state", "resume"),
        ("sync_folder", "manifest", "fresh"),
        ("sync_folder", "base", "fresh"),
        ("sync_folder", "bank", "fresh"),
        ("sync_folder", "removed", "overwrite"),
        ("sync_folder", "unlinked", "overwrite"),
        ("sync_folder", "parents", "fresh"),
    ],
)
def test_no_sync_can_be_left_out(tmp_path: Path, sync: str, kind: str, plan: str) -> None:
    record = recorded(plan)
    fewer = without(record.steps, sync, kind)
    assert len(fewer) < len(record.steps)
    found = states(record, fewer, seed=0)
    with without_syncs():
        problems = (violation(tmp_path / "state", plan, state) for state in found)
        assert any(problems), "the replay does not miss it"
