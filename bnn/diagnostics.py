"""Diagnostics of Markov chains: how far chains agree, and how much their draws are worth.

All functions take draws [C, D, ...] of C chains, reckon in float64 and keep the trailing axes. Draws that
hold a NaN, and fewer than 4 draws a chain, give NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bnn.errors import DataError

CHUNK_VALUES = 1_000_000  # draws of several quantities taken at once: a step holds about ten times as many numbers
MIN_DRAWS = 4  # of a chain: each half needs two for a variance
TAILS = (0.05, 0.95)

# What a verdict asks of chains.
ENOUGH_DRAWS = 100  # of a chain: below, R-hat and ESS say more about chance than about the chains
MAX_RHAT = 1.05  # half chains' means then spread by a third of a posterior standard deviation: 1.05^2 - 1 = 0.32^2
MIN_EBFMI = 0.3


def split_rhat(draws: Tensor) -> Tensor:
    """Rank-normalised split R-hat: how much wider all chains together are than each half chain alone.

    R = sqrt((n - 1) / n + B / W), the larger one of z and of |x - median| as ranks; n draws a half chain, B the
    variance of the half chains' means, W the mean of their variances, z the normal scores of the ranks

    Args:
        draws: [C, D, ...]. Of one chain the two halves are compared.

    Returns:
        [...], near 1 where chains agree; infinite where each half chain stands still at a place of its own;
        NaN where all draws are equal.

    Examples:
        >>> from bnn.seeding import generator
        >>> draws = torch.randn(4, 200, 3, generator=generator(0))
        >>> apart = draws + torch.arange(4.0).view(4, 1, 1)
        >>> bool((split_rhat(draws) < 1.02).all()), bool((split_rhat(apart) > 1.3).all())
        (True, True)

    Source: Vehtari et al. (2021), arXiv:1903.08008, eqs. 1 to 4 and section 4.
    """

    def rhat(values: Tensor) -> Tensor:  # [P, C, D] -> [P]
        halves = _halves(values)
        ordered = halves.flatten(1).sort(dim=1).values  # [P, 2 C n]
        folded = (halves - _quantile(ordered, 0.5)[:, None, None]).abs()
        # Two values equally often have one distance from their median, and no folded R-hat: the other one then counts.
        return torch.fmax(_rhat(_normal_scores(halves)), _rhat(_normal_scores(folded)))

    return _each(rhat, draws)


def ess_bulk(draws: Tensor) -> Tensor:
    """Effective sample size in the bulk of the distribution: of the normal scores of ranks, over half chains.

    ESS = C D / tau, tau = 1 + 2 sum_t rho_t, summed over pairs of lags as long as they are positive, made to fall

    Args:
        draws: [C, D, ...].

    Returns:
        [...], independent draws that would tell as much about the middle of the distribution; at most
        C D log10(C D), which chains that swing from side to side reach. Equal draws count in full.

    Source: Vehtari et al. (2021), arXiv:1903.08008, section 4; of the sum, Geyer (1992), section 3.3.
    """
    return _each(lambda values: _ess(_normal_scores(_halves(values))), draws)


def ess_tail(draws: Tensor) -> Tensor:
    """Effective sample size in the tails: the smaller one of the indicators x <= 5 % and x <= 95 % quantile.

    Args:
        draws: [C, D, ...].

    Returns:
        [...], to be large before quantiles and intervals are believed.

    Source: Vehtari et al. (2021), arXiv:1903.08008, section 4.3.
    """

    def tail(values: Tensor) -> Tensor:  # [P, C, D] -> [P]
        ordered = values.flatten(1).sort(dim=1).values  # [P, C D]
        below = [_halves((values <= _quantile(ordered, share)[:, None, None]).double()) for share in TAILS]
        return torch.minimum(_ess(below[0]), _ess(below[1]))

    return _each(tail, draws)


def ess_mean(draws: Tensor) -> Tensor:
    """Effective sample size of the draws' own mean: of the values as they are, over half chains.

    Args:
        draws: [C, D, ...].

    Returns:
        [...], meaningful where the distribution has a variance.

    Source: Vehtari et al. (2021), arXiv:1903.08008, section 3.2.
    """
    return _each(lambda values: _ess(_halves(values)), draws)


def mcse_mean(draws: Tensor) -> Tensor:
    """Monte Carlo standard error of the mean: standard deviation of all draws / sqrt(ess_mean).

    Args:
        draws: [C, D, ...].

    Returns:
        [...], in the unit of the draws.

    Source: Vehtari et al. (2021), arXiv:1903.08008, section 3.2.
    """
    return _each(lambda values: values.flatten(1).std(dim=1) / _ess(_halves(values)).sqrt(), draws)


def ebfmi(energy: Tensor) -> Tensor:
    """Energy Bayesian fraction of missing information of each chain of a Hamiltonian sampler.

    sum_d (E_d - E_{d-1})^2 / sum_d (E_d - mean E)^2

    Args:
        energy: Hamiltonian energy of each draw [C, D], in nats.

    Returns:
        [C], near 1 or above where fresh momenta reach all energies; below 0.3 they reach them slowly, as in
        funnels and heavy tails.

    Examples:
        >>> ebfmi(torch.tensor([[1.0, 3.0, 2.0, 4.0]]))
        tensor([1.8000], dtype=torch.float64)

    Source: Betancourt (2016), arXiv:1604.00695, section 3.
    """
    if energy.dim() != 2:
        raise _shape("energy [C, D]", energy)
    values = energy.double()
    if values.shape[1] < MIN_DRAWS:
        return values.new_full((len(values),), math.nan)
    spread = (values - values.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return values.diff(dim=1).square().sum(dim=1) / spread  # [C]


def _each(statistic: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    """A statistic [P, C, D] -> [P] of every quantity, as many at once as memory is granted for; -> [...]."""
    if draws.dim() < 2 or not draws.shape[0]:
        raise _shape("draws [C, D, ...] of at least one chain", draws)
    chains, length, *rest = draws.shape
    columns = draws.detach().reshape(chains, length, math.prod(rest))  # [C, D, P]
    found = torch.full((columns.shape[2],), math.nan, dtype=torch.float64, device=draws.device)
    size = max(1, CHUNK_VALUES // max(chains * length, 1))
    for start in range(0, len(found) if length >= MIN_DRAWS else 0, size):
        values = columns[:, :, start : start + size].double().permute(2, 0, 1).contiguous()  # [P, C, D]
        missing = values.isnan().flatten(1).any(dim=1)
        found[start : start + size] = torch.where(missing, math.nan, statistic(values))
    return found.reshape(rest)


def _halves(values: Tensor) -> Tensor:
    """Each chain as two: [P, C, D] -> [P, 2 C, D // 2]. An odd draw in the middle belongs to neither."""
    half = values.shape[2] // 2
    return torch.cat([values[:, :, :half], values[:, :, -half:]], dim=1)


def _normal_scores(values: Tensor) -> Tensor:
    """z = Phi^-1((rank - 3/8) / (S + 1/4)) over the S draws of all chains, [P, C, D]; ties share their mean rank."""
    ordered, order = values.flatten(1).sort(dim=1)  # [P, S]
    size = ordered.shape[1]
    begins = torch.ones_like(ordered, dtype=torch.bool)  # where equal values begin, and where they end
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = begins.roll(-1, dims=1)
    place = torch.arange(1, size + 1, dtype=torch.float64, device=values.device)
    first = torch.where(begins, place, 0.0).cummax(dim=1).values
    last = torch.where(ends, place, math.inf).flip(1).cummin(dim=1).values.flip(1)
    rank = torch.empty_like(ordered).scatter_(1, order, (first + last) / 2)
    scores: Tensor = torch.special.ndtri((rank - 0.375) / (size + 0.25))
    return scores.view_as(values)


def _quantile(ordered: Tensor, share: float) -> Tensor:
    """Quantile of sorted values [P, S], by straight lines between them: [P]."""
    place = share * (ordered.shape[1] - 1)
    lower, upper, way = ordered[:, math.floor(place)], ordered[:, math.ceil(place)], place - math.floor(place)
    if way == 0.5:  # the median: rounded alike on both sides, so that its two neighbours stay equally far from it
        return (lower + upper) / 2
    return torch.lerp(lower, upper, way)


def _rhat(values: Tensor) -> Tensor:
    """R-hat of chains as they are, [P, C, D] -> [P]."""
    length = values.shape[2]
    between, within = values.mean(dim=2).var(dim=1), values.var(dim=2).mean(dim=1)
    return (between / within + (length - 1) / length).sqrt()


def _ess(values: Tensor) -> Tensor:
    """Effective sample size of chains as they are, [P, C, D] -> [P]."""
    chains, length = values.shape[1:]
    covariance = _autocovariance(values).mean(dim=1)  # [P, D] over lags
    within = covariance[:, 0] * length / (length - 1)
    total = covariance[:, 0]  # variance over all chains, of which `within` is one chain's
    if chains > 1:
        total = total + values.mean(dim=2).var(dim=1)
    rho = 1 - (within.unsqueeze(1) - covariance) / total.unsqueeze(1)  # [P, D]
    rho[:, 0] = 1.0
    num_pairs = max((length - 1) // 2, 1)  # the last lags hang on very few draws, and are not looked at
    even = rho[:, 0 : 2 * num_pairs : 2]
    pairs = even + rho[:, 1 : 2 * num_pairs : 2]  # [P, pairs]
    stops = pairs <= 0
    stops[:, -1] = True
    last = stops.long().argmax(dim=1, keepdim=True)  # [P, 1], the first pair that is not counted in full
    before = torch.arange(num_pairs, device=values.device) < last
    falling = torch.where(before, pairs.cummin(dim=1).values, 0.0).sum(dim=1)
    # Of the pair that ends the sum its even lag, which may be positive, still counts once.
    at_end, sum_at_end = even.gather(1, last).squeeze(1), pairs.gather(1, last).squeeze(1)
    at_end = torch.where(sum_at_end >= 0, at_end, at_end.clamp_min(0.0))
    size = chains * length
    tau = (2 * falling + at_end - 1).clamp_min(1 / math.log10(size))
    constant = (values == values[:, :1, :1]).flatten(1).all(dim=1)
    return torch.where(constant, float(size), size / tau)


def _autocovariance(values: Tensor) -> Tensor:
    """sum_d (x_d - mean) (x_{d+t} - mean) / D at each lag t, along the last axis, by a Fourier transform."""
    length = values.shape[-1]
    size = 2 ** math.ceil(math.log2(2 * length))  # padded, so that the end of a chain does not meet its beginning
    spectrum = torch.fft.rfft(values - values.mean(dim=-1, keepdim=True), n=size)
    products: Tensor = torch.fft.irfft(spectrum.abs().square(), n=size)
    return products[..., :length] / length


def _shape(want: str, got: Tensor) -> DataError:
    return DataError("diagnostics", want=want, got=f"{list(got.shape)}", fix="put chains first, then draws")
