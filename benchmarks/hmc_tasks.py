"""The targets of hmc.py, where chains start on them, their rivals as processes, and the products of their gradients."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bnn.inference.products import products as by_onednn
from bnn.likelihoods import Gaussian
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.priors import Normal
from bnn.seeding import generator
from bnn.types import Batch

PEERS = Path(__file__).parent / "peers"
NOISE, PROBES = 0.1, 20
CLIMB_STEPS, CLIMB_RATE = 300, 0.05  # of Adam, from a draw of the prior to where chains start in the part on worth


class Size(NamedTuple):
    """An MLP inputs-width-width-1 and its data; what a gradient of a chain takes, about, to choose the draws by."""

    inputs: int
    width: int
    rows: int
    seconds: float


SIZES = {"2.7k": Size(1, 50, 200, 6e-5), "9k": Size(7, 90, 500, 3e-4), "100k": Size(32, 300, 500, 3e-3)}
Ask: TypeAlias = Callable[..., dict[str, Any]]


class Task(NamedTuple):
    """One size with its data: all that is measured of it."""

    name: str
    size: Size
    model: BayesianModel
    batch: Batch
    probes: Tensor  # [20, inputs]
    device: torch.device


def task_of(name: str, device: torch.device) -> Task:
    size = SIZES[name]
    source = generator(0, "hmc")
    x = torch.rand(size.rows, size.inputs, generator=source) * 2 - 1  # [B, inputs]
    y = torch.sin(4 * x.mean(dim=1, keepdim=True) * math.sqrt(size.inputs))  # [B, 1]
    y = y + NOISE * torch.randn(size.rows, 1, generator=source)
    probes = torch.rand(PROBES, size.inputs, generator=source) * 2.4 - 1.2  # [20, inputs], some beyond the data
    model = BayesianModel(_module(size, 0).to(device), prior=Normal(), likelihood=Gaussian(NOISE), num_data=size.rows)
    return Task(name, size, model, Batch(x.to(device), y.to(device)), probes.to(device), device)


def _module(size: Size, seed: int) -> torch.nn.Module:
    return build(f"mlp:{size.width},{size.width}", input_shape=[size.inputs], num_outputs=1, seed=seed)


def starts_of(task: Task, chains: int) -> Tensor:
    """[C, P]: the values that fresh modules have, at which outputs are small."""
    flat = [
        torch.cat([p.detach().flatten() for p in _module(task.size, chain).parameters()]) for chain in range(chains)
    ]
    return torch.stack(flat).to(task.device)


def points_of(task: Task) -> Tensor:
    """[2, P]: a start, and a draw of the prior whose outputs are 0: below them the gradient is the prior's alone."""
    drawn = task.model.unconstrain(task.model.sample_prior(0, "point"))
    drawn[-(task.size.width + 1) :] = 0.0
    return torch.stack([starts_of(task, 1)[0], drawn.to(task.device)])


def climbed(task: Task, chains: int) -> Tensor:
    """[C, P]: Adam from draws of the prior on the log density, so that no chain begins far from every mode."""
    draws = [task.model.unconstrain(task.model.sample_prior(0, "start", chain)) for chain in range(chains)]
    flat = torch.stack(draws).to(task.device).requires_grad_()
    density = torch.func.vmap(lambda one: task.model.log_density(one, task.batch)[0])
    optimizer = torch.optim.Adam([flat], lr=CLIMB_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, CLIMB_STEPS)
    for _ in range(CLIMB_STEPS):
        optimizer.zero_grad()
        (-density(flat).sum()).backward()
        optimizer.step()
        schedule.step()
    return flat.detach()


@contextmanager
def peer(python: str, script: str, task: Task, starts: Tensor, threads: int) -> Iterator[tuple[Ask, dict[str, str]]]:
    """A process that holds a rival on this task, as a function that asks it; and the versions it names."""
    widths = [task.size.inputs, task.size.width, task.size.width, 1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "problem.npz")
        arrays = {
            "x": task.batch.x,
            "y": task.batch.y,
            "probes": task.probes,
            "starts": starts,
            "points": points_of(task),
        }
        np.savez(path, **{key: value.cpu().numpy() for key, value in arrays.items()}, widths=widths, noise=NOISE)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        words = [python, str(PEERS / script), path]
        with subprocess.Popen(words, stdin=-1, stdout=-1, text=True, env=environment) as process:
            assert process.stdin
            assert process.stdout

            def answer() -> dict[str, Any]:
                line = process.stdout.readline()  # type: ignore[union-attr]
                if not line:
                    raise SystemExit(f"{script} ended without an answer; see what it printed above")
                return json.loads(line)

            def ask(question: str, **options: Any) -> dict[str, Any]:
                process.stdin.write(json.dumps({"ask": question, **options}) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                return answer()

            try:
                yield ask, answer()
            finally:
                with suppress(BrokenPipeError):
                    process.stdin.close()  # at which it ends


def products(task: Task, starts: Tensor, *, onednn: bool = False) -> Callable[[], None]:
    """The matrix products of one gradient and no more, into memory that is there: what no implementation can leave out.

    With `onednn` the three large ones, of width x width, are oneDNN's as our gradient may take them; else torch's own.

    Forward h_1 = x W_1^T, h_2 = h_1 W_2^T, f = h_2 W_3^T; backward dW_3 = df^T h_2, dh_2 = df W_3, dW_2 = dh_2^T h_1,
    dh_1 = dh_2 W_2, dW_1 = dh_1^T x.
    """
    chains, inputs, width = len(starts), task.size.inputs, task.size.width
    x = task.batch.x.expand(chains, -1, -1)  # [C, B, inputs]
    first = starts[:, : inputs * width].reshape(chains, width, inputs)
    second = starts[:, -(width * (width + 2) + 1) : -(2 * width + 1)].reshape(chains, width, width)
    third = starts[:, -(width + 1) : -1].reshape(chains, 1, width)
    hidden, above, slope = (x.new_empty(chains, task.size.rows, width) for _ in range(3))
    output = x.new_empty(chains, task.size.rows, 1)
    slopes = [torch.empty_like(weight) for weight in (first, second, third)]

    def large(left: Tensor, right: Tensor, out: Tensor) -> None:
        if onednn:
            by_onednn(left, right)
        else:
            torch.bmm(left, right, out=out)

    def run() -> None:
        torch.bmm(x, first.mT, out=hidden)
        large(hidden, second.mT, above)
        torch.bmm(above, third.mT, out=output)
        torch.bmm(output.mT, above, out=slopes[2])
        torch.bmm(output, third, out=slope)
        large(slope.mT, hidden, slopes[1])
        large(slope, second, hidden)
        torch.bmm(hidden.mT, x, out=slopes[0])

    return run
