"""SWAG: a normal with the moments of the models that SGD visits around a mode."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bnn.batches import num_batches
from bnn.errors import ConfigError, check_kinds, choose
from bnn.inference.climbing import STARTS, Climb, Start, climb, require_finite, starts, weighted_batches
from bnn.inference.gradients import gradient_of
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Block, Data, State, make_block

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep


@dataclass(frozen=True)
class SWAG:
    """Draws of a normal whose mean and covariance are those of models on the path of SGD.

    u = mean + scale sqrt(T) (sqrt(diagonal / 2) z_1 + D z_2 / sqrt(2 (K - 1))), z_1 [P] and z_2 [K] standard normal

    Adam climbs to a mode first. From there SGD with a constant rate goes on, v <- momentum v + T grad log pi(u) / N
    and u <- u + swag_lr v, and every `collect_every` steps the place where it is counts as a model. `mean` and
    `diagonal` are the mean and the variances of all models; the K columns of D are the last models less the mean of
    the models up to each. The path knows nothing of the temperature T: the spread of the draws does.

    The noise of batches is all that moves SGD at a mode, so the spread depends on `swag_lr` and
    `batch_size`, and is none where every batch holds all rows.

    Args:
        num_steps: steps of the climb, at least 1.
        batch_size: rows a step, of both.
        lr: of the climb, falling exponentially to a hundredth over it.
        swag_lr: rate of SGD, in units of u; the loss is a mean over rows, so it does not depend on N.
        momentum: of SGD, in [0, 1).
        num_models: models to collect, at least 3.
        collect_every: steps of SGD from one model to the next; an epoch where None.
        rank: most columns of D, at least 2; there are `num_models` - 1 where that is less.
        scale: of the deviation from the mean, at least 0; 1 as the method has it.
        start: where the climb begins: `"module"`, at the module's values; `"reset"`, after `reset_parameters`
            of its layers on a copy; `"prior"`, at a draw of the prior.
        block_size: samples a block; the samples do not depend on it.

    Raises:
        ConfigError: an option out of range.
        FitError: the log density is not finite.

    Source: Maddox et al. (2019), arXiv:1902.02476, algorithm 1.
    """

    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    swag_lr: float = 0.05
    momentum: float = 0.9
    num_models: int = 40
    collect_every: int | None = None
    rank: int = 20
    scale: float = 1.0
    start: Start = "module"
    block_size: int = 64
    name: ClassVar[str] = "swag"

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("SWAG(start=)", self.start, STARTS)
        least_of = {"num_steps": 1, "batch_size": 1, "num_models": 3, "rank": 2, "block_size": 1, "collect_every": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"SWAG({name}=)", want=f"at least {least}", got=str(value), fix="raise it")
        for name in ("lr", "swag_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"SWAG({name}=)", want="a positive number", got=str(getattr(self, name)), fix="try 0.01"
                )
        if not 0 <= self.momentum < 1:
            raise ConfigError("SWAG(momentum=)", want="a number in [0, 1)", got=str(self.momentum), fix="try 0.9")
        if not 0 <= self.scale < math.inf:
            raise ConfigError("SWAG(scale=)", want="a number of at least 0", got=str(self.scale), fix="try 1.0")

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        yield from _run(self, model, data, num_samples, seed, state)


class Moments(NamedTuple):
    """Of the models collected so far."""

    num_models: int
    mean: Tensor  # [P]
    squares: Tensor  # [P] sums of squared deviations from the mean
    deviations: Tensor  # [K, P] of the last models from the mean up to each


class Path(NamedTuple):
    """Where SGD is."""

    flat: Tensor  # [P] unconstrained
    velocity: Tensor  # [P]


def no_models(flat: Tensor) -> Moments:
    """The moments before the first model."""
    return Moments(0, torch.zeros_like(flat), torch.zeros_like(flat), flat.new_zeros(0, len(flat)))


def collect(moments: Moments, flat: Tensor, rank: int) -> Moments:
    """Add one model [P].

    mean_i = mean_(i-1) + (u - mean_(i-1)) / i;  squares_i = squares_(i-1) + (u - mean_(i-1)) (u - mean_i);
    D gets the column u - mean_i from i = 2 on, since the first is 0, and keeps the last `rank`

    Squares are summed about the running mean (Welford): E[u^2] - E[u]^2 of weights that move by less than a
    thousandth of their size would leave nothing in float32.
    """
    count = moments.num_models + 1
    before = flat - moments.mean
    mean = moments.mean + before / count
    after = flat - mean
    deviations = moments.deviations
    if count > 1:
        deviations = torch.cat([deviations, after.unsqueeze(0)])[-rank:]  # [K, P]
    return Moments(count, mean, moments.squares + before * after, deviations)


def descend(at: Path, gradient: Tensor, *, swag_lr: float, momentum: float) -> Path:
    """A step of SGD along a gradient [P] of the log density a row: v <- momentum v + g; u <- u + swag_lr v."""
    velocity = momentum * at.velocity + gradient
    return Path(at.flat + swag_lr * velocity, velocity)


def draw(moments: Moments, scale: float, normals: Tensor) -> Tensor:
    """Standard normals [P + K] -> u [P], by the equation of `SWAG` with `scale` for scale sqrt(T)."""
    rank = len(moments.deviations)
    first, second = normals.to(moments.mean).split([len(moments.mean), rank])
    deviation = (moments.squares / (2 * moments.num_models)).sqrt() * first  # [P]
    deviation = deviation + second @ moments.deviations / math.sqrt(2 * (rank - 1))
    found: Tensor = moments.mean + scale * deviation
    return found


def _run(
    options: SWAG, model: BayesianModel, data: Data, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    every = options.collect_every or num_batches(data, options.batch_size)
    collected = options.num_steps + options.num_models * every
    total = collected + num_samples
    if num_batches(data, options.batch_size) == 1:
        warnings.warn(
            "SWAG: one batch holds all rows, so that little moves SGD and samples hardly differ; lower batch_size",
            stacklevel=3,
        )
    climbed = state or {"step": 0}
    for climbed in _climb(options, model, data, seed, state):
        yield model.layout.no_rows(), {**climbed, "num_steps": total}
    found = climbed
    for found in _collect(options, model, data, seed, climbed, every, collected):
        yield model.layout.no_rows(), {**found, "num_steps": total}
    moments = _load(found, model.device)[1]
    for start in range(found["step"] - collected, num_samples, options.block_size):
        indices = range(start, min(start + options.block_size, num_samples))
        drawn = _draws(options, model, moments, seed, indices)  # [K, P]
        params, _ = model.constrain(drawn.cpu())
        block = make_block(params, chain=torch.zeros(len(indices), dtype=torch.int64), draw=torch.tensor(list(indices)))
        yield block, {**found, "step": collected + indices[-1] + 1, "num_steps": total}


def _climb(options: SWAG, model: BayesianModel, data: Data, seed: int, state: State | None) -> Iterator[State]:
    """The states of the climb that follow this one; none where it is over."""
    step = 0 if state is None else state["step"]
    if step >= options.num_steps:
        return
    at = Climb.of(starts(model, options.start, 1, seed)) if state is None else Climb.load(state, model.device)
    batches = weighted_batches(model, data, options.batch_size, seed=seed, start=step)
    gradient, last_good = gradient_of(model), None if state is None else state["info"]["log_density_per_row"]
    while step < options.num_steps:
        stop, heights = min(step + STEPS_PER_STATE, options.num_steps), []
        for number in range(step, stop):
            slope, height = gradient(at.flat, *next(batches), number)
            at = climb(at, slope, step=number, num_steps=options.num_steps, lr=options.lr)
            heights.append(height / model.num_data)
        seen = torch.stack(heights)  # [steps, 1]
        require_finite("SWAG", seen, at.flat, start=step, last_good=last_good, lr=options.lr)
        step, last_good = stop, float(seen.mean())
        yield {**at.save(), "step": step, "info": {"log_density_per_row": last_good}}


def _collect(
    options: SWAG, model: BayesianModel, data: Data, seed: int, state: State, every: int, end: int
) -> Iterator[State]:
    """The states of SGD that follow this one, the climb's last or one of its own; none where it is over."""
    step = state["step"]
    if step >= end:
        return
    if step > options.num_steps:
        path, moments, height_of_mode = *_load(state, model.device), state["height_of_mode"]
    else:
        flat = state["climb.flat"][0].to(model.device)
        path, moments = Path(flat, torch.zeros_like(flat)), no_models(flat)
        height_of_mode = state["info"]["log_density_per_row"]
    batches = weighted_batches(model, data, options.batch_size, seed=seed, start=step)
    gradient, fall, last_good = gradient_of(model), 0.0, state["info"]["log_density_per_row"]
    while step < end:
        stop, heights = min(step + STEPS_PER_STATE, end), []
        for number in range(step, stop):
            slope, height = gradient(path.flat.unsqueeze(0), *next(batches), number)
            slope = slope[0] * (model.temperature / model.num_data)  # [P]
            path = descend(path, slope, swag_lr=options.swag_lr, momentum=options.momentum)
            if (number + 1 - options.num_steps) % every == 0:
                moments = collect(moments, path.flat, options.rank)
            heights.append(height / model.num_data)
        seen = torch.stack(heights)  # [steps, 1]
        require_finite("SWAG", seen, path.flat, start=step, last_good=last_good, lr=options.swag_lr, option="swag_lr")
        step, last_good = stop, float(seen.mean())
        fall = height_of_mode - float(seen.mean())
        info = {"log_density_per_row": float(seen.mean()), "fall_per_row": fall}
        yield {**_save(path, moments), "height_of_mode": height_of_mode, "step": step, "info": info}
    _warn(options, model, fall)


def _warn(options: SWAG, model: BayesianModel, fall: float) -> None:
    """Say aloud that SGD has left the mode. Draws of a normal density lie P / 2 nats below its mode, on average."""
    if fall > 1 + model.layout.num_values / model.num_data:
        warnings.warn(
            f"SWAG: SGD ended {fall:.3g} nats a row below the mode that it began at, so that the samples do not "
            f"represent the posterior; lower swag_lr (it is {options.swag_lr:g})",
            stacklevel=4,
        )


def _draws(options: SWAG, model: BayesianModel, moments: Moments, seed: int, indices: range) -> Tensor:
    """Samples in unconstrained space, [K, P]: each has the same bits whatever is drawn beside it."""
    size, scale = model.layout.num_values + len(moments.deviations), options.scale * math.sqrt(model.temperature)
    sources = [generator(seed, "draw", index) for index in indices]
    return torch.stack(
        [draw(moments, scale, torch.randn(size, generator=source, dtype=moments.mean.dtype)) for source in sources]
    )


def _save(path: Path, moments: Moments) -> State:
    state = {f"path.{name}": value for name, value in path._asdict().items()}
    return state | {f"moments.{name}": value for name, value in moments._asdict().items()}


def _load(state: State, device: torch.device) -> tuple[Path, Moments]:
    here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()}
    path = Path(here["path.flat"], here["path.velocity"])
    return path, Moments._make(here[f"moments.{name}"] for name in Moments._fields)
