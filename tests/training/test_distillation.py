"""Distillation: losses against closed forms, the student against the mean predictive, resume bit for bit."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from scenarios import Undefined, classifier
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import bnn
from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.errors import BankExists, ConfigError, FitError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import Prior
from bnn.layout import layout_of
from bnn.likelihoods import SCALE
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.predictive import TargetPredictive, predict
from bnn.samplers import ClassBalancedSampler, SampleIndexSampler, StratifiedBatchSampler
from bnn.seeding import generator
from bnn.training import distil, divergence
from bnn.training.distillation import whole_predictive
from bnn.types import make_block


def teacher(num_samples: int = 5) -> tuple[FunctionalModel, tuple[torch.Tensor, torch.Tensor]]:
    model, data = classifier()
    bank = fit(model, data, method=Prior(), num_samples=num_samples)
    return FunctionalModel(model.module, bank), data


def read_curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_divergence_of_classes() -> None:
    p, q = (torch.randn(7, 3, generator=generator(i), dtype=torch.float64) for i in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    one = torch.ones(())
    torch.testing.assert_close(divergence(likelihoods.Categorical(), p, q, one, one), expected)


def test_divergence_of_normals_sums_over_outputs() -> None:
    mu, m = (torch.randn(7, 2, generator=generator(i)) for i in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, 0.3), torch.distributions.Normal(m, 0.8)
    )
    found = divergence(likelihoods.Gaussian(0.3), mu, m, torch.tensor(0.3), torch.tensor(0.8))
    torch.testing.assert_close(found, expected.sum(dim=1))


def test_a_student_that_can_learns_the_mean_predictive(tmp_path: Path) -> None:
    """A table of logits, one a row of data, can stand for any probabilities: its optimum is their mean over samples."""
    logits = 2 * torch.randn(5, 9, 3, generator=generator(0))  # [S, rows, C]
    module = nn.Embedding(9, 3)
    bank = Bank.from_state_dicts([{"weight": one} for one in logits], module=module)
    rows = torch.arange(9)
    student = distil(
        module, FunctionalModel(module, bank), (rows, rows), out=tmp_path / "s", likelihood=likelihoods.Categorical(),
        num_epochs=1500, batch_size=9, lr=0.1,
    )  # fmt: skip
    torch.testing.assert_close(
        student[0]["weight"].softmax(dim=1), logits.softmax(dim=-1).mean(dim=0), rtol=0, atol=0.02
    )


LOG_WEIGHT = torch.tensor([0.0, -1.0, -2.0, 0.5], dtype=torch.float64)


def table() -> tuple[nn.Embedding, FunctionalModel, Tensor]:
    """A table of logits, 3 classes a row of 9; a bank of 4 weighted ones; and their logits [S, N, C]."""
    logits = 2 * torch.randn(4, 9, 3, generator=generator(0))
    module = nn.Embedding(9, 3)
    with torch.no_grad():
        module.weight.copy_(torch.randn(9, 3, generator=generator(1)))
    block = make_block({"weight": logits}, chain=torch.zeros(4), draw=torch.arange(4), log_weight=LOG_WEIGHT)
    bank = Bank.from_blocks([block], layout=layout_of(module), info={"likelihood": {"name": "Categorical"}})
    return module, FunctionalModel(module, bank), logits


def mixture(logits: Tensor) -> Tensor:
    """The mean probabilities of the weighted tables, [N, C]."""
    return (LOG_WEIGHT.softmax(dim=0).view(4, 1, 1) * logits.softmax(dim=-1)).sum(dim=0).float()


def test_weighted_banks_teach_by_weight(tmp_path: Path) -> None:
    """The optimum is the weighted mean of the samples' probabilities."""
    module, net, logits = table()
    rows = torch.arange(9)
    student = distil(module, net, (rows, rows), out=tmp_path / "s", num_epochs=2000, batch_size=9, lr=0.1)
    torch.testing.assert_close(student[0]["weight"].softmax(dim=1), mixture(logits), rtol=0, atol=0.02)


def test_a_gaussian_student_learns_mean_and_spread_of_the_mixture(tmp_path: Path) -> None:
    """Means mu_k of a constant and scales sigma_k: the optimum is their mean and sqrt(mean sigma^2 + var mu)."""
    module = nn.Linear(1, 1)
    mu, sigma = torch.tensor([-1.0, 0.5, 2.0, 3.0]), torch.tensor([0.2, 0.5, 0.9, 0.4])
    model = BayesianModel(
        module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(priors.HalfCauchy(1.0)), num_data=9
    )
    params = {"weight": torch.zeros(4, 1, 1), "bias": mu.unsqueeze(1), SCALE: sigma}
    block = make_block(params, chain=torch.zeros(4), draw=torch.arange(4))
    bank = Bank.from_blocks([block], layout=model.layout, info=model.to_config())
    x = torch.linspace(-1, 1, 8).unsqueeze(1)
    student = distil(
        module,
        FunctionalModel(module, bank),
        (x, x),
        held_out=(x, x),
        out=tmp_path / "s",
        num_epochs=3000,
        batch_size=8,
        lr=0.03,
    )
    assert float(student[0]["bias"]) == pytest.approx(float(mu.mean()), abs=0.05)
    expected = float((sigma.square().mean() + mu.var(correction=0)).sqrt())
    assert float(student[0][SCALE]) == pytest.approx(expected, rel=0.03)
    curve = read_curve(tmp_path / "s")
    assert set(curve[0]) == {"epoch", "loss", "lr", "held_out_nll"}


def test_resume_after_an_interruption_is_bit_equal(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)

    def run(out: str, **options: bool) -> Bank:
        return distil(
            module, net, (x, y), held_out=(x, y), out=tmp_path / out, num_epochs=40, batch_size=5, seed=1, **options
        )

    whole = run("whole")

    def interrupted(run, *args):  # type: ignore[no-untyped-def]
        for count, found in enumerate(run):
            if count == 2:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("broken")
    assert len(Bank.open(tmp_path / "broken")) == 0
    resumed = run("broken", resume=True)
    assert all(torch.equal(resumed[0][name], whole[0][name]) for name in whole.layout.names)
    curves = [read_curve(tmp_path / name) for name in ("whole", "broken")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 40
    run("broken", resume=True)  # complete already: nothing to do
    with pytest.raises(BankExists):
        run("whole")


def test_stopped_after_the_last_row_it_is_finished_by_resume(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)

    def run(**options: bool) -> Bank:
        return distil(module, net, (x, y), out=tmp_path / "s", num_epochs=4, seed=1, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.training.files.write_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert run(resume=True).info["complete"]
    assert {"model.safetensors", "curve.csv"} <= {path.name for path in (tmp_path / "s").iterdir()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.bank.writer.BankWriter.close", lambda self: (self.commit(), interrupt()))
        with pytest.raises(KeyboardInterrupt):
            run(overwrite=True)
    assert not Bank.open(tmp_path / "s").info["complete"]
    assert run(resume=True).info["complete"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_bank_that_replaces_a_student_leaves_nothing_of_it(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    distil(module, net, (x, y), out=tmp_path / "s", num_epochs=1)
    model, data = classifier()
    fit(model, data, method=Prior(), num_samples=2, out=tmp_path / "s", overwrite=True)
    assert not {"model.safetensors", "curve.csv"} & {path.name for path in (tmp_path / "s").iterdir()}


def test_tuple_inputs_are_taught_too(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.inner(a + b)

    module, (_, (x, y)) = Sum(), classifier()
    bank = Bank.from_state_dicts([module.state_dict()] * 3, module=module, info={"likelihood": {"name": "Categorical"}})
    student = distil(
        module, FunctionalModel(module, bank), ((x, x), y), out=tmp_path / "s", num_epochs=2, batch_size=5, lr=1e-7
    )
    # It begins at its teacher, and steps of 1e-7 leave it there.
    torch.testing.assert_close(student[0]["inner.weight"], bank[0]["inner.weight"])


def test_files_for_tools_that_know_nothing_of_banks(tmp_path: Path, world_untouched: None) -> None:
    net, (x, y) = teacher()
    student = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    bank = distil(student, net, (x, y), held_out=(x, y), out=tmp_path / "s", num_epochs=6)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    loaded = safetensors.torch.load_file(tmp_path / "s" / "model.safetensors")
    fresh = build("mlp:6", input_shape=[4], num_outputs=3, seed=9)
    fresh.load_state_dict({name: tensor for name, tensor in loaded.items() if not name.startswith("@pad")})
    torch.testing.assert_close(fresh(x), FunctionalModel(student, bank)(x, 0))
    curve = read_curve(tmp_path / "s")
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4, 5, 6]
    assert set(curve[0]) == {"epoch", "loss", "lr", "held_out_nll", "held_out_kl", "held_out_accuracy"}


def test_workers_do_not_change_the_student(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    banks = [
        distil(module, net, (x, y), out=tmp_path / str(workers), num_epochs=3, batch_size=5, num_workers=workers)
        for workers in (0, 2)
    ]
    assert all(torch.equal(banks[0][0][name], banks[1][0][name]) for name in banks[0].layout.names)


def test_bad_options_and_losses_leave_nothing_behind(tmp_path: Path) -> None:
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    for options in ({"num_epochs": 0}, {"batch_size": 0}, {"lr": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            distil(module, net, (x, y), out=tmp_path / "s", **options)  # type: ignore[arg-type]
    with pytest.raises(FitError, match="lower lr"):
        distil(nn.Sequential(module, Undefined()), net, (x, y), out=tmp_path / "s", num_epochs=2)
    assert not (tmp_path / "s").exists()


# Several samples a batch, weights of rows


def descend(values: list[Tensor]) -> torch.optim.Optimizer:
    """Steps of 1, so that the values fall by the gradient itself."""
    return torch.optim.SGD(values, 1.0)


def divergences(p: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) of each row [B], by torch's own distributions."""
    first, second = torch.distributions.Categorical(probs=p), torch.distributions.Categorical(logits=logits)
    return torch.distributions.kl_divergence(first, second)


@pytest.mark.parametrize("num_indices", [None, 3], ids=["one", "three"])
def test_steps_follow_the_mean_over_the_samples_that_a_batch_meets(tmp_path: Path, num_indices: int | None) -> None:
    """Two steps on all rows: each falls by the gradient of the weighted mean of the K divergences, by hand."""
    module, net, logits = table()
    rows = torch.arange(9)
    taught = distil(
        module, net, (rows, rows), out=tmp_path / "s", num_indices=num_indices, num_epochs=2, batch_size=9,
        optimizer=descend, seed=5,
    )  # fmt: skip
    size = num_indices or 1
    met = SampleIndexSampler(net.bank, seed=5).at(range(2 * size)).view(2, size)
    relative = 4 * LOG_WEIGHT.softmax(dim=0).float()
    values, losses = module.weight.detach().clone().requires_grad_(), []
    for step in range(2):
        each = torch.stack([relative[i] * divergences(logits[i].softmax(dim=-1), values).mean() for i in met[step]])
        losses.append(float(each.mean().detach()))
        (gradient,) = torch.autograd.grad(each.mean(), [values])
        values = (values - gradient).detach().requires_grad_()
    torch.testing.assert_close(taught[0]["weight"], values.detach())
    assert [row["loss"] for row in read_curve(tmp_path / "s")] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("balanced", ["rows", "batches"])
def test_a_balanced_sampler_chooses_rows_and_importance_weights_undo_it(
    tmp_path: Path, importance: bool, balanced: str
) -> None:
    """One step on the sampler's own rows, by hand."""
    module, net, logits = table()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])

    def sampler() -> ClassBalancedSampler | StratifiedBatchSampler:
        if balanced == "rows":
            return ClassBalancedSampler(labels, num_samples=7, seed=2)
        return StratifiedBatchSampler(labels, 7, skew=1.0, num_batches=1, seed=2)

    taught = distil(
        module, net, (torch.arange(9), labels), out=tmp_path / "s", sampler=sampler(), importance_weights=importance,
        num_epochs=1, batch_size=7, optimizer=descend, seed=5,
    )  # fmt: skip
    rows = torch.tensor(list(sampler())).flatten()
    assert len(rows) == 7
    assert len(rows.unique()) < 7  # the rare rows come again
    index = int(SampleIndexSampler(net.bank, seed=5).at(0))
    shares = torch.bincount(labels[rows]) / 7 if balanced == "batches" else torch.full((3,), 1 / 3)
    weight = (torch.tensor([6, 2, 1]) / 9 / shares)[labels[rows]] if importance else torch.ones(7)
    values = module.weight.detach().clone().requires_grad_()
    each = divergences(logits[index].softmax(dim=-1)[rows], values[rows])
    (weight * each).mean().mul(4 * LOG_WEIGHT.softmax(dim=0)[index].float()).backward()
    torch.testing.assert_close(taught[0]["weight"], (values - values.grad).detach())
    assert taught.info["sampling"]["posterior"] == ("natural" if importance else "balanced")


# The whole predictive as the target


def gaussian_bank() -> tuple[nn.Linear, FunctionalModel, Tensor]:
    """A weighted bank of two lines, each with a noise scale of its own, 2 outputs; and inputs [N, 1]."""
    module = nn.Linear(1, 2)
    likelihood = likelihoods.Gaussian(priors.HalfCauchy(1.0))
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=11)
    weight, bias = (torch.randn(3, *shape, generator=generator(4, str(shape))) for shape in ((2, 1), (2,)))
    params = {"weight": weight, "bias": bias, SCALE: torch.tensor([0.2, 0.5, 0.9])}
    log_weight = torch.tensor([0.0, 1.0, -1.0])
    block = make_block(params, chain=torch.zeros(3), draw=torch.arange(3), log_weight=log_weight)
    bank = Bank.from_blocks([block], layout=model.layout, info=model.to_config())
    return module, FunctionalModel(module, bank), torch.linspace(-1, 1, 11).unsqueeze(1)


@pytest.mark.parametrize("form", ["tensors", "data set"])
def test_the_cached_target_is_what_predict_says(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of 4 rows of 11, the last one short."""
    monkeypatch.setattr("bnn.training.distillation.CACHE_ROWS", 4)
    model, (x, y) = classifier(num_rows=11)
    bank = fit(model, (x, y), method=Prior(), num_samples=5)
    net = FunctionalModel(model.module, bank)
    data = (x, y) if form == "tensors" else TensorDataset(x, y)
    found, scales = whole_predictive(net, data, likelihoods.Categorical())
    expected = predict(net, x)
    torch.testing.assert_close(found.double(), expected.log_probs)  # type: ignore[union-attr]
    assert scales.shape == ()
    _, normal, x = gaussian_bank()
    targets = torch.zeros(11, 2)
    data = (x, targets) if form == "tensors" else TensorDataset(x, targets)
    likelihood = likelihoods.Gaussian(priors.HalfCauchy(1.0))
    mean, spread = whole_predictive(normal, data, likelihood)
    line = predict(normal, x)
    assert isinstance(line, TargetPredictive)
    torch.testing.assert_close(mean.double(), line.mean)
    torch.testing.assert_close(spread.double().square(), line.aleatoric + line.epistemic)
    assert spread.shape == (11, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_taught_its_own_predictive(tmp_path: Path, workers: int) -> None:
    """One shuffled pass with steps of 1 in batches of 4: each row falls by its own gradient, (q - p) / B."""
    module, net, logits = table()
    rows = torch.arange(9)
    taught = distil(
        module, net, (rows, rows), out=tmp_path / "s", targets="predictive", num_epochs=1, batch_size=3,
        optimizer=descend, num_workers=workers,
    )  # fmt: skip
    start = module.weight.detach()
    torch.testing.assert_close(taught[0]["weight"], start - (start.softmax(dim=-1) - mixture(logits)) / 3)
    loss = float(divergences(mixture(logits), start).mean())
    assert read_curve(tmp_path / "s")[0]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_student_of_the_predictive_reaches_the_same_optimum_without_noise(tmp_path: Path) -> None:
    """Where paired targets leave 0.02 after 2,000 steps, for samples come and go, these leave next to nothing after 500."""
    module, net, logits = table()
    rows = torch.arange(9)
    taught = distil(
        module, net, (rows, rows), out=tmp_path / "s", targets="predictive", num_epochs=500, batch_size=9, lr=0.2
    )
    torch.testing.assert_close(taught[0]["weight"].softmax(dim=1), mixture(logits), rtol=0, atol=1e-4)
    assert read_curve(tmp_path / "s")[-1]["loss"] < 1e-6  # it can be reached, so nothing is left to learn


def test_a_gaussian_student_of_the_predictive_reaches_its_closed_form(tmp_path: Path) -> None:
    """KL to N(m(x), s^2) is least where m is the least squares line through the means, and s^2 the mean over
    rows and outputs of the mixture's variance and what the line misses: the means are on a line, so nothing."""
    module, net, x = gaussian_bank()
    taught = distil(
        module, net, (x, torch.zeros(11, 2)), out=tmp_path / "s", targets="predictive", num_epochs=2500, batch_size=11,
        lr=0.05,
    )  # fmt: skip
    line = predict(net, x)
    assert isinstance(line, TargetPredictive)
    share = net.bank.log_weight.softmax(dim=0).float()
    bank = net.bank.block(slice(None)).params
    expected = {name: torch.tensordot(share, bank[name], dims=1) for name in ("weight", "bias")}
    for name, value in expected.items():
        torch.testing.assert_close(taught[0][name], value, rtol=0, atol=2e-3)
    spread = float((line.aleatoric + line.epistemic).mean().sqrt())
    assert float(taught[0][SCALE]) == pytest.approx(spread, rel=2e-3)


# Changed inputs

SEEN: list[Tensor] = []
"""Inputs of `Watched` modules in the order of their forward passes."""


class Watched(nn.Linear):
    """A layer that remembers what it was given, also where a copy of it runs."""

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.detach().clone())
        return super().forward(x)


@pytest.fixture
def seen() -> Iterator[list[Tensor]]:
    SEEN.clear()
    yield SEEN
    SEEN.clear()


def watch(folder: Path, x: Tensor, num_epochs: int, **options: Any) -> list[Tensor]:
    """Inputs of every step that all rows make one batch of, after checking that teacher and student see the same."""
    module = Watched(x.shape[1], 3)
    bank = Bank.from_state_dicts([module.state_dict()] * 2, module=module, info={"likelihood": {"name": "Categorical"}})
    net = FunctionalModel(module, bank)
    SEEN.clear()
    labels = torch.zeros(len(x), dtype=torch.int64)
    distil(module, net, (x, labels), out=folder, num_epochs=num_epochs, batch_size=len(x), **options)
    assert len(SEEN) == 2 * num_epochs
    assert all(torch.equal(SEEN[2 * step], SEEN[2 * step + 1]) for step in range(num_epochs))
    return SEEN[::2]


def test_inputs_as_they_are_without_noise_or_mixup(tmp_path: Path, seen: list[Tensor]) -> None:
    x = torch.randn(7, 4, generator=generator(0))
    for inputs in watch(tmp_path / "s", x, 3):
        assert sorted(inputs.tolist()) == sorted(x.tolist())


def test_noise_is_normal_of_its_scale_and_new_at_every_step(tmp_path: Path, seen: list[Tensor]) -> None:
    """All rows alike, so that what is left of each is the noise: mean, variance and fourth moment in standard errors."""
    x = torch.full((50, 4), 3.0)
    inputs = torch.stack(watch(tmp_path / "s", x, 40, noise=0.3))
    noise = ((inputs - 3.0) / 0.3).double()
    assert len(noise.flatten().unique()) > 0.99 * noise.numel()
    count = noise.numel()
    assert abs(float(noise.mean())) < 4 / count**0.5
    assert abs(float(noise.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((noise**4).mean()) - 3) < 4 * (96 / count) ** 0.5


def test_mixup_mixes_each_row_with_one_other_by_the_share_of_the_batch(tmp_path: Path, seen: list[Tensor]) -> None:
    """The rows are a basis, so that the mixing is read off: share on a row itself, the rest on its partner."""
    shares = []
    for inputs in watch(tmp_path / "s", 5 * torch.eye(7), 60, mixup=1.0):
        mixing = (inputs / 5).sort(dim=1, descending=True).values  # [B, B], the largest coefficients first
        torch.testing.assert_close(inputs.sum(dim=0), torch.full((7,), 5.0))  # every row is one row's partner
        apart = mixing[:, 0] < 1 - 1e-6  # a row may be its own partner
        assert bool((mixing[:, 2:].abs() < 1e-6).all())
        assert bool(apart.any())
        torch.testing.assert_close(mixing[apart].sum(dim=1), torch.ones(int(apart.sum())))
        assert float(mixing[apart, 0].max() - mixing[apart, 0].min()) < 1e-6
        shares.append(float(mixing[apart, 0][0]))
    # The larger of share and 1 - share, of a uniform share: uniform in [1/2, 1].
    found = torch.tensor(shares)
    assert abs(float(found.mean()) - 0.75) < 4 * (1 / 48 / 60) ** 0.5
    assert abs(float(found.var()) - 1 / 48) < 4 * (1 / 2880 / 60) ** 0.5
    for inputs in watch(tmp_path / "half", 5 * torch.eye(7), 10, mixup=1e4):
        largest = (inputs / 5).max(dim=1).values
        assert bool((((largest - 0.5).abs() < 0.05) | (largest > 1 - 1e-6)).all())  # Beta(a, a) of a large a
        assert float(largest.min()) < 0.55


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Ctrl-C once so many states have come."""

    def cut(run, *args):  # type: ignore[no-untyped-def]
        for count, found in enumerate(run):
            if count == after:
                raise KeyboardInterrupt
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", cut)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    "options",
    [{"noise": 0.3}, {"mixup": 0.4}, {"noise": 0.1, "mixup": 1.0, "num_indices": 2}, {"targets": "predictive"}],
    ids=["noise", "mixup", "both", "predictive"],
)
def test_changed_inputs_and_cached_targets_are_the_same_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Interrupted inside the second epoch of 5 batches, and again where the third one ends."""
    monkeypatch.setattr("bnn.training.loop.STEPS_PER_STATE", 1)
    net, (x, y) = teacher()
    module = build("mlp:6", input_shape=[4], num_outputs=3, seed=2)

    def run(out: str, **how: bool) -> Bank:
        return distil(module, net, (x, y), out=tmp_path / out, num_epochs=4, batch_size=5, seed=1, **options, **how)

    whole = run("whole")
    with interrupted(7):
        run("broken")
    with interrupted(8):
        run("broken", resume=True)
    resumed = run("broken", resume=True)
    assert all(torch.equal(resumed[0][name], whole[0][name]) for name in whole.layout.names)
    assert read_curve(tmp_path / "broken") == read_curve(tmp_path / "whole")
    plain = distil(module, net, (x, y), out=tmp_path / "plain", num_epochs=4, batch_size=5, seed=1)
    assert not torch.equal(plain[0]["1.weight"], whole[0]["1.weight"])


class Ages(Dataset):
    """Whole numbers in, row by row."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(row), torch.tensor(row % 3)


@pytest.mark.parametrize("options", [{"noise": 0.1}, {"mixup": 0.2}], ids=["noise", "mixup"])
def test_noise_and_mixup_are_refused_where_they_mean_nothing(tmp_path: Path, options: dict[str, float]) -> None:
    module, net, _ = table()
    with pytest.raises(ConfigError, match="inputs of real numbers, got whole numbers"):
        distil(module, net, Ages(), out=tmp_path / "s", num_epochs=1, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="targets='predictive': want neither noise, mixup, num_indices nor window"):
        distil(module, net, Ages(), out=tmp_path / "s", targets="predictive", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"noise": -0.1}, "noise and mixup of at least 0"),
        ({"mixup": float("inf")}, "noise and mixup of at least 0"),
        ({"noise": float("nan")}, "noise and mixup of at least 0"),
        ({"targets": "mean"}, "targets: want one of paired, predictive, got 'mean'"),
        ({"targets": "predictive", "num_indices": 2}, "want neither noise, mixup, num_indices nor window beside it"),
        ({"num_indices": 0}, "num_indices: want at least 1"),
    ],
)
def test_options_of_targets_and_inputs_are_checked(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    module, net, _ = table()
    rows = torch.arange(9)
    with pytest.raises(ConfigError, match=match):
        distil(module, net, (rows, rows), out=tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()


def test_a_student_is_scored_with_its_own_noise(tmp_path: Path) -> None:
    """The teacher's noise is fixed at 0.3; the student's also covers how far the samples lie apart."""
    x = torch.linspace(-1, 1, 20).unsqueeze(1)
    module = nn.Linear(1, 1)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(0.3), num_data=20)
    net = FunctionalModel(module, fit(model, (x, x), method=Prior(), num_samples=6))
    student = distil(module, net, (x, x), held_out=(x, x), out=tmp_path / "s", num_epochs=200, batch_size=20, lr=0.05)
    report = bnn.evaluate(FunctionalModel(module, student), (x, x))
    assert report.metrics["aleatoric"].value == pytest.approx(float(student[0][SCALE]) ** 2, rel=1e-5)
    assert float(student[0][SCALE]) > 0.5
    assert report.metrics["nll"].value == pytest.approx(read_curve(tmp_path / "s")[-1]["held_out_nll"], rel=1e-4)


def test_classes_that_a_teacher_rules_out_cost_nothing() -> None:
    teacher = torch.tensor([[0.0, -torch.inf, 1.0]])
    student = torch.zeros(1, 3)
    one = torch.ones(())
    p = torch.tensor([0.0, 1.0]).softmax(dim=0)
    expected = float((p * (p.log() + torch.tensor(3.0).log())).sum())
    assert float(divergence(likelihoods.Categorical(), teacher, student, one, one)) == pytest.approx(expected, rel=1e-6)
