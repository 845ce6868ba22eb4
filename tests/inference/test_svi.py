"""Guides of Pyro: of every form, against closed forms and the families of our own; what is refused; what stays as it was."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam, PyroSample
from scenarios import LinearRegression, classifier, linear_regression
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.batches import full_batch, num_batches
from bnn.errors import ConfigError, FitError, NotConverged
from bnn.fitting import fit
from bnn.inference import Guide, svi
from bnn.inference.climbing import weighted_batches
from bnn.inference.families import NormalFamily
from bnn.inference.gradients import height_of
from bnn.inference.guide import family_loss
from bnn.model import BayesianModel
from bnn.samplers import WeightedIndexSampler
from bnn.seeding import generator, isolated
from bnn.types import Batch

SIZE = 5  # values of scenarios.linear_regression(): weight [1, 4], bias [1]


def flat_guide(x: Tensor, y: Tensor) -> None:
    """A mean-field normal over all values, as a function."""
    loc = pyro.param("loc", lambda: torch.zeros(SIZE))
    scale = pyro.param("scale", lambda: torch.full((SIZE,), 0.1), constraint=constraints.positive)
    pyro.sample("theta", dist.Normal(loc, scale).to_event(1))


def site_guide(x: Tensor, y: Tensor) -> None:
    """One of a site a parameter."""
    for name, shape in (("weight", (1, 4)), ("bias", (1,))):
        loc = pyro.param(f"{name}.loc", lambda shape=shape: torch.zeros(shape))
        scale = pyro.param(f"{name}.scale", lambda shape=shape: torch.full(shape, 0.1), constraint=constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))


class ModuleGuide(PyroModule):
    """One as a module with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(SIZE))
        self.scale = PyroParam(torch.full((SIZE,), 0.1), constraint=constraints.positive)

    def forward(self, x: Tensor, y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(self.loc, self.scale).to_event(1))


def own_model(x: Tensor, y: Tensor) -> None:
    """scenarios.linear_regression() written in Pyro."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 4), 1.5).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(1), 1.5).to_event(1))
    with pyro.plate("rows", 30, subsample=x):
        pyro.sample("y", dist.Normal(x @ weight.T + bias, 0.5).to_event(1), obs=y)


@contextmanager
def untouched() -> Iterator[None]:
    """Fail if torch's global random state, Pyro's store or its settings are not as before, also after an exception."""
    random_state, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    local = pyro.settings.get("module_local_params")
    try:
        yield
    finally:
        assert torch.equal(random_state, torch.get_rng_state())
        after = dict(pyro.get_param_store().items())
        assert after.keys() == store.keys()
        assert all(torch.equal(after[name], value) for name, value in store.items())
        assert pyro.settings.get("module_local_params") == local


def started(case: LinearRegression) -> LinearRegression:
    """The scenario with its module at the mean of the posterior, for fits of few steps."""
    module = case.model.module
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), case.mean.split([4, 1]), strict=True):
            parameter.copy_(value.view(parameter.shape))
    return case


# Every form of a guide


FORMS: dict[str, dict[str, Any]] = {
    "by name": {"family": "AutoNormal"},
    "class": {"family": autoguide.AutoDiagonalNormal},
    "partial": {"family": functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=2, init_scale=0.05)},
    "function": {"family": flat_guide},
    "module": {"family": ModuleGuide()},
    "by name, a site a parameter": {"family": "AutoNormal", "sites": "parameter"},
    "function, a site a parameter": {"family": site_guide, "sites": "parameter"},
    "function, own model": {"family": site_guide, "sites": "parameter", "pyro_model": own_model},
    "by name, own model": {"family": "AutoNormal", "sites": "parameter", "pyro_model": own_model},
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_of_a_guide_makes_a_bank(name: str) -> None:
    """Whose values come nearer to the posterior; the user's store and settings are as before."""
    case = linear_regression()
    guide = Guide(**FORMS[name], num_steps=60, batch_size=7, lr=0.1)
    with untouched():
        bank = fit(case.model, case.data, method=guide, num_samples=8, seed=0)
    block = bank.block(slice(None))
    assert {key: value.shape for key, value in block.params.items()} == {"weight": (8, 1, 4), "bias": (8, 1)}
    flat = case.model.layout.flatten(block.params)
    assert len(flat.unique(dim=0)) == 8
    distance = (flat.mean(dim=0) - case.mean).norm() / case.mean.norm()
    assert float(distance) < 0.6  # from zeros, at distance 1
    json.dumps(dict(bank.info["method"]))


def test_the_users_module_is_unchanged() -> None:
    guide = ModuleGuide()
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    case = linear_regression()
    first = fit(case.model, case.data, method=Guide(guide, num_steps=3), num_samples=2, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())
    assert all(value.grad is None for value in guide.parameters())
    again = fit(case.model, case.data, method=Guide(guide, num_steps=3), num_samples=2, seed=0)
    assert torch.equal(first[1]["weight"], again[1]["weight"])


def test_an_automatic_guide_starts_at_the_modules_values() -> None:
    case = started(linear_regression())
    for sites in ("flat", "parameter"):
        guide = Guide(functools.partial(autoguide.AutoNormal, init_scale=1e-4), num_steps=1, lr=1e-9, sites=sites)  # type: ignore[arg-type]
        flat = case.model.layout.flatten(fit(case.model, case.data, method=guide, num_samples=1)[0])
        torch.testing.assert_close(flat.double(), case.mean, rtol=0, atol=1e-3)


def test_a_start_that_the_user_gave_is_taken() -> None:
    case = linear_regression()
    start = autoguide.init_to_value(values={"theta": torch.full((SIZE,), 3.0)})
    family = functools.partial(autoguide.AutoNormal, init_loc_fn=start, init_scale=1e-4)
    bank = fit(case.model, case.data, method=Guide(family, num_steps=1, lr=1e-9), num_samples=1)
    assert float((bank[0]["weight"] - 3.0).abs().max()) < 1e-2


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (flat_guide, f"{__name__}:flat_guide"),
        (autoguide.AutoNormal, "pyro.infer.autoguide.guides:AutoNormal"),
        (ModuleGuide(), f"{__name__}:ModuleGuide"),
        (
            functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=3),
            {"partial": "pyro.infer.autoguide.guides:AutoLowRankMultivariateNormal", "rank": 3},
        ),
        ("AutoNormal", "AutoNormal"),
    ],
)
def test_banks_name_their_guide(family: Any, expected: Any) -> None:
    from bnn.fitting import method_options

    guide = Guide(family, num_steps=1)
    options = method_options(guide)
    assert options["family"] == expected
    assert json.loads(json.dumps(options)) == options
    assert guide.name == "guide"


# The posterior


@pytest.mark.parametrize("options", [{}, {"sites": "parameter"}, {"sites": "parameter", "pyro_model": own_model}])
def test_any_normal_stays_at_the_posterior(options: dict[str, Any]) -> None:
    """Started at its mean, in the form of whichever site: the covariance is found, and the mean is left."""
    case = started(linear_regression())
    guide = Guide("AutoMultivariateNormal", num_steps=700, batch_size=30, lr=0.04, **options)
    bank = fit(case.model, case.data, method=guide, num_samples=300, seed=1)
    flat = case.model.layout.flatten(bank.block(slice(None)).params).double()
    root = torch.linalg.cholesky(case.covariance)
    whitened = torch.linalg.solve_triangular(root, (flat - case.mean).T, upper=False)
    # 4 standard errors of 300 draws, and the end of a short optimisation.
    assert float(whitened.mean(dim=1).abs().max()) < 4 / math.sqrt(300) + 0.3
    found = torch.linalg.eigvalsh(whitened.cov())
    assert float(found.min()) > 0.35
    assert float(found.max()) < 2.2


def test_the_density_of_sites_is_that_of_the_model() -> None:
    """With positive sites: their change of variables is the guide's part, so the factor is the plain log joint."""
    x = torch.randn(6, 3, generator=generator(0, "x"))
    model = BayesianModel(
        nn.Linear(3, 1), prior=priors.Normal(), likelihood=likelihoods.Gaussian(priors.LogNormal()), num_data=12
    )
    batch = Batch(x, torch.ones(6, 1))
    params = model.sample_prior(0, "params")
    program = pyro.poutine.condition(svi.density, data=params)
    trace = pyro.poutine.trace(program).get_trace(model, "parameter", batch, 0.7)
    assert float(trace.log_prob_sum()) == pytest.approx(float(model.log_joint(params, batch, weight=0.7)), rel=1e-6)


@pytest.mark.parametrize("prior", [priors.Normal(0.0, 2.0), priors.Normal(scale=priors.LogNormal())])
def test_positive_sites_stay_positive(prior: Any) -> None:
    """Under a wide guide, which would reach below zero were it on the values themselves."""
    model = BayesianModel(
        nn.Linear(1, 1), prior=prior, likelihood=likelihoods.Gaussian(priors.LogNormal(-1.0, 1.0)), num_data=9
    )
    x = torch.linspace(-1, 1, 9).unsqueeze(1)
    family = functools.partial(autoguide.AutoNormal, init_scale=2.0)
    bank = fit(model, (x, 0.5 * x), method=Guide(family, num_steps=2, sites="parameter"), num_samples=60, seed=0)
    names = [name for name in model.layout.names if name.startswith("@")]
    assert "@likelihood.scale" in names
    for name in names:
        drawn = bank.block(slice(None)).params[name]
        assert bool((drawn > 0).all())
        assert float(drawn.log().std()) > 1.0


def test_further_sites_of_an_own_model_are_fitted_and_left_out_of_the_bank() -> None:
    """The noise is unknown to the BayesianModel: a site of the Pyro model alone, which the guide has to cover."""
    seen = []

    def wider(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 4), 1.5).to_event(2))
        bias = pyro.sample("bias", dist.Normal(torch.zeros(1), 1.5).to_event(1))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        seen.append(float(noise.detach()))
        with pyro.plate("rows", 30, subsample=x):
            pyro.sample("y", dist.Normal(x @ weight.T + bias, noise).to_event(1), obs=y)

    case = started(linear_regression())
    guide = Guide("AutoNormal", num_steps=400, batch_size=30, lr=0.1, sites="parameter", pyro_model=wider)
    bank = fit(case.model, case.data, method=guide, num_samples=3, seed=0)
    assert bank.layout.names == ("weight", "bias")
    residual = case.data[1].double().squeeze(1) - torch.cat([case.data[0], torch.ones(30, 1)], 1).double() @ case.mean
    assert sum(seen[-50:]) / 50 == pytest.approx(float(residual.square().mean().sqrt()), rel=0.35)
    with pytest.raises(ConfigError, match="want a guide of the site 'noise', got one of weight, bias"):
        fit(case.model, case.data, method=Guide(site_guide, sites="parameter", pyro_model=wider), num_samples=1)


# Gradients


class Unreparameterised(dist.Normal):  # type: ignore[misc]
    """A normal that can be sampled, and no more."""

    has_rsample = False

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        raise AssertionError("drawn by rsample")

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return torch.normal(self.loc.expand(self._extended_shape(sample_shape)), self.scale)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        return super().expand(batch_shape, self._get_checked_instance(Unreparameterised, _instance))


def gradients(kind: Any, case: LinearRegression, loc: Tensor, scale: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """ELBOs [S] of a normal guide and their gradients [S, 2 P] in loc and log scale."""

    def guide(x: Tensor, y: Tensor) -> None:
        here = pyro.param("loc", lambda: loc.clone())
        spread = pyro.param("scale", lambda: scale.clone(), constraint=constraints.positive)
        pyro.sample("theta", kind(here, spread).to_event(1))

    batch = full_batch(case.data)
    fitted = svi.build(guide, "flat", None, case.model, batch, 0)
    named = svi.parameters(fitted)
    assert list(named) == ["store.loc", "store.scale"]
    values, slopes = [], []
    with svi.apart(fitted.store), isolated(0, "gradients"):
        for _ in range(num):
            one = -svi.loss(fitted, batch, 1.0)
            slopes.append(torch.cat(torch.autograd.grad(one, list(named.values()))))
            values.append(one.detach())
    return torch.stack(values).double(), torch.stack(slopes).double()


def test_gradients_by_the_score_and_by_reparameterised_draws_are_those_in_closed_form() -> None:
    """ELBO(q) = log evidence - KL(q || posterior); within 4 standard errors, of which the score has far larger ones."""
    case = linear_regression(num_rows=5, num_inputs=1, noise=0.3)
    spread = case.covariance.diagonal().sqrt().float()
    start, width = case.mean.float() + 1.5 * spread, spread.clone()
    loc, log_scale = (value.double().requires_grad_() for value in (start, width.log()))
    posterior = MultivariateNormal(case.mean, case.covariance)
    elbo = case.log_evidence - kl_divergence(MultivariateNormal(loc, (2 * log_scale).exp().diag()), posterior)
    expected = torch.cat(torch.autograd.grad(elbo, [loc, log_scale]))
    variances = []
    for kind, num in ((dist.Normal, 300), (Unreparameterised, 4500)):
        values, slopes = gradients(kind, case, start, width, num)
        error = slopes.std(dim=0) / math.sqrt(num)
        assert abs(float(values.mean() - elbo.detach())) < 4 * float(values.std()) / math.sqrt(num)
        assert float(((slopes.mean(dim=0) - expected).abs() / error).max()) < 4
        assert float((expected.abs() / error).max()) > 7  # a gradient of nothing would be seen
        variances.append(slopes.var(dim=0))
    assert bool((variances[0] < variances[1]).all())
    assert float((variances[1] / variances[0]).max()) > 5


def test_banks_of_a_guide_without_reparameterised_draws_have_its_draws() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.full((SIZE,), 1.5))
        pyro.sample("theta", Unreparameterised(loc, torch.full((SIZE,), 0.2)).to_event(1))

    case = linear_regression()
    bank = fit(case.model, case.data, method=Guide(guide, num_steps=3, lr=1e-3), num_samples=400, seed=0)
    flat = case.model.layout.flatten(bank.block(slice(None)).params)
    assert float((flat.mean(dim=0) - 1.5).abs().max()) < 4 * 0.2 / 20 + 3e-3
    assert float((flat.std(dim=0) / 0.2 - 1).abs().max()) < 4 / math.sqrt(800)
    assert float(bank[0]["bias"]) != 1.5


def test_our_mean_field_has_the_loss_of_pyros() -> None:
    """The ELBO and its gradient at the same parameters agree in expectation with AutoDiagonalNormal's under Trace_ELBO."""
    case = linear_regression(num_rows=11, num_inputs=3)
    batch, num = full_batch(case.data), 250
    spread = case.covariance.diagonal().sqrt().float()
    loc, width = case.mean.float() + spread, 1.5 * spread
    fitted = svi.build(autoguide.AutoDiagonalNormal, "flat", None, case.model, batch, 0)
    theirs = svi.parameters(fitted)
    names = "loc", "scale_unconstrained"
    ours = NormalFamily(loc, width, 0, generator(0, "x"))
    with torch.no_grad():
        theirs["loc"].copy_(loc)
        theirs["scale_unconstrained"].copy_(ours.parameters["scale_unconstrained"])
    found: list[Tensor] = []
    for kind in ("ours", "theirs"):
        leaves = [(ours.parameters if kind == "ours" else theirs)[name] for name in names]
        rows = []
        with svi.apart(fitted.store), isolated(0, kind):
            for _ in range(num):
                if kind == "ours":
                    loss = family_loss([ours.draw(torch.randn(4))], height_of(case.model), batch, 1.0)
                else:
                    loss = svi.loss(fitted, batch, 1.0)
                slope = torch.autograd.grad(loss, leaves)
                rows.append(torch.cat([loss.detach().view(1), *slope]))
        found.append(torch.stack(rows).double())
    one, other = found
    error = ((one.var(dim=0) + other.var(dim=0)) / num).sqrt()
    assert float(((one.mean(dim=0) - other.mean(dim=0)).abs() / error).max()) < 4
    assert float((one.mean(dim=0).abs() / error).median()) > 4


def test_losses_of_minibatches_average_to_that_of_all_rows() -> None:
    """At the same draw, over an epoch whose last batch is short: rows with the weights of `weighted_batches`."""
    model, data = classifier()
    start = model.unconstrain(model.module_params())
    family = NormalFamily(start, torch.full_like(start, 0.2), 0, generator(0, "x"))
    normals = torch.randn(len(start), generator=generator(0, "z"))
    whole = family_loss([family.draw(normals)], height_of(model), full_batch(data), 1.0)
    batches = weighted_batches(model, data, 7, seed=0)
    count = num_batches(data, 7)
    parts = [family_loss([family.draw(normals)], height_of(model), *next(batches)) for _ in range(count)]
    assert float(torch.stack(parts).mean().detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    assert float(torch.stack(parts).std().detach()) > 0.1


# What stays as it was


def failing(x: Tensor, y: Tensor) -> None:
    flat_guide(x, y)
    torch.rand(3)
    if float(pyro.param("loc").detach().abs().max()) > 0:
        raise RuntimeError("mine")


def test_the_users_store_is_as_before_after_an_exception() -> None:
    pyro.param("loc", torch.ones(3))
    case = linear_regression()
    try:
        with untouched(), pytest.raises(RuntimeError, match="mine"):
            fit(case.model, case.data, method=Guide(failing, num_steps=5), num_samples=1)
        assert torch.equal(pyro.param("loc"), torch.ones(3))
    finally:
        pyro.get_param_store().clear()


@pytest.mark.parametrize(
    ("family", "sites"), [(flat_guide, "flat"), (site_guide, "parameter"), (ModuleGuide(), "flat")]
)
def test_a_run_goes_on_from_every_state_with_the_same_bits(family: Any, sites: Any) -> None:
    """Also with a parameter store of the user's that has the same names."""
    case = linear_regression()
    guide = Guide(family, num_steps=70, batch_size=7, lr=0.05, sites=sites, block_size=2)
    whole = [
        (block, {key: torch.clone(v) if isinstance(v, Tensor) else v for key, v in state.items()})
        for block, state in guide.run(case.model, case.data, num_samples=3, seed=0)
    ]
    names = {key for key in whole[0][1] if key.startswith("value.")}
    if family is flat_guide:
        assert names == {"value.store.loc", "value.store.scale"}
    pyro.param("loc", torch.full((SIZE,), 9.0))
    try:
        for at in range(len(whole) - 1):
            rest = list(guide.run(case.model, case.data, num_samples=3, seed=0, state=whole[at][1]))
            assert len(rest) == len(whole) - at - 1
            for (block, state), (expected, last) in zip(rest, whole[at + 1 :], strict=True):
                assert all(torch.equal(block.params[name], expected.params[name]) for name in block.params)
                assert all(torch.equal(state[key], last[key]) for key in names)
    finally:
        pyro.get_param_store().clear()


def test_a_bank_of_a_guide_that_is_a_function_is_resumed(tmp_path: Path) -> None:
    case = linear_regression()
    guide = Guide(flat_guide, num_steps=60, batch_size=7)
    whole = fit(case.model, case.data, method=guide, num_samples=4, seed=0)
    fit(case.model, case.data, method=guide, num_samples=2, seed=0, out=tmp_path / "bank")
    grown = fit(case.model, case.data, method=guide, num_samples=4, seed=0, out=tmp_path / "bank", resume=True)
    assert torch.equal(grown[3]["weight"], whole[3]["weight"])
    assert Bank.open(tmp_path / "bank").info["method"]["options"]["family"] == f"{__name__}:flat_guide"


# What is refused


def with_sites(*names_and_shapes: tuple[str, tuple[int, ...]]) -> Any:
    def program(x: Tensor, y: Tensor) -> None:
        for name, shape in names_and_shapes:
            pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))

    return program


WEIGHT, BIAS = ("weight", (1, 4)), ("bias", (1,))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"family": with_sites(("tetha", (5,)))},
            "want a guide of the site 'theta', got one of tetha; add pyro.sample",
        ),
        ({"family": with_sites()}, "want a guide of the site 'theta', got one of none"),
        ({"family": with_sites(("theta", (4,)))}, r"site 'theta': want a value of shape \[5\], got \[4\]"),
        (
            {"family": with_sites(("theta", (5,)), ("z", ()))},
            "want sites of the model: theta, got 'z', which it has not",
        ),
        ({"family": with_sites(WEIGHT), "sites": "parameter"}, "want a guide of the site 'bias', got one of weight"),
        (
            {"family": with_sites(WEIGHT, ("bias", (2,))), "sites": "parameter"},
            r"Guide site 'bias': want a value of shape \[1\], got \[2\]",
        ),
        (
            {"family": "AutoNormal", "sites": "parameter", "pyro_model": with_sites(WEIGHT)},
            r"Guide\(pyro_model=\): want a site named 'bias', as the parameter, got sites weight",
        ),
        (
            {"family": "AutoNormal", "sites": "parameter", "pyro_model": with_sites(("weight", (4,)), BIAS)},
            r"Guide\(pyro_model=\) site 'weight': want a value of shape \[1, 4\], got \[4\]",
        ),
        ({"family": autoguide.AutoLaplaceApproximation}, "want a guide whose covariance is positive"),
        (
            {"family": functools.partial(autoguide.AutoLaplaceApproximation)},
            "want a guide whose covariance is positive",
        ),
    ],
)
def test_guides_that_do_not_fit_the_model_are_refused(options: dict[str, Any], match: str) -> None:
    case = linear_regression()
    with untouched(), pytest.raises(ConfigError, match=match):
        fit(case.model, case.data, method=Guide(**options, num_steps=2), num_samples=1)


def test_auxiliary_sites_of_a_guide_are_allowed() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.tensor(0.1), constraint=constraints.positive)
        common = pyro.sample("common", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Normal(common.expand(SIZE), 1e-4 + 0 * scale).to_event(1))

    case = linear_regression()
    bank = fit(case.model, case.data, method=Guide(guide, num_steps=1), num_samples=3)
    assert all(float(bank[index]["weight"].std()) < 1e-3 for index in range(3))
    assert float(torch.stack([bank[index]["bias"] for index in range(3)]).std()) > 0.01


def test_a_guide_without_parameters_is_refused() -> None:
    case = linear_regression()
    with pytest.raises(ConfigError, match="parameter"):
        fit(case.model, case.data, method=Guide(with_sites(("theta", (SIZE,))), num_steps=1), num_samples=1)


@pytest.mark.parametrize("sites", ["flat", "parameter"])
def test_guides_that_are_not_told_where_to_start_are_fitted(sites: Any) -> None:
    """Those that draw their first values from the model: normalizing flows, and functions that make a guide."""

    def made(rank: int, model: Any) -> Any:
        return autoguide.AutoLowRankMultivariateNormal(model, rank=rank)

    model = BayesianModel(
        nn.Linear(3, 1), prior=priors.Normal(), likelihood=likelihoods.Gaussian(priors.LogNormal()), num_data=6
    )
    data = torch.ones(6, 3), torch.ones(6, 1)
    for family in ("AutoIAFNormal", functools.partial(made, 2)):
        bank = fit(model, data, method=Guide(family, num_steps=2, sites=sites), num_samples=20)
        assert bool((bank.block(slice(None)).params["@likelihood.scale"] > 0).all())
        assert float(bank.block(slice(None)).params["weight"].std()) > 0.01


def test_what_an_own_model_would_leave_out_is_refused() -> None:
    """Its density knows no temperature of the BayesianModel, nor importance weights of rows."""
    case = linear_regression()
    guide = Guide("AutoNormal", num_steps=2, batch_size=7, sites="parameter", pyro_model=own_model)
    sampler = WeightedIndexSampler(torch.arange(1.0, 31.0))
    with pytest.raises(ConfigError, match=r"Guide\(pyro_model=\): .*importance weights"):
        fit(case.model, case.data, method=guide, num_samples=1, sampler=sampler, importance_weights=True)
    module, prior, likelihood = case.model.module, case.model.prior, case.model.likelihood
    cold = BayesianModel(module, prior=prior, likelihood=likelihood, num_data=30, temperature=0.1)
    with pytest.raises(ConfigError, match=r"Guide\(pyro_model=\): .*temperature 0.1"):
        fit(cold, case.data, method=guide, num_samples=1)


def test_an_own_model_may_be_a_module() -> None:
    """Whose own parameters are fitted too, in a copy, but for frozen ones."""

    class Own(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(0.0))
            self.factor = nn.Parameter(torch.tensor(1.5), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor) -> None:
            own_model(x, y - self.factor * self.shift)

    case, module = linear_regression(), Own()
    guide = Guide("AutoNormal", num_steps=20, sites="parameter", pyro_model=module)
    *_, (_, state) = guide.run(case.model, case.data, num_samples=1, seed=0)
    assert float(module.shift.detach()) == 0.0
    (shift,) = (value for key, value in state.items() if key.startswith("value.") and key.endswith("shift"))
    assert float(shift) != 0.0
    assert all(float(value) == 1.5 for key, value in state.items() if key.startswith("value.") and "factor" in key)


FLAT = "AutoNormal"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"family": "AutoFoo"}, "want one of mean-field, .*AutoNormal.*, got 'AutoFoo'"),
        ({"family": "AutoLaplaceApproximation"}, "want a guide whose covariance is positive.*use the method Laplace"),
        ({"family": "AutoNormal", "rank": 3}, r"Guide\(rank=\): want none for a guide of Pyro"),
        ({"family": flat_guide, "init_scale": 0.1}, r"Guide\(init_scale=\): want none for a guide of Pyro"),
        ({"family": 3}, "want a family or a guide, got 3"),
        ({"sites": "parameter"}, r"Guide\(sites=, pyro_model=\): want a guide of Pyro, got 'mean-field'"),
        ({"family": "full-rank", "pyro_model": own_model}, "want a guide of Pyro, got 'full-rank'"),
        ({"family": "map", "sites": "parameter"}, "want a guide of Pyro, got 'map'"),
        ({"family": FLAT, "pyro_model": own_model}, r"Guide\(pyro_model=\): want sites='parameter', got 'flat'"),
        ({"family": FLAT, "sites": "site"}, r"Guide\(sites=\): want one of flat, parameter, got 'site'"),
        ({"family": "low-rank", "variance_reduction": "local"}, "unless weights are independent, got local"),
        ({"family": "flow", "variance_reduction": "flipout"}, "unless weights are independent, got flipout"),
        ({"family": FLAT, "variance_reduction": "local"}, "unless weights are independent, got local"),
        ({"family": "map", "variance_reduction": "antithetic"}, "want 'none' for this family, got antithetic"),
        ({"family": flat_guide, "variance_reduction": "antithetic"}, "want 'none' for this family, got antithetic"),
        ({"variance_reduction": "rao"}, "want one of none, antithetic, local, flipout, got 'rao'"),
        ({"family": "flow", "draws": "sobol"}, r"Guide\(draws=\): want none for a guide that is no normal of ours"),
        ({"family": FLAT, "draws": "mean"}, r"Guide\(draws=\): want none for a guide that is no normal of ours"),
        ({"family": flat_guide, "draws": "antithetic"}, r"Guide\(draws=\): want none for a guide that is no normal"),
        ({"memory": 0}, r"Guide\(memory=\): want at least 1, got 0"),
        ({"hidden": 0}, r"Guide\(hidden=\): want at least 1, got 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Guide(**options)


# What a run says


@pytest.mark.parametrize("family", ["mean-field", "flow", "AutoNormal", flat_guide])
def test_a_loss_that_is_not_finite_names_its_step_and_the_last_good_elbo(family: Any) -> None:
    """Targets so large that their squares overflow, from a batch in the middle of the run on."""
    case = linear_regression()
    guide = Guide(family, num_steps=60, batch_size=30, lr=1e25)
    with pytest.raises(FitError) as caught:
        list(guide.run(case.model, case.data, num_samples=1, seed=0))
    message = str(caught.value)
    if family in ("mean-field", "flow"):
        assert (
            "want a finite loss and gradient, got a loss that is not at step 1; the last good ELBO a row was -"
            in message
        )
    assert "lower lr" in message


class Explodes(nn.Module):
    """A layer whose outputs are NaN from a call in the second stretch of steps on, before a trace takes its place."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return self.layer(x) * (math.nan if type(self).calls >= 54 else 1.0)


@pytest.mark.parametrize("family", ["mean-field", "AutoNormal"])
def test_the_last_good_elbo_is_that_before_the_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second stretch of steps, the first of which was kept in a state."""
    monkeypatch.setattr(Explodes, "calls", 0)
    case = linear_regression()
    model = BayesianModel(Explodes(), prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=30)
    run = Guide(family, num_steps=100, batch_size=30).run(model, case.data, num_samples=1, seed=0)
    _, state = next(run)
    assert state["step"] == 50
    with pytest.raises(FitError, match=r"a loss that is not at step 5\d; the last good ELBO a row was -\d") as caught:
        next(run)
    good = float(str(caught.value).split("a row was ")[1].split(";")[0])
    assert good == pytest.approx(state["info"]["elbo_per_row"], rel=0.6)


PAIRS: Any = {"variance_reduction": "antithetic"}  # so that the noise of the ELBO does not hide its trend


def test_a_fit_of_too_few_steps_warns() -> None:
    case = linear_regression()
    guide = Guide(num_steps=200, batch_size=30, **PAIRS)
    with pytest.warns(NotConverged, match=r"Guide\('mean-field'\): the ELBO a row still rose .* last quarter of 200"):
        fit(case.model, case.data, method=guide, num_samples=1)


def test_a_fit_that_has_settled_does_not_warn() -> None:
    case = started(linear_regression())
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConverged)
        fit(case.model, case.data, method=Guide(num_steps=400, batch_size=30, lr=0.05), num_samples=1)


def test_too_few_steps_to_tell_do_not_warn() -> None:
    """With fewer than two a window, even where the ELBO rises without noise: 40 steps of the same do warn."""
    case = linear_regression()
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotConverged)
        fit(
            case.model,
            case.data,
            method=Guide(num_steps=39, batch_size=30, lr=0.03, init_scale=1e-3, **PAIRS),
            num_samples=1,
        )
    with pytest.warns(NotConverged):
        fit(
            case.model,
            case.data,
            method=Guide(num_steps=40, batch_size=30, lr=0.03, init_scale=1e-3, **PAIRS),
            num_samples=1,
        )


def test_the_warning_is_the_same_after_a_resume() -> None:
    case = linear_regression()
    guide = Guide(num_steps=200, batch_size=30, **PAIRS)
    texts = []
    run = guide.run(case.model, case.data, num_samples=1, seed=0)
    state = [next(run)[1] for _ in range(3)][2]  # within the last half, whose quarters are compared
    for at in (None, state):
        with pytest.warns(NotConverged) as caught:
            list(guide.run(case.model, case.data, num_samples=1, seed=0, state=at))
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


def test_sites_may_be_attributes_of_a_module() -> None:
    class Attributes(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(SIZE))
            self.theta = PyroSample(lambda self: dist.Normal(self.loc, 0.1).to_event(1))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.theta  # type: ignore[no-any-return]

    case = linear_regression()
    bank = fit(case.model, case.data, method=Guide(Attributes(), num_steps=40, lr=0.1), num_samples=2, seed=0)
    assert float(bank[0]["weight"].abs().max()) > 0.5  # it has moved


# What goes wrong in programs of users


def test_an_automatic_guide_that_was_made_before_is_fitted_and_left_as_it_was() -> None:
    """Pyro takes the model away from such a guide when it is copied."""
    case = linear_regression()
    guide = autoguide.AutoNormal(own_model)
    before = guide.model
    model, data = case.model, case.data
    bank = fit(model, data, method=Guide(guide, num_steps=5, sites="parameter", pyro_model=own_model), num_samples=2)
    assert len(bank) == 2
    assert guide.model is before
    assert guide.prototype_trace is None


def late_guide(x: Tensor, y: Tensor) -> None:
    flat_guide(x, y)
    if (count := len(late_guide.calls)) > 9:  # type: ignore[attr-defined]
        pyro.param(f"late{count}", torch.zeros(()))
    late_guide.calls.append(count)  # type: ignore[attr-defined]


late_guide.calls = []  # type: ignore[attr-defined]


def without_event(x: Tensor, y: Tensor) -> None:
    pyro.sample("theta", dist.Normal(pyro.param("loc", torch.zeros(5)), 0.1))


def detached(x: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(5)).detach()
    pyro.sample("theta", dist.Normal(loc, 0.1).to_event(1))


def without_arguments() -> None:
    pyro.sample("theta", dist.Normal(pyro.param("loc", torch.zeros(5)), 0.1).to_event(1))


class NotMade(pyro.nn.PyroModule):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("family", "match"),
    [
        (late_guide, "want all parameters at its first call, got 'store.late10' later"),
        (without_event, r"want sites whose tensors are one event each.*to_event"),
        (detached, "want a loss that depends on the guide's parameters"),
        (without_arguments, r"want a guide of inputs and targets, guide\(x, y\)"),
        (NotMade, "want a class or functools.partial that makes a guide from a Pyro model alone"),
    ],
)
def test_common_mistakes_in_a_guide_are_told_in_words(family: Any, match: str) -> None:
    case = linear_regression()
    with pytest.raises(ConfigError, match=match):
        fit(case.model, case.data, method=Guide(family, num_steps=60), num_samples=2)
