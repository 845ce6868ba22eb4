"""What benchmarks reckon with of their own: the microcanonical sampler that HMC is weighed against."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnn.inference.density import Plan, Prepared, target_of_function
from bnn.seeding import generator

C, P = 3, 7
SCALES = torch.linspace(0.5, 2.0, P, dtype=torch.float64)


@pytest.fixture
def mclmc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("mclmc")


def normal() -> Prepared:
    flat = torch.zeros(C, P, dtype=torch.float64)
    target = target_of_function(lambda u: -0.5 * (u / SCALES).square().sum(), None)
    return Prepared(target, Plan("traced", 1, 1), flat)


def placed(mclmc: Any, density: Prepared, scale: Tensor) -> Any:
    u = torch.randn(C, P, generator=generator(1), dtype=torch.float64)
    velocity = torch.randn(C, P, generator=generator(2), dtype=torch.float64)
    values = density(u)
    return mclmc.Chains(
        u / scale, velocity / velocity.norm(dim=1, keepdim=True), values.gradient * scale, values.log_density
    )


def test_a_kick_follows_its_equation(mclmc: Any) -> None:
    """du/dt = (1 - u u^T) g / (P - 1), dK/dt = u . g, by small steps of Euler."""
    at = placed(mclmc, normal(), SCALES)
    found, gain = mclmc.kick(at.velocity, at.slope, 0.8)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(C, dtype=torch.float64))
    velocity, expected = at.velocity, torch.zeros(C, dtype=torch.float64)
    for _ in range(20_000):
        along = (velocity * at.slope).sum(dim=1)
        expected = expected + 0.8 / 20_000 * along
        velocity = velocity + 0.8 / 20_000 * (at.slope - along.unsqueeze(1) * velocity) / (P - 1)
        velocity = velocity / velocity.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, velocity, rtol=0, atol=1e-4)
    torch.testing.assert_close(gain, expected, rtol=0, atol=1e-3)


def test_steps_go_back_where_they_came_from_and_errors_fall_with_the_third_power(mclmc: Any) -> None:
    density = normal()
    at = placed(mclmc, density, SCALES)
    moved, error = mclmc.integrate(density, at, SCALES, 0.3)
    back, again = mclmc.integrate(density, moved._replace(velocity=-moved.velocity), SCALES, 0.3)
    torch.testing.assert_close(back.z, at.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.velocity, -at.velocity, rtol=0, atol=1e-12)
    torch.testing.assert_close(again, -error, rtol=0, atol=1e-12)
    errors = [mclmc.integrate(density, at, SCALES, size)[1].abs() for size in (0.1, 0.05)]
    assert bool((errors[0] / errors[1] > 5).all())


@pytest.mark.slow
def test_its_draws_have_the_variances_of_a_normal(mclmc: Any) -> None:
    flat = torch.randn(16, 30, generator=generator(3))
    scales = torch.logspace(-1, 1, 30)
    density = Prepared(
        target_of_function(lambda u: -0.5 * (u / scales).square().sum(), None), Plan("traced", 1, 1), flat
    )
    run = mclmc.run_chains(density, flat * scales, torch.ones(30), num_warmup=3000, num_steps=3000, seed=0)
    draws = torch.stack([turn.u for turn in run if not turn.warm], dim=1)
    ratio = (draws.double() / scales).square().mean(dim=(0, 1))
    assert float(ratio.min()) > 0.9
    assert float(ratio.max()) < 1.1
