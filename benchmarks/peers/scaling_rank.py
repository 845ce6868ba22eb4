"""One rank's work for `scaling.py`: chains, a guide and an evaluation, timed inside, so that start-up does not count.

    torchrun --nproc-per-node 2 benchmarks/peers/scaling_rank.py FOLDER TURNS

Each turn of a work is done by both ranks together, by rank 0 alone, and by both processes at once as if there were no other.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import bnn
from bnn import distributed
from bnn.inference import HMC, Guide, Prior
from bnn.modules import build
from bnn.scaling import fit_calls
from bnn.seeding import generator
from bnn.traffic import counted

ROWS, SAMPLES, EVALUATED = 16_384, 512, 16_384
CHAINS = HMC(num_chains=8, num_warmup=45, num_steps=8, trajectory="fixed", init="prior", compile=False)
DRAWS = {f"chains, {draws} draws": draws for draws in (30, 240)}  # of each chain, after warm-up
STEPS = {1024: 300, 4096: 100, 16_384: 40}  # of a guide, by rows of a batch
KEPT = 16  # draws of the guide

Job = Callable[[Path], dict[str, float]]


@cache
def model_of(spec: str, rows: int) -> tuple[bnn.BayesianModel, tuple[torch.Tensor, torch.Tensor]]:
    """A module of 64 inputs and ten classes, and rows that a line through the origin labels."""
    source = generator(0, "rows")
    x = torch.randn(rows, 64, generator=source)
    y = (x @ torch.randn(64, 10, generator=source)).argmax(dim=1)
    module = build(spec, input_shape=[64], num_outputs=10, seed=0)
    prior, likelihood = bnn.priors.FanIn(), bnn.likelihoods.Categorical()
    return bnn.BayesianModel(module, prior=prior, likelihood=likelihood, num_data=rows), (x, y)


def chains(out: Path, draws: int) -> dict[str, float]:
    model, data = model_of("mlp:64,64", 1024)
    bank = bnn.fit(model, data, method=CHAINS, num_samples=8 * draws, out=out, progress=False)
    last = bank.log_joint[bank.draw == draws - 1].double()
    return {"log_joint": float(last.mean()), "spread": float(last.std()), "samples": len(bank)}


def guide(out: Path, batch_size: int) -> dict[str, float]:
    method = Guide("mean-field", num_steps=STEPS[batch_size], batch_size=batch_size)
    model, data = model_of("mlp:280,280", ROWS)
    bank = bnn.fit(model, data, method=method, num_samples=KEPT, out=out, progress=False)
    values = torch.cat([value.flatten(1) for value in bank.block(slice(None)).params.values()], dim=1)
    return {"norm": float(values.double().norm()), "samples": len(bank)}


@cache
def judged() -> tuple[bnn.FunctionalModel, Any]:
    """A module under samples of its prior, and rows."""
    model, data = model_of("mlp:64,64", EVALUATED)
    blocks = [block for block, _ in Prior().run(model, data, num_samples=SAMPLES, seed=0)]
    info = {"likelihood": model.likelihood.to_config()}
    net = bnn.FunctionalModel(model.module, bnn.Bank.from_blocks(blocks, layout=model.layout, info=info)).settled()
    return net, data


def evaluation(out: Path) -> dict[str, float]:
    del out
    net, data = judged()
    report = bnn.evaluate(net, data, figures="basic", progress=False)
    return {name: float(figure.value) for name, figure in report.metrics.items() if figure.value is not None}


GUIDES = {f"guide, batches of {size:,}": size for size in STEPS}
JOBS: dict[str, Job] = {
    **{name: partial(chains, draws=draws) for name, draws in DRAWS.items()},
    **{name: partial(guide, batch_size=size) for name, size in GUIDES.items()},
    "evaluation": evaluation,
}


def sent() -> dict[str, list[float]]:
    """Bytes a step, counted and as the model has them, of a rank; of chains a trajectory of warm-up, with the meetings that there were."""
    together, found = distributed.ranks(), {}
    works: dict[str, tuple[Any, str]] = dict.fromkeys(DRAWS, (CHAINS, "mlp:64,64"))
    works |= {
        name: (Guide("mean-field", num_steps=50, batch_size=size), "mlp:280,280") for name, size in GUIDES.items()
    }
    for name, (method, spec) in works.items():
        model, data = model_of(spec, 256)
        size = model.layout.num_values
        calls, num_meetings = fit_calls(method, together.world_size, num_values=size, itemsize=4), 0
        num_steps = CHAINS.num_warmup if method is CHAINS else calls.num_steps
        with counted() as traffic:
            for _, state in method.run(model, data, num_samples=8, seed=0):
                num_meetings += state.get("meets", False)
                if state["step"] >= num_steps:
                    break
        kinds = ("all_gather", "all_reduce")  # of the run itself; flags and the last commit belong to the fit
        counts = sum(traffic.payload.get(kind, 0) for kind in kinds)
        taken = num_meetings if method is CHAINS else num_steps
        every = [*calls.once[:-2], *calls.step * taken, *calls.edge * calls.num_edges]
        model_bytes = sum(call.payload for call in every if call.kind in kinds)
        found[name] = [counts / num_steps, model_bytes / num_steps]
    return found


def meet(place: Path, rank: int) -> None:
    """Wait until both processes are here, without a word to each other's ranks."""
    (place.parent / f"{place.name}-{rank}").touch()
    while not all((place.parent / f"{place.name}-{each}").exists() for each in range(2)):
        time.sleep(0.005)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turn_of(job: Job, place: Path, rank: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Seconds by way of one turn, and the figures that one process and two ranks give."""
    figures: dict[str, dict[str, float]] = {}
    took: dict[str, float] = {}

    def make(way: str) -> None:
        figures[way] = job(place.parent / f"{place.name}-{way}-{rank * (way == 'beside')}")

    with distributed.joined() as together:

        def both() -> None:
            make("two")
            together.barrier()

        together.barrier()
        took["two"] = timed(both)
    meet(place.with_name(f"{place.name}-split"), rank)
    if rank == 0:
        took["one"] = timed(lambda: make("one"))
    meet(place.with_name(f"{place.name}-whole"), rank)
    took["beside"] = timed(lambda: make("beside"))
    return took, [figures.get("one", {}), figures["two"]]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder, turns, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])
    told: dict[str, Any] = {}
    judged()  # made whole by each process, before they split what they make
    for place, (name, job) in enumerate(JOBS.items()):
        found = [turn_of(job, folder / f"{place}-{turn}", rank) for turn in range(1 + turns)]
        took = [seconds for seconds, _ in found[1:]]  # the first warms up
        told[name] = {"turns": took, "figures": found[-1][1]}
    with distributed.joined():
        told["sent"] = sent()
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
