"""What producers on minibatches share: where positions start, and Adam on all of them at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnn.batches import Share, mean_rows, minibatches, moved, shares
from bnn.errors import FitError
from bnn.model import BayesianModel
from bnn.seeding import isolated
from bnn.types import Batch, Data, State

Start: TypeAlias = Literal["module", "reset", "prior"]
STARTS: tuple[str, ...] = ("module", "reset", "prior")

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # of Adam, as its authors chose them
LAST_RATE = 0.01  # share of the learning rate that is left at the end of a climb


class Climb(NamedTuple):
    """M positions under Adam, each with moments of its own."""

    flat: Tensor  # [M, P] unconstrained
    mean: Tensor  # [M, P] of gradients
    square: Tensor  # [M, P] of squared gradients

    @staticmethod
    def of(flat: Tensor) -> Climb:
        """At rest."""
        return Climb(flat, torch.zeros_like(flat), torch.zeros_like(flat))

    @staticmethod
    def load(state: State, device: torch.device) -> Climb:
        """What `save` gave."""
        return Climb(*(state[f"climb.{name}"].to(device) for name in Climb._fields))

    def save(self) -> State:
        """As a state that a bank can keep."""
        return {f"climb.{name}": value for name, value in self._asdict().items()}


def climb(at: Climb, gradient: Tensor, *, step: int, num_steps: int, lr: float) -> Climb:
    """Step number `step`, from 0, of a climb of `num_steps`.

    u <- u + lr LAST_RATE^(step / num_steps) m / (sqrt v + EPSILON), m and v without their bias towards 0

    Source: Kingma and Ba (2015), arXiv:1412.6980, algorithm 1.
    """
    count = step + 1
    mean = FIRST_DECAY * at.mean + (1 - FIRST_DECAY) * gradient
    square = SECOND_DECAY * at.square + (1 - SECOND_DECAY) * gradient.square()
    rate = lr * LAST_RATE ** (step / num_steps)
    direction = (mean / (1 - FIRST_DECAY**count)) / ((square / (1 - SECOND_DECAY**count)).sqrt() + EPSILON)
    return Climb(at.flat + rate * direction, mean, square)


def weighted_batches(
    model: BayesianModel, data: Data, batch_size: int, *, seed: int, start: int = 0
) -> Iterator[tuple[Batch, float]]:
    """Batches without end on the model's device, from number `start` on, each with the weight of its likelihood.

    An epoch visits its batches equally often, also a short last one, while the contract of `log_joint`
    weighs them by their rows: the weight is B_i / mean B.
    """
    for share, weight in weighted_shares(model, data, batch_size, seed=seed, start=start):
        assert share.batch is not None, "the share of one alone is the batch"
        yield share.batch, weight


def weighted_shares(
    model: BayesianModel,
    data: Data,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Share, float]]:
    """What number `rank` of `world_size` takes of `weighted_batches`, each share with the weight of its batch."""
    rows = mean_rows(data, batch_size)
    model.check_rows(moved(next(minibatches(data, batch_size, seed=seed)), model.device))
    for share in shares(data, batch_size, seed=seed, start=start, rank=rank, world_size=world_size):
        yield Share(moved(share.batch, model.device), share.total), share.total / rows


def starts(model: BayesianModel, start: Start, num: int, seed: int, *, first: int = 0, every: int = 1) -> Tensor:
    """Positions [M, P] to climb from: `num` of them, numbered from `first` on, or every so-many-th.

    `"module"`: the module's values, all alike; `"reset"`: those after `reset_parameters` of its layers on a
    copy, so that each is another (what no layer resets stays); `"prior"`: draws of the prior.
    """
    numbers = range(first, first + num * every, every)
    if start == "prior":
        found = [model.sample_prior(seed, "start", index) for index in numbers]
    elif start == "reset":
        found = [_reset(model, seed, index) for index in numbers]
    else:
        found = [model.module_params()] * num
    return torch.stack([model.unconstrain(params).to(model.device) for params in found])


def _reset(model: BayesianModel, seed: int, index: int) -> dict[str, Tensor]:
    fresh: nn.Module = copy.deepcopy(model.module).cpu()
    with isolated(seed, "reset", index, cuda=False), torch.no_grad():
        for part in reversed(list(fresh.modules())):  # as they were built: a part may set what its own parts began with
            # Attention and the transformer of torch call theirs by the second name.
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                _call(reset, part)
    named = dict(fresh.named_parameters(remove_duplicate=False))
    own = model.module_params()
    return {name: named[name].detach().to(model.device) if name in named else own[name] for name in own}


def _call(reset: Callable[[], object], part: nn.Module) -> None:
    """Reset a layer, also what a parametrisation computes: it is written to while cached, and then assigned."""
    with parametrize.cached():
        reset()
        computed = {name: getattr(part, name) for name in getattr(part, "parametrizations", {})}
    for name, value in computed.items():
        with suppress(RuntimeError):  # of a parametrisation without an inverse: its values stay
            setattr(part, name, value)


def require_finite(
    place: str, heights: Tensor, flat: Tensor, *, start: int, last_good: float | None, lr: float, option: str = "lr"
) -> None:
    """Raise FitError unless densities and positions are finite, naming the first step to blame and the last good density.

    Args:
        place: the method.
        heights: log densities [steps, M], of the steps from `start` on.
        flat: the positions after them.
        start: number of the first step.
        last_good: mean log density before it, if there was one.
        lr: what to lower, under the name `option`.
    """
    good = heights.isfinite().flatten(1).all(dim=1).long()  # [steps]
    count = int(good.cumprod(dim=0).sum())  # steps before the first that is not
    if count == len(heights) and bool(flat.isfinite().all()):
        return
    at = min(count, len(heights) - 1)
    before = float(heights[at - 1].double().mean()) if at > 0 else last_good
    told = "none before it" if before is None else f"the last good one was {before:.6g}"
    raise FitError(
        place,
        want="a finite log density and gradient",
        got=f"one that is not at step {start + at}; {told}",
        fix=f"lower {option} (it is {lr:g}), or standardise the data",
    )
