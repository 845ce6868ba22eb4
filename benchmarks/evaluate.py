"""Evaluating a bank, beside its forward passes alone and beside holding the outputs of all samples.

    python benchmarks/evaluate.py --mnist DIR --json benchmarks/results/evaluate.json

DIR holds `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`; without it digits alone are run. Samples come from a
bank of 64, again and again, so that the largest number of them asks for no disk. Ways take turns, and a figure is the
median of the turns. "basic" is accuracy, NLL, Brier score, ECE and entropies with both their errors, "all" every figure and
curve. The rivals hold [S, N, C] and reckon the basic figures from it, without errors; where that takes more than `--held`
bytes they are left out. Peaks are of processes of their own, above what one holds when its data and bank are there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bnn
from bnn.cli.bench import machine
from bnn.data import load_data
from bnn.functional import FunctionalModel
from bnn.layout import Layout
from bnn.modules import build
from bnn.types import Block, Params

DISTINCT, BATCH = 64, 512
MODULES = {"digits": "mlp:64,64,relu", "mnist": "mlp:512,512,relu"}
SAMPLES = {"digits": (10, 100, 1000, 10_000), "mnist": (10, 100)}
BINS = 15


class Repeated:
    """A bank of S samples that are those of a small one again and again, as one chain."""

    def __init__(self, bank: bnn.Bank, size: int) -> None:
        self._bank, self._size = bank, size
        self.chain, self.draw = torch.zeros(size, dtype=torch.int64), torch.arange(size)
        self.log_weight = torch.zeros(size, dtype=torch.float64)

    @property
    def layout(self) -> Layout:
        return self._bank.layout

    @property
    def info(self) -> Mapping[str, Any]:
        return self._bank.info

    @property
    def digest(self) -> str:
        return self._bank.digest

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Params:
        return self._bank[index % DISTINCT]

    def block(self, indices: Sequence[int] | slice | Tensor) -> Block:
        if isinstance(indices, slice):
            indices = torch.arange(*indices.indices(self._size))
        indices = torch.as_tensor(indices)
        found = self._bank.block(indices % DISTINCT)
        return found._replace(chain=self.chain[indices], draw=self.draw[indices])


def task(name: str, size: int, mnist: Path | None) -> tuple[FunctionalModel, Tensor, Tensor]:
    """The module under its samples, and all rows."""
    data = load_data("digits" if name == "digits" else str(mnist))
    x, y = torch.cat([data.train.x, data.test.x]), torch.cat([data.train.y, data.test.y])
    module = build(MODULES[name], input_shape=data.input_shape, num_outputs=10, seed=0)
    model = bnn.BayesianModel(
        module, prior=bnn.priors.FanIn(1.5), likelihood=bnn.likelihoods.Categorical(), num_data=len(y)
    )
    bank = bnn.fit(model, (x, y), method=bnn.inference.Prior(), num_samples=DISTINCT, progress=False)
    return FunctionalModel(module, Repeated(bank, size)).settled(), x, y


def forwards(net: FunctionalModel, x: Tensor, y: Tensor) -> None:
    """Every sample on every batch, and nothing else."""
    del y
    with torch.no_grad():
        for rows in x.split(BATCH):
            for _ in net.stream(rows):
                pass


def ours(figures: str) -> Callable[[FunctionalModel, Tensor, Tensor], dict[str, float]]:
    def run(net: FunctionalModel, x: Tensor, y: Tensor) -> dict[str, float]:
        report = bnn.evaluate(net, (x, y), figures=figures, batch_size=BATCH, progress=False)  # type: ignore[arg-type]
        return {name: float(figure.value) for name, figure in report.metrics.items() if figure.value is not None}

    return run


def outputs(net: FunctionalModel, x: Tensor) -> Tensor:
    """[S, N, C], as the module gives them."""
    held = torch.empty(len(net.bank), len(x), 10)
    with torch.no_grad():
        for start, rows in zip(range(0, len(x), BATCH), x.split(BATCH), strict=True):
            for indices, _, found in net.stream(rows):
                held[indices, start : start + len(rows)] = found
    return held


def in_torch(net: FunctionalModel, x: Tensor, y: Tensor) -> dict[str, float]:
    """The basic figures from held outputs, in float32 as people do."""
    each = outputs(net, x).log_softmax(dim=-1)
    probs = torch.logsumexp(each, dim=0).sub(torch.tensor(float(len(each))).log()).exp()
    confidence, predicted = probs.max(dim=1)
    total = torch.special.entr(probs).sum(dim=1)
    expected = -(each.exp() * each).sum(dim=-1).mean(dim=0)
    place = torch.bucketize(confidence, torch.arange(1, BINS) / BINS)
    correct = (predicted == y).float()
    gaps = torch.zeros(BINS).index_add_(0, place, correct - confidence)
    one_hot = torch.nn.functional.one_hot(y, 10)
    return {
        "accuracy": float(correct.mean()),
        "nll": float(-probs.gather(1, y[:, None]).log().mean()),
        "brier": float((probs - one_hot).square().sum(dim=1).mean()),
        "ece": float(gaps.abs().sum() / len(y)),
        "predictive_entropy": float(total.mean()),
        "expected_entropy": float(expected.mean()),
        "mutual_information": float((total - expected).mean()),
    }


def in_torchmetrics(net: FunctionalModel, x: Tensor, y: Tensor) -> dict[str, float]:
    """Accuracy and ECE by torchmetrics, the others as above: it has neither entropies nor a Brier score of classes."""
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    each = outputs(net, x).log_softmax(dim=-1)
    probs = each.exp().mean(dim=0)
    total, expected = torch.special.entr(probs).sum(dim=1), -(each.exp() * each).sum(dim=-1).mean(dim=0)
    return {
        "accuracy": float(multiclass_accuracy(probs, y, num_classes=10, average="micro")),
        "ece": float(multiclass_calibration_error(probs, y, num_classes=10, n_bins=BINS)),
        "nll": float(torch.nn.functional.nll_loss(probs.log(), y)),
        "brier": float((probs - torch.nn.functional.one_hot(y, 10)).square().sum(dim=1).mean()),
        "predictive_entropy": float(total.mean()),
        "expected_entropy": float(expected.mean()),
        "mutual_information": float((total - expected).mean()),
    }


WAYS: dict[str, Callable[[FunctionalModel, Tensor, Tensor], Any]] = {
    "forward passes": forwards,
    "basic": ours("basic"),
    "all": ours("all"),
    "held, torch": in_torch,
}
if importlib.util.find_spec("torchmetrics"):
    WAYS["held, torchmetrics"] = in_torchmetrics


def in_turns(ways: dict[str, Callable[[], Any]], budget: float) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, and what each found; one turn for warmth, then three to eleven within the budget."""
    found = {name: way() for name, way in ways.items()}
    took: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for turn in range(11):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            took[name].append(time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - began > budget:
            break
    return {name: statistics.median(seconds) for name, seconds in took.items()}, found


def check(found: dict[str, Any]) -> None:
    """All ways give the same basic figures, as far as float32 goes."""
    for way, figures in found.items():
        if figures is None:
            continue
        for name, value in found["basic"].items():
            if abs(figures[name] - value) > 1e-3 * max(1.0, abs(value)):
                raise SystemExit(f"{way} gives {name} {figures[name]}, basic gives {value}")


def peak(name: str, size: int, way: str, mnist: Path | None) -> int:
    """Bytes that a way takes above what its data and samples do, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(size), way]
    run = subprocess.run(
        [*command, *(["--mnist", str(mnist)] if mnist else [])], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def print_peak(name: str, size: int, way: str, mnist: Path | None) -> None:
    net, x, y = task(name, size, mnist)
    forwards(FunctionalModel(net.module, Repeated(net.bank._bank, 8)).settled(), x[:BATCH], y[:BATCH])  # type: ignore[attr-defined]
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports and of the fit, does not count
    before = _memory("VmRSS")
    WAYS[way](net, x, y)
    print(_memory("VmHWM") - before)


def _memory(name: str) -> int:
    """Bytes of this process, as Linux tells them: resident now, or at most since they were reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, help="folder of MNIST test files in IDX format")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--most", type=int, default=10_000, help="largest number of samples")
    parser.add_argument("--held", type=float, default=1e9, help="bytes of outputs that rivals may hold")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of turns for each row")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        print_peak(options.peak[0], int(options.peak[1]), options.peak[2], options.mnist)
        return
    rows = []
    for name in MODULES if options.mnist else ["digits"]:
        for size in (number for number in SAMPLES[name] if number <= options.most):
            net, x, y = task(name, size, options.mnist)
            chosen = {
                way: run for way, run in WAYS.items() if "held" not in way or size * len(x) * 10 * 4 <= options.held
            }
            took, found = in_turns({way: partial(run, net, x, y) for way, run in chosen.items()}, options.budget)
            check(found)
            peaks = {way: peak(name, size, way, options.mnist) for way in chosen}
            base = took["forward passes"]
            rows += [
                {
                    "task": name,
                    "module": MODULES[name],
                    "rows": len(x),
                    "samples": size,
                    "way": way,
                    "seconds": took[way],
                    "over_forward_passes": took[way] / base,
                    "peak_bytes": peaks[way],
                }
                for way in chosen
            ]
            for row in rows[-len(chosen) :]:
                print(
                    f"{row['over_forward_passes']:6.2f} of the forward passes: {name}, {size:,} samples x {len(x):,} rows, "
                    f"{row['way']}, {row['seconds'] * 1e3:,.1f} ms, {row['peak_bytes'] / 1e6:,.0f} MB"
                )
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
