"""Hamiltonian Monte Carlo with all chains on one batch axis, resumable after every draw."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.batches import full_batch, moved
from bnn.diagnostics import ENOUGH_DRAWS, MAX_RHAT, MIN_EBFMI, ebfmi, split_rhat
from bnn.distributed import ranks
from bnn.errors import ConfigError, check_kinds, choose
from bnn.inference import starting
from bnn.inference.chains import COLUMNS, Draw, movement, run_chains
from bnn.inference.density import target_of_function, target_of_model
from bnn.inference.starting import Init
from bnn.model import BayesianModel
from bnn.progress import with_progress
from bnn.types import Block, Data, Params, State, make_block

Trajectory: TypeAlias = Literal["auto", "fixed", "jittered", "chees"]
Mass: TypeAlias = Literal["diagonal", "low-rank", "unit"]
TRAJECTORIES: tuple[str, ...] = ("auto", "fixed", "jittered", "chees")
MASSES: tuple[str, ...] = ("diagonal", "low-rank", "unit")
DTYPES = {"float32": torch.float32, "float64": torch.float64}

MANY_CHAINS = 16  # from here on their spread is worth a trajectory length learnt by ChEES
STEPS, MOST_STEPS = 64, 512  # leapfrog steps of a trajectory, at most: of a given length, and of a learnt one


@dataclass(frozen=True)
class HMC:
    """Draws from p(theta | D) by simulating Hamiltonian dynamics; exact as the number of draws grows.

    H(u, p) = -log pi(u) + p^T M^-1 p / 2, integrated by leapfrog, accepted with min(1, exp(-dH)).

    Chains run side by side on one `vmap` axis, and the data are used in full at each step. During warm-up the
    step size of each chain is adapted by dual averaging, and one mass for all is learnt from the pooled
    within-chain variances. Energies are summed in float64.

    Args:
        num_chains: C, at least 1; `num_samples` must be a multiple of it.
        num_warmup: draws a chain for adaptation, not kept; under 40 no mass is learnt.
        num_steps: most leapfrog steps of a trajectory, at least 1; by default 64, and 512 under ChEES.
        trajectory: `"fixed"` takes `num_steps`; `"jittered"` draws their number anew for each trajectory, from half of
            `num_steps` to all of it, so that no chain falls into step with a period of its target; `"chees"` learns
            the trajectory's length in warm-up from how far all chains move, and takes a changing share of it;
            `"auto"` is `"chees"` from 16 chains on, below it `"jittered"`.
        target_accept: mean acceptance that the step size is adapted to, in (0, 1).
        step_size: of the first step, in units of the mass; found by doubling where None.
        mass: `"diagonal"`; `"low-rank"`, with up to `rank` directions of large variance beside it; or `"unit"`: the
            prior's scales, not learnt.
        rank: of `"low-rank"`, at least 1.
        init: where chains start: `"prior"` at a draw of the prior each, `"ensemble"` there and then
            climbed by Adam, all at once, so that no chain begins far from every mode, `"module"` at
            the module's values, `"map"` at one mode, climbed to from there; or a bank, at rows of it.
        thin: keep every n-th draw.
        dtype: `"float32"` or `"float64"`, in which chains move and the module computes; by default that of its
            parameters, float32 at least.
        memory: bytes that the values of one gradient may take at once; data are cut into slices to fit, and on a CPU
            also where None, into slices that its cache holds. Where None, what follows from the data alone, such as
            features of layers that are not Bayesian, is computed once, but for the largest of it where all together would
            take more than 64 MiB, and more than the data.
        compile: whether gradients are compiled; by default where they would take more than half a minute without, and
            there is a compiler.

    Raises:
        ConfigError: an option out of range.
        FitError: the log joint is not finite at the start, or infinite later; every chain has stood still for
            100 trajectories.

    Source: Neal (2011), arXiv:1206.1901; Hoffman and Gelman (2014), arXiv:1111.4246; of ChEES, Hoffman, Radul and
    Sountsov (2021), AISTATS.
    """

    num_chains: int = 4
    num_warmup: int = 200
    num_steps: int | None = None
    trajectory: Trajectory = "auto"
    target_accept: float = 0.8
    step_size: float | None = None
    mass: Mass = "diagonal"
    rank: int = 10
    init: Init | Sequence[Params] = "ensemble"
    thin: int = 1
    dtype: Literal["float32", "float64"] | None = None
    memory: int | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("HMC(trajectory=)", self.trajectory, TRAJECTORIES)
        choose("HMC(mass=)", self.mass, MASSES)
        starting.check_init("HMC(init=)", self.init)
        if self.dtype is not None:
            choose("HMC(dtype=)", self.dtype, tuple(DTYPES))
        for name, least in (
            ("num_chains", 1),
            ("num_warmup", 0),
            ("num_steps", 1),
            ("thin", 1),
            ("rank", 1),
            ("memory", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"HMC({name}=)", want=f"at least {least}", got=str(value), fix="raise it")
        if not 0 < self.target_accept < 1:
            raise ConfigError(
                "HMC(target_accept=)", want="a number in (0, 1)", got=str(self.target_accept), fix="try 0.8"
            )
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ConfigError("HMC(step_size=)", want="a positive number", got=str(self.step_size), fix="leave it out")

    name: ClassVar[str] = "hmc"
    columns: ClassVar[tuple[str, ...]] = COLUMNS
    split: ClassVar[str] = "chains"
    together: ClassVar[tuple[str, ...]] = ("climb", "warm-up")

    @property
    def learns_length(self) -> bool:
        """Whether trajectories are ChEES's."""
        return self.trajectory == "chees" or (self.trajectory == "auto" and self.num_chains >= MANY_CHAINS)

    @property
    def most_steps(self) -> int:
        """Leapfrog steps of a trajectory, at most."""
        return self.num_steps or (MOST_STEPS if self.learns_length else STEPS)

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
        inner, batch = _in_dtype(self, model, full_batch(data))
        batch = moved(batch, inner.device)
        inner.check_rows(batch)
        scale = inner.prior_scale().to(inner.device, inner.layout.dtype)

        together = ranks()
        chains = together.share(self.num_chains)

        def start() -> Tensor:
            return starting.positions(inner, self.init, self.num_chains, seed, chains=chains)

        num_draws, target = num_samples // self.num_chains, target_of_model(inner, batch)
        for draw, following in run_chains(self, target, start, scale, seed, num_draws, state, together=together):
            yield _block(chains, model, draw), following


class Info(NamedTuple):
    """What `sample` tells beside the draws."""

    acceptance: Tensor  # [C, D] mean acceptance probability of the trajectories that led to a draw
    divergent: Tensor  # [C, D] how many of them diverged
    energy: Tensor  # [C, D] Hamiltonian energy of each draw
    log_density: Tensor  # [C, D]
    num_steps: Tensor  # [D] leapfrog steps of the last trajectory that led to a draw
    step_size: Tensor  # [C] of each chain, after warm-up
    rhat: Tensor  # [P] rank-normalised split R-hat of each coordinate; NaN with a context, whose chains differ
    ebfmi: Tensor  # [C]
    scale: Tensor  # [P] standard deviations that warm-up learnt: the diagonal of the inverse mass, rooted
    mode: str  # compiled, traced or eager
    compile_seconds: float
    warmup_seconds: float  # without the compilation
    sampling_seconds: float


class Sampled(NamedTuple):
    """Draws of `sample`, and what is known of them."""

    draws: Any  # [C, D, P], or a dict of [C, D, *shape]
    info: Info


def sample(
    log_density: Callable[..., Tensor],
    initial: Any,
    *,
    num_draws: int,
    num_warmup: int,
    seed: int = 0,
    context: Tensor | None = None,
    num_steps: int | None = None,
    trajectory: Trajectory = "auto",
    target_accept: float = 0.8,
    step_size: float | None = None,
    mass: Mass = "diagonal",
    rank: int = 10,
    thin: int = 1,
    compile: bool | None = None,
    progress: bool | None = None,
) -> Sampled:
    """Draws of any differentiable log density, by HMC on all chains at once; no module is needed.

    H(u, p) = -log pi(u) + p^T M^-1 p / 2, integrated by leapfrog, accepted with min(1, exp(-dH))

    Args:
        log_density: one position -> log pi, a scalar tensor, up to a constant; natural logarithm. Written with
            tensor operations alone, since it runs under `torch.func.vmap`. A position is [P], or a dict as `initial`.
        initial: where chains start, [C, P], or a dict of tensors [C, *shape]; floating, of one dtype, in which
            chains move.
        num_draws: D, kept draws a chain, at least 1.
        num_warmup: draws a chain for adaptation, not kept.
        context: [C, ...], a slice a chain, given to the density as a second argument: chains of unlike targets.
        progress: show a bar on stderr; by default where it is a terminal.
        seed, num_steps, trajectory, target_accept, step_size, mass, rank, thin, compile: as of `HMC`;
            `mass="unit"` is the identity.

    Returns:
        draws [C, D, P] in the dtype of `initial`, or a dict of [C, D, *shape], on its device; and `Info`. A warning
        says where chains stood still, diverged, disagree (R-hat above 1.05) or reach energies slowly (E-BFMI below
        0.3); of the last two from 100 draws a chain on. Weights of a network, whose units can change places, may
        well disagree where all its predictions agree.

    Raises:
        ConfigError: an option out of range; `initial` or `context` of another form; a density that is no scalar.
        FitError: the density is not finite at the start, or infinite later; every chain has stood still.

    Examples:
        >>> import torch
        >>> from bnn.inference.hmc import sample
        >>> found = sample(lambda u: -0.5 * (u**2).sum(), torch.zeros(4, 3), num_draws=50, num_warmup=50, seed=0)
        >>> found.draws.shape, found.info.acceptance.shape
        (torch.Size([4, 50, 3]), torch.Size([4, 50]))

    Source: as of `HMC`.
    """
    flat, piece, rebuild = _flattened(log_density, initial, context)
    if not isinstance(num_draws, int) or isinstance(num_draws, bool) or num_draws < 1:
        raise ConfigError("num_draws", want="a whole number of at least 1", got=repr(num_draws), fix="raise it")
    options = HMC(
        num_chains=len(flat),
        num_warmup=num_warmup,
        num_steps=num_steps,
        trajectory=trajectory,
        target_accept=target_accept,
        step_size=step_size,
        mass=mass,
        rank=rank,
        init="prior",  # without a climb
        thin=thin,
        compile=compile,
    )
    draws = flat.new_empty(len(flat), num_draws, flat.shape[1])  # [C, D, P]
    told = {name: torch.empty(len(flat), num_draws, dtype=torch.float64) for name in (*COLUMNS, "log_density")}
    steps = torch.empty(num_draws, dtype=torch.int64)
    run = run_chains(
        options, target_of_function(piece, context), lambda: flat, torch.ones_like(flat[0]), seed, num_draws, None,
        warns=False,
    )  # fmt: skip
    started = warm_until = time.perf_counter()
    for draw, state in with_progress(run, "hmc", progress):
        if state["step"] <= num_warmup:
            warm_until = time.perf_counter()
        if draw.number is not None:
            draws[:, draw.number] = draw.at.flat
            told["log_density"][:, draw.number] = draw.at.log_density.cpu()
            for name, column in draw.columns.items():
                told[name][:, draw.number] = column.cpu()
            steps[draw.number] = draw.num_steps
    sampled_at = time.perf_counter()
    rhat = split_rhat(draws).cpu() if context is None else torch.full((flat.shape[1],), math.nan, dtype=torch.float64)
    info = Info(
        acceptance=told["acceptance"],
        divergent=told["divergent"],
        energy=told["energy"],
        log_density=told["log_density"],
        num_steps=steps,
        step_size=draw.columns["step_size"],
        rhat=rhat,
        ebfmi=ebfmi(told["energy"]),
        scale=state["metric.scale"],
        mode=state["plan.mode"],
        compile_seconds=state["info"]["compile_seconds"],
        warmup_seconds=max(warm_until - started - state["info"]["compile_seconds"], 0.0),
        sampling_seconds=sampled_at - warm_until - (0.0 if num_warmup else state["info"]["compile_seconds"]),
    )
    _warn(info, thin)
    return Sampled(rebuild(draws), info)


def _warn(info: Info, thin: int) -> None:
    """Say aloud, in one warning, what makes draws useless."""
    num_draws = info.acceptance.shape[1]
    accepted, divergences = info.acceptance.sum(dim=1) * thin, int(info.divergent.sum())
    trouble = [found] if (found := movement(accepted, divergences, num_draws * thin)) else []
    if num_draws >= ENOUGH_DRAWS:
        rhat, least = info.rhat.nan_to_num(0.0, posinf=math.inf), info.ebfmi.nan_to_num(math.inf)
        if float(rhat.max()) > MAX_RHAT:
            trouble.append(
                f"chains disagree, R-hat {float(rhat.max()):.2f} in coordinate {int(rhat.argmax())} (want at most "
                f"{MAX_RHAT}): raise num_draws, num_warmup or num_steps"
            )
        if float(least.min()) < MIN_EBFMI:
            trouble.append(
                f"chains reach energies slowly, E-BFMI {float(least.min()):.2f} in chain {int(least.argmin())} (want at "
                f"least {MIN_EBFMI}), as in funnels and heavy tails: write scales non-centred"
            )
    if trouble:
        warnings.warn(f"HMC: {'; '.join(trouble)}", stacklevel=3)


def _flattened(
    log_density: Callable[..., Tensor], initial: Any, context: Tensor | None
) -> tuple[Tensor, Callable[..., Tensor], Callable[[Tensor], Any]]:
    """Positions [C, P], the density of one of them, and the way back from [C, D, P] to the form of `initial`."""
    leaves, structure = pytree.tree_flatten(initial)
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        raise ConfigError(
            "initial",
            want="a tensor [chains, P] or a dict of tensors [chains, ...]",
            got=", ".join(sorted({_kind(leaf) for leaf in leaves})) or "nothing",
            fix="pass floats",
        )
    kinds = {(len(leaf) if leaf.dim() else 0, leaf.dtype, leaf.device) for leaf in leaves}
    if len(kinds) > 1 or not all(leaf.dim() and leaf.numel() for leaf in leaves):
        raise ConfigError(
            "initial",
            want="as many chains, one dtype and one device in all",
            got=", ".join(sorted({_kind(leaf) for leaf in leaves})),
            fix="stack the starts of all chains",
        )
    plain = isinstance(initial, Tensor)
    if plain and initial.dim() != 2:
        raise ConfigError("initial", want="[chains, P]", got=str(list(initial.shape)), fix="flatten it, or pass a dict")
    if context is not None and (not isinstance(context, Tensor) or not context.dim() or len(context) != len(leaves[0])):
        got = str(list(context.shape)) if isinstance(context, Tensor) else type(context).__name__
        raise ConfigError(
            "context", want=f"a tensor [{len(leaves[0])}, ...], a slice a chain", got=got, fix="stack one a chain"
        )
    shapes = [leaf.shape[1:] for leaf in leaves]
    sizes = [math.prod(shape) for shape in shapes]

    def rebuild(flat: Tensor) -> Any:
        """[*, P] -> the form of `initial`, with the leading axes of `flat`."""
        pieces = zip(flat.split(sizes, dim=-1), shapes, strict=True)
        return pytree.tree_unflatten([piece.reshape(flat.shape[:-1] + shape) for piece, shape in pieces], structure)

    def density(flat: Tensor, *rest: Tensor) -> Tensor:
        value = log_density(rebuild(flat), *rest)
        if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
            raise ConfigError(
                "log_density", want="a real scalar tensor for one position", got=_kind(value), fix="sum over the axes"
            )
        return value

    flat = torch.cat([leaf.detach().reshape(len(leaf), -1) for leaf in leaves], dim=1)  # [C, P]
    return flat, density, rebuild


def _kind(value: Any) -> str:
    """A tensor's dtype and shape, or what else it is, in a word."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _in_dtype(options: HMC, model: BayesianModel, batch: Any) -> tuple[BayesianModel, Any]:
    """The model and rows in the dtype asked for: a copy of the module is converted."""
    if options.dtype is None:
        return model, batch
    dtype = DTYPES[options.dtype]
    inner = BayesianModel(
        copy.deepcopy(model.module).to(dtype),
        prior=model.prior,
        likelihood=model.likelihood,
        num_data=model.num_data,
        bayesian=model.bayesian,
        temperature=model.temperature,
    )

    def converted(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return inner, pytree.tree_map(converted, batch)


def _block(chains: range, model: BayesianModel, draw: Draw) -> Block:
    """The chains' draws, one row a chain, where the draw is kept; else no row."""
    rows = slice(None) if draw.number is not None else slice(0, 0)
    params, _ = model.constrain(draw.at.flat[rows].cpu())  # [C, P], or none of them
    chain = torch.tensor(chains)[rows]
    return make_block(
        params,
        chain=chain,
        draw=torch.full_like(chain, draw.number or 0),
        log_joint=draw.at.log_joint[rows].cpu(),
        columns={name: column[rows].cpu() for name, column in draw.columns.items()},
    )
