"""Outputs of S samples on B rows: bnn against what people do instead, and against the bare arithmetic.

    python benchmarks/apply.py --json benchmarks/results/apply.json

NumPyro lives in an environment of its own: python3 -m venv peers && peers/bin/pip install numpyro==0.22.0 jax==0.10.2,
and then --peers peers/bin/python. All ways of a cell take turns on the same samples and rows; a figure is the least of the
turns, since what else runs on a machine only adds to it. Where all S samples would take longer than a turn may, a part of
them is timed: `timed` in the JSON file says how many, and seconds are scaled up from those. --device cuda times on a GPU.
--tasks, --rows and --samples run a part of the grid, which joins what the file has already.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from apply_tasks import Task, tasks
from pyro.infer import Predictive
from pyro.nn import PyroSample
from torch import Tensor, nn

import bnn
from bnn.cli.bench import machine
from bnn.layout import layout_of
from bnn.seeding import generator
from bnn.types import Params, make_block

ROWS, SAMPLES = (1, 128, 1024), (1, 10, 100, 1000)
TURN_SECONDS, TURNS, MOST_TURNS, ROW_SECONDS = 0.2, 3, 10, 0.01
SLOW = 0.3  # seconds a sample, of which two are timed
HELD = 3 * 2**30  # bytes of samples that are kept in memory
VMAP_BYTES = 2**31  # that the rivals' vmap over all samples may take, about
AUTO, LOOP, VMAP, COMPILED = "bnn, auto", "bnn, loop", "bnn, vmap", "bnn, vmap compiled"
CEILING = "bare arithmetic"
JITTED = "NumPyro Predictive, jitted"  # by hand, under jax.jit: beside the rivals, which are what people call
FIXED = (LOOP, VMAP)


class Cell(NamedTuple):
    """One module with B rows and S samples."""

    task: Task
    rows: int
    samples: int


class Setting(NamedTuple):
    """The samples of a module in a bank, and as people keep them without one."""

    module: nn.Module
    bank: bnn.Bank
    stacked: Params  # [S, *shape] on the device
    device: str


Way = Callable[[int], Tensor]
"""A number of samples -> their outputs [S, B, C]."""


def setting_of(task: Task, device: str) -> Setting:
    """A bank of random samples about the module's values: 1,000 of them, or as many as memory is held for."""
    torch.manual_seed(0)
    module = task.make()
    layout = layout_of(module)
    size = max(4, min(SAMPLES[-1], HELD // layout.num_bytes))
    source = generator(0, "apply")
    params = {
        name: value.detach() + 0.05 * torch.randn(size, *value.shape, generator=source)
        for name, value in module.named_parameters()
    }
    block = make_block(params, chain=torch.zeros(size), draw=torch.arange(size))
    bank = bnn.Bank.from_blocks([block], layout=layout, info={})
    return Setting(module.to(device), bank, {name: tensor.to(device) for name, tensor in params.items()}, device)


def ways_of(cell: Cell, setting: Setting, x: Tensor, peer: Peer | None) -> Iterator[tuple[str, Way]]:
    """Ours, the rivals, and the ceiling."""
    module, bank, stacked, device = setting
    for name, options in (
        (AUTO, {}),
        (LOOP, {"strategy": "loop", "compile": False}),
        (VMAP, {"strategy": "vmap", "compile": False}),
        (COMPILED, {"strategy": "vmap", "compile": True}),
    ):
        if name == COMPILED and not (cell.task.widths and cell.samples == 100):
            continue  # a quarter of a minute and more for each shape
        net = bnn.FunctionalModel(module, bank, device=device, **options)  # type: ignore[arg-type]

        def ours(size: int, net: bnn.FunctionalModel = net) -> Tensor:
            if size == 1:
                return net(x, 0).unsqueeze(0)
            if size <= 1024:
                return net(x, slice(0, size))
            return torch.cat([net(x, slice(start, start + 1024)) for start in range(0, size, 1024)])

        ours.net = net  # type: ignore[attr-defined]
        yield name, ours
    own = copy.deepcopy(module)
    rows = [{name: tensor[k] for name, tensor in stacked.items()} for k in range(min(len(bank), cell.samples))]
    buffers = dict(module.named_buffers())
    dicts = [row | buffers for row in rows]

    def assigned(size: int) -> Tensor:
        outputs = []
        for row in rows[:size]:
            for name, parameter in own.named_parameters():
                parameter.data = row[name]
            outputs.append(own(x))
        return torch.stack(outputs)

    def loaded(size: int) -> Tensor:
        outputs = []
        for state in dicts[:size]:
            own_too.load_state_dict(state)
            outputs.append(own_too(x))
        return torch.stack(outputs)

    own_too = copy.deepcopy(module)
    yield "param.data", assigned
    yield "load_state_dict", loaded
    base = copy.deepcopy(module).to("meta")
    first = {name: tensor[: cell.samples] for name, tensor in stacked.items()}

    def as_in_the_tutorial(size: int) -> Tensor:
        def one(params: Params, x: Tensor) -> Tensor:
            return torch.func.functional_call(base, (params, buffers), (x,))

        return torch.func.vmap(one, in_dims=(0, None))({name: tensor[:size] for name, tensor in first.items()}, x)

    yield "stack_module_state and vmap", as_in_the_tutorial
    sampled = copy.deepcopy(module)
    with pyro_left_clean():
        pyro.nn.module.to_pyro_module_(sampled)
        for part in sampled.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, PyroSample(dist.Normal(0.0, 1.0).expand(parameter.shape).to_event(parameter.dim())))

    def pyro_model(x: Tensor) -> None:
        pyro.deterministic("outputs", sampled(x))

    def with_pyro(size: int) -> Tensor:
        samples = {name: tensor[:size] for name, tensor in first.items()}
        return Predictive(pyro_model, posterior_samples=samples, return_sites=["outputs"])(x)["outputs"]

    yield "Pyro Predictive", with_pyro
    if peer is not None and cell.task.widths:
        for jitted in (False, True):
            yield "NumPyro Predictive" + (", jitted" if jitted else ""), lambda size, jitted=jitted: peer(size, jitted)

    def bare(size: int) -> Tensor:
        return torch.stack([cell.task.bare(row, x) for row in rows[:size]])

    yield CEILING, bare
    batched = cell.task.bare_batched
    if batched is not None:
        for at_once in (8, 32, 128, 1000):
            if at_once < 4 * cell.samples:

                def bare_at_once(size: int, at_once: int = at_once) -> Tensor:
                    parts = [
                        batched({name: tensor[k : min(k + at_once, size)] for name, tensor in first.items()}, x)
                        for k in range(0, size, at_once)
                    ]
                    return torch.cat(parts)

                yield f"{CEILING}, {at_once} at once", bare_at_once


@contextmanager
def pyro_left_clean() -> Iterator[None]:
    yield
    pyro.clear_param_store()


class Peer:
    """NumPyro's Predictive in a process of its own; it times itself, and sends its outputs once."""

    def __init__(self, python: str, task: Task, setting: Setting, x: Tensor, folder: Path) -> None:
        arrays = {f"param/{name}": tensor.numpy() for name, tensor in setting.stacked.items()}
        np.savez(folder / "problem.npz", x=x.numpy(), widths=np.array(task.widths), **arrays)
        script = Path(__file__).parent / "peers" / "apply_numpyro.py"
        environment = {**os.environ, "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"}
        if torch.get_num_threads() > 1:
            environment.pop("XLA_FLAGS")
        self._process = subprocess.Popen(
            [python, script, folder / "problem.npz"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        self.versions = json.loads(self._process.stdout.readline())
        self.seconds = 0.0
        self._folder = folder

    def __call__(self, size: int, jitted: bool) -> Tensor:
        """Run; the seconds are the peer's own, without the way there and back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(
            json.dumps({"ask": "predict", "size": size, "jitted": jitted, "out": str(self._folder / "o.npy")}) + "\n"
        )
        self._process.stdin.flush()
        self.seconds = json.loads(self._process.stdout.readline())["seconds"]
        return torch.from_numpy(np.load(self._folder / "o.npy"))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def measured(cell: Cell, setting: Setting, python: str | None) -> list[dict[str, Any]]:
    """A row for each way of a cell."""
    x = torch.randn(cell.rows, *cell.task.shape, generator=generator(1, "x")).to(setting.device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        peer = None
        if python is not None and cell.task.widths:
            peer = Peer(python, cell.task, setting, x, Path(folder))
        ways = dict(ways_of(cell, setting, x, peer))
        size_of: dict[str, int] = {}
        reference = ways[CEILING](min(cell.samples, 2))
        failed: dict[str, str] = {}
        for name, way in ways.items():
            try:
                size_of[name] = _size(cell, setting, name, way, peer)
                outputs = way(min(size_of[name], 2))  # also compiles, and lets ours choose
                torch.testing.assert_close(outputs.to(reference)[:2], reference[: len(outputs)], rtol=1e-3, atol=1e-3)
                way(size_of[name])
            except (RuntimeError, ValueError, bnn.errors.BnnError) as error:
                failed[name] = str(error).splitlines()[0][:200]
        best = {name: math.inf for name in ways if name not in failed}
        spent = dict.fromkeys(best, 0.0)
        for turn in range(MOST_TURNS):
            for name in best:
                if turn < TURNS or spent[name] < TURN_SECONDS:
                    seconds = _seconds(
                        ways[name], size_of[name], setting.device, peer if name.startswith("NumPyro") else None
                    )
                    best[name], spent[name] = min(best[name], seconds), spent[name] + seconds
        if peer is not None:
            peer.close()
    shared = {"task": cell.task.name, "rows": cell.rows, "samples": cell.samples}
    found = [
        {**shared, "way": name, "seconds": best[name] * cell.samples / size_of[name], "timed": size_of[name]}
        for name in best
    ]
    for row in found:
        if row["way"] == AUTO:  # what it chose for the block; a single sample is run through Python at first
            choices = list(ways[AUTO].net._chooser.choices.values())  # type: ignore[attr-defined]
            row["chosen"] = str(choices[-1].way) if choices else "loop"
    return found + [{**shared, "way": name, "seconds": None, "why": why} for name, why in failed.items()]


def _size(cell: Cell, setting: Setting, name: str, way: Way, peer: Peer | None) -> int:
    """How many samples a turn takes: all, or as many as fit the time, the memory, and what is kept."""
    most = min(cell.samples, len(setting.bank))
    few = min(2, most)
    way(few)
    seconds = _seconds(way, few, setting.device, peer if name.startswith("NumPyro") else None) / few
    fits = max(min(most, 10 if seconds < SLOW else 2), int(TURN_SECONDS * 4 / max(seconds, 1e-9)))
    if name.startswith(("stack_module", "NumPyro")):
        activation = 4 * cell.rows * max((*cell.task.widths, math.prod(cell.task.shape) * 16))
        fits = min(fits, max(2, VMAP_BYTES // (3 * activation)))
    return max(1, min(most, fits))


def _seconds(way: Way, size: int, device: str, peer: Peer | None) -> float:
    """Seconds of a call; short ones are called in a row, so that none pays for the caches that another way left."""
    if peer is not None:
        way(size)
        return peer.seconds
    calls, spent, last = 0, 0.0, 0.0
    while spent < ROW_SECONDS:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        way(size)
        if device == "cuda":
            torch.cuda.synchronize()
        last = time.perf_counter() - start
        if calls or last > ROW_SECONDS:  # the first one of a row of short calls does not count
            spent += last
        calls += 1
    return last if calls < 2 else spent / (calls - 1)


def deep() -> dict[str, float]:
    """Sixty tiny layers, B = 4: times the plain call of the module, each call under another of 64 samples."""
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(60)])
    states = [{name: 0.3 * torch.randn_like(value) for name, value in module.state_dict().items()} for _ in range(64)]
    bank, x = bnn.Bank.from_state_dicts(states, module=module), torch.randn(4, 8)
    loop, auto = bnn.FunctionalModel(module, bank, strategy="loop", compile=False), bnn.FunctionalModel(module, bank)
    order = torch.randperm(64).tolist()

    def plain(size: int) -> Tensor:
        return torch.stack([module(x) for _ in order[:size]])

    def under(net: bnn.FunctionalModel) -> Way:
        return lambda size: torch.stack([net(x, index) for index in order[:size]])

    def called(size: int) -> Tensor:
        return torch.stack([torch.func.functional_call(module, states[index], (x,)) for index in order[:size]])

    ways: dict[str, Way] = {"plain": plain, LOOP: under(loop), AUTO: under(auto), "functional_call": called}
    best = dict.fromkeys(ways, math.inf)
    with torch.no_grad():
        torch.testing.assert_close(ways[AUTO](64), called(64))
        for _ in range(20):
            for name, way in ways.items():
                best[name] = min(best[name], _seconds(way, 64, "cpu", None))
    return {name: seconds / best["plain"] for name, seconds in best.items()}


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the grid was asked to show, a row a cell: times as fast as the best rival, as Pyro; share of the ceiling."""
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["seconds"] is not None:
            cells.setdefault((row["task"], row["rows"], row["samples"]), {})[row["way"]] = row["seconds"]
    found = []
    for (task, num_rows, samples), seconds in cells.items():
        if AUTO not in seconds:
            continue
        ceiling = min(s for way, s in seconds.items() if way.startswith(CEILING))
        rivals = {way: s for way, s in seconds.items() if not way.startswith((CEILING, "bnn")) and way != JITTED}
        rival = min(rivals, key=rivals.__getitem__)
        fixed = min(s for way, s in seconds.items() if way in FIXED)
        found.append(
            {
                "task": task,
                "rows": num_rows,
                "samples": samples,
                "microseconds_a_sample": seconds[AUTO] / samples * 1e6,
                "best_rival": rival,
                "times_as_fast_as_best_rival": rivals[rival] / seconds[AUTO],
                "times_as_fast_as_pyro": seconds["Pyro Predictive"] / seconds[AUTO]
                if "Pyro Predictive" in seconds
                else None,
                "times_as_fast_as_param_data": seconds["param.data"] / seconds[AUTO],
                "times_as_fast_as_numpyro_jitted": seconds[JITTED] / seconds[AUTO] if JITTED in seconds else None,
                "share_of_ceiling": ceiling / seconds[AUTO],
                "of_the_best_fixed": seconds[AUTO] / fixed,
            }
        )
    return found


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['task']:22} B {row['rows']:5} S {row['samples']:5}  {row['microseconds_a_sample']:10.1f} us a sample"
        f"  {row['times_as_fast_as_best_rival']:6.2f} x {row['best_rival']:28} {row['times_as_fast_as_pyro'] or math.nan:6.1f} x Pyro"
        f"  {row['share_of_ceiling']:5.2f} of the ceiling  {row['of_the_best_fixed']:5.2f} of the best fixed",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", help="python of an environment with numpyro")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="*", help="words that names of tasks begin with")
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--samples", nargs="*", type=int, default=SAMPLES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for task in tasks():
        if options.tasks and not any(task.name.startswith(word) for word in options.tasks):
            continue
        setting = setting_of(task, options.device)
        for num_rows in options.rows:
            for samples in options.samples:
                fresh = measured(Cell(task, num_rows, samples), setting, options.peers)
                key = (task.name, num_rows, samples)
                rows = [row for row in rows if (row["task"], row["rows"], row["samples"]) != key] + fresh
                show(compared(fresh)[0])
                if options.json is not None:
                    keep(options.json, rows)
    if options.device == "cpu" and options.json is not None:
        keep(options.json, rows, deep())


def keep(path: Path, rows: list[dict[str, Any]], deep: dict[str, float] | None = None) -> None:
    """The whole file anew, a line a row."""
    found: dict[str, Any] = {
        "question": (__doc__ or "").splitlines()[0],
        "machine": machine(),
        "versions": {"torch": torch.__version__, "pyro": pyro.__version__},
    }
    if deep is not None:
        found["sixty_layers_over_plain"] = deep
    lines = [json.dumps(found)[1:-1]]
    lines += [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in part) + "\n]"
        for name, part in (("compared", compared(rows)), ("rows", rows))
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
