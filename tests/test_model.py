"""The scaling contract: N and the temperature exist in one place, and batches average to the full data."""

from __future__ import annotations

import copy

import pytest
import torch
from scenarios import classifier, linear_regression
from torch import nn

from bnn import inference, likelihoods, priors
from bnn.errors import ConfigError
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch


def test_batches_weighted_by_their_size_average_to_the_full_log_joint() -> None:
    model, (x, y) = classifier(num_rows=23)  # 23 is not divisible by 7
    params = model.sample_prior(0)
    full = model.log_joint(params, Batch(x, y))
    parts = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 23, 7)]
    assert [len(part[1]) for part in parts] == [7, 7, 7, 2]
    mean = sum(len(part[1]) / 23 * model.log_joint(params, Batch(*part)) for part in parts)
    torch.testing.assert_close(mean, full, rtol=1e-5, atol=1e-3)


def test_log_joint_is_the_sum_of_its_parts() -> None:
    model, (x, y) = classifier()
    params = model.sample_prior(1)
    with torch.no_grad():
        module = copy.deepcopy(model.module)
        for name, parameter in module.named_parameters():
            parameter.copy_(params[name])
        log_likelihood = -nn.functional.cross_entropy(module(x), y, reduction="sum")
    torch.testing.assert_close(model.log_likelihood(params, Batch(x, y)), log_likelihood)
    log_prior = priors.log_prob(model.prior, model.layout.entries, params)
    torch.testing.assert_close(model.log_joint(params, Batch(x, y)), log_likelihood + log_prior)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_multiply_the_log_likelihood_of_their_rows_alone(temperature: float, dtype: torch.dtype) -> None:
    """log_joint = (weight N / B sum_b w_b log p(y_b | x_b) + log prior) / T, in value and gradient, by hand."""
    like, (x, y) = classifier()
    model = BayesianModel(
        like.module, prior=like.prior, likelihood=like.likelihood, num_data=23, temperature=temperature
    )
    weight = 3 * torch.rand(7, generator=generator(0), dtype=dtype)
    flat = model.unconstrain(model.sample_prior(1)).requires_grad_()
    params = model.layout.unflatten(flat)
    each = -nn.functional.cross_entropy(model.forward(params, x[:7]), y[:7], reduction="none")
    log_prior = priors.log_prob(model.prior, model.layout.entries, params)
    expected = (0.5 * 23 / 7 * (weight.float() * each).sum() + log_prior) / temperature
    found = model.log_joint(params, Batch(x[:7], y[:7], weight), weight=0.5)
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    gradients = [torch.autograd.grad(value, [flat], retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)
    density, log_joint = model.log_density(flat, Batch(x[:7], y[:7], weight), weight=0.5)
    torch.testing.assert_close(log_joint, expected)
    torch.testing.assert_close(density, expected)  # no unknown, so nothing to transform


def test_a_whole_weight_is_so_many_copies_of_a_row() -> None:
    model, (x, y) = classifier()
    params = model.sample_prior(2)
    counts = torch.tensor([2, 0, 1, 3, 1, 0, 0])
    copies = torch.arange(7).repeat_interleave(counts)
    assert len(copies) == 7
    torch.testing.assert_close(
        model.log_joint(params, Batch(x[:7], y[:7], counts.float())),
        model.log_joint(params, Batch(x[copies], y[copies])),
    )


def test_weights_of_one_are_none() -> None:
    model, (x, y) = classifier()
    params = model.sample_prior(2)
    assert torch.equal(model.log_joint(params, Batch(x, y, torch.ones(23))), model.log_joint(params, Batch(x, y)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_temperature_divides_all_of_it(temperature: float) -> None:
    model, (x, y) = classifier()
    tempered = BayesianModel(
        model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, temperature=temperature
    )
    params = model.sample_prior(2)
    expected = model.log_joint(params, Batch(x, y)) / temperature
    torch.testing.assert_close(tempered.log_joint(params, Batch(x, y)), expected)


def test_the_jacobian_makes_the_unconstrained_density_integrate_to_the_same() -> None:
    """With no data the density of log s must be that of s times s: both integrate to 1."""
    module = nn.Linear(1, 1)
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.2, 0.5))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=1, bayesian="bias")
    grid = torch.linspace(-4, 4, 2001)
    jacobian = torch.stack([model.constrain(torch.tensor([0.0, u]))[1] for u in grid])
    density = torch.stack(
        [likelihood.scale.log_prob(model.constrain(torch.tensor([0.0, u]))[0]["@likelihood.scale"]) for u in grid]
    )
    total = torch.trapezoid((density + jacobian).exp(), grid)
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-4, atol=1e-4)


def test_constrain_is_undone_by_unconstrain() -> None:
    module = nn.Linear(3, 2)
    likelihood = likelihoods.Gaussian(priors.HalfCauchy(0.5))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=5)
    flat = torch.randn(4, model.layout.num_values, generator=generator(0))
    params, log_jacobian = model.constrain(flat)
    assert bool((params["@likelihood.scale"] > 0).all())
    torch.testing.assert_close(model.unconstrain(params), flat)
    torch.testing.assert_close(log_jacobian, flat[:, -1])


def test_parameters_outside_the_sample_stay_the_modules_own() -> None:
    model, (x, _) = classifier()
    partial = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, bayesian="3")
    assert partial.layout.names == ("3.weight", "3.bias")
    own = {name: p.detach() for name, p in model.module.named_parameters()}
    sample = partial.sample_prior(0)
    torch.testing.assert_close(partial.forward(sample, x), model.forward({**own, **sample}, x))
    assert set(partial.base()) == {"1.weight", "1.bias"}


def test_log_evidence_of_the_conjugate_model_by_the_basic_identity() -> None:
    """log p(y) = log joint - log posterior, at any theta: it pins every constant of the log joint."""
    case = linear_regression()
    posterior = torch.distributions.MultivariateNormal(case.mean, case.covariance)
    for seed in range(3):
        theta = case.mean + torch.randn(5, generator=generator(seed), dtype=torch.float64) * 0.1
        params = {"weight": theta[:4].view(1, 4).float(), "bias": theta[4:].float()}
        log_joint = float(case.model.log_joint(params, Batch(*case.data)))
        assert log_joint - float(posterior.log_prob(theta)) == pytest.approx(case.log_evidence, abs=2e-3)


@pytest.mark.parametrize(
    ("option", "value"), [("num_data", 0), ("num_data", 2.5), ("temperature", 0.0), ("temperature", -1.0)]
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    options = {"num_data": 10, "temperature": 1.0, option: value}
    with pytest.raises(ConfigError, match=option):
        BayesianModel(nn.Linear(2, 3), prior=priors.Normal(), likelihood=likelihoods.Categorical(), **options)


def test_fitting_leaves_no_gradient_on_free_parameters() -> None:
    model, data = classifier()
    partial = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, bayesian="3")
    list(inference.Guide("map", num_steps=3).run(partial, data, num_samples=1, seed=0))
    assert all(parameter.grad is None for parameter in model.module.parameters())
