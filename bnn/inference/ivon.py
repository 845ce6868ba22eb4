"""IVON: a normal with a diagonal covariance, found at about the cost of Adam by the package `ivon-opt`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bnn.errors import ConfigError, check_kinds, choose
from bnn.inference.climbing import STARTS, Start, require_finite, starts, weighted_batches
from bnn.inference.gradients import Gradient, gradient_of
from bnn.model import BayesianModel
from bnn.seeding import generator, isolated
from bnn.types import Batch, Block, Data, State, make_block

STEPS_PER_STATE = 50  # optimisation steps between two states that a bank may keep


@dataclass(frozen=True)
class IVON:
    """The q(u) = N(mean, diagonal) that maximises the evidence lower bound, by natural-gradient steps.

    With v = u / (prior scale), q(v) = N(m, 1 / (ess (h + 1/N))) minimises ess E_q[loss(v)] + KL(q || N(0, T)),
    where ess = N / T and loss(v) = -(T log pi(u) + v^2 / 2) / N.

    exp(-ess loss) N(v; 0, T) is proportional to pi(u): the weight decay 1/N stands for a prior N(0, T)
    on v, which the loss takes out again, so that the target is that of the model for any prior. h is
    learnt from draws alone, as the mean of noise times gradient.

    Args:
        num_steps: optimisation steps, at least 1.
        batch_size: rows a step.
        lr: falls to 0 over the run along half a cosine.
        hess_init: the h at the start; larger is a narrower q there. In units of v a row.
        beta1: decay of the mean gradient, in [0, 1).
        beta2: decay of h, in [0, 1). A run should last many times 1 / (1 - beta2) steps.
        mc_samples: draws, and so gradients, a step.
        start: where m begins: `"module"`, at the module's values; `"reset"`, after `reset_parameters` of its
            layers on a copy; `"prior"`, at a draw of the prior.
        block_size: samples a block; the samples do not depend on it.

    Raises:
        ConfigError: an option out of range, or `ivon-opt` is not installed.
        FitError: the log density is not finite.

    Source: Shen et al. (2024), arXiv:2402.17641, algorithm 1.
    """

    num_steps: int = 2000
    batch_size: int = 128
    lr: float = 0.2
    hess_init: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.995
    mc_samples: int = 1
    start: Start = "module"
    block_size: int = 64
    name: ClassVar[str] = "ivon"

    def __post_init__(self) -> None:
        check_kinds(self)
        choose("IVON(start=)", self.start, STARTS)
        for name in ("num_steps", "batch_size", "mc_samples", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"IVON({name}=)", want="at least 1", got=str(getattr(self, name)), fix="raise it")
        for name, fix in (("lr", "try 0.2"), ("hess_init", "try 0.1")):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"IVON({name}=)", want="a positive number", got=str(getattr(self, name)), fix=fix)
        for name, fix in (("beta1", "try 0.9"), ("beta2", "try 0.995")):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"IVON({name}=)", want="a number in [0, 1)", got=str(getattr(self, name)), fix=fix)

    def run(
        self, model: BayesianModel, data: Data, *, num_samples: int, seed: int, state: State | None = None
    ) -> Iterator[tuple[Block, State]]:
        yield from _run(self, model, data, num_samples, seed, state)


class Fitted(NamedTuple):
    """What the optimiser holds between two steps, all in units of v."""

    mean: Tensor  # [P]
    momentum: Tensor  # [P]
    hess: Tensor  # [P]


def spread(at: Fitted, model: BayesianModel) -> Tensor:
    """Standard deviations of q in units of v, [P]: 1 / sqrt(ess (h + 1/N))."""
    return (model.num_data / model.temperature * (at.hess + 1 / model.num_data)).rsqrt()


def optimise(
    options: IVON,
    model: BayesianModel,
    gradient: Gradient,
    at: Fitted,
    batches: Iterator[tuple[Batch, float]],
    steps: range,
) -> tuple[Fitted, Tensor]:
    """Take these steps: what follows, and the log density [n] of each draw on the way. Draws from the global stream."""
    parameter = nn.Parameter(at.mean.clone())
    optimizer = _package().IVON(
        [parameter],
        lr=options.lr,
        ess=model.num_data / model.temperature,
        hess_init=options.hess_init,
        beta1=options.beta1,
        beta2=options.beta2,
        weight_decay=1 / model.num_data,
    )
    (group,) = optimizer.param_groups
    group["momentum"], group["hess"], optimizer.current_step = at.momentum, at.hess, steps.start
    scale, heights = _scale(model), []
    for step in steps:
        group["lr"] = options.lr * 0.5 * (1 + math.cos(math.pi * step / options.num_steps))
        batch, weight = next(batches)
        for _ in range(options.mc_samples):
            with optimizer.sampled_params(train=True):
                v = parameter.detach()
                slope, height = gradient((scale * v).unsqueeze(0), batch, weight, step)
                parameter.grad = _loss_gradient(model, scale, v, slope[0])
            heights.append(height)
        optimizer.step()
    return Fitted(parameter.detach().clone(), group["momentum"], group["hess"]), torch.cat(heights)


def _loss_gradient(model: BayesianModel, scale: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """The gradient of the loss at v, [P], by that of the log density at u = scale v."""
    return -(model.temperature * scale * slope + v) / model.num_data


def _run(
    options: IVON, model: BayesianModel, data: Data, num_samples: int, seed: int, state: State | None
) -> Iterator[tuple[Block, State]]:
    total = options.num_steps + num_samples
    at = _start(options, model, seed) if state is None else _load(state, model.device)
    step = 0 if state is None else min(state["step"], options.num_steps)
    drawn = 0 if state is None else max(state["step"] - options.num_steps, 0)
    info: dict[str, float] = {} if state is None else state["info"]
    batches = weighted_batches(model, data, options.batch_size, seed=seed, start=step)
    gradient = gradient_of(model)
    while step < options.num_steps:
        stop = min(step + STEPS_PER_STATE, options.num_steps)
        with isolated(seed, "ivon", step):
            at, heights = optimise(options, model, gradient, at, batches, range(step, stop))
        require_finite(
            "IVON",
            heights.unsqueeze(1),
            torch.stack([at.mean, at.hess]),
            start=step,
            last_good=info.get("log_density"),
            lr=options.lr,
        )
        density = float(heights.mean())
        elbo = density + _entropy(model, at)
        step, info = stop, {"elbo_per_row": elbo / model.num_data, "log_density": density}
        yield model.layout.no_rows(), {**at._asdict(), "step": step, "num_steps": total, "info": info}
    for start in range(drawn, num_samples, options.block_size):
        indices = range(start, min(start + options.block_size, num_samples))
        params, _ = model.constrain(_draws(model, at, seed, indices).cpu())
        block = make_block(params, chain=torch.zeros(len(indices), dtype=torch.int64), draw=torch.tensor(list(indices)))
        yield block, {**at._asdict(), "step": options.num_steps + indices[-1] + 1, "num_steps": total, "info": info}


def _start(options: IVON, model: BayesianModel, seed: int) -> Fitted:
    mean = starts(model, options.start, 1, seed)[0] / _scale(model)
    return Fitted(mean, torch.zeros_like(mean), torch.full_like(mean, options.hess_init))


def _load(state: State, device: torch.device) -> Fitted:
    return Fitted(*(state[name].to(device) for name in Fitted._fields))


def _scale(model: BayesianModel) -> Tensor:
    return model.prior_scale().to(model.device, model.layout.dtype)


def _entropy(model: BayesianModel, at: Fitted) -> float:
    """Of q in unconstrained space, in nats."""
    deviations = (_scale(model) * spread(at, model)).double()
    return float(deviations.log().sum()) + 0.5 * len(deviations) * math.log(2 * math.pi * math.e)


def _draws(model: BayesianModel, at: Fitted, seed: int, indices: range) -> Tensor:
    """Samples of q in unconstrained space, [K, P]: each has the same bits whatever is drawn beside it."""
    scale, deviations = _scale(model), spread(at, model)
    sources = [generator(seed, "draw", index) for index in indices]
    normals = [torch.randn(len(scale), generator=source, dtype=at.mean.dtype) for source in sources]
    return torch.stack([scale * (at.mean + deviations * normal.to(at.mean)) for normal in normals])


def _package() -> Any:
    """The optimiser's package, which `bnn` works without."""
    try:
        return import_module("ivon")
    except ImportError as error:
        raise ConfigError(
            "IVON", want="the package ivon-opt", got="none installed", fix='pip install "bnn-toolkit[ivon]"'
        ) from error
