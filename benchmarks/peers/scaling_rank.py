"""One rank's work for `scaling.py`: chains, a guide and an evaluation, timed inside, so that start-up does not count.

    torchrun --nproc-per-node 2 benchmarks/peers/scaling_rank.py FOLDER TURNS
    python benchmarks/peers/scaling_rank.py plan

Each turn of a work is done by both ranks together, by rank 0 alone, and by both processes at once as if there were no other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bnn
from bnn import distributed
from bnn.inference import HMC, Guide, Prior
from bnn.modules import build
from bnn.scaling import Pace, fit_calls, paces, plan_ranks, share_of
from bnn.seeding import generator
from bnn.traffic import counted

SAMPLES, EVALUATED = 512, 16_384
OFTEN = 3  # times as many turns of a work that takes a few seconds, whose single turns tell little
LONG = ("chains, 240 draws on 1,024 rows", "chains, 60 draws on 4,096 rows")  # half a minute a turn
CHAINS = HMC(num_chains=8, num_warmup=45, num_steps=8, trajectory="fixed", init="prior", compile=False)
TRIAL = 4.0  # seconds of each of the two trials of a plan


class Fit(NamedTuple):
    """A fit that ranks share."""

    method: Any
    spec: str  # of the module
    rows: int  # of the data
    num_samples: int

    @property
    def num_steps(self) -> int:
        """At which ranks may have something to say: trajectories of warm-up, or steps of a guide."""
        return int(self.method.num_warmup if self.method is CHAINS else self.method.num_steps)


FITS = {
    f"chains, {draws} draws on {rows:,} rows": Fit(CHAINS, "mlp:64,64", rows, CHAINS.num_chains * draws)
    for draws, rows in ((30, 1024), (240, 1024), (60, 4096))  # of each chain, after warm-up
} | {
    f"guide, batches of {size:,}": Fit(
        Guide("mean-field", num_steps=steps, batch_size=size), "mlp:280,280", rows=16_384, num_samples=16
    )
    for size, steps in ((1024, 300), (4096, 100), (16_384, 40))
}

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


def fitted(out: Path, fit: Fit) -> dict[str, float]:
    """What is to be the same however many ranks there were: of chains their heights, of a guide its draws."""
    model, data = model_of(fit.spec, fit.rows)
    bank = bnn.fit(model, data, method=fit.method, num_samples=fit.num_samples, out=out, progress=False)
    if fit.method is CHAINS:
        last = bank.log_joint[bank.draw == bank.draw.max()].double()
        return {"log_joint": float(last.mean()), "spread": float(last.std()), "samples": len(bank)}
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


JOBS: dict[str, Job] = {
    **{name: partial(fitted, fit=fit) for name, fit in FITS.items()},
    "evaluation": evaluation,
}


def sent(fit: Fit) -> list[float]:
    """Bytes a step, counted and as the model has them, of a rank; of chains a trajectory of warm-up, with the meetings that there were."""
    model, data = model_of(fit.spec, 256)
    method = fit.method if fit.method is CHAINS else dataclasses.replace(fit.method, num_steps=50)
    num_steps, num_meetings = fit._replace(method=method).num_steps, 0
    calls = fit_calls(method, distributed.ranks().world_size, num_values=model.layout.num_values, itemsize=4)
    with counted() as traffic:
        for _, state in method.run(model, data, num_samples=8, seed=0):
            num_meetings += state.get("meets", False)
            if state["step"] >= num_steps:
                break
    kinds = ("all_gather", "all_reduce")  # of the run itself; flags and the last commit belong to the fit
    counts = sum(traffic.payload.get(kind, 0) for kind in kinds)
    taken = num_meetings if method is CHAINS else num_steps
    every = [*calls.once[:-2], *calls.step * taken, *calls.edge * calls.num_edges]
    return [counts / num_steps, sum(call.payload for call in every if call.kind in kinds) / num_steps]


def planned(fit: Fit) -> float:
    """The efficiency of two ranks that `bnn bank plan --ranks 2` foresees, from a trial of the whole and one of a rank's part."""
    model, data = model_of(fit.spec, fit.rows)
    share = share_of(fit.method, fit.num_samples, fit.rows, 2)

    def tried(method: Any, num_samples: int) -> dict[str, Pace]:
        run = method.run(model, data, num_samples=num_samples, seed=0)
        return paces((state for _, state in run), TRIAL, most=None if method.name == "hmc" else method.num_steps)

    whole, own = tried(fit.method, fit.num_samples), tried(share.method, share.num_samples)
    seconds = own["warm-up"].seconds if "warm-up" in own else 0.0
    calls = fit_calls(fit.method, 2, num_values=model.layout.num_values, itemsize=4, trajectory_seconds=seconds)
    return plan_ranks(share, whole, own, calls, 2).efficiency


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
    if sys.argv[1] == "plan":
        sys.stdout.write(json.dumps({name: planned(fit) for name, fit in FITS.items()}))
        return
    folder, turns, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["RANK"])
    told: dict[str, Any] = {}
    judged()  # made whole by each process, before they split what they make
    for place, (name, job) in enumerate(JOBS.items()):
        taken = turns if name in LONG else OFTEN * turns
        found = [turn_of(job, folder / f"{place}-{turn}", rank) for turn in range(1 + taken)]
        took = [seconds for seconds, _ in found[1:]]  # the first warms up
        told[name] = {"turns": took, "figures": found[-1][1]}
    with distributed.joined():
        told["sent"] = {name: sent(fit) for name, fit in FITS.items()}
    (folder / f"told-{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
