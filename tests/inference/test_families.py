"""Families of guides against distributions of torch, Jacobians by autograd, closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from scenarios import LinearRegression, classifier, linear_regression
from torch import Tensor, nn
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, Normal, kl_divergence
from torch.nn.functional import softplus

from bnn import likelihoods, priors
from bnn.batches import Share, full_batch
from bnn.errors import ConfigError
from bnn.fitting import fit
from bnn.inference import Guide, gradients
from bnn.inference.families import Family, FlowFamily, FullRankFamily, NormalFamily, Point
from bnn.inference.gradients import STEPS_BEFORE_TRACING, height_of
from bnn.inference.guide import _family_fit, family_loss, make_family
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.tracing import trace
from bnn.types import Batch

FAMILIES: dict[str, Callable[[Tensor, Tensor], Family]] = {
    "mean-field": lambda start, scale: NormalFamily(start, scale, 0, generator(0, "family")),
    "low-rank": lambda start, scale: NormalFamily(start, scale, 2, generator(0, "family")),
    "full-rank": FullRankFamily,
    "flow": lambda start, scale: FlowFamily(start, scale, 7, generator(0, "family")),
}
NORMALS = [name for name in FAMILIES if name != "flow"]
SIZES = [1, 2, 5]


def family_of(name: str, size: int, *, moved: float = 0.4, dtype: torch.dtype = torch.float64) -> Family:
    """A family of P values whose parameters have all moved away from their start."""
    source = generator(7, name, size)
    start = torch.randn(size, generator=source, dtype=dtype)
    scale = 0.2 + torch.rand(size, generator=source, dtype=dtype)
    family = FAMILIES[name](start, scale)
    with torch.no_grad():
        for parameter in family.parameters.values():
            parameter.add_(moved * torch.randn(parameter.shape, generator=source, dtype=dtype))
    return family


def closed_form(name: str, here: dict[str, Tensor]) -> MultivariateNormal:
    """The normal that parameters stand for, as the docstrings of the families say, in float64."""
    scale = softplus(here["scale_unconstrained"])
    root = torch.eye(len(scale), dtype=scale.dtype)
    covariance = scale.square().diag()
    if name == "low-rank":
        covariance = scale.diag() @ (root + here["cov_factor"] @ here["cov_factor"].T) @ scale.diag()
    if name == "full-rank":
        root = scale.diag() @ (root + here["lower"].tril(-1))
        covariance = root @ root.T
    return MultivariateNormal(here["loc"], covariance)


def jacobian(family: Family, normals: Tensor) -> Tensor:
    found = torch.autograd.functional.jacobian(lambda z: family.draw(z).flat, normals)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_surprise_of_a_flow_is_by_the_jacobian(size: int) -> None:
    """-log q(T(z)) = -log N(z) + log |det dT / dz|, at each z, also far out where the spline has ended."""
    family = family_of("flow", size)
    for normals in 2.5 * torch.randn(6, size, generator=generator(1, "z"), dtype=torch.float64):
        expected = torch.linalg.slogdet(jacobian(family, normals)).logabsdet - (
            torch.distributions.Normal(0.0, 1.0).log_prob(normals).sum()
        )
        assert float(family.draw(normals).surprise.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NORMALS)
def test_surprise_of_a_normal_is_its_entropy(name: str, size: int) -> None:
    """By the Jacobian of the first P normals, whose volume is that of a mean-field or full-rank normal, and by torch."""
    family = family_of(name, size)
    normals = torch.randn(family.num_normals, generator=generator(1, "z"), dtype=torch.float64)
    found = float(family.draw(normals).surprise.detach())
    assert found == pytest.approx(float(closed_form(name, family.parameters).entropy().detach()), rel=1e-9)
    if name == "low-rank":
        here = family.parameters
        scale = softplus(here["scale_unconstrained"])
        factored = LowRankMultivariateNormal(here["loc"], scale.unsqueeze(1) * here["cov_factor"], scale.square())
        assert found == pytest.approx(float(factored.entropy().detach()), rel=1e-9)
    else:
        volume = torch.linalg.slogdet(jacobian(family, normals)).logabsdet
        assert found == pytest.approx(float(volume) + 0.5 * size * (1 + math.log(2 * math.pi)), rel=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NORMALS)
def test_draws_are_linear_in_the_normals_with_mean_and_covariance_in_closed_form(name: str, size: int) -> None:
    """u = m + A z: m is the draw of z = 0 and the covariance A A^T, without a sample."""
    family = family_of(name, size)
    zero = torch.zeros(family.num_normals, dtype=torch.float64)
    expected = closed_form(name, family.parameters)
    torch.testing.assert_close(family.draw(zero).flat, expected.loc)
    slope = jacobian(family, zero)
    torch.testing.assert_close(slope @ slope.T, expected.covariance_matrix)
    normals = torch.randn(family.num_normals, generator=generator(2, "z"), dtype=torch.float64)
    torch.testing.assert_close(family.draw(normals).flat, expected.loc + slope @ normals)


@pytest.mark.parametrize("size", SIZES)
def test_a_value_of_a_flow_sees_those_before_it_only(size: int) -> None:
    found = jacobian(family_of("flow", size), torch.randn(size, generator=generator(3, "z"), dtype=torch.float64))
    assert bool((found.triu(1) == 0).all())
    assert bool((found.diagonal() > 0).all())
    below = found[torch.ones_like(found).tril(-1).bool()]
    assert bool((below != 0).all())  # and all of them


def test_a_point_has_no_surprise() -> None:
    start = torch.randn(3, generator=generator(0, "start"))
    drawn = Point(start).draw(torch.empty(0))
    assert torch.equal(drawn.flat, start)
    assert float(drawn.surprise) == 0.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("world_untouched")
def test_at_the_start_q_is_normal_about_it(name: str, size: int) -> None:
    """With standard deviations s: in each direction but those of the random factor of low-rank."""
    start = torch.randn(size, generator=generator(4, "start"))
    scale = 0.05 + torch.rand(size, generator=generator(4, "scale"))
    family = FAMILIES[name](start, scale)
    normals = torch.randn(family.num_normals, generator=generator(4, "z"))
    if name == "low-rank":
        normals[size:] = 0.0
    torch.testing.assert_close(family.draw(normals).flat, start + scale * normals[:size], rtol=1e-5, atol=1e-5)
    assert family.draw(normals).flat is not start
    expected = torch.distributions.Normal(start, scale)
    if name == "flow":
        surprise = -expected.log_prob(start + scale * normals).sum()
        assert float(family.draw(normals).surprise.detach()) == pytest.approx(float(surprise), rel=1e-4)
    if name in ("mean-field", "full-rank"):
        assert float(family.draw(normals).surprise.detach()) == pytest.approx(float(expected.entropy().sum()), rel=1e-5)


@pytest.mark.usefixtures("world_untouched")
def test_a_flow_depends_on_its_generator_alone() -> None:
    def weights(seed: int) -> Tensor:
        return FlowFamily(torch.zeros(3), torch.ones(3), 5, generator(seed, "x")).parameters["hidden.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# Bytes


@pytest.mark.parametrize("size", [40, 200])
@pytest.mark.parametrize("name", ["full-rank", "flow"])
def test_bytes_are_those_of_parameters_gradients_and_moments(name: str, size: int) -> None:
    """Counted after a step of Adam; what the graph holds beside them is less than as much again."""
    hidden = 7
    family = FAMILIES[name](torch.zeros(size), torch.ones(size))
    optimizer = torch.optim.Adam(family.parameters.values())
    family.draw(torch.ones(size)).flat.sum().backward()
    assert all(parameter.grad is not None for parameter in family.parameters.values())
    optimizer.step()
    held = [t for p in family.parameters.values() for t in (p, p.grad, *optimizer.state[p].values()) if t.dim()]
    count = sum(tensor.numel() * tensor.itemsize for tensor in held)
    told = FullRankFamily.num_bytes(size, 4) if name == "full-rank" else FlowFamily.num_bytes(size, hidden, 4)
    assert count <= told <= 2 * count


@pytest.mark.parametrize(
    ("family", "need"),
    [("full-rank", 7 * 200_000**2 * 4), ("flow", (4 * (3 * 200_000 * 64 + 64 + 200_000 * 27) + 9 * 200_000 * 64) * 4)],
)
def test_more_than_the_memory_is_refused_before_it_is_taken(family: Any, need: int) -> None:
    """1.1 TB would not be there to be taken; the flow is asked for one byte less than it needs."""
    module = nn.Linear(200_000, 1, bias=False)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=1)
    memory = 4 * 1024**3 if family == "full-rank" else need - 1
    with pytest.raises(
        ConfigError, match=rf"Guide\('{family}', memory=\): want at least {need:,} bytes for 200,000 values"
    ):
        next(
            Guide(family, memory=memory).run(model, (torch.zeros(1, 200_000), torch.zeros(1, 1)), num_samples=1, seed=0)
        )


def test_the_memory_that_is_needed_is_enough() -> None:
    case = linear_regression()
    options = {"num_steps": 1, "batch_size": 30}
    fit(case.model, case.data, method=Guide("full-rank", memory=7 * 25 * 4, **options), num_samples=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="want at least 700 bytes for 5 values, got 699"):
        fit(case.model, case.data, method=Guide("full-rank", memory=7 * 25 * 4 - 1, **options), num_samples=1)  # type: ignore[arg-type]


# Gradients: for linear regression the posterior is normal, and ELBO(q) = log evidence - KL(q || p) is known


def near_posterior(name: str, case: LinearRegression) -> Family:
    """A family somewhat off the posterior, so that no gradient is zero."""
    spread = case.covariance.diagonal().sqrt()
    family = FAMILIES[name]((case.mean + 1.5 * spread).float(), (1.5 * spread).float())
    source = generator(5, name)
    with torch.no_grad():
        for key in ("cov_factor", "lower"):
            if key in family.parameters:
                parameter = family.parameters[key]
                parameter.copy_(0.8 * torch.randn(parameter.shape, generator=source))
    return family


def elbo(name: str, family: Family, case: LinearRegression) -> tuple[float, dict[str, Tensor]]:
    """ELBO and its gradient in every parameter, in closed form."""
    here = {key: value.detach().double().requires_grad_() for key, value in family.parameters.items()}
    value = case.log_evidence - kl_divergence(closed_form(name, here), MultivariateNormal(case.mean, case.covariance))
    value.backward()
    return float(value.detach()), {key: leaf.grad for key, leaf in here.items() if leaf.grad is not None}


def estimates(
    family: Family, case: LinearRegression, loss: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """ELBOs [S] and their gradients [S, ...] of draws by a loss of standard normals."""
    values, slopes = [], []
    for normals in torch.randn(count, family.num_normals, generator=generator(6, "normals")):
        one = -loss(normals)
        slopes.append(torch.autograd.grad(one, list(family.parameters.values())))
        values.append(one.detach())
    stacked = [torch.stack(parts).double() for parts in zip(*slopes, strict=True)]
    return torch.stack(values).double(), dict(zip(family.parameters, stacked, strict=True))


def off(estimate: Tensor, expected: Tensor) -> Tensor:
    """Error of the mean over draws, in standard errors; values that do not vary by their rounding."""
    error = estimate.std(dim=0) / math.sqrt(len(estimate))
    return (estimate.mean(dim=0) - expected).abs() / (error + 1e-4 * (1 + expected.abs()))


@pytest.mark.parametrize("reduction", ["none", "antithetic"])
@pytest.mark.parametrize("name", NORMALS)
def test_elbo_and_gradient_are_unbiased(name: str, reduction: str) -> None:
    """Within 4 standard errors of the closed form, whose gradient is many of them."""
    case = linear_regression(num_rows=11, num_inputs=3)
    family, batch = near_posterior(name, case), full_batch(case.data)
    value, slope = elbo(name, family, case)

    def loss(normals: Tensor) -> Tensor:
        sides = [normals] if reduction == "none" else [normals, -normals]
        return family_loss([family.draw(side) for side in sides], height_of(case.model), batch, 1.0)

    values, slopes = estimates(family, case, loss, 500 if reduction == "none" else 250)
    assert float(off(values, torch.tensor(value).double())) < 4
    for key, expected in slope.items():
        assert float(off(slopes[key], expected).max()) < 4, key
        # A gradient of nothing, or twice this one, would be seen.
        assert float(off(slopes[key], 0 * expected).max()) > 8, key


def test_antithetic_steps_take_the_pair() -> None:
    """The loss of a step with them is the mean of those at its normals z and at -z, and varies less."""
    case = linear_regression()
    batch = full_batch(case.data)
    share = Share(batch, len(batch.y))
    both, plain = (
        _family_fit(Guide(variance_reduction=how, batch_size=30, init_scale=0.3), case.model, case.data, 3)  # type: ignore[arg-type]
        for how in ("antithetic", "none")
    )
    family = FAMILIES["mean-field"](both.parameters["loc"], torch.full((5,), 0.45))
    z = torch.randn(5, generator=generator(3, "step", 4))
    pair = [float(family_loss([family.draw(sign * z)], height_of(case.model), batch, 1.0).detach()) for sign in (1, -1)]
    assert float(both.descent(share, 1.0, 4).loss) == pytest.approx(sum(pair) / 2, rel=1e-5)
    assert float(plain.descent(share, 1.0, 4).loss) == pytest.approx(pair[0], rel=1e-5)
    first, second = ([fitted.descent(share, 1.0, step).loss for step in range(40)] for fitted in (both, plain))
    assert float(torch.stack(first).std()) < float(torch.stack(second).std())


@pytest.mark.parametrize(("name", "reduction"), [("map", "none"), *product(FAMILIES, ["none", "antithetic"])])
def test_late_steps_by_a_trace_are_those_through_python(
    name: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients, as batches change and parameters move: a trace has no values of its own."""
    model, (x, y) = classifier()
    options = Guide(name, variance_reduction=reduction, batch_size=7, init_scale=0.3)  # type: ignore[arg-type]
    late, plain = (_family_fit(options, model, (x, y), 3) for _ in range(2))
    traces = []
    monkeypatch.setattr(gradients, "trace", lambda *given: traces.append(trace(*given)) or traces[-1])
    for step in range(STEPS_BEFORE_TRACING, STEPS_BEFORE_TRACING + 6):
        rows = (torch.arange(7) + step) % len(y)
        share = Share(Batch(x[rows], y[rows]), 7)
        found = late.descent(share, 0.9, step)
        with monkeypatch.context() as patch:
            patch.setattr(gradients, "STEPS_BEFORE_TRACING", math.inf)
            expected = plain.descent(share, 0.9, step)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
        for key, slope, other in zip(late.parameters, found.slopes, expected.slopes, strict=True):
            torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                late.parameters[key] -= 1e-3 * other  # type: ignore[operator]
                plain.parameters[key] -= 1e-3 * other  # type: ignore[operator]
    assert len(traces) == (name != "flow")  # whose splines, of Pyro, choose by masks


# Fits


@pytest.mark.parametrize(("num_steps", "share"), [(700, 0.6), pytest.param(4000, 0.02, marks=pytest.mark.slow)])
def test_full_rank_agrees_with_the_closed_form(num_steps: int, share: float) -> None:
    """By KL(q || p), against that of the best mean-field normal, whose variances are 1 / (precision)_ii."""
    case = linear_regression()
    options: dict[str, Any] = {"batch_size": 30, "lr": 0.05, "init_scale": 0.2, "variance_reduction": "antithetic"}
    *_, (_, state) = Guide("full-rank", num_steps=num_steps, **options).run(
        case.model, case.data, num_samples=1, seed=1
    )
    found = closed_form("full-rank", {key[6:]: value.double() for key, value in state.items() if key[:6] == "value."})
    posterior = MultivariateNormal(case.mean, case.covariance)
    factorised = MultivariateNormal(case.mean, (1 / torch.linalg.inv(case.covariance).diagonal()).diag())
    assert float(kl_divergence(found, posterior)) < share * float(kl_divergence(factorised, posterior))
    # The gradient in the mean is without noise where steps are taken in pairs and q has the covariance.
    assert float(((found.loc - case.mean) / posterior.stddev).abs().max()) < 0.1
    if share < 0.1:
        root = torch.linalg.cholesky(case.covariance)
        whitened = torch.linalg.solve_triangular(root, found.covariance_matrix, upper=False)
        whitened = torch.linalg.solve_triangular(root, whitened.T, upper=False)
        assert float((whitened - torch.eye(5)).abs().max()) < 0.1  # noise of the optimisation


class Square(nn.Module):
    """y = w^2 x: w and -w explain the same."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w.square()


NOISE = 0.7


def two_modes(start: float) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    likelihood = likelihoods.Gaussian(NOISE)
    model = BayesianModel(Square(start), prior=priors.Normal(), likelihood=likelihood, num_data=4)
    return model, (torch.ones(4, 1), torch.ones(4, 1))


def by_quadrature() -> tuple[Tensor, Tensor, float]:
    """A grid, the posterior density on it, and the log evidence."""
    w = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    log_joint = torch.distributions.Normal(0.0, 1.0).log_prob(w)
    log_joint = log_joint + 4 * torch.distributions.Normal(w.square(), NOISE).log_prob(torch.ones(()).double())
    evidence = torch.trapezoid(log_joint.exp(), w)
    return w, log_joint.exp() / evidence, float(evidence.log())


@pytest.mark.parametrize(
    ("num_steps", "lr", "most"),
    # One mode of two that do not overlap is log 2 = 0.69 nats away.
    [(600, 0.02, 0.5), pytest.param(2000, 0.04, 0.08, marks=pytest.mark.slow)],
)
def test_a_flow_finds_both_modes(num_steps: int, lr: float, most: float) -> None:
    """By KL(q || p), and by how far that lets the distribution functions of draws and quadrature be apart."""
    w, density, log_evidence = by_quadrature()
    model, data = two_modes(0.0)
    guide = Guide(
        "flow", num_steps=num_steps, batch_size=4, hidden=4, lr=lr, init_scale=1.0, variance_reduction="antithetic"
    )
    *_, (block, state) = guide.run(model, data, num_samples=1, seed=0)
    family = make_family(guide, model, 0)
    with torch.no_grad():
        for name, parameter in family.parameters.items():
            parameter.copy_(state[f"value.{name}"])
        normals = torch.special.ndtri((torch.arange(800) + 0.5) / 800)  # even in q
        draws = [family.draw(one) for one in normals.unsqueeze(1)]
        batch = full_batch(data)
        gaps = torch.stack([one.surprise + model.log_density(one.flat, batch)[0] for one in draws])
    divergence = log_evidence - float(gaps.mean())
    assert -0.01 < divergence < most
    drawn = torch.cat([one.flat for one in draws]).double()
    assert bool((drawn.diff() > 0).all())
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, w)])
    here = cdf[torch.searchsorted(w, drawn)]
    apart = (here - (torch.arange(800) + 0.5) / 800).abs().max()
    assert float(apart) < math.sqrt(divergence / 2) + 0.005  # Pinsker, and the grids
    # Two modes: fewer draws between them than in as wide a strip at either.
    low, middle, high = (((drawn - at).abs() < 0.25).sum() for at in (-0.95, 0.0, 0.95))
    assert int(middle) < int(low) / 2
    assert int(middle) < int(high) / 2
    assert torch.equal(block.params["w"][0], make_draw(guide, family, 0))


def make_draw(guide: Guide, family: Family, seed: int) -> Tensor:
    """The first sample of a bank: at the normals of its index."""
    normals = torch.randn(1, generator=generator(seed, "draw", 0))
    return family.draw(normals).flat.detach()


def test_a_normal_finds_one_mode() -> None:
    """That in which it starts, with the curvature there, and so misses half of the evidence."""
    model, data = two_modes(0.7)
    guide = Guide(num_steps=400, batch_size=4, lr=0.03, init_scale=0.3, draws="antithetic")
    bank = fit(model, data, method=guide, num_samples=1000, seed=0)
    drawn = bank.block(slice(None)).params["w"].flatten()
    assert float((drawn > 0).double().mean()) > 0.99
    w, density, log_evidence = by_quadrature()
    right = torch.where(w > 0, 2 * density, 0.0)
    mean = float(torch.trapezoid(right * w, w))
    assert float(drawn.mean()) == pytest.approx(mean, abs=0.1)
    elbo = 4 * bank.info["diagnostics"]["main"]["elbo_per_row"]
    assert elbo < log_evidence - 0.3


def test_the_divergence_from_the_prior_is_summed_once_over_all_layers() -> None:
    """Not a mean over layers or values, and not divided by the batch: as other toolkits have had it.

    Of a normal prior the expectation is exact at z = 1 and z = -1, since it is quadratic.
    """
    model, (x, y) = classifier()
    options = Guide("mean-field", init_scale=0.3)
    family = make_family(options, model, 0)
    batch = Batch(x[:4], y[:4])
    ones = torch.ones(model.layout.num_values)
    found = (
        sum(float(family_loss([family.draw(z)], height_of(model), batch, 0.0).detach()) for z in (ones, -ones)) / 2
    )  # no likelihood
    loc, scale = family.parameters["loc"].detach(), family.scale.detach()  # type: ignore[attr-defined]
    expected = kl_divergence(Normal(loc, scale), Normal(0.0, model.prior_scale()))
    assert found == pytest.approx(float(expected.sum()), rel=1e-5)
