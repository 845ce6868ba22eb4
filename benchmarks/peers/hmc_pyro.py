"""HMC of Pyro, for hmc.py: on a module with a site a parameter, and on a potential function of one vector."""

from __future__ import annotations

import functools
import math
import sys
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from answering import layers, read_problem, serve
from pyro.infer import HMC, MCMC
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroSample
from torch import Tensor, nn

PROBLEM = read_problem(sys.argv[1])
X, Y, START = torch.tensor(PROBLEM.x), torch.tensor(PROBLEM.y), torch.tensor(PROBLEM.starts[0])
ALL_THREADS = torch.get_num_threads()


def potential(values: dict[str, Tensor]) -> Tensor:
    """-log density of {"flat": theta [P]}, with constants."""
    flat, hidden = values["flat"], X
    *inner, (last, shift) = layers(PROBLEM, flat)
    for weight, bias in inner:
        hidden = nn.functional.linear(hidden, weight, bias).tanh()
    residual = (Y - nn.functional.linear(hidden, last, shift)) / PROBLEM.noise
    log_2pi = math.log(2 * math.pi)
    constants = len(Y) * (0.5 * log_2pi + math.log(PROBLEM.noise)) + 0.5 * len(flat) * log_2pi
    return 0.5 * residual.square().sum() + 0.5 * flat.square().sum() + constants


@functools.cache
def module() -> nn.Module:
    """The MLP with a standard normal site a parameter, as Pyro's users write it."""
    parts: list[nn.Module] = []
    for inputs, outputs in zip(PROBLEM.widths[:-1], PROBLEM.widths[1:], strict=True):
        parts += [nn.Linear(inputs, outputs), nn.Tanh()]
    found = nn.Sequential(*parts[:-1])
    pyro.nn.module.to_pyro_module_(found)
    for part in found.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(()), torch.ones(())).expand(parameter.shape).to_event(parameter.dim())
            setattr(part, name, PyroSample(prior))
    return found


def model(x: Tensor, y: Tensor) -> None:
    mean = module()(x)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, PROBLEM.noise).to_event(1), obs=y)


def sites(flat: Tensor) -> dict[str, Tensor]:
    """A position [P] by site."""
    return {
        f"{2 * layer}.{name}": value.clone()
        for layer, pair in enumerate(layers(PROBLEM, flat))
        for name, value in zip(("weight", "bias"), pair, strict=True)
    }


def run_of(way: str, draws: int, steps: int, step_size: float) -> tuple[float, float]:
    """Seconds and mean acceptance of one chain; way is `module` or `potential`."""
    target = {"model": model} if way == "module" else {"potential_fn": potential}
    kernel = HMC(**target, step_size=step_size, num_steps=steps, adapt_step_size=False, adapt_mass_matrix=False)
    seen: dict[str, Any] = {}
    run = MCMC(
        kernel, num_samples=draws, warmup_steps=0, initial_params=sites(START) if way == "module" else {"flat": START},
        disable_progbar=True, hook_fn=lambda kernel, *_: seen.update(kernel.diagnostics()),
    )  # fmt: skip
    start = time.perf_counter()
    run.run(*((X, Y) if way == "module" else ()))
    return time.perf_counter() - start, float(seen["acceptance rate"])


@functools.cache
def threads_of(way: str) -> int:
    """One thread of torch or all, whichever makes a short run faster: small products only wait for each other."""
    seconds = {}
    for threads in (1, ALL_THREADS):
        torch.set_num_threads(threads)
        seconds[threads] = min(run_of(way, 2, 16, 1e-4)[0] for _ in range(3))
    return min(seconds, key=lambda threads: seconds[threads])


def leapfrogs(way: str, draws: int, steps: int, step_size: float) -> dict[str, Any]:
    threads = threads_of(way)
    torch.set_num_threads(threads)
    seconds, acceptance = run_of(way, draws, steps, step_size)
    return {"seconds": seconds, "compile_seconds": 0.0, "acceptance": acceptance, "threads": threads}


def density(way: str, point: int) -> dict[str, Any]:
    """Log density and gradient at a point, as the sampler sees them."""
    flat = torch.tensor(PROBLEM.points[point])
    at = sites(flat) if way == "module" else {"flat": flat}
    energy = initialize_model(model, (X, Y), initial_params=at)[1] if way == "module" else potential
    at = {name: value.requires_grad_() for name, value in at.items()}
    value = -energy(at)
    slopes = torch.autograd.grad(value, list(at.values()))
    return {"log_density": value.item(), "gradient": torch.cat([slope.flatten() for slope in slopes]).tolist()}


if __name__ == "__main__":
    pyro.set_rng_seed(0)
    serve({"leapfrogs": leapfrogs, "density": density}, {"pyro": pyro.__version__, "torch": torch.__version__})
