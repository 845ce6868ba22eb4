"""Stochastic gradient MCMC: chains that move by the gradients of minibatches and noise of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnn.distributed import ranks
from bnn.errors import ConfigError, NotConverged, check_kinds, choose
from bnn.inference.climbing import (
    STARTS,
    Climb,
    Start,
    climb,
    require_finite,
    starts,
    weighted_batches,
)
from bnn.inference.gradients import Gradient, gradient_of
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch, Block, Data, State, make_block

Preconditioner: TypeAlias = Literal["identity", "prior", "rmsprop"]
PRECONDITIONERS: tuple[str, ...] = ("identity", "prior", "rmsprop")

STEPS_PER_STATE = 50  # most steps between two states that a bank may keep
DAMPING = 0.1  # of "rmsprop": share of the mean root mean square that is added to each
HOT = 2.0  # kinetic temperature from which on more moves the chains than their own noise


@dataclass(frozen=True)
class _Options:
    """What both samplers share, explained where it is offered: in `SGHMC`."""

    num_chains: int = 4
    num_warmup: int = 500
    init: Start = "reset"
    climb_steps: int = 1000
    climb_lr: float = 0.01
    lr: float = 0.003
    cycle_steps: int | None = 1000
    exploration: float = 0.8
    draws_per_cycle: int = 3
    thin: int = 50
    batch_size: int = 128
    preconditioner: Preconditioner = "rmsprop"

    split: ClassVar[str] = "chains"


@dataclass(frozen=True)
class SGHMC(_Options):
    """Draws from near p(theta | D) by Hamiltonian dynamics with friction, on gradients of minibatches.

    r <- (1 - friction) r + sqrt(h) M g + sqrt(2 friction M) xi;  u <- u + sqrt(h) r;  h = lr T share / N

    u are the unconstrained values, g is the gradient of the log density, estimated by a minibatch and at the
    scale of all data, xi is standard normal, and T the temperature of the model: a step has the same
    length whatever N and T. No draw is rejected. At a constant step size the law of u tends to the posterior as lr
    falls, and is wider than it by terms of order lr, to which the noise of minibatches adds.

    Each chain first climbs by Adam towards a mode of its own, then takes `num_warmup` noisy steps that are not
    kept. Then the step size runs through cycles,

    share = (cos(pi k / cycle_steps) + 1) / 2 at step k of a cycle, from 0,

    whose first part explores without noise, and whose rest gives `draws_per_cycle` draws at equal distances,
    the last at its end. So each cycle can end near another mode; its draws lie nearer to that than the
    posterior does, since its noisy steps are few and short. With `cycle_steps=None` the step size is constant
    (share = 1), every `thin`-th step is a draw, and it is these draws whose law tends to the posterior. The preconditioner M does not change once the climb is over, so that no correction
    for its change is needed; its geometric mean is 1. Chains share the batches; noise is their own, and none
    depends on how many run beside it.

    Args:
        num_chains: chains, at least 1; `num_samples` must be a multiple of it.
        num_warmup: noisy steps before the first draw, at lr.
        init: where chains start to climb: `"reset"` at values that the layers' `reset_parameters` gives each,
            `"prior"` at a draw of the prior each, `"module"` at the module's values.
        climb_steps: steps of Adam before; 0 for none.
        climb_lr: its learning rate, falling to a hundredth.
        lr: the step size h N / T, or its highest: it is that of gradient descent with the momentum
            1 - friction on the mean negative log joint a row.
        friction: share of the momentum that is lost a step, in (0, 1].
        cycle_steps: length of a cycle; None for a constant step size.
        exploration: share of a cycle that is without noise, in [0, 1).
        draws_per_cycle: draws a chain that a cycle gives, at least 1.
        thin: steps from draw to draw, at least 1, where there are no cycles.
        batch_size: rows a step; a `DataLoader` brings its own.
        preconditioner: M is 1 for `"identity"`, the variance of the prior for `"prior"`, and for `"rmsprop"`
            one over the root mean square of the gradients that the chain met on its climb.

    Raises:
        ConfigError: an option out of range.
        FitError: a log density or a position is not finite.

    Source: Chen, Fox and Guestrin (2014), arXiv:1402.4102, eq. 15; the cycles: Zhang et al. (2020),
    arXiv:1902.03932.
    """

    friction: float = 0.1
    name: ClassVar[str] = "sghmc"

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.friction <= 1:
            raise ConfigError(
                "SGHMC(friction=)", want="a number in (0, 1]", got=str(self.friction), fix="try 0.1; 1 is SGLD"
            )

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        yield from _run(self, self.friction, model, data, num_samples, seed, state)


@dataclass(frozen=True)
class SGLD(_Options):
    """Draws from near p(theta | D) by gradient steps on minibatches, with noise: Langevin dynamics.

    u <- u + h M g + sqrt(2 h M) xi;  h = lr T share / N

    This is `SGHMC` with a friction of 1, and every option means what it means there. Without momentum a
    chain needs more steps for the same way: SGHMC's lr times its friction moves as far as SGLD's lr.

    Raises:
        ConfigError: an option out of range.
        FitError: a log density or a position is not finite.

    Source: Welling and Teh (2011), ICML, eq. 4; of a preconditioner, Li et al. (2016), arXiv:1512.07666.
    """

    lr: float = 0.01
    name: ClassVar[str] = "sgld"

    def __post_init__(self) -> None:
        _check(self)

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        yield from _run(self, 1.0, model, data, num_samples, seed, state)


class Chains(NamedTuple):
    """Where C chains stand, and how they move."""

    flat: Tensor  # [C, P] unconstrained
    momentum: Tensor  # [C, P]
    preconditioner: Tensor  # [C, P], M

    @staticmethod
    def load(state: State, device: torch.device) -> Chains:
        """What `save` gave."""
        return Chains(*(state[f"chains.{name}"].to(device) for name in Chains._fields))

    def save(self) -> State:
        """As a state that a bank can keep."""
        return {f"chains.{name}": value for name, value in self._asdict().items()}


class Turn(NamedTuple):
    """What a step after the climb does."""

    share: float  # of the step size
    noisy: bool
    draw: bool  # whether a draw is kept after it


def transition(at: Chains, gradient: Tensor, noise: Tensor | None, step_size: float, friction: float) -> Chains:
    """One step of every chain.

    r <- (1 - friction) r + sqrt(h) M g + sqrt(2 friction M) xi;  u <- u + sqrt(h) r

    Momentum is kept in units of sqrt(h), and so goes on unchanged where h changes.

    Args:
        at: where the chains are.
        gradient: g [C, P].
        noise: xi [C, P]; None for a step without.
        step_size: h.
        friction: in (0, 1].
    """
    root = math.sqrt(step_size)
    momentum = (1 - friction) * at.momentum + root * at.preconditioner * gradient
    if noise is not None:
        momentum = momentum + (2 * friction * at.preconditioner).sqrt() * noise
    return at._replace(flat=at.flat + root * momentum, momentum=momentum)


def kinetic_temperature(at: Chains, friction: float) -> Tensor:
    """(1 - friction / 2) mean r^2 / M, a scalar: 1 for a small step size and exact gradients, more with noisy ones.

    Without gradients r has the variance 2 friction M / (1 - (1 - friction)^2) = M / (1 - friction / 2).
    """
    return (1 - friction / 2) * (at.momentum.square() / at.preconditioner).mean()


def turn(options: _Options, step: int) -> Turn:
    """What step number `step` after the climb does, from 0; it does not depend on how many draws are asked for."""
    after = step - options.num_warmup
    if after < 0:
        return Turn(1.0, noisy=True, draw=False)
    if options.cycle_steps is None:
        return Turn(1.0, noisy=True, draw=(after + 1) % options.thin == 0)
    place = after % options.cycle_steps
    share = (math.cos(math.pi * place / options.cycle_steps) + 1) / 2
    return Turn(
        share,
        noisy=place >= _first_noisy(options, options.cycle_steps),
        draw=place + 1 in _ends(options, options.cycle_steps),
    )


def num_turns(options: _Options, num_draws: int) -> int:
    """Steps after the climb until every chain has so many draws."""
    if options.cycle_steps is None:
        return options.num_warmup + num_draws * options.thin
    cycles, place = divmod(num_draws - 1, options.draws_per_cycle)
    return options.num_warmup + cycles * options.cycle_steps + _ends(options, options.cycle_steps)[place]


def precondition(kind: Preconditioner, model: BayesianModel, climbed: Climb) -> Tensor:
    """M [C, P] of the chains that have climbed, of geometric mean 1 in each."""
    if kind == "rmsprop":
        size = climbed.square.sqrt()
        found = 1 / (size + DAMPING * size.mean(dim=1, keepdim=True))
    elif kind == "prior":
        found = model.prior_scale().to(climbed.flat).square().expand_as(climbed.flat)
    else:
        found = torch.ones_like(climbed.flat)
    return found / found.log().mean(dim=1, keepdim=True).exp()


class Setting(NamedTuple):
    """What stays the same over a run."""

    options: _Options
    friction: float
    model: BayesianModel
    gradient: Gradient
    batches: Iterator[tuple[Batch, float]]
    seed: int
    chains: range  # of this rank


def _run(
    options: _Options,
    friction: float,
    model: BayesianModel,
    data: Data,
    num_samples: int,
    seed: int,
    state: State | None,
) -> Iterator[tuple[Block, State]]:
    if num_samples % options.num_chains:
        near = max(num_samples // options.num_chains, 1) * options.num_chains
        raise ConfigError(
            "num_samples",
            want=f"a multiple of num_chains = {options.num_chains}",
            got=str(num_samples),
            fix=f"pass {near} or {near + options.num_chains}",
        )
    total = options.climb_steps + num_turns(options, num_samples // options.num_chains)
    step = 0 if state is None else state["step"]
    batches = weighted_batches(model, data, options.batch_size, seed=seed, start=step)
    chains = ranks().share(options.num_chains)
    setting = Setting(options, friction, model, gradient_of(model), batches, seed, chains)
    if state is None:
        climbed = Climb.of(starts(model, options.init, len(chains), seed, first=chains.start))
        state = {**climbed.save(), "step": 0, "drawn": 0, "heat": [0.0, 0], "info": {}}
    state = {**state, "num_steps": total}
    while state["step"] < options.climb_steps:
        state = _climbed(setting, state)
        yield model.layout.no_rows(), state
    at = _chains(setting, state)
    while state["step"] < total:
        at, state = _sampled(setting, at, state)
        yield _block(setting, at, state), state
    _warn(options, state["info"].get("kinetic_temperature", 1.0))


def _climbed(setting: Setting, state: State) -> State:
    """The next state of the climb."""
    options, at = setting.options, Climb.load(state, setting.model.device)
    steps = range(state["step"], min(state["step"] + STEPS_PER_STATE, options.climb_steps))
    heights = []
    for step in steps:
        slope, height = setting.gradient(at.flat, *next(setting.batches), step)
        at = climb(at, slope, step=step, num_steps=options.climb_steps, lr=options.climb_lr)
        heights.append(height)
    info = _watched(setting, state, heights, at.flat, options.climb_lr)
    return {**state, **at.save(), "step": steps[-1] + 1, "info": info}


def _sampled(setting: Setting, at: Chains, state: State) -> tuple[Chains, State]:
    """Where the chains are at the next draw, or after STEPS_PER_STATE steps if that is sooner."""
    options, friction = setting.options, setting.friction
    longest = setting.model.temperature * options.lr / setting.model.num_data
    begin = state["step"] - options.climb_steps
    heights, temperatures = [], []
    for step in range(begin, begin + STEPS_PER_STATE):
        what = turn(options, step)
        slope, height = setting.gradient(at.flat, *next(setting.batches), options.climb_steps + step)
        noise = _noise(setting.chains, at.flat, setting.seed, step) if what.noisy else None
        at = transition(at, slope, noise, longest * what.share, friction)
        heights.append(height)
        if what.noisy and step >= options.num_warmup:
            temperatures.append(kinetic_temperature(at, friction))
        if what.draw:
            break
    info = _watched(setting, state, heights, at.flat, options.lr)
    total, num = state["heat"]
    if temperatures:
        total, num = total + float(torch.stack(temperatures).sum()), num + len(temperatures)
    if num:
        info["kinetic_temperature"] = total / num
    info["step_size"] = longest * what.share
    step, drawn = state["step"] + len(heights), state["drawn"] + what.draw
    here = {"step": step, "num_steps": state["num_steps"], "drawn": drawn, "draw": what.draw, "heat": [total, num]}
    return at, {**at.save(), **here, "info": info}


def _chains(setting: Setting, state: State) -> Chains:
    """The chains of a state, or at rest where the climb of a state ended."""
    if "chains.flat" in state:
        return Chains.load(state, setting.model.device)
    climbed = Climb.load(state, setting.model.device)
    found = precondition(setting.options.preconditioner, setting.model, climbed)
    return Chains(climbed.flat, torch.zeros_like(climbed.flat), found)


def _block(setting: Setting, at: Chains, state: State) -> Block:
    """The chains' draws, one row a chain, where the state follows one."""
    rows = slice(None) if state["draw"] else slice(0, 0)
    params, _ = setting.model.constrain(at.flat[rows].cpu())  # [C, P], or none of them
    chain = torch.tensor(setting.chains)[rows]
    return make_block(params, chain=chain, draw=torch.full_like(chain, state["drawn"] - 1))


def _watched(setting: Setting, state: State, heights: list[Tensor], flat: Tensor, lr: float) -> dict[str, float]:
    """The mean log density a row over steps with these log densities [C], if all are finite; else FitError."""
    found, rows = torch.stack(heights), setting.model.num_data  # [steps, C]
    before = state["info"].get("log_density_per_row")
    last_good = None if before is None else before * rows
    require_finite(type(setting.options).__name__, found, flat, start=state["step"], last_good=last_good, lr=lr)
    return {"log_density_per_row": float(found.double().mean()) / rows}


def _noise(chains: range, like: Tensor, seed: int, step: int) -> Tensor:
    """Standard normals [C, P] of a step: by (seed, chain, step), whatever runs beside."""
    sources = [generator(seed, "chain", chain, step) for chain in chains]
    return torch.stack([torch.randn(like.shape[1], generator=one, dtype=like.dtype) for one in sources]).to(like.device)


def _first_noisy(options: _Options, cycle_steps: int) -> int:
    """The step of a cycle, from 0, from which on there is noise."""
    return math.ceil(options.exploration * cycle_steps)


def _ends(options: _Options, cycle_steps: int) -> list[int]:
    """Steps of a cycle, counted from 1, after which draws are kept: at equal distances, the last at its end."""
    first, num = _first_noisy(options, cycle_steps), options.draws_per_cycle
    return [first + (place * (cycle_steps - first)) // num for place in range(1, num + 1)]


def _warn(options: _Options, temperature: float) -> None:
    """Say aloud that the draws are those of another law."""
    if temperature > HOT:
        warnings.warn(
            f"{type(options).__name__}: the kinetic temperature is {temperature:.2f}, not 1: the chains are still falling "
            "towards a mode, or minibatches bring more noise than their own, and the draws are too wide; "
            "raise num_warmup, batch_size or friction, or lower lr",
            NotConverged,
            stacklevel=3,
        )


def _check(options: _Options) -> None:
    """Raise ConfigError for an option that is out of range."""
    check_kinds(options)
    name = type(options).__name__
    choose(f"{name}(init=)", options.init, STARTS)
    choose(f"{name}(preconditioner=)", options.preconditioner, PRECONDITIONERS)
    counts = {"num_chains": 1, "num_warmup": 0, "climb_steps": 0, "draws_per_cycle": 1, "thin": 1, "batch_size": 1}
    learns = options.preconditioner == "rmsprop"
    ranges = [
        *((option, getattr(options, option) >= least, f"at least {least}") for option, least in counts.items()),
        ("lr", 0 < options.lr < math.inf, "a positive number"),
        ("climb_lr", 0 < options.climb_lr < math.inf, "a positive number"),
        ("exploration", 0 <= options.exploration < 1, "a share in [0, 1)"),
        ("climb_steps", options.climb_steps > 0 or not learns, "at least 1 for 'rmsprop', which learns from the climb"),
    ]
    for option, fine, want in ranges:
        if not fine:
            default, got = type(options).__dataclass_fields__[option].default, str(getattr(options, option))
            raise ConfigError(f"{name}({option}=)", want=want, got=got, fix=f"pass another; the default is {default}")
    if options.cycle_steps is None:
        return
    rest = options.cycle_steps - _first_noisy(options, options.cycle_steps)
    if rest < options.draws_per_cycle:
        raise ConfigError(
            f"{name}(cycle_steps=)",
            want=f"at least {options.draws_per_cycle} steps with noise, as many as draws_per_cycle",
            got=f"{max(rest, 0)} of {options.cycle_steps}",
            fix="raise it, or lower exploration",
        )
