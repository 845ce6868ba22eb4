"""Weighted and class-balanced draws from 10^5 to 10^8 rows: time to the first batch, time an index, memory.

Each figure comes from a process of its own, so that memory is that of one way alone. The rivals are
torch's sampler, NumPy's choice, and two packages' ways of balancing classes, written from their
description: imbalanced-dataset-sampler draws by 1 / count with `torch.multinomial`, catalyst concatenates
`numpy.random.choice` of each class and shuffles.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import seconds
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from bnn.cli.bench import machine
from bnn.samplers import ClassBalancedSampler, PairedLoader, SampleIndexSampler, WeightedIndexSampler

DRAWS, BATCH, CLASSES = 10**6, 128, 10
SIZES = (10**5, 10**6, 10**7, 10**8)
SLOW = 10**7  # ways that walk over rows in Python are left out above this


def weights_of(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).random(num_rows)


def labels_of(num_rows: int) -> np.ndarray:
    """Classes whose shares fall by a half from one to the next."""
    shares = 0.5 ** np.arange(CLASSES)
    edges = np.cumsum(shares / shares.sum())
    return np.searchsorted(edges, np.random.default_rng(0).random(num_rows) * edges[-1], side="right").astype(np.int64)


def imbalanced(labels: np.ndarray) -> Iterator[int]:
    listed = labels.tolist()
    counts = collections.Counter(listed)
    weights = torch.tensor([1.0 / counts[label] for label in listed], dtype=torch.float64)
    return (int(index) for index in torch.multinomial(weights, DRAWS, replacement=True))


def catalyst(labels: np.ndarray) -> Iterator[int]:
    rows: dict[int, Any] = {kind: [] for kind in range(CLASSES)}
    for row, label in enumerate(labels.tolist()):
        rows[label].append(row)
    state = np.random.RandomState(0)
    drawn = [state.choice(found, DRAWS // CLASSES, replace=True) for found in rows.values()]
    together = np.concatenate(drawn)
    state.shuffle(together)
    return iter(together.tolist())


def numpy_choice(weights: np.ndarray) -> Iterator[int]:
    probabilities = weights / weights.sum()
    return iter(np.random.default_rng(0).choice(len(weights), DRAWS, p=probabilities).tolist())


WAYS: dict[str, tuple[str, Callable[[Any], Iterable[int]], int]] = {
    "bnn WeightedIndexSampler": ("weights", lambda w: WeightedIndexSampler(w, DRAWS), SIZES[-1]),
    "torch WeightedRandomSampler": ("weights", lambda w: WeightedRandomSampler(torch.from_numpy(w), DRAWS), SIZES[-1]),
    "numpy Generator.choice": ("weights", numpy_choice, SIZES[-1]),
    "bnn ClassBalancedSampler": ("labels", lambda y: ClassBalancedSampler(y, num_samples=DRAWS), SIZES[-1]),
    "as imbalanced-dataset-sampler": ("labels", imbalanced, SLOW),
    "as catalyst BalanceClassSampler": ("labels", catalyst, SLOW),
}


def peak_bytes() -> int:
    """Most memory that this process has held; Linux's own figure, since `getrusage` also counts its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_one(way: str, num_rows: int, path: str) -> dict[str, float]:
    """One way in this process: seconds to the first batch and an index, and arrays of N beside the input's."""
    _, make, _ = WAYS[way]
    given = np.load(path)  # made by the parent: what making it took is not counted
    list(islice(iter(make(given[:1000])), BATCH))  # imports and caches
    before = peak_bytes()
    start = time.perf_counter()
    drawn = iter(make(given))
    first = list(islice(drawn, BATCH))
    to_first = time.perf_counter() - start
    count = len(first) + sum(1 for _ in drawn)
    total = time.perf_counter() - start
    if count != DRAWS:
        raise RuntimeError(f"{way}: {count} draws")
    extra = max(peak_bytes() - before, 0) / (8 * num_rows)
    return {
        "first_batch_seconds": to_first,
        "total_seconds": total,
        "nanoseconds_an_index": total / DRAWS * 1e9,
        "extra_arrays": extra,
    }


def from_memory() -> dict[str, float]:
    """Microseconds of a batch of 128 from 200,000 rows in memory."""
    x, y = torch.randn(200_000, 64), torch.randint(10, (200_000,))
    stock = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    ours = PairedLoader((x, y), SampleIndexSampler(100), batch_size=BATCH, shuffle=True)
    return {
        name: seconds(lambda loader=loader: collections.deque(loader, maxlen=0), repeats=5) / len(loader) * 1e6
        for name, loader in (("PairedLoader", ours), ("DataLoader(TensorDataset)", stock))
    }


def measure_all(num_rows: int, folder: Path) -> list[dict[str, Any]]:
    """Every way on so many rows, each in a process of its own."""
    print(f"{DRAWS:,} draws from {num_rows:,} rows")
    files = {"weights": folder / "weights.npy", "labels": folder / "labels.npy"}
    np.save(files["weights"], weights_of(num_rows))
    np.save(files["labels"], labels_of(num_rows))
    rows: list[dict[str, Any]] = []
    ours: dict[str, float] = {}
    for way, (kind, _, largest) in WAYS.items():
        if num_rows > largest:
            print(f"  left out above {largest:,} rows: {way}")
            continue
        command = [sys.executable, __file__, "--one", way, str(num_rows), str(files[kind])]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            reason = run.stderr.strip().splitlines()[-1]
            print(f"  refused: {way}: {reason}")
            rows.append({"rows": num_rows, "way": way, "kind": kind, "refused": reason})
            continue
        found = json.loads(run.stdout)
        ratio = found["total_seconds"] / ours.setdefault(kind, found["total_seconds"])  # ours comes first
        print(
            f"  {ratio:6.2f} times the time of ours, {found['nanoseconds_an_index']:7.0f} ns an index, first batch after "
            f"{found['first_batch_seconds'] * 1e3:8.1f} ms, {found['extra_arrays']:5.1f} arrays of N: {way}"
        )
        rows.append({"rows": num_rows, "way": way, "kind": kind, "times_ours": ratio, **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "N", "FILE"), help="measure one way in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(options.one[0], int(options.one[1]), options.one[2])))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in SIZES:
            rows += measure_all(num_rows, Path(folder))
    batch = from_memory()
    ratio = batch["DataLoader(TensorDataset)"] / batch["PairedLoader"]
    print(
        f"a batch of {BATCH} from memory: {ratio:.2f} times as fast as DataLoader(TensorDataset) "
        f"({batch['PairedLoader']:.0f} and {batch['DataLoader(TensorDataset)']:.0f} us)"
    )
    if options.json:
        found_all = {"draws": DRAWS, "rows": rows, "batch_from_memory_microseconds": batch, "machine": machine()}
        options.json.write_text(json.dumps(found_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
