"""Noise a row against the closed form of a layer's outputs, and against gradients known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scenarios import classifier, linear_regression
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.func import functional_call
from torch.nn import functional
from torch.nn.functional import softplus

from bnn import likelihoods, priors
from bnn.batches import full_batch
from bnn.errors import ConfigError
from bnn.inference import Guide
from bnn.inference.families import NormalFamily
from bnn.inference.gradients import height_of
from bnn.inference.guide import family_loss
from bnn.inference.row_noise import Noise, PerRow, RowNoise, Use, Watch, eligible, eligible_rows, row_noise_loss
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch, Params

B = 6


def params_of(module: nn.Module) -> Params:
    return {name: value.detach() for name, value in module.named_parameters()}


def uses_of(module: nn.Module, x: Tensor) -> dict[str, list[Use]]:
    params = params_of(module)
    with torch.no_grad(), Watch(params) as watch:
        functional_call(module, params, (x,))
    return watch.uses


class Own(nn.Module):
    """A forward of two weights [3, 3] and a bias [3] that a test writes."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        source = generator(0, "own")
        self.weight = nn.Parameter(torch.randn(3, 3, generator=source))
        self.other = nn.Parameter(torch.randn(3, 3, generator=source))
        self.bias = nn.Parameter(torch.randn(3, generator=source))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


linear = functional.linear
FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str]]] = {
    "each once": (lambda m, x: linear(linear(x, m.weight, m.bias), m.other), {"weight", "other", "bias"}),
    "by keyword": (lambda m, x: linear(x, m.weight, bias=m.bias), {"weight", "bias"}),
    "tied twice": (lambda m, x: linear(linear(x, m.weight), m.weight) + linear(x, m.other), {"other"}),
    "tied by a method": (lambda m, x: linear(linear(x, m.weight), m.weight.t()) + linear(x, m.other), {"other"}),
    "tied by a property": (lambda m, x: linear(linear(x, m.weight), m.weight.T) + linear(x, m.other), {"other"}),
    "in another op": (lambda m, x: linear(x, m.weight) + m.weight.sum() + linear(x, m.other), {"other"}),
    "in a product": (lambda m, x: (x @ m.weight) @ m.other + linear(x, torch.eye(3), m.bias), {"bias"}),
    "bias shared": (lambda m, x: linear(linear(x, m.weight, m.bias), m.other, m.bias), {"weight", "other"}),
    "as an input": (lambda m, x: linear(x, m.weight) + linear(m.other, m.weight).sum(), set()),
    "shapes are read": (lambda m, x: linear(x, m.weight) * m.weight.shape[0], {"weight"}),
}


@pytest.mark.parametrize("how", ["local", "flipout"])
@pytest.mark.parametrize("name", FORWARDS)
def test_tensors_that_a_layer_uses_once_are_eligible(name: str, how: RowNoise) -> None:
    forward, expected = FORWARDS[name]
    uses = uses_of(Own(forward), torch.ones(B, 3))
    if not expected:
        with pytest.raises(ConfigError, match="none that is Bayesian"):
            eligible(uses, how, B)
        return
    assert eligible(uses, how, B) == expected


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], bool]] = {
    "linear": (nn.Linear(3, 2), (B, 3), True),
    "linear without a bias": (nn.Linear(3, 2, bias=False), (B, 3), True),
    "linear on positions": (nn.Linear(3, 2), (B, 5, 3), False),
    "conv1d": (nn.Conv1d(3, 2, 2), (B, 3, 5), False),
    "conv2d": (nn.Conv2d(2, 4, 2, stride=2, padding=1, groups=2), (B, 2, 4, 5), False),
    "conv2d without a bias": (nn.Conv2d(2, 3, 2, bias=False), (B, 2, 4, 3), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_are_eligible(name: str) -> None:
    module, shape, is_local = LAYERS[name]
    uses = uses_of(module, torch.ones(shape))
    assert eligible(uses, "flipout", B) == set(params_of(module))
    if is_local:
        assert eligible(uses, "local", B) == set(params_of(module))
    else:
        with pytest.raises(ConfigError, match=r"want a linear layer on rows \[B, C\], got none.*try 'flipout'"):
            eligible(uses, "local", B)


def test_a_tensor_that_goes_into_a_layer_is_not_its_weight() -> None:
    """Even with as many rows as the batch has."""
    uses = uses_of(Own(lambda m, x: x + linear(m.other, torch.eye(3)) + linear(x, m.weight)), torch.ones(3, 3))
    assert eligible(uses, "flipout", 3) == {"weight"}


class Folded(nn.Module):
    """A layer on rows and positions alike, and one on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 2), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2])  # [B, 5, 2]
        return self.last(positions.flatten(1))


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_layers_on_other_rows_than_those_of_the_batch_are_not_eligible(how: RowNoise) -> None:
    """Positions folded into rows would each get noise of their own, while those of a row share a draw."""
    model = BayesianModel(Folded(), prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=8)
    batch = Batch(torch.ones(8, 5, 3), torch.zeros(8, 1))
    assert eligible_rows(model, batch, how) == {"last.weight", "last.bias"}


class Transposed(nn.Module):
    """Positions first, and as many of them as rows: only the size of the batch tells the two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).mean(dim=0)  # [B, T, 3] -> [B, 1]


class ByKeyword(nn.Module):
    """A weight that no draw a row would replace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, weight=self.layer.weight, bias=self.layer.bias)


@pytest.mark.parametrize(
    ("module", "x"), [(Transposed(), torch.ones(B, B, 3)), (ByKeyword(), torch.ones(B, 3))], ids=["axes", "keyword"]
)
def test_layers_whose_rows_or_weights_cannot_be_reached_are_refused(module: nn.Module, x: Tensor) -> None:
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=B)
    with pytest.raises(ConfigError, match=r"want a linear or convolutional layer used once, got none"):
        eligible_rows(model, Batch(x, torch.zeros(B, 1)), "flipout")


def test_nothing_to_flip_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a linear or convolutional layer used once, got none.*try 'antithetic'"):
        eligible(uses_of(nn.LayerNorm(3), torch.ones(B, 3)), "flipout", B)


def noise_of(module: nn.Module, num: int) -> tuple[Params, Params, list[Params]]:
    """Means, scales and draws of the parameters of a module."""
    mean, source = params_of(module), generator(1, "noise")
    scale = {name: 0.3 + torch.rand(value.shape, generator=source) for name, value in mean.items()}
    draws = [
        {name: value + scale[name] * torch.randn(value.shape, generator=source) for name, value in mean.items()}
        for _ in range(num)
    ]
    return mean, scale, draws


def outputs_of(module: nn.Module, x: Tensor, how: RowNoise, num: int, names: frozenset[str] | None = None) -> Tensor:
    """Outputs [S, B * ...] with noise a row."""
    mean, scale, draws = noise_of(module, num)
    source, found = generator(2, how), []
    for drawn in draws:
        with torch.no_grad(), PerRow(Noise(drawn, mean, scale), names or frozenset(mean), how, source):
            found.append(functional_call(module, drawn, (x,)).flatten())
    return torch.stack(found).double()


def output_moments(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [O] and covariance [O, O] of the outputs under one draw of the weights for all rows, in closed form."""
    mean, scale, _ = noise_of(module, 0)
    slopes = torch.func.jacrev(lambda params: functional_call(module, params, (x,)).flatten())(mean)  # linear in them
    covariance = sum(
        (slope.flatten(1) * scale[name].flatten().square()) @ slope.flatten(1).T for name, slope in slopes.items()
    )
    assert isinstance(covariance, Tensor)
    return functional_call(module, mean, (x,)).detach().flatten().double(), covariance.double()


def off(found: Tensor, mean: Tensor, covariance: Tensor) -> tuple[float, Tensor]:
    """Errors of mean and covariance of draws [S, O], in standard errors; rounding where there is no noise."""
    count, spread = len(found), covariance.diagonal()
    # Fourth moments of the draws themselves: flipped outputs are no normals.
    centred = found - found.mean(dim=0)
    products = centred.unsqueeze(2) * centred.unsqueeze(1)
    error = products.std(dim=0) / math.sqrt(count) + 1e-6
    of_mean = (found.mean(dim=0) - mean).abs() / ((spread / count).sqrt() + 1e-6)
    return float(of_mean.max()), (products.mean(dim=0) - covariance).abs() / error


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in LAYERS for how in ("local", "flipout") if how == "flipout" or LAYERS[name][2]],
)
def test_outputs_have_the_moments_of_a_shared_draw_within_rows_and_none_between(name: str, how: Any) -> None:
    """Rows that share one draw are correlated; those with noise of their own are not, positions of a row are.

    Local: outputs of a row are independent too. Flipout: of a row all that one draw says.
    """
    module, shape, _ = LAYERS[name]
    module = _reset(module)
    x = torch.randn(2, *shape[1:], generator=generator(3, name))
    x[1] = 0.5 * x[0] + 0.5 * x[1]  # so that a shared draw would correlate them
    mean, shared = output_moments(module, x)
    rows = torch.arange(2).repeat_interleave(len(mean) // 2)
    same = rows.unsqueeze(0) == rows.unsqueeze(1)
    found = outputs_of(module, x, how, 1200)
    of_mean, of_covariance = off(found, mean, torch.where(same, shared, 0.0))
    assert of_mean < 4.5
    assert float(of_covariance.max()) < 5  # the largest of up to 1,000
    # The shared draw's own covariance would be seen to be another.
    assert float(off(found, mean, shared)[1].max()) > 8


def _reset(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.randn(value.shape, generator=generator(4, name)))
    return module


def test_signs_of_flipout_are_of_inputs_and_of_outputs() -> None:
    """Equal rows differ in the size of their noise, which signs of inputs change, and in its sign."""
    module = _reset(nn.Linear(3, 1, bias=False))
    x = torch.ones(B, 3)
    noise = outputs_of(module, x, "flipout", 4).view(4, B) - float(module.weight.detach().sum())
    for one in noise:
        assert len(one.abs().round(decimals=4).unique()) in (2, 3, 4)  # of |+-a +-b +-c|
    assert bool((noise > 0).any())
    assert bool((noise < 0).any())


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_tensors_that_are_not_eligible_keep_the_draw(how: RowNoise) -> None:
    """A bias outside of it: given the draw, its share of the output is the same in all rows, and not its mean."""
    module = _reset(nn.Linear(3, 2))
    x = torch.zeros(B, 3)
    _, _, (drawn,) = noise_of(module, 1)
    found = outputs_of(module, x, how, 1, frozenset({"weight"})).view(B, 2)
    torch.testing.assert_close(found, drawn["bias"].double().expand(B, 2), rtol=0, atol=1e-6)
    # Eligible, it has noise of its own.
    other = outputs_of(module, x, how, 1).view(B, 2)
    assert len(other.unique(dim=0)) > 1


def test_small_scales_of_layers_in_low_precision_are_kept() -> None:
    """A scale below what bfloat16 tells apart at the mean: outputs vary all the same."""
    module = nn.Linear(3, 1).to(torch.bfloat16)
    nn.init.constant_(module.weight, 1.0)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(0.01), num_data=B)
    batch = Batch(torch.full((B, 3), 0.01, dtype=torch.bfloat16), torch.zeros(B, 1))
    start = model.unconstrain(model.module_params())
    start[3:] = 0.0
    family = NormalFamily(start, torch.full_like(start, 0.001), 0, generator(0, "x"))
    rows, options = frozenset({"weight"}), Guide(variance_reduction="local")
    loss = row_noise_loss(
        family, model, batch, 1.0, torch.zeros(4), rows, options.variance_reduction, generator(0, "y")
    )
    slope = torch.autograd.grad(loss, family.parameters["scale_unconstrained"])[0]
    entropy = torch.autograd.grad(family.draw(torch.zeros(4)).surprise, family.parameters["scale_unconstrained"])[0]
    assert bool((slope + entropy)[:3].abs().min() > 0)  # the likelihood says something of it


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    module = nn.Linear(3, 2, bias=False)
    mean, scale, (drawn,) = noise_of(module, 1)
    leaf = scale["weight"].requires_grad_()
    with PerRow(Noise(drawn, mean, {"weight": leaf}), frozenset({"weight"}), "local", generator(0, "x")):
        functional_call(module, drawn, (torch.zeros(B, 3),)).square().sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad == 0).all())


# The ELBO and its gradient


def loss_of(family: NormalFamily, model: BayesianModel, batch: Batch, how: str, step: int) -> Tensor:
    """-ELBO of one draw."""
    source = generator(5, how, step)
    normals = torch.randn(family.num_normals, generator=source)
    if how == "none":
        return family_loss([family.draw(normals)], height_of(model), batch, 1.0)
    rows = frozenset(name for name in model.layout.names if not name.startswith("@"))
    options = Guide(variance_reduction=how)  # type: ignore[arg-type]
    return row_noise_loss(family, model, batch, 1.0, normals, rows, options.variance_reduction, source)


def estimates(family: NormalFamily, model: BayesianModel, batch: Batch, how: str, num: int) -> tuple[Tensor, Tensor]:
    """ELBOs [S] and their gradients [S, 2 P], of loc and then of the scale's parameter."""
    values, slopes = [], []
    for step in range(num):
        one = -loss_of(family, model, batch, how, step)
        slopes.append(torch.cat(torch.autograd.grad(one, list(family.parameters.values()))))
        values.append(one.detach())
    return torch.stack(values).double(), torch.stack(slopes).double()


def errors(found: Tensor, expected: Tensor) -> Tensor:
    return (found.mean(dim=0) - expected).abs() / (found.std(dim=0) / math.sqrt(len(found)) + 1e-4)


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_elbo_and_gradient_are_those_in_closed_form(how: str) -> None:
    """For linear regression ELBO(q) = log evidence - KL(q || posterior)."""
    case = linear_regression(num_rows=11, num_inputs=3)
    spread = case.covariance.diagonal().sqrt().float()
    family = NormalFamily(case.mean.float() + spread, 1.5 * spread, 0, generator(0, "x"))
    loc, raw = (value.detach().double().requires_grad_() for value in family.parameters.values())
    posterior = MultivariateNormal(case.mean, case.covariance)
    elbo = case.log_evidence - kl_divergence(MultivariateNormal(loc, softplus(raw).square().diag()), posterior)
    expected = torch.cat(torch.autograd.grad(elbo, [loc, raw]))
    values, slopes = estimates(family, case.model, full_batch(case.data), how, 500)
    assert float(errors(values, elbo.detach())) < 4
    assert float(errors(slopes, expected).max()) < 4
    size = len(loc)
    assert float(errors(slopes[:, :size], 0 * expected[:size]).max()) > 8
    assert float(errors(slopes[:, size:], 0 * expected[size:]).max()) > 8


def hierarchical() -> tuple[BayesianModel, Batch]:
    """Unknown scales of weights and of noise, on a layer with an activation behind it."""
    source = generator(6, "hierarchical")
    x = torch.randn(7, 3, generator=source)
    y = x[:, :1].tanh() + 0.3 * torch.randn(7, 1, generator=source)
    model = BayesianModel(
        nn.Sequential(_reset(nn.Linear(3, 2)), nn.Tanh(), _reset(nn.Linear(2, 1))),
        prior=priors.Normal(0.0, priors.LogNormal(-0.5, 0.5)),
        likelihood=likelihoods.Gaussian(priors.LogNormal(-1.0, 0.5)),
        num_data=7,
    )
    return model, Batch(x, y)


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_gradients_agree_with_the_shared_draw_where_scales_are_unknown(how: str) -> None:
    model, batch = hierarchical()
    assert {name for name in model.layout.names if name.startswith("@")} == {"@likelihood.scale", "@prior.scale"}
    start = model.unconstrain(model.module_params())
    family = NormalFamily(start, torch.full_like(start, 0.3), 0, generator(0, "x"))
    shared, found = (estimates(family, model, batch, one, 250) for one in ("none", how))
    for one, other in zip(shared, found, strict=True):
        error = ((one.var(dim=0) + other.var(dim=0)) / 250).sqrt() + 1e-4
        assert float(((one.mean(dim=0) - other.mean(dim=0)).abs() / error).max()) < 4
    assert float(errors(found[1], torch.zeros(1)).median()) > 3  # gradients of the right size, not noise


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_without_noise_the_loss_is_that_of_the_shared_draw(how: str) -> None:
    """At unknown scales that keep their draw: priors, Jacobian and entropy are the same numbers."""
    model, batch = hierarchical()
    start = model.unconstrain(model.module_params())
    of_module = torch.cat([torch.full((e.numel,), not e.name.startswith("@")) for e in model.layout.entries])
    family = NormalFamily(start, torch.where(of_module, 1e-5, 0.5), 0, generator(0, "x"))
    options = Guide(variance_reduction=how)  # type: ignore[arg-type]
    rows = frozenset(name for name in model.layout.names if not name.startswith("@"))
    for step in range(4):
        normals = torch.randn(family.num_normals, generator=generator(9, "normals", step))
        found = row_noise_loss(
            family, model, batch, 0.7, normals, rows, options.variance_reduction, generator(9, how, step)
        )
        expected = family_loss([family.draw(normals)], height_of(model), batch, 0.7)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


@pytest.mark.parametrize("how", ["local", "flipout"])
def test_gradients_vary_less_on_a_minibatch(how: str) -> None:
    """In the sum over parameters: rows with noise of their own average it, whereas a shared draw is in all of them."""
    source = generator(7, "minibatch")
    x = torch.randn(60, 4, generator=source)
    model, _ = classifier()
    batch = Batch(x, (x[:, 0] > 0).long())
    start = model.unconstrain(model.module_params())
    family = NormalFamily(start, torch.full_like(start, 0.3), 0, generator(0, "x"))
    shared, found = (estimates(family, model, batch, one, 120)[1].var(dim=0).sum() for one in ("none", how))
    # By more than chance: the root of 2 / 120 is 0.13.
    assert float(found) < 0.6 * float(shared)


def test_fits_with_noise_a_row_lead_to_the_posterior_of_a_mean_field() -> None:
    """Through the method itself, from the mean of the posterior on."""
    case = linear_regression()
    with torch.no_grad():
        case.model.module.weight.copy_(case.mean[:4].unsqueeze(0))  # type: ignore[operator,union-attr]
        case.model.module.bias.copy_(case.mean[4:])  # type: ignore[operator,union-attr]
    spread = 1 / torch.linalg.inv(case.covariance).diagonal().sqrt()
    for how in ("local", "flipout"):
        guide = Guide(num_steps=250, batch_size=30, lr=0.05, variance_reduction=how)  # type: ignore[arg-type]
        *_, (_, state) = guide.run(case.model, case.data, num_samples=1, seed=0)
        assert float(((state["value.loc"] - case.mean) / spread).abs().max()) < 0.5
        assert float((softplus(state["value.scale_unconstrained"]) / spread).log().abs().max()) < 0.4


def test_a_model_without_layers_for_it_is_refused_by_the_fit() -> None:
    module = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 1, 4), nn.Flatten())
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=8)
    data = torch.zeros(8, 4), torch.zeros(8, 1)
    with pytest.raises(ConfigError, match=r"Guide\(variance_reduction=\): want a linear layer on rows"):
        next(Guide(variance_reduction="local", num_steps=1).run(model, data, num_samples=1, seed=0))
    next(Guide(variance_reduction="flipout", num_steps=1).run(model, data, num_samples=1, seed=0))


def test_a_local_draw_is_normal() -> None:
    """Its quartiles, not its moments alone."""
    module = _reset(nn.Linear(3, 1))
    x = torch.randn(1, 3, generator=generator(8, "x"))
    mean, covariance = output_moments(module, x)
    found = outputs_of(module, x, "local", 2000).flatten()
    inside = (found - mean).abs() < float(covariance.sqrt()) * float(Normal(0.0, 1.0).icdf(torch.tensor(0.75)))
    assert float(inside.double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(2000))
