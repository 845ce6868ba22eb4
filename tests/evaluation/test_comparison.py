"""compare: agreement and total variation by NumPy, Wasserstein distances by closed forms and by dense tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from tables import random, table_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.errors import ConfigError, DataError
from bnn.evaluation import compare, wasserstein
from bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Poisson, StudentT
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture

ROWS, CLASSES = 13, 4  # N and C; the banks have 3 and 5 samples
X = torch.arange(ROWS)


def softmax_mean(tables: Tensor, log_weight: Tensor) -> np.ndarray:
    """Weighted mean of class probabilities [N, C]."""
    return np.einsum("s,snc->nc", scipy.special.softmax(log_weight), scipy.special.softmax(tables.numpy(), axis=2))


# Classes


@pytest.mark.parametrize("batch_size", [1, 5, 512])
def test_figures_of_classes_equal_numpys(batch_size: int) -> None:
    tables, weights = (random(3, ROWS, CLASSES), random(5, ROWS, CLASSES, seed=1)), (random(3), 2 * random(5) + 7)
    nets = [
        table_net(table, log_weight=weight, likelihood=Categorical())
        for table, weight in zip(tables, weights, strict=True)
    ]
    found = compare(*nets, X, batch_size=batch_size)
    p, q = (softmax_mean(table, weight) for table, weight in zip(tables, weights, strict=True))
    same = p.argmax(axis=1) == q.argmax(axis=1)
    variation = 0.5 * np.abs(p - q).sum(axis=1)
    assert 0 < same.mean() < 1
    for name, values in (("agreement", same.astype(float)), ("total_variation", variation)):
        figure = found.figures[name]
        np.testing.assert_allclose(found.rows[name].numpy(), values, rtol=1e-12)
        assert figure.value == pytest.approx(values.mean(), rel=1e-12)
        assert figure.error == pytest.approx(values.std(ddof=1) / math.sqrt(ROWS), rel=1e-12)
        assert figure.quadrature_error is None
    assert found.num_samples == (3, 5)
    told = found.to_dict()
    assert told["metrics"]["agreement"]["n"] == told["num_rows"] == ROWS


def test_binary_banks_compare_as_two_classes() -> None:
    tables = 2 * random(3, ROWS, 1), 2 * random(5, ROWS, 1, seed=2)
    found = compare(*(table_net(table, likelihood=Bernoulli()) for table in tables), X)
    p, q = (scipy.special.expit(table.numpy()).mean(axis=0)[:, 0] for table in tables)
    assert found.figures["total_variation"].value == pytest.approx(np.abs(p - q).mean(), rel=1e-12)
    assert found.figures["agreement"].value == pytest.approx(((p > 0.5) == (q > 0.5)).mean())


def test_a_bank_agrees_with_itself_in_any_order() -> None:
    table = random(5, ROWS, CLASSES)
    likelihood = Categorical()
    one, other = table_net(table, likelihood=likelihood), table_net(table.flip(0), likelihood=likelihood)
    found = compare(one, other, X)
    assert found.figures["agreement"].value == 1.0
    assert found.figures["total_variation"].value < 1e-15
    far = compare(
        table_net(1e4 * table[:1], likelihood=likelihood), table_net(-1e4 * table[:1], likelihood=likelihood), X
    )
    assert far.figures["total_variation"].value == pytest.approx(1.0)
    assert far.figures["agreement"].value == 0.0


def test_forms_of_data_say_the_same() -> None:
    one, other = (table_net(random(s, ROWS, CLASSES), likelihood=Categorical()) for s in (3, 5))
    wanted = compare(one, other, X).to_dict()
    rows = TensorDataset(X, torch.full((ROWS,), float("nan")))  # which nobody looks at
    for data in ((X, torch.zeros(ROWS)), rows, DataLoader(rows, batch_size=4)):
        assert compare(one, other, data).to_dict() == wanted
    with pytest.raises(DataError, match="want inputs, or rows with targets, got int"):
        compare(one, other, 3)


def test_modules_may_differ() -> None:
    x = random(ROWS, 3).float()
    nets = []
    for seed, module in enumerate(
        (nn.Linear(3, CLASSES), nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)))
    ):
        state = {name: 0.7 * torch.randn(v.shape) for name, v in module.state_dict().items()}
        bank = bnn.Bank.from_state_dicts([state] * (seed + 1), module=module)
        nets.append(bnn.FunctionalModel(module, bank))
    found = compare(*nets, x, likelihood=Categorical())
    p, q = (net(x, 0).detach().double().softmax(dim=1) for net in nets)
    assert found.figures["total_variation"].value == pytest.approx(float((p - q).abs().sum() / 2 / ROWS), rel=1e-6)


# Distances


def normals(means: Tensor, scales: Tensor, log_weight: Tensor | None = None) -> NormalMixture:
    """A mixture from [S, B, C] and what broadcasts to it."""
    log_weight = torch.zeros(len(means)) if log_weight is None else log_weight
    return NormalMixture(means, scales, log_weight.double().log_softmax(dim=0))


def dense_distance(one: Mixture, other: Mixture, parts: Any) -> np.ndarray:
    """W2 [B, C] from quantile functions tabled at 400,000 values, with SciPy's distribution functions."""
    found = np.zeros(one.mean.shape)
    t = np.linspace(-7.4, 7.4, 400_001)
    for place in np.ndindex(found.shape):
        quantiles = []
        for mixture in (one, other):
            cdf, low, high = parts(mixture, place)
            values = np.linspace(low, high, 400_000)
            below = cdf(values)
            kept = (below > 1e-15) & (below < 1 - 1e-15)
            quantiles.append(np.interp(t, scipy.special.ndtri(below[kept]), values[kept]))
        squared = (quantiles[0] - quantiles[1]) ** 2 * scipy.stats.norm.pdf(t)
        found[place] = math.sqrt(np.trapezoid(squared, t))
    return found


def normal_parts(mixture: NormalMixture, place: tuple[int, ...]) -> Any:
    means = mixture.means[(slice(None), *place)].numpy()
    scales = mixture.scales.expand_as(mixture.means)[(slice(None), *place)].numpy()
    share = mixture.log_weight.exp().numpy()
    kept = share > 0

    def cdf(values: np.ndarray) -> np.ndarray:
        each = scipy.stats.norm.cdf(values[:, None], means[kept], scales[kept])
        return each @ share[kept]

    return cdf, (means - 9 * scales)[kept].min(), (means + 9 * scales)[kept].max()


MIXTURES = {
    "near": (normals(random(3, 2, 2), torch.full((3, 1, 1), 0.8)), normals(random(4, 2, 2, seed=1), torch.ones(4, 1, 1))),
    "far apart": (
        normals(6 * random(3, 2, 2), torch.full((3, 1, 1), 0.3)),
        normals(6 * random(4, 2, 2, seed=1), 0.2 + random(4, 2, 2).abs()),
    ),
    "narrow beside wide": (
        normals(random(2, 2, 2), torch.tensor([0.01, 2.0]).view(2, 1, 1)),
        normals(random(3, 2, 2, seed=4), torch.tensor([1.0, 0.02, 0.5]).view(3, 1, 1)),
    ),
    "weighted": (
        normals(random(3, 2, 2), torch.full((3, 1, 1), 0.5), torch.tensor([0.0, -3.0, -math.inf])),
        normals(3 * random(4, 2, 2, seed=1), torch.ones(4, 1, 1), 3 * random(4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXTURES)
def test_distance_of_mixtures_is_that_of_dense_tables(kind: str) -> None:
    one, other = (NormalMixture(m.means.double(), m.scales.double(), m.log_weight) for m in MIXTURES[kind])
    found = wasserstein(one, other)
    wanted = dense_distance(one, other, normal_parts)
    off = np.abs(found.value.numpy() - wanted)
    assert (off <= found.error.numpy() + 2e-5 * wanted).all(), (off, found.error)
    assert (found.error.numpy() <= 5e-3 * wanted).all()
    assert torch.equal(wasserstein(other, one).value, found.value)
    # Gelbrich: W2^2 is at least what the first two moments say.
    means, stds = (one.mean - other.mean), one_std(one) - one_std(other)
    assert bool((found.value.square() >= (means.square() + stds.square()) * (1 - 1e-3)).all())


def one_std(mixture: Mixture) -> Tensor:
    return (mixture.aleatoric + mixture.epistemic).sqrt()


def test_distance_of_normals_is_their_closed_form() -> None:
    shape = (1, 7, 2)
    one = normals(3 * random(*shape), 0.1 + random(*shape, seed=1).abs())
    other = normals(3 * random(*shape, seed=2), 0.1 + random(*shape, seed=3).abs())
    found = wasserstein(one, other)
    wanted = ((one.means - other.means).square() + (one.scales - other.scales).square()).sqrt()[0]
    torch.testing.assert_close(found.value, wanted, rtol=1e-6, atol=1e-9)
    assert float(found.error.max()) < 1e-6
    same = wasserstein(one, one)
    assert float(same.value.max()) == float(same.error.max()) == 0.0


def test_distance_obeys_units_and_the_triangle() -> None:
    a, b, c = (normals(2 * random(s, 5, 1, seed=s), torch.full((s, 1, 1), 0.5).double()) for s in (2, 3, 4))
    ab, bc, ac = (wasserstein(*pair).value for pair in ((a, b), (b, c), (a, c)))
    assert bool((ac <= (ab + bc) * (1 + 1e-3)).all())
    moved = [NormalMixture(40 + 7 * m.means, 7 * m.scales, m.log_weight) for m in (a, b)]
    torch.testing.assert_close(wasserstein(*moved).value, 7 * ab, rtol=1e-4, atol=0)


def steps_distance(one: np.ndarray, other: np.ndarray) -> float:
    """W2 of two distributions over 0, 1, ..., from their probabilities: mass moved in order."""
    total, i, j, left, right = 0.0, 0, 0, one[0], other[0]
    while i < len(one) and j < len(other):
        moved = min(left, right)
        total += moved * (i - j) ** 2
        left, right = left - moved, right - moved
        if left <= 0:
            i += 1
            left = one[i] if i < len(one) else 0.0
        if right <= 0:
            j += 1
            right = other[j] if j < len(other) else 0.0
    return math.sqrt(total)


def test_distance_of_counts_moves_the_mass_in_order() -> None:
    mixtures = []
    for size, shift in ((3, -1.0), (4, 1.5)):
        log_weight = random(size).log_softmax(dim=0)
        mixtures.append(PoissonMixture(random(size, 5, 2, seed=size) + shift, log_weight))
    found = wasserstein(*mixtures)
    counts = np.arange(400)
    for place in np.ndindex(5, 2):
        probs = []
        for mixture in mixtures:
            rates = mixture.log_rates[(slice(None), *place)].exp().numpy()
            probs.append(mixture.log_weight.exp().numpy() @ scipy.stats.poisson.pmf(counts, rates[:, None]))
        assert float(found.value[place]) == pytest.approx(steps_distance(*probs), rel=1e-6)
    assert float(found.error.max()) == 0.0


def test_distance_of_large_counts_is_that_of_normals() -> None:
    rates = torch.tensor([[[1e8]], [[1.0002e8]]], dtype=torch.float64)
    one, other = (PoissonMixture(rate.log().unsqueeze(0), torch.zeros(1, dtype=torch.float64)) for rate in rates)
    wanted = math.hypot(float(rates[1] - rates[0]), float(rates[1].sqrt() - rates[0].sqrt()))
    assert float(wasserstein(one, other).value) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("df", "tolerance"), [(3.0, 1e-3), (5.0, 1e-4), (30.0, 1e-5)])
def test_distance_of_student_t_is_its_closed_form(df: float, tolerance: float) -> None:
    """One shape, moved and stretched: W2^2 = (difference of places)^2 + df / (df - 2) (difference of scales)^2."""
    zero = torch.zeros(1, dtype=torch.float64)
    one = StudentTMixture(random(1, 5, 2), torch.full((1, 1, 1), 0.7).double(), zero, df)
    other = StudentTMixture(random(1, 5, 2, seed=1), torch.full((1, 1, 1), 1.3).double(), zero, df)
    wanted = ((one.locs - other.locs).square()[0] + df / (df - 2.0) * 0.6**2).sqrt()
    torch.testing.assert_close(wasserstein(one, other).value, wanted, rtol=tolerance, atol=0)


def test_figures_of_targets_are_means_over_rows_in_their_units() -> None:
    tables, scales = (random(3, ROWS, 2), random(5, ROWS, 2, seed=1)), (torch.tensor([0.3, 0.5, 1.1]).double(), None)
    nets = [
        table_net(tables[0], scales=scales[0], likelihood=Gaussian(bnn.priors.HalfCauchy())),
        table_net(tables[1], log_weight=random(5), likelihood=Gaussian(0.6)),
    ]
    loc, scale = torch.tensor([3.0, -4.0]), torch.tensor([2.0, 10.0])
    found = compare(*nets, X, loc=loc, scale=scale, batch_size=5)
    first = normals(tables[0], scales[0].view(3, 1, 1))
    second = normals(tables[1], torch.full((5, 1, 1), 0.6).double(), random(5))
    rows = {
        "w2": wasserstein(first, second).value * scale,
        "mean_difference": (second.mean - first.mean).abs() * scale,
        "std_difference": (one_std(second) - one_std(first)).abs() * scale,
        "std_bias": (one_std(second) - one_std(first)) * scale,
    }
    assert list(found.figures) == list(rows)
    for name, values in rows.items():
        figure = found.figures[name]
        mean = values.mean(dim=1)
        assert figure.value == pytest.approx(float(mean.mean()), rel=1e-5), name
        assert figure.error == pytest.approx(float(mean.std()) / math.sqrt(ROWS), rel=1e-5), name
    assert found.figures["w2"].quadrature_error is not None
    assert found.figures["w2"].quadrature_error < 5e-3 * found.figures["w2"].value


def test_noise_of_other_kinds_compares_too() -> None:
    other = table_net(random(5, ROWS, 2, seed=3), likelihood=HeteroscedasticGaussian(0.1))
    one = table_net(random(3, ROWS, 1), likelihood=StudentT(6.0, 0.5))
    found = compare(one, other, X)
    assert bool((found.rows["w2"] >= found.rows["mean_difference"] * (1 - 1e-3)).all())
    counts = table_net(random(3, ROWS, 1), likelihood=Poisson())
    assert compare(counts, counts, X).figures["w2"].value == 0.0


def test_what_has_no_distance_is_left_out_and_told() -> None:
    one, other = (table_net(random(s, ROWS, 1), likelihood=StudentT(1.0, 0.5)) for s in (3, 5))
    found = compare(one, other, X)
    assert list(found.figures) == ["mean_difference"]
    assert "w2 is left out" in found.notes[0]
    assert "w2 is left out" in str(found)
    mixture = StudentTMixture(random(2, 3, 1), torch.ones(2, 1, 1), torch.zeros(2), 2.5)
    with pytest.raises(DataError, match="df of at least 3"):
        wasserstein(mixture, mixture)


def test_single_rows_have_no_error() -> None:
    nets = [table_net(random(s, 1, 3), likelihood=Categorical()) for s in (2, 4)]
    assert compare(*nets, torch.arange(1)).figures["agreement"].error is None


# Refusals


def test_banks_of_unlike_tasks_are_refused() -> None:
    classes, targets = (
        table_net(random(3, ROWS, 2), likelihood=Categorical()),
        table_net(random(5, ROWS, 2), likelihood=Gaussian()),
    )
    with pytest.raises(ConfigError, match="want two banks of one task, got a classification and a regression"):
        compare(classes, targets, X)
    for likelihood, what in ((Categorical(), "classes"), (Gaussian(), "targets")):
        nets = [table_net(random(3, ROWS, columns), likelihood=likelihood) for columns in (2, 3)]
        with pytest.raises(
            DataError, match=f"predictives of as many {what}, got 2 of the reference and 3 of the other"
        ):
            compare(*nets, X)
    with pytest.raises(ConfigError, match="want a likelihood"):
        compare(table_net(random(3, ROWS, 2)), classes, X)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()], ids=str)
def test_a_sample_that_is_not_finite_is_named(likelihood: Any) -> None:
    good = random(5, ROWS, 2)
    module = nn.Linear(1, 2)
    states = [{"weight": torch.full((2, 1), 3e38 if s == 2 else 1.0), "bias": torch.zeros(2)} for s in range(3)]
    bad = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts(states, module=module))
    x = torch.full((ROWS, 1), 10.0)
    fine = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts(states[:2], module=module))
    assert good.isfinite().all()
    with pytest.raises(DataError, match="sample 2: want finite outputs"):
        compare(fine, bad, x, likelihood=likelihood)
