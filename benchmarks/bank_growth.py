"""Does reading a bank cost in proportion to the samples S and to the values P of each?

    python benchmarks/bank_growth.py --json benchmarks/results/bank_growth.json

A pass from first to last in which every value is added up, over banks of ten to ten thousand samples of 9,000 values, and of
sixteen samples of a thousand to ten million values; files are in the page cache. Ways take turns, the first of which warms up;
a figure is the median of the others. `bare` adds up the same numbers from memory, in tensors of one sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnn.bank import Bank, BankWriter
from bnn.cli.bench import machine
from bnn.layout import layout_of
from bnn.types import make_block

SAMPLES = (10, 100, 1000, 10_000)  # of a layer of WIDTH inputs and outputs
WIDTHS = (31, 100, 316, 1000, 3162)  # whose squares are the values of SIXTEEN samples
WIDTH, SIXTEEN = 95, 16
BLOCK = 64
LEAST = 0.2  # seconds of a turn


def written(folder: Path, width: int, num_samples: int) -> Path:
    """A bank of draws from a normal, in shards of 32 MB."""
    layout = layout_of(nn.Linear(width, width, bias=False))
    writer = BankWriter(folder, layout=layout, config={}, shard_rows=max(2**25 // layout.num_bytes, 1))
    source = torch.Generator().manual_seed(0)
    for start in range(0, num_samples, BLOCK):
        index = torch.arange(start, min(start + BLOCK, num_samples))
        flat = torch.randn(len(index), layout.num_values, generator=source)
        writer.append(make_block(layout.unflatten(flat), chain=index * 0, draw=index))
    writer.close()
    return folder


def added_up(bank: Bank) -> None:
    for _, block in bank.blocks(BLOCK):
        for tensor in block.params.values():
            tensor.sum()


def measured(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of a pass, by way."""
    mapped, host = Bank.open(folder, verify="never"), Bank.open(folder, residency="host")
    budget = 4 * max(file.stat().st_size for file in folder.glob("main-*.safetensors")) + 2**20
    streamed = Bank.open(folder, residency="streamed", host_budget=budget, verify="never")
    sample = torch.randn(mapped.layout.num_values)

    def bare() -> None:
        for _ in range(len(mapped)):
            sample.sum()

    ways: dict[str, Callable[[], None]] = {
        "mapped": lambda: added_up(mapped),
        "host": lambda: added_up(host),
        "streamed": lambda: added_up(streamed),
        "bare": bare,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            passes, start = 0, time.perf_counter()
            while time.perf_counter() - start < LEAST:
                way()
                passes += 1
            if turn:
                took[name].append((time.perf_counter() - start) / passes)
    streamed.release()
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def table(run: dict[str, Any]) -> list[str]:
    """Lines of the table on the page about residency: nanoseconds for each value that is read."""
    lines = [
        "| samples | values of each | mapped | in memory | streamed | added up alone |",
        "|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        each = (
            row["seconds"][way] / row["samples"] / row["values"] * 1e9 for way in ("mapped", "host", "streamed", "bare")
        )
        lines.append(f"| {row['samples']:,} | {row['values']:,} | {' | '.join(f'{value:.2f}' for value in each)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the banks, which are removed; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width, samples in (*((WIDTH, number) for number in SAMPLES), *((width, SIXTEEN) for width in WIDTHS)):
        with tempfile.TemporaryDirectory(dir=options.out) as name:
            found = measured(written(Path(name) / "bank", width, samples), options.repeats)
        rows.append({"samples": samples, "values": width * width, "seconds": found})
        each = ", ".join(f"{way} {seconds / samples / width**2 * 1e9:.2f}" for way, seconds in found.items())
        print(f"{samples:,} samples of {width * width:,} values, ns a value: {each}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
