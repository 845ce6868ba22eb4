"""The No-U-Turn Sampler of Pyro on the flat density of a model, one chain after another, resumable after every draw."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from bnn.batches import full_batch, moved
from bnn.distributed import ranks
from bnn.errors import ConfigError, FitError, check_kinds
from bnn.inference import starting
from bnn.inference.density import prepare, target_of_model
from bnn.inference.nuts_kernel import Chain, Info, Kernel, Potential, alone
from bnn.inference.starting import Init
from bnn.model import BayesianModel
from bnn.types import Block, Data, Params, State, make_block

STUCK = 100  # trajectories in a row from which no chain moved, after which nothing will come
ENOUGH_TO_JUDGE = 4  # trajectories of a chain: with fewer, one that is refused is no sign of anything


@dataclass(frozen=True)
class NUTS:
    """Draws from p(theta | D) by Pyro's No-U-Turn Sampler: slow, and independent of our own `HMC`, to check it by.

    H(z, p) = -log pi(s z) + p^T M^-1 p / 2, with s the scales of the prior; the trajectory is doubled until it turns
    back or diverges, and the next position is drawn from its points by their weights exp(-H)

    Chains run one after another, each with a step size (dual averaging) and a diagonal mass (variances in windows
    that double) of its own, learnt during warm-up. The data are used in full at each step.

    Args:
        num_chains: chains, at least 1; `num_samples` must be a multiple of it.
        num_warmup: draws a chain for adaptation, not kept; under 20 no mass is learnt.
        max_tree_depth: most doublings, at least 1: a trajectory has at most 2^max_tree_depth - 1 leapfrog steps.
        target_accept: mean acceptance that the step size is adapted to, in (0, 1).
        step_size: of the first trajectory, in units of the prior's scales; found by doubling where None.
        init: where chains start: `"prior"` at a draw of the prior each, `"ensemble"` there and then
            climbed by Adam, `"module"` at the module's values, `"map"` at one mode, climbed to from there; or a
            bank, at rows of it.
        thin: keep every n-th draw.

    Raises:
        ConfigError: an option out of range.
        FitError: the log joint is not finite at the start, or infinite later; every chain has stood still for
            100 trajectories.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(2, 1)
        >>> likelihood = bnn.likelihoods.Gaussian(0.5)
        >>> model = bnn.BayesianModel(module, prior=bnn.priors.Normal(), likelihood=likelihood, num_data=4)
        >>> method = NUTS(num_chains=2, num_warmup=60)
        >>> bnn.fit(model, (torch.eye(4)[:, :2], torch.ones(4, 1)), method=method, num_samples=6)
        Bank(in memory: 6 samples of 3 values)

    Source: Hoffman and Gelman (2014), arXiv:1111.4246; Betancourt (2017), arXiv:1701.02434, appendix A.
    """

    num_chains: int = 4
    num_warmup: int = 300
    max_tree_depth: int = 10
    target_accept: float = 0.8
    step_size: float | None = None
    init: Init | Sequence[Params] = "ensemble"
    thin: int = 1

    def __post_init__(self) -> None:
        check_kinds(self)
        starting.check_init("NUTS(init=)", self.init)
        for name, least in (("num_chains", 1), ("num_warmup", 0), ("max_tree_depth", 1), ("thin", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"NUTS({name}=)", want=f"at least {least}", got=str(value), fix="raise it")
        if not 0 < self.target_accept < 1:
            raise ConfigError(
                "NUTS(target_accept=)", want="a number in (0, 1)", got=str(self.target_accept), fix="try 0.8"
            )
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ConfigError("NUTS(step_size=)", want="a positive number", got=str(self.step_size), fix="leave it out")

    name: ClassVar[str] = "nuts"
    split: ClassVar[str] = "chains"
    columns: ClassVar[tuple[str, ...]] = ("acceptance", "divergent", "step_size", "energy")

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


class Totals(NamedTuple):
    """Sums over the trajectories of a chain, after warm-up."""

    trajectories: int = 0
    acceptance: float = 0.0
    divergences: int = 0
    num_steps: int = 0
    full: int = 0  # trajectories as long as max_tree_depth lets them be

    def add(self, found: Info, longest: int) -> Totals:
        return Totals(
            self.trajectories + 1,
            self.acceptance + found.acceptance,
            self.divergences + found.divergent,
            self.num_steps + found.num_steps,
            self.full + (found.num_steps >= longest),
        )


def _run(
    options: NUTS, model: BayesianModel, data: Data, num_draws: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    batch = moved(full_batch(data), model.device)
    model.check_rows(batch)
    potential, longest = Potential(model, batch), 2**options.max_tree_depth - 1
    kernel = Kernel(
        potential,
        num_warmup=options.num_warmup,
        target_accept=options.target_accept,
        max_tree_depth=options.max_tree_depth,
    )
    together = ranks()
    own = together.share(options.num_chains)
    if state is None:
        chains, step, totals = _start(options, kernel, seed, own), 0, [Totals()] * len(own)
    else:
        chains, step = _restore(state, kernel, seed), state["step"]
        totals = [Totals(*values) for values in state["totals"]]
    total = options.num_warmup + num_draws * options.thin
    while step < total:
        warm = step < options.num_warmup
        rounds: list[list[Info]] = []  # trajectories that lead to this draw, over chains
        for _ in range(1 if warm else options.thin):
            moves = [
                _draw(options, kernel, chain, seed, number, step) for number, chain in zip(own, chains, strict=True)
            ]
            chains, infos = [chain for chain, _ in moves], [info for _, info in moves]
            if not together.several:  # else nobody knows whether another rank's chains move
                _require_moving(options, chains, step)
            rounds.append(infos)
            step += 1
            if not warm:
                totals = [one.add(info, longest) for one, info in zip(totals, infos, strict=True)]
        found = [Totals().add(info, longest) for info in rounds[0]] if warm else totals
        state = {**_save(chains), "totals": [list(one) for one in totals], "step": step, "num_steps": total}
        state |= {"phase": _phase(options, step, total), "info": _info(found, chains)}
        draw = (step - options.num_warmup) // options.thin - 1  # below 0 in warm-up
        yield _block(potential, own, chains, rounds, None if warm else draw), state
    _warn(totals, first=own.start)


def _draw(options: NUTS, kernel: Kernel, chain: Chain, seed: int, number: int, step: int) -> tuple[Chain, Info]:
    """One trajectory of chain `number`."""
    with alone(chain.position.device, seed, "chain", number, step):
        chain, info = kernel.draw(chain, step)
    if info.pole:
        raise FitError(
            "NUTS",
            want="a log density below infinity",
            got=f"inf on the way of chain {number} at {_when(options, step)}",
            fix="look for a scale that reaches 0, or a logarithm or division without a bound; rows committed before it stay",
        )
    return chain, info


def _require_moving(options: NUTS, chains: list[Chain], step: int) -> None:
    """Raise FitError where no chain has moved for long."""
    if all(chain.still >= STUCK for chain in chains):
        raise FitError(
            "NUTS",
            want="chains that move",
            got=f"every chain standing still for {STUCK} trajectories, up to {_when(options, step)}",
            fix="raise num_warmup or target_accept, or look for a density that is NaN beside the chains; rows committed before it stay",
        )


def _when(options: NUTS, step: int) -> str:
    """Trajectory number `step` in words."""
    after = step - options.num_warmup
    return f"trajectory {step} of warm-up" if after < 0 else f"draw {after // options.thin}"


def _phase(options: NUTS, step: int, total: int) -> dict[str, str | int]:
    """Where a run stands, for its bar."""
    if step <= options.num_warmup:
        return {"name": "warm-up", "step": step, "num_steps": options.num_warmup}
    done = {"step": step - options.num_warmup, "num_steps": total - options.num_warmup}
    return {"name": "sampling", **done, "thin": options.thin}


def _block(potential: Potential, own: range, chains: list[Chain], rounds: list[list[Info]], draw: int | None) -> Block:
    """The chains' draws, one row a chain; no row in warm-up, which has no number of a draw."""
    model, rows = potential.model, slice(0, 0) if draw is None else slice(None)
    flat = potential.flat(torch.stack([chain.position for chain in chains]))[rows]  # [C, P], or none of them
    params, _ = model.constrain(flat.cpu())
    with torch.no_grad():
        heights = [model.log_density(one, potential.batch)[1].double().cpu() for one in flat]
    chain = torch.tensor(own)[rows]
    last = rounds[-1]
    columns = {
        "acceptance": [sum(infos[c].acceptance for infos in rounds) / len(rounds) for c in range(len(chains))],
        "divergent": [float(sum(infos[c].divergent for infos in rounds)) for c in range(len(chains))],
        "step_size": [info.step_size for info in last],
        "energy": [info.energy for info in last],
    }
    return make_block(
        params,
        chain=chain,
        draw=torch.full_like(chain, draw or 0),
        log_joint=torch.stack(heights) if heights else None,
        columns={name: torch.tensor(values, dtype=torch.float64)[rows] for name, values in columns.items()},
    )


def _info(totals: list[Totals], chains: list[Chain]) -> dict[str, float]:
    """What the bank's manifest keeps; `mean_steps` are leapfrog steps a trajectory, `full_trees` may be cut short."""
    trajectories = sum(one.trajectories for one in totals)
    return {
        "acceptance": sum(one.acceptance for one in totals) / trajectories,
        "divergences": float(sum(one.divergences for one in totals)),
        "step_size": sum(chain.step_size for chain in chains) / len(chains),
        "mean_steps": sum(one.num_steps for one in totals) / trajectories,
        "full_trees": float(sum(one.full for one in totals)),
    }


def _warn(totals: list[Totals], *, first: int = 0) -> None:
    """Say aloud what makes draws useless: chains that stand still or trajectories that diverge."""
    each = [one.acceptance / one.trajectories for one in totals]  # [C]
    slow = [
        chain
        for chain, acceptance in enumerate(each)
        if acceptance < 0.2 and totals[chain].trajectories >= ENOUGH_TO_JUDGE
    ]
    divergences, trajectories = sum(one.divergences for one in totals), sum(one.trajectories for one in totals)
    if slow or divergences > 0.05 * trajectories:
        mean = sum(each[chain] for chain in slow) / max(len(slow), 1)
        named = (
            f"acceptance {mean:.2f} in chains {', '.join(str(first + chain) for chain in slow[:8])}, " if slow else ""
        )
        warnings.warn(
            f"NUTS: {named}{divergences} of {trajectories} trajectories diverged: the draws do not represent the "
            "posterior; raise num_warmup, target_accept or the prior's precision",
            stacklevel=2,
        )


def _start(options: NUTS, kernel: Kernel, seed: int, own: range) -> list[Chain]:
    """These chains before their first draw.

    Raises:
        FitError: the density or its gradient is not finite there.
    """
    chains = []
    for number, position in zip(own, _positions(options, kernel.potential, seed, own), strict=True):
        with alone(position.device, seed, "start", number):
            chain = kernel.begin(position)
        if not bool(chain.potential.isfinite() & chain.gradient.isfinite().all()):
            raise FitError(
                "NUTS",
                want="a finite log joint and gradient",
                got=f"a log joint of {-float(chain.potential):g} at the start of chain {number}",
                fix="use a narrower prior, standardise the data, or init='module'",
            )
        if options.step_size is not None:
            chain = chain._replace(step_size=options.step_size, centre=math.log(10 * options.step_size))
        chains.append(chain)
    return chains


def _positions(options: NUTS, potential: Potential, seed: int, own: range) -> Tensor:
    """Where these chains start, z [C, P]."""
    model, batch = potential.model, potential.batch
    every = starting.positions(model, options.init, options.num_chains, seed)
    flat = every[own.start : own.stop]  # [C, P]
    if starting.climbs(options.init):
        scale = potential.scale.to(flat.dtype)
        steps = starting.CLIMB_STEPS
        density = prepare(
            target_of_model(model, batch),
            flat,
            num_gradients=steps,
            memory=None,
            compile=False,
            num_chains=options.num_chains,
        )
        at = starting.first_climb(flat, scale)
        for step in range(steps):
            at = starting.climb_step(density, at, scale, step)
        flat = at.flat * scale
    return flat.double() / potential.scale


def _save(chains: list[Chain]) -> State:
    """Tensors over chains [C, ...], numbers as lists."""
    columns = zip(Chain._fields, zip(*chains, strict=True), strict=True)
    return {
        f"chain.{name}": torch.stack(values) if isinstance(values[0], Tensor) else list(values)
        for name, values in columns
    }


def _restore(state: State, kernel: Kernel, seed: int) -> list[Chain]:
    """What `_save` kept, and Pyro's kernel made ready for it: of the sizes and windows that any chain has."""
    device = kernel.potential.scale.device
    columns = [state[f"chain.{name}"] for name in Chain._fields]
    columns = [list(values.to(device)) if isinstance(values, Tensor) else values for values in columns]
    chains = [Chain(*values) for values in zip(*columns, strict=True)]
    with alone(device, seed, "start", 0):
        kernel.begin(chains[0].position)
    return chains
