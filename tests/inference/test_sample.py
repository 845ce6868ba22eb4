"""`sample`: draws of targets with known moments, and what it promises of chains, forms and randomness."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from scenarios import linear_regression
from torch import Tensor

from bnn.diagnostics import ebfmi, ess_mean, mcse_mean, split_rhat
from bnn.errors import ConfigError, FitError
from bnn.inference.hmc import Sampled, sample
from bnn.seeding import generator

EULER = 0.5772156649015329


def standard_errors(draws: Tensor, expected: Tensor | float, *, least_ess: float = 200) -> float:
    """The largest |mean - expected| in standard errors of draws [C, D, ...], after checking that they have mixed."""
    ess = float(ess_mean(draws).min())
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    error = draws.double().mean(dim=(0, 1)) - expected
    return float((error.abs() / mcse_mean(draws)).max())


def check_normal(draws: Tensor, mean: Tensor, variance: Tensor, *, least_ess: float = 200) -> None:
    """Means and variances of normal draws [C, D, P] within four standard errors, of which only the ESS is estimated.

    SE(mean) = sqrt(variance / ESS), SE(mean of squares) = variance sqrt(2 / ESS)
    """
    left = draws.double() - mean
    for values, expected, spread in ((left, 0.0, variance.sqrt()), (left.square(), variance, variance * math.sqrt(2))):
        ess = ess_mean(values)
        assert float(ess.min()) > least_ess, f"not mixed: ESS {float(ess.min()):.0f}"
        error = (values.mean(dim=(0, 1)) - expected).abs()
        assert float((error * ess.sqrt() / spread).max()) < 4


def common_step(found: Sampled) -> float:
    """The step size of the chains, their geometric mean."""
    return float(found.info.step_size.log().mean().exp())


def standard_normal(flat: Tensor) -> Tensor:
    return -0.5 * flat.square().sum()


def normal(scales: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda flat: -0.5 * (flat / scales).square().sum()


def rotated(scales: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A normal with these standard deviations along random axes, and its variances."""
    size = len(scales)
    axes = torch.linalg.qr(torch.randn(size, size, generator=generator(0, "axes"), dtype=torch.float64)).Q
    turned = axes.float()
    return lambda flat: -0.5 * (flat @ turned / scales).square().sum(), (axes * scales).square().sum(dim=1)


# Moments of targets with known answers.


@pytest.mark.parametrize(
    ("num_chains", "num_draws", "num_steps"),
    [(16, 300, None), pytest.param(4, 1000, 24, marks=pytest.mark.slow)],
    ids=["chees", "jittered"],
)
def test_a_normal_of_condition_ten_thousand_in_a_hundred_dimensions(
    num_chains: int, num_draws: int, num_steps: int | None
) -> None:
    scales = torch.logspace(-1, 1, 100)
    found = sample(
        normal(scales),
        torch.randn(num_chains, 100, generator=generator(0, "start")),
        num_draws=num_draws,
        num_warmup=300,
        num_steps=num_steps,
        seed=1,
    )
    check_normal(found.draws, torch.zeros(100), scales.square())
    assert int(found.info.divergent.sum()) == 0
    assert 0.7 < float(found.info.acceptance.mean()) < 0.95
    # Standard deviations pooled over the chains of a warm-up, 100 of them: within a few per cent.
    torch.testing.assert_close(found.info.scale, scales, rtol=0.25, atol=0)


def test_a_low_rank_mass_reaches_what_a_diagonal_one_cannot() -> None:
    """Four directions of a hundred times the spread of the others, across all coordinates: condition 1e4."""
    scales = torch.ones(100)
    scales[:4] = 100.0
    density, variance = rotated(scales)
    start = torch.randn(4, 100, generator=generator(0, "start"))
    options: dict[str, Any] = {"num_warmup": 300, "num_steps": 12, "seed": 2, "trajectory": "jittered"}
    low_rank = sample(density, start, num_draws=450, mass="low-rank", rank=6, **options)
    with pytest.warns(UserWarning, match="chains disagree, R-hat"):
        diagonal = sample(density, start, num_draws=100, mass="diagonal", **options)
    check_normal(low_rank.draws, torch.zeros(100), variance)

    def worth(found: Sampled) -> float:
        """The least ESS of a leapfrog step."""
        return float(ess_mean(found.draws).min()) / float(found.info.num_steps.sum())

    assert worth(low_rank) > 5 * worth(diagonal)
    assert common_step(low_rank) > 2 * common_step(diagonal)


@pytest.mark.slow
@pytest.mark.parametrize("mass", ["diagonal", "low-rank"])
def test_a_rotated_normal_of_condition_ten_thousand_under_chees(mass: Any) -> None:
    scales = torch.logspace(-1, 1, 40)
    density, variance = rotated(scales)
    start = torch.randn(16, 40, generator=generator(0, "start"))
    found = sample(density, start, num_draws=200, num_warmup=300, mass=mass, seed=3)
    check_normal(found.draws, torch.zeros(40), variance)


def test_a_funnel_written_without_centre() -> None:
    """v ~ N(0, 3^2), x_i = exp(v / 2) z_i: E log |x_i| = E v / 2 + E log |z| = -(EULER + log 2) / 2."""

    def density(flat: Tensor) -> Tensor:
        return -0.5 * (flat[0] / 3).square() - 0.5 * flat[1:].square().sum()

    found = sample(density, torch.zeros(16, 6), num_draws=300, num_warmup=200, seed=0)
    v, z = found.draws[..., :1], found.draws[..., 1:]
    check_normal(v, torch.zeros(1), torch.full((1,), 9.0))
    check_normal(z, torch.zeros(5), torch.ones(5))
    assert standard_errors(v / 2 + z.abs().log(), -(EULER + math.log(2)) / 2) < 4
    assert int(found.info.divergent.sum()) == 0


def centred_funnel(flat: Tensor) -> Tensor:
    v, x = flat[0], flat[1:]
    return -0.5 * (v / 3).square() - 0.5 * x.square().sum() * torch.exp(-v) - 0.5 * len(x) * v


def test_chains_that_have_not_mixed_in_a_funnel_are_told_of_in_one_warning() -> None:
    """Not one trajectory diverges, for the step size fits the mouth: R-hat and E-BFMI alone say that the neck was missed."""
    start = torch.randn(4, 10, generator=generator(0, "start"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = sample(centred_funnel, start, num_draws=200, num_warmup=200, num_steps=16, seed=0)
    (message,) = (str(one.message) for one in told)
    rhat, least = float(found.info.rhat.max()), float(found.info.ebfmi.min())
    assert rhat > 1.05
    assert least < 0.3
    assert f"R-hat {rhat:.2f} in coordinate {int(found.info.rhat.argmax())} (want at most 1.05)" in message
    assert f"E-BFMI {least:.2f} in chain {int(found.info.ebfmi.argmin())} (want at least 0.3)" in message
    assert "\n" not in message
    torch.testing.assert_close(found.info.rhat, split_rhat(found.draws))
    torch.testing.assert_close(found.info.ebfmi, ebfmi(found.info.energy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(centred_funnel, start, num_draws=99, num_warmup=200, num_steps=16, seed=0)  # too few to tell


def test_chains_of_unlike_targets_are_not_asked_to_agree() -> None:
    context = torch.tensor([[-30.0], [0.0], [30.0]])
    found = sample(
        lambda flat, mean: standard_normal(flat - mean), context.clone(), context=context, num_draws=120, num_warmup=100
    )
    assert bool(found.info.rhat.isnan().all())
    assert found.info.ebfmi.shape == (3,)


def test_divergences_of_a_funnel_with_its_centre_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"HMC: .* trajectories diverged: the draws do not represent"):
        found = sample(
            centred_funnel,
            torch.randn(8, 10, generator=generator(0, "start")),
            num_draws=100,
            num_warmup=0,
            num_steps=16,
            step_size=0.7,
            seed=0,
        )
    assert int(found.info.divergent.sum()) > 0.05 * 800
    assert set(found.info.divergent.flatten().tolist()) == {0.0, 1.0}


def test_conjugate_linear_regression() -> None:
    case = linear_regression()
    x, y = case.data[0].double(), case.data[1].double()

    def density(params: dict[str, Tensor]) -> Tensor:
        weight, bias = params["weight"], params["bias"]
        left = y.squeeze(1) - x @ weight - bias
        prior: Tensor = (weight.square().sum() + bias.square()) / 1.5**2
        return -0.5 * (left / 0.5).square().sum() - 0.5 * prior

    start = {"weight": torch.zeros(4, 4, dtype=torch.float64), "bias": torch.zeros(4, dtype=torch.float64)}
    found = sample(density, start, num_draws=500, num_warmup=150, num_steps=7, seed=1)
    draws = torch.cat([found.draws["weight"], found.draws["bias"].unsqueeze(-1)], dim=-1)  # [C, D, P]
    check_normal(draws, case.mean, case.covariance.diagonal())
    left = draws - case.mean
    products = left.unsqueeze(-1) * left.unsqueeze(-2)  # [C, D, P, P]
    assert standard_errors(products, case.covariance) < 4


def test_logistic_regression_against_quadrature() -> None:
    source = generator(0, "logistic")
    x = torch.randn(9, 2, generator=source, dtype=torch.float64) * torch.tensor([1.0, 3.0])
    y = (x[:, 0] + 0.5 > 0).double()

    def density(flat: Tensor) -> Tensor:
        logits = x @ flat
        return (y * logits - torch.nn.functional.softplus(logits)).sum() - 0.5 * (flat / 2).square().sum()

    axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)  # [G, 2]
    weight = torch.func.vmap(density)(grid).softmax(dim=0)
    mean = weight @ grid
    moments = weight @ (grid - mean).square()
    cross = weight @ (grid - mean).prod(dim=1)
    assert float(weight[grid.abs().max(dim=1).values > 11.5].sum()) < 1e-7, "the grid is too small"
    found = sample(density, torch.zeros(4, 2, dtype=torch.float64), num_draws=700, num_warmup=100, num_steps=5, seed=4)
    assert standard_errors(found.draws, mean) < 4
    assert standard_errors((found.draws - mean).square(), moments) < 4
    assert standard_errors((found.draws - mean).prod(dim=-1), cross) < 4


def test_logarithms_of_gamma_variables() -> None:
    """u = log x, x ~ Gamma(a, 1): the cumulants of u are polygammas of a, its third one negative; E exp u = a."""
    shape = torch.tensor([0.7, 2.0, 7.0])
    found = sample(
        lambda flat: (shape * flat - flat.exp()).sum(), torch.zeros(4, 3), num_draws=1000, num_warmup=150, num_steps=7
    )
    mean = torch.digamma(shape)
    assert standard_errors(found.draws, mean) < 4
    assert standard_errors((found.draws - mean).square(), torch.polygamma(1, shape)) < 4
    assert standard_errors((found.draws - mean).double() ** 3, torch.polygamma(2, shape)) < 4
    assert standard_errors(found.draws.exp(), shape) < 4


@pytest.mark.parametrize(
    ("trajectory", "num_chains"),
    [("fixed", 4), ("fixed", 16), ("jittered", 4), ("jittered", 17), ("chees", 5), ("auto", 4), ("auto", 16)],
)
def test_every_trajectory_leads_to_one_target(trajectory: Any, num_chains: int) -> None:
    covariance = torch.tensor([[4.0, 1.5, 0.0], [1.5, 1.0, -0.2], [0.0, -0.2, 0.5]])
    precision = torch.linalg.inv(covariance)
    mean = torch.tensor([3.0, -1.0, 0.5])
    learns = trajectory == "chees" or (trajectory == "auto" and num_chains >= 16)
    options: dict[str, Any] = {"num_warmup": 150, "num_steps": None if learns else 5}
    if trajectory == "fixed":  # of a length that is no multiple of half a period in any direction
        options = {"num_warmup": 0, "num_steps": 5, "step_size": 0.35}
    found = sample(
        lambda flat: -0.5 * (flat - mean) @ precision @ (flat - mean),
        mean + torch.randn(num_chains, 3, generator=generator(0, "start")),
        num_draws=3000 // num_chains,
        trajectory=trajectory,
        seed=5,
        **options,
    )
    check_normal(found.draws, mean, covariance.diagonal())
    left = found.draws.double() - mean
    assert standard_errors(left[..., 0] * left[..., 1], 1.5) < 4
    lengths = set(found.info.num_steps.tolist())
    if trajectory == "fixed":
        assert lengths == {5}
    elif learns:
        assert len(lengths) > 1
        assert max(lengths) <= 512
    else:
        assert lengths == {3, 4, 5}


@pytest.mark.parametrize(("num_chains", "same_as"), [(15, "jittered"), (16, "chees")])
def test_auto_is_chees_from_sixteen_chains_on(num_chains: int, same_as: Any) -> None:
    start = torch.randn(num_chains, 2, generator=generator(0, "start"))
    auto, named = (
        sample(standard_normal, start, num_draws=5, num_warmup=20, trajectory=trajectory, seed=0).draws
        for trajectory in ("auto", same_as)
    )
    assert torch.equal(auto, named)


def test_chees_learns_the_length_of_a_mode_where_chains_are_in_modes_far_apart() -> None:
    """Two normals 400 apart, long in one direction and short in the one between them: the long one sets the length."""
    scales, centre = torch.tensor([8.0, 1.0, 1.0]), torch.tensor([0.0, 200.0, 0.0])
    one = normal(scales)
    side = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0).unsqueeze(1)
    start = torch.randn(16, 3, generator=generator(0, "start")) * scales
    longest = []
    apart = pytest.warns(UserWarning, match="chains disagree, R-hat .* in coordinate 1 ")
    for where, told in ((side * centre, apart), (centre.expand(16, 3), nullcontext())):
        with told:
            found = sample(
                lambda flat: torch.logaddexp(one(flat - centre), one(flat + centre)),
                start + where,
                num_draws=120,
                num_warmup=300,
                trajectory="chees",
                mass="unit",
                seed=0,
            )
        check_normal(found.draws - where.unsqueeze(1), torch.zeros(3), scales.square())
        longest.append(float(found.info.num_steps.max()) * common_step(found))
    assert longest[0] == pytest.approx(longest[1], rel=0.2)
    assert all(8 < time < 8 * math.pi for time in longest)


def test_one_chain_alone_learns_a_length_by_chees() -> None:
    """With nobody to be centred with it takes its own mean: the length does not wander off."""
    for seed in (0, 1):
        found = sample(
            normal(torch.tensor(3.0)),
            torch.zeros(1, 5),
            num_draws=64,
            num_warmup=600,
            trajectory="chees",
            mass="unit",
            seed=seed,
        )
        assert 4 < float(found.info.num_steps.max()) * common_step(found) < 12  # half a period is 9.4


def test_energies_are_those_of_the_draws() -> None:
    """E = -log pi + kinetic energy, a chi-square of P degrees of freedom halved."""
    scales = torch.tensor([0.5, 1.0, 3.0, 10.0])
    found = sample(normal(scales), torch.zeros(4, 4), num_draws=400, num_warmup=150, num_steps=5, seed=0)
    log_density = torch.func.vmap(torch.func.vmap(normal(scales)))(found.draws)
    torch.testing.assert_close(found.info.log_density.float(), log_density)
    kinetic = found.info.energy + found.info.log_density
    assert standard_errors(kinetic, 2.0) < 4
    assert standard_errors((kinetic - 2.0).square(), 2.0) < 4


# Chains, forms and randomness.


def test_each_chain_has_its_own_context() -> None:
    centre = torch.tensor([0.0, -40.0, 7.0, 300.0, 5.0])  # no order that a sort could keep
    spread = torch.tensor([1.0, 1.6, 1.3, 1.45, 1.15])
    context = torch.stack([centre, spread], dim=1)  # [C, 2]

    def density(flat: Tensor, own: Tensor) -> Tensor:
        return -0.5 * ((flat - own[0]) / own[1]).square().sum()

    start = centre.unsqueeze(1).expand(5, 3)
    found = sample(density, start, context=context, num_draws=1000, num_warmup=150, trajectory="chees", seed=0)
    for chain in range(5):
        own = found.draws[chain : chain + 1]
        check_normal(own, centre[chain].expand(3), spread[chain].square().expand(3))


def test_a_context_of_several_axes_and_of_whole_numbers() -> None:
    """Class counts a chain: the log odds of a Beta(1 + k, 1 + n - k) variable."""
    counts = torch.tensor([[[1, 9], [4, 4]], [[7, 1], [2, 0]], [[3, 3], [0, 8]]])  # [C, P, 2]

    def density(flat: Tensor, own: Tensor) -> Tensor:
        return ((1 + own[:, 0]) * flat - (2 + own.sum(dim=1)) * torch.nn.functional.softplus(flat)).sum()

    found = sample(density, torch.zeros(3, 2), context=counts, num_draws=1400, num_warmup=100, num_steps=6, seed=0)
    mean = torch.digamma(1.0 + counts[..., 0]) - torch.digamma(1.0 + counts[..., 1])  # [C, P]
    variance = torch.polygamma(1, 1.0 + counts[..., 0]) + torch.polygamma(1, 1.0 + counts[..., 1])
    for chain in range(3):
        own = found.draws[chain : chain + 1]
        assert standard_errors(own, mean[chain]) < 4
        assert standard_errors((own - mean[chain]).square(), variance[chain]) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dict_comes_back_in_its_own_form(dtype: torch.dtype) -> None:
    start = {"b": torch.zeros(4, 3, 2), "scale": torch.zeros(4), "a": torch.zeros(4, 1, 5)}
    start = {name: tensor.to(dtype) for name, tensor in start.items()}
    centre = {"b": torch.arange(6.0).view(3, 2), "scale": torch.tensor(-3.0), "a": 10 + torch.arange(5.0).view(1, 5)}

    def density(params: dict[str, Tensor]) -> Tensor:
        assert {name: tensor.shape for name, tensor in params.items()} == {n: c.shape for n, c in centre.items()}
        return -0.5 * torch.stack([(params[name] - centre[name]).square().sum() for name in centre]).sum()

    found = sample(density, start, num_draws=300, num_warmup=120, num_steps=6, seed=1)
    assert list(found.draws) == list(start)
    for name, draws in found.draws.items():
        assert draws.shape == (4, 300, *centre[name].shape)
        assert draws.dtype == dtype
        assert standard_errors(draws, centre[name]) < 4


def test_float64_draws_where_float32_would_round() -> None:
    """A unit normal around 1e8, where float32 knows every eighth number."""
    start = torch.full((4, 3), 1e8, dtype=torch.float64)
    found = sample(lambda flat: standard_normal(flat - 1e8), start, num_draws=300, num_warmup=150, num_steps=6, seed=0)
    assert found.draws.dtype == torch.float64
    check_normal(found.draws - 1e8, torch.zeros(3), torch.ones(3))


def test_forms_of_what_is_told() -> None:
    found = sample(standard_normal, torch.zeros(3, 2), num_draws=5, num_warmup=45, thin=2, seed=0)
    info = found.info
    assert found.draws.shape == (3, 5, 2)
    assert {info.acceptance.shape, info.divergent.shape, info.energy.shape, info.log_density.shape} == {(3, 5)}
    assert info.num_steps.shape == (5,)
    assert info.scale.shape == (2,)
    assert bool((info.acceptance > 0).all() & (info.acceptance <= 1).all())
    assert info.mode in ("compiled", "traced", "eager")
    assert (info.compile_seconds > 0) == (info.mode == "compiled")
    assert info.warmup_seconds > 0
    assert info.sampling_seconds > 0


def test_thinning_keeps_every_third_draw() -> None:
    options: dict[str, Any] = {"num_warmup": 50, "num_steps": 5, "seed": 1}
    every = sample(standard_normal, torch.zeros(2, 4), num_draws=21, **options)
    third = sample(standard_normal, torch.zeros(2, 4), num_draws=7, thin=3, **options)
    assert torch.equal(third.draws, every.draws[:, 2::3])
    assert torch.equal(third.info.energy, every.info.energy[:, 2::3])
    torch.testing.assert_close(third.info.acceptance, every.info.acceptance.view(2, 7, 3).mean(dim=2))


def test_chains_and_seeds_have_noise_of_their_own() -> None:
    """Chains that start alike and learn nothing part at the first draw, and so do seeds."""
    options: dict[str, Any] = {"num_draws": 3, "num_warmup": 0, "step_size": 0.3, "trajectory": "fixed", "num_steps": 2}
    draws = torch.cat([sample(standard_normal, torch.zeros(5, 2), seed=seed, **options).draws for seed in (0, 1)])
    assert len(draws[:, 0].unique(dim=0)) == 10


@pytest.mark.parametrize("trajectory", ["jittered", "chees"])
def test_without_adaptation_a_chain_knows_nothing_of_the_others(trajectory: Any) -> None:
    start = torch.randn(7, 3, generator=generator(0, "start"), dtype=torch.float64)
    options: dict[str, Any] = {"num_draws": 20, "num_warmup": 0, "step_size": 0.3, "trajectory": trajectory, "seed": 2}

    def density(flat: Tensor) -> Tensor:
        return -0.25 * (flat**4).sum() + flat.sin().sum()

    seven = sample(density, start, **options)
    two = sample(density, start[:2], **options)
    assert torch.equal(seven.draws[:2], two.draws)
    assert len(seven.draws[:, 5, 0].unique()) == 7


def test_one_seed_gives_one_run_and_another_seed_another(world_untouched: None) -> None:
    start = torch.randn(4, 3, generator=generator(0, "start"))
    kept = start.clone()
    options: dict[str, Any] = {"num_draws": 10, "num_warmup": 50, "num_steps": 5}
    first, again, other = (sample(standard_normal, start, seed=seed, **options) for seed in (7, 7, 8))
    assert torch.equal(first.draws, again.draws)
    assert torch.equal(first.info.energy, again.info.energy)
    assert not torch.isclose(first.draws, other.draws).any()
    assert torch.equal(start, kept)
    start.zero_()  # what came back holds no view of it
    assert torch.equal(first.draws, again.draws)


def test_draws_carry_no_graph() -> None:
    start = torch.zeros(2, 3, requires_grad=True)
    found = sample(standard_normal, start, num_draws=3, num_warmup=10, seed=0)
    assert not found.draws.requires_grad
    assert start.grad is None


@pytest.mark.parametrize("fails", [False, True])
def test_the_number_of_threads_is_left_alone(fails: bool) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        start = torch.full((2, 3), math.nan if fails else 0.0)
        if fails:
            with pytest.raises(FitError):
                sample(standard_normal, start, num_draws=3, num_warmup=3)
        else:
            sample(standard_normal, start, num_draws=3, num_warmup=0, step_size=0.1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# What is refused: one line each, that names what is wrong.


def refused(kind: type[Exception], density: Callable[..., Any], start: Any, **options: Any) -> str:
    """The message of the error that `sample` raises, which is one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a density cannot be traced
        with pytest.raises(kind) as caught:
            sample(density, start, **({"num_draws": 3, "num_warmup": 3} | options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("density", "got"),
    [
        (lambda flat: flat.square().sum().reshape(1), "[1]"),
        (lambda flat: flat.square(), "[4]"),
        (lambda flat: 1.0, "got float"),
        (lambda flat: (flat.sum(), flat.sum()), "got tuple"),
        (lambda flat: None, "got NoneType"),
        (lambda flat: flat.sum().long(), "int64 []"),
        (lambda flat: flat.sum().to(torch.complex64), "complex64 []"),
    ],
)
def test_a_density_of_another_form_is_refused(density: Callable[..., Any], got: str) -> None:
    message = refused(ConfigError, density, torch.zeros(3, 4))
    assert message.startswith("log_density: want a")
    assert got in message


@pytest.mark.parametrize(
    "density",
    [lambda flat: flat.sum() if flat[0] > 0 else -flat.sum(), lambda flat: flat.sum() * flat[0].item()],
    ids=["if", "item"],
)
def test_a_density_that_branches_on_values_is_refused(density: Callable[..., Any]) -> None:
    message = refused(FitError, density, torch.zeros(3, 2))
    assert "no `if` and no .item() on values" in message
    assert "torch.where" in message
    assert "it works on one position" in message


@pytest.mark.parametrize(
    ("density", "context", "got"),
    [
        (lambda flat: flat.sum() / (1 // 0), None, "got ZeroDivisionError: "),
        (lambda flat, more: flat.sum(), None, "got TypeError: .*missing 1 required positional argument: 'more'"),
        (lambda flat: flat.sum(), torch.ones(3, 2), "got TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda flat: flat @ torch.ones(5), None, "got RuntimeError: .*size"),
    ],
    ids=["division", "argument missing", "argument too many", "shape"],
)
def test_a_mistake_in_a_density_is_told_as_it_is(density: Callable[..., Any], context: Tensor | None, got: str) -> None:
    """Not as a matter of vmap: it fails on one position too."""
    message = refused(FitError, density, torch.zeros(3, 2), context=context)
    assert re.search(got, message)
    assert "mend the density" in message
    assert "torch.where" not in message


@pytest.mark.parametrize(("bad", "named"), [([1], "nan in chain 1;"), ([2, 4], "nan in chain 2, as in 2 chains")])
def test_a_density_that_is_nan_at_the_start_names_the_chain(bad: list[int], named: str) -> None:
    start = torch.zeros(5, 2)
    start[bad, 1] = math.nan
    message = refused(FitError, standard_normal, start)
    assert "a finite log density and gradient at the start" in message
    assert named in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_context_that_spoils_the_density_names_the_chain(value: float) -> None:
    context = torch.zeros(4)
    context[3] = value
    message = refused(FitError, lambda flat, own: standard_normal(flat) + own, torch.zeros(4, 2), context=context)
    assert f"{value} in chain 3" in message


def test_a_gradient_that_is_not_finite_at_the_start_is_an_error() -> None:
    message = refused(FitError, lambda flat: -flat.abs().sqrt().sum(), torch.tensor([[1.0], [0.0]]))
    assert "chain 1" in message


@pytest.mark.parametrize("num_warmup", [0, 100])
def test_a_density_that_turns_infinite_names_chain_and_step(num_warmup: int) -> None:
    """Infinite beyond 1 in one chain of three."""

    def density(flat: Tensor, limit: Tensor) -> Tensor:
        return torch.where(flat[0] > limit, math.inf, standard_normal(flat))

    message = refused(
        FitError,
        density,
        torch.zeros(3, 2),
        context=torch.tensor([100.0, 100.0, 1.0]),
        num_draws=100,
        num_warmup=num_warmup,
        step_size=0.2,
        num_steps=4,
    )
    assert "a log density below infinity" in message
    when = r"trajectory \d+ of warm-up" if num_warmup else r"draw \d+"
    assert re.search(rf"inf in chain 2 at {when};", message)


def test_chains_that_all_stand_still_are_an_error_that_names_the_draw() -> None:
    message = refused(FitError, standard_normal, torch.ones(3, 2), num_draws=300, num_warmup=0, step_size=1e4)
    assert "every chain standing still for 100 trajectories, up to draw 99" in message


def test_chains_beside_which_nothing_is_finite_are_an_error() -> None:
    """The step size falls until steps round to nothing: that is no movement either."""

    def density(flat: Tensor) -> Tensor:
        return torch.where((flat == 1.0).all(), standard_normal(flat), math.nan)

    message = refused(FitError, density, torch.ones(3, 2), num_draws=300, num_warmup=200)
    assert "every chain standing still" in message


def test_one_chain_that_stands_still_is_told_of() -> None:
    context = torch.tensor([1.0, 1e9, 1.0])
    options: dict[str, Any] = {"num_draws": 50, "num_warmup": 0, "step_size": 0.5, "num_steps": 3, "seed": 0}
    with pytest.warns(UserWarning, match=r"HMC: chains 1 accepted 0.00 of their trajectories, 50 of 150"):
        found = sample(lambda flat, own: own * standard_normal(flat), torch.ones(3, 2), context=context, **options)
    assert len(found.draws[1].unique(dim=0)) == 1
    # A trajectory that is refused leaves the chain with the energy that it began with.
    assert float((found.info.energy[1] + found.info.log_density[1]).max()) < 20
    assert len(found.draws[2].unique(dim=0)) > 10


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), "pass floats"),
        (torch.zeros(3, 2, dtype=torch.complex64), "pass floats"),
        ([[0.0, 0.0]], "pass floats"),
        ({}, "pass floats"),
        (torch.zeros(3), "want [chains, P], got [3]"),
        (torch.zeros(3, 2, 2), "want [chains, P], got [3, 2, 2]"),
        (torch.zeros(0, 2), "as many chains"),
        (torch.zeros(3, 0), "initial: want"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, "as many chains"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(3, dtype=torch.float64)}, "one dtype"),
        ({"a": torch.zeros(())}, "as many chains"),
    ],
)
def test_a_start_of_another_form_is_refused(start: Any, named: str) -> None:
    message = refused(ConfigError, lambda found: torch.zeros(()), start)
    assert message.startswith("initial: want")
    assert named in message


@pytest.mark.parametrize(
    ("context", "got"), [(torch.zeros(2, 2), "[2, 2]"), (torch.zeros(()), "[]"), ([0.0] * 3, "list")]
)
def test_a_context_of_another_form_is_refused(context: Any, got: str) -> None:
    message = refused(ConfigError, lambda flat, own: standard_normal(flat), torch.zeros(3, 2), context=context)
    assert "context: want a tensor [3, ...]" in message
    assert f"got {got}" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_draws": 0}, "num_draws: want"),
        ({"num_draws": 2.5}, "num_draws: want"),
        ({"num_warmup": -1}, "num_warmup"),
        ({"seed": "a"}, "seed: want a whole number"),
        ({"trajectory": "nuts"}, "auto, fixed, jittered, chees"),
        ({"mass": "dense"}, "diagonal, low-rank, unit"),
        ({"target_accept": 1.0}, "target_accept"),
        ({"step_size": 0.0}, "step_size"),
        ({"rank": 0}, "rank"),
        ({"thin": 0}, "thin"),
        ({"num_steps": 0}, "num_steps"),
        ({"compile": "yes"}, "compile"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    assert named in refused(ConfigError, standard_normal, torch.zeros(3, 2), **options)
