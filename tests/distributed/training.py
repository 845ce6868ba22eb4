"""What one rank trains; run as a script, once a rank, by `ranked.launch` or by torchrun."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import bnn
from bnn import distributed, training
from bnn.errors import BnnError
from bnn.layout import layout_of
from bnn.samplers import ClassBalancedSampler
from bnn.training import loop
from bnn.types import make_block

S, N, D, C, HIDDEN = 7, 23, 3, 4, 5
BATCH = 11  # batches of 11, 11 and 1 rows: of the last one rank has it, and the others nothing


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(module: nn.Module, seed: int) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.copy_(0.5 * random(*parameter.shape, seed=seed + place))
    return module


def module(seed: int = 10) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, C)), seed)


def head(patterns: str = "2") -> bnn.Bank:
    """A bank of some parameters, whose samples have weights of their own."""
    layout = layout_of(module(), patterns)
    params = {entry.name: random(S, *entry.shape, seed=20 + place) for place, entry in enumerate(layout.entries)}
    zeros = torch.zeros(S, dtype=torch.int64)
    block = make_block(params, chain=zeros, draw=torch.arange(S), log_weight=0.5 * random(S, seed=30))
    info = {"likelihood": bnn.likelihoods.Categorical().to_config(), "method": {"name": "hmc", "options": {}}}
    return bnn.Bank.from_blocks([block], layout=layout, info=info)


def rows() -> tuple[Tensor, Tensor]:
    return random(N, D, seed=40), torch.arange(N) * 3 % C


class Pairs(Dataset[Any]):
    """The same rows, one by one."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = rows()
        return x[row], y[row]


def trained(out: Path, **options: Any) -> bnn.Bank:
    shared: dict[str, Any] = {"num_epochs": 4, "batch_size": BATCH, "lr": 0.02, "seed": 3, "progress": False}
    data = options.pop("data", None) or rows()
    return training.train(module(), head(), data, out=out, **shared | options)


def distilled(out: Path, **options: Any) -> bnn.Bank:
    net = bnn.FunctionalModel(module(), head("*"))
    shared: dict[str, Any] = {"num_epochs": 3, "batch_size": BATCH, "lr": 0.02, "seed": 3, "progress": False}
    return training.distil(module(60), net, rows(), out=out, **shared | options)


def balanced() -> ClassBalancedSampler:
    return ClassBalancedSampler(rows()[1], seed=5)


def held_out() -> tuple[Tensor, Tensor]:
    return random(6, D, seed=41), torch.arange(6) % C


RUNS: dict[str, Callable[[Path], bnn.Bank]] = {
    "train": lambda out: trained(out, held_out=held_out(), patience=2),
    "data set": lambda out: trained(out, data=Pairs(), num_indices=2, num_workers=0),
    "clipped": lambda out: trained(
        out, clip_norm=0.1, optimizer=lambda values: torch.optim.SGD(values, 0.1, momentum=0.9)
    ),
    "balanced": lambda out: trained(out, sampler=balanced(), importance_weights=True),
    "distil": lambda out: distilled(out, held_out=held_out()),
    "mixed": lambda out: distilled(out, noise=0.1, mixup=0.4, num_indices=3),
    "predictive": lambda out: distilled(out, targets="predictive"),
}


def runs(out: str) -> None:
    """Every run, and one whose ranks meet samples of their own; what each rank has at its end."""
    warnings.simplefilter("ignore")
    with distributed.joined() as together:
        found = {name: make(Path(out) / name) for name, make in RUNS.items()}
        found["own"] = trained(Path(out) / "own", shared_indices=False)
        values = {name: {key: tensor.tolist() for key, tensor in bank[0].items()} for name, bank in found.items()}
        (Path(out) / f"{together.rank}.json").write_text(json.dumps(values))


def killed(out: str, at: str) -> None:
    """A run of which every step is kept, whose rank 1 is killed before the given step of the first attempt."""
    loop.STEPS_PER_STATE = 1
    from bnn.bank import writer

    writer.STATE_SECONDS = 0.0
    step, calls = loop._step, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if not distributed.restarts() and os.environ["RANK"] == "1" and calls == int(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)

    loop._step = counted
    with distributed.joined():
        trained(Path(out), held_out=held_out())
    sys.stdout.write(f"{calls}\n")


def refusals(out: str) -> None:
    """What is said where ranks differ: one line a case, on every rank."""
    said: list[str] = []
    with distributed.joined() as together:
        odd = together.rank == 1
        x, y = rows()
        cases: list[dict[str, Any]] = [
            {"data": (x + 1e-9 * odd, y)},
            {"lr": 0.02 + 0.01 * odd},
            {"num_epochs": 4 + odd},
            {"sampler": ClassBalancedSampler(y, seed=5, rank=together.rank, world_size=2)},
        ]
        for options in cases:
            try:
                trained(Path(out) / "refused", **options)
                said.append("nothing")
            except BnnError as error:
                said.append(f"{type(error).__name__}: {error}")
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
