"""What all samples of a bank say of targets: mixtures, with density, distribution function and quantiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from bnn.errors import DataError
from bnn.likelihoods import normal_log_prob, poisson_log_prob, student_t_log_prob
from bnn.metrics import mixture_cdf, mixture_log_prob

VALUES = 2**20  # numbers held at once while several quantiles are sought
STEPS = 200  # of Newton's method at most
CLOSE, ROUNDING = 1e-13, 1e-12  # a step in standard deviations, or what is missing of a level, that ends it


class NormalMixture(NamedTuple):
    """A mixture of S normals a row and output, in units of the target, float64."""

    means: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1], [S, 1, C] where targets have units of their own, or [S, B, C] where noise varies
    log_weight: Tensor  # [S] normalised

    @property
    def centres(self) -> Tensor:
        """Mean of each sample [S, B, C]."""
        return self.means

    @property
    def variances(self) -> Tensor:
        """Noise variance of each sample, what broadcasts to [S, B, C]."""
        return self.scales.square()

    @property
    def mean(self) -> Tensor:
        """Predictive mean [B, C]."""
        return _average(self.means, self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected noise variance [B, C]."""
        return _average(self.scales.square().expand_as(self.means), self.log_weight)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' means [B, C]."""
        return _average((self.means - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of targets [B, C], summed over outputs inside a sample, [B]."""
        return mixture_log_prob(self.means, self.scales, y, self.log_weight)

    def log_probs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B]."""
        return normal_log_prob(y, self.means, self.scales).sum(dim=-1)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]."""
        return mixture_cdf(self.means, self.scales, y, self.log_weight)

    def cdfs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B, C]."""
        below: Tensor = torch.special.ndtr((y - self.means) / self.scales)
        return below

    def density(self, y: Tensor) -> Tensor:
        """Density of each target by itself, [B, C]."""
        return _average(normal_log_prob(y, self.means, self.scales).exp(), self.log_weight)


class StudentTMixture(NamedTuple):
    """A mixture of S Student's t a row and output, in units of the target, float64."""

    locs: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1] or [S, 1, C]
    log_weight: Tensor  # [S] normalised
    df: float

    @property
    def centres(self) -> Tensor:
        """Centre of each sample [S, B, C]; its mean for df above 1."""
        return self.locs

    @property
    def variances(self) -> Tensor:
        """Noise variance of each sample, what broadcasts to [S, B, C], infinite for df up to 2."""
        return self.scales.square() * (self.df / (self.df - 2.0) if self.df > 2.0 else math.inf)

    @property
    def mean(self) -> Tensor:
        """Predictive mean [B, C]; of df up to 1, where there is none, the mean of the centres."""
        return _average(self.locs, self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected noise variance [B, C]: df / (df - 2) scale^2, infinite for df up to 2."""
        factor = self.df / (self.df - 2.0) if self.df > 2.0 else math.inf
        return factor * _average(self.scales.square().expand_as(self.locs), self.log_weight)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' centres [B, C]."""
        return _average((self.locs - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of targets [B, C], summed over outputs inside a sample, [B]."""
        return torch.logsumexp(self.log_probs(y) + self.log_weight.unsqueeze(1), dim=0)

    def log_probs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B]."""
        return student_t_log_prob(y, self.locs, self.scales, self.df).sum(dim=-1)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]; needs SciPy."""
        return _average(self.cdfs(y), self.log_weight)

    def cdfs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B, C]; needs SciPy."""
        from scipy.special import stdtr

        return torch.from_numpy(stdtr(self.df, ((y - self.locs) / self.scales).numpy()))

    def density(self, y: Tensor) -> Tensor:
        """Density of each target by itself, [B, C]."""
        return _average(student_t_log_prob(y, self.locs, self.scales, self.df).exp(), self.log_weight)


class PoissonMixture(NamedTuple):
    """A mixture of S Poisson distributions a row and output, float64."""

    log_rates: Tensor  # [S, B, C]
    log_weight: Tensor  # [S] normalised

    @property
    def centres(self) -> Tensor:
        """Rate of each sample [S, B, C]."""
        return self.log_rates.exp()

    @property
    def variances(self) -> Tensor:
        """Variance of the counts given a sample, which is its rate, [S, B, C]."""
        return self.log_rates.exp()

    @property
    def mean(self) -> Tensor:
        """Expected count [B, C]."""
        return _average(self.log_rates.exp(), self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected variance of the counts given a sample, which is their expected rate, [B, C]."""
        return self.mean

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' rates [B, C]."""
        return _average((self.log_rates.exp() - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log probability of counts [B, C], summed over outputs inside a sample, [B]."""
        return torch.logsumexp(self.log_probs(y) + self.log_weight.unsqueeze(1), dim=0)

    def log_probs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B]."""
        return poisson_log_prob(y, self.log_rates).sum(dim=-1)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each count, [B, C]; 0 below 0."""
        return _average(self.cdfs(y), self.log_weight)

    def cdfs(self, y: Tensor) -> Tensor:
        """The same of each sample, [S, B, C]."""
        counts = y.double().floor().expand_as(self.log_rates)
        below = torch.special.gammaincc(counts.clamp_min(0) + 1.0, self.log_rates.exp())
        return torch.where(counts < 0, torch.zeros_like(below), below)


Mixture: TypeAlias = NormalMixture | StudentTMixture | PoissonMixture
"""The predictive of a regression: `mean`, `aleatoric` and `epistemic` variance, `log_prob` and `cdf`."""


def quantile(mixture: Mixture, level: float) -> Tensor:
    """The value y [B, C] with P(Y <= y) = level, by bisection to neighbouring numbers; of counts, the least with P >= level.

    Raises:
        DataError: rates of counts too large for a number.
    """
    counts = isinstance(mixture, PoissonMixture)
    kept = mixture.log_weight > -torch.inf  # samples of no weight have no say in where to look
    if isinstance(mixture, PoissonMixture):
        centre = mixture.log_rates[kept].exp()
        spread = centre.sqrt() + 1.0
    else:
        centre = (mixture.means if isinstance(mixture, NormalMixture) else mixture.locs)[kept]
        spread = mixture.scales[kept].expand_as(centre)
    if not torch.isfinite(centre).all():
        raise DataError(
            "quantiles", want="finite rates", got="one beyond 1e308", fix="check the inputs, or drop the sample"
        )
    width = 10.0
    below, above = (centre - width * spread).amin(dim=0), (centre + width * spread).amax(dim=0)  # [B, C]
    while not ((mixture.cdf(below) <= level) & (mixture.cdf(above) >= level)).all():
        width *= 4.0  # tails heavier than a normal's
        below, above = (centre - width * spread).amin(dim=0), (centre + width * spread).amax(dim=0)
    if counts:
        below, above = below.clamp_min(-1.0).floor(), above.ceil()
    while True:
        middle = 0.5 * (below + above)
        middle = middle.floor() if counts else middle
        if ((middle <= below) | (middle >= above)).all():
            return above
        low = mixture.cdf(middle) < level
        below, above = torch.where(low, middle, below), torch.where(low, above, middle)


def quantiles(mixture: Mixture, levels: Sequence[float]) -> Tensor:
    """The values y [L, B, C] with P(Y <= y) = level, by Newton's method kept inside a bracket; of counts, as `quantile`.

    They are right to rounding of the distribution function, at a fifth of what bisection costs.
    """
    if isinstance(mixture, PoissonMixture):
        return torch.stack([quantile(mixture, level) for level in levels])
    least, most = _bracket(mixture, min(levels), max(levels))
    spread = (mixture.aleatoric + mixture.epistemic).sqrt()
    spread = torch.where(spread.isfinite(), spread, most - least)
    found = []
    for some in torch.tensor(levels, dtype=torch.float64).split(max(1, VALUES // mixture.centres.numel())):
        level = some[:, None, None].expand(-1, *least.shape).flatten(0, 1)  # [l B, C]
        start = (mixture.mean + spread * torch.special.ndtri(some)[:, None, None]).clamp(least, most).flatten(0, 1)
        ends = (least.repeat(len(some), 1), most.repeat(len(some), 1))
        place = _solved(tiled(mixture, len(some)), level, start, ends, CLOSE * spread.repeat(len(some), 1))
        found.append(place.view(len(some), *least.shape))
    return torch.cat(found)


Kind = TypeVar("Kind", bound="Mixture")


def tiled(mixture: Kind, times: int) -> Kind:
    """The same mixture for its rows, again and again: [S, times B, C]."""
    changed: dict[str, Any] = {
        name: value.repeat(1, times, 1)
        for name, value in mixture._asdict().items()
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] > 1
    }
    if mixture.centres.shape[1] == 1:  # one row, which broadcasts in scales and not in means
        first = mixture._fields[0]
        changed[first] = getattr(mixture, first).repeat(1, times, 1)
    return mixture._replace(**changed)  # type: ignore[return-value]


def _solved(
    mixture: NormalMixture | StudentTMixture, level: Tensor, place: Tensor, ends: tuple[Tensor, Tensor], close: Tensor
) -> Tensor:
    """Where the distribution function reaches a level, all [B, C], from a first guess between two ends."""
    below, above = ends
    missed = torch.full_like(place, torch.inf)
    for _ in range(STEPS):
        value = mixture.cdf(place) - level
        below, above = torch.where(value < 0, place, below), torch.where(value < 0, above, place)
        step = place - value / mixture.density(place)
        there = value.abs() <= ROUNDING  # one step more, and what is missing is rounding
        # Where a step leaves the bracket, or the last one did not halve what is missing, the bracket is halved.
        fine = (step >= below) & (step <= above) & (there | (2.0 * value.abs() <= missed))
        moved = torch.where(fine, step, torch.where(there, place, 0.5 * (below + above)))
        missed = torch.where(fine, value.abs(), torch.inf)
        near = (there | ((moved - place).abs() <= close)).all()
        place = moved
        if near:
            break
    return place


def _bracket(mixture: NormalMixture | StudentTMixture, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Values [B, C] between which quantiles of these levels lie."""
    kept = mixture.log_weight > -torch.inf
    centre = mixture.centres[kept]
    spread = mixture.scales[kept].expand_as(centre)
    width = 10.0
    while True:
        below, above = (centre - width * spread).amin(dim=0), (centre + width * spread).amax(dim=0)
        if ((mixture.cdf(below) <= low) & (mixture.cdf(above) >= high)).all():
            return below, above
        width *= 4.0  # tails heavier than a normal's


def _average(values: Tensor, log_weight: Tensor) -> Tensor:
    """sum_s w_s values_s, [S, B, C] -> [B, C]."""
    return (log_weight.exp()[:, None, None] * values).sum(dim=0)
