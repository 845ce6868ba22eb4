"""Likelihoods: what the outputs of a module mean for the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.priors import (
    LOG_2PI,
    PositivePrior,
    Unknown,
    check_scale,
    made_from,
    require_positive,
    student_t_constant,
    student_t_draws,
)
from bnn.softmax import log_softmax
from bnn.types import Params

SCALE = "@likelihood.scale"

Task: TypeAlias = Literal["classification", "regression"]


class Likelihood(Protocol):
    """p(y | outputs, unknowns)."""

    @property
    def task(self) -> Task: ...

    @property
    def unknowns(self) -> tuple[Unknown, ...]: ...

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        """log p(y_b | outputs_b, unknowns), [B]."""
        ...

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        """A draw of the targets of each row, given the outputs of one sample and its unknowns."""
        ...

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        """Fisher information of a row's target about its outputs, as columns: [B, C, C], positive semidefinite."""
        ...

    def unknown_fisher(self, outputs: Tensor) -> float:
        """Fisher information of a row's target about the logarithm of the unknown, if there is one.

        It is the same for all rows, and none is shared between the unknown and the outputs.
        """
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
        return log_softmax(full(outputs)).gather(-1, y.unsqueeze(-1)).squeeze(-1)  # [B, C] -> [B]

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return _there(torch.multinomial, full(outputs).softmax(dim=-1), generator, num_samples=1).squeeze(-1)  # [B]

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        probs = full(outputs).softmax(dim=-1)
        return torch.diag_embed(probs) - probs.unsqueeze(-1) * probs.unsqueeze(-2)  # [B, C, C]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 0.0

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
class Bernoulli:
    """p(y = 1 | z) = 1 / (1 + exp(-z)), for one output z (the logit), [B] or [B, 1], and targets 0 or 1 [B].

    Predictions are over the two classes, as of `Categorical`; targets are int64, or any dtype in training.
    """

    @property
    def task(self) -> Task:
        return "classification"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return ()

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        logits, y = full(as_columns(outputs)), as_columns(y)
        check_logit(logits, y)
        return (y * logits - torch.nn.functional.softplus(logits)).squeeze(-1)  # [B]

    def class_logits(self, outputs: Tensor) -> Tensor:
        """The same distribution as logits of two classes, [..., B] or [..., B, 1] -> [..., B, 2]."""
        return torch.cat([torch.zeros_like(outputs), outputs], dim=-1)

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return _there(torch.bernoulli, full(as_columns(outputs)).sigmoid().squeeze(-1), generator).long()  # [B]

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        chance = full(as_columns(outputs)).sigmoid()
        return (chance * (1 - chance)).unsqueeze(-1)  # [B, 1, 1]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 0.0

    def check(self, outputs: Any, y: Tensor) -> None:
        check_logit(one_tensor(outputs), y[:1])
        check_binary(y)

    def to_config(self) -> dict[str, Any]:
        return {"name": "Bernoulli"}


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
        check_scale("Gaussian(scale=)", self.scale)

    @property
    def task(self) -> Task:
        return "regression"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return _unknown_scale(self.scale)

    def scale_of(self, params: Params) -> Tensor:
        """The noise scale of one sample (a scalar), or of K of them [K]."""
        return _scale_of(self.scale, params)

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        outputs, y = full(as_columns(outputs)), as_columns(y)  # [B, C]
        check_columns(outputs, y, "Gaussian")
        return normal_log_prob(y, outputs, self.scale_of(params)).sum(dim=-1)  # [B]

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return full(outputs) + self.scale_of(params) * _normals(outputs, generator)  # of the shape of the outputs

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        return _one_each(outputs) / self.scale_of(params).square()  # [B, C, C]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 2.0 * as_columns(outputs).shape[-1]

    def check(self, outputs: Any, y: Tensor) -> None:
        check_columns(one_tensor(outputs), y[:1], "Gaussian")

    def to_config(self) -> dict[str, Any]:
        return {"name": "Gaussian", "scale": _plain(self.scale)}


@dataclass(frozen=True)
class HeteroscedasticGaussian:
    """p(y | f, r) = Normal(f, scale^2), scale = floor + log(1 + exp r): noise that depends on the inputs.

    The module has two outputs a target, [B, 2 C]: the C means f, then the C values r. Targets are [B] or
    [B, C]; densities are summed over C.

    Args:
        floor: least noise standard deviation, positive, in the target's units: without one a module that
            meets a target exactly has no finite density.

    Source: Nix and Weigend (1994), Proc. ICNN.
    """

    floor: float = 1e-3

    def __post_init__(self) -> None:
        require_positive("HeteroscedasticGaussian(floor=)", self.floor)

    @property
    def task(self) -> Task:
        return "regression"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return ()

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [..., 2 C] -> means and scales, [..., C] each."""
        mean, raw = full(outputs).chunk(2, dim=-1)
        return mean, self.floor + torch.nn.functional.softplus(raw)

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        y = as_columns(y)
        check_columns(outputs, y, "HeteroscedasticGaussian", per_target=2)
        return normal_log_prob(y, *self.split(outputs)).sum(dim=-1)  # [B]

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        mean, scale = self.split(outputs)
        return mean + scale * _normals(mean, generator)  # [B, C]

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        _, scale = self.split(outputs)
        slope = full(outputs).chunk(2, dim=-1)[1].sigmoid()  # d scale / d r
        return torch.diag_embed(torch.cat([scale**-2, 2.0 * (slope / scale).square()], dim=-1))  # [B, 2 C, 2 C]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 0.0

    def check(self, outputs: Any, y: Tensor) -> None:
        check_columns(one_tensor(outputs), y[:1], "HeteroscedasticGaussian", per_target=2)

    def to_config(self) -> dict[str, Any]:
        return {"name": "HeteroscedasticGaussian", "floor": self.floor}


@dataclass(frozen=True)
class StudentT:
    """(y - f) / scale ~ Student's t, for outputs f and targets y [B] or [B, C]: a regression with outliers.

    Args:
        df: degrees of freedom, positive; the noise has a mean above 1 and a variance above 2.
        scale: in the target's units, as of `Gaussian`; the noise's standard deviation is
            sqrt(df / (df - 2)) of it.

    Source: of its information, Lange, Little and Taylor (1989), JASA 84(408).
    """

    df: float = 4.0
    scale: float | PositivePrior = 1.0

    def __post_init__(self) -> None:
        require_positive("StudentT(df=)", self.df)
        check_scale("StudentT(scale=)", self.scale)

    @property
    def task(self) -> Task:
        return "regression"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return _unknown_scale(self.scale)

    def scale_of(self, params: Params) -> Tensor:
        """The scale of one sample (a scalar), or of K of them [K]."""
        return _scale_of(self.scale, params)

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        outputs, y = full(as_columns(outputs)), as_columns(y)  # [B, C]
        check_columns(outputs, y, "StudentT")
        return student_t_log_prob(y, outputs, self.scale_of(params), self.df).sum(dim=-1)  # [B]

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return full(outputs) + self.scale_of(params) * student_t_draws(self.df, tuple(outputs.shape), generator).to(
            outputs.device
        )

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        return _one_each(outputs) * (self.df + 1) / ((self.df + 3) * self.scale_of(params).square())  # [B, C, C]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 2.0 * self.df / (self.df + 3.0) * as_columns(outputs).shape[-1]

    def check(self, outputs: Any, y: Tensor) -> None:
        check_columns(one_tensor(outputs), y[:1], "StudentT")

    def to_config(self) -> dict[str, Any]:
        return {"name": "StudentT", "df": self.df, "scale": _plain(self.scale)}


@dataclass(frozen=True)
class Poisson:
    """p(y | z) = exp(y z - exp z) / y!, for outputs z (the log rate) and counts y, [B] or [B, C], summed over C."""

    @property
    def task(self) -> Task:
        return "regression"

    @property
    def unknowns(self) -> tuple[Unknown, ...]:
        return ()

    def log_prob(self, outputs: Tensor, y: Tensor, params: Params) -> Tensor:
        outputs, y = full(as_columns(outputs)), as_columns(y)  # [B, C]
        check_columns(outputs, y, "Poisson")
        return poisson_log_prob(y, outputs).sum(dim=-1)  # [B]

    def sample(self, outputs: Tensor, params: Params, generator: torch.Generator) -> Tensor:
        return _there(torch.poisson, full(outputs).exp(), generator)  # of the shape of the outputs

    def fisher(self, outputs: Tensor, params: Params) -> Tensor:
        return torch.diag_embed(full(as_columns(outputs)).exp())  # [B, C, C]

    def unknown_fisher(self, outputs: Tensor) -> float:
        return 0.0

    def check(self, outputs: Any, y: Tensor) -> None:
        check_columns(one_tensor(outputs), y[:1], "Poisson")
        check_counts(y)

    def to_config(self) -> dict[str, Any]:
        return {"name": "Poisson"}


def normal_log_prob(y: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """log Normal(y; mean, scale^2), elementwise."""
    return -(((y - mean) / scale) ** 2) / 2.0 - scale.log() - 0.5 * LOG_2PI


def student_t_log_prob(y: Tensor, loc: Tensor, scale: Tensor, df: float) -> Tensor:
    """log of the density of loc + scale t, t of df degrees of freedom, elementwise."""
    tails = torch.log1p(((y - loc) / scale).square() / df)
    return student_t_constant(df) - 0.5 * (df + 1.0) * tails - scale.log()


def poisson_log_prob(y: Tensor, log_rate: Tensor) -> Tensor:
    """y log rate - rate - log y!, elementwise."""
    y = y.to(log_rate.dtype)
    return y * log_rate - log_rate.exp() - torch.lgamma(y + 1.0)


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


def check_columns(outputs: Tensor, y: Tensor, name: str, *, per_target: int = 1) -> None:
    """Raise DataError unless there are `per_target` outputs a target: [B, per_target C] and [B, C], [B] as [B, 1]."""
    outputs, y = as_columns(outputs), as_columns(y)
    if outputs.dim() == y.dim() == 2 and outputs.shape == (*y.shape[:-1], per_target * y.shape[-1]):
        return
    if per_target == 1:
        raise DataError(
            f"likelihood {name}",
            want=f"targets of the shape of the outputs {list(outputs.shape)}",
            got=f"{list(y.shape)}",
            fix="give the module as many outputs as there are targets",
        )
    raise DataError(
        f"likelihood {name}",
        want=f"{per_target} outputs a target",
        got=f"outputs {list(outputs.shape)} and targets {list(y.shape)}",
        fix="give the module the means of all targets, then as many values for their noise",
    )


def check_logit(outputs: Tensor, y: Tensor) -> None:
    """Raise DataError unless outputs and targets are [B], or [B, 1]."""
    outputs, y = as_columns(outputs), as_columns(y)
    if outputs.shape != y.shape or outputs.dim() != 2 or outputs.shape[1] != 1:
        raise DataError(
            "likelihood Bernoulli",
            want="one output and one target a row",
            got=f"outputs {list(outputs.shape)} and targets {list(y.shape)}",
            fix="give the module one output; of several classes Categorical() is the likelihood",
        )


def check_binary(y: Tensor) -> None:
    """Raise DataError unless all targets are 0 or 1."""
    if not bool(((y == 0) | (y == 1)).all()):
        raise DataError(
            "likelihood Bernoulli",
            want="targets 0 or 1",
            got=f"{float(y.min()):g} to {float(y.max()):g}",
            fix="use Categorical() with an output a class, or recode the targets",
        )


def check_counts(y: Tensor) -> None:
    """Raise DataError unless all targets are whole numbers of at least 0."""
    y = y.double()
    legal = torch.isfinite(y) & (y >= 0) & (y == y.round())
    if not bool(legal.all()):
        raise DataError(
            "likelihood Poisson",
            want="counts 0, 1, 2, ...",
            got=f"{float(y[~legal].flatten()[0]):g}",
            fix="use Gaussian() for measurements; leave counts as they are, without standardising them",
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


LIKELIHOODS: dict[str, Any] = {
    kind.__name__: kind for kind in (Categorical, Bernoulli, Gaussian, HeteroscedasticGaussian, StudentT, Poisson)
}


def likelihood_from_config(config: dict[str, Any] | None) -> Likelihood:
    """The likelihood that `to_config` described, such as the one that a bank was made with.

    Raises:
        ConfigError: there is none, or its name or an option is unknown.
    """
    if not isinstance(config, dict) or str(config.get("name")) not in LIKELIHOODS:
        raise ConfigError(
            "bank",
            want="a likelihood that this version knows",
            got=repr(config),
            fix="pass likelihood=bnn.likelihoods.Categorical() or another",
        )
    made: Likelihood = made_from(LIKELIHOODS, config, "likelihood")
    return made


def _unknown_scale(scale: float | PositivePrior) -> tuple[Unknown, ...]:
    return () if isinstance(scale, (int, float)) else (Unknown(SCALE, scale),)


def _scale_of(scale: float | PositivePrior, params: Params) -> Tensor:
    return torch.as_tensor(float(scale)) if isinstance(scale, (int, float)) else params[SCALE]


def _plain(scale: float | PositivePrior) -> Any:
    return scale if isinstance(scale, (int, float)) else scale.to_config()


def _there(draw: Any, values: Tensor, generator: torch.Generator, **options: Any) -> Tensor:
    """Draws made where the generator is, brought to where the values are."""
    drawn: Tensor = draw(values.to(generator.device), generator=generator, **options)
    return drawn.to(values.device)


def _normals(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(like.shape), generator=generator, device=generator.device).to(like.device)


def _one_each(outputs: Tensor) -> Tensor:
    """Unit matrices [B, C, C] for outputs [B, C] or [B]."""
    return torch.diag_embed(torch.ones_like(full(as_columns(outputs))))
