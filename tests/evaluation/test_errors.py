"""Monte Carlo errors against the spread of figures over many banks, and standard errors against that over many data sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation import Report, evaluate
from bnn.layout import layout_of
from bnn.likelihoods import Categorical, Gaussian
from bnn.seeding import generator
from bnn.types import make_block

ROWS, CLASSES, BANKS = 30, 3, 150


class Table(nn.Module):
    """Outputs looked up by row number, so that a sample can be any [N, C] one likes."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return self.table[rows]


def net_of(tables: Tensor, num_chains: int, log_weight: Tensor | None = None) -> bnn.FunctionalModel:
    """Samples [S, N, C] as the draws of chains, chain after chain."""
    module, size = Table(tuple(tables.shape[1:])), len(tables)
    draws = size // num_chains
    chain, draw = torch.arange(num_chains).repeat_interleave(draws), torch.arange(draws).repeat(num_chains)
    block = make_block({"table": tables}, chain=chain, draw=draw, log_weight=log_weight)
    bank = bnn.Bank.from_blocks([block], layout=layout_of(module), info={})
    return bnn.FunctionalModel(module, bank, strategy="loop", compile=False)


def chains(source: torch.Generator, num_chains: int, draws: int, keep: float, columns: int) -> Tensor:
    """Stationary chains x_t = keep x_(t-1) + noise of variance 1 in all, around one table of means, [S, N, C]."""
    mean = torch.randn(ROWS, columns, generator=generator(0, "mean"), dtype=torch.float64)
    noise = torch.randn(draws, num_chains, ROWS, columns, generator=source, dtype=torch.float64)
    values = [noise[0]]
    for step in noise[1:]:
        values.append(keep * values[-1] + math.sqrt(1 - keep**2) * step)
    return mean + torch.stack(values, dim=1).flatten(0, 1)


def check_spread(reports: list[Report], names: tuple[str, ...], bias: float) -> None:
    """The root mean square of the stated errors is the spread of the values over banks.

    Each has an error: spread / sqrt(2 (n - 1)) of a standard deviation, and that of a mean of n squared errors. `bias`
    is what runs of draws, which are not quite independent of each other, may leave out.
    """
    for name in names:
        values = np.array([report.metrics[name].value for report in reports])
        squared = np.array([report.metrics[name].monte_carlo_error for report in reports]) ** 2
        spread, stated = values.std(ddof=1), math.sqrt(squared.mean())
        noise = spread / math.sqrt(2 * (len(values) - 1))
        own = squared.std(ddof=1) / math.sqrt(len(values)) / (2 * stated)
        assert abs(stated - spread) < 4 * math.hypot(noise, own) + bias * spread, (name, stated, spread)


@pytest.mark.parametrize(("num_chains", "draws", "keep"), [(1, 120, 0.0), (4, 30, 0.0), (2, 300, 0.8)])
def test_monte_carlo_errors_of_class_figures_are_their_spread_over_banks(
    num_chains: int, draws: int, keep: float
) -> None:
    source = generator(1, num_chains, draws)
    y = torch.randint(CLASSES, (ROWS - 12,), generator=generator(2))
    inside, outside = torch.arange(ROWS - 12), torch.arange(ROWS - 12, ROWS)
    reports = []
    for _ in range(BANKS):
        net = net_of(chains(source, num_chains, draws, keep, CLASSES), num_chains)
        report = evaluate(net, (inside, y), ood=(outside, torch.zeros(12)), likelihood=Categorical(), progress=False)
        reports.append(report)
    smooth = (
        "nll",
        "gibbs_nll",
        "brier",
        "predictive_entropy",
        "expected_entropy",
        "mutual_information",
        "disagreement",
    )
    check_spread(reports, smooth, bias=0.15 if keep else 0.0)


@pytest.mark.parametrize(("num_chains", "draws", "keep"), [(1, 120, 0.0), (2, 300, 0.8)])
def test_monte_carlo_errors_of_a_regression_are_their_spread_over_banks(
    num_chains: int, draws: int, keep: float
) -> None:
    source = generator(3, num_chains, draws)
    x, y = torch.arange(ROWS), 2 * torch.randn(ROWS, 1, generator=generator(4), dtype=torch.float64)
    reports = []
    for _ in range(BANKS):
        net = net_of(chains(source, num_chains, draws, keep, 1), num_chains)
        reports.append(evaluate(net, (x, y), likelihood=Gaussian(0.5), loc=3.0, scale=2.0, progress=False))
    names = ("rmse", "nll", "crps", "epistemic", "sharpness", "width_90", "pinball", "interval_score_90")
    check_spread(reports, names, bias=0.15 if keep else 0.0)


def test_weighted_samples_have_larger_errors_by_their_effective_number() -> None:
    source = generator(5)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(6))
    reports = []
    for _ in range(BANKS):
        log_weight = torch.randn(120, generator=source, dtype=torch.float64)
        net = net_of(chains(source, 1, 120, 0.0, CLASSES), 1, log_weight)
        reports.append(
            evaluate(net, (torch.arange(ROWS), y), likelihood=Categorical(), figures="basic", progress=False)
        )
    check_spread(reports, ("nll", "brier", "expected_entropy"), bias=0.1)


def test_errors_fall_with_the_root_of_the_number_of_samples_and_what_is_needed_follows() -> None:
    source = generator(7)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(8))
    found = {}
    for draws in (200, 3200):
        net = net_of(chains(source, 1, draws, 0.0, CLASSES), 1)
        found[draws] = evaluate(net, (torch.arange(ROWS), y), likelihood=Categorical(), progress=False)
    few, many = (found[draws].metrics["expected_entropy"].monte_carlo_error for draws in (200, 3200))
    assert few is not None
    assert many is not None
    assert few / many == pytest.approx(4.0, rel=4 * math.sqrt(2 / 38))
    line = found[200].curves["samples"]
    figure = found[200].metrics["nll"]
    assert figure.monte_carlo_error is not None
    assert figure.value is not None
    expected = math.ceil(200 * (figure.monte_carlo_error / (0.01 * figure.value)) ** 2)
    assert line["needed"]["nll"] == expected
    assert line["num_samples"] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    assert line["metrics"]["nll"][-1] == figure.value
    assert line["metrics"]["nll"][0] > line["metrics"]["nll"][-1]


@pytest.mark.parametrize("name", ["ece", "rmsce", "classwise_ece", "ace", "aurc", "risk_at_coverage_80"])
def test_standard_errors_over_rows_are_the_spread_over_data_sets(name: str) -> None:
    """A predictive that is off by a known amount, so that gaps of bins are larger than their noise."""
    rows, sets, source = 600, 100, generator(9, name)
    values, errors = [], []
    for _ in range(sets):
        logits = 1.5 * torch.randn(1, rows, CLASSES, generator=source, dtype=torch.float64)
        truth = (0.4 * logits[0]).softmax(dim=-1)
        y = torch.multinomial(truth, 1, generator=source)[:, 0]
        net = net_of(logits, 1)
        report = evaluate(net, (torch.arange(rows), y), likelihood=Categorical(), num_bins=5, progress=False)
        values.append(report.metrics[name].value)
        errors.append(report.metrics[name].standard_error)
    spread = np.std(values, ddof=1)
    tolerance = 4 * (spread / math.sqrt(2 * sets) + np.std(errors) / math.sqrt(sets))
    assert abs(np.mean(errors) - spread) < tolerance, (np.mean(errors), spread)
