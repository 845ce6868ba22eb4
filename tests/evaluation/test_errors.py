"""Monte Carlo errors against the spread of figures over many banks, and standard errors against that over many data sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.evaluation import Report, curves
from bnn.evaluation.class_figures import ClassCollector, add_outside
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


def chains(source: torch.Generator, num_chains: int, draws: int, keep: float, columns: int, rows: int = ROWS) -> Tensor:
    """Stationary chains x_t = keep x_(t-1) + noise of variance 1 in all, around one table of means, [S, N, C]."""
    mean = torch.randn(rows, columns, generator=generator(0, "mean"), dtype=torch.float64)
    noise = torch.randn(draws, num_chains, rows, columns, generator=source, dtype=torch.float64)
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


def check_ratio(reports: list[Report], name: str, low: float, high: float) -> None:
    """The stated errors are so many times the spread, as is documented, but for four standard errors of that ratio."""
    values = np.array([report.metrics[name].value for report in reports])
    squared = np.array([report.metrics[name].monte_carlo_error for report in reports]) ** 2
    spread, stated = values.std(ddof=1), math.sqrt(squared.mean())
    own = squared.std(ddof=1) / math.sqrt(len(values)) / (2 * stated)
    noise = 4 * math.hypot(1 / math.sqrt(2 * (len(values) - 1)), own / stated)
    assert low * (1 - noise) < stated / spread < high * (1 + noise), (name, stated, spread)


SMOOTH = ("nll", "gibbs_nll", "brier", "predictive_entropy", "expected_entropy", "mutual_information", "disagreement")
JUMPING = ("accuracy", "variation_ratio", "ece", "rmsce", "ace", "classwise_ece", "augrc", "risk_at_coverage_80")
CHAINS = [(1, 120, 0.0), (4, 30, 0.0), (2, 150, 0.6)]  # the last has a quarter of its draws' worth
# Of chains that keep 0.6, runs of 15 draws leave out 2 / 15 * 0.6 / (1 - 0.36) of the variance, and what is not linear more.
BIAS = 0.12


@pytest.mark.parametrize(("num_chains", "draws", "keep"), CHAINS)
def test_monte_carlo_errors_of_class_figures_are_their_spread_over_banks(
    num_chains: int, draws: int, keep: float
) -> None:
    source, plan = generator(1, num_chains, draws), views(num_chains, draws)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(2))
    reports = [on_classes(plan, chains(source, num_chains, draws, keep, CLASSES), y)[0] for _ in range(BANKS)]
    check_spread(reports, (*SMOOTH, *JUMPING), bias=BIAS if keep else 0.0)
    # What hangs on one or two rows, as the page of definitions has it.
    check_ratio(reports, "aurc", 1.0, 1.15)
    check_ratio(reports, "coverage_at_risk_5", 0.9, 1.7)
    check_ratio(reports, "mce", 1.0, 1.35)


def with_outside(plan: Views, logits: Tensor, y: Tensor) -> Report:
    """Figures of rows of which the second half also stands for rows outside."""
    report, collector = on_classes(plan, logits, y)
    inside = collector.scores()
    middle = len(y) // 2
    assert collector.weight is not None
    add_outside(
        report,
        plan,
        collector.weight,
        {name: values[:, :middle] for name, values in inside.items()},
        {name: values[:, middle:] for name, values in inside.items()},
    )
    return report


@pytest.mark.parametrize(("num_chains", "draws"), [(1, 120), (7, 6)])
def test_monte_carlo_errors_of_figures_that_jump_are_their_spread_over_banks(num_chains: int, draws: int) -> None:
    """Leaving out one run at a time says twice as much of them. Of 7 chains there are 21 runs, an odd number."""
    rows, banks, source, plan = 160, 200, generator(10, num_chains), views(num_chains, draws)
    y = torch.randint(CLASSES, (rows,), generator=generator(11))
    reports = [with_outside(plan, chains(source, num_chains, draws, 0.0, CLASSES, rows), y) for _ in range(banks)]
    check_spread(reports, (*SMOOTH, *JUMPING, "aurc", "coverage_at_risk_5", "auroc", "aupr_in", "aupr_out"))
    check_spread(reports, ("auroc_one_minus_max_prob", "fpr95_mutual_information"))
    check_ratio(reports, "mce", 1.0, 1.35)
    check_ratio(reports, "fpr95", 0.9, 1.3)  # four rows outside lie beyond the threshold
    # Rows are ranked by noise alone, which there is more of in half of the samples.
    check_ratio(reports, "auroc_mutual_information", 0.75, 1.0)


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
        "coverage_50",
        "coverage_90",
    )
    check_spread(reports, names, bias=BIAS if keep else 0.0)


def test_weighted_samples_have_errors_by_their_effective_number() -> None:
    """The weights are drawn anew with each bank, as importance sampling does."""
    source, reports = generator(5), []
    y = torch.randint(CLASSES, (ROWS,), generator=generator(6))
    for _ in range(BANKS):
        log_weight = torch.randn(120, generator=source, dtype=torch.float64)
        reports.append(on_classes(views(1, 120, log_weight), chains(source, 1, 120, 0.0, CLASSES), y)[0])
    check_spread(reports, ("nll", "brier", "expected_entropy", "gibbs_nll", "accuracy", "ece", "augrc"))


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


def test_the_standard_error_of_the_largest_gap_is_close_to_its_spread_over_data_sets() -> None:
    """Resamples of a maximum say up to a fifth too much, as the page of definitions has it."""
    rows, sets, source, plan = 600, 150, generator(12), views(1, 1)
    for slope in (0.4, 1.0):  # gaps of 0.2 and more, and no gap but noise
        values, errors = np.empty(sets), np.empty(sets)
        for place in range(sets):
            logits = 1.5 * torch.randn(1, rows, CLASSES, generator=source, dtype=torch.float64)
            y = torch.multinomial((slope * logits[0]).softmax(dim=-1), 1, generator=source)[:, 0]
            figure = on_classes(plan, logits, y, num_bins=5)[0].metrics["mce"]
            values[place], errors[place] = figure.value, figure.standard_error
        noise = 4 * math.hypot(1 / math.sqrt(2 * sets), errors.std() / errors.mean() / math.sqrt(sets))
        ratio = errors.mean() / values.std(ddof=1)
        assert 1.0 * (1 - noise) < ratio < 1.2 * (1 + noise), (slope, ratio)


@pytest.mark.parametrize("draws", [1, 2, 7, 50])
def test_errors_over_rows_do_not_hang_on_the_halves(draws: int) -> None:
    plan, alone = views(3, draws), views(3, draws, errors=False)
    logits = torch.randn(3 * draws, ROWS, CLASSES, generator=generator(13), dtype=torch.float64)
    y = torch.randint(CLASSES, (ROWS,), generator=generator(14))
    with_errors, without = (on_classes(some, logits, y)[0].metrics for some in (plan, alone))
    for name, figure in with_errors.items():
        if figure.standard_error is None:
            assert without[name].standard_error is None
        else:
            assert without[name].standard_error == pytest.approx(figure.standard_error, rel=1e-9), name
        assert without[name].monte_carlo_error is None
        assert figure.monte_carlo_error is not None
