"""Variational posteriors: a guide is fitted to the model by gradients of the ELBO, then sampled."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from bnn import adam
from bnn.batches import Share, minibatches, moved
from bnn.distributed import ranks
from bnn.drawing import NORMAL_FAMILIES, VIRTUAL_DRAWS, GuideDraws, frozen
from bnn.errors import ConfigError, FitError, NotConverged, check_kinds, choose
from bnn.inference import svi
from bnn.inference.climbing import weighted_shares
from bnn.inference.families import Draw, Family, FlowFamily, FullRankFamily, NormalFamily, Point
from bnn.inference.gradients import Gradient, Height, Repeated, gradient_of, height_of
from bnn.inference.row_noise import RowNoise, eligible_rows, row_noise_loss
from bnn.model import BayesianModel
from bnn.seeding import derive, generator, isolated
from bnn.types import Batch, Block, Data, Params, State, make_block

FamilyName: TypeAlias = Literal["mean-field", "low-rank", "full-rank", "flow", "map"]
FAMILIES: tuple[str, ...] = ("mean-field", "low-rank", "full-rank", "flow", "map")

Draws: TypeAlias = Literal["random", "antithetic", "sobol", "mean"]
DRAWS: tuple[str, ...] = ("random", "antithetic", "sobol", "mean")

VarianceReduction: TypeAlias = Literal["none", "antithetic", "local", "flipout"]
VARIANCE_REDUCTIONS: tuple[str, ...] = ("none", "antithetic", "local", "flipout")

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep
WINDOWS = 20  # of the run, over which the ELBO is averaged to see its trend
STILL_RISING = 0.02  # share of all that the ELBO gained, above which a gain in the last quarter says: go on


@dataclass(frozen=True)
class Guide:
    """q(theta) that maximises the evidence lower bound.

    ELBO(q) = E_q[log p(D, theta)] - E_q[log q(theta)], with the log joint of a batch for log p(D, theta)

    All weights are one flat vector u [P] in the unconstrained space of the model. Families of our own:

    - `"mean-field"`: Normal(m, diag(s^2));
    - `"low-rank"`: a normal with covariance diag(s) (I + W W^T) diag(s), W of given rank;
    - `"full-rank"`: a normal with any covariance, of P^2 / 2 parameters;
    - `"flow"`: an inverse autoregressive flow of a spline a value, whose net has `hidden` units;
    - `"map"`: the single point of highest log joint.

    Guides of Pyro, fitted by its SVI with a site `"theta"` of all weights, or with `sites="parameter"` a site a
    parameter under its own name, of its own shape: the name of a class in `pyro.infer.autoguide`
    (`"AutoNormal"`), a class or `functools.partial` that makes a guide from a Pyro model, or the guide itself, a
    function or Pyro module called with inputs and targets (x, y).

    Gradients are those of reparameterised draws u = T(z) (Pyro's `rsample`) wherever a distribution has them,
    and of the score, f(u) grad log q(u), where it has only `sample`. Samples are drawn afterwards without a graph,
    each from its own generator; of normal families u = m + L z with z standard normal, and z

    - `"random"`: independent;
    - `"antithetic"`: in pairs z, -z, so that what is odd about the mean cancels in a pair;
    - `"sobol"`: Phi^-1 of a scrambled Sobol sequence, which fills space evenly: best for a number of
      samples that is a power of 2, and for at most 21,201 dimensions;
    - `"mean"`: the one sample m.

    Args:
        family: the form of q.
        num_steps: optimisation steps, at least 1.
        batch_size: rows a step.
        lr: of Adam, falling exponentially to a hundredth over the run.
        rank: of `"low-rank"`, at least 1.
        hidden: width of the net of `"flow"`, at least 1.
        init_scale: initial standard deviation of q, as a share of the prior's.
        block_size: samples a block; the samples do not depend on it.
        draws: how samples are drawn from q.
        variance_reduction: of the ELBO's gradient. `"antithetic"` takes each step at z and at -z. Of mean-field,
            `"local"` draws the outputs of linear layers in place of their weights, one draw a row, and
            `"flipout"` flips the signs of one draw a row, in linear and convolutional layers. Tensors that a
            layer does not allow keep the draw of the batch.
        sites: of guides of Pyro.
        pyro_model: a Pyro model (x, y) of one's own, whose density is fitted in place of the BayesianModel's. It
            samples a site for each parameter under its name, scales its likelihood to all N rows itself, and
            may have other sites, which the guide fits and the bank leaves out. Needs `sites="parameter"`.
        memory: bytes that `"full-rank"` and `"flow"`, or Pyro's AutoMultivariateNormal and AutoIAFNormal, may need
            while they are fitted.

    Raises:
        ConfigError: an option out of range, more dimensions than a Sobol sequence has, more bytes than `memory`,
            a guide whose sites are not the model's.
        FitError: the loss is not finite; step and last finite loss are named.

    Source: Kingma and Welling (2014), arXiv:1312.6114; Kucukelbir et al. (2017), arXiv:1603.00788; of the score,
    Ranganath et al. (2014), arXiv:1401.0118. Of the sequence: Joe and Kuo (2008), SIAM J. Sci. Comput. 30(5); of its
    scrambling, Owen (1998).
    """

    family: FamilyName | str | Callable[..., Any] = "mean-field"
    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    rank: int = 10
    hidden: int = 64
    init_scale: float = 0.05
    block_size: int = 64
    draws: Draws = "random"
    variance_reduction: VarianceReduction = "none"
    sites: svi.Sites = "flat"
    pyro_model: svi.Program | None = None
    memory: int = 4 * 1024**3

    def __post_init__(self) -> None:
        check_kinds(self)
        if isinstance(self.family, str):
            if self.family == "AutoLaplaceApproximation":
                svi.autoguide_named(self.family)
            choose("Guide", self.family, [*FAMILIES, *svi.AUTOGUIDES])
        elif not callable(self.family):
            raise ConfigError("Guide", want="a family or a guide", got=repr(self.family), fix="pass 'mean-field'")
        choose("Guide(draws=)", self.draws, DRAWS)
        choose("Guide(variance_reduction=)", self.variance_reduction, VARIANCE_REDUCTIONS)
        choose("Guide(sites=)", self.sites, svi.SITES)
        for name in ("num_steps", "batch_size", "rank", "hidden", "block_size", "memory"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Guide({name}=)", want="at least 1", got=str(getattr(self, name)), fix="raise it")
        for name in ("lr", "init_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"Guide({name}=)", want="a positive number", got=str(getattr(self, name)), fix="try 0.01"
                )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.draws != "random" and self.family not in ("mean-field", "low-rank", "full-rank"):
            why = "'map', a point" if self.family == "map" else "a guide that is no normal of ours"
            raise ConfigError("Guide(draws=)", want=f"none for {why}", got=self.draws, fix="leave it out")
        normal = self.family in ("mean-field", "low-rank", "full-rank", "flow")
        if self.variance_reduction in ("local", "flipout") and self.family != "mean-field":
            raise ConfigError(
                "Guide(variance_reduction=)",
                want="'none' or 'antithetic' unless weights are independent",
                got=self.variance_reduction,
                fix="choose 'mean-field'",
            )
        if self.variance_reduction == "antithetic" and not normal:
            raise ConfigError(
                "Guide(variance_reduction=)", want="'none' for this family", got="antithetic", fix="leave it out"
            )
        if self.is_own and (self.sites != "flat" or self.pyro_model is not None):
            raise ConfigError(
                "Guide(sites=, pyro_model=)",
                want="a guide of Pyro",
                got=f"{self.family!r}, which knows one flat vector",
                fix="pass 'AutoNormal' or a guide of your own",
            )
        changed = [name for name in ("rank", "hidden", "init_scale") if getattr(self, name) != getattr(Guide, name)]
        if not self.is_own and changed:
            raise ConfigError(
                f"Guide({changed[0]}=)",
                want="none for a guide of Pyro, whose options are its own",
                got=str(getattr(self, changed[0])),
                fix="pass a functools.partial of its class",
            )
        if self.pyro_model is not None and self.sites != "parameter":
            raise ConfigError(
                "Guide(pyro_model=)", want="sites='parameter'", got="'flat'", fix="pass sites='parameter' beside it"
            )

    @property
    def is_own(self) -> bool:
        """Whether the family is one of ours, not a guide of Pyro."""
        return self.family in FAMILIES

    @property
    def name(self) -> str:
        return str(self.family) if self.is_own else "guide"

    @property
    def split(self) -> str:
        """How ranks share a fit: nothing where noise belongs to the rows of one batch, or Pyro takes the steps."""
        return "gradients" if self.is_own and self.variance_reduction in ("none", "antithetic") else ""

    @property
    def title(self) -> str:
        """The family, or the name of the guide, for people."""
        kind = getattr(self.family, "func", self.family)
        return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        if num_samples != 1 and (self.family == "map" or self.draws == "mean"):
            what = "Guide('map')" if self.family == "map" else "Guide(draws='mean')"
            raise ConfigError(
                "num_samples", want=f"1 for {what}, which is one point", got=str(num_samples), fix="pass num_samples=1"
            )
        size = model.layout.num_values + (self.rank if self.family == "low-rank" else 0)
        if self.draws == "sobol" and size > SobolEngine.MAXDIM:
            raise ConfigError(
                "Guide(draws='sobol')",
                want=f"at most {SobolEngine.MAXDIM:,} dimensions, which the sequence has",
                got=f"{size:,}",
                fix="draw with 'antithetic', or make fewer parameters Bayesian",
            )
        _check_memory(self, model)
        yield from _run(self, model, data, num_samples, seed, state)


class Descent(NamedTuple):
    """-ELBO, a scalar, and its gradient in each parameter; None where it does not depend on that."""

    loss: Tensor
    slopes: Sequence[Tensor | None]


class Fitted(NamedTuple):
    """What is optimised, and how it is used."""

    parameters: dict[str, Tensor]  # leaves
    descent: Callable[[Share, float, int], Descent]  # of a batch, weight of its likelihood, step
    draw: Callable[[range], Params]  # bank indices -> params [K, *shape]
    around: Callable[[int], AbstractContextManager[None]]  # of steps from this one on


def _run(
    options: Guide, model: BayesianModel, data: Data, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    total = options.num_steps + num_samples
    fitted = _family_fit(options, model, data, seed) if options.is_own else _pyro_fit(options, model, data, seed)
    fused = options.is_own and model.device.type == "cpu"  # one pass over each tensor; Pyro's may be of any kind
    optimizer = torch.optim.Adam(fitted.parameters.values(), lr=options.lr, fused=fused or None)
    if state is not None:
        adam.load(state, optimizer, fitted.parameters)
    step = 0 if state is None else min(state["step"], options.num_steps)
    drawn = 0 if state is None else max(state["step"] - options.num_steps, 0)
    info: dict[str, float] = {} if state is None else state["info"]
    trend = torch.zeros(WINDOWS, dtype=torch.float64) if state is None else state["trend"]
    if step < options.num_steps:
        rank, world_size = ranks().rank, ranks().world_size
        batches = weighted_shares(
            model, data, options.batch_size, seed=seed, start=step, rank=rank, world_size=world_size
        )
    while step < options.num_steps:
        steps = range(step, min(step + STEPS_PER_STATE, options.num_steps))
        with fitted.around(step):
            elbos = _optimise(options, fitted, optimizer, batches, steps, info.get("elbo_per_row"), model.num_data)
        if ranks().several:
            _align(optimizer, fitted.parameters)
        step, info = steps.stop, {"elbo_per_row": float(elbos.mean())}
        trend = trend.index_add(0, torch.tensor(steps) * WINDOWS // options.num_steps, elbos)
        if step == options.num_steps:
            _warn_if_rising(options, trend)
        kept = {**adam.save(optimizer, fitted.parameters), "trend": trend}
        yield model.layout.no_rows(), {**kept, "step": step, "num_steps": total, "info": info}
    kept = {**adam.save(optimizer, fitted.parameters), "trend": trend}
    for start in range(drawn, num_samples, options.block_size):
        indices = range(start, min(start + options.block_size, num_samples))
        with torch.no_grad():
            params = fitted.draw(indices)
        block = make_block(params, chain=torch.zeros(len(indices), dtype=torch.int64), draw=torch.tensor(indices))
        yield block, {**kept, "step": options.num_steps + indices.stop, "num_steps": total, "info": info}


def _family_fit(options: Guide, model: BayesianModel, data: Data, seed: int) -> Fitted:
    """One of our families, started at the module's present values."""
    if options.family == "map":
        model.require_mode("Guide('map')")
    family = make_family(options, model, seed)
    how: RowNoise | None = None
    if options.variance_reduction == "local" or options.variance_reduction == "flipout":
        how = options.variance_reduction
    batch = moved(next(minibatches(data, options.batch_size, seed=seed)), model.device)
    model.check_rows(batch)
    rows: frozenset[str] = frozenset() if how is None else eligible_rows(model, batch, how)

    def normals_of(step: int) -> tuple[torch.Generator, Tensor]:
        # Draws are made where they are used: by (seed, step), whatever ran before.
        source = generator(seed, "step", step, device=model.device)
        return source, torch.randn(family.num_normals, generator=source, device=model.device, dtype=model.layout.dtype)

    # Of a mode the log joint: a point has no density to transform.
    constrained = options.family == "map"
    height, gradient = height_of(model, constrained=constrained), gradient_of(model, constrained=constrained)
    parameters = list(family.parameters.values())

    def draws(normals: Tensor) -> list[Draw]:
        return [family.draw(side) for side in _sides(options, normals)]

    def through_python(normals: Tensor, batch: Batch, weight: float) -> tuple[Tensor, ...]:
        loss = family_loss(draws(normals), height, batch, weight)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    repeated = Repeated(through_python, model.device)

    def descent(share: Share, weight: float, step: int) -> Descent:
        source, normals = normals_of(step)
        if ranks().several:
            loss, other = shared_loss(draws(normals), gradient, share, weight, step)
            return Descent(loss, torch.autograd.grad(other, parameters))
        assert share.batch is not None, "one process has whole batches"
        if how is None:
            loss, *slopes = repeated(normals, share.batch, weight, step)
            return Descent(loss, slopes)
        assert isinstance(family, NormalFamily)
        loss = row_noise_loss(family, model, share.batch, weight, normals, rows, how, source)
        return Descent(loss.detach(), torch.autograd.grad(loss, parameters))

    def draw(indices: range) -> Params:
        return model.space.values(_draw(family, options, model, seed, indices).cpu().contiguous())  # [K, P]

    return Fitted(family.parameters, descent, draw, lambda step: nullcontext())


def _sides(options: Guide, normals: Tensor) -> list[Tensor]:
    return [normals, -normals] if options.variance_reduction == "antithetic" else [normals]


def make_family(options: Guide, model: BayesianModel, seed: int) -> Family:
    """The family at its start: at the module's present values, with a share of the prior's scale."""
    start = model.unconstrain(model.module_params()).to(model.device)
    scale = (options.init_scale * model.prior_scale()).to(start)
    source = generator(seed, "guide")
    if options.family == "map":
        return Point(start)
    if options.family == "full-rank":
        return FullRankFamily(start, scale)
    if options.family == "flow":
        return FlowFamily(start, scale, options.hidden, source)
    return NormalFamily(start, scale, options.rank if options.family == "low-rank" else 0, source)


def family_loss(draws: Sequence[Draw], height: Height, batch: Batch, weight: float) -> Tensor:
    """-ELBO of these draws of q: -mean_u (height(u) + surprise(u)), in nats."""
    return -torch.stack([height(draw.flat, batch, weight) + draw.surprise for draw in draws]).mean()


def shared_loss(
    draws: Sequence[Draw], gradient: Gradient, share: Share, weight: float, step: int
) -> tuple[Tensor, Tensor]:
    """`family_loss` where each rank has its rows of the batch, and a scalar with the same gradient.

    loss(batch) = -mean_u (sum_r B_r / B height(u; rows of r) + surprise(u)): each log likelihood is scaled by N / B_r

    What travels, as one flat tensor, are the heights' slopes at the draws, P numbers each, whatever the number of parameters:
    all ranks have the same draws, to rounding (`_align`), and lead the sum of the slopes back to the parameters.
    """
    flats = [draw.flat.detach() for draw in draws]
    announced = ranks().coming_total(flats[0].new_empty(sum(map(len, flats)) + 1))
    total, slopes = flats[0].new_zeros(1), [torch.zeros_like(flat) for flat in flats]
    if share.batch is not None:
        found = [gradient(flat.unsqueeze(0), share.batch, weight, step) for flat in flats]
        part = len(share.batch.y) / share.total / len(draws)
        slopes = [part * slope[0] for slope, _ in found]
        total = part * torch.cat([height for _, height in found]).sum().reshape(1).to(total)
    *slopes, total = announced(torch.cat([*slopes, total])).split([*map(len, flats), 1])
    surprise = torch.stack([draw.surprise for draw in draws]).mean()
    led_back = torch.stack([draw.flat @ slope for draw, slope in zip(draws, slopes, strict=True)]).sum()
    return -(total[0] + surprise.detach()), -(led_back + surprise)


def _pyro_fit(options: Guide, model: BayesianModel, data: Data, seed: int) -> Fitted:
    """A guide of Pyro under SVI."""
    batch = moved(next(minibatches(data, options.batch_size, seed=seed)), model.device)
    model.check_rows(batch)
    fit = svi.build(_pyro_family(options), options.sites, options.pyro_model, model, batch, seed)

    known = svi.parameters(fit)

    def descent(share: Share, weight: float, step: int) -> Descent:
        assert share.batch is not None, "Pyro takes whole batches"
        try:
            loss = svi.loss(fit, share.batch, weight)
        except ValueError as error:
            if not svi.is_improper(error):
                raise
            return Descent(torch.full((), math.nan), [None] * len(known))  # `_optimise` raises, with the step
        moving = [name for name, parameter in known.items() if parameter.requires_grad]
        slopes = torch.autograd.grad(loss, [known[name] for name in moving], allow_unused=True)
        found = dict(zip(moving, slopes, strict=True))
        return Descent(loss.detach(), [found.get(name) for name in known])

    def draw(indices: range) -> Params:
        with svi.apart(fit.store):
            found = [svi.draw(fit, batch, seed, index) for index in indices]
        return {name: torch.stack([params[name] for params in found]) for name in model.layout.names}

    @contextmanager
    def around(step: int) -> Iterator[None]:
        with svi.apart(fit.store), isolated(seed, "svi", step), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN")  # `_optimise` raises, with the step
            yield
        if late := svi.parameters(fit).keys() - known.keys():
            raise ConfigError(
                "Guide", want="all parameters at its first call", got=f"'{min(late)}' later", fix="make it there too"
            )

    return Fitted(known, descent, draw, around)


def _optimise(
    options: Guide,
    fitted: Fitted,
    optimizer: torch.optim.Adam,
    batches: Iterator[tuple[Share, float]],
    steps: range,
    last_good: float | None,
    num_data: int,
) -> Tensor:
    """Take these steps; their ELBO a row, float64. Ranks take their rows of each batch, and sum what these say."""
    losses = []
    for step in steps:
        optimizer.param_groups[0]["lr"] = options.lr * 0.01 ** (step / options.num_steps)
        losses.append(_descend(fitted, optimizer, *next(batches), step))
    elbos = -torch.stack(losses).double().cpu() / num_data
    bad = (~elbos.isfinite()).nonzero()
    if len(bad) or not all(bool(p.isfinite().all()) for p in fitted.parameters.values()):
        first = int(bad[0]) if len(bad) else len(steps) - 1
        good = last_good
        if first > 0 or not len(bad):
            good = float(elbos[first - 1 if len(bad) else first])
        raise FitError(
            f"Guide('{options.title}')",
            want="a finite loss and gradient",
            got=f"{'a loss that is not' if len(bad) else 'parameters that are not'} at step {steps[first]}; "
            + ("none was before it" if good is None else f"the last good ELBO a row was {good:.6g}"),
            fix=f"lower lr (it is {options.lr:g}) or init_scale, or standardise the data",
        )
    return elbos


def _descend(fitted: Fitted, optimizer: torch.optim.Adam, share: Share, weight: float, step: int) -> Tensor:
    """Take a step, and leave no gradients: those of the next one need their memory. Returns -ELBO."""
    loss, slopes = fitted.descent(share, weight, step)
    for parameter, slope in zip(fitted.parameters.values(), slopes, strict=True):
        parameter.grad = None if slope is None else slope.contiguous()  # as a fused optimiser takes it
    optimizer.step()
    optimizer.zero_grad()
    return loss


def _align(optimizer: torch.optim.Adam, parameters: Mapping[str, Tensor]) -> None:
    """Give all ranks the parameters and moments of rank 0.

    Each leads the same slopes back by itself, which processors of two kinds, or two numbers of threads, round apart.
    """
    together, held = ranks(), []
    for parameter in parameters.values():
        moments = optimizer.state[parameter]
        held += [parameter.data, moments["exp_avg"], moments["exp_avg_sq"]]
    own = torch.cat([tensor.flatten() for tensor in held]).cpu() if together.rank == 0 else None
    told = together.broadcast(own, shape=(sum(tensor.numel() for tensor in held),), dtype=held[0].dtype)
    if own is None:
        for tensor, values in zip(held, told.split([tensor.numel() for tensor in held]), strict=True):
            tensor.copy_(values.view_as(tensor))


def _warn_if_rising(options: Guide, trend: Tensor) -> None:
    """Say aloud that the ELBO had not settled: it gained in the last quarter of the steps, beyond its noise."""
    if options.num_steps < 2 * WINDOWS:
        return
    counts = torch.bincount(torch.arange(options.num_steps) * WINDOWS // options.num_steps, minlength=WINDOWS)
    means = trend / counts  # [WINDOWS]
    quarter = WINDOWS // 4
    before, last = means[-2 * quarter : -quarter], means[-quarter:]
    gain, whole = float(last.mean() - before.mean()), float(last.mean() - means[0])
    noise = math.sqrt(float(before.var() + last.var()) / quarter)
    if gain > 3 * noise and gain > STILL_RISING * whole:
        warnings.warn(
            f"Guide('{options.title}'): the ELBO a row still rose from {float(before.mean()):.4g} to "
            f"{float(last.mean()):.4g} in the last quarter of {options.num_steps} steps; raise num_steps or lr",
            NotConverged,
            stacklevel=2,
        )


def _pyro_family(options: Guide) -> Any:
    return svi.autoguide_named(options.family) if isinstance(options.family, str) else options.family


def _check_memory(options: Guide, model: BayesianModel) -> None:
    """Raise ConfigError, before anything is made, where a family that grows with P^2 or P H needs too much."""
    size, itemsize, need = model.layout.num_values, model.layout.dtype.itemsize, 0
    if options.family == "full-rank":
        need = FullRankFamily.num_bytes(size, itemsize)
    elif options.family == "flow":
        need = FlowFamily.num_bytes(size, options.hidden, itemsize)
    elif not options.is_own:
        need = svi.num_bytes(_pyro_family(options), size, itemsize)
    if need > options.memory:
        other = "a smaller hidden, 'low-rank'" if options.family == "flow" else "'low-rank'"
        raise ConfigError(
            f"Guide('{options.title}', memory=)",
            want=f"at least {need:,} bytes for {size:,} values",
            got=f"{options.memory:,}",
            fix=f"raise memory, choose {other}, or make fewer parameters Bayesian",
        )


def _draw(family: Family, options: Guide, model: BayesianModel, seed: int, indices: range) -> Tensor:
    """Samples of the guide in unconstrained space, [K, P]: each has the same bits whatever is drawn beside it."""
    loc = family.parameters["loc"]
    if options.draws == "mean" or options.family == "map":
        return loc.detach().clone().expand(len(indices), -1)
    if options.family in NORMAL_FAMILIES and options.draws in VIRTUAL_DRAWS:
        draws = GuideDraws(model.space, frozen(family.parameters), seed, options.draws == "antithetic")
        return draws.flat(indices)
    normals = torch.empty(len(indices), family.num_normals, dtype=loc.dtype)
    if options.draws == "sobol":
        engine = SobolEngine(family.num_normals, scramble=True, seed=derive(seed, "sobol"))
        engine.fast_forward(indices.start)
        # The engine's points are multiples of 2^-30: in the middle of their cells none is 0 or 1, where Phi^-1 ends.
        # Its first is kept in float32, which can round it up to 1.
        points = engine.draw(len(indices), dtype=torch.float64).clamp_max(1 - 2.0**-30) + 2.0**-31
        normals.copy_(torch.special.ndtri(points))
    else:
        for row, index in zip(normals, indices, strict=True):
            row.normal_(generator=generator(seed, "draw", index))
    normals = normals.to(loc.device)
    if isinstance(family, NormalFamily) and not family.rank:
        return torch.addcmul(loc, family.scale, normals)  # value by value: no sum whose order depends on K
    return torch.stack([family.draw(row).flat for row in normals])
