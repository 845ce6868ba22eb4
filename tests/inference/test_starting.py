"""Where chains start, and the climb that some of them take."""

from __future__ import annotations

import pytest
import torch
from scenarios import classifier, linear_regression
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError
from bnn.fitting import fit
from bnn.inference import Prior
from bnn.inference.climbing import Climb
from bnn.inference.density import Plan, Prepared, target_of_model
from bnn.inference.hmc import HMC
from bnn.inference.starting import (
    CLIMB_RATE,
    CLIMB_STEPS,
    check_init,
    climb_step,
    climbs,
    first_climb,
    positions,
)
from bnn.model import BayesianModel
from bnn.types import Batch, State

C = 3


def hierarchical() -> BayesianModel:
    """Unknown noise and scale of the weights: positions are not the values that banks hold."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(4, 2)
    prior = priors.Normal(0.5, priors.HalfCauchy(1.0))
    return BayesianModel(module, prior=prior, likelihood=likelihoods.Gaussian(priors.LogNormal(0.0, 1.0)), num_data=11)


@pytest.mark.parametrize("init", ["prior", "ensemble"])
def test_chains_start_at_draws_of_the_prior_each_its_own(init: str, world_untouched: None) -> None:
    model = classifier()[0]
    flat = positions(model, init, C, 5)  # type: ignore[arg-type]
    assert flat.shape == (C, model.layout.num_values)
    expected = torch.stack([model.unconstrain(model.sample_prior(5, "start", chain)) for chain in range(C)])
    assert torch.equal(flat, expected)
    assert not torch.equal(positions(model, init, C, 6), flat)  # type: ignore[arg-type]
    assert torch.equal(positions(model, init, 2, 5), flat[:2])  # type: ignore[arg-type]


@pytest.mark.parametrize("init", ["module", "map"])
def test_chains_start_at_the_module(init: str) -> None:
    for model in (classifier()[0], hierarchical()):
        flat = positions(model, init, C, 5)  # type: ignore[arg-type]
        expected = model.unconstrain(model.module_params())
        assert torch.equal(flat, expected.expand(C, -1))


def bank_of(model: BayesianModel, num_samples: int) -> Bank:
    data = torch.randn(model.num_data, 4), torch.zeros(model.num_data, 2)
    return fit(model, data, method=Prior(), num_samples=num_samples, seed=8)


def test_chains_start_at_rows_of_a_bank_without_repeats() -> None:
    model = hierarchical()
    bank = bank_of(model, 7)
    rows = model.unconstrain(bank.block(slice(None)).params)  # [S, P]
    flat = positions(model, bank, 5, 3)
    taken = [int((rows == row).all(dim=1).nonzero()) for row in flat]
    assert len(set(taken)) == 5
    assert taken != sorted(taken)  # drawn, not the first
    assert torch.equal(positions(model, bank, 5, 3), flat)
    assert not torch.equal(positions(model, bank, 5, 4), flat)
    every = positions(model, bank, 7, 3)
    assert sorted(int((rows == row).all(dim=1).nonzero()) for row in every) == list(range(7))
    found = model.constrain(flat)[0]
    for name, tensor in bank.block(torch.tensor(taken)).params.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_bank_is_not_changed_by_chains_that_start_in_it() -> None:
    model = hierarchical()
    bank = bank_of(model, 5)
    before = {name: tensor.clone() for name, tensor in bank.block(slice(None)).params.items()}
    positions(model, bank, 4, 0).fill_(9.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bank.block(slice(None)).params.items())


def test_a_bank_of_too_few_rows_or_of_another_module_is_refused_in_one_line() -> None:
    model = hierarchical()
    with pytest.raises(ConfigError, match="init: want a bank with a row for each of 5 chains, got 4; ") as refused:
        positions(model, bank_of(model, 4), 5, 0)
    assert "\n" not in str(refused.value)
    with pytest.raises(BankMismatch, match="init") as other:
        positions(classifier()[0], bank_of(model, 5), 3, 0)
    assert "\n" not in str(other.value)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hmc_goes_on_from_a_bank_of_another_method(dtype: str) -> None:
    case = linear_regression()
    bank = fit(case.model, case.data, method=Prior(), num_samples=6, seed=1)
    method = HMC(num_chains=4, num_warmup=0, num_steps=1, step_size=1e-7, init=bank, dtype=dtype)  # type: ignore[arg-type]
    found = case.model.layout.flatten(
        fit(case.model, case.data, method=method, num_samples=4, seed=2).block(slice(None)).params
    )
    torch.testing.assert_close(found, positions(case.model, bank, 4, 2), rtol=0, atol=1e-4)


def test_inits_are_words_or_banks() -> None:
    for init in ("prior", "ensemble", "module", "map", bank_of(hierarchical(), 4)):
        check_init("init", init)
    for init in ("laplace", 3, None, [torch.zeros(3)]):
        with pytest.raises(ConfigError, match=r"init.*prior, ensemble, module, map"):
            check_init("init", init)
    assert [climbs(init) for init in ("prior", "ensemble", "module", "map")] == [False, True, False, True]  # type: ignore[arg-type]
    assert not climbs(bank_of(hierarchical(), 4))


def climbed(density: Prepared, at: Climb, scale: Tensor, first: int, last: int) -> list[Climb]:
    found = []
    for step in range(first, last):
        at = climb_step(density, at, scale, step)
        found.append(at)
    return found


def test_every_chain_climbs_and_a_climb_that_goes_on_has_the_same_bits() -> None:
    """From draws of the prior into the posterior, whose mode and spread are known here."""
    case = linear_regression()
    flat = positions(case.model, "ensemble", C, 0)
    scale = torch.tensor([1.5, 1.5, 1.5, 1.5, 1.5])
    density = Prepared(target_of_model(case.model, Batch(*case.data)), Plan("traced", 1, 1), flat)
    first = first_climb(flat, scale)
    torch.testing.assert_close(first.flat * scale, flat)
    path = climbed(density, first, scale, 0, CLIMB_STEPS)
    before, after = density(flat).log_density, density(path[-1].flat * scale).log_density
    assert bool((after > before + 10).all())
    spread = case.covariance.diagonal().sqrt()
    assert float(((flat - case.mean) / spread).abs().max()) > 10
    assert float(((path[-1].flat * scale - case.mean) / spread).abs().max()) < 3
    halfway: State = {name: tensor.clone() for name, tensor in path[149].save().items()}
    again = climbed(density, Climb.load(halfway, torch.device("cpu")), scale, 150, CLIMB_STEPS)
    assert all(torch.equal(a, b) for a, b in zip(again[-1], path[-1], strict=True))


def test_a_step_of_the_climb_is_in_units_of_the_prior() -> None:
    """Adam's first step is its rate in each value, in the direction of the gradient, times the scale."""
    case = linear_regression()
    flat, scale = positions(case.model, "prior", C, 0), torch.tensor([0.1, 1.0, 2.0, 3.0, 40.0])
    density = Prepared(target_of_model(case.model, Batch(*case.data)), Plan("traced", 1, 1), flat)
    step = climb_step(density, first_climb(flat, scale), scale, 0).flat * scale - flat
    torch.testing.assert_close(step, CLIMB_RATE * scale * density(flat).gradient.sign(), rtol=1e-3, atol=1e-6)


def test_chains_of_a_classifier_climb_to_modes_of_their_own() -> None:
    model, data = classifier()
    flat = positions(model, "ensemble", C, 0)
    scale = model.prior_scale()
    density = Prepared(target_of_model(model, Batch(*data)), Plan("traced", 1, 1), flat)
    top = climbed(density, first_climb(flat, scale), scale, 0, CLIMB_STEPS)[-1].flat * scale
    assert bool((density(top).log_density > density(flat).log_density + 10).all())
    assert float(torch.cdist(top / scale, top / scale).add(10 * torch.eye(C)).min()) > 1.0
