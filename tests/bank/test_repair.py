"""Repair keeps every sound row, drops the rest by name, guesses nothing and leaves the damaged bank alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bank.test_bank import GOLDEN, LAYOUT, check, flip, rows
from forging import edit_json

from bnn.bank import Bank, BankWriter, disk, lost_shards, repair, thin, unnamed_shards, verify_files
from bnn.errors import BankCorrupt, BankError, BankExists, ConfigError

BASE = {"buffer": torch.arange(4.0)}


def begin(path: Path, **options: Any) -> BankWriter:
    return BankWriter(path, layout=LAYOUT, config={"seed": 0}, base=BASE, **options)


def fill(bank_writer: BankWriter, sizes: list[int], first: int = 0) -> None:
    """A shard and a commit for each size."""
    for size in sizes:
        bank_writer.append(rows(first, size), {"step": first + size, "info": {"rows": first + size}})
        bank_writer.commit()
        first += size


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fates(found: Any) -> dict[str, str]:
    return {file.name: file.fate for file in found.files}


def test_a_whole_bank_is_kept_whole_with_its_state_and_base(tmp_path: Path) -> None:
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3, 4, 70])
    bank_writer.close()
    before = bytes_of(tmp_path / "bank")
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 77)
    assert set(fates(found).values()) == {"kept"}
    assert found.resumable
    assert found.bank.info["complete"]
    assert found.bank.info["diagnostics"] == {"main": {"rows": 77}}
    assert torch.equal(found.bank.base()["buffer"], BASE["buffer"])
    assert bytes_of(tmp_path / "bank") == before
    again = begin(tmp_path / "new", resume=True)
    assert again.state is not None
    assert (again.num_rows, again.state["step"]) == (77, 77)
    again.release()


@pytest.mark.parametrize("how", ["gone", "cut", "another bank's"])
def test_without_a_manifest_every_shard_is_adopted(tmp_path: Path, how: str) -> None:
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3, 4, 5])
    bank_writer.release()
    manifest = tmp_path / "bank" / "manifest-main.json"
    if how == "gone":
        manifest.unlink()
    elif how == "cut":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    else:
        edit_json(manifest, bank="0" * 64)
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 12)
    assert [name for name, fate in fates(found).items() if fate == "adopted"] == [
        f"main-{number:06d}.safetensors" for number in range(3)
    ]
    assert ("manifest-main.json" in fates(found)) == (how != "gone")
    assert found.resumable
    assert not found.bank.info["complete"]
    resumed = begin(tmp_path / "new", resume=True)
    fill(resumed, [2], first=12)
    resumed.close()
    check(Bank.open(tmp_path / "new", verify="full"), 14)


@pytest.mark.parametrize("step", ["state", "manifest"])
def test_what_a_crash_left_behind_the_last_commit_is_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed between shard and manifest: with the state written the fit can go on from all rows, without it not."""

    class Killed(BaseException):
        pass

    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3])
    real = disk.create

    def create(path: Path) -> int:
        if path.name.startswith(f".tmp-{step}-"):
            raise Killed
        return real(path)

    monkeypatch.setattr(disk, "create", create)
    with pytest.raises(Killed):
        fill(bank_writer, [4], first=3)
    monkeypatch.undo()
    bank_writer.release()
    check(Bank.open(tmp_path / "bank"), 3)
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 7)
    assert fates(found) == {"main-000000.safetensors": "kept", "main-000001.safetensors": "adopted"}
    assert found.resumable == (step == "manifest")
    kept = repair(tmp_path / "bank", tmp_path / "kept", resumable=True)
    check(kept.bank, 7 if step == "manifest" else 3)
    assert kept.resumable
    resumed = begin(tmp_path / "kept", resume=True)
    assert resumed.state is not None
    assert resumed.state["step"] == len(kept.bank)
    resumed.release()


def test_damaged_shards_are_dropped_by_name_and_the_rows_behind_them_kept(tmp_path: Path) -> None:
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3, 4, 5, 6])
    bank_writer.close()
    flip(tmp_path / "bank" / "main-000001.safetensors", -1)
    (tmp_path / "bank" / "main-000002.safetensors").unlink()
    found = repair(tmp_path / "bank", tmp_path / "new")
    expected = [*range(3), *range(12, 18)]
    assert found.bank.log_joint.tolist() == [-float(row) for row in expected]
    assert torch.equal(found.bank.block([2, 3]).params["0.weight"], rows(0, 18).params["0.weight"][[2, 12]])
    assert not found.resumable
    assert not found.bank.info["complete"]
    dropped = {file.name: file.reason for file in found.files if file.fate == "dropped"}
    assert list(dropped) == ["main-000001.safetensors", "main-000002.safetensors"]
    assert "crc32 of its header" in dropped["main-000001.safetensors"]
    assert dropped["main-000002.safetensors"] == "the manifest names it, and it is gone"
    kept = repair(tmp_path / "bank", tmp_path / "first", overwrite=True)
    assert len(kept.bank) == 9


def test_of_two_shards_with_the_same_rows_the_committed_one_counts(tmp_path: Path) -> None:
    """An orphan of a killed run, and the rows that the resumed one made again."""
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3, 4])
    before = (tmp_path / "bank" / "main-000001.safetensors").read_bytes()
    bank_writer.release()
    (tmp_path / "bank" / "main-000007.safetensors").write_bytes(before)
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 7)
    assert fates(found)["main-000007.safetensors"] == "dropped"
    (tmp_path / "bank" / "manifest-main.json").unlink()
    found = repair(tmp_path / "bank", tmp_path / "later")
    check(found.bank, 7)
    assert fates(found)["main-000001.safetensors"] == "dropped"


def test_shards_of_others_are_never_adopted(tmp_path: Path) -> None:
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3])
    bank_writer.close()
    other = BankWriter(tmp_path / "other", layout=LAYOUT, config={"seed": 1}, base=BASE)
    fill(other, [3, 4])
    other.close()
    raw = (tmp_path / "other" / "main-000001.safetensors").read_bytes()
    (tmp_path / "bank" / "main-000001.safetensors").write_bytes(raw)
    (tmp_path / "bank" / "second-000000.safetensors").write_bytes(raw)
    (tmp_path / "bank" / "main-000002.safetensors").symlink_to(tmp_path / "other" / "main-000000.safetensors")
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 3)
    assert fates(found) == {
        "main-000000.safetensors": "kept",
        "main-000001.safetensors": "dropped",
        "main-000002.safetensors": "dropped",
        "second-000000.safetensors": "dropped",
    }


def test_writers_are_repaired_each(tmp_path: Path) -> None:
    for name, first, sizes in (("a", 0, [3, 4]), ("b", 7, [2])):
        bank_writer = begin(tmp_path / "bank", writer=name)
        fill(bank_writer, sizes, first=first)
        bank_writer.close()
    (tmp_path / "bank" / "manifest-a.json").unlink()
    found = repair(tmp_path / "bank", tmp_path / "new")
    assert found.bank.log_joint.tolist() == [-float(row) for row in range(9)]
    assert found.bank.chain.tolist() == Bank.open(tmp_path / "new").chain.tolist()
    assert {path.name for path in (tmp_path / "new").glob("manifest-*")} == {"manifest-a.json", "manifest-b.json"}


def test_what_cannot_be_repaired_says_so(tmp_path: Path) -> None:
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3])
    bank_writer.close()
    with pytest.raises(ConfigError, match="got the bank itself"):
        repair(tmp_path / "bank", tmp_path / "x" / ".." / "bank")
    repair(tmp_path / "bank", tmp_path / "new")
    with pytest.raises(BankExists, match="which is kept"):
        repair(tmp_path / "bank", tmp_path / "new")
    with pytest.raises(BankError, match="want a bank of version 2"):
        repair(GOLDEN / "version-1", tmp_path / "old")
    flip(tmp_path / "bank" / "main-000000.safetensors", -1)
    with pytest.raises(BankError, match="want one sound row at least, got none"):
        repair(tmp_path / "bank", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config = tmp_path / "bank" / "bank.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"seed": 3}))
    with pytest.raises(BankCorrupt, match=r"bank\.json: want the checksum"):
        repair(tmp_path / "bank", tmp_path / "none")


# A manifest that was lost


@pytest.mark.parametrize("last", ["shard", "state"])
def test_a_lost_manifest_is_no_empty_bank(tmp_path: Path, last: str) -> None:
    """Its writer wrote one before its first shard: shards without one have lost it, and are not begun over."""
    bank_writer = begin(tmp_path / "bank")
    fill(bank_writer, [3, 4])
    bank_writer.release()
    (tmp_path / "bank" / "manifest-main.json").unlink()
    if last == "state":
        for path in (tmp_path / "bank").glob("main-*.safetensors"):
            path.unlink()
    else:
        told = "manifest-main.json, which named it, is gone; 'bnn bank repair' adopts it"
        problems = [f"main-{number:06d}.safetensors: {told}" for number in range(2)]
        assert verify_files(tmp_path / "bank") == lost_shards(tmp_path / "bank") == problems
        assert unnamed_shards(tmp_path / "bank") == []
        with pytest.raises(BankCorrupt, match="is gone; 'bnn bank repair' adopts it"):
            Bank.open(tmp_path / "bank", verify="full")
    before = bytes_of(tmp_path / "bank")
    with pytest.raises(BankCorrupt, match=r"manifest-main\.json: want the manifest .*'bnn bank repair', or begin anew"):
        begin(tmp_path / "bank", resume=True)
    assert bytes_of(tmp_path / "bank") == before
    fill(anew := begin(tmp_path / "bank", overwrite=True), [2])
    anew.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 2)


def test_a_lost_manifest_of_a_writer_that_joined_is_missed_too(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 3)):
        fill(bank_writer := begin(tmp_path / "bank", writer=name), [3], first=first)
        bank_writer.close()
    (tmp_path / "bank" / "manifest-b.json").unlink()
    with pytest.raises(BankCorrupt, match=r"manifest-b\.json: want the manifest"):
        begin(tmp_path / "bank", writer="b")
    assert [line.split(":")[0] for line in verify_files(tmp_path / "bank")] == ["b-000000.safetensors"]


def test_a_manifest_is_there_before_the_first_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = disk.replace

    def replace(source: Path, target: Path) -> None:
        made.append(target.name)
        real(source, target)

    monkeypatch.setattr(disk, "replace", replace)
    for name in ("a", "b"):
        bank_writer = begin(tmp_path / "bank", writer=name)
        bank_writer._capacity = 2
        bank_writer.append(rows(0, 3))
        bank_writer.close()
    own = [[name for name in made if name.startswith((f"manifest-{w}", f"{w}-"))] for w in "ab"]
    for w, names in zip("ab", own, strict=True):
        assert names == [
            f"manifest-{w}.json",
            f"{w}-000000.safetensors",
            f"{w}-000001.safetensors",
            f"manifest-{w}.json",
        ]


# What else is lost


@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_rows_are_kept_where_the_base_is_lost_and_the_new_bank_says_so(tmp_path: Path, how: str) -> None:
    fill(bank_writer := begin(tmp_path / "bank"), [3, 4])
    bank_writer.close()
    path = tmp_path / "bank" / "base.safetensors"
    flip(path, -1) if how == "flipped" else path.unlink()
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 7)
    assert fates(found)["base.safetensors"] == "dropped"
    assert not found.resumable  # with which base?
    assert found.bank.info["lost"] == ["base.safetensors"]
    with pytest.raises(BankCorrupt, match=r"base\.safetensors was lost before this bank was repaired"):
        found.bank.base()
    check(thin(found.bank, tmp_path / "copy", every=1), 7)
    assert Bank.open(tmp_path / "copy").info["lost"] == ["base.safetensors"]
    assert verify_files(tmp_path / "new") == []


def test_a_writer_without_a_sound_shard_is_named(tmp_path: Path) -> None:
    """One in its warm-up is kept with its state, one whose rows are gone and one that only began are dropped."""
    for name, first, sizes in (("a", 0, [3]), ("b", 0, [0]), ("c", 3, [2]), ("d", 0, [])):
        fill(bank_writer := begin(tmp_path / "bank", writer=name), sizes, first=first)
        if not sizes:
            bank_writer.commit()
        bank_writer.release()
    (tmp_path / "bank" / "c-000000.safetensors").unlink()
    found = repair(tmp_path / "bank", tmp_path / "new")
    check(found.bank, 3)
    told = {file.name: (file.fate, file.reason) for file in found.files}
    assert told["state-b-000000.safetensors"] == ("kept", "no row comes before it")
    assert told["state-c-000000.safetensors"] == ("dropped", "it follows row 2, of which none is left")
    assert told["c-000000.safetensors"] == ("dropped", "the manifest names it, and it is gone")
    assert told["manifest-d.json"] == ("dropped", "its writer has neither a shard nor a state")
    again = begin(tmp_path / "new", writer="b", resume=True)
    assert again.state is not None
    again.release()
    assert sorted(path.name for path in (tmp_path / "new").glob("manifest-*")) == ["manifest-a.json", "manifest-b.json"]


def test_a_bank_without_a_sound_shard_says_what_is_wrong_with_each(tmp_path: Path) -> None:
    fill(bank_writer := begin(tmp_path / "bank"), [3, 4])
    bank_writer.close()
    flip(tmp_path / "bank" / "main-000000.safetensors", -1)
    (tmp_path / "bank" / "main-000001.safetensors").unlink()
    with pytest.raises(BankError) as caught:
        repair(tmp_path / "bank", tmp_path / "new")
    assert "main-000000.safetensors: want tensor" in caught.value.got
    assert "main-000001.safetensors: the manifest names it, and it is gone" in caught.value.got


def test_repair_tells_of_both_its_passes(tmp_path: Path) -> None:
    fill(bank_writer := begin(tmp_path / "bank"), [70, 130])
    bank_writer.close()
    told: list[tuple[int, int]] = []
    repair(tmp_path / "bank", tmp_path / "new", progress=lambda *found: told.append(found))
    size = sum(path.stat().st_size for path in (tmp_path / "bank").glob("main-*"))
    assert {total for _, total in told} == {2 * size}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert len([step for step in done if step <= size]) > 6
    assert size < done[-1] <= 2 * size
