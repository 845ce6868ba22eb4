"""Laplace's approximation against closed forms and against laplace-torch."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import LinearRegression, classifier, linear_regression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.batches import full_batch, sampled
from bnn.errors import ConfigError, FitError, ModuleError
from bnn.fitting import fit
from bnn.inference.laplace import Laplace, Posterior, best_factor, posterior_at
from bnn.likelihoods import Categorical, Gaussian
from bnn.model import BayesianModel
from bnn.priors import LogNormal, Normal
from bnn.samplers import WeightedIndexSampler
from bnn.types import Batch, Data


def covariance(posterior: Posterior) -> Tensor:
    """H^-1 [P, P]; 0 for what is outside the blocks."""
    size = len(posterior.mode)
    found = torch.zeros(size, size, dtype=torch.float64)
    for root, places in zip(posterior.roots, posterior.places, strict=True):
        columns = torch.eye(len(places), dtype=torch.float64)
        found[places.unsqueeze(1), places] = torch.stack([root.solve(column) for column in columns])
    return found


def at_module(options: Laplace, model: BayesianModel, data: Data) -> tuple[Posterior, dict[str, float]]:
    """The posterior with the module's values for the mode."""
    return posterior_at(options, model, data, model.unconstrain(model.module_params()), 0)


def at_mean(case: LinearRegression) -> LinearRegression:
    """The same case with the module at the posterior's mean."""
    with torch.no_grad():
        case.model.module.weight.copy_(case.mean[:-1])  # type: ignore[union-attr,operator]
        case.model.module.bias.copy_(case.mean[-1])  # type: ignore[union-attr,operator]
    return case


def last_info(options: Laplace, model: BayesianModel, data: Data) -> dict[str, float]:
    found: dict[str, float] = list(options.run(model, data, num_samples=1, seed=0))[-1][1]["info"]
    return found


def test_a_linear_regression_has_its_closed_form() -> None:
    """Climb, curvature, evidence and draws, from the module's zeros."""
    case = linear_regression()
    options = Laplace("full", num_steps=900, batch_size=30, lr=0.1)
    *_, (block, state) = options.run(case.model, case.data, num_samples=3, seed=0)
    flat = state["climb.flat"][0]
    torch.testing.assert_close(flat.double(), case.mean, rtol=1e-4, atol=1e-4)
    posterior, info = posterior_at(options, case.model, case.data, flat, 0)
    torch.testing.assert_close(covariance(posterior), case.covariance, rtol=1e-5, atol=1e-7)
    assert info["log_evidence"] == pytest.approx(case.log_evidence, abs=1e-4)
    assert info == state["info"]
    assert 0 <= info["mode_gap"] < 1e-5
    assert block.num_samples == 3


def test_the_climb_is_that_of_adam_with_a_falling_rate() -> None:
    case = linear_regression()
    flat = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([flat], maximize=True)
    for step in range(70):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.01 ** (step / 70)
        optimizer.zero_grad()
        case.model.log_density(flat, Batch(*case.data))[0].backward()
        optimizer.step()
    options = Laplace("full", num_steps=70, batch_size=30, lr=0.1)
    *_, (_, state) = options.run(case.model, case.data, num_samples=1, seed=0)
    torch.testing.assert_close(state["climb.flat"][0], flat.detach(), rtol=1e-4, atol=1e-4)


def test_draws_have_the_moments_of_the_posterior() -> None:
    case = at_mean(linear_regression())
    num = 4000
    bank = fit(case.model, case.data, method=Laplace("full", num_steps=0), num_samples=num, seed=1)
    draws = case.model.layout.flatten(bank.block(slice(None)).params).double()
    scale = case.covariance.diagonal().sqrt()
    errors = (draws.mean(dim=0) - case.mean) / (scale / math.sqrt(num))
    assert float(errors.abs().max()) < 4
    # A product of two normals of correlation r has the variance (1 + r^2) s_i^2 s_j^2.
    found, expected = draws.T.cov(), case.covariance
    outer = torch.outer(scale, scale)
    spread = outer * (1 + (expected / outer) ** 2).sqrt() / math.sqrt(num)
    assert float(((found - expected) / spread).abs().max()) < 4


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_draws_have_the_covariance_of_their_structure(structure: Any) -> None:
    model, data = classifier(num_rows=60)
    posterior, _ = at_module(Laplace(structure), model, data)
    expected = covariance(posterior)
    num = 3000
    draws = torch.stack([posterior.draw(0, index) for index in range(num)]).double() - posterior.mode.double()
    # In units of H each number is standard normal: its squares sum to chi^2, and coordinates are uncorrelated.
    white = draws @ torch.linalg.cholesky(torch.linalg.inv(expected))
    chi = white.square().sum(dim=1)
    assert abs(float(chi.mean()) - 43) < 4 * math.sqrt(2 * 43 / num)
    assert float((white.T.cov() - torch.eye(43)).abs().max()) < 5.5 * math.sqrt(2 / num)  # of 43 * 44 / 2 numbers


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_temperature_divides_the_precision_and_not_the_evidence(structure: Any) -> None:
    model, data = classifier()
    cold = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23, temperature=0.25)
    (warm, first), (other, second) = (at_module(Laplace(structure), one, data) for one in (model, cold))
    torch.testing.assert_close(covariance(other), 0.25 * covariance(warm), rtol=1e-9, atol=1e-12)
    assert second["log_evidence"] == pytest.approx(first["log_evidence"], rel=1e-5)
    assert second["log_density"] == pytest.approx(4 * first["log_density"], rel=1e-5)
    assert second["mode_gap"] == pytest.approx(4 * first["mode_gap"], rel=1e-4)
    factors = [at_module(Laplace(structure, prior_precision="evidence"), one, data)[1] for one in (model, cold)]
    assert factors[1]["prior_factor"] == pytest.approx(factors[0]["prior_factor"], rel=1e-5)


def test_the_gap_to_the_mode_is_exact_for_a_quadratic() -> None:
    case = linear_regression()  # at zero, far from its mode
    _, info = at_module(Laplace("full"), case.model, case.data)
    batch = Batch(*case.data)
    heights = [float(case.model.log_density(flat, batch)[0]) for flat in (torch.zeros(5), case.mean.float())]
    assert heights[1] - heights[0] > 10
    assert info["mode_gap"] == pytest.approx(heights[1] - heights[0], rel=1e-4)


def evidence(case: LinearRegression, prior: float, flat: Tensor | None = None) -> float:
    """Closed-form log p(y) under a prior standard deviation; or Laplace's formula for it at some point."""
    x, y = (tensor.double() for tensor in case.data)
    design = torch.cat([x, torch.ones(30, 1)], dim=1)
    noise = 0.5
    if flat is None:
        spread = prior**2 * design @ design.T + noise**2 * torch.eye(30)
        return float(torch.distributions.MultivariateNormal(torch.zeros(30).double(), spread).log_prob(y[:, 0]))
    likelihood = torch.distributions.Normal(design @ flat.double(), noise).log_prob(y[:, 0]).sum()
    density = torch.distributions.Normal(0.0, prior).log_prob(flat.double()).sum()
    precision = design.T @ design / noise**2 + torch.eye(5) / prior**2
    return float(likelihood + density + 2.5 * math.log(2 * math.pi) - 0.5 * torch.logdet(precision))


def test_the_factor_maximises_the_evidence_at_the_mode() -> None:
    case = at_mean(linear_regression())
    posterior, info = at_module(Laplace("full", prior_precision="evidence"), case.model, case.data)
    grid = torch.logspace(-2, 2, 4001, dtype=torch.float64)
    values = torch.tensor([evidence(case, 1.5 / math.sqrt(float(a)), case.mean) for a in grid[::10]])
    best = float(grid[::10][values.argmax()])
    assert 0.02 < best < 50
    assert abs(best - 1) > 0.1  # the prior's own precision is not the best
    assert info["prior_factor"] == pytest.approx(best, rel=0.03)  # two steps of the grid are 2.3 % each
    assert info["log_evidence"] == pytest.approx(float(values.max()), abs=1e-3)
    x = torch.cat([case.data[0], torch.ones(30, 1)], dim=1).double()
    precision = x.T @ x / 0.5**2 + info["prior_factor"] * torch.eye(5) / 1.5**2
    torch.testing.assert_close(covariance(posterior), torch.linalg.inv(precision), rtol=1e-5, atol=1e-7)


def test_fits_with_the_factor_in_the_prior_come_to_the_maximum_of_the_true_evidence() -> None:
    prior = 1.5
    for _ in range(60):
        case = at_mean(linear_regression(prior=prior))
        factor = at_module(Laplace("full", prior_precision="evidence"), case.model, case.data)[1]["prior_factor"]
        prior /= math.sqrt(factor)
    assert factor == pytest.approx(1.0, abs=1e-4)
    grid = torch.logspace(-1, 1, 801, dtype=torch.float64)
    best = float(grid[torch.tensor([evidence(case, float(scale)) for scale in grid]).argmax()])
    assert abs(best - 1.5) > 0.1
    assert prior == pytest.approx(best, rel=0.01)  # a step of the grid is 0.6 %


def test_a_factor_for_each_tensor_is_the_best_for_each() -> None:
    model, data = classifier()
    options = {"num_steps": 300, "lr": 0.05}
    one = last_info(Laplace("kron", prior_precision="evidence", **options), model, data)  # type: ignore[arg-type]
    each = last_info(Laplace("kron", prior_precision="evidence-per-tensor", **options), model, data)  # type: ignore[arg-type]
    own = last_info(Laplace("kron", **options), model, data)  # type: ignore[arg-type]
    assert own["log_evidence"] < one["log_evidence"] < each["log_evidence"]
    assert {name for name in each if name.startswith("prior_factor")} == {
        f"prior_factor.{name}" for name in model.layout.names
    }
    assert len({round(each[f"prior_factor.{name}"], 3) for name in model.layout.names}) == 4


def test_the_unknown_keeps_its_prior() -> None:
    """Its variance is that of its own information and prior, whatever the factor of the weights."""
    module = nn.Linear(3, 2)
    model = BayesianModel(module, prior=Normal(0.0, 9.0), likelihood=Gaussian(LogNormal(0.0, 0.5)), num_data=7)
    x, y = torch.linspace(-1, 1, 21).view(7, 3) ** 2, torch.linspace(0, 1, 14).view(7, 2)
    for options in (Laplace("full"), Laplace("kron", prior_precision="evidence-per-tensor")):
        posterior, info = at_module(options, model, (x, y))
        assert float(covariance(posterior)[-1, -1]) == pytest.approx(1 / (2 * 2 * 7 + 1 / 0.5**2), rel=1e-6)
        assert not any("@" in name for name in info)
    with_factor = at_module(Laplace("full", prior_precision="evidence"), model, (x, y))[1]
    assert with_factor["prior_factor"] > 2
    bank = fit(model, (x, y), method=Laplace(num_steps=0), num_samples=5)
    assert bool((bank.block(slice(None)).params["@likelihood.scale"] > 0).all())


def test_what_on_leaves_out_stays_at_the_map() -> None:
    model, data = classifier()
    *_, (block, state) = Laplace("full", on="3", num_steps=50).run(model, data, num_samples=6, seed=0)
    params, mode = block.params, model.layout.unflatten(state["climb.flat"][0])
    for name in ("1.weight", "1.bias"):
        assert bool((params[name] == mode[name]).all())
        assert not torch.equal(params[name][0], model.module_params()[name])  # the climb is of all
    for name in ("3.weight", "3.bias"):
        assert len(params[name].unique(dim=0)) == 6
    part = at_module(Laplace("full", on=("*", "!1")), model, data)[0]
    whole = at_module(Laplace("full"), model, data)[0]
    precision = torch.linalg.inv(covariance(whole))[25:, 25:]
    torch.testing.assert_close(covariance(part)[25:, 25:], torch.linalg.inv(precision), rtol=1e-6, atol=1e-8)
    assert float(covariance(part)[:25].abs().max()) == 0


def test_a_bank_knows_several_globs_again(tmp_path: Path) -> None:
    model, data = classifier()
    method = Laplace(on=("*", "!1.bias"), num_steps=10)
    fit(model, data, method=method, num_samples=2, out=tmp_path / "bank")
    assert len(fit(model, data, method=method, num_samples=3, out=tmp_path / "bank", resume=True)) == 3


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_samples_do_not_depend_on_blocks(structure: Any) -> None:
    model, data = classifier()
    banks = [
        fit(model, data, method=Laplace(structure, num_steps=20, block_size=size), num_samples=9, seed=2)
        for size in (2, 9)
    ]
    first, second = (bank.block(slice(None)).params for bank in banks)
    assert all(torch.equal(first[name], second[name]) for name in model.layout.names)


def test_states_hold_the_mode_and_not_the_curvature() -> None:
    model, data = classifier()
    states = [state for _, state in Laplace("full", num_steps=120).run(model, data, num_samples=70, seed=0)]
    assert [state["step"] for state in states] == [50, 100, 120, 184, 190]
    for state in states:
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        assert sum(tensor.numel() for tensor in tensors) == (3 if state["step"] <= 120 else 1) * 43


def test_weights_of_rows_reach_the_curvature() -> None:
    """A sampler's rows enter with the weights that its draws give them on average."""
    model, (x, y) = classifier()
    chances = torch.linspace(1.0, 4.0, 23)
    sampler = WeightedIndexSampler(chances, num_samples=23, seed=0)
    found = at_module(Laplace("full"), model, sampled((x, y), sampler, importance=False))[0]
    weight = 23 * chances / chances.sum()
    whole = full_batch(sampled((x, y), sampler, importance=False))
    torch.testing.assert_close(whole.weight.float(), weight)  # type: ignore[union-attr]
    plain = torch.linalg.inv(covariance(at_module(Laplace("full"), model, (x, y))[0]))
    prior = torch.diag(model.prior_precision(torch.zeros(43)).double())
    expected = torch.zeros(43, 43, dtype=torch.float64)
    for row in range(23):  # the sum over rows, by fits of one row each
        alone = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=1)
        one = at_module(Laplace("full"), alone, (x[row : row + 1], y[row : row + 1]))[0]
        expected += float(weight[row]) * (torch.linalg.inv(covariance(one)) - prior)
    found_precision = torch.linalg.inv(covariance(found)) - prior
    torch.testing.assert_close(found_precision, expected, rtol=1e-4, atol=1e-4)
    assert float((plain - prior - expected).abs().max()) > 0.05


def test_loaders_that_drop_rows_stand_for_all() -> None:
    model, (x, y) = classifier()
    loader = DataLoader(TensorDataset(x, y), batch_size=10, drop_last=True)
    found = torch.linalg.inv(covariance(at_module(Laplace("full"), model, loader)[0]))
    some = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=20)
    part = torch.linalg.inv(covariance(at_module(Laplace("full"), some, (x[:20], y[:20]))[0]))
    prior = torch.diag(model.prior_precision(torch.zeros(43)).double())
    torch.testing.assert_close(found - prior, 23 / 20 * (part - prior), rtol=1e-4, atol=1e-4)


def test_the_best_factor_is_where_the_slope_vanishes() -> None:
    """One direction in closed form: lambda / (lambda + a) = a q."""
    found = best_factor(torch.tensor([3.0], dtype=torch.float64), 0.5)
    expected = (-0.5 * 3 + math.sqrt((0.5 * 3) ** 2 + 4 * 0.5 * 3)) / (2 * 0.5)
    assert found == pytest.approx(expected, rel=1e-9)
    assert best_factor(torch.tensor([3.0]), 0.0) == pytest.approx(1e8, rel=1e-6)
    assert best_factor(torch.tensor([0.0]), 1.0) == pytest.approx(1e-8, rel=1e-6)


def test_memory_is_reckoned_before_anything_is_done() -> None:
    model, data = classifier()
    need = 24 * 43**2
    with pytest.raises(ConfigError, match=rf"at least {need:,} bytes for the curvature of 43 values, got {need - 1:,}"):
        next(Laplace("full", memory=need - 1).run(model, data, num_samples=1, seed=0))
    with pytest.raises(ConfigError, match=r"Laplace\('kron', memory=\).*structure='diag'"):
        next(Laplace("kron", memory=1000).run(model, data, num_samples=1, seed=0))
    assert len(fit(model, data, method=Laplace("full", memory=need, num_steps=0), num_samples=1)) == 1


def test_priors_without_a_fixed_curvature_are_refused() -> None:
    model, data = classifier()
    for prior, match in [
        (bnn.priors.StudentT(4.0), "normal values"),
        (Normal(0.0, LogNormal()), "a prior with fixed scales"),
    ]:  # type: ignore[arg-type]
        other = BayesianModel(model.module, prior=prior, likelihood=model.likelihood, num_data=23)
        with pytest.raises(ConfigError, match=match):
            next(Laplace(num_steps=5).run(other, data, num_samples=1, seed=0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"structure": "lowrank"}, r"Laplace\(structure=\): want one of full, kron, diag"),
        ({"start": "here"}, r"Laplace\(start=\)"),
        ({"prior_precision": "best"}, r"want one of model, evidence, evidence-per-tensor"),
        ({"structure": "full", "prior_precision": "evidence-per-tensor"}, "one factor for 'full'"),
        ({"num_steps": -1}, r"Laplace\(num_steps=\): want at least 0"),
        ({"batch_size": 0}, r"Laplace\(batch_size=\)"),
        ({"block_size": 0}, r"Laplace\(block_size=\)"),
        ({"memory": 0}, r"Laplace\(memory=\)"),
        ({"lr": math.inf}, r"Laplace\(lr=\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Laplace(**options)


@pytest.mark.parametrize(("on", "match"), [("head", "'head', which matches none"), (("*", "!*"), "got none")])
def test_globs_that_choose_nothing_are_refused(on: Any, match: str) -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match=rf"Laplace\(on=\).*{match}"):
        next(Laplace(on=on).run(model, data, num_samples=1, seed=0))


def test_a_climb_that_diverges_is_told_with_its_step() -> None:
    model, data = classifier()
    with pytest.raises(
        FitError, match=r"Laplace: want a finite .*at step 1; the last good one was -[\d.]+; lower lr \(it is 1e\+30\)"
    ):
        list(Laplace(lr=1e30, num_steps=60).run(model, data, num_samples=1, seed=0))


def test_a_module_that_is_not_finite_is_told_without_a_climb() -> None:
    model, data = classifier()
    with torch.no_grad():
        model.module[3].bias.fill_(torch.inf)  # type: ignore[index,union-attr]
    with pytest.raises(FitError, match="finite"):
        list(Laplace(num_steps=0).run(model, data, num_samples=1, seed=0))


def peer(
    oracle: Any, structure: str, module: nn.Module, data: tuple[Tensor, Tensor], precision: float
) -> tuple[Tensor, float]:
    """The posterior precision [P, P] and log evidence of laplace-torch, on a copy, which it changes."""
    with warnings.catch_warnings():
        # Its import, and torch's forward-mode derivatives which it takes, compile functions with torch.jit.script,
        # of which torch 2.13 says that it is deprecated.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        laplace = oracle("laplace")
        found = laplace.Laplace(
            copy.deepcopy(module),
            "classification",
            subset_of_weights="all",
            hessian_structure=structure,
            prior_precision=precision,
        )
        found.fit(DataLoader(TensorDataset(*data), batch_size=len(data[1])))
        total = found.posterior_precision
        log_evidence = float(found.log_marginal_likelihood())
    if structure == "kron":
        total = total.to_matrix()
    total = torch.diag(total) if structure == "diag" else total
    return total.detach().double(), log_evidence


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_laplace_torch_agrees(structure: Any, oracle: Any) -> None:
    start, data = classifier()
    prior = Normal(0.0, 1.7**-0.5)
    model = BayesianModel(start.module, prior=prior, likelihood=start.likelihood, num_data=23)
    expected, log_evidence = peer(oracle, structure, start.module, data, 1.7)
    posterior, info = at_module(Laplace(structure), model, data)
    # Theirs is in float32, whose rounding an inverse multiplies.
    torch.testing.assert_close(torch.linalg.inv(covariance(posterior)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(covariance(posterior), torch.linalg.inv(expected), rtol=1e-4, atol=1e-5)
    assert info["log_evidence"] == pytest.approx(log_evidence, rel=1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.body(x.unflatten(1, (2, 2)))
        return self.head(outputs[:, -1])


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_a_module_whose_rows_cannot_be_taken_apart_is_refused_before_the_climb(structure: Any) -> None:
    _, data = classifier()
    model = BayesianModel(Recurrent(), prior=Normal(), likelihood=Categorical(), num_data=23)
    with pytest.raises(
        ModuleError, match=r"want a module whose rows .* can take one by one, got .*; take structure='kron'"
    ):
        next(Laplace(structure, num_steps=1000).run(model, data, num_samples=2, seed=0))
    head = Laplace("kron", on="head", num_steps=5).run(model, data, num_samples=2, seed=0)
    assert sum(block.num_samples for block, _ in head) == 2


def test_importance_weights_of_a_sampler_keep_the_target() -> None:
    """Rows drawn unlike, with weights that make up for it: the full pass takes each row once, as they are."""
    case = linear_regression()
    sampler = WeightedIndexSampler(torch.linspace(1.0, 3.0, 30), seed=0)
    method = Laplace("full", num_steps=0)
    banks = [
        fit(case.model, case.data, method=method, num_samples=3, **options)
        for options in ({}, {"sampler": sampler, "importance_weights": True})
    ]
    assert torch.equal(banks[0][2]["weight"], banks[1][2]["weight"])
