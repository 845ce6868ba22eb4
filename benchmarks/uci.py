"""HMC, a mean-field guide and an ensemble on UCI regressions, beside published figures of the same splits.

    python benchmarks/uci.py --data-root DIR/uci --splits 0-4 --json benchmarks/results/uci.json

DIR/uci holds a folder a set: `data.txt`, `index_features.txt`, `index_target.txt`, and the splits of Hernandez-Lobato and
Adams (2015), `index_{train,test}_{k}.txt`. One hidden layer of 50 units, noise and scale of the prior learnt, one setting
for all sets and splits. Inputs and targets are standardised with the training rows; figures are in the target's own units.

Each fit runs on one thread; `--slice 1/2` and `--slice 2/2` share the work between two processes. A run that is started
again goes on: what the JSON file has for the same choice of options is not run again. Without --json nothing is kept.

`--validate` scores the setting of HMC and others that were weighed against it, on rows that a seed cuts from those that no
split from 0 to 4 tests on, fitted to the others of these. No test row of these splits takes part, nor its target;
of the splits 5 to 19 some test rows are among the rows that chose between the candidates.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from uci_table import SETS, SOURCES, Row, table, verdicts

import bnn
from bnn.bank.files import write_atomic
from bnn.cli.bench import machine
from bnn.data import DataSet, load_data
from bnn.diagnostics import ess_bulk, split_rhat
from bnn.evaluation.convergence import arrange
from bnn.fitting import describe, method_options, versions
from bnn.inference import HMC, Ensemble, Guide
from bnn.likelihoods import Gaussian
from bnn.metrics import coverage, rmse
from bnn.mixtures import NormalMixture
from bnn.modules import build
from bnn.predictive import mixture
from bnn.priors import FanIn, HalfCauchy, LogNormal, PositivePrior, Prior
from bnn.seeding import derive
from bnn.types import Method

LEVEL = 0.9
PRIOR = FanIn(LogNormal(0.0, 0.5), 1.0)  # one learnt scale of all weights, for standardised inputs and targets
NOISE = LogNormal(-2.0, 1.0)  # in standard deviations of the target
REPORTED, CUT_SHARE = range(5), 0.2  # splits whose test rows --validate leaves out; its share of validation rows


class Choice(NamedTuple):
    """All that may be chosen: a method with its options, and the model."""

    method: Method
    num_samples: int
    prior: Prior
    module: str = "mlp:50,tanh"
    noise: PositivePrior = NOISE

    def to_config(self) -> dict[str, Any]:
        return {
            "method": {"name": self.method.name, "options": method_options(self.method)},
            "num_samples": self.num_samples,
            "module": self.module,
            "prior": self.prior.to_config(),
            "likelihood": Gaussian(self.noise).to_config(),
        }

    @property
    def digest(self) -> str:
        """By which a result is known to be of this choice."""
        return hashlib.sha256(json.dumps(self.to_config(), sort_keys=True).encode()).hexdigest()[:12]


HMC_CHOSEN = Choice(
    HMC(num_chains=4, num_warmup=200, num_steps=256, trajectory="jittered", compile=True), 4 * 150, PRIOR
)


def changed(*, prior: Prior = PRIOR, module: str = HMC_CHOSEN.module, **options: Any) -> Choice:
    """HMC as chosen, but for these: as many draws a chain, whatever the number of chains."""
    method = dataclasses.replace(HMC_CHOSEN.method, **options)  # type: ignore[type-var]
    num_samples = HMC_CHOSEN.num_samples * options.get("num_chains", 4) // 4
    return Choice(method, num_samples, prior, module)


CHOSEN = {
    "hmc": HMC_CHOSEN,
    "mean-field": Choice(Guide("mean-field", num_steps=8000, lr=0.03), 500, PRIOR),
    # A mode says little of a prior's scale, so that the members' is fixed.
    "ensemble": Choice(Ensemble(num_steps=5000, lr=0.03), 10, FanIn(1.0)),
}
CANDIDATES = {
    "chosen": HMC_CHOSEN,
    "relu": changed(module="mlp:50,relu"),
    "half-Cauchy scale": changed(prior=FanIn(HalfCauchy(1.0), 1.0)),
    "a scale a layer": changed(prior=FanIn(LogNormal(0.0, 0.5), 1.0, shared=False)),
    "learnt scale of biases": changed(prior=FanIn(LogNormal(0.0, 0.5), LogNormal(0.0, 0.5))),
    "fixed scales": changed(prior=FanIn(1.0)),
    "starts from the prior": changed(init="prior"),
    "long trajectories": changed(num_steps=512),
    "ChEES": changed(trajectory="chees", num_steps=1024),
    "acceptance 0.65": changed(target_accept=0.65),
    "acceptance 0.9": changed(target_accept=0.9),
    "8 chains": changed(num_chains=8),
}


def judge(folder: Path, split: int, choice: Choice) -> Row:
    """Fit to the training rows of a split, and score on its test rows, in the target's own units."""
    data = load_data(str(folder), split=split)
    module = build(choice.module, input_shape=data.input_shape, num_outputs=1, seed=0)
    likelihood = Gaussian(choice.noise)
    model = bnn.BayesianModel(module, prior=choice.prior, likelihood=likelihood, num_data=len(data.train.y))
    bank, found = fitted(model, data, choice, seed=split)
    units, net = data.units, bnn.FunctionalModel(module, bank)
    predictive = mixture(net, data.test.x, likelihood=likelihood, loc=units.loc, scale=units.scale)
    assert isinstance(predictive, NormalMixture)
    y = data.test.y.double().unsqueeze(1) * units.scale + units.loc  # [B] -> [B, 1]
    found["rmse"] = float(rmse(predictive.mean, y))
    found["log_likelihood"] = float(predictive.log_prob(y).mean())
    found["coverage_90"] = float(coverage(predictive.cdf(y), LEVEL))
    found["noise"] = float(predictive.aleatoric.mean().sqrt())
    if hasattr(choice.method, "num_chains"):
        draws = predictive.means[arrange(bank), :, 0]  # [S, B, 1] -> [C, D, B]
        rhat, ess = split_rhat(draws), ess_bulk(draws)  # [B]
        found |= {"rhat_median": float(rhat.median()), "rhat_max": float(rhat.max())}
        found |= {"ess_median": float(ess.median()), "ess_min": float(ess.min())}
    return found


def fitted(model: bnn.BayesianModel, data: DataSet, choice: Choice, *, seed: int) -> tuple[bnn.Bank, Row]:
    """A bank in memory, with the seconds and leapfrog steps of each phase of its fit and what the method said."""
    found: Row = {}
    blocks = []
    began = before = time.perf_counter()
    leapfrogs = 0.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for block, state in choice.method.run(model, data.train[:2], num_samples=choice.num_samples, seed=seed):
            blocks.append(block)
            info, now = state["info"], time.perf_counter()
            name = state["phase"]["name"].replace("-", "_") if "phase" in state else "all"
            found[f"seconds_{name}"] = found.get(f"seconds_{name}", 0.0) + now - before
            if "leapfrogs" in info:
                more = info["leapfrogs"] - leapfrogs
                found[f"leapfrogs_{name}"] = found.get(f"leapfrogs_{name}", 0.0) + more
                leapfrogs = info["leapfrogs"]
            before = now
    compile_seconds = info.get("compile_seconds", 0.0)
    first = next(iter(found))  # the phase that began with the compilation
    found[first] -= compile_seconds
    found |= {"seconds": time.perf_counter() - began, "seconds_compile": compile_seconds}
    found |= {name: info[name] for name in ("acceptance", "divergences", "step_size", "length") if name in info}
    found["said"] = sorted({str(one.message) for one in said if issubclass(one.category, UserWarning)})
    about = describe(model, choice.method, seed, None)
    return bnn.Bank.from_blocks(blocks, layout=model.layout, info=about, base=model.base()), found


def cut(folder: Path, out: Path) -> None:
    """A folder of the same data whose splits are cuts for validation, of the rows that no reported split tests on."""
    out.mkdir(parents=True)
    for name in ("data.txt", "index_features.txt", "index_target.txt"):
        (out / name).write_bytes((folder / name).read_bytes())

    def rows(part: str, split: int) -> np.ndarray:
        return np.loadtxt(folder / f"index_{part}_{split}.txt").astype(int)

    everything = np.union1d(rows("train", 0), rows("test", 0))
    free = np.setdiff1d(everything, np.concatenate([rows("test", split) for split in REPORTED]))
    for number in REPORTED:
        order = np.random.default_rng(derive(number, "cut")).permutation(free)
        size = round(CUT_SHARE * len(free))
        np.savetxt(out / f"index_test_{number}.txt", np.sort(order[:size]), fmt="%d")
        np.savetxt(out / f"index_train_{number}.txt", np.sort(order[size:]), fmt="%d")


class Kept:
    """The JSON file of a run, to which several processes add rows: each addition reads it again under a lock."""

    def __init__(self, path: Path | None, part: str) -> None:
        self.path, self.part = path, part
        self._found: dict[str, Any] = {}

    def rows(self) -> list[Row]:
        """What is there now."""
        if self.path is not None and self.path.exists():
            self._found = json.loads(self.path.read_text(encoding="utf-8"))
        rows: list[Row] = self._found.get(self.part, [])
        return rows

    def add(self, row: Row, about: dict[str, Any]) -> None:
        """A row more, in place of one of the same set, split and method."""
        with self._locked():
            others = [other for other in self.rows() if key(other)[:3] != key(row)[:3]]
            rows = sorted([*others, row], key=key)
            self._found = {**self._found, **about, self.part: rows}
            if self.path is not None:
                write_atomic(self.path, [(json.dumps(self._found, indent=1) + "\n").encode()])

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if self.path is None:
            yield
            return
        handle = os.open(self.path.parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # of the folder: the file itself is replaced
            yield
        finally:
            os.close(handle)


def key(row: Row) -> tuple[str, int, str, str]:
    return row["set"], row["split"], row["method"], row["choice"]


def run(tasks: Sequence[tuple[str, int, str]], choices: dict[str, Choice], root: Path, kept: Kept) -> None:
    """Judge what is not there yet: (set, split, method), each with its choice."""
    about = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "machine": machine(),
        "versions": versions() | {"numpy": np.__version__},
        "sources": SOURCES,
    }
    for name, split, method in tasks:
        choice = choices[method]
        row: Row = {"set": name, "split": split, "method": method, "choice": choice.digest}
        if key(row) in {key(other) for other in kept.rows()}:
            continue
        row |= judge(root / name, split, choice)
        figures = {figure: value for figure, value in row.items() if isinstance(value, float)}
        print(f"{name} {split} {method}:", ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
        configs = {each: choices[each].to_config() | {"digest": choices[each].digest} for each in choices}
        title = "choices" if kept.part == "rows" else "candidates"
        kept.add(row, {**about, title: configs})


def validate(
    names: Sequence[str], sets: Sequence[str], splits: Sequence[int], root: Path, kept: Kept, part: slice
) -> None:
    """Score candidates for HMC on cuts of training rows, and print their means over the cuts."""
    tasks = [(name, number, candidate) for candidate in names for name in sets for number in splits][part]
    with tempfile.TemporaryDirectory() as folder:
        for name in sets:
            cut(root / name, Path(folder) / name)
        run(tasks, CANDIDATES, Path(folder), kept)
    for name in sets:
        for candidate in names:
            of = [row for row in kept.rows() if (row["set"], row["method"]) == (name, candidate)]
            if of:
                figures = ("rmse", "log_likelihood", "coverage_90", "rhat_median", "rhat_max", "divergences", "seconds")
                words = (f"{figure} {statistics.fmean(row[figure] for row in of):.4g}" for figure in figures)
                print(f"{name:18s}{candidate:24s}{len(of)} cuts:", ", ".join(words))


def numbers(words: str) -> list[int]:
    """`0-4` or `0,2,7` as a list."""
    spans = [part.split("-") for part in words.split(",")]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def share(words: str) -> slice:
    """`I/N`, I from 1: every N-th task."""
    part, count = map(int, words.split("/"))
    if not 1 <= part <= count:
        raise argparse.ArgumentTypeError(f"{words}: want I/N with 1 <= I <= N")
    return slice(part - 1, None, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data-root", type=Path, required=True, help="folder that holds a folder a set")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument(
        "--splits", type=numbers, default=list(REPORTED), help="such as 0-4 or 0,3; cuts with --validate"
    )
    parser.add_argument("--methods", nargs="+", choices=list(CHOSEN), default=list(CHOSEN))
    parser.add_argument("--slice", type=share, default=slice(None), help="I/N: every N-th task, from the I-th on")
    parser.add_argument("--validate", action="store_true", help="score candidates on training rows, and nothing else")
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--json", type=Path, help="file to add results to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.data_root
    if options.validate:
        kept = Kept(options.json, "validation")
        validate(options.candidates, options.sets, options.splits, root, kept, options.slice)
        return
    kept = Kept(options.json, "rows")
    tasks = [(name, split, method) for method in options.methods for name in options.sets for split in options.splits]
    run(tasks[options.slice], CHOSEN, root, kept)
    rows = [row for row in kept.rows() if row["choice"] == CHOSEN[row["method"]].digest]
    print("\n".join([*table(rows), *verdicts(rows)]))


if __name__ == "__main__":
    main()
