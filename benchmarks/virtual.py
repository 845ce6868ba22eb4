"""What does a sample of a virtual bank cost? Against a bare `torch.randn` of its size, and reading it from a mapped bank."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Pair, report
from torch import nn

import bnn
from bnn.bank import Bank, materialise
from bnn.seeding import generator
from bnn.types import Method

WIDTHS = {10_000: 100, 100_000: 316, 1_000_000: 1000, 11_000_000: 3316}  # P about -> width of two square layers
VALUES_A_ROUND = 2_000_000  # drawn between two looks at the clock, but at least 2 samples
ROUNDS = 9
BLOCK = 16  # samples
FULL_RANK, RANK = 2_000, 10


def module_of(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width // 2), nn.Tanh(), nn.Linear(width // 2, width))


def fitted(module: nn.Module, method: Method, out: Path, num_samples: int) -> Bank:
    width = module[0].in_features  # type: ignore[index, union-attr]
    likelihood, prior = bnn.likelihoods.Gaussian(1.0), bnn.priors.FanIn()
    model = bnn.BayesianModel(module, prior=prior, likelihood=likelihood, num_data=2)
    data = torch.zeros(2, width), torch.zeros(2, width)
    return bnn.fit(model, data, method=method, num_samples=num_samples, out=out, virtual=True, progress=False)


def least(calls: dict[str, Callable[[int], Any]], num: int) -> dict[str, float]:
    """Microseconds a call of each, the least of rounds in which they take turns: what else runs only adds to it."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for index in range(num):
                call(index)
            found[name] = min(found[name], (time.perf_counter() - start) / num * 1e6)
    return found


def touched(params: dict[str, torch.Tensor]) -> None:
    """Read every byte, as whoever uses the sample would: a mapped one is only then there."""
    for tensor in params.values():
        tensor.sum()


def compare(what: str, bank: Bank, plain: Bank | None) -> list[Pair]:
    """Microseconds a sample, alone and in a block, and those of a read where there is a bank to read."""
    size, source = bank.layout.num_values, generator(0)
    num = max(2, min(len(bank), VALUES_A_ROUND // size))
    ones = least({"ours": bank.__getitem__, "bare": lambda _: torch.randn(size, generator=source)}, num)
    blocks = least(
        {"ours": lambda _: bank.block(slice(BLOCK)), "bare": lambda _: torch.randn(BLOCK, size, generator=source)},
        max(1, num // BLOCK),
    )
    randn = f"torch.randn, P = {size:,}"
    pairs = [
        Pair(f"{what}, one", randn, ones["ours"], ones["bare"]),
        Pair(f"{what}, {BLOCK} at once", f"{randn}, {BLOCK} at once", blocks["ours"] / BLOCK, blocks["bare"] / BLOCK),
    ]
    if plain is not None:
        reads = least({"ours": lambda i: touched(bank[i]), "mapped": lambda i: touched(plain[i])}, num)
        pairs.append(Pair(f"{what}, one made and read", "one mapped and read", reads["ours"], reads["mapped"]))
        for index in (0, num - 1):
            assert all(torch.equal(value, plain[index][name]) for name, value in bank[index].items())
    return pairs


def parts(bank: Any) -> list[Pair]:
    """Where the time of a small sample of mean-field goes, beside the bare normals."""
    draws, size = bank._draws, bank.layout.num_values
    row, source = torch.randn(size), torch.Generator()
    values = row.numpy()
    calls: dict[str, Callable[[int], Any]] = {
        "seed": draws._source,
        "product and sum": lambda _: draws._scale(values, False, slice(None), out=values),
        "a tensor for each entry": lambda _: draws.space.values(row),
        "bare": lambda _: torch.randn(size, generator=source),
    }
    took = least(calls, VALUES_A_ROUND // size)
    randn = f"part of torch.randn, P = {size:,}"
    return [Pair(f"mean-field, {name}", randn, took[name], took["bare"]) for name in calls if name != "bare"]


def table(run: dict[str, Any]) -> list[str]:
    """Lines of the table on the page about virtual banks: what a sample costs, and the speed beside `torch.randn`."""
    lines = [
        "| family | values | alone, us | of `torch.randn` | 16 at once, us | of `torch.randn` |",
        "|---|---|---|---|---|---|",
    ]
    pairs = [row for row in run["rows"] if row["rival"].startswith("torch.randn")]
    for one, many in zip(pairs[::2], pairs[1::2], strict=True):
        cells = [f"{row['our_cost']:,.0f} | {row['ratio']:.2f}" for row in (one, many)]
        lines.append(f"| {one['ours'].split(',')[0]} | {one['rival'].split(' = ')[1]} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    pairs: list[Pair] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for size, width in WIDTHS.items():
            num = max(BLOCK, min(320, 2 * VALUES_A_ROUND // size))
            guide = bnn.inference.Guide("mean-field", num_steps=1)
            bank = fitted(module_of(width), guide, place / f"{size}", num)
            plain = materialise(bank, place / f"plain-{size}") if size <= 1_000_000 else None
            pairs += compare("mean-field", bank, plain)
            pairs += parts(bank) if size == min(WIDTHS) else []
        for family, size in (("low-rank", 10_000), ("low-rank", 1_000_000), ("full-rank", FULL_RANK)):
            width = WIDTHS.get(size, 44)
            guide = bnn.inference.Guide(family, num_steps=1, rank=RANK)
            pairs += compare(family, fitted(module_of(width), guide, place / f"{family}-{size}", 320), None)
        prior = bnn.inference.Prior()
        pairs += compare("prior", fitted(module_of(WIDTHS[10_000]), prior, place / "prior", 320), None)
    report("microseconds a sample of a virtual bank", pairs, "us")


if __name__ == "__main__":
    main()
