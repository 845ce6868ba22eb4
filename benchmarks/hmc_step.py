"""One leapfrog step of HMC, a chain: chains on one vmap axis against Pyro's HMC on the same module."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from common import Pair, report, seconds
from pyro.infer import HMC as PyroHMC
from pyro.infer import MCMC
from pyro.nn import PyroSample

from bnn.inference import HMC
from bnn.likelihoods import Gaussian
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.priors import Normal
from bnn.seeding import generator

STEPS, DRAWS = 16, 20


def pyro_cost(x: torch.Tensor, y: torch.Tensor) -> float:
    """Microseconds a step of Pyro's HMC, one chain, adaptation off."""
    module = build("mlp:50,50", input_shape=[1], num_outputs=1, seed=0)
    pyro.nn.module.to_pyro_module_(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(()), torch.ones(())).expand(parameter.shape).to_event(parameter.dim())
            setattr(part, name, PyroSample(prior))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        mean = module(x)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.1).to_event(1), obs=y)

    def run() -> None:
        kernel = PyroHMC(model, step_size=1e-4, num_steps=STEPS, adapt_step_size=False, adapt_mass_matrix=False)
        MCMC(kernel, num_samples=DRAWS, warmup_steps=0, disable_progbar=True).run(x, y)

    return seconds(run, repeats=3) / (DRAWS * STEPS) * 1e6


def our_cost(x: torch.Tensor, y: torch.Tensor, chains: int) -> float:
    """Microseconds a step and chain of ours; lengths are drawn, so the mean number of steps divides."""
    module = build("mlp:50,50", input_shape=[1], num_outputs=1, seed=0)
    model = BayesianModel(module, prior=Normal(), likelihood=Gaussian(0.1), num_data=len(y))
    method = HMC(num_chains=chains, num_warmup=0, num_steps=STEPS, step_size=1e-4, init="prior")

    def run() -> None:
        assert (
            sum(b.num_samples for b, _ in method.run(model, (x, y), num_samples=DRAWS * chains, seed=0))
            == DRAWS * chains
        )

    mean_steps = (math.ceil(STEPS / 2) + STEPS) / 2
    return seconds(run, repeats=3) / (DRAWS * mean_steps * chains) * 1e6


def main() -> None:
    source = generator(0, "hmc")
    x = torch.rand(200, 1, generator=source) * 2 - 1
    y = torch.sin(4 * x) + 0.1 * torch.randn(200, 1, generator=source)
    rival = pyro_cost(x, y)
    pairs = [Pair(f"bnn, {chains} chains", "Pyro HMC, 1 chain", our_cost(x, y, chains), rival) for chains in (1, 8, 64)]
    report("microseconds a leapfrog step and chain, MLP 1-50-50-1 tanh, 200 rows", pairs, "us")


if __name__ == "__main__":
    main()
