"""MCLMC of blackjax on a normal with known variances, for mclmc.py, in an environment of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

TOLD = json.loads(sys.argv[1])
FOLDER = Path(TOLD["folder"])
SCALES, START = jnp.asarray(np.load(FOLDER / "scales.npy")), jnp.asarray(np.load(FOLDER / "start.npy"))
# In units of the scales, as ours is after warm-up.
KERNEL = blackjax.mclmc(
    lambda z: -0.5 * jnp.square(z).sum(), L=TOLD["length"], step_size=TOLD["step_size"],
    integrator=blackjax.mcmc.integrators.isokinetic_mclachlan,
)  # fmt: skip


def chain(start: jax.Array, key: jax.Array) -> jax.Array:
    """Draws [D, P] of one chain."""
    first, rest = jax.random.split(key)

    def step(state: blackjax.types.ArrayTree, key: jax.Array) -> tuple[blackjax.types.ArrayTree, jax.Array]:
        state, _ = KERNEL.step(key, state)
        return state, state.position

    _, draws = jax.lax.scan(step, KERNEL.init(start, first), jax.random.split(rest, TOLD["num_steps"]))
    return draws


KEYS = jax.random.split(jax.random.key(0), len(START))
np.save(FOLDER / "draws.npy", np.asarray(jax.jit(jax.vmap(chain))(START / SCALES, KEYS)) * np.asarray(SCALES))
