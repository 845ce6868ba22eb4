"""What warm-up learns: the step size by dual averaging, the mass in windows, the trajectory length by ChEES."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.inference.hamiltonian import Metric, Transition, whiten

# Dual averaging (Hoffman and Gelman 2014, section 3.2.1): shrinkage, early damping, decay of the average. With their
# shrinkage of 0.05 the step swings so widely that its average is accepted with 0.94 where 0.8 is asked for.
GAMMA, EARLY, KAPPA = 0.1, 10.0, 0.75
# ChEES (Hoffman, Radul and Sountsov 2021, section 3.2): Adam without momentum on log T, and the decay of its average.
LENGTH_RATE, LENGTH_DECAY, LENGTH_KAPPA = 0.025, 0.95, 0.5
MANY_SCATTERS = 4.0  # of the largest variance of noise: passed by chance about once in ten thousand
LOW_RANK_ROUNDS, LEAST_SHARE = 3, 1e-4  # alternations of components and diagonal; what a diagonal may shrink to
CENTRE_RATE = 0.05  # least weight of a new draw in the running centre of a chain
DISAGREEMENT = 0.2  # variance of the chains' centres over that within, above which each has its own: R-hat near 1.1


class StepSize(NamedTuple):
    """Dual averaging of the logarithm of each chain's step size.

    Chains have steps of their own: by a common mean seven of eight would reach the target alone, and the eighth, where
    the target is narrow, would stay stuck.
    """

    log_step: Tensor  # [C] float64, of the next trajectory
    log_step_mean: Tensor  # [C] its average, used after warm-up
    error_mean: Tensor  # [C] running mean of (target - acceptance)
    num_updates: int  # trajectories since the last restart
    centre: Tensor  # [C] what log_step is drawn towards


def first_step_size(step_size: Tensor) -> StepSize:
    """Before any trajectory; drawn towards ten times these steps [C], since long ones are cheap to try."""
    log_step = step_size.double().log()
    return StepSize(log_step, log_step, torch.zeros_like(log_step), 0, log_step + math.log(10.0))


def update_step_size(at: StepSize, acceptance: Tensor, target: float) -> StepSize:
    """One step of dual averaging, with the acceptance [C] of a trajectory.

    x <- m - sqrt(t) / GAMMA * mean(target - acceptance);  x_mean <- t^-KAPPA x + (1 - t^-KAPPA) x_mean
    """
    count = at.num_updates + 1
    error_mean = at.error_mean * (1 - 1 / (count + EARLY)) + (target - acceptance) / (count + EARLY)
    log_step = at.centre - math.sqrt(count) / GAMMA * error_mean
    weight = count**-KAPPA
    mean = weight * log_step + (1 - weight) * at.log_step_mean
    return StepSize(log_step, mean, error_mean, count, at.centre)


class Moments(NamedTuple):
    """Running variances of the draws of a window, and some of the draws where correlations are wanted."""

    num_draws: int
    mean: Tensor  # [C, P]
    squares: Tensor  # [C, P] sums of squared deviations
    recent: Tensor  # [C, W, P] room for W draws of the window, evenly spaced; W = 0 for a diagonal mass
    num_kept: int  # of them that are filled


def no_moments(flat: Tensor, room: int) -> Moments:
    """Of a window that begins."""
    zeros = torch.zeros_like(flat)
    return Moments(0, zeros, zeros, flat.new_zeros(len(flat), room, flat.shape[1]), 0)


def update_moments(moments: Moments, flat: Tensor, every: int) -> Moments:
    """Add one draw a chain (Welford); each `every`-th is kept as it is while there is room."""
    number = moments.num_draws + 1
    delta = flat - moments.mean
    mean = moments.mean + delta / number
    recent, kept = moments.recent, moments.num_kept
    if number % every == 0 and kept < recent.shape[1]:
        recent = recent.clone()  # states that were handed out keep theirs
        recent[:, kept] = flat
        kept += 1
    return Moments(number, mean, moments.squares + delta * (flat - mean), recent, kept)


def learn_metric(moments: Moments, prior_variance: Tensor, rank: int) -> Metric:
    """The metric of the variances seen, pooled over chains about each chain's own mean.

    With n draws in all the variances are drawn by 5 / (n + 5) towards a thousandth of the prior's, as Stan does
    towards 1e-3. With `rank` > 0 the largest principal components stand beside the diagonal, which is then of
    what they leave over.
    """
    chains = len(moments.mean)
    count = chains * (moments.num_draws - 1)
    variance = moments.squares.sum(dim=0) / max(count, 1)  # [P]
    scale = ((count * variance + 5e-3 * prior_variance) / (count + 5)).sqrt()
    if not rank or moments.num_kept < 2:
        return Metric(scale, scale.new_zeros(len(scale), 0), scale.new_zeros(0))
    draws = moments.recent[:, : moments.num_kept]
    draws = (draws - draws.mean(dim=1, keepdim=True)).flatten(0, 1).double()  # [n, P]
    number, whole = chains * (moments.num_kept - 1), scale.double()
    share = torch.ones_like(whole)  # of each variance that no component explains
    for _ in range(LOW_RANK_ROUNDS):
        scaled = draws / (whole * share.sqrt())
        directions, variances = principal(scaled, number, rank)
        if not len(variances):
            break
        left = (scaled - (scaled @ directions) @ directions.T).square().sum(dim=0) / number  # [P]
        left = left / (1.0 - directions.square().sum(dim=1)).clamp_min(0.1)
        share = (share * left.clamp_min(1e-3)).clamp(LEAST_SHARE, 1.0)
    directions, variances = principal(draws / (whole * share.sqrt()), number, rank)
    return Metric((whole * share.sqrt()).to(scale), directions.to(scale), variances.to(scale))


def principal(draws: Tensor, number: int, rank: int) -> tuple[Tensor, Tensor]:
    """Directions [P, R] of the largest variances [R] of centred draws [n, P] of about unit variance.

    R is at most `rank`: variances count where they are above what noise alone would show in `number` draws of
    P values, (1 + sqrt(P / number))^2 and what the largest of noise scatters about it, and are shrunk to what they
    would be without it.

    Source: Donoho, Gavish and Johnstone (2018), Annals of Statistics 46(4), section 2; of the scatter, Johnstone (2001),
    Annals of Statistics 29(2), theorem 1.
    """
    _, singular, right = torch.linalg.svd(draws / math.sqrt(number), full_matrices=False)
    ratio = draws.shape[1] / number
    noisy = singular.square()[:rank]
    root_draws, root_values = math.sqrt(number), math.sqrt(draws.shape[1])
    scatter = (root_draws + root_values) / number * (1.0 / root_draws + 1.0 / root_values) ** (1.0 / 3.0)
    above = noisy > (1.0 + math.sqrt(ratio)) ** 2 + MANY_SCATTERS * scatter
    part = noisy[above] + 1.0 - ratio
    true = 0.5 * (part + (part.square() - 4.0 * noisy[above]).clamp_min(0.0).sqrt())
    return right[:rank][above].T.contiguous(), true


def windows(num_warmup: int) -> list[int]:
    """Warm-up draws after which the mass is learnt: windows that double, between a start and an end without.

    The first 15 % find the typical set, and at the end the step size settles for 50 draws, as in
    Stan, or a tenth or at most a third of the warm-up. Below 40 draws no mass is learnt: there are
    too few for a variance and for the step size that follows it.
    """
    if num_warmup < 40:
        return []
    begin, end = window_start(num_warmup), num_warmup - max(min(50, num_warmup // 3), num_warmup // 10)
    edges: list[int] = []
    width = max((end - begin) // 7, 5)
    edge = begin
    while edge + width <= end:
        following = edge + width + 2 * width
        edge = end if following > end else edge + width
        edges.append(edge)
        width *= 2
        if edge == end:
            break
    return edges


def window_start(num_warmup: int) -> int:
    """Draws before the first window."""
    return int(0.15 * num_warmup)


class Length(NamedTuple):
    """ChEES: the trajectory length T, in time of the dynamics, climbs the change of the squared distance to the centre.

    ChEES(T) = 1/4 E[(|x' - c|^2 - |x - c|^2)^2]
    """

    log_length: float
    log_length_mean: float  # its average, used after warm-up
    square: float  # running mean of squared gradients, for Adam
    num_updates: int
    centre: Tensor  # [C, P] running mean of each chain
    spread: Tensor  # [C] running mean of |x - centre|^2, whitened, over P


def first_length(length: float, flat: Tensor) -> Length:
    """Before any trajectory."""
    return Length(math.log(length), math.log(length), 0.0, 0, flat, torch.zeros(len(flat), dtype=torch.float64))


def update_length(
    at: Length,
    found: Transition,
    before: Tensor,
    after: Tensor,
    metric: Metric,
    *,
    time: Tensor,
    shortest: float,
    longest: float,
) -> Length:
    """One step up the gradient of ChEES, in whitened positions, where no parameter's unit decides.

    d ChEES / d T = t / T E[a (|x' - c'|^2 - |x - c|^2) (x' - c') . v'] / E[a], times T for the gradient of log T, with a
    the acceptance, t the time of this trajectory and v' the velocity at its end. The centre c is the mean over
    chains as in the paper; chains in modes of their own, whose distance says nothing of how one of them moves,
    each take their running mean.

    Args:
        before: positions [C, P] before the trajectory.
        after: positions [C, P] that the chains went on with.
        time: [C] of each chain's trajectory, step size times steps.
        shortest, longest: bounds of T.
    """
    start, end = whiten(metric, before), whiten(metric, found.proposal)  # [C, P]
    velocity = whiten(metric, found.velocity)
    centre = whiten(metric, at.centre)
    weight = found.acceptance.nan_to_num(0.0)  # [C]
    fine = end.isfinite().all(dim=1) & velocity.isfinite().all(dim=1)
    weight = torch.where(fine, weight, 0.0)
    end, velocity = torch.where(fine[:, None], end, 0.0), torch.where(fine[:, None], velocity, 0.0)
    if _disagree(at, centre):
        from_start, from_end = start - centre, end - centre
    else:
        share = (weight / weight.sum().clamp_min(1e-30)).to(end)  # [C]
        from_start, from_end = start - start.mean(dim=0), end - (share[:, None] * end).sum(dim=0)
    gain = from_end.double().square().sum(dim=1) - from_start.double().square().sum(dim=1)  # [C]
    slope = time * gain * (from_end.double() * velocity.double()).sum(dim=1)
    gradient = float((weight * slope).sum() / weight.sum().clamp_min(1e-30))
    moved = _recentred(at, after, metric)
    if not math.isfinite(gradient) or not bool((weight > 0).any()):
        return moved
    count = at.num_updates + 1
    square = LENGTH_DECAY * at.square + (1 - LENGTH_DECAY) * gradient**2
    step = gradient / (math.sqrt(square / (1 - LENGTH_DECAY**count)) + 1e-30)
    log_length = min(max(at.log_length + LENGTH_RATE * step, math.log(shortest)), math.log(longest))
    weight_now = count**-LENGTH_KAPPA
    mean = weight_now * log_length + (1 - weight_now) * at.log_length_mean
    return moved._replace(log_length=log_length, log_length_mean=mean, square=square, num_updates=count)


def _recentred(at: Length, after: Tensor, metric: Metric) -> Length:
    """The running centres with one more draw a chain."""
    weight = max(1.0 / (at.num_updates + 2), CENTRE_RATE)
    distance = whiten(metric, after - at.centre).double().square().mean(dim=1)  # [C]
    spread = at.spread.to(distance)
    return at._replace(centre=at.centre + weight * (after - at.centre), spread=spread + weight * (distance - spread))


def _disagree(at: Length, centre: Tensor) -> bool:
    """Whether the chains' whitened centres are further apart than the draws of one chain make them."""
    if len(centre) == 1 or at.num_updates < 1 / CENTRE_RATE:
        # Nobody else to be centred with, or too early to tell: one gradient across modes far apart would weigh for long.
        return True
    between = float(centre.double().var(dim=0).mean())
    return between > DISAGREEMENT * float(at.spread.mean())
