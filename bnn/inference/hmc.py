"""Hamiltonian Monte Carlo with all chains on one batch axis, resumable after every draw."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnn.batches import full_batch, moved
from bnn.errors import ConfigError, FitError, check_kinds, choose
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Block, Data, State, make_block

Init: TypeAlias = Literal["prior", "ensemble", "module"]
INITS: tuple[str, ...] = ("prior", "ensemble", "module")

MAX_ENERGY_ERROR = 1000.0  # beyond it a trajectory counts as divergent, as in Stan
# Dual averaging (Hoffman and Gelman 2014, section 3.2.1): shrinkage, early damping, decay of the average.
GAMMA, EARLY, KAPPA = 0.05, 10.0, 0.75
CLIMB_STEPS, CLIMB_RATE = 300, 0.05  # of the optimisation before warm-up, in prior standard deviations a step


@dataclass(frozen=True)
class HMC:
    """Draws from p(theta | D) by simulating Hamiltonian dynamics; exact as the number of draws grows.

    H(u, p) = -log pi(u) + p^T M^-1 p / 2, integrated by leapfrog, accepted with min(1, exp(-dH)).

    Chains run side by side on one `vmap` axis. During warm-up the step size, one for all chains, is
    adapted by dual averaging and the diagonal mass is learnt from the pooled within-chain variances.
    The number of steps is drawn anew for each trajectory, from half of `num_steps` to all of it, so
    that no chain falls into step with a period of its target. The data are used in full at each step.

    Args:
        num_chains: chains, at least 1; `num_samples` must be a multiple of it.
        num_warmup: draws a chain for adaptation, not kept.
        num_steps: most leapfrog steps of a trajectory, at least 1.
        target_accept: mean acceptance that the step size is adapted to, in (0, 1).
        step_size: of the first step, in units of the mass matrix; found by doubling where None.
        adapt_mass: whether the mass is learnt; the prior's scales are used without.
        init: where chains start: `"prior"` at a draw of the prior each, `"ensemble"` there and then
            climbed by Adam, all at once, so that no chain begins far from every mode, `"module"` at
            the module's values.
        thin: keep every n-th draw.

    Raises:
        ConfigError: an option out of range.
        FitError: the log joint is not finite at the start.

    Source: Neal (2011), arXiv:1206.1901; Hoffman and Gelman (2014), arXiv:1111.4246.
    """

    num_chains: int = 4
    num_warmup: int = 200
    num_steps: int = 32
    target_accept: float = 0.8
    step_size: float | None = None
    adapt_mass: bool = True
    init: Init = "ensemble"
    thin: int = 1

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("HMC(init=)", self.init, INITS)
        for name, least in (("num_chains", 1), ("num_warmup", 0), ("num_steps", 1), ("thin", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"HMC({name}=)", want=f"at least {least}", got=str(value), fix="raise it")
        if not 0 < self.target_accept < 1:
            raise ConfigError(
                "HMC(target_accept=)", want="a number in (0, 1)", got=str(self.target_accept), fix="try 0.8"
            )
        if self.step_size is not None and not self.step_size > 0:
            raise ConfigError("HMC(step_size=)", want="a positive number", got=str(self.step_size), fix="leave it out")

    name: ClassVar[str] = "hmc"

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        if num_samples % self.num_chains:
            near = max(num_samples // self.num_chains, 1) * self.num_chains
            raise ConfigError(
                "num_samples",
                want=f"a multiple of num_chains = {self.num_chains}",
                got=str(num_samples),
                fix=f"pass {near} or {near + self.num_chains}",
            )
        yield from _run(self, model, data, num_samples // self.num_chains, seed, state)


class Position(NamedTuple):
    """Where the chains stand: C positions with their densities and gradients."""

    flat: Tensor  # [C, P] unconstrained
    log_density: Tensor  # [C]
    log_joint: Tensor  # [C]
    gradient: Tensor  # [C, P]


class Adaptation(NamedTuple):
    """What warm-up learns: the step size by dual averaging, the mass from variances of the draws."""

    log_step: float  # of the next trajectory
    log_step_mean: float  # its average, used after warm-up
    error_mean: float  # running mean of (target - acceptance)
    num_updates: int  # trajectories since the last restart
    centre: float  # what log_step is drawn towards
    inverse_mass: Tensor  # [P]
    num_draws: int  # draws in the running moments below
    mean: Tensor  # [C, P]
    squares: Tensor  # [C, P] sums of squared deviations


class Info(NamedTuple):
    """Diagnostics of one trajectory."""

    acceptance: Tensor  # [C] probabilities
    divergent: Tensor  # [C] bool


Density: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""u [C, P] -> log density [C], log joint [C], gradient of the former [C, P]."""


def density_of(model: BayesianModel, data: Data) -> Density:
    """The full-data log density of a model, with its gradient, over chains."""
    batch = moved(full_batch(data), model.device)
    model.check_rows(batch)

    def log_density(flat: Tensor) -> tuple[Tensor, Tensor]:
        return model.log_density(flat, batch)

    gradient = torch.func.vmap(torch.func.grad_and_value(log_density, has_aux=True))

    def density(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope, (value, log_joint) = gradient(flat)
        return value.detach(), log_joint.detach(), slope.detach()

    return density


def trajectory(
    density: Density, at: Position, momentum: Tensor, inverse_mass: Tensor, step_size: float, num_steps: int
) -> tuple[Position, Tensor]:
    """num_steps of the leapfrog integrator: the position reached and the momentum there.

    p <- p + e/2 grad; repeat { u <- u + e M^-1 p; p <- p + e grad }; the last p half a step back
    """
    flat, gradient = at.flat, at.gradient
    momentum = momentum + 0.5 * step_size * gradient
    for step in range(num_steps):
        flat = flat + step_size * inverse_mass * momentum
        value, log_joint, gradient = density(flat)
        momentum = momentum + (step_size if step < num_steps - 1 else 0.5 * step_size) * gradient
    return Position(flat, value, log_joint, gradient), momentum


def transition(
    density: Density,
    at: Position,
    noise: Tensor,
    uniform: Tensor,
    inverse_mass: Tensor,
    step_size: float,
    num_steps: int,
) -> tuple[Position, Info]:
    """One draw of every chain: fresh momentum, a trajectory, accept or stay.

    Args:
        noise: standard normals [C, P]; momentum is noise / sqrt(M^-1).
        uniform: [C] in [0, 1), float64.
    """
    momentum = noise / inverse_mass.sqrt()
    new, end = trajectory(density, at, momentum, inverse_mass, step_size, num_steps)
    # Energies are summed in float64: the difference of two sums over P terms decides.
    kinetic = 0.5 * ((end.double().square() - momentum.double().square()) * inverse_mass.double()).sum(dim=1)  # [C]
    error = (at.log_density.double() - new.log_density.double()) + kinetic
    error = torch.where(error.isfinite() & new.gradient.isfinite().all(dim=1), error, math.inf)
    acceptance = (-error).clamp(max=0.0).exp()
    accept = uniform < acceptance
    moved = Position(*(torch.where(_like(accept, n), n, o) for n, o in zip(new, at, strict=True)))
    return moved, Info(acceptance, error > MAX_ENERGY_ERROR)


def update_step_size(adaptation: Adaptation, acceptance: float, target: float) -> Adaptation:
    """One step of dual averaging.

    x <- m - sqrt(t) / GAMMA * mean(target - acceptance);  x_mean <- t^-KAPPA x + (1 - t^-KAPPA) x_mean
    """
    count = adaptation.num_updates + 1
    error_mean = adaptation.error_mean * (1 - 1 / (count + EARLY)) + (target - acceptance) / (count + EARLY)
    log_step = adaptation.centre - math.sqrt(count) / GAMMA * error_mean
    weight = count**-KAPPA
    mean = weight * log_step + (1 - weight) * adaptation.log_step_mean
    return adaptation._replace(log_step=log_step, log_step_mean=mean, error_mean=error_mean, num_updates=count)


def restart_step_size(adaptation: Adaptation, step_size: float) -> Adaptation:
    """Forget the average; draw the step size towards ten times this one, since long steps are cheap to try."""
    log_step = math.log(step_size)
    return adaptation._replace(
        log_step=log_step, log_step_mean=log_step, error_mean=0.0, num_updates=0, centre=math.log(10 * step_size)
    )


def update_moments(adaptation: Adaptation, flat: Tensor) -> Adaptation:
    """Add one draw a chain to the running variances (Welford)."""
    num = adaptation.num_draws + 1
    delta = flat - adaptation.mean
    mean = adaptation.mean + delta / num
    return adaptation._replace(num_draws=num, mean=mean, squares=adaptation.squares + delta * (flat - mean))


def learn_mass(adaptation: Adaptation, prior_variance: Tensor) -> Adaptation:
    """Set M^-1 to the variances seen, pooled over chains about each chain's own mean; forget them.

    With n draws in all the estimate is drawn by 5 / (n + 5) towards a thousandth of the prior's
    variance, as Stan does towards 1e-3.
    """
    chains = len(adaptation.mean)
    count = chains * (adaptation.num_draws - 1)
    variance = adaptation.squares.sum(dim=0) / max(count, 1)  # [P]
    inverse_mass = (count * variance + 5e-3 * prior_variance) / (count + 5)
    zeros = torch.zeros_like(adaptation.mean)
    return adaptation._replace(inverse_mass=inverse_mass, num_draws=0, mean=zeros, squares=zeros)


def windows(num_warmup: int) -> list[int]:
    """Warm-up draws after which the mass is learnt: windows that double, between a start and an end without.

    The first 15 % find the typical set, and at the end the step size settles for 50 draws, as in
    Stan, or a tenth or at most a third of the warm-up. Below 40 draws no mass is learnt: there are
    too few for a variance and for the step size that follows it.
    """
    if num_warmup < 40:
        return []
    begin, end = int(0.15 * num_warmup), num_warmup - max(min(50, num_warmup // 3), num_warmup // 10)
    edges: list[int] = []
    width = max((end - begin) // 7, 5)
    edge = begin
    while edge + width <= end:
        following = edge + width + 2 * width
        edge = end if following > end else edge + width
        edges.append(edge)
        width *= 2
        if edge == end:
            break
    return edges


def _run(
    options: HMC, model: BayesianModel, data: Data, num_draws: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    chains = options.num_chains
    density = density_of(model, data)
    prior_variance = model.prior_scale().to(model.device, model.layout.dtype).square()
    if state is None:
        at = _start(options, model, density, seed)
        adaptation = _first_adaptation(options, density, at, prior_variance, seed)
        step, divergences, accepted = 0, 0, 0.0
    else:
        at, adaptation = _restore(state, model.device)
        step, accepted = state["step"], state["accepted"]
        divergences = state["info"]["divergences"]
    total, edges = options.num_warmup + num_draws * options.thin, set(windows(options.num_warmup))
    while step < total:
        warm = step < options.num_warmup
        step_size = math.exp(adaptation.log_step if warm else adaptation.log_step_mean)
        noise, uniform, length = _randomness(options, at.flat, seed, step)
        at, found = transition(density, at, noise, uniform, adaptation.inverse_mass, step_size, length)
        acceptance = float(found.acceptance.mean())
        step += 1
        if warm:
            adaptation = update_step_size(adaptation, acceptance, options.target_accept)
            adaptation = _learn(options, adaptation, at.flat, prior_variance, step, edges)
        else:
            divergences, accepted = divergences + int(found.divergent.sum()), accepted + acceptance
        after = max(step - options.num_warmup, 0)
        info = {
            "acceptance": accepted / after if after else acceptance,
            "divergences": divergences,
            "step_size": step_size,
        }
        state = {**_save(at, adaptation), "accepted": accepted, "step": step, "num_steps": total, "info": info}
        yield _block(options, model, at, after), state
    if total > options.num_warmup:
        _warn(accepted / (total - options.num_warmup), divergences, chains * num_draws * options.thin)


def _block(options: HMC, model: BayesianModel, at: Position, after: int) -> Block:
    """The chains' draws, one row a chain, where draw number `after` of the sampling phase is kept; else no row."""
    rows = slice(None) if after > 0 and after % options.thin == 0 else slice(0, 0)
    params, _ = model.constrain(at.flat[rows].cpu())  # [C, P], or none of them
    chain = torch.arange(options.num_chains)[rows]
    draw = torch.full_like(chain, after // options.thin - 1)
    return make_block(params, chain=chain, draw=draw, log_joint=at.log_joint[rows].cpu())


def _warn(acceptance: float, divergences: int, num_trajectories: int) -> None:
    """Say aloud what makes draws useless: chains that stand still or trajectories that diverge."""
    if acceptance < 0.2 or divergences > 0.05 * num_trajectories:
        warnings.warn(
            f"HMC: acceptance {acceptance:.2f}, {divergences} of {num_trajectories} trajectories "
            "diverged: the draws do not represent the posterior; raise num_warmup, target_accept or the prior's precision",
            stacklevel=2,
        )


def _learn(
    options: HMC, adaptation: Adaptation, flat: Tensor, prior_variance: Tensor, step: int, edges: set[int]
) -> Adaptation:
    """The mass part of warm-up after draw `step`."""
    if not options.adapt_mass or step <= int(0.15 * options.num_warmup):
        return adaptation
    adaptation = update_moments(adaptation, flat)
    if step in edges:
        adaptation = restart_step_size(learn_mass(adaptation, prior_variance), math.exp(adaptation.log_step_mean))
    return adaptation


def _start(options: HMC, model: BayesianModel, density: Density, seed: int) -> Position:
    if options.init == "module":
        flat = model.unconstrain(model.module_params()).expand(options.num_chains, -1).clone()
    else:
        draws = [model.sample_prior(seed, "start", chain) for chain in range(options.num_chains)]
        flat = torch.stack([model.unconstrain(draw) for draw in draws])  # [C, P]
    flat = flat.to(model.device)
    if options.init == "ensemble":
        flat = climb(density, flat, model.prior_scale().to(flat))
    value, log_joint, gradient = density(flat)
    if not (value.isfinite().all() and gradient.isfinite().all()):
        raise FitError(
            "HMC",
            want="a finite log joint at the start",
            got=f"{value.tolist()}",
            fix="use a narrower prior, standardise the data, or init='module'",
        )
    return Position(flat, value, log_joint, gradient)


def climb(density: Density, flat: Tensor, scale: Tensor) -> Tensor:
    """Adam on the log density of every chain at once: u <- u + rate * scale * m / (sqrt v + eps).

    Args:
        flat: where the chains are [C, P].
        scale: of each number [P], in whose units steps are taken: the prior's.

    Returns:
        Positions [C, P] nearer to a mode. They are no draws: warm-up makes those.
    """
    mean, square = torch.zeros_like(flat), torch.zeros_like(flat)
    for step in range(1, CLIMB_STEPS + 1):
        _, _, gradient = density(flat)
        slope = gradient * scale
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope.square()
        rate = CLIMB_RATE * (1.0 - step / (CLIMB_STEPS + 1))
        update = (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
        flat = flat + rate * scale * update
    return flat


def _first_adaptation(options: HMC, density: Density, at: Position, prior_variance: Tensor, seed: int) -> Adaptation:
    zeros = torch.zeros_like(at.flat)
    start = Adaptation(0.0, 0.0, 0.0, 0, 0.0, prior_variance, 0, zeros, zeros)
    step_size = options.step_size or _reasonable_step_size(density, at, prior_variance, seed)
    return restart_step_size(start, step_size)


def _reasonable_step_size(density: Density, at: Position, inverse_mass: Tensor, seed: int) -> float:
    """A step size, found by doubling or halving, at which one step is accepted about half of the time."""
    noise = torch.randn(at.flat.shape, generator=generator(seed, "step size"), dtype=at.flat.dtype)
    noise, uniform = noise.to(at.flat.device), torch.ones(len(noise), dtype=torch.float64, device=at.flat.device)

    def acceptance(step_size: float) -> float:
        return float(transition(density, at, noise, uniform, inverse_mass, step_size, 1)[1].acceptance.mean())

    step_size = 0.1
    direction = 1 if acceptance(step_size) > 0.5 else -1
    for _ in range(50):
        following = step_size * 2.0**direction
        if (acceptance(following) > 0.5) != (direction == 1):
            return step_size if direction == 1 else following
        step_size = following
    raise FitError(
        "HMC", want="a step size between 1e-16 and 1e14", got="none", fix="check the scale of prior and data"
    )


def _randomness(options: HMC, like: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor, int]:
    """Momenta [C, P], uniforms [C] and the length of draw `step`: by (seed, chain, step), whatever runs beside."""
    sources = [generator(seed, "chain", chain, step) for chain in range(options.num_chains)]
    noise = torch.stack([torch.randn(like.shape[1], generator=source, dtype=like.dtype) for source in sources])
    uniform = torch.stack([torch.rand((), generator=source, dtype=torch.float64) for source in sources])
    shortest = math.ceil(options.num_steps / 2)
    length = torch.randint(shortest, options.num_steps + 1, (), generator=generator(seed, "length", step))
    return noise.to(like.device), uniform.to(like.device), int(length)


def _save(at: Position, adaptation: Adaptation) -> State:
    state = {f"at.{name}": value for name, value in at._asdict().items()}
    return state | {f"adaptation.{name}": value for name, value in adaptation._asdict().items()}


def _restore(state: State, device: torch.device) -> tuple[Position, Adaptation]:
    here: dict[str, Any] = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in state.items()}
    at = Position(*(here[f"at.{name}"] for name in Position._fields))
    return at, Adaptation(*(here[f"adaptation.{name}"] for name in Adaptation._fields))


def _like(flags: Tensor, tensor: Tensor) -> Tensor:
    """[C] -> [C] or [C, 1], to stand beside a tensor over chains."""
    return flags if tensor.dim() == 1 else flags.unsqueeze(1)
