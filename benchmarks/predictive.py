"""The predictive of S samples on B rows: streamed over a bank against Pyro's Predictive and a plain loop."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from common import Pair, report, seconds
from pyro.infer import Predictive
from pyro.nn import PyroSample

import bnn
from bnn.modules import build
from bnn.seeding import generator

SAMPLES, ROWS = 100, 1000


def main() -> None:
    source = generator(0, "predictive")
    x = torch.randn(ROWS, 64, generator=source)
    module = build("mlp:128,128", input_shape=[64], num_outputs=10, seed=0)
    model = bnn.BayesianModel(module, prior=bnn.priors.FanIn(), likelihood=bnn.likelihoods.Categorical(), num_data=1)
    bank = bnn.fit(model, (x[:1], torch.zeros(1, dtype=torch.int64)), method=bnn.inference.Prior(), num_samples=SAMPLES)
    samples = bank.block(slice(None)).params
    found = {}

    @torch.no_grad()
    def plain_loop() -> None:
        total = torch.zeros(ROWS, 10)
        for index in range(SAMPLES):
            total += torch.func.functional_call(module, bank[index], (x,)).softmax(dim=1)
        found["loop"] = total / SAMPLES

    nets = {name: bnn.FunctionalModel(module, bank, strategy=name) for name in ("auto", "loop", "vmap")}  # type: ignore[arg-type]

    def streamed(strategy: str) -> None:
        found[f"bnn, {strategy}"] = bnn.predict(nets[strategy], x).probs.float()  # type: ignore[union-attr]

    # Last, because it changes the module.
    ours = {f"bnn.predict, {strategy}": seconds(lambda s=strategy: streamed(s)) * 1e3 for strategy in nets}
    rivals = {"a loop of functional_call and softmax": seconds(plain_loop) * 1e3}
    pyro.nn.module.to_pyro_module_(module)
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, PyroSample(dist.Normal(0.0, 1.0).expand(parameter.shape).to_event(parameter.dim())))

    def pyro_model(x: torch.Tensor) -> None:
        pyro.deterministic("logits", module(x))

    predictive = Predictive(pyro_model, posterior_samples=dict(samples), return_sites=["logits"])

    @torch.no_grad()
    def with_pyro() -> None:
        found["pyro"] = predictive(x)["logits"].softmax(dim=-1).mean(dim=0)

    rivals["Pyro Predictive"] = seconds(with_pyro) * 1e3
    for name, probs in found.items():
        torch.testing.assert_close(probs, found["loop"], rtol=1e-3, atol=1e-4, msg=name)
    pairs = [Pair(mine, rival, cost, other) for mine, cost in ours.items() for rival, other in rivals.items()]
    report(f"milliseconds for {SAMPLES} samples x {ROWS} rows, MLP 64-128-128-10", pairs, "ms")


if __name__ == "__main__":
    main()
