"""Coded banks: how fast samples are decoded, and what codecs and choices of few samples do to predictions.

    python benchmarks/codecs.py --out DIR --json benchmarks/results/codecs.json

DIR lies on the disk that is measured; what is written there is removed. Decoding is compared with reading the same
float32 rows from the disk, their pages given back before (`posix_fadvise`), and with `memcpy` of as many bytes; ways take
turns, and a figure is the median of the turns. Coded rows are in the page cache, as they are after the first pass over a bank that is a
quarter of the size; rows named "cold" are read from the disk too. Sizes and predictions are those of HMC on digits, and hang on no clock: `--parts` runs
one of the two and joins what the JSON file has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import bnn
from bnn import reduction
from bnn.bank import Bank, BankWriter
from bnn.bank.moving import thin
from bnn.cli.bench import machine
from bnn.data import load_data
from bnn.layout import layout_of
from bnn.modules import build
from bnn.types import make_block

CODECS = ("bf16", "fp16", "int8")
BLOCK = 64  # samples


def in_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each way; the first turn of all is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            seconds = way()
            if turn:
                took[name].append(seconds)
    return {name: statistics.median(found) for name, found in took.items()}


def dropped(folder: Path) -> None:
    """Give the pages of a bank's files back, so that the next read is from the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def blocks_of(bank: Bank) -> float:
    start = time.perf_counter()
    for _, block in bank.blocks(BLOCK):
        for tensor in block.params.values():
            tensor.view(-1)[::1024].sum()  # a value of each page, so that mapped ones are read
    return time.perf_counter() - start


def singles_of(bank: Bank, order: list[int]) -> float:
    start = time.perf_counter()
    for index in order:
        for tensor in bank[index].values():
            tensor.view(-1)[::1024].sum()
    return time.perf_counter() - start


def reading(folder: Path, buffer: np.ndarray) -> float:
    """Seconds of plain reads of the shards into one buffer of memory, from the disk."""
    dropped(folder)
    view, start = memoryview(buffer), time.perf_counter()
    for path in sorted(folder.glob("main-*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [view]):
            pass
        os.close(descriptor)
    return time.perf_counter() - start


def copying(source: torch.Tensor, target: torch.Tensor, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        target.copy_(source)
    return time.perf_counter() - start


def speeds(out: Path, width: int, size: int, repeats: int) -> list[dict[str, Any]]:
    """Blocks and single samples of each codec, beside float32 from the disk and from memory."""
    layout = layout_of(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)))
    folder = out / f"plain-{width}"
    writer, source = BankWriter(folder, layout=layout, config={}), torch.Generator().manual_seed(0)
    for start in range(0, size, BLOCK):
        index = torch.arange(start, min(start + BLOCK, size))
        flat = torch.randn(len(index), layout.num_values, generator=source)
        writer.append(make_block(layout.unflatten(flat), chain=index * 0, draw=index))
    writer.close()
    plain = Bank.open(folder, verify="never")
    coded = {codec: reduction.cast(plain, out / f"{codec}-{width}", codec=codec) for codec in CODECS}
    banks = {codec: Bank.open(bank.path, verify="never") for codec, bank in coded.items() if bank.path is not None}
    order = torch.randperm(size, generator=source)[: min(size, 512)].tolist()
    buffer, num_bytes = np.empty(8 * 2**20, dtype=np.uint8), size * layout.num_bytes
    memory = torch.empty(2, min(size, BLOCK), layout.num_values)

    def cold(bank: Bank, read: Callable[[Bank], float]) -> float:
        assert bank.path is not None
        bank.release()
        dropped(bank.path)
        return read(bank)

    ways: dict[str, Callable[[], float]] = {
        "read, float32, cold": lambda: reading(folder, buffer),
        "blocks, float32, cold": lambda: cold(plain, blocks_of),
        "blocks, memcpy": lambda: copying(memory[0], memory[1], -(-size // BLOCK)),
        "singles, float32, cold": lambda: cold(plain, lambda bank: singles_of(bank, order)),
        "singles, float32": lambda: singles_of(plain, order),
    }
    for codec, bank in banks.items():
        ways[f"blocks, {codec}"] = lambda bank=bank: blocks_of(bank)
        ways[f"blocks, {codec}, cold"] = lambda bank=bank: cold(bank, blocks_of)
        ways[f"singles, {codec}"] = lambda bank=bank: singles_of(bank, order)
    took = in_turns(ways, repeats)
    for codec, bank in banks.items():  # what was timed is right
        values, original = bank.block(slice(0, 3)).params["0.weight"], plain.block(slice(0, 3)).params["0.weight"]
        assert float((values - original).abs().max()) < 0.05, codec
    rows = []
    for name, seconds in took.items():
        done = len(order) * layout.num_bytes if name.startswith("singles") else num_bytes
        rival = took["read, float32, cold"] / num_bytes * done
        rows.append(
            {"values": layout.num_values, "way": name, "seconds": seconds, "bytes": done, "ratio": rival / seconds}
        )
        print(
            f"{rival / seconds:6.2f} of the speed of cold float32: P={layout.num_values:,} {name}, {done / seconds / 1e6:,.0f} MB/s"
        )
    return rows


def table(run: dict[str, Any]) -> list[str]:
    """Lines of the table on the page about smaller banks: times as fast as float32 rows come from the disk."""
    of = {(row["values"], row["way"]): row["ratio"] for row in run["rows"]}
    lines = [
        "| values | | float32, cold | bf16 | fp16 | int8 | int8, cold | copied in memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for values in sorted({values for values, _ in of}):
        for kind in ("blocks", "singles"):
            ways = ("float32, cold", "bf16", "fp16", "int8", "int8, cold", "memcpy")
            cells = [f"{of[values, f'{kind}, {way}']:.2f}" if (values, f"{kind}, {way}") in of else "" for way in ways]
            lines.append(f"| {values:,} | {kind} | {' | '.join(cells)} |")
    return lines


def granularity(bank: Bank) -> dict[str, dict[str, float]]:
    """What int8 would do with a scale for each number, row of a weight, or tensor: bytes once, and errors in standard deviations."""
    found = {}
    block = bank.block(slice(0, len(bank)))
    for way in ("number", "row", "tensor"):
        largest, squares, num_scales = 0.0, 0.0, 0
        for values in block.params.values():
            centred = values.double() - values.double().mean(dim=0)
            scale = centred.abs().amax(dim=0) / 127  # [*shape]
            if way == "tensor" or scale.dim() < 2:
                scale = scale if way == "number" else scale.max()
            elif way == "row":
                scale = scale.flatten(1).amax(dim=1).view(-1, *[1] * (scale.dim() - 1))
            num_scales += scale.numel()
            error = (centred - scale * (centred / scale).round()) / centred.std(dim=0, correction=0)
            largest, squares = max(largest, float(error.abs().max())), squares + float(error.square().mean(dim=0).sum())
        root = (squares / bank.layout.num_values) ** 0.5
        found[way] = {"bytes": 2 * num_scales, "largest": largest, "root_mean_square": root}
        print(f"a scale a {way}: errors of {root:.3g} standard deviations, at most {largest:.3g}")
    return found


def predictions(out: Path, samples: int, keeps: tuple[int, ...]) -> dict[str, Any]:
    """Certificates of codecs, and choices of few samples judged on rows that they never saw."""
    data = load_data("digits")
    likelihood = bnn.likelihoods.Categorical()
    module = build("mlp:32", input_shape=data.input_shape, num_outputs=data.num_outputs, seed=0)
    model = bnn.BayesianModel(module, prior=bnn.priors.FanIn(), likelihood=likelihood, num_data=len(data.train.y))
    bank = bnn.fit(
        model,
        data.train,
        method=bnn.inference.HMC(num_chains=4, num_warmup=200),
        num_samples=samples,
        out=out / "digits",
    )
    net = bnn.FunctionalModel(module, bank).settled()
    x = data.test.x
    found: dict[str, Any] = {"samples": samples, "values": bank.layout.num_values, "codecs": {}, "few": []}

    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors") if not path.name.startswith("state"))

    found["bytes"], found["scales_of_int8"] = size(out / "digits"), granularity(bank)
    for codec in CODECS:
        small = reduction.cast(bank, out / codec, codec=codec, net=net, x=x)
        said = small.info["codec"]
        found["codecs"][codec] = {"bytes": size(out / codec), "errors": said["errors"], **said["predictive"]}
        print(codec, found["codecs"][codec])
    probe, fresh = x[::2], x[1::2]  # the rows that judge have no part in choice or certificate
    whole = bnn.predict(net, fresh)
    for keep in keeps:
        few = {
            "best": reduction.thin(bank, out / f"best-{keep}", best=keep, net=net, x=probe),
            "plain": thin(bank, out / f"plain-{keep}", every=samples // keep),
        }
        row = {"samples": keep} | {
            way: reduction.compare(whole, bnn.predict(bnn.FunctionalModel(module, each).settled(), fresh))
            for way, each in few.items()
        }
        row["said"] = few["best"].info["thinned"]["kl"]
        row["ratio"] = row["plain"]["kl"]["mean"] / row["best"]["kl"]["mean"]
        found["few"].append(row)
        print(f"{row['ratio']:6.2f} times the KL of the best {keep} has plain thinning, on {len(fresh)} other rows")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder on the disk to measure; a temporary one by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=400, help="of HMC on digits")
    parser.add_argument("--parts", nargs="+", choices=("speeds", "predictions"), default=("speeds", "predictions"))
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine()}
    if options.json is not None and options.json.exists():
        found = {**json.loads(options.json.read_text()), **found}
    with tempfile.TemporaryDirectory(dir=options.out) as name:
        if "speeds" in options.parts:
            found["rows"] = []
            for width, size in ((90, 8192), (812, 256), (3300, 16)):
                found["rows"] += speeds(Path(name), width, size, options.repeats)
        if "predictions" in options.parts:
            found["digits"] = predictions(Path(name), options.samples, (10, 20, 40, 80))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
