"""What warm-up learns, against recursions written out, known covariances and dynamics in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnn.inference.adaptation import (
    EARLY,
    GAMMA,
    KAPPA,
    LENGTH_DECAY,
    LENGTH_RATE,
    Length,
    Moments,
    StepSize,
    first_length,
    first_step_size,
    learn_metric,
    no_moments,
    principal,
    update_length,
    update_moments,
    update_step_size,
    window_start,
    windows,
)
from bnn.inference.hamiltonian import Metric, Transition, diagonal, whiten
from bnn.seeding import generator

DOUBLE = torch.float64


# Step size


def test_dual_averaging_is_the_recursion_of_the_paper_written_out_for_each_chain() -> None:
    """x_t = m - sqrt(t) / (gamma (t + t0)) sum_i (target - a_i), and x_mean the average with weights of t^-kappa.

    Hoffman and Gelman (2014), eq. 6 with gamma = 0.1 (theirs is 0.05), t0 = 10, kappa = 0.75, m = log(10 e_0).
    """
    assert (GAMMA, EARLY, KAPPA) == (0.1, 10.0, 0.75)
    acceptance = torch.rand(60, 3, generator=generator(0, "acceptance"), dtype=DOUBLE)
    first = torch.tensor([0.3, 0.01, 2.0], dtype=DOUBLE)
    at, steps = first_step_size(first), []
    assert torch.equal(at.log_step, first.log())
    assert torch.equal(at.log_step_mean, first.log())
    for count in range(1, 61):
        at = update_step_size(at, acceptance[count - 1], 0.7)
        total = (0.7 - acceptance[:count]).sum(dim=0)
        steps.append((10 * first).log() - math.sqrt(count) / (0.1 * (count + 10)) * total)
        torch.testing.assert_close(at.log_step, steps[-1], rtol=1e-12, atol=1e-12)
        weights = [t**-0.75 * math.prod(1 - s**-0.75 for s in range(t + 1, count + 1)) for t in range(1, count + 1)]
        assert sum(weights) == pytest.approx(1.0)
        mean = sum(w * x for w, x in zip(weights, steps, strict=True))
        torch.testing.assert_close(at.log_step_mean, mean, rtol=1e-12, atol=1e-12)
        assert at.num_updates == count
        assert at.log_step.dtype == DOUBLE


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
def test_dual_averaging_finds_the_step_size_of_a_known_acceptance_in_each_chain(target: float) -> None:
    """With acceptance exp(-(e / s)^2) the step size that gives the target is s sqrt(-log target); s from 0.01 to 100."""
    spreads = torch.tensor([0.01, 1.0, 100.0, 0.5], dtype=DOUBLE)
    at: StepSize = first_step_size(torch.tensor([0.03, 0.2, 30.0, 2.0], dtype=DOUBLE))
    for _ in range(12_000):
        at = update_step_size(at, (-(at.log_step.exp() / spreads).square()).exp(), target)
    expected = spreads * math.sqrt(-math.log(target))
    torch.testing.assert_close(at.log_step_mean.exp(), expected, rtol=0.03, atol=0)


# Moments and metric


def moments_of(draws: Tensor, room: int = 0, every: int = 1) -> Moments:
    """Of draws [C, D, P], taken one by one."""
    moments = no_moments(draws[:, 0], room)
    for number in range(draws.shape[1]):
        moments = update_moments(moments, draws[:, number], every)
    return moments


def test_moments_are_means_and_variances_of_each_chain() -> None:
    draws = 3 * torch.randn(4, 50, 3, generator=generator(0), dtype=DOUBLE) + 1000
    moments = moments_of(draws)
    torch.testing.assert_close(moments.mean, draws.mean(dim=1), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments.squares / 49, draws.var(dim=1), rtol=1e-9, atol=0)
    assert (moments.num_draws, moments.num_kept, tuple(moments.recent.shape)) == (50, 0, (4, 0, 3))


def test_moments_in_float32_do_not_cancel_far_from_the_origin() -> None:
    draws = torch.randn(2, 400, 3, generator=generator(1)) + 10_000
    torch.testing.assert_close(moments_of(draws).squares / 399, draws.double().var(dim=1).float(), rtol=0.01, atol=0)


def test_every_nth_draw_is_kept_while_there_is_room_and_states_keep_theirs() -> None:
    draws = torch.randn(2, 11, 3, generator=generator(2))
    moments, handed_out = no_moments(draws[:, 0], 4), []
    for number in range(11):
        moments = update_moments(moments, draws[:, number], 2)
        handed_out.append((moments, moments.recent.clone()))
    assert moments.num_kept == 4
    assert torch.equal(moments.recent, draws[:, [1, 3, 5, 7]])
    assert all(torch.equal(earlier.recent, copy) for earlier, copy in handed_out)
    assert [earlier.num_kept for earlier, _ in handed_out] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]


def test_a_diagonal_mass_is_the_pooled_variance_within_chains_drawn_to_the_prior() -> None:
    """(n v + 5 * 1e-3 prior) / (n + 5) with n = C (D - 1), by hand; chains far apart do not widen it."""
    draws = torch.randn(4, 30, 3, generator=generator(3), dtype=DOUBLE) * torch.tensor([0.5, 2.0, 9.0])
    draws = draws + 50 * torch.arange(4.0).view(4, 1, 1)
    prior = torch.tensor([4.0, 1.0, 0.25], dtype=DOUBLE)
    metric = learn_metric(moments_of(draws), prior, 0)
    pooled = (draws - draws.mean(dim=1, keepdim=True)).square().sum(dim=(0, 1)) / (4 * 29)
    expected = (116 * pooled + 5 * 1e-3 * prior) / 121
    torch.testing.assert_close(metric.scale, expected.sqrt(), rtol=1e-10, atol=0)
    assert (metric.directions.shape, metric.variances.shape) == ((3, 0), (0,))


def test_a_window_of_one_draw_gives_a_thousandth_of_the_prior() -> None:
    prior = torch.tensor([4.0, 1.0])
    metric = learn_metric(moments_of(torch.randn(3, 1, 2)), prior, 0)
    torch.testing.assert_close(metric.scale.square(), 1e-3 * prior)
    assert learn_metric(moments_of(torch.randn(3, 1, 2), 5), prior, 2).directions.shape == (2, 0)


def whitened(metric: Metric, covariance: Tensor) -> Tensor:
    """Eigenvalues of W cov W^T, where W is what the metric calls white: all 1 for the true one."""
    white = whiten(Metric(*(part.double() for part in metric)), torch.eye(len(covariance), dtype=DOUBLE)).T
    return torch.linalg.eigvalsh(white @ covariance @ white.T)


def spiked(scale: Tensor, variances: list[float], seed: int) -> tuple[Tensor, Tensor]:
    """Directions [P, R] and the covariance S (I + U diag(v - 1) U^T) S."""
    size = len(scale)
    directions = torch.linalg.qr(torch.randn(size, len(variances), generator=generator(seed), dtype=DOUBLE))[0]
    inner = torch.eye(size, dtype=DOUBLE)
    inner = inner + directions @ torch.diag(torch.tensor(variances, dtype=DOUBLE) - 1) @ directions.T
    return directions, scale[:, None] * inner * scale


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_low_rank_mass_recovers_directions_and_variances(dtype: torch.dtype) -> None:
    """A diagonal of spreads over three orders of magnitude, and two directions of large variance across it."""
    size = 30
    scale = torch.logspace(-2, 1, size, dtype=DOUBLE)
    _, covariance = spiked(scale, [400.0, 60.0], 5)
    root = torch.linalg.cholesky(covariance)
    means = 20 * scale * torch.randn(3, 1, size, generator=generator(6), dtype=DOUBLE)
    draws = torch.randn(3, 1000, size, generator=generator(7), dtype=DOUBLE) @ root.T + means
    moments = moments_of(draws.to(dtype), 1000)
    low, plain = learn_metric(moments, scale.square().to(dtype), 5), learn_metric(moments, scale.square().to(dtype), 0)
    assert low.directions.shape == (size, 2)
    assert {part.dtype for part in low} == {dtype}
    torch.testing.assert_close(low.directions.T @ low.directions, torch.eye(2, dtype=dtype), rtol=0, atol=1e-5)
    # Directions are of the scaled space: what counts is the space that both span, and the variances along it.
    found = whitened(low, covariance)
    assert float(found.min()) > 0.8
    assert float(found.max()) < 1.3
    assert float(whitened(plain, covariance).max() / whitened(plain, covariance).min()) > 50


def test_at_most_so_many_directions_the_largest_first() -> None:
    scale = torch.ones(40, dtype=DOUBLE)
    _, covariance = spiked(scale, [300.0, 100.0, 40.0], 8)
    draws = torch.randn(2, 800, 40, generator=generator(9), dtype=DOUBLE) @ torch.linalg.cholesky(covariance).T
    moments = moments_of(draws, 800)
    every = learn_metric(moments, scale, 7).variances
    assert len(every) >= 3
    assert bool((every.diff() < 0).all())
    two, one = learn_metric(moments, scale, 2), learn_metric(moments, scale, 1)
    assert (two.directions.shape, one.directions.shape) == ((40, 2), (40, 1))
    largest = [float(whitened(metric, covariance).max()) for metric in (learn_metric(moments, scale, 7), two, one)]
    assert largest[0] < 1.5 < 10 < min(largest[1:])


@pytest.mark.parametrize(("chains", "draws", "size"), [(4, 20, 300), (4, 50, 100), (3, 60, 40)])
def test_noise_alone_has_no_directions(chains: int, draws: int, size: int) -> None:
    """Also where there are more values than draws; by chance in one of a hundred runs at most."""
    found = []
    for seed in range(40):
        noise = torch.randn(chains, draws, size, generator=generator(seed, "noise"))
        found.append(learn_metric(moments_of(noise, draws), torch.ones(size), 10).directions.shape[1])
    assert sum(found) <= 3


def test_variances_of_components_are_shrunk_to_what_they_are_without_noise() -> None:
    """Of n = 600 draws of 150 values with variance 5 along one direction the largest singular value alone says 5.3."""
    number, size, spike, plain, shrunk = 600, 150, 5.0, [], []
    for seed in range(30):
        draws = torch.randn(number, size, generator=generator(seed, "spiked"), dtype=DOUBLE)
        draws[:, 0] *= math.sqrt(spike)
        directions, variances = principal(draws, number, 3)
        assert directions.shape == (size, len(variances))
        assert float(directions[0, 0].abs()) > 0.85
        plain.append(float(torch.linalg.svdvals(draws)[0] ** 2) / number)
        shrunk.append(float(variances[0]))
    error = float(torch.tensor(shrunk).std()) / math.sqrt(len(shrunk))
    assert abs(sum(shrunk) / len(shrunk) - spike) < 4 * error + spike / number  # its bias is of order 1 / n
    biased = spike * (1 + size / number / (spike - 1))
    assert abs(sum(plain) / len(plain) - biased) < 4 * error + 2 * spike / number


# Windows


@pytest.mark.parametrize("num_warmup", [0, 1, 5, 12, 39, 40, 41, 57, 80, 150, 200, 333, 500, 1000, 5001])
def test_windows_lie_inside_the_warm_up_double_and_leave_room_for_the_step_size(num_warmup: int) -> None:
    edges = windows(num_warmup)
    assert bool(edges) == (num_warmup >= 40)
    if not edges:
        return
    assert edges == sorted(set(edges))
    begin = window_start(num_warmup)
    assert begin == int(0.15 * num_warmup)
    widths = [stop - start for start, stop in pairwise([begin, *edges])]
    assert min(widths) >= 5
    assert all(second == 2 * first for first, second in pairwise(widths[:-1]))
    if len(widths) > 1:
        assert widths[-1] >= 2 * widths[-2]
    assert num_warmup - edges[-1] >= max(min(50, num_warmup // 3), num_warmup // 10)
    assert edges[-1] >= 0.6 * num_warmup  # most of the warm-up teaches the mass


def test_windows_inside_every_length_of_warm_up() -> None:
    for num_warmup in range(40, 700):
        edges = windows(num_warmup)
        assert edges
        assert all(a < b for a, b in pairwise([window_start(num_warmup), *edges]))
        assert num_warmup - edges[-1] >= 13


# Trajectory length


class Flow(NamedTuple):
    """A trajectory of each chain: positions before and after, and velocities at its end, [C, P]."""

    start: Tensor
    end: Tensor
    velocity: Tensor


def exact(spreads: Tensor, start: Tensor, momentum: Tensor, time: float) -> Flow:
    """Dynamics of N(0, diag(spreads^2)) with unit mass in closed form: each value turns with the angle t / spread."""
    angle = time / spreads
    end = start * angle.cos() + momentum * spreads * angle.sin()
    return Flow(start, end, momentum * angle.cos() - start / spreads * angle.sin())


def found_of(flow: Flow, acceptance: Tensor | None = None) -> Transition:
    size = len(flow.start)
    every = torch.ones(size, dtype=torch.bool)
    return Transition(
        torch.ones(size, dtype=DOUBLE) if acceptance is None else acceptance,
        ~every,
        every,
        torch.zeros(size, dtype=DOUBLE),
        flow.end,
        flow.velocity,
        ~every,
    )


def updated(at: Length, flow: Flow, time: float | Tensor, acceptance: Tensor | None = None, **options: float) -> Length:
    bounds = {"shortest": 1e-6, "longest": 1e6} | options
    metric = diagonal(torch.ones_like(flow.start[0]))
    times = torch.as_tensor(time, dtype=DOUBLE).expand(len(flow.start))
    return update_length(at, found_of(flow, acceptance), flow.start, flow.end, metric, time=times, **bounds)  # type: ignore[arg-type]


@pytest.fixture
def centred_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that agree, from the first trajectory on, where as a rule it is too early to tell."""
    monkeypatch.setattr("bnn.inference.adaptation._disagree", lambda *_: False)


def gradient_of(at: Length, after: Length) -> float:
    """The gradient that one first update took: Adam's running square holds its size, the step its sign."""
    size = math.sqrt(after.square / (1 - LENGTH_DECAY))
    return math.copysign(size, after.log_length - at.log_length)


def mirrored(num: int, spreads: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of the target and momenta, each beside its mirror image, so that the chains' mean is 0."""
    start = torch.randn(num, len(spreads), generator=generator(seed), dtype=DOUBLE) * spreads
    momentum = torch.randn(num, len(spreads), generator=generator(seed + 1), dtype=DOUBLE)
    return torch.cat([start, -start]), torch.cat([momentum, -momentum])


SPREADS = torch.tensor([0.4, 1.0, 1.7], dtype=DOUBLE)


@pytest.mark.parametrize("time", [0.3, 0.9, 1.6, 2.4, 3.3])
def test_the_gradient_is_the_numeric_derivative_of_chees(time: float) -> None:
    """T d/dT of 1/4 mean (|x'(T)|^2 - |x|^2)^2 on the same starts and momenta."""
    start, momentum = mirrored(500, SPREADS, 10)

    def criterion(length: float) -> float:
        end = exact(SPREADS, start, momentum, length).end
        return float(0.25 * (end.square().sum(dim=1) - start.square().sum(dim=1)).square().mean())

    at = first_length(1.0, torch.zeros_like(start))  # centres, of which the first updates have one a chain
    found = gradient_of(at, updated(at, exact(SPREADS, start, momentum, time), time))
    numeric = time * (criterion(time + 1e-5) - criterion(time - 1e-5)) / 2e-5
    assert found == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("time", [0.5, 1.3, 2.9])
def test_the_gradient_is_that_of_the_expected_chees_of_a_normal(time: float) -> None:
    """ChEES(T) = sum_i s_i^4 sin^2(T / s_i), since (x'^2 - x^2) / s^2 has variance 4 sin^2; by 4 standard errors."""
    start, momentum = mirrored(20_000, SPREADS, 12)
    flow = exact(SPREADS, start, momentum, time)
    at = first_length(1.0, torch.zeros_like(start))  # centres, of which the first updates have one a chain
    found = gradient_of(at, updated(at, flow, time))
    expected = time * float((SPREADS**3 * (2 * time / SPREADS).sin()).sum())
    slopes = (flow.end.square().sum(1) - start.square().sum(1)) * (flow.end * flow.velocity).sum(1)
    error = time * float(slopes[:20_000].std()) / math.sqrt(20_000)
    assert abs(found - expected) < 4 * error
    assert abs(expected) > 8 * error  # the sign is told


@pytest.mark.parametrize("first", [0.3, 2.3])
def test_the_length_climbs_to_its_optimum(first: float) -> None:
    """Of a normal with one spread s ChEES is largest at a quarter of its period, T = pi s / 2."""
    spreads = torch.full((5,), 0.8, dtype=DOUBLE)
    start, _ = mirrored(100, spreads, 14)
    at = first_length(first, start)
    for number in range(300):
        start, momentum = mirrored(100, spreads, 20 + 2 * number)
        time = math.exp(at.log_length)
        at = updated(at, exact(spreads, start, momentum, time), time)
    assert math.exp(at.log_length_mean) == pytest.approx(math.pi * 0.8 / 2, rel=0.05)


def test_steps_are_those_of_adam_without_momentum_and_of_its_average(centred_together: None) -> None:
    """log T <- log T + 0.025 g / sqrt(v), v = mean of g^2 without its bias; the average weighs t^-1/2."""
    start, momentum = mirrored(50, SPREADS, 16)
    flow = exact(SPREADS, start, momentum, 0.7)
    at = first_length(0.9, start)
    square, logs, mean = 0.0, [math.log(0.9)], math.log(0.9)
    for count in range(1, 8):
        time = 0.3 + 0.1 * count
        slopes = (flow.end.square().sum(1) - start.square().sum(1)) * (flow.end * flow.velocity).sum(1)
        gradient = time * float(slopes.mean())
        square = LENGTH_DECAY * square + (1 - LENGTH_DECAY) * gradient**2
        logs.append(logs[-1] + LENGTH_RATE * gradient / math.sqrt(square / (1 - LENGTH_DECAY**count)))
        mean = count**-0.5 * logs[-1] + (1 - count**-0.5) * mean
        at = updated(at, flow, time)
        assert at.log_length == pytest.approx(logs[-1], rel=1e-9)
        assert at.log_length_mean == pytest.approx(mean, rel=1e-9)
        assert at.num_updates == count


def slow_gradient(flow: Flow, acceptance: Tensor, time: float | Tensor, centres: Tensor | None) -> float:
    """Chain by chain, about a centre each, or about the means over chains, of the ends weighted by acceptance."""
    total, times = 0.0, torch.as_tensor(time).expand(len(flow.start))
    start_mean = flow.start.mean(dim=0)
    end_mean = (acceptance[:, None] * flow.end).sum(dim=0) / acceptance.sum()
    for chain in range(len(flow.start)):
        x = flow.start[chain] - (start_mean if centres is None else centres[chain])
        y = flow.end[chain] - (end_mean if centres is None else centres[chain])
        total += float(times[chain] * acceptance[chain] * (y @ y - x @ x) * (y @ flow.velocity[chain]))
    return total / float(acceptance.sum())


def flow_of(chains: int, apart: float, seed: int, time: float = 0.8) -> Flow:
    """Chains that move about points of their own, `apart` from each other."""
    start = torch.randn(chains, 3, generator=generator(seed), dtype=DOUBLE) * SPREADS
    flow = exact(SPREADS, start, torch.randn(chains, 3, generator=generator(seed + 1), dtype=DOUBLE), time)
    shift = apart * torch.arange(chains, dtype=DOUBLE)[:, None] * torch.tensor([1.0, -1.0, 0.5], dtype=DOUBLE)
    return Flow(flow.start + shift, flow.end + shift, flow.velocity)


def test_chains_weigh_as_much_as_they_accept(centred_together: None) -> None:
    flow, acceptance = flow_of(6, 0.0, 30), torch.tensor([1.0, 0.2, 0.0, 0.7, 0.9, 0.4], dtype=DOUBLE)
    at = first_length(1.0, flow.start)
    times = torch.tensor([0.8, 0.4, 1.2, 0.1, 2.0, 0.6], dtype=DOUBLE)  # chains with steps of their own
    found = gradient_of(at, updated(at, flow, times, acceptance))
    assert found == pytest.approx(slow_gradient(flow, acceptance, times, None), rel=1e-9)


@pytest.mark.parametrize("apart", [0.0, 30.0])
def test_chains_that_disagree_are_centred_each_on_its_own_mean(apart: float) -> None:
    """After 40 updates about points 0 or 30 apart the next takes the common mean, or each chain's own."""
    at = first_length(1.0, flow_of(4, apart, 40).start)
    for number in range(40):
        at = updated(at, flow_of(4, apart, 50 + 2 * number), 0.8)
    assert at.num_updates == 40
    flow, every = flow_of(4, apart, 200), torch.ones(4, dtype=DOUBLE)
    after = updated(at._replace(square=0.0, num_updates=40), flow, 0.8)
    gradient = math.copysign(math.sqrt(after.square / (1 - LENGTH_DECAY)), after.log_length - at.log_length)
    own, common = (slow_gradient(flow, every, 0.8, centres) for centres in (at.centre, None))
    assert abs(own - common) > 0.05 * abs(own)
    assert gradient == pytest.approx(own if apart else common, rel=1e-6)


def test_centres_are_running_means_of_where_the_chains_went() -> None:
    """The mean of all positions at first; later ones of at least a twentieth, so that old ones are forgotten."""
    flows = [flow_of(3, 1.0, 300 + number) for number in range(60)]
    at = first_length(1.0, flows[0].start)
    for number, flow in enumerate(flows, start=1):
        at = updated(at, flow, 0.8)
        if number == 15:
            mean = torch.stack([flows[0].start, *(f.end for f in flows[:15])]).mean(dim=0)
            torch.testing.assert_close(at.centre, mean, rtol=1e-10, atol=1e-10)
    before = at
    at = updated(at, flows[0], 0.8)
    torch.testing.assert_close(at.centre, before.centre + 0.05 * (flows[0].end - before.centre))


def test_whitened_positions_decide_and_no_unit_does() -> None:
    """In other units of each parameter, with a metric in those units, the same length is learnt."""
    units = torch.tensor([100.0, 0.01, 7.0], dtype=DOUBLE)
    flow = flow_of(5, 0.2, 60)
    scaled = Flow(*(part * units for part in flow))
    plain = updated(first_length(1.0, flow.start), flow, 0.8)
    other = update_length(
        first_length(1.0, scaled.start),
        found_of(scaled),
        scaled.start,
        scaled.end,
        diagonal(units),
        time=torch.full((5,), 0.8, dtype=DOUBLE),
        shortest=1e-6,
        longest=1e6,
    )
    assert other.log_length == pytest.approx(plain.log_length, rel=1e-10)
    assert other.square == pytest.approx(plain.square, rel=1e-10)
    torch.testing.assert_close(other.spread, plain.spread)


BROKEN: dict[str, Callable[[Flow, Tensor], tuple[Flow, Tensor]]] = {
    "nothing accepted": lambda flow, a: (flow, 0 * a),
    "nothing finite": lambda flow, a: (flow._replace(end=flow.end * math.nan), a),
    "acceptance not finite": lambda flow, a: (flow, a * math.nan),
    "infinite velocities": lambda flow, a: (flow._replace(velocity=flow.velocity + math.inf), a),
}


@pytest.mark.parametrize("how", BROKEN)
def test_trajectories_that_say_nothing_leave_the_length_alone(how: str) -> None:
    good = flow_of(4, 0.0, 70)
    at = updated(first_length(1.0, good.start), good, 0.8)
    flow, acceptance = BROKEN[how](flow_of(4, 0.0, 72), torch.ones(4, dtype=DOUBLE))
    metric = diagonal(torch.ones(3, dtype=DOUBLE))
    after = update_length(
        at,
        found_of(flow, acceptance),
        flow.start,
        flow.start,
        metric,
        time=torch.full((len(flow.start),), 0.8),
        shortest=1e-6,
        longest=1e6,
    )
    for name in ("log_length", "log_length_mean", "square", "num_updates"):
        assert getattr(after, name) == getattr(at, name)
    assert bool(after.centre.isfinite().all())
    assert bool(after.spread.isfinite().all())


def test_a_chain_that_is_not_finite_does_not_count(centred_together: None) -> None:
    flow, acceptance = flow_of(5, 0.0, 80), torch.tensor([1.0, 0.5, 0.8, 0.3, 0.6], dtype=DOUBLE)
    broken = Flow(flow.start, flow.end.clone(), flow.velocity.clone())
    broken.end[2], broken.velocity[4, 0] = math.nan, math.inf
    at = first_length(1.0, flow.start)
    metric = diagonal(torch.ones(3, dtype=DOUBLE))
    after = update_length(
        at,
        found_of(broken, acceptance),
        flow.start,
        flow.start,
        metric,
        time=torch.full((len(flow.start),), 0.8),
        shortest=1e-6,
        longest=1e6,
    )
    silent = acceptance * torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=DOUBLE)
    assert gradient_of(at, after) == pytest.approx(slow_gradient(flow, silent, 0.8, None), rel=1e-9)


def test_the_length_stays_between_its_bounds() -> None:
    flow = flow_of(5, 0.0, 90, time=0.1)  # far too short: it wants to grow
    at = first_length(1.0, flow.start)
    assert updated(at, flow, 0.1).log_length > 0
    assert updated(at, flow, 0.1, longest=1.0).log_length == 0.0
    assert updated(at, flow, 0.1, shortest=1.7).log_length == pytest.approx(math.log(1.7))
