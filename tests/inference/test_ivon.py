"""IVON against the best factorised normal in closed form, and its adapter against the equations written out."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from scenarios import classifier, linear_regression
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference.climbing import weighted_batches
from bnn.inference.gradients import gradient_of
from bnn.inference.ivon import IVON, Fitted, optimise, spread
from bnn.model import BayesianModel
from bnn.seeding import generator, isolated
from bnn.types import Batch, Data, State

SMALL: dict[str, Any] = {"num_steps": 110, "batch_size": 7}


class Conjugate(NamedTuple):
    """A linear regression with its posterior at temperature T: precision / T about the same mean."""

    model: BayesianModel
    data: tuple[Tensor, Tensor]
    mean: Tensor  # [P]
    precision: Tensor  # [P, P]


def conjugate(noise: float, loc: float, prior: float, temperature: float) -> Conjugate:
    plain = linear_regression(noise=noise)
    x, y = plain.data
    design = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    weight = torch.eye(5, dtype=torch.float64) / prior**2
    precision = design.T @ design / noise**2 + weight
    mean = torch.linalg.solve(
        precision, design.T @ y[:, 0].double() / noise**2 + weight @ torch.full_like(weight[0], loc)
    )
    model = BayesianModel(
        plain.model.module,
        prior=priors.Normal(loc, prior),
        likelihood=likelihoods.Gaussian(noise),
        num_data=len(x),
        temperature=temperature,
    )
    return Conjugate(model, plain.data, mean, precision / temperature)


def last_state(method: IVON, model: BayesianModel, data: Data, **how: Any) -> State:
    return [state for _, state in method.run(model, data, **{"num_samples": 1, "seed": 3, **how})][-1]


def draws_of(method: IVON, model: BayesianModel, data: Data, num_samples: int, seed: int = 3) -> Tensor:
    """Samples in unconstrained space, [S, P]."""
    bank = fit(model, data, method=method, num_samples=num_samples, seed=seed)
    return model.unconstrain(bank.block(slice(None)).params)


def errors_of(case: Conjugate, method: IVON) -> tuple[Tensor, Tensor, Tensor]:
    """Of q: the error of log s, s being 1 / variance, its standard error, and that of the mean in deviations, [P] each.

    At the optimum a draw's estimate of s, relative to it, is the prior's share and z_i (g_i + sum_j r_ij z_j): r is
    the likelihood's part of the precision over the square roots of the diagonal of all of it, and g the slope of the
    likelihood there, which the pull of the weight decay, mean / (T scale^2), holds in balance. So its variance is
    g_i^2 + r_ii^2 + sum_j r_ij^2. log s is a walk of steps (1 - beta2) times that, pulled back at the rate 1 - beta2.
    """
    state = last_state(method, case.model, case.data)
    at = Fitted(*(state[name] for name in Fitted._fields))
    scale = case.model.prior_scale().double()
    expected = case.precision.diagonal().rsqrt()
    share = case.precision - (1 / (case.model.temperature * scale.square())).diag()
    share = share * expected.unsqueeze(0) * expected.unsqueeze(1)  # [P, P]
    slopes = case.mean / (case.model.temperature * scale.square()) * expected  # [P]
    variances = (slopes.square() + share.diagonal().square() + share.square().sum(dim=1)) / method.mc_samples
    logs = -2 * (scale * spread(at, case.model).double() / expected).log()
    return logs, ((1 - method.beta2) / 2 * variances).sqrt(), (scale * at.mean.double() - case.mean) / expected


CASES = [(0.5, 0.0, 1.5, 1.0), (2.0, 0.0, 0.2, 0.5), (2.0, -0.4, 0.2, 2.0)]
NAMES = ["much data", "cold, strong prior", "warm, strong prior off zero"]


@pytest.mark.parametrize(("noise", "loc", "prior", "temperature"), CASES, ids=NAMES)
def test_q_is_the_best_factorised_normal(noise: float, loc: float, prior: float, temperature: float) -> None:
    """Its mean is that of the posterior and its precisions are the diagonal of the posterior's precision.

    A strong prior is about half of the precision here, so that to count it twice or not at all would be seen.
    """
    case = conjugate(noise, loc, prior, temperature)
    share = 1 / (temperature * prior**2 * case.precision.diagonal())
    assert float(share.max()) < 0.05 if noise == 0.5 else float(share.min()) > 0.4
    logs, errors, mean = errors_of(case, IVON(num_steps=3000, batch_size=30, beta2=0.997))
    assert float(errors.max()) < 0.1  # so that the check below can see half or twice the precision
    assert float((logs / errors).abs().max()) < 4
    # The rate falls to 0, so that the noise of single steps is averaged out of the mean.
    assert float(mean.abs().max()) < 0.1


@pytest.mark.slow
def test_a_longer_run_with_slower_averages_comes_nearer_to_it() -> None:
    case = conjugate(*CASES[0])
    logs, errors, mean = errors_of(case, IVON(num_steps=8000, batch_size=30, beta2=0.9993))
    assert float(errors.max()) < 0.03
    assert float((logs / errors).abs().max()) < 4
    assert float(mean.abs().max()) < 0.05


def by_hand(
    options: IVON, model: BayesianModel, at: Fitted, batches: list[tuple[Batch, float]]
) -> tuple[Fitted, list[Tensor]]:
    """Algorithm 1 of the paper on the mean negative log likelihood and prior, less the part of the weight decay."""
    size, decay = model.num_data, 1 / model.num_data
    mean, momentum, hess = at
    scale, ess, heights = model.prior_scale(), size / model.temperature, []
    for step, (batch, weight) in enumerate(batches):
        slopes, curvatures = [], []
        for _ in range(options.mc_samples):
            noise = torch.randn(len(mean)) / (ess * (hess + decay)).sqrt()
            v = (mean + noise).requires_grad_()
            log_density, _ = model.log_density(scale * v, batch, weight=weight)
            loss = -log_density * model.temperature / size - decay * v.square().sum() / 2
            (slope,) = torch.autograd.grad(loss, v)
            slopes.append(slope)
            curvatures.append(slope * noise * ess * (hess + decay))
            heights.append(log_density.detach())
        slope, curvature = torch.stack(slopes).mean(dim=0), torch.stack(curvatures).mean(dim=0)
        momentum = options.beta1 * momentum + (1 - options.beta1) * slope
        step_of_hess = (1 - options.beta2) * (curvature - hess)
        hess = hess + step_of_hess + 0.5 * step_of_hess.square() / (hess + decay)
        rate = options.lr * (options.hess_init + decay) * (1 + math.cos(math.pi * step / options.num_steps)) / 2
        mean = mean - rate * (momentum / (1 - options.beta1 ** (step + 1)) + decay * mean) / (hess + decay)
    return Fitted(mean, momentum, hess), heights


@pytest.mark.parametrize(("temperature", "mc_samples"), [(1.0, 1), (0.5, 3)])
def test_the_adapter_is_the_algorithm_written_out(temperature: float, mc_samples: int) -> None:
    """With a prior that is not standard, and batches of which the last is short."""
    plain, data = classifier()
    model = BayesianModel(
        plain.module, prior=priors.Normal(0.3, 0.7), likelihood=plain.likelihood, num_data=23, temperature=temperature
    )
    options = IVON(num_steps=9, batch_size=7, mc_samples=mc_samples, beta1=0.8, beta2=0.97, hess_init=0.5, lr=0.3)
    flat = torch.randn(43, generator=generator(0))
    at = Fitted(flat, torch.zeros(43), torch.full((43,), 0.5))
    stream = weighted_batches(model, data, 7, seed=3)
    batches = [next(stream) for _ in range(9)]
    assert {round(weight, 3) for _, weight in batches} == {1.217, 0.348}
    with isolated(0, "test"):
        found, heights = optimise(options, model, gradient_of(model), at, iter(batches), range(9))
    with isolated(0, "test"):
        expected, expected_heights = by_hand(options, model, at, batches)
    assert float((expected.mean - flat).abs().max()) > 0.01
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(heights, torch.stack(expected_heights), rtol=1e-4, atol=1e-3)


def test_starts() -> None:
    """With steps too small to matter, the mean is where the run began."""
    model, data = classifier()
    found = {}
    for start in ("module", "reset", "prior"):
        state = last_state(IVON(num_steps=1, batch_size=7, lr=1e-9, start=start), model, data)  # type: ignore[arg-type]
        found[start] = state["mean"] * model.prior_scale()
    torch.testing.assert_close(found["module"], model.unconstrain(model.module_params()), rtol=0, atol=1e-5)
    torch.testing.assert_close(found["prior"], model.unconstrain(model.sample_prior(3, "start", 0)), rtol=0, atol=1e-5)
    assert float((found["reset"] - found["module"]).abs().max()) > 0.1


def test_a_finished_run_grows_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = classifier()
    state = last_state(IVON(**SMALL), model, data)
    monkeypatch.setitem(sys.modules, "ivon", None)
    ((block, _),) = IVON(**SMALL).run(model, data, num_samples=4, seed=3, state=state)
    assert block.draw.tolist() == [1, 2, 3]


def test_the_rate_falls_to_zero() -> None:
    model, data = classifier()
    states = [state for _, state in IVON(num_steps=500, batch_size=7).run(model, data, num_samples=1, seed=3)]
    assert [state["step"] for state in states[:3]] == [50, 100, 150]
    means = [state["mean"] for state in states]
    first, last = (float((a - b).norm()) for a, b in ((means[1], means[0]), (means[9], means[8])))
    assert last < 0.1 * first


def test_draws_have_the_moments_of_q() -> None:
    model, data = classifier()
    wide = BayesianModel(model.module, prior=priors.Normal(0.0, 0.7), likelihood=model.likelihood, num_data=23)
    size = 4000
    drawn = draws_of(IVON(**SMALL, block_size=500), wide, data, size).double()
    state = last_state(IVON(**SMALL), wide, data)
    at = Fitted(*(state[name] for name in Fitted._fields))
    mean, deviations = 0.7 * at.mean.double(), 0.7 * (23 * at.hess.double() + 1).rsqrt()
    # The largest of 43 standard normals is beyond 4.5 once in 3,000 times.
    assert float(((drawn.mean(dim=0) - mean) / deviations).abs().max()) * math.sqrt(size) < 4.5
    assert float(((drawn - mean) / deviations).square().mean(dim=0).sub(1).abs().max()) < 4.5 * math.sqrt(2 / size)
    correlation = (drawn.T.corrcoef() - torch.eye(43)).abs().max()
    assert float(correlation) < 5 / math.sqrt(size)


def test_each_draw_is_another_and_does_not_depend_on_those_beside_it(world_untouched: None) -> None:
    model, data = classifier()
    whole = draws_of(IVON(**SMALL), model, data, 13)
    assert len(whole.unique(dim=0)) == 13
    for size, block_size in ((13, 1), (13, 5), (6, 4)):
        assert torch.equal(draws_of(IVON(**SMALL, block_size=block_size), model, data, size), whole[:size])
    assert not torch.equal(draws_of(IVON(**SMALL), model, data, 2, seed=4), whole[:2])


def test_resume_from_every_state() -> None:
    model, data = classifier()
    method = IVON(**SMALL, block_size=2)
    whole = list(method.run(model, data, num_samples=5, seed=3))
    expected = torch.cat([model.unconstrain(block.params) for block, _ in whole])
    assert len(whole) == 3 + 3  # slices of the optimisation, blocks
    for place in range(len(whole) - 1):
        rest = list(method.run(model, data, num_samples=5, seed=3, state=whole[place][1]))
        found = torch.cat([model.unconstrain(block.params) for block, _ in [*whole[: place + 1], *rest]])
        assert torch.equal(found, expected)


def test_the_bound_is_that_of_q() -> None:
    """E_q[log pi] + entropy: at the optimum of a conjugate model both are known.

    E_q[log pi] - log pi(mean) = -P / 2 for the best factorised normal.
    """
    case = conjugate(*CASES[0])
    info = last_state(IVON(num_steps=1500, batch_size=30), case.model, case.data)["info"]
    batch = Batch(*case.data)
    mode = float(case.model.log_density(case.mean.float(), batch)[1])
    entropy = 0.5 * float((2 * math.pi * math.e / case.precision.diagonal()).log().sum())
    # The last slice is a mean of 50 draws, each of which spreads by sqrt(P / 2 or more), and q is not at its best.
    assert info["elbo_per_row"] * 30 == pytest.approx(mode - 2.5 + entropy, abs=1.5)
    assert info["log_density"] == pytest.approx(mode - 2.5, abs=1.5)


CALLS: list[int] = []


class Breaking(nn.Module):
    """A layer whose forward raises at its 70th call, counted outside of it since copies are what is run."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        if len(CALLS) == 55:  # in a step that runs by a trace, which is held against this
            raise OSError("the cable was pulled")
        found: Tensor = self.inner(x)
        return found


def test_a_forward_that_raises_leaves_the_module_as_it_was(world_untouched: None) -> None:
    """The optimiser alone would leave a draw in the parameters: its context restores them only on success."""
    _, data = classifier()
    with isolated(0, "module"):
        module = Breaking()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Categorical(), num_data=23)
    CALLS.clear()
    run = IVON(**SMALL).run(model, data, num_samples=1, seed=3)
    assert next(run)[1]["step"] == 50
    with pytest.raises(OSError, match="the cable was pulled"):
        next(run)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_without_the_package_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = classifier()
    monkeypatch.setitem(sys.modules, "ivon", None)
    with pytest.raises(ConfigError, match=r'want the package ivon-opt, .*; pip install "bnn-toolkit\[ivon\]"'):
        last_state(IVON(), model, data)


def test_the_package_is_loaded_by_a_run_alone() -> None:
    code = "import sys, bnn.inference.ivon; sys.exit('ivon' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_broken_upstream_is_not_offered() -> None:
    """`sync` with `hess_approx="gradsq"` reduces a tensor that is None."""
    assert not {"sync", "hess_approx"} & {field.name for field in dataclasses.fields(IVON)}


def test_a_run_that_diverges_is_told() -> None:
    model, data = classifier()
    with pytest.raises(FitError, match=r"IVON: want a finite log density .* lower lr \(it is 1e\+30\)"):
        last_state(IVON(**SMALL, lr=1e30), model, data)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"batch_size": 0},
        {"mc_samples": 0},
        {"block_size": 0},
        {"lr": 0.0},
        {"hess_init": -1.0},
        {"hess_init": math.nan},
        {"beta1": 1.0},
        {"beta2": 1.0},
        {"start": "here"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"IVON\({name}=\)"):
        IVON(**options)
