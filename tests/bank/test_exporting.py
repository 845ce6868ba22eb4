"""Files for other tools: state dicts that modules load, chains that ArviZ reads, and the mean against NumPy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from bnn.bank import Bank, exporting, files, mean, moving, write_chains, write_state_dict
from bnn.errors import BankError, BankExists, BankMismatch, ConfigError
from bnn.layout import Entry, layout_of
from bnn.types import make_block

C, D = 3, 14  # chains, draws


class Tied(nn.Module):
    """Two names of one weight, half precision beside single, buffers of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.low = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.tensor([True, False, True]))


def chains(*, shuffled: bool = True, drop: int = 0) -> Bank:
    """C chains of D draws in random order of rows."""
    source = torch.Generator().manual_seed(0)
    module = Tied()
    layout = layout_of(module, ["*", "!norm"], extra=[Entry("@likelihood.scale", (), torch.float32)])
    index = torch.randperm(C * D, generator=source) if shuffled else torch.arange(C * D)
    index = index[: C * D - drop]
    size = len(index)
    block = make_block(
        {e.name: torch.randn(size, *e.shape, generator=source).to(e.dtype) for e in layout.entries},
        chain=2 * (index % C),
        draw=100 + 3 * (index // C),
        log_joint=torch.randn(size, generator=source).double(),
        columns={
            "acceptance": torch.rand(size, generator=source).double(),
            "divergent": (torch.rand(size, generator=source) < 0.3).double() * 2,
            "energy": torch.randn(size, generator=source).double(),
        },
    )
    kept = {k: v for k, v in module.state_dict().items() if k not in layout.names and k not in layout.aliases}
    return Bank.from_blocks([block], layout=layout, info={}, base=kept)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and blocks of a few rows, so that small banks have several."""
    monkeypatch.setattr(exporting, "PIECE_BYTES", 180)
    monkeypatch.setattr(moving, "BLOCK_BYTES", 400)


def row_of(bank: Bank, chain: int, draw: int) -> int:
    (row,) = ((bank.chain == 2 * chain) & (bank.draw == 100 + 3 * draw)).nonzero().flatten().tolist()
    return row


@pytest.mark.usefixtures("small")
def test_chains_are_the_banks_draws(tmp_path: Path) -> None:
    bank, told = chains(), []
    write_chains(bank, tmp_path / "chains.safetensors", params=["*"], progress=lambda *place: told.append(place))
    found = safetensors.numpy.load_file(tmp_path / "chains.safetensors")
    assert set(found) == {
        *(f"posterior.{name}" for name in bank.layout.names),
        *(f"sample_stats.{name}" for name in ("lp", "log_weight", "diverging", "acceptance_rate", "energy")),
    }
    assert found["posterior.low"].dtype == np.float32
    assert found["sample_stats.diverging"].dtype == bool
    assert found["posterior.first.weight"].shape == (C, D, 3, 3)
    assert found["posterior.@likelihood.scale"].shape == (C, D)
    for chain in range(C):
        for draw in range(D):
            row = row_of(bank, chain, draw)
            for name, value in bank[row].items():
                assert np.array_equal(found[f"posterior.{name}"][chain, draw], value.float().numpy())
            assert found["sample_stats.lp"][chain, draw] == bank.log_joint[row]
            assert found["sample_stats.energy"][chain, draw] == bank.columns["energy"][row]
            assert found["sample_stats.acceptance_rate"][chain, draw] == bank.columns["acceptance"][row]
            assert found["sample_stats.diverging"][chain, draw] == (bank.columns["divergent"][row] > 0)
    assert len(told) > 20
    assert told[-1][0] == told[-1][1] == sum(array.nbytes for array in found.values())


def test_arviz_reads_the_chains(tmp_path: Path) -> None:
    az = pytest.importorskip("arviz", reason="arviz (extra 'test') is not installed")
    bank = chains()
    write_chains(bank, tmp_path / "chains.safetensors", params=["first", "@*"])
    tensors = safetensors.numpy.load_file(tmp_path / "chains.safetensors")
    groups: dict[str, dict[str, Any]] = {"posterior": {}, "sample_stats": {}}
    for name, array in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = array
    found = az.from_dict(**groups)
    assert set(found.posterior) == {"first.weight", "first.bias", "@likelihood.scale"}
    ess = az.ess(found)
    assert ess["first.weight"].shape == (3, 3)
    assert bool(np.isfinite(ess["first.weight"]).all())
    assert int(found.sample_stats["diverging"].sum()) == int((bank.columns["divergent"] > 0).sum())
    row = row_of(bank, 1, 4)
    assert np.array_equal(found.posterior["first.bias"].values[1, 4], bank[row]["first.bias"].numpy())


def test_chains_choose_parameters_by_globs(tmp_path: Path) -> None:
    bank = chains()
    for params, wanted in (((), set()), (["first", "!*.bias"], {"posterior.first.weight"})):
        write_chains(bank, tmp_path / "chains", params=params, overwrite=True)
        found = safetensors.numpy.load_file(tmp_path / "chains")
        assert {name for name in found if name.startswith("posterior")} == wanted
    with pytest.raises(ConfigError, match="params: want patterns that match a parameter, got 'second'"):
        write_chains(bank, tmp_path / "other", params=["second"])
    assert not (tmp_path / "other").exists()


def test_chains_of_unequal_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"want chains of one length, got 13 to 14 draws; .*thin"):
        write_chains(chains(shuffled=False, drop=1), tmp_path / "chains")
    with pytest.raises(BankError, match="want samples, got none"):
        write_chains(Bank.from_blocks([], layout=chains().layout, info={}), tmp_path / "chains")
    block = chains().block(slice(None))
    again = block._replace(draw=torch.where(block.draw == 103, 106, block.draw))
    bank = Bank.from_blocks([again], layout=chains().layout, info={})
    with pytest.raises(BankError, match="got draw 106 of chain 0 more than once"):
        write_chains(bank, tmp_path / "chains")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("weighted", [False, True])
def test_mean_is_that_of_numpy(weighted: bool) -> None:
    bank = chains()
    if weighted:
        weight = 4 * torch.randn(C * D, generator=torch.Generator().manual_seed(1)).double() + 700
        weight[3] = -torch.inf
        bank = Bank.from_blocks(
            [bank.block(slice(None))._replace(log_weight=weight)], layout=bank.layout, info={"columns": []}
        )
    relative = np.exp(bank.log_weight.numpy() - bank.log_weight.numpy().max())
    found = mean(bank)
    assert set(found) == {"first.weight", "first.bias", "low"}
    for name, value in found.items():
        rows = np.stack([bank[index][name].double().numpy() for index in range(len(bank))])
        wanted = torch.from_numpy(np.average(rows, axis=0, weights=relative)).to(value.dtype)
        assert value.dtype == bank[0][name].dtype
        assert torch.allclose(value, wanted, rtol=2e-6 if value.dtype == torch.float32 else 1e-2)


def test_mean_needs_weight() -> None:
    bank = chains()
    none = torch.full((C * D,), -torch.inf, dtype=torch.float64)
    block = bank.block(slice(None))._replace(log_weight=none)
    with pytest.raises(BankError, match="log weights of -inf"):
        mean(Bank.from_blocks([block], layout=bank.layout, info={}))
    with pytest.raises(BankError, match="got none"):
        mean(Bank.from_blocks([], layout=bank.layout, info={}))


@pytest.mark.parametrize("what", ["sample", "mean"])
def test_a_module_loads_the_state_dict_as_it_is(tmp_path: Path, what: str) -> None:
    bank = chains()
    params = bank[5] if what == "sample" else mean(bank)
    write_state_dict(bank, tmp_path / "model.safetensors", params)
    module = Tied()
    module.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))  # strict: no more, no less
    assert torch.equal(module.first.weight, params["first.weight"])
    assert torch.equal(module.second.weight, params["first.weight"])
    assert torch.equal(module.low, params["low"])
    assert torch.equal(module.norm.num_batches_tracked, bank.base()["norm.num_batches_tracked"])
    assert torch.equal(module.mask, torch.tensor([True, False, True]))
    files.map_tensors(tmp_path / "model.safetensors")  # which refuses a tensor that is not at a multiple of its width


def test_other_values_are_refused(tmp_path: Path) -> None:
    bank = chains()
    good = bank[0]
    for change, words in (
        ({"low": good["low"].float()}, "'low' .*bfloat16, got torch.float32"),
        ({"first.bias": torch.zeros(4)}, r"'first.bias' \[3\] .*got torch.float32 \[4\]"),
        ({"third": torch.zeros(4)}, "'third' too"),
    ):
        with pytest.raises(BankMismatch, match=words):
            write_state_dict(bank, tmp_path / "model", {**good, **change})
    with pytest.raises(BankMismatch, match=r"'low' .*got nothing"):
        write_state_dict(bank, tmp_path / "model", {name: value for name, value in good.items() if name != "low"})
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    bank = Bank.from_state_dicts([module.state_dict()] * 2, module=module, out=tmp_path / "bank")
    file = tmp_path / "file"
    file.write_text("mine")
    own = sorted(path for path in (tmp_path / "bank").iterdir())
    before = [path.read_bytes() for path in own]
    for write in (
        lambda path, **more: write_chains(bank, path, **more),
        lambda path, **more: write_state_dict(bank, path, bank[0], **more),
    ):
        with pytest.raises(BankExists, match="a file, which is kept"):
            write(file)
        with pytest.raises(BankExists, match="a folder"):
            write(tmp_path / "bank", overwrite=True)
        for path in own:
            with pytest.raises(BankExists, match="one of the bank"):
                write(path, overwrite=True)
    assert file.read_text() == "mine"
    assert [path.read_bytes() for path in own] == before
    write_state_dict(bank, file, bank[1], overwrite=True)
    assert torch.equal(safetensors.torch.load_file(file)["bias"], module.bias)
