"""What reading a bank shard by shard costs statistically, with rows in the order of chains and striped.

    python benchmarks/bank_order.py --json benchmarks/results/bank_order.json

Chains of HMC on a small regression, with steps so few that neighbours are alike. A visit of a shard draws m of its
samples; asked is the variance of the mean of what they predict, over that of m independent draws from the whole bank,
which should be 1 + (m - 1) rho, rho being the correlation of two samples of one shard. Both are averaged over inputs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bnn
from bnn.bank.compacting import places
from bnn.cli.bench import machine
from bnn.inference import HMC

CHAINS, DRAWS, ROWS = 4, 1024, 64  # so that there are 64 shards
VISITS = (1, 4, 16, 64)


def predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outputs [S, B] of the samples at 40 inputs, with chain and draw of each."""
    source = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 60).unsqueeze(1)
    y = (2 * x).sin() + 0.2 * torch.randn(60, 1, generator=source)
    module = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    model = bnn.BayesianModel(module, prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Gaussian(0.2), num_data=60)
    method = HMC(num_chains=CHAINS, num_warmup=500, num_steps=8)
    bank = bnn.fit(model, (x, y), method=method, num_samples=CHAINS * DRAWS, seed=0, progress=False)
    probes = torch.linspace(-2.5, 2.5, 40).unsqueeze(1)
    with torch.no_grad():
        outputs = bnn.FunctionalModel(module, bank, strategy="vmap")(probes, slice(None))
    return outputs.squeeze(-1).double().numpy(), bank.chain.numpy(), bank.draw.numpy()


def rho_of(groups: np.ndarray) -> float:
    """Correlation of two samples of one shard, from groups [shards, R, B], averaged over inputs by their variance."""
    rows = groups.shape[1]
    whole = groups.reshape(-1, groups.shape[2]).var(axis=0)  # [B]
    between = groups.mean(axis=1).var(axis=0)  # [B]: (1 + (R - 1) rho) / R of the whole
    return float((between.sum() / whole.sum() * rows - 1) / (rows - 1))


def measured(groups: np.ndarray, visit: int, repeats: int, seed: int) -> float:
    """Variance of the mean of `visit` samples of one shard over that of as many independent ones."""
    source = np.random.default_rng(seed)
    shards, rows, _ = groups.shape
    means = np.empty((repeats, groups.shape[2]))
    for place in range(repeats):
        chosen = source.permutation(rows)[:visit]
        means[place] = groups[source.integers(shards), chosen].mean(axis=0)
    whole = groups.reshape(-1, groups.shape[2])
    return float(means.var(axis=0).sum() / (whole.var(axis=0).sum() / visit))


def table(run: dict[str, Any]) -> list[str]:
    """The lines of the page that shows a run."""
    visits = " | m = ".join(map(str, VISITS))
    lines = [f"| rows | ρ | m = {visits} |", "|---" * (2 + len(VISITS)) + "|"]  # noqa: RUF001 - as the page has it
    for order, words in (("chain", "chain after chain"), ("striped", "striped")):
        found = {row["draws"]: row for row in run["rows"] if row["order"] == order}
        cells = [f"{found[visit]['measured']:.2f} ({found[visit]['formula']:.2f})" for visit in VISITS]
        lines.append(f"| {words} | {found[1]['rho']:.3f} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=20_000)
    options = parser.parse_args()
    outputs, chain, draw = predictions()
    rows: list[dict[str, Any]] = []
    for order in ("chain", "striped"):
        groups = np.stack([outputs[shard] for shard in places(chain, draw, ROWS, order, 0)])  # type: ignore[arg-type]
        rho = rho_of(groups)
        for visit in VISITS:
            found = measured(groups, visit, options.repeats, seed=visit)
            rows.append(
                {"order": order, "draws": visit, "rho": rho, "formula": 1 + (visit - 1) * rho, "measured": found}
            )
            print(
                f"{order:8} {visit:3} draws a visit: {found:6.2f} times the variance, by the formula {rows[-1]['formula']:6.2f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
