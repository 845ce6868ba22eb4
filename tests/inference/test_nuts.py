"""NUTS against closed forms, against Pyro's own run of its kernel, and against our HMC."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.infer.mcmc
import pytest
import torch
from scenarios import classifier, effective_sample_size, linear_regression
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.bank import Bank, files
from bnn.bank import format as fmt
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.functional import FunctionalModel
from bnn.inference import HMC
from bnn.inference.nuts import NUTS, Totals, _warn
from bnn.inference.nuts_kernel import SITE, Potential
from bnn.model import BayesianModel
from bnn.seeding import generator, isolated
from bnn.types import Batch, Block, State


def in_standard_errors(chains: Tensor, expected: float, *, least_ess: float = 200) -> float:
    """|mean - expected| of draws [C, D] in standard errors, after checking that the chains have mixed."""
    ess = effective_sample_size(chains.double())
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    return abs(float(chains.double().mean()) - expected) / (float(chains.double().std()) / math.sqrt(ess))


def by_chain(bank: Bank, values: Tensor) -> Tensor:
    """[S, ...] -> [C, D, ...], by the columns of the bank."""
    chains, draws = int(bank.chain.max()) + 1, int(bank.draw.max()) + 1
    found = torch.empty(chains, draws, *values.shape[1:], dtype=values.dtype)
    found[bank.chain, bank.draw] = values
    return found


def unequal() -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """P = 6, with a learnt noise scale, prior scales that differ from entry to entry, and the module near a mode."""
    source = generator(2, "unequal")
    x = torch.randn(17, 4, generator=source)
    y = x.sum(dim=1, keepdim=True) + 0.3 * torch.randn(17, 1, generator=source)
    with isolated(2, "unequal"):
        module = nn.Linear(4, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.1, 0.9, 1.0, 1.05]]))
        module.bias.fill_(0.02)
    likelihood = likelihoods.Gaussian(priors.LogNormal(-1.0, 0.5))
    return BayesianModel(module, prior=priors.FanIn(3.0), likelihood=likelihood, num_data=17), (x, y)


def near(**options: Any) -> NUTS:
    """NUTS from the module's values, which few draws suffice from."""
    return NUTS(**{"init": "module", **options})


def run(method: NUTS, num_samples: int, *, seed: int = 0, state: State | None = None) -> list[tuple[Block, State]]:
    model, data = unequal()
    return list(method.run(model, data, num_samples=num_samples, seed=seed, state=state))


def rows_of(found: list[tuple[Block, State]]) -> dict[str, Tensor]:
    rows = {name: torch.cat([block.params[name] for block, _ in found]) for name in found[0][0].params}
    for name in found[0][0].columns:
        rows[f"@{name}"] = torch.cat([block.columns[name] for block, _ in found])
    for name in ("chain", "draw", "log_joint"):
        rows[f"@{name}"] = torch.cat([getattr(block, name) for block, _ in found])
    return rows


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def draws() -> Tensor:
    """[C, D, P] from the conjugate posterior."""
    case = linear_regression()
    bank = fit(case.model, case.data, method=NUTS(num_chains=2, num_warmup=150), num_samples=1000, seed=1)
    assert bank.chain[:5].tolist() == [0, 1, 0, 1, 0]
    assert bank.draw[:5].tolist() == [0, 0, 1, 1, 2]
    return by_chain(bank, case.model.layout.flatten(bank.block(slice(None)).params).double())


def test_means_of_the_conjugate_posterior(draws: Tensor) -> None:
    case = linear_regression()
    for place in range(5):
        assert in_standard_errors(draws[..., place], float(case.mean[place])) < 4


def test_covariances_of_the_conjugate_posterior(draws: Tensor) -> None:
    """By the mean of products about the known mean, with the ESS of those."""
    case = linear_regression()
    for a, b in ((0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (0, 1), (0, 4), (2, 3)):
        products = (draws[..., a] - case.mean[a]) * (draws[..., b] - case.mean[b])
        assert in_standard_errors(products, float(case.covariance[a, b])) < 4


def test_a_skewed_target_with_a_known_mean() -> None:
    """One row at 0 under y ~ N(b, s^2), b ~ N(0, 1), log s ~ N(0.3, 0.6^2): the Jacobian counts here.

    With b integrated out, p(s | y = 0) is proportional to LogNormal(s) / sqrt(1 + s^2).
    """
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.3, 0.6))
    model = BayesianModel(nn.Linear(1, 1), prior=priors.Normal(), likelihood=likelihood, num_data=1, bayesian="bias")
    data = torch.zeros(1, 1), torch.zeros(1, 1)
    bank = fit(model, data, method=NUTS(num_chains=2, num_warmup=100), num_samples=800, seed=2)
    scale = by_chain(bank, bank.block(slice(None)).params["@likelihood.scale"])
    s = torch.linspace(1e-3, 40, 400_001, dtype=torch.float64)
    density = likelihood.scale.log_prob(s).exp() / torch.sqrt(1 + s**2)  # type: ignore[union-attr]
    density = density / torch.trapezoid(density, s)
    for power in (1, -1):
        assert in_standard_errors(scale**power, float(torch.trapezoid(density * s**power, s))) < 4


@pytest.mark.slow
def test_predictions_agree_with_those_of_our_hmc() -> None:
    """A network with learnt noise: means and second moments of its outputs, each with standard errors of both."""
    source = generator(5, "curve")
    x = torch.linspace(-2, 2, 40).unsqueeze(1)
    y = torch.sin(2 * x) + 0.3 * torch.randn(40, 1, generator=source)
    module = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    likelihood = likelihoods.Gaussian(priors.LogNormal(-1.0, 0.5))
    model = BayesianModel(module, prior=priors.FanIn(1.5), likelihood=likelihood, num_data=40)
    probes = torch.linspace(-2.5, 2.5, 7).unsqueeze(1)
    moments = []
    for method, num_samples in ((NUTS(num_chains=2, num_warmup=100), 240), (HMC(num_chains=8), 2400)):
        bank = fit(model, (x, y), method=method, num_samples=num_samples, seed=3)
        outputs = FunctionalModel(module, bank)(probes, slice(None)).squeeze(-1).double()  # [S, 7]
        noise = bank.block(slice(None)).params["@likelihood.scale"].double()
        seen = by_chain(bank, torch.cat([outputs, outputs.square(), noise.unsqueeze(1)], dim=1))  # [C, D, 15]
        ess = torch.tensor([effective_sample_size(seen[..., place]) for place in range(15)])
        assert bool((ess > 100).all()), ess
        flat = seen.flatten(0, 1)
        moments.append((flat.mean(dim=0), flat.var(dim=0) / ess))
    (ours, error), (theirs, other) = moments
    assert float(((ours - theirs).abs() / (error + other).sqrt()).max()) < 4


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_a_chain_is_the_one_that_pyro_runs() -> None:
    """Pyro's kernel, never taken apart, meets the same numbers in warm-up, its windows and after."""
    model, data = unequal()
    num_warmup, num_draws = 45, 6
    both = rows_of(
        run(near(num_chains=2, num_warmup=num_warmup, init="prior", max_tree_depth=6), 2 * num_draws, seed=7)
    )
    ours = {name: rows[1::2] for name, rows in both.items()}  # the second chain
    batch, scale = Batch(*data), model.prior_scale().double()

    def potential(sites: dict[str, Tensor]) -> Tensor:
        return -model.log_density((sites[SITE] * scale).float(), batch)[0].double()

    kernel = pyro.infer.mcmc.NUTS(potential_fn=potential, max_tree_depth=6)
    position = {SITE: model.unconstrain(model.sample_prior(7, "start", 1)).double() / scale}
    kernel.initial_params = position
    with isolated(7, "nuts", "start", 1):
        kernel.setup(num_warmup)
    inverse_masses, theirs = [], []
    for step in range(num_warmup + num_draws):
        with isolated(7, "nuts", "chain", 1, step):
            position = kernel.sample(position)
        inverse_masses.append(kernel.inverse_mass_matrix[(SITE,)])
        theirs.append(model.constrain((position[SITE] * scale).float())[0])
    assert not torch.equal(inverse_masses[0], inverse_masses[-1])  # a window has ended
    assert float(kernel.step_size) == float(ours["@step_size"][0])
    for name in model.layout.names:
        expected = torch.stack([params[name] for params in theirs[num_warmup:]])
        assert torch.equal(ours[name], expected)


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_resume_from_any_state_is_bit_for_bit_the_unbroken_run(tmp_path: Path) -> None:
    """Windows of the mass included: the warm-up has a start, a window of 15 draws, and an end."""
    method = near(num_chains=3, num_warmup=21, max_tree_depth=4, thin=2)
    whole = run(method, 12, seed=5)
    assert [state["step"] for _, state in whole] == [*range(1, 22), 23, 25, 27, 29]
    assert len({tuple(state["chain.window"]) for _, state in whole}) == 4
    expected = rows_of(whole)
    for place in range(0, len(whole) - 1, 3):
        state = whole[place][1]
        tensors, metadata = fmt.encode_state(state, "state")
        path = tmp_path / f"{place}.safetensors"
        files.write_tensors(path, tensors, metadata)
        mapped = files.map_tensors(path)
        back = fmt.decode_state({name: t.clone() for name, t in mapped.tensors.items()}, mapped.metadata, "state")
        rest = run(method, 12, seed=5, state=back)
        assert equal(rows_of([*whole[: place + 1], *rest]), expected), f"resumed after state {place}"
        assert rest[-1][1]["info"] == whole[-1][1]["info"]
        assert rest[-1][1]["totals"] == whole[-1][1]["totals"]


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_states_and_blocks_are_not_changed_by_what_follows() -> None:
    model, data = unequal()
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for block, state in near(num_chains=2, num_warmup=25, max_tree_depth=3).run(model, data, num_samples=4, seed=0):
        for found in (state, dict(block.params)):
            kept.append((found, {k: v.clone() if isinstance(v, Tensor) else repr(v) for k, v in found.items()}))
    _, first = run(near(num_chains=2, num_warmup=25, max_tree_depth=3), 4)[12]
    assert first["chain.num_draws"] == [11, 11]  # moments of the window, that what follows adds to
    kept.append((first, {k: v.clone() if isinstance(v, Tensor) else repr(v) for k, v in first.items()}))
    run(near(num_chains=2, num_warmup=25, max_tree_depth=3), 4, state=first)
    for found, copies in kept:
        for name, value in found.items():
            assert torch.equal(value, copies[name]) if isinstance(value, Tensor) else repr(value) == copies[name]
            assert not (isinstance(value, Tensor) and value.requires_grad)


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_chains_do_not_know_of_each_other() -> None:
    """Nor does what one has learnt reach another, though Pyro's kernel is the same object."""
    options = {"num_warmup": 25, "max_tree_depth": 4, "init": "prior"}
    three = rows_of(run(near(num_chains=3, **options), 12))  # type: ignore[arg-type]
    one = rows_of(run(near(num_chains=1, **options), 4))  # type: ignore[arg-type]
    first = three["@chain"] == 0
    assert equal({name: rows[first] for name, rows in three.items()}, one)
    assert len(set(three["@step_size"].tolist())) == 3


def test_thinning_keeps_every_nth_draw_and_sums_up_what_led_to_it() -> None:
    options = {"num_chains": 2, "num_warmup": 5, "max_tree_depth": 3}
    every = rows_of(run(near(**options), 24))  # type: ignore[arg-type]
    third = rows_of(run(near(**options, thin=3), 8))  # type: ignore[arg-type]
    for name in ("weight", "bias", "@likelihood.scale", "@log_joint", "@energy", "@step_size"):
        assert torch.equal(every[name].view(12, 2, -1)[2::3], third[name].view(4, 2, -1))
    model, data = unequal()
    for row, log_joint in enumerate(third["@log_joint"].tolist()):
        params = {name: third[name][row] for name in model.layout.names}
        assert log_joint == pytest.approx(float(model.log_joint(params, Batch(*data))), rel=1e-5)
    acceptance = every["@acceptance"].view(4, 3, 2)
    torch.testing.assert_close(third["@acceptance"].view(4, 2), acceptance.mean(dim=1))
    assert bool((acceptance.std(dim=1) > 0).all())
    assert third["@draw"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_acceptance_and_energy_of_a_trajectory_of_one_step() -> None:
    """By the leapfrog written out, from the momentum at the head of the keyed stream: H, and min(1, exp(-dH))."""
    model, data = unequal()
    method = near(num_chains=2, num_warmup=0, max_tree_depth=1, step_size=0.15)
    found = list(method.run(model, data, num_samples=14, seed=4))
    rows, batch, scale = rows_of(found), Batch(*data), model.prior_scale().double()

    def height(z: Tensor) -> Tensor:
        return -model.log_density((scale * z).float(), batch)[0].double()

    stayed = 0
    for step in range(1, 7):
        for chain in range(2):
            at = found[step - 1][1]["chain.position"][chain]
            with isolated(4, "nuts", "chain", chain, step):
                momentum = torch.normal(torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
                size = 0.15 if bool(torch.bernoulli(torch.tensor(0.5, dtype=torch.float64))) else -0.15
            half = momentum - size / 2 * torch.func.grad(height)(at)
            new = at + size * half
            end = half - size / 2 * torch.func.grad(height)(new)
            energy = float(height(at) + momentum.square().sum() / 2)
            error = float(height(new) + end.square().sum() / 2) - energy
            row = 2 * step + chain
            assert float(rows["@energy"][row]) == pytest.approx(energy, rel=1e-6)
            assert float(rows["@acceptance"][row]) == pytest.approx(min(1.0, math.exp(-error)), rel=1e-4)
            reached = found[step][1]["chain.position"][chain]
            stayed += torch.equal(reached, at)
            assert torch.equal(reached, at) or torch.allclose(reached, new, rtol=1e-5)
    assert 0 < stayed < 12
    assert bool((rows["@step_size"] == 0.15).all())
    assert found[-1][1]["info"]["acceptance"] == pytest.approx(float(rows["@acceptance"].mean()))


@pytest.mark.parametrize(("depth", "steps"), [(1, 1), (3, 7)])
def test_the_depth_of_the_tree_bounds_the_leapfrog_steps(depth: int, steps: int) -> None:
    """With steps too small to turn back, each tree is full."""
    found = run(near(num_chains=2, num_warmup=0, max_tree_depth=depth, step_size=1e-4), 10)
    assert [state["info"]["mean_steps"] for _, state in found] == [steps] * 5
    assert [state["info"]["full_trees"] for _, state in found] == [2, 4, 6, 8, 10]
    assert found[-1][1]["info"]["acceptance"] > 0.999


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_only_trees_of_full_depth_are_counted_as_full() -> None:
    """A tree that turns back inside its last doubling has between 8 and 14 steps, and none was cut short."""
    found = run(near(num_chains=1, num_warmup=0, max_tree_depth=4, step_size=0.04), 16, seed=4)
    infos = [{"mean_steps": 0.0, "full_trees": 0}, *(state["info"] for _, state in found)]
    steps = [round(b["mean_steps"] * (k + 1) - a["mean_steps"] * k) for k, (a, b) in enumerate(pairwise(infos))]
    assert {7, 11, 15} <= set(steps)
    assert [b["full_trees"] - a["full_trees"] for a, b in pairwise(infos)] == [one == 15 for one in steps]


def test_divergences_are_counted_and_told() -> None:
    case = linear_regression()
    method = near(num_chains=3, num_warmup=0, step_size=50.0)
    with pytest.warns(UserWarning, match="acceptance 0.00 in chains 0, 1, 2, 12 of 12 trajectories diverged"):
        found = list(method.run(case.model, case.data, num_samples=12, seed=0))
    assert found[-1][1]["info"]["divergences"] == 12
    assert bool((rows_of(found)["@divergent"] == 1).all())
    with pytest.warns(UserWarning, match="in chains 0, 1, 2, 24 of 24 trajectories"):
        thinned = list(near(num_chains=3, num_warmup=0, step_size=50.0, thin=2).run(
            case.model, case.data, num_samples=12, seed=0))  # fmt: skip
    assert bool((rows_of(thinned)["@divergent"] == 2).all())
    assert bool((rows_of(run(near(num_chains=2, num_warmup=30, max_tree_depth=4), 6))["@divergent"] == 0).all())


def test_warm_up_finds_the_acceptance_that_is_asked_for() -> None:
    found = []
    for target in (0.6, 0.95):
        states = run(near(num_chains=2, num_warmup=80, target_accept=target, max_tree_depth=5), 60)
        found.append(states[-1][1]["info"])
    assert found[0]["step_size"] > 1.3 * found[1]["step_size"]
    assert found[0]["acceptance"] < found[1]["acceptance"] - 0.05
    assert found[1]["acceptance"] > 0.9


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_the_first_step_size_is_the_one_given() -> None:
    given = run(near(num_chains=2, num_warmup=3, max_tree_depth=2, step_size=0.01), 2)
    state = given[0][1]
    # After one update of dual averaging: log e = log(10 e_0) - (target - acceptance) / (0.05 * 11)
    expected = math.log(0.1) - (0.8 - state["info"]["acceptance"]) / 0.55
    assert sum(map(math.log, state["chain.step_size"])) / 2 == pytest.approx(expected, rel=1e-6)
    assert all(math.exp(centre) == pytest.approx(0.1) for centre in state["chain.centre"])


def test_positions_are_in_the_scales_of_the_prior_and_in_float64() -> None:
    model, data = unequal()
    potential = Potential(model, Batch(*data))
    assert len(model.prior_scale().unique()) > 1
    assert torch.equal(potential.flat(torch.ones(6, dtype=torch.float64)), model.prior_scale())
    (_, state), *_ = run(near(num_chains=3, num_warmup=0, max_tree_depth=1, step_size=1e-9), 3)
    assert state["chain.position"].dtype == torch.float64
    own = model.unconstrain(model.module_params())
    torch.testing.assert_close(state["chain.position"] * model.prior_scale(), own.expand(3, 6).double())


def test_starts() -> None:
    model, data = classifier()
    options: dict[str, Any] = {"num_chains": 2, "num_warmup": 0, "max_tree_depth": 1, "step_size": 1e-6}
    banks = {
        init: fit(model, data, method=NUTS(init=init, **options), num_samples=2)
        for init in ("module", "prior", "ensemble", "map")
    }
    name = model.layout.names[0]
    torch.testing.assert_close(banks["module"][1][name], model.module_params()[name], atol=1e-3, rtol=0)
    torch.testing.assert_close(banks["prior"][1][name], model.sample_prior(0, "start", 1)[name], atol=1e-3, rtol=0)
    assert not torch.allclose(banks["ensemble"][0][name], banks["ensemble"][1][name], atol=1e-2)
    torch.testing.assert_close(banks["map"][0][name], banks["map"][1][name], atol=1e-3, rtol=0)
    for init, below in (("ensemble", "prior"), ("map", "module")):
        assert bool((banks[init].log_joint > banks[below].log_joint + 10).all())
    again = fit(model, data, method=NUTS(init=banks["prior"], **options), num_samples=2)
    rows = {tuple(one[name].flatten().mul(100).round().tolist()) for bank in (again, banks["prior"]) for one in bank}
    assert len(rows) == 2


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_phases_of_a_run_are_told() -> None:
    found = run(near(num_chains=2, num_warmup=3, max_tree_depth=2, thin=2), 4)
    phases = [tuple(state["phase"].values()) for _, state in found]
    assert phases == [*(("warm-up", step, 3) for step in (1, 2, 3)), ("sampling", 2, 4, 2), ("sampling", 4, 4, 2)]
    assert [block.num_samples for block, _ in found] == [0, 0, 0, 2, 2]
    assert [[one[0] for one in state["totals"]] for _, state in found] == [[0, 0], [0, 0], [0, 0], [2, 2], [4, 4]]
    sizes = found[-1][1]["chain.step_size"]
    assert sizes[0] != sizes[1]
    assert found[-1][1]["info"]["step_size"] == pytest.approx(sum(sizes) / 2)


@pytest.mark.filterwarnings("ignore:NUTS. ")  # of so few draws it may be anything
def test_settings_of_the_caller_are_neither_felt_nor_changed(world_untouched: None) -> None:
    """Gradients off, checks of distributions off or on: between draws they are the caller's, and draws are the same."""
    expected = rows_of(run(near(num_chains=2, num_warmup=3, max_tree_depth=2), 4))
    kind = torch.distributions.Distribution
    before = kind._validate_args
    model, data = unequal()
    try:
        for checks in (False, True):
            kind.set_default_validate_args(checks)
            found = []
            with torch.no_grad():
                for step in near(num_chains=2, num_warmup=3, max_tree_depth=2).run(model, data, num_samples=4, seed=0):
                    found.append(step)
                    assert kind._validate_args is checks
                    assert not torch.is_grad_enabled()
                    assert pyro.distributions.is_validation_enabled() is __debug__
            assert equal(rows_of(found), expected)
    finally:
        kind.set_default_validate_args(before)


def test_a_density_that_turns_infinite_names_chain_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = unequal()
    density = model.log_density

    def pole(flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        height, log_joint = density(flat, batch)
        return torch.where(flat[0] > edge, math.inf, height), log_joint

    own = float(model.unconstrain(model.module_params())[0])
    monkeypatch.setattr(model, "log_density", pole)
    for num_warmup, match in (
        (0, r"got inf on the way of chain [01] at draw \d+; look for a scale that reaches 0"),
        (900, r"got inf on the way of chain [01] at trajectory \d+ of warm-up; look"),
    ):
        edge = own + 0.05
        method = near(num_chains=2, num_warmup=num_warmup, step_size=0.01, max_tree_depth=6)
        with pytest.raises(FitError, match=match):
            list(method.run(model, data, num_samples=400, seed=0))


@pytest.mark.filterwarnings("ignore:NUTS. ")
def test_a_density_that_checks_its_arguments_diverges_where_they_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """In warm-up and after it: the checks of torch.distributions would end the run."""
    model, data = unequal()

    def checking(flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        height = torch.distributions.Normal(0.0, torch.sqrt(1.0 + flat[0])).log_prob(flat).sum()
        return height, height

    monkeypatch.setattr(model, "log_density", checking)
    monkeypatch.setattr("bnn.inference.starting.positions", lambda *_: torch.zeros(2, 6))
    for num_warmup, divergences in ((0, 20), (20, 1)):
        method = near(num_chains=2, num_warmup=num_warmup, step_size=1.0, max_tree_depth=3)
        states = [state for _, state in method.run(model, data, num_samples=80, seed=0)]
        assert states[-1]["info"]["divergences"] >= divergences


def islands(flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """A density on P = 6 values: standard normal where the first of them is above -50; below, NaN but at -100 itself."""
    height = -0.5 * flat.square().sum()
    return torch.where((flat[0] < -50) & (flat != -100).any(), math.nan, height), height


def test_chains_that_all_stand_still_are_told_after_a_hundred_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = unequal()
    monkeypatch.setattr(model, "log_density", islands)
    monkeypatch.setattr("bnn.inference.starting.positions", lambda *_: torch.full((2, 6), -100.0))
    method = near(num_chains=2, num_warmup=0, step_size=0.1, thin=2)
    running, states = method.run(model, data, num_samples=300, seed=0), []
    with pytest.raises(FitError, match="got every chain standing still for 100 trajectories, up to draw 49; raise"):
        states.extend(state for _, state in running)
    assert len(states) == 49
    with pytest.raises(FitError, match="up to draw 49"):
        list(method.run(model, data, num_samples=300, seed=0, state=states[30]))


def test_one_chain_that_stands_still_is_named_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = unequal()
    monkeypatch.setattr(model, "log_density", islands)
    starts = torch.tensor([[0.0], [-100.0], [1.0]]).expand(3, 6)
    monkeypatch.setattr("bnn.inference.starting.positions", lambda *_: starts)
    method = near(num_chains=3, num_warmup=0, step_size=0.1, max_tree_depth=2)
    running = method.run(model, data, num_samples=330, seed=0)
    with pytest.warns(UserWarning, match="NUTS: acceptance 0.00 in chains 1, 110 of 330 trajectories diverged"):
        found = list(running)
    assert [still > 100 for still in found[-1][1]["chain.still"]] == [False, True, False]


def test_a_pole_that_only_the_search_for_a_step_size_met_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flat density lets the search double its step far out."""
    model, data = unequal()
    met = []

    def far(flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        met.append(bool(flat.abs().max() > 1e6))
        height = 0.0 * flat.sum()
        return torch.where(flat.abs().max() > 1e6, math.inf, height), height

    monkeypatch.setattr(model, "log_density", far)
    method = near(num_chains=2, num_warmup=0, step_size=0.1, max_tree_depth=2)
    assert len(list(method.run(model, data, num_samples=4, seed=0))) == 2
    assert any(met)


def test_what_is_told_at_the_end() -> None:
    well, slow, divergent = Totals(100, 80.0), Totals(100, 19.0), Totals(100, 80.0, divergences=16)
    _warn([well, well, Totals(100, 80.0, divergences=15)])  # 5 %: nothing
    with pytest.warns(UserWarning, match="NUTS: 16 of 300 trajectories diverged: the draws"):
        _warn([well, divergent, well])
    with pytest.warns(UserWarning, match="NUTS: acceptance 0.19 in chains 0, 2, 0 of 300 trajectories diverged"):
        _warn([slow, well, slow])


def test_bad_options_and_starts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = classifier()
    with pytest.raises(ConfigError, match="a multiple of num_chains = 4, got 10; pass 8 or 12"):
        list(NUTS(num_chains=4).run(model, (x, y), num_samples=10, seed=0))
    for options, match in (
        ({"num_chains": 0}, r"NUTS\(num_chains=\): want at least 1, got 0"),
        ({"num_warmup": -1}, r"NUTS\(num_warmup=\): want at least 0, got -1"),
        ({"max_tree_depth": 0}, r"NUTS\(max_tree_depth=\): want at least 1, got 0"),
        ({"thin": 0}, r"NUTS\(thin=\): want at least 1, got 0"),
        ({"target_accept": 1.0}, r"NUTS\(target_accept=\): want a number in \(0, 1\), got 1.0"),
        ({"target_accept": 0.0}, r"NUTS\(target_accept=\)"),
        ({"step_size": 0.0}, r"NUTS\(step_size=\): want a positive number, got 0.0"),
        ({"step_size": math.inf}, r"NUTS\(step_size=\): want a positive number, got inf"),
        ({"init": "mode"}, r"NUTS\(init=\): want one of prior, ensemble, module, map, got 'mode'"),
    ):
        with pytest.raises(ConfigError, match=match):
            NUTS(**options)  # type: ignore[arg-type]
    # A density of NaN whatever the processor: what products of huge numbers come to hangs on its instructions.
    monkeypatch.setattr(model, "log_density", lambda flat, batch: (math.nan * flat.sum(), math.nan * flat.sum()))
    with pytest.raises(
        FitError, match=r"want a finite log joint and gradient, got a log joint of .* at the start of chain 0"
    ):
        list(NUTS(num_chains=2).run(model, (x, y), num_samples=2, seed=0))


def test_a_gradient_that_is_not_finite_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = unequal()
    density = model.log_density

    def edge(flat: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        height, log_joint = density(flat, batch)
        return height + (flat[0] - flat[0].detach()).abs().sqrt(), log_joint  # 0, with a slope of 0 / 0

    monkeypatch.setattr(model, "log_density", edge)
    with pytest.raises(FitError, match=r"got a log joint of -\d.* at the start of chain 0"):
        list(near(num_chains=2).run(model, data, num_samples=2, seed=0))
