"""Rows over new shards: the same samples, every shard a small bank, and what shard order costs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bank.test_kinds import quick, same_params
from bank.test_moving import BASE, CONFIG, LAYOUT, block_of, digests, write

from bnn.bank import Bank, BankWriter, compact, merge, thin, verify_files
from bnn.bank.compacting import places
from bnn.cli import run
from bnn.errors import BankError, BankExists, ConfigError
from bnn.layout import Entry, Layout
from bnn.types import make_block

__all__ = ["quick"]  # the fixture, which holds for these tests too
CHAINS = tuple(np.random.default_rng(0).integers(0, 3, 50).tolist())


def old_bank(folder: Path) -> Bank:
    """Fifty samples of three chains, of two writers, in shards of at most seven."""
    first = block_of(CHAINS[:30], own=("energy",))
    for name, block in (("a", first), ("b", block_of(CHAINS[30:], seed=1, own=("energy",)))):
        writer = BankWriter(folder, layout=LAYOUT, config=CONFIG, base=BASE, writer=name, shard_rows=7)
        writer.append(block)
        writer.close()
    return Bank.open(folder)


def keys(bank: Bank) -> list[tuple[int, int, float]]:
    return list(zip(bank.chain.tolist(), bank.draw.tolist(), bank.columns["energy"].tolist(), strict=True))


@pytest.mark.parametrize("order", ["striped", "chain"])
def test_every_sample_comes_once_with_its_columns(tmp_path: Path, order: Any) -> None:
    bank, told = old_bank(tmp_path / "old"), []
    before = digests(tmp_path / "old")
    found = compact(
        bank, tmp_path / "new", shard_bytes=9500, order=order, seed=5, progress=lambda *place: told.append(place)
    )
    assert digests(tmp_path / "old") == before
    place = {key: index for index, key in enumerate(keys(bank))}
    assert len(place) == 50
    assert sorted(keys(found)) == sorted(place)
    for index, key in enumerate(keys(found)):
        assert same_params(found[index], bank[place[key]])
        assert float(found.log_joint[index]) == float(bank.log_joint[place[key]])
    assert told[-1] == (50, 50)
    assert all(later[0] > sooner[0] for sooner, later in pairwise(told))
    assert len(found.shard_rows) >= 2
    assert max(found.shard_rows) - min(found.shard_rows) <= 1
    files = sorted((tmp_path / "new").glob("main-*.safetensors"))
    assert max(file.stat().st_size for file in files) <= 9500
    assert verify_files(tmp_path / "new") == found.check_headers() == found.check_values() == []
    assert not found.info["resumable"]
    said = json.loads((tmp_path / "new" / "bank.json").read_text())
    assert said["row_order"] == order
    assert said["compacted"] == {"of": bank.digest, "seed": 5}
    assert {key: said[key] for key in CONFIG} == CONFIG
    assert said["requires"] == ["columns"]  # whoever knew the old one can read it
    if order == "chain":
        assert [key[:2] for key in keys(found)] == sorted(key[:2] for key in place)
    again = compact(bank, tmp_path / "again", shard_bytes=9500, order=order, seed=5)
    assert again.digest == found.digest
    other = compact(bank, tmp_path / "other", shard_bytes=9500, order=order, seed=6)
    assert (keys(other) == keys(found)) == (order == "chain")


def test_few_large_shards_become_of_many_small_ones(tmp_path: Path) -> None:
    bank = old_bank(tmp_path / "old")
    assert len(bank.shard_rows) == 8
    found = compact(bank, tmp_path / "new")
    assert found.shard_rows == (50,)
    assert sorted(keys(found)) == sorted(keys(bank))


@pytest.mark.parametrize(("size", "most"), [(50, 7), (48, 8), (7, 10), (9, 1), (1000, 64)])
def test_every_shard_of_stripes_is_a_small_bank(size: int, most: int) -> None:
    """Of N neighbours in chain and time each of the N shards has one; so of n draws of a chain n / N, to within 2."""
    chain = np.sort(np.random.default_rng(1).integers(0, 4, size))
    draw = np.arange(size)
    shards = places(chain, draw, most, "striped", 3)
    count = -(-size // most)
    assert len(shards) == count
    assert sorted(np.concatenate(shards).tolist()) == list(range(size))
    for rows in shards:
        assert len(rows) <= most
        assert (np.bincount(rows // count, minlength=-(-size // count))[:-1] == 1).all()
        for one in range(4):
            assert abs((chain[rows] == one).sum() - (chain == one).sum() / count) <= 2
    if most > 5:
        assert any((np.diff(rows) < 0).any() for rows in shards)  # and within a shard they are shuffled


def test_stripes_have_no_rhythm() -> None:
    """Of a chain that goes round every six draws, six shards would each get one phase by counting; they get all."""
    shards = places(np.zeros(600, dtype=np.int64), np.arange(600), 100, "striped", 0)
    for rows in shards:
        counts = np.bincount(rows % 6, minlength=6)
        assert counts.max() < 100 / 6 + 5 * np.sqrt(100 / 6)


def test_variance_of_shard_means_is_that_of_independent_draws_or_less(tmp_path: Path) -> None:
    """The mean of a shard varies by (1 + (m - 1) rho) / m: rho is 0.8 for a slow chain cut up, and at most 0 for stripes."""
    source = np.random.default_rng(4)
    size, most = 4096, 64
    noise, values = source.standard_normal(size), np.empty(size)
    values[0] = noise[0]
    for step in range(1, size):  # AR(1) with a lag-one correlation of 0.995
        values[step] = 0.995 * values[step - 1] + np.sqrt(1 - 0.995**2) * noise[step]
    chain, draw = np.zeros(size, dtype=np.int64), np.arange(size)

    def inflation(order: Any) -> float:
        means = [values[rows].mean() for rows in places(chain, draw, most, order, 0)]
        return float(np.var(means) / (values.var() / most))

    assert inflation("chain") > 40  # of 64: a shard is worth little more than one sample
    assert inflation("striped") < 1


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    bank = old_bank(tmp_path / "old")
    with pytest.raises(ConfigError, match="one of striped, chain"):
        compact(bank, tmp_path / "new", order="random")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"shard_bytes: want at least [0-9]+, for one sample, got 500"):
        compact(bank, tmp_path / "new", shard_bytes=500)
    with pytest.raises(ConfigError, match="a number of bytes"):
        compact(bank, tmp_path / "new", shard_bytes="many")
    with pytest.raises(ConfigError, match="the bank itself"):
        compact(bank, tmp_path / "old", overwrite=True)
    with pytest.raises(ConfigError, match="at least one sample"):
        compact(Bank.from_blocks([], layout=LAYOUT, info={}), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    compact(bank, tmp_path / "new")
    with pytest.raises(BankExists):
        compact(bank, tmp_path / "new")
    compact(bank, tmp_path / "new", shard_bytes="9.5kB", overwrite=True)
    assert len(Bank.open(tmp_path / "new").shard_rows) >= 2


def test_a_sample_that_is_not_finite_leaves_nothing_behind(tmp_path: Path) -> None:
    bank = write(tmp_path / "old", block_of((0, 0, 1), own=("energy",)))
    value = bank[1]["0.bias"].numpy().tobytes()
    file = tmp_path / "old" / "main-000000.safetensors"
    file.write_bytes(file.read_bytes().replace(value, np.full(3, np.nan, dtype=np.float32).tobytes()))
    with pytest.raises(BankError, match=r"NaN or Inf in '0\.bias'"):
        compact(Bank.open(tmp_path / "old", verify="never"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_is_made_of_it_says_what_is_still_true(tmp_path: Path) -> None:
    bank = compact(old_bank(tmp_path / "old"), tmp_path / "new")
    assert thin(bank, tmp_path / "few", every=2).info["row_order"] == "striped"
    other = compact(write(tmp_path / "one", block_of((0, 1, 1), seed=9, own=("energy",))), tmp_path / "two")
    merged = merge([bank, other], tmp_path / "both")
    assert "row_order" not in merged.info
    assert "compacted" not in merged.info
    assert compact(merged, tmp_path / "all", order="chain").info["row_order"] == "chain"


def test_a_row_larger_than_a_block_is_moved_too(tmp_path: Path) -> None:
    layout = Layout((Entry("w", (70, 9), torch.float32),))
    writer = BankWriter(tmp_path / "old", layout=layout, config={})
    writer.append(make_block({"w": torch.randn(5, 70, 9)}, chain=torch.zeros(5), draw=torch.arange(5)))
    writer.close()
    found = compact(Bank.open(tmp_path / "old"), tmp_path / "new", shard_bytes="12kB", order="chain")
    assert found.draw.tolist() == [0, 1, 2, 3, 4]


def test_the_command_does_what_the_function_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = old_bank(tmp_path / "old")
    words = ["bank", "compact", str(tmp_path / "old"), "--out", str(tmp_path / "new")]
    assert run([*words, "--shard-bytes", "9500", "--seed", "2"]) == 0
    assert "50" in capsys.readouterr().out
    assert Bank.open(tmp_path / "new").digest == compact(bank, tmp_path / "own", shard_bytes=9500, seed=2).digest
    assert run([*words, "--order", "chain"]) == 2  # something is there
    assert run([*words, "--order", "chain", "--overwrite"]) == 0
    assert Bank.open(tmp_path / "new").info["row_order"] == "chain"
    assert run([*words, "--shard-bytes", "few", "--overwrite"]) == 2
