"""Priors over the parameters of a module, and over single positive unknowns such as a noise scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.layout import Entry, matches
from bnn.types import Params

LOG_2PI = math.log(2.0 * math.pi)


class Prior(Protocol):
    """Independent normal priors, one location and one scale an entry."""

    def moments(self, entry: Entry) -> tuple[float, float]:
        """Mean and standard deviation of the entry's values.

        Raises:
            ConfigError: the prior says nothing of this entry.
        """
        ...

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise ConfigError unless the prior covers these entries and every pattern in it is used."""
        ...

    def to_config(self) -> dict[str, Any]: ...


def log_prob(prior: Prior, entries: Sequence[Entry], params: Params) -> Tensor:
    """Log density of one sample, summed over the entries.

    log p(theta) = sum_i -(theta_i - loc_i)^2 / (2 scale_i^2) - log scale_i - log(2 pi) / 2

    Returns:
        A scalar, in the widest dtype of the entries, float32 at least.
    """
    total = torch.zeros(())
    for entry in entries:
        loc, scale = prior.moments(entry)
        constant = entry.numel * (math.log(scale) + 0.5 * LOG_2PI)
        values = params[entry.name].to(torch.promote_types(entry.dtype, torch.float32))
        total = total - (values - loc).square().sum() / (2.0 * scale**2) - constant
    return total


def sample(prior: Prior, entries: Sequence[Entry], generator: torch.Generator) -> Params:
    """One draw from the prior, on the generator's device."""
    drawn = {}
    for entry in entries:
        loc, scale = prior.moments(entry)
        noise = torch.randn(entry.shape, generator=generator, device=generator.device)
        drawn[entry.name] = (loc + scale * noise).to(entry.dtype)
    return drawn


@dataclass(frozen=True)
class Normal:
    """theta ~ Normal(loc, scale^2), with one scale for all or a scale a glob.

    Args:
        loc: the mean of every value.
        scale: standard deviation, positive; or a mapping from glob to it, in which the first pattern
            that matches a name counts.

    Examples:
        >>> Normal(0.0, {"*.bias": 0.1, "*": 1.0}).moments(Entry("fc.bias", (3,), torch.float32))
        (0.0, 0.1)
    """

    loc: float = 0.0
    scale: float | Mapping[str, float] = 1.0

    def __post_init__(self) -> None:
        scales = self.scale.values() if isinstance(self.scale, Mapping) else (self.scale,)
        for scale in scales:
            require_positive("Normal(scale=)", scale)

    def moments(self, entry: Entry) -> tuple[float, float]:
        if not isinstance(self.scale, Mapping):
            return self.loc, self.scale
        for pattern, scale in self.scale.items():
            if matches(pattern, entry.name):
                return self.loc, scale
        raise ConfigError(
            "Normal(scale=)",
            want=f"a pattern for '{entry.name}'",
            got=f"only {', '.join(self.scale)}",
            fix="add '*' as the last pattern",
        )

    def check(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.moments(entry)
        if isinstance(self.scale, Mapping):
            for pattern in self.scale:
                if not any(matches(pattern, entry.name) for entry in entries):
                    raise ConfigError(
                        "Normal(scale=)",
                        want="patterns that match a Bayesian parameter",
                        got=f"{pattern!r}, which matches none",
                        fix=f"the parameters are {', '.join(e.name for e in entries)}",
                    )

    def to_config(self) -> dict[str, Any]:
        scale = dict(self.scale) if isinstance(self.scale, Mapping) else self.scale
        return {"name": "Normal", "loc": self.loc, "scale": scale}


@dataclass(frozen=True)
class FanIn:
    """theta ~ Normal(0, scale^2 / fan_in) for weights, Normal(0, bias_scale^2) for vectors and scalars.

    fan_in is the number of inputs that one output sums over: the product of all dimensions but the
    first. Activations then keep their size through the layers, however wide they are.

    Args:
        scale: standard deviation of a weight times sqrt(fan_in), positive.
        bias_scale: standard deviation of entries with fewer than two dimensions, positive.

    Source: Neal (1996), Bayesian Learning for Neural Networks, section 2.1.
    """

    scale: float = 1.0
    bias_scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("FanIn(scale=)", self.scale)
        require_positive("FanIn(bias_scale=)", self.bias_scale)

    def moments(self, entry: Entry) -> tuple[float, float]:
        if len(entry.shape) < 2:
            return 0.0, self.bias_scale
        return 0.0, self.scale / math.sqrt(max(math.prod(entry.shape[1:]), 1))

    def check(self, entries: Sequence[Entry]) -> None:
        del entries  # every entry has a fan-in

    def to_config(self) -> dict[str, Any]:
        return {"name": "FanIn", "scale": self.scale, "bias_scale": self.bias_scale}


class PositivePrior(Protocol):
    """A prior over one positive unknown, sampled in the unconstrained space of its logarithm."""

    def log_prob(self, value: Tensor) -> Tensor: ...

    def sample(self, generator: torch.Generator) -> Tensor: ...

    def to_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class HalfCauchy:
    """p(s) = 2 / (pi scale (1 + (s / scale)^2)), s > 0.

    Args:
        scale: the median of s, positive, in units of the target.

    Source: Gelman (2006), Prior distributions for variance parameters in hierarchical models.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("HalfCauchy(scale=)", self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        return math.log(2.0 / (math.pi * self.scale)) - torch.log1p((value / self.scale).square())

    def sample(self, generator: torch.Generator) -> Tensor:
        # Inverse of F(s) = 2/pi atan(s / scale), with u kept off 0 and 1 so that log s is finite.
        u = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
        return (self.scale * torch.tan(0.5 * math.pi * u)).float()

    def to_config(self) -> dict[str, Any]:
        return {"name": "HalfCauchy", "scale": self.scale}


@dataclass(frozen=True)
class LogNormal:
    """log s ~ Normal(loc, scale^2).

    Args:
        loc: the mean of log s; exp(loc) is the median of s, in units of the target.
        scale: standard deviation of log s, positive.
    """

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("LogNormal(scale=)", self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        log_value = value.log()
        return -((log_value - self.loc) ** 2) / (2.0 * self.scale**2) - log_value - math.log(self.scale) - 0.5 * LOG_2PI

    def sample(self, generator: torch.Generator) -> Tensor:
        return (self.loc + self.scale * torch.randn((), generator=generator, device=generator.device)).exp()

    def to_config(self) -> dict[str, Any]:
        return {"name": "LogNormal", "loc": self.loc, "scale": self.scale}


def require_positive(place: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ConfigError(place, want="a positive number", got=repr(value), fix="pass one such as 1.0")
