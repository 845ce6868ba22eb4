"""Banks altered at random: what opens has the rows of a commit, and anything else is a BankError.

Bytes are flipped, cut, inserted, doubled and swapped; JSON gets absurd values under a checksum that fits.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import signal
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from disk_faults import Forked, check_rows_of, opened, run_all, steps
from memory import peak

from bnn.bank import Bank, verify_files
from bnn.bank import format as fmt
from bnn.errors import BankError

BATCH = 100
MEMORY = 200 * 2**20  # bytes that a look at a broken bank may take beyond those of a whole one
SECONDS = 10

ABSURD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 2**31, 2**48, 2**63, 2**64, 10**30, "", "0", "x" * 10**4, "\0", "\ud800",
    "../up", "/etc/passwd", "main-000000.safetensors", "manifest-main.json", "0" * 64, [], {}, [[]], [None], [0], {"": None},
    [0] * 10**4, {"a": {"b": {"c": []}}}, "float32", "F64", "null", "\u202e", "9" * 400,
)  # fmt: skip


# Mutations


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in JSON."""
    if at:
        yield at
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def mutated_json(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three values replaced, removed, doubled, renamed or exchanged."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        ways = list(places(config))
        if not ways:
            break
        way = draw.choice(ways)
        holder: Any = config
        for key in way[:-1]:
            holder = holder[key]
        key, how = way[-1], draw.randrange(7)
        if how <= 2:
            holder[key] = draw.choice(ABSURD)
        elif how == 3:
            del holder[key]
        elif how == 4 and type(holder[key]) in (int, float):
            holder[key] = draw.choice(
                (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2**20, float(holder[key]))
            )
        elif how == 5 and isinstance(holder, list):
            holder.insert(draw.randrange(len(holder) + 1), json.loads(json.dumps(holder[key])))
        elif how == 5:
            holder[draw.choice(("", "x", "rows", "file", "__metadata__"))] = json.loads(json.dumps(holder[key]))
        else:
            numbers = [w for w in ways if w != way and len(w) == len(way) and w[:-1] == way[:-1]]
            if numbers:
                other = draw.choice(numbers)[-1]
                if isinstance(holder, dict) or max(other, key) < len(holder):
                    holder[key], holder[other] = holder[other], holder[key]
    return config


def mutated_bytes(raw: bytes, draw: random.Random) -> bytes:
    changed, how = bytearray(raw), draw.randrange(6)
    start = draw.randrange(len(raw)) if draw.random() < 0.6 else draw.randrange(min(len(raw), 1500))
    size = draw.choice((1, 2, 8, 64, 512, 4096))
    if how == 0:
        for _ in range(draw.choice((1, 1, 2, 9))):
            changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif how == 1:
        del changed[start : start + size]
    elif how == 2:
        changed[start:start] = draw.randbytes(size)
    elif how == 3:
        changed[start:start] = changed[start : start + size]
    elif how == 4:
        changed[start : start + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    else:
        other = draw.randrange(len(raw))
        one, two = bytes(changed[start : start + 8]), bytes(changed[other : other + 8])
        changed[start : start + 8], changed[other : other + 8] = two, one
    return bytes(changed)


def resealed(path: Path, raw: bytes, draw: random.Random) -> bytes:
    """Absurd JSON whose checksum fits; for tensors, an absurd header."""
    if path.suffix == ".json":
        config = mutated_json(json.loads(raw), draw)
        if draw.random() < 0.97:
            config["checksum"] = fmt.checksum(config)
        return json.dumps(config).encode()
    length = int.from_bytes(raw[:8], "little")
    text = json.dumps(mutated_json(json.loads(raw[8 : 8 + length]), draw), separators=(",", ":")).encode()
    text += b" " * (length - len(text) if draw.random() < 0.7 else 0)
    declared = len(text) if draw.random() < 0.9 else draw.choice((0, 2**32, 2**63, len(text) - 1, 10**8 + 1))
    return declared.to_bytes(8, "little") + text + raw[8 + length :]


def mutate(folder: Path, draw: random.Random) -> str:
    """Alter one file of a bank; which, and how."""
    path = draw.choice(sorted(p for p in folder.iterdir() if p.stat().st_size))
    raw = path.read_bytes()
    how = draw.choice(("bytes", "resealed", "resealed"))
    changed = mutated_bytes(raw, draw) if how == "bytes" else resealed(path, raw, draw)
    path.write_bytes(changed)
    if how == "resealed" and path.suffix != ".json" and draw.random() < 0.8:
        refit(folder, path.name, changed)
    return f"{path.name}: {how}"


def refit(folder: Path, name: str, raw: bytes) -> None:
    """Sums and sizes in the JSON files that fit an altered file, so that its content is what must be refused."""
    for path in folder.glob("*.json"):
        config = json.loads(path.read_text())
        facts = [*config.get("shards", []), config.get("state"), config.get("base")]
        for fact in facts:
            if isinstance(fact, dict) and fact.get("file") == name:
                fact |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
                header = raw[: 8 + int.from_bytes(raw[:8], "little")]
                if "crc32" in fact:
                    fact["crc32"][fmt.HEADER] = zlib.crc32(header)
                path.write_text(json.dumps(fmt.seal(config, path.name)))


# A look


def look(folder: Path) -> str:
    """What a reader and a writer that resumes make of a bank: the kind of error, or "rows" if they are right."""
    kind, told = "rows", None
    try:
        bank = Bank.open(folder)
        check_rows_of(bank, commits=(0, 3, 7, 9))
        repr(bank)
        bank.base()
        bank.check_headers()
        bank.check_values()
        bank.refresh()
    except BankError as error:
        kind, told = type(error).__name__, error
    if told is not None:
        assert told.place.startswith(str(folder)) or "/" not in told.place, told
        assert len(str(told)) < 2000, "a message as long as a page"
    for work in (lambda: verify_files(folder), lambda: opened(folder, resume=True).release()):
        with suppress(BankError):
            work()
    return kind


def batch(root: str, first: int, count: int, tell: Callable[[str], object]) -> None:
    """Alter copies of a bank and look at each, under limits of time and memory."""
    folder, whole = Path(root) / "work" / "bank", Path(root) / "bank"
    shutil.rmtree(folder.parent, ignore_errors=True)
    shutil.copytree(whole, folder)
    look(folder)
    before = peak()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, in_use + 2**30))
    for seed in range(first, first + count):
        for path in folder.iterdir():
            if not (whole / path.name).exists():
                path.unlink()
        for path in whole.iterdir():
            shutil.copyfile(path, folder / path.name)
        signal.alarm(SECONDS)
        begun = time.monotonic()
        what = "nothing"
        try:
            what = mutate(folder, random.Random(seed))
            kind = look(folder)
        except Exception as error:
            kind = f"WRONG {what}: {type(error).__name__} {error}"[:500].replace("\n", " ")
        signal.alarm(0)
        more = peak() - before
        if more > MEMORY:
            kind = f"WRONG {what}: {more} bytes more"
        elif time.monotonic() - begun > SECONDS / 2:
            kind = f"WRONG {what}: slow"
        elif sorted(p.name for p in folder.parent.iterdir()) != ["bank"]:
            kind = f"WRONG {what}: files outside"
        tell(f"{seed} {kind}")


def fuzz(root: str, first: int, count: int) -> tuple[dict[str, int], list[str]]:
    """How often each end came, and the ends that must not be."""
    whole = Path(root) / "bank"
    run_all(steps(opened(whole), [3, 4, 2], lambda writer, rows: None))
    kinds, wrong = Counter[str](), []
    there = {path.name for path in Path(root).iterdir()} | {"work"}
    start = first
    while start < first + count:
        size = min(BATCH, first + count - start)
        status, told = Forked(lambda tell, start=start, size=size: batch(root, start, size, tell)).end()
        done = len(told)
        for line in told:
            seed, kind = line.split(" ", 1)
            kinds["wrong" if kind.startswith("WRONG") else kind] += 1
            wrong += [f"seed {seed}: {kind}"] * kind.startswith("WRONG")
        if status:
            kinds["died"] += 1
            wrong.append(f"seed {start + done}: ended with {status}")
            done += 1
        start += done
        assert {path.name for path in Path(root).iterdir()} == there
    return dict(kinds), wrong


@pytest.mark.parametrize("count", [300, pytest.param(2_500, marks=pytest.mark.slow)])
def test_altered_banks(tmp_path: Path, alone: Callable[..., Any], tell: Callable[[str], None], count: int) -> None:
    kinds, wrong = alone(fuzz, tmp_path, count, count, limit=400)
    tell(f"seeds {count} to {2 * count - 1}: {kinds}")
    assert not wrong, "\n".join(wrong)
    assert kinds["rows"] > count // 50  # alterations of what means nothing are no error
    assert kinds["BankCorrupt"] > count // 5
