"""Training and distilling on two and three ranks against one process on the whole batch."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked import free_port, launch, paths

import bnn
from bnn.samplers import PairedLoader, SampleIndexSampler

HERE = Path(__file__).parent
SCRIPT = HERE / "training.py"
sys.path.insert(0, str(HERE))

import training as work  # noqa: E402


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in work.RUNS.items():
            make(out / name)
    return out


@pytest.mark.parametrize("world_size", [2, 3])
def test_steps_are_those_of_one_process(world_size: int, alone: Path, tmp_path: Path) -> None:
    ended = launch(world_size, "runs", tmp_path, script=SCRIPT)
    assert [process.returncode for process in ended] == [0] * world_size, "".join(p.err for p in ended)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(each == told[0] for each in told)
    for name in work.RUNS:
        found, expected = bnn.Bank.open(tmp_path / name), bnn.Bank.open(alone / name)
        assert found.info["complete"]
        for key, value in expected[0].items():
            assert torch.allclose(found[0][key], value, rtol=1e-9, atol=1e-11), (name, key)
            start = work.module(10 if name in ("train", "data set", "clipped", "balanced") else 60)
            assert (value - dict(start.named_parameters())[key]).abs().max() > 1e-3
        assert curve(tmp_path / name) == [pytest.approx(row, rel=1e-9) for row in curve(alone / name)]
        export = "free.safetensors" if (alone / name / "free.safetensors").exists() else "model.safetensors"
        assert (tmp_path / name / export).exists()
    own = by_hand(world_size)
    for key, value in bnn.Bank.open(tmp_path / "own")[0].items():
        assert torch.allclose(value, own[key], rtol=1e-9, atol=1e-11), key


def by_hand(world_size: int) -> dict[str, torch.Tensor]:
    """Training whose ranks meet samples of their own, without ranks: the shares of a batch one after the other."""
    module, bank, (x, y) = work.module(), work.head(), work.rows()
    free = {name: value.detach().requires_grad_() for name, value in module.named_parameters() if name[0] == "0"}
    optimizer = torch.optim.Adam(list(free.values()), lr=0.02)
    indices = [SampleIndexSampler(bank, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    loader = PairedLoader((x, y), SampleIndexSampler(bank, seed=3), batch_size=work.BATCH, shuffle=True)
    weights = work.S * bank.log_weight.softmax(dim=0)
    step, total = 0, 4 * len(loader)
    for _ in range(4):
        for (inputs, targets), _ in loader:
            optimizer.param_groups[0]["lr"] = 0.02 * 0.01 ** (step / total)
            loss = torch.zeros((), dtype=torch.float64)
            for rank in range(world_size):
                share = slice(len(targets) * rank // world_size, len(targets) * (rank + 1) // world_size)
                index = int(indices[rank].at(step))
                outputs = torch.func.functional_call(module, {**bank[index], **free}, (inputs[share],))
                each = torch.nn.functional.cross_entropy(outputs, targets[share], reduction="sum")
                loss = loss + weights[index] * each / len(targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return {name: value.detach() for name, value in free.items()}


def curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_a_killed_rank_is_started_again_and_training_goes_on(tmp_path: Path) -> None:
    """torchrun starts both again, which take the steps that are left; the result is that of a run without a kill."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("--master-port", str(free_port()), str(SCRIPT), "killed", str(tmp_path / "run"), "8"),
    ]
    ended = subprocess.run(
        command, env={**clean(), **paths()}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    calls = [int(line) for line in ended.stdout.split()]
    assert len(calls) == 2
    assert all(0 < number < 12 for number in calls)  # of 12 steps
    whole = launch(2, "killed", tmp_path / "whole", "0", script=SCRIPT)
    assert [process.returncode for process in whole] == [0, 0], whole[0].err
    found, expected = bnn.Bank.open(tmp_path / "run"), bnn.Bank.open(tmp_path / "whole")
    assert all(torch.equal(found[0][key], value) for key, value in expected[0].items())
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_ranks_that_differ_are_refused_by_all(tmp_path: Path) -> None:
    ended = launch(2, "refusals", tmp_path, script=SCRIPT)
    assert [process.returncode for process in ended] == [0, 0], ended[0].err
    said = json.loads(ended[0].out)
    for message, expected in zip(
        said, ["data.rows.digest", "lr = 0.02", "num_epochs = 4", "world_size=2"], strict=True
    ):
        assert expected in message
    assert said == json.loads(ended[1].out)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shares_of_a_batch_are_the_batch_of_one_process(num_workers: int) -> None:
    """7 rows in batches of 3 over 2 ranks: neighbours, in order, with the same index, and None without rows."""
    x = torch.arange(7)
    options: dict[str, Any] = {"batch_size": 3, "shuffle": True}
    whole = list(PairedLoader((x, x), SampleIndexSampler(4), **options))
    shares = [
        list(PairedLoader((x, x), SampleIndexSampler(4), rank=rank, world_size=2, num_workers=num_workers, **options))
        for rank in range(2)
    ]
    for place, ((rows, _), index) in enumerate(whole):
        parts = [share[place] for share in shares]
        assert [part.index for part in parts] == [index, index]
        assert [row for part in parts if part.data is not None for row in part.data[0].tolist()] == rows.tolist()
    assert [share[-1].data is None for share in shares] == [True, False]


def clean() -> dict[str, str]:
    import os

    from bnn import distributed

    return {name: value for name, value in os.environ.items() if name not in distributed.LAUNCHED}
