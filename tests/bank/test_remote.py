"""Banks at an address: the same samples, copies that are checked, and nothing but copies that is written."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.test_bank import LAYOUT, check, rows
from forging import edit_fact, edit_json

from bnn.bank import Bank, BankWriter, disk, verify_files, writer
from bnn.bank import format as fmt
from bnn.bank.address import is_address
from bnn.errors import (
    BankCorrupt,
    BankError,
    BankLimit,
    BankMismatch,
    BankNotFound,
    BankWriteError,
    ConfigError,
)

fsspec = pytest.importorskip("fsspec", reason="fsspec (extra 'remote') is not installed")

BASE = {"buffer": torch.arange(4.0)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a shard."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)


def write(path: Path, size: int, *, resume: bool = False, seed: int = 0) -> Path:
    bank_writer = BankWriter(path, layout=LAYOUT, config={"seed": seed}, base=BASE, resume=resume)
    bank_writer.append(rows(bank_writer.num_rows, size), {"step": 1, "num_steps": 1, "info": {}})
    bank_writer.close(complete=False)
    return path


class Site:
    """A folder at an address: what was asked for, and files that can be put there."""

    def __init__(self, address: str, asked: list[str], put: Callable[[str, bytes], None]) -> None:
        self.address, self.asked, self.put = address, asked, put

    def upload(self, folder: Path) -> None:
        for path in folder.iterdir():
            if not path.name.startswith("lock"):
                self.put(path.name, path.read_bytes())

    def shards(self) -> list[str]:
        return [name for name in self.asked if name.startswith("main-")]


@pytest.fixture
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Site:
    root = "/" + re.sub(r"\W", "-", request.node.name)
    there = fsspec.filesystem("memory")
    asked: list[str] = []
    real = type(there)._open

    def opened(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            asked.append(path.rpartition("/")[2])
        return real(self, path, mode, **options)

    monkeypatch.setattr(type(there), "_open", opened)
    return Site(f"memory:/{root}", asked, lambda name, raw: there.pipe_file(f"{root}/{name}", raw))


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Site]:
    pytest.importorskip("aiohttp", reason="aiohttp (extra 'remote') is not installed")
    folder, asked = tmp_path / "site", list[str]()
    (folder / "bank").mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/bank"
        yield Site(address, asked, lambda name, raw: (folder / "bank" / name).write_bytes(raw) and None)
        server.shutdown()


@pytest.fixture(params=["memory", "web"])
def site(request: pytest.FixtureRequest) -> Site:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def folder_of(cache: Path) -> Path:
    (found,) = (path.parent for path in cache.rglob("bank.json"))
    return found


def test_shards_come_when_they_are_touched(tmp_path: Path, site: Site) -> None:
    site.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(site.address, cache=tmp_path / "cache")
    assert site.shards() == []
    assert len(bank) == 25
    assert torch.equal(bank[12]["0.weight"], rows(12, 1).params["0.weight"][0])
    assert torch.equal(bank[13]["0.weight"], rows(13, 1).params["0.weight"][0])
    assert site.shards() == ["main-000001.safetensors"]
    check(bank, 25)
    assert sorted(site.shards()) == [f"main-00000{n}.safetensors" for n in range(3)]
    assert bank.base()["buffer"].tolist() == [0, 1, 2, 3]
    assert bank.digest == Bank.open(tmp_path / "bank").digest
    assert bank.check_headers() == bank.check_values() == []
    kept = tree(folder_of(tmp_path / "cache"))
    own = tree(tmp_path / "bank")
    assert kept == {name: raw for name, raw in own.items() if not name.startswith(("lock", "state"))}


def test_a_second_open_uses_the_copies(tmp_path: Path, site: Site) -> None:
    site.upload(write(tmp_path / "bank", 25))
    check(Bank.open(site.address, cache=tmp_path / "cache", prefetch=True), 25)
    assert len(site.shards()) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    site.asked.clear()
    check(Bank.open(site.address + "/", cache=tmp_path / "cache"), 25)
    assert site.shards() == []
    assert {"bank.json", "manifest-main.json"} <= set(site.asked)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def test_full_verification_has_every_file_and_its_sha256(tmp_path: Path, site: Site) -> None:
    site.upload(write(tmp_path / "bank", 25))
    check(Bank.open(site.address, cache=tmp_path / "cache", verify="full"), 25)
    assert verify_files(folder_of(tmp_path / "cache")) == []
    (state,) = folder_of(tmp_path / "cache").glob("state-*")
    assert state.read_bytes() == (tmp_path / "bank" / state.name).read_bytes()


def test_a_bank_without_rows_brings_its_state(tmp_path: Path, memory: Site) -> None:
    """It is all that such a bank keeps: of a fit that has just begun, or of samples that are made when asked for."""
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(LAYOUT.no_rows(), {"step": 1, "num_steps": 2, "info": {}, "loc": torch.arange(3.0)})
    bank_writer.close()
    memory.upload(tmp_path / "bank")
    assert len(Bank.open(memory.address, cache=tmp_path / "cache")) == 0
    (state,) = folder_of(tmp_path / "cache").glob("state-*")
    assert state.read_bytes() == (tmp_path / "bank" / state.name).read_bytes()


def test_a_snapshot_stays_and_refresh_sees_what_was_committed(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(memory.address, cache=tmp_path / "cache")
    memory.upload(write(tmp_path / "bank", 10, resume=True))
    assert len(bank) == 25
    check(bank, 25)
    newer = bank.refresh()
    check(newer, 35)
    check(bank, 25)
    check(pickle.loads(pickle.dumps(bank)), 25)
    check(Bank.open(memory.address, cache=tmp_path / "cache"), 35)


def opened_there(raw: bytes, sink: Any) -> None:
    bank = pickle.loads(raw)
    sink.put((len(bank), bank.digest, float(bank[22]["0.bias"][0])))


def test_a_bank_travels_and_fetches_elsewhere(tmp_path: Path, web: Site) -> None:
    web.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(web.address, cache=tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    sink = context.Queue()
    process = context.Process(target=opened_there, args=(pickle.dumps(bank), sink))
    process.start()
    assert sink.get(timeout=60) == (25, bank.digest, 22.0)
    process.join()
    assert web.shards() == ["main-000002.safetensors"]


def filled(address: str, cache: str, sink: Any) -> None:
    bank = Bank.open(address, cache=cache)
    sink.put(sum(float(sample["0.bias"][0]) for sample in bank))


def test_two_processes_fill_one_cache(tmp_path: Path, web: Site) -> None:
    web.upload(write(tmp_path / "bank", 25))
    context = multiprocessing.get_context("spawn")
    sink = context.Queue()
    processes = [context.Process(target=filled, args=(web.address, str(tmp_path / "cache"), sink)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [sink.get(timeout=90) for _ in processes] == [300.0, 300.0]
    for process in processes:
        process.join()
    folder = folder_of(tmp_path / "cache")
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".tmp", "fetched"))]
    check(Bank.open(web.address, cache=tmp_path / "cache", offline=True), 25)


def test_threads_may_fetch_the_same_shard(tmp_path: Path, web: Site) -> None:
    web.upload(write(tmp_path / "bank", 5))
    banks = [Bank.open(web.address, cache=tmp_path / "cache") for _ in range(4)]
    found: list[float] = []
    threads = [threading.Thread(target=lambda bank=bank: found.append(float(bank[3]["0.bias"][0]))) for bank in banks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3.0] * 4


# Offline


def test_a_complete_cache_opens_offline(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    options = {"cache": tmp_path / "cache", "offline": True}
    with pytest.raises(BankNotFound, match=r"want copies of it in .*cache, got none; open it once, not offline"):
        Bank.open(memory.address, **options)
    bank = Bank.open(memory.address, cache=tmp_path / "cache")
    bank[0], bank[24]
    with pytest.raises(BankNotFound, match=r"want all files of the bank.*got no copy of main-000001\.safetensors"):
        Bank.open(memory.address, **options)
    bank[12]
    fsspec.filesystem("memory").rm(memory.address.removeprefix("memory:/"), recursive=True)
    memory.asked.clear()
    check(Bank.open(memory.address, **options), 25)
    assert memory.asked == []
    with pytest.raises(BankNotFound, match=r"memory://.*want a bank, got no bank\.json there"):
        Bank.open(memory.address, cache=tmp_path / "cache")


def test_offline_nothing_is_written(tmp_path: Path, memory: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that others own can be read: online too, where nothing has changed."""
    memory.upload(write(tmp_path / "bank", 25))
    Bank.open(memory.address, cache=tmp_path / "cache", prefetch=True)

    def refused(*args: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("create", "write", "replace", "unlink"):
        monkeypatch.setattr(disk, name, refused)
    for offline in (True, False):
        check(Bank.open(memory.address, cache=tmp_path / "cache", offline=offline), 25)


# What stands at the address


def test_a_shard_that_is_altered_or_cut_is_refused_and_no_copy_kept(tmp_path: Path, site: Site) -> None:
    folder = write(tmp_path / "bank", 25)
    site.upload(folder)
    name = "main-000001.safetensors"
    raw = (folder / name).read_bytes()
    for bad, want in {
        raw[:-100]
        + bytes(100): r"want \d+ bytes of sha256 [0-9a-f]{12}, as its manifest says, got sha256 [0-9a-f]{12}",
        raw[:-100]: rf"want {len(raw)} bytes of sha256 .*, got {len(raw) - 100} bytes",
        raw + b"more": rf"want .*, got {len(raw) + 4} bytes",
    }.items():
        site.put(name, bad)
        bank = Bank.open(site.address, cache=tmp_path / "cache")
        with pytest.raises(BankCorrupt, match=rf"/{name}: {want}"):
            bank[12]
        assert torch.equal(bank[3]["0.bias"], rows(3, 1).params["0.bias"][0])
        copies = [path.name for path in folder_of(tmp_path / "cache").iterdir()]
        assert name not in copies
        assert not [copy for copy in copies if copy.startswith((".tmp", "fetched"))]
    site.put(name, raw)
    check(bank, 25)


def test_a_shard_that_is_gone(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(memory.address, cache=tmp_path / "cache")
    fsspec.filesystem("memory").rm(f"{memory.address.removeprefix('memory:/')}/main-000002.safetensors")
    with pytest.raises(BankCorrupt, match=r"/main-000002\.safetensors: want the file, got nothing there"):
        bank[21]


def remade(folder: Path, out: Path) -> None:
    """The same bank.json and names, other samples: what a fit with --overwrite on another machine may leave."""
    bank_writer = BankWriter(out, layout=LAYOUT, config={"seed": 0}, base=BASE)
    bank_writer.append(rows(100, 25))
    bank_writer.close(complete=False)
    assert (out / "bank.json").read_bytes() == (folder / "bank.json").read_bytes()


def test_a_bank_that_was_made_anew_between_open_and_fetch_is_refused(tmp_path: Path, site: Site) -> None:
    folder = write(tmp_path / "bank", 25)
    site.upload(folder)
    bank = Bank.open(site.address, cache=tmp_path / "cache")
    bank[0]
    remade(folder, tmp_path / "again")
    site.upload(tmp_path / "again")
    with pytest.raises(BankMismatch, match=r"/main-000001\.safetensors: .*as when the bank was opened, got .*replaced"):
        bank[12]
    assert float(bank[3]["0.bias"][0]) == 3.0
    with pytest.raises(BankMismatch, match=r"/main-000000\.safetensors: want the file that copies were made of, got"):
        Bank.open(site.address, cache=tmp_path / "cache")
    fresh = Bank.open(site.address, cache=tmp_path / "other")
    assert float(fresh[3]["0.bias"][0]) == 103.0


def test_another_bank_at_the_address_gets_a_folder_of_its_own(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(memory.address, cache=tmp_path / "cache")
    bank[0]
    memory.upload(write(tmp_path / "another", 15, seed=1))
    with pytest.raises(BankMismatch, match=r"/main-000001\.safetensors: .*replaced"):
        bank[12]
    check(Bank.open(memory.address, cache=tmp_path / "cache"), 15)
    assert len(list((tmp_path / "cache").rglob("bank.json"))) == 2


def escaping(where: str, folder: Path) -> None:
    """Names in the JSON files that lead out of the folder, under checksums that fit."""
    config = json.loads((folder / "bank.json").read_text())
    manifest = json.loads((folder / "manifest-main.json").read_text())
    if where == "shard":
        edit_fact(folder, file="../x-000000.safetensors")
    elif where == "absolute":
        edit_fact(folder, file="/etc/passwd")
    elif where == "state":
        edit_json(folder / "manifest-main.json", state=manifest["state"] | {"file": "../state-main-000001.safetensors"})
    else:
        more = {"file": "a/b.safetensors", "bytes": 1, "sha256": "0" * 64}
        changes = {"codec": more} if where == "more" else {"base": config["base"] | {"file": "../base.safetensors"}}
        changed = edit_json(folder / "bank.json", **changes)
        edit_json(folder / "manifest-main.json", bank=changed["checksum"])


@pytest.mark.parametrize("where", ["shard", "absolute", "state", "base", "more"])
def test_no_path_escapes(tmp_path: Path, memory: Site, where: str) -> None:
    folder = write(tmp_path / "bank", 25)
    escaping(where, folder)
    memory.upload(folder)
    before = tree(tmp_path)
    with pytest.raises(BankCorrupt):
        Bank.open(memory.address, cache=tmp_path / "cache", prefetch=True)
    made = set(tree(tmp_path)) - set(before)
    assert all(name.startswith("cache/") and Path(name).name in ("bank.json", "manifest-main.json", "base.safetensors", "last", "lock") for name in made), made  # fmt: skip
    assert not {"passwd", "x-000000.safetensors"} & set(memory.asked)


def test_a_forged_identity_makes_no_path(tmp_path: Path, memory: Site) -> None:
    """bank.json of version 1 has no checksum that is compared: whatever stands there is no name of a folder."""
    folder = write(tmp_path / "bank", 5)
    config = json.loads((folder / "bank.json").read_text())
    config |= {"version": 1, "checksum": "../../../escaped"}
    memory.upload(folder)
    memory.put("bank.json", json.dumps(config).encode())
    with pytest.raises(BankError):
        Bank.open(memory.address, cache=tmp_path / "deep" / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "deep"]


@pytest.mark.parametrize("name", ["bank.json", "manifest-main.json"])
def test_files_that_are_too_large_are_not_read_to_their_end(tmp_path: Path, memory: Site, name: str) -> None:
    memory.upload(write(tmp_path / "bank", 5))
    memory.put(name, b'{"a": "' + b"x" * 20_000_000 + b'"}')
    with pytest.raises(BankLimit, match=rf"/{name}: want at most \d+ bytes, got more"):
        Bank.open(memory.address, cache=tmp_path / "cache")


@pytest.mark.parametrize("prefetch", [False, True])
def test_manifests_of_many_shards_are_taken_before_the_shards_are_here(
    tmp_path: Path, memory: Site, monkeypatch: pytest.MonkeyPatch, prefetch: bool
) -> None:
    """Shards account for the bytes of manifests: those that stand at the address, not those in the cache."""
    memory.upload(write(tmp_path / "bank", 60))
    monkeypatch.setattr(fmt, "MAX_MANIFEST_BYTES", 1000)
    monkeypatch.setattr(fmt, "MAX_MANIFESTS_BYTES", 1000)
    assert (tmp_path / "bank" / "manifest-main.json").stat().st_size > 2000
    bank = Bank.open(memory.address, cache=tmp_path / "cache", prefetch=prefetch)
    check(pickle.loads(pickle.dumps(bank)), 60)
    check(Bank.open(memory.address, cache=tmp_path / "cache", offline=True), 60)


def test_what_is_no_bank(tmp_path: Path, site: Site) -> None:
    with pytest.raises(BankNotFound, match=r"want a bank, got no bank\.json there"):
        Bank.open(site.address, cache=tmp_path / "cache")
    site.put("bank.json", b"{}")
    with pytest.raises(BankCorrupt, match=r"/bank\.json: want format"):
        Bank.open(site.address, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_server_that_lists_nothing(tmp_path: Path, web: Site) -> None:
    """The rows of `main` are read, and that there may be others is said."""
    web.upload(write(tmp_path / "bank", 25))
    web.put("index.html", b"<html>no list</html>")
    with pytest.warns(UserWarning, match="the server lists no files: rows of the writer 'main' are read"):
        bank = Bank.open(web.address, cache=tmp_path / "cache")
    check(bank, 25)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    """And what the address keeps secret is not told."""
    pytest.importorskip("aiohttp", reason="aiohttp (extra 'remote') is not installed")
    with pytest.raises(
        BankError, match=r"^http://127\.0\.0\.1:9/bank/bank\.json: want to read it, got Client"
    ) as caught:
        Bank.open("http://someone:secret@127.0.0.1:9/bank", cache=tmp_path / "cache")
    assert "secret" not in str(caught.value)
    assert not isinstance(caught.value, (BankNotFound, BankCorrupt))


def test_a_transfer_that_breaks_off(tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "bank", 5)
    web.upload(folder)
    bank = Bank.open(web.address, cache=tmp_path / "cache")
    real = http.server.SimpleHTTPRequestHandler.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(
            http.server.SimpleHTTPRequestHandler, "copyfile", lambda self, source, out: out.write(source.read(99))
        )
        with pytest.raises(
            BankError, match=r"main-000000\.safetensors: want to read it, got ContentLengthError|got ClientPayloadError"
        ):
            bank[3]
    assert http.server.SimpleHTTPRequestHandler.copyfile is real
    assert not list(folder_of(tmp_path / "cache").glob("*main-000000*"))
    check(bank, 5)


# The cache


def test_a_cache_that_is_a_file(tmp_path: Path, memory: Site) -> None:
    """As root no folder is read-only, but a file is no folder."""
    memory.upload(write(tmp_path / "bank", 5))
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(BankWriteError, match=r"cache: want a cache folder that takes files, got Not a directory; make"):
        Bank.open(memory.address, cache=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("fault", ["ENOSPC", "EROFS", "no room"])
def test_a_cache_that_is_full_or_read_only(
    tmp_path: Path, memory: Site, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    bank = Bank.open(memory.address, cache=tmp_path / "cache")

    def refused(*args: Any) -> Any:
        number = getattr(errno, fault)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if fault == "no room":
            patch.setattr(disk, "free_bytes", lambda folder: 100)
        else:
            patch.setattr(disk, "write" if fault == "ENOSPC" else "create", refused)
        want = {
            "ENOSPC": "No space left",
            "EROFS": "Read-only file system",
            "no room": r"100 bytes free of \d+ for main",
        }
        with pytest.raises(BankWriteError, match=rf"cache: want a cache folder that takes files, got {want[fault]}"):
            bank[12]
    assert not list(folder_of(tmp_path / "cache").glob("*fetched*"))
    check(bank, 25)


FETCH = """
import sys
from bnn.bank import Bank
Bank.open(sys.argv[1], cache=sys.argv[2])[12]
"""


class Stalled:
    """A server that sends half of a shard and then waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent, self.go_on = threading.Event(), threading.Event()
        real = http.server.SimpleHTTPRequestHandler.copyfile

        def copyfile(handler: Any, source: Any, out: Any) -> None:
            if "main-000001" in handler.path and not self.go_on.is_set():
                out.write(source.read(1000))
                out.flush()
                self.sent.set()
                self.go_on.wait(60)
            real(handler, source, out)

        monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", copyfile)


def half_fetched(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*fetched-*"))


def test_what_a_killed_fetch_left_goes_at_the_next_open(
    tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.upload(write(tmp_path / "bank", 25))
    cache, stalled = tmp_path / "cache", Stalled(monkeypatch)
    with subprocess.Popen([sys.executable, "-c", FETCH, web.address, str(cache)]) as process:
        assert stalled.sent.wait(60)
        assert len(half_fetched(cache)) == 1
        Bank.open(web.address, cache=cache)
        assert len(half_fetched(cache)) == 1  # it is at work still
        process.kill()
    (folder_of(cache) / "fetched-note.txt").write_text("mine")
    (folder_of(cache) / "fetched-1-2-main-000002.safetensors").write_bytes(b"whole, but not compared yet")
    (folder_of(cache).parent / ".tmp-fetched-1-2-last-1").write_bytes(b"")
    assert len(half_fetched(cache)) == 4
    bank = Bank.open(web.address, cache=cache)
    assert half_fetched(cache) == ["fetched-note.txt"]
    stalled.go_on.set()
    check(bank, 25)


def test_a_fetch_by_another_thread_is_left_alone(tmp_path: Path, web: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    web.upload(write(tmp_path / "bank", 25))
    bank, stalled = Bank.open(web.address, cache=tmp_path / "cache"), Stalled(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        row = threads.submit(lambda: bank[12]["0.weight"].clone())
        assert stalled.sent.wait(60)
        before = half_fetched(tmp_path / "cache")
        Bank.open(web.address, cache=tmp_path / "cache")
        assert half_fetched(tmp_path / "cache") == before != []
        stalled.go_on.set()
        assert torch.equal(row.result(60), rows(12, 1).params["0.weight"][0])
    assert half_fetched(tmp_path / "cache") == []


def test_locks_that_cannot_be_had_remove_nothing(tmp_path: Path, memory: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a file system without locks nobody knows whether a fetch is at work."""
    memory.upload(write(tmp_path / "bank", 25))
    Bank.open(memory.address, cache=tmp_path / "cache")
    (folder_of(tmp_path / "cache") / "fetched-1-2-x").write_bytes(b"")

    def refused(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(disk, "lock", refused)
        check(Bank.open(memory.address, cache=tmp_path / "cache"), 25)
    assert half_fetched(tmp_path / "cache") == ["fetched-1-2-x"]


def test_a_copy_of_another_size_comes_anew(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    Bank.open(memory.address, cache=tmp_path / "cache", prefetch=True)
    path = folder_of(tmp_path / "cache") / "main-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    check(Bank.open(memory.address, cache=tmp_path / "cache"), 25)


def test_a_copy_that_is_altered_is_noticed(tmp_path: Path, memory: Site) -> None:
    memory.upload(write(tmp_path / "bank", 25))
    Bank.open(memory.address, cache=tmp_path / "cache", prefetch=True)
    path = folder_of(tmp_path / "cache") / "main-000001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-3000] + bytes(3000))
    with pytest.raises(BankCorrupt, match="main-000001"):
        check(Bank.open(memory.address, cache=tmp_path / "cache"), 25)


# Options


def test_options_that_do_not_fit(tmp_path: Path, memory: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.upload(write(tmp_path / "bank", 5))
    with pytest.raises(ConfigError, match="cache: want a folder for copies"):
        Bank.open(memory.address)
    for options in ({"cache": tmp_path}, {"prefetch": True}, {"offline": True}):
        with pytest.raises(ConfigError, match="want an address, with cache="):
            Bank.open(tmp_path / "bank", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="want a scheme that fsspec knows"):
        Bank.open("nowhere://bank", cache=tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"https://host/bank: want an address without query"):
        Bank.open("https://host/bank?token=secret", cache=tmp_path / "cache")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"want fsspec, and its package for memory://.*bnn-toolkit\[remote\]"):
        Bank.open(memory.address, cache=tmp_path / "cache")


def test_what_is_an_address() -> None:
    assert all(map(is_address, ("s3://a/b", "https://a", "memory://x", "github+x://y")))
    assert not any(map(is_address, ("banks/a", "/a", "a:b", "C:/banks", "./s3://", Path("s3://a/b"))))


@pytest.mark.parametrize("residency", ["host", "streamed"])
def test_other_residencies_fetch_before_they_read(tmp_path: Path, memory: Site, residency: str) -> None:
    memory.upload(write(tmp_path / "bank", 60))
    options: dict[str, Any] = {"host_budget": 30_000} if residency == "streamed" else {}
    bank = Bank.open(memory.address, cache=tmp_path / "cache", residency=residency, **options)  # type: ignore[arg-type]
    check(bank, 60)
    check(pickle.loads(pickle.dumps(bank)), 60)
    bank.release()


def test_a_virtual_bank_brings_the_state_that_it_is_made_of(tmp_path: Path, memory: Site) -> None:
    import bnn

    model = bnn.BayesianModel(
        torch.nn.Linear(3, 2), prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Categorical(), num_data=20
    )
    source = torch.Generator().manual_seed(0)
    data = torch.randn(20, 3, generator=source), torch.randint(2, (20,), generator=source)
    method = bnn.inference.Guide("mean-field", num_steps=3)
    local = bnn.fit(model, data, method=method, num_samples=11, out=tmp_path / "bank", virtual=True)
    memory.upload(tmp_path / "bank")
    for offline in (False, True):
        bank = Bank.open(memory.address, cache=tmp_path / "cache", offline=offline)
        assert len(bank) == 11
        assert torch.equal(pickle.loads(pickle.dumps(bank))[7]["weight"], local[7]["weight"])
