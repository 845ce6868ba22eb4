"""The mass against dense matrices, and one transition against what it must do with each uniform."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnn.inference.density import Values
from bnn.inference.hamiltonian import (
    MAX_ENERGY_ERROR,
    Metric,
    Position,
    diagonal,
    kinetic,
    momentum_of,
    trajectory,
    transition,
    velocity_of,
    whiten,
)
from bnn.seeding import generator

DOUBLE = torch.float64
C, P, R = 4, 7, 2
STEPS = torch.tensor([0.11, 0.05, 0.2, 0.3], dtype=DOUBLE)  # of each chain
SPREADS = torch.tensor([0.3, 0.8, 1.0, 1.5, 2.0, 0.6, 1.2], dtype=DOUBLE)


def low_rank(dtype: torch.dtype = DOUBLE) -> Metric:
    directions = torch.linalg.qr(torch.randn(P, R, generator=generator(0, "directions"), dtype=DOUBLE))[0]
    parts = SPREADS, directions, torch.tensor([9.0, 0.25], dtype=DOUBLE)
    return Metric(*(part.to(dtype) for part in parts))


def dense(metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """S, A and M^-1 = S A S as matrices."""
    scale = torch.diag(metric.scale)
    inner = torch.eye(P, dtype=DOUBLE)
    inner = inner + metric.directions @ torch.diag(metric.variances - 1) @ metric.directions.T
    return scale, inner, scale @ inner @ scale


METRICS = [diagonal(SPREADS), low_rank()]


@pytest.mark.parametrize("metric", METRICS, ids=["diagonal", "low rank"])
def test_velocities_momenta_and_whitened_positions_are_those_of_dense_matrices(metric: Metric) -> None:
    scale, inner, inverse_mass = dense(metric)
    vectors = torch.randn(C, P, generator=generator(1), dtype=DOUBLE)
    torch.testing.assert_close(velocity_of(metric, vectors), vectors @ inverse_mass, rtol=1e-12, atol=1e-12)
    columns = momentum_of(metric, torch.eye(P, dtype=DOUBLE))  # row i is what the i-th normal moves
    torch.testing.assert_close(columns.T @ columns, torch.linalg.inv(inverse_mass), rtol=1e-10, atol=1e-10)
    white = whiten(metric, torch.eye(P, dtype=DOUBLE)).T  # the matrix W of x -> W x
    torch.testing.assert_close(white @ inverse_mass @ white.T, torch.eye(P, dtype=DOUBLE), rtol=1e-10, atol=1e-10)
    root = torch.linalg.inv(torch.linalg.cholesky(inner))
    square = (vectors @ torch.linalg.inv(scale) @ root.T).square().sum(dim=1)
    torch.testing.assert_close(whiten(metric, vectors).square().sum(dim=1), square, rtol=1e-10, atol=0)


@pytest.mark.parametrize("metric", METRICS, ids=["diagonal", "low rank"])
def test_kinetic_energies_are_summed_in_float64(metric: Metric) -> None:
    momentum = 300 * torch.randn(C, P, generator=generator(2), dtype=DOUBLE)
    expected = torch.stack([0.5 * row @ dense(metric)[2] @ row for row in momentum])
    torch.testing.assert_close(kinetic(metric, momentum), expected, rtol=1e-12, atol=0)
    single, short = Metric(*(part.float() for part in metric)), momentum.float()
    again = Metric(*(part.double() for part in single))
    expected = torch.stack([0.5 * row @ dense(again)[2] @ row for row in short.double()])
    assert kinetic(single, short).dtype == DOUBLE
    torch.testing.assert_close(kinetic(single, short), expected, rtol=1e-12, atol=0)


def normal(flat: Tensor) -> Values:
    """Independent normals of unlike spreads; the log joint is told apart from the density by a constant."""
    scaled = flat / SPREADS.to(flat)
    value = -0.5 * scaled.double().square().sum(dim=1)
    return Values(value, value - 3.0, -scaled / SPREADS.to(flat))


def at(flat: Tensor, density: Callable[[Tensor], Values] = normal) -> Position:
    return Position(flat, *density(flat))


@pytest.mark.parametrize("metric", METRICS, ids=["diagonal", "low rank"])
def test_a_trajectory_is_the_leapfrog_written_out(metric: Metric) -> None:
    flat, noise = (torch.randn(C, P, generator=generator(seed), dtype=DOUBLE) for seed in (3, 4))
    for num_steps in (1, 2, 5):
        start, inverse_mass, step = at(flat), dense(metric)[2], STEPS[:, None]
        found, end = trajectory(normal, start, noise, metric, STEPS, num_steps)
        u, p = flat.clone(), noise.clone()
        for _ in range(num_steps):
            p = p + step / 2 * normal(u).gradient
            u = u + step * p @ inverse_mass
            p = p + step / 2 * normal(u).gradient
        torch.testing.assert_close(found.flat, u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(end, p, rtol=1e-12, atol=1e-12)
        for part, expected in zip(found[1:], normal(found.flat), strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(start.flat, flat)
        assert torch.equal(noise, torch.randn(C, P, generator=generator(4), dtype=DOUBLE))


def test_the_uniform_decides_against_the_acceptance_of_each_chain() -> None:
    """With a step that is too long for half of the chains: acceptance min(1, exp(-dH)) from a Hamiltonian by hand."""
    metric, step = low_rank(), torch.tensor([0.6, 0.6, 0.5, 0.6], dtype=DOUBLE)
    flat = torch.randn(C, P, generator=generator(5), dtype=DOUBLE) * torch.tensor([[0.1], [0.3], [0.5], [0.7]])
    noise, start = torch.randn(C, P, generator=generator(6), dtype=DOUBLE), at(flat)
    new, end = trajectory(normal, start, momentum_of(metric, noise), metric, step, 3)
    inverse_mass = dense(metric)[2]
    momenta = momentum_of(metric, noise)
    before = 0.5 * ((momenta @ inverse_mass) * momenta).sum(dim=1) - start.log_density
    after = 0.5 * ((end @ inverse_mass) * end).sum(dim=1) - new.log_density
    expected = (before - after).exp().clamp(max=1.0)
    assert int(((expected > 0.02) & (expected < 0.98)).sum()) >= 2
    for shift, accepts in ((-1e-9, True), (1e-9, False)):
        uniform = (expected + shift).clamp(0.0, 1.0)
        moved, found = transition(normal, start, noise, uniform, metric, step, 3)
        torch.testing.assert_close(found.acceptance, expected, rtol=1e-10, atol=1e-12)
        assert found.accepted.tolist() == [accepts] * C
        torch.testing.assert_close(found.energy, torch.where(found.accepted, after, before), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.proposal, new.flat)
        torch.testing.assert_close(found.velocity, end @ inverse_mass)
        assert not found.divergent.any()
        for part, old, proposed in zip(moved, start, new, strict=True):
            keep = found.accepted if part.dim() == 1 else found.accepted[:, None]
            assert torch.equal(part, torch.where(keep, proposed, old))


def test_a_mixed_verdict_moves_only_the_chains_that_accept() -> None:
    start = at(torch.randn(C, P, generator=generator(7)))  # float32
    noise = torch.randn(C, P, generator=generator(8))
    uniform = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=DOUBLE)
    moved, found = transition(normal, start, noise, uniform, diagonal(SPREADS.float()), STEPS, 4)
    assert found.accepted.tolist() == [True, False, True, False]
    for new, old in zip(moved, start, strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new[1::2], old[1::2])
        assert not torch.isclose(new[::2], old[::2], rtol=1e-6, atol=0).any()


@pytest.mark.parametrize("broken", ["nan value", "nan gradient", "infinite value", "minus infinity", "nan position"])
def test_trajectories_into_what_is_not_finite_are_rejected_and_divergent(broken: str) -> None:
    """In chain 2 alone; what the other chains do is the same as without it."""

    def density(flat: Tensor) -> Values:
        value, joint, gradient = (part.clone() for part in normal(flat))
        if broken == "nan gradient":
            gradient[2, 3] = math.nan
        elif broken == "nan position":
            gradient[2] = math.inf
        else:
            value[2] = {"nan value": math.nan, "infinite value": math.inf, "minus infinity": -math.inf}[broken]
        return Values(value, joint, gradient)

    start, noise = at(torch.randn(C, P, generator=generator(9))), torch.randn(C, P, generator=generator(10))
    uniform, metric = torch.zeros(C, dtype=DOUBLE), low_rank(torch.float32)
    moved, found = transition(density, start, noise, uniform, metric, STEPS, 4)
    alone, fine = transition(normal, start, noise, uniform, metric, STEPS, 4)
    assert found.accepted.tolist() == [True, True, False, True]
    assert found.divergent.tolist() == [False, False, True, False]
    assert found.infinite.tolist() == [False, False, broken == "infinite value", False]
    assert float(found.acceptance[2]) == 0.0
    assert bool(found.energy.isfinite().all())
    others = [0, 1, 3]
    assert torch.equal(found.acceptance[others], fine.acceptance[others])
    for new, old, expected in zip(moved, start, alone, strict=True):
        assert torch.equal(new[2], old[2])
        assert torch.equal(new[others], expected[others])


def test_divergence_is_an_energy_error_above_the_limit_and_not_below() -> None:
    """One leapfrog step e at rest at x of a unit normal: with u' = x (1 - e^2 / 2) and p' = -e x (1 - e^2 / 4)

    dH = (u'^2 + p'^2 - x^2) / 2 = x^2 (e^6 / 32 - e^4 / 8)
    """

    def unit(flat: Tensor) -> Values:
        value = -0.5 * flat.double().square().sum(dim=1)
        return Values(value, value, -flat)

    step = 4.0
    share = step**6 / 32 - step**4 / 8
    ends = torch.tensor([[0.999], [1.001]], dtype=DOUBLE) * math.sqrt(MAX_ENERGY_ERROR / share)
    start, uniform = Position(ends, *unit(ends)), torch.zeros(2, dtype=DOUBLE)
    _, found = transition(
        unit, start, torch.zeros(2, 1, dtype=DOUBLE), uniform, diagonal(torch.ones(1)), torch.full((2,), step), 1
    )
    energy = 0.5 * found.proposal.square() + 0.5 * found.velocity.square() - 0.5 * ends.square()
    torch.testing.assert_close(energy, ends.square() * share)
    assert found.divergent.tolist() == [False, True]
    assert MAX_ENERGY_ERROR == 1000.0
