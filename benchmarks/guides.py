"""A step of each guide, against a step of mean-field written by hand, Pyro with a site a parameter, and `posteriors`.

`posteriors` brings packages of its own, so it runs in an environment of its own:

    python3 -m venv peers && peers/bin/pip install torch==2.13.0 && peers/bin/pip install posteriors==0.1.3 numpy
    python benchmarks/guides.py --posteriors peers/bin/python --json benchmarks/results/guides.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroSample
from torch import Tensor, nn
from torch.nn import functional

from bnn.cli.bench import machine
from bnn.inference.guide import STEPS_PER_STATE, Guide
from bnn.likelihoods import Categorical
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.priors import Normal
from bnn.seeding import generator

ROWS, BATCH, STEPS, REPEATS, DRAWS = 1024, 128, STEPS_PER_STATE, 7, 1000
HAND = "by hand, mean-field"
SITES = "Pyro AutoNormal, a site a parameter"

MODULES = {"mlp-9k": ("mlp:64,64", [64]), "mlp-100k": ("mlp:280,280", [64]), "cnn": ("cnn", [1, 8, 8])}

GUIDES: dict[str, Guide] = {
    "mean-field": Guide("mean-field", num_steps=10**9, batch_size=BATCH),
    "mean-field, antithetic": Guide("mean-field", num_steps=10**9, batch_size=BATCH, variance_reduction="antithetic"),
    "mean-field, local": Guide("mean-field", num_steps=10**9, batch_size=BATCH, variance_reduction="local"),
    "mean-field, flipout": Guide("mean-field", num_steps=10**9, batch_size=BATCH, variance_reduction="flipout"),
    "low-rank": Guide("low-rank", num_steps=10**9, batch_size=BATCH),
    "full-rank": Guide("full-rank", num_steps=10**9, batch_size=BATCH),
    "flow": Guide("flow", num_steps=10**9, batch_size=BATCH),
    "map": Guide("map", num_steps=10**9, batch_size=BATCH),
    "AutoNormal, one flat site": Guide("AutoNormal", num_steps=10**9, batch_size=BATCH),
}


def module_of(name: str) -> nn.Module:
    spec, shape = MODULES[name]
    return build(spec, input_shape=shape, num_outputs=10, seed=0)


def our_step(name: str, guide: Guide, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """STEPS steps of a fit, its minibatches and states included."""
    model = BayesianModel(module_of(name), prior=Normal(), likelihood=Categorical(), num_data=ROWS)
    run = guide.run(model, (x, y), num_samples=1, seed=0)
    return lambda: next(run)


def hand_step(name: str, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """What one writes for a module with normal weights: a loop over its tensors, closed-form KL, Adam."""
    means = {key: value.detach().clone().requires_grad_() for key, value in module_of(name).named_parameters()}
    raw = {key: torch.full_like(value, -3.0).requires_grad_() for key, value in means.items()}
    optimizer = torch.optim.Adam([*means.values(), *raw.values()], lr=0.01)
    source = generator(0, "hand")

    def forward(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        if name == "cnn":
            x = functional.max_pool2d(functional.conv2d(x, theta["0.weight"], theta["0.bias"], padding=1).relu(), 2)
            x = functional.conv2d(x, theta["3.weight"], theta["3.bias"], padding=1).relu()
            return functional.linear(
                functional.adaptive_avg_pool2d(x, 2).flatten(1), theta["7.weight"], theta["7.bias"]
            )
        x = functional.linear(x, theta["1.weight"], theta["1.bias"]).tanh()
        x = functional.linear(x, theta["3.weight"], theta["3.bias"]).tanh()
        return functional.linear(x, theta["5.weight"], theta["5.bias"])

    def step() -> None:
        chosen = torch.randint(ROWS, (BATCH,), generator=source)
        optimizer.zero_grad()
        theta, divergence = {}, torch.zeros(())
        for key, mean in means.items():
            scale = functional.softplus(raw[key])
            theta[key] = mean + scale * torch.randn_like(mean)
            divergence = divergence + (0.5 * (scale.square() + mean.square()) - scale.log()).sum()
        loss = ROWS / BATCH * functional.cross_entropy(forward(theta, x[chosen]), y[chosen], reduction="sum")
        (loss + divergence).backward()
        optimizer.step()

    return lambda: [step() for _ in range(STEPS)]


def pyro_step(name: str, kind: type, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Pyro's own SVI, with a PyroSample a parameter."""
    module = module_of(name)
    pyro.nn.module.to_pyro_module_(module)
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            prior = dist.Normal(torch.zeros(()), torch.ones(())).expand(parameter.shape).to_event(parameter.dim())
            setattr(part, key, PyroSample(prior))

    def model(x: Tensor, y: Tensor) -> None:
        logits = module(x)
        with pyro.plate("rows", ROWS, subsample_size=len(y)):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    guide = kind(model, rank=10) if kind is AutoLowRankMultivariateNormal else kind(model)
    store: dict[str, Any] = {}

    def steps() -> None:
        nonlocal store
        with pyro.get_param_store().scope(store or None) as store:
            for _ in range(STEPS):
                chosen = torch.randint(ROWS, (BATCH,))
                svi.step(x[chosen], y[chosen])

    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    return steps


def steps_of(name: str) -> dict[str, float]:
    """Median seconds of a step in every way; the ways take turns, so that a slow minute meets all of them."""
    source = generator(0, "rows")
    x, y = torch.randn(ROWS, *MODULES[name][1], generator=source), torch.randint(10, (ROWS,), generator=source)
    ways = {HAND: hand_step(name, x, y)}
    for key, guide in GUIDES.items():
        if key == "full-rank" and name == "mlp-100k":
            continue  # 6 * 100,000^2 numbers: refused above the default memory
        ways[f"bnn {key}"] = our_step(name, guide, x, y)
    ways[SITES] = pyro_step(name, AutoNormal, x, y)
    ways["Pyro AutoLowRankMultivariateNormal, a site a parameter"] = pyro_step(
        name, AutoLowRankMultivariateNormal, x, y
    )
    found: dict[str, list[float]] = {key: [] for key in ways}
    for repeat in range(REPEATS + 1):
        for key, run in ways.items():
            if key == "bnn full-rank" and repeat > 2:
                continue  # some are enough of half a minute each
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                found[key].append((time.perf_counter() - start) / STEPS)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


def draws_of(name: str) -> tuple[float, float]:
    """Median seconds of DRAWS samples of a mean-field guide, and of as many standard normals."""
    model = BayesianModel(module_of(name), prior=Normal(), likelihood=Categorical(), num_data=ROWS)
    source = generator(0, "rows")
    data = torch.randn(ROWS, *MODULES[name][1], generator=source), torch.randint(10, (ROWS,), generator=source)
    *_, (_, fitted) = Guide(num_steps=1).run(model, data, num_samples=1, seed=0)
    fitted["step"] = 1  # no sample drawn yet
    ours, bare = [], []
    for repeat in range(REPEATS + 1):
        run = Guide(num_steps=1).run(model, data, num_samples=DRAWS, seed=0, state=dict(fitted))
        start = time.perf_counter()
        count = sum(block.num_samples for block, _ in run)
        middle = time.perf_counter()
        torch.randn(DRAWS, model.layout.num_values)
        if repeat:
            ours.append(middle - start)
            bare.append(time.perf_counter() - middle)
        assert count == DRAWS
    return statistics.median(ours), statistics.median(bare)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--posteriors", help="python of an environment with posteriors")
    options = parser.parse_args()
    peers: dict[str, float] = {}
    if options.posteriors:
        script = Path(__file__).parent / "peers" / "posteriors_step.py"
        words = [options.posteriors, str(script), *map(str, (ROWS, BATCH, STEPS, REPEATS))]
        peers = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    rows = []
    for name in MODULES:
        found = steps_of(name) | ({"posteriors vi.diag": peers[name]} if name in peers else {})
        print(f"{name}: microseconds a step, batch {BATCH}")
        for way, seconds in found.items():
            over_hand, under_sites = seconds / found[HAND], found[SITES] / seconds
            print(
                f"  {seconds * 1e6:9.0f}  {over_hand:6.2f} x by hand, {under_sites:6.2f} times as fast as sites: {way}"
            )
            rows.append(
                {"module": name, "way": way, "seconds": seconds, "over_hand": over_hand, "sites_over": under_sites}
            )
    draws = []
    for name in MODULES:
        ours, bare = draws_of(name)
        print(f"{name}: {DRAWS} samples in {ours:.3f} s, {ours / bare:.2f} x torch.randn ({bare:.3f} s)")
        draws.append({"module": name, "seconds": ours, "randn_seconds": bare, "over_randn": ours / bare})
    if options.json:
        found_all = {"batch_size": BATCH, "rows_of_data": ROWS, "steps": rows, "draws": draws, "machine": machine()}
        options.json.write_text(json.dumps(found_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
