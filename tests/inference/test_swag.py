"""SWAG against a list of models kept along the same path, and its draws against the covariance that they should have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scenarios import classifier, effective_sample_size, linear_regression
from torch import Tensor

from bnn.batches import minibatches
from bnn.errors import ConfigError, FitError
from bnn.fitting import fit
from bnn.inference.swag import SWAG, Moments, collect, draw, no_models
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Data, State

SMALL: dict[str, Any] = {"num_steps": 60, "batch_size": 7, "num_models": 9, "rank": 4, "collect_every": 11}


def states_of(method: SWAG, model: BayesianModel, data: Data, **how: Any) -> list[State]:
    return [state for _, state in method.run(model, data, **{"num_samples": 1, "seed": 3, **how})]


def draws_of(method: SWAG, model: BayesianModel, data: Data, num_samples: int, seed: int = 3) -> Tensor:
    """Samples in unconstrained space, [S, P]."""
    bank = fit(model, data, method=method, num_samples=num_samples, seed=seed)
    return model.unconstrain(bank.block(slice(None)).params)


def models_of(method: SWAG, model: BayesianModel, data: Data, begin: Tensor, every: int) -> list[Tensor]:
    """The models that torch's SGD on the mean loss meets, in the plainest way."""
    place = torch.nn.Parameter(begin.clone())
    optimizer = torch.optim.SGD([place], lr=method.swag_lr, momentum=method.momentum)
    batches = minibatches(data, method.batch_size, seed=3, start=method.num_steps)
    rows = model.num_data / math.ceil(model.num_data / method.batch_size)
    found = []
    for step in range(1, method.num_models * every + 1):
        batch = next(batches)
        optimizer.zero_grad()
        log_density, _ = model.log_density(place, batch, weight=len(batch.y) / rows)
        (-log_density * model.temperature / model.num_data).backward()
        optimizer.step()
        if step % every == 0:
            found.append(place.detach().clone())
    return found


def expected_moments(models: list[Tensor], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [P], variances [P] and deviations [K, P] of a list of models."""
    stack = torch.stack(models).double()
    deviations = [stack[i] - stack[: i + 1].mean(dim=0) for i in range(1, len(stack))]
    return stack.mean(dim=0), stack.var(dim=0, correction=0), torch.stack(deviations[-rank:])


@pytest.mark.parametrize(
    ("options", "temperature", "columns"),
    [({}, 1.0, 4), ({"rank": 20, "momentum": 0.0, "swag_lr": 0.3}, 0.5, 8), ({"collect_every": None}, 1.0, 4)],
    ids=["some columns", "all columns", "epochs"],
)
def test_moments_are_those_of_the_models_on_the_path(options: Any, temperature: float, columns: int) -> None:
    plain, data = classifier()
    model = BayesianModel(
        plain.module, prior=plain.prior, likelihood=plain.likelihood, num_data=23, temperature=temperature
    )
    method = SWAG(**{**SMALL, **options})
    states = states_of(method, model, data)
    (climbed,) = [state["climb.flat"][0] for state in states if state["step"] == 60]
    every = method.collect_every or 4  # batches of 7, 7, 7 and 2 rows
    assert states[-1]["num_steps"] == states[-1]["step"] == 60 + 9 * every + 1
    models = models_of(method, model, data, climbed, every)
    mean, variances, deviations = expected_moments(models, method.rank)
    found = states[-1]
    assert found["moments.num_models"] == 9
    torch.testing.assert_close(found["moments.mean"].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["moments.squares"].double() / 9, variances, rtol=1e-3, atol=1e-7)
    assert found["moments.deviations"].shape == (columns, 43)
    torch.testing.assert_close(found["moments.deviations"].double(), deviations, rtol=1e-3, atol=1e-5)
    # The values that SGD began at do not count as a model.
    with_start, _, _ = expected_moments([climbed, *models], method.rank)
    assert float((with_start - mean).abs().max()) > 1e-3


def test_moments_survive_a_mean_that_is_large_beside_the_spread() -> None:
    """Means of squares less squares of means would be noise here: 1000^2 has steps of 0.06 in float32."""
    models = 1000 + 0.01 * torch.randn(50, 6, generator=generator(0))
    moments = no_models(models[0])
    for number, model in enumerate(models, start=1):
        moments = collect(moments, model, rank=5)
        assert moments.deviations.shape == (min(number - 1, 5), 6)
    mean, variances, deviations = expected_moments(list(models), 5)
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.squares.double() / 50, variances, rtol=0.02, atol=0)
    torch.testing.assert_close(moments.deviations.double(), deviations, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.5, 1.0), (1.0, 3.0)])
def test_draws_have_the_mean_and_covariance_of_the_moments(scale: float, temperature: float) -> None:
    """Noise times the variance, in the place of the standard deviation, is off by orders of magnitude here."""
    case = linear_regression()
    model = BayesianModel(
        case.model.module,
        prior=case.model.prior,
        likelihood=case.model.likelihood,
        num_data=30,
        temperature=temperature,
    )
    method = SWAG(**{**SMALL, "rank": 3, "scale": scale, "swag_lr": 0.005, "block_size": 1000})
    size = 20_000
    drawn = draws_of(method, model, case.data, size).double()
    state = states_of(method, model, case.data)[-1]
    mean, variances = state["moments.mean"].double(), state["moments.squares"].double() / 9
    deviations = state["moments.deviations"].double()  # [3, P]
    covariance = 0.5 * variances.diag() + 0.5 * deviations.T @ deviations / (3 - 1)
    covariance = scale**2 * temperature * covariance
    spread = covariance.diagonal()
    assert float(((drawn.mean(dim=0) - mean) / (spread / size).sqrt()).abs().max()) < 4
    errors = ((spread.unsqueeze(0) * spread.unsqueeze(1) + covariance.square()) / size).sqrt()
    assert float(((drawn.T.cov() - covariance) / errors).abs().max()) < 4


def test_one_draw_is_the_equation() -> None:
    moments = Moments(
        4,
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([8.0, 0.0, 32.0]),
        torch.tensor([[1.0, 0.0, 2.0], [0.0, 5.0, 0.0]]),
    )
    found = draw(moments, 2.0, torch.tensor([1.0, 1.0, -1.0, 3.0, 1.0]))
    # sqrt(variance / 2) = (1, 0, 2), and D z_2 / sqrt(2 (2 - 1)) = (3, 5, 6) / sqrt 2
    root = math.sqrt(2)
    expected = torch.tensor([1 + 2 * (1 + 3 / root), 2 + 2 * 5 / root, 3 + 2 * (-2 + 6 / root)])
    torch.testing.assert_close(found, expected)


def test_sgd_stays_around_the_mode_of_a_conjugate_posterior() -> None:
    """The loss is quadratic, so that the mean of SGD's stationary distribution is the mode."""
    case = linear_regression()
    method = SWAG(num_steps=500, lr=0.05, batch_size=9, swag_lr=0.005, num_models=160, collect_every=50, rank=2)
    states = states_of(method, case.model, case.data)
    path = [state["path.flat"] for state in states if state["step"] > 500][:160]  # a state a model
    models = torch.stack(path).double()
    torch.testing.assert_close(states[-1]["moments.mean"].double(), models.mean(dim=0), rtol=1e-4, atol=1e-5)
    for place in range(5):
        ess = effective_sample_size(models[:, place].unsqueeze(0))
        assert ess > 50
        error = float(models[:, place].std()) / math.sqrt(ess)
        assert abs(float(models[:, place].mean() - case.mean[place])) < 4 * error
        assert error < 0.02 * float(case.covariance[place, place].sqrt())


def test_the_temperature_scales_the_spread_and_leaves_the_path_alone() -> None:
    plain, data = classifier()
    found = []
    for temperature in (1.0, 0.25):
        model = BayesianModel(
            plain.module, prior=plain.prior, likelihood=plain.likelihood, num_data=23, temperature=temperature
        )
        mean = states_of(SWAG(**SMALL), model, data)[-1]["moments.mean"]
        found.append((mean, draws_of(SWAG(**SMALL), model, data, 3) - mean))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(0.5 * found[0][1], found[1][1], rtol=0.02, atol=1e-4)


def test_each_draw_is_another_and_does_not_depend_on_those_beside_it() -> None:
    model, data = classifier()
    whole = draws_of(SWAG(**SMALL), model, data, 13)
    assert len(whole.unique(dim=0)) == 13
    for size, block_size in ((13, 1), (13, 5), (6, 4)):
        assert torch.equal(draws_of(SWAG(**SMALL, block_size=block_size), model, data, size), whole[:size])
    assert torch.equal(draws_of(SWAG(**SMALL, scale=0.0), model, data, 2)[0], draws_of(
        SWAG(**SMALL, scale=0.0), model, data, 2)[1])  # fmt: skip


def test_seeds_leave_the_global_streams_alone(world_untouched: None) -> None:
    model, data = classifier()
    assert not torch.equal(
        draws_of(SWAG(**SMALL), model, data, 2, seed=0), draws_of(SWAG(**SMALL), model, data, 2, seed=1)
    )


def test_resume_from_every_state() -> None:
    model, data = classifier()
    method = SWAG(**SMALL, block_size=2)
    whole = list(method.run(model, data, num_samples=5, seed=3))
    expected = torch.cat([model.unconstrain(block.params) for block, _ in whole])
    assert len(whole) == 2 + 2 + 3  # slices of the climb and of SGD, blocks
    for place in range(len(whole) - 1):
        rest = list(method.run(model, data, num_samples=5, seed=3, state=whole[place][1]))
        assert len(rest) == len(whole) - place - 1
        found = torch.cat([model.unconstrain(block.params) for block, _ in [*whole[: place + 1], *rest]])
        assert torch.equal(found, expected)


def test_starts() -> None:
    """With steps too small to matter, the mean is where the climb began."""
    model, data = classifier()
    still: dict[str, Any] = {**SMALL, "num_steps": 1, "lr": 1e-9, "swag_lr": 1e-9}
    found = {start: states_of(SWAG(**still, start=start), model, data)[-1]["moments.mean"] for start in
             ("module", "reset", "prior")}  # fmt: skip
    torch.testing.assert_close(found["module"], model.unconstrain(model.module_params()), rtol=0, atol=1e-5)
    drawn = model.unconstrain(model.sample_prior(3, "start", 0))
    torch.testing.assert_close(found["prior"], drawn, rtol=0, atol=1e-5)
    assert float((found["reset"] - found["module"]).abs().max()) > 0.1


def test_a_rate_that_throws_sgd_out_of_the_mode_is_told() -> None:
    case = linear_regression()
    with pytest.raises(FitError, match=r"at step \d+; the last good one was .*; lower swag_lr \(it is 3\)"):
        states_of(SWAG(**SMALL, swag_lr=3.0), case.model, case.data)
    with pytest.raises(FitError, match=r"lower lr \(it is 1e\+30\)"):
        states_of(SWAG(**SMALL, lr=1e30), case.model, case.data)
    model, data = classifier()
    with pytest.warns(UserWarning, match=r"nats a row below the mode .* lower swag_lr \(it is 6\)"):
        states = states_of(SWAG(**SMALL, swag_lr=6.0), model, data)
    assert states[-1]["info"]["fall_per_row"] > 1 + 43 / 23
    assert abs(states_of(SWAG(**SMALL), model, data)[-1]["info"]["fall_per_row"]) < 0.5


def test_a_batch_of_all_rows_is_told() -> None:
    model, data = classifier()
    with pytest.warns(UserWarning, match="one batch holds all rows"):
        states_of(SWAG(**{**SMALL, "batch_size": 23}), model, data)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"batch_size": 0},
        {"num_models": 2},
        {"rank": 1},
        {"block_size": 0},
        {"collect_every": 0},
        {"lr": 0.0},
        {"swag_lr": -1.0},
        {"swag_lr": math.nan},
        {"momentum": 1.0},
        {"scale": -0.1},
        {"start": "here"},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=rf"SWAG\({name}=\)"):
        SWAG(**options)
