"""Every method on the same tasks: what it is worth, and what it costs.

Digits: MLP 64-32-10 tanh, prior FanIn(2), rows with permuted pixels as outside. UCI energy and yacht, splits 0 to 4:
one hidden layer of 50, prior FanIn(1), noise learnt. `--uci FOLDER` holds the folders `energy` and `yacht` with
`data.txt` and the index files of the splits; without it digits alone are run. Options of a method are the same on
all data of a kind, and were not tuned on these test rows: they are defaults but for the number of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import bnn
from bnn.cli.bench import machine
from bnn.data import DataSet, load_data, load_outside
from bnn.inference import HMC, IVON, SGHMC, SGLD, SWAG, Ensemble, Guide, Laplace, Prior
from bnn.modules import build
from bnn.types import Method

SAMPLES, SPLITS = 200, range(5)

METHODS: dict[str, tuple[Method, int]] = {
    "prior": (Prior(), SAMPLES),
    "map": (Guide("map"), 1),
    "mean-field": (Guide("mean-field", num_steps=5000), SAMPLES),
    "low-rank": (Guide("low-rank", num_steps=5000), SAMPLES),
    "full-rank": (Guide("full-rank", num_steps=2000), SAMPLES),
    "flow": (Guide("flow", num_steps=3000), SAMPLES),
    "ivon": (IVON(num_steps=5000), SAMPLES),
    "laplace, kron": (Laplace("kron"), SAMPLES),
    "laplace, kron, prior by evidence": (Laplace("kron", prior_precision="evidence"), SAMPLES),
    "laplace, full": (Laplace("full"), SAMPLES),
    "laplace, full, last layer": (Laplace("full", on="3.*"), SAMPLES),
    "swag": (SWAG(), SAMPLES),
    "ensemble": (Ensemble(), 10),
    "sgld": (SGLD(), SAMPLES),
    "sghmc": (SGHMC(), SAMPLES),
    "hmc": (HMC(num_chains=4, num_warmup=200, num_steps=32), SAMPLES),
}


def model_of(data: DataSet) -> bnn.BayesianModel:
    """The module and prior of a kind of data."""
    classes = data.task == "classification"
    spec = "mlp:32" if classes else "mlp:50"
    module = build(spec, input_shape=data.input_shape, num_outputs=data.num_outputs, seed=0)
    likelihood: Any = bnn.likelihoods.Categorical()
    if not classes:
        likelihood = bnn.likelihoods.Gaussian(bnn.priors.HalfCauchy(1.0))
    prior = bnn.priors.FanIn(2.0 if classes else 1.0)
    return bnn.BayesianModel(module, prior=prior, likelihood=likelihood, num_data=len(data.train.y))


def judge(data: DataSet, outside: Any, method: Method, num_samples: int) -> dict[str, float]:
    """Fit and evaluate once: figures in the target's units, seconds of the fit, bytes of the samples."""
    model = model_of(data)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of HMC and guides about themselves: the table shows what came of it
        bank = bnn.fit(model, data.train[:2], method=method, num_samples=num_samples, seed=0, progress=False)
    seconds = time.perf_counter() - start
    net = bnn.FunctionalModel(model.module, bank)
    units = data.units
    report = bnn.evaluate(net, data.test, ood=outside, loc=units.loc, scale=units.scale, progress=False)
    names = ("accuracy", "nll", "ece", "ood_auroc") if outside is not None else ("rmse", "nll", "coverage_90")
    found = {name: report.metrics[name].value for name in names}
    return found | {"seconds": seconds, "bytes": float(num_samples * model.layout.num_bytes)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--uci", type=Path)
    parser.add_argument("--only", action="append", help="methods, as the table calls them")
    options = parser.parse_args()
    digits = load_data("digits", split=0)
    tasks: dict[str, list[tuple[DataSet, Any]]] = {"digits": [(digits, load_outside("digits-shuffled", digits))]}
    for name in ("energy", "yacht") if options.uci else ():
        tasks[name] = [(load_data(str(options.uci / name), split=split), None) for split in SPLITS]
    rows = []
    for task, splits in tasks.items():
        print(task, flush=True)
        for name, (method, num_samples) in METHODS.items():
            if options.only and name not in options.only:
                continue
            runs = [judge(data, outside, method, num_samples) for data, outside in splits]
            mean = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
            error = {
                key: statistics.stdev(run[key] for run in runs) / len(runs) ** 0.5 for key in runs[0] if len(runs) > 1
            }
            told = "  ".join(f"{key} {value:.4g}" for key, value in mean.items())
            print(f"  {name:34s} {told}", flush=True)
            rows.append(
                {"task": task, "method": name, "num_samples": num_samples, "mean": mean, "standard_error": error}
            )
    if options.json:
        found = {"splits": list(SPLITS), "rows": rows, "machine": machine()}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
