"""One class in a hundred: a natural posterior, a balanced one, one with importance weights, and focal loss.

Digit 8 against the others of scikit-learn's digits, the training rows cut so that it is a hundredth of them.
Test rows are kept whole; figures for natural shares weigh the two classes by their training shares. Mean and
standard error over seeds, each of which cuts, splits and fits anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import bnn
from bnn.cli.bench import machine
from bnn.modules import build
from bnn.samplers import ClassBalancedSampler
from bnn.seeding import generator

SEEDS, STEPS, SAMPLES, RARE = 10, 2500, 50, 13


class Rows(NamedTuple):
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def rows_of(seed: int) -> Rows:
    """Training rows with 13 eights among about 1,300 others, and untouched test rows."""
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target == 8).long()
    order = torch.randperm(len(y), generator=generator(seed, "split"))
    test, train = order[:360], order[360:]
    eights = train[y[train] == 1][:RARE]
    train = torch.cat([train[y[train] == 0], eights])
    return Rows(x[train], y[train], x[test], y[test])


def posterior(rows: Rows, seed: int, *, balanced: bool, importance: bool) -> bnn.FunctionalModel:
    module = build("mlp:32", input_shape=[64], num_outputs=2, seed=seed)
    model = bnn.BayesianModel(
        module, prior=bnn.priors.FanIn(1.0), likelihood=bnn.likelihoods.Categorical(), num_data=len(rows.y)
    )
    bank = bnn.fit(
        model,
        (rows.x, rows.y),
        method=bnn.inference.Guide("mean-field", num_steps=STEPS),
        num_samples=SAMPLES,
        seed=seed,
        sampler=ClassBalancedSampler(rows.y, seed=seed) if balanced else None,
        importance_weights=importance,
    )
    return bnn.FunctionalModel(module, bank)


def focal(rows: Rows, seed: int, gamma: float = 2.0) -> Tensor:
    """Log probabilities of a plain module trained on -(1 - p)^gamma log p, without a posterior."""
    module = build("mlp:32", input_shape=[64], num_outputs=2, seed=seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    source = generator(seed, "focal")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.01 ** (step / STEPS)
        batch = torch.randint(len(rows.y), (128,), generator=source)
        log_p = module(rows.x[batch]).log_softmax(dim=1).gather(1, rows.y[batch].unsqueeze(1)).squeeze(1)
        optimizer.zero_grad()
        (-((1 - log_p.exp()) ** gamma) * log_p).mean().backward()
        optimizer.step()
    with torch.no_grad():
        return module(rows.test_x).log_softmax(dim=1).double()


def figures(log_probs: Tensor, rows: Rows) -> dict[str, float]:
    nll = -log_probs.gather(1, rows.test_y.unsqueeze(1)).squeeze(1)
    right = (log_probs.argmax(dim=1) == rows.test_y).double()
    rare, share = rows.test_y == 1, RARE / len(rows.y)
    natural_nll = (1 - share) * nll[~rare].mean() + share * nll[rare].mean()
    return {
        "recall of the rare class": float(right[rare].mean()),
        "recall of the others": float(right[~rare].mean()),
        "NLL at natural shares": float(natural_nll),
        "NLL at equal shares": float((nll[~rare].mean() + nll[rare].mean()) / 2),
    }


def run(seed: int) -> dict[str, dict[str, float]]:
    rows = rows_of(seed)
    shares = [1 - RARE / len(rows.y), RARE / len(rows.y)]
    natural = posterior(rows, seed, balanced=False, importance=False)
    balanced = posterior(rows, seed, balanced=True, importance=False)
    weighed = posterior(rows, seed, balanced=True, importance=True)
    return {
        "natural": figures(bnn.predict(natural, rows.test_x).log_probs, rows),
        "balanced": figures(bnn.predict(balanced, rows.test_x).log_probs, rows),
        "balanced, prior_shift": figures(
            bnn.predict(balanced, rows.test_x, prior_shift=([0.5, 0.5], shares)).log_probs, rows
        ),
        "balanced draws, importance weights": figures(bnn.predict(weighed, rows.test_x).log_probs, rows),
        "focal loss, no posterior": figures(focal(rows, seed), rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = [run(seed) for seed in range(SEEDS)]
    found = []
    for way in runs[0]:
        row: dict[str, object] = {"way": way}
        for figure in runs[0][way]:
            values = [one[way][figure] for one in runs]
            row[figure] = {"mean": statistics.mean(values), "error": statistics.stdev(values) / SEEDS**0.5}
        found.append(row)
        shown = ", ".join(
            f"{name} {v['mean']:.3f} ± {v['error']:.3f}" for name, v in row.items() if isinstance(v, dict)
        )
        print(f"{way}: {shown}")
    if options.json:
        options.json.write_text(json.dumps({"seeds": SEEDS, "rows": found, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
