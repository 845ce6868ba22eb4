"""Calibrating a bank's predictive, predicting with that, and judging it, against the full predictive and exact laws."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import bnn
from bnn.calibrating import calibrate, judge
from bnn.errors import BankMismatch, ConfigError, DataError
from bnn.layout import layout_of
from bnn.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, Poisson
from bnn.posthoc import Calibration, fit_temperature, prediction_sets, set_threshold, temper
from bnn.predictive import ClassPredictive, TargetPredictive, predict
from bnn.seeding import generator
from bnn.types import make_block

SAMPLES, CLASSES = 5, 3


class Table(nn.Module):
    """Outputs looked up by row number, so that a sample can be any [N, C] one likes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def table_net(tables: Tensor) -> bnn.FunctionalModel:
    module, size = Table(tuple(tables.shape[1:])), len(tables)
    block = make_block({"table": tables}, chain=torch.arange(size), draw=torch.zeros(size, dtype=torch.int64))
    bank = bnn.Bank.from_blocks([block], layout=layout_of(module), info={})
    return bnn.FunctionalModel(module, bank, strategy="loop")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed, *shape), dtype=torch.float64)


def classes(rows: int, *, seed: int = 0, sharper: float = 3.0) -> tuple[bnn.FunctionalModel, Tensor]:
    """A bank whose mean predictive is too sharp for the labels of `rows` rows."""
    tables = sharper * (random(1, rows, CLASSES, seed=seed) + 0.3 * random(SAMPLES, rows, CLASSES, seed=seed))
    mean = tables.log_softmax(dim=2).logsumexp(dim=0)
    y = torch.multinomial((mean / sharper).softmax(dim=1), 1, generator=generator(seed, "labels")).squeeze(1)
    return table_net(tables), y


def targets(rows: int, *, seed: int = 0, outputs: int = 2) -> tuple[bnn.FunctionalModel, Tensor]:
    """A bank whose noise, of scale 1, is that of the first target, and too narrow for the others."""
    tables = random(1, rows, outputs, seed=seed) + 0.2 * random(SAMPLES, rows, outputs, seed=seed)
    noise = 1.0 + 2.0 * torch.arange(outputs, dtype=torch.float64)
    return table_net(tables), tables.mean(dim=0) + noise * random(rows, outputs, seed=seed + 1000)


def class_predictive(net: bnn.FunctionalModel, x: Any, **options: Any) -> ClassPredictive:
    found = predict(net, x, likelihood=Categorical(), **options)
    assert isinstance(found, ClassPredictive)
    return found


def target_predictive(net: bnn.FunctionalModel, x: Any, **options: Any) -> TargetPredictive:
    found = predict(net, x, **{"likelihood": Gaussian(1.0), **options})
    assert isinstance(found, TargetPredictive)
    return found


def test_temperature_and_limit_are_those_of_the_mean_predictive() -> None:
    net, y = classes(60)
    found = calibrate(net, (torch.arange(60), y), level=0.8, score="aps", likelihood=Categorical(), batch_size=7)
    plain = class_predictive(net, torch.arange(60))
    assert found.temperature == fit_temperature(plain.log_probs, y)
    assert found.temperature > 1.5  # it is too sharp
    assert found.limit == set_threshold(plain.probs, y, level=0.8, score="aps")
    assert (found.num_rows, found.level, found.score, found.bank) == (60, 0.8, "aps", net.bank.digest)
    for estimate, log_probs in (
        (found.before, plain.log_probs),
        (found.after, temper(plain.log_probs, found.temperature)),
    ):
        losses = -log_probs.numpy()[np.arange(60), y.numpy()]
        assert estimate is not None
        assert estimate.value == pytest.approx(losses.mean())
        assert estimate.standard_error == pytest.approx(scipy.stats.sem(losses))
    assert found.after.value < found.before.value  # type: ignore[union-attr]


def test_predictions_are_tempered_and_keep_the_split_of_the_mixture() -> None:
    net, y = classes(60)
    x = torch.arange(60)
    found = calibrate(net, (x, y), level=0.8, likelihood=Categorical())
    plain, calibrated = class_predictive(net, x), class_predictive(net, x, calibration=found)
    assert found.temperature is not None
    torch.testing.assert_close(calibrated.log_probs, temper(plain.log_probs, found.temperature))
    assert calibrated.calibrated is not None
    assert torch.equal(calibrated.calibrated.sets, prediction_sets(plain.probs, found.limit or 0.0))
    assert calibrated.calibrated.level == 0.8
    assert torch.equal(calibrated.expected_entropy, plain.expected_entropy)
    assert torch.equal(calibrated.mutual_information, plain.mutual_information)
    assert float((calibrated.entropy - plain.entropy).min()) > -1e-12  # flatter everywhere
    assert plain.calibrated is None


def test_loaders_and_batches_are_calibrated_alike() -> None:
    net, y = classes(60)
    data = TensorDataset(torch.arange(60), y)
    found = calibrate(net, data, likelihood=Categorical(), batch_size=9)
    for other in (DataLoader(data, batch_size=13), (torch.arange(60), y)):
        again = calibrate(net, other, likelihood=Categorical())
        assert again.num_rows == 60
        assert again.temperature == pytest.approx(found.temperature, rel=1e-9)  # batches change last bits
        assert again.limit == pytest.approx(found.limit, rel=1e-12)
    found = replace(found, limit=0.8)  # which no score is equal to
    whole = class_predictive(net, torch.arange(60), calibration=found)
    parts = class_predictive(net, DataLoader(data, batch_size=8), calibration=found)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, rtol=0, atol=1e-12)
    assert whole.calibrated is not None
    assert parts.calibrated is not None
    assert torch.equal(whole.calibrated.sets, parts.calibrated.sets)


def test_intervals_are_quantiles_widened_in_any_units() -> None:
    net, y = targets(40, outputs=2)
    x = torch.arange(40)
    found = calibrate(net, (x, y), level=0.8, likelihood=Gaussian(1.0), batch_size=11)
    lower, upper = found.quantiles
    assert (lower, upper) == pytest.approx((0.1, 0.9))
    plain = target_predictive(net, x, quantiles=(lower, upper))
    scores = torch.maximum(plain.quantiles[lower] - y, y - plain.quantiles[upper])
    place = math.ceil(0.8 * 41)
    expected = [sorted(scores[:, c].tolist())[place - 1] for c in range(2)]
    assert found.margins == tuple(expected)
    assert found.margins[1] > 2 * abs(found.margins[0])  # noise three times as large as the bank says
    loc, scale = torch.tensor([100.0, -5.0]), torch.tensor([20.0, 0.5])
    calibrated = target_predictive(net, x, calibration=found, loc=loc, scale=scale, quantiles=(0.5,))
    assert calibrated.calibrated is not None
    margins = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(calibrated.calibrated.lower, (plain.quantiles[lower] - margins) * scale + loc)
    torch.testing.assert_close(calibrated.calibrated.upper, (plain.quantiles[upper] + margins) * scale + loc)
    assert list(calibrated.quantiles) == [0.5]


def test_intervals_of_counts_do_not_begin_below_nothing() -> None:
    tables = 0.1 * random(SAMPLES, 30, 1)
    net = table_net(tables)
    y = torch.poisson(2.5 * torch.ones(30), generator=generator(0, "counts"))
    found = calibrate(net, (torch.arange(30), y), level=0.8, likelihood=Poisson())
    calibrated = target_predictive(net, torch.arange(30), likelihood=Poisson(), calibration=found)
    assert calibrated.calibrated is not None
    assert float(calibrated.calibrated.lower.min()) == 0.0
    inside = (calibrated.calibrated.lower[:, 0] <= y) & (y <= calibrated.calibrated.upper[:, 0])
    assert int(inside.sum()) >= 25  # ceil(0.8 * 31)
    with pytest.raises(DataError, match="counts"):
        calibrate(net, (torch.arange(30), -y - 1), level=0.8, likelihood=Poisson())


def test_one_logit_is_two_classes() -> None:
    logits = 3 * random(SAMPLES, 50, 1)
    y = (torch.rand(50, generator=generator(2)) < logits.mean(dim=0).squeeze(1).sigmoid().float()).long()
    two = torch.cat([torch.zeros_like(logits), logits], dim=2)
    one = calibrate(table_net(logits), (torch.arange(50), y.float()), likelihood=Bernoulli())
    other = calibrate(table_net(two), (torch.arange(50), y), likelihood=Categorical())
    assert one.temperature == pytest.approx(other.temperature)
    assert one.limit == pytest.approx(other.limit)


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_coverage_of_sets_is_what_was_asked_for(score: Any) -> None:
    """New rows of a calibrated bank: the share in their sets is off by held-out and new rows' luck alone."""
    held, new = 400, 2000
    net, y = classes(held + new)
    data = torch.arange(held + new), y
    found = calibrate(net, (data[0][:held], y[:held]), level=0.8, score=score, likelihood=Categorical())
    judged = judge(net, (data[0][held:], y[held:]), found, likelihood=Categorical(), batch_size=300)
    place = 321  # ceil(0.8 * 401)
    law = scipy.stats.betabinom(new, place, held + 1 - place)
    assert abs(judged.coverage.value - law.mean() / new) < 4 * law.std() / new
    assert judged.num_rows == new
    plain = class_predictive(net, data[0][held:])
    sets = prediction_sets(plain.probs, found.limit or 0.0, score=score)
    assert judged.size.value == pytest.approx(float(sets.sum(dim=1).double().mean()))
    losses = -plain.log_probs.numpy()[np.arange(new), y[held:].numpy()]
    assert judged.before is not None
    assert judged.after is not None
    assert judged.before.value == pytest.approx(losses.mean())
    assert judged.before.standard_error == pytest.approx(scipy.stats.sem(losses))
    assert judged.after.value < judged.before.value - 4 * judged.after.standard_error
    assert judged.uncalibrated_coverage is None


def test_coverage_of_intervals_is_what_was_asked_for() -> None:
    held, new = 300, 1500
    net, y = targets(held + new, outputs=1)
    y = 1.8 * y  # the bank is too sure
    x = torch.arange(held + new)
    found = calibrate(net, (x[:held], y[:held]), likelihood=Gaussian(1.0))
    judged = judge(net, (x[held:], y[held:]), found, likelihood=Gaussian(1.0), loc=7.0, scale=10.0)
    law = scipy.stats.betabinom(new, 271, held + 1 - 271)  # ceil(0.9 * 301)
    assert abs(judged.coverage.value - law.mean() / new) < 4 * law.std() / new
    assert judged.uncalibrated_coverage is not None
    assert judged.uncalibrated_size is not None
    assert found.margins is not None
    assert judged.uncalibrated_coverage.value < 0.8
    assert judged.size.value - judged.uncalibrated_size.value == pytest.approx(20 * found.margins[0])
    assert judged.before is None


def test_a_calibration_is_of_one_predictive() -> None:
    net, y = classes(60)
    x = torch.arange(60)
    found = calibrate(net, (x, y), likelihood=Categorical())
    with pytest.raises(BankMismatch, match="another bank, or samples have come to it since"):
        class_predictive(classes(60, seed=1)[0], x, calibration=found)
    shift = ([0.5, 0.25, 0.25], [0.2, 0.4, 0.4])
    with pytest.raises(ConfigError, match="the prior shift None, which it was made with"):
        class_predictive(net, x, calibration=found, prior_shift=shift)
    shifted = calibrate(net, (x, y), likelihood=Categorical(), prior_shift=shift)
    assert shifted.prior_shift == ((0.5, 0.25, 0.25), (0.2, 0.4, 0.4))
    assert shifted.temperature != found.temperature
    class_predictive(net, x, calibration=shifted, prior_shift=shift)
    with pytest.raises(ConfigError, match="the prior shift"):
        class_predictive(net, x, calibration=shifted)
    with pytest.raises(ConfigError, match="all samples"):
        class_predictive(net, x, calibration=found, tolerance=0.1)
    regression, values = targets(40)
    other = calibrate(regression, (torch.arange(40), values), likelihood=Gaussian(1.0))
    with pytest.raises(ConfigError, match=r"the likelihood .*1\.0"):
        target_predictive(regression, torch.arange(40), likelihood=Gaussian(2.0), calibration=other)
    with pytest.raises(ConfigError, match="3 outputs, got 2"):
        target_predictive(regression, torch.arange(40), calibration=replace(other, margins=(0.0, 0.0, 0.0)))


def test_rows_that_cannot_calibrate_are_refused() -> None:
    net, y = classes(60)
    x = torch.arange(60)
    few = x[:8], y[:8]
    with pytest.raises(DataError, match=r"at least 9 for a level of 0\.9, got 8"):
        calibrate(net, few, likelihood=Categorical())
    assert calibrate(net, (x[:9], y[:9]), likelihood=Categorical()).num_rows == 9
    loader = DataLoader(TensorDataset(x, y), sampler=WeightedRandomSampler([1.0] * 59 + [9.0], 60), batch_size=7)
    with pytest.raises(DataError, match="calibrate: want rows in their natural order, each once"):
        calibrate(net, loader, likelihood=Categorical())
    with pytest.raises(ConfigError, match="one of lac, aps"):
        calibrate(net, (x, y), score="raps", likelihood=Categorical())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        calibrate(net, (x, y), level=90, likelihood=Categorical())
    with pytest.raises(ConfigError):
        calibrate(net, (x, y))  # nobody names a likelihood
    regression, values = targets(40)
    with pytest.raises(DataError, match="targets"):
        calibrate(regression, (torch.arange(40), values[:, :1]), likelihood=Gaussian(1.0))


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(1.0)], ids=lambda one: type(one).__name__)
def test_calibrating_repeats_and_touches_no_global_stream(likelihood: Likelihood, world_untouched: None) -> None:
    net, y = classes(60) if likelihood.task == "classification" else targets(60)
    data = torch.arange(60), y
    found = calibrate(net, data, likelihood=likelihood)
    assert found == calibrate(net, data, likelihood=likelihood)
    assert isinstance(found, Calibration)
