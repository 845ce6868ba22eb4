"""The streamed predictive against the full [S, N, C] reference, its symmetries, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.errors import ConfigError, DataError, NotConverged
from bnn.functional import Strategy
from bnn.functional import model as functional_model
from bnn.functional.calibration import Meter
from bnn.layout import Entry, layout_of
from bnn.likelihoods import (
    SCALE,
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    StudentT,
)
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture, quantile
from bnn.predictive import (
    ClassPredictive,
    TargetPredictive,
    mixture,
    predict,
)
from bnn.priors import HalfCauchy
from bnn.seeding import generator
from bnn.types import make_block

ROWS, CLASSES = 11, 3  # N and C; S is 1, 2, 7 or 70
streamed = pytest.mark.parametrize("num_samples", [1, 2, 7, 70])
weights = pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
profile = settings(max_examples=15, deadline=None, derandomize=True)


class Table(nn.Module):
    """Outputs looked up by row number, so that a sample can be any [N, C] one likes."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def table_net(
    tables: Tensor, *, log_weight: Tensor | None = None, scales: Tensor | None = None, strategy: Strategy = "loop"
) -> bnn.FunctionalModel:
    """A module under a bank whose sample s gives `tables[s]`, with weights and noise scales [S] of their own."""
    module, size = Table(tuple(tables.shape[1:]), tables.dtype), len(tables)
    extra = [] if scales is None else [Entry(SCALE, (), scales.dtype)]
    params = {"table": tables} if scales is None else {"table": tables, SCALE: scales}
    zeros = torch.zeros(size, dtype=torch.int64)
    block = make_block(params, chain=torch.arange(size), draw=zeros, log_weight=log_weight)
    bank = bnn.Bank.from_blocks([block], layout=layout_of(module, extra=extra), info={})
    return bnn.FunctionalModel(module, bank, strategy=strategy)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64)


def random_weights(num_samples: int, weighted: bool) -> tuple[Tensor | None, np.ndarray]:
    """Log weights of a bank, not normalised, and the shares they stand for."""
    if not weighted:
        return None, np.full(num_samples, 1 / num_samples)
    log_weight = 2 * random(num_samples, seed=8) + 5.0
    return log_weight, scipy.special.softmax(log_weight.numpy())


def classes_of(tables: Tensor, log_weight: Tensor | None = None) -> ClassPredictive:
    found = predict(table_net(tables, log_weight=log_weight), torch.arange(tables.shape[1]), likelihood=Categorical())
    assert isinstance(found, ClassPredictive)
    return found


def normal_of(
    tables: Tensor, likelihood: Gaussian, *, log_weight: Tensor | None = None, scales: Tensor | None = None
) -> NormalMixture:
    net = table_net(tables, log_weight=log_weight, scales=scales)
    found = mixture(net, torch.arange(tables.shape[1]), likelihood=likelihood)
    assert isinstance(found, NormalMixture)
    return found


def core(found: ClassPredictive) -> tuple[Tensor, ...]:
    """What a bank says, whatever number of samples it says it with."""
    return found.log_probs, found.expected_entropy, found.expected_log_prob, found.variance


def close(actual: Tensor, expected: Tensor | np.ndarray, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


def check_classes(found: ClassPredictive, logits: Tensor, share: np.ndarray, atol: float = 1e-12) -> None:
    """Compare with sums over the full [S, N, C]."""
    log_probs = scipy.special.log_softmax(logits.numpy(), axis=-1)
    mean = scipy.special.logsumexp(log_probs, axis=0, b=share[:, None, None])
    aleatoric = share @ scipy.special.entr(np.exp(log_probs)).sum(axis=-1)
    total = scipy.special.entr(np.exp(mean)).sum(axis=-1)
    close(found.log_probs, mean, atol)
    close(found.probs, np.exp(mean), atol)
    close(found.expected_entropy, aleatoric, atol)
    close(found.expected_log_prob, np.einsum("s,snc->nc", share, log_probs), atol)
    close(found.entropy, total, atol)
    close(found.mutual_information, np.maximum(total - aleatoric, 0), atol)


# Streaming


@streamed
@weights
def test_classes_equal_the_full_reference(num_samples: int, weighted: bool) -> None:
    logits = 3 * random(num_samples, ROWS, CLASSES)
    log_weight, share = random_weights(num_samples, weighted)
    check_classes(classes_of(logits, log_weight), logits, share)


@streamed
@weights
@pytest.mark.parametrize("outputs", [1, 2])
def test_normals_equal_the_full_reference(num_samples: int, weighted: bool, outputs: int) -> None:
    means, scales = random(num_samples, ROWS, outputs), 0.3 + random(num_samples, seed=1).abs()
    log_weight, share = random_weights(num_samples, weighted)
    found = normal_of(means, Gaussian(HalfCauchy(1.0)), log_weight=log_weight, scales=scales)
    mu, sigma = means.numpy(), scales.numpy()
    mean = np.einsum("s,snc->nc", share, mu)
    assert torch.equal(found.means, means)
    assert torch.equal(found.scales, scales[:, None, None])
    close(found.log_weight, np.log(share))
    close(found.mean, mean)
    close(found.aleatoric, np.full((ROWS, outputs), share @ sigma**2))
    close(found.epistemic, np.einsum("s,snc->nc", share, (mu - mean) ** 2))


@weights
@pytest.mark.parametrize("samples_at_once", [1, 3, 64])
@pytest.mark.parametrize("limit", ["outputs", "bytes"])
def test_the_size_of_blocks_does_not_matter(
    limit: str, samples_at_once: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = samples_at_once * ROWS * CLASSES
    logits = 3 * random(70, ROWS, CLASSES)
    log_weight, share = random_weights(70, weighted)
    net, sizes = table_net(logits, log_weight=log_weight), []
    if limit == "outputs":
        net._chooser.memory = 4 * 8 * numbers  # a quarter of it is for outputs
    else:
        monkeypatch.setattr(functional_model, "BLOCK_BYTES", numbers * 8)
    whole = net.bank.block
    monkeypatch.setattr(net.bank, "block", lambda chosen: (sizes.append(chosen), whole(chosen))[1])
    check_classes(predict(net, torch.arange(ROWS), likelihood=Categorical()), logits, share)
    taken = [len(range(*chosen.indices(70))) for chosen in sizes[1:]]  # after the one sample that is measured
    assert sum(taken) == 70
    assert max(taken) == samples_at_once


@weights
def test_samples_run_all_at_once_give_the_same(weighted: bool) -> None:
    logits = 3 * random(7, ROWS, CLASSES)
    log_weight, share = random_weights(7, weighted)
    net = table_net(logits, log_weight=log_weight, strategy="vmap")
    check_classes(predict(net, torch.arange(ROWS), likelihood=Categorical()), logits, share)


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_rows_in_batches_give_the_rows_of_the_whole(batch_size: int) -> None:
    net = table_net(3 * random(7, ROWS, CLASSES))
    whole = predict(net, torch.arange(ROWS), likelihood=Categorical())
    parts = [predict(net, rows, likelihood=Categorical()) for rows in torch.arange(ROWS).split(batch_size)]
    assert isinstance(whole, ClassPredictive)
    for index, expected in enumerate(core(whole)):
        close(torch.cat([core(part)[index] for part in parts]), expected, atol=1e-14)  # type: ignore[arg-type]


def test_a_real_module_in_float32_is_averaged_in_float64() -> None:
    module = nn.utils.skip_init(nn.Linear, 4, CLASSES)
    values = [
        {"weight": random(CLASSES, 4, seed=s).float(), "bias": random(CLASSES, seed=s).float()} for s in range(70)
    ]
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts(values, module=module))
    x = random(ROWS, 4).float()
    found = predict(net, x, likelihood=Categorical())
    logits = torch.stack([nn.functional.linear(x, one["weight"], one["bias"]) for one in values]).double()
    check_classes(found, logits, np.full(70, 1 / 70), atol=1e-6)
    assert {values.dtype for values in core(found)} == {torch.float64}
    close(found.probs.sum(dim=1), np.ones(ROWS), atol=1e-12)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(1.0)])
def test_no_gradient_is_kept_of_parameters_outside_the_sample(likelihood: Categorical | Gaussian) -> None:
    class Shifted(Table):
        def __init__(self) -> None:
            super().__init__((ROWS, CLASSES))
            self.shift = nn.Parameter(torch.ones(CLASSES, dtype=torch.float64))

        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows) * self.shift

    module, tables, zeros = Shifted(), random(7, ROWS, CLASSES), torch.zeros(7, dtype=torch.int64)
    block = make_block({"table": tables}, chain=torch.arange(7), draw=zeros)
    net = bnn.FunctionalModel(module, bnn.Bank.from_blocks([block], layout=layout_of(module, "table"), info={}))
    assert net(torch.arange(ROWS), 0).requires_grad
    found = predict(net, torch.arange(ROWS), likelihood=likelihood, outputs=True)
    assert not any(values.requires_grad for values in found if isinstance(values, Tensor))


# Weights


def test_a_sample_of_double_weight_is_a_sample_kept_twice() -> None:
    logits = 3 * random(2, ROWS, CLASSES)
    doubled = classes_of(logits, torch.tensor([0.0, math.log(2)], dtype=torch.float64))
    for found, expected in zip(core(doubled), core(classes_of(logits[[0, 1, 1]])), strict=True):
        close(found, expected)


def test_a_common_factor_of_the_weights_changes_nothing() -> None:
    logits, log_weight = 3 * random(7, ROWS, CLASSES), random(7)
    for found, expected in zip(
        core(classes_of(logits, log_weight + 1000.0)), core(classes_of(logits, log_weight)), strict=True
    ):
        close(found, expected, atol=1e-10)


@pytest.mark.parametrize("absent", [0, 4, 6])
def test_a_sample_of_weight_zero_is_not_there(absent: int) -> None:
    logits, log_weight = 3 * random(7, ROWS, CLASSES), random(7)
    log_weight[absent] = -math.inf
    kept = [s for s in range(7) if s != absent]
    for found, expected in zip(
        core(classes_of(logits, log_weight)), core(classes_of(logits[kept], log_weight[kept])), strict=True
    ):
        close(found, expected)


# Properties


@profile
@given(size=st.sampled_from([(2, 5, 3), (7, 4, 6), (9, 5, 2)]), seed=st.integers(0, 2**31))
def test_order_of_samples_rows_and_classes_does_not_matter(size: tuple[int, int, int], seed: int) -> None:
    logits, log_weight = 3 * random(*size, seed=seed), random(size[0], seed=seed)
    samples, rows, classes = (torch.randperm(n, generator=generator(seed, i)) for i, n in enumerate(size))
    expected = classes_of(logits, log_weight)
    found = classes_of(logits[samples][:, rows][:, :, classes], log_weight[samples])
    close(found.log_probs, expected.log_probs[rows][:, classes], atol=1e-10)
    close(found.expected_log_prob, expected.expected_log_prob[rows][:, classes], atol=1e-10)
    close(found.entropy, expected.entropy[rows], atol=1e-10)
    close(found.expected_entropy, expected.expected_entropy[rows], atol=1e-10)
    close(found.mutual_information, expected.mutual_information[rows], atol=1e-10)


@profile
@given(size=st.sampled_from([(1, 4, 3), (2, 5, 3), (7, 4, 6), (9, 5, 2)]), seed=st.integers(0, 2**31))
def test_bounds_and_duplicates(size: tuple[int, int, int], seed: int) -> None:
    """0 <= MI <= min(log C, log S); Gibbs <= mean predictive; S -> 2S changes nothing."""
    logits, log_weight = 3 * random(*size, seed=seed), random(size[0], seed=seed)
    equal = classes_of(logits)
    assert bool((equal.mutual_information >= 0).all())
    assert bool((equal.mutual_information <= min(math.log(size[0]), math.log(size[2])) + 1e-12).all())
    for once in (equal, classes_of(logits, log_weight)):
        assert bool((once.expected_log_prob <= once.log_probs + 1e-12).all())  # Jensen
    twice = classes_of(torch.cat([logits, logits]), torch.cat([log_weight, log_weight]))
    for found, expected in zip(core(twice), core(classes_of(logits, log_weight)), strict=True):
        close(found, expected, atol=1e-10)


def test_a_constant_added_to_the_logits_of_a_row_changes_nothing() -> None:
    logits = 3 * random(7, ROWS, CLASSES)
    for found, expected in zip(
        core(classes_of(logits + 100 * random(7, ROWS, 1))), core(classes_of(logits)), strict=True
    ):
        close(found, expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    """Samples so sure of one class that probabilities of the others are 0: only logarithms hold them."""
    logits = (1e4 * random(1, ROWS, CLASSES).sign() * (1 + random(7, ROWS, CLASSES, seed=1).abs())).to(dtype)
    found = classes_of(logits)
    assert all(bool(torch.isfinite(values).all()) for values in (*core(found), found.entropy, found.mutual_information))
    check_classes(found, logits.double(), np.full(7, 1 / 7), atol=1e-9)
    assert found.log_probs.min() < -5000


def test_sure_samples_that_disagree_are_all_epistemic() -> None:
    logits = 1e4 * torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1, 2, 3]].unsqueeze(1).expand(-1, 5, -1).contiguous()
    found = classes_of(logits)
    votes = np.array([2, 2, 1, 1]) / 6
    close(found.probs, np.tile(votes, (5, 1)))
    close(found.expected_entropy, np.zeros(5))
    close(found.mutual_information, np.full(5, scipy.special.entr(votes).sum()))


def test_one_sample_has_exactly_no_epistemic_part() -> None:
    assert torch.equal(classes_of(3 * random(1, ROWS, CLASSES)).mutual_information, torch.zeros(ROWS).double())
    normal = normal_of(random(1, ROWS, 2), Gaussian(0.3))
    assert torch.equal(normal.epistemic, torch.zeros(ROWS, 2).double())
    close(normal.aleatoric, np.full((ROWS, 2), 0.09), atol=1e-8)


@pytest.mark.parametrize("num_samples", [2, 7, 70])
def test_identical_samples_have_no_epistemic_part(num_samples: int) -> None:
    """Streamed sums round; what is left is far below any figure that is shown, and never negative."""
    found = classes_of(3 * random(1, ROWS, CLASSES).expand(num_samples, -1, -1)).mutual_information
    assert bool((found >= 0).all())
    assert bool((found < 1e-13).all())
    assert bool((normal_of(random(1, ROWS, 2).expand(num_samples, -1, -1), Gaussian(0.3)).epistemic < 1e-28).all())


# Regression


def test_predictions_come_in_the_units_of_the_target() -> None:
    means, scales = random(7, ROWS, 2), 0.3 + random(7).abs()
    net = table_net(means, scales=scales)
    found = mixture(net, torch.arange(ROWS), likelihood=Gaussian(HalfCauchy(1.0)), loc=-40.0, scale=2.5)
    assert isinstance(found, NormalMixture)
    close(found.means, 2.5 * means - 40.0)
    close(found.scales, 2.5 * scales[:, None, None])
    close(found.epistemic, 2.5**2 * means.numpy().var(axis=0), atol=1e-10)
    close(found.aleatoric, np.full((ROWS, 2), 2.5**2 * float(scales.square().mean())), atol=1e-10)


def test_outputs_without_a_column_are_one_output() -> None:
    means = random(7, ROWS)
    found = normal_of(means, Gaussian(0.5))
    assert torch.equal(found.means, means.unsqueeze(-1))
    assert torch.equal(found.scales, torch.full((7, 1, 1), 0.5).double())


# Which likelihood


def test_the_likelihood_is_the_banks_unless_another_is_given() -> None:
    module = Table((ROWS, CLASSES))
    bank = bnn.Bank.from_state_dicts(
        [{"table": 3 * random(ROWS, CLASSES)}] * 2, module=module, info={"likelihood": Gaussian(0.25).to_config()}
    )
    net = bnn.FunctionalModel(module, bank)
    found = mixture(net, torch.arange(ROWS))
    assert isinstance(found, NormalMixture)
    assert found.scales.unique().tolist() == [0.25]
    assert isinstance(predict(net, torch.arange(ROWS), likelihood=Categorical()), ClassPredictive)


def test_a_bank_without_likelihood_asks_for_one() -> None:
    with pytest.raises(ConfigError, match="pass likelihood="):
        predict(table_net(random(2, ROWS, CLASSES)), torch.arange(ROWS))


# Refusals


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(1.0)])
@pytest.mark.parametrize("bad", [0, 1, 6, 68])
def test_a_sample_that_overflows_is_named(bad: int, likelihood: Categorical | Gaussian) -> None:
    """Its weights are finite, or no bank would hold them; 1e300 squared is not."""

    class Squared(Table):
        def forward(self, rows: Tensor) -> Tensor:
            return super().forward(rows).square()

    tables = random(70, ROWS, CLASSES)
    tables[bad, 4, 1] = 1e300
    tables[bad + 1, 0, 0] = 1e300  # the first one is named, not the last
    module = Squared((ROWS, CLASSES))
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([{"table": t} for t in tables], module=module))
    with pytest.raises(DataError, match=rf"^sample {bad}: want finite outputs, got NaN or Inf"):
        predict(net, torch.arange(ROWS), likelihood=likelihood)
    predict(net, torch.tensor([2, 3]), likelihood=likelihood)  # the rows it does not spoil go through


def test_nan_in_the_outputs_names_the_sample_too() -> None:
    class Difference(Table):
        def forward(self, rows: Tensor) -> Tensor:
            huge = super().forward(rows) * 1e300
            return huge - huge

    tables = torch.zeros(7, ROWS, CLASSES, dtype=torch.float64)
    tables[5, 3, 2] = 1e10  # Inf - Inf
    module = Difference((ROWS, CLASSES))
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([{"table": t} for t in tables], module=module))
    with pytest.raises(DataError, match="sample 5"):
        predict(net, torch.arange(ROWS), likelihood=Categorical())


def test_a_module_with_two_outputs_is_refused() -> None:
    class Pair(Table):
        def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.table[rows], self.table[rows]

    module = Pair((ROWS, CLASSES))
    bank = bnn.Bank.from_state_dicts([{"table": random(ROWS, CLASSES)}] * 2, module=module)
    with pytest.raises(DataError, match=r"one tensor of outputs, got tuple"):
        predict(bnn.FunctionalModel(module, bank), torch.arange(ROWS), likelihood=Categorical())


def test_an_empty_bank_is_refused() -> None:
    module = Table((ROWS, CLASSES))
    net = bnn.FunctionalModel(module, bnn.Bank.from_blocks([], layout=layout_of(module), info={}))
    with pytest.raises(ConfigError, match="at least one sample"):
        predict(net, torch.arange(ROWS), likelihood=Categorical())


# Other targets, against sums over SciPy's distributions of every sample

LEARNT_T = StudentT(5.0, HalfCauchy())
KINDS: dict[str, Likelihood] = {
    "gaussian": Gaussian(HalfCauchy()),
    "heteroscedastic": HeteroscedasticGaussian(0.05),
    "student-t": StudentT(3.5, 0.7),
    "student-t learnt": LEARNT_T,
    "poisson": Poisson(),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def tables_of(kind: str, num_samples: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Outputs [S, N, C or 2 C] and learnt scales [S] where there are any."""
    tables = random(num_samples, ROWS, columns * (2 if kind == "heteroscedastic" else 1))
    learnt = kind in ("gaussian", "student-t learnt")
    return tables, 0.3 + random(num_samples, seed=1).abs() if learnt else None


def parts_of(kind: str, tables: Tensor, scales: Tensor | None, loc: Any = 0.0, scale: Any = 1.0) -> Any:
    """A frozen SciPy distribution of every sample, row and target, [S, N, C]."""
    values = tables.numpy()
    if kind == "poisson":
        return scipy.stats.poisson(np.exp(values))
    if kind == "heteroscedastic":
        columns = values.shape[-1] // 2
        noise = 0.05 + np.log1p(np.exp(values[..., columns:]))
        return scipy.stats.norm(values[..., :columns] * scale + loc, noise * scale)
    noise = np.full((len(values), 1, 1), 0.7) if scales is None else scales.numpy()[:, None, None]
    if kind == "gaussian":
        return scipy.stats.norm(values * scale + loc, noise * scale)
    return scipy.stats.t(3.5 if kind == "student-t" else 5.0, values * scale + loc, noise * scale)


def targets_of(
    kind: str, tables: Tensor, log_weight: Tensor | None = None, scales: Tensor | None = None, **units: Any
) -> Mixture:
    net = table_net(tables, log_weight=log_weight, scales=scales)
    found = mixture(net, torch.arange(tables.shape[1]), likelihood=KINDS[kind], **units)
    wanted = {"poisson": PoissonMixture, "gaussian": NormalMixture, "heteroscedastic": NormalMixture}
    assert type(found) is wanted.get(kind, StudentTMixture)
    return found


def check_targets(found: Mixture, parts: Any, share: np.ndarray, y: np.ndarray, atol: float = 1e-7) -> None:
    """Moments, log densities and cumulative probabilities at targets [N, C], by sums over the full [S, N, C].

    A fixed scale such as 0.7 is a float32 inside, hence the tolerance.
    """
    means, variances = np.broadcast_arrays(*parts.stats("mv"))
    mean = np.einsum("s,snc->nc", share, means)
    close(found.mean, mean, atol)
    close(found.aleatoric, np.einsum("s,snc->nc", share, variances), atol)
    close(found.epistemic, np.einsum("s,snc->nc", share, (means - mean) ** 2), atol)
    log_prob = (parts.logpmf if hasattr(parts.dist, "pmf") else parts.logpdf)(y).sum(axis=-1)  # [S, N]
    close(found.log_prob(torch.from_numpy(y)), scipy.special.logsumexp(log_prob, axis=0, b=share[:, None]), 10 * atol)
    close(found.cdf(torch.from_numpy(y)), np.einsum("s,snc->nc", share, parts.cdf(y)), atol)


def some_targets(kind: str, columns: int) -> np.ndarray:
    y = 1.5 * random(ROWS, columns, seed=2).numpy()
    return np.round(np.abs(y) * 2) if kind == "poisson" else y


@kinds
@streamed
@weights
@pytest.mark.parametrize("columns", [1, 2])
def test_targets_equal_the_full_reference(kind: str, num_samples: int, weighted: bool, columns: int) -> None:
    tables, scales = tables_of(kind, num_samples, columns)
    log_weight, share = random_weights(num_samples, weighted)
    found = targets_of(kind, tables, log_weight, scales)
    assert found.mean.shape == (ROWS, columns)
    check_targets(found, parts_of(kind, tables, scales), share, some_targets(kind, columns))
    close(found.log_weight, np.log(share))


@kinds
@weights
def test_targets_in_blocks_of_three_are_those_of_all_at_once(
    kind: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, scales = tables_of(kind, 7, 2)
    log_weight, share = random_weights(7, weighted)
    monkeypatch.setattr(functional_model, "MOST_SAMPLES", 3)
    check_targets(
        targets_of(kind, tables, log_weight, scales), parts_of(kind, tables, scales), share, some_targets(kind, 2)
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "poisson"])
def test_targets_come_in_units_of_their_own(kind: str) -> None:
    tables, scales = tables_of(kind, 7, 2)
    loc, scale = np.array([-40.0, 3.0]), np.array([2.5, 0.4])
    for units in ((-40.0, 2.5), (loc, scale)):
        at, spread = (torch.as_tensor(value, dtype=torch.float64) for value in units)
        found = targets_of(kind, tables, None, scales, loc=at, scale=spread)
        parts = parts_of(kind, tables, scales, *units)
        check_targets(found, parts, np.full(7, 1 / 7), some_targets(kind, 2) * units[1] + units[0], atol=1e-6)
        plain = targets_of(kind, tables, None, scales)
        y = torch.from_numpy(some_targets(kind, 2))
        shift = float(spread.log().expand(2).sum())
        close(found.log_prob(y * spread + at), plain.log_prob(y) - shift, 1e-9)
        close(found.cdf(y * spread + at), plain.cdf(y), 1e-9)


@pytest.mark.parametrize("units", [{"loc": 1.0}, {"scale": 2.0}, {"loc": torch.tensor([0.0, 1.0])}], ids=str)
def test_counts_have_no_other_units(units: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^predict\(loc=, scale=\): want 0 and 1 for counts"):
        targets_of("poisson", random(3, ROWS, 2), **units)
    targets_of("poisson", random(3, ROWS, 2), loc=torch.zeros(2), scale=1)


@kinds
@weights
def test_the_total_variance_is_that_of_draws_of_sample_and_noise(kind: str, weighted: bool) -> None:
    """The mixture by simulation: a sample by its weight, then a target by its likelihood; one row after another."""
    count, likelihood = 40_000, KINDS[kind]
    tables, scales = tables_of(kind, 5, 2)
    log_weight, share = random_weights(5, weighted)
    found = targets_of(kind, tables, log_weight, scales)
    times = torch.multinomial(torch.from_numpy(share), count, replacement=True, generator=generator(3)).bincount(
        minlength=5
    )
    draws = []
    for s in range(5):
        rows = tables[s].repeat(int(times[s]), 1)
        params = {} if scales is None else {SCALE: scales[s]}
        draws.append(likelihood.sample(rows, params, generator(4, s)).double().view(int(times[s]), ROWS, 2))
    drawn = torch.cat(draws)
    squares = (drawn - found.mean).square()
    total = found.aleatoric + found.epistemic
    for values, expected in ((drawn, found.mean), (squares, total)):
        if kind == "student-t" and values is squares:
            continue  # of 3.5 degrees of freedom: squares have no variance, and so no standard error
        error = values.std(dim=0) / math.sqrt(count)
        assert bool(((values.mean(dim=0) - expected).abs() < 4.5 * error).all())
    inside = (drawn <= found.mean).double().mean(dim=0)
    chance = found.cdf(found.mean)
    assert bool(((inside - chance).abs() < 4.5 * (chance * (1 - chance) / count).sqrt()).all())


def test_the_mass_of_counts_below_one_is_that_of_them_all_added_up() -> None:
    found = targets_of("poisson", random(7, ROWS, 2), random(7))
    total = torch.zeros(ROWS, 2, dtype=torch.float64)
    for count in range(60):
        y = torch.full((ROWS, 2), float(count), dtype=torch.float64)
        below = found.cdf(y - 1)
        close(below, total)
        close(found.cdf(y + 0.7), found.cdf(y))  # no mass between whole numbers
        only = PoissonMixture(found.log_rates[:, :, :1], found.log_weight)
        total = found.cdf(y)
        close((total - below)[:, 0], only.log_prob(y[:, :1]).exp(), 1e-12)
    close(total, np.ones((ROWS, 2)), 1e-10)
    for y in (-0.5, -1.0, -7.0):
        assert torch.equal(found.cdf(torch.full((ROWS, 2), y)), torch.zeros(ROWS, 2).double())


@pytest.mark.parametrize("df", [0.5, 1.0, 2.0])
def test_a_t_without_a_variance_says_so(df: float) -> None:
    """Also where a sample has weight 0, which must not turn infinite into undefined."""
    log_weight = random(7)
    log_weight[2] = -math.inf
    net = table_net(random(7, ROWS, 2), log_weight=log_weight)
    found = mixture(net, torch.arange(ROWS), likelihood=StudentT(df))
    assert isinstance(found, StudentTMixture)
    assert bool((found.aleatoric == math.inf).all())
    kept = [0, 1, 3, 4, 5, 6]
    without = mixture(
        table_net(random(7, ROWS, 2)[kept], log_weight=log_weight[kept]), torch.arange(ROWS), likelihood=StudentT(df)
    )
    assert isinstance(without, StudentTMixture)
    for of in ("mean", "epistemic"):
        close(getattr(found, of), getattr(without, of))
    close(found.log_prob(torch.zeros(ROWS, 2)), without.log_prob(torch.zeros(ROWS, 2)))
    close(found.cdf(torch.zeros(ROWS, 2)), without.cdf(torch.zeros(ROWS, 2)))


@pytest.mark.parametrize(("df", "factor"), [(2.1, 21.0), (2.5, 5.0), (3.0, 3.0), (12.0, 1.2)])
def test_a_t_of_more_than_two_degrees_of_freedom_has_a_variance(df: float, factor: float) -> None:
    found = mixture(table_net(random(7, ROWS, 2)), torch.arange(ROWS), likelihood=StudentT(df, 0.5))
    assert isinstance(found, StudentTMixture)
    close(found.aleatoric, np.full((ROWS, 2), 0.25 * factor), 1e-9)


@pytest.mark.parametrize("kind", ["student-t", "poisson", "gaussian"])
def test_targets_without_a_column_are_one_target(kind: str) -> None:
    tables, scales = tables_of(kind, 7, 1)
    whole, flat = (targets_of(kind, values, None, scales) for values in (tables, tables.squeeze(2)))
    close(flat.mean, whole.mean)
    close(flat.log_prob(torch.ones(ROWS, 1)), whole.log_prob(torch.ones(ROWS, 1)))


# One logit


@streamed
@weights
@pytest.mark.parametrize("column", [True, False])
def test_one_logit_is_two_classes(num_samples: int, weighted: bool, column: bool) -> None:
    """p = sum_s w_s sigmoid(z_s), against binary entropies: not the sigmoid of a mean."""
    tables = 3 * random(num_samples, ROWS)
    log_weight, share = random_weights(num_samples, weighted)
    net = table_net(tables.unsqueeze(2) if column else tables, log_weight=log_weight)
    found = predict(net, torch.arange(ROWS), likelihood=Bernoulli())
    assert isinstance(found, ClassPredictive)
    each = scipy.special.expit(tables.numpy())
    chance = share @ each
    close(found.probs, np.stack([1 - chance, chance], axis=1))

    def entropy(p: np.ndarray) -> np.ndarray:
        return scipy.special.entr(p) + scipy.special.entr(1 - p)

    close(found.entropy, entropy(chance))
    close(found.expected_entropy, share @ entropy(each))
    close(found.mutual_information, np.maximum(entropy(chance) - share @ entropy(each), 0))
    close(found.expected_log_prob, np.stack([share @ np.log(1 - each), share @ np.log(each)], axis=1))
    check_classes(found, torch.stack([torch.zeros_like(tables), tables], dim=2), share)


def test_sure_logits_stay_finite() -> None:
    found = predict(table_net(1e4 * random(7, ROWS, 1).sign()), torch.arange(ROWS), likelihood=Bernoulli())
    assert isinstance(found, ClassPredictive)
    assert all(bool(torch.isfinite(values).all()) for values in core(found))


def test_a_prior_shift_of_one_logit_adds_to_it() -> None:
    """log odds + log(pi' / (1 - pi')) - log(pi / (1 - pi)) of each sample."""
    logits = 2 * random(7, ROWS, 1)
    net = table_net(logits)
    found = predict(net, torch.arange(ROWS), likelihood=Bernoulli(), prior_shift=([0.5, 0.5], [0.9, 0.1]))
    assert isinstance(found, ClassPredictive)
    close(found.probs[:, 1], (logits[:, :, 0] + math.log(0.1 / 0.9)).sigmoid().mean(dim=0))


# Outputs that do not fit


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (Bernoulli(), (ROWS, 3)),
        (Bernoulli(), (ROWS, 2)),
        (Bernoulli(), (ROWS, 1, 1)),
        (HeteroscedasticGaussian(), (ROWS, 3)),
        (HeteroscedasticGaussian(), (ROWS, 1)),
        (HeteroscedasticGaussian(), (ROWS,)),
        (StudentT(), (ROWS, 2, 2)),
        (Poisson(), (ROWS, 2, 2)),
    ],
    ids=str,
)
def test_outputs_that_the_likelihood_does_not_take_are_refused(likelihood: Likelihood, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"^module: want outputs \["):
        predict(table_net(random(3, *shape)), torch.arange(ROWS), likelihood=likelihood)


@pytest.mark.parametrize("likelihood", [StudentT(), Poisson(), HeteroscedasticGaussian()], ids=str)
def test_a_prior_shift_is_of_classes(likelihood: Likelihood) -> None:
    with pytest.raises(ConfigError, match=r"^prior_shift: want none for a regression"):
        predict(table_net(random(3, ROWS, 2)), torch.arange(ROWS), likelihood=likelihood, prior_shift=([1, 1], [1, 2]))


@pytest.mark.parametrize("likelihood", KINDS.values(), ids=str)
def test_the_likelihood_of_a_bank_comes_from_its_info(likelihood: Likelihood) -> None:
    module = Table((ROWS, 2))
    scales = torch.full((3,), 0.6, dtype=torch.float64)
    zeros = torch.zeros(3, dtype=torch.int64)
    block = make_block({"table": random(3, ROWS, 2), SCALE: scales}, chain=torch.arange(3), draw=zeros)
    layout = layout_of(module, extra=[Entry(SCALE, (), torch.float64)])
    bank = bnn.Bank.from_blocks([block], layout=layout, info={"likelihood": likelihood.to_config()})
    net = bnn.FunctionalModel(module, bank)
    found, expected = predict(net, torch.arange(ROWS)), predict(net, torch.arange(ROWS), likelihood=likelihood)
    assert type(found) is type(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


# Data sets, quantiles, outputs, and when to stop


@pytest.mark.parametrize("form", ["loader", "data set", "inputs alone", "one tensor a batch"])
def test_data_sets_and_loaders_give_their_rows_in_order(form: str) -> None:
    net = table_net(3 * random(7, ROWS, CLASSES))
    rows = torch.arange(ROWS)
    pairs, alone = TensorDataset(rows, torch.zeros(ROWS)), TensorDataset(rows)
    data = {
        "loader": DataLoader(pairs, batch_size=4),
        "data set": pairs,
        "inputs alone": DataLoader(alone, batch_size=3),
        "one tensor a batch": DataLoader(range(ROWS), batch_size=5),  # type: ignore[arg-type]
    }[form]
    options: dict[str, Any] = {"likelihood": Categorical(), "outputs": True, "quantiles": (0.5,)}
    whole, found = predict(net, rows, **options), predict(net, data, progress=False, **options)
    assert isinstance(whole, ClassPredictive)
    assert isinstance(found, ClassPredictive)
    for mine, expected in zip(core(found), core(whole), strict=True):
        close(mine, expected, atol=1e-14)
    close(found.quantiles[0.5], whole.quantiles[0.5])
    assert found.outputs is not None
    assert torch.equal(found.outputs, whole.outputs)
    assert found.samples_used.tolist() == [7] * ROWS


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(DataError, match="want at least one row"):
        predict(table_net(random(7, ROWS, 3)), DataLoader(TensorDataset(torch.zeros(0, 1))), likelihood=Categorical())


@weights
def test_variances_and_outputs_are_those_of_the_samples(weighted: bool) -> None:
    logits = 3 * random(70, ROWS, CLASSES)
    log_weight, share = random_weights(70, weighted)
    net = table_net(logits, log_weight=log_weight)
    found = predict(net, torch.arange(ROWS), likelihood=Categorical(), outputs=True)
    assert isinstance(found, ClassPredictive)
    probs = scipy.special.softmax(logits.numpy(), axis=-1)
    mean = np.einsum("s,snc->nc", share, probs)
    close(found.mean, mean)
    close(found.variance, np.einsum("s,snc->nc", share, (probs - mean) ** 2))
    assert torch.equal(found.outputs, logits)  # type: ignore[arg-type]
    # sum_s w_s^2 (p_s - mean)^2 S / (S - 1), of draws that are independent
    close(found.standard_error, np.sqrt(np.einsum("s,snc->nc", share**2, (probs - mean) ** 2) * 70 / 69))


@kinds
def test_moments_are_those_of_the_mixture(kind: str) -> None:
    tables, scales = tables_of(kind, 70, 2)
    log_weight, _ = random_weights(70, True)
    net = table_net(tables, log_weight=log_weight, scales=scales)
    units = {} if kind == "poisson" else {"loc": -4.0, "scale": 2.5}
    whole = mixture(net, torch.arange(ROWS), likelihood=KINDS[kind], **units)  # type: ignore[arg-type]
    found = predict(net, torch.arange(ROWS), likelihood=KINDS[kind], **units)  # type: ignore[arg-type]
    assert isinstance(found, TargetPredictive)
    close(found.mean, whole.mean, 1e-9)
    close(found.aleatoric, whole.aleatoric, 1e-9)
    close(found.epistemic, whole.epistemic, 1e-9)
    close(found.variance, whole.aleatoric + whole.epistemic, 1e-9)


@kinds
@pytest.mark.parametrize("level", [0.01, 0.5, 0.95])
def test_quantiles_are_where_the_mixture_has_that_much_below(kind: str, level: float) -> None:
    tables, scales = tables_of(kind, 7, 2)
    net = table_net(tables, log_weight=random(7), scales=scales)
    whole = mixture(net, torch.arange(ROWS), likelihood=KINDS[kind])
    found = predict(net, torch.arange(ROWS), likelihood=KINDS[kind], quantiles=[level]).quantiles[level]
    if kind == "poisson":
        assert torch.equal(found, found.round())
        assert bool((whole.cdf(found) >= level).all())
        assert bool((whole.cdf(found - 1) < level).all())
    else:
        close(whole.cdf(found), np.full((ROWS, 2 if kind != "heteroscedastic" else found.shape[1]), level), 1e-9)
    assert torch.equal(found, quantile(whole, level))


def test_quantiles_of_class_probabilities_count_samples_by_weight() -> None:
    logits = 3 * random(7, ROWS, CLASSES)
    net = table_net(logits, log_weight=torch.tensor([0.0] * 6 + [math.log(4.0)], dtype=torch.float64))
    found = predict(net, torch.arange(ROWS), likelihood=Categorical(), quantiles=(0.25, 0.5)).quantiles
    repeated = torch.cat([logits, logits[6:], logits[6:], logits[6:]]).softmax(dim=-1)
    for level, expected in found.items():
        close(expected, np.quantile(repeated.numpy(), level, axis=0, method="inverted_cdf"))


@pytest.mark.parametrize(
    "options",
    [{"quantiles": [0.0]}, {"quantiles": [0.5, 1.0]}, {"tolerance": 0.0}, {"tolerance": 1.0, "outputs": True}],
)
def test_levels_and_tolerances_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^(quantiles|tolerance|outputs): want "):
        predict(table_net(random(7, ROWS, 3)), torch.arange(ROWS), likelihood=Categorical(), **options)


def drawn_net(values: Tensor, chain: Tensor, log_weight: Tensor | None = None) -> bnn.FunctionalModel:
    """Samples [S, N, C] in order of their draws, of several chains."""
    module = Table(tuple(values.shape[1:]))
    draw = torch.zeros(len(chain), dtype=torch.int64)
    for one in chain.unique():
        draw[chain == one] = torch.arange(int((chain == one).sum()))
    block = make_block({"table": values}, chain=chain, draw=draw, log_weight=log_weight)
    return bnn.FunctionalModel(module, bnn.Bank.from_blocks([block], layout=layout_of(module), info={}))


def test_samples_are_taken_until_the_standard_error_is_small_enough() -> None:
    """Independent draws of variance 1: s / sqrt(n) <= 0.1 wants about 100 of them."""
    net = drawn_net(random(4000, ROWS, 1), torch.arange(4).repeat_interleave(1000))
    for tolerance in (0.1, 0.05):
        found = predict(net, torch.arange(ROWS), likelihood=Gaussian(0.5), tolerance=tolerance)
        used = int(found.samples_used[0])
        assert 1 / tolerance**2 <= used <= 2.5 / tolerance**2  # the largest of 11 rows decides
        assert float(found.standard_error.max()) <= tolerance
        assert bool((found.mean.abs() < 5 * tolerance).all())


def test_chains_that_disagree_make_the_error_larger() -> None:
    """Four chains with means of their own: the error of the mean is that of four draws, however long they are."""
    chain = torch.arange(4).repeat_interleave(500)
    centres = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    values = 0.1 * random(2000, ROWS, 1) + centres[chain][:, None, None]
    with pytest.warns(NotConverged, match=r"all 2000 samples leave a standard error of .* tolerance=0\.1 is not kept"):
        found = predict(drawn_net(values, chain), torch.arange(ROWS), likelihood=Gaussian(0.5), tolerance=0.1)
    assert found.samples_used.tolist() == [2000] * ROWS
    # 16 runs of draws, four a chain: sum of (m_g - m)^2 / 16^2 over them, 16 / 15 of it
    expected = math.sqrt(4 * float(centres.square().sum()) / 256 * 16 / 15)
    assert float(found.standard_error.mean()) == pytest.approx(expected, rel=0.05)


def test_the_error_of_the_mean_is_what_repeated_banks_show() -> None:
    """Autocorrelated chains: z-scores of the mean have variance 1, within its own standard error."""
    rho, draws, chains, rows = 0.9, 400, 4, 60
    noise = random(draws * chains, rows, 1, seed=3).reshape(chains, draws, rows, 1)
    values = torch.empty_like(noise)
    values[:, 0] = noise[:, 0]
    for step in range(1, draws):
        values[:, step] = rho * values[:, step - 1] + math.sqrt(1 - rho**2) * noise[:, step]
    net = drawn_net(values.flatten(0, 1), torch.arange(chains).repeat_interleave(draws))
    found = predict(net, torch.arange(rows), likelihood=Gaussian(0.5), tolerance=1e-9)
    z = (found.mean / found.standard_error).square().mean()  # of 60 independent rows
    assert abs(float(z) - 1.0) < 4 * math.sqrt(2 / rows)
    plain = found.epistemic.sqrt() / math.sqrt(draws * chains)
    assert float((found.standard_error / plain).mean()) > 3.0  # sqrt((1 + rho) / (1 - rho)) = 4.4


def test_a_tolerance_with_weights_counts_effective_samples() -> None:
    log_weight = torch.where(torch.arange(2000) % 2 == 0, 0.0, -30.0).double()  # half of them count
    net = drawn_net(random(2000, ROWS, 1), torch.zeros(2000, dtype=torch.int64), log_weight)
    found = predict(net, torch.arange(ROWS), likelihood=Gaussian(0.5), tolerance=0.1)
    assert 200 <= int(found.samples_used[0]) <= 500


def test_memory_of_a_prediction_does_not_grow_with_the_bank() -> None:
    """Bytes that are alive at once, of a thousand samples and of ten thousand: both fill their blocks."""
    peaks = []
    for size in (1_000, 10_000):
        net = drawn_net(random(1, 50, 3).expand(size, -1, -1), torch.zeros(size, dtype=torch.int64))
        net = bnn.FunctionalModel(net.module, net.bank, strategy="loop", memory=2**20)
        meter = Meter([net.bank.block(slice(0, 1)).params["table"]])  # the bank itself is there already
        with meter:
            predict(net, torch.arange(50), likelihood=Categorical())
        peaks.append(meter.peak)
    assert peaks[1] < peaks[0] + 10_000 * 8 * 8  # some columns [S] besides


def test_a_tolerance_waits_for_samples_that_weigh_much() -> None:
    """Weights are known beforehand: what has most of them is seen before the error is believed."""
    log_weight = torch.zeros(1024, dtype=torch.float64)
    log_weight[777] = 20.0
    values = random(1024, ROWS, 1)
    net = drawn_net(values, torch.zeros(1024, dtype=torch.int64), log_weight)
    with pytest.warns(NotConverged, match="are worth 1.0 by their weights"):
        found = predict(net, torch.arange(ROWS), likelihood=Gaussian(0.5), tolerance=0.03)
    close(found.mean, values[777], 1e-4)
    first = torch.zeros(1024, dtype=torch.float64)
    first[0] = 20.0
    with pytest.warns(NotConverged, match="are worth 1.0 by their weights"):
        predict(
            drawn_net(values, torch.zeros(1024, dtype=torch.int64), first),
            torch.arange(ROWS),
            likelihood=Gaussian(0.5),
            tolerance=0.03,
        )


def test_quantiles_of_samples_far_apart() -> None:
    means = torch.tensor([0.0, 0.0, 1e18], dtype=torch.float64).reshape(3, 1, 1)
    even = torch.full((3,), -math.log(3), dtype=torch.float64)
    spread = NormalMixture(means, torch.ones(3, 1, 1, dtype=torch.float64), even)
    assert float(spread.cdf(quantile(spread, 0.3))) == pytest.approx(0.3, abs=1e-9)
    none = torch.tensor([-math.log(2), -math.log(2), -math.inf], dtype=torch.float64)
    assert abs(float(quantile(NormalMixture(means * 100, spread.scales, none), 0.5))) < 1e-9
    rates = torch.full((1, 1, 1), 710.0, dtype=torch.float64)
    with pytest.raises(DataError, match="want finite rates"):
        quantile(PoissonMixture(rates, torch.zeros(1, dtype=torch.float64)), 0.5)


def test_pairs_of_inputs_come_through_a_loader() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left) * right

    module = Pair()
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts([module.state_dict()] * 2, module=module))
    left, right = torch.randn(ROWS, 4), torch.randn(ROWS, 3)
    rows = [((left[k], right[k]), 0) for k in range(ROWS)]
    found = predict(net, DataLoader(rows, batch_size=4), likelihood=Categorical())  # type: ignore[arg-type]
    close(found.mean, predict(net, (left, right), likelihood=Categorical()).mean, 1e-6)  # of float32, in other batches
