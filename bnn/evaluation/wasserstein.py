"""How far apart two predictives of a regression are: the Wasserstein distance between mixtures, row by row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.errors import DataError
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture, quantile

REACH = 7.5  # normal scores up to which is integrated: 6e-14 of the mass lies beyond
LEVELS = 97  # normal scores at which quantiles are looked for, 0.16 apart
COARSE = 48  # values from which that search begins, over the whole range of a mixture
MOST_COUNTS = 4096  # counts that a predictive spreads over, before they are treated as numbers
LEAST_DF = 3.0  # of Student's t: below, what lies beyond the reach decides, and up to 2 the distance is infinite
# Three points a cell are exact for polynomials of degree 5; the integrand is a square times a density, nearly constant there.
NODES = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64)
WEIGHTS = torch.tensor([5 / 9, 8 / 9, 5 / 9], dtype=torch.float64)


class Distance(NamedTuple):
    """W2 of each row and output, and a bound on its error as far as halving the grid can tell; [B, C] each."""

    value: Tensor
    error: Tensor


class _Quantiles(NamedTuple):
    """A quantile function of each row, Q(Phi(t)): at normal scores [R, M], rising; between them lines, or steps."""

    scores: Tensor
    values: Tensor
    steps: bool

    def halved(self) -> _Quantiles:
        """The same from every second value; of steps, which are exact, the same."""
        if self.steps:
            return self
        return _Quantiles(self.scores[:, ::2].contiguous(), self.values[:, ::2].contiguous(), False)

    def at(self, scores: Tensor) -> Tensor:
        """Q(Phi(t)) at scores [R, T]."""
        above = torch.searchsorted(self.scores, scores.contiguous())
        if self.steps:
            return self.values.gather(1, above.clamp_max(self.values.shape[1] - 1))
        above = above.clamp(1, self.scores.shape[1] - 1)
        low, high = self.scores.gather(1, above - 1), self.scores.gather(1, above)
        first, last = self.values.gather(1, above - 1), self.values.gather(1, above)
        width = high - low
        share = torch.where(width > 0, (scores - low) / width.clamp_min(1e-300), torch.ones_like(width))
        return first + share.clamp(0.0, 1.0) * (last - first)


def has_distance(mixture: Mixture) -> bool:
    """Whether W2 of this predictive can be told: of Student's t only from df = 3 on."""
    return not isinstance(mixture, StudentTMixture) or mixture.df >= LEAST_DF


def wasserstein(one: Mixture, other: Mixture) -> Distance:
    """Wasserstein distance of order 2 between two predictives of the same rows and outputs, in units of the target.

    W2^2 = integral over u in (0, 1) of (F^-1(u) - G^-1(u))^2

    With u = Phi(t) the quantile function of a normal is a line in t, and those of mixtures are nearly so but for gaps
    between components. Each is tabled at values that lie dense where either the mass or a gap is, joined by lines, and the
    square of their difference integrated over the cells of both tables. The same with half of the values tells the error.
    Of counts the quantile functions are steps, and the integral is exact; of Student's t it stops at the quantiles of
    3e-14, where for df = 3 some 1e-4 of the integral lies beyond.

    Args:
        one: a predictive of B rows and C outputs, with any number of samples.
        other: of the same shape, with any number of its own.

    Returns:
        `Distance`, [B, C] each.

    Raises:
        DataError: other rows or outputs, or Student's t with df below 3.

    Examples:
        >>> def normal(mean, scale):
        ...     means = torch.full((1, 1, 1), mean, dtype=torch.float64)
        ...     return NormalMixture(means, torch.full_like(means, scale), torch.zeros(1, dtype=torch.float64))
        >>> round(float(wasserstein(normal(0.0, 1.0), normal(3.0, 5.0)).value), 6)  # sqrt(3^2 + 4^2)
        5.0

    Source: Villani (2003), Topics in Optimal Transportation, theorem 2.18.
    """
    shape = one.mean.shape
    if other.mean.shape != shape:
        raise DataError(
            "wasserstein",
            want=f"predictives of one shape, {list(shape)}",
            got=str(list(other.mean.shape)),
            fix="compare banks on the same inputs and targets",
        )
    if not (has_distance(one) and has_distance(other)):
        raise DataError(
            "wasserstein", want=f"df of at least {LEAST_DF:g}", got="heavier tails", fix="compare means and scores"
        )
    tables = _table(one), _table(other)
    fine, coarse = _integral(*tables), _integral(*(table.halved() for table in tables))
    # Lines between values err by the square of their distance, so that the coarse one is off four times as much.
    best = (fine + (fine - coarse) / 3.0).clamp_min(0.0).sqrt()
    error = torch.maximum((fine.sqrt() - coarse.sqrt()).abs(), (best - fine.sqrt()).abs())
    return Distance(best.view(shape), error.view(shape))


def _integral(one: _Quantiles, other: _Quantiles) -> Tensor:
    """The integral of the squared difference over the normal measure, [R]."""
    rows = len(one.scores)
    even = torch.linspace(-REACH, REACH, LEVELS, dtype=torch.float64).expand(rows, LEVELS)
    cells = torch.cat([one.scores, other.scores, even], dim=1).clamp(-REACH, REACH).sort(dim=1).values  # [R, T]
    half = 0.5 * cells.diff(dim=1).unsqueeze(2)  # [R, T - 1, 1]
    points = (cells[:, :-1].unsqueeze(2) + half * (1.0 + NODES)).flatten(1)  # [R, 3 (T - 1)]
    density = torch.exp(-0.5 * points.square()) / math.sqrt(2.0 * math.pi)
    squared = (one.at(points) - other.at(points)).square()
    return ((half * WEIGHTS).flatten(1) * density * squared).sum(dim=1)


def _table(mixture: Mixture) -> _Quantiles:
    """The quantile functions of a mixture's rows and outputs, R = B C of them."""
    if isinstance(mixture, PoissonMixture):
        low, high = quantile(mixture, 1e-13), quantile(mixture, 1.0 - 1e-13)  # [B, C]
        counts = int((high - low).max()) + 1
        if counts <= MOST_COUNTS:
            values = [low + place for place in range(counts)]
            return _quantiles(mixture, values, steps=True)
        values = [low + (high - low) * place / (COARSE - 1) for place in range(COARSE)]
    else:
        values = _range(mixture)
    for _ in range(2):  # the second round mends what the coarse values led to
        table = _quantiles(mixture, values)
        even = torch.linspace(-REACH, REACH, LEVELS, dtype=torch.float64)
        found = table.at(even.expand(len(table.scores), LEVELS))  # [R, LEVELS]
        values = [*values[:COARSE], *(column.view(mixture.mean.shape) for column in found.unbind(1))]
    ordered = torch.stack(values).sort(dim=0).values  # [M, B, C]
    between = 0.5 * (ordered[1:] + ordered[:-1])
    # Every second value is one of the coarser table.
    return _quantiles(mixture, list(torch.stack([ordered[:-1], between], dim=1).flatten(0, 1)) + [ordered[-1]])


def _range(mixture: NormalMixture | StudentTMixture) -> list[Tensor]:
    """Values [B, C] over the range of a mixture: dense about its mean in units of its noise, and far apart outside."""
    kept = mixture.log_weight > -torch.inf
    centre = (mixture.means if isinstance(mixture, NormalMixture) else mixture.locs)[kept]  # [S, B, C]
    spread = mixture.scales[kept].expand_as(centre)
    width, tail = REACH + 1.0, 0.5 * math.erfc(REACH / math.sqrt(2.0))
    while True:
        low, high = (centre - width * spread).amin(dim=0), (centre + width * spread).amax(dim=0)
        if bool(((mixture.cdf(low) <= tail) & (mixture.cdf(high) >= 1.0 - tail)).all()) or width > 1e8:
            break
        width *= 2.0
    middle, unit = mixture.mean, spread.amin(dim=0)
    even = torch.linspace(0.0, 1.0, COARSE // 2, dtype=torch.float64)
    below, above = torch.asinh((low - middle) / unit), torch.asinh((high - middle) / unit)
    curved = [middle + unit * torch.sinh(below + (above - below) * float(place)) for place in even]
    return curved + [low + (high - low) * float(place) for place in even]


def _quantiles(mixture: Mixture, values: list[Tensor], *, steps: bool = False) -> _Quantiles:
    """The table of the normal scores of P(Y <= value), at values [B, C] in any order."""
    ordered = torch.stack(values).sort(dim=0).values  # [M, B, C]
    below = torch.stack([mixture.cdf(value) for value in ordered]).flatten(1).T  # [R, M]
    scores = torch.special.ndtri(below.clamp(0.0, 1.0)).clamp(-2 * REACH, 2 * REACH)
    return _Quantiles(scores.cummax(dim=1).values.contiguous(), ordered.flatten(1).T.contiguous(), steps)
