"""Leapfrog steps of HMC and the worth of its draws, against NumPyro, blackjax and Pyro on the same target.

The target is a regression on an MLP with two hidden layers of tanh, standard normal priors and known noise, of 2,701,
9,001 and 100,501 weights. JAX and what stands on it live in an environment of their own:

    python3 -m venv peers && peers/bin/pip install numpyro==0.22.0 jax==0.10.2 blackjax==1.7.1
    python benchmarks/hmc.py --peers peers/bin/python --json benchmarks/results/hmc.json

Speed: all take the same step size and as many steps, without adaptation. They take turns, and a figure is the
median of the turns. Beside it stand the gradient alone, and the matrix products of that gradient alone.
Profile: where the time of a leapfrog step goes, by torch's profiler.
Worth: bulk ESS of predictions at 20 probe inputs, under each one's own adaptation, from the same starts.
Parts are run with --parts, --sizes and --chains, and join those that the JSON file has already.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import arviz
import numpy as np
import torch
from hmc_tasks import SIZES, Ask, Task, climbed, peer, points_of, products, starts_of, task_of
from torch import Tensor, profiler
from torch._inductor import config as inductor
from torch.utils.flop_counter import FlopCounterMode

from bnn.cli.bench import machine
from bnn.inference import HMC
from bnn.inference.density import Prepared, prepare, target_of_model, threads
from bnn.inference.hmc import sample
from bnn.inference.products import available
from bnn.types import Params

STEPS, STEP_SIZE = 16, 1e-4
AGREE = 1e-4  # relative: what densities and gradients in float32 may differ by
PYRO_SECONDS = 2.5e-3  # of a leapfrog on a small module, about

OURS, TRACED = "bnn", "bnn, not compiled"
GRADIENT, PRODUCTS = "bnn, gradient alone", "matrix products alone"
JAX_GRADIENT, NUTS = "JAX, gradient alone", "NumPyro NUTS"

KINDS = ("products", "tanh, fused", "sums, fused", "other, fused", "other operations")
REST = "calls and Python"

Row: TypeAlias = dict[str, Any]


def density_of(task: Task, starts: Tensor) -> Prepared:
    """The compiled gradient that our HMC takes its steps by."""
    return prepare(target_of_model(task.model, task.batch), starts, num_gradients=0, memory=2**30, compile=True)


def our_leapfrogs(task: Task, chains: int, draws: int, *, compiled: bool) -> Callable[[], dict[str, Any]]:
    """A run of the method HMC, `draws` draws of every chain a turn, with blocks and states as a bank would get them."""
    method = HMC(
        num_chains=chains, num_warmup=0, num_steps=STEPS, trajectory="fixed", step_size=STEP_SIZE, mass="unit",
        init="module", compile=compiled,
    )  # fmt: skip
    run = method.run(task.model, task.batch[:2], num_samples=chains * 10**9, seed=1)

    def turn() -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(draws):
            _, state = next(run)
        seconds = time.perf_counter() - start
        info = state["info"]
        return {"seconds": seconds, "compile_seconds": info["compile_seconds"], "acceptance": info["acceptance"]}

    return turn


def seconds_of(run: Callable[[], Any], calls: int, device: torch.device) -> dict[str, Any]:
    """Seconds a call, of several in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"seconds": (time.perf_counter() - start) / calls}


class Way(NamedTuple):
    """Something that is timed in turns: a run, and the leapfrogs or gradients of one chain that its seconds cover."""

    run: Callable[[], dict[str, Any]]
    covers: int
    versions: dict[str, str]


def our_ways(task: Task, starts: Tensor, draws: int) -> dict[str, Way]:
    chains, calls = len(starts), max(draws * STEPS // 2, 5)
    density = density_of(task, starts)
    alone = {"torch": products(task, starts)}
    if task.device.type == "cpu" and available():
        alone["oneDNN"] = products(task, starts, onednn=True)

    def products_run() -> dict[str, Any]:
        """By the faster way of the two."""
        with threads(density.plan.threads):  # as many as the gradient has
            took = {by: seconds_of(run, calls, task.device)["seconds"] for by, run in alone.items()}
        best = min(took, key=lambda by: took[by])
        return {"seconds": took[best], "by": best}

    own = versions()
    count = chains * draws * STEPS
    return {
        OURS: Way(our_leapfrogs(task, chains, draws, compiled=True), count, own),
        TRACED: Way(our_leapfrogs(task, chains, draws, compiled=False), count, own),
        GRADIENT: Way(lambda: seconds_of(lambda: density(starts), calls, task.device), chains, own),
        PRODUCTS: Way(products_run, chains, own),
    }


def rival_ways(
    found: dict[str, tuple[Ask, dict[str, str]]], chains: int, draws: int, pyro_draws: int
) -> dict[str, Way]:
    same = {"steps": STEPS, "step_size": STEP_SIZE}
    ways: dict[str, Way] = {}
    for name in (name for name in ("NumPyro", "blackjax") if name in found):
        ask, own = found[name]
        run = _asking(ask, "leapfrogs", chains=chains, draws=draws, **same)
        ways[name] = Way(run, chains * draws * STEPS, own)
    if "NumPyro" in found:
        ask, own = found["NumPyro"]
        run = _asking(ask, "gradients", chains=chains, calls=max(draws * STEPS // 2, 5))
        ways[JAX_GRADIENT] = Way(run, chains, own)
    if chains == 1:
        ask, own = found["Pyro"]
        for way in ("module", "potential"):
            run = _asking(ask, "leapfrogs", way=way, draws=pyro_draws, **same)
            ways[f"Pyro, {way}"] = Way(run, pyro_draws * STEPS, own)
    return ways


def _asking(ask: Ask, question: str, **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: ask(question, **options)


def speed(task: Task, options: argparse.Namespace) -> Iterator[Row]:
    """Microseconds a leapfrog step and chain of every way, in turns; then whether all have the same density."""
    all_starts = starts_of(task, max(options.chains))
    rows: list[Row] = []
    with ExitStack() as stack:
        found = rivals(stack, task, all_starts, options) if task.device.type == "cpu" else {}
        for chains in options.chains:
            draws = min(max(round(options.seconds / (STEPS * chains * task.size.seconds)), 2), 400)
            pyro_draws = max(round(options.seconds / (STEPS * PYRO_SECONDS)), 2)
            ways = our_ways(task, all_starts[:chains], draws) | rival_ways(found, chains, draws, pyro_draws)
            turns: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for turn in range(options.repeats + 1):
                for name, way in ways.items():
                    answer = way.run()
                    if turn:  # the first warms up
                        turns[name].append(answer)
            for name, way in ways.items():
                seconds = statistics.median(answer["seconds"] for answer in turns[name]) / way.covers
                rest = {key: value for key, value in turns[name][0].items() if key != "seconds"}
                if rest.get("acceptance", 1.0) < 0.9:
                    raise SystemExit(f"{name}: acceptance {rest['acceptance']:.2f} at a step of {STEP_SIZE}, want 0.9")
                figures = {"microseconds": seconds * 1e6, "per_second": 1 / seconds, "repeats": options.repeats, **rest}
                rows.append(_row("speed", task, name, chains, figures, way.versions))
                print(f"  {seconds * 1e6:10.1f} us, {chains:2} chains: {name}", flush=True)
        agree(task, {name: ask for name, (ask, _) in found.items()})
    yield from rows


def rivals(
    stack: ExitStack, task: Task, starts: Tensor, options: argparse.Namespace
) -> dict[str, tuple[Ask, dict[str, str]]]:
    """The rivals that this run can reach, each in a process of its own."""
    scripts = {"Pyro": (sys.executable, "hmc_pyro.py")}
    if options.peers:
        scripts |= {"NumPyro": (options.peers, "hmc_numpyro.py"), "blackjax": (options.peers, "hmc_blackjax.py")}
    return {
        name: stack.enter_context(peer(python, script, task, starts, options.threads))
        for name, (python, script) in scripts.items()
    }


def profile(task: Task, options: argparse.Namespace) -> Iterator[Row]:
    """Where the time of a leapfrog step goes, by torch's profiler: shares of products, elementwise kernels and the rest.

    Compiled kernels are counted by what is fused into them: with a tanh, else with a sum, else none of the two. What no
    operation accounts for is the Python between gradients and the calls themselves. Profiling costs time of its own.
    """
    all_starts = starts_of(task, max(options.chains))
    for chains in options.chains:
        draws = min(max(round(options.seconds / (STEPS * chains * task.size.seconds)), 2), 50)
        with inductor.patch({"cpp.enable_kernel_profile": True}):
            turn = our_leapfrogs(task, chains, draws, compiled=True)
            turn()
        plain = turn()["seconds"]
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as seen:
            seconds = turn()["seconds"]
        shares = dict.fromkeys(KINDS, 0.0)
        for event in seen.key_averages():
            if (kind := _kind(event.key)) in shares:
                shares[kind] += event.self_cpu_time_total / 1e6 / seconds
        shares[REST] = 1.0 - sum(shares.values())
        figures = {
            "microseconds": plain / (chains * draws * STEPS) * 1e6,
            "slowed_by_profiling": seconds / plain,
            "shares": shares,
            "onednn": density_of(task, all_starts[:chains]).plan.onednn,
        }
        told = ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items())
        print(f"  {figures['microseconds']:.1f} us, {chains:2} chains: {told}", flush=True)
        yield _row("profile", task, OURS, chains, figures, versions())


def _kind(name: str) -> str:
    """Which of KINDS an operation is, by its name."""
    if "cpp_fused" in name:
        return "tanh, fused" if "tanh" in name else "sums, fused" if "sum" in name else "other, fused"
    if any(word in name for word in ("bmm", "::mm", "addmm", "bnn::products", "linear_pointwise")):
        return "products"
    return "other operations" if "::" in name else REST


def agree(task: Task, rivals: dict[str, Ask]) -> None:
    """End the run unless log densities and gradients are ours at two points, and the products by hand are complete."""
    points = points_of(task)  # [2, P]
    values = density_of(task, points)(points)
    asked: dict[str, dict[str, str]] = {name: {} for name in rivals if name != "Pyro"}
    asked |= {f"Pyro, {way}": {"way": way} for way in ("module", "potential") if "Pyro" in rivals}
    for name, more in asked.items():
        for point, (value, slope) in enumerate(zip(values.log_density.tolist(), values.gradient.cpu(), strict=True)):
            answer = rivals[name.split(",")[0]]("density", point=point, **more)
            pairs = (task.model.layout.unflatten(flat) for flat in (slope, torch.tensor(answer["gradient"])))
            apart = _gradients_apart(*pairs)
            apart["log density"] = abs(answer["log_density"] - value) / abs(value)
            worst = max(apart, key=lambda part: apart[part])
            print(f"  apart by {apart[worst]:.1e} at most, relative, in {worst}, at point {point}: {name}")
            if not apart[worst] < AGREE:
                raise SystemExit(f"{name}: another log density or gradient than ours, of {task.name} weights")
    # Under vmap so that products over chains are counted, as they are batched.
    gradient_of = torch.func.vmap(torch.func.grad(lambda flat: task.model.log_density(flat, task.batch)[0]))
    counts = []
    for run in (lambda: gradient_of(points), products(task, points)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    print(f"  operations of matrix products, gradient and by hand: {counts[0]:,} and {counts[1]:,}")
    if counts[0] != counts[1]:
        raise SystemExit("the matrix products by hand are not those of the gradient")


def _gradients_apart(ours: Params, theirs: Params) -> dict[str, float]:
    """Relative differences, tensor by tensor."""
    return {name: float((theirs[name] - slope).norm() / slope.norm()) for name, slope in ours.items()}


def worth(task: Task, options: argparse.Namespace) -> Iterator[Row]:
    """Bulk ESS of predictions a second: our HMC with its defaults, and NumPyro's NUTS with as many chains."""
    for chains in (chains for chains in options.chains if chains > 1):
        started = time.perf_counter()
        starts = climbed(task, chains)
        climb = {"climb_seconds": time.perf_counter() - started}  # of both, in the seconds of neither
        ours, figures = our_worth(task, starts, options)
        rows = [_row("worth", task, OURS, chains, climb | _worth(ours, figures), versions())]
        if options.peers and task.device.type == "cpu":
            theirs, figures, own = nuts_worth(task, starts, options)
            figures["means_apart"] = _apart(ours, theirs)
            rows.append(_row("worth", task, NUTS, chains, climb | _worth(theirs, figures), own))
        for row in rows:
            print(
                f"  bulk ESS {row['ess_median']:.0f} (least {row['ess_least']:.0f}), R-hat {row['rhat']:.2f}, "
                f"{row['ess_per_second']:.2f} a second of sampling, {row['ess_per_second_in_all']:.2f} with warm-up, "
                f"{row['warmup_seconds']:.1f} + {row['sampling_seconds']:.1f} s, {chains:2} chains: {row['way']}",
                flush=True,
            )
            yield row


def our_worth(task: Task, starts: Tensor, options: argparse.Namespace) -> tuple[np.ndarray, dict[str, Any]]:
    """Predictions at the probes [C, D, probes] of a run with defaults, and its figures."""
    lengths = {"num_warmup": options.num_warmup, "num_draws": options.num_draws}
    found = sample(lambda flat: task.model.log_density(flat, task.batch)[0], starts, seed=1, **lengths)
    forward = torch.func.vmap(lambda flat: task.model.forward(task.model.constrain(flat)[0], task.probes)[:, 0])
    predictions = torch.stack([forward(chain.to(task.device)).cpu() for chain in found.draws])  # [C, D, probes]
    info = found.info
    figures = {
        **lengths,
        "compile_seconds": info.compile_seconds,
        "warmup_seconds": info.warmup_seconds,
        "sampling_seconds": info.sampling_seconds,
        "step_size": float(torch.as_tensor(info.step_size).mean()),
        "acceptance": float(info.acceptance.mean()),
        "steps_a_draw": float(torch.as_tensor(info.num_steps).double().mean()),
    }
    return predictions.numpy(), figures


def nuts_worth(
    task: Task, starts: Tensor, options: argparse.Namespace
) -> tuple[np.ndarray, dict[str, Any], dict[str, str]]:
    """The same of NumPyro's NUTS, and the versions."""
    lengths = {"num_warmup": options.num_warmup, "num_draws": options.num_draws}
    with (
        peer(options.peers, "hmc_numpyro.py", task, starts, options.threads) as (ask, own),
        tempfile.TemporaryDirectory() as folder,
    ):
        file = str(Path(folder) / "predictions.npy")
        figures = ask("nuts", chains=len(starts), seed=1, file=file, **lengths)
        return np.load(file), lengths | figures, own


def _worth(predictions: np.ndarray, figures: dict[str, Any]) -> dict[str, Any]:
    """ESS and R-hat over the probes, by arviz, joined to the figures of a run."""
    named = arviz.convert_to_dataset({"prediction": predictions.astype(np.float64)})
    ess = arviz.ess(named, method="bulk")["prediction"].to_numpy()
    rhat = arviz.rhat(named)["prediction"].to_numpy()
    in_all = figures["warmup_seconds"] + figures["sampling_seconds"]
    return figures | {
        "ess_median": float(np.median(ess)),
        "ess_least": float(ess.min()),
        "rhat": float(rhat.max()),
        "ess_per_second": float(np.median(ess)) / figures["sampling_seconds"],
        "least_ess_per_second": float(ess.min()) / figures["sampling_seconds"],
        "ess_per_second_in_all": float(np.median(ess)) / in_all,
        "ess_per_second_with_compilation": float(np.median(ess)) / (in_all + figures["compile_seconds"]),
    }


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    """How far the mean predictions of two runs are apart, in standard errors, at the worst probe."""
    means, errors = [], []
    for predictions in (one, other):
        named = arviz.convert_to_dataset({"prediction": predictions.astype(np.float64)})
        means.append(predictions.mean(axis=(0, 1)))
        errors.append(arviz.mcse(named, method="mean")["prediction"].to_numpy())
    return float((np.abs(means[0] - means[1]) / np.hypot(*errors)).max())


PARTS = {"speed": speed, "worth": worth, "profile": profile}


def versions() -> dict[str, str]:
    return {"bnn": metadata.version("bnn-toolkit"), "torch": torch.__version__}


def _row(part: str, task: Task, way: str, chains: int, figures: dict[str, Any], versions: dict[str, str]) -> Row:
    here = machine()
    cpu = f"{here['cpu']}, {here['cores']} cores, {here['threads']} threads"
    return {
        "part": part, "weights": task.model.layout.num_values, "rows_of_data": task.size.rows, "chains": chains,
        "way": way, **figures, "versions": versions, "machine": cpu if task.device.type == "cpu" else here["gpu"],
    }  # fmt: skip


def compared(rows: list[Row]) -> list[dict[str, Any]]:
    """Of each machine, size and number of chains: ours over the rivals, and where our time goes."""
    found = []
    for key in dict.fromkeys((row["machine"], row["weights"], row["chains"]) for row in rows):
        here = {(r["part"], r["way"]): r for r in rows if (r["machine"], r["weights"], r["chains"]) == key}
        # Pyro runs one chain at a time: a chain of ours stands beside it whatever the number of chains.
        alone = {
            (r["part"], r["way"]): r
            for r in rows
            if r["way"].startswith("Pyro") and (r["machine"], r["weights"]) == key[:2]
        }
        cost = {way: row["microseconds"] for (part, way), row in (alone | here).items() if part == "speed"}
        value = {way: row["ess_per_second"] for (part, way), row in here.items() if part == "worth"}
        more: dict[str, Any] = {}
        if {OURS, GRADIENT, PRODUCTS} <= cost.keys():
            more["share_in_gradient"] = cost[GRADIENT] / cost[OURS]
            more["products_over_gradient"] = cost[PRODUCTS] / cost[GRADIENT]
            more["times_as_fast"] = {
                way: rival / cost[OURS]
                for way, rival in cost.items()
                if way not in (OURS, GRADIENT, PRODUCTS, JAX_GRADIENT)
            }
        if {OURS, NUTS} <= value.keys():
            more["ess_a_second_over_nuts"] = value[OURS] / value[NUTS]
        if more:
            found.append({"machine": key[0], "weights": key[1], "chains": key[2], **more})
    return found


def show(found: dict[str, Any]) -> None:
    for row in found["compared"]:
        print(f"{row['weights']:,} weights, {row['chains']} chains, {row['machine']}")
        for way, ratio in row.get("times_as_fast", {}).items():
            print(f"  {ratio:6.2f} times as fast, a leapfrog and chain: bnn as {way}")
        if "share_in_gradient" in row:
            print(
                f"  {row['share_in_gradient']:6.2f} of the time in the gradient, "
                f"{row['products_over_gradient']:.2f} of that in its matrix products"
            )
        if "ess_a_second_over_nuts" in row:
            print(f"  {row['ess_a_second_over_nuts']:6.2f} times the bulk ESS a second of {NUTS}")


def joined(path: Path | None, rows: list[Row]) -> dict[str, Any]:
    """These rows and those that the file has of other parts, sizes, chains, ways and machines."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path and path.is_file() else []
    keys = ("part", "machine", "weights", "chains", "way")
    rows = list({tuple(row[key] for key in keys): row for row in [*old, *rows]}.values())
    rows.sort(key=lambda row: [row[key] for key in keys])
    return {"compared": compared(rows), "rows": rows, "machine": machine()}


def arguments() -> argparse.Namespace:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", help="python of an environment with numpyro and blackjax")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--chains", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--device", default="cpu", help="of ours; rivals run on the CPU alone")
    parser.add_argument("--threads", type=int, default=available, help="processors for each side")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one timed run, about")
    parser.add_argument("--num-warmup", type=int, default=300)
    parser.add_argument("--num-draws", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="figures too rough to keep")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.seconds, options.num_warmup, options.num_draws = 2, 0.1, 20, 10
    return options


def main() -> None:
    options = arguments()
    if hasattr(os, "sched_setaffinity"):  # inherited by the rivals; JAX takes as many threads as it may run on
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name in options.sizes:
        task = task_of(name, torch.device(options.device))
        for part in options.parts:
            print(f"{part}, {task.model.layout.num_values:,} weights", flush=True)
            for row in PARTS[part](task, options):
                rows.append(row)
                if options.json:
                    options.json.write_text(json.dumps(joined(options.json, rows), indent=2) + "\n", encoding="utf-8")
    show(joined(options.json, rows))


if __name__ == "__main__":
    main()
