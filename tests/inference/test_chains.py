"""The run of HMC, step by step: each state goes on as the run did, and warm-up learns from the steps that it should."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from bnn.bank import format as fmt
from bnn.errors import FitError
from bnn.inference import chains, warmup
from bnn.inference import density as density_module
from bnn.inference.adaptation import first_length, first_step_size, update_step_size, window_start, windows
from bnn.inference.chains import COLUMNS, Draw, run_chains, van_der_corput
from bnn.inference.density import Plan, target_of_function
from bnn.inference.hamiltonian import diagonal
from bnn.inference.hmc import HMC
from bnn.inference.starting import CLIMB_STEPS
from bnn.seeding import generator
from bnn.types import State

C, P = 3, 5
CLIMBS = CLIMB_STEPS // 50
COVARIANCE = torch.diag(torch.tensor([0.03, 0.02, 0.05, 0.01, 0.04])) + 4.0  # one direction of large variance
PRECISION = torch.linalg.inv(COVARIANCE)
MEAN = torch.tensor([0.4, -0.2, 1.0, 0.1, -1.0])
SCALE = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.5])


def log_density(u: Tensor) -> Tensor:
    apart = (u - MEAN).double()  # sums of which a float32 would lose digits
    return -0.5 * apart @ PRECISION.double() @ apart


@pytest.fixture
def without_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that start at once, for the many runs that these tests begin."""
    monkeypatch.setattr(density_module, "_plan", lambda *_: (Plan("eager", 1, 0), None))


def run(options: HMC, num_draws: int, state: State | None = None, seed: int = 3) -> Iterator[tuple[Draw, State]]:
    def start() -> Tensor:
        assert state is None, "a run that goes on has its positions in the state"
        return 2 * torch.randn(C, P, generator=generator(seed, "test start"))

    return run_chains(options, target_of_function(log_density, None), start, SCALE, seed, num_draws, state)


def options_of(**more: Any) -> HMC:
    return HMC(**({"num_chains": C, "num_warmup": 44, "num_steps": 3, "rank": 2} | more))


def through_disk(state: State) -> State:
    """What a bank reads back of a state, also of tensors without any number."""
    return fmt.decode_state(*fmt.encode_state(state, "test"), "test")


def assert_same(found: tuple[Draw, State], expected: tuple[Draw, State]) -> None:
    (draw, state), (other, kept) = found, expected
    assert (draw.number, draw.num_steps) == (other.number, other.num_steps)
    both = [*zip(draw.at, other.at, strict=True), *((draw.columns[name], other.columns[name]) for name in COLUMNS)]
    for a, b in both:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert list(state) == list(kept)
    for name, value in kept.items():
        if isinstance(value, Tensor):
            assert value.dtype == state[name].dtype, name
            assert torch.equal(state[name], value), name
        else:
            assert state[name] == value, name


@pytest.mark.parametrize(
    ("trajectory", "mass", "thin"),
    [
        *product(["fixed", "jittered", "chees"], ["diagonal", "low-rank", "unit"], [1]),
        *(("fixed", "diagonal", 3), ("jittered", "low-rank", 3), ("chees", "unit", 3)),
    ],
)
def test_every_state_leads_to_the_next_step_of_the_run(
    without_tracing: None, trajectory: str, mass: str, thin: int
) -> None:
    """Step after step, so that each state leads to all that follow: in the climb, in warm-up, between kept draws."""
    steps, warmup = (12, 60) if trajectory == "chees" else (5, 70)  # its trajectories are shorter than the most
    init, climbs = ("ensemble", CLIMBS) if mass == "low-rank" else ("prior", 0)  # the climb knows nothing of the rest
    options = options_of(trajectory=trajectory, mass=mass, thin=thin, init=init, num_steps=steps, num_warmup=warmup)
    whole = list(run(options, 3))
    assert len(whole) == climbs + warmup + 3 * thin
    for (_, state), expected in pairwise(whole):
        assert_same(next(run(options, 3, through_disk(state))), expected)
    assert list(run(options, 3, through_disk(whole[-1][1]))) == []
    learnt = whole[climbs + warmup - 1][1]
    assert learnt["metric.directions"].shape[0] == P
    if trajectory == "fixed":  # with which a window this short tells a direction
        assert bool(learnt["metric.directions"].shape[1]) == (mass == "low-rank")
    assert torch.equal(learnt["metric.scale"], SCALE) == (mass == "unit")


def test_the_length_is_learnt_from_the_time_of_each_chain(
    without_tracing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is its own step size times the common number of steps; bounds are those of the mean step, in logarithms."""
    asked: list[dict[str, Any]] = []
    update = warmup.update_length

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return update(*arguments, **options)

    monkeypatch.setattr(warmup, "update_length", watched)
    whole = list(run(options_of(init="prior", trajectory="chees", num_steps=11), 2))
    assert len(asked) == 44
    for (draw, state), options in zip(whole, asked, strict=False):
        torch.testing.assert_close(options["time"], draw.columns["step_size"] * draw.num_steps, rtol=1e-12, atol=0)
        shortest = state["info"]["step_size"]
        assert (options["shortest"], options["longest"]) == pytest.approx((shortest, 11 * shortest), rel=1e-12)
    assert len(set(asked[-1]["time"].tolist())) == C


@pytest.mark.parametrize("init", ["prior", "map"])
def test_runs_that_go_on_from_anywhere_end_the_same(without_tracing: None, init: str) -> None:
    """To the end, from a few places, through gradients that are traced again."""
    options = options_of(trajectory="chees", mass="low-rank", init=init)
    whole = list(run(options, 4))
    for place in (0, CLIMBS - 1 if init == "map" else 5, len(whole) // 2, len(whole) - 3):
        rest = list(run(options, 4, through_disk(whole[place][1])))
        assert len(rest) == len(whole) - place - 1
        for found, expected in zip(rest, whole[place + 1 :], strict=True):
            assert_same(found, expected)


def test_traced_runs_go_on_from_their_states() -> None:
    options = options_of(init="prior", num_warmup=30)
    whole = list(run(options, 3))
    assert whole[-1][1]["plan.mode"] == "traced"
    for found, expected in zip(run(options, 3, through_disk(whole[27][1])), whole[28:], strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("trajectory", ["jittered", "chees"])
def test_states_are_not_changed_by_what_follows(without_tracing: None, trajectory: str) -> None:
    found, copies = [], []
    for pair in run(options_of(trajectory=trajectory, mass="low-rank", init="ensemble"), 5):
        found.append(pair)
        copies.append(copy.deepcopy(pair))
    for kept, earlier in zip(found, copies, strict=True):
        assert_same(kept, earlier)


def test_a_run_that_is_asked_for_more_goes_on_from_its_last_draw(without_tracing: None) -> None:
    options = options_of(trajectory="chees", thin=2, init="prior")
    few, many = list(run(options, 3)), list(run(options, 7))
    for (draw, state), (other, _) in zip(few, many[: len(few)], strict=True):
        assert torch.equal(draw.at.flat, other.at.flat)
        assert state["num_steps"] == 44 + 3 * 2
    rest = list(run(options, 7, through_disk(few[-1][1])))
    for found, expected in zip(rest, many[len(few) :], strict=True):
        assert_same(found, expected)
    assert [draw.number for draw, _ in rest if draw.number is not None] == [3, 4, 5, 6]


def test_seeds_decide(without_tracing: None) -> None:
    options = options_of(init="prior")
    one, again, other = (list(run(options, 2, seed=seed))[-1][0].at.flat for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.isclose(one, other).any()


def test_phases_count_their_own_steps(without_tracing: None) -> None:
    phases = [state["phase"] for _, state in run(options_of(init="map", thin=2), 3)]
    expected = [{"name": "climb", "step": 50 * step, "num_steps": CLIMB_STEPS} for step in range(1, CLIMBS + 1)]
    expected += [{"name": "warm-up", "step": step, "num_steps": 44} for step in range(1, 45)]
    expected += [{"name": "sampling", "step": step, "num_steps": 6, "thin": 2} for step in range(1, 7)]
    assert phases == expected
    steps = [state["step"] for _, state in run(options_of(init="map", thin=2), 3)]
    assert steps == [*range(50, CLIMB_STEPS + 1, 50), *range(CLIMB_STEPS + 1, CLIMB_STEPS + 51)]
    assert {state["num_steps"] for _, state in run(options_of(init="map", thin=2), 3)} == {CLIMB_STEPS + 50}


def with_warmup(**more: Any) -> tuple[HMC, list[tuple[Draw, State]]]:
    options = options_of(init="prior", num_warmup=120, num_steps=4, **more)
    return options, list(run(options, 2))


def test_step_sizes_follow_dual_averaging_begun_anew_with_each_mass(
    without_tracing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceptances: list[Tensor] = []
    transition = chains.transition

    def watched(*arguments: Any) -> Any:
        moved, found = transition(*arguments)
        acceptances.append(found.acceptance)
        return moved, found

    monkeypatch.setattr(chains, "transition", watched)
    _, whole = with_warmup()
    acceptances = acceptances[-len(whole) :]  # the search for first step sizes takes some
    edges = windows(120)
    assert len(edges) >= 2
    at = first_step_size(whole[0][0].columns["step_size"])
    for step, (draw, state) in enumerate(whole[:120], start=1):
        torch.testing.assert_close(draw.columns["step_size"], at.log_step.exp(), rtol=1e-12, atol=0)
        assert state["info"]["acceptance"] == pytest.approx(float(acceptances[step - 1].mean()), rel=1e-12)
        assert state["info"]["step_size"] == pytest.approx(math.exp(float(at.log_step.mean())), rel=1e-12)
        at = update_step_size(at, acceptances[step - 1], 0.8)
        if step in edges:
            at = first_step_size(at.log_step_mean.exp())
        for name in ("log_step", "log_step_mean", "error_mean"):
            torch.testing.assert_close(state[f"step_size.{name}"], getattr(at, name), rtol=1e-12, atol=1e-12)
    for draw, state in whole[120:]:
        assert state["step_size.num_updates"] == 120 - edges[-1]
        torch.testing.assert_close(draw.columns["step_size"], at.log_step_mean.exp(), rtol=1e-12, atol=0)
    assert len(set(at.log_step_mean.tolist())) == C


def test_the_mass_is_learnt_at_the_edges_from_the_draws_of_each_window(without_tracing: None) -> None:
    _, whole = with_warmup()
    edges = windows(120)
    positions = torch.stack([draw.at.flat for draw, _ in whole], dim=1)  # [C, D, P]
    scale = SCALE
    for (start, stop), until in zip(pairwise([window_start(120), *edges]), [*edges[1:], 122], strict=True):
        assert all(torch.equal(state["metric.scale"], scale) for _, state in whole[start : stop - 1])
        draws = positions[:, start:stop]  # after trajectories start + 1 to stop
        count = C * (stop - start - 1)
        pooled = (draws - draws.mean(dim=1, keepdim=True)).square().sum(dim=(0, 1)) / count
        expected = ((count * pooled + 5e-3 * SCALE.square()) / (count + 5)).sqrt()
        scale = whole[stop - 1][1]["metric.scale"]
        torch.testing.assert_close(scale, expected, rtol=1e-4, atol=0)
        assert all(torch.equal(state["metric.scale"], scale) for _, state in whole[stop - 1 : until - 1])


def test_a_window_keeps_draws_from_all_of_it_for_correlations(without_tracing: None) -> None:
    options, whole = with_warmup(mass="low-rank", rank=2)
    room = math.ceil(20 * 2 / C) + 1
    edges = windows(options.num_warmup)
    positions = torch.stack([draw.at.flat for draw, _ in whole], dim=1)
    for start, stop in pairwise([window_start(120), *edges]):
        before = whole[stop - 2][1]  # one trajectory before the mass is learnt
        kept = before["moments.recent"][:, : before["moments.num_kept"]]  # [C, W, P]
        assert kept.shape[1] <= room
        number, width = kept.shape[1], stop - start
        spacings = [  # evenly spaced: each n-th of the window's draws
            every
            for every in range(1, width // number + 1)
            if torch.equal(kept, positions[:, start + every - 1 : start + number * every : every])
        ]
        assert spacings
        assert (number + 1) * max(spacings) >= width - 1, "from all of the window"


def test_nothing_is_learnt_after_warm_up(without_tracing: None) -> None:
    options = options_of(init="prior", num_warmup=60, trajectory="chees")
    states = [state for _, state in run(options, 6)][59:]
    names = [name for name in states[0] if name.split(".")[0] in ("step_size", "metric", "moments", "length")]
    assert len(names) > 15
    for name in names:
        for state in states[1:]:
            same = torch.equal(state[name], states[0][name]) if isinstance(state[name], Tensor) else None
            assert same or state[name] == states[0][name], name


def test_kept_draws_tell_of_the_trajectories_since_the_last_one(without_tracing: None) -> None:
    every, third = (list(run(options_of(init="prior", thin=thin), 12 // thin)) for thin in (1, 3))
    single = [draw for draw, _ in every[44:]]
    kept = [draw for draw, _ in third[44:] if draw.number is not None]
    assert [draw.number for draw in kept] == [0, 1, 2, 3]
    for number, draw in enumerate(kept):
        group = single[3 * number : 3 * number + 3]
        assert torch.equal(draw.at.flat, group[-1].at.flat)
        mean = torch.stack([one.columns["acceptance"] for one in group]).mean(dim=0)
        torch.testing.assert_close(draw.columns["acceptance"], mean, rtol=1e-12, atol=0)
        divergent = torch.stack([one.columns["divergent"] for one in group]).sum(dim=0)
        assert torch.equal(draw.columns["divergent"], divergent)
        assert torch.equal(draw.columns["energy"], group[-1].columns["energy"])
    assert every[-1][1]["sums.leapfrogs"] == sum(draw.num_steps for draw, _ in every)


def test_divergences_are_counted_with_their_chain_and_draw() -> None:
    """A wall that every trajectory of chains 1 and 2 runs into: what lies behind it is not finite."""

    def walled(u: Tensor, wall: Tensor) -> Tensor:
        return torch.where(u[0] > wall, math.nan, -0.5 * u.square().sum())

    context = torch.tensor([1e9, -1e9, -1e9])
    target = target_of_function(walled, context)
    flat = torch.zeros(C, P)
    flat[1:, 0] = -1e9 - 1000.0  # before their wall, pulled across it by the first step
    options = options_of(init="prior", num_warmup=0, step_size=0.1, thin=2, compile=False)
    with pytest.warns(UserWarning, match=r"chains 1, 2 accepted 0.00 .* 12 of 18 trajectories diverged"):
        whole = list(run_chains(options, target, lambda: flat, torch.ones(P), 0, 3, None))
    for draw, _ in whole:
        if draw.number is not None:
            assert draw.columns["divergent"].tolist() == [0.0, 2.0, 2.0]
            assert torch.equal(draw.at.flat[1:], flat[1:])
    assert whole[-1][1]["info"]["divergences"] == 12


def test_divergences_are_those_of_the_phase(without_tracing: None) -> None:
    """A step far too long: warm-up tells of its own from the first trajectory on, and sampling begins at 0."""
    options = options_of(init="prior", num_warmup=25, num_steps=20, step_size=40.0)
    told = [state["info"]["divergences"] for _, state in run(options, 4)]
    assert told[0] >= 1
    assert told[:25] == sorted(told[:25])
    assert told[24] > told[25]
    whole = list(run(options, 4))
    assert [state["info"]["divergences"] for _, state in run(options, 4, through_disk(whole[24][1]))] == told[25:]


def steps_of(options: HMC, log_length: float, step_size: float, steps: range, seed: int = 0) -> list[int]:
    length = first_length(1.0, torch.zeros(C, P))._replace(log_length=log_length, log_length_mean=log_length + 1)
    each = step_size * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)  # whose geometric mean is what counts
    return [chains._num_steps(options, length, warmup.common_step(each), seed, step) for step in steps]


def test_numbers_of_leapfrog_steps(without_tracing: None) -> None:
    fixed, jittered = (options_of(trajectory=kind, num_steps=9) for kind in ("fixed", "jittered"))
    assert set(steps_of(fixed, 0.0, 0.1, range(40))) == {9}
    drawn = steps_of(jittered, 0.0, 0.1, range(300))
    assert set(drawn) == {5, 6, 7, 8, 9}
    assert drawn == steps_of(jittered, 0.0, 0.1, range(300))
    assert drawn != steps_of(jittered, 0.0, 0.1, range(300), seed=1)
    assert set(steps_of(options_of(trajectory="jittered", num_steps=1), 0.0, 0.1, range(40))) == {1}


def test_randomness_is_keyed_by_seed_chain_and_trajectory() -> None:
    like = torch.zeros(C, P)
    noise, uniform = chains._randomness(like, 3, 20)
    for chain in range(C):
        source = generator(3, "chain", chain, 20)
        assert torch.equal(noise[chain], torch.randn(P, generator=source))
        assert torch.equal(uniform[chain], torch.rand((), generator=source, dtype=torch.float64))
    for seed, step in ((3, 21), (4, 20)):
        others = chains._randomness(like, seed, step)
        assert not torch.isclose(others[0], noise).any()
        assert not torch.isclose(others[1], uniform).any()


def test_chees_takes_changing_shares_of_its_length() -> None:
    """ceil(h T / e) with h from an even sequence in (0, 1); T the running one in warm-up, its average after."""
    chees = options_of(trajectory="chees", num_steps=40, num_warmup=10)
    shares = [0.5, 0.25, 0.75, 0.125, 0.625, 0.375, 0.875]
    assert [van_der_corput(number) for number in range(1, 8)] == shares
    assert steps_of(chees, math.log(2.0), 0.1, range(7)) == [math.ceil(20 * share) for share in shares]
    later = [math.ceil(20 * math.e * van_der_corput(step + 1)) for step in range(10, 20)]
    assert steps_of(chees, math.log(2.0), 0.1, range(10, 20)) == [min(number, 40) for number in later]
    assert set(steps_of(chees, math.log(1e-9), 0.1, range(10))) == {1}
    assert set(steps_of(chees, math.log(1e9), 0.1, range(10))) == {40}


def test_the_even_sequence_fills_every_cell() -> None:
    values = [van_der_corput(number) for number in range(1, 256)]
    assert len(set(values)) == 255
    assert {math.floor(256 * value) for value in values} == set(range(1, 256))


def test_first_step_sizes_are_accepted_with_a_half_chain_by_chain() -> None:
    """Chains of normals with spreads from 0.001 to 1,000: the longest of the steps 0.1 * 2^k that passes, to a factor 2."""
    spreads = torch.tensor([1e-3, 0.1, 1.0, 30.0, 1e3])
    target = target_of_function(lambda u, spread: -0.5 * (u / spread).square().sum(), spreads)
    flat = spreads[:, None] * torch.randn(5, P, generator=generator(0))
    density = density_module.Prepared(target, Plan("eager", 1, 0), flat)
    at = chains.Position(flat, *density(flat))
    metric = diagonal(torch.ones(P))
    noise = torch.randn(5, P, generator=generator(0, "step size"))
    found = warmup.reasonable_step_size(density, at, metric, noise)
    none = torch.ones(5, dtype=torch.float64)

    def accepted(size: Tensor) -> Tensor:
        return chains.transition(density, at, noise, none, metric, size, 1)[1].acceptance

    assert bool((accepted(found) > 0.5).all())
    assert bool((accepted(2 * found) <= 0.5).all())
    assert bool(((found / spreads > 0.05) & (found / spreads < 20)).all())
    torch.testing.assert_close((found / 0.1).log2(), (found / 0.1).log2().round(), rtol=0, atol=1e-9)


def test_a_chain_without_a_step_size_is_named() -> None:
    """A density that is flat in chain 1: every step is accepted there, however long."""
    target = target_of_function(lambda u, flat: -0.5 * flat * u.square().sum(), torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(FitError, match=r"want a step that is ever too long, got none up to 1.1e\+14 in chain 1;"):
        next(run_chains(options_of(init="prior"), target, lambda: torch.ones(C, P), torch.ones(P), 0, 3, None))
