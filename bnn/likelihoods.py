"""Likelihoods: what the outputs of a module mean for the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from bnn import priors
from bnn.errors import ConfigError, DataError
from bnn.priors import LOG_2PI, PositivePrior, require_positive
from bnn.types import Params

SCALE = "@likelihood.scale"

Task: TypeAlias = Literal["classification", "regression"]


class Unknown(NamedTuple):
    """A positive unknown of the likelihood that belongs to the sample, under its name in the params."""

    name: str
    prior: PositivePrior


class Likelihood(Protocol):
    """p(y | outputs, unknowns)."""

    @property
    def task(self) -> Task: ...

    @property
    def unknowns(self) -> tuple[Unknown, ...]: ...

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        """log p(y_b | outputs_b, unknowns), [B]."""
        ...

    def check(self, outputs: Any, y: Tensor) -> None:
        """Raise DataError unless the outputs of the first row fit all targets y."""
        ...

    def to_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Categorical:
    """p(y = c | z) = softmax(z)_c, for outputs z [B, C] (logits) and targets y int64 [B] in [0, C)."""

    @property
    def task(self) -> Task:
        return "classification"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return ()

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        check_logits(outputs, y)
        return full(outputs).log_softmax(dim=-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)  # [B, C] -> [B]

    def check(self, outputs: Any, y: Tensor) -> None:
        check_logits(one_tensor(outputs), y[:1])
        if not 0 <= int(y.min()) <= int(y.max()) < outputs.shape[1]:
            raise DataError(
                "data",
                want=f"classes in [0, {outputs.shape[1]}), one an output of the module",
                got=f"{int(y.min())} to {int(y.max())}",
                fix="number the classes from 0, or give the module more outputs",
            )

    def to_config(self) -> dict[str, Any]:
        return {"name": "Categorical"}


@dataclass(frozen=True)
class Gaussian:
    """p(y | f) = Normal(f, scale^2), for outputs f and targets y [B] or [B, C], summed over C.

    Args:
        scale: noise standard deviation in the target's units: a positive number, or a prior
            (`priors.HalfCauchy`, `priors.LogNormal`) with which it is learnt, as the entry
            `@likelihood.scale` of every sample.
    """

    scale: float | PositivePrior = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, (int, float)):
            require_positive("Gaussian(scale=)", self.scale)

    @property
    def task(self) -> Task:
        return "regression"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return () if isinstance(self.scale, (int, float)) else (Unknown(SCALE, self.scale),)

    def scale_of(self, params: Params) -> Tensor:
        """The noise scale of one sample (a scalar), or of K of them [K]."""
        return torch.as_tensor(float(self.scale)) if isinstance(self.scale, (int, float)) else params[SCALE]

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        outputs, y = full(as_columns(outputs)), as_columns(y)  # [B, C]
        check_columns(outputs, y)
        scale = self.scale_of(params)
        density = -(((y - outputs) / scale) ** 2) / 2.0 - scale.log() - 0.5 * LOG_2PI  # [B, C]
        return density.sum(dim=-1)  # [B]

    def check(self, outputs: Any, y: Tensor) -> None:
        check_columns(one_tensor(outputs), y[:1])

    def to_config(self) -> dict[str, Any]:
        scale = self.scale if isinstance(self.scale, (int, float)) else self.scale.to_config()
        return {"name": "Gaussian", "scale": scale}


def full(outputs: Tensor) -> Tensor:
    """Outputs in float32 at least: sums over rows lose what decides in half precision."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def as_columns(values: Tensor) -> Tensor:
    """[B] -> [B, 1]; [B, C] as it is. Keeps [B] and [B, 1] from broadcasting to [B, B]."""
    return values.unsqueeze(-1) if values.dim() == 1 else values


def one_tensor(outputs: Any) -> Tensor:
    """The outputs, if they are a tensor; otherwise a DataError: a likelihood is over one tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    raise DataError(
        "module",
        want="one tensor of outputs",
        got=type(outputs).__name__,
        fix="wrap the module so that it returns its logits or means",
    )


def check_columns(outputs: Tensor, y: Tensor) -> None:
    """Raise DataError unless outputs and targets are of one shape [B, C], or [B] as [B, 1]."""
    outputs, y = as_columns(outputs), as_columns(y)
    if outputs.shape != y.shape:
        raise DataError(
            "likelihood Gaussian",
            want=f"targets of the shape of the outputs {list(outputs.shape)}",
            got=f"{list(y.shape)}",
            fix="give the module as many outputs as there are targets",
        )


def check_logits(outputs: Tensor, y: Tensor) -> None:
    """Raise DataError unless outputs are [B, C] and targets int64 [B]."""
    if outputs.dim() != 2 or y.dim() != 1 or len(outputs) != len(y) or y.dtype != torch.int64:
        raise DataError(
            "likelihood Categorical",
            want="outputs [B, C] and int64 targets [B]",
            got=f"outputs {list(outputs.shape)} and {y.dtype} targets {list(y.shape)}",
            fix="give the module one output a class, and pass y.long()",
        )


def likelihood_from_config(config: dict[str, Any] | None) -> Likelihood:
    """The likelihood that a bank was made with.

    Raises:
        ConfigError: the bank names none.
    """
    match config:
        case {"name": "Categorical"}:
            return Categorical()
        case {"name": "Gaussian", "scale": {"name": "HalfCauchy", "scale": scale}}:
            return Gaussian(priors.HalfCauchy(scale))
        case {"name": "Gaussian", "scale": {"name": "LogNormal", "loc": loc, "scale": scale}}:
            return Gaussian(priors.LogNormal(loc, scale))
        case {"name": "Gaussian", "scale": int() | float() as scale}:
            return Gaussian(scale)
        case _:
            raise ConfigError(
                "bank",
                want="a likelihood that this version knows",
                got=repr(config),
                fix="pass likelihood=bnn.likelihoods.Categorical() or Gaussian(...)",
            )
