"""evaluate, train and distil on binary targets, counts, outliers and noise that varies: well-specified data and SciPy."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from torch import Tensor, nn

import bnn
from bnn.errors import ConfigError, DataError
from bnn.evaluation import Report, evaluate
from bnn.fitting import fit
from bnn.inference import Prior
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
from bnn.model import BayesianModel
from bnn.predictive import predict
from bnn.priors import HalfCauchy, Normal
from bnn.seeding import generator
from bnn.training import distil, train
from bnn.types import make_block

ROWS, SAMPLES = 3000, 3  # N and S; one target or two a row
LEVELS = (0.5, 0.9, 0.95)
KINDS: dict[str, Likelihood] = {
    "gaussian": Gaussian(0.6),
    "gaussian learnt": Gaussian(HalfCauchy()),
    "heteroscedastic": HeteroscedasticGaussian(0.05),
    "student-t": StudentT(5.0, 0.6),
    "student-t learnt": StudentT(5.0, HalfCauchy()),
    "cauchy": StudentT(1.0, 0.6),
    "poisson": Poisson(),
}
CONTINUOUS = [kind for kind in KINDS if kind != "poisson"]


class Table(nn.Module):
    """Outputs looked up by row number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def table_net(tables: Tensor, *, log_weight: Tensor | None = None, scales: Tensor | None = None) -> bnn.FunctionalModel:
    """A module under a bank whose sample s gives `tables[s]`, with weights and noise scales [S] of their own."""
    module, size = Table(tuple(tables.shape[1:])), len(tables)
    extra = [] if scales is None else [Entry(SCALE, (), scales.dtype)]
    params = {"table": tables} if scales is None else {"table": tables, SCALE: scales}
    zeros = torch.zeros(size, dtype=torch.int64)
    block = make_block(params, chain=torch.arange(size), draw=zeros, log_weight=log_weight)
    return bnn.FunctionalModel(module, bnn.Bank.from_blocks([block], layout=layout_of(module, extra=extra), info={}))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64)


class Scene:
    """A mixture of S samples a row, and targets drawn from it: what is predicted is what happens."""

    def __init__(self, kind: str, columns: int) -> None:
        self.likelihood = KINDS[kind]
        tables = random(SAMPLES, ROWS, columns * (2 if kind == "heteroscedastic" else 1))
        self.tables = tables + 0.7 if kind == "poisson" else tables
        self.scales = torch.tensor([0.3, 0.5, 1.1]).double() if "learnt" in kind else None
        self.share = np.array([0.5, 0.3, 0.2])
        self.net = table_net(self.tables, log_weight=torch.from_numpy(np.log(self.share)), scales=self.scales)
        chosen = torch.multinomial(torch.from_numpy(self.share), ROWS, replacement=True, generator=generator(1, kind))
        self.y = torch.zeros(ROWS, columns, dtype=torch.float64)
        for s in range(SAMPLES):
            here = chosen == s
            params = {} if self.scales is None else {SCALE: self.scales[s]}
            drawn = self.likelihood.sample(self.tables[s][here], params, generator(2, kind, s))
            self.y[here] = drawn.double().view(-1, columns)

    def parts(self) -> Any:
        """A frozen SciPy distribution of every sample, row and target, [S, N, C]."""
        values = self.tables.numpy()
        likelihood = self.likelihood
        if isinstance(likelihood, Poisson):
            return scipy.stats.poisson(np.exp(values))
        if isinstance(likelihood, HeteroscedasticGaussian):
            mean, raw = np.split(values, 2, axis=-1)
            return scipy.stats.norm(mean, 0.05 + np.log1p(np.exp(raw)))
        noise = np.full((SAMPLES, 1, 1), 0.6) if self.scales is None else self.scales.numpy()[:, None, None]
        if isinstance(likelihood, StudentT):
            return scipy.stats.t(likelihood.df, values, noise)
        return scipy.stats.norm(values, noise)

    def report(self, **options: Any) -> Report:
        return evaluate(self.net, (torch.arange(ROWS), self.y), likelihood=self.likelihood, progress=False, **options)


# Figures


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "batch_size"), [(1, 512), (2, 700)])
def test_figures_equal_their_recomputation(kind: str, columns: int, batch_size: int) -> None:
    scene = Scene(kind, columns)
    report, parts, y = scene.report(batch_size=batch_size), scene.parts(), scene.y.numpy()
    log_prob = (parts.logpmf if kind == "poisson" else parts.logpdf)(y).sum(axis=-1)
    recomputed = {"nll": -scipy.special.logsumexp(log_prob, axis=0, b=scene.share[:, None])}
    if kind != "cauchy":
        means, variances = np.broadcast_arrays(*parts.stats("mv"))
        mean = np.einsum("s,snc->nc", scene.share, means)
        recomputed["aleatoric"] = np.einsum("s,snc->nc", scene.share, variances).mean(axis=1)
        recomputed["epistemic"] = np.einsum("s,snc->nc", scene.share, (means - mean) ** 2).mean(axis=1)
        assert report.metrics["rmse"].value == pytest.approx(math.sqrt(((y - mean) ** 2).mean()), rel=1e-6)
    above = np.einsum("s,snc->nc", scene.share, parts.sf(y - 1 if kind == "poisson" else y))
    below = np.einsum("s,snc->nc", scene.share, parts.cdf(y))
    for level in LEVELS:
        tail = 0.5 - 0.5 * level
        recomputed[f"coverage_{level * 100:.0f}"] = ((below >= tail) & (above >= tail)).mean(axis=1)
    for name, values in recomputed.items():
        figure = report.metrics[name]
        assert figure.value == pytest.approx(values.mean(), rel=1e-6), name
        assert figure.standard_error == pytest.approx(scipy.stats.sem(values), rel=1e-5, abs=1e-9), name
    crps = report.metrics["crps"]
    assert (crps.value is not None) == (kind in ("gaussian", "gaussian learnt", "heteroscedastic"))
    assert (crps.value is None) == (crps.note is not None)
    assert report.num_rows == ROWS


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("columns", [1, 2])
def test_intervals_of_what_is_predicted_cover_as_they_say(kind: str, columns: int) -> None:
    report = Scene(kind, columns).report()
    for level in LEVELS:
        figure = report.metrics[f"coverage_{level * 100:.0f}"]
        error = math.sqrt(level * (1 - level) / ROWS)  # of two targets a row it is less, but they share a sample
        assert abs(figure.value - level) < 4 * error, (level, figure)
    pit = report.rows["pit"].flatten()
    assert bool(((pit > 0) & (pit < 1)).all())
    if columns == 1:
        assert scipy.stats.kstest(pit.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("columns", [1, 2])
def test_intervals_of_counts_cover_at_least_what_they_say(columns: int) -> None:
    """And as much as the whole numbers in them weigh: the chance of each row's interval, by sums over its counts."""
    scene = Scene("poisson", columns)
    report, parts = scene.report(), scene.parts()
    counts = np.arange(200).reshape(-1, 1, 1, 1)
    mass = np.einsum("s,ksnc->knc", scene.share, parts.pmf(counts))  # [counts, N, C]
    below = mass.cumsum(axis=0)
    assert below[-1].min() > 1 - 1e-9
    for level in LEVELS:
        tail = 0.5 - 0.5 * level
        chance = (mass * ((below >= tail) & (below - mass <= 1 - tail))).sum(axis=0)  # [N, C]
        assert chance.min() >= level - 1e-9
        figure = report.metrics[f"coverage_{level * 100:.0f}"]
        assert figure.standard_error is not None
        assert figure.value > level - 4 * math.sqrt(level * (1 - level) / ROWS)
        assert abs(figure.value - chance.mean()) < 4 * figure.standard_error


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cauchy"])
def test_the_predicted_variance_is_the_squared_error_of_the_mean(kind: str) -> None:
    report = Scene(kind, 1).report()
    total = report.rows["aleatoric"] + report.rows["epistemic"]
    difference = (report.rows["squared_error"] - total).flatten()
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / math.sqrt(ROWS)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_figures_in_the_units_of_the_target(kind: str) -> None:
    scene = Scene(kind, 2)
    plain, scaled = scene.report(), scene.report(loc=torch.tensor([5.0, -2.0]), scale=torch.tensor([3.0, 3.0]))
    for level in LEVELS:
        name = f"coverage_{level * 100:.0f}"
        assert scaled.metrics[name].value == pytest.approx(plain.metrics[name].value, abs=1e-9)
    nll, rmse = (plain.metrics[name].value for name in ("nll", "rmse"))
    assert scaled.metrics["nll"].value == pytest.approx(nll + 2 * math.log(3.0), rel=1e-6)
    assert scaled.metrics["rmse"].value == pytest.approx(3 * rmse, rel=1e-6)


def test_counts_are_not_standardised() -> None:
    with pytest.raises(ConfigError, match=r"want 0 and 1 for counts"):
        Scene("poisson", 1).report(scale=2.0)


@pytest.mark.parametrize("kind", ["poisson", "student-t", "cauchy", "heteroscedastic"])
def test_reports_are_written(kind: str, tmp_path: Path) -> None:
    report = Scene(kind, 1).report()
    report.save(tmp_path)
    facts = json.loads((tmp_path / "report.json").read_text())["reports"]["bank"]
    assert facts["metrics"]["nll"]["value"] == report.metrics["nll"].value
    assert "nll" in str(report)


def test_a_variance_that_is_infinite_has_no_error_and_stays_json(tmp_path: Path) -> None:
    """JSON knows neither NaN nor Infinity: a strict reader must take the file."""
    report = Scene("cauchy", 1).report()
    figure = report.metrics["aleatoric"]
    assert figure.value is None
    assert figure.standard_error is None
    assert str(figure.note).startswith("infinite")
    report.save(tmp_path)

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} in report.json")

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)


# Targets of a kind that does not fit


@pytest.mark.parametrize("bad", [-1.0, 1.5, 0.25])
def test_targets_that_are_no_counts_are_refused(bad: float) -> None:
    y = torch.ones(7)
    y[4] = bad
    with pytest.raises(DataError, match=rf"want counts 0, 1, 2, ..., got {bad:g}"):
        evaluate(table_net(random(3, 7, 1)), (torch.arange(7), y), likelihood=Poisson())


@pytest.mark.parametrize("bad", [0.7, 2.0, -1.0, -0.3])
def test_targets_that_are_not_binary_are_refused(bad: float) -> None:
    """Cut to whole numbers, 0.7 and -0.3 would count as 0."""
    y = torch.ones(7)
    y[4] = bad
    with pytest.raises(DataError, match="want targets 0 or 1"):
        evaluate(table_net(random(3, 7, 1)), (torch.arange(7), y), likelihood=Bernoulli())


@pytest.mark.parametrize("likelihood", [Poisson(), StudentT(), HeteroscedasticGaussian()], ids=str)
def test_targets_of_another_shape_are_refused(likelihood: Likelihood) -> None:
    columns = 4 if isinstance(likelihood, HeteroscedasticGaussian) else 2
    with pytest.raises(DataError, match=r"^data: want targets \[7, 2\]"):
        evaluate(table_net(random(3, 7, columns)), (torch.arange(7), torch.ones(7)), likelihood=likelihood)


# Binary targets


def binary(rows: int = ROWS) -> tuple[Tensor, np.ndarray, Tensor]:
    """Logits [S, N, 1], the chance of a 1 in their mixture [N], and targets drawn from it [N]."""
    tables = 1.5 * random(SAMPLES, rows, 1)
    chance = scipy.special.expit(tables.numpy()).mean(axis=0)[:, 0]
    y = torch.bernoulli(torch.from_numpy(chance), generator=generator(6, "binary")).long()
    return tables, chance, y


FORMS = {
    "int64": lambda y: y,
    "int32": lambda y: y.int(),
    "bool": lambda y: y.bool(),
    "float32": lambda y: y.float(),
    "column": lambda y: y.unsqueeze(1),
    "float column": lambda y: y.double().unsqueeze(1),
}


@pytest.mark.parametrize("form", FORMS)
def test_binary_targets_of_any_dtype_give_the_figures_of_two_classes(form: str) -> None:
    tables, chance, y = binary(70)
    x = torch.arange(70)
    net = table_net(tables)
    found = evaluate(net, (x, FORMS[form](y)), likelihood=Bernoulli(), batch_size=16, num_bins=6)
    two = table_net(torch.cat([torch.zeros_like(tables), tables], dim=2))
    expected = evaluate(two, (x, y), likelihood=Categorical(), num_bins=6)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, figure in expected.metrics.items():
        if figure.value is None:
            assert found.metrics[name] == figure
        else:
            assert found.metrics[name].value == pytest.approx(figure.value, abs=1e-12), name
    assert found.task == "classification"
    nll = -scipy.stats.bernoulli(chance).logpmf(y.numpy())
    assert found.metrics["nll"].value == pytest.approx(nll.mean())
    assert found.metrics["brier"].value == pytest.approx(2 * ((chance - y.numpy()) ** 2).mean())


def test_binary_targets_that_are_drawn_from_the_mixture_score_as_it_expects() -> None:
    tables, chance, y = binary()
    report = evaluate(table_net(tables), (torch.arange(ROWS), y), likelihood=Bernoulli())
    expected = {
        "accuracy": np.maximum(chance, 1 - chance),
        "nll": scipy.special.entr(chance) + scipy.special.entr(1 - chance),
        "brier": 2 * chance * (1 - chance),
    }
    for name, values in expected.items():
        figure = report.metrics[name]
        assert figure.standard_error is not None
        assert abs(figure.value - values.mean()) < 4 * figure.standard_error, name
    assert report.metrics["ece"].value < 0.05


def test_binary_rows_from_outside_are_scored_too() -> None:
    tables, _, y = binary(70)
    tables = torch.cat([tables, 0.3 * tables[:, :50]], dim=1)
    ood = torch.arange(70, 120), torch.zeros(50)
    report = evaluate(table_net(tables), (torch.arange(70), y.float()), likelihood=Bernoulli(), ood=ood)
    chance = scipy.special.expit(tables.numpy()).mean(axis=0)[:, 0]
    score = scipy.special.entr(chance) + scipy.special.entr(1 - chance)
    expected = sklearn.metrics.roc_auc_score([0] * 70 + [1] * 50, score)
    assert 0.6 < expected < 0.95
    assert report.metrics["auroc"].value == pytest.approx(expected)


@pytest.mark.parametrize("columns", [2, 3])
def test_binary_targets_want_one_logit(columns: int) -> None:
    with pytest.raises(DataError, match=r"^module: want outputs"):
        evaluate(table_net(random(3, 7, columns)), (torch.arange(7), torch.ones(7)), likelihood=Bernoulli())


# Training and distilling


def small(likelihood: Likelihood, outputs: int = 1) -> tuple[nn.Module, bnn.Bank, Tensor]:
    """A module of two layers with a bank of its last one, and inputs."""
    x = random(40, 3, seed=9).float()
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(0.5 * random(*parameter.shape, seed=len(name)))
    model = BayesianModel(module, prior=Normal(), likelihood=likelihood, num_data=40, bayesian="2")
    y = torch.zeros(40, dtype=torch.int64) if likelihood.task == "classification" else torch.zeros(40, 1)
    return module, fit(model, (x, y), method=Prior(), num_samples=5, seed=0), x


def curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("form", ["int64", "float32", "column", "float column"])
def test_training_by_binary_targets_is_judged_on_held_out_rows(form: str, tmp_path: Path) -> None:
    module, bank, x = small(Bernoulli())
    y = FORMS[form]((x[:, 0] + 0.3 * x[:, 1] > 0).long())
    trained = train(
        module, bank, (x[:27], y[:27]), out=tmp_path / "t", held_out=(x[27:], y[27:]), likelihood=Bernoulli(),
        num_epochs=12, batch_size=9, num_indices=5, lr=0.05, seed=3, progress=False,
    )  # fmt: skip
    rows = curve(tmp_path / "t")
    assert len(rows) == 12
    module.load_state_dict(trained[0], strict=False)
    net = bnn.FunctionalModel(module, bank)
    found = predict(net, x[27:], likelihood=Bernoulli())
    report = evaluate(net, (x[27:], y[27:]), likelihood=Bernoulli(), progress=False)
    chance = torch.stack([net(x[27:], s) for s in range(5)])[:, :, 0].detach().double().sigmoid().mean(dim=0).numpy()
    np.testing.assert_allclose(found.probs[:, 1].numpy(), chance, rtol=1e-5)  # type: ignore[union-attr]
    truth = y[27:].flatten().long().numpy()
    nll, accuracy = -scipy.stats.bernoulli(chance).logpmf(truth).mean(), ((chance > 0.5) == truth).mean()
    for got in (rows[-1]["held_out_nll"], report.metrics["nll"].value):
        assert got == pytest.approx(nll, rel=1e-5)
    for got in (rows[-1]["held_out_accuracy"], report.metrics["accuracy"].value):
        assert got == pytest.approx(accuracy)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("bad", [2.0, 0.5])
def test_training_refuses_targets_that_are_not_binary(bad: float, tmp_path: Path) -> None:
    module, bank, x = small(Bernoulli())
    y = (x[:, 0] > 0).float()
    wrong = y.clone()
    wrong[20] = bad
    options: dict[str, Any] = {"likelihood": Bernoulli(), "num_epochs": 1, "batch_size": 9, "progress": False}
    with pytest.raises(DataError, match="want targets 0 or 1"):
        train(module, bank, (x, wrong), out=tmp_path / "a", **options)
    with pytest.raises(DataError, match="want targets 0 or 1"):
        train(module, bank, (x, y), out=tmp_path / "b", held_out=(x, wrong), **options)


@pytest.mark.parametrize("kind", ["poisson", "student-t", "heteroscedastic"])
def test_training_by_other_targets_is_judged_by_the_mixture(kind: str, tmp_path: Path) -> None:
    likelihood = KINDS[kind]
    module, bank, x = small(likelihood, 2 if kind == "heteroscedastic" else 1)
    y = (x[:, :1].exp()).round() if kind == "poisson" else x[:, :1] + 0.1
    trained = train(
        module, bank, (x[:27], y[:27]), out=tmp_path / "t", held_out=(x[27:], y[27:]), likelihood=likelihood,
        num_epochs=12, batch_size=9, num_indices=5, lr=0.05, seed=3, progress=False,
    )  # fmt: skip
    rows = curve(tmp_path / "t")
    module.load_state_dict(trained[0], strict=False)
    report = evaluate(bnn.FunctionalModel(module, bank), (x[27:], y[27:]), likelihood=likelihood, progress=False)
    assert rows[-1]["held_out_nll"] == pytest.approx(report.metrics["nll"].value, rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize("likelihood", [Bernoulli(), StudentT(), Poisson(), HeteroscedasticGaussian()], ids=str)
def test_students_of_other_targets_are_refused_by_name(likelihood: Likelihood, tmp_path: Path) -> None:
    module, bank, x = small(likelihood, 2 if isinstance(likelihood, HeteroscedasticGaussian) else 1)
    net = bnn.FunctionalModel(module, bank)
    name = type(likelihood).__name__
    with pytest.raises(ConfigError, match=rf"^likelihood: want Categorical or Gaussian.*, got {name};"):
        distil(module, net, (x, torch.zeros(40, 1)), out=tmp_path / "s", num_epochs=1, progress=False)
    assert not (tmp_path / "s").exists()
