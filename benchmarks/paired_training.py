"""An epoch of training in which every batch meets a weight sample: a bank with PairedLoader, and the usual ways."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from bnn.cli.bench import machine
from bnn.cli.bench_train import FLOOR, arms, make_job
from bnn.modules import build
from bnn.seeding import generator

ROWS, BATCH, SAMPLES, REPEATS = 12_800, 128, 200, 9


def modules() -> dict[str, tuple[nn.Module, list[int]]]:
    """Each module with the shape of its rows."""
    return {
        "small MLP 64-64-64-10": (build("mlp:64,64", input_shape=[64], num_outputs=10, seed=0), [64]),
        "middle MLP 64-512-512-10": (build("mlp:512,512", input_shape=[64], num_outputs=10, seed=0), [64]),
        "CNN, 8 x 8 images": (build("cnn", input_shape=[1, 8, 8], num_outputs=10, seed=0), [1, 8, 8]),
    }


def measure(module: nn.Module, shape: list[int], device: str) -> dict[str, float]:
    """Median seconds of an epoch in every way; the ways take turns, so that a slow minute meets all of them."""
    source = generator(0, "rows")
    x, y = torch.randn(ROWS, *shape, generator=source), torch.randint(10, (ROWS,), generator=source)
    job = make_job(module, x, y, num_samples=SAMPLES, batch_size=BATCH, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        ways = arms(job, device, folder=Path(folder))
        found: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(REPEATS + 1):
            for name, epoch in ways.items():
                start = time.perf_counter()
                epoch()
                if device == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first warms up
                    found[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"seconds an epoch of {ROWS:,} rows in batches of {BATCH}, the last layer trained, a sample a batch")
    rows = []
    for name, (module, shape) in modules().items():
        found = measure(module, shape, options.device)
        print(name)
        for way, seconds in found.items():
            print(f"  {seconds:.3f} s, {seconds / found[FLOOR]:5.2f} times the floor: {way}")
            rows.append({"module": name, "way": way, "seconds": seconds, "times_floor": seconds / found[FLOOR]})
    if options.json:
        found_all = {"rows_of_data": ROWS, "batch_size": BATCH, "floor": FLOOR, "device": options.device}
        options.json.write_text(json.dumps({**found_all, "rows": rows, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
