"""What all samples of a bank say of targets: mixtures, with density, distribution function and quantiles."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnn.errors import DataError
from bnn.likelihoods import poisson_log_prob, student_t_log_prob
from bnn.metrics import mixture_cdf, mixture_log_prob


class NormalMixture(NamedTuple):
    """A mixture of S normals a row and output, in units of the target, float64."""

    means: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1], [S, 1, C] where targets have units of their own, or [S, B, C] where noise varies
    log_weight: Tensor  # [S] normalised

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

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]."""
        return mixture_cdf(self.means, self.scales, y, self.log_weight)


class StudentTMixture(NamedTuple):
    """A mixture of S Student's t a row and output, in units of the target, float64."""

    locs: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1] or [S, 1, C]
    log_weight: Tensor  # [S] normalised
    df: float

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
        each = student_t_log_prob(y, self.locs, self.scales, self.df).sum(dim=-1)  # [S, B]
        return torch.logsumexp(each + self.log_weight.unsqueeze(1), dim=0)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]; needs SciPy."""
        from scipy.special import stdtr

        z = ((y - self.locs) / self.scales).numpy()
        return _average(torch.from_numpy(stdtr(self.df, z)), self.log_weight)


class PoissonMixture(NamedTuple):
    """A mixture of S Poisson distributions a row and output, float64."""

    log_rates: Tensor  # [S, B, C]
    log_weight: Tensor  # [S] normalised

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
        each = poisson_log_prob(y, self.log_rates).sum(dim=-1)  # [S, B]
        return torch.logsumexp(each + self.log_weight.unsqueeze(1), dim=0)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each count, [B, C]; 0 below 0."""
        counts = y.double().floor().expand_as(self.log_rates)
        below = torch.special.gammaincc(counts.clamp_min(0) + 1.0, self.log_rates.exp())
        return _average(torch.where(counts < 0, torch.zeros_like(below), below), self.log_weight)


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


def _average(values: Tensor, log_weight: Tensor) -> Tensor:
    """sum_s w_s values_s, [S, B, C] -> [B, C]."""
    return (log_weight.exp()[:, None, None] * values).sum(dim=0)
