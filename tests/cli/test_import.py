"""bnn bank import, and banks at an address on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnn import modules
from bnn.bank import Bank
from bnn.cli import run

fsspec = pytest.importorskip("fsspec", reason="fsspec (extra 'remote') is not installed")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of two inputs and two classes, in a folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(40, 2))
    kinds = ["oak" if a + b > 0 else "pine" for a, b in x]
    lines = [f"{a},{b},{kind}" for (a, b), kind in zip(x, kinds, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["a,b,kind", *lines]) + "\n")
    return tmp_path


def dicts(count: int) -> list[dict[str, torch.Tensor]]:
    return [
        dict(modules.build("mlp:3", input_shape=[2], num_outputs=2, seed=seed).state_dict()) for seed in range(count)
    ]


FLAGS = ["--model", "mlp:3", "--data", "t.csv:kind"]


def test_checkpoints_become_a_bank_that_is_evaluated(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table / "run").mkdir()
    for number, tensors in enumerate(dicts(5)):
        save_file(tensors, table / "run" / f"step{number * 50}.safetensors")
    assert run(["bank", "import", "--from", "checkpoints", "run", "--out", "bank", *FLAGS]) == 0
    told = capsys.readouterr().out
    assert "5 samples of 17 values" in told
    assert "method      import" in told
    bank = Bank.open("bank")
    for sample, tensors in zip(bank, dicts(5), strict=True):
        assert all(torch.equal(sample[name], tensors[name]) for name in sample)
    assert bank.info["prior"] is None
    assert run(["evaluate", "--bank", "bank", "--report", "report"]) == 0
    assert "bank" in json.loads((table / "report" / "report.json").read_text())["reports"]
    assert run(["bank", "import", "--from", "checkpoints", "run", "--out", "bank", *FLAGS]) == 2
    assert run(["bank", "import", "--from", "checkpoints", "run", "--out", "bank", *FLAGS, "--overwrite"]) == 0


def test_draws_with_a_map_of_names(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacked = {name: torch.stack([one[name] for one in dicts(6)]).numpy() for name in dicts(1)[0]}
    arrays = {f"p{n}": a.reshape(3, 2, *a.shape[1:]) for n, a in enumerate(stacked.values())}
    arrays["p0"] = arrays["p0"].swapaxes(-1, -2)
    np.savez(table / "draws.npz", **arrays)
    lines = [f'p{number} = "{name}"' for number, name in enumerate(stacked)]
    lines[0] = f'p0 = {{ name = "{next(iter(stacked))}", transpose = true }}'
    (table / "names.toml").write_text("\n".join(lines))
    flags = ["bank", "import", "--from", "draws", "draws.npz", "--out", "bank", *FLAGS]
    assert run(flags) == 2
    assert "want names of the module alone, got 'p0' too" in capsys.readouterr().err
    assert not (table / "bank").exists()
    assert run([*flags, "--names", "names.toml"]) == 0
    bank = Bank.open("bank")
    assert bank.chain.tolist() == [0, 0, 1, 1, 2, 2]
    for sample, tensors in zip(bank, dicts(6), strict=True):
        assert all(torch.equal(sample[name], tensors[name]) for name in sample)


def test_kinds_that_live_in_python(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, want in {"laplace-torch": "bnn.importing from Python", "trace": "choose from that list"}.items():
        assert run(["bank", "import", "--from", kind, "run", "--out", "bank", *FLAGS]) == 2
        error = capsys.readouterr().err
        assert error.startswith("--from: want one of checkpoints, draws")
        assert want in error


def test_a_bank_at_an_address(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (table / "run").mkdir()
    for number, tensors in enumerate(dicts(3)):
        save_file(tensors, table / "run" / f"{number}.safetensors")
    assert run(["bank", "import", "--from", "checkpoints", "run", "--out", "bank", *FLAGS]) == 0
    there = fsspec.filesystem("memory")
    for path in (table / "bank").iterdir():
        there.pipe_file(f"/command-line/{path.name}", path.read_bytes())
    address = "memory://command-line"
    capsys.readouterr()
    assert run(["bank", "info", address]) == 2
    assert "pass cache=FOLDER (--cache FOLDER)" in capsys.readouterr().err
    assert run(["bank", "info", address, "--cache", "copies"]) == 0
    assert "3 samples of 17 values" in capsys.readouterr().out
    assert run(["bank", "info", address, "--cache", "copies", "--offline"]) == 2
    assert "got no copy of main-000000.safetensors" in capsys.readouterr().err
    assert run(["evaluate", "--bank", address, "--bank", "bank", "--cache", "copies", "--report", "report"]) == 0
    figures = json.loads((table / "report" / "report.json").read_text())["reports"]
    assert figures["command-line"]["metrics"] == figures["bank"]["metrics"]
    assert run(["bank", "info", address, "--cache", "copies", "--offline"]) == 0
    (table / "file").write_text("")
    assert run(["bank", "info", address, "--cache", "file"]) == 3
