"""NumPyro's Predictive over the samples of an MLP, for apply.py, in an environment of its own."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from answering import serve
from numpyro.infer import Predictive

FOUND = np.load(sys.argv[1])
X, WIDTHS = jnp.asarray(FOUND["x"]), FOUND["widths"].tolist()
SAMPLES = {name.removeprefix("param/"): jnp.asarray(FOUND[name]) for name in FOUND.files if name.startswith("param/")}
SENT: set[str] = set()


def model(x: jax.Array) -> None:
    places = range(0, 2 * (len(WIDTHS) - 1), 2)
    for place, before, after in zip(places, WIDTHS[:-1], WIDTHS[1:], strict=True):
        weight = numpyro.sample(f"{place}.weight", dist.Normal(0.0, 1.0).expand([after, before]).to_event(2))
        bias = numpyro.sample(f"{place}.bias", dist.Normal(0.0, 1.0).expand([after]).to_event(1))
        x = x @ weight.T + bias
        x = jnp.tanh(x) if place != places[-1] else x
    numpyro.deterministic("outputs", x)


@functools.cache
def made(size: int, jitted: bool) -> Callable[[], jax.Array]:
    """Vectorised over samples; as people call it, or under jax.jit, which they can add."""
    samples = {name: values[:size] for name, values in SAMPLES.items()}

    def run(samples: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        found = Predictive(model, posterior_samples=samples, return_sites=["outputs"], parallel=True)
        return found(jax.random.key(0), x)["outputs"]

    function = jax.jit(run) if jitted else run
    return lambda: jax.block_until_ready(function(samples, X))


def predict(size: int, jitted: bool, out: str) -> dict[str, Any]:
    run = made(size, jitted)
    outputs = run()  # compiles
    calls, spent = 0, 0.0
    while spent < 0.01:
        start = time.perf_counter()
        outputs = run()
        spent += time.perf_counter() - start
        calls += 1
    seconds = spent / calls
    np.save(out, np.asarray(outputs[:2]))
    return {"seconds": seconds}


if __name__ == "__main__":
    serve({"predict": predict}, {"numpyro": numpyro.__version__, "jax": jax.__version__})
