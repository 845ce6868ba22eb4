"""HMC against closed forms, and its parts against what they must conserve."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scenarios import classifier, effective_sample_size, linear_regression
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference import HMC
from bnn.inference.hmc import (
    Adaptation,
    Position,
    climb,
    density_of,
    learn_mass,
    restart_step_size,
    trajectory,
    transition,
    update_moments,
    update_step_size,
    windows,
)
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch


def chains_of(values: Tensor, num_chains: int) -> Tensor:
    """[S] in the order draw by draw -> [C, D]."""
    return values.view(-1, num_chains).T


def within(values: Tensor, expected: float, *, num_chains: int, least_ess: float = 200) -> float:
    """|mean - expected| in standard errors, after checking that the chains have mixed."""
    chains = chains_of(values.double(), num_chains)
    ess = effective_sample_size(chains)
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    return abs(float(chains.mean()) - expected) / (float(chains.std()) / math.sqrt(ess))


@pytest.fixture(scope="module")
def draws() -> Tensor:
    case = linear_regression()
    bank = fit(case.model, case.data, method=HMC(num_chains=4, num_warmup=300, num_steps=12), num_samples=4000, seed=1)
    assert bank.block(slice(0, 9)).chain.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert bank.draw[:9].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    return case.model.layout.flatten(bank.block(slice(None)).params).double()


def test_means_of_the_conjugate_posterior(draws: Tensor) -> None:
    case = linear_regression()
    for place in range(5):
        assert within(draws[:, place], float(case.mean[place]), num_chains=4) < 4


def test_variances_of_the_conjugate_posterior(draws: Tensor) -> None:
    """By the mean of (x - mean)^2, with the ESS of that."""
    case = linear_regression()
    for place in range(5):
        squares = (draws[:, place] - case.mean[place]).square()
        assert within(squares, float(case.covariance[place, place]), num_chains=4) < 4


def test_covariances_of_the_conjugate_posterior(draws: Tensor) -> None:
    case = linear_regression()
    for a, b in ((0, 1), (0, 4), (2, 3)):
        products = (draws[:, a] - case.mean[a]) * (draws[:, b] - case.mean[b])
        assert within(products, float(case.covariance[a, b]), num_chains=4) < 4


def test_a_skewed_target_with_a_known_mean() -> None:
    """One row at 0 under y ~ N(b, s^2), b ~ N(0, 1), log s ~ N(0.3, 0.6^2): no symmetry to hide behind.

    With b integrated out, p(s | y = 0) is proportional to LogNormal(s) / sqrt(1 + s^2).
    """
    module = nn.Linear(1, 1)
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.3, 0.6))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=1, bayesian="bias")
    data = torch.zeros(1, 1), torch.zeros(1, 1)
    bank = fit(model, data, method=HMC(num_chains=4, num_warmup=200, num_steps=8), num_samples=4000, seed=2)
    scale = bank.block(slice(None)).params["@likelihood.scale"]
    s = torch.linspace(1e-3, 40, 400_001, dtype=torch.float64)
    density = likelihood.scale.log_prob(s).exp() / torch.sqrt(1 + s**2)  # type: ignore[union-attr]
    density = density / torch.trapezoid(density, s)
    for power in (1, -1):
        expected = float(torch.trapezoid(density * s**power, s))
        assert within(scale**power, expected, num_chains=4) < 4


def test_a_module_in_bfloat16_has_the_posterior_of_its_values() -> None:
    """A well determined slope: the chain must move in steps that bfloat16 alone would round away."""
    source = generator(0, "bfloat16")
    x = torch.randn(400, 1, generator=source)
    y = 0.1 * x + torch.randn(400, 1, generator=source)
    expected = float(1 / (x.square().sum() + 1.0).sqrt())
    module = nn.Linear(1, 1).to(torch.bfloat16)
    with torch.no_grad():
        module.bias.zero_()
    model = BayesianModel(
        module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=400, bayesian="weight"
    )
    method = HMC(num_chains=4, num_warmup=150, num_steps=6)
    bank = fit(model, (x.to(torch.bfloat16), y), method=method, num_samples=800, seed=1)
    drawn = bank.block(slice(None)).params["weight"].float().flatten()
    assert len(drawn.unique()) > 50
    assert float(drawn.std()) == pytest.approx(expected, rel=0.2)


def test_the_limit_of_divergence_is_an_energy_of_a_thousand() -> None:
    """A quadratic target whose first step overshoots by a known energy."""

    def density(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value = -0.5 * flat.square().sum(dim=1)
        return value, value, -flat

    for step, divergent in ((60.0, True), (3.0, False)):
        flat = torch.tensor([[1.0]])
        at = Position(flat, *density(flat))
        momentum, uniform = torch.tensor([[0.0]]), torch.zeros(1, dtype=torch.float64)
        _, found = transition(density, at, momentum, uniform, torch.ones(1), step, 1)
        assert bool(found.divergent[0]) == divergent


def test_leapfrog_is_reversible_and_conserves_energy_to_second_order() -> None:
    case = linear_regression()
    density = density_of(case.model, case.data)
    flat = torch.randn(3, 5, generator=generator(0))
    at = Position(flat, *density(flat))
    momentum = torch.randn(3, 5, generator=generator(1))
    mass = torch.full((5,), 0.7)

    def energy(position: Position, p: Tensor) -> Tensor:
        return -position.log_density.double() + 0.5 * (p.double().square() * mass).sum(dim=1)

    errors = []
    for step_size, steps in ((0.02, 20), (0.01, 40)):
        new, end = trajectory(density, at, momentum, mass, step_size, steps)
        errors.append(float((energy(new, end) - energy(at, momentum)).abs().max()))
        back, start = trajectory(density, new, -end, mass, step_size, steps)
        torch.testing.assert_close(back.flat, at.flat, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(-start, momentum, rtol=1e-3, atol=1e-3)
    assert 2.5 < errors[0] / errors[1] < 6  # half the step, a quarter of the error


def test_density_is_that_of_the_model_a_chain_at_a_time() -> None:
    model, (x, y) = classifier()
    flat = torch.randn(3, model.layout.num_values, generator=generator(0))
    value, log_joint, gradient = density_of(model, (x, y))(flat)
    for chain in range(3):
        one = flat[chain].clone().requires_grad_()
        expected, joint = model.log_density(one, Batch(x, y))
        expected.backward()
        torch.testing.assert_close(value[chain], expected.detach())
        torch.testing.assert_close(log_joint[chain], joint.detach())
        torch.testing.assert_close(gradient[chain], one.grad, rtol=1e-4, atol=1e-4)


def test_eight_chains_hold_the_same_draws_as_two_of_them() -> None:
    """Randomness is keyed by (seed, chain, step): with the step size fixed, chains do not know of each other."""
    model, data = classifier()
    options = {"num_warmup": 0, "num_steps": 3, "step_size": 0.02}
    eight = fit(model, data, method=HMC(num_chains=8, **options), num_samples=40, seed=5)  # type: ignore[arg-type]
    two = fit(model, data, method=HMC(num_chains=2, **options), num_samples=10, seed=5)  # type: ignore[arg-type]
    name = model.layout.names[0]
    both = eight.block(slice(None)).params[name].view(5, 8, 5, 4)[:, :2]
    torch.testing.assert_close(both, two.block(slice(None)).params[name].view(5, 2, 5, 4), rtol=1e-4, atol=1e-5)


def test_the_mass_is_the_pooled_variance_within_chains() -> None:
    scales = torch.tensor([0.5, 2.0, 9.0])
    draws = torch.randn(4, 3000, 3, generator=generator(0)) * scales + torch.arange(4.0).view(4, 1, 1) * 50
    zeros = torch.zeros(4, 3)
    adaptation = Adaptation(0.0, 0.0, 0.0, 0, 0.0, torch.ones(3), 0, zeros, zeros)
    for step in range(3000):
        adaptation = update_moments(adaptation, draws[:, step])
    torch.testing.assert_close(learn_mass(adaptation, torch.ones(3)).inverse_mass, scales**2, rtol=0.06, atol=0)


@pytest.mark.parametrize("num_warmup", [0, 1, 5, 12, 20, 50, 80, 200, 1000])
def test_windows_lie_inside_the_warm_up_and_double(num_warmup: int) -> None:
    edges = windows(num_warmup)
    assert edges == sorted(set(edges))
    assert all(0.15 * num_warmup < edge <= num_warmup - int(0.1 * num_warmup) for edge in edges)
    assert bool(edges) == (num_warmup >= 40)
    if edges:
        assert num_warmup - edges[-1] >= min(50, num_warmup // 3)
    widths = [b - a for a, b in pairwise(edges[:-1])]
    assert all(b == 2 * a for a, b in pairwise(widths))


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
def test_dual_averaging_finds_the_step_size_of_a_known_acceptance(target: float) -> None:
    """With acceptance exp(-e) the step size that gives the target is -log(target)."""
    zeros = torch.zeros(2, 3)
    adaptation = restart_step_size(Adaptation(0.0, 0.0, 0.0, 0, 0.0, torch.ones(3), 0, zeros, zeros), 0.5)
    for _ in range(2000):
        adaptation = update_step_size(adaptation, math.exp(-math.exp(adaptation.log_step)), target)
    assert abs(math.exp(-math.exp(adaptation.log_step_mean)) - target) < 0.01


def test_a_higher_target_is_accepted_more_often() -> None:
    model, data = classifier()
    found = []
    for target in (0.6, 0.95):
        method = HMC(num_chains=4, num_warmup=200, num_steps=8, target_accept=target)
        states = [state for _, state in method.run(model, data, num_samples=400, seed=0)]
        found.append(states[-1]["info"]["acceptance"])
        assert states[-1]["info"]["divergences"] == 0
    assert 0.5 < found[0] < found[1] - 0.05


def test_divergences_are_counted() -> None:
    case = linear_regression()
    method = HMC(num_chains=3, num_warmup=0, num_steps=8, step_size=50.0)
    with pytest.warns(UserWarning, match="acceptance 0.00, 12 of 12 trajectories diverged"):
        states = [state for _, state in method.run(case.model, case.data, num_samples=12, seed=0)]
    assert states[-1]["info"]["divergences"] == 12
    assert states[-1]["info"]["acceptance"] == 0.0


def test_thinning_keeps_every_nth_draw() -> None:
    model, data = classifier()
    options = {"num_chains": 2, "num_warmup": 5, "num_steps": 3}
    every = fit(model, data, method=HMC(**options), num_samples=24, seed=1)  # type: ignore[arg-type]
    third = fit(model, data, method=HMC(**options, thin=3), num_samples=8, seed=1)  # type: ignore[arg-type]
    name = model.layout.names[0]
    kept = every.block(slice(None)).params[name].view(12, 2, 5, 4)[2::3]
    assert torch.equal(kept, third.block(slice(None)).params[name].view(4, 2, 5, 4))
    assert third.draw.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_starts() -> None:
    model, data = classifier()
    near = fit(
        model, data, method=HMC(num_chains=2, num_warmup=0, num_steps=1, step_size=1e-6, init="module"), num_samples=2
    )
    own = model.module_params()
    assert all(torch.allclose(near[1][name], own[name], atol=1e-3) for name in model.layout.names)
    apart = fit(
        model, data, method=HMC(init="prior", num_chains=2, num_warmup=0, num_steps=1, step_size=1e-6), num_samples=2
    )
    assert not torch.allclose(apart[0][model.layout.names[0]], apart[1][model.layout.names[0]], atol=1e-2)


def test_an_ensemble_starts_each_chain_near_a_mode_of_its_own() -> None:
    case = linear_regression()
    far = torch.randn(3, 5, generator=generator(0))
    near = climb(density_of(case.model, case.data), far, case.model.prior_scale())
    spread = case.covariance.diagonal().sqrt()
    assert float(((far - case.mean) / spread).abs().max()) > 10
    assert float(((near - case.mean) / spread).abs().max()) < 1
    model, data = classifier()
    apart = fit(model, data, method=HMC(num_chains=2, num_warmup=0, num_steps=1, step_size=1e-6), num_samples=2)
    prior = fit(
        model, data, method=HMC(init="prior", num_chains=2, num_warmup=0, num_steps=1, step_size=1e-6), num_samples=2
    )
    assert bool((apart.log_joint > prior.log_joint + 20).all())
    assert not torch.allclose(apart[0][model.layout.names[0]], apart[1][model.layout.names[0]], atol=1e-2)


def test_bad_options_and_starts_are_refused() -> None:
    model, (x, y) = classifier()
    with pytest.raises(ConfigError, match="a multiple of num_chains = 4, got 10; pass 8 or 12"):
        list(HMC(num_chains=4).run(model, (x, y), num_samples=10, seed=0))
    for options in (
        {"num_chains": 0},
        {"num_warmup": -1},
        {"num_steps": 0},
        {"target_accept": 1.0},
        {"step_size": 0.0},
        {"init": "map"},
    ):
        with pytest.raises(ConfigError, match="HMC"):
            HMC(**options)  # type: ignore[arg-type]
    with pytest.raises(FitError, match="a finite log joint at the start"):
        list(HMC(num_chains=2).run(model, (x.sign() * 3e38, y), num_samples=2, seed=0))
