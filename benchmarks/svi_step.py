"""One SVI step of a guide: one flat site for all weights, as bnn has it, against a Pyro site a parameter."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from common import Pair, report, seconds
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample

from bnn.inference.guide import STEPS_PER_STATE, Guide
from bnn.likelihoods import Categorical
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.priors import Normal
from bnn.seeding import generator

ROWS, BATCH = 1024, 128


def pyro_step(family: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """Microseconds of a step of Pyro's own SVI, with a PyroSample a parameter."""
    module = build("mlp:128,128", input_shape=[64], num_outputs=10, seed=0)
    pyro.clear_param_store()
    pyro.nn.module.to_pyro_module_(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(()), torch.ones(())).expand(parameter.shape).to_event(parameter.dim())
            setattr(part, name, PyroSample(prior))

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        logits = module(x)
        with pyro.plate("rows", ROWS, subsample_size=len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    assert isinstance(module, PyroModule)
    guide = AutoNormal(model) if family == "mean-field" else AutoLowRankMultivariateNormal(model, rank=10)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return seconds(lambda: [svi.step(x, y) for _ in range(STEPS_PER_STATE)]) / STEPS_PER_STATE * 1e6


def our_step(family: str, x: torch.Tensor, y: torch.Tensor) -> float:
    """Microseconds of a step of our guide: a whole fit, its minibatches and states included."""
    module = build("mlp:128,128", input_shape=[64], num_outputs=10, seed=0)
    model = BayesianModel(module, prior=Normal(), likelihood=Categorical(), num_data=ROWS)
    guide = Guide(family, num_steps=10**9, batch_size=BATCH)  # type: ignore[arg-type]
    run = guide.run(model, (x, y), num_samples=1, seed=0)
    return seconds(lambda: next(run)) / STEPS_PER_STATE * 1e6


def main() -> None:
    source = generator(0, "svi")
    x, y = torch.randn(ROWS, 64, generator=source), torch.randint(10, (ROWS,), generator=source)
    pairs = [
        Pair(
            f"bnn {family}",
            f"Pyro {family}, a site a parameter",
            our_step(family, x, y),
            pyro_step(family, x[:BATCH], y[:BATCH]),
        )
        for family in ("mean-field", "low-rank")
    ]
    report("microseconds a step, MLP 64-128-128-10, batch 128", pairs, "us")


if __name__ == "__main__":
    main()
