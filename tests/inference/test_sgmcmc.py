"""SGHMC and SGLD against the exact law of their recursion on a quadratic target, and against a slow copy of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import LinearRegression, classifier, effective_sample_size, linear_regression
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.batches import full_batch, mean_rows, minibatches
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference.climbing import Climb, climb, weighted_batches
from bnn.inference.gradients import gradient_of
from bnn.inference.sgmcmc import (
    SGHMC,
    SGLD,
    Chains,
    Preconditioner,
    kinetic_temperature,
    num_turns,
    precondition,
    transition,
    turn,
)
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch, Block, State

SMALL: dict[str, Any] = {
    "num_chains": 2, "climb_steps": 60, "num_warmup": 9, "cycle_steps": None, "exploration": 0.5, "thin": 7, "batch_size": 7, "lr": 0.01,
}  # fmt: skip


def within(values: Tensor, expected: float, *, num_chains: int, least_ess: float = 200) -> float:
    """|mean - expected| in standard errors, of [S] in the order draw by draw, after checking that the chains mixed."""
    chains = values.double().view(-1, num_chains).T  # [C, D]
    ess = effective_sample_size(chains)
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    return abs(float(chains.mean()) - expected) / (float(chains.std()) / math.sqrt(ess))


def stationary(forward: Tensor, noise: Tensor) -> Tensor:
    """The covariance S = F S F^T + G G^T of z <- F z + G xi, by one linear system over its entries."""
    size = len(forward)
    system = torch.eye(size**2, dtype=torch.float64) - torch.kron(forward, forward)
    return torch.linalg.solve(system, (noise @ noise.T).flatten()).view(size, size)


def law(precision: Tensor, preconditioner: Tensor, step_size: float, friction: float) -> Tensor:
    """Covariance [2P, 2P] of (u, r) where -log pi is u^T precision u / 2: the docstring's recursion by hand."""
    eye, root = torch.eye(len(precision), dtype=torch.float64), math.sqrt(step_size)
    pull = -root * preconditioner.diag() @ precision
    spread = (2 * friction * preconditioner).sqrt().diag()
    forward = torch.cat(
        [torch.cat([eye + root * pull, root * (1 - friction) * eye], 1), torch.cat([pull, (1 - friction) * eye], 1)]
    )
    return stationary(forward, torch.cat([root * spread, spread]))


def at_temperature(case: LinearRegression, temperature: float) -> BayesianModel:
    model = case.model
    return BayesianModel(
        model.module, prior=model.prior, likelihood=model.likelihood, num_data=30, temperature=temperature
    )


COMMON: dict[str, Any] = {"num_chains": 16, "cycle_steps": None, "init": "module", "climb_steps": 100, "batch_size": 30}
LAWS: dict[str, tuple[SGHMC | SGLD, float, int]] = {
    # method, temperature, num_samples; step sizes so long that the law is clearly not the posterior
    "sghmc, rmsprop, hot": (SGHMC(lr=0.2, friction=0.5, thin=5, num_warmup=200, **COMMON), 2.0, 16 * 300),
    "sgld, prior": (SGLD(lr=0.12, thin=6, num_warmup=100, preconditioner="prior", **COMMON), 1.0, 16 * 300),
}
SLOW_LAWS = {
    "sghmc, identity": (SGHMC(lr=0.2, thin=8, num_warmup=400, preconditioner="identity", **COMMON), 1.0, 16 * 600),
    "sghmc, prior, cold": (SGHMC(lr=0.2, thin=8, num_warmup=400, preconditioner="prior", **COMMON), 0.3, 16 * 600),
    "sghmc, rmsprop": (SGHMC(lr=0.25, friction=0.4, thin=8, num_warmup=400, **COMMON), 1.0, 16 * 600),
    "sgld, rmsprop": (SGLD(lr=0.12, thin=20, num_warmup=200, **COMMON), 1.0, 16 * 500),
}


@pytest.mark.parametrize("name", [*LAWS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_LAWS)])
def test_draws_have_the_exact_law_of_the_recursion(name: str) -> None:
    """With all rows a batch the recursion is linear: its mean is the posterior's, its covariance a matrix equation's."""
    method, temperature, num_samples = (LAWS | SLOW_LAWS)[name]
    case = linear_regression()
    model = at_temperature(case, temperature)
    found = list(method.run(model, case.data, num_samples=num_samples, seed=1))
    preconditioner = found[-1][1]["chains.preconditioner"].double()
    assert bool((preconditioner == preconditioner[0]).all())  # all chains climbed the same way
    friction = method.friction if isinstance(method, SGHMC) else 1.0
    precision = torch.linalg.inv(case.covariance) / temperature
    expected = law(precision, preconditioner[0], method.lr * temperature / 30, friction)
    widths = expected.diagonal()[:5] / (temperature * case.covariance.diagonal())
    assert float(widths.max()) > 1.2  # or the test would not tell this law from the posterior

    drawn = torch.cat([model.layout.flatten(block.params) for block, _ in found]).double() - case.mean  # [S, P]
    assert len(drawn) == num_samples
    for a in range(5):
        assert within(drawn[:, a], 0.0, num_chains=16) < 4
        for b in range(a + 1):
            assert within(drawn[:, a] * drawn[:, b], float(expected[a, b]), num_chains=16) < 4, (a, b)

    kinetic = (1 - friction / 2) * float((expected.diagonal()[5:] / preconditioner[0]).mean())
    heat = torch.tensor([[0.0, 0.0], *(state["heat"] for _, state in found if state["heat"][1])])
    windows = heat.diff(dim=0)
    assert within(windows[:, 0] / windows[:, 1], kinetic, num_chains=1) < 4
    assert found[-1][1]["info"]["kinetic_temperature"] == pytest.approx(kinetic, rel=0.05)


@pytest.mark.parametrize("friction", [0.05, 0.3, 1.0])
def test_the_law_of_a_step_tends_to_the_posterior_as_the_step_size_falls(friction: float) -> None:
    """In float64, from `transition` itself: the error is of the order of the step size, whatever preconditions it."""
    case = linear_regression()
    precision, size = torch.linalg.inv(case.covariance), 5
    preconditioner = torch.rand(size, generator=generator(1), dtype=torch.float64) * 3 + 0.2

    def step(u: Tensor, r: Tensor, noise: Tensor, step_size: float) -> Tensor:
        at = Chains(u, r, preconditioner.expand_as(u))
        new = transition(at, -u @ precision, noise, step_size, friction)
        return torch.cat([new.flat, new.momentum], dim=1).T

    eye, none = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    errors = []
    for step_size in (2e-4, 1e-4):
        forward = torch.cat([step(eye, none, none, step_size), step(none, eye, none, step_size)], dim=1)
        noise = step(none, none, eye, step_size)
        found = stationary(forward, noise)
        torch.testing.assert_close(found, law(precision, preconditioner, step_size, friction))
        errors.append(float((found[:size, :size] - case.covariance).abs().max() / case.covariance.abs().max()))
    assert errors[1] < 0.02
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_minibatch_gradients_average_to_the_full_one_over_an_epoch() -> None:
    model, data = classifier()  # 23 rows: batches of 7, 7, 7 and 2
    flat = 0.3 * torch.randn(3, model.layout.num_values, generator=generator(0))
    gradient = gradient_of(model)
    stream = weighted_batches(model, data, 7, seed=5)
    mean = torch.stack([gradient(flat, *next(stream), 0)[0] for _ in range(4)]).mean(dim=0)
    torch.testing.assert_close(mean, gradient(flat, full_batch(data), 1.0, 0)[0], rtol=1e-4, atol=1e-4)


def slowly(method: SGHMC | SGLD, model: BayesianModel, data: Any, num_steps: int, seed: int) -> Tensor:
    """Positions [C, P] after these steps beyond the climb: one chain at a time, by autograd, from the equations."""
    rows, found = mean_rows(data, method.batch_size), []
    friction = method.friction if isinstance(method, SGHMC) else 1.0
    scale = (model.prior_scale() ** 2).double()
    matrix = scale / torch.exp(torch.log(scale).mean())

    def slope(u: Tensor, batch: Batch) -> Tensor:
        free = u.float().requires_grad_()
        model.log_density(free, batch, weight=len(batch.y) / rows)[0].backward()
        assert free.grad is not None
        return free.grad.double()

    for chain in range(method.num_chains):
        batches = minibatches(data, method.batch_size, seed=seed)
        at = Climb.of(model.unconstrain(model.module_params()).double().unsqueeze(0))
        for step in range(method.climb_steps):
            toward = slope(at.flat[0], next(batches)).unsqueeze(0)
            at = climb(at, toward, step=step, num_steps=method.climb_steps, lr=method.climb_lr)
        u, v, before = at.flat[0], torch.zeros(model.layout.num_values, dtype=torch.float64), 1.0
        for step in range(num_steps):
            share, noisy = 1.0, True
            if step >= method.num_warmup and method.cycle_steps:
                place = (step - method.num_warmup) % method.cycle_steps
                share = 0.5 * (math.cos(math.pi * place / method.cycle_steps) + 1)
                noisy = place / method.cycle_steps >= method.exploration
            h = method.lr * share * model.temperature / model.num_data
            v = v * math.sqrt(h / before)  # v = sqrt(h) r
            xi = torch.randn(len(u), generator=generator(seed, "chain", chain, step)).double()
            v = (
                (1 - friction) * v
                + h * matrix * slope(u, next(batches))
                + noisy * (2 * friction * h * matrix).sqrt() * xi
            )
            u, before = u + v, h
        found.append(u)
    return torch.stack(found)


@pytest.mark.parametrize("method", [
    SGHMC(**SMALL | {"preconditioner": "prior", "init": "module", "friction": 0.2, "lr": 0.05}),
    SGHMC(**SMALL | {"preconditioner": "prior", "init": "module", "cycle_steps": 10, "exploration": 0.25, "lr": 0.05}),
    SGLD(**SMALL | {"preconditioner": "prior", "init": "module", "cycle_steps": 10, "lr": 0.02}),
])  # fmt: skip
def test_chains_follow_their_equations(method: SGHMC | SGLD) -> None:
    """Against a copy that is slow and plain; rows weigh alike although batches of 7 leave one of 2."""
    start, data = classifier()
    model = BayesianModel(start.module, prior=start.prior, likelihood=start.likelihood, num_data=23, temperature=0.5)
    found = list(method.run(model, data, num_samples=8, seed=6))
    block, state = found[-1]
    expected = slowly(method, model, data, state["step"] - method.climb_steps, seed=6)
    torch.testing.assert_close(state["chains.flat"].double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.layout.flatten(block.params), state["chains.flat"])


def test_warm_up_counts_steps_and_not_tensors() -> None:
    """One tensor or two of the same numbers: the same draws, after as many steps.

    torch-uncertainty's SGHMC counted its burn-in once a parameter tensor, so that it ended early.
    """

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.both[:4] + self.both[4]).unsqueeze(1)

    case = linear_regression()
    joined = BayesianModel(Joined(), prior=priors.Normal(0.0, 1.5), likelihood=likelihoods.Gaussian(0.5), num_data=30)
    method = SGHMC(**SMALL | {"init": "module", "cycle_steps": 12, "climb_lr": 0.1, "batch_size": 30})
    apart = list(method.run(case.model, case.data, num_samples=8, seed=2))
    whole = list(method.run(joined, case.data, num_samples=8, seed=2))
    assert [state["step"] for _, state in whole] == [50, 60, 60 + 9 + 8, 60 + 9 + 10, 60 + 9 + 12, 60 + 9 + 20]
    for (one, state), (two, other) in zip(whole, apart, strict=True):
        assert state["step"] == other["step"]
        flat = case.model.layout.flatten(two.params)
        torch.testing.assert_close(joined.layout.flatten(one.params), flat, rtol=1e-4, atol=1e-4)


def test_a_step_leaves_what_it_is_given_alone() -> None:
    """torch-uncertainty's SGHMC wrote into `p.grad`."""
    given = [torch.randn(3, 7, generator=generator(key)) for key in range(4)]
    given.append(torch.rand(3, 7, generator=generator(9)) + 0.5)
    flat, momentum, gradient, noise, preconditioner = given
    kept = [tensor.clone() for tensor in given]
    at = Chains(flat, momentum, preconditioner)
    new = transition(at, gradient, noise, 0.01, 0.3)
    kinetic_temperature(new, 0.3)
    assert not torch.equal(new.flat, flat)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, kept, strict=True))


@pytest.mark.parametrize("preconditioner", ["identity", "prior", "rmsprop"])
def test_a_chain_does_not_know_how_many_run_beside_it(preconditioner: Preconditioner, world_untouched: None) -> None:
    """hamiltorch's threads shared one global seed."""
    model, data = classifier()
    before = torch.get_rng_state()
    options = SMALL | {"preconditioner": preconditioner, "climb_steps": 20}
    three = list(SGHMC(**options | {"num_chains": 3}).run(model, data, num_samples=9, seed=5))
    torch.manual_seed(1)
    one = list(SGHMC(**options | {"num_chains": 1}).run(model, data, num_samples=3, seed=5))
    torch.set_rng_state(before)
    beside = torch.stack([state["chains.flat"] for block, state in three if block.num_samples])  # [D, C, P]
    alone = torch.stack([state["chains.flat"] for block, state in one if block.num_samples])
    torch.testing.assert_close(beside[:, :1], alone, rtol=1e-3, atol=1e-4)
    assert float((beside[:, 1] - beside[:, 2]).abs().max()) > 0.05


def test_noise_is_new_at_each_step_and_in_each_chain() -> None:
    """From the module's values, alike in all chains, under a friction of 1 with next to no gradient."""
    case = linear_regression()
    method = SGLD(
        num_chains=3,
        init="module",
        climb_steps=0,
        num_warmup=0,
        cycle_steps=None,
        thin=1,
        lr=1e-6,
        preconditioner="identity",
    )
    states = [state for _, state in method.run(case.model, case.data, num_samples=3 * 400, seed=4)]
    moves = torch.stack([state["chains.momentum"] for state in states])  # [D, C, P]
    found = torch.corrcoef(torch.cat([moves[:-1].flatten(1), moves[1:].flatten(1)], dim=1).T)  # [2CP, 2CP]
    others = found[~torch.eye(len(found), dtype=torch.bool)]
    assert float(others.abs().max()) < 5 / math.sqrt(400)
    assert float(moves.std()) == pytest.approx(math.sqrt(2), rel=0.05)


def test_cycles() -> None:
    method = SGHMC(num_warmup=3, cycle_steps=8, exploration=0.5, draws_per_cycle=3)
    found = [turn(method, step) for step in range(3 + 16)]
    assert [each.share for each in found[:3]] == [1.0, 1.0, 1.0]
    expected = [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert [each.share for each in found[3:]] == pytest.approx(expected * 2, abs=1e-6)
    assert [each.noisy for each in found] == [True] * 3 + ([False] * 4 + [True] * 4) * 2
    assert [each.draw for each in found] == [False] * 3 + ([False] * 4 + [True, True, False, True]) * 2


@pytest.mark.parametrize("method", [
    SGHMC(num_warmup=0, cycle_steps=None, thin=1), SGHMC(num_warmup=5, cycle_steps=None, thin=7),
    SGLD(num_warmup=2, cycle_steps=9, exploration=0.5, draws_per_cycle=4),
    SGLD(num_warmup=0, cycle_steps=3, exploration=0.0, draws_per_cycle=3), SGHMC(cycle_steps=20, draws_per_cycle=1),
])  # fmt: skip
def test_a_run_ends_at_its_last_draw(method: SGHMC | SGLD) -> None:
    draws = [step + 1 for step in range(num_turns(method, 12)) if turn(method, step).draw]
    assert draws == [num_turns(method, number) for number in range(1, 13)]
    if method.cycle_steps is None:
        assert all(turn(method, step) == turn(method, 0)._replace(draw=step + 1 in draws) for step in range(draws[-1]))


def test_each_preconditioner_has_a_geometric_mean_of_one() -> None:
    model, _ = classifier()
    square = torch.rand(3, model.layout.num_values, generator=generator(0)) * 50
    square[:, 4] = 0.0
    climbed = Climb(torch.zeros_like(square), torch.zeros_like(square), square)
    found: dict[str, Tensor] = {}
    for kind in ("identity", "prior", "rmsprop"):
        found[kind] = precondition(kind, model, climbed)  # type: ignore[arg-type]
        torch.testing.assert_close(found[kind].log().mean(dim=1), torch.zeros(3), rtol=0, atol=1e-4)
        assert found[kind].shape == square.shape
    assert bool((found["identity"] == 1).all())
    ratio = found["prior"] / model.prior_scale().square()
    torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
    size = square.sqrt()
    ratio = found["rmsprop"] * (size + 0.1 * size.mean(dim=1, keepdim=True))
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


def test_the_preconditioner_is_frozen_after_the_climb() -> None:
    model, data = classifier()
    states = [state for _, state in SGHMC(**SMALL).run(model, data, num_samples=8, seed=0)]
    climbed = [state for state in states if "climb.square" in state]
    later = [state for state in states if "chains.flat" in state]
    expected = precondition("rmsprop", model, Climb.load(climbed[-1], torch.device("cpu")))
    assert all(torch.equal(state["chains.preconditioner"], expected) for state in later)
    assert len(expected.unique()) > 40


CHOICES: dict[str, SGHMC | SGLD] = {
    "constant": SGHMC(**SMALL),
    "cycles": SGLD(**SMALL | {"cycle_steps": 60, "exploration": 0.3}),
    "no climb": SGHMC(**SMALL | {"preconditioner": "prior", "init": "prior", "climb_steps": 0, "lr": 0.001}),
    "thin": SGHMC(**SMALL | {"thin": 55}),
}


def flat_of(model: BayesianModel, found: list[tuple[Block, State]]) -> Tensor:
    return torch.cat([model.layout.flatten(block.params) for block, _ in found if block.num_samples])


@pytest.mark.parametrize("name", CHOICES)
def test_resume_from_every_state_and_growth(name: str) -> None:
    model, data = classifier()
    method = CHOICES[name]
    whole = list(method.run(model, data, num_samples=6, seed=3))
    expected = flat_of(model, whole)
    assert len(expected) == 6
    assert [int(block.draw[0]) for block, _ in whole if block.num_samples] == [0, 1, 2]
    steps = [state["step"] for _, state in whole]
    assert all(0 < after - before <= 50 for before, after in zip([0, *steps], steps, strict=False))
    for place in range(len(whole) - 1):
        rest = list(method.run(model, data, num_samples=6, seed=3, state=whole[place][1]))
        assert torch.equal(flat_of(model, [*whole[: place + 1], *rest]), expected), place
    fewer = list(method.run(model, data, num_samples=2, seed=3))
    assert torch.equal(flat_of(model, fewer), expected[:2])
    more = list(method.run(model, data, num_samples=6, seed=3, state=fewer[-1][1]))
    assert torch.equal(flat_of(model, [*fewer, *more]), expected)
    assert more[-1][1]["info"] == whole[-1][1]["info"]


@pytest.mark.parametrize(("name", "num_steps"), [("constant", 4 * 7), ("cycles", (60 - 18) + (32 - 18))])
def test_the_kinetic_temperature_is_that_of_noisy_steps_after_warm_up(name: str, num_steps: int) -> None:
    model, data = classifier()
    states = [state for _, state in CHOICES[name].run(model, data, num_samples=8, seed=0)]
    total, num = states[-1]["heat"]
    assert num == num_steps
    assert states[-1]["info"]["kinetic_temperature"] == total / num
    early = [state for state in states if state["step"] <= 60 + 9]
    assert early
    assert all("kinetic_temperature" not in state["info"] for state in early)


def test_banks_resume_and_grow(tmp_path: Path) -> None:
    model, data = classifier()
    method = CHOICES["cycles"]
    fit(model, data, method=method, num_samples=4, out=tmp_path / "bank", seed=3)
    grown = fit(model, data, method=method, num_samples=10, out=tmp_path / "bank", seed=3, resume=True)
    whole = fit(model, data, method=method, num_samples=10, seed=3)
    assert grown.chain.tolist() == [0, 1] * 5
    assert grown.draw.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert bool(grown.log_joint.isnan().all())
    assert torch.equal(
        model.layout.flatten(grown.block(slice(None)).params), model.layout.flatten(whole.block(slice(None)).params)
    )
    assert set(Bank.open(tmp_path / "bank").info["diagnostics"]["main"]) == {
        "log_density_per_row", "kinetic_temperature", "step_size",
    }  # fmt: skip


def test_starts() -> None:
    model, data = classifier()
    own = model.unconstrain(model.module_params())
    still: dict[str, Any] = SMALL | {
        "climb_steps": 0,
        "num_warmup": 0,
        "thin": 1,
        "lr": 1e-12,
        "preconditioner": "prior",
    }
    at = {}
    for init in ("module", "reset", "prior"):
        at[init] = flat_of(model, list(SGHMC(init=init, **still).run(model, data, num_samples=2, seed=0)))
    torch.testing.assert_close(at["module"], own.expand(2, -1), rtol=0, atol=1e-4)
    for init in ("reset", "prior"):
        assert float((at[init][0] - at[init][1]).abs().max()) > 0.1


def test_info_tells_the_mean_log_density_a_row() -> None:
    case = linear_regression()
    method = SGHMC(num_chains=2, climb_steps=300, num_warmup=0, cycle_steps=None, thin=1, lr=1e-9, batch_size=30)
    state = list(method.run(case.model, case.data, num_samples=2, seed=0))[-1][1]
    params = case.model.constrain(state["chains.flat"])[0]
    expected = torch.stack([
        case.model.log_joint({name: tensor[k] for name, tensor in params.items()}, full_batch(case.data)) for k in (0, 1)
    ]).mean() / 30  # fmt: skip
    assert state["info"]["log_density_per_row"] == pytest.approx(float(expected), rel=1e-5)
    assert state["info"]["step_size"] == pytest.approx(1e-9 / 30)


def test_noise_of_minibatches_that_outweighs_the_chains_own_is_told() -> None:
    case = linear_regression()
    options: dict[str, Any] = SMALL | {"lr": 0.02, "friction": 0.05, "num_warmup": 300, "climb_lr": 0.1}
    with pytest.warns(
        UserWarning, match="SGHMC: the kinetic temperature is .*, not 1: .* minibatches bring more noise"
    ):
        states = [s for _, s in SGHMC(**options | {"batch_size": 5}).run(case.model, case.data, num_samples=40, seed=0)]
    assert 2 < states[-1]["info"]["kinetic_temperature"] < 10
    states = [s for _, s in SGHMC(**options | {"batch_size": 30}).run(case.model, case.data, num_samples=40, seed=0)]
    assert states[-1]["info"]["kinetic_temperature"] < 1.3


def test_chains_that_diverge_are_an_error() -> None:
    case = linear_regression()
    with pytest.raises(FitError, match=r"SGHMC: .* at step \d+; the last good one was -.*lower lr \(it is 50\)"):
        list(SGHMC(**SMALL | {"lr": 50.0}).run(case.model, case.data, num_samples=20, seed=0))
    options = SMALL | {"climb_lr": 0.1, "batch_size": 30}
    state = list(SGHMC(**options).run(case.model, case.data, num_samples=2, seed=0))[-1][1]
    before = f"{30 * state['info']['log_density_per_row']:.6g}"
    broken = state | {"chains.flat": state["chains.flat"] * math.inf}
    with pytest.raises(FitError, match=rf"at step {60 + 9 + 7}; the last good one was {before};"):
        list(SGHMC(**options).run(case.model, case.data, num_samples=4, seed=0, state=broken))
    x, y = case.data
    with pytest.raises(FitError, match=r"SGLD: .* at step 0; none before it"):
        list(SGLD(**SMALL).run(case.model, (x.sign() * 3e38, y), num_samples=20, seed=0))


def test_bad_options_are_refused() -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match="a multiple of num_chains = 4, got 10; pass 8 or 12"):
        list(SGLD(num_chains=4).run(model, data, num_samples=10, seed=0))
    wrong: list[dict[str, Any]] = [
        {"num_chains": 0}, {"num_warmup": -1}, {"init": "ensemble"}, {"climb_steps": -1}, {"climb_lr": 0.0},
        {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"cycle_steps": 0}, {"cycle_steps": 4, "draws_per_cycle": 3},
        {"exploration": 1.0}, {"exploration": -0.1}, {"draws_per_cycle": 0}, {"thin": 0}, {"batch_size": 0},
        {"preconditioner": "full"}, {"climb_steps": 0, "preconditioner": "rmsprop"},
    ]  # fmt: skip
    for options in wrong:
        for kind in (SGHMC, SGLD):
            with pytest.raises(ConfigError, match=rf"{kind.__name__}\({next(iter(options))}="):
                kind(**options)
    for friction in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match=r"SGHMC\(friction="):
            SGHMC(friction=friction)
    SGHMC(climb_steps=0, preconditioner="identity", cycle_steps=6, exploration=0.5)  # the least that cycles take
    assert (SGHMC(friction=1.0).name, SGLD().name) == ("sghmc", "sgld")
    assert not hasattr(SGLD(), "friction")
