"""bnn bench: throughput of a weight bank beside what people do without one."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from bnn.cli import common

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bnn.bank import Bank

NAMES = ("write", "read", "bank", "select", "apply", "train")
BLOCK = 25  # samples of a block in select and apply
SECONDS = 0.5  # of each measurement


class Setting(NamedTuple):
    """One weight bank and the same samples as people keep them without one."""

    module: nn.Module
    state_dicts: list[dict[str, Tensor]]
    bank: Bank
    folder: Path
    x: Tensor
    order: list[int]

    @property
    def num_bytes(self) -> int:
        return self.bank.layout.num_bytes


class Row(NamedTuple):
    """One comparison: samples a second of ours and of a rival."""

    name: str
    ours: str
    rival: str
    ours_per_second: float
    rival_per_second: float
    num_bytes: int  # of one sample

    @property
    def ratio(self) -> float:
        return self.ours_per_second / self.rival_per_second

    def to_dict(self) -> dict[str, Any]:
        gigabytes = self.ours_per_second * self.num_bytes / 1e9
        return {**self._asdict(), "ratio": self.ratio, "ours_gigabytes_per_second": gigabytes}


def bench(
    name: Annotated[
        str | None,
        typer.Argument(help="write, read, bank, select, apply or train; all by default.", show_default=False),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples in the bank.")] = 256,
    width: Annotated[int, typer.Option(help="Hidden width of the MLP 64-WIDTH-WIDTH-10.")] = 128,
    device: Annotated[str, typer.Option(help="Where 'apply' and 'train' compute: cpu, cuda.")] = "cpu",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the figures and the machine's description.", show_default=False),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(help="File of an earlier run: exit 1 if a ratio fell by more than a third.", show_default=False),
    ] = None,
    seed: common.Seed = 0,
    debug: common.Debug = False,
) -> int:
    """Measure weight-bank throughput beside param.data, load_state_dict and one torch.load a sample; ratios first."""
    del debug
    from bnn.errors import ConfigError, choose

    if name is not None:
        choose("bench", name, NAMES)
    if num_samples < BLOCK or width < 1:
        raise ConfigError(
            "bench",
            want=f"--num-samples of at least {BLOCK}, --width of at least 1",
            got=f"{num_samples}, {width}",
            fix="raise it",
        )
    common.check_device(device)
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"--json {json_file}", want="a folder that is there", got="none", fix="make it first")
    earlier = None if compare is None else _read_earlier(compare)
    with tempfile.TemporaryDirectory(prefix="bnn-bench-") as folder:
        setting = _prepare(Path(folder), num_samples, width, seed)
        rows = [row for chosen in NAMES if name in (None, chosen) for row in _MEASURES[chosen](setting, device)]
    _show(rows)
    if json_file is not None:
        found = {
            "machine": machine(),
            "num_samples": num_samples,
            "width": width,
            "device": device,
            "rows": [row.to_dict() for row in rows],
        }
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if earlier is None else _compare(rows, earlier)


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    import torch

    from bnn.machine import cpu

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def per_second(run: Callable[[], int]) -> float:
    """Samples a second of a function that handles some and returns how many: the median of several runs."""
    run()
    speeds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(speeds) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        count = run()
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)


def _prepare(folder: Path, num_samples: int, width: int, seed: int) -> Setting:
    import torch

    from bnn import modules
    from bnn.bank import Bank
    from bnn.seeding import generator

    module = modules.build(f"mlp:{width},{width}", input_shape=[64], num_outputs=10, seed=seed)
    source = generator(seed, "bench")
    named = dict(module.named_parameters())
    state_dicts = [
        {name: torch.randn(p.shape, generator=source) / p.shape[-1] ** 0.5 for name, p in named.items()}
        for _ in range(num_samples)
    ]
    for index, state_dict in enumerate(state_dicts):
        torch.save(state_dict, folder / f"{index}.pt")
    bank = Bank.from_state_dicts(state_dicts, module=module, out=folder / "bank")
    order = torch.randperm(num_samples, generator=source).tolist()
    return Setting(module, state_dicts, bank, folder, torch.randn(128, 64, generator=source), order)


def _write(setting: Setting, device: str) -> Iterator[Row]:
    del device
    import torch

    from bnn.bank import Bank

    runs = iter(range(10**9))

    def ours() -> int:
        Bank.from_state_dicts(setting.state_dicts, module=setting.module, out=setting.folder / f"w{next(runs)}")
        return len(setting.state_dicts)

    def rival() -> int:
        for index, state_dict in enumerate(setting.state_dicts):
            torch.save(state_dict, setting.folder / f"w{index}.pt")
        return len(setting.state_dicts)

    yield Row("write", "bank, fsynced", "torch.save a sample", per_second(ours), per_second(rival), setting.num_bytes)


def _read(setting: Setting, device: str) -> Iterator[Row]:
    del device
    import torch

    from bnn.bank import Bank

    bank = Bank.open(setting.folder / "bank")

    def touch(params: dict[str, Tensor]) -> float:
        return sum(float(tensor.sum()) for tensor in params.values())

    def ours() -> int:
        for index in setting.order:
            touch(bank[index])
        return len(setting.order)

    def rival() -> int:
        for index in setting.order:  # files that this benchmark has just written
            touch(torch.load(setting.folder / f"{index}.pt", weights_only=True))
        return len(setting.order)

    row = Row("read", "bank[i], mapped", "torch.load a sample", per_second(ours), per_second(rival), setting.num_bytes)
    _require(all(torch.equal(bank[7][name], setting.state_dicts[7][name]) for name in bank[7]))
    yield row


def _bank(setting: Setting, device: str) -> Iterator[Row]:
    del device
    from bnn.cli.bench_bank import works

    for work in works(setting.bank, setting.folder, setting.order):
        ours, rival = per_second(work.run), per_second(work.rival_run)
        yield Row("bank", work.ours, work.rival, ours, rival, setting.num_bytes)


def _select(setting: Setting, device: str) -> Iterator[Row]:
    del device
    import torch

    blocks = [setting.order[start : start + BLOCK] for start in range(0, len(setting.order) - BLOCK + 1, BLOCK)]

    def ours() -> int:
        for indices in blocks:
            setting.bank.block(indices)
        return BLOCK * len(blocks)

    def rival() -> int:
        for indices in blocks:
            for name in setting.state_dicts[0]:
                torch.stack([setting.state_dicts[index][name] for index in indices])
        return BLOCK * len(blocks)

    def views() -> int:
        for start in range(0, len(setting.order) - BLOCK + 1, BLOCK):
            setting.bank.block(slice(start, start + BLOCK))
        return BLOCK * len(blocks)

    slow = per_second(rival)
    label = "torch.stack of state dicts"
    yield Row("select", f"block of {BLOCK} at random", label, per_second(ours), slow, setting.num_bytes)
    yield Row("select", f"block of {BLOCK} neighbours", label, per_second(views), slow, setting.num_bytes)


def _apply(setting: Setting, device: str) -> Iterator[Row]:
    import copy

    import torch

    from bnn.functional import FunctionalModel

    x, module = setting.x.to(device), copy.deepcopy(setting.module).to(device)
    loop = FunctionalModel(setting.module, setting.bank, device=device, strategy="loop")
    auto = FunctionalModel(setting.module, setting.bank, device=device)
    on_device = [{name: tensor.to(device) for name, tensor in one.items()} for one in setting.state_dicts]
    stacked = {name: torch.stack([one[name] for one in on_device]) for name in on_device[0]}
    size = len(setting.state_dicts)

    @torch.no_grad()
    def by_index() -> int:
        for index in range(size):
            loop(x, index)
        return _synchronised(size, device)

    @torch.no_grad()
    def by_block() -> int:
        auto(x, slice(None))
        return _synchronised(size, device)

    @torch.no_grad()
    def vmapped() -> int:
        torch.func.vmap(lambda params: torch.func.functional_call(module, params, (x,)))(stacked)
        return _synchronised(size, device)

    @torch.no_grad()
    def assign() -> int:
        for state_dict in on_device:
            for name, parameter in module.named_parameters():
                parameter.data = state_dict[name]
            module(x)
        return _synchronised(size, device)

    @torch.no_grad()
    def load() -> int:
        for state_dict in on_device:
            module.load_state_dict(state_dict)
            module(x)
        return _synchronised(size, device)

    @torch.no_grad()
    def load_file() -> int:
        for index in range(size):  # files that this benchmark has just written
            module.load_state_dict(torch.load(setting.folder / f"{index}.pt", weights_only=True))
            module(x)
        return _synchronised(size, device)

    ours = {"loop": per_second(by_index), "auto": per_second(by_block)}
    rivals = {
        "param.data": per_second(assign),
        "load_state_dict": per_second(load),
        "stack_module_state and vmap": per_second(vmapped),
        "torch.load + load_state_dict": per_second(load_file),
    }
    with torch.no_grad():
        module.load_state_dict(on_device[3])
        _require(torch.allclose(loop(x, 3), module(x)) and torch.allclose(auto(x, [3, 5])[0], module(x), atol=1e-5))
    for mine, speed in ours.items():
        for rival, other in rivals.items():
            yield Row("apply", mine, rival, speed, other, setting.num_bytes)


def _train(setting: Setting, device: str) -> Iterator[Row]:
    """Batches a second of training the last layer, each batch under a sample of the rest."""
    import torch

    from bnn.cli.bench_train import FLOOR, arms, make_job

    x, y = setting.x.repeat(20, 1), torch.arange(20 * len(setting.x)) % 10
    job = make_job(setting.module, x, y, num_samples=len(setting.bank), batch_size=128, seed=0)
    ways = arms(job, device, folder=setting.folder / "train")

    def timed(way: str) -> Callable[[], int]:
        def epoch() -> int:
            ways[way]()
            return _synchronised(job.num_batches, device)

        return epoch

    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in job.mean.values())
    ours = per_second(timed("bnn, bank in memory"))
    for rival in (FLOOR, "sampled in collate_fn", "sampled in collate_fn, 2 workers", "param.data of kept samples"):
        yield Row("train", "PairedLoader, a sample a batch", rival, ours, per_second(timed(rival)), num_bytes)


_MEASURES: dict[str, Callable[[Setting, str], Iterator[Row]]] = {
    "write": _write,
    "read": _read,
    "bank": _bank,
    "select": _select,
    "apply": _apply,
    "train": _train,
}


def _synchronised(count: int, device: str) -> int:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return count


def _require(holds: bool) -> None:
    if not holds:
        raise RuntimeError("bench: the two ways gave different results")


def _show(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("ratio", "", "ours", "rival"):
        table.add_column(title, justify="right" if title == "ratio" else "left")
    for title in ("samples/s", "GB/s", "rival samples/s"):
        table.add_column(title, justify="right")
    for row in rows:
        gigabytes = row.ours_per_second * row.num_bytes / 1e9
        table.add_row(
            f"{row.ratio:.1f}" if row.ratio >= 1 else f"{row.ratio:.2g}",
            row.name,
            row.ours,
            row.rival,
            f"{row.ours_per_second:,.0f}",
            f"{gigabytes:.2f}",
            f"{row.rival_per_second:,.0f}",
        )
    Console(highlight=False, markup=False, width=None if Console().is_terminal else 140).print(table)


def _read_earlier(path: Path) -> dict[tuple[str, str, str], float]:
    from bnn.errors import ConfigError

    try:
        found = json.loads(path.read_text())
        return {(row["name"], row["ours"], row["rival"]): float(row["ratio"]) for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--compare {path}",
            want="a file that --json wrote",
            got=f"{type(error).__name__}: {error}",
            fix="make one with 'bnn bench --json FILE'",
        ) from error


def _compare(rows: list[Row], earlier: dict[tuple[str, str, str], float]) -> int:
    """0, or 1 where a ratio fell by more than a third: less is within the noise of shared machines."""
    worse = 0
    for row in rows:
        before = earlier.get((row.name, row.ours, row.rival))
        if before is not None and row.ratio < before * 2 / 3:
            typer.echo(f"slower: {row.name}, {row.ours} against {row.rival}: ratio {row.ratio:.2f}, was {before:.2f}")
            worse = 1
    return worse
