"""Log likelihoods of every row under every sample, in memory and on disk; PSIS-LOO and WAIC by closed forms and ArviZ."""

from __future__ import annotations

import errno
import math
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from safetensors import safe_open
from tables import random, table_net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.bank import disk
from bnn.errors import BankCorrupt, BankExists, BankWriteError, ConfigError, DataError
from bnn.evaluation import Pointwise, evaluate, log_likelihoods, loo, pointwise, to_arviz, waic
from bnn.likelihoods import Bernoulli, Categorical, Gaussian, HeteroscedasticGaussian, Likelihood, Poisson, StudentT
from bnn.priors import HalfCauchy
from bnn.seeding import generator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces its next version at each import
    import arviz

SAMPLES, ROWS, CLASSES = 5, 13, 3  # S, N and C
X = torch.arange(ROWS)
SCALES = torch.tensor([0.3, 0.5, 1.1, 0.7, 0.9]).double()


def drawn(likelihood: Likelihood, columns: int) -> tuple[Tensor, Tensor]:
    """Tables of outputs [S, N, C] and targets."""
    outputs = {"Categorical": CLASSES, "Bernoulli": 1, "HeteroscedasticGaussian": 2 * columns}
    tables = random(SAMPLES, ROWS, outputs.get(type(likelihood).__name__, columns))
    if isinstance(likelihood, Categorical):
        return tables, torch.randint(CLASSES, (ROWS,), generator=generator(0, "labels"))
    if isinstance(likelihood, Bernoulli):
        return tables, torch.randint(2, (ROWS,), generator=generator(0, "labels"))
    y = random(ROWS, columns, seed=7)
    return tables, (2 * y).abs().round() if isinstance(likelihood, Poisson) else y


def by_scipy(likelihood: Likelihood, tables: Tensor, y: Tensor, scale: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Log density [S, N] in units that are `scale` times those of the outputs."""
    values, wanted = tables.numpy(), y.numpy()
    if isinstance(likelihood, Categorical):
        return scipy.special.log_softmax(values, axis=2)[:, np.arange(ROWS), wanted]
    if isinstance(likelihood, Bernoulli):
        return scipy.stats.bernoulli.logpmf(wanted, scipy.special.expit(values[:, :, 0]))
    if isinstance(likelihood, Poisson):
        return scipy.stats.poisson.logpmf(wanted, np.exp(values)).sum(axis=2)
    if isinstance(likelihood, HeteroscedasticGaussian):
        values, raw = np.split(values, 2, axis=2)
        noise = likelihood.floor + np.log1p(np.exp(raw))
    family = scipy.stats.t(likelihood.df) if isinstance(likelihood, StudentT) else scipy.stats.norm()
    moved = (wanted * scale - values * scale) / (noise * scale)
    return (family.logpdf(moved) - np.log(noise * scale)).sum(axis=2)


CASES: list[tuple[Likelihood, int, Any]] = [
    (Categorical(), 1, 1.0),
    (Bernoulli(), 1, 1.0),
    (Gaussian(0.6), 1, 3.0),
    (Gaussian(0.6), 2, [3.0, 0.25]),
    (Gaussian(HalfCauchy()), 2, 3.0),
    (HeteroscedasticGaussian(0.05), 2, [3.0, 0.25]),
    (StudentT(4.0, HalfCauchy()), 2, [3.0, 0.25]),
    (Poisson(), 2, 1.0),
]


@pytest.mark.parametrize(("likelihood", "columns", "scale"), CASES, ids=str)
@pytest.mark.parametrize("batch_size", [4, 512])
def test_values_are_scipys(likelihood: Likelihood, columns: int, scale: Any, batch_size: int) -> None:
    tables, y = drawn(likelihood, columns)
    learnt = "HalfCauchy" in str(likelihood)
    net = table_net(tables, scales=SCALES if learnt else None, likelihood=likelihood, log_weight=random(SAMPLES))
    units = {"loc": 0.0 if scale == 1.0 else 40.0, "scale": torch.tensor(scale)}
    found = log_likelihoods(net, (X, y), batch_size=batch_size, **units)
    noise = SCALES.numpy()[:, None, None] if learnt else np.float64(getattr(likelihood, "scale", 1.0))
    np.testing.assert_allclose(
        found.log_likelihood.numpy(), by_scipy(likelihood, tables, y, np.asarray(scale), noise), rtol=1e-6, atol=1e-6
    )
    assert torch.equal(found.log_weight, net.bank.log_weight)
    report = evaluate(net, (X, y), progress=False, **units)
    assert -float(found.log_predictive().mean()) == pytest.approx(report.metrics["nll"].value, rel=1e-6)


def bank_of(
    rows: int = ROWS, samples: int = SAMPLES, **options: Any
) -> tuple[bnn.FunctionalModel, tuple[Tensor, Tensor]]:
    tables = random(samples, rows, 2)
    net = table_net(tables, log_weight=random(samples), likelihood=Gaussian(0.6), **options)
    return net, (torch.arange(rows), random(rows, 2, seed=7))


@pytest.mark.parametrize("batch_size", [1, 4, 512])
def test_the_file_holds_the_same_and_opens_with_safetensors(tmp_path: Path, batch_size: int) -> None:
    net, data = bank_of(temperature=0.5, method={"name": "hmc"})
    wanted = log_likelihoods(net, data, scale=3.0)
    found = log_likelihoods(net, data, scale=3.0, out=tmp_path / "values.safetensors", batch_size=batch_size)
    with safe_open(tmp_path / "values.safetensors", "pt") as file:
        assert set(file.keys()) == {"log_likelihood", "chain", "draw", "log_weight"}
        assert torch.equal(file.get_tensor("log_likelihood"), wanted.log_likelihood)
        assert torch.equal(file.get_tensor("log_weight"), net.bank.log_weight)
        assert file.metadata()["kind"] == "bnn-pointwise"
    again = Pointwise.open(tmp_path / "values.safetensors")
    for each in (found, again):
        assert torch.equal(each.log_likelihood, wanted.log_likelihood)
        assert torch.equal(each.chain, net.bank.chain)
        assert torch.equal(each.draw, net.bank.draw)
        assert each.about == wanted.about
    assert again.about["bank"] == net.bank.digest
    assert again.about["temperature"] == 0.5
    assert again.about["data"]["num_rows"] == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["values.safetensors"]
    other = log_likelihoods(net, (data[0], data[1] + 1), scale=3.0)
    assert other.about["data"]["targets_sha256"] != again.about["data"]["targets_sha256"]


def test_slabs_put_together_are_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = bank_of()
    found = log_likelihoods(net, data, out=tmp_path / "values")
    monkeypatch.setattr(sys.modules["bnn.evaluation.pointwise"], "SLAB_VALUES", 4 * SAMPLES)
    slabs = [(first, slab.clone()) for first, slab in found.slabs()]
    assert [(first, slab.shape[1]) for first, slab in slabs] == [(0, 4), (4, 4), (8, 4), (12, 1)]
    assert torch.equal(torch.cat([slab for _, slab in slabs], dim=1), found.log_likelihood)


def test_forms_of_data_say_the_same() -> None:
    net, data = bank_of()
    wanted = log_likelihoods(net, data)
    rows = TensorDataset(*data)
    for form in (rows, DataLoader(rows, batch_size=4)):
        found = log_likelihoods(net, form)
        assert torch.equal(found.log_likelihood, wanted.log_likelihood)
        assert found.about == wanted.about


def test_a_loader_that_leaves_rows_out_is_refused(tmp_path: Path) -> None:
    net, data = bank_of()
    loader = DataLoader(TensorDataset(*data), batch_size=4, drop_last=True)
    for out in (None, tmp_path / "values"):
        with pytest.raises(DataError, match="want all 13 rows, each once, got 12"):
            log_likelihoods(net, loader, out=out)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    net, data = bank_of()
    (tmp_path / "values").write_text("mine")
    with pytest.raises(BankExists):
        log_likelihoods(net, data, out=tmp_path / "values")
    assert (tmp_path / "values").read_text() == "mine"
    log_likelihoods(net, data, out=tmp_path / "values", overwrite=True)
    assert Pointwise.open(tmp_path / "values").num_rows == ROWS


def test_a_sample_that_is_not_finite_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    module = nn.Linear(1, 2)
    states = [{"weight": torch.full((2, 1), 3e38 if s == 2 else 1.0), "bias": torch.zeros(2)} for s in range(4)]
    net = bnn.FunctionalModel(module, bnn.Bank.from_state_dicts(states, module=module))
    data = torch.full((ROWS, 1), 10.0), torch.zeros(ROWS, dtype=torch.int64)
    for likelihood, y in ((Categorical(), data[1]), (Gaussian(), torch.zeros(ROWS, 2))):
        with pytest.raises(DataError, match="sample 2: want a finite log likelihood"):
            log_likelihoods(net, (data[0], y), likelihood=likelihood, out=tmp_path / "values")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = bank_of()
    real, calls = disk.write_at, []

    def full(descriptor: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 7:
            raise OSError(errno.ENOSPC, "full")
        return real(descriptor, view, offset)

    monkeypatch.setattr(disk, "write_at", full)
    with pytest.raises(BankWriteError, match="No space left"):
        log_likelihoods(net, data, out=tmp_path / "values")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "write_at", lambda descriptor, view, offset: real(descriptor, view[:5], offset))
    found = log_likelihoods(net, data, out=tmp_path / "values")  # five bytes at a time
    assert torch.equal(found.log_likelihood, log_likelihoods(net, data).log_likelihood)


def test_other_files_are_refused(tmp_path: Path) -> None:
    net, data = bank_of()
    log_likelihoods(net, data, out=tmp_path / "values")
    raw = (tmp_path / "values").read_bytes()
    (tmp_path / "cut").write_bytes(raw[:-8])
    with pytest.raises(BankCorrupt):
        Pointwise.open(tmp_path / "cut")
    (tmp_path / "old").write_bytes(raw.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(BankCorrupt, match="want version 1, got 9"):
        Pointwise.open(tmp_path / "old")
    bnn.bank.write_state_dict(net.bank, tmp_path / "state", net.bank[0])
    with pytest.raises(BankCorrupt, match="want a file of kind bnn-pointwise"):
        loo(tmp_path / "state")


def test_targets_that_do_not_fit_are_refused() -> None:
    tables = random(SAMPLES, ROWS, CLASSES)
    with pytest.raises(DataError, match="classes in"):
        log_likelihoods(table_net(tables), (X, torch.full((ROWS,), 3)), likelihood=Categorical())
    with pytest.raises(DataError, match="targets of the shape"):
        log_likelihoods(table_net(tables), (X, torch.zeros(ROWS, 2)), likelihood=Gaussian())
    with pytest.raises(ConfigError, match="0 and 1 for counts"):
        log_likelihoods(table_net(tables), (X, torch.zeros(ROWS, 3)), likelihood=Poisson(), scale=2.0)
    with pytest.raises(ConfigError, match="want a likelihood"):
        log_likelihoods(table_net(tables), (X, torch.zeros(ROWS, 3)))


# Leave one out, in a closed form: y ~ Normal(theta, NOISE^2), theta ~ Normal(0, PRIOR^2)

NOISE, PRIOR = 1.3, 2.0


def conjugate(y: Tensor, temperature: float = 1.0) -> tuple[float, float]:
    """Mean and variance of theta given y, of p(y | theta) p(theta) to the power 1 / T."""
    precision = (len(y) / NOISE**2 + 1 / PRIOR**2) / temperature
    return float(y.sum() / NOISE**2 / temperature) / precision, 1 / precision


def exact_loo(y: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Log density of each y_n given the others [N]."""
    found = []
    for n in range(len(y)):
        mean, variance = conjugate(torch.cat([y[:n], y[n + 1 :]]), temperature)
        found.append(scipy.stats.norm.logpdf(float(y[n]), mean, math.sqrt(variance + NOISE**2)))
    return np.array(found)


def from_posterior(y: Tensor, samples: int, seed: int, *, widened: float = 1.0, temperature: float = 1.0) -> Pointwise:
    """Draws of theta, from a normal `widened` times the posterior with the log weights that make up for it."""
    mean, variance = conjugate(y, temperature)
    width = widened * math.sqrt(variance)
    theta = mean + width * torch.randn(samples, generator=generator(seed, "theta"), dtype=torch.float64)
    log_weight = torch.from_numpy(
        scipy.stats.norm.logpdf(theta, mean, math.sqrt(variance)) - scipy.stats.norm.logpdf(theta, mean, width)
    )
    tables = theta.view(-1, 1, 1).expand(samples, len(y), 1).contiguous()
    net = table_net(tables, log_weight=log_weight + 5.0, likelihood=Gaussian(NOISE), temperature=temperature)
    return log_likelihoods(net, (torch.arange(len(y)), y.unsqueeze(1)))


@pytest.mark.parametrize(
    ("widened", "temperature"),
    [(1.0, 1.0), (1.5, 1.0), (1.0, 0.5), (1.5, 2.0)],
    ids=["plain", "weighted", "cold", "both"],
)
def test_loo_of_a_conjugate_model_is_exact(widened: float, temperature: float) -> None:
    y = NOISE * random(11) + 0.5
    wanted = exact_loo(y, temperature)
    runs = []
    for seed in range(8):
        found = loo(from_posterior(y, 700, seed, widened=widened, temperature=temperature), efficiency=1.0)
        assert found.num_high == 0
        runs.append(found.rows.numpy())
    runs_of = np.stack(runs)
    error = runs_of.std(axis=0, ddof=1) / math.sqrt(len(runs))
    assert (np.abs(runs_of.mean(axis=0) - wanted) < 4 * error + 1e-4).all()
    assert error.max() < 0.02
    total = runs_of.sum(axis=1)
    assert abs(total.mean() - wanted.sum()) < 4 * total.std(ddof=1) / math.sqrt(len(runs)) + 1e-3


def test_loo_and_waic_are_arvizs() -> None:
    y = random(11) * 2.0
    theta = conjugate(y)[0] + math.sqrt(conjugate(y)[1]) * random(3, 70)
    values = scipy.stats.norm.logpdf(y.numpy(), theta[:, :, None], NOISE)  # [chains, draws, N]
    shuffled = np.random.default_rng(0).permutation(210)
    chain, draw = (torch.from_numpy(part.ravel()[shuffled].copy()) for part in np.indices((3, 70)))
    flat = torch.from_numpy(values.reshape(210, 11)[shuffled])
    source = Pointwise(flat, chain, draw, torch.full((210,), 2.0, dtype=torch.float64), {})
    data = arviz.from_dict(posterior={"theta": theta.numpy()}, log_likelihood={"y": values})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rows that it does not trust
        wanted, criterion = arviz.loo(data, pointwise=True, reff=0.7), arviz.waic(data, pointwise=True)
    found = loo(source, efficiency=0.7)
    np.testing.assert_allclose(found.rows.numpy(), wanted.loo_i.values, rtol=1e-9)
    np.testing.assert_allclose(found.pareto_k.numpy(), wanted.pareto_k.values, rtol=1e-9)
    assert found.elpd == pytest.approx(wanted.elpd_loo, rel=1e-12)
    assert found.error == pytest.approx(wanted.se, rel=1e-12)
    assert found.num_parameters == pytest.approx(wanted.p_loo, rel=1e-9)
    mine = waic(source)
    np.testing.assert_allclose(mine.rows.numpy(), criterion.waic_i.values, rtol=1e-12)
    assert (mine.elpd, mine.error, mine.num_parameters) == pytest.approx(
        (criterion.elpd_waic, criterion.se, criterion.p_waic), rel=1e-12
    )
    exported = to_arviz(source)
    assert np.array_equal(exported.log_likelihood["y"].values, values)
    assert arviz.loo(exported, reff=0.7).elpd_loo == pytest.approx(found.elpd, rel=1e-12)


def test_waic_of_weighted_samples_is_numpys() -> None:
    values, log_weight = random(7, 5), random(7)
    found = waic(
        Pointwise(values, torch.arange(7), torch.zeros(7, dtype=torch.int64), log_weight, {"temperature": 0.5})
    )
    share = scipy.special.softmax(log_weight.numpy())
    mean = np.average(values.numpy(), axis=0, weights=share)
    variance = np.average((values.numpy() - mean) ** 2, axis=0, weights=share)
    rows = np.log(share @ np.exp(values.numpy())) - variance / 0.5
    np.testing.assert_allclose(found.rows.numpy(), rows, rtol=1e-12)
    assert found.num_high == int((variance > 0.4).sum())
    assert 0 < found.num_high < 6


@pytest.mark.parametrize("size", [1, 40])
def test_pieces_of_the_rows_say_the_same(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = bank_of(rows=23, samples=40)
    source = log_likelihoods(net, data, out=tmp_path / "values")
    wanted = loo(source), waic(source), source.log_predictive()
    monkeypatch.setattr(sys.modules["bnn.evaluation.pointwise"], "SLAB_VALUES", 5 * 40)
    monkeypatch.setattr(sys.modules["bnn.evaluation.leave_one_out"], "SMOOTHED_VALUES", size)
    found = loo(str(tmp_path / "values"))
    torch.testing.assert_close(found.rows, wanted[0].rows, rtol=1e-13, atol=0)
    assert torch.equal(found.pareto_k, wanted[0].pareto_k)
    torch.testing.assert_close(waic(source).rows, wanted[1].rows, rtol=1e-13, atol=0)
    torch.testing.assert_close(source.log_predictive(), wanted[2], rtol=1e-13, atol=0)


def test_samples_without_weight_have_no_say() -> None:
    source = from_posterior(random(11), 60, 0)
    heavy = source.log_weight.clone()
    heavy[::4] = -math.inf
    found = loo(source._replace(log_weight=heavy))
    kept = heavy > -math.inf
    columns = (column[kept] for column in source[:4])
    assert torch.equal(found.rows, loo(Pointwise(*columns, about=source.about)).rows)
    assert found.num_samples == 45
    with pytest.raises(DataError, match="a sample with weight"):
        loo(source._replace(log_weight=torch.full((60,), -math.inf)))


def test_rows_that_lean_on_few_samples_are_counted() -> None:
    y = torch.cat([random(10), torch.tensor([25.0]).double()])  # one that the others do not foresee
    found = loo(from_posterior(y, 500, 0))
    assert int(found.pareto_k.argmax()) == 10
    assert found.num_high == int((found.pareto_k > 0.7).sum())
    assert found.num_high >= 1
    assert f"Pareto k above 0.7 for {found.num_high} of them" in str(found)
    few = loo(from_posterior(y[:10], 12, 0))  # too few samples for a tail
    assert few.num_high == few.num_infinite == 10


def test_rows_that_all_samples_say_the_same_of_are_left_out_exactly() -> None:
    """As of classes that are certain under every sample; ArviZ calls their k infinite."""
    source = from_posterior(random(11), 300, 0)
    values = source.log_likelihood.clone()
    values[:, 3] = -0.25
    found = loo(source._replace(log_likelihood=values, log_weight=torch.zeros(300, dtype=torch.float64)))
    assert float(found.rows[3]) == pytest.approx(-0.25, rel=1e-12)
    assert float(found.pareto_k[3]) == 0.0
    assert found.num_high == 0


def test_efficiency_follows_the_chains() -> None:
    """Draws of x_d = r x_{d-1} + ... are worth (1 - r) / (1 + r) of independent ones; squares of them more."""
    chains, draws, worth = 4, 2000, {}
    for correlation in (0.0, 0.9):
        noise = random(draws, chains)
        theta = [noise[0]]
        for step in noise[1:]:
            theta.append(correlation * theta[-1] + math.sqrt(1 - correlation**2) * step)
        flat = torch.stack(theta, dim=1).flatten()  # [chains * draws]
        values = torch.from_numpy(scipy.stats.norm.logpdf(np.array([0.3, 2.0, -1.0]), flat[:, None], 3.0))
        chain, draw = (torch.from_numpy(part.ravel().copy()) for part in np.indices((chains, draws)))
        source = Pointwise(values, chain, draw, torch.zeros(len(flat), dtype=torch.float64), {})
        worth[correlation] = loo(source).efficiency
        assert loo(source._replace(log_weight=random(len(flat)))).efficiency == 1.0
        assert loo(source._replace(chain=torch.arange(len(flat)))).efficiency == 1.0
    assert worth[0.0] == pytest.approx(1.0, abs=0.15)
    assert 0.1 / 1.9 * 0.7 < worth[0.9] < 0.25


def test_arviz_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    source = from_posterior(random(11), 60, 0)
    monkeypatch.setitem(sys.modules, "arviz", None)
    for call in (loo, to_arviz):
        with pytest.raises(ConfigError, match="want ArviZ, got none installed; pip install arviz"):
            call(source)
    assert waic(source).elpd < 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_arviz_of_the_next_kind_smooths_the_right_tail(sign: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 on it takes log likelihoods and turns them round in some versions: the same smoothing behind that interface."""
    source = from_posterior(random(11), 300, 0)
    wanted = loo(source, efficiency=0.8)
    real = arviz.psislw
    stats = types.SimpleNamespace(psislw=lambda ary, r_eff=1, axis=-1: real(sign * np.asarray(ary), r_eff))
    monkeypatch.setitem(sys.modules, "arviz", types.ModuleType("arviz"))
    monkeypatch.setitem(sys.modules, "arviz_stats", types.ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", types.ModuleType("arviz_stats.base"))
    sys.modules["arviz_stats.base"].array_stats = stats  # type: ignore[attr-defined]
    found = loo(source, efficiency=0.8)
    torch.testing.assert_close(found.rows, wanted.rows, rtol=1e-12, atol=0)
    assert torch.equal(found.pareto_k, wanted.pareto_k)


def test_an_efficiency_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="efficiency"):
        loo(from_posterior(random(11), 60, 0), efficiency=0.0)


def test_arviz_takes_chains_of_one_length_and_weight() -> None:
    source = from_posterior(random(11), 60, 0)
    with pytest.raises(DataError, match="got unequal weights"):
        to_arviz(source._replace(log_weight=random(60)))
    chain = torch.zeros(60, dtype=torch.int64)
    chain[:7] = 1
    with pytest.raises(DataError, match="got unequal lengths"):
        to_arviz(source._replace(chain=chain))
    assert pointwise.KIND == "bnn-pointwise"
