"""Hamiltonian dynamics of many chains: the mass, the leapfrog integrator, and one transition with its acceptance."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.inference.density import Density

MAX_ENERGY_ERROR = 1000.0  # beyond it a trajectory counts as divergent, as in Stan


class Position(NamedTuple):
    """Where the chains stand: C positions with what the density says of them."""

    flat: Tensor  # [C, P] unconstrained
    log_density: Tensor  # [C] float64
    log_joint: Tensor  # [C] float64
    gradient: Tensor  # [C, P]


class Metric(NamedTuple):
    """The inverse mass, an estimate of the target's covariance: diagonal, or low rank plus diagonal.

    M^-1 = S A S,  A = I + U diag(v - 1) U^T,  S = diag(scale)
    """

    scale: Tensor  # [P] standard deviations
    directions: Tensor  # [P, R] U, orthonormal; R = 0 for a diagonal mass
    variances: Tensor  # [R] v > 0, along U once scaled


class Transition(NamedTuple):
    """What is known of one trajectory of each chain."""

    acceptance: Tensor  # [C] probabilities, float64
    divergent: Tensor  # [C] bool
    accepted: Tensor  # [C] bool
    energy: Tensor  # [C] float64, Hamiltonian of the state that the chain went on with
    proposal: Tensor  # [C, P] where the trajectory ended
    velocity: Tensor  # [C, P] there
    infinite: Tensor  # [C] bool, whether the log density there is +inf: no divergence, but a broken target


def diagonal(scale: Tensor) -> Metric:
    """The metric of these standard deviations [P] without correlations."""
    return Metric(scale, scale.new_zeros(len(scale), 0), scale.new_zeros(0))


def velocity_of(metric: Metric, momentum: Tensor) -> Tensor:
    """M^-1 p, [C, P]."""
    return metric.scale * _along(metric, metric.scale * momentum, metric.variances - 1.0)


def whiten(metric: Metric, values: Tensor) -> Tensor:
    """A^-1/2 S^-1 x, [C, P]: positions in which the target has about unit covariance; of standard normals, momenta p ~ N(0, M)."""
    scaled = values / metric.scale
    if not metric.directions.shape[1]:
        return scaled
    return _along(metric, scaled, metric.variances.rsqrt() - 1.0)


def momentum_of(metric: Metric, noise: Tensor) -> Tensor:
    """p = S^-1 A^-1/2 z ~ N(0, M) for standard normals z, [C, P]."""
    return _along(metric, noise, metric.variances.rsqrt() - 1.0) / metric.scale


def _along(metric: Metric, values: Tensor, change: Tensor) -> Tensor:
    """(I + U diag(change) U^T) x, [C, P]."""
    if not len(change):
        return values
    return values + ((values @ metric.directions) * change) @ metric.directions.T


def trajectory(
    density: Density, at: Position, momentum: Tensor, metric: Metric, step_size: Tensor, num_steps: int
) -> tuple[Position, Tensor]:
    """num_steps of the leapfrog integrator: the position reached and the momentum there.

    p <- p + e/2 grad; repeat { u <- u + e M^-1 p; p <- p + e grad }; the last p half a step back

    Args:
        step_size: e, one a chain [C].
    """
    flat, values = at.flat, None
    step_length = step_size.to(flat).unsqueeze(1)  # [C, 1]
    momentum = torch.addcmul(momentum, at.gradient, step_length, value=0.5)
    # A diagonal mass takes one fused operation a step.
    drift = None if len(metric.variances) else step_length * metric.scale.square()  # [C, P]
    for step in range(num_steps):
        if drift is None:
            flat = torch.addcmul(flat, step_length, velocity_of(metric, momentum))
        else:
            flat = torch.addcmul(flat, drift, momentum)
        values = density(flat)
        momentum = momentum.addcmul_(values.gradient, step_length, value=1.0 if step < num_steps - 1 else 0.5)
    assert values is not None, "a trajectory has at least one step"
    return Position(flat, *values), momentum


def kinetic(metric: Metric, momentum: Tensor) -> Tensor:
    """p^T M^-1 p / 2 in float64, [C]."""
    momentum, metric = momentum.double(), Metric(*(part.double() for part in metric))
    return 0.5 * (momentum * velocity_of(metric, momentum)).sum(dim=1)


def transition(
    density: Density,
    at: Position,
    noise: Tensor,
    uniform: Tensor,
    metric: Metric,
    step_size: Tensor,
    num_steps: int,
) -> tuple[Position, Transition]:
    """One draw of every chain: fresh momentum, a trajectory, accept with min(1, exp(-dH)) or stay.

    Args:
        noise: standard normals [C, P].
        uniform: [C] in [0, 1), float64.
        step_size: one a chain [C].
    """
    momentum = momentum_of(metric, noise)
    start = kinetic(metric, momentum) - at.log_density  # [C]
    new, end = trajectory(density, at, momentum, metric, step_size, num_steps)
    energy = kinetic(metric, end) - new.log_density
    error = energy - start
    error = torch.where(error.isfinite() & new.gradient.isfinite().all(dim=1), error, math.inf)
    acceptance = (-error).clamp(max=0.0).exp()
    accept = uniform < acceptance
    moved = Position(*(torch.where(_like(accept, n), n, o) for n, o in zip(new, at, strict=True)))
    found = Transition(
        acceptance,
        error > MAX_ENERGY_ERROR,
        accept,
        torch.where(accept, energy, start),
        new.flat,
        velocity_of(metric, end),
        new.log_density.isposinf(),
    )
    return moved, found


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    """[C] -> [C] or [C, 1], to stand beside a tensor over chains."""
    return flags if tensor.dim() == 1 else flags.unsqueeze(1)
