"""Ranks as processes of this machine, and the fits that they are asked for."""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import socket
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import bnn
from bnn.inference import HMC, NUTS, SGHMC, Ensemble, Guide, Prior
from bnn.types import Method

N, D, HIDDEN, OUT = 37, 3, 4, 2
WORK = Path(__file__).parent / "distributed" / "work.py"
TALK = WORK.with_name("talk.py")  # which imports no more than it needs

CHAINS: dict[str, tuple[Method, int]] = {
    "hmc": (HMC(num_chains=5, num_warmup=45, num_steps=3, init="prior", compile=False), 20),
    "chees": (HMC(num_chains=5, num_warmup=45, num_steps=4, init="prior", compile=False, trajectory="chees"), 20),
    "nuts": (NUTS(num_chains=3, num_warmup=8, init="prior", max_tree_depth=2), 9),
    "sghmc": (SGHMC(num_chains=4, num_warmup=10, climb_steps=20, cycle_steps=None, thin=5, batch_size=10), 16),
    "low-rank mass": (
        HMC(num_chains=5, num_warmup=45, num_steps=3, init="prior", compile=False, mass="low-rank", rank=3),
        20,
    ),
}
ROWS: dict[str, tuple[Method, int]] = {
    "prior": (Prior(block_size=3), 11),
    "ensemble": (Ensemble(num_steps=40, batch_size=10, group_size=2), 7),
}
GUIDES: dict[str, tuple[Method, int]] = {
    "mean-field": (Guide(num_steps=60, batch_size=10), 11),
    "antithetic": (Guide("full-rank", num_steps=30, batch_size=12, variance_reduction="antithetic"), 11),
    "flow": (Guide("flow", num_steps=30, batch_size=10, hidden=5), 11),
    # 37 rows in batches of 12: the last has a single one, and one rank none.
    "map": (Guide("map", num_steps=60, batch_size=12), 1),
}


def rows() -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64, generator=source)
    return x, (x @ torch.randn(D, OUT, dtype=torch.float64, generator=source)).argmax(dim=1)


def model() -> bnn.BayesianModel:
    module = nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).double()
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=source, dtype=torch.float64))
    return bnn.BayesianModel(module, prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Categorical(), num_data=N)


class Bottomless(bnn.priors.LogNormal):
    """A prior without a bound: infinite above 2."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > 2.0, torch.inf, super().log_prob(value))


WARM = HMC(num_chains=5, num_warmup=400, num_steps=3, step_size=0.3, mass="unit", init="prior", compile=False)


def bottomless() -> tuple[bnn.BayesianModel, tuple[Tensor, Tensor]]:
    """A model whose density is infinite where its noise is large, which chains of `WARM` come to."""
    likelihood = bnn.likelihoods.Gaussian(Bottomless(0.0, 0.5))
    module = nn.Linear(1, 1).double()
    data = torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    return bnn.BayesianModel(module, prior=bnn.priors.Normal(), likelihood=likelihood, num_data=1), data


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(
    world_size: int,
    *arguments: str | Path,
    timeout: float = 120,
    awaited: int | None = None,
    script: Path = WORK,
    **environment: str,
) -> list[Any]:
    """Run a script once a rank; the processes as they ended, with what they said as `out` and `err`.

    The others are killed once the rank `awaited` has ended. Ranks are forked from one process that has imported torch
    and the package, which is most of what a start costs.
    """
    started = forking()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    order = list(range(world_size)) if awaited is None else [awaited, *(r for r in range(world_size) if r != awaited)]
    with TemporaryDirectory() as folder:
        said = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world_size)]
        processes = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            values = {**meeting, **own, **environment}
            words = [str(script), *map(str, arguments)]
            processes.append(started.Process(target=run_script, args=(words, values, *map(str, said[rank]))))
            processes[-1].start()
        try:
            for rank in order:
                processes[rank].join(timeout)
                if processes[rank].exitcode is None:
                    told = "".join(err.read_text() for _, err in said if err.exists())
                    raise TimeoutError(
                        f"rank {rank} of {script.name} runs for more than {timeout} s; they said {told!r}"
                    )
                if awaited is not None:
                    for process in processes:
                        process.kill()
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            SimpleNamespace(returncode=process.exitcode, out=out.read_text(), err=err.read_text())
            for process, (out, err) in zip(processes, said, strict=True)
        ]


@functools.cache
def forking() -> ForkServerContext:
    """Where processes are forked from one that has imported what ranks import, and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ranked", "bnn.cli", "bnn.evaluation", "bnn.training", "torch._dynamo", "torch.fx.experimental.proxy_tensor"]
    )
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # where torch tells how sockets close on a busy machine
    with mock.patch.dict(os.environ, {**paths(), **quiet, "OMP_NUM_THREADS": "1"}):  # read when torch is imported
        forkserver.ensure_running()
    return context


def run_script(words: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """In a process of its own: what `python SCRIPT WORDS` does there, with what it says in two files."""
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(environment)
    sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
    runpy.run_path(words[0], run_name="__main__")


def paths() -> dict[str, str]:
    """Where the processes find the package and these tests."""
    here = Path(__file__).parent
    return {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}


def sorted_rows(bank: bnn.Bank) -> tuple[Tensor, dict[str, Tensor]]:
    """Chain and draw [2, S] and every other number of a bank, in the order of chain and draw."""
    block = bank.block(slice(None))
    order = torch.from_numpy(_order(block.chain, block.draw))
    values = {**block.params, **block.columns, "log_joint": block.log_joint, "log_weight": block.log_weight}
    return torch.stack([block.chain, block.draw])[:, order], {name: value[order] for name, value in values.items()}


def _order(chain: Tensor, draw: Tensor) -> Any:
    import numpy as np

    return np.lexsort((draw.numpy(), chain.numpy()))
