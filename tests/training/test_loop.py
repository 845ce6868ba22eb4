"""The training loop against plain loops of torch, and runs that are cut short against unbroken ones, bit for bit."""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scenarios import classifier
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)
from torch.utils.data import Dataset

import bnn
from bnn.bank import Bank
from bnn.errors import BankMismatch, ConfigError, DataError, FitError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import Prior
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.samplers import (
    ByMetric,
    ClassBalancedSampler,
    DynamicClassSampler,
    Linear,
    PairedLoader,
    SampleIndexSampler,
    StratifiedBatchSampler,
)
from bnn.seeding import generator
from bnn.training import distil, train

FREE = ("1.weight", "1.bias")
STEPS = 5  # an epoch of 23 rows in batches of 5


class Case(NamedTuple):
    """A module with a bank of its last layer, rows to train on, and others to judge by."""

    module: nn.Module
    bank: Bank
    data: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


@functools.cache
def case(num_samples: int = 4) -> Case:
    """Made once: what a test changes it copies."""
    model, (x, y) = classifier(num_rows=36)
    head = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=36, bayesian="3")
    bank = fit(head, (x, y), method=Prior(), num_samples=num_samples)
    return Case(model.module, bank, (x[:23], y[:23]), (x[23:], y[23:]))


def read_curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "curve.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


# Against plain loops


def with_head(module: nn.Module, bank: Bank, index: int) -> nn.Module:
    """The module's own free values beside one sample, which is left as it is."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in bank.layout.names:
                parameter.copy_(bank[index][name])
    return module


def free_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if name in FREE}


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizer] | None] = {
    "default": None,
    "sgd": lambda values: SGD(values, 0.5),
    "adamw": lambda values: AdamW(values, 0.02, weight_decay=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_the_first_step_is_that_of_a_plain_loop(tmp_path: Path, name: str, clip_norm: float | None) -> None:
    module, bank, (x, y), _ = case()
    trained = train(
        module, bank, (x, y), out=tmp_path / "t", num_epochs=1, batch_size=23, lr=0.02, optimizer=OPTIMIZERS[name],
        clip_norm=clip_norm, seed=3,
    )  # fmt: skip
    plain = with_head(copy.deepcopy(module), bank, int(SampleIndexSampler(bank, seed=3).at(0)))
    values = list(free_of(plain).values())
    optimizer = (OPTIMIZERS[name] or (lambda values: Adam(values, 0.02)))(values)
    nn.functional.cross_entropy(plain(x), y).backward()
    if clip_norm is not None:
        assert float(nn.utils.clip_grad_norm_(values, clip_norm)) > clip_norm
    optimizer.step()
    for name, value in free_of(plain).items():
        torch.testing.assert_close(trained[0][name], value.detach())
        assert not torch.equal(value, dict(module.named_parameters())[name])


def plain_run(found: Case, num_epochs: int, patience: int | None = None, lr: float = 0.05) -> list[dict[str, Any]]:
    """Epoch by epoch what a loop by hand comes to: batches are the loader's, the rest is torch alone."""
    module, bank, data, (x_out, y_out) = found
    loader = PairedLoader(data, SampleIndexSampler(bank, seed=3), batch_size=5, shuffle=True)
    plain = copy.deepcopy(module)
    optimizer = Adam(free_of(plain).values(), lr)
    scheduler = LambdaLR(optimizer, lambda step: 0.01 ** (step / (STEPS * num_epochs)))
    epochs: list[dict[str, Any]] = []
    best, waited = math.inf, 0
    for epoch in range(1, num_epochs + 1):
        losses = []
        for (x, y), index in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(with_head(plain, bank, index)(x), y)
            loss.backward()
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            probs = torch.stack([with_head(plain, bank, i)(x_out).softmax(dim=1) for i in range(len(bank))]).mean(dim=0)
        nll = float(nn.functional.nll_loss(probs.double().log(), y_out))
        values = {name: value.detach().clone() for name, value in free_of(plain).items()}
        row = {"epoch": epoch, "loss": sum(losses) / STEPS, "lr": rate, "held_out_nll": nll}
        row["held_out_accuracy"] = float((probs.argmax(dim=1) == y_out).double().mean())
        epochs.append({"row": row, "values": values})
        best, waited = (nll, 0) if nll < best else (best, waited + 1)
        if patience is not None and waited >= patience:
            break
    return epochs


def test_a_run_and_its_curve_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    """Six epochs of five batches, the last one of 3 rows: losses, rates, held-out figures and the values left."""
    found = case()
    module, bank, data, held_out = found
    trained = train(
        module, bank, data, held_out=held_out, out=tmp_path / "t", num_epochs=6, batch_size=5, lr=0.05, seed=3
    )
    expected = plain_run(found, 6)
    for name in FREE:
        torch.testing.assert_close(trained[0][name], expected[-1]["values"][name], rtol=1e-4, atol=1e-5)
    curve = read_curve(tmp_path / "t")
    assert len(curve) == 6
    for row, epoch in zip(curve, expected, strict=True):
        assert list(row) == ["epoch", "loss", "lr", "held_out_nll", "held_out_accuracy"]
        assert row == pytest.approx(epoch["row"], rel=1e-4)
    assert curve[-1]["lr"] == pytest.approx(0.05 * 0.01 ** (29 / 30))  # the fall to a hundredth ends with the run


@pytest.mark.parametrize("patience", [2, 4])
def test_early_stopping_stops_where_a_loop_by_hand_stops(tmp_path: Path, patience: int) -> None:
    """And keeps the values of the best epoch, not of the last."""
    found = case()
    module, bank, data, held_out = found
    trained = train(
        module, bank, data, held_out=held_out, out=tmp_path / "t", num_epochs=60, batch_size=5, lr=0.2, seed=3,
        patience=patience,
    )  # fmt: skip
    expected = plain_run(found, 60, patience, lr=0.2)
    best = min(range(len(expected)), key=lambda epoch: expected[epoch]["row"]["held_out_nll"])
    assert 1 < len(expected) < 60
    assert best == len(expected) - 1 - patience
    curve = read_curve(tmp_path / "t")
    assert [row["held_out_nll"] for row in curve] == pytest.approx(
        [epoch["row"]["held_out_nll"] for epoch in expected], rel=1e-3
    )
    for name in FREE:
        torch.testing.assert_close(trained[0][name], expected[best]["values"][name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(trained[0][name], expected[-1]["values"][name], rtol=1e-2, atol=1e-3)
    assert trained.info["complete"]


def test_patience_that_never_ends_keeps_the_best_values_all_the_same(tmp_path: Path) -> None:
    found = case()
    module, bank, data, held_out = found
    expected = plain_run(found, 8, lr=0.2)
    best = min(range(8), key=lambda epoch: expected[epoch]["row"]["held_out_nll"])
    assert best < 7
    trained = train(
        module, bank, data, held_out=held_out, out=tmp_path / "t", num_epochs=8, batch_size=5, lr=0.2, seed=3,
        patience=100,
    )  # fmt: skip
    torch.testing.assert_close(trained[0]["1.weight"], expected[best]["values"]["1.weight"], rtol=1e-3, atol=1e-4)


def test_another_figure_can_decide(tmp_path: Path) -> None:
    """A student by its divergence from the bank, which falls where the NLL of random targets does not."""
    model, (x, _) = classifier()
    bank = fit(model, (x, torch.zeros(23, dtype=torch.int64)), method=Prior(), num_samples=4)
    net, student = FunctionalModel(model.module, bank), build("mlp:6", input_shape=[4], num_outputs=3, seed=2)
    held_out = x, torch.randint(3, (23,), generator=generator(0))
    lengths = {}
    for monitor in ("held_out_nll", "held_out_kl"):
        out = tmp_path / monitor
        data = x, torch.zeros(23, dtype=torch.int64)
        distil(student, net, data, held_out=held_out, out=out, num_epochs=20, lr=0.01, patience=2, monitor=monitor)
        curve = [row[monitor] for row in read_curve(out)]
        lengths[monitor] = len(curve)
        stalled = [
            epoch for epoch in range(2, len(curve)) if min(curve[epoch - 1 : epoch + 1]) >= min(curve[: epoch - 1])
        ]
        assert stalled == ([len(curve) - 1] if len(curve) < 20 else [])
    assert lengths["held_out_nll"] != lengths["held_out_kl"]


# Schedulers, clipping, precision


class Schedule(NamedTuple):
    make: Callable[[Optimizer], Any]
    interval: str


SCHEDULES: dict[str, Schedule] = {
    "step": Schedule(lambda optimizer: StepLR(optimizer, 2, gamma=0.3), "epoch"),
    "multi-step": Schedule(lambda optimizer: MultiStepLR(optimizer, [3, 8, 8, 17], gamma=0.4), "step"),
    "cosine": Schedule(lambda optimizer: CosineAnnealingLR(optimizer, T_max=4), "epoch"),
    "one cycle": Schedule(lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=6 * STEPS + 1), "step"),
    "plateau": Schedule(lambda optimizer: ReduceLROnPlateau(optimizer, patience=0, factor=0.5), "epoch"),
    "sequential": Schedule(
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer, 0.1, total_iters=7), CosineAnnealingLR(optimizer, 20)], milestones=[7]
        ),
        "step",
    ),
}


def momentum(values: list[Tensor]) -> Optimizer:
    return SGD(values, 0.1, momentum=0.9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_step_when_they_are_told_to(tmp_path: Path, name: str) -> None:
    """The rate of each epoch in the curve is the one that its last step was taken with."""
    module, bank, data, held_out = case()
    make, interval = SCHEDULES[name]
    train(
        module, bank, data, held_out=held_out, out=tmp_path / "t", num_epochs=6, batch_size=5, optimizer=momentum,
        scheduler=make, scheduler_interval=interval,  # type: ignore[arg-type]
    )  # fmt: skip
    curve = read_curve(tmp_path / "t")
    optimizer = momentum([nn.Parameter(torch.zeros(2))])
    scheduler, expected = make(optimizer), []
    for row in curve:
        for _ in range(STEPS):
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            if interval == "step":
                scheduler.step()
        expected.append(rate)
        if interval == "epoch":
            scheduler.step(*([row["held_out_nll"]] if name == "plateau" else []))
    assert [row["lr"] for row in curve] == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_an_optimiser_of_ones_own_is_left_at_its_rate(tmp_path: Path) -> None:
    module, bank, data, _ = case()
    train(module, bank, data, out=tmp_path / "t", num_epochs=3, batch_size=5, optimizer=momentum)
    assert [row["lr"] for row in read_curve(tmp_path / "t")] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize("clip_norm", [0.01, 1e6])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_gradient_of_all_values_together_is_clipped(tmp_path: Path, clip_norm: float, precision: Any) -> None:
    """Steps of 1: what the values fell by is the gradient, in one direction whatever its norm."""
    module, bank, data, _ = case()
    falls = {}
    for name, norm in (("clipped", clip_norm), ("free", None)):
        trained = train(
            module, bank, data, out=tmp_path / name, num_epochs=1, batch_size=23, clip_norm=norm, precision=precision,
            optimizer=lambda values: SGD(values, 1.0),
        )  # fmt: skip
        falls[name] = torch.cat([(dict(module.named_parameters())[n] - trained[0][n]).detach().flatten() for n in FREE])
    norm = float(falls["free"].norm())
    assert norm > 0.02
    assert float(falls["clipped"].norm()) == pytest.approx(min(clip_norm, norm), rel=1e-3)
    torch.testing.assert_close(falls["clipped"] / falls["clipped"].norm(), falls["free"] / norm, rtol=1e-3, atol=1e-4)


SEEN: list[tuple[torch.dtype, torch.dtype]] = []
"""Of each forward pass of a `Watched` layer: the dtype of its weight, and of what it gave."""


class Watched(nn.Linear):
    """A layer that says what it computes in, also where a copy of it runs."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        SEEN.append((self.weight.dtype, found.dtype))
        return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("verb", ["train", "distil"])
def test_forward_passes_compute_in_the_precision_and_values_stay(tmp_path: Path, precision: Any, verb: str) -> None:
    module = nn.Sequential(Watched(4, 5), nn.Tanh(), nn.Linear(5, 3))
    like, (x, y) = classifier()
    bayesian = "2" if verb == "train" else "*"
    model = BayesianModel(module, prior=like.prior, likelihood=like.likelihood, num_data=23, bayesian=bayesian)
    bank = fit(model, (x, y), method=Prior(), num_samples=4)
    SEEN.clear()
    if verb == "train":
        result = train(module, bank, (x, y), out=tmp_path / "t", num_epochs=2, batch_size=5, precision=precision)
    else:
        net = FunctionalModel(module, bank)
        result = distil(module, net, (x, y), out=tmp_path / "t", num_epochs=2, batch_size=5, precision=precision)
    computed = [(torch.float32, getattr(torch, precision))]
    assert computed * (2 * STEPS * (1 if verb == "train" else 2)) == SEEN
    assert all(entry.dtype == torch.float32 for entry in result.layout.entries)
    start = dict(module.named_parameters())
    assert all(not torch.equal(result[0][name], start[name]) for name in result.layout.names)
    SEEN.clear()


def test_a_step_in_mixed_precision_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Bit for bit other than in float32, and near it."""
    module, bank, (x, y), _ = case()
    found = {}
    for precision in ("bfloat16", "float32"):
        bank_of = train(
            module, bank, (x, y), out=tmp_path / precision, num_epochs=1, batch_size=23, seed=3,
            precision=precision, optimizer=lambda values: SGD(values, 1.0),  # type: ignore[arg-type]
        )  # fmt: skip
        found[precision] = bank_of[0]["1.weight"]
    plain = with_head(copy.deepcopy(module), bank, int(SampleIndexSampler(bank, seed=3).at(0)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(plain(x).float(), y)
    loss.backward()
    expected = (plain[1].weight - plain[1].weight.grad).detach()  # type: ignore[index,union-attr,operator]
    torch.testing.assert_close(found["bfloat16"], expected, rtol=0, atol=2e-3)  # sums over rows in another order
    assert not torch.equal(found["bfloat16"], found["float32"])
    torch.testing.assert_close(found["bfloat16"], found["float32"], rtol=0, atol=0.02)


# Cut short and resumed


class Noisy(Dataset):
    """Rows with noise from the global streams of torch, NumPy and Python, as transforms of images have it."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        import random

        import numpy as np

        shift = random.random() + float(np.random.rand())  # noqa: NPY002
        return self.x[row] + 0.1 * torch.randn(self.x.shape[1]) + 0.1 * shift, self.y[row]


def labels() -> Tensor:
    return case().data[1]


# Options are made anew for every run, as a process that begins again would make them.
RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "sgd, step": lambda: {"optimizer": momentum, "scheduler": SCHEDULES["step"].make},
    "adamw, multi-step": lambda: {
        "optimizer": lambda values: AdamW(values, 0.02, betas=(0.8, 0.95)),
        "scheduler": SCHEDULES["multi-step"].make,
        "scheduler_interval": "step",
    },
    "rmsprop, cosine": lambda: {
        "optimizer": lambda values: RMSprop(values, 0.01, momentum=0.5, centered=True),
        "scheduler": SCHEDULES["cosine"].make,
    },
    "amsgrad, one cycle": lambda: {
        "optimizer": lambda values: Adam(values, 0.02, amsgrad=True),
        "scheduler": SCHEDULES["one cycle"].make,
        "scheduler_interval": "step",
    },
    "sgd, one cycle": lambda: {
        "optimizer": momentum,
        "scheduler": SCHEDULES["one cycle"].make,
        "scheduler_interval": "step",
    },
    "plateau": lambda: {
        "optimizer": momentum,
        "scheduler": SCHEDULES["plateau"].make,
        "held_out": case().held_out,
        "clip_norm": 0.1,
    },
    "sequential": lambda: {
        "optimizer": momentum,
        "scheduler": SCHEDULES["sequential"].make,
        "scheduler_interval": "step",
    },
    "bfloat16, clipped": lambda: {"precision": "bfloat16", "clip_norm": 0.1},
    "float16": lambda: {"precision": "float16"},
    "float16, multi-step": lambda: {
        "precision": "float16",
        "optimizer": momentum,
        "scheduler": SCHEDULES["multi-step"].make,
        "scheduler_interval": "step",
    },
    "two workers": lambda: {"num_workers": 2, "num_indices": 3},
    "random rows": lambda: {"data": Noisy(*case().data)},
    "random rows, two workers": lambda: {"data": Noisy(*case().data), "num_workers": 2},
    "by recall": lambda: {
        "sampler": DynamicClassSampler(labels(), ByMetric("recall", strength=2.0), seed=4),
        "held_out": case().held_out,
    },
    "by loss, two workers, importance": lambda: {
        "sampler": DynamicClassSampler(labels(), ByMetric("loss"), seed=4),
        "held_out": case().held_out,
        "importance_weights": True,
        "num_workers": 2,
    },
    "balanced, importance": lambda: {
        "sampler": ClassBalancedSampler(labels(), seed=4),
        "importance_weights": True,
    },
    "stratified": lambda: {"sampler": StratifiedBatchSampler(labels(), 5, skew=1.0, seed=4)},
    "stratified, two workers": lambda: {
        "sampler": StratifiedBatchSampler(labels(), 5, skew=1.0, seed=4),
        "num_workers": 2,
    },
}


def run(out: Path, name: str, **how: Any) -> Bank:
    module, bank, data, _ = case()
    options = {"data": data, "num_epochs": 6, "batch_size": 5, "lr": 0.05, "seed": 1, **RUNS[name](), **how}
    return train(module, bank, out=out, **options)


@contextmanager
def cut_after(states: int) -> Iterator[list[int]]:
    """Ctrl-C once so many states have come; the steps of those that came."""
    steps: list[int] = []

    def cut(producer: Any, *_: Any) -> Iterator[Any]:
        for block, state in producer:
            if len(steps) == states:
                raise KeyboardInterrupt
            steps.append(state["step"])
            yield block, state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.fitting.with_progress", cut)
        with pytest.raises(KeyboardInterrupt):
            yield steps


@pytest.fixture
def state_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.training.loop.STEPS_PER_STATE", 1)


@pytest.mark.parametrize("name", RUNS)
def test_cut_short_twice_and_resumed_a_run_has_the_same_bits(tmp_path: Path, name: str, state_every_step: None) -> None:
    """First inside an epoch, at its end, or in its first step; the second time likewise."""
    whole = run(tmp_path / "whole", name)
    curve = (tmp_path / "whole" / "curve.csv").read_bytes()
    cuts = ((7, 10),) if "workers" in name else ((3, 10), (5, 6), (12, 29))  # processes take time to start
    for first, second in cuts:
        out = tmp_path / f"{first}-{second}"
        with cut_after(first) as steps:
            run(out, name)
        assert steps == list(range(1, first + 1))
        with cut_after(second - first) as steps:
            run(out, name, resume=True)
        assert steps == list(range(first + 1, second + 1))  # it did go on, and not begin again
        resumed = run(out, name, resume=True)
        for entry in FREE:
            assert torch.equal(resumed[0][entry], whole[0][entry]), (first, second, entry)
        assert (out / "curve.csv").read_bytes() == curve
    start = dict(case().module.named_parameters())
    assert all(not torch.equal(whole[0][entry], start[entry]) for entry in FREE)


def test_the_runs_of_the_table_differ(tmp_path: Path) -> None:
    """An option that changed nothing would resume to the same bits whether it is kept or not."""
    names = [name for name in RUNS if "two workers" not in name and "float16, multi-step" not in name]
    found = {name: run(tmp_path / name.replace(" ", "-"), name)[0]["1.weight"] for name in names}
    for name, value in found.items():
        assert sum(torch.equal(value, other) for other in found.values()) == 1, name


@pytest.mark.parametrize("metric", ["recall", "loss"])
@pytest.mark.parametrize("verb", ["train", "distil"])
def test_a_sampler_by_metric_is_told_of_each_class_after_every_epoch(tmp_path: Path, metric: Any, verb: str) -> None:
    """Recall and mean loss of the held-out rows of each class, by hand, under the values that the epoch left."""
    module, bank, (x, y), (x_out, y_out) = case()
    y_out = torch.where(y_out == 2, 1, y_out)  # a class that no held-out row has counts as the mean
    schedule = ByMetric(metric, strength=2.0)
    sampler, by_hand = (DynamicClassSampler(y, schedule, seed=4) for _ in range(2))
    options: dict[str, Any] = {"sampler": sampler, "held_out": (x_out, y_out), "num_epochs": 1, "batch_size": 5}
    plain = copy.deepcopy(module)
    if verb == "train":
        trained = train(module, bank, (x, y), out=tmp_path / "t", **options)
        plain.load_state_dict(trained[0], strict=False)
        each = [with_head(plain, bank, index)(x_out).detach().double().softmax(dim=1) for index in range(4)]
        log_probs = torch.stack(each).mean(dim=0).log()
    else:
        info = {"likelihood": {"name": "Categorical"}}
        net = FunctionalModel(module, Bank.from_state_dicts([module.state_dict()], module=module, info=info))
        plain.load_state_dict(distil(module, net, (x, y), out=tmp_path / "t", **options)[0])
        log_probs = plain(x_out).detach().double().log_softmax(dim=1)
    loss = nn.functional.nll_loss(log_probs, y_out, reduction="none")
    values = loss if metric == "loss" else (log_probs.argmax(dim=1) == y_out).double()
    means = [float(values[y_out == number].mean()) for number in (0, 1)] + [float(values.mean())]
    by_hand.update({metric: means})
    torch.testing.assert_close(sampler.class_shares(1), by_hand.class_shares(1), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(sampler.class_shares(1), DynamicClassSampler(y, schedule).class_shares(1), atol=0.02)


@pytest.mark.parametrize("workers", [0, 2])
def test_early_stopping_after_a_resume_keeps_the_best_values_of_before_it(
    tmp_path: Path, workers: int, state_every_step: None
) -> None:
    """Cut in the epoch after the best one, so that the best values come from the state."""
    module, bank, data, held_out = case()

    def stopping(out: str, **how: bool) -> Bank:
        return train(
            module, bank, data, held_out=held_out, out=tmp_path / out, num_epochs=60, batch_size=5, lr=0.2, seed=3,
            patience=3, num_workers=workers, **how,
        )  # fmt: skip

    whole = stopping("whole")
    curve = read_curve(tmp_path / "whole")
    assert 4 < len(curve) < 60
    best = min(range(len(curve)), key=lambda epoch: curve[epoch]["held_out_nll"]) + 1
    assert best == len(curve) - 3
    cuts = (STEPS * best, STEPS * best + 2, STEPS * (best + 2) + 4)
    for cut in cuts[: 1 if workers else 3]:
        with cut_after(cut):
            stopping(str(cut))
        resumed = stopping(str(cut), resume=True)
        assert torch.equal(resumed[0]["1.weight"], whole[0]["1.weight"]), cut
        assert read_curve(tmp_path / str(cut)) == curve


def test_a_state_now_and_then_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States every 7 steps, which is no number of epochs: what came after the last one is done again."""
    monkeypatch.setattr("bnn.training.loop.STEPS_PER_STATE", 7)
    whole = run(tmp_path / "whole", "by recall")
    with cut_after(2) as steps:
        run(tmp_path / "broken", "by recall")
    assert steps == [7, 14]
    assert torch.equal(run(tmp_path / "broken", "by recall", resume=True)[0]["1.weight"], whole[0]["1.weight"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": 0.1}, "method"),
        ({"num_epochs": 7}, "method"),
        ({"clip_norm": 1.0}, "method"),
        ({"precision": "bfloat16"}, "method"),
        ({"seed": 2}, "seed"),
        ({"num_indices": 2}, "method"),
        ({"optimizer": momentum}, "method"),
        ({"free": "1.bias"}, "fingerprint"),
        ({"sampler": "other"}, "sampling"),
    ],
)
def test_a_resume_with_other_options_is_refused(
    tmp_path: Path, change: dict[str, Any], match: str, state_every_step: None
) -> None:
    if "sampler" in change:
        change = {"sampler": ClassBalancedSampler(labels(), 0.5)}
    with cut_after(3):
        run(tmp_path / "t", "default")
    with pytest.raises(Exception, match=rf"bank\.json: want {match}"):
        run(tmp_path / "t", "default", resume=True, **change)


def test_a_resume_beside_other_frozen_values_is_refused(tmp_path: Path, state_every_step: None) -> None:
    """Parameters in neither the bank nor the globs, and buffers, decide what is learnt as well."""
    module, bank, data, _ = case()
    module = copy.deepcopy(module)
    with cut_after(3):
        train(module, bank, data, out=tmp_path / "t", free="1.bias", num_epochs=2, batch_size=5)
    with torch.no_grad():
        module[1].weight.add_(1.0)  # type: ignore[index,operator,union-attr]
    with pytest.raises(BankMismatch, match="frozen"):
        train(module, bank, data, out=tmp_path / "t", free="1.bias", num_epochs=2, batch_size=5, resume=True)


def test_a_resume_with_other_held_out_rows_is_refused(tmp_path: Path, state_every_step: None) -> None:
    """They decide when a run stops, and what schedulers and samplers are told."""
    module, bank, data, (x_out, y_out) = case()
    options: dict[str, Any] = {"num_epochs": 2, "batch_size": 5, "patience": 2}
    with cut_after(3):
        train(module, bank, data, out=tmp_path / "t", held_out=(x_out, y_out), **options)
    for other in ((x_out + 1, y_out), (x_out[:9], y_out[:9]), (x_out, y_out.flip(0))):
        with pytest.raises(BankMismatch, match=r"bank\.json: want"):
            train(module, bank, data, out=tmp_path / "t", held_out=other, resume=True, **options)


def test_a_sampler_that_has_served_serves_a_new_run_like_a_new_one(tmp_path: Path) -> None:
    """What it was told in another run is of that run."""
    module, bank, data, held_out = case()
    sampler = DynamicClassSampler(labels(), ByMetric("recall", strength=2.0), seed=4)
    options: dict[str, Any] = {"sampler": sampler, "held_out": held_out, "num_epochs": 3, "batch_size": 5}
    first, second = (train(module, bank, data, out=tmp_path / out, **options)[0]["1.weight"] for out in ("a", "b"))
    assert torch.equal(first, second)


KILLED = """
import sys
from bnn.bank import writer
from bnn.training import loop
writer.STATE_SECONDS, loop.STEPS_PER_STATE = 0.0, 1
from bnn.cli import main
main(sys.argv[1:])
"""


def test_kill_9_of_bnn_train_loses_nothing_that_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state is committed at every step, so that the kill falls somewhere inside an epoch."""
    from bnn.cli import run as command

    monkeypatch.chdir(tmp_path)
    rows = "\n".join(f"{i % 7},{i % 5},{'abc'[i % 7 % 3]}" for i in range(60))
    Path("t.csv").write_text("p,q,kind\n" + rows)
    fit_words = "fit --data t.csv:kind --model mlp:6 --method prior --num-samples 5 --bayesian 3 --out bank"
    assert command(fit_words.split()) == 0
    train_words = (
        "train --bank bank --free * --num-epochs 150 --batch-size 10 --optimizer sgd --patience 140 --seed 2 "
        "--balance skew=1.0,schedule=recall:1.0 --num-indices 2 --out"
    )
    words = train_words.split()
    assert command([*words, "whole"]) == 0
    manifest = Path("broken/manifest-main.json")
    with subprocess.Popen([sys.executable, "-c", KILLED, *words, "broken"], stdout=subprocess.PIPE) as process:
        for _ in range(3000):
            time.sleep(0.01)
            if process.poll() is not None or (
                manifest.exists() and json.loads(manifest.read_text())["generation"] > 12
            ):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    stopped = Bank.open("broken")
    assert len(stopped) == 0
    assert not stopped.info["complete"]
    assert not Path("broken/free.safetensors").exists()
    assert command([*words, "broken", "--resume"]) == 0
    whole, broken = Bank.open("whole"), Bank.open("broken")
    assert broken.info["complete"]
    assert all(torch.equal(broken[0][name], whole[0][name]) for name in whole.layout.names)
    assert Path("broken/curve.csv").read_bytes() == Path("whole/curve.csv").read_bytes()


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_epochs": 0}, "num_epochs: want at least 1"),
        ({"lr": 0.0}, "lr: want a number above 0"),
        ({"lr": math.nan}, "lr: want a number above 0"),
        ({"clip_norm": 0.0}, "clip_norm: want a number above 0"),
        ({"precision": "int8"}, "precision: want one of float32, bfloat16, float16, got 'int8'"),
        ({"scheduler_interval": "hour"}, "scheduler_interval: want one of step, epoch"),
        ({"log": "wandb"}, "log: want one of csv, tensorboard"),
        ({"patience": 0}, "patience: want at least 1 epoch"),
        ({"patience": 2}, "patience: want held_out= rows to judge by"),
        ({"patience": 2, "monitor": "held_out_f1", "held_out": True}, "monitor: want one of held_out_nll, held_out_acc"),
        ({"scheduler": SCHEDULES["plateau"].make}, "scheduler: want ReduceLROnPlateau by epoch"),
        ({"scheduler": SCHEDULES["plateau"].make, "scheduler_interval": "step", "held_out": True}, "by epoch"),
        ({"sampler": "by recall"}, "sampler: want held_out= rows for a schedule by metric"),
        ({"num_workers": -1}, "num_workers: want at least 0"),
        ({"batch_size": 0}, "batch_size: want at least 1"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_and_leave_nothing(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    module, bank, data, held_out = case()
    if "held_out" in options:
        options = {**options, "held_out": held_out}
    if "sampler" in options:
        options = {"sampler": RUNS["by recall"]()["sampler"]}
    with pytest.raises(ConfigError, match=match):
        train(module, bank, data, out=tmp_path / "t", **{"num_epochs": 2, "batch_size": 5, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_says_at_which_step_and_leaves_nothing(tmp_path: Path) -> None:
    module, bank, (x, y), _ = case()
    with pytest.raises(FitError, match=r"train: want a finite loss, got \w+ at step 1; lower lr, or clip_norm"):
        train(module, bank, (x, y), out=tmp_path / "t", num_epochs=2, batch_size=5, optimizer=leap)
    assert list(tmp_path.iterdir()) == []


def leap(values: list[Tensor]) -> Optimizer:
    """One step of this leads beyond what a float can hold."""
    return SGD(values, 1e38, momentum=0.9, weight_decay=10.0)


def test_an_accuracy_that_is_watched_is_to_rise(tmp_path: Path) -> None:
    """The values kept are those of the epoch that was most accurate, not of the least."""
    module, bank, (x, y), _ = case(1)
    watched = train(
        module, bank, (x, y), held_out=(x, y), out=tmp_path / "t", num_epochs=60, lr=0.1, patience=60,
        monitor="held_out_accuracy",
    )  # fmt: skip
    curve = [row["held_out_accuracy"] for row in read_curve(tmp_path / "t")]
    trained = copy.deepcopy(module)
    trained.load_state_dict(watched[0], strict=False)
    predicted = bnn.predict(bnn.FunctionalModel(trained, bank), x).probs.argmax(dim=1)
    assert max(curve) > min(curve)
    assert float((predicted == y).double().mean()) == pytest.approx(max(curve))


def test_schedules_by_epoch_need_no_class_to_have_training_rows(tmp_path: Path) -> None:
    """The last class of the module has no training row, and the sampler one class fewer."""
    module, bank, (x, y), _ = case()
    kept = y < int(y.max())
    rows = x[kept], y[kept]
    for schedule in (Linear(1.0, 0.0, 3), ByMetric("recall")):
        sampler = DynamicClassSampler(rows[1], schedule)
        train(
            module, bank, rows, held_out=(x, y), sampler=sampler, num_epochs=3, batch_size=5,
            out=tmp_path / type(schedule).__name__,
        )  # fmt: skip
        assert len(read_curve(tmp_path / type(schedule).__name__)) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": lambda values: torch.optim.LBFGS(values)}, "steps without a closure, got LBFGS"),
        ({"optimizer": "sgd"}, "optimizer: want a function from the list of values .* got str"),
        ({"scheduler": "step"}, "scheduler: want a function from the optimiser .* got str"),
    ],
)
def test_what_makes_no_optimiser_or_scheduler_is_refused(tmp_path: Path, options: Any, says: str) -> None:
    module, bank, data, _ = case()
    with pytest.raises(ConfigError, match=says):
        train(module, bank, data, out=tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


def test_a_resume_with_another_optimiser_is_refused(tmp_path: Path, state_every_step: None) -> None:
    module, bank, data, _ = case()
    with cut_after(3):
        train(module, bank, data, out=tmp_path / "t", num_epochs=2, batch_size=5)
    with pytest.raises(BankMismatch, match="SGD"):
        train(
            module, bank, data, out=tmp_path / "t", num_epochs=2, batch_size=5, resume=True,
            optimizer=lambda values: torch.optim.SGD(values, 0.1),
        )  # fmt: skip


def test_rows_that_the_module_does_not_take_are_refused_in_words(tmp_path: Path) -> None:
    module, bank, (x, y), _ = case()
    for rows in (x.double(), x[:, :3]):
        with pytest.raises(
            DataError, match=r"train: want rows that the module takes, .* got RuntimeError: mat1 and mat2"
        ):
            train(module, bank, (rows, y), out=tmp_path / "t", num_epochs=1)
        assert not (tmp_path / "t").exists()


def test_a_short_last_batch_counts_by_its_rows_under_importance_weights(tmp_path: Path) -> None:
    """An epoch takes each of 23 rows once, in batches of 5 and one of 3: its loss is the mean over rows."""
    module, bank, (x, y), _ = case(1)
    sampler = StratifiedBatchSampler(y, 5, seed=3)
    train(
        module, bank, (x, y), sampler=sampler, importance_weights=True, out=tmp_path / "t", num_epochs=1,
        optimizer=lambda values: SGD(values, lr=1e-12),
    )  # fmt: skip
    with torch.no_grad():
        outputs = FunctionalModel(module, bank)(x, 0)
    expected = float(nn.functional.cross_entropy(outputs, y))
    assert sampler.batch_sizes().tolist() == [5, 5, 5, 5, 3]
    assert read_curve(tmp_path / "t")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_an_optimiser_may_have_groups_of_values(tmp_path: Path) -> None:
    """Values come in the order of the result's names; those of a group with lr 0 stay."""
    module, bank, data, _ = case()
    trained = train(
        module, bank, data, out=tmp_path / "t", num_epochs=2,
        optimizer=lambda values: SGD([{"params": [values[0]], "lr": 0.1}, {"params": [values[1]], "lr": 0.0}]),
    )  # fmt: skip
    assert list(trained[0]) == list(FREE)
    named = dict(module.named_parameters())
    assert not torch.equal(trained[0][FREE[0]], named[FREE[0]])
    assert torch.equal(trained[0][FREE[1]], named[FREE[1]])
