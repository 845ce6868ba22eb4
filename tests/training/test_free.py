"""Training beside a bank: closed forms, gradients by hand, which parameters move, and what is left behind."""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from scenarios import classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import bnn
from bnn import priors
from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import HMC, Prior
from bnn.layout import Entry, layout_of
from bnn.likelihoods import SCALE, Categorical, Gaussian, Likelihood
from bnn.model import BayesianModel
from bnn.samplers import ClassBalancedSampler, SampleIndexSampler, StratifiedBatchSampler, WeightedIndexSampler
from bnn.seeding import generator
from bnn.training import train
from bnn.types import make_block


def read_curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def descend(values: list[Tensor]) -> torch.optim.Optimizer:
    """Steps of 1, so that the values fall by the gradient itself."""
    return torch.optim.SGD(values, 1.0)


def bank_of(
    module: nn.Module, bayesian: str, params: dict[str, Tensor], likelihood: Likelihood, **columns: Any
) -> Bank:
    """A bank of these samples [S, *shape] of the parameters that a glob names."""
    size = len(next(iter(params.values())))
    extra = [Entry(SCALE, (), torch.float32)] if SCALE in params else []
    block = make_block(params, chain=torch.zeros(size), draw=torch.arange(size), **columns)
    info = {"likelihood": likelihood.to_config(), "task": likelihood.task}
    return Bank.from_blocks([block], layout=layout_of(module, bayesian, extra), info=info)


# Closed forms


class Sum(nn.Module):
    """A Bayesian line through two inputs and a free one through three others."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.trunk = nn.Linear(2, 1, bias=False), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :2]) + self.trunk(x[:, 2:])


class Lines(NamedTuple):
    """A sum of lines, samples of the first, and rows."""

    module: Sum
    bank: Bank
    data: tuple[Tensor, Tensor]
    head: Tensor  # [S, 2]


LOG_WEIGHT = torch.tensor([0.0, 2.0, -1.0, 0.5, 1.0], dtype=torch.float64)


def lines(log_weight: Tensor | None = None, scale: Tensor | None = None, num_rows: int = 40) -> Lines:
    source = generator(2, "lines")
    x = torch.randn(num_rows, 5, generator=source) * torch.tensor([1.0, 2.0, 0.5, 1.0, 1.5])
    x[:, 2] = x[:, 2] + 0.5 * x[:, 0]  # what head and trunk see is correlated, so that the head matters
    y = x @ torch.tensor([[1.0], [-0.5], [2.0], [0.3], [-1.0]]) + 0.4 + 0.3 * torch.randn(num_rows, 1, generator=source)
    module, head = Sum(), torch.randn(5, 2, generator=source)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    params = {"head.weight": head.unsqueeze(1)} | ({} if scale is None else {SCALE: scale})
    likelihood = Gaussian(0.7) if scale is None else Gaussian(priors.HalfCauchy(1.0))
    bank = bank_of(module, "head", params, likelihood, log_weight=log_weight)
    return Lines(module, bank, (x, y), head)


def least_squares(case: Lines, share: Tensor, rows: Tensor | None = None) -> Tensor:
    """The trunk (weights, then bias) that is best on average over samples of these shares, rows of these weights."""
    x, y = (tensor.double() for tensor in case.data)
    target = y - x[:, :2] @ case.head.double().T @ share.unsqueeze(1)  # [N, 1]
    design = torch.cat([x[:, 2:], torch.ones(len(x), 1)], dim=1)
    root = torch.ones(len(x), 1) if rows is None else rows.double().sqrt().unsqueeze(1)
    return torch.linalg.lstsq(root * design, root * target).solution.flatten()


def trunk(bank: Bank) -> Tensor:
    return torch.cat([bank[0]["trunk.weight"].flatten(), bank[0]["trunk.bias"]]).double()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_optimum_is_least_squares_under_the_mean_of_the_samples(tmp_path: Path, weighted: bool) -> None:
    """Each step on all rows and all samples once, so that nothing is left to chance."""
    case = lines(LOG_WEIGHT if weighted else None)
    trained = train(
        case.module, case.bank, case.data, out=tmp_path / "t", num_indices=5, num_epochs=250, batch_size=40,
        optimizer=lambda values: torch.optim.SGD(values, 0.2),
    )  # fmt: skip
    share = LOG_WEIGHT.softmax(dim=0) if weighted else torch.full((5,), 0.2, dtype=torch.float64)
    expected = least_squares(case, share)
    torch.testing.assert_close(trunk(trained), expected, rtol=0, atol=1e-4)
    other = least_squares(case, torch.eye(5, dtype=torch.float64)[0])
    assert float((expected - other).abs().max()) > 0.1  # one sample alone leads elsewhere


@pytest.mark.parametrize("weighted", [False, True])
def test_one_sample_a_batch_leads_to_the_same_place(tmp_path: Path, weighted: bool) -> None:
    case = lines(LOG_WEIGHT if weighted else None)
    trained = train(case.module, case.bank, case.data, out=tmp_path / "t", num_epochs=300, batch_size=8, lr=0.05)
    share = LOG_WEIGHT.softmax(dim=0) if weighted else torch.full((5,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(trunk(trained), least_squares(case, share), rtol=0, atol=0.04)


def test_samples_with_little_noise_count_for_more(tmp_path: Path) -> None:
    """Under a noise scale of its own each sample's squares count by 1 / sigma_i^2."""
    scale = torch.tensor([0.5, 1.0, 2.0, 0.8, 3.0])
    case = lines(scale=scale)
    trained = train(
        case.module, case.bank, case.data, out=tmp_path / "t", num_indices=5, num_epochs=250, batch_size=40,
        optimizer=lambda values: torch.optim.SGD(values, 0.2),
    )  # fmt: skip
    precision = scale.double() ** -2
    torch.testing.assert_close(trunk(trained), least_squares(case, precision / precision.sum()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("importance", [False, True])
def test_a_weighted_sampler_leads_to_weighted_least_squares_and_importance_weights_back(
    tmp_path: Path, importance: bool
) -> None:
    """20,000 draws a step bring the batch close to its expectation: rows count by N pi_i, or all alike."""
    case = lines()
    weights = torch.where(case.data[1][:, 0] > 0, 8.0, 1.0)
    trained = train(
        case.module, case.bank, case.data, out=tmp_path / "t", num_indices=5, num_epochs=120, batch_size=20_000,
        optimizer=lambda values: torch.optim.SGD(values, 0.1), sampler=WeightedIndexSampler(weights, 20_000),
        importance_weights=importance,
    )  # fmt: skip
    equal = torch.full((5,), 0.2, dtype=torch.float64)
    targets = {False: least_squares(case, equal, weights), True: least_squares(case, equal)}
    torch.testing.assert_close(trunk(trained), targets[importance], rtol=0, atol=0.02)
    assert float((targets[True] - targets[False]).abs().max()) > 0.1
    assert trained.info["sampling"]["posterior"] == ("natural" if importance else "balanced")


# One step by hand


def head_bank(module: nn.Module, likelihood: Likelihood | None = None) -> Bank:
    """Five weighted samples of the last layer of the small classifier."""
    source = generator(9, "head")
    params = {"3.weight": torch.randn(5, 3, 5, generator=source), "3.bias": torch.randn(5, 3, generator=source)}
    return bank_of(module, "3", params, likelihood or Categorical(), log_weight=LOG_WEIGHT)


def with_sample(module: nn.Module, bank: Bank, index: int) -> nn.Module:
    """A copy of the module that holds a sample."""
    copied = copy.deepcopy(module)
    copied.load_state_dict(bank[index], strict=False)
    return copied


def focal(outputs: Tensor, y: Tensor) -> Tensor:
    """-(1 - p_y)^2 log p_y."""
    log_p = outputs.log_softmax(dim=1).gather(1, y.unsqueeze(1)).squeeze(1)
    return -((1 - log_p.exp()) ** 2) * log_p


def cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


@pytest.mark.parametrize("num_indices", [None, 3])
@pytest.mark.parametrize("loss", [None, focal], ids=["likelihood", "focal"])
def test_a_step_falls_by_the_gradient_of_the_weighted_mean_over_samples(
    tmp_path: Path, num_indices: int | None, loss: Callable[[Tensor, Tensor], Tensor] | None
) -> None:
    model, (x, y) = classifier()
    bank = head_bank(model.module)
    trained = train(
        model.module, bank, (x, y), out=tmp_path / "t", loss=loss, num_indices=num_indices, num_epochs=1, batch_size=23,
        optimizer=descend, seed=4,
    )  # fmt: skip
    indices = SampleIndexSampler(bank, seed=4).at(range(num_indices or 1)).tolist()
    weight = 5 * LOG_WEIGHT.softmax(dim=0)
    gradients = {"1.weight": torch.zeros(5, 4), "1.bias": torch.zeros(5)}
    total = 0.0
    for index in indices:
        copied = with_sample(model.module, bank, index)
        cost = float(weight[index]) / len(indices) * (loss or cross_entropy)(copied(x), y).mean()
        cost.backward()
        total += float(cost.detach())
        for name in gradients:
            gradients[name] += dict(copied.named_parameters())[name].grad  # type: ignore[operator]
    start = dict(model.module.named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(trained[0][name], start[name].detach() - gradient)
    assert read_curve(tmp_path / "t")[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert trained.info["method"]["options"]["loss"] == ("likelihood" if loss is None else "given")


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("kind", ["rows", "batches"])
def test_a_balanced_sampler_chooses_rows_and_importance_weights_undo_it(
    tmp_path: Path, kind: str, importance: bool
) -> None:
    model, (x, y) = classifier()
    bank = head_bank(model.module)

    def sampler() -> ClassBalancedSampler | StratifiedBatchSampler:
        if kind == "rows":
            return ClassBalancedSampler(y, num_samples=17, seed=6)
        return StratifiedBatchSampler(y, 17, per_class=[1.0, 1.0, 2.0], num_batches=1, seed=6)

    trained = train(
        model.module, bank, (x, y), out=tmp_path / "t", sampler=sampler(), importance_weights=importance, num_epochs=1,
        batch_size=17, optimizer=descend, seed=4,
    )  # fmt: skip
    rows = torch.tensor(list(sampler())).flatten()
    drawn = torch.full((3,), 1 / 3) if kind == "rows" else torch.bincount(y[rows]) / 17
    weight = (torch.bincount(y) / 23 / drawn)[y[rows]] if importance else torch.ones(17)
    index = int(SampleIndexSampler(bank, seed=4).at(0))
    copied = with_sample(model.module, bank, index)
    cost = 5 * LOG_WEIGHT.softmax(dim=0)[index].float() * (weight * cross_entropy(copied(x[rows]), y[rows])).mean()
    cost.backward()
    first = copied[1]  # type: ignore[index]
    torch.testing.assert_close(trained[0]["1.weight"], (first.weight - first.weight.grad).detach())


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda outputs, y: cross_entropy(outputs, y).mean(), r"\[\]"),
        (lambda outputs, y: outputs, r"\[7, 3\]"),
        (lambda outputs, y: cross_entropy(outputs, y).unsqueeze(1), r"\[7, 1\]"),
    ],
    ids=["mean", "a class", "a column"],
)
def test_a_loss_that_is_not_one_a_row_is_refused(
    tmp_path: Path, loss: Callable[[Tensor, Tensor], Tensor], got: str
) -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match=rf"loss: want a loss for each row, \[7\], got {got}; leave the mean out"):
        train(model.module, head_bank(model.module), data, out=tmp_path / "t", loss=loss, batch_size=7)
    assert list(tmp_path.iterdir()) == []


# What moves and what does not


def test_the_module_is_not_changed_by_a_bit(tmp_path: Path, world_untouched: None) -> None:
    """Nor its gradients, flags, buffers and mode; nor does the result share memory with it."""
    model, data = classifier()
    module = nn.Sequential(model.module, nn.BatchNorm1d(3)).eval()
    bank = bank_of(module, "0.3.bias", {"0.3.bias": torch.randn(5, 3, generator=generator(1))}, Categorical())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    flags = [(id(p), p.requires_grad, p.grad) for p in module.parameters()], [m.training for m in module.modules()]
    trained = train(module, bank, data, held_out=data, out=tmp_path / "t", num_epochs=3, batch_size=7, num_indices=2)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    after = [(id(p), p.requires_grad, p.grad) for p in module.parameters()], [m.training for m in module.modules()]
    assert after == flags
    assert set(trained[0]) == set(dict(module.named_parameters())) - {"0.3.bias"}
    assert all(not torch.equal(value, before[name]) for name, value in trained[0].items())


def test_frozen_parameters_of_the_module_are_trained_where_they_are_named(tmp_path: Path) -> None:
    model, data = classifier()
    bank = head_bank(model.module)
    free = train(model.module, bank, data, out=tmp_path / "a", num_epochs=2, batch_size=7)
    model.module.requires_grad_(False)
    with pytest.raises(ConfigError, match="free: want parameters outside the bank that require gradients, got none"):
        train(model.module, bank, data, out=tmp_path / "b", num_epochs=2, batch_size=7)
    frozen = train(model.module, bank, data, out=tmp_path / "b", free="1.*", num_epochs=2, batch_size=7)
    assert torch.equal(free[0]["1.weight"], frozen[0]["1.weight"])
    model.module[1].bias.requires_grad_(True)  # type: ignore[union-attr,operator,index]
    default = train(model.module, bank, data, out=tmp_path / "c", num_epochs=2, batch_size=7)
    assert list(default[0]) == ["1.bias"]


@pytest.mark.parametrize(
    ("free", "names"),
    [
        ("*", ["1.weight", "1.bias", "2.weight", "2.bias"]),
        ("2", ["2.weight", "2.bias"]),
        (["1", "2.bias"], ["1.weight", "1.bias", "2.bias"]),
        (["*", "!*.bias"], ["1.weight", "2.weight"]),
        ("!1", ["2.weight", "2.bias"]),
        (["*.weight", "!2"], ["1.weight"]),
    ],
)
def test_globs_choose_among_what_the_bank_does_not_hold(tmp_path: Path, free: Any, names: list[str]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 6), nn.Linear(6, 3))
    bank = bank_of(module, "3", {"3.weight": torch.randn(2, 3, 6), "3.bias": torch.randn(2, 3)}, Categorical())
    _, data = classifier()
    trained = train(module, bank, data, out=tmp_path / "t", free=free, num_epochs=1, batch_size=7)
    assert list(trained[0]) == names
    start = dict(module.named_parameters())
    assert all(not torch.equal(trained[0][name], start[name]) for name in names)
    # Those that were left out stood in the forward pass with the module's own values, and the chosen ones moved
    # from there: with the others moved by hand, the same run ends elsewhere.
    left = next((n for n in start if n not in names and not n.startswith("3")), None)
    if left is not None:
        with torch.no_grad():
            start[left].add_(0.5)
        moved = train(module, bank, data, out=tmp_path / "m", free=free, num_epochs=1, batch_size=7)
        assert not torch.equal(moved[0][names[0]], trained[0][names[0]])


@pytest.mark.parametrize(
    ("free", "match"),
    [
        (
            "3",
            r"patterns that match parameters outside the bank: 1.weight, 1.bias, got '3', which matches what the bank",
        ),
        (["*", "!3.bias"], "got '!3.bias', which matches what the bank holds"),
        ("tail", "got 'tail', which matches nothing"),
        (["*", "!*"], "want at least one"),
    ],
)
def test_globs_of_nothing_are_refused(tmp_path: Path, free: Any, match: str) -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match=match):
        train(model.module, head_bank(model.module), data, out=tmp_path / "t", free=free)
    assert list(tmp_path.iterdir()) == []


def test_names_that_look_like_globs_are_names(tmp_path: Path) -> None:
    """The bank's own parameters are taken away from the free ones by name."""
    _, data = classifier()
    module = nn.Sequential()
    module.add_module("a[0]", nn.Linear(4, 3))
    module.add_module("b", nn.Linear(3, 3))
    values = {"a[0].weight": torch.randn(2, 3, 4), "a[0].bias": torch.randn(2, 3)}
    bank = bank_of(module, "a[[]0]", values, Categorical())
    trained = train(module, bank, data, out=tmp_path / "t", num_epochs=1, batch_size=7)
    assert set(trained[0]) == {"b.weight", "b.bias"}


def test_a_bank_that_holds_everything_is_refused(tmp_path: Path) -> None:
    model, data = classifier()
    bank = fit(model, data, method=Prior(), num_samples=2)
    with pytest.raises(ConfigError, match="free: want parameters outside the bank, got a bank that holds all of them"):
        train(model.module, bank, data, out=tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


class Tied(nn.Module):
    """Two layers under one weight, with a head of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights_are_one_value_with_the_gradients_of_all_their_uses(tmp_path: Path) -> None:
    _, (x, y) = classifier()
    module = Tied()
    values = {"head.weight": torch.randn(2, 3, 4), "head.bias": torch.randn(2, 3)}
    bank = bank_of(module, "head", values, Categorical())
    trained = train(
        module, bank, (x, y), out=tmp_path / "t", free=["*.weight"], num_epochs=1, batch_size=23, optimizer=descend
    )
    assert list(trained[0]) == ["first.weight"]
    assert trained.layout.aliases == {"second.weight": "first.weight"}
    copied = with_sample(module, bank, int(SampleIndexSampler(bank, seed=0).at(0)))
    assert copied.first.weight is copied.second.weight  # type: ignore[union-attr]
    cross_entropy(copied(x), y).mean().backward()
    expected = copied.first.weight - copied.first.weight.grad  # type: ignore[union-attr,operator]
    torch.testing.assert_close(trained[0]["first.weight"], expected.detach())


def test_weights_tied_to_what_the_bank_holds_are_the_banks(tmp_path: Path) -> None:
    _, data = classifier()
    module = Tied()
    bank = bank_of(module, "first.weight", {"first.weight": torch.randn(2, 4, 4)}, Categorical())
    trained = train(module, bank, data, out=tmp_path / "t", num_epochs=1, batch_size=7)
    assert set(trained[0]) == {"first.bias", "second.bias", "head.weight", "head.bias"}
    with pytest.raises(ConfigError, match=r"'second\.weight', which matches what the bank holds"):
        train(module, bank, data, out=tmp_path / "u", free="second.weight")


# Held-out figures


@pytest.fixture
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples that held-out rows are judged under: all of 5, or of a bank beyond the limit those evenly spaced."""
    monkeypatch.setattr("bnn.training.free.HELD_OUT_SAMPLES", request.param)
    return {32: [0, 1, 2, 3, 4], 3: [0, 2, 4], 2: [0, 4]}[request.param]


@pytest.mark.parametrize("chosen", [32, 3, 2], indirect=True)
def test_held_out_classes_are_judged_by_the_mean_predictive(tmp_path: Path, chosen: list[int]) -> None:
    """Of the trained values, with the bank's weights, by hand."""
    model, (x, y) = classifier(num_rows=36)
    module, bank = model.module, head_bank(model.module)
    trained = train(
        module, bank, (x[:23], y[:23]), held_out=(x[23:], y[23:]), out=tmp_path / "t", num_epochs=2, batch_size=7
    )
    module = copy.deepcopy(module)
    module.load_state_dict(trained[0], strict=False)
    with torch.no_grad():
        each = torch.stack([with_sample(module, bank, i)(x[23:]).double().softmax(dim=1) for i in chosen])
    probs = torch.tensordot(LOG_WEIGHT[chosen].softmax(dim=0), each, dims=1)
    row = read_curve(tmp_path / "t")[-1]
    assert row["held_out_nll"] == pytest.approx(float(nn.functional.nll_loss(probs.log(), y[23:])), rel=1e-5)
    assert row["held_out_accuracy"] == float((probs.argmax(dim=1) == y[23:]).double().mean())


@pytest.mark.parametrize("chosen", [32, 3], indirect=True)
@pytest.mark.parametrize("learnt", [False, True], ids=["fixed", "learnt"])
def test_held_out_targets_are_judged_by_the_mixture(tmp_path: Path, chosen: list[int], learnt: bool) -> None:
    scale = torch.tensor([0.5, 1.0, 2.0, 0.8, 3.0]) if learnt else None
    case = lines(LOG_WEIGHT, scale)
    x, y = case.data
    trained = train(
        case.module, case.bank, (x[:29], y[:29]), held_out=(x[29:], y[29:]), out=tmp_path / "t", num_epochs=2,
        batch_size=7,
    )  # fmt: skip
    weight, bias = trained[0]["trunk.weight"], trained[0]["trunk.bias"]
    means = (x[29:, 2:] @ weight.T + bias + x[29:, :2] @ case.head[chosen].T).double()  # [B, K]
    sigma = torch.full((5,), 0.7) if scale is None else scale
    each = torch.distributions.Normal(means, sigma[chosen].double()).log_prob(y[29:].double())
    mixed = torch.logsumexp(each + LOG_WEIGHT[chosen].log_softmax(dim=0), dim=1)
    assert read_curve(tmp_path / "t")[-1]["held_out_nll"] == pytest.approx(-float(mixed.mean()), rel=1e-5)


# Files, and what comes after


def test_the_files_of_a_run(tmp_path: Path) -> None:
    """A bank of one sample, and the same values as an ordinary state dict for tools that know no banks."""
    model, data = classifier()
    bank = head_bank(model.module)
    trained = train(model.module, bank, data, held_out=data, out=tmp_path / "t", num_epochs=4, batch_size=7, seed=8)
    assert {"bank.json", "free.safetensors", "curve.csv"} <= {path.name for path in (tmp_path / "t").iterdir()}
    loaded = safetensors.torch.load_file(tmp_path / "t" / "free.safetensors")
    plain = {name: tensor for name, tensor in loaded.items() if not name.startswith("@pad")}
    assert plain.keys() == trained[0].keys()
    assert all(torch.equal(plain[name], trained[0][name]) for name in plain)
    again = Bank.open(tmp_path / "t", verify="full")
    assert (len(again), again.info["complete"], again.info["seed"]) == (1, True, 8)
    assert again.info["method"]["name"] == "train"
    assert again.info["method"]["options"]["bank"] == bank.digest
    assert again.info["sampling"] == {"sampler": None, "posterior": "natural"}
    assert again.info["likelihood"] == {"name": "Categorical"}
    assert [row["epoch"] for row in read_curve(tmp_path / "t")] == [1, 2, 3, 4]


def test_a_trained_trunk_makes_the_head_better(tmp_path: Path) -> None:
    """A posterior of the head over a random trunk, then the trunk trained under it; both judged on other rows."""
    model, (x, y) = classifier(num_rows=300, width=7)
    head = BayesianModel(model.module, prior=priors.Normal(), likelihood=Categorical(), num_data=200, bayesian="3")
    rows, others = (x[:200], y[:200]), (x[200:], y[200:])
    bank = fit(head, rows, method=HMC(num_chains=2, num_warmup=100, num_steps=8), num_samples=20)
    before = bnn.evaluate(FunctionalModel(model.module, bank), others).metrics
    trained = train(model.module, bank, rows, out=tmp_path / "t", num_epochs=60, batch_size=32, lr=0.02)
    missing, unexpected = model.module.load_state_dict(trained[0], strict=False)
    assert set(missing) == {"3.weight", "3.bias"}
    assert unexpected == []
    after = bnn.evaluate(FunctionalModel(model.module, bank), others).metrics
    assert after["nll"].value < before["nll"].value - 4 * (before["nll"].standard_error or math.inf)
    assert after["accuracy"].value > before["accuracy"].value


def test_training_is_repeatable_by_seed_and_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    model, data = classifier()
    bank = head_bank(model.module)
    found = [
        train(model.module, bank, data, out=tmp_path / str(place), num_epochs=2, batch_size=5, **options)[0]["1.weight"]
        for place, options in enumerate([{}, {}, {"num_workers": 2}, {"seed": 1}])
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


class Rows(Dataset):
    """Rows one by one, and no `__getitems__`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.x[row], self.y[row]


class Added(nn.Module):
    """A module of two inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner(a + b)


def test_forms_of_data_serve_alike(tmp_path: Path) -> None:
    model, (x, y) = classifier()
    bank = head_bank(model.module)
    forms: dict[str, Any] = {"pair": (x, y), "tensors": TensorDataset(x, y), "rows": Rows(x, y)}
    found = {
        name: train(model.module, bank, data, out=tmp_path / name, num_epochs=2, batch_size=5)[0]["1.weight"]
        for name, data in forms.items()
    }
    assert all(torch.equal(value, found["pair"]) for value in found.values())
    module = Added(model.module)
    values = {f"inner.{name}": tensor for name, tensor in bank.block(slice(None)).params.items()}
    tuples = bank_of(module, "inner.3", values, Categorical(), log_weight=LOG_WEIGHT)
    two = train(module, tuples, ((x - 1, torch.ones_like(x)), y), out=tmp_path / "two", num_epochs=2, batch_size=5)
    torch.testing.assert_close(two[0]["inner.1.weight"], found["pair"], rtol=1e-3, atol=1e-4)


def refused() -> Iterator[tuple[str, dict[str, Any], type[Exception], str]]:
    _, (x, y) = classifier()
    yield "loader", {"data": DataLoader(TensorDataset(x, y))}, ConfigError, "data: want a pair of tensors or a data set"
    yield "NaN", {"data": (x.clone().fill_(torch.nan), y)}, DataError, "NaN or Inf in row 0 of x"
    yield "no pair", {"data": TensorDataset(x)}, DataError, r"rows \(x, y\)"
    classes = WeightedIndexSampler([1.0, 2.0, 3.0])
    yield "weights of classes", {"sampler": classes}, DataError, "one weight or label a row of the data, 23 of them"
    never = ClassBalancedSampler(y, weights=[1.0, 0.0, 1.0])
    yield "weights of 0", {"sampler": never, "importance_weights": True}, ConfigError, "0 for class 1"
    yield "a stock sampler", {"sampler": torch.utils.data.SequentialSampler(y)}, ConfigError, "got SequentialSampler"
    yield "no samples", {"num_indices": 0}, ConfigError, "num_indices: want at least 1"


@pytest.mark.parametrize(("options", "error", "match"), [c[1:] for c in refused()], ids=[c[0] for c in refused()])
def test_bad_data_and_samplers_are_refused_and_leave_nothing(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model, data = classifier()
    with pytest.raises(error, match=match):
        train(model.module, head_bank(model.module), out=tmp_path / "t", batch_size=7, **{"data": data, **options})
    assert list(tmp_path.iterdir()) == []


def test_targets_that_fit_no_output_are_refused_in_words(tmp_path: Path) -> None:
    model, (x, y) = classifier()
    with pytest.raises(DataError, match=r"classes in \[0, 3\), one an output of the module, got 1 to 3"):
        train(model.module, head_bank(model.module), (x, y + 1), out=tmp_path / "t", batch_size=7)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_of_another_module_is_refused(tmp_path: Path) -> None:
    model, data = classifier()
    other, _ = classifier(width=6)
    with pytest.raises(BankMismatch, match="the layout"):
        train(other.module, head_bank(model.module), data, out=tmp_path / "t")
