"""Imports equal the samples that they were made of, bit for bit, and refuse what is none by name."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import importing
from bnn.bank import Bank
from bnn.bank.moving import rows_at_once
from bnn.errors import BankError, BankMismatch, BnnError, ConfigError, DataError
from bnn.importing import (
    checkpoints,
    from_checkpoints,
    from_draws,
    from_laplace,
    from_states,
    laplace,
    read_draws,
    states,
)
from bnn.importing.names import read_names

D, H, C = 4, 3, 2  # inputs, hidden units, outputs


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).eval()


def state_dicts(count: int, module: nn.Module) -> list[dict[str, Tensor]]:
    source = torch.Generator().manual_seed(5)
    return [
        {
            name: torch.randn(t.shape, generator=source) if t.is_floating_point() else t.clone()
            for name, t in module.state_dict().items()
        }
        for _ in range(count)
    ]


def saved(folder: Path, dicts: list[dict[str, Tensor]]) -> Path:
    """Files whose natural order is not that of their letters."""
    folder.mkdir(exist_ok=True)
    for number, tensors in enumerate(dicts):
        save_file(tensors, folder / f"epoch{8 + number}.safetensors")
    return folder


def equal(bank: Bank, dicts: list[dict[str, Tensor]]) -> None:
    assert len(bank) == len(dicts)
    for mine, theirs in zip(bank, dicts, strict=True):
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name


def predicts(bank: Bank, module: nn.Module, dicts: list[dict[str, Tensor]]) -> None:
    """A functional model over the bank gives what each sample loaded into the module gives."""
    x = torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    found = bnn.FunctionalModel(module, bank)(x, slice(None))  # [K, B, C]
    assert found.shape == (len(dicts), 7, C)
    for row, tensors in zip(found, dicts, strict=True):
        own = copy.deepcopy(module)
        own.load_state_dict(tensors, strict=False)
        torch.testing.assert_close(row, own(x))


# Checkpoints


@pytest.mark.parametrize("on_disk", [True, False])
def test_checkpoints_are_samples_in_natural_order(tmp_path: Path, on_disk: bool) -> None:
    module = network()
    dicts = state_dicts(5, module)
    told: list[tuple[int, int]] = []
    bank = from_checkpoints(
        saved(tmp_path / "run", dicts),
        module,
        out=tmp_path / "bank" if on_disk else None,
        progress=lambda done, total: told.append((done, total)),
    )
    equal(bank, dicts)
    assert bank.chain.tolist() == [0, 1, 2, 3, 4]
    assert bank.draw.tolist() == [0] * 5
    assert not bank.log_weight.any()
    assert bool(bank.log_joint.isnan().all())
    predicts(bank, module, dicts)
    options = bank.info["method"]["options"]
    assert (bank.info["method"]["name"], options["from"], options["files"]) == ("import", "checkpoints", 5)
    assert {"bnn", "torch"} <= set(bank.info["versions"])
    assert told[-1] == (10, 10)
    assert bank.digest == Bank.from_state_dicts(dicts, module=module).digest or on_disk


def test_checkpoints_with_batch_norm_are_as_from_state_dicts(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(D, H), nn.BatchNorm1d(H), nn.Linear(H, C)).eval()
    dicts = state_dicts(3, module)
    for number, tensors in enumerate(dicts):
        tensors["1.running_var"] = tensors["1.running_var"].abs() + 0.1
        tensors["1.num_batches_tracked"] = torch.tensor(number)
    found = from_checkpoints(saved(tmp_path / "run", dicts), module)
    expected = Bank.from_state_dicts(dicts, module=module)
    assert found.layout == expected.layout
    assert "1.running_mean" in found.layout.names
    assert found.digest == expected.digest
    assert {name: t.tolist() for name, t in found.base().items()} == {n: t.tolist() for n, t in expected.base().items()}
    predicts(found, module, dicts)


def test_the_map_of_names_tells_banks_of_one_source_apart(tmp_path: Path) -> None:
    """Two ways to read the same files are two banks, and each says which it is."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    source = torch.Generator().manual_seed(0)
    for number in range(4):
        tensors = {
            "a": torch.randn(2, 3, generator=source),
            "b": torch.randn(3, 2, generator=source),
            "step": torch.ones(()),
        }
        (tmp_path / "run").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "run" / f"{number}.safetensors")
    maps: list[dict[str, Any]] = [
        {"a": "0.weight", "b": "1.weight", "step": False},
        {"a": {"name": "1.weight", "transpose": True}, "b": {"name": "0.weight", "transpose": (1, 0)}, "step": None},
    ]
    folders = [tmp_path / "plain", tmp_path / "turned"]
    banks = [
        from_checkpoints(tmp_path / "run", module, names=one, out=out) for one, out in zip(maps, folders, strict=True)
    ]
    told = [json.loads((out / "bank.json").read_text()) for out in folders]
    assert told[0]["method"]["options"]["names"] == maps[0]
    assert told[1]["method"]["options"]["names"] == {
        "a": {"name": "1.weight", "transpose": True}, "b": {"name": "0.weight", "transpose": [1, 0]}, "step": False,
    }  # fmt: skip
    assert told[0]["method"]["options"]["sha256"] == told[1]["method"]["options"]["sha256"]
    assert told[0]["checksum"] != told[1]["checksum"]
    again = from_checkpoints(
        tmp_path / "run", module, names=told[1]["method"]["options"]["names"], out=tmp_path / "again"
    )
    assert again.digest == banks[1].digest != banks[0].digest
    draws = {"a": np.ones((2, 5, 2, 3)), "b": np.ones((2, 5, 3, 2))}
    named = from_draws(draws, module, names={"b": "1.weight", "a": "0.weight"})
    assert named.info["method"]["options"]["names"] == {"a": "0.weight", "b": "1.weight"}
    assert "names" not in from_draws({"0.weight": draws["a"], "1.weight": draws["b"]}, module).info["method"]["options"]


def test_only_one_checkpoint_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read when their row is made, never a second file's before the first one's row is taken."""
    module = network()
    folder = saved(tmp_path / "run", state_dicts(4, module))
    events: list[str] = []
    real = checkpoints.sample_block

    def block(values: Any, layout: Any, place: str, row: int) -> Any:
        events.append(Path(place).stem)
        return real(values, layout, place, row)

    monkeypatch.setattr(checkpoints, "sample_block", block)
    appended = bnn.bank.BankWriter.append
    monkeypatch.setattr(
        bnn.bank.BankWriter, "append", lambda self, block, state=None: (events.append("row"), appended(self, block))[1]
    )
    from_checkpoints(folder, module, out=tmp_path / "bank")
    assert events == ["epoch8", "row", "epoch9", "row", "epoch10", "row", "epoch11", "row"]


def test_two_folders_of_like_files_make_banks_of_their_own(tmp_path: Path) -> None:
    module = network()
    dicts = state_dicts(6, module)
    first = from_checkpoints(saved(tmp_path / "a", dicts[:3]), module, out=tmp_path / "one")
    again = from_checkpoints(tmp_path / "a", module, out=tmp_path / "two")
    other = from_checkpoints(saved(tmp_path / "b", dicts[3:]), module, out=tmp_path / "three")
    assert first.info["checksum"] == again.info["checksum"] != other.info["checksum"]


def test_tied_weights_under_either_name(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    weight = torch.arange(16.0).view(4, 4)
    for name, tensors in {
        "kept": {"a.weight": weight},
        "alias": {"b.weight": weight},
        "both": {"a.weight": weight, "b.weight": weight.clone()},
    }.items():
        bank = from_checkpoints(saved(tmp_path / name, [tensors]), Tied())
        assert torch.equal(bank[0]["a.weight"], weight)
    saved(tmp_path / "differ", [{"a.weight": weight, "b.weight": weight + 1}])
    with pytest.raises(BankMismatch, match=r"epoch8.*'b.weight' equal to 'a.weight', to which it is tied, got other"):
        from_checkpoints(tmp_path / "differ", Tied())


def broken(change: str, dicts: list[dict[str, Tensor]]) -> None:
    bad = dicts[2]
    if change == "missing":
        del bad["2.bias"]
    elif change == "extra":
        bad["head.weight"] = torch.zeros(2)
    elif change == "shape":
        bad["0.weight"] = bad["0.weight"].T.contiguous()
    elif change == "integers":
        bad["0.bias"] = torch.zeros(H, dtype=torch.int64)
    elif change == "nan":
        bad["2.weight"][1, 1] = torch.nan


REFUSALS = {
    "missing": r"epoch10.safetensors: want '2.bias' \[2\], got nothing under that name",
    "extra": r"epoch10.safetensors: want names of the module alone, got 'head.weight' too",
    "shape": r"epoch10.safetensors: want '0.weight' \[3, 4\], got \[4, 3\]; say transpose",
    "integers": r"epoch10.safetensors: want real numbers as '0.bias', got I64",
    "nan": r"epoch10.safetensors: want finite samples, got NaN or Inf in '2.weight' of row 2",
}


@pytest.mark.parametrize("change", REFUSALS)
def test_checkpoints_that_do_not_fit_leave_nothing_behind(tmp_path: Path, change: str) -> None:
    module = network()
    dicts = state_dicts(4, module)
    broken(change, dicts)
    with pytest.raises(BankError, match=REFUSALS[change]):
        from_checkpoints(saved(tmp_path / "run", dicts), module, out=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_pickles_are_refused_by_name_with_a_way_out(tmp_path: Path) -> None:
    module = network()
    folder = saved(tmp_path / "run", state_dicts(2, module))
    torch.save(module.state_dict(), folder / "epoch3.pt")
    with pytest.raises(
        DataError, match=r"epoch3\.pt: want a \.safetensors file.*save_file\(torch\.load\('epoch3\.pt', weights"
    ):
        from_checkpoints(folder, module)
    with pytest.raises(DataError, match=r"epoch3\.pt"):
        from_checkpoints([folder / "epoch3.pt"], module)
    (folder / "epoch3.pt").unlink()
    (folder / "epoch8.safetensors").write_bytes(b"\x80\x04 a pickle under another name")
    with pytest.raises(DataError, match=r"epoch8\.safetensors: want a safetensors file"):
        from_checkpoints(folder, module)


def test_folders_that_hold_no_checkpoints(tmp_path: Path) -> None:
    module = network()
    (tmp_path / "empty").mkdir()
    bank = Bank.from_state_dicts([module.state_dict()], module=module, out=tmp_path / "bank")
    for place, want in (
        (tmp_path / "none", "got nothing there"),
        (tmp_path / "empty", r"want \.safetensors files, got none"),
        (bank.path, "got a bank"),
    ):
        with pytest.raises(DataError, match=want):
            from_checkpoints(place, module)
    with pytest.raises(DataError, match="at least one"):
        from_checkpoints([], module)


def test_values_outside_the_sample_must_be_the_modules(tmp_path: Path) -> None:
    module = network()
    model = bnn.BayesianModel(
        module, prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Categorical(), num_data=9, bayesian="2"
    )
    dicts = state_dicts(3, module)
    with pytest.raises(BankMismatch, match=r"epoch8.*want '0\.bias' as the module has it"):
        from_checkpoints(saved(tmp_path / "run", dicts), model)
    for tensors in dicts:
        tensors |= {name: module.state_dict()[name].clone() for name in ("0.weight", "0.bias")}
    bank = from_checkpoints(saved(tmp_path / "run", dicts), model)
    assert bank.layout.names == ("2.weight", "2.bias")
    assert bank.info["likelihood"]["name"] == model.likelihood.to_config()["name"]
    predicts(bank, module, dicts)


# Draws


def draws_of(dicts: list[dict[str, Tensor]], chains: int) -> dict[str, np.ndarray]:
    """[chains, draws, *shape], matrices as JAX has them: [in, out]."""
    stacked = {name: torch.stack([one[name] for one in dicts]) for name in dicts[0]}
    arrays = {n: t.unflatten(0, (chains, len(dicts) // chains)).numpy() for n, t in stacked.items()}
    return {n: a.swapaxes(-1, -2) if a.ndim == 4 else a for n, a in arrays.items()}


NAMES = {
    "w1": {"name": "0.weight", "transpose": True},
    "b1": "0.bias",
    "w2": {"name": "2.weight", "transpose": [1, 0]},
    "b2": "2.bias",
    "tau": False,
}


def foreign(dicts: list[dict[str, Tensor]], chains: int) -> dict[str, np.ndarray]:
    own = draws_of(dicts, chains)
    renamed = {"w1": own["0.weight"], "b1": own["0.bias"], "w2": own["2.weight"], "b2": own["2.bias"]}
    return renamed | {"tau": np.ones((chains, len(dicts) // chains))}


@pytest.mark.parametrize("on_disk", [True, False])
def test_draws_keep_chain_and_draw(tmp_path: Path, on_disk: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnn.importing import draws as place

    monkeypatch.setattr(place, "rows_at_once", lambda layout: 2)  # several blocks a chain
    module = network()
    dicts = state_dicts(10, module)
    density = np.arange(10.0).reshape(2, 5)
    bank = from_draws(
        foreign(dicts, 2), module, names=NAMES, log_joint=density, out=tmp_path / "bank" if on_disk else None
    )
    equal(bank, dicts)
    assert bank.chain.tolist() == [0] * 5 + [1] * 5
    assert bank.draw.tolist() == [0, 1, 2, 3, 4] * 2
    assert bank.log_joint.tolist() == list(range(10))
    assert not bank.log_weight.any()
    predicts(bank, module, dicts)
    assert bank.info["method"]["options"]["package"] == "numpy"


def test_draws_of_doubles_are_rounded_and_said_so() -> None:
    module = network()
    dicts = state_dicts(6, module)
    wide = {name: array.astype(np.float64) + 1e-12 for name, array in foreign(dicts, 3).items()}
    bank = from_draws(wide, module, names=NAMES)
    assert bank[1]["0.bias"].equal(torch.from_numpy(wide["b1"][0, 1]).float())
    assert bank.info["method"]["options"]["cast"] == dict.fromkeys(bank.layout.names, "float64")
    wide["b2"][2, 1, 0] = 1e300  # more than a float32 holds
    with pytest.raises(BankError, match=r"draws: want finite samples, got NaN or Inf in '2\.bias' of row 5"):
        from_draws(wide, module, names=NAMES)


def test_draws_of_torch_and_pyros_unknowns() -> None:
    """A model's own unknowns are of the sample, under the name that the map gives them."""
    module = network()
    model = bnn.BayesianModel(
        module, prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Gaussian(bnn.priors.LogNormal()), num_data=9
    )
    assert "@likelihood.scale" in model.layout.names
    dicts = state_dicts(6, module)
    arrays: dict[str, Any] = {n: torch.stack([one[n] for one in dicts]).unflatten(0, (3, 2)) for n in dicts[0]}
    arrays["sigma"] = torch.arange(1.0, 7.0).view(3, 2)
    bank = from_draws(arrays, model, names={"sigma": "@likelihood.scale"})
    assert [float(sample["@likelihood.scale"]) for sample in bank] == [1, 2, 3, 4, 5, 6]
    assert bank.info["task"] == "regression"
    with pytest.raises(BankMismatch, match=r"'@likelihood\.scale' \[\], got nothing"):
        from_draws({n: a for n, a in arrays.items() if n != "sigma"}, model)


def test_draws_of_arviz(tmp_path: Path) -> None:
    az = pytest.importorskip("arviz", reason="arviz (extra 'test') is not installed")
    module = network()
    dicts = state_dicts(10, module)
    data = az.from_dict(posterior=foreign(dicts, 2), coords={"chain": [3, 7], "draw": [10, 20, 30, 40, 50]})
    bank = from_draws(data, module, names=NAMES)
    equal(bank, dicts)
    assert bank.chain.tolist() == [3] * 5 + [7] * 5
    assert bank.draw.tolist() == [10, 20, 30, 40, 50] * 2
    assert bank.info["method"]["options"]["package"] == "arviz"
    assert bank.info["versions"]["arviz"] == az.__version__
    turned = data.posterior.transpose("draw", ..., "chain")
    equal(from_draws(turned, module, names=NAMES), dicts)
    tree = pytest.importorskip("xarray", reason="xarray is not installed").DataTree.from_dict(
        {"posterior": data.posterior, "sample_stats": data.posterior[["tau"]]}
    )
    equal(from_draws(tree, module, names=NAMES), dicts)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".nc"])
def test_files_of_draws(tmp_path: Path, suffix: str) -> None:
    module = network()
    dicts = state_dicts(6, module)
    path = tmp_path / f"draws{suffix}"
    if suffix == ".npz":
        np.savez(path, **foreign(dicts, 3))
    elif suffix == ".safetensors":
        save_file({n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in foreign(dicts, 3).items()}, path)
    else:
        az = pytest.importorskip("arviz", reason="arviz (extra 'test') is not installed")
        az.from_dict(posterior=foreign(dicts, 2)).to_netcdf(str(path))
    equal(from_draws(read_draws(path), module, names=NAMES), dicts)


def test_what_bank_export_writes_comes_back(tmp_path: Path) -> None:
    module = network()
    dicts = state_dicts(6, module)
    bank = from_draws(foreign(dicts, 3), module, names=NAMES, out=tmp_path / "bank")
    bnn.bank.write_chains(bank, tmp_path / "chains.safetensors", params=["*"])
    again = from_draws(read_draws(tmp_path / "chains.safetensors"), module)
    equal(again, dicts)
    assert torch.equal(again.chain, bank.chain)
    assert torch.equal(again.draw, bank.draw)


def test_files_that_hold_no_draws(tmp_path: Path) -> None:
    np.savez(tmp_path / "objects.npz", w=np.array([{}], dtype=object))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "draws.csv").write_text("a\n1\n")
    for name, want in {
        "objects.npz": "an .npz archive of plain arrays",
        "cut.npz": "an .npz archive of plain arrays",
        "junk.npz": "want an .npz archive of plain arrays, got no zip archive",
        "draws.csv": "want .safetensors, .npz or .nc, got .csv",
        "none.npz": "a file of draws, got none",
    }.items():
        with pytest.raises(DataError, match=want):
            read_draws(tmp_path / name)


def changed(change: str, arrays: dict[str, Any], names: dict[str, Any]) -> None:
    if change == "missing":
        del arrays["b2"], names["b2"]
    elif change == "extra":
        arrays["sd"] = np.ones((3, 2))
    elif change == "not turned":
        names["w1"] = "0.weight"
    elif change == "integers":
        arrays["b1"] = arrays["b1"].astype(np.int64)
    elif change == "nan":
        arrays["w2"][1, 1, 0, 1] = np.nan
    elif change == "one chain less":
        arrays["b1"] = arrays["b1"][:2]
    elif change == "no chains":
        arrays["tau"] = np.ones(6)
    elif change == "unknown key":
        names["w9"] = "0.weight"
    elif change == "twice":
        names["tau"] = "0.bias"
    elif change == "axes":
        names["w1"] = {"name": "0.weight", "transpose": [0, 2]}
    elif change == "typo":
        names["w1"] = {"name": "0.weight", "transposed": True}


WRONG = {
    "missing": (BankMismatch, r"draws: want '2\.bias' \[2\], got nothing under that name; map a name to it"),
    "extra": (BankMismatch, r"want names of the module alone, got 'sd' too"),
    "not turned": (BankMismatch, r"draws 'w1': want '0\.weight' \[3, 4\], got \[4, 3\]; say transpose"),
    "integers": (BankMismatch, r"draws 'b1': want real numbers as 'b1', got int64"),
    "nan": (BankError, r"got NaN or Inf in '2\.weight' of row 3"),
    "one chain less": (BankMismatch, r"draws 'b1': want \[3, 2\] chains and draws, as 'w1' has, got \[2, 2\]"),
    "no chains": (DataError, r"draws 'tau': want \[chains, draws, \*shape\], got \[6\]"),
    "unknown key": (ConfigError, r"names 'w9': want a name of the draws, got none"),
    "twice": (ConfigError, r"names 'tau': want a name of its own, got '0\.bias', which 'b1' becomes"),
    "axes": (ConfigError, r"names 'w1': want each of its 2 axes once, got transpose = \[0, 2\]"),
    "typo": (ConfigError, r"names 'w1': want a name,.*'transposed'"),
}


@pytest.mark.parametrize("change", WRONG)
def test_draws_that_do_not_fit_leave_nothing_behind(tmp_path: Path, change: str) -> None:
    module = network()
    arrays: dict[str, Any] = {n: a.copy() for n, a in foreign(state_dicts(6, module), 3).items()}
    names = dict(NAMES)
    changed(change, arrays, names)
    kind, want = WRONG[change]
    with pytest.raises(kind, match=want):
        from_draws(arrays, module, names=names, out=tmp_path / "bank")
    assert not (tmp_path / "bank").exists()


def test_other_draws_and_densities_are_refused() -> None:
    with pytest.raises(BankMismatch, match=r"log_joint: want \[3, 2\], got \[2, 3\]"):
        from_draws(foreign(state_dicts(6, network()), 3), network(), names=NAMES, log_joint=np.zeros((2, 3)))
    with pytest.raises(DataError, match="draws: want name -> array"):
        from_draws([1, 2], network())


def test_an_existing_bank_is_kept_unless_overwritten(tmp_path: Path) -> None:
    module = network()
    dicts = state_dicts(6, module)
    from_draws(foreign(dicts, 3), module, names=NAMES, out=tmp_path / "bank")
    with pytest.raises(BnnError, match="bank"):
        from_draws(foreign(dicts[:4], 2), module, names=NAMES, out=tmp_path / "bank")
    equal(Bank.open(tmp_path / "bank"), dicts)
    equal(from_draws(foreign(dicts[:4], 2), module, names=NAMES, out=tmp_path / "bank", overwrite=True), dicts[:4])


def test_a_map_of_names_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.toml"
    path.write_text(
        'w1 = { name = "0.weight", transpose = true }\nb1 = "0.bias"\n'
        'w2 = { name = "2.weight", transpose = [1, 0] }\nb2 = "2.bias"\ntau = false\n'
    )
    assert read_names(path) == NAMES
    for text, want in {
        "w1 = 3": "names.toml 'w1': want a name",
        "w1 = ": "want TOML",
        '0.weight = "w1"': r"names.toml '0': want a name",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=want):
            read_names(path)
    with pytest.raises(ConfigError, match="want a TOML file"):
        read_names(tmp_path / "none.toml")


# laplace-torch


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(3)
    return torch.randn(23, D, generator=source), torch.randint(C, (23,), generator=source)


def fitted(oracle: Any, module: nn.Module, rows: tuple[Tensor, Tensor], subset: str, structure: str) -> Any:
    with warnings.catch_warnings():
        # See tests/inference/test_laplace.py: its import compiles functions with torch.jit.script.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        peer = oracle("laplace")
        found = peer.Laplace(
            module, "classification", subset_of_weights=subset, hessian_structure=structure, prior_precision=1.7
        )
        found.fit(DataLoader(TensorDataset(*rows), batch_size=23))
    return found


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_laplace_torch_draws(
    tmp_path: Path,
    rows: tuple[Tensor, Tensor],
    subset: str,
    structure: str,
    oracle: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = network()
    posterior = fitted(oracle, module, rows, subset, structure)
    monkeypatch.setattr(laplace, "rows_at_once", lambda layout: 4)
    bank = from_laplace(posterior, module, num_samples=9, seed=11, out=tmp_path / "bank")
    source = bnn.seeding.generator(11, "import", "laplace")
    flat = torch.cat([posterior.sample(size, generator=source) for size in (4, 4, 1)])  # [S, P]
    names = ("2.weight", "2.bias") if subset == "last_layer" else ("0.weight", "0.bias", "2.weight", "2.bias")
    assert bank.layout.names == names
    for sample, row in zip(bank, flat, strict=True):
        assert torch.equal(torch.cat([sample[name].flatten() for name in names]), row)
    assert bank.draw.tolist() == list(range(9))
    assert not bank.chain.any()
    predicts(bank, module, [dict(sample) for sample in bank])
    again = from_laplace(posterior, module, num_samples=9, seed=11)
    other = from_laplace(posterior, module, num_samples=9, seed=12)
    assert torch.equal(again[5]["2.bias"], bank[5]["2.bias"])
    assert not torch.equal(other[5]["2.bias"], bank[5]["2.bias"])
    assert bank.info["method"]["options"]["posterior"] == type(posterior).__name__


def test_laplace_torch_moments(rows: tuple[Tensor, Tensor], oracle: Any) -> None:
    """Mean and covariance of the bank are those of the posterior, within standard errors."""
    module = network()
    posterior = fitted(oracle, module, rows, "last_layer", "full")
    count = 4000
    bank = from_laplace(posterior, module, num_samples=count, seed=1)
    flat = bank.layout.flatten(bank.block(slice(None)).params).double()  # [S, P]
    covariance = torch.linalg.inv(posterior.posterior_precision.double())
    spread = covariance.diagonal().sqrt()
    assert ((flat.mean(0) - posterior.mean).abs() < 4.5 * spread / count**0.5).all()
    error = (torch.outer(spread, spread).square() + covariance.square()).sqrt() / count**0.5
    assert ((torch.cov(flat.T) - covariance).abs() < 4.5 * error).all()


def test_laplace_torch_refusals(rows: tuple[Tensor, Tensor], oracle: Any) -> None:
    module = network()
    posterior = fitted(oracle, module, rows, "last_layer", "diag")
    other = copy.deepcopy(module)
    with torch.no_grad():
        other[0].bias += 1.0  # type: ignore[index]
    with pytest.raises(BankMismatch, match=r"model '0\.bias': want the values that the posterior was fitted on"):
        from_laplace(posterior, other, num_samples=3)
    with pytest.raises(BankMismatch, match=r"laplace: want '2\.weight' \[5, 3\], got \[2, 3\]"):
        from_laplace(posterior, nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 5)), num_samples=3)
    model = bnn.BayesianModel(module, prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Categorical(), num_data=23)
    with pytest.raises(BankMismatch, match=r"bayesian: want the parameters of the source: 2\.weight, 2\.bias"):
        from_laplace(posterior, model, num_samples=3)
    with pytest.raises(ConfigError, match="num_samples"):
        from_laplace(posterior, module, num_samples=0)
    with pytest.raises(ConfigError, match="got Sequential"):
        from_laplace(module, module, num_samples=3)
    import laplace as peer

    with pytest.raises(ConfigError, match=r"a fitted posterior, got one before fit"):
        from_laplace(peer.Laplace(module, "classification"), module, num_samples=3)


# posteriors


@pytest.fixture
def posteriors(oracle: Any) -> Any:
    with warnings.catch_warnings():
        # Its classes share their default tensors, of which tensordict 0.15 says that this will change.
        warnings.filterwarnings("ignore", "The Tensor default of the field", FutureWarning)
        return oracle("posteriors")


def test_states_of_posteriors(tmp_path: Path, posteriors: Any) -> None:
    module = network()
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(2))

    def log_posterior(params: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(module, params, (batch,))
        return -outputs.square().mean(), torch.tensor([])

    transform = posteriors.sgmcmc.sghmc.build(log_posterior, lr=1e-2)

    def walk() -> Iterator[Any]:
        state = transform.init(start)
        for _ in range(7):
            state, _ = transform.update(state, x)
            yield state

    kept = list(walk())
    dicts = [{name: state.params[name].detach() for name in start} for state in kept]
    bank = from_states(kept, module, out=tmp_path / "bank")
    equal(bank, dicts)
    assert bank.draw.tolist() == list(range(7))
    assert not bank.chain.any()
    predicts(bank, module, dicts)
    assert bank.info["versions"]["posteriors"]
    equal(from_states(torch.stack(kept), module), dicts)
    equal(from_states(iter(kept), module), dicts)


def test_distributions_of_posteriors_are_sampled_first(posteriors: Any) -> None:
    module = network()
    start = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    state = posteriors.vi.diag.VIDiagState(
        start, {n: torch.full_like(t, -2.0) for n, t in start.items()}, opt_state=None
    )
    for given in ([state], state):
        with pytest.raises(ConfigError, match=r"want draws, got a distribution, of which 'log_sd_diag'"):
            from_states(given, module)
    draws = posteriors.vi.diag.sample(state, torch.Size([5]))
    bank = from_states(draws, module)
    equal(bank, [{name: draws[name][row] for name in start} for row in range(5)])


class State:
    """As `posteriors` has them: params, and what the algorithm keeps beside."""

    def __init__(self, params: Any) -> None:
        self.params, self.momenta = params, params


@pytest.mark.parametrize("kind", ["states", "params", "nested", "generator", "in place"])
def test_states_are_draws_of_one_chain(kind: str) -> None:
    module = network()
    dicts = state_dicts(5, module)
    nested = [
        {"0": {"weight": d["0.weight"], "bias": d["0.bias"]}, "2": {"weight": d["2.weight"], "bias": d["2.bias"]}}
        for d in dicts
    ]

    def in_place() -> Iterator[State]:
        state = State({name: torch.empty_like(tensor) for name, tensor in dicts[0].items()})
        for one in dicts:
            for name, tensor in one.items():
                state.params[name].copy_(tensor)
            yield state

    made: dict[str, Any] = {
        "states": [State(one) for one in dicts],
        "params": dicts,
        "nested": nested,
        "generator": (State(one) for one in dicts),
        "in place": in_place(),
    }
    bank = from_states(made[kind], module)
    equal(bank, dicts)
    assert bank.draw.tolist() == [0, 1, 2, 3, 4]
    assert not bank.chain.any()


def test_states_of_chains_side_by_side_and_stacked_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    module = network()
    dicts = state_dicts(12, module)
    steps = [{n: torch.stack([one[n] for one in dicts[s : s + 3]]) for n in dicts[0]} for s in range(0, 12, 3)]
    told: list[tuple[int, int]] = []
    bank = from_states([State(one) for one in steps], module, progress=lambda done, total: told.append((done, total)))
    equal(bank, dicts)
    assert bank.chain.tolist() == [0, 1, 2] * 4
    assert bank.draw.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert told == [(3, 12), (6, 12), (9, 12), (12, 12)]
    monkeypatch.setattr(states, "rows_at_once", lambda layout: 5)
    bank = from_states({n: torch.stack([one[n] for one in dicts]) for n in dicts[0]}, module)
    equal(bank, dicts)
    assert bank.draw.tolist() == list(range(12))


def test_states_with_names_and_axes_of_their_own() -> None:
    module = network()
    dicts = state_dicts(4, module)
    theirs = [
        {"w1": d["0.weight"].T, "b1": d["0.bias"], "w2": d["2.weight"].T, "b2": d["2.bias"], "tau": torch.ones(())}
        for d in dicts
    ]
    equal(from_states(theirs, module, names=NAMES), dicts)
    equal(from_states({n: torch.stack([one[n] for one in theirs]) for n in theirs[0]}, module, names=NAMES), dicts)


def test_states_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    module = network()
    for change, want in {
        "missing": r"state 2: want '2\.bias' \[2\], got nothing",
        "extra": r"state 2: want names of the module alone, got 'head\.weight' too",
        "shape": r"state 2: want '0\.weight' \[3, 4\], got \[4, 3\]",
        "integers": r"state 2: want real numbers as '0\.bias', got torch\.int64",
        "nan": r"NaN or Inf in '2\.weight' of row 2",
    }.items():
        dicts = state_dicts(4, module)
        broken(change, dicts)
        with pytest.raises(BankError, match=want):
            from_states(dicts, module, out=tmp_path / "bank")
        assert not (tmp_path / "bank").exists()
    with pytest.raises(BankError, match="at least one"):
        from_states([], module)
    with pytest.raises(BankMismatch, match=r"want \[S, \*\[3, 4\]\]"):
        from_states(state_dicts(1, module)[0], module)


def test_rows_that_were_committed_go_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an import is of use to nobody, and nothing could tell it from a whole one."""
    from bnn.bank import writer

    monkeypatch.setattr(writer, "ROW_SECONDS", -1.0)  # each row is committed as it comes
    dicts = state_dicts(4, network())
    broken("nan", dicts)

    def walk() -> Iterator[dict[str, Tensor]]:
        for number, one in enumerate(dicts):
            if number == 2:
                assert (tmp_path / "bank" / "main-000001.safetensors").exists()
            yield one

    with pytest.raises(BankError, match="row 2"):
        from_states(walk(), network(), out=tmp_path / "bank")
    assert not list(tmp_path.glob("bank/*.safetensors"))
    assert not (tmp_path / "bank" / "bank.json").exists()


def test_bank_json_is_plain(tmp_path: Path) -> None:
    bank = from_states(state_dicts(3, network()), network(), out=tmp_path / "bank")
    told = json.loads((tmp_path / "bank" / "bank.json").read_text())
    assert told["method"] == bank.info["method"]
    assert told["method"]["options"]["from"] == "posteriors"
    assert rows_at_once(bank.layout) > 3
    assert set(importing.__all__) >= {"from_checkpoints", "from_draws", "from_laplace", "from_states"}
