"""The log density of a problem in JAX, for the peers of hmc.py that run on it, and seconds that JAX compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from answering import Problem, layers
from jax import Array

LOG_2PI = 1.8378770664093453


class Compiling:
    """Seconds that JAX has spent on tracing, lowering and compiling, by its own count."""

    def __init__(self) -> None:
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += seconds


def outputs(problem: Problem, flat: Array, x: Array) -> Array:
    *hidden, last = layers(problem, flat)
    for weight, bias in hidden:
        x = jnp.tanh(x @ weight.T + bias)
    return x @ last[0].T + last[1]  # [B, 1]


def log_density_of(problem: Problem) -> Callable[[Array], Array]:
    """log N(y | f(x; theta), noise^2) + log N(theta | 0, 1), with constants, of theta [P]."""
    x, y = jnp.asarray(problem.x), jnp.asarray(problem.y)

    def log_density(flat: Array) -> Array:
        residual = (y - outputs(problem, flat, x)) / problem.noise
        constants = y.size * (0.5 * LOG_2PI + jnp.log(problem.noise)) + 0.5 * flat.size * LOG_2PI
        return -0.5 * jnp.sum(residual**2) - 0.5 * jnp.sum(flat**2) - constants

    return log_density


def answers_of(problem: Problem) -> dict[str, Callable[..., dict[str, Any]]]:
    """The density and gradient at a point, and seconds of the gradient of all chains alone."""
    log_density = log_density_of(problem)
    gradient = jax.jit(jax.vmap(jax.value_and_grad(log_density)))

    def density(point: int) -> dict[str, Any]:
        value, slope = jax.value_and_grad(log_density)(jnp.asarray(problem.points[point]))
        return {"log_density": float(value), "gradient": slope.tolist()}

    def gradients(chains: int, calls: int) -> dict[str, Any]:
        at = jnp.asarray(problem.starts[:chains])
        jax.block_until_ready(gradient(at))
        start = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(gradient(at))
        return {"seconds": (time.perf_counter() - start) / calls}

    return {"density": density, "gradients": gradients}
