"""Stacking: weights by SciPy's and ArviZ's optimum, the bank of all samples by the mixture that it stands for."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from tables import random, table_net
from torch import Tensor

import bnn
from bnn.bank import Bank, BankWriter, merge
from bnn.errors import BankMismatch, ConfigError, DataError, NotConverged
from bnn.evaluation import diagnose, evaluate, log_likelihoods, loo, stack, stacking, stacking_weights, to_arviz
from bnn.likelihoods import Categorical, Gaussian

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def by_scipy(values: Tensor) -> np.ndarray:
    """The weights [K] by sequential quadratic programming, from several starts."""
    density = np.exp(values.numpy() - values.numpy().max(axis=0))
    size = len(density)
    best = None
    for seed in range(5):
        found = scipy.optimize.minimize(
            lambda w: -np.log(w @ density + 1e-300).mean(),
            np.random.default_rng(seed).dirichlet(np.ones(size)),
            jac=lambda w: -(density / (w @ density + 1e-300)).mean(axis=1),
            bounds=[(0, 1)] * size,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        best = found if best is None or found.fun < best.fun else best
    return best.x


@pytest.mark.parametrize(("banks", "rows", "spread"), [(2, 40, 1.0), (3, 200, 1.0), (5, 77, 0.3), (4, 60, 30.0)])
def test_weights_are_scipys(banks: int, rows: int, spread: float) -> None:
    values = spread * random(banks, rows) - 2.0
    found = stacking_weights(values)
    wanted = by_scipy(values)
    assert float(found.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(found.weights.numpy(), wanted, atol=2e-4)
    elpd = scipy.special.logsumexp(values.numpy(), axis=0, b=wanted.clip(0)[:, None]).sum()
    assert found.elpd >= elpd - 1e-6 * rows
    assert found.gain == pytest.approx(found.elpd - float(values.sum(dim=1).max()))
    assert found.gain >= -1e-9 * rows
    assert 0 <= found.gap <= 1e-9 * rows
    mixed = scipy.special.logsumexp(values.numpy(), axis=0, b=found.weights.numpy()[:, None])
    assert found.error == pytest.approx(mixed.std() * math.sqrt(rows))


def test_the_gap_bounds_what_is_left() -> None:
    values = random(4, 60)
    best = stacking_weights(values).elpd
    for tolerance in (1e-1, 1e-3, 1e-5):
        found = stacking_weights(values, tolerance=tolerance)
        assert 0 <= best - found.elpd <= found.gap + 1e-9


def test_a_bank_that_is_better_everywhere_takes_all() -> None:
    values = random(3, 50)
    values[1] = values.amax(dim=0) + 0.5
    found = stacking_weights(values)
    assert float(found.weights[1]) > 1 - 1e-8
    assert found.gain == pytest.approx(0.0, abs=1e-6)


def test_predictives_that_are_nearly_the_same_come_to_an_end(recwarn: pytest.WarningsRecorder) -> None:
    values = random(1, 300) + 1e-4 * random(3, 300)
    found = stacking_weights(values)
    assert found.gap <= 1e-9 * 300
    alike = stacking_weights(values[:1].expand(4, 300))
    assert torch.equal(alike.weights, torch.full((4,), 0.25, dtype=torch.float64))
    assert not [warning for warning in recwarn if issubclass(warning.category, NotConverged)]


def test_an_end_before_the_optimum_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "MOST_STEPS", 1)
    with pytest.warns(NotConverged, match="after 1 steps other weights could still gain"):
        stacking_weights(random(4, 60))


def test_rows_of_huge_and_of_no_density_are_fine() -> None:
    values = random(2, 30)
    shifted = values + torch.linspace(-1e5, 1e5, 30)
    torch.testing.assert_close(stacking_weights(shifted).weights, stacking_weights(values).weights, atol=1e-6, rtol=0)
    values[0, 3] = -math.inf
    assert float(stacking_weights(values).weights[1]) > 0.01
    assert stacking_weights(values[:1, :3]).weights.tolist() == [1.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values[0], r"want log densities \[K, N\], got \[7\]"),
        (lambda values: values[:, :0], r"got \[2, 0\]"),
        (lambda values: torch.where(values == values[1, 4], torch.nan, values), "bank 1: want numbers"),
        (lambda values: torch.where(values == values[1, 4], torch.inf, values), "bank 1: want numbers"),
        (lambda values: torch.where(torch.arange(7) == 5, -torch.inf, values), "row 5: want a density above 0"),
    ],
)
def test_other_densities_are_refused(change: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        stacking_weights(change(random(2, 7)))


def test_a_tolerance_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        stacking_weights(random(2, 7), tolerance=0.0)


def test_weights_by_loo_are_arvizs() -> None:
    y = random(31, 1)
    sources = {}
    for name, noise, size in (("wide", 1.4, 120), ("narrow", 0.8, 150)):
        tables = 0.2 * random(size, 31, 1, seed=size) + (0.6 if name == "wide" else -0.3)
        net = table_net(
            tables, likelihood=Gaussian(noise), chain=torch.zeros(size, dtype=torch.int64), draw=torch.arange(size)
        )
        sources[name] = log_likelihoods(net, (torch.arange(31), y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = arviz.compare(
            {name: to_arviz(source) for name, source in sources.items()}, ic="loo", method="stacking"
        )
    found = stacking_weights(torch.stack([loo(source, efficiency=1.0).rows for source in sources.values()]))
    assert 0.05 < float(found.weights[0]) < 0.95
    for weight, name in zip(found.weights.tolist(), sources, strict=True):
        assert weight == pytest.approx(wanted.loc[name, "weight"], abs=1e-3)


# The bank

ROWS = 9


def bank_of(
    path: Path, size: int, *, likelihood: Any, columns: int, seed: int = 0, own: tuple[str, ...] = (), **info: Any
) -> Bank:
    """A bank on disk of samples with unequal weights, and columns of a method of its own."""
    net = table_net(random(size, ROWS, columns, seed=seed), log_weight=random(size, seed=seed) + 9.0)
    block = net.bank.block(slice(None))._replace(columns={name: random(size) for name in own})
    config = {"likelihood": likelihood.to_config(), **info, "columns": list(own)}
    writer = BankWriter(path, layout=net.bank.layout, config=config)
    writer.append(block)
    writer.close()
    return Bank.open(path)


@pytest.mark.parametrize("shares", [(0.2, 0.5, 0.3), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
def test_the_stacked_bank_predicts_as_the_mixture(tmp_path: Path, shares: tuple[float, ...]) -> None:
    sizes = (3, 5, 2)
    banks = [
        bank_of(tmp_path / f"{k}", size, likelihood=Categorical(), columns=4, seed=k, temperature=1.0)
        for k, size in enumerate(sizes)
    ]
    found = stack(banks, shares, tmp_path / "out")
    log_weight = found.log_weight.split(sizes)
    for share, part in zip(shares, log_weight, strict=True):
        assert float(part.exp().sum()) == pytest.approx(share, abs=1e-12)
    module = table_net(random(1, ROWS, 4)).module
    nets = [bnn.FunctionalModel(module, bank) for bank in (*banks, found)]
    x, y = torch.arange(ROWS), torch.arange(ROWS) % 4
    *single, mixed = (bnn.predict(net, x) for net in nets)
    wanted = sum(share * one.probs for share, one in zip(shares, single, strict=True))
    torch.testing.assert_close(mixed.probs, wanted, rtol=1e-12, atol=1e-15)
    nll = -float(wanted[x, y].log().mean())
    assert evaluate(nets[-1], (x, y), progress=False).metrics["nll"].value == pytest.approx(nll, rel=1e-12)
    assert [fact["share"] for fact in found.info["merged"]] == pytest.approx(list(shares))
    assert [fact["samples"] for fact in found.info["merged"]] == list(sizes)
    assert found.info["method"] == {"name": "stack", "options": {}}


def test_a_regression_is_the_mixture_too(tmp_path: Path) -> None:
    banks = [bank_of(tmp_path / f"{k}", 2 + k, likelihood=Gaussian(0.4), columns=2, seed=k) for k in range(2)]
    weights = torch.tensor([0.35, 0.65])
    found = stack(banks, weights, tmp_path / "out")
    module = table_net(random(1, ROWS, 2)).module
    data = torch.arange(ROWS), random(ROWS, 2)
    *single, mixed = (
        log_likelihoods(bnn.FunctionalModel(module, bank), data).log_predictive() for bank in (*banks, found)
    )
    torch.testing.assert_close(mixed, (torch.stack(single) + weights.double().log().unsqueeze(1)).logsumexp(dim=0))


def test_methods_with_other_columns_and_temperatures_stack(tmp_path: Path) -> None:
    hmc = bank_of(
        tmp_path / "hmc", 4, likelihood=Categorical(), columns=3, own=("energy", "acceptance"),
        method={"name": "hmc", "options": {}}, temperature=1.0,
    )  # fmt: skip
    cold = bank_of(
        tmp_path / "cold", 3, likelihood=Categorical(), columns=3, seed=1, own=("acceptance",),
        method={"name": "nuts", "options": {}}, temperature=0.5,
    )  # fmt: skip
    with pytest.raises(BankMismatch, match="columns"):
        merge([hmc, cold], tmp_path / "out")
    found = stack([hmc, cold], [0.5, 0.5], tmp_path / "out")
    assert list(found.columns) == ["acceptance"]
    assert torch.equal(found.columns["acceptance"], torch.cat([bank.columns["acceptance"] for bank in (hmc, cold)]))
    assert "temperature" not in found.info
    assert diagnose(found).verdict == "not a Markov chain"


def test_banks_that_mean_other_things_do_not_stack(tmp_path: Path) -> None:
    one = bank_of(tmp_path / "one", 4, likelihood=Categorical(), columns=2)
    other = bank_of(tmp_path / "other", 3, likelihood=Gaussian(), columns=2, seed=1)
    with pytest.raises(BankMismatch, match="the likelihood"):
        stack([one, other], [0.5, 0.5], tmp_path / "out")
    wide = bank_of(tmp_path / "wide", 3, likelihood=Categorical(), columns=3, seed=1)
    with pytest.raises(BankMismatch, match="the layout"):
        stack([one, wide], [0.5, 0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shares", [[0.5], [0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], []])
def test_shares_that_are_no_weights_are_refused(tmp_path: Path, shares: list[float]) -> None:
    banks = [bank_of(tmp_path / f"{k}", 2 + k, likelihood=Categorical(), columns=2, seed=k) for k in range(2)]
    with pytest.raises(ConfigError, match="shares: want 2 numbers of at least 0 that sum to 1"):
        stack(banks, shares, tmp_path / "out")
    assert not (tmp_path / "out").exists()
