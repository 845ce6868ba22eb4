"""Evaluating a bank, beside its forward passes alone and beside holding the outputs of all samples.

    python benchmarks/evaluate.py --mnist DIR --json benchmarks/results/evaluate.json

DIR holds `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`; without it digits alone are run. Samples come from a
bank of 64, again and again, so that the largest number of them asks for no disk. Ways take turns, and a figure is the
median of the turns. "forward passes" runs the samples on the batches with the same strategy and looks at no output; "basic" is
accuracy, NLL, Brier score, ECE and entropies with both their errors, "all" every figure and curve. The rivals hold [S, N, C]
and reckon the basic figures from it, without errors; where that takes more than `--held` bytes they are left out. Where two turns over all rows of data would
take longer than `--budget`, as smaller sizes tell, fewer whole batches are taken, and `rows` says how many; ways for which even
one batch makes a turn longer than twice the budget are left out: `left_out` names them. Peaks are of processes
of their own, above what one holds when its data and bank are there, with large arrays given back to the system at once so that
holes in the heap do not count; of ways that take longer than `--longest` seconds there are none.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
SAMPLES = {"digits": (10, 100, 1000, 10_000), "mnist": (10, 100, 1000, 10_000)}
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


def task(name: str, size: int, mnist: Path | None, rows: int | None = None) -> tuple[FunctionalModel, Tensor, Tensor]:
    """The module under its samples, and the first rows of data, or all."""
    data = load_data("digits" if name == "digits" else str(mnist))
    x, y = torch.cat([data.train.x, data.test.x]), torch.cat([data.train.y, data.test.y])
    module = build(MODULES[name], input_shape=data.input_shape, num_outputs=10, seed=0)
    model = bnn.BayesianModel(
        module, prior=bnn.priors.FanIn(1.5), likelihood=bnn.likelihoods.Categorical(), num_data=len(y)
    )
    bank = bnn.fit(model, (x, y), method=bnn.inference.Prior(), num_samples=DISTINCT, progress=False)
    return FunctionalModel(module, Repeated(bank, size)).settled(), x[:rows], y[:rows]


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


class Turns(NamedTuple):
    """What ways took, taking turns."""

    seconds: dict[str, float]  # the median
    count: int
    found: dict[str, Any]


def in_turns(ways: dict[str, Callable[[], Any]], budget: float) -> Turns:
    """One to eleven turns within a budget of seconds. The first is for warmth, but where it alone fills half of that."""
    found: dict[str, Any] = {}
    took: dict[str, list[float]] = {name: [] for name in ways}
    began = time.perf_counter()
    for turn in range(12):
        for name, way in ways.items():
            start = time.perf_counter()
            found[name] = way()
            took[name].append(time.perf_counter() - start)
        spent = time.perf_counter() - began
        if turn == 0 and spent < 0.5 * budget:
            took = {name: [] for name in ways}
        elif spent * (turn + 2) / (turn + 1) > budget:
            break
    count = len(next(iter(took.values())))
    return Turns({name: statistics.median(seconds) for name, seconds in took.items()}, count, found)


def batches_within(size: int, rows: int, expected: Mapping[str, float], budget: float) -> int:
    """Rows in whole batches, all of them at most and one batch at least, of which two turns end within a budget of seconds.

    Args:
        size: number of samples.
        rows: all there are.
        expected: seconds of each way for a sample and row; none where nothing is known.
        budget: seconds.
    """
    turn = size * sum(expected.values())
    if 2.0 * turn * rows <= budget:
        return rows
    return min(rows, max(1, int(budget / (2.0 * turn * BATCH))) * BATCH)


def within(ways: Sequence[str], expected: Mapping[str, float], most: float) -> tuple[list[str], dict[str, str]]:
    """The ways whose turn is expected to end within so many seconds, first come, and why the others are left out."""
    kept, why, total = [], {}, 0.0
    for way in ways:
        total += expected.get(way, 0.0)
        if total <= most and "forward passes" not in why:
            kept.append(way)
        else:
            why[way] = f"a turn of the row would take about {total:,.0f} s"
    return kept, why


def check(found: dict[str, Any]) -> None:
    """All ways give the same basic figures, as far as float32 goes."""
    for way, figures in found.items():
        if figures is None:
            continue
        for name, value in found["basic"].items():
            if abs(figures[name] - value) > 1e-3 * max(1.0, abs(value)):
                raise SystemExit(f"{way} gives {name} {figures[name]}, basic gives {value}")


def peak(name: str, size: int, rows: int, way: str, mnist: Path | None) -> int:
    """Bytes that a way takes above what its data and samples do, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, str(size), str(rows), way]
    run = subprocess.run(
        [*command, *(["--mnist", str(mnist)] if mnist else [])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )
    return int(run.stdout.split()[-1])


def print_peak(name: str, size: int, rows: int, way: str, mnist: Path | None) -> None:
    net, x, y = task(name, size, mnist, rows)
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
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of turns for each row")
    parser.add_argument("--longest", type=float, default=40.0, help="seconds of a way whose peak is measured")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        name, size, rows, way = options.peak
        print_peak(name, int(size), int(rows), way, options.mnist)
        return
    found: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    for name in MODULES if options.mnist else ["digits"]:
        expected: dict[str, float] = {}  # seconds of each way for a sample and row
        for size in (number for number in SAMPLES[name] if number <= options.most):
            more, without = measured(name, size, expected, options)
            found += more
            left_out += [{"task": name, "samples": size, **cell} for cell in without]
            expected |= {row["way"]: row["seconds"] / size / row["rows"] for row in more}
            for row in more:
                print(line(row), flush=True)
            for cell in without:
                print(f"left out: {name}, {size:,} samples, {cell['way']}, {cell['what']}: {cell['why']}", flush=True)
    if options.json is not None:
        facts = {"machine": machine(), "rows": found, "left_out": left_out}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


def measured(
    name: str, size: int, expected: Mapping[str, float], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of one task and number of samples, and the cells that are left out, with the reason."""
    net, x, y = task(name, size, options.mnist)
    rows = batches_within(size, len(x), expected, options.budget)
    x, y = x[:rows], y[:rows]
    seconds = {way: size * rows * one for way, one in expected.items()}
    known = [way for way in WAYS if not expected or way in expected]
    kept, why = within(known, seconds, 2.0 * options.budget)
    why |= {way: "left out of fewer samples" for way in WAYS if way not in known}
    left_out = [{"way": way, "what": "all", "why": reason} for way, reason in why.items()]
    if not kept:
        return [], left_out
    held = size * len(x) * 10 * 4
    for way in [way for way in kept if "held" in way and held > options.held]:
        kept.remove(way)
        left_out.append({"way": way, "what": "all", "why": f"outputs of {held / 1e9:.1f} GB"})
    turns = in_turns({way: partial(WAYS[way], net, x, y) for way in kept}, options.budget)
    check(turns.found)
    cells = []
    for way in kept:
        took, bytes_ = turns.seconds[way], None
        if took <= options.longest:
            bytes_ = peak(name, size, rows, way, options.mnist)
        else:
            left_out.append({"way": way, "what": "peak_bytes", "why": f"a run takes {took:,.0f} s"})
        cells.append(
            {
                "task": name,
                "module": MODULES[name],
                "rows": rows,
                "samples": size,
                "way": way,
                "turns": turns.count,
                "seconds": took,
                "over_forward_passes": took / turns.seconds["forward passes"],
                "peak_bytes": bytes_,
            }
        )
    return cells, left_out


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    bytes_ = "no peak" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f} MB"
    return (
        f"{row['over_forward_passes']:6.2f} of the forward passes: {row['task']}, {row['samples']:,} samples x "
        f"{row['rows']:,} rows, {row['way']}, {row['seconds'] * 1e3:,.1f} ms, {bytes_}, turns: {row['turns']}"
    )


def table(run: Mapping[str, Any]) -> list[str]:
    """Lines of the table on the page about evaluation."""
    lines = [
        "| module | samples | rows | forward passes, s | basic | all | held, torch | peak of all, MB | held, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in MODULES:
        for size in SAMPLES[name]:
            of = {row["way"]: row for row in run["rows"] if (row["task"], row["samples"]) == (name, size)}
            if not of:
                continue
            ratios = [
                f"{of[way]['over_forward_passes']:.2f}" if way in of else "-" for way in ("basic", "all", "held, torch")
            ]
            peaks = [of.get(way, {}).get("peak_bytes") for way in ("all", "held, torch")]
            cells = [*ratios, *("-" if peak is None else f"{peak / 1e6:,.0f}" for peak in peaks)]
            alone = of["forward passes"]
            lines.append(f"| {name} | {size:,} | {alone['rows']:,} | {alone['seconds']:.3g} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
