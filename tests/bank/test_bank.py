"""Banks on disk and in memory: rows come back as they went in, commits are prefixes, damage is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from forging import edit_fact, edit_json, replace_tensors
from torch import Tensor, nn

from bnn.bank import Bank, BankWriter, verify_files, writer
from bnn.errors import BankCorrupt, BankError, BankExists, BankLocked, BankMismatch, BankNotFound
from bnn.layout import Entry, layout_of
from bnn.types import Block, make_block

MODULE = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
LAYOUT = layout_of(MODULE, extra=[Entry("@likelihood.scale", (), torch.float32)])


def rows(first: int, size: int) -> Block:
    """Rows whose every value tells the row: row + place / 1000."""
    return rows_at(torch.arange(first, first + size))


def rows_at(index: Tensor) -> Block:
    """Those rows, in any order."""
    params = {
        e.name: index.float().view(-1, *[1] * len(e.shape)) + torch.arange(e.numel).view(e.shape) / 1000
        for e in LAYOUT.entries
    }
    return make_block(
        params, chain=index % 3, draw=index // 3, log_joint=-index.double(), log_weight=index.double() / 7
    )


def check(bank: Bank, size: int) -> None:
    """The bank holds rows 0 .. size - 1."""
    assert len(bank) == size
    expected = rows(0, size)
    found = bank.block(slice(None))
    for name in LAYOUT.names:
        assert torch.equal(found.params[name], expected.params[name])
    for mine, theirs in zip(found[1:5], expected[1:5], strict=True):
        assert torch.equal(mine, theirs)
    assert found.columns == {}


def write(path: Path, sizes: list[int], **options: Any) -> Bank:
    bank_writer = BankWriter(path, layout=LAYOUT, config={"seed": 0}, **options)
    first = 0
    for size in sizes:
        bank_writer.append(rows(first, size), {"step": first + size, "num_steps": sum(sizes), "info": {}})
        first += size
    bank_writer.close()
    return Bank.open(path)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a shard, so that small banks have several."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 10)


def test_rows_per_shard_is_the_largest_multiple_of_64_under_256_mib() -> None:
    assert writer.rows_per_shard(400_000) == 640
    assert writer.rows_per_shard(4 * 8_970) == 7_424
    assert writer.rows_per_shard(8 * 2**20) == 32
    assert writer.rows_per_shard(2**30) == 1


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("sizes", [[7], [10], [3, 4, 5, 6], [25], [4, 25, 1], [0, 5, 0]])
def test_rows_come_back_whatever_the_blocks(tmp_path: Path, sizes: list[int]) -> None:
    bank = write(tmp_path / "bank", sizes)
    check(bank, sum(sizes))
    assert bank.info["complete"]
    for index in (0, sum(sizes) // 2, sum(sizes) - 1, -1):
        expected = rows(index % sum(sizes), 1)
        assert all(torch.equal(bank[index][name], expected.params[name][0]) for name in LAYOUT.names)


@pytest.mark.usefixtures("small_shards")
def test_blocks_of_any_indices(tmp_path: Path) -> None:
    bank = write(tmp_path / "bank", [25])
    memory = Bank.from_blocks([rows(0, 11), rows(11, 14)], layout=LAYOUT, info={})
    for indices in ([24, 0, 13, 13], [3], slice(8, 13), slice(None, None, 5), torch.tensor([9, 10]), [], [-1, -25]):
        expected = torch.arange(25)[
            indices if isinstance(indices, slice) else torch.as_tensor(indices, dtype=torch.int64)
        ]
        for source in (bank, memory):
            block = source.block(indices)
            assert block.num_samples == len(expected)
            assert torch.equal(block.params["0.bias"][:, 0], expected.float())
            assert torch.equal(block.draw, expected // 3)
    for bad in ([25], [-26]):
        with pytest.raises(IndexError, match="0 <= index < 25"):
            bank.block(bad)
    with pytest.raises(IndexError, match="bank index 25"):
        bank[25]


@pytest.mark.usefixtures("small_shards")
def test_views_are_not_copies(tmp_path: Path) -> None:
    bank = write(tmp_path / "bank", [25])
    first, again = bank[12]["0.weight"], bank.block([11, 12, 13]).params["0.weight"]
    assert first.data_ptr() == again[1].data_ptr()
    assert [start for start, _ in bank.blocks(4)] == [0, 4, 8, 10, 14, 18, 20, 24]


def test_plain_safetensors_opens_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    with safetensors.safe_open(tmp_path / "bank" / "main-000000.safetensors", framework="pt") as shard:
        assert torch.equal(shard.get_tensor("0.weight"), rows(0, 7).params["0.weight"])
        assert torch.equal(shard.get_tensor("@draw"), rows(0, 7).draw)
        assert {"@chain", "@draw", "@log_joint", "@log_weight", *LAYOUT.names} <= set(shard.keys())
        assert shard.metadata()["first_row"] == "0"


def test_resume_goes_on_after_the_last_commit(tmp_path: Path) -> None:
    first = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0})
    first.append(rows(0, 5), {"step": 5, "num_steps": 9, "info": {}, "flat": torch.arange(3.0)})
    first.commit()
    first.append(rows(5, 2), {"step": 7, "num_steps": 9, "info": {}, "flat": torch.zeros(3)})
    first.release()  # killed before the second commit
    check(Bank.open(tmp_path / "bank"), 5)
    assert not Bank.open(tmp_path / "bank").info["complete"]
    second = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, resume=True)
    assert second.num_rows == 5
    assert second.state is not None
    assert second.state["step"] == 5
    assert torch.equal(second.state["flat"], torch.arange(3.0))
    second.append(rows(5, 4), second.state)
    second.close()
    check(Bank.open(tmp_path / "bank"), 9)


def test_a_state_is_committed_also_without_rows(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 0), {"step": 3, "num_steps": 9, "info": {"loss": 0.5}})
    bank_writer.commit()
    bank_writer.release()
    bank = Bank.open(tmp_path / "bank")
    assert len(bank) == 0
    assert bank.info["diagnostics"] == {"main": {"loss": 0.5}}
    resumed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, resume=True)
    assert resumed.state == {"step": 3, "num_steps": 9, "info": {"loss": 0.5}}
    resumed.release()


def test_time_commits_rows_and_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 2), {"step": 2, "num_steps": 9, "info": {}})
    assert bank_writer.num_rows == 0
    now[0] = 10.5
    bank_writer.append(rows(2, 1), {"step": 3, "num_steps": 9, "info": {}})
    assert bank_writer.num_rows == 3  # ten seconds after the first row
    now[0] = 41.0
    bank_writer.append(rows(3, 0), {"step": 8, "num_steps": 9, "info": {}})
    assert bank_writer.state is not None
    assert bank_writer.state["step"] == 8  # thirty seconds without a row
    bank_writer.close()


def test_readers_keep_their_snapshot(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 4))
    bank_writer.commit()
    bank = Bank.open(tmp_path / "bank")
    bank_writer.append(rows(4, 3))
    bank_writer.close()
    check(bank, 4)
    check(bank.refresh(), 7)
    assert bank.digest != bank.refresh().digest


def test_several_writers_fill_one_bank_in_the_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "bank", [4], writer="a")
    second = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="b")
    second.append(rows(4, 3))
    second.close()
    bank, expected = Bank.open(tmp_path / "bank"), rows(0, 7)
    assert bank.info["complete"]
    assert all(torch.equal(bank.block(range(7)).params[name], expected.params[name]) for name in LAYOUT.names)
    chains = [0, 1, 2, 0, 4, 5, 3]  # 0 to 2 of "a", then those of "b"
    assert bank.chain.tolist() == chains
    assert bank.block([6, 0, 4, 5]).chain.tolist() == [3, 0, 4, 5]
    assert bank.block([6, 4]).chain.tolist() == [3, 4]
    assert [int(block.chain[0]) for _, block in bank.blocks(2)] == [0, 2, 4, 3]
    third = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, writer="b", resume=True)
    assert third.num_rows == 3
    third.release()


def test_a_second_claim_of_one_writer_name_is_refused(tmp_path: Path) -> None:
    first = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    with pytest.raises(BankLocked, match="writer name 'main'"):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    first.close()


def test_an_existing_bank_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "bank", [4])
    with pytest.raises(BankExists, match="which is kept"):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    check(Bank.open(tmp_path / "bank"), 4)
    check(write(tmp_path / "bank", [2], overwrite=True), 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    for option in ({}, {"overwrite": True}):
        with pytest.raises(BankExists, match="other files, which are kept"):
            BankWriter(tmp_path / "other", layout=LAYOUT, config={}, **option)
    with pytest.raises(BankNotFound, match="a bank to go on with"):
        BankWriter(tmp_path / "nothing", layout=LAYOUT, config={}, resume=True)
    assert not (tmp_path / "nothing").exists()


def test_overwrite_keeps_the_old_bank_until_the_first_commit(tmp_path: Path) -> None:
    write(tmp_path / "bank", [4])
    doomed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, overwrite=True)
    doomed.append(rows(0, 2))
    doomed.abandon()
    check(Bank.open(tmp_path / "bank"), 4)


def test_resume_with_other_options_names_the_difference(tmp_path: Path) -> None:
    write(tmp_path / "bank", [4])
    with pytest.raises(BankMismatch, match="want seed = 0, got 1"):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 1}, resume=True)
    BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, resume=True).release()  # the lock is free again


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_refused_with_parameter_and_row(tmp_path: Path, value: float) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 3))
    bad = rows(3, 4)
    bad.params["1.weight"][2, 0, 1] = value
    with pytest.raises(BankError, match=r"NaN or Inf in '1\.weight' of row 5"):
        bank_writer.append(bad)
    bank_writer.close()
    check(Bank.open(tmp_path / "bank"), 3)


def test_a_block_of_another_layout_is_refused(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bad = rows(0, 3)
    for change in (
        {"0.bias": bad.params["0.bias"].double()},
        {"0.bias": bad.params["0.bias"][:, :2]},
        {"extra": torch.zeros(3)},
    ):
        with pytest.raises(BankMismatch, match="block"):
            bank_writer.append(bad._replace(params={**bad.params, **change}))
    bank_writer.abandon()
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("how", ["fresh", "overwrite"])
def test_killed_at_any_file_of_the_first_commit_the_folder_serves_again(tmp_path: Path, renames: int, how: str) -> None:
    """A kill is stood in for by an exit of the writing that nothing can catch up on: no handler of the writer runs."""
    from bnn.bank import files

    class Killed(BaseException):
        pass

    if how == "overwrite":
        write(tmp_path / "bank", [4])
    real, seen = files.os.replace, [0]

    def replace(source: object, target: object) -> None:
        if seen[0] == renames:
            Path(f"{source}.kept").write_bytes(Path(str(source)).read_bytes())  # what unlinking cannot reach
            raise Killed
        seen[0] += 1
        real(source, target)  # type: ignore[arg-type]

    doomed = BankWriter(
        tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, base={"b": torch.ones(2)}, overwrite=how == "overwrite"
    )
    doomed.append(rows(0, 3), {"step": 3, "num_steps": 9, "info": {}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(Killed):
            doomed.commit()
    for lock in doomed._part.locks:
        lock.close()  # as the end of a process does
    again = BankWriter(
        tmp_path / "bank", layout=LAYOUT, config={"seed": 0}, base={"b": torch.ones(2)}, resume=how == "fresh",
        overwrite=how == "overwrite",
    )  # fmt: skip
    assert again.num_rows == 0
    again.append(rows(0, 6))
    again.close()
    check(Bank.open(tmp_path / "bank", verify="full"), 6)


def test_ctrl_c_between_two_rows_sees_all_of_a_block_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={})
    bank_writer.append(rows(0, 3), {"step": 3, "num_steps": 9, "info": {}})
    copied = [0]
    real = BankWriter._copy_rows

    def interrupted(self: BankWriter, *args: Any) -> None:
        real(self, *args)
        copied[0] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(BankWriter, "_copy_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank_writer.append(rows(3, 2), {"step": 5, "num_steps": 9, "info": {}})
    assert copied == [1]
    bank_writer.commit()
    bank_writer.release()
    check(Bank.open(tmp_path / "bank"), 3)
    monkeypatch.undo()
    resumed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, resume=True)
    assert resumed.state is not None
    assert resumed.state["step"] == 3
    resumed.release()


def test_overwrite_waits_for_nobody_who_still_writes(tmp_path: Path) -> None:
    first = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, writer="a")
    first.append(rows(0, 3))
    first.commit()
    with pytest.raises(BankLocked, match="'a'"):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, writer="b", overwrite=True)
    first.close()
    check(Bank.open(tmp_path / "bank"), 3)


def test_every_file_is_fsynced_before_its_name_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnn.bank import files

    calls: list[str] = []
    fsync, replace = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("rename"), replace(a, b))[1])
    write(tmp_path / "bank", [3])
    assert calls.pop(0) == "fsync"  # of the folder above, which has a new one
    assert calls == ["fsync", "rename", "fsync"] * (len(calls) // 3)
    assert calls.count("rename") == 5  # bank.json, empty manifest, shard, state, manifest


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, weight: float) -> None:
    bank_writer = BankWriter(tmp_path / "deep" / "bank", layout=LAYOUT, config={})
    with pytest.raises(BankError, match="log_weight"):
        bank_writer.append(rows(0, 2)._replace(log_weight=torch.tensor([0.0, weight], dtype=torch.float64)))
    bank_writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_buffers_that_no_bank_can_keep_are_refused_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(
        BankError, match=r"'rotary': want .* got torch\.complex64; register the buffer with persistent=False"
    ):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, base={"rotary": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("requires", 5), ("requires", [1]), ("method", 3), ("model", "mlp"), ("data", []), ("base", 3)]
)
def test_odd_values_in_bank_json_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path / "bank", [3])
    path = tmp_path / "bank" / "bank.json"
    edit_json(path, **{key: value})
    with pytest.raises(BankCorrupt, match=r"bank\.json"):
        Bank.open(tmp_path / "bank")


# Damage


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(bytes(raw))


def test_a_flipped_bit_is_found_on_first_use_and_by_verify(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    shard = tmp_path / "bank" / "main-000000.safetensors"
    flip(shard, 4096 + 5)
    bank = Bank.open(tmp_path / "bank")
    with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors: want tensor '0\.weight' with the crc32"):
        bank[3]
    assert verify_files(tmp_path / "bank") == ["main-000000.safetensors: other bytes than the manifest says"]
    with pytest.raises(BankCorrupt, match="other bytes"):
        Bank.open(tmp_path / "bank", verify="full")
    assert len(Bank.open(tmp_path / "bank", verify="never").block(slice(None)).chain) == 7


@pytest.mark.parametrize("change", ["cut", "extend", "remove", "link"])
def test_a_shard_of_another_size_is_refused_at_open(tmp_path: Path, change: str) -> None:
    write(tmp_path / "bank", [7])
    shard = tmp_path / "bank" / "main-000000.safetensors"
    raw = shard.read_bytes()
    shard.unlink()
    if change == "link":
        (tmp_path / "elsewhere").write_bytes(raw)
        shard.symlink_to(tmp_path / "elsewhere")
    elif change != "remove":
        shard.write_bytes(raw[:-1] if change == "cut" else raw + b"\0")
    with pytest.raises(BankCorrupt, match=r"main-000000\.safetensors"):
        Bank.open(tmp_path / "bank")[0]


@pytest.mark.usefixtures("small_shards")
def test_swapped_shards_are_found(tmp_path: Path) -> None:
    write(tmp_path / "bank", [10, 10])
    one, two = (tmp_path / "bank" / f"main-00000{i}.safetensors" for i in range(2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    for verify in ("first-use", "never"):
        with pytest.raises(BankMismatch, match=r"main-000000\.safetensors: want first_row 0, got 10"):
            Bank.open(tmp_path / "bank", verify=verify)[0]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "main-1.safetensors", "other-000000.safetensors", "", "main-000000.pt"],
)
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "bank", [7])
    edit_fact(tmp_path / "bank", file=name)
    with pytest.raises(BankCorrupt, match=r"manifest-main\.json: want shards in order"):
        Bank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rows", 8),
        ("complete", "yes"),
        ("version", 9),
        ("shards", None),
        ("writer", "other"),
        ("shards", [{"file": 3}]),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path / "bank", [7])
    edit_json(tmp_path / "bank" / "manifest-main.json", **{key: value})
    with pytest.raises(BankError, match=r"manifest-main\.json: want (?!the checksum)"):
        Bank.open(tmp_path / "bank")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "bnn-bank", "format": "x"}', '{"format": NaN}', '{"format": "zip"}']
)
def test_a_broken_bank_json_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "bank", [7])
    (tmp_path / "bank" / "bank.json").write_text(text)
    with pytest.raises(BankCorrupt, match=r"bank\.json"):
        Bank.open(tmp_path / "bank")


def test_a_layout_that_is_not_that_of_the_fingerprint_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    path = tmp_path / "bank" / "bank.json"
    layout = json.loads(path.read_text())["layout"]
    layout["entries"][0][1] = [3, 5]
    edit_json(path, layout=layout)
    with pytest.raises(BankCorrupt, match="fingerprint"):
        Bank.open(tmp_path / "bank")


def test_a_shard_of_another_layout_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    folder = tmp_path / "bank"
    with safetensors.safe_open(folder / "main-000000.safetensors", "pt") as shard:
        metadata = shard.metadata()
    replace_tensors(folder, {name: torch.zeros(7, 2) for name in LAYOUT.names}, metadata=metadata)
    bank = Bank.open(folder)
    with pytest.raises(BankCorrupt, match=r"tensor '0\.bias' as"):
        bank[0]
    assert len(bank.check_headers()) == 1


@pytest.mark.parametrize("make", [lambda p: p.mkdir(), lambda p: None, lambda p: p.write_text("no folder")])
def test_what_is_no_bank_says_so(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "thing")
    with pytest.raises(BankNotFound, match="thing: want a bank, got"):
        Bank.open(tmp_path / "thing")


# Other ways in and out


def test_from_state_dicts_in_memory_and_on_disk(tmp_path: Path) -> None:
    modules = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(5)]
    state_dicts = [module.state_dict() for module in modules]
    memory = Bank.from_state_dicts(state_dicts, module=modules[0])
    disk = Bank.from_state_dicts(state_dicts, module=modules[0], out=tmp_path / "bank")
    for bank in (memory, disk):
        assert len(bank) == 5
        for index, module in enumerate(modules):
            assert all(torch.equal(bank[index][name], p) for name, p in module.named_parameters())
        assert set(bank.base()) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
        assert torch.isnan(bank.log_joint).all()
    assert memory.digest != Bank.from_state_dicts(state_dicts[:4], module=modules[0]).digest


def test_from_state_dicts_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 2), nn.Linear(3, 2)
    for one, numbers in ((module, [0, 1]), (other, [1, 0])):
        one.register_buffer("order", torch.tensor(numbers))
    with pytest.raises(BankMismatch, match="state dict 1: want buffer 'order'"):
        Bank.from_state_dicts([module.state_dict(), other.state_dict()], module=module)
    with pytest.raises(BankMismatch, match=r"state dict 0: want 'weight' \[2, 3\], got \[2, 4\]"):
        Bank.from_state_dicts([nn.Linear(4, 2).state_dict()], module=nn.Linear(3, 2))
    with pytest.raises(BankError, match="at least one"):
        Bank.from_state_dicts([], module=module)
    broken = nn.Linear(3, 2).state_dict()
    broken["bias"][1] = float("nan")
    with pytest.raises(BankError, match="'bias' of row 0"):
        Bank.from_state_dicts([broken], module=nn.Linear(3, 2), out=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_an_altered_base_is_refused(tmp_path: Path) -> None:
    module = nn.BatchNorm1d(3)
    bank = Bank.from_state_dicts([module.state_dict()], module=module, out=tmp_path / "bank")
    flip(tmp_path / "bank" / "base.safetensors", -1)
    with pytest.raises(BankCorrupt, match=r"base\.safetensors"):
        bank.base()
    assert verify_files(tmp_path / "bank") == ["base.safetensors: other bytes than the manifest says"]


def test_a_bank_travels_to_another_process_as_its_path(tmp_path: Path) -> None:
    bank = write(tmp_path / "bank", [7])
    raw = pickle.dumps(bank)
    assert len(raw) < 1000
    check(pickle.loads(raw), 7)


def test_reading_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "bank", [7])
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "bank").iterdir()}
    bank = Bank.open(tmp_path / "bank", verify="full")
    bank.block(slice(None))
    bank.refresh()
    assert {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in (tmp_path / "bank").iterdir()} == before


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from bank.test_bank import LAYOUT, rows
from bnn.bank import BankWriter
from pathlib import Path
writer = BankWriter(Path(sys.argv[1]), layout=LAYOUT, config={{}})
first = 0
while True:
    writer.append(rows(first, 3), {{"step": first + 3, "num_steps": 10**9, "info": {{}}}})
    writer.commit()
    first += 3
    print(first, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 4, 9])
def test_kill_9_leaves_every_acknowledged_row(tmp_path: Path, acknowledged: int) -> None:
    code = KILLED.format()
    tests = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bank"), tests], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(acknowledged):
            last = int(process.stdout.readline())
        process.kill()
    bank = Bank.open(tmp_path / "bank")
    assert len(bank) >= last
    check(bank, len(bank))
    resumed = BankWriter(tmp_path / "bank", layout=LAYOUT, config={}, resume=True)
    assert resumed.state is not None
    assert resumed.state["step"] == len(bank)
    resumed.append(rows(len(bank), 2), resumed.state)
    resumed.close()
    check(Bank.open(tmp_path / "bank"), len(bank) + 2)


# Columns of the method


def with_columns(first: int, size: int) -> Block:
    index = torch.arange(first, first + size)
    return rows(first, size)._replace(columns={"acceptance": index / 100.0, "energy": -index.double()})


@pytest.mark.usefixtures("small_shards")
def test_columns_of_the_method_come_back(tmp_path: Path) -> None:
    config = {"columns": ["energy", "acceptance"]}
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config=config)
    for first, size in ((0, 4), (4, 9), (13, 0)):
        block = with_columns(first, size)
        bank_writer.append(block._replace(columns={name: c.double() for name, c in block.columns.items()}))
    bank_writer.close()
    bank = Bank.open(tmp_path / "bank")
    memory = Bank.from_blocks([with_columns(0, 4), with_columns(4, 9)], layout=LAYOUT, info={})
    assert bank.info["requires"] == ["columns"]
    for found in (bank, memory):
        assert sorted(found.columns) == ["acceptance", "energy"]
        assert found.columns["energy"].tolist() == [-float(row) for row in range(13)]
        picked = found.block([11, 2, 3])  # from two shards
        torch.testing.assert_close(picked.columns["acceptance"].double(), torch.tensor([0.11, 0.02, 0.03]).double())
        assert picked.columns["energy"].tolist() == [-11.0, -2.0, -3.0]
    assert bank.check_headers() == []
    assert bank.columns["acceptance"].dtype == torch.float64


def test_a_block_without_the_columns_that_were_named_is_refused(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=LAYOUT, config={"columns": ["energy"]})
    with pytest.raises(BankMismatch, match=r"block columns: want energy, .* got none"):
        bank_writer.append(rows(0, 2))
    with pytest.raises(BankMismatch, match="got acceptance, energy"):
        bank_writer.append(with_columns(0, 2))
    bank_writer.release()


@pytest.mark.parametrize("columns", ["energy", ["Energy"], ["energy", "energy"], ["log_joint"], ["a.b"], [3]])
def test_columns_that_are_no_names_are_refused(tmp_path: Path, columns: Any) -> None:
    write(tmp_path / "bank", [3])
    edit_json(tmp_path / "bank" / "bank.json", columns=columns)
    with pytest.raises(BankCorrupt, match="columns with names of their own"):
        Bank.open(tmp_path / "bank")


# Golden bytes

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("version", [1, 2])
def test_golden_banks_read_as_they_were_written(version: int) -> None:
    bank = Bank.open(GOLDEN / f"version-{version}", verify="full")
    assert bank.layout == LAYOUT
    check(bank, 5)
    assert torch.equal(bank.base()["buffer"], torch.arange(4.0))
    assert bank.info["seed"] == 7


def write_golden(path: Path) -> None:
    bank_writer = BankWriter(path, layout=LAYOUT, config={"seed": 7}, base={"buffer": torch.arange(4.0)})
    bank_writer.append(rows(0, 3), {"step": 3, "num_steps": 5, "info": {"loss": 0.5}})
    bank_writer.commit()
    bank_writer.append(rows(3, 2), {"step": 5, "num_steps": 5, "info": {"loss": 0.25}})
    bank_writer.close()


def test_writing_the_golden_bank_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_golden(tmp_path / "bank")
    golden = GOLDEN / "version-2"
    written = {p.name for p in (tmp_path / "bank").iterdir()} - {"lock-main"}
    assert written == {p.name for p in golden.iterdir()}
    for name in sorted(written):
        assert (tmp_path / "bank" / name).read_bytes() == (golden / name).read_bytes(), name


def test_a_bank_of_version_1_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "version-1", tmp_path / "bank")
    with pytest.raises(BankError, match="want format version 2 to go on with, got version 1, which is only read"):
        BankWriter(tmp_path / "bank", layout=LAYOUT, config={"seed": 7}, resume=True)
    check(Bank.open(tmp_path / "bank", verify="full"), 5)
