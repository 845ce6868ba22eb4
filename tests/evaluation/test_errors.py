"""Monte Carlo errors against the spread of figures over many banks, and standard errors against that over many data sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation import Report, curves
from bnn.evaluation.class_figures import ClassCollector
from bnn.evaluation.class_sums import ClassSums
from bnn.evaluation.target_figures import TargetCollector
from bnn.evaluation.target_sums import TargetSums
from bnn.evaluation.views import Views, views_of
from bnn.layout import layout_of
from bnn.mixtures import NormalMixture
from bnn.seeding import generator
from bnn.types import make_block

ROWS, CLASSES, BANKS = 30, 3, 120


def views(num_chains: int, draws: int, log_weight: Tensor | None = None, *, errors: bool = True) -> Views:
    """Of a bank of chains, one after the other."""
    size = num_chains * draws
    chain, draw = torch.arange(num_chains).repeat_interleave(draws), torch.arange(draws).repeat(num_chains)
    params = {"weight": torch.zeros(size, 1, 1), "bias": torch.zeros(size, 1)}
    block = make_block(params, chain=chain, draw=draw, log_weight=log_weight)
    return views_of(bnn.Bank.from_blocks([block], layout=layout_of(nn.Linear(1, 1)), info={}), errors=errors)


def on_classes(plan: Views, logits: Tensor, y: Tensor, num_bins: int = 15) -> tuple[Report, ClassCollector]:
    """Figures of samples that say logits [S, N, C]."""
    sums, report = ClassSums(plan, y), Report("classification", len(y), len(logits), 1, 0.1)
    sums.add(torch.arange(len(logits)), logits)
    collector = ClassCollector(plan, num_bins=num_bins, whole=True, ranked=True)
    collector.add(sums.rows(), y)
    collector.report(report)
    return report, collector


def on_targets(plan: Views, means: Tensor, y: Tensor) -> Report:
    """Figures of samples that say means [S, N, 1], under noise of 0.5."""
    size = len(means)
    log_weight = torch.full((size,), -math.log(size), dtype=torch.float64)
    mixture = NormalMixture(means, torch.full((size, 1, 1), 0.5, dtype=torch.float64), log_weight)
    sums, report = TargetSums(plan, y), Report("regression", len(y), size, 1, 0.1)
    sums.add(torch.arange(size), mixture)
    collector = TargetCollector(plan, whole=True)
    collector.add(sums.rows(), y, mixture)
    collector.report(report)
    return report


def chains(source: torch.Generator, num_chains: int, draws: int, keep: float, columns: int) -> Tensor:
    """Stationary chains x_t = keep x_(t-1) + noise of variance 1 in all, around one table of means, [S, N, C]."""
    mean = torch.randn(ROWS, columns, generator=generator(0, "mean"), dtype=torch.float64)
    noise = torch.randn(draws, num_chains, ROWS, columns, generator=source, dtype=torch.float64)
    values = [noise[0]]
    for step in noise[1:]:
        values.append(keep * values[-1] + math.sqrt(1 - keep**2) * step)
    return mean + torch.stack(values, dim=1).flatten(0, 1)


def check_spread(reports: list[Report], names: tuple[str, ...], bias: float = 0.0) -> None:
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


CHAINS = [(1, 120, 0.0), (4, 30, 0.0), (2, 300, 0.8)]
# Of chains that keep 0.8, runs of 30 draws leave out 2 / 30 * 0.8 / (1 - 0.64) of the variance, and what is not linear more.
BIAS = 0.12


@pytest.mark.parametrize(("num_chains", "draws", "keep"), CHAINS)
def test_monte_carlo_errors_of_class_figures_are_their_spread_over_banks(
    num_chains: int, draws: int, keep: float
) -> None:
    source, plan = generator(1, num_chains, draws), views(num_chains, draws)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(2))
    reports = [on_classes(plan, chains(source, num_chains, draws, keep, CLASSES), y)[0] for _ in range(BANKS)]
    smooth = (
        *("nll", "gibbs_nll", "brier", "predictive_entropy", "expected_entropy", "mutual_information"),
        *("variation_ratio", "disagreement", "aurc", "augrc"),
    )
    check_spread(reports, smooth[:6], bias=BIAS if keep else 0.0)
    for name in smooth[6:]:  # ranks and votes of few rows jump, and their errors err on the large side
        values = [report.metrics[name].value for report in reports]
        stated = np.mean([report.metrics[name].monte_carlo_error for report in reports])
        assert 0.75 < stated / np.std(values, ddof=1) < 4, name


@pytest.mark.parametrize(("num_chains", "draws", "keep"), CHAINS)
def test_monte_carlo_errors_of_a_regression_are_their_spread_over_banks(
    num_chains: int, draws: int, keep: float
) -> None:
    source, plan = generator(3, num_chains, draws), views(num_chains, draws)
    y = 2 * torch.randn(ROWS, 1, generator=generator(4), dtype=torch.float64)
    reports = [on_targets(plan, chains(source, num_chains, draws, keep, 1), y) for _ in range(BANKS)]
    names = (
        "rmse",
        "mae",
        "nll",
        "gibbs_nll",
        "crps",
        "epistemic",
        "sharpness",
        "width_90",
        "pinball",
        "interval_score_90",
    )
    check_spread(reports, names, bias=BIAS if keep else 0.0)


def test_weighted_samples_have_errors_by_their_effective_number() -> None:
    """The weights are drawn anew with each bank, as importance sampling does."""
    source, reports = generator(5), []
    y = torch.randint(CLASSES, (ROWS,), generator=generator(6))
    for _ in range(BANKS):
        log_weight = torch.randn(120, generator=source, dtype=torch.float64)
        reports.append(on_classes(views(1, 120, log_weight), chains(source, 1, 120, 0.0, CLASSES), y)[0])
    check_spread(reports, ("nll", "brier", "expected_entropy", "gibbs_nll"))


def test_errors_fall_with_the_root_of_the_number_of_samples_and_what_is_needed_follows() -> None:
    source, found = generator(7), {}
    y = torch.randint(CLASSES, (ROWS,), generator=generator(8))
    for draws in (200, 3200):
        found[draws] = on_classes(views(1, draws), chains(source, 1, draws, 0.0, CLASSES), y)
    few, many = (found[draws][0].metrics["expected_entropy"].monte_carlo_error for draws in (200, 3200))
    assert few is not None
    assert many is not None
    # Each error is known to 1 / sqrt(2 (G - 1)), here a sixth.
    assert few / many == pytest.approx(4.0, rel=4 * math.sqrt(2 / 38))
    report, collector = found[200]
    line = curves.samples(report, collector.views, collector.beginnings())
    figure = report.metrics["nll"]
    assert figure.monte_carlo_error is not None
    assert figure.value is not None
    assert line["needed"]["nll"] == math.ceil(200 * (figure.monte_carlo_error / (0.01 * figure.value)) ** 2)
    assert line["num_samples"] == [1, 2, 4, 8, 16, 32, 64, 128, 200]
    assert line["metrics"]["nll"][-1] == pytest.approx(figure.value, abs=1e-12)
    assert line["metrics"]["nll"][0] > line["metrics"]["nll"][-1]


def test_standard_errors_over_rows_are_the_spread_over_data_sets() -> None:
    """Of a predictive that is off by a known amount, so that gaps of bins are larger than their noise."""
    rows, sets, source, plan = 600, 150, generator(9), views(1, 1)
    reports = []
    for _ in range(sets):
        logits = 1.5 * torch.randn(1, rows, CLASSES, generator=source, dtype=torch.float64)
        y = torch.multinomial((0.4 * logits[0]).softmax(dim=-1), 1, generator=source)[:, 0]
        reports.append(on_classes(plan, logits, y, num_bins=5)[0])
    for name in (
        "accuracy",
        "nll",
        "brier",
        "ece",
        "rmsce",
        "ace",
        "classwise_ece",
        "aurc",
        "augrc",
        "risk_at_coverage_80",
    ):
        values = np.array([report.metrics[name].value for report in reports])
        errors = np.array([report.metrics[name].standard_error for report in reports])
        spread = values.std(ddof=1)
        tolerance = 4 * math.hypot(spread / math.sqrt(2 * sets), errors.std() / math.sqrt(sets))
        assert abs(errors.mean() - spread) < tolerance, (name, errors.mean(), spread)
