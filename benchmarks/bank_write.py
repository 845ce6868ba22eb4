"""Writing, opening and verifying a bank, beside the bare calls that no bank can do without.

    python benchmarks/bank_write.py --out DIR --json benchmarks/results/bank_write.json

DIR lies on the disk that is measured; what is written there is removed. Ways take turns, and a figure is the median
of the turns. A write is compared with `os.write` and `os.fsync` of the same bytes, verification with `hashlib.sha256`
of the same files from the page cache, opening with one `os.stat` a shard, and commits with the same run of HMC that
commits only at its end; the share of the time that the sampler waits for its writer is told beside, for two such runs
differ by more than a commit costs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnn
from bnn.bank import Bank, BankWriter, verify_files, writer
from bnn.cli.bench import machine
from bnn.fitting import fit
from bnn.inference import HMC
from bnn.layout import Layout, layout_of
from bnn.types import Block, make_block

CHUNK = 8 * 2**20


def module_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def rows_of(layout: Layout, size: int) -> Block:
    flat = torch.randn(size, layout.num_values, generator=torch.Generator().manual_seed(0))
    return make_block(layout.unflatten(flat), chain=torch.zeros(size), draw=torch.arange(size))


def in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; the first turn of all is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            seconds = way()
            if turn:
                took[name].append(seconds)
    return {name: statistics.median(found) for name, found in took.items()}


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write(out: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """A bank of full shards against a file of as many bytes."""
    layout = layout_of(module_of(500))
    block = rows_of(layout, 64)
    blocks = max(1, megabytes * 2**20 // (64 * layout.num_bytes))
    payload = memoryview(torch.randn(16 * 2**20).numpy()).cast("B")  # random, as weights are
    target, num_bytes = out / "bank", 0

    def ours() -> float:
        nonlocal num_bytes
        start = time.perf_counter()
        bank_writer = BankWriter(target, layout=layout, config={}, overwrite=target.exists())
        for _ in range(blocks):
            bank_writer.append(block)
        bank_writer.close()
        took = time.perf_counter() - start
        num_bytes = sum(path.stat().st_size for path in target.iterdir())
        shutil.rmtree(target)
        return took

    def bare() -> float:
        def run() -> None:
            left, number = num_bytes, 0
            while left > 0:
                size = min(left, 256 * 2**20)
                descriptor = os.open(out / f"bare-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                for start in range(0, size, CHUNK):
                    begin = start % (len(payload) - CHUNK)
                    os.write(descriptor, payload[begin : begin + min(CHUNK, size - start)])
                os.fsync(descriptor)
                os.close(descriptor)
                left, number = left - size, number + 1

        took = timed(run)
        for path in out.glob("bare-*"):
            path.unlink()
        return took

    took = in_turns({"bnn": ours, "os.write and fsync": bare}, repeats)
    return _row("write with fsync", took, num_bytes)


def verify(out: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """`verify --full` against sha256 of the same files."""
    layout = layout_of(module_of(500))
    block = rows_of(layout, 64)
    bank_writer = BankWriter(out / "bank", layout=layout, config={})
    for _ in range(max(1, megabytes * 2**20 // (64 * layout.num_bytes))):
        bank_writer.append(block)
    bank_writer.close()
    files = sorted((out / "bank").glob("main-*.safetensors"))

    def bare() -> None:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(CHUNK):
                    digest.update(piece)

    def ours() -> None:
        assert verify_files(out / "bank") == []

    took = in_turns({"bnn": lambda: timed(ours), "hashlib.sha256": lambda: timed(bare)}, repeats)
    num_bytes = sum(path.stat().st_size for path in files)
    shutil.rmtree(out / "bank")
    return _row("verify --full", took, num_bytes)


def opening(out: Path, shards: int, rows: int, repeats: int) -> dict[str, Any]:
    """Opening a bank of many shards without checksums against a stat of each."""
    layout = layout_of(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    bank_writer = BankWriter(out / "bank", layout=layout, config={})
    bank_writer._capacity = rows // shards  # as commits by time would leave them
    bank_writer.append(rows_of(layout, rows))
    bank_writer.close()
    files = sorted((out / "bank").glob("main-*.safetensors"))
    assert len(files) == shards

    def ours() -> None:
        assert len(Bank.open(out / "bank", verify="never")) == rows

    def bare() -> None:
        for path in files:
            os.stat(path)

    took = in_turns({"bnn": lambda: timed(ours), "os.stat": lambda: timed(bare)}, repeats)
    shutil.rmtree(out / "bank")
    return _row(f"open {shards} shards of {rows:,} samples", took, None)


def commits(out: Path, seconds: float, repeats: int) -> dict[str, Any]:
    """A run of HMC with a commit every ten seconds against the same run with one at its end."""
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    model = bnn.BayesianModel(
        nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1)),
        prior=bnn.priors.Normal(), likelihood=bnn.likelihoods.Gaussian(0.5), num_data=200,
    )  # fmt: skip
    data = (x, x[:, :1].sin())
    method = HMC(
        num_chains=4,
        num_warmup=0,
        num_steps=16,
        trajectory="fixed",
        step_size=1e-3,
        init="module",
        compile=False,  # by rule long runs are compiled and short ones are not, and the rate is taken from short ones
    )

    def trial_of(size: int) -> float:
        took = timed(lambda: fit(model, data, method=method, num_samples=size, out=out / "trial", progress=False))
        shutil.rmtree(out / "trial")
        return took

    few = trial_of(1000)
    rate = 4000 / max(trial_of(5000) - few, 1e-3)  # of the later ones: what a run begins with is no sampling
    samples = int(rate * max(seconds - few, 1.0)) // 4 * 4

    inside = 0.0  # seconds that the sampler waited for the writer

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def timed_method(*args: Any, **options: Any) -> Any:
            nonlocal inside
            start = time.perf_counter()
            try:
                return method(*args, **options)
            finally:
                inside += time.perf_counter() - start

        return timed_method

    def run(row_seconds: float) -> float:
        nonlocal inside
        inside = 0.0
        before = writer.ROW_SECONDS, writer.STATE_SECONDS, BankWriter.append
        writer.ROW_SECONDS, writer.STATE_SECONDS = row_seconds, max(row_seconds, 30.0)
        BankWriter.append = counted(BankWriter.append)  # type: ignore[method-assign]
        try:
            return timed(
                lambda: fit(
                    model, data, method=method, num_samples=samples, out=out / "bank", overwrite=True, progress=False
                )
            )
        finally:
            writer.ROW_SECONDS, writer.STATE_SECONDS, BankWriter.append = before  # type: ignore[method-assign]

    shares: list[float] = []

    def ours() -> float:
        took = run(10.0)
        shares.append(inside / took)
        return took

    took = in_turns({"bnn": ours, "one commit at the end": lambda: run(1e9)}, repeats)
    shutil.rmtree(out / "bank")
    assert took["bnn"] > 30, f"{took['bnn']:.0f} s of sampling have too few commits to tell what one costs"
    share = statistics.median(shares)
    print(f"{share:6.2%} of that time in the writer")
    return _row(f"HMC of {samples:,} samples, a commit every 10 s", took, None) | {"share_of_time": share}


def _row(question: str, took: dict[str, float], num_bytes: int | None) -> dict[str, Any]:
    ours, (rival, theirs) = took["bnn"], next(item for item in took.items() if item[0] != "bnn")
    row = {"question": question, "seconds": ours, "rival": rival, "rival_seconds": theirs, "ratio": theirs / ours}
    speed = "" if num_bytes is None else f", {num_bytes / ours / 1e6:,.0f} and {num_bytes / theirs / 1e6:,.0f} MB/s"
    print(
        f"{theirs / ours:6.2f} of the speed of {rival}: {question}, {ours * 1e3:,.1f} and {theirs * 1e3:,.1f} ms{speed}"
    )
    return row | ({} if num_bytes is None else {"bytes": num_bytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder on the disk to measure; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=45.0, help="of a run of HMC, more than 30")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        folder = Path(name)
        rows = [
            opening(folder, 500, 32_000, options.repeats * 4),
            verify(folder, options.megabytes, options.repeats),
            write(folder, options.megabytes, options.repeats),
            commits(folder, options.seconds, max(options.repeats // 2, 1)),
        ]
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
