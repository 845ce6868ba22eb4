"""Laplace's approximation: a normal at the MAP whose precision is the curvature there.

The engine is ours and not `laplace-torch`, which is what the tests compare it with: that one changes the
user's module, draws from the global stream and cannot be resumed, and brings torchvision and three backends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.batches import Sampled, full_batch, minibatches, moved, num_batches
from bnn.errors import ConfigError, FitError, ModuleError, check_kinds, choose
from bnn.inference.climbing import STARTS, Climb, Start, climb, require_finite, starts, weighted_batches
from bnn.inference.curvature import STRUCTURES, Piece, Plan, Root, Structure, measure, not_finite, places_of, plan
from bnn.inference.gradients import gradient_of
from bnn.layout import as_patterns, select
from bnn.model import BayesianModel
from bnn.priors import LOG_2PI
from bnn.seeding import generator
from bnn.types import Batch, Block, Data, State, make_block

PriorPrecision: TypeAlias = Literal["model", "evidence", "evidence-per-tensor"]
PRIOR_PRECISIONS: tuple[str, ...] = ("model", "evidence", "evidence-per-tensor")

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep
FACTORS = (1e-8, 1e8)  # of the prior precision, between which the best is sought


@dataclass(frozen=True)
class Laplace:
    """Draws of a normal at the mode of the log density, with the curvature there for its precision.

    u ~ Normal(u*, H^-1), u* = argmax log pi(u), H = (sum_b w_b J_b^T F_b J_b + D) / T

    J_b is the Jacobian of the outputs of row b about u, F_b the Fisher information of its target about the
    outputs, and D the prior's precisions: the generalised Gauss-Newton matrix, positive definite wherever the
    climb ends, as the Hessian need not be. The diagnostic `log_evidence` is that of the model at
    temperature 1,

    log p(D) = log p(D, u*) + (Q log 2 pi - log det H) / 2,

    over the Q values of the tensors in `on`, the others being held; `mode_gap` is g^T H^-1 g / 2 for the
    gradient g at u*: the nats by which the mode is higher, about 0 after a climb that was long enough.

    Args:
        structure: `"full"`, one matrix over all values; `"kron"`, two factors for each weight of a linear or
            convolutional layer and one for each bias, without what two tensors have in common, and a diagonal
            for tensors of other layers; `"diag"`, the diagonal of the matrix.
        on: globs over the layout's names, as of `bayesian`, such as the last layer's; what they leave out
            stays at the MAP in every sample.
        num_steps: steps of the climb; 0 takes the start for the MAP.
        batch_size: rows a step, and at once in passes over the data.
        lr: of Adam, falling exponentially to a hundredth over the climb.
        start: `"module"`, the module's values; `"reset"`, new ones of its layers; `"prior"`, a draw.
        prior_precision: `"model"`, the prior's own; `"evidence"`, that times the one factor that maximises the
            log evidence at the MAP found, unknowns apart; `"evidence-per-tensor"`, a factor each (not of `"full"`).
        memory: bytes that the curvature may take.
        block_size: samples a block; the samples do not depend on it.

    Raises:
        ConfigError: an option out of range, a curvature above `memory`, a prior that is not normal.
        FitError: the log density or the curvature is not finite.

    Source: MacKay (1992), Neural Computation 4(3), 448-472, also of the factor; of the factors of linear layers
    Martens and Grosse (2015), arXiv:1503.05671, and Ritter et al. (2018), ICLR; of shared weights Grosse and
    Martens (2016), arXiv:1602.01407; Daxberger et al. (2021), arXiv:2106.14806.
    """

    structure: Structure = "kron"
    on: str | tuple[str, ...] = "*"
    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.01
    start: Start = "module"
    prior_precision: PriorPrecision = "model"
    memory: int = 4 * 2**30
    block_size: int = 64

    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("Laplace(structure=)", self.structure, STRUCTURES)
        choose("Laplace(start=)", self.start, STARTS)
        if not all(isinstance(pattern, str) for pattern in as_patterns(self.on)):
            raise ConfigError("Laplace(on=)", want="globs of names", got=repr(self.on), fix="pass on='*'")
        choose("Laplace(prior_precision=)", self.prior_precision, PRIOR_PRECISIONS)
        if self.structure == "full" and self.prior_precision == "evidence-per-tensor":
            raise ConfigError(
                "Laplace(prior_precision=)",
                want="one factor for 'full', whose tensors share a matrix",
                got="'evidence-per-tensor'",
                fix="pass 'evidence', or structure='kron'",
            )
        for name, least in (("num_steps", 0), ("batch_size", 1), ("memory", 1), ("block_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"Laplace({name}=)", want=f"at least {least}", got=str(getattr(self, name)), fix="raise it"
                )
        if not 0 < self.lr < math.inf:
            raise ConfigError("Laplace(lr=)", want="a positive number", got=str(self.lr), fix="try 0.01")

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        model.require_mode("Laplace")
        total = self.num_steps + num_samples
        step = 0 if state is None else state["step"]
        info: dict[str, float] = {} if state is None else state["info"]
        if state is not None and step >= self.num_steps:
            flat = state["climb.flat"].to(model.device)
        else:
            at = Climb.of(starts(model, self.start, 1, seed)) if state is None else Climb.load(state, model.device)
            flat = at.flat
        check_form(self, model, data, flat[0], seed)
        if step < self.num_steps:
            for climbed, step, height in _climb(self, model, data, at, step, seed, info.get("log_density")):  # noqa: B020
                flat, info = climbed.flat, {"log_density": height}
                yield model.layout.no_rows(), {**climbed.save(), "step": step, "num_steps": total, "info": info}
        if step >= total:
            return
        posterior, info = posterior_at(self, model, data, flat[0], seed)
        for begin in range(step - self.num_steps, num_samples, self.block_size):
            indices = range(begin, min(begin + self.block_size, num_samples))
            params, _ = model.constrain(torch.stack([posterior.draw(seed, index) for index in indices]).cpu())
            draws = torch.tensor(list(indices))
            # The curvature is found anew from the data when a run is resumed: it is large, and the mode is not.
            after = {"climb.flat": flat, "step": self.num_steps + indices[-1] + 1, "num_steps": total, "info": info}
            yield make_block(params, chain=torch.zeros_like(draws), draw=draws), after


class Posterior(NamedTuple):
    """Normal(mode, H^-1), H in blocks."""

    mode: Tensor  # [P]
    roots: tuple[Root, ...]
    places: tuple[Tensor, ...]  # [Q] of each root's values in the mode

    def draw(self, seed: int, index: int) -> Tensor:
        """Sample number `index` [P]: the same bits whatever is drawn beside it."""
        source = generator(seed, "draw", index)
        normals = torch.randn(len(self.mode), generator=source, dtype=torch.float64).to(self.mode.device)
        found = self.mode.double()
        for root, places in zip(self.roots, self.places, strict=True):
            found[places] += root.spread(normals[places])
        return found.to(self.mode)

    def gap(self, gradient: Tensor) -> float:
        """g^T H^-1 g / 2."""
        parts = [gradient[places] for places in self.places]
        return 0.5 * sum(float(root.solve(part) @ part) for root, part in zip(self.roots, parts, strict=True))


def best_factor(relative: Tensor, distance: float) -> float:
    """The factor a of the prior precision that maximises the evidence at a point.

    log evidence(a) = sum_i (log a - log(lambda_i + a)) / 2 - a q / 2 + const

    Its slope is 0 where sum_i lambda_i / (lambda_i + a) = a q; the left side falls in a and the right one
    grows, so there is one such place, which is found by halving.

    Args:
        relative: lambda [Q], eigenvalues of the curvature in units of the prior precision.
        distance: q, the squared distance of the point from the prior's mean in prior standard deviations.

    Source: MacKay (1992), eq. 4.8.
    """
    low, high = (math.log(bound) for bound in FACTORS)
    for _ in range(60):
        middle = 0.5 * (low + high)
        factor = math.exp(middle)
        if float((relative / (relative + factor)).sum()) > factor * distance:
            low = middle
        else:
            high = middle
    return math.exp(0.5 * (low + high))


def check_form(options: Laplace, model: BayesianModel, data: Data, flat: Tensor, seed: int) -> Plan:
    """The form of the curvature, near any flat sample [P].

    Raises:
        ConfigError: it takes more memory than is allowed, or the prior is not normal.
    """
    names = _chosen(options, model)
    batch = moved(next(_epoch(data, options.batch_size, seed)), model.device)
    model.check_rows(batch)
    params, _ = model.constrain(flat)
    found = plan(model, options.structure, names, params, model.prior_precision(flat), batch.x)
    if found.num_bytes > options.memory:
        others = "'kron' or 'diag'" if options.structure == "full" else "'diag'"
        raise ConfigError(
            f"Laplace('{options.structure}', memory=)",
            want=f"at least {found.num_bytes:,} bytes for the curvature of {len(places_of(model.layout, names)):,} values",
            got=f"{options.memory:,}",
            fix=f"raise it, take structure={others}, or choose fewer parameters with on=",
        )
    _try(options, model, found, params, batch)
    return found


def _try(options: Laplace, model: BayesianModel, form: Plan, params: dict[str, Tensor], batch: Batch) -> None:
    """Raise ModuleError, before the climb, for a module whose curvature cannot be taken: of two rows here."""
    try:
        measure(model, form, params, iter([_rows_of(batch, slice(2))]))
    except (torch.linalg.LinAlgError, FitError):  # type: ignore[attr-defined]
        return  # values that are not finite, which are told of in their own words
    except RuntimeError as error:
        raise ModuleError(
            f"Laplace('{options.structure}')",
            want="a module whose rows torch.func.vmap can take one by one",
            got=str(error).strip().splitlines()[0],
            fix="take structure='kron' on its linear layers with on=, or another method such as Guide",
        ) from error


def posterior_at(
    options: Laplace, model: BayesianModel, data: Data, flat: Tensor, seed: int
) -> tuple[Posterior, dict[str, float]]:
    """The normal at a mode [P], and what there is to say of it."""
    form = check_form(options, model, data, flat, seed)
    height, gradient, prior_gradient = _slopes(options, model, data, flat, seed)
    require_finite("Laplace", height.unsqueeze(0), gradient, start=options.num_steps, last_good=None, lr=options.lr)
    params, log_jacobian = model.constrain(flat)
    pieces = measure(model, form, params, _epoch(data, options.batch_size, seed))
    precision = model.prior_precision(flat).double()  # [P]
    distances = prior_gradient.square() / precision  # [P]
    places = tuple(places_of(model.layout, piece.names).to(model.device) for piece in pieces)
    factors = _factors(options, pieces, [precision[at] for at in places], [distances[at] for at in places])
    temperature = model.temperature
    log_evidence = temperature * float(height - log_jacobian) + float(log_jacobian)
    roots: list[Root] = []
    for piece, at, factor in zip(pieces, places, factors, strict=True):
        root = piece.plus(factor * precision[at], temperature)
        log_det = root.log_det + len(at) * math.log(temperature)
        change = len(at) * math.log(factor) - (factor - 1) * float(distances[at].sum())  # of twice the log prior
        log_evidence += 0.5 * (change + len(at) * LOG_2PI - log_det)
        roots.append(root)
    posterior = Posterior(flat, tuple(roots), places)
    info = {"log_density": float(height), "log_evidence": log_evidence, "mode_gap": posterior.gap(gradient)}
    if not all(math.isfinite(value) for value in info.values()):
        raise not_finite(f"a log evidence of {log_evidence:g}")
    own = {piece.names[0]: factor for piece, factor in zip(pieces, factors, strict=True) if _has_factor(piece)}
    if options.prior_precision == "evidence-per-tensor":
        info |= {f"prior_factor.{name}": factor for name, factor in own.items()}
    elif options.prior_precision == "evidence" and own:
        info["prior_factor"] = next(iter(own.values()))
    return posterior, info


def _chosen(options: Laplace, model: BayesianModel) -> list[str]:
    """Names of the layout that `on` chooses, in its order."""
    try:
        found = select(model.layout.names, options.on)
    except ConfigError as error:
        raise ConfigError("Laplace(on=)", want=error.want, got=error.got, fix=error.fix) from error
    if not found:
        raise ConfigError("Laplace(on=)", want="at least one parameter", got="none", fix="pass on='*'")
    return [name for name in model.layout.names if name in found]


def _epoch(data: Data, batch_size: int, seed: int) -> Iterator[Batch]:
    """All rows once: in the order of an epoch, or with the weights that a sampler's draws have on average."""
    if not isinstance(data, Sampled):
        yield from islice(minibatches(data, batch_size, seed=seed), num_batches(data, batch_size))
        return
    everything = full_batch(data)
    for begin in range(0, len(everything.y), batch_size):
        part = slice(begin, begin + batch_size)
        yield _rows_of(everything, part)


def _rows_of(batch: Batch, part: slice) -> Batch:
    return Batch(*(pytree.tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) else leaf, f) for f in batch))


def _climb(
    options: Laplace, model: BayesianModel, data: Data, at: Climb, step: int, seed: int, last_good: float | None
) -> Iterator[tuple[Climb, int, float]]:
    """The climb from a step on: every so often where it is, the step, and the mean log density of those before."""
    gradient = gradient_of(model)
    batches = weighted_batches(model, data, options.batch_size, seed=seed, start=step)
    while step < options.num_steps:
        heights, start = [], step
        for _ in range(min(STEPS_PER_STATE, options.num_steps - step)):
            slope, height = gradient(at.flat, *next(batches), step)
            at = climb(at, slope, step=step, num_steps=options.num_steps, lr=options.lr)
            heights.append(height)
            step += 1
        require_finite("Laplace", torch.stack(heights), at.flat, start=start, last_good=last_good, lr=options.lr)
        last_good = float(torch.stack(heights).mean())
        yield at, step, last_good


def _slopes(
    options: Laplace, model: BayesianModel, data: Data, flat: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The full-data log density [1], its gradient [P], and that of the log prior [P], in float64.

    The densities of the batches of an epoch, weighted by their rows, average to the full-data one.
    """
    gradient = gradient_of(model)
    rows, total, slope = 0, torch.zeros(1, dtype=torch.float64, device=flat.device), torch.zeros_like(flat).double()
    for batch in _epoch(data, options.batch_size, seed):
        here = moved(batch, model.device)
        found, height = gradient(flat.unsqueeze(0), here, 1.0, 0)
        total, slope = total + len(batch.y) * height.double(), slope + len(batch.y) * found[0].double()
        rows += len(batch.y)
    prior, _ = gradient(flat.unsqueeze(0), here, 0.0, 0)
    return total / rows, slope / rows, model.temperature * prior[0].double()


def _has_factor(piece: Piece) -> bool:
    return not piece.names[0].startswith("@")


def _factors(
    options: Laplace, pieces: tuple[Piece, ...], precisions: list[Tensor], distances: list[Tensor]
) -> list[float]:
    """What multiplies the prior precision of each piece; 1 for unknowns."""
    own = [number for number, piece in enumerate(pieces) if _has_factor(piece)]
    factors = [1.0] * len(pieces)
    if options.prior_precision == "model" or not own:
        return factors
    groups = [own] if options.prior_precision == "evidence" else [[number] for number in own]
    for group in groups:
        relative = torch.cat([pieces[number].relative(precisions[number]) for number in group])
        found = best_factor(relative, sum(float(distances[number].sum()) for number in group))
        for number in group:
            factors[number] = found
    return factors
