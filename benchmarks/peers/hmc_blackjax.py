"""HMC of blackjax, chains on one vmap axis, for hmc.py, in an environment of its own."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import blackjax
import jax
import jax.numpy as jnp
from answering import read_problem, serve
from hmc_target import Compiling, answers_of, log_density_of

PROBLEM, COMPILING = read_problem(sys.argv[1]), Compiling()


@functools.cache
def sampler(chains: int, draws: int, steps: int, step_size: float) -> tuple[Callable, Any, float]:
    """A compiled run of `draws` draws of all chains, the state that it starts from, seconds of compilation."""
    flat = jnp.asarray(PROBLEM.starts[:chains])
    kernel = blackjax.hmc(log_density_of(PROBLEM), step_size, jnp.ones(flat.shape[1]), steps)
    state = jax.vmap(kernel.init)(flat)

    def draw(state: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        state, info = jax.vmap(kernel.step)(jax.random.split(key, chains), state)
        return state, (state.position, info.acceptance_rate)

    run = jax.jit(lambda state, key: jax.lax.scan(draw, state, jax.random.split(key, draws)))
    before = COMPILING.seconds
    jax.block_until_ready(run(state, jax.random.key(0)))
    return run, state, COMPILING.seconds - before


def leapfrogs(chains: int, draws: int, steps: int, step_size: float) -> dict[str, Any]:
    run, state, compiled = sampler(chains, draws, steps, step_size)
    start = time.perf_counter()
    _, (_, acceptance) = jax.block_until_ready(run(state, jax.random.key(1)))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "compile_seconds": compiled, "acceptance": float(acceptance.mean())}


if __name__ == "__main__":
    VERSIONS = {"blackjax": blackjax.__version__, "jax": jax.__version__}
    serve({**answers_of(PROBLEM), "leapfrogs": leapfrogs}, VERSIONS)
