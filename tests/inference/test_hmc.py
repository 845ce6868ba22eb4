"""The method `HMC` against closed forms, and its dynamics against what they must conserve."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import classifier, linear_regression, undefined_classifier
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.bank import Bank
from bnn.diagnostics import ess_mean, mcse_mean
from bnn.errors import BankMismatch, ConfigError, FitError
from bnn.fitting import fit
from bnn.inference import HMC, Prior, chains
from bnn.inference.density import Values
from bnn.inference.hamiltonian import Metric, Position, diagonal, kinetic, trajectory, transition
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch

STILL: dict[str, Any] = {"num_warmup": 0, "num_steps": 1, "step_size": 1e-6}  # chains that stay where they start


def by_chain(values: Tensor, num_chains: int) -> Tensor:
    """[S, ...] in the order draw by draw -> [C, D, ...]."""
    return values.reshape(-1, num_chains, *values.shape[1:]).transpose(0, 1)


def within(draws: Tensor, expected: Tensor | float, *, least_ess: float = 200) -> float:
    """The largest |mean - expected| in standard errors of draws [C, D, ...], after checking that they have mixed."""
    ess = float(ess_mean(draws).min())
    assert ess > least_ess, f"not mixed: ESS {ess:.0f}"
    return float(((draws.double().mean(dim=(0, 1)) - expected).abs() / mcse_mean(draws)).max())


def flattened(model: BayesianModel, bank: Bank, num_chains: int) -> Tensor:
    """All samples, [C, D, P]."""
    return by_chain(model.layout.flatten(bank.block(slice(None)).params).double(), num_chains)


# Posteriors with closed forms.


@pytest.mark.parametrize(
    "options",
    [
        {"num_chains": 4, "num_steps": 7},
        {"num_chains": 5, "num_steps": 8, "dtype": "float64", "init": "prior"},
        {"num_chains": 7, "num_steps": 16, "mass": "unit", "init": "module"},
        {"num_chains": 4, "num_steps": 6, "mass": "low-rank", "rank": 2, "init": "map"},
        {"num_chains": 16},
    ],
    ids=["plain", "float64", "unit", "low-rank", "chees"],
)
def test_the_conjugate_posterior(options: dict[str, Any]) -> None:
    case, num_chains = linear_regression(), options["num_chains"]
    bank = fit(
        case.model, case.data, method=HMC(num_warmup=120, **options), num_samples=1600 // num_chains * num_chains
    )
    assert bank.chain[: num_chains + 2].tolist() == [*range(num_chains), 0, 1]
    assert bank.draw[: num_chains + 2].tolist() == [*[0] * num_chains, 1, 1]
    draws = flattened(case.model, bank, num_chains)
    assert within(draws, case.mean) < 4
    left = draws - case.mean
    assert within(left.unsqueeze(-1) * left.unsqueeze(-2), case.covariance) < 4  # [C, D, P, P]
    assert next(case.model.module.parameters()).dtype == torch.float32


def test_a_skewed_target_with_a_known_mean() -> None:
    """One row at 0 under y ~ N(b, s^2), b ~ N(0, 1), log s ~ N(0.3, 0.6^2): no symmetry to hide behind.

    With b integrated out, p(s | y = 0) is proportional to LogNormal(s) / sqrt(1 + s^2).
    """
    likelihood = likelihoods.Gaussian(priors.LogNormal(0.3, 0.6))
    model = BayesianModel(nn.Linear(1, 1), prior=priors.Normal(), likelihood=likelihood, num_data=1, bayesian="bias")
    data = torch.zeros(1, 1), torch.zeros(1, 1)
    bank = fit(
        model, data, method=HMC(num_chains=4, num_warmup=100, num_steps=5, init="module"), num_samples=2000, seed=2
    )
    scale = by_chain(bank.block(slice(None)).params["@likelihood.scale"], 4)
    joints = [model.log_joint(bank[index], Batch(*data)) for index in (0, 7)]  # without a Jacobian
    torch.testing.assert_close(torch.stack(joints).double(), bank.log_joint[[0, 7]])
    s = torch.linspace(1e-3, 40, 400_001, dtype=torch.float64)
    density = likelihood.scale.log_prob(s).exp() / torch.sqrt(1 + s**2)  # type: ignore[union-attr]
    density = density / torch.trapezoid(density, s)
    for power in (1, -1):
        assert within(scale**power, float(torch.trapezoid(density * s**power, s))) < 4


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_a_module_in_bfloat16_has_the_posterior_of_its_values(dtype: Any) -> None:
    """A well determined slope: the chain must move in steps that bfloat16 alone would round away."""
    source = generator(0, "bfloat16")
    x = torch.randn(400, 1, generator=source)
    y = 0.1 * x + torch.randn(400, 1, generator=source)
    rounded = x.to(torch.bfloat16)
    precision = float(rounded.float().square().sum()) + 1.0
    module = nn.Linear(1, 1).to(torch.bfloat16)
    with torch.no_grad():
        module.bias.zero_()
    model = BayesianModel(
        module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(1.0), num_data=400, bayesian="weight"
    )
    method = HMC(num_chains=4, num_warmup=100, num_steps=4, dtype=dtype, init="module")
    bank = fit(model, (rounded, y), method=method, num_samples=1200, seed=1)
    stored = bank.block(slice(None)).params["weight"]
    assert stored.dtype == module.weight.dtype == torch.bfloat16
    drawn = by_chain(stored.float(), 4)
    assert len(drawn.unique()) > 50
    assert float(drawn.std()) == pytest.approx(precision**-0.5, rel=0.1)
    if dtype == "float64":  # in bfloat16 the module rounds its outputs, which moves the mean
        mean = float((rounded.double() * y).sum()) / precision
        assert within(drawn, mean, least_ess=150) < 4


def test_float64_is_the_arithmetic_of_module_and_density() -> None:
    """The log joint of the rows kept, reckoned anew in float64, agrees to what rounding of the rows leaves."""
    base, (x, y) = classifier()
    more: dict[str, Any] = {
        "prior": base.prior,
        "likelihood": base.likelihood,
        "num_data": len(y),
        "temperature": 0.5,
        "bayesian": ["*", f"!{base.layout.names[1]}"],
    }
    model, rows = BayesianModel(base.module, **more), {}
    options: dict[str, Any] = {"num_chains": 3, "init": "module", "num_warmup": 0, "num_steps": 2, "step_size": 0.01}
    for dtype in ("float32", "float64"):
        method = HMC(dtype=dtype, **options)
        rows[dtype] = [
            (state["at.flat"], state["at.log_joint"], block.log_joint)
            for block, state in method.run(model, (x, y), num_samples=12, seed=0)
        ]
    double = BayesianModel(classifier()[0].module.double(), **more)
    errors = {}
    for dtype, found in rows.items():
        flat, log_joint, kept = found[-1]
        assert str(flat.dtype) == f"torch.{dtype}"
        assert torch.equal(log_joint, kept)
        expected = torch.stack([double.log_density(row, Batch(x.double(), y))[1] for row in flat.double()])
        errors[dtype] = float((log_joint - expected).abs().max())
    assert errors["float64"] < 1e-11 < errors["float32"] < 1e-3


# Where chains start.


def test_chains_start_at_the_module() -> None:
    model, data = classifier()
    bank = fit(model, data, method=HMC(num_chains=2, init="module", **STILL), num_samples=2)
    own = model.module_params()
    assert all(torch.allclose(bank[1][name], own[name], atol=1e-3) for name in model.layout.names)


def test_chains_start_at_draws_of_the_prior_of_their_own() -> None:
    model, data = classifier()
    bank = fit(model, data, method=HMC(num_chains=3, init="prior", **STILL), num_samples=3)
    rows = flattened(model, bank, 3)[:, 0]  # [C, P]
    assert float((rows[0] - rows[1]).abs().max()) > 0.1
    assert float((rows / model.prior_scale()).std()) == pytest.approx(1.0, rel=0.3)


@pytest.mark.parametrize("init", ["ensemble", "map"])
def test_chains_climb_to_a_mode(init: Any) -> None:
    case = linear_regression()
    bank = fit(case.model, case.data, method=HMC(num_chains=3, init=init, **STILL), num_samples=3)
    spread = case.covariance.diagonal().sqrt()
    far = fit(case.model, case.data, method=HMC(num_chains=3, init="prior", **STILL), num_samples=3)
    assert float(((flattened(case.model, far, 3) - case.mean) / spread).abs().max()) > 10
    assert float(((flattened(case.model, bank, 3) - case.mean) / spread).abs().max()) < 3
    rows = flattened(case.model, bank, 3)
    assert (float((rows[0] - rows[2]).abs().max()) < 1e-4) == (init == "map")


@pytest.mark.parametrize("dtype", [None, "float64"])
def test_chains_start_at_rows_of_a_bank(dtype: Any) -> None:
    """With a noise scale and a prior scale that are unknown, both of which positions hold as logarithms."""
    likelihood, prior = likelihoods.Gaussian(priors.LogNormal(0.3, 0.6)), priors.Normal(0.0, priors.HalfCauchy(2.0))
    model = BayesianModel(nn.Linear(2, 1), prior=prior, likelihood=likelihood, num_data=5)
    data = torch.randn(5, 2, generator=generator(0, "x")), torch.zeros(5, 1)
    bank = fit(model, data, method=Prior(), num_samples=9)
    method = HMC(num_chains=4, init=bank, dtype=dtype, **STILL)
    found = model.layout.flatten(fit(model, data, method=method, num_samples=4, seed=1).block(slice(None)).params)
    rows = model.layout.flatten(bank.block(slice(None)).params)
    distance = (found.unsqueeze(1) - rows).abs().amax(dim=2)  # [C, S]
    nearest = distance.argmin(dim=1)
    assert float(distance.min(dim=1).values.max()) < 1e-3
    assert len(nearest.unique()) == 4
    again = model.layout.flatten(fit(model, data, method=method, num_samples=4, seed=2).block(slice(None)).params)
    assert not torch.equal((again.unsqueeze(1) - rows).abs().amax(dim=2).argmin(dim=1), nearest)
    with pytest.raises(ConfigError, match="a bank with a row for each of 10 chains, got 9"):
        fit(model, data, method=HMC(num_chains=10, init=bank), num_samples=10)


def test_a_bank_of_another_module_is_no_start() -> None:
    case, (model, data) = linear_regression(), classifier()
    bank = fit(case.model, case.data, method=Prior(), num_samples=5)
    with pytest.raises(BankMismatch):
        fit(model, data, method=HMC(init=bank), num_samples=4)


# What the method does with its options, and what it tells.


def test_columns_of_a_bank(tmp_path: Path) -> None:
    case = linear_regression()
    method = HMC(num_chains=4, num_warmup=100, num_steps=5, thin=2, init="module")
    bank = fit(case.model, case.data, method=method, num_samples=1000, seed=3, out=tmp_path / "bank")
    columns = {name: by_chain(column, 4) for name, column in Bank.open(tmp_path / "bank").columns.items()}
    assert set(columns) == {"acceptance", "divergent", "step_size", "energy"}
    assert 0 < float(columns["acceptance"].min()) < float(columns["acceptance"].max()) <= 1
    assert 0.7 < float(columns["acceptance"].mean()) < 0.95
    assert not columns["divergent"].any()
    step_size = columns["step_size"]  # [C, D]
    assert bool((step_size == step_size[:, :1]).all() & (step_size > 0).all())
    # E = -log pi + kinetic energy, half a chi-square of P degrees of freedom; log pi is the log joint here.
    kinetic_energy = columns["energy"] + by_chain(bank.log_joint, 4)
    assert within(kinetic_energy, 2.5) < 4
    assert within((kinetic_energy - 2.5).square(), 2.5) < 4


def test_divergences_are_counted_and_warned_of() -> None:
    case = linear_regression()
    method = HMC(num_chains=3, num_warmup=0, num_steps=8, step_size=50.0, thin=2)
    with pytest.warns(UserWarning, match=r"HMC: chains 0, 1, 2 accepted 0.00 .*, 24 of 24 trajectories diverged"):
        found = list(method.run(case.model, case.data, num_samples=12, seed=0))
    kept = [block for block, _ in found if block.num_samples]
    assert [block.columns["divergent"].tolist() for block in kept] == [[2.0] * 3] * 4
    assert [block.columns["acceptance"].tolist() for block in kept] == [[0.0] * 3] * 4
    assert found[-1][1]["info"]["divergences"] == 24
    assert found[-1][1]["info"]["acceptance"] == 0.0


@pytest.mark.parametrize(("num_trajectories", "slow"), [(3, False), (4, True)])
def test_a_chain_is_called_slow_only_after_enough_trajectories(num_trajectories: int, slow: bool) -> None:
    case = linear_regression()
    method = HMC(num_chains=2, num_warmup=0, num_steps=2, step_size=3.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        *_, (_, state) = method.run(case.model, case.data, num_samples=2 * num_trajectories, seed=0)
    assert state["info"]["acceptance"] < 0.1
    assert any("chains 0, 1 accepted 0.0" in str(warning.message) for warning in caught) == slow


def test_a_higher_target_is_accepted_more_often() -> None:
    model, data = classifier()
    found = []
    for target in (0.6, 0.95):
        method = HMC(num_chains=4, num_warmup=100, num_steps=5, target_accept=target, init="map")
        states = [state for _, state in method.run(model, data, num_samples=200, seed=0)]
        found.append(states[-1]["info"]["acceptance"])
        assert states[-1]["info"]["divergences"] == 0
    assert 0.5 < found[0] < found[1] - 0.05


@pytest.mark.parametrize("mass", ["unit", "diagonal", "low-rank"])
def test_the_mass_that_is_learnt(mass: Any) -> None:
    case = linear_regression()
    method = HMC(num_chains=4, num_warmup=150, num_steps=5, mass=mass, rank=2, init="prior")
    *_, (_, state) = method.run(case.model, case.data, num_samples=4, seed=0)
    spread, found = case.covariance.diagonal().sqrt().float(), Metric(*(state[f"metric.{n}"] for n in Metric._fields))
    if mass == "unit":
        assert torch.equal(found.scale, case.model.prior_scale())
    elif mass == "diagonal":
        torch.testing.assert_close(found.scale, spread, rtol=0.3, atol=0)
    assert (found.directions.shape[1] > 0) == (mass == "low-rank")


def test_eight_chains_hold_the_same_draws_as_two_of_them() -> None:
    """Randomness is keyed by (seed, chain, step): with the step size fixed, chains do not know of each other."""
    model, data = classifier()
    options: dict[str, Any] = {"num_warmup": 0, "num_steps": 3, "step_size": 0.02, "dtype": "float64", "init": "prior"}
    eight = fit(model, data, method=HMC(num_chains=8, **options), num_samples=40, seed=5)
    two = fit(model, data, method=HMC(num_chains=2, **options), num_samples=10, seed=5)
    torch.testing.assert_close(flattened(model, eight, 8)[:2], flattened(model, two, 2), rtol=1e-6, atol=1e-6)


def test_a_run_changes_nothing_outside(world_untouched: None) -> None:
    model, (x, y) = classifier()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    rows = x.clone()
    fit(model, (x, y), method=HMC(num_chains=2, num_warmup=10, num_steps=2, dtype="float64"), num_samples=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert torch.equal(x, rows)
    assert all(parameter.grad is None for parameter in model.module.parameters())


# What is refused, and what a run that fails leaves behind.


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_chains": 0}, r"HMC\(num_chains=\): want at least 1, got 0"),
        ({"num_chains": 2.0}, r"HMC\(num_chains=\): want a whole number"),
        ({"num_warmup": -1}, r"HMC\(num_warmup=\)"),
        ({"num_steps": 0}, r"HMC\(num_steps=\)"),
        ({"thin": 0}, r"HMC\(thin=\)"),
        ({"rank": 0}, r"HMC\(rank=\)"),
        ({"memory": 0}, r"HMC\(memory=\)"),
        ({"target_accept": 1.0}, r"HMC\(target_accept=\): want a number in \(0, 1\)"),
        ({"target_accept": 0.0}, r"HMC\(target_accept=\)"),
        ({"step_size": 0.0}, r"HMC\(step_size=\)"),
        ({"step_size": float("inf")}, r"HMC\(step_size=\)"),
        ({"trajectory": "nuts"}, r"HMC\(trajectory=\): want one of auto, fixed, jittered, chees, got 'nuts'"),
        ({"mass": "dense"}, r"HMC\(mass=\): want one of diagonal, low-rank, unit, got 'dense'"),
        ({"dtype": "float16"}, r"HMC\(dtype=\): want one of float32, float64, got 'float16'"),
        ({"init": "mode"}, r"HMC\(init=\): want one of prior, ensemble, module, map, got 'mode'"),
        ({"init": 3}, r"HMC\(init=\): want one of prior, ensemble, module, map, or a bank, got 3"),
        ({"compile": 1}, r"HMC\(compile=\)"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        HMC(**options)
    assert "\n" not in str(caught.value)


def test_samples_that_the_chains_cannot_share_are_refused() -> None:
    model, data = classifier()
    with pytest.raises(ConfigError, match="a multiple of num_chains = 4, got 10; pass 8 or 12"):
        fit(model, data, method=HMC(num_chains=4), num_samples=10)


def test_a_log_joint_that_is_not_finite_at_the_start_is_an_error(tmp_path: Path) -> None:
    model, data = undefined_classifier()
    with pytest.raises(FitError, match="a finite log density and gradient at the start, got nan in chain 0"):
        fit(model, data, method=HMC(num_chains=2), num_samples=2, out=tmp_path / "bank")


class Bottomless(priors.LogNormal):
    """A prior without a bound: infinite above `LIMIT`."""

    LIMIT = 2.0

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > self.LIMIT, torch.inf, super().log_prob(value))


def kept_rows(path: Path, num_chains: int) -> Tensor:
    """Rows of a bank whose fit failed: whole draws, all of them finite, [C, D, P]."""
    bank = Bank.open(path, verify="full")
    assert len(bank) > 0
    assert len(bank) % num_chains == 0
    values = bank.layout.flatten(bank.block(slice(None)).params)
    assert bool(values.isfinite().all() & bank.log_joint.isfinite().all())
    return by_chain(values, num_chains)


def test_rows_before_an_infinite_log_joint_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.bank.writer.ROW_SECONDS", 0.0)  # each draw is committed as it comes
    model = BayesianModel(
        nn.Linear(1, 1),
        prior=priors.Normal(),
        likelihood=likelihoods.Gaussian(Bottomless(0.0, 0.5)),
        num_data=1,
    )
    data = torch.zeros(1, 1), torch.zeros(1, 1)
    method = HMC(num_chains=3, num_warmup=0, num_steps=3, step_size=0.3, init="module")
    with pytest.raises(FitError, match=r"a log density below infinity, got inf in chain \d at draw \d+; ") as caught:
        fit(model, data, method=method, num_samples=600, out=tmp_path / "bank")
    rows = kept_rows(tmp_path / "bank", 3)
    failed = int(str(caught.value).split(" at draw ")[1].split(";")[0])
    assert failed - 1 <= rows.shape[1] <= failed
    with pytest.raises(FitError) as again:
        fit(model, data, method=method, num_samples=600, out=tmp_path / "bank", resume=True)
    assert str(again.value) == str(caught.value)


def test_rows_before_all_chains_stand_still_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.bank.writer.ROW_SECONDS", 0.0)
    monkeypatch.setattr(chains, "STUCK", 20)
    calls = 0

    def refusing(density: Any, at: Any, noise: Tensor, uniform: Tensor, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return transition(density, at, noise, uniform if calls <= 15 else uniform + 1.0, *rest)

    monkeypatch.setattr(chains, "transition", refusing)
    case = linear_regression()
    method = HMC(num_chains=3, num_warmup=10, num_steps=2, step_size=0.1, init="module")
    with pytest.raises(FitError, match="every chain standing still for 20 trajectories, up to draw 24"):
        fit(case.model, case.data, method=method, num_samples=900, out=tmp_path / "bank")
    rows = kept_rows(tmp_path / "bank", 3)
    assert rows.shape[1] == 24
    assert torch.equal(rows[:, 5:], rows[:, 4:5].expand(3, 19, 5))  # five draws, and where they ended
    assert len(rows[1].unique(dim=0)) > 1


# The dynamics, on a target without symmetry, in float64.

METRICS = {
    "diagonal": diagonal(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)),
    "low-rank": Metric(
        torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64),
        torch.linalg.qr(torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 1.0]], dtype=torch.float64)).Q,
        torch.tensor([4.0, 0.3], dtype=torch.float64),
    ),
}


def target(flat: Tensor) -> Values:
    """log pi(u) = -sum u^4 / 4 - (u_0 - u_1 u_2)^2 / 2 + sum sin u."""

    def one(u: Tensor) -> Tensor:
        return -0.25 * (u**4).sum() - 0.5 * (u[0] - u[1] * u[2]).square() + u.sin().sum()

    gradient, value = torch.func.vmap(torch.func.grad_and_value(one))(flat)
    return Values(value, value, gradient)


def position(flat: Tensor) -> Position:
    return Position(flat, *target(flat))


def steps(size: float, num_chains: int) -> Tensor:
    """The same step size for each chain, [C]."""
    return torch.full((num_chains,), size, dtype=torch.float64)


def start_of(num_chains: int) -> tuple[Tensor, Tensor]:
    """Positions and momenta [C, 3]."""
    both = torch.randn(2, num_chains, 3, generator=generator(0, "start"), dtype=torch.float64)
    return both[0], both[1]


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_leapfrog_is_reversible_to_rounding(metric: Metric) -> None:
    flat, momentum = start_of(4)
    new, end = trajectory(target, position(flat), momentum, metric, steps(0.05, 4), 40)
    assert float((new.flat - flat).abs().min(dim=0).values.max()) > 0.01
    back, start = trajectory(target, new, -end, metric, steps(0.05, 4), 40)
    torch.testing.assert_close(back.flat, flat, rtol=0, atol=1e-13)
    torch.testing.assert_close(-start, momentum, rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_leapfrog_preserves_volume(metric: Metric) -> None:
    """The determinant of the Jacobian of (u, p) -> (u', p') is 1, though the map is far from the identity."""

    def flow(both: Tensor) -> Tensor:
        flat, momentum = both.view(2, 1, 3)
        new, end = trajectory(target, position(flat), momentum, metric, steps(0.1, 1), 7)
        return torch.cat([new.flat[0], end[0]])

    for flat, momentum in zip(*start_of(4), strict=True):
        jacobian = torch.func.jacrev(flow)(torch.cat([flat, momentum]))  # [2 P, 2 P]
        assert float((jacobian - torch.eye(6)).abs().max()) > 0.3
        assert float(torch.linalg.det(jacobian)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_energy_errors_are_of_second_order_in_the_step(metric: Metric) -> None:
    flat, momentum = start_of(4)
    at = position(flat)
    before, errors = kinetic(metric, momentum) - at.log_density, []
    for step_size, num_steps in ((0.02, 50), (0.01, 100), (0.005, 200)):
        new, end = trajectory(target, at, momentum, metric, steps(step_size, 4), num_steps)
        errors.append(kinetic(metric, end) - new.log_density - before)  # [C]
    for long, short in ((errors[0], errors[1]), (errors[1], errors[2])):
        torch.testing.assert_close(long / short, torch.full((4,), 4.0, dtype=torch.float64), rtol=0.1, atol=0)
