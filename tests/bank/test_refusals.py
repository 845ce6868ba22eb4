"""What a reader must refuse, however well it is made: banks mixed, rolled back, oversized or pointing elsewhere."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from bank.test_bank import LAYOUT, check, rows, write
from forging import edit_fact, edit_json, replace_tensors
from memory import PEAK

from bnn.bank import Bank, BankWriter, disk, files, mean, thin, verify_files, write_state_dict, wrong_sizes
from bnn.bank import format as fmt
from bnn.errors import BankCorrupt, BankError, BankExists, BankLimit, BankLocked, BankMismatch, BankNotFound
from bnn.layout import layout_of
from bnn.types import make_block

TESTS = str(Path(__file__).parents[1])


def write_seeded(path: Path, seed: int, size: int, **options: Any) -> Bank:
    bank_writer = BankWriter(path, layout=LAYOUT, config={"seed": seed}, **options)
    bank_writer.append(rows(0, size), {"step": size, "num_steps": size, "info": {}})
    bank_writer.close()
    return Bank.open(path)


# Mixed and rolled back


@pytest.mark.parametrize("verify", ["first-use", "never"])
def test_a_shard_of_another_bank_is_refused(tmp_path: Path, verify: Any) -> None:
    """The same rows under another seed: only the bank that the header names tells them apart."""
    write_seeded(tmp_path / "a", 0, 7)
    write_seeded(tmp_path / "b", 1, 7)
    shutil.copy(tmp_path / "b" / "main-000000.safetensors", tmp_path / "a")
    bank = Bank.open(tmp_path / "a", verify=verify)
    with pytest.raises(BankMismatch, match=r"a/main-000000\.safetensors: want bank [0-9a-f]{64}, got [0-9a-f]{64}"):
        bank[0]
    assert len(bank.check_headers()) == 1


def test_a_manifest_of_another_bank_is_refused(tmp_path: Path) -> None:
    write_seeded(tmp_path / "a", 0, 7)
    write_seeded(tmp_path / "b", 1, 7)
    for name in ("main-000000.safetensors", "manifest-main.json"):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a")
    with pytest.raises(BankMismatch, match=r"manifest-main\.json: want the bank [0-9a-f]{64}, got"):
        Bank.open(tmp_path / "a")


def test_a_refresh_never_goes_backwards(tmp_path: Path) -> None:
    path = tmp_path / "bank"
    bank_writer = BankWriter(path, layout=LAYOUT, config={})
    bank_writer.append(rows(0, 3))
    bank_writer.commit()
    older = (path / "manifest-main.json").read_bytes()
    bank_writer.append(rows(3, 4))
    bank_writer.close()
    bank = Bank.open(path)
    (path / "manifest-main.json").write_bytes(older)
    with pytest.raises(BankMismatch, match="want generation 2 of writer 'main' at least, got 1; an older commit"):
        bank.refresh()
    check(bank, 7)
    check(Bank.open(path), 3)  # by itself it is a right bank
    (path / "manifest-main.json").unlink()
    with pytest.raises(BankMismatch, match="got none"):
        bank.refresh()


def test_a_refresh_does_not_take_another_bank_for_this_one(tmp_path: Path) -> None:
    bank = write_seeded(tmp_path / "bank", 0, 7)
    write_seeded(tmp_path / "bank", 1, 9, overwrite=True)
    with pytest.raises(BankMismatch, match="want the bank that was opened, got another in its place"):
        bank.refresh()


def test_overwriting_under_a_reader_never_gives_it_other_rows(tmp_path: Path) -> None:
    mapped = write_seeded(tmp_path / "bank", 0, 7)
    before = mapped[2]["0.weight"]
    unmapped = Bank.open(tmp_path / "bank", verify="never")
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 1}, overwrite=True)
    bank_writer.append(rows(100, 7))
    bank_writer.close()
    assert torch.equal(before, rows(2, 1).params["0.weight"][0])
    with pytest.raises(BankMismatch, match=r"main-000000\.safetensors: want bank"):
        unmapped[2]


def test_a_handle_travels_with_its_snapshot(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 4))
    bank_writer.commit()
    bank = Bank.open(tmp_path / "bank")
    bank_writer.append(rows(4, 3))
    bank_writer.close()
    sent = pickle.loads(pickle.dumps(bank))
    check(sent, 4)
    assert sent.digest == bank.digest
    raw = pickle.dumps(bank)
    write_seeded(tmp_path / "bank", 1, 9, overwrite=True)
    with pytest.raises(BankMismatch, match="another in its place"):
        pickle.loads(raw)


# Several writers


def test_writers_that_begin_at_once_fill_one_bank(tmp_path: Path) -> None:
    """Eight threads, each a writer of its own: one begins the bank, the others join it."""
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer=f"w{number}")
            barrier.wait(10)
            bank_writer.append(rows(number * 3, 3))
            bank_writer.close()
        except BaseException as error:  # told by the thread that looks
            failed.append(error)

    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    bank = Bank.open(tmp_path / "bank", verify="full")
    assert bank.block(slice(None)).log_joint.tolist() == [-float(row) for row in range(24)]
    assert sorted(bank.chain.tolist()) == list(range(24))


def test_a_bank_that_another_writer_begins_while_one_looks_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look for `bank.json` and the look at what else is there."""
    real, looks = disk.names, list[Path]()

    def names(folder: Path) -> list[str]:
        looks.append(folder)
        if len(looks) == 1:
            other = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="w1")
            other.append(rows(3, 3))
            other.close()
        return real(folder)

    (tmp_path / "bank").mkdir()
    monkeypatch.setattr(disk, "names", names)
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="w0")
    bank_writer.append(rows(0, 3))
    bank_writer.close()
    assert looks
    assert Bank.open(tmp_path / "bank").block(slice(None)).log_joint.tolist() == [-float(row) for row in range(6)]


def test_joining_wants_the_same_configuration(tmp_path: Path) -> None:
    write_seeded(tmp_path / "bank", 0, 4)
    with pytest.raises(BankMismatch, match="want seed = 0, got 1"):
        write_seeded(tmp_path / "bank", 1, 4, writer="rank1")
    write_seeded(tmp_path / "bank", 0, 5, writer="rank1")
    with pytest.raises(BankExists, match="which is kept"):
        write_seeded(tmp_path / "bank", 0, 5, writer="rank1")  # has its part already
    with pytest.raises(BankExists, match="which is kept"):
        write_seeded(tmp_path / "bank", 0, 5)
    assert len(Bank.open(tmp_path / "bank")) == 9


# Oversized


def test_a_header_longer_than_its_tensors_account_for_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    path = tmp_path / "bank" / "main-000000.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    for declared, error in ((2**63, BankCorrupt), (len(raw) + 1, BankCorrupt)):
        path.write_bytes(struct.pack("<Q", declared) + raw[8:])
        with pytest.raises(error, match="a header of"):
            Bank.open(tmp_path / "bank")[0]
    padded = struct.pack("<Q", length + 2**23) + raw[8 : 8 + length] + b" " * 2**23 + raw[8 + length :]
    path.write_bytes(padded)
    edit_fact(tmp_path / "bank", bytes=len(padded))
    with pytest.raises(BankLimit, match=r"main-000000\.safetensors: want a header of at most"):
        Bank.open(tmp_path / "bank")[0]


@pytest.mark.parametrize("name", ["bank.json", "manifest-main.json"])
def test_json_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bank", [7])
    os.truncate(tmp_path / "bank" / name, 2**30)  # a hole: it takes no room
    with pytest.raises(BankLimit, match=rf"{name}: want at most \d+ bytes, got 1073741824"):
        Bank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**6,
        '{"a":' * 10**5,
        '{"format": "bnn-bank", "version": ' + "9" * 10**5 + "}",
        '{"format": "bnn-bank", "version": 1e999}',
        '{"format": "bnn-bank", "version": 2, "version": 2}',
        "\xff\xfe",
    ],
)
def test_json_bombs_are_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "bank", [7])
    for name in ("manifest-main.json", "bank.json"):
        (tmp_path / "bank" / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(BankError, match=name):
            Bank.open(tmp_path / "bank")


@pytest.mark.parametrize("shape", [[2] * 10**5, [2**40, 2**40], [-1, 12], [3.0, 4], [True, 12], ["3", 4]])
def test_shapes_that_are_none_are_refused(tmp_path: Path, shape: list[Any]) -> None:
    write(tmp_path / "bank", [1])
    path = tmp_path / "bank" / "main-000000.safetensors"
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["0.weight"]["shape"] = shape
    text = json.dumps(header).encode()
    forged = struct.pack("<Q", len(text)) + text + raw[8 + length :]
    path.write_bytes(forged)
    edit_fact(tmp_path / "bank", bytes=len(forged))
    with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors: want dtype, shape and offsets of tensor"):
        Bank.open(tmp_path / "bank")[0]


def test_more_rows_than_the_file_has_room_for_are_refused_at_open(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    edit_fact(tmp_path / "bank", rows=10**12)
    edit_json(tmp_path / "bank" / "manifest-main.json", rows=10**12)
    with pytest.raises(BankCorrupt, match="bytes for 1000000000000 rows"):
        Bank.open(tmp_path / "bank")


def test_a_writer_makes_no_file_that_a_reader_refuses(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "a", layout=LAYOUT, config={"note": "x" * 2**23})
    bank_writer.append(rows(0, 3))
    with pytest.raises(BankLimit, match=r"bank\.json: want at most"):
        bank_writer.commit()
    bank_writer.release()
    bank_writer = BankWriter(tmp_path / "b", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 3), {"step": 3, "num_steps": 9, "info": {"all": list(range(10**5))}})
    with pytest.raises(BankLimit, match=r"manifest-main\.json: want info of at most"):
        bank_writer.commit()
    bank_writer.release()


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.path.insert(0, sys.argv[2])
from bank.test_bank import check
from bnn.bank import Bank
bank = Bank.open(sys.argv[1])
check(bank, 500)
assert bank.chain.shape == (500,)
kept = [bank[i] for i in range(20)]
assert [int(bank.block([i]).log_joint[0]) for i in range(499, -1, -7)] == [-i for i in range(499, -1, -7)]
"""


def test_five_hundred_shards_are_read_with_sixty_four_descriptors(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer._capacity = 1
    bank_writer.append(rows(0, 500))
    bank_writer.close()
    assert len(list((tmp_path / "bank").glob("main-*.safetensors"))) == 500
    code = [sys.executable, "-c", LIMITED, str(tmp_path / "bank"), TESTS]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Not files, not ours


MAKES: dict[str, Callable[[Path, Path], None]] = {
    "pipe": lambda path, away: os.mkfifo(path),
    "folder": lambda path, away: path.mkdir(),
    "device": lambda path, away: path.symlink_to("/dev/zero"),
    "link outside": lambda path, away: path.symlink_to(away),
    "link inside": lambda path, away: path.symlink_to("other-copy"),
    "nothing": lambda path, away: None,
}


@pytest.mark.parametrize("name", ["bank.json", "manifest-main.json", "main-000000.safetensors", "base.safetensors"])
@pytest.mark.parametrize("make", MAKES)
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, name: str, make: str) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, base={"b": torch.ones(3)})
    bank_writer.append(rows(0, 3))
    bank_writer.close()
    path = tmp_path / "bank" / name
    shutil.copy(path, tmp_path / "away")
    shutil.copy(path, tmp_path / "bank" / "other-copy")
    path.unlink()
    MAKES[make](path, tmp_path / "away")
    if name == "manifest-main.json" and make == "nothing":
        assert len(Bank.open(tmp_path / "bank")) == 0  # nothing was committed
        return
    with pytest.raises(BankNotFound if (name, make) == ("bank.json", "nothing") else BankCorrupt):
        Bank.open(tmp_path / "bank").base()


def test_a_pickle_under_the_name_of_a_shard_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    write(tmp_path / "bank", [3])
    path = tmp_path / "bank" / "main-000000.safetensors"
    for save in (lambda: path.write_bytes(pickle.dumps(Trap())), lambda: torch.save({"w": Trap()}, path)):
        save()
        edit_fact(tmp_path / "bank", bytes=path.stat().st_size, rows=1)
        edit_json(tmp_path / "bank" / "manifest-main.json", rows=1)
        for verify in ("first-use", "never"):
            with pytest.raises(BankError):
                Bank.open(tmp_path / "bank", verify=verify)[0]
        assert verify_files(tmp_path / "bank") == ["main-000000.safetensors: other bytes than the manifest says"]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "change", ["dtype", "shape", "missing", "extra", "column"], ids=lambda change: f"{change} of a tensor"
)
def test_a_shard_of_other_tensors_names_the_first(tmp_path: Path, change: str) -> None:
    write(tmp_path / "bank", [7])
    path = tmp_path / "bank" / "main-000000.safetensors"
    with safetensors.safe_open(path, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys() if not name.startswith("@pad.")}  # noqa: SIM118
        metadata = shard.metadata()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if change == "dtype":
        tensors["1.bias"] = tensors["1.bias"].double()
    elif change == "shape":
        tensors["1.bias"] = tensors["1.bias"][:, :1].contiguous()
    elif change == "missing":
        del tensors["1.bias"]
    else:
        tensors["1.extra" if change == "extra" else "@energy"] = torch.zeros(7, dtype=torch.float64)
    replace_tensors(tmp_path / "bank", tensors, metadata=metadata)
    name = {"extra": r"1\.extra", "column": "@energy"}.get(change, r"1\.bias")
    with pytest.raises(BankCorrupt, match=rf"main-000000\.safetensors: want tensor '{name}' as"):
        Bank.open(tmp_path / "bank")[0]


def test_a_sample_that_is_not_finite_is_found_in_a_bank_that_others_wrote(tmp_path: Path) -> None:
    write(tmp_path / "bank", [70])
    with safetensors.safe_open(tmp_path / "bank" / "main-000000.safetensors", "pt") as shard:
        metadata = shard.metadata()
    found = Bank.open(tmp_path / "bank").block(slice(None))
    tensors = {name: tensor.clone() for name, tensor in found.params.items()}
    tensors |= {
        "@chain": found.chain,
        "@draw": found.draw,
        "@log_joint": found.log_joint,
        "@log_weight": found.log_weight,
    }
    tensors["1.weight"][66, 1, 2] = float("inf")
    replace_tensors(tmp_path / "bank", tensors, metadata=metadata)
    bank = Bank.open(tmp_path / "bank")
    assert [line.split(";")[0] for line in bank.check_values()] == [
        f"{tmp_path / 'bank'}: NaN or Inf in '1.weight' of row 66"
    ]


# Bits


def flipped(path: Path, places: range) -> int:
    """How many single flipped bits of a file an open and a look at every row do not refuse."""
    raw, unseen = path.read_bytes(), 0
    for place in places:
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(changed))
        try:
            bank = Bank.open(path.parent)
            bank.block(slice(None))
            unseen += 1
        except BankError:
            pass
    path.write_bytes(raw)
    return unseen


@pytest.mark.parametrize("name", ["bank.json", "manifest-main.json"])
def test_flipped_bits_of_json_are_found(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bank", [2])
    path = tmp_path / "bank" / name
    assert flipped(path, range(0, 8 * path.stat().st_size, 41)) == blanks(path, 41)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bank.json", "manifest-main.json", "main-000000.safetensors"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    """Of JSON; of a shard one in every byte of the header, and fewer of what crc32 covers."""
    write(tmp_path / "bank", [2])
    path = tmp_path / "bank" / name
    bits = 8 * path.stat().st_size
    if name.endswith("json"):
        assert flipped(path, range(bits)) == blanks(path, 1)
        return
    header = 8 * (8 + struct.unpack("<Q", path.read_bytes()[:8])[0])
    assert flipped(path, range(0, header, 7)) == 0
    assert flipped(path, range(header, bits, 61)) <= pads(path, header, bits, 61)


def blanks(path: Path, step: int) -> int:
    """Flips that turn white space outside strings into other white space, or the end of the line away: no content."""
    raw, found = path.read_bytes(), 0
    inside = False
    for place, byte in enumerate(raw):
        inside ^= byte == ord('"') and raw[place - 1] != ord("\\")
        for bit in range(8):
            at_step = (8 * place + bit) % step == 0
            found += at_step and not inside and chr(byte) in " \n" and chr(byte ^ 1 << bit) in " \n\t\r"
    return found


def pads(path: Path, header: int, bits: int, step: int) -> int:
    """Flips that hit pads, which hold nothing."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        places = json.loads(file.read(length))
    holes = [place["data_offsets"] for name, place in places.items() if name.startswith("@pad.")]
    start = header // 8
    return sum(any(start + a <= bit // 8 < start + b for a, b in holes) for bit in range(header, bits, step))


# Every length


def test_every_cut_of_a_small_bank_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [2])
    for name in ("bank.json", "manifest-main.json", "main-000000.safetensors"):
        path = tmp_path / "bank" / name
        raw = path.read_bytes()
        last = len(raw) - 1 if name.endswith("json") else len(raw)  # JSON may do without the end of its last line
        for length in range(0, last, 1 if name.endswith("json") else 37):
            path.write_bytes(raw[:length])
            with pytest.raises(BankError, match=name):
                Bank.open(tmp_path / "bank")
        path.write_bytes(raw)
    check(Bank.open(tmp_path / "bank", verify="full"), 2)


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 4096])
def test_bytes_after_the_end_are_refused(tmp_path: Path, tail: bytes) -> None:
    write(tmp_path / "bank", [2])
    path = tmp_path / "bank" / "main-000000.safetensors"
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(BankCorrupt, match="bytes for 2 rows"):
        Bank.open(tmp_path / "bank")


# The source itself


def test_only_one_module_of_the_bank_touches_files() -> None:
    """So that a fault put into `disk` reaches every call; `there` is a file system at an address."""
    import bnn.bank

    banned = {"open", "unlink", "rename", "mkdir", "rmdir", "iterdir", "exists", "is_file", "is_dir", "stat", "touch"}
    banned |= {"write_bytes", "write_text", "read_bytes", "read_text", "listdir", "replace", "fsync", "glob"}
    for path in sorted(Path(str(bnn.bank.__file__)).parent.glob("*.py")):
        if path.name == "disk.py":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in banned:
                owner = ast.unparse(node.func.value)
                assert owner in ("disk", "Bank", "there") or "_replace" in node.func.attr, (
                    f"{path.name}:{node.lineno} {owner}"
                )
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", f"{path.name}:{node.lineno}"


def test_nothing_in_bnn_unpickles() -> None:
    import bnn

    for path in sorted(Path(str(bnn.__file__)).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not {"pickle", "cloudpickle", "dill", "marshal", "shelve"} & {*names, module}, path
            if isinstance(node, ast.Call) and path.name != "bench.py":  # the rival that it measures against loads so
                assert ast.unparse(node.func) not in ("torch.load", "eval", "exec", "yaml.load"), (
                    f"{path}:{node.lineno}"
                )


LOOK = (
    PEAK
    + """
import sys, time
from bnn.bank import Bank, verify_files
before, start = peak(), time.monotonic()
try:
    bank = Bank.open(sys.argv[1])
    bank.base()
    told = "opened"
except Exception as error:
    told = type(error).__name__
print(told, peak() - before, time.monotonic() - start)
"""
)


def look(folder: Path) -> tuple[str, int, float]:
    """What opening a bank comes to, in a process of its own: its end, bytes and seconds."""
    done = subprocess.run([sys.executable, "-c", LOOK, str(folder)], capture_output=True, text=True, check=True)
    told, size, seconds = done.stdout.split()
    return told, int(size), float(seconds)


def test_memory_of_a_refusal_is_bounded(tmp_path: Path) -> None:
    """A `bank.json` of the largest legal size, made of what takes most memory as Python objects."""
    write(tmp_path / "bank", [2])
    path = tmp_path / "bank" / "bank.json"
    path.write_text('{"a":[' + "{}," * ((4 * 2**20 - 10) // 3) + "{}]}")
    told, size, _ = look(tmp_path / "bank")
    assert told == "BankCorrupt"
    assert size < 200_000_000


def junk_manifests(folder: Path, count: int, size: int) -> None:
    """Sealed manifests of so many more writers, each without rows and filled with a key that nobody knows."""
    junk = [{}] * ((size - 2000) // 3)
    kept = json.loads((folder / "manifest-main.json").read_text())
    del kept["checksum"]
    kept |= {"writer": "WRITER", "rows": 0, "shards": [], "state": None, "zz": junk}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    for number in range(count):
        own = text.replace("WRITER", f"w{number}")
        seal = hashlib.sha256(own.encode()).hexdigest()
        (folder / f"manifest-w{number}.json").write_text(f'{own[:-1]},"checksum":"{seal}"}}')


@pytest.mark.parametrize(
    ("count", "size", "told"), [(80, 2**20, "BankLimit"), (2, 2**20, "opened"), (1100, 2500, "BankLimit")]
)
def test_memory_of_many_manifests_is_bounded(tmp_path: Path, count: int, size: int, told: str) -> None:
    """Each of them is legal; what they hold beyond the known keys is not kept."""
    write(tmp_path / "bank", [2])
    junk_manifests(tmp_path / "bank", count, size)
    found, size, seconds = look(tmp_path / "bank")
    assert found == told
    assert size < 100_000_000
    assert seconds < 10


def test_memory_of_the_header_of_a_base_is_bounded(tmp_path: Path) -> None:
    write(tmp_path / "bank", [2], base={"b": torch.ones(3)})
    text = ('{"__metadata__":{"format":"pt"},"b":[' + "{}," * ((4 * 2**20 - 200) // 3) + "{}]}").encode()
    text += b" " * (-(8 + len(text)) % 8)
    raw = struct.pack("<Q", len(text)) + text
    (tmp_path / "bank" / "base.safetensors").write_bytes(raw)
    fact = {"file": "base.safetensors", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    config = edit_json(tmp_path / "bank" / "bank.json", base=fact)
    edit_json(tmp_path / "bank" / "manifest-main.json", bank=config["checksum"])
    told, size, _ = look(tmp_path / "bank")
    assert told == "BankCorrupt"
    assert size < 150_000_000
    (tmp_path / "bank" / "base.safetensors").write_bytes(struct.pack("<Q", 8 * 2**20) + b" " * 8 * 2**20)
    with pytest.raises(BankLimit, match=r"base\.safetensors: want a header of at most 4194304 bytes"):
        files.map_tensors(tmp_path / "bank" / "base.safetensors")


def test_a_writer_makes_no_manifest_that_a_reader_refuses_beside_the_others(tmp_path: Path) -> None:
    write(tmp_path / "bank", [2])
    junk_manifests(tmp_path / "bank", 2, 2**20)
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="other")
    bank_writer.append(rows(2, 2), {"info": {f"{number:06d}": 0.5 for number in range(3000)}})
    with pytest.raises(BankLimit, match=r"want manifests of at most \d+ bytes together"):
        bank_writer.commit()
    bank_writer.release()
    check(Bank.open(tmp_path / "bank"), 2)


def test_every_promise_of_the_format_page_names_tests_that_are_there() -> None:
    tests = Path(__file__).parents[1]
    page = (tests.parent / "docs" / "bank-format.md").read_text(encoding="utf-8")
    table = page[page.index("| promise | held by |") :].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 10
    for line in table:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, line
        for file, test in named:
            folder = "inference" if file == "test_kills.py" else "bank"
            assert f"def {test}(" in (tests / folder / file).read_text(), f"{file}::{test}"


# Contradictions


def test_rows_that_do_not_begin_where_the_last_ended_are_refused(tmp_path: Path) -> None:
    for first_row in (1, -1):
        write(tmp_path / "bank", [3], overwrite=True)
        edit_fact(tmp_path / "bank", first_row=first_row)
        with pytest.raises(BankCorrupt, match=r"manifest-main\.json: want shards in order from row 0"):
            Bank.open(tmp_path / "bank")


def test_a_bank_that_lost_its_bank_json_is_not_taken_for_an_empty_folder(tmp_path: Path) -> None:
    write(tmp_path / "bank", [5])
    (tmp_path / "bank" / "bank.json").unlink()
    before = {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()}
    for options in ({}, {"resume": True}):
        with pytest.raises(BankError, match=r"kept|want a bank to go on with"):
            write(tmp_path / "bank", [2], **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "bank").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(BankExists, match="which are kept"):
        write(tmp_path / "mine", [2])
    check(write(tmp_path / "bank", [2], overwrite=True), 2)


def test_overwriting_asks_again_who_writes_before_anything_goes(tmp_path: Path) -> None:
    write_seeded(tmp_path / "bank", 0, 4)
    doomed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, overwrite=True)
    joined = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="b")
    joined.append(rows(4, 3))
    joined.commit()
    doomed.append(rows(0, 2))
    with pytest.raises(BankLocked, match="'b'"):
        doomed.commit()
    doomed.release()
    joined.close()
    assert len(Bank.open(tmp_path / "bank", verify="full")) == 7


def test_a_writer_that_gave_its_name_free_writes_no_more(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 3))
    bank_writer.close()
    bank_writer.release()  # once more does nothing
    with pytest.raises(BankLocked, match="got one that gave it free"):
        bank_writer.append(rows(3, 1))
    check(Bank.open(tmp_path / "bank"), 3)


def test_shards_beyond_six_digits_are_refused_before_they_are_written(tmp_path: Path) -> None:
    write(tmp_path / "bank", [3])
    shutil.copy(tmp_path / "bank" / "main-000000.safetensors", tmp_path / "bank" / "main-999999.safetensors")
    resumed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, resume=True)
    resumed.append(rows(3, 2))
    with pytest.raises(BankLimit, match="want at most 1000000 shards of a writer"):
        resumed.close()
    resumed.release()
    check(Bank.open(tmp_path / "bank"), 3)


def test_banks_of_other_state_dicts_are_other_banks(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        module = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(module.weight, value)
        Bank.from_state_dicts([module.state_dict()], module=module, out=tmp_path / name)
    shutil.copy(tmp_path / "a" / "main-000000.safetensors", tmp_path / "b")
    with pytest.raises(BankMismatch, match="want bank"):
        Bank.open(tmp_path / "b", verify="never")[0]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [["w", [2], "float32"], ["w", [2], "float32"]],
        [["@chain", [], "float32"]],
        [["@header", [], "float32"]],
        [["@pad.0", [], "float32"]],
        [["n" * 1025, [2], "float32"]],
    ],
)
def test_entries_that_contradict_the_format_are_refused(tmp_path: Path, entries: list[Any]) -> None:
    from bnn.layout import Layout

    write(tmp_path / "bank", [3])
    layout = {"entries": entries, "aliases": {}}
    edit_json(tmp_path / "bank" / "bank.json", layout=layout, fingerprint=Layout.from_config(layout).fingerprint)
    with pytest.raises(BankCorrupt, match=r"bank\.json: want (entries|a layout)"):
        Bank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bank.json", {"sampling": [1]}),
        ("bank.json", {"method": {"name": "hmc", "options": [1]}}),
        ("bank.json", {"method": {"name": ["hmc"]}}),
        ("bank.json", {"data": {"spec": 3}}),
        ("manifest-main.json", {"info": {"step_size": "x"}}),
    ],
)
def test_records_of_another_kind_are_refused(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    write(tmp_path / "bank", [3])
    edit_json(tmp_path / "bank" / name, **changes)
    with pytest.raises(BankCorrupt, match=name):
        Bank.open(tmp_path / "bank")


def test_a_terminal_obeys_no_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bnn.cli import run

    write(tmp_path / "bank", [3])
    method = {"name": "\x1b[31mred \x1b]0;title\x07 \ud800", "options": {}}
    config = edit_json(tmp_path / "bank" / "bank.json", method=method)
    edit_json(tmp_path / "bank" / "manifest-main.json", bank=config["checksum"])
    assert run(["bank", "info", str(tmp_path / "bank")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[31mred \\x1b]0;title\\x07 \\ud800" in out
    edit_json(tmp_path / "bank" / "bank.json", format="\x1b[31m")
    assert run(["bank", "info", str(tmp_path / "bank")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_numbers_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [3])
    path = tmp_path / "bank" / "bank.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1e999'))
    with pytest.raises(BankCorrupt, match="1e999 is no number that a float holds"):
        Bank.open(tmp_path / "bank")


def test_a_fit_does_not_go_on_without_a_state(tmp_path: Path) -> None:
    from scenarios import linear_regression

    from bnn.bank import repair
    from bnn.fitting import fit
    from bnn.inference import HMC

    case, method = linear_regression(), HMC(num_chains=2, num_warmup=5, num_steps=2)
    fit(case.model, case.data, method=method, num_samples=4, out=tmp_path / "bank")
    for path in (tmp_path / "bank").glob("state-*"):
        path.unlink()
    assert not repair(tmp_path / "bank", tmp_path / "new").resumable
    with pytest.raises(BankError, match="want a state that follows its last row"):
        fit(case.model, case.data, method=method, num_samples=6, out=tmp_path / "new", resume=True)
    assert len(Bank.open(tmp_path / "new")) == 4


# Rows that are no numbers


def not_finite(path: Path) -> Bank:
    """A bank of 14 rows that others wrote, of which row 9 holds NaN."""
    write(path, [7, 7])
    block = rows(0, 14)
    block.params["0.bias"][9, 1] = torch.nan
    tensors = {**block.params, "@chain": block.chain, "@draw": block.draw}
    tensors |= {"@log_joint": block.log_joint, "@log_weight": block.log_weight}
    with safetensors.safe_open(path / "main-000000.safetensors", "pt") as shard:
        metadata = {key: value for key, value in shard.metadata().items() if key not in ("crc32", "format")}
    replace_tensors(path, tensors, metadata=metadata)
    return Bank.open(path)


def test_a_row_that_is_not_finite_is_named_by_all_that_read_every_row(tmp_path: Path) -> None:
    bank = not_finite(tmp_path / "bank")
    told: list[tuple[int, int]] = []
    assert len(bank.check_values(lambda *found: told.append(found))) == 1
    assert told == [(14, 14)]
    named = r"bank: want finite samples, got .*NaN or Inf in '0\.bias' of row 9"
    with pytest.raises(BankCorrupt, match=named):
        Bank.open(tmp_path / "bank", verify="full")
    with pytest.raises(BankError, match=named):
        mean(bank)
    with pytest.raises(BankError, match=r"NaN or Inf in '0\.bias'"):
        write_state_dict(bank, tmp_path / "sample", bank[9])
    write_state_dict(bank, tmp_path / "sample", bank[8])
    with pytest.raises(BankError, match=named):
        thin(bank, tmp_path / "new", every=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["state-main-000000.safetensors", "base.safetensors"])
def test_a_cut_state_or_base_is_seen_without_reading_it(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bank", [3], base={"b": torch.ones(3)})
    assert wrong_sizes(tmp_path / "bank") == []
    path = tmp_path / "bank" / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert wrong_sizes(tmp_path / "bank") == [f"{name}: {size - 1} bytes instead of {size}"]
    path.unlink()
    assert wrong_sizes(tmp_path / "bank") == [f"{name}: no regular file instead of {size}"]


# Cuts of what is larger


def test_every_cut_of_a_state_or_a_base_is_refused(tmp_path: Path) -> None:
    base = {"b": torch.ones(3), "c": torch.arange(5)}
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, base=base)
    bank_writer.append(rows(0, 3), {"step": 3, "info": {}, "flat": torch.arange(300.0), "seeds": torch.arange(7)})
    bank_writer.close()

    def resume(folder: Path) -> BankWriter:
        return BankWriter(folder, layout=LAYOUT, config={"seed": 0}, base=base, resume=True)

    for name in ("state-main-000000.safetensors", "base.safetensors"):
        path = tmp_path / "bank" / name
        raw = path.read_bytes()
        header = 8 + struct.unpack("<Q", raw[:8])[0]
        for size in sorted({*range(0, header, 37), *range(8), *range(header - 3, len(raw), 5), len(raw) - 1}):
            path.write_bytes(raw[:size])
            assert wrong_sizes(tmp_path / "bank") == [f"{name}: {size} bytes instead of {len(raw)}"]
            assert [line.split(":")[0] for line in verify_files(tmp_path / "bank")] == [name]
            with pytest.raises(BankCorrupt):
                files.map_tensors(path)
            look_at = resume if name.startswith("state") else Bank.open
            with pytest.raises(BankCorrupt, match=name):
                look_at(tmp_path / "bank")
        path.write_bytes(raw)
    check(Bank.open(tmp_path / "bank", verify="full"), 3)


def test_cuts_of_a_larger_shard_are_refused_by_size_and_by_header(tmp_path: Path) -> None:
    """At every byte of the header and about each end of a tensor; also where the manifest names the size it was cut to."""
    layout = layout_of(torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.Linear(50, 10)))
    flat = torch.randn(300, layout.num_values, generator=torch.Generator().manual_seed(0))
    block = make_block(layout.unflatten(flat), chain=torch.zeros(300), draw=torch.arange(300))
    bank_writer = BankWriter(tmp_path / "bank", layout=layout, config={})
    bank_writer.append(block)
    bank_writer.close()
    path = tmp_path / "bank" / "main-000000.safetensors"
    raw = path.read_bytes()
    assert len(raw) > 4 * 10**6
    places, _ = fmt.decode_header(raw, len(raw), path.name)
    header = min(place.begin for place in places.values())
    ends = {end + step for place in places.values() for end in (place.begin, place.end) for step in (-1, 0, 1)}
    with path.open("r+b") as file:
        for size in sorted((ends - {len(raw), len(raw) + 1}) | set(range(header)), reverse=True):
            file.truncate(size)
            with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors: want \d+ bytes for 300 rows"):
                Bank.open(tmp_path / "bank")
            with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors"):
                files.map_tensors(path)


def test_a_cut_that_the_manifest_agrees_with_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    path = tmp_path / "bank" / "main-000000.safetensors"
    raw = path.read_bytes()
    places, _ = fmt.decode_header(raw, len(raw), path.name)
    for size in sorted({end + step for place in places.values() for end in place[2:] for step in (-1, 0, 1)}):
        if size < len(raw):
            path.write_bytes(raw[:size])
            edit_fact(tmp_path / "bank", bytes=size)
            with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors"):
                Bank.open(tmp_path / "bank", verify="never")[0]


def test_what_tells_of_a_bank_that_was_replaced_goes_with_a_resume(tmp_path: Path) -> None:
    """Power was lost after the first file of the new bank, and before the removal of that name was sure."""
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0})
    bank_writer.commit()
    bank_writer.release()
    (tmp_path / "bank" / ".tmp-removed-bank.json").write_text("{}")
    BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, resume=True).release()
    assert not (tmp_path / "bank" / ".tmp-removed-bank.json").exists()
