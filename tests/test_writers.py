"""Several fits fill one bank: parts of their own, random numbers of their own, each resumed by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenarios import linear_regression

from bnn.bank import Bank
from bnn.cli import run
from bnn.errors import BankExists, BankMismatch, ConfigError
from bnn.fitting import fit
from bnn.inference import HMC


def test_two_writers_fill_one_bank_with_samples_of_their_own(tmp_path: Path) -> None:
    case = linear_regression()
    method = HMC(num_chains=3, num_warmup=20, num_steps=3)
    parts = {}
    for name in ("b", "a"):
        fit(case.model, case.data, method=method, num_samples=12, out=tmp_path / "bank", seed=4, writer=name)
        parts[name] = fit(
            case.model, case.data, method=method, num_samples=12, out=tmp_path / name, seed=4, writer=name
        )
    bank = Bank.open(tmp_path / "bank")
    assert len(bank) == 24
    assert bank.info["complete"]
    assert bank.chain.reshape(2, -1).tolist() == [[0, 1, 2] * 4, [3, 4, 5] * 4]  # "a", then "b"
    assert not set(parts["a"].log_joint.tolist()) & set(parts["b"].log_joint.tolist())
    for first, name in ((0, "a"), (12, "b")):  # what a writer makes does not hang on the others
        assert torch.equal(bank.log_joint[first : first + 12], parts[name].log_joint)
    with pytest.raises(BankExists, match="go on with resume"):
        fit(case.model, case.data, method=method, num_samples=12, out=tmp_path / "bank", seed=4, writer="a")
    with pytest.raises(BankMismatch, match="want seed = 4, got 5"):
        fit(case.model, case.data, method=method, num_samples=12, out=tmp_path / "bank", seed=5, writer="c")
    longer = fit(
        case.model, case.data, method=method, num_samples=15, out=tmp_path / "bank", seed=4, writer="a", resume=True
    )
    assert torch.equal(longer.log_joint[:12], parts["a"].log_joint)
    assert len(longer) == 27


def test_a_writer_wants_a_folder() -> None:
    case = linear_regression()
    with pytest.raises(ConfigError, match="writer: want out=, the folder that writers share"):
        fit(case.model, case.data, method=HMC(num_chains=2), num_samples=4, writer="a")


def test_writers_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rank0", "rank1"):
        line = f"fit --data diabetes --model mlp:3 --method prior --num-samples 5 --out {tmp_path}/bank --writer {name}"
        assert run(line.split()) == 0
    assert "10 samples" in capsys.readouterr().out
    assert run([*line.split()]) == 2
    assert "which is kept" in capsys.readouterr().err
    assert run([*line.replace("rank1", "Rank").split()]) == 2
    assert "small letters" in capsys.readouterr().err
