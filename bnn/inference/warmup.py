"""The warm-up of HMC: where it begins, and what each trajectory teaches all chains on all ranks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from bnn.distributed import ALONE, Ranks
from bnn.errors import FitError
from bnn.inference.adaptation import (
    Length,
    Moments,
    StepSize,
    first_length,
    first_step_size,
    learn_metric,
    no_moments,
    update_length,
    update_moments,
    update_step_size,
    window_start,
    windows,
)
from bnn.inference.density import Prepared
from bnn.inference.hamiltonian import Metric, Position, Transition, diagonal, transition
from bnn.seeding import generator

if TYPE_CHECKING:
    from bnn.inference.hmc import HMC

FIRST_LENGTH = 1.0  # of a trajectory that ChEES learns, in time: a scale of the prior at unit velocity
LEARNT_FROM = ("acceptance", "proposal", "velocity")  # what ChEES asks of a transition


class Adaptation(NamedTuple):
    """Everything that warm-up learns."""

    step_size: StepSize
    metric: Metric
    moments: Moments
    length: Length


def first_adaptation(
    options: HMC, density: Prepared, at: Position, scale: Tensor, seed: int, together: Ranks
) -> Adaptation:
    """Where warm-up begins: each chain's own first step, the prior's scale [P] as mass, and a trajectory of unit time.

    Noise by which steps are tried is that of all chains, of which a rank takes its own: [C, P] whatever the split.
    """
    metric = diagonal(scale)
    if options.step_size is None:
        noise = torch.randn(
            (options.num_chains, at.flat.shape[1]), generator=generator(seed, "step size"), dtype=at.flat.dtype
        )
        own = together.share(options.num_chains)
        noise = noise[own.start : own.stop].to(at.flat.device)  # [C, P]
        step_size = reasonable_step_size(density, at, metric, noise, together)
    else:
        step_size = torch.full_like(at.log_density, options.step_size)
    common = common_step(together.pooled(step_size))
    room = room_of(options) if windows(options.num_warmup) else 0
    length = min(max(FIRST_LENGTH, common), common * options.most_steps)
    centre = together.pooled(at.flat) if options.learns_length else at.flat
    return Adaptation(first_step_size(step_size), metric, no_moments(at.flat, room), first_length(length, centre))


def room_of(options: HMC) -> int:
    """Draws a chain that a window keeps for the correlations of a low-rank mass: twenty for each direction, all chains together."""
    return math.ceil(20 * options.rank / options.num_chains) + 1 if options.mass == "low-rank" else 0


def update_adaptation(
    options: HMC,
    adaptation: Adaptation,
    found: Transition,
    before: Tensor,
    after: Tensor,
    scale: Tensor,
    *,
    step_size: Tensor,
    num_steps: int,
    step: int,
    edges: set[int],
    together: Ranks = ALONE,
    common: float,
) -> Adaptation:
    """What one trajectory of warm-up, number `step` from 1, teaches: step sizes a chain, mass and length for all.

    Every rank learns mass and length from the chains of all, which are gathered as they stand in one process.
    """
    learnt = update_step_size(adaptation.step_size, found.acceptance, options.target_accept)
    adaptation = adaptation._replace(step_size=learnt)
    if options.learns_length:
        length = update_length(
            adaptation.length,
            found._replace(**{name: together.pooled(getattr(found, name)) for name in LEARNT_FROM}),
            together.pooled(before),
            together.pooled(after),
            adaptation.metric,
            time=together.pooled(step_size) * num_steps,
            shortest=common,
            longest=common * options.most_steps,
        )
        adaptation = adaptation._replace(length=length)
    if options.mass == "unit" or not window_start(options.num_warmup) < step <= max(edges, default=0):
        return adaptation
    borders = sorted({window_start(options.num_warmup), *edges})
    width = next((stop - start for start, stop in pairwise(borders) if step <= stop), 1)
    every = math.ceil(width / max(room_of(options), 1))  # draws from all of the window fit
    moments = update_moments(adaptation.moments, after, every)
    if step not in edges:
        return adaptation._replace(moments=moments)
    mean, squares, recent = (together.pooled(each) for each in (moments.mean, moments.squares, moments.recent))
    whole = moments._replace(mean=mean, squares=squares, recent=recent)
    metric = learn_metric(whole, scale.square(), options.rank if options.mass == "low-rank" else 0)
    return Adaptation(
        first_step_size(learnt.log_step_mean.exp()),
        metric,
        no_moments(after, room_of(options) if step < max(edges) else 0),
        adaptation.length._replace(num_updates=0, square=0.0),
    )


def common_step(step_size: Tensor) -> float:
    """Geometric mean of the chains' steps."""
    return float(step_size.log().mean().exp())


def reasonable_step_size(
    density: Prepared, at: Position, metric: Metric, noise: Tensor, together: Ranks = ALONE
) -> Tensor:
    """Step sizes [C], found by doubling or halving, at which one step of a chain, with this noise [C, P], is accepted
    with about a half.
    """
    uniform = torch.ones_like(at.log_density)

    def easy(step_size: Tensor) -> Tensor:
        return transition(density, at, noise, uniform, metric, step_size, 1)[1].acceptance > 0.5  # [C]

    step_size = torch.full_like(at.log_density, 0.1)
    grows = easy(step_size)
    settled = torch.zeros_like(grows)
    for _ in range(50):
        following = torch.where(grows, 2.0 * step_size, 0.5 * step_size)
        crossed = easy(following) != grows
        # Of two neighbours the one that is still easy.
        step_size = torch.where(settled | (crossed & grows), step_size, following)
        settled = settled | crossed
        if settled.all():
            break
    endless, reached = together.pooled((~settled & grows).to(torch.uint8)), together.pooled(step_size)
    if endless.any():
        chain = int(endless.nonzero()[0])
        raise FitError(
            "HMC",
            want="a step that is ever too long",
            got=f"none up to {float(reached[chain]):.1e} in chain {chain}",
            fix="look for a log density that is flat, or add a prior",
        )
    return step_size  # where none is easy the run will find its chains standing still
