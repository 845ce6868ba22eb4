"""Microcanonical Langevin Monte Carlo beside HMC on UCI regressions, for as many gradients; a trial, not a method.

    python benchmarks/mclmc.py --data-root DIR/uci --json benchmarks/results/mclmc.json
    python benchmarks/mclmc.py --check --peers peers/bin/python --json benchmarks/results/mclmc.json

Both take the model, the climb and the start of `uci.py`, and its four chains of 150 draws; MCLMC takes as many gradients
in warm-up, and as many in sampling, as HMC's trajectories took leapfrog steps. Its step size keeps the variance of the
energy error at 5e-4 a dimension, its length L is 0.4 times that over which draws forget each other, both tuned in
warm-up; positions are measured in the standard deviations that warm-up finds, as by HMC's mass. Nothing is rejected.

`--check` runs it on a normal of 100 dimensions whose variances are known, beside blackjax with the same step and L.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from hmc_tasks import PEERS
from torch import Tensor
from uci import CHOSEN, Choice, judge

from bnn.batches import full_batch
from bnn.cli.bench import machine
from bnn.diagnostics import ess_mean
from bnn.fitting import versions
from bnn.inference import starting
from bnn.inference.density import Density, prepare, target_of_function, target_of_model
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Block, Data, State, make_block

LAMBDA = 0.1931833275037836  # of the minimal-norm integrator, McLachlan (1995)
ENERGY_VARIANCE = 5e-4  # wanted, a dimension
MEMORY = 150  # steps over which the step size is averaged
FORGETS = 0.4  # L over the length after which draws have forgotten each other
DIVERGES = 1000.0  # nats of energy error: such a step, or one that is not finite, is taken back
SHARES = (0.3, 0.3)  # of warm-up: for the step size alone, and with the scales; the rest is for L


class Chains(NamedTuple):
    """Where C chains stand, in units of the scales: z = u / scale."""

    z: Tensor  # [C, P]
    velocity: Tensor  # [C, P], of length 1
    slope: Tensor  # [C, P], gradient of the log density in z
    log_density: Tensor  # [C] float64


class StepSize(NamedTuple):
    """Weighted means that the step size follows from; common to all chains."""

    size: float
    most: float
    total: float = 0.0  # of weights times xi / size^6
    weight: float = 0.0


def kick(velocity: Tensor, slope: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """The velocity turned towards the gradient for a time, on the unit sphere; and the gain of kinetic energy [C].

    u' = (u + (sinh d + (u . e) (cosh d - 1)) e) / (cosh d + (u . e) sinh d), e = g / |g|, d = time |g| / (P - 1);
    dK = (P - 1) log(cosh d + (u . e) sinh d)
    """
    length = slope.norm(dim=1, keepdim=True)
    towards = slope / length
    delta = time * length / (slope.shape[1] - 1)  # [C, 1]
    along = (velocity * towards).sum(dim=1, keepdim=True)
    shrink = torch.exp(-delta)
    turned = (1 - shrink) * (1 + shrink + along * (1 - shrink)) * towards + 2 * shrink * velocity
    gain = delta.double() - math.log(2.0) + torch.log(1 + along + (1 - along) * shrink.square()).double()
    return turned / turned.norm(dim=1, keepdim=True), (slope.shape[1] - 1) * gain.squeeze(1)


def integrate(density: Density, at: Chains, scale: Tensor, size: float) -> tuple[Chains, Tensor]:
    """One step of the minimal-norm integrator, two gradients; and the error of the energy [C].

    B(l size) A(size / 2) B((1 - 2 l) size) A(size / 2) B(l size): A moves positions, B turns velocities
    """
    velocity, gain = kick(at.velocity, at.slope, LAMBDA * size)
    z = at.z + 0.5 * size * velocity
    slope = density(z * scale).gradient * scale
    velocity, more = kick(velocity, slope, (1 - 2 * LAMBDA) * size)
    z = z + 0.5 * size * velocity
    values = density(z * scale)
    slope = values.gradient * scale
    velocity, last = kick(velocity, slope, LAMBDA * size)
    error = gain + more + last - (values.log_density - at.log_density)
    return Chains(z, velocity, slope, values.log_density), error


def refreshed(velocity: Tensor, size: float, length: float, source: torch.Generator) -> Tensor:
    """The velocity, partly forgotten over a step: u' = (u + nu n) / |u + nu n|, nu^2 = (exp(2 size / L) - 1) / P."""
    noise = torch.randn(velocity.shape, generator=source, dtype=velocity.dtype)
    moved = velocity + math.sqrt(math.expm1(2 * size / length) / velocity.shape[1]) * noise
    return moved / moved.norm(dim=1, keepdim=True)


def adapted(step: StepSize, error: Tensor, dimensions: int) -> StepSize:
    """The step size after the energy errors [C] of a step: var E grows with its sixth power."""
    xi = error.square() / (dimensions * ENERGY_VARIANCE) + 1e-8
    weight = torch.exp(-0.5 * (xi.log() / (6 * 1.5)).square())
    keep = (MEMORY - 1) / (MEMORY + 1)
    total = keep * step.total + float((weight * xi).mean()) / step.size**6
    weights = keep * step.weight + float(weight.mean())
    return StepSize(min((total / weights) ** (-1 / 6), step.most), step.most, total, weights)


class Turn(NamedTuple):
    """A step of the run."""

    u: Tensor  # [C, P]
    log_density: Tensor  # [C]
    step_size: float
    length: float
    warm: bool


def run_chains(
    density: Density, flat: Tensor, scale: Tensor, *, num_warmup: int, num_steps: int, seed: int
) -> Iterator[Turn]:
    """Steps of all chains, warm-up first: step size, then scales, then L."""
    source = generator(seed, "mclmc")
    dimensions = flat.shape[1]

    def placed(u: Tensor, velocity: Tensor, scale: Tensor) -> Chains:
        values = density(u)
        return Chains(u / scale, velocity / velocity.norm(dim=1, keepdim=True), values.gradient * scale, values[0])

    at = placed(flat, torch.randn(flat.shape, generator=source, dtype=flat.dtype), scale)
    length = math.sqrt(dimensions)
    step = StepSize(0.25 * length, math.inf)
    first, second = (round(share * num_warmup) for share in (SHARES[0], sum(SHARES)))
    kept: list[Tensor] = []
    for number in range(num_warmup + num_steps):
        warm = number < num_warmup
        moved, error = integrate(density, at, scale, step.size)
        fine = (error.abs() < DIVERGES) & moved.slope.isfinite().all(dim=1)  # [C]
        if not fine.all():  # those chains turn round with a shorter step; what was learnt of longer ones is forgotten
            moved = Chains(*(torch.where(fine.view(-1, *[1] * (new.dim() - 1)), new, old)
                             for new, old in zip(moved, at, strict=True)))  # fmt: skip
            step = StepSize(0.8 * step.size, 0.8 * step.size)
        elif number < second:
            step = adapted(step, error, dimensions)
        at = moved._replace(velocity=refreshed(moved.velocity, step.size, length, source))
        if first <= number < num_warmup and number % 4 == 0:
            kept.append(at.z * scale)
        if number + 1 == second and kept:  # scales from the second half of what was kept, and units with them
            draws = torch.stack(kept[len(kept) // 2 :], dim=1)  # [C, D, P]
            old, scale = scale, draws.var(dim=1).mean(dim=0).sqrt().clamp_min(1e-3 * scale)
            at = placed(at.z * old, at.velocity * old / scale, scale)
            ratio = float((old / scale).log().mean().exp())
            step = StepSize(step.size * ratio, math.inf)
            second_end = second + (num_warmup - second) // 3
            kept = []
        elif second <= number < num_warmup and number < second_end and fine.all():
            step = adapted(step, error, dimensions)  # in the new units
        if number + 1 == num_warmup and len(kept) > 20:
            draws = torch.stack(kept[len(kept) // 3 :], dim=1)
            worth = torch.stack([ess_mean(chain.unsqueeze(0)) for chain in draws])  # [C, P]
            forgets = float((4 * draws.shape[1] / worth.clamp_min(1.0)).median())  # steps
            length = max(FORGETS * step.size * forgets, step.size)
        yield Turn(at.z * scale, at.log_density, step.size, length, warm)


@dataclass(frozen=True)
class MCLMC:
    """What `uci.judge` takes for a method."""

    num_chains: int
    gradients_warm_up: int
    gradients_sampling: int

    name: ClassVar[str] = "mclmc"

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        del state
        batch = full_batch(data)
        scale = model.prior_scale()
        flat = starting.positions(model, "ensemble", self.num_chains, seed)
        density = prepare(target_of_model(model, batch), flat, num_gradients=0, memory=None, compile=True)
        compiled = {"compile_seconds": density.compile_seconds}
        climb = starting.first_climb(flat, scale)
        for number in range(starting.CLIMB_STEPS):
            climb = starting.climb_step(density, climb, scale, number)
        nothing = _block(model, climb.flat * scale, torch.zeros(self.num_chains), None)
        yield nothing, {"phase": {"name": "climb"}, "info": compiled}
        num_draws = num_samples // self.num_chains
        every = self.gradients_sampling // 2 // num_draws
        steps = {"num_warmup": self.gradients_warm_up // 2, "num_steps": every * num_draws}
        sampled = 0
        for number, turn in enumerate(run_chains(density, climb.flat * scale, scale, seed=seed, **steps)):
            sampled += not turn.warm
            last_warm = number + 1 == steps["num_warmup"]
            if not last_warm and (turn.warm or sampled % every):
                continue
            info = {"leapfrogs": 2.0 * (number + 1), "step_size": turn.step_size, "length": turn.length, **compiled}
            phase = {"name": "warm-up" if turn.warm else "sampling"}
            draw = None if turn.warm else sampled // every - 1
            yield _block(model, turn.u, turn.log_density, draw), {"phase": phase, "info": info}


def _block(model: BayesianModel, u: Tensor, log_density: Tensor, draw: int | None) -> Block:
    rows = slice(0, 0) if draw is None else slice(None)
    params, _ = model.constrain(u[rows])
    chain = torch.arange(len(u))[rows]
    return make_block(params, chain=chain, draw=torch.full_like(chain, draw or 0), log_joint=log_density[rows].double())


def compared(root: Path, name: str, split: int, old: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """HMC, unless its row is there already, and MCLMC on one split, one after the other."""
    rows = [row for row in old if (row["set"], row["split"], row["method"]) == (name, split, "hmc")]
    chosen = CHOSEN["hmc"]
    choice = chosen
    for method in ("mclmc",) if rows else ("hmc", "mclmc"):
        if rows:
            gradients = {f"gradients_{part}": int(rows[0][f"leapfrogs_{part}"]) for part in ("warm_up", "sampling")}
            choice = Choice(MCLMC(4, **gradients), chosen.num_samples, chosen.prior, chosen.module, chosen.noise)
        row = {"set": name, "split": split, "method": method} | judge(root / name, split, choice)
        seconds = row["seconds_sampling"]
        row |= {"ess_per_second": row["ess_median"] / seconds, "least_ess_per_second": row["ess_min"] / seconds}
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        rows.append(row)
    return rows


def check(peers: str) -> list[dict[str, Any]]:
    """A normal with known variances: relative error of the variances, ours and blackjax's, with one step and L."""
    scales = torch.logspace(-1, 1, 100)
    density = target_of_function(lambda u: -0.5 * (u / scales).square().sum(), None)
    flat = torch.randn(16, 100, generator=generator(0, "start")) * scales
    prepared = prepare(density, flat, num_gradients=0, memory=None, compile=False)
    steps = {"num_warmup": 6000, "num_steps": 12000}
    draws, turn = [], None
    for turn in run_chains(prepared, flat, torch.ones(100), seed=0, **steps):
        if not turn.warm:
            draws.append(turn.u)
    assert turn is not None
    found = torch.stack(draws, dim=1).double()  # [C, D, P]
    rows = [_against(found, scales, "bnn", turn.step_size, turn.length)]
    with tempfile.TemporaryDirectory() as folder:
        told = {"step_size": turn.step_size, "length": turn.length, "num_steps": steps["num_steps"], "folder": folder}
        words = [peers, str(PEERS / "mclmc_blackjax.py"), json.dumps(told)]
        np.save(Path(folder) / "scales.npy", scales.numpy())
        np.save(Path(folder) / "start.npy", flat.numpy())
        subprocess.run(words, check=True)
        theirs = torch.from_numpy(np.load(Path(folder) / "draws.npy")).double()
    rows.append(_against(theirs, scales, "blackjax", turn.step_size, turn.length))
    return rows


def _against(draws: Tensor, scales: Tensor, way: str, step_size: float, length: float) -> dict[str, Any]:
    squares = (draws / scales).square()  # of mean 1
    ratio = squares.mean(dim=(0, 1))  # [P]
    errors = (ratio - 1) / (2 / ess_mean(squares)).sqrt()
    row = {
        "way": way,
        "step_size": step_size,
        "length": length,
        "variance_ratio": float(ratio.mean()),
        "worst_in_standard_errors": float(errors.abs().max()),
        "ess_least": float(ess_mean(squares).min()),
    }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--sets", nargs="+", default=["yacht", "energy"])
    parser.add_argument("--splits", nargs="+", type=int, default=[0])
    parser.add_argument("--check", action="store_true", help="on a normal with known variances, beside blackjax")
    parser.add_argument("--peers", help="python of an environment with blackjax")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    old = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.is_file() else {}
    found = {"question": __doc__.splitlines()[0] if __doc__ else "", "rows": [], "check": []} | old
    began = time.perf_counter()
    if options.check:
        found["check"] = check(options.peers)
    else:
        new = [row for name in options.sets for split in options.splits
               for row in compared(options.data_root, name, split, found["rows"])]  # fmt: skip
        rows = {(row["set"], row["split"], row["method"]): row for row in [*found["rows"], *new]}
        found["rows"] = [rows[key] for key in sorted(rows)]
    found |= {"machine": machine(), "versions": versions()}
    for method in ("hmc", "mclmc"):
        of = [row["log_likelihood"] for row in found["rows"] if row["method"] == method]
        if of:
            print(method, f"log likelihood {statistics.fmean(of):.3f}, {time.perf_counter() - began:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
