"""The scaling contract: N and the temperature exist in one place; and scales that are unknown, against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scenarios import classifier, effective_sample_size, linear_regression
from torch import Tensor, nn

from bnn import inference, likelihoods, priors
from bnn.bank import Bank
from bnn.errors import ConfigError
from bnn.fitting import fit
from bnn.model import BayesianModel
from bnn.priors import FanIn, HalfCauchy, Laplace, LogNormal, Normal, ScaleMixture, StudentT
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
    found = model.log_likelihood(params, Batch(x, y))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), log_likelihood)
    log_prior = priors.log_prob(model.prior, model.layout.entries, params)
    torch.testing.assert_close(model.log_joint(params, Batch(x, y)), found + log_prior)


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
    torch.testing.assert_close(found, expected, rtol=1.3e-6, atol=0.0)
    assert found.dtype == torch.float64
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


# Unknown scales of the prior

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")  # 12, 4, 8 and 2 values
WEIGHTS, BIASES = ("0.weight", "2.weight"), ("0.bias", "2.bias")
FAN_IN = {"0.weight": 3, "2.weight": 4}
UNKNOWNS = {name: f"@prior.scale.{name}" for name in NAMES}

# A prior, the names of its unknowns, and the unknown that each entry has.
HIERARCHIES: dict[str, tuple[priors.Prior, tuple[str, ...], dict[str, str]]] = {
    "one": (Normal(0.3, HalfCauchy(0.7)), ("@prior.scale",), dict.fromkeys(NAMES, "@prior.scale")),
    "by glob": (
        Laplace(scale={"*.bias": LogNormal(-1.0, 0.4), "2": 0.5, "*": HalfCauchy(1.5)}),
        ("@prior.scale.*", "@prior.scale.*.bias"),
        {"0.weight": "@prior.scale.*", "0.bias": "@prior.scale.*.bias", "2.bias": "@prior.scale.*.bias"},
    ),
    "one an entry": (
        ScaleMixture(loc=-0.2, scale=LogNormal(0.1, 0.6), shared=False),
        tuple(UNKNOWNS.values()),
        UNKNOWNS,
    ),
    "fan-in": (
        FanIn(HalfCauchy(1.2), LogNormal(0.2, 0.3), StudentT(3.0)),
        ("@prior.scale", "@prior.bias_scale"),
        dict.fromkeys(WEIGHTS, "@prior.scale") | dict.fromkeys(BIASES, "@prior.bias_scale"),
    ),
    "fan-in, one an entry": (
        FanIn(0.8, HalfCauchy(0.4), shared=False),
        ("@prior.bias_scale.0.bias", "@prior.bias_scale.2.bias"),
        {name: f"@prior.bias_scale.{name}" for name in BIASES},
    ),
}
hierarchies = pytest.mark.parametrize("case", HIERARCHIES)


def hierarchy(
    case: str, dtype: torch.dtype = torch.float32, scale: float | priors.PositivePrior = 0.5
) -> BayesianModel:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    return BayesianModel(module, prior=HIERARCHIES[case][0], likelihood=likelihoods.Gaussian(scale), num_data=7)


def non_centred(case: str, u: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """theta = loc + s z / sqrt(fan_in) and its log Jacobian, one sample, value by value."""
    prior, names, unknown_of = HIERARCHIES[case]
    theta = {name: value.exp() if name.startswith("@") else value for name, value in u.items()}
    log_jacobian = sum((u[name] for name in u if name.startswith("@")), torch.zeros((), dtype=torch.float64))
    loc = getattr(prior, "loc", 0.0)
    for name, unknown in unknown_of.items():
        by = 1 / math.sqrt(FAN_IN[name]) if isinstance(prior, FanIn) and name in FAN_IN else 1.0
        theta[name] = loc + theta[unknown] * by * u[name]
        for _ in range(u[name].numel()):
            log_jacobian = log_jacobian + math.log(by) + u[unknown]
    assert set(unknown_of.values()) == set(names)
    return theta, log_jacobian


@hierarchies
def test_unknown_scales_are_entries_of_the_sample(case: str) -> None:
    model = hierarchy(case, scale=HalfCauchy(0.5))
    names = HIERARCHIES[case][1]
    assert sorted(model.layout.names) == sorted((*NAMES, "@likelihood.scale", *names))
    assert model.layout.names[:4] == NAMES
    assert [entry.shape for entry in model.layout.entries[4:]] == [()] * (len(names) + 1)
    assert {unknown.name for unknown in model.unknowns} == {"@likelihood.scale", *names}


@hierarchies
def test_unknown_scales_are_kept_in_banks(case: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = hierarchy(case)
    data = torch.zeros(7, 3), torch.zeros(7, 2)
    fit(model, data, method=inference.Prior(), num_samples=5, seed=3, out=tmp_path / "bank")
    bank = Bank.open(tmp_path / "bank", verify="full")
    assert bank.layout == model.layout
    for index in range(5):
        for name, value in model.sample_prior(3, "prior", index).items():
            assert torch.equal(bank[index][name], value)
    assert priors.prior_from_config(bank.info["prior"]) == model.prior


@hierarchies
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_non_centred_form_value_by_value(case: str, dtype: torch.dtype) -> None:
    model = hierarchy(case, dtype, scale=LogNormal(0.1, 0.4))
    size = model.layout.num_values
    flat = 0.8 * torch.randn(5, size, generator=generator(0, case), dtype=model.layout.dtype)
    params, log_jacobian = model.constrain(flat)
    assert log_jacobian.shape == (5,)
    for row in range(5):
        u = {name: value.double() for name, value in model.layout.unflatten(flat[row].double()).items()}
        theta, expected = non_centred(case, u)
        alone, jacobian = model.constrain(flat[row])
        assert jacobian.shape == ()
        torch.testing.assert_close(log_jacobian[row], jacobian)
        torch.testing.assert_close(jacobian.double(), expected, rtol=1e-5, atol=1e-5)
        for name, value in theta.items():
            torch.testing.assert_close(params[name][row], alone[name])
            torch.testing.assert_close(alone[name].double(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.unconstrain(alone), flat[row], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.unconstrain(params), flat, rtol=1e-5, atol=1e-5)


@hierarchies
def test_the_jacobian_is_that_of_autograd(case: str) -> None:
    model = hierarchy(case, torch.float64, scale=LogNormal(0.1, 0.4))
    flat = 0.8 * torch.randn(model.layout.num_values, generator=generator(1, case), dtype=torch.float64)
    matrix = torch.autograd.functional.jacobian(lambda u: model.layout.flatten(model.constrain(u)[0]), flat)
    _, expected = torch.linalg.slogdet(matrix)
    torch.testing.assert_close(model.constrain(flat)[1], expected, rtol=1e-5, atol=1e-5)


@hierarchies
def test_the_log_prior_is_that_of_the_values_given_their_scales_and_that_of_the_scales(case: str) -> None:
    model = hierarchy(case, scale=HalfCauchy(0.5))
    params = model.sample_prior(0)
    values = priors.log_prob(model.prior, [e for e in model.layout.entries if e.name in NAMES], params)
    scales = sum(unknown.prior.log_prob(params[unknown.name]) for unknown in model.unknowns)
    torch.testing.assert_close(model.log_prior(params), values + scales)
    batch = Batch(torch.randn(7, 3, generator=generator(2)), torch.randn(7, 2, generator=generator(3)))
    expected = values + scales + model.log_likelihood(params, batch)
    density, log_joint = model.log_density(model.unconstrain(params), batch)
    single = {"rtol": 1.3e-6, "atol": 1e-5}  # the values themselves go through float32
    torch.testing.assert_close(log_joint, expected, **single)
    torch.testing.assert_close(density, expected + model.constrain(model.unconstrain(params))[1], **single)


@hierarchies
def test_densities_and_gradients_under_vmap_are_those_of_one_sample_at_a_time(case: str) -> None:
    model = hierarchy(case, scale=HalfCauchy(0.5))
    batch = Batch(torch.randn(7, 3, generator=generator(2)), torch.randn(7, 2, generator=generator(3)))
    flat = 0.6 * torch.randn(5, model.layout.num_values, generator=generator(4, case))
    many = torch.func.vmap(torch.func.grad_and_value(lambda u: model.log_density(u, batch)[0]))(flat)
    params, log_jacobian = torch.func.vmap(model.constrain)(flat)
    for row in range(5):
        one = torch.func.grad_and_value(lambda u: model.log_density(u, batch)[0])(flat[row])
        for found, expected in zip(many, one, strict=True):
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
        alone, jacobian = model.constrain(flat[row])
        torch.testing.assert_close(log_jacobian[row], jacobian)
        assert all(torch.allclose(params[name][row], alone[name]) for name in model.layout.names)


@hierarchies
def test_a_module_in_bfloat16_keeps_its_dtype_and_a_float32_scale(case: str) -> None:
    model = hierarchy(case, torch.bfloat16, scale=HalfCauchy(0.5))
    flat = 0.6 * torch.randn(5, model.layout.num_values, generator=generator(4, case))
    params, log_jacobian = model.constrain(flat)
    assert {name: value.dtype for name, value in params.items()} == {
        name: torch.float32 if name.startswith("@") else torch.bfloat16 for name in model.layout.names
    }
    assert log_jacobian.dtype == torch.float32
    for row in range(5):
        theta, expected = non_centred(case, {n: v.double() for n, v in flat_parts(model, flat[row]).items()})
        torch.testing.assert_close(log_jacobian[row].double(), expected, rtol=1e-5, atol=1e-5)
        for name in NAMES:  # half a unit in the last of 8 bits, of the value or, near 0, of what is summed
            torch.testing.assert_close(params[name][row].double(), theta[name], rtol=2**-8, atol=1e-4)
    again = model.unconstrain(params)
    torch.testing.assert_close(again, flat, rtol=2**-6, atol=0.02)
    assert again.dtype == torch.float32


def flat_parts(model: BayesianModel, flat: Tensor) -> dict[str, Tensor]:
    """u by entry, in the dtype of the flat vector rather than of the module."""
    pieces = flat.split([entry.numel for entry in model.layout.entries])
    return {e.name: piece.view(e.shape) for e, piece in zip(model.layout.entries, pieces, strict=True)}


@pytest.mark.parametrize(
    "family", [Normal(0.4), Laplace(0.4), StudentT(3.0, 0.4), ScaleMixture(0.4, 0.2, 0.4)], ids=str
)
@pytest.mark.parametrize("unknown", [LogNormal(0.2, 0.6), HalfCauchy(0.7)], ids=str)
def test_the_density_of_weight_and_scale_integrates_to_one_in_both_spaces(
    family: priors.Family, unknown: priors.PositivePrior
) -> None:
    """One weight and its scale on a grid of (z, log s): log prior plus log Jacobian is a normalised density."""
    module = nn.Linear(1, 1, bias=False)
    options = {field: getattr(family, field) for field in type(family).__dataclass_fields__}
    prior = type(family)(**{**options, "scale": unknown})
    model = BayesianModel(module, prior=prior, likelihood=likelihoods.Gaussian(1.0), num_data=1)
    z = torch.linspace(-9, 9, 801, dtype=torch.float64).sinh() / 40  # fine about 0, out to 100
    log_scale = torch.linspace(-14, 14, 601, dtype=torch.float64)
    flat = torch.cartesian_prod(z, log_scale)
    density = torch.func.vmap(lambda u: model.log_prior(model.constrain(u)[0]) + model.constrain(u)[1])(flat)
    within = torch.trapezoid(density.double().exp().view(801, 601), log_scale, dim=1)
    torch.testing.assert_close(torch.trapezoid(within, z), torch.ones((), dtype=torch.float64), rtol=0, atol=2e-4)


def test_sample_prior_draws_scales_and_values_together() -> None:
    """z = theta / s is standard normal whatever s is, and s has its median."""
    model = BayesianModel(
        nn.Linear(2, 3),
        prior=FanIn(HalfCauchy(0.7), 0.5),
        likelihood=likelihoods.Gaussian(LogNormal(0.2, 0.5)),
        num_data=7,
    )
    draws = [model.sample_prior(2, "draw", index) for index in range(3000)]
    scale, noise = (torch.stack([d[name] for d in draws]) for name in ("@prior.scale", "@likelihood.scale"))
    for values, median in ((scale, 0.7), (noise, math.exp(0.2))):
        assert abs(float((values < median).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(3000)
    z = torch.stack([d["weight"].flatten() for d in draws]) / scale[:, None] * math.sqrt(2)
    for part in (scale < 0.7, scale >= 0.7):
        chosen = z[part].double()
        assert abs(float(chosen.mean())) < 4 / math.sqrt(chosen.numel())
        assert abs(float(chosen.square().mean()) - 1) < 4 * math.sqrt(2 / chosen.numel())
    assert all(torch.equal(value, draws[7][name]) for name, value in model.sample_prior(2, "draw", 7).items())
    assert not torch.equal(draws[7]["weight"], draws[8]["weight"])
    assert tuple(draws[0]) == model.layout.names


@hierarchies
def test_the_modules_own_values_go_with_scales_at_their_medians(case: str) -> None:
    model = hierarchy(case, scale=LogNormal(0.3, 0.4))
    params = model.module_params()
    for name, parameter in model.module.named_parameters():
        assert torch.equal(params[name], parameter)
    for unknown in model.unknowns:
        assert params[unknown.name].shape == ()
        assert float(params[unknown.name]) == pytest.approx(unknown.prior.median)
    assert float(params["@likelihood.scale"]) == pytest.approx(math.exp(0.3))
    back, _ = model.constrain(model.unconstrain(params))
    for name, value in params.items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-6)


@hierarchies
def test_prior_scale_is_that_of_draws_in_the_unconstrained_space(case: str) -> None:
    """Of the values: non-centred ones know nothing of the scale. One for the logarithms of unknowns."""
    model = hierarchy(case, scale=LogNormal(0.3, 0.4))
    scale = model.prior_scale()
    assert scale.shape == (model.layout.num_values,)
    assert float(scale[-1]) == 1.0
    draws = torch.stack([model.unconstrain(model.sample_prior(0, index)) for index in range(2000)]).double()
    spreads, squares, place = flat_parts(model, scale), draws.square(), 0
    for entry in model.layout.entries:
        here = squares[:, place : place + entry.numel].flatten()
        place += entry.numel
        if entry.name.startswith("@"):
            assert float(spreads[entry.name]) == 1.0
            continue
        assert len(spreads[entry.name].unique()) == 1
        if isinstance(model.prior.place(entry).family, StudentT):
            assert float(spreads[entry.name].flatten()[0]) == pytest.approx(math.sqrt(3.0))  # df / (df - 2) = 3
            continue
        error = float(here.std()) / math.sqrt(len(here))
        assert abs(float(here.mean()) - float(spreads[entry.name].flatten()[0]) ** 2) < 4.5 * error, entry.name


def test_prior_scale_of_fixed_priors_is_their_standard_deviation() -> None:
    def of(prior: priors.Prior) -> dict[str, float]:
        model = BayesianModel(nn.Linear(4, 3), prior=prior, likelihood=likelihoods.Gaussian(HalfCauchy()), num_data=7)
        parts = flat_parts(model, model.prior_scale())
        assert all(len(part.unique()) == 1 for part in parts.values())
        return {name: round(float(part.flatten()[0]), 5) for name, part in parts.items()}

    assert of(Normal(1.0, {"bias": 0.3, "*": 2.0})) == {"weight": 2.0, "bias": 0.3, "@likelihood.scale": 1.0}
    assert of(Laplace(scale=0.5)) == dict.fromkeys(("weight", "bias"), round(math.sqrt(0.5), 5)) | {
        "@likelihood.scale": 1
    }
    assert of(FanIn(3.0, 0.2)) == {"weight": 1.5, "bias": 0.2, "@likelihood.scale": 1.0}
    assert of(FanIn(3.0, 0.2, StudentT(4.0)))["weight"] == round(1.5 * math.sqrt(2), 5)
    assert of(StudentT(1.0, scale=0.7))["weight"] == 0.7  # it has no standard deviation


@pytest.mark.parametrize("prior", [Normal(0.3, 0.7), Normal(0.0, {"bias": 0.3, "*": 2.0}), FanIn(3.0, 0.2)], ids=str)
@pytest.mark.parametrize("noise", [0.5, HalfCauchy(0.7), LogNormal(0.2, 0.6)], ids=str)
def test_prior_precision_is_minus_the_hessian_of_the_log_prior(
    prior: priors.Prior, noise: float | priors.PositivePrior
) -> None:
    model = BayesianModel(
        nn.Linear(4, 3).double(), prior=prior, likelihood=likelihoods.Gaussian(noise), num_data=7, temperature=1.0
    )
    for seed in range(3):
        flat = torch.randn(model.layout.num_values, generator=generator(seed), dtype=torch.float64)
        hessian = torch.autograd.functional.hessian(
            lambda u: model.log_prior(model.constrain(u)[0]).double() + model.constrain(u)[1], flat
        )
        found = model.prior_precision(flat)
        assert found.dtype == torch.float64
        torch.testing.assert_close(torch.diag(found), -hessian, rtol=1e-5, atol=1e-6)
        assert bool((found > 0).all())


@pytest.mark.parametrize(
    ("prior", "named"),
    [
        (Laplace(), "Laplace for 'weight'"),
        (StudentT(4.0), "StudentT for 'weight'"),
        (ScaleMixture(), "ScaleMixture for 'weight'"),
        (FanIn(family=Laplace()), "FanIn for 'weight'"),
        (FanIn(bias_scale=HalfCauchy()), "FanIn for 'bias'"),
        (Normal(scale=HalfCauchy()), "Normal for 'weight'"),
        (Normal(scale={"bias": LogNormal(), "*": 1.0}), "Normal for 'bias'"),
    ],
    ids=str,
)
def test_a_curvature_that_is_not_that_of_a_normal_is_refused(prior: priors.Prior, named: str) -> None:
    model = BayesianModel(nn.Linear(4, 3), prior=prior, likelihood=likelihoods.Gaussian(HalfCauchy()), num_data=7)
    with pytest.raises(ConfigError, match=rf"^prior: want normal values with fixed scales.*got {named}"):
        model.prior_precision(torch.zeros(model.layout.num_values))


@hierarchies
def test_a_mode_is_refused_where_there_is_none(case: str) -> None:
    """With all values at loc the log joint grows as the scale shrinks, past any bound."""
    model = hierarchy(case)
    unknown_of = HIERARCHIES[case][2]
    with pytest.raises(ConfigError, match=r"^Laplace: want a prior with fixed scales.*got '@prior\.") as caught:
        model.require_mode("Laplace")
    assert caught.value.got.strip("'") in unknown_of.values()
    if not all(isinstance(unknown.prior, HalfCauchy) for unknown in model.unknowns):
        return  # a log-normal falls faster than any power of the scale grows
    params, loc = model.module_params(), getattr(model.prior, "loc", 0.0)
    values = []
    for scale in (1e-2, 1e-4, 1e-6):
        shrunk = {n: torch.full_like(params[n], loc) if n in unknown_of else params[n] for n in NAMES}
        values.append(float(model.log_prior(shrunk | {name: torch.tensor(scale) for name in unknown_of.values()})))
    assert values[0] + 20 < values[1] < values[2] - 20


@pytest.mark.parametrize(
    "prior", [Normal(), Laplace(), StudentT(), ScaleMixture(), FanIn(2.0, 0.5, StudentT(3.0))], ids=str
)
def test_fixed_scales_have_a_mode(prior: priors.Prior) -> None:
    model = BayesianModel(nn.Linear(4, 3), prior=prior, likelihood=likelihoods.Gaussian(HalfCauchy()), num_data=7)
    model.require_mode("Laplace")
    assert model.layout.names == ("weight", "bias", "@likelihood.scale")


# A hierarchical posterior by quadrature over the scale


def within(values: Tensor, expected: float, *, num_chains: int, least_ess: float = 200) -> float:
    """|mean - expected| in standard errors, draws in the order of a bank, after checking that the chains have mixed."""
    chains = values.double().view(-1, num_chains).T
    ess = effective_sample_size(chains)
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    return abs(float(chains.mean()) - expected) / (float(chains.std()) / math.sqrt(ess))


class Quadrature:
    """theta ~ N(0, s^2) with a scale s a group of columns, y ~ N(X theta, noise^2): moments on a grid of log s."""

    def __init__(self, design: Tensor, y: Tensor, noise: float, groups: list[list[int]], unknown: LogNormal) -> None:
        grid = torch.linspace(
            unknown.loc - 5 * unknown.scale, unknown.loc + 5 * unknown.scale, 241 if len(groups) == 1 else 81
        )
        log_scale = torch.cartesian_prod(*[grid.double()] * len(groups)).view(-1, len(groups))  # [G, groups]
        size = design.shape[1]
        variance = torch.zeros(len(log_scale), size, dtype=torch.float64)
        for place, columns in enumerate(groups):
            variance[:, columns] = (2 * log_scale[:, place : place + 1]).exp()
        covariance = torch.linalg.inv(design.T @ design / noise**2 + torch.diag_embed(1 / variance))  # [G, P, P]
        self.mean = covariance @ (design.T @ y / noise**2)  # [G, P]
        self.second = covariance.diagonal(dim1=1, dim2=2) + self.mean.square()
        rows = (design * variance[:, None]) @ design.T + noise**2 * torch.eye(len(y), dtype=torch.float64)  # [G, N, N]
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), rows).log_prob(y)
        z = (log_scale - unknown.loc) / unknown.scale
        self.weight = (evidence - 0.5 * z.square().sum(dim=1)).softmax(dim=0)  # [G], an even grid of log s
        self.log_scale = log_scale

    def of(self, values: Tensor) -> Tensor:
        return self.weight @ values


def check_hierarchy(prior: priors.Prior, groups: list[list[int]], names: list[str], num_samples: int) -> None:
    """Few rows and much noise: the data leave room for the prior, in which non-centred chains move freely."""
    source = generator(6, "hierarchy")
    x = torch.randn(9, 2, generator=source) * torch.tensor([0.6, 1.4])
    y = x @ torch.tensor([[1.5], [-0.4]]) + 0.5 + 2.5 * torch.randn(9, 1, generator=source)
    design = torch.cat([x, torch.ones(9, 1)], dim=1).double()
    truth = Quadrature(design, y.flatten().double(), 2.5, groups, LogNormal(0.2, 0.7))
    model = BayesianModel(nn.Linear(2, 1), prior=prior, likelihood=likelihoods.Gaussian(2.5), num_data=9)
    method = inference.HMC(num_chains=16, num_warmup=100, num_steps=12, trajectory="jittered")
    bank = fit(model, (x, y), method=method, num_samples=num_samples, seed=4)
    params = bank.block(slice(None)).params
    theta = torch.cat([params["weight"].flatten(1), params["bias"]], dim=1).double()
    for place, name in enumerate(names):
        log_scale = params[name].double().log()
        for values, of in ((log_scale, lambda u: u), (log_scale.square(), torch.square), (log_scale.exp(), torch.exp)):
            assert within(values, float(truth.of(of(truth.log_scale[:, place]))), num_chains=16) < 4
    for column in range(3):
        assert within(theta[:, column], float(truth.of(truth.mean[:, column])), num_chains=16) < 4
        assert within(theta[:, column].square(), float(truth.of(truth.second[:, column])), num_chains=16) < 4
    assert float(bank.log_joint[17]) == pytest.approx(float(model.log_joint(bank[17], Batch(x, y))), abs=1e-3)


def test_the_posterior_of_an_unknown_scale_is_that_of_quadrature() -> None:
    check_hierarchy(Normal(scale=LogNormal(0.2, 0.7)), [[0, 1, 2]], ["@prior.scale"], 2400)


@pytest.mark.slow
def test_the_posterior_of_a_scale_an_entry_is_that_of_quadrature() -> None:
    names = ["@prior.scale.weight", "@prior.scale.bias"]
    check_hierarchy(Normal(scale=LogNormal(0.2, 0.7), shared=False), [[0, 1], [2]], names, 8000)
