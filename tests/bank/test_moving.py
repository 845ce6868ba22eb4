"""Rows moved to a new bank: the same values as sample by sample, the old bank as it was, memory bounded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bank import test_bank
from memory import PEAK
from torch import nn

from bnn.bank import Bank, BankWriter, merge, moving, repair, thin, writer
from bnn.errors import BankError, BankExists, BankMismatch, BnnError, ConfigError
from bnn.layout import Entry, Layout, layout_of
from bnn.types import Block, make_block

MODULE = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
LAYOUT = layout_of(MODULE, extra=[Entry("@likelihood.scale", (), torch.float32)])
CHAINS = (0, 1, 2, 0, 1, 0, 0, 2, 1, 0, 0)  # of unequal length, and in no order
CONFIG = {
    "seed": 3,
    "method": {"name": "hmc", "options": {"num_chains": 3}},
    "likelihood": {"name": "Categorical"},
    "temperature": 1.0,
    "columns": ["energy"],
}
BASE = {"1.running": torch.tensor([1.0, float("nan")]), "1.count": torch.tensor(4)}


def block_of(chains: tuple[int, ...], *, layout: Layout = LAYOUT, seed: int = 0, own: tuple[str, ...] = ()) -> Block:
    """Random values, with draws numbered 10, 12, ... in each chain."""
    source = torch.Generator().manual_seed(seed)
    size = len(chains)
    params = {e.name: torch.randn(size, *e.shape, generator=source).to(e.dtype) for e in layout.entries}
    draw = [10 + 2 * chains[:row].count(chain) for row, chain in enumerate(chains)]
    return make_block(
        params,
        chain=torch.tensor(chains),
        draw=torch.tensor(draw),
        log_joint=torch.randn(size, generator=source).double(),
        columns={name: torch.randn(size, generator=source).double() for name in own},
    )


def write(path: Path, block: Block, *, layout: Layout = LAYOUT, base: Any = BASE, **more: Any) -> Bank:
    config = {**CONFIG, "columns": list(block.columns), **more}
    bank_writer = BankWriter(path, layout=layout, config=config, base=base)
    bank_writer.append(block, {"step": 1, "num_steps": 1, "info": {"acceptance": 0.5}})
    bank_writer.close()
    return Bank.open(path)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def check_rows(found: Bank, wanted: list[tuple[Bank, int, int]]) -> None:
    """Each row of a bank is that of (another bank, index there) with its chain moved up, read one by one."""
    assert len(found) == len(wanted)
    for index, (bank, source, offset) in enumerate(wanted):
        assert found[index].keys() == bank[source].keys()
        assert all(torch.equal(found[index][name], value) for name, value in bank[source].items())
        assert int(found.chain[index]) == int(bank.chain[source]) + offset
        assert int(found.draw[index]) == int(bank.draw[source])
        assert float(found.log_joint[index]) == float(bank.log_joint[source])
        assert found.columns.keys() == bank.columns.keys()
        assert all(float(found.columns[name][index]) == float(column[source]) for name, column in bank.columns.items())


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows a shard and three a block, so that small banks have several."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 4)
    monkeypatch.setattr(moving, "BLOCK_BYTES", 3 * LAYOUT.num_bytes)


def slow_places(chains: tuple[int, ...]) -> list[int]:
    return [chains[:row].count(chain) for row, chain in enumerate(chains)]


@pytest.mark.parametrize("every", [1, 2, 3, 5, 50])
def test_thin_keeps_every_nth_draw_of_each_chain(tmp_path: Path, every: int) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS, own=("energy",)))
    before, told = digests(tmp_path / "old"), []
    found = thin(bank, tmp_path / "new", every=every, progress=lambda *place: told.append(place))
    kept = [row for row, place in enumerate(slow_places(CHAINS)) if place % every == 0]
    check_rows(found, [(bank, row, 0) for row in kept])
    assert digests(tmp_path / "old") == before
    assert told[-1] == (11, 11)
    assert all(later[0] > sooner[0] for sooner, later in pairwise(told))
    said = json.loads((tmp_path / "new" / "bank.json").read_text())
    old = json.loads((tmp_path / "old" / "bank.json").read_text())
    assert said.pop("checksum") != old.pop("checksum")
    assert said.pop("thinned") == {"every": every, "of": bank.digest}
    assert said == old
    assert found.info["complete"]
    assert all(
        torch.equal(found.base()[name].view(torch.uint8), BASE[name].view(torch.uint8)) for name in ("1.running",)
    )


def test_thin_counts_draws_not_rows(tmp_path: Path) -> None:
    """Two writers may bring the draws of a chain in another order."""
    block = block_of((0, 0, 0, 0, 0))._replace(draw=torch.tensor([4, 0, 3, 1, 2]))
    bank = write(tmp_path / "old", block)
    assert thin(bank, tmp_path / "new", every=2).draw.tolist() == [4, 0, 2]


def test_draws_of_writers_that_share_a_chain_stay_together(tmp_path: Path) -> None:
    """Every second row would be all of one writer and nothing of the other."""
    block = block_of((0, 0, 1, 0, 0, 0, 0))._replace(draw=torch.tensor([0, 1, 7, 2, 0, 1, 2]))
    bank = write(tmp_path / "old", block)
    check_rows(thin(bank, tmp_path / "new", every=2), [(bank, row, 0) for row in (0, 2, 3, 4, 6)])


def test_thin_of_an_ensemble_counts_samples(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", block_of((5, 3, 0, 1, 2, 9, 7)))
    found = thin(bank, tmp_path / "new", every=3)
    check_rows(found, [(bank, 0, 0), (bank, 3, 0), (bank, 6, 0)])


def test_thin_of_a_bank_in_memory(tmp_path: Path) -> None:
    bank = Bank.from_blocks([block_of(CHAINS)], layout=LAYOUT, info={**CONFIG, "columns": []}, base=BASE)
    check_rows(thin(bank, tmp_path / "new", every=4), [(bank, row, 0) for row in (0, 1, 2, 9)])


@pytest.mark.parametrize("every", [0, -1])
def test_thin_refuses_steps_below_one(tmp_path: Path, every: int) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS))
    with pytest.raises(ConfigError, match=r"every: want at least 1"):
        thin(bank, tmp_path / "new", every=every)
    assert not (tmp_path / "new").exists()


def test_thin_of_no_sample_is_refused(tmp_path: Path) -> None:
    bank = Bank.from_blocks([], layout=LAYOUT, info=CONFIG)
    with pytest.raises(ConfigError, match="at least one sample"):
        thin(bank, tmp_path / "new", every=2)
    assert not (tmp_path / "new").exists()


def test_targets_are_kept_unless_they_are_to_be_replaced(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS))
    other = write(tmp_path / "other", block_of((0, 0), seed=1))
    before = digests(tmp_path / "other")
    for make in (
        lambda **more: thin(bank, tmp_path / "other", every=2, **more),
        lambda **more: merge([bank, write(tmp_path / "third", block_of((0,), seed=2))], tmp_path / "other", **more),
    ):
        with pytest.raises(BankExists):
            make()
        assert digests(tmp_path / "other") == before
    assert len(thin(bank, tmp_path / "other", every=2, overwrite=True)) == 6  # 3 of 6 draws, 2 of 3, 1 of 2
    assert len(other) == 2


def test_a_bank_is_never_written_over_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS))
    third = write(tmp_path / "third", block_of((0,), seed=2))
    before = digests(tmp_path / "old")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "old", Path("third/../old"), tmp_path / "link"):
        with pytest.raises(ConfigError, match="the bank itself"):
            thin(bank, out, every=2, overwrite=True)
        with pytest.raises(ConfigError, match="the bank itself"):
            merge([third, bank], out, overwrite=True)
    assert digests(tmp_path / "old") == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_half_a_bank_is_not_left_behind(tmp_path: Path, error: type[BaseException]) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS))

    def stop(done: int, total: int) -> None:
        if done > 8:  # shards of four rows are there by then
            raise error

    with pytest.raises(error):
        thin(bank, tmp_path / "folder" / "new", every=1, progress=stop)
    assert not (tmp_path / "folder").exists()


def test_blocks_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more rows at once than fit the memory given, whatever the bank."""
    bank = write(tmp_path / "old", block_of(CHAINS))
    sizes: list[int] = []
    blocks = Bank.blocks

    def watched(self: Bank, size: int) -> Iterator[tuple[int, Block]]:
        for first, block in blocks(self, size):
            sizes.append(block.num_samples)
            yield first, block

    monkeypatch.setattr(Bank, "blocks", watched)
    monkeypatch.setattr(Bank, "block", _only_neighbours(Bank.block))
    thin(bank, tmp_path / "new", every=2)
    assert sizes == [3, 1, 3, 1, 3]


def _only_neighbours(block: Any) -> Any:
    def watched(self: Bank, indices: Any) -> Block:
        assert isinstance(indices, slice), "rows from all over the bank are a copy"
        return block(self, indices)

    return watched


def test_merge_puts_banks_one_after_the_other(tmp_path: Path) -> None:
    one = write(tmp_path / "one", block_of(CHAINS, own=("energy",)))
    two = write(tmp_path / "two", block_of((1, 1, 4, 1, 4), seed=1, own=("energy",)), seed=4)
    three = write(tmp_path / "three", block_of((0, 2), seed=2, own=("energy",)))
    before = [digests(tmp_path / name) for name in ("one", "two", "three")]
    found = merge([one, two, three], tmp_path / "new")
    check_rows(
        found,
        [*((one, row, 0) for row in range(11)), *((two, row, 3) for row in range(5)), *((three, r, 8) for r in (0, 1))],
    )
    assert not found.log_weight.any()
    assert [digests(tmp_path / name) for name in ("one", "two", "three")] == before
    assert found.info["method"] == CONFIG["method"]
    assert found.info["temperature"] == 1.0
    assert "seed" not in found.info
    assert found.info["merged"] == [
        {"digest": bank.digest, "method": CONFIG["method"], "seed": seed, "samples": samples}
        for bank, seed, samples in ((one, 3, 11), (two, 4, 5), (three, 3, 2))
    ]
    assert torch.equal(found.base()["1.count"], BASE["1.count"])


def test_merge_keeps_the_model_that_runs_of_several_seeds_share(tmp_path: Path) -> None:
    models = [
        {"spec": spec, "options": {"num_outputs": 2, "seed": seed}} for spec, seed in (("a", 0), ("a", 1), ("b", 0))
    ]
    banks = [
        write(tmp_path / f"{seed}", block_of((0,), seed=seed), model=model)
        for seed, model in enumerate([*models, None])
    ]
    assert merge(banks[:2], tmp_path / "alike").info["model"] == models[0]
    assert "model" not in merge([banks[0], banks[2]], tmp_path / "unlike").info
    assert "model" not in merge([banks[0], banks[3]], tmp_path / "unknown").info


def test_merge_of_two_methods_has_a_name_of_its_own(tmp_path: Path) -> None:
    one = write(tmp_path / "one", block_of((0, 0)))
    two = write(tmp_path / "two", block_of((0, 0), seed=1), method={"name": "nuts", "options": {}})
    found = merge([one, two], tmp_path / "new")
    assert found.info["method"] == {"name": "merge", "options": {}}
    assert [fact["method"]["name"] for fact in found.info["merged"]] == ["hmc", "nuts"]


def test_a_bank_weighs_as_many_as_it_has_samples(tmp_path: Path) -> None:
    """Weights are known up to a constant within a bank: one that is larger by a constant must not count for more."""
    plain = write(tmp_path / "plain", block_of((0, 0, 0)))
    weight = torch.tensor([5.0, 7.0, -torch.inf, 6.5], dtype=torch.float64)
    weighted = write(tmp_path / "weighted", block_of((0, 0, 0, 0), seed=1)._replace(log_weight=weight))
    found = merge([plain, weighted], tmp_path / "new").log_weight
    assert torch.equal(found[:3], torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(found[3:].exp(), 4 * weight.softmax(dim=0))
    nothing = torch.full((2,), -torch.inf, dtype=torch.float64)
    none = write(tmp_path / "none", block_of((0, 0), seed=2)._replace(log_weight=nothing))
    with pytest.raises(BankError, match="none: want a sample with weight"):
        merge([plain, none], tmp_path / "no")


HALF = Layout((*LAYOUT.entries[:1], LAYOUT.entries[1]._replace(dtype=torch.float16), *LAYOUT.entries[2:]))
WIDE = layout_of(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5)), extra=[LAYOUT.entries[-1]])
TIED = Layout(LAYOUT.entries, {"2.weight": "1.weight"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": WIDE}, "'1.weight' \\[5, 3\\] where '1.weight' \\[2, 3\\] stands"),
        ({"layout": HALF}, "'0.bias' as torch.float16"),
        ({"layout": TIED}, "ties"),
        ({"own": ("acceptance",)}, "columns as in .*one: energy, got acceptance"),
        ({"likelihood": {"name": "Bernoulli"}}, "the likelihood as in .*one: .*Categorical.*Bernoulli"),
        ({"temperature": 0.5}, r"the temperature as in .*one: 1\.0, got 0\.5"),
        ({"base": {}}, "'1.count' outside the sample"),
        ({"base": {**BASE, "1.count": torch.tensor(5)}}, "'1.count' outside .*other values"),
        ({"base": {**BASE, "1.count": torch.tensor([4])}}, r"'1.count' outside .*got torch.int64 \[1\]"),
    ],
)
def test_merge_names_the_first_difference(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    one = write(tmp_path / "one", block_of((0, 0), own=("energy",)))
    change = {"own": ("energy",), "layout": LAYOUT, **change}
    block = block_of((0, 0), seed=1, own=change.pop("own"), layout=change["layout"])
    two = write(tmp_path / "two", block, **change)
    with pytest.raises(BankMismatch, match=words) as caught:
        merge([one, two], tmp_path / "new")
    assert caught.value.place == str(tmp_path / "two")
    assert not (tmp_path / "new").exists()


def test_merge_refuses_one_bank_and_the_same_twice(tmp_path: Path) -> None:
    one = write(tmp_path / "one", block_of((0, 0)))
    again = write(tmp_path / "again", block_of((0, 0)))
    with pytest.raises(ConfigError, match="at least two, got 1"):
        merge([one], tmp_path / "new")
    with pytest.raises(ConfigError, match=r"again: want each bank once, got the samples of .*one"):
        merge([one, again], tmp_path / "new")


def test_a_moved_bank_cannot_be_resumed_as_the_old_one(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", block_of(CHAINS))
    thin(bank, tmp_path / "new", every=2)
    with pytest.raises(BnnError, match="thinned"):
        BankWriter(tmp_path / "new", layout=LAYOUT, config={**CONFIG, "columns": []}, base=BASE, resume=True)


CODE = (
    PEAK
    + """
import sys, torch
from torch import nn
from bnn.bank import Bank, BankWriter, mean, merge, thin, write_chains
from bnn.layout import layout_of
from bnn.types import make_block

S, K = 3000, 60
layout = layout_of(nn.Linear(1000, 199, bias=False))
for name, seed in (("one", 0), ("two", 1)):
    writer = BankWriter(f"{sys.argv[1]}/{name}", layout=layout, config={})
    for start in range(0, S, K):
        index = torch.arange(start, start + K)
        flat = (seed + index.float()).view(K, 1).expand(K, layout.num_values)
        writer.append(make_block(layout.unflatten(flat), chain=index % 3, draw=index // 3))
    writer.close()
one, two = (Bank.open(f"{sys.argv[1]}/{name}") for name in ("one", "two"))
thinned = thin(one, f"{sys.argv[1]}/thinned", every=2)
merged = merge([one, two], f"{sys.argv[1]}/merged")
write_chains(one, f"{sys.argv[1]}/chains.safetensors", params=["*"])
assert float(mean(merged)["weight"][0, 0]) == 1500.0
print(peak(), len(thinned), len(merged))
"""
)


@pytest.mark.slow
def test_banks_of_gigabytes_are_moved_in_little_memory(tmp_path: Path) -> None:
    """Two banks of 2.4 GB, thinned, merged, averaged and written by chain, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, thinned, merged = map(int, done.stdout.split())
    assert (thinned, merged) == (1500, 6000)
    assert peak < 1_000_000_000, f"{peak / 1e6:.0f} MB resident"


def test_a_copy_of_an_unfinished_bank_is_unfinished_and_no_fit_goes_on_from_it(tmp_path: Path) -> None:
    bank_writer = BankWriter(tmp_path / "bank", layout=test_bank.LAYOUT, config={"seed": 0})
    bank_writer.append(test_bank.rows(0, 5), {"info": {}})
    bank_writer.commit()
    bank_writer.release()
    bank = Bank.open(tmp_path / "bank")
    assert (bank.info["complete"], bank.info["resumable"]) == (False, True)
    few = thin(bank, tmp_path / "few", every=2)
    assert (few.info["complete"], few.info["resumable"]) == (False, False)
    other = test_bank.write(tmp_path / "other", [3])
    assert other.info["complete"]
    both = merge([bank, other], tmp_path / "both")
    assert (both.info["complete"], both.info["resumable"]) == (False, False)


def test_a_new_bank_never_lies_inside_an_old_one(tmp_path: Path) -> None:
    bank = test_bank.write(tmp_path / "bank", [3])
    before = sorted(path.name for path in (tmp_path / "bank").iterdir())
    with pytest.raises(ConfigError, match="want the folder of a new bank, got one inside the bank"):
        thin(bank, tmp_path / "bank" / "deep" / "new", every=2)
    with pytest.raises(ConfigError, match="got one inside the bank"):
        repair(tmp_path / "bank", tmp_path / "bank" / "new")
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == before
