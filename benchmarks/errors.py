"""Are the errors that an evaluation states the spread of its figures?

    python benchmarks/errors.py --json benchmarks/results/errors.json

Over samples: banks of independent samples of random logits around one table, on the same rows; the root mean square of the
stated Monte Carlo errors over the standard deviation of the figure. Over rows: data sets of one predictive, that of its
own classes or one that is off; the mean standard error over the standard deviation. A ratio of 1 is right; each comes
with its own standard error. The logits are the weights of an embedding, of which a row asks for its own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import bnn
from bnn.cli.bench import machine
from bnn.evaluation import Report
from bnn.layout import layout_of
from bnn.likelihoods import Categorical
from bnn.seeding import generator
from bnn.types import make_block

CLASSES, SAMPLES, OUTSIDE = 3, 120, 100
FIGURES = (
    "nll", "brier", "mutual_information", "accuracy", "ece", "rmsce", "classwise_ece", "ace", "mce", "aurc", "augrc",
    "coverage_at_risk_5", "risk_at_coverage_80", "auroc", "fpr95", "auroc_mutual_information",
)  # fmt: skip
ROW_FIGURES = ("ece", "rmsce", "ace", "mce", "coverage_at_risk_5", "risk_at_coverage_80")


def evaluated(logits: Tensor, y: Tensor, **options: Any) -> Report:
    """A report on samples that say logits [S, N, C], of which the rows after those of y stand for rows outside."""
    module = nn.Embedding(*logits.shape[1:])
    size = torch.arange(len(logits))
    block = make_block({"weight": logits.float()}, chain=torch.zeros(len(size)), draw=size)
    bank = bnn.Bank.from_blocks([block], layout=layout_of(module), info={})
    net = bnn.FunctionalModel(module, bank, strategy="vmap")
    rows = torch.arange(logits.shape[1])
    outside = (rows[len(y) :], y.new_zeros(len(rows) - len(y))) if len(y) < len(rows) else None  # labels are not read
    return bnn.evaluate(
        net, (rows[: len(y)], y), ood=outside, likelihood=Categorical(), batch_size=1000, progress=False, **options
    )


def over_samples(num_rows: int, banks: int) -> Iterator[Report]:
    source = generator(0, "samples", num_rows)
    table = 2.0 * torch.randn(num_rows + OUTSIDE, CLASSES, generator=source)
    y = torch.multinomial((2.0 * table[:num_rows]).softmax(dim=-1), 1, generator=source)[:, 0]
    for _ in tqdm(range(banks), f"{num_rows} rows"):
        yield evaluated(table + torch.randn(SAMPLES, *table.shape, generator=source), y)


def over_rows(num_rows: int, slope: float, sets: int) -> Iterator[Report]:
    """Classes are drawn by `slope` times the logits: 1 is calibrated."""
    source = generator(1, "rows", num_rows, slope)
    for _ in tqdm(range(sets), f"{num_rows} rows, slope {slope}"):
        logits = 1.5 * torch.randn(1, num_rows, CLASSES, generator=source)
        y = torch.multinomial((slope * logits[0]).softmax(dim=-1), 1, generator=source)[:, 0]
        yield evaluated(logits, y, num_bins=5)


def ratios(reports: Sequence[Report], names: Sequence[str], error: str) -> dict[str, dict[str, float]]:
    """Stated error over spread, and the standard error of that."""
    found = {}
    for name in names:
        figures = [one.metrics[name] for one in reports]
        values = torch.tensor([figure.value for figure in figures], dtype=torch.float64)
        squared = torch.tensor([getattr(figure, error) for figure in figures], dtype=torch.float64).square()
        stated, size = math.sqrt(float(squared.mean())), len(figures)
        spread = float(values.std())
        if not spread:
            raise SystemExit(f"{name}: the same in all {size} reports, so that nothing can be said of its error")
        ratio = stated / spread
        own = float(squared.std()) / math.sqrt(size) / (2 * stated**2)
        found[name] = {"ratio": ratio, "error": ratio * math.hypot(own, 1 / math.sqrt(2 * (size - 1)))}
    return found


def table(run: dict[str, Any], what: str) -> list[str]:
    """Lines for the docs, of `over_samples` or `over_rows`."""
    columns = run[what]
    names = list(columns[0]["ratios"])
    lines = [
        "| figure | " + " | ".join(column["title"] for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        lines.append(
            f"| `{name}` | " + " | ".join(f"{column['ratios'][name]['ratio']:.2f}" for column in columns) + " |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--banks", type=int, default=600)
    parser.add_argument("--sets", type=int, default=200)
    arguments = parser.parse_args()
    samples = [
        {"title": f"{rows} rows", "count": arguments.banks}
        | {"ratios": ratios(list(over_samples(rows, arguments.banks)), FIGURES, "monte_carlo_error")}
        for rows in (30, 400)
    ]
    rows = [
        {"title": f"{size:,} rows, {told}", "count": arguments.sets}
        | {"ratios": ratios(list(over_rows(size, slope, arguments.sets)), ROW_FIGURES, "standard_error")}
        for size, slope, told in ((600, 0.4, "off"), (600, 1.0, "calibrated"), (5000, 1.0, "calibrated"))
    ]
    run = {"over_samples": samples, "over_rows": rows}
    for what in run:
        print("\n".join(table(run, what)))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), **run}, indent=2) + "\n")


if __name__ == "__main__":
    main()
