"""Reading the samples of a bank, beside the ways that people keep samples, and beside bare reads and copies.

    python benchmarks/bank_read.py --out DIR --json benchmarks/results/bank_read.json

DIR lies on the disk that is measured and needs about 6 GB; what is written there is removed. Ways take turns, and a
figure is the median of the turns. Of random samples two figures are told: `hand out` gives the tensors of a sample, and
`read` adds up every value of them, which is what any use does at least. Files are in the page cache there: the bank and
NumPy's file were dropped from it and read once, each through its own map, for how pages came there decides what a map
of them costs. `mapped, room for all` has a budget for the whole bank, as NumPy's map has. Cold reading drops the files
first (posix_fadvise), on both sides; bare reads go through the page cache, as those of `dd` do. HDF5 takes `pip install h5py`; without it the row
is left out, and the JSON says so. With `--device cuda` the rows of a device are measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from bnn.bank import Bank, BankWriter
from bnn.cli.bench import machine
from bnn.layout import layout_of
from bnn.types import make_block

try:
    import h5py
except ImportError:
    h5py = None  # type: ignore[assignment]

PIECE = 4 * 2**20
SHARD_BYTES = 32 * 2**20


class Size(NamedTuple):
    """A module, and how many samples of it."""

    name: str
    widths: tuple[int, ...]
    samples: int


SIZES = (
    Size("9,000", (64, 64, 64, 10), 4096),
    Size("670,000", (784, 600, 300, 60, 10), 512),
    Size("11 million", (600,) * 31, 40),
)


class Kept(NamedTuple):
    """The same samples in every form."""

    folder: Path
    size: Size
    places: list[tuple[str, int, int, tuple[int, ...]]]  # of each tensor in a flat sample: name, begin, end, shape
    num_values: int
    order: list[int]

    @property
    def row_bytes(self) -> int:
        return 4 * self.num_values


def module_of(size: Size) -> nn.Module:
    layers: list[nn.Module] = []
    for first, second in zip(size.widths[:-1], size.widths[1:], strict=True):
        layers += [nn.Linear(first, second), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def keep(folder: Path, size: Size) -> Kept:
    """Write the samples: a bank, a file each for torch.load and safetensors, a matrix for NumPy and HDF5."""
    layout = layout_of(module_of(size))
    source = torch.Generator().manual_seed(0)
    rows = max(SHARD_BYTES // layout.num_bytes, 1)
    writer = BankWriter(folder / "bank", layout=layout, config={}, shard_rows=rows)
    matrix = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (size.samples, layout.num_values))
    table = None
    if h5py is not None:
        file = h5py.File(folder / "rows.h5", "w")
        table = file.create_dataset(
            "rows", (size.samples, layout.num_values), np.float32, chunks=(1, layout.num_values)
        )
    for first in range(0, size.samples, rows):
        count = min(rows, size.samples - first)
        flat = torch.randn(count, layout.num_values, generator=source)
        block = make_block(layout.unflatten(flat), chain=torch.zeros(count), draw=torch.arange(first, first + count))
        writer.append(block)
        matrix[first : first + count] = flat.numpy()
        if table is not None:
            table[first : first + count] = flat.numpy()
        for place in range(count):
            one = {name: tensor[place].clone() for name, tensor in block.params.items()}
            torch.save(one, folder / f"{first + place}.pt")
            safetensors.torch.save_file(one, folder / f"{first + place}.safetensors")
    writer.close()
    matrix.flush()
    if table is not None:
        file.close()
    order = torch.randperm(size.samples, generator=source).tolist()
    ends = np.cumsum([entry.numel for entry in layout.entries]).tolist()
    places = [(e.name, end - e.numel, end, e.shape) for e, end in zip(layout.entries, ends, strict=True)]
    return Kept(folder, size, places, layout.num_values, order)


def split(kept: Kept, row: Tensor) -> dict[str, Tensor]:
    """The tensors of a flat sample, as views."""
    return {name: row[begin:end].view(shape) for name, begin, end, shape in kept.places}


def forget(files: Iterable[Path]) -> None:
    """Drop files from the page cache."""
    os.sync()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


Way = Callable[[int], dict[str, Tensor]]


def ways_of(kept: Kept) -> dict[str, Way]:
    """Ways to get sample i."""
    folder = kept.folder
    forget([*(folder / "bank").glob("main-*.safetensors"), folder / "rows.npy"])
    mapped, roomy = Bank.open(folder / "bank"), Bank.open(folder / "bank", host_budget="8GB")
    streamed = Bank.open(folder / "bank", residency="streamed", host_budget="8GB")
    for bank in (mapped, roomy, streamed):  # every shard is read and checked once
        for _ in bank.blocks(64):
            pass
    matrix = np.asarray(np.load(folder / "rows.npy", mmap_mode="c"))
    for row in matrix:
        row.sum()
    held = [{name: tensor.clone() for name, tensor in mapped[index].items()} for index in range(kept.size.samples)]
    whole = torch.from_numpy(np.load(folder / "rows.npy"))
    spare = torch.empty(kept.num_values)

    def by_safetensors(index: int) -> dict[str, Tensor]:
        with safe_open(folder / f"{index}.safetensors", framework="pt") as file:
            return {name: file.get_tensor(name) for name, *_ in kept.places}

    ways: dict[str, Way] = {
        "bnn, mapped": mapped.__getitem__,
        "bnn, mapped, room for all": roomy.__getitem__,
        "bnn, host": Bank.open(folder / "bank", residency="host").__getitem__,
        "bnn, streamed": streamed.__getitem__,
        "NumPy memmap": lambda index: split(kept, torch.from_numpy(matrix[index])),
        "list of state dicts": lambda index: held[index],
        # files that this benchmark has just written
        "torch.load a sample": lambda index: torch.load(folder / f"{index}.pt", weights_only=True),
        "safetensors.safe_open a sample": by_safetensors,
        "plain copy": lambda index: split(kept, spare.copy_(whole[index])),
    }
    if h5py is not None:
        table = h5py.File(folder / "rows.h5", "r")["rows"]
        ways["HDF5, a chunk a sample"] = lambda index: split(kept, torch.from_numpy(table[index]))
    return ways


def random_samples(kept: Kept, repeats: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Samples at random, in the page cache."""
    ways = ways_of(kept)
    expected = ways["list of state dicts"](kept.order[0])
    for name, way in ways.items():  # which is also what warms them
        found = way(kept.order[0])
        assert all(torch.equal(found[key], value) for key, value in expected.items()), name

    def handed(way: Way) -> Callable[[int], Any]:
        return way

    def read(way: Way) -> Callable[[int], Any]:
        return lambda index: [float(tensor.sum()) for tensor in way(index).values()]

    for question, made in (("hand out", handed), ("read", read)):
        took: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(repeats + 1):
            for name, way in ways.items():
                run, count = made(way), 0
                start = time.perf_counter()
                while (passed := time.perf_counter() - start) < seconds or count < 3:
                    run(kept.order[count % len(kept.order)])
                    count += 1
                if turn:
                    took[name].append(count / passed)
        yield from _rows(
            f"random samples, {question}", kept, {name: statistics.median(of) for name, of in took.items()}
        )


def cold(kept: Kept, repeats: int) -> Iterator[dict[str, Any]]:
    """The whole bank from first to last, from the disk."""
    files = sorted((kept.folder / "bank").glob("main-*.safetensors"))
    buffer = bytearray(PIECE)

    def bare() -> None:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            while os.readv(descriptor, [buffer]):
                pass
            os.close(descriptor)

    def streamed(verify: Any) -> Callable[[], None]:
        def run() -> None:
            bank = Bank.open(kept.folder / "bank", verify=verify, residency="streamed", host_budget="320MB")
            assert sum(block.num_samples for _, block in bank.blocks(64)) == kept.size.samples
            bank.release()

        return run

    def mapped() -> None:
        bank = Bank.open(kept.folder / "bank", verify="never")
        for _, block in bank.blocks(64):
            for tensor in block.params.values():
                tensor.sum()

    ways = {
        "bnn, streamed": streamed("never"),
        "bnn, streamed, checked": streamed("first-use"),
        "bnn, mapped": mapped,
        "bare reads": bare,
    }
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            forget(files)
            start = time.perf_counter()
            way()
            if turn:
                took[name].append(kept.size.samples / (time.perf_counter() - start))
    yield from _rows("cold, first to last", kept, {name: statistics.median(of) for name, of in took.items()})


PEAK = """
import sys, torch, bnn
from bnn.bank import Bank

def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(next(line.split()[1] for line in file if line.startswith("VmHWM")))

bank = Bank.open(sys.argv[1], residency="streamed", host_budget=int(sys.argv[2]))
torch.zeros(10).sum()
before = peak()
sampler = bnn.SampleIndexSampler(bank, window=1)
bank.follow(sampler)
for index in sampler:
    for tensor in bank[index].values():
        tensor.sum()
print(peak() - before)
"""


def memory(kept: Kept) -> dict[str, Any]:
    """Peak resident memory of an epoch in a process of its own, above what it had before the first sample."""
    files = list((kept.folder / "bank").glob("main-*.safetensors"))
    total, largest = sum(f.stat().st_size for f in files), max(f.stat().st_size for f in files)
    budget = max(total // 10, 2 * largest + 8192)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(kept.folder / "bank"), str(budget)], capture_output=True, text=True, check=True
    )
    row = {
        "question": "memory of an epoch", "values": kept.num_values, "bank_bytes": total, "budget": budget,
        "peak_bytes": int(done.stdout), "within": int(done.stdout) <= budget + 200_000_000,
    }  # fmt: skip
    print(
        f"  {row['peak_bytes'] / 1e6:,.0f} MB for an epoch over {total / 1e6:,.0f} MB with a budget of {budget / 1e6:,.0f} MB"
    )
    return row


def on_device(kept: Kept, repeats: int, device: str) -> Iterator[dict[str, Any]]:
    """Blocks of a bank on a device against its own copies, and streaming against bare pinned copies."""
    bank = Bank.open(kept.folder / "bank", residency="device", device=device)
    flat = torch.empty(kept.size.samples, kept.num_values, device=device)
    chosen = torch.tensor(kept.order[: max(kept.size.samples // 4, 1)])
    target, picked = torch.empty(len(chosen), kept.num_values, device=device), flat[: len(chosen)]

    def timed(run: Callable[[], Any]) -> float:
        found = []
        for turn in range(repeats + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if turn:
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    speeds = {
        "bnn, on the device": len(chosen) / timed(lambda: bank.block(chosen)),
        "device copy": len(chosen) / timed(lambda: target.copy_(picked)),
    }
    yield from _rows("blocks on the device", kept, speeds)
    shards = [file.stat().st_size for file in sorted((kept.folder / "bank").glob("main-*.safetensors"))]
    pinned, slot = (
        torch.empty(max(shards), dtype=torch.uint8, pin_memory=True),
        torch.empty(max(shards), dtype=torch.uint8, device=device),
    )
    streamed = Bank.open(
        kept.folder / "bank",
        verify="never",
        residency="streamed",
        device=device,
        device_budget=4 * (max(shards) + 4096),
    )

    def copies() -> None:
        for size in shards:
            slot[:size].copy_(pinned[:size], non_blocking=True)

    speeds = {
        "bnn, streamed": kept.size.samples / timed(lambda: sum(b.num_samples for _, b in streamed.blocks(64))),
        "pinned copies": kept.size.samples / timed(copies),
    }
    streamed.release()
    yield from _rows("streaming to the device", kept, speeds)


def _rows(question: str, kept: Kept, speeds: dict[str, float]) -> Iterator[dict[str, Any]]:
    ours = {name: speed for name, speed in speeds.items() if name.startswith("bnn")}
    for mine, speed in ours.items():
        for rival, other in speeds.items():
            if rival not in ours:
                gigabytes = speed * kept.row_bytes / 1e9
                print(
                    f"  {speed / other:8.2f} times as fast: {question}, {mine} as {rival} ({speed:,.0f} and {other:,.0f} a second, {gigabytes:.2f} GB/s)"
                )
                yield {
                    "question": question, "values": kept.num_values, "ours": mine, "rival": rival,
                    "ours_per_second": speed, "rival_per_second": other, "ratio": speed / other,
                    "ours_gigabytes_per_second": gigabytes,
                }  # fmt: skip


def table(run: dict[str, Any]) -> list[str]:
    """Lines of the table on the page about residency."""
    lines = [
        "| values | cold pass, streamed | checked | cold pass, mapped | random, mapped | room for all | beside `torch.load`, handed out | read "
        "| memory of an epoch, of its budget |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for values in dict.fromkeys(row["values"] for row in run["rows"]):
        of = {
            (row["question"], row["ours"].removeprefix("bnn, "), row["rival"]): row["ratio"]
            for row in run["rows"]
            if row["values"] == values and "ratio" in row
        }
        epoch = next(row for row in run["rows"] if row["values"] == values and row["question"] == "memory of an epoch")
        keys = [
            *(("cold, first to last", way, "bare reads") for way in ("streamed", "streamed, checked", "mapped")),
            *(("random samples, read", way, "NumPy memmap") for way in ("mapped", "mapped, room for all")),
            *((f"random samples, {what}", "mapped", "torch.load a sample") for what in ("hand out", "read")),
        ]
        held = f"{epoch['peak_bytes'] / 1e6:.0f} of {epoch['budget'] / 1e6:.0f} MB"
        lines.append(f"| {values:,} | {' | '.join(f'{of[key]:.2f}' for key in keys)} | {held} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder on the disk to measure; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each way in each turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1, 2], help="which of the three sizes")
    parser.add_argument("--small", action="store_true", help="an eighth of the samples, to try the script")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number in options.sizes:
        size = SIZES[number]
        if options.small:
            size = size._replace(samples=max(size.samples // 8, 3))
        print(f"{size.name} values, {size.samples} samples")
        with tempfile.TemporaryDirectory(dir=options.out) as name:
            kept = keep(Path(name), size)
            rows += cold(kept, options.repeats)
            rows.append(memory(kept))
            rows += random_samples(kept, options.repeats, options.seconds)
            if options.device != "cpu":
                rows += on_device(kept, options.repeats, options.device)
            with suppress(OSError):
                shutil.rmtree(kept.folder / "bank")
    if options.json is not None:
        left_out = [] if h5py is not None else ["HDF5: h5py is not installed"]
        found = {"machine": machine(), "left_out": left_out, "rows": rows}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
