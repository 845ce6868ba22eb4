"""Chains on two ranks as users run them, in float32: the distribution of one process, in standard errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranked import WORK, launch
from torch import Tensor

import bnn
from bnn import diagnostics
from bnn.cli import run

pytestmark = pytest.mark.slow

CHAINS, DRAWS, LEAST = 6, 160, 200  # draws of each chain; effective draws that a comparison wants
OPTIONS = [
    "--data", "diabetes", "--model", "mlp:2", "--method", "hmc", "--num-chains", str(CHAINS), "--num-warmup", "150",
    "--num-samples", str(CHAINS * DRAWS), "--option", "num_steps=24",
]  # fmt: skip


def figures(bank: bnn.Bank) -> dict[str, Tensor]:
    """Functions of a sample that do not hang on the order of hidden units, [C, D] each: chains, draws."""
    block = bank.block(slice(None))
    place = block.chain * DRAWS + block.draw
    weight, bias = (next(v for name, v in block.params.items() if name.endswith(end)) for end in ("weight", "bias"))
    told = {
        "log joint": block.log_joint,
        "noise": block.params["@likelihood.scale"].log(),
        "first weights": weight.flatten(1).square().sum(dim=1).log(),
        "first biases": bias.square().sum(dim=1).log(),
    }
    return {name: torch.empty(CHAINS * DRAWS, dtype=torch.float64).index_copy(0, place, v.double()).view(CHAINS, DRAWS) for name, v in told.items()}  # fmt: skip


def test_two_ranks_draw_from_what_one_process_draws_from(tmp_path: Path) -> None:
    """Other seeds, so that the chains are others: means and spreads of each agree within four standard errors."""
    assert run(["fit", *OPTIONS, "--seed", "1", "--out", str(tmp_path / "one")]) == 0
    line = " ".join(["fit", *OPTIONS, "--seed", "2", "--out", str(tmp_path / "two")])
    ended = launch(2, "command_lines", line, script=WORK.with_name("using.py"), timeout=600)
    assert [process.returncode for process in ended] == [0, 0], ended[0].err
    one, two = (figures(bnn.Bank.open(tmp_path / name)) for name in ("one", "two"))
    for name in one:
        for power in (1, 2):
            centre = one[name].mean()
            here, there = ((values[name] - centre) ** power for values in (one, two))
            errors = []
            for draws in (here, there):
                effective = float(diagnostics.ess_mean(draws))
                assert effective > LEAST, (name, power, effective)
                errors.append(float(draws.var()) / effective)
            assert abs(float(here.mean() - there.mean())) < 4 * sum(errors) ** 0.5, (name, power)
