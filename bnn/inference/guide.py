"""Variational posteriors with Pyro: a guide is fitted by SVI to one flat site of all weights, then sampled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLowRankMultivariateNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor
from torch.quasirandom import SobolEngine

from bnn import adam
from bnn.batches import mean_rows, minibatches, moved
from bnn.errors import ConfigError, FitError, choose
from bnn.model import BayesianModel
from bnn.seeding import GLOBAL_STATE, derive, generator, isolated
from bnn.types import Batch, Block, Data, State, make_block

Family: TypeAlias = Literal["mean-field", "low-rank", "map"]
FAMILIES: tuple[str, ...] = ("mean-field", "low-rank", "map")

Draws: TypeAlias = Literal["random", "antithetic", "sobol", "mean"]
DRAWS: tuple[str, ...] = ("random", "antithetic", "sobol", "mean")

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep


@dataclass(frozen=True)
class Guide:
    """q(theta) that maximises the evidence lower bound, found with Pyro's SVI.

    ELBO(q) = E_q[log p(D, theta)] - E_q[log q(theta)], with the log joint of a batch for log p(D, theta)

    `"mean-field"` is a normal with a diagonal covariance, `"low-rank"` one with the covariance
    W W^T + D of given rank, `"map"` the single point of highest log joint. All weights are one flat
    site, in the unconstrained space of the model. Gradients are those of reparameterised draws;
    samples are drawn afterwards without a graph, each from its own generator, in unconstrained space
    u = m + L z with z standard normal:

    - `"random"`: independent;
    - `"antithetic"`: samples 2j and 2j + 1 are m + L z and m - L z, so that what is odd about the mean
      cancels in a pair;
    - `"sobol"`: z = Phi^-1 of a scrambled Sobol sequence, which fills space evenly: best for a number of
      samples that is a power of 2, and for at most 21,201 dimensions;
    - `"mean"`: the one sample m.

    Args:
        family: the form of q.
        num_steps: optimisation steps, at least 1.
        batch_size: rows a step.
        lr: of Adam, falling exponentially to a hundredth over the run.
        rank: of `"low-rank"`, at least 1.
        init_scale: initial standard deviation of q, as a share of the prior's.
        block_size: samples a block; the samples do not depend on it.
        draws: how samples are drawn from q.

    Raises:
        ConfigError: an option out of range, or more dimensions than a Sobol sequence has.
        FitError: the loss is not finite.

    Source: Kingma and Welling (2014), arXiv:1312.6114; Kucukelbir et al. (2017), arXiv:1603.00788. Of the
    sequence: Joe and Kuo (2008), SIAM J. Sci. Comput. 30(5); of its scrambling, Owen (1998).
    """

    family: Family = "mean-field"
    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    rank: int = 10
    init_scale: float = 0.05
    block_size: int = 64
    draws: Draws = "random"

    def __post_init__(self) -> None:
        choose("Guide", self.family, FAMILIES)
        choose("Guide(draws=)", self.draws, DRAWS)
        if self.family == "map" and self.draws != "random":
            raise ConfigError("Guide(draws=)", want="none for 'map', a point", got=self.draws, fix="leave it out")
        for name in ("num_steps", "batch_size", "rank", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Guide({name}=)", want="at least 1", got=str(getattr(self, name)), fix="raise it")
        if not (self.lr > 0 and self.init_scale > 0):
            raise ConfigError(
                "Guide(lr=, init_scale=)",
                want="positive numbers",
                got=f"{self.lr}, {self.init_scale}",
                fix="pass ones such as 0.01 and 0.05",
            )

    @property
    def name(self) -> str:
        return self.family

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        if num_samples != 1 and (self.family == "map" or self.draws == "mean"):
            what = "Guide('map')" if self.family == "map" else "Guide(draws='mean')"
            raise ConfigError(
                "num_samples", want=f"1 for {what}, which is one point", got=str(num_samples), fix="pass num_samples=1"
            )
        if self.draws == "sobol" and (size := _dimensions(self, model)) > SobolEngine.MAXDIM:
            raise ConfigError(
                "Guide(draws='sobol')",
                want=f"at most {SobolEngine.MAXDIM:,} dimensions, which the sequence has",
                got=f"{size:,}",
                fix="draw with 'antithetic', or make fewer parameters Bayesian",
            )
        yield from _run(self, model, data, num_samples, seed, state)


def _run(
    options: Guide, model: BayesianModel, data: Data, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    total = options.num_steps + num_samples
    guide, density = _build(options, model, mean_rows(data, options.batch_size), seed)
    named = dict(guide.named_parameters())
    optimizer = torch.optim.Adam(named.values(), lr=options.lr)
    if state is not None:
        adam.load(state, optimizer, named)
    step = 0 if state is None else min(state["step"], options.num_steps)
    drawn = 0 if state is None else max(state["step"] - options.num_steps, 0)
    info: dict[str, float] = {} if state is None else state["info"]
    batches = minibatches(data, options.batch_size, seed=seed, start=step)
    here = (moved(batch, model.device) for batch in batches)
    if step < options.num_steps:
        model.check_rows(moved(next(minibatches(data, options.batch_size, seed=seed)), model.device))
    while step < options.num_steps:
        stop = min(step + STEPS_PER_STATE, options.num_steps)
        with _pyro_apart(), isolated(seed, "svi", step), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # `_optimise` raises, with the step
            loss = _optimise(guide, density, optimizer, options, here, range(step, stop))
        step, info = stop, {"elbo_per_row": -loss / model.num_data}
        yield model.layout.no_rows(), {**adam.save(optimizer, named), "step": step, "num_steps": total, "info": info}
    fitted = adam.save(optimizer, named)
    with _pyro_apart(), torch.no_grad():
        posterior = _Normal.of(guide, options)
    for start in range(drawn, num_samples, options.block_size):
        indices = range(start, min(start + options.block_size, num_samples))
        drawn_here = _draw(posterior, options, seed, indices)  # [K, P]
        params, _ = model.constrain(drawn_here.cpu())
        block = make_block(params, chain=torch.zeros(len(indices), dtype=torch.int64), draw=torch.tensor(list(indices)))
        yield block, {**fitted, "step": options.num_steps + indices[-1] + 1, "num_steps": total, "info": info}


def _build(
    options: Guide, model: BayesianModel, rows_per_batch: float, seed: int
) -> tuple[Any, Callable[[Batch], None]]:
    """The guide, started at the module's present values, and the Pyro model that it approximates.

    Steps visit the batches of an epoch equally often, also a short last one, while the contract of
    `log_joint` weighs them by their rows: each likelihood gets the weight B_i / mean B.
    """
    size = model.layout.num_values

    def density(batch: Batch) -> None:
        # The site is only a place for theta: its density is in the factor.
        theta = pyro.sample("theta", dist.ImproperUniform(dist.constraints.real, (), (size,)))
        log_density, log_joint = model.log_density(theta, batch, weight=len(batch.y) / rows_per_batch)
        # A point has no density to transform: the mode is that of the constrained values.
        pyro.factor("log_density", log_joint if options.family == "map" else log_density)

    def place(batch: Batch | None = None) -> None:
        del batch
        pyro.sample("theta", dist.ImproperUniform(dist.constraints.real, (), (size,)))

    start = model.unconstrain(model.module_params()).to(model.device)
    init = init_to_value(values={"theta": start})
    guide: Any
    with _pyro_apart(), isolated(seed, "guide"):
        if options.family == "map":
            guide = AutoDelta(place, init_loc_fn=init)
        elif options.family == "mean-field":
            guide = AutoDiagonalNormal(place, init_loc_fn=init)
        else:
            guide = AutoLowRankMultivariateNormal(place, init_loc_fn=init, rank=options.rank)
        guide(None)  # Pyro makes the guide's parameters at the first call
    if options.family != "map":
        with torch.no_grad():
            scale = (options.init_scale * model.prior_scale()).to(start)
            guide.scale_unconstrained.copy_(scale.expm1().log())  # the inverse of Pyro's softplus
    return guide, density


def _optimise(
    guide: Any,
    density: Callable[[Batch], None],
    optimizer: torch.optim.Adam,
    options: Guide,
    batches: Iterator[Batch],
    steps: range,
) -> float:
    """Take these steps; the mean loss over them, in nats."""
    elbo, losses = Trace_ELBO(), []
    for step in steps:
        optimizer.param_groups[0]["lr"] = options.lr * 0.01 ** (step / options.num_steps)
        optimizer.zero_grad()
        try:
            loss = elbo.differentiable_loss(density, guide, next(batches))
        except ValueError as error:  # Pyro refuses a normal whose scale is no positive number
            if _is_proper(guide):
                raise
            raise _diverged(options, "a standard deviation that is no positive number", step) from error
        loss.backward()
        if not torch.isfinite(loss):
            raise _diverged(options, f"a loss of {float(loss.detach()):.3g}", step)
        optimizer.step()
        losses.append(loss.detach())
    if not _is_proper(guide):  # a gradient that is not finite, under a loss that was
        raise _diverged(options, "parameters that are not", steps[-1])
    return float(torch.stack(losses).mean())


def _is_proper(guide: Any) -> bool:
    """Whether the guide's parameters are finite, and its scale, if it has one, above 0."""
    scale = getattr(guide, "scale", torch.ones(()))
    return bool((scale > 0).all()) and all(bool(torch.isfinite(p).all()) for p in guide.parameters())


def _diverged(options: Guide, got: str, step: int) -> FitError:
    return FitError(
        f"Guide('{options.family}')",
        want="a finite loss and gradient",
        got=f"{got} at step {step}",
        fix=f"lower lr (it is {options.lr:g}) or init_scale, or standardise the data",
    )


class _Normal(NamedTuple):
    """q in unconstrained space: u = mean + scale z_1 + factor z_2, with z standard normal."""

    mean: Tensor  # [P]
    scale: Tensor  # [P]
    factor: Tensor  # [P, rank], of rank 0 unless the covariance has one

    @staticmethod
    def of(guide: Any, options: Guide) -> _Normal:
        if options.family == "map":
            point = guide.theta.detach()
            return _Normal(point, torch.zeros_like(point), point.new_zeros(len(point), 0))
        posterior = guide.get_posterior()
        if options.family == "mean-field":
            scale = posterior.base_dist.scale
            return _Normal(posterior.mean.detach(), scale.detach(), scale.new_zeros(len(scale), 0))
        return _Normal(posterior.loc.detach(), posterior.cov_diag.detach().sqrt(), posterior.cov_factor.detach())

    def at(self, normals: Tensor) -> Tensor:
        """Standard normals [P + rank] -> u [P]."""
        first, second = normals.to(self.mean).split([len(self.mean), self.factor.shape[1]])
        found: Tensor = self.mean + self.scale * first + self.factor @ second
        return found


def _dimensions(options: Guide, model: BayesianModel) -> int:
    """Standard normals behind one draw."""
    return model.layout.num_values + (options.rank if options.family == "low-rank" else 0)


def _draw(posterior: _Normal, options: Guide, seed: int, indices: range) -> Tensor:
    """Samples of the guide in unconstrained space, [K, P]: each has the same bits whatever is drawn beside it."""
    size = len(posterior.mean) + posterior.factor.shape[1]
    if options.draws == "mean" or options.family == "map":
        return posterior.mean.expand(len(indices), -1)
    if options.draws == "sobol":
        engine = SobolEngine(size, scramble=True, seed=derive(seed, "sobol"))
        engine.fast_forward(indices.start)
        # The engine's points are multiples of 2^-30: in the middle of their cells none is 0 or 1, where Phi^-1 ends.
        # Its first is kept in float32, which can round it up to 1.
        points = engine.draw(len(indices), dtype=torch.float64).clamp_max(1 - 2.0**-30) + 2.0**-31
        return torch.stack([posterior.at(torch.special.ndtri(point)) for point in points])
    drawn = []
    for index in indices:
        pair, second = divmod(index, 2) if options.draws == "antithetic" else (index, 0)
        normals = torch.randn(size, generator=generator(seed, "draw", pair), dtype=posterior.mean.dtype)
        drawn.append(posterior.at(-normals if second else normals))
    return torch.stack(drawn)


@contextmanager
def _pyro_apart() -> Iterator[None]:
    """Run Pyro code with a parameter store and settings of its own; the user's are as before afterwards."""
    with GLOBAL_STATE, pyro.get_param_store().scope(), pyro.settings.context(module_local_params=True):
        yield
