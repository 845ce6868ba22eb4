"""HMC and NUTS of NumPyro, for hmc.py, in an environment of its own."""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from answering import read_problem, serve
from hmc_target import Compiling, answers_of, log_density_of, outputs
from numpyro.infer import HMC, MCMC, NUTS

PROBLEM, COMPILING = read_problem(sys.argv[1]), Compiling()
LOG_DENSITY = log_density_of(PROBLEM)


def potential(flat: jax.Array) -> jax.Array:
    return -LOG_DENSITY(flat)


def starts(chains: int) -> jax.Array:
    """[P] of one chain, [C, P] of more: what NumPyro asks for."""
    return jnp.asarray(PROBLEM.starts[0] if chains == 1 else PROBLEM.starts[:chains])


def timed(run: MCMC, seed: int, **options: Any) -> tuple[float, float]:
    """Seconds of a run without compilation, and seconds of compilation."""
    compiled, start = COMPILING.seconds, time.perf_counter()
    run.run(jax.random.key(seed), **options)
    jax.block_until_ready((run.last_state, run.get_samples(group_by_chain=True)))
    total, compiled = time.perf_counter() - start, COMPILING.seconds - compiled
    return total - compiled, compiled


@functools.cache
def sampler(chains: int, draws: int, steps: int, step_size: float) -> tuple[MCMC, float]:
    """A compiled run of HMC, and the seconds that it took to compile."""
    kernel = HMC(
        potential_fn=potential, step_size=step_size, num_steps=steps, trajectory_length=None,
        adapt_step_size=False, adapt_mass_matrix=False,
    )  # fmt: skip
    run = MCMC(
        kernel, num_warmup=0, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
    )
    _, compiled = timed(run, 0, init_params=starts(chains), extra_fields=("accept_prob",))
    return run, compiled


def leapfrogs(chains: int, draws: int, steps: int, step_size: float) -> dict[str, Any]:
    """Seconds of `draws` more draws a chain, from where the last run stopped."""
    run, compiled = sampler(chains, draws, steps, step_size)
    run.post_warmup_state = run.last_state
    seconds, _ = timed(run, 1, extra_fields=("accept_prob",))
    return {
        "seconds": seconds,
        "compile_seconds": compiled,
        "acceptance": float(run.get_extra_fields()["accept_prob"].mean()),
    }


def nuts(chains: int, num_warmup: int, num_draws: int, seed: int, file: str) -> dict[str, Any]:
    """A run of NUTS with its defaults; the predictions at the probes [C, D, probes] go to a file."""
    run = MCMC(
        NUTS(potential_fn=potential), num_warmup=num_warmup, num_samples=num_draws, num_chains=chains,
        chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    compiled, start = COMPILING.seconds, time.perf_counter()
    run.warmup(jax.random.key(seed), init_params=starts(chains))
    jax.block_until_ready(run.post_warmup_state)
    warm_compiled = COMPILING.seconds - compiled
    warmup_seconds = time.perf_counter() - start - warm_compiled
    state = run.post_warmup_state
    sampling_seconds, compiled = timed(run, seed + 1, extra_fields=("num_steps", "accept_prob"))
    predict = jax.jit(jax.vmap(lambda flat: outputs(PROBLEM, flat, jnp.asarray(PROBLEM.probes))[:, 0]))
    np.save(file, np.stack([predict(chain) for chain in run.get_samples(group_by_chain=True)]))
    fields = run.get_extra_fields(group_by_chain=True)
    return {
        "compile_seconds": warm_compiled + compiled,
        "warmup_seconds": warmup_seconds,
        "sampling_seconds": sampling_seconds,
        "step_size": float(state.adapt_state.step_size.mean()),
        "acceptance": float(fields["accept_prob"].mean()),
        "steps_a_draw": float(fields["num_steps"].mean()),
        "deepest_steps_a_draw": float(fields["num_steps"].max(axis=0).mean()),  # what all chains together wait for
    }


if __name__ == "__main__":
    VERSIONS = {"numpyro": numpyro.__version__, "jax": jax.__version__}
    serve({**answers_of(PROBLEM), "leapfrogs": leapfrogs, "nuts": nuts}, VERSIONS)
