"""Priors over the parameters of a module, and over single positive unknowns such as a noise scale."""

from __future__ import annotations

import dataclasses
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from bnn.errors import ConfigError
from bnn.layout import Entry, matches
from bnn.types import Params

LOG_2PI = math.log(2.0 * math.pi)
HYPER_SCALE = "@prior.scale"


class PositivePrior(Protocol):
    """A prior over one positive unknown, sampled in the unconstrained space of its logarithm."""

    @property
    def median(self) -> float: ...

    def log_prob(self, value: Tensor) -> Tensor: ...

    def sample(self, generator: torch.Generator) -> Tensor: ...

    def to_config(self) -> dict[str, Any]: ...


class Unknown(NamedTuple):
    """A positive unknown of likelihood or prior that belongs to the sample, under its name in the params."""

    name: str
    prior: PositivePrior


Scale: TypeAlias = float | PositivePrior | Mapping[str, Any]
"""A number, a prior over it, or a mapping from glob to either, in which the first pattern that matches a name counts."""


class Place(NamedTuple):
    """How the values of one entry are distributed: theta = loc + scale s z, with z of a family and s an unknown or 1."""

    family: Family
    loc: float
    scale: float
    unknown: Unknown | None = None


class Prior(Protocol):
    """Independent values, one place an entry; entries may share an unknown scale."""

    def place(self, entry: Entry) -> Place:
        """How the entry's values are distributed.

        Raises:
            ConfigError: the prior says nothing of this entry.
        """
        ...

    def check(self, entries: Sequence[Entry]) -> None:
        """Raise ConfigError unless the prior covers these entries and every pattern in it is used."""
        ...

    def to_config(self) -> dict[str, Any]: ...


def unknowns(prior: Prior, entries: Sequence[Entry]) -> tuple[Unknown, ...]:
    """The unknown scales that these entries have, each once."""
    found = [place.unknown for entry in entries if (place := prior.place(entry)).unknown is not None]
    return tuple({unknown.name: unknown for unknown in found if unknown is not None}.values())


def log_prob(prior: Prior, entries: Sequence[Entry], params: Params) -> Tensor:
    """Log density of one sample given the unknown scales in it, summed over the entries.

    log p(theta | s) = sum_i log f((theta_i - loc_i) / (scale_i s_i)) - log (scale_i s_i), f the family's density

    Returns:
        A scalar in float64: differences of sums over many values decide in HMC.
    """
    total = torch.zeros(())
    for entry in entries:
        place = prior.place(entry)
        values = params[entry.name].to(torch.promote_types(entry.dtype, torch.float32))
        values = values if place.loc == 0.0 else values - place.loc
        if place.unknown is None:
            total = total + place.family.log_prob(values / place.scale) - entry.numel * math.log(place.scale)
        else:
            scale = place.scale * params[place.unknown.name]
            total = total + place.family.log_prob(values / scale) - entry.numel * scale.log()
    return total


def sample(prior: Prior, entries: Sequence[Entry], generator: torch.Generator) -> Params:
    """One draw from the prior, unknown scales included, on the generator's device."""
    drawn = {unknown.name: unknown.prior.sample(generator).to(torch.float32) for unknown in unknowns(prior, entries)}
    values = {}
    for entry in entries:
        place = prior.place(entry)
        scale = place.scale if place.unknown is None else place.scale * drawn[place.unknown.name]
        value, most = place.loc + scale * place.family.sample(entry.shape, generator), torch.finfo(entry.dtype).max
        values[entry.name] = value.to(entry.dtype).clamp(-most, most)  # heavy tails reach past float16
    return values | drawn


class Family(ABC):
    """A prior of independent values theta = loc + scale z, in which z has one density for all entries.

    Subclasses are frozen dataclasses with `loc`, `scale` and `shared` among their fields.
    """

    loc: float
    scale: Scale
    shared: bool

    @property
    @abstractmethod
    def spread(self) -> float:
        """Standard deviation of z; 1 where it has none."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log f(z), summed over all values."""

    @abstractmethod
    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draws of z, of this shape."""

    def place(self, entry: Entry) -> Place:
        if not isinstance(self.scale, Mapping):
            return _placed(self, self.loc, self.scale, HYPER_SCALE, self.shared, entry)
        for pattern, scale in self.scale.items():
            if matches(pattern, entry.name):
                return _placed(self, self.loc, scale, f"{HYPER_SCALE}.{pattern}", self.shared, entry)
        raise ConfigError(
            f"{type(self).__name__}(scale=)",
            want=f"a pattern for '{entry.name}'",
            got=f"only {', '.join(self.scale)}",
            fix="add '*' as the last pattern",
        )

    def check(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self.place(entry)
        for pattern in self.scale if isinstance(self.scale, Mapping) else ():
            if not any(matches(pattern, entry.name) for entry in entries):
                raise ConfigError(
                    f"{type(self).__name__}(scale=)",
                    want="patterns that match a Bayesian parameter",
                    got=f"{pattern!r}, which matches none",
                    fix=f"the parameters are {', '.join(e.name for e in entries)}",
                )

    def to_config(self) -> dict[str, Any]:
        return _config(self)


@dataclass(frozen=True)
class Normal(Family):
    """theta ~ Normal(loc, scale^2).

    Args:
        loc: the mean of every value.
        scale: standard deviation, positive; a prior over it (`HalfCauchy`, `LogNormal`), with which it is an
            unknown of the sample, `@prior.scale`; or a mapping from glob to either, in which the first
            pattern that matches a name counts.
        shared: whether an unknown scale is one for all entries (of its pattern), or one an entry,
            `@prior.scale.<name>`. Samplers see such entries non-centred, as z with theta = loc + scale z.

    Examples:
        >>> Normal(0.0, {"*.bias": 0.1, "*": 1.0}).place(Entry("fc.bias", (3,), torch.float32)).scale
        0.1
        >>> Normal(scale=HalfCauchy(1.0)).place(Entry("fc.bias", (3,), torch.float32)).unknown.name
        '@prior.scale'

    Source: of the non-centred form, Papaspiliopoulos et al. (2007), Statistical Science 22(1).
    """

    loc: float = 0.0
    scale: Scale = 1.0
    shared: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def spread(self) -> float:
        return 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(dtype=torch.float64) - 0.5 * LOG_2PI * z.numel()

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device=generator.device)


@dataclass(frozen=True)
class Laplace(Family):
    """p(theta) = exp(-|theta - loc| / scale) / (2 scale): many values near loc, some far from it.

    Args:
        loc: the median of every value.
        scale: mean distance from it, positive, in the forms that `Normal` takes; the standard deviation
            is sqrt(2) of it.
        shared: as of `Normal`.
    """

    loc: float = 0.0
    scale: Scale = 1.0
    shared: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def spread(self) -> float:
        return math.sqrt(2.0)

    def log_prob(self, z: Tensor) -> Tensor:
        return -z.abs().sum(dtype=torch.float64) - math.log(2.0) * z.numel()

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        # A difference of two exponentials -log(1 - u): u is never 1, but can be 0.
        u = torch.rand((2, *shape), generator=generator, device=generator.device)
        return torch.log1p(-u[1]) - torch.log1p(-u[0])


@dataclass(frozen=True)
class StudentT(Family):
    """(theta - loc) / scale ~ Student's t with df degrees of freedom: a normal with heavy tails.

    Args:
        df: degrees of freedom, positive; 1 is Cauchy, large ones come near to a normal.
        loc: the median of every value.
        scale: positive, in the forms that `Normal` takes; the standard deviation is sqrt(df / (df - 2)) of it,
            for df above 2.
        shared: as of `Normal`.
    """

    df: float = 4.0
    loc: float = 0.0
    scale: Scale = 1.0
    shared: bool = True

    def __post_init__(self) -> None:
        require_positive("StudentT(df=)", self.df)
        _check(self)

    @property
    def spread(self) -> float:
        return math.sqrt(self.df / (self.df - 2.0)) if self.df > 2.0 else 1.0

    def log_prob(self, z: Tensor) -> Tensor:
        tails = torch.log1p(z.square() / self.df).sum(dtype=torch.float64)
        return -0.5 * (self.df + 1.0) * tails + student_t_constant(self.df) * z.numel()

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return student_t_draws(self.df, tuple(shape), generator)


@dataclass(frozen=True)
class ScaleMixture(Family):
    """theta ~ share Normal(loc, scale^2) + (1 - share) Normal(loc, (ratio scale)^2): wide and narrow values.

    Args:
        share: of the wide part, in (0, 1).
        ratio: standard deviation of the narrow part over that of the wide one, in (0, 1).
        loc: the mean of every value.
        scale: standard deviation of the wide part, positive, in the forms that `Normal` takes.
        shared: as of `Normal`.

    Source: Blundell et al. (2015), arXiv:1505.05424, eq. 7.
    """

    share: float = 0.5
    ratio: float = 0.1
    loc: float = 0.0
    scale: Scale = 1.0
    shared: bool = True

    def __post_init__(self) -> None:
        for name in ("share", "ratio"):
            if not (is_number(value := getattr(self, name)) and 0 < value < 1):
                raise ConfigError(f"ScaleMixture({name}=)", want="a number in (0, 1)", got=repr(value), fix="try 0.5")
        _check(self)

    @property
    def spread(self) -> float:
        return math.sqrt(self.share + (1.0 - self.share) * self.ratio**2)

    def log_prob(self, z: Tensor) -> Tensor:
        square = -0.5 * z.square()
        wide, narrow = math.log(self.share), math.log1p(-self.share) - math.log(self.ratio)
        each = torch.logaddexp(square + wide, square / self.ratio**2 + narrow)
        return each.sum(dtype=torch.float64) - 0.5 * LOG_2PI * z.numel()

    def sample(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        wide = torch.rand(tuple(shape), generator=generator, device=generator.device) < self.share
        normals = torch.randn(tuple(shape), generator=generator, device=generator.device)
        return torch.where(wide, normals, self.ratio * normals)


@dataclass(frozen=True)
class FanIn:
    """theta = scale / sqrt(fan_in) z for weights, bias_scale z for vectors and scalars; z normal by default.

    fan_in is the number of inputs that one output sums over: the product of all dimensions but the
    first. Activations then keep their size through the layers, however wide they are.

    Args:
        scale: of a weight times sqrt(fan_in): a positive number, or a prior over it, with which it is the
            unknown `@prior.scale`.
        bias_scale: of entries with fewer than two dimensions, in the same forms; the unknown `@prior.bias_scale`.
        family: of z, such as `StudentT(4.0)`, at loc 0 and scale 1.
        shared: whether an unknown scale is one for all of its entries, or one an entry, `@prior.scale.<name>`.

    Source: Neal (1996), Bayesian Learning for Neural Networks, section 2.1.
    """

    scale: float | PositivePrior = 1.0
    bias_scale: float | PositivePrior = 1.0
    family: Family = field(default_factory=Normal)
    shared: bool = True

    def __post_init__(self) -> None:
        check_scale("FanIn(scale=)", self.scale)
        check_scale("FanIn(bias_scale=)", self.bias_scale)
        if not isinstance(self.family, Family) or self.family.loc != 0.0 or self.family.scale != 1.0:
            raise ConfigError(
                "FanIn(family=)", want="a family at loc 0 and scale 1", got=repr(self.family), fix="scale FanIn itself"
            )
        _check_shared("FanIn", self.shared, self.scale, self.bias_scale)

    def place(self, entry: Entry) -> Place:
        if len(entry.shape) < 2:
            return _placed(self.family, 0.0, self.bias_scale, "@prior.bias_scale", self.shared, entry)
        found = _placed(self.family, 0.0, self.scale, HYPER_SCALE, self.shared, entry)
        return found._replace(scale=found.scale / math.sqrt(max(math.prod(entry.shape[1:]), 1)))

    def check(self, entries: Sequence[Entry]) -> None:
        del entries  # every entry has a fan-in

    def to_config(self) -> dict[str, Any]:
        return _config(self)


@dataclass(frozen=True)
class HalfCauchy:
    """p(s) = 2 / (pi scale (1 + (s / scale)^2)), s > 0.

    Args:
        scale: the median of s, positive, in the units of what it is a prior of.

    Source: Gelman (2006), Prior distributions for variance parameters in hierarchical models.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("HalfCauchy(scale=)", self.scale)

    @property
    def median(self) -> float:
        return self.scale

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
        loc: the mean of log s; exp(loc) is the median of s, in the units of what it is a prior of.
        scale: standard deviation of log s, positive.
    """

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive("LogNormal(scale=)", self.scale)
        require_finite("LogNormal(loc=)", self.loc)
        if abs(self.loc) > 700:
            raise ConfigError("LogNormal(loc=)", want="the logarithm of a number", got=repr(self.loc), fix="lower it")

    @property
    def median(self) -> float:
        return math.exp(self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        log_value = value.log()
        return -((log_value - self.loc) ** 2) / (2.0 * self.scale**2) - log_value - math.log(self.scale) - 0.5 * LOG_2PI

    def sample(self, generator: torch.Generator) -> Tensor:
        return (self.loc + self.scale * torch.randn((), generator=generator, device=generator.device)).exp()

    def to_config(self) -> dict[str, Any]:
        return {"name": "LogNormal", "loc": self.loc, "scale": self.scale}


PRIORS: dict[str, Any] = {kind.__name__: kind for kind in (Normal, Laplace, StudentT, ScaleMixture, FanIn)}
POSITIVE: dict[str, Any] = {kind.__name__: kind for kind in (HalfCauchy, LogNormal)}


def prior_from_config(config: Mapping[str, Any]) -> Prior:
    """The prior that `to_config` described.

    Raises:
        ConfigError: an unknown name or option, with those that there are.
    """
    made: Prior = made_from(PRIORS, config, "prior")
    return made


def made_from(table: Mapping[str, Any], config: Mapping[str, Any], place: str) -> Any:
    """What `name` says in the table, made with the options beside it; tables inside it are priors of their own."""
    if not isinstance(config, Mapping):
        raise ConfigError(place, want="a table with a name", got=repr(config)[:100], fix="write name = 'Normal'")
    name, options = str(config.get("name")), {key: value for key, value in config.items() if key != "name"}
    if name not in table:
        raise ConfigError(
            f"{place} name", want=f"one of {', '.join(table)}", got=repr(name), fix="choose from that list"
        )
    known = [option.name for option in dataclasses.fields(table[name])]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{place} {name}", want=f"options among {', '.join(known)}", got=repr(option), fix="leave it out"
            )
    return table[name](**{option: _value(value, f"{place} {option}") for option, value in options.items()})


def _value(value: Any, place: str) -> Any:
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = {str(pattern): inner for pattern, inner in value}  # patterns are kept in their order
    if not isinstance(value, Mapping):
        return value
    if "name" in value:
        return made_from(POSITIVE | PRIORS, value, place)
    return {pattern: _value(inner, place) for pattern, inner in value.items()}


def _config(prior: Any) -> dict[str, Any]:
    """Name and options; those that say nothing here are left out."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return [[pattern, plain(inner)] for pattern, inner in value.items()]  # tables are stored in any order
        return value.to_config() if hasattr(value, "to_config") else value

    found = {option.name: plain(getattr(prior, option.name)) for option in dataclasses.fields(prior)}
    if prior.shared:
        found.pop("shared")
    if getattr(prior, "family", None) == Normal():
        found.pop("family")
    return {"name": type(prior).__name__, **found}


def _placed(family: Family, loc: float, scale: Any, name: str, shared: bool, entry: Entry) -> Place:
    if isinstance(scale, (int, float)):
        return Place(family, loc, float(scale))
    return Place(family, loc, 1.0, Unknown(name if shared else f"{name}.{entry.name}", scale))


def _scales(scale: Any) -> Iterator[Any]:
    yield from scale.values() if isinstance(scale, Mapping) else (scale,)


def _check(prior: Family) -> None:
    name = type(prior).__name__
    require_finite(f"{name}(loc=)", prior.loc)
    if isinstance(prior.scale, Mapping) and not (prior.scale and all(isinstance(key, str) for key in prior.scale)):
        raise ConfigError(f"{name}(scale=)", want="patterns", got=repr(prior.scale), fix="pass {'*': 1.0}, or 1.0")
    for scale in _scales(prior.scale):
        check_scale(f"{name}(scale=)", scale)
    _check_shared(name, prior.shared, *_scales(prior.scale))


def _check_shared(name: str, shared: Any, *scales: Any) -> None:
    if not isinstance(shared, bool):
        raise ConfigError(f"{name}(shared=)", want="True or False", got=repr(shared), fix="leave it out")
    if not shared and all(isinstance(scale, (int, float)) for scale in scales):
        raise ConfigError(
            f"{name}(shared=False)", want="a scale with a prior", got="a fixed one", fix="pass scale=HalfCauchy(1.0)"
        )


def check_scale(place: str, scale: Any) -> None:
    """Raise ConfigError unless `scale` is a positive number or a prior over one."""
    if isinstance(scale, type) or not all(hasattr(scale, name) for name in ("log_prob", "sample", "median")):
        require_positive(place, scale)


def student_t_constant(df: float) -> float:
    """log of the normalising constant of a standard t density."""
    return math.lgamma((df + 1.0) / 2.0) - math.lgamma(df / 2.0) - 0.5 * math.log(df * math.pi)


def student_t_draws(df: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws of a standard t: z / sqrt(g), with z normal and g gamma of shape and rate df / 2."""
    normals = torch.randn(shape, generator=generator, device=generator.device)
    concentration = torch.full(shape, df / 2.0, device=generator.device)
    # Of few degrees of freedom a gamma can be too small for float32.
    gammas = torch._standard_gamma(concentration, generator=generator).clamp_min(1e-30) / (df / 2.0)
    return normals / gammas.sqrt()


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number that float64 can hold, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_finite(place: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a finite number."""
    if not is_number(value):
        raise ConfigError(place, want="a finite number", got=repr(value)[:100], fix="pass one such as 0.0")


def require_positive(place: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if not (is_number(value) and value > 0):
        raise ConfigError(place, want="a positive number", got=repr(value)[:100], fix="pass one such as 1.0")
