"""Guides against closed forms: the low-rank one of full rank is exact, the mean-field one minimises KL(q || p)."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from scenarios import classifier, linear_regression
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnn import likelihoods, priors
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference import Guide
from bnn.model import BayesianModel
from bnn.types import Batch


def moments(guide: Guide, num_samples: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    case = linear_regression()
    bank = fit(case.model, case.data, method=guide, num_samples=num_samples, seed=1)
    flat = case.model.layout.flatten(bank.block(slice(None)).params).double()
    return flat.mean(dim=0), flat.T.cov()


def test_low_rank_of_full_rank_agrees_with_the_closed_form() -> None:
    """Fitted on all rows, so that only Monte Carlo error and the end of the optimisation remain."""
    case = linear_regression()
    mean, covariance = moments(Guide("low-rank", rank=5, num_steps=3000, batch_size=30, lr=0.05))
    spread = case.covariance.diagonal().sqrt()
    # 4 standard errors of 4,000 draws, and as much again for what is left of the optimisation noise.
    assert float(((mean - case.mean) / spread).abs().max()) < 8 / math.sqrt(4000)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(case.covariance), covariance, upper=False)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(case.covariance), whitened.T, upper=False)
    assert float((whitened - torch.eye(5)).abs().max()) < 8 * math.sqrt(2 / 4000)


def test_mean_field_has_the_precision_of_the_posterior_on_its_diagonal() -> None:
    """For a normal target the best factorised normal has mean mu and variances 1 / (precision)_ii."""
    case = linear_regression()
    mean, covariance = moments(Guide("mean-field", num_steps=3000, batch_size=30, lr=0.02))
    expected = 1 / torch.linalg.inv(case.covariance).diagonal()
    assert float(((mean - case.mean) / expected.sqrt()).abs().max()) < 8 / math.sqrt(4000)
    assert float((covariance.diagonal() / expected - 1).abs().max()) < 8 * math.sqrt(2 / 4000)


def test_map_is_the_mode() -> None:
    case = linear_regression()
    bank = fit(case.model, case.data, method=Guide("map", num_steps=3000, batch_size=30, lr=0.05), num_samples=1)
    found = case.model.layout.flatten(bank[0]).double()
    assert float((found - case.mean).abs().max()) < 1e-3


def test_map_with_learnt_noise_is_the_mode_of_the_constrained_values() -> None:
    """y ~ N(0, s^2), log s ~ N(0.2, 0.7^2): the mode of the log joint over s, by a grid."""
    module = nn.Linear(1, 1)
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.2, 0.7))
    model = BayesianModel(module, prior=priors.Normal(0.0, 1e-3), likelihood=likelihood, num_data=6)
    y = torch.tensor([[-1.2], [0.3], [0.9], [-0.4], [1.1], [0.2]])
    bank = fit(model, (torch.zeros(6, 1), y), method=Guide("map", num_steps=3000, batch_size=6, lr=0.05), num_samples=1)
    s = torch.linspace(0.2, 3.0, 28_001)
    log_joint = torch.distributions.Normal(0.0, s.unsqueeze(1)).log_prob(y.T).sum(dim=1) + likelihood.scale.log_prob(s)
    assert float(bank[0]["@likelihood.scale"]) == pytest.approx(float(s[log_joint.argmax()]), abs=2e-3)


def test_a_short_last_batch_weighs_by_its_rows() -> None:
    """In an unshuffled loader the last row is a batch of its own: it must not count as much as 128 others."""
    rows, module = 129, nn.Linear(1, 1)
    y = torch.zeros(rows, 1)
    y[-1] = 30.0
    model = BayesianModel(
        module, prior=priors.Normal(0.0, 100.0), likelihood=likelihoods.Gaussian(1.0), num_data=rows, bayesian="bias"
    )
    loader = DataLoader(TensorDataset(torch.zeros(rows, 1), y), batch_size=128)
    bank = fit(model, loader, method=Guide("map", num_steps=3000, lr=0.05), num_samples=1)
    assert float(bank[0]["bias"]) == pytest.approx(30.0 / rows, abs=0.05)


def test_minibatches_lead_to_the_same_posterior() -> None:
    case = linear_regression()
    mean, _ = moments(Guide("low-rank", rank=5, num_steps=3000, batch_size=7, lr=0.05))
    spread = case.covariance.diagonal().sqrt()
    assert float(((mean - case.mean) / spread).abs().max()) < 0.3  # the noise of batches of 7 of 30


def test_elbo_per_row_is_below_the_log_evidence_and_close_for_full_rank() -> None:
    case = linear_regression()
    states = [s for _, s in Guide("low-rank", rank=5, num_steps=3000, batch_size=30, lr=0.05).run(
        case.model, case.data, num_samples=1, seed=0)]  # fmt: skip
    elbo = states[-1]["info"]["elbo_per_row"] * 30
    assert elbo < case.log_evidence + 0.5
    assert elbo > case.log_evidence - 1.0


def test_draws_do_not_depend_on_the_block_size() -> None:
    model, data = classifier()
    banks = [
        fit(model, data, method=Guide(num_steps=60, block_size=size), num_samples=7, seed=2).block(slice(None))
        for size in (1, 3, 64)
    ]
    for bank in banks[1:]:
        assert all(torch.equal(bank.params[name], banks[0].params[name]) for name in model.layout.names)


def test_the_start_is_the_modules_own_values() -> None:
    model, data = classifier()
    bank = fit(model, data, method=Guide("map", num_steps=1, lr=1e-9), num_samples=1)
    own = model.module_params()
    assert all(torch.allclose(bank[0][name], own[name], atol=1e-6) for name in model.layout.names)


def test_a_loss_that_is_not_finite_says_at_which_step() -> None:
    model, (x, y) = classifier()
    with pytest.raises(FitError, match=r"want a finite loss and gradient, got .* at step \d+; lower lr"):
        list(Guide(lr=1e30, num_steps=100).run(model, (x, y), num_samples=1, seed=0))


@pytest.mark.parametrize(
    "options", [{"num_steps": 0}, {"rank": 0}, {"lr": 0.0}, {"init_scale": -1.0}, {"batch_size": 0}]
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="Guide"):
        Guide("low-rank", **options)  # type: ignore[arg-type]


def test_an_unknown_family_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match="mean-field, low-rank, map, got 'laplac'"):
        Guide("laplac")  # type: ignore[arg-type]


def test_the_users_pyro_store_survives() -> None:
    pyro.param("mine", torch.ones(3))
    try:
        model, data = classifier()
        fit(model, data, method=Guide(num_steps=10), num_samples=2)
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert not pyro.settings.get("module_local_params")
    finally:
        pyro.get_param_store().clear()


def test_the_factor_of_the_pyro_model_is_the_log_density() -> None:
    from bnn.inference.guide import _build

    model, (x, y) = classifier()
    _, density = _build(Guide(), model, 23.0, seed=0)
    theta = torch.randn(model.layout.num_values)
    trace = pyro.poutine.trace(pyro.poutine.condition(density, data={"theta": theta})).get_trace(Batch(x, y))
    assert float(trace.log_prob_sum()) == pytest.approx(float(model.log_density(theta, Batch(x, y))[0]), rel=1e-6)
