"""Likelihoods: densities, draws and information against SciPy and autograd, shapes that must not broadcast, round trips."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from bnn.errors import BnnError, ConfigError, DataError
from bnn.likelihoods import (
    SCALE,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    StudentT,
    likelihood_from_config,
)
from bnn.priors import HalfCauchy, LogNormal
from bnn.seeding import generator

LEARNT = {SCALE: torch.tensor(0.7)}
ROWS = 7


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64).to(dtype)


class Truth(NamedTuple):
    """A likelihood with frozen SciPy distributions of the targets, one an output [B, C], and what it is given."""

    likelihood: Likelihood
    outputs: Tensor
    params: dict[str, Tensor]
    distribution: Any
    discrete: bool


def truth(name: str, columns: int = 2, rows: int = ROWS) -> Truth:
    """B rows of C targets; Bernoulli has one."""
    if name == "Bernoulli":
        logits = 1.5 * floats(rows, 1)
        return Truth(Bernoulli(), logits, {}, scipy.stats.bernoulli(logits.double().sigmoid().numpy()), True)
    if name == "Poisson":
        logs = floats(rows, columns)
        return Truth(Poisson(), logs, {}, scipy.stats.poisson(logs.double().exp().numpy()), True)
    if name == "HeteroscedasticGaussian":
        outputs = floats(rows, 2 * columns)
        mean, raw = outputs[:, :columns].double().numpy(), outputs[:, columns:].double().numpy()
        return Truth(
            HeteroscedasticGaussian(0.1), outputs, {}, scipy.stats.norm(mean, 0.1 + np.log1p(np.exp(raw))), False
        )
    outputs = floats(rows, columns)
    at = outputs.double().numpy()
    if name == "StudentT":
        return Truth(StudentT(5.0, 0.6), outputs, {}, scipy.stats.t(5.0, at, 0.6), False)
    if name == "StudentT learnt":
        return Truth(StudentT(9.0, HalfCauchy()), outputs, LEARNT, scipy.stats.t(9.0, at, 0.7), False)
    if name == "Gaussian learnt":
        return Truth(Gaussian(HalfCauchy()), outputs, LEARNT, scipy.stats.norm(at, 0.7), False)
    assert name == "Gaussian"
    return Truth(Gaussian(0.3), outputs, {}, scipy.stats.norm(at, 0.3), False)


NAMES = (
    "Bernoulli",
    "Gaussian",
    "Gaussian learnt",
    "HeteroscedasticGaussian",
    "StudentT",
    "StudentT learnt",
    "Poisson",
)
names = pytest.mark.parametrize("name", NAMES)
ALL = (Categorical(), *(truth(name).likelihood for name in NAMES))


def targets_of(case: Truth) -> Tensor:
    """Targets that are likely and some that are not, [B, C]."""
    drawn = case.distribution.rvs(random_state=3)
    return torch.from_numpy(drawn).long() if case.discrete else torch.from_numpy(1.7 * drawn + 0.4).float()


# Densities


def test_categorical_is_the_log_softmax_at_the_target() -> None:
    logits = 3 * torch.randn(7, 4, generator=generator(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = torch.distributions.Categorical(logits=logits).log_prob(y)
    torch.testing.assert_close(Categorical().log_prob(logits, y, {}), expected)


@names
def test_log_prob_sums_the_log_densities_of_the_outputs(name: str) -> None:
    case = truth(name)
    y = targets_of(case)
    of = case.distribution.logpmf if case.discrete else case.distribution.logpdf
    found = case.likelihood.log_prob(case.outputs, y, case.params)
    assert (found.shape, found.dtype) == ((ROWS,), torch.float32)
    torch.testing.assert_close(found.double(), torch.from_numpy(of(y.numpy()).sum(axis=1)), rtol=1e-5, atol=1e-5)


@names
def test_float64_outputs_keep_their_precision(name: str) -> None:
    case = truth(name)
    y = targets_of(case)
    of = case.distribution.logpmf if case.discrete else case.distribution.logpdf
    params = {name: value.double() for name, value in case.params.items()}
    found = case.likelihood.log_prob(case.outputs.double(), y if case.discrete else y.double(), params)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.from_numpy(of(y.numpy()).sum(axis=1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@names
def test_half_precision_outputs_are_taken_as_they_are_and_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    case = truth(name)
    outputs, y = case.outputs.to(dtype), targets_of(case)
    found = case.likelihood.log_prob(outputs, y, case.params)
    assert found.dtype == torch.float32
    assert torch.equal(found, case.likelihood.log_prob(outputs.float(), y, case.params))
    assert torch.equal(
        case.likelihood.fisher(outputs, case.params), case.likelihood.fisher(outputs.float(), case.params)
    )
    draws = [case.likelihood.sample(z, case.params, generator(0)) for z in (outputs, outputs.float())]
    assert torch.equal(draws[0], draws[1])


def test_half_precision_logits_of_classes_are_computed_in_float32() -> None:
    logits, y = floats(ROWS, 4, dtype=torch.bfloat16), torch.arange(ROWS) % 4
    assert torch.equal(Categorical().log_prob(logits, y, {}), Categorical().log_prob(logits.float(), y, {}))
    assert Categorical().fisher(logits, {}).dtype == torch.float32


@pytest.mark.parametrize("z", [-200.0, -90.0, 0.0, 90.0, 200.0])
def test_bernoulli_of_sure_logits_is_finite(z: float) -> None:
    """log p = -log(1 + exp(-z)) or -log(1 + exp z), for which probabilities would be 0."""
    logits = torch.tensor([[z], [z]], requires_grad=True)
    found = Bernoulli().log_prob(logits, torch.tensor([0, 1]), {})
    expected = torch.tensor([-max(z, 0.0), min(z, 0.0)]) - math.log1p(math.exp(-abs(z)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30)  # exp(-90) is all but 0 in float32
    found.sum().backward()
    assert bool(torch.isfinite(logits.grad).all())  # type: ignore[arg-type]


def test_the_floor_keeps_the_density_of_an_exact_fit_finite() -> None:
    """A scale of softplus(-200) is 0 in any precision."""
    outputs = torch.tensor([[1.0, -200.0]], requires_grad=True)
    found = HeteroscedasticGaussian(0.01).log_prob(outputs, torch.tensor([1.0]), {})
    assert found.tolist() == pytest.approx([scipy.stats.norm(0, 0.01).logpdf(0)])
    found.sum().backward()
    assert bool(torch.isfinite(outputs.grad).all())  # type: ignore[arg-type]


def test_a_heteroscedastic_module_gives_means_then_noise() -> None:
    mean, scale = HeteroscedasticGaussian(0.5).split(torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0, 1.0]]))
    assert mean.tolist() == [[1.0, 2.0, 3.0]]
    torch.testing.assert_close(scale, torch.tensor([[0.0, 0.0, 1.0]]).exp().log1p() + 0.5)


def test_gaussian_with_learnt_scale_takes_it_from_the_sample() -> None:
    mean, y = (torch.randn(7, 2, generator=generator(i)) for i in range(2))
    learnt = Gaussian(HalfCauchy(1.0)).log_prob(mean, y, {SCALE: torch.tensor(0.3)})
    torch.testing.assert_close(learnt, Gaussian(0.3).log_prob(mean, y, {}))
    learnt = StudentT(3.0, HalfCauchy(1.0)).log_prob(mean, y, {SCALE: torch.tensor(0.3)})
    torch.testing.assert_close(learnt, StudentT(3.0, 0.3).log_prob(mean, y, {}))


@names
def test_samples_side_by_side_under_vmap(name: str) -> None:
    case = truth(name)
    y = targets_of(case)
    outputs = torch.stack([case.outputs + 0.3 * k for k in range(5)])  # [K, B, C]
    params = {key: torch.linspace(0.4, 1.2, 5) for key in case.params}
    both = torch.func.vmap(lambda z, p: case.likelihood.log_prob(z, y, p))(outputs, params)
    for k in range(5):
        alone = case.likelihood.log_prob(outputs[k], y, {key: value[k] for key, value in params.items()})
        torch.testing.assert_close(both[k], alone)


# Shapes


@pytest.mark.parametrize(
    "likelihood",
    [Bernoulli(), Gaussian(0.7), Gaussian(HalfCauchy()), StudentT(4.0, 0.7), StudentT(4.0, HalfCauchy()), Poisson()],
)
def test_columns_and_vectors_do_not_broadcast_against_each_other(likelihood: Likelihood) -> None:
    outputs, y = floats(ROWS, 1), (torch.arange(ROWS) % 2).float()
    expected = likelihood.log_prob(outputs, y.unsqueeze(1), LEARNT)
    assert expected.shape == (ROWS,)
    for z in (outputs, outputs[:, 0]):
        for target in (y, y.unsqueeze(1)):
            torch.testing.assert_close(likelihood.log_prob(z, target, LEARNT), expected)
        assert likelihood.fisher(z, LEARNT).shape == (ROWS, 1, 1)
        drawn = likelihood.sample(z, LEARNT, generator(0))
        assert drawn.numel() == ROWS
        assert likelihood.log_prob(z, drawn, LEARNT).shape == (ROWS,)
        assert likelihood.unknown_fisher(z) == likelihood.unknown_fisher(outputs)


def test_heteroscedastic_targets_with_and_without_a_column() -> None:
    outputs, y = floats(ROWS, 2), floats(ROWS, seed=1)
    found = HeteroscedasticGaussian().log_prob(outputs, y, {})
    assert found.shape == (ROWS,)
    torch.testing.assert_close(found, HeteroscedasticGaussian().log_prob(outputs, y.unsqueeze(1), {}))


@names
def test_draws_fit_their_outputs(name: str) -> None:
    case = truth(name, columns=3)
    drawn = case.likelihood.sample(case.outputs, case.params, generator(0))
    assert drawn.shape == ((ROWS,) if name == "Bernoulli" else (ROWS, 3))
    assert drawn.dtype == (torch.int64 if name == "Bernoulli" else torch.float32)
    case.likelihood.check(case.outputs[:1], drawn)
    assert bool(torch.isfinite(case.likelihood.log_prob(case.outputs, drawn, case.params)).all())


# Draws

DRAWS = 20_000


def many(case: Truth, seed: int = 0) -> Tensor:
    """Draws for each row, [M, B, C]."""
    rows = case.outputs.repeat(DRAWS, 1)
    return case.likelihood.sample(rows, case.params, generator(seed)).view(DRAWS, len(case.outputs), -1)


@names
def test_draws_have_the_mean_and_variance_of_the_distribution(name: str) -> None:
    case = truth(name)
    drawn = many(case).double()
    mean, variance = (torch.from_numpy(np.asarray(values)) for values in case.distribution.stats("mv"))
    squares = (drawn - mean).square()
    for values, expected in ((drawn, mean), (squares, variance)):
        error = values.std(dim=0) / math.sqrt(DRAWS)
        assert values.shape[1:] == expected.expand_as(values[0]).shape
        assert bool(((values.mean(dim=0) - expected).abs() < 4.5 * error).all())


@names
def test_draws_have_the_distribution_at_its_quantiles(name: str) -> None:
    case = truth(name)
    drawn = many(case, seed=1).double()
    for level in (0.02, 0.3, 0.5, 0.9, 0.99):
        point = case.distribution.ppf(level)
        chance = torch.from_numpy(case.distribution.cdf(point))
        error = (chance * (1 - chance) / DRAWS).sqrt() + 1e-12
        share = (drawn <= torch.from_numpy(point)).double().mean(dim=0)
        assert bool(((share - chance).abs() < 4.5 * error).all()), level


@names
def test_rows_and_outputs_are_drawn_independently(name: str) -> None:
    case = truth(name)
    drawn = many(case).double().flatten(1)
    correlation = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(DRAWS)


def test_classes_are_drawn_with_their_chances() -> None:
    logits = 1.5 * floats(ROWS, 4)
    drawn = Categorical().sample(logits.repeat(DRAWS, 1), {}, generator(0))
    assert drawn.dtype == torch.int64
    chance = logits.double().softmax(dim=1)
    share = torch.nn.functional.one_hot(drawn.view(DRAWS, ROWS), 4).double().mean(dim=0)
    assert bool(((share - chance).abs() < 4.5 * (chance * (1 - chance) / DRAWS).sqrt()).all())


def test_counts_are_drawn_with_their_chances() -> None:
    case = truth("Poisson")
    drawn = many(case)
    for count in range(4):
        chance = torch.from_numpy(case.distribution.pmf(count))
        error = (chance * (1 - chance) / DRAWS).sqrt()
        assert bool((((drawn == count).double().mean(dim=0) - chance).abs() < 4.5 * error).all())


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_draws_are_the_generators(likelihood: Likelihood, world_untouched: None) -> None:
    outputs = 0.5 * floats(400, 1 if isinstance(likelihood, Bernoulli) else 4)
    draws = [likelihood.sample(outputs, LEARNT, generator(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_draws_are_made_on_the_generators_device_and_come_to_the_outputs(likelihood: Likelihood, device: str) -> None:
    outputs = 0.5 * floats(40, 1 if isinstance(likelihood, Bernoulli) else 4)
    params = {name: value.to(device) for name, value in LEARNT.items()}
    drawn = likelihood.sample(outputs.to(device), params, generator(5))
    assert drawn.device.type == device
    torch.testing.assert_close(drawn.cpu(), likelihood.sample(outputs, LEARNT, generator(5)))


# Fisher information


def scores(case: Truth, outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """d log p(y_b) / d outputs_b [B, C], and / d log scale [B] (0 where there is no unknown), by autograd in float64."""
    log_scale = {k: v.double().log().expand(len(outputs)) for k, v in case.params.items()}

    def one(z: Tensor, target: Tensor, logs: dict[str, Tensor]) -> Tensor:
        params = {key: value.exp() for key, value in logs.items()}
        return case.likelihood.log_prob(z.unsqueeze(0), target.unsqueeze(0), params)[0]

    of_outputs, of_logs = torch.func.vmap(torch.func.grad(one, argnums=(0, 2)))(outputs.double(), y.double(), log_scale)
    return of_outputs, of_logs.get(SCALE, torch.zeros(len(outputs), dtype=torch.float64))


@names
def test_fisher_is_the_expected_outer_product_of_scores_by_sum_or_quadrature(name: str) -> None:
    """One target a row, integrated over: counts up to 60, and the line as y = loc + scale tan(t)."""
    case = truth(name, columns=1)
    if case.discrete:
        y = torch.arange(2 if name == "Bernoulli" else 60, dtype=torch.float64).expand(ROWS, -1)  # [B, G]
        weight = torch.from_numpy(case.distribution.pmf(y.numpy()))
    else:
        angle = torch.linspace(-1, 1, 4001, dtype=torch.float64)[1:-1] * math.pi / 2
        centre, spread = (torch.from_numpy(np.asarray(case.distribution.ppf(p))) for p in (0.5, 0.8))
        y = centre + (spread - centre) * angle.tan()
        density = torch.from_numpy(case.distribution.pdf(y.numpy())) * (spread - centre) / angle.cos().square()
        weight = density * (angle[1] - angle[0])
    torch.testing.assert_close(weight.sum(dim=1), torch.ones(ROWS, dtype=torch.float64), rtol=0, atol=1e-6)
    information = case.likelihood.fisher(case.outputs, case.params)
    columns = case.outputs.shape[1]
    assert information.shape == (ROWS, columns, columns)
    for row in range(ROWS):
        grid = y[row].unsqueeze(1)
        of_outputs, of_scale = scores(case, case.outputs[row].expand(len(grid), -1), grid)
        expected = torch.einsum("g,gi,gj->ij", weight[row], of_outputs, of_outputs)
        torch.testing.assert_close(information[row].double(), expected, rtol=1e-4, atol=1e-5)
        if case.params:
            known = case.likelihood.unknown_fisher(case.outputs)
            assert known == pytest.approx(float(weight[row] @ of_scale.square()), rel=1e-4)
        torch.testing.assert_close(  # nothing is shared by the scale and the outputs
            (weight[row] * of_scale) @ of_outputs, torch.zeros(columns, dtype=torch.float64), rtol=0, atol=1e-5
        )


def test_fisher_of_classes_is_the_expected_outer_product_of_scores() -> None:
    logits = 1.5 * floats(ROWS, 4, dtype=torch.float64)
    expected = torch.zeros(ROWS, 4, 4, dtype=torch.float64)
    for c in range(4):
        z = logits.clone().requires_grad_()
        (score,) = torch.autograd.grad(Categorical().log_prob(z, torch.full((ROWS,), c), {}).sum(), z)
        expected += logits.softmax(dim=1)[:, c, None, None] * score.unsqueeze(2) * score.unsqueeze(1)
    torch.testing.assert_close(Categorical().fisher(logits, {}), expected)


@names
def test_fisher_of_several_outputs_is_that_of_draws(name: str) -> None:
    """By Monte Carlo, in standard errors: also what outputs of one row share, and what they share with the scale."""
    case = truth(name, columns=3, rows=2)
    rows = case.outputs.repeat(DRAWS, 1)
    drawn = case.likelihood.sample(rows, case.params, generator(2)).view(len(rows), -1)
    of_outputs, of_scale = scores(case, rows, drawn)
    joint = torch.cat([of_outputs, of_scale.unsqueeze(1)], dim=1).view(DRAWS, 2, -1)
    products = joint.unsqueeze(3) * joint.unsqueeze(2)  # [M, B, C + 1, C + 1]
    expected = torch.zeros(products.shape[1:], dtype=torch.float64)
    expected[:, :-1, :-1] = case.likelihood.fisher(case.outputs, case.params)
    if case.params:
        expected[:, -1, -1] = case.likelihood.unknown_fisher(case.outputs)
    error = products.std(dim=0) / math.sqrt(DRAWS) + 1e-9
    assert bool(((products.mean(dim=0) - expected).abs() < 4.5 * error).all())


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_fisher_is_positive_semidefinite(likelihood: Likelihood) -> None:
    outputs = 4 * floats(ROWS, 1 if isinstance(likelihood, Bernoulli) else 4)
    information = likelihood.fisher(outputs, LEARNT)
    assert information.shape == (ROWS, outputs.shape[1], outputs.shape[1])
    assert torch.equal(information, information.mT)
    assert float(torch.linalg.eigvalsh(information.double()).min()) > -1e-6
    assert float(information.diagonal(dim1=1, dim2=2).min()) > 0


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_what_is_known_of_the_scale_grows_with_the_outputs(likelihood: Likelihood) -> None:
    """Two of each output of a normal, and less of a t the heavier its tails are; nothing of what has no scale."""
    outputs = floats(ROWS, 1 if isinstance(likelihood, Bernoulli) else 4)
    each = 2.0 * isinstance(likelihood, Gaussian)
    if isinstance(likelihood, StudentT):
        each = 2 * likelihood.df / (likelihood.df + 3)
    assert likelihood.unknown_fisher(outputs) == pytest.approx(4 * each)


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_the_task_and_the_unknowns(likelihood: Likelihood) -> None:
    assert (likelihood.task == "classification") == isinstance(likelihood, Categorical | Bernoulli)
    prior = getattr(likelihood, "scale", None)
    assert likelihood.unknowns == (((SCALE, prior),) if isinstance(prior, HalfCauchy) else ())


# Refusals


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y", "message"),
    [
        (
            Gaussian(1.0),
            (7, 2),
            torch.zeros(7),
            r"likelihood Gaussian: want targets of the shape of the outputs \[7, 2\]",
        ),
        (Gaussian(1.0), (7, 2), torch.zeros(7, 3), r"likelihood Gaussian: want targets of the shape"),
        (StudentT(4.0), (7, 2), torch.zeros(7), r"likelihood StudentT: want targets of the shape .*, got \[7, 1\]"),
        (StudentT(4.0), (6, 1), torch.zeros(7), r"likelihood StudentT: want targets of the shape"),
        (Poisson(), (7, 3), torch.zeros(7, 2), r"likelihood Poisson: want targets of the shape .*, got \[7, 2\]"),
        (Poisson(), (7, 3), torch.zeros(7), r"likelihood Poisson: want targets of the shape"),
        (
            HeteroscedasticGaussian(),
            (7, 3),
            torch.zeros(7),
            r"want 2 outputs a target, got outputs \[7, 3\] and targets",
        ),
        (HeteroscedasticGaussian(), (7, 2), torch.zeros(7, 2), r"HeteroscedasticGaussian: want 2 outputs a target"),
        (HeteroscedasticGaussian(), (7, 1), torch.zeros(7), r"HeteroscedasticGaussian: want 2 outputs a target"),
        (HeteroscedasticGaussian(), (7,), torch.zeros(7), r"HeteroscedasticGaussian: want 2 outputs a target"),
        (Bernoulli(), (7, 3), torch.zeros(7), r"likelihood Bernoulli: want one output and one target a row"),
        (Bernoulli(), (7, 2), torch.zeros(7, 2), r"likelihood Bernoulli: want one output and one target a row"),
        (Bernoulli(), (6, 1), torch.zeros(7), r"likelihood Bernoulli: want one output and one target a row"),
        (Categorical(), (7, 4), torch.zeros(7), r"likelihood Categorical: want outputs \[B, C\] and int64 targets"),
        (Categorical(), (7,), torch.zeros(7, dtype=torch.int64), r"likelihood Categorical: want outputs \[B, C\]"),
        (Categorical(), (7, 4), torch.zeros(6, dtype=torch.int64), r"likelihood Categorical: want outputs \[B, C\]"),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    likelihood: Likelihood, outputs: tuple[int, ...], y: Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        likelihood.log_prob(torch.zeros(outputs), y, LEARNT)
    if outputs[0] == len(y):
        with pytest.raises(DataError, match=r"likelihood \w+: want"):
            likelihood.check(torch.zeros(outputs)[:1], y)


@pytest.mark.parametrize("likelihood", [Gaussian(1.0), StudentT(), Poisson(), HeteroscedasticGaussian()], ids=str)
def test_more_than_rows_and_columns_is_refused(likelihood: Likelihood) -> None:
    """A sum over the last axis alone would leave no [B]."""
    columns = 2 if isinstance(likelihood, HeteroscedasticGaussian) else 1
    with pytest.raises(DataError, match=r"likelihood \w+: want"):
        likelihood.log_prob(torch.zeros(7, 4, 3 * columns), torch.zeros(7, 4, 3), {})


@pytest.mark.parametrize(
    ("likelihood", "columns", "y", "message"),
    [
        (Bernoulli(), 1, [0.0, 2.0, 1.0], r"^likelihood Bernoulli: want targets 0 or 1, got 0 to 2; use Categorical"),
        (Bernoulli(), 1, [0.0, 0.5, 1.0], r"want targets 0 or 1"),
        (Bernoulli(), 1, [1.0, -1.0, 1.0], r"want targets 0 or 1, got -1 to 1"),
        (Bernoulli(), 1, [0.0, math.nan, 1.0], r"want targets 0 or 1"),
        (
            Bernoulli(),
            3,
            [0.0, 1.0, 1.0],
            r"^likelihood Bernoulli: want one output .*, got outputs \[1, 3\].*Categorical",
        ),
        (Poisson(), 1, [0.0, -1.0, 2.0], r"^likelihood Poisson: want counts 0, 1, 2, ..., got -1; use Gaussian"),
        (Poisson(), 1, [0.0, 1.0, 1.5], r"want counts 0, 1, 2, ..., got 1.5"),
        (Poisson(), 1, [0.0, math.nan, 1.0], r"want counts 0, 1, 2, ..., got nan"),
        (Poisson(), 1, [0.0, math.inf, 1.0], r"want counts 0, 1, 2, ..., got inf"),
        (Poisson(), 2, [0.0, 1.0, 1.0], r"^likelihood Poisson: want targets of the shape"),
        (HeteroscedasticGaussian(), 3, [0.0, 1.0, 1.0], r"want 2 outputs a target, got outputs \[1, 3\]"),
        (Gaussian(), 2, [0.0, 1.0, 1.0], r"^likelihood Gaussian: want targets of the shape"),
        (Categorical(), 3, [0, 3, 1], r"want classes in \[0, 3\), .*, got 0 to 3"),
        (Categorical(), 3, [0, -1, 1], r"want classes in \[0, 3\), .*, got -1 to 1"),
        (Categorical(), 3, [0.0, 1.0, 1.0], r"int64 targets"),
    ],
)
def test_check_looks_at_all_targets(likelihood: Likelihood, columns: int, y: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        likelihood.check(torch.zeros(1, columns), torch.tensor(y))


@pytest.mark.parametrize(
    ("likelihood", "columns", "y"),
    [
        (Bernoulli(), 1, torch.tensor([0, 1, 1])),
        (Bernoulli(), 1, torch.tensor([0.0, 1.0, 1.0])),
        (Bernoulli(), 1, torch.tensor([False, True, True])),
        (Bernoulli(), 1, torch.tensor([[0.0], [1.0], [1.0]])),
        (Poisson(), 1, torch.tensor([0, 4, 1])),
        (Poisson(), 1, torch.tensor([0, 4, 1], dtype=torch.uint8)),
        (Poisson(), 1, torch.tensor([False, True, True])),
        (Poisson(), 2, torch.tensor([[0.0, 3.0], [7.0, 1e6], [1.0, 2.0]])),
        (HeteroscedasticGaussian(), 2, torch.tensor([0.0, -4.5, 1.0])),
        (HeteroscedasticGaussian(), 4, torch.zeros(3, 2)),
        (StudentT(), 2, torch.zeros(3, 2)),
    ],
)
def test_check_lets_fitting_targets_through(likelihood: Likelihood, columns: int, y: Tensor) -> None:
    likelihood.check(torch.zeros(1, columns), y)
    found = likelihood.log_prob(torch.zeros(3, columns), y, {})
    assert found.shape == (3,)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_check_wants_one_tensor(likelihood: Likelihood) -> None:
    with pytest.raises(DataError, match=r"^module: want one tensor of outputs, got tuple"):
        likelihood.check((torch.zeros(1, 2), torch.zeros(1, 2)), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "1", None, True, [1.0], HalfCauchy])
def test_options_out_of_range_are_refused(value: Any) -> None:
    makes = ((Gaussian, "scale"), (StudentT, "scale"), (StudentT, "df"), (HeteroscedasticGaussian, "floor"))
    for make, option in makes:
        with pytest.raises(ConfigError, match=rf"^{make.__name__}\({option}=\): want a positive number"):
            make(**{option: value})


@pytest.mark.parametrize(("make", "option"), [(StudentT, "df"), (HeteroscedasticGaussian, "floor")])
def test_only_scales_can_be_unknown(make: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=rf"\({option}=\)"):
        make(**{option: HalfCauchy()})


# Configs


@pytest.mark.parametrize(
    "likelihood",
    [
        *ALL,
        Gaussian(LogNormal(0.1, 0.4)),
        StudentT(2.5, LogNormal(0.1, 0.4)),
        StudentT(),
        HeteroscedasticGaussian(),
        HeteroscedasticGaussian(0.25),
    ],
    ids=str,
)
def test_config_round_trip(likelihood: Likelihood) -> None:
    config = json.loads(json.dumps(likelihood.to_config(), sort_keys=True, allow_nan=False))
    assert likelihood_from_config(config) == likelihood
    assert config["name"] == type(likelihood).__name__


@pytest.mark.parametrize(
    "config",
    [None, {}, "Gaussian", [], [{"name": "Gaussian"}], 3, True, *({"name": n} for n in ("Weibull", None, 3, [], {}))],
    ids=str,
)
def test_a_bank_without_a_known_likelihood_says_so(config: Any) -> None:
    with pytest.raises(ConfigError, match="pass likelihood="):
        likelihood_from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "Categorical", "scale": 1.0}, "got 'scale'"),
        ({"name": "Gaussian", "df": 1.0}, "^likelihood Gaussian: want options among scale, got 'df'"),
        ({"name": "StudentT", "loc": 1.0}, "^likelihood StudentT: want options among df, scale, got 'loc'"),
        ({"name": "HeteroscedasticGaussian", "scale": 1.0}, "want options among floor, got 'scale'"),
        (
            {"name": "Gaussian", "scale": {"name": "Cauchy"}},
            "^likelihood scale name: want one of HalfCauchy, LogNormal",
        ),
        ({"name": "Gaussian", "scale": {"name": "HalfCauchy", "loc": 0.0}}, "want options among scale, got 'loc'"),
    ],
)
def test_unknown_options_are_refused_with_the_list(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        likelihood_from_config(config)


@pytest.mark.parametrize(
    "value", ["x", None, [], [1.0], True, {}, {"*": 1.0}, math.nan, 10**400, {"name": "Normal"}, {"name": ["HalfCauchy"]}],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "option"),
    [("Gaussian", "scale"), ("StudentT", "scale"), ("StudentT", "df"), ("HeteroscedasticGaussian", "floor")],
)
def test_options_of_a_wrong_type_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(BnnError, match=option):
        likelihood_from_config({"name": name, option: value})
