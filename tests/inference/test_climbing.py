"""What producers on minibatches share, against torch's Adam and sums over all rows."""

from __future__ import annotations

import copy
import math
from itertools import islice

import pytest
import torch
from scenarios import classifier
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from bnn import likelihoods, priors
from bnn.errors import DataError, FitError
from bnn.inference.climbing import (
    LAST_RATE,
    Climb,
    climb,
    require_finite,
    starts,
    weighted_batches,
)
from bnn.model import BayesianModel
from bnn.seeding import generator, isolated
from bnn.types import Batch


def test_climb_is_adam_with_a_rate_that_falls_exponentially() -> None:
    num_steps, lr = 37, 0.05
    source = generator(0, "adam")
    start = torch.randn(3, 5, generator=source).double()
    slopes = torch.randn(num_steps, 3, 5, generator=source).double() * torch.logspace(-3, 3, 5)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([theirs], lr=lr, maximize=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, LAST_RATE ** (1 / num_steps))
    at = Climb.of(start)
    for step, slope in enumerate(slopes):
        at = climb(at, slope, step=step, num_steps=num_steps, lr=lr)
        theirs.grad = slope.clone()
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(at.flat, theirs.detach(), rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * lr)


def test_climb_goes_on_from_what_was_saved_and_changes_nothing_in_place() -> None:
    slopes = torch.randn(6, 2, 3, generator=generator(1, "slopes"))
    seen = [Climb.of(torch.ones(2, 3))]
    for step, slope in enumerate(slopes):
        seen.append(climb(seen[-1], slope, step=step, num_steps=6, lr=0.1))
    state = {name: tensor.clone() for name, tensor in seen[2].save().items()}
    assert set(state) == {"climb.flat", "climb.mean", "climb.square"}
    again = Climb.load(state, torch.device("cpu"))
    for step in range(2, 6):
        again = climb(again, slopes[step], step=step, num_steps=6, lr=0.1)
    assert all(torch.equal(mine, whole) for mine, whole in zip(again, seen[-1], strict=True))
    assert torch.equal(seen[0].flat, torch.ones(2, 3))
    assert torch.equal(state["climb.mean"], seen[2].mean)


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader"])
def test_weighted_batches_of_an_epoch_average_to_the_log_joint_of_all_rows(form: str) -> None:
    model, (x, y) = classifier()
    model.module.double()
    model = BayesianModel(model.module, prior=model.prior, likelihood=model.likelihood, num_data=23)
    x = x.double()
    data = {
        "tensors": (x, y),
        "dataset": TensorDataset(x, y),
        "loader": DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
    }[form]
    found = list(islice(weighted_batches(model, data, 7, seed=2), 8))
    assert [len(batch.y) for batch, _ in found] == [7, 7, 7, 2] * 2
    assert [weight for _, weight in found] == pytest.approx([7 / 5.75, 7 / 5.75, 7 / 5.75, 2 / 5.75] * 2)
    params = model.module_params()
    whole = model.log_joint(params, Batch(x, y))
    for epoch in (found[:4], found[4:]):
        mean = sum(model.log_joint(params, batch, weight=weight) for batch, weight in epoch) / 4
        torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12)
    later = list(islice(weighted_batches(model, data, 7, seed=2, start=3), 5))
    assert all(torch.equal(a.x, b.x) for (a, _), (b, _) in zip(later, found[3:], strict=True))
    other = next(weighted_batches(model, data, 7, seed=3))[0]
    assert not torch.equal(other.x, found[0][0].x)


def test_weighted_batches_refuse_rows_that_do_not_fit() -> None:
    model, (x, y) = classifier()
    with pytest.raises(DataError, match="rows that the module"):
        next(weighted_batches(model, (x[:, :3], y), 7, seed=0))


class Attentive(nn.Module):
    """Layers two levels down, attention, a parametrised layer, and a parameter that nothing resets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.normed = parametrizations.weight_norm(nn.Linear(6, 3))
        self.shift = nn.Parameter(torch.full((3,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x).unsqueeze(1)
        return self.normed(self.attention(hidden, hidden, hidden)[0].squeeze(1)) + self.shift


def attentive(bayesian: str = "*") -> BayesianModel:
    with isolated(0, "attentive"):
        module = Attentive()
    likelihood = likelihoods.Gaussian(priors.HalfCauchy(1.0))
    return BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=9, bayesian=bayesian)


def test_starts_by_reset_are_new_in_every_layer_at_any_depth(world_untouched: None) -> None:
    model = attentive()
    module = copy.deepcopy(model.module.state_dict())
    params, _ = model.constrain(starts(model, "reset", 3, 7))
    assert all(torch.equal(module[name], tensor) for name, tensor in model.module.state_dict().items())
    random = {
        *("body.0.weight", "body.0.bias", "body.1.1.weight", "body.1.1.bias", "attention.in_proj_weight"),
        *("attention.out_proj.weight", "normed.bias", "normed.parametrizations.weight.original1"),
    }
    random.add("normed.parametrizations.weight.original0")
    for name, values in params.items():
        alike = [torch.equal(values[a], values[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
        assert alike == [name not in random] * 3, name
        if name in random:
            assert not any(torch.equal(row, module[name]) for row in values), name
    assert torch.equal(params["shift"], torch.full((3, 3), 0.25))
    assert torch.equal(params["body.1.0.weight"], torch.ones(3, 6))
    assert torch.equal(params["attention.out_proj.bias"], torch.zeros(3, 6))  # attention has the last word on it
    torch.testing.assert_close(params["@likelihood.scale"], torch.ones(3))


def test_starts_by_reset_have_the_spread_that_their_layer_gives() -> None:
    """torch draws the weights of a linear layer from U(-a, a) with a = 1 / sqrt(inputs)."""
    module = nn.Linear(16, 500)
    with torch.no_grad():
        module.weight.fill_(3.0)
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(), num_data=9)
    weights = model.constrain(starts(model, "reset", 2, 0))[0]["weight"]
    assert float(weights.abs().max()) <= 0.25
    # The variance of U(-a, a) is a^2 / 3; that of a square (4 / 45) a^4, here of 16,000.
    error = math.sqrt(4 / 45 * 0.25**4 / weights.numel())
    assert abs(float(weights.square().mean()) - 0.25**2 / 3) < 4 * error


def test_a_parametrisation_without_an_inverse_keeps_its_values() -> None:
    class Softplus(nn.Module):
        def forward(self, raw: Tensor) -> Tensor:
            return nn.functional.softplus(raw)

    module = nn.Linear(4, 2)
    nn.utils.parametrize.register_parametrization(module, "weight", Softplus())
    model = BayesianModel(module, prior=priors.Normal(), likelihood=likelihoods.Gaussian(), num_data=9)
    params, _ = model.constrain(starts(model, "reset", 2, 0))
    raw = module.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.equal(params["parametrizations.weight.original"], torch.stack([raw.detach()] * 2))
    assert not torch.equal(params["bias"][0], params["bias"][1])


@pytest.mark.parametrize("start", ["reset", "prior"])
def test_a_start_depends_on_seed_and_number_alone(start: str, world_untouched: None) -> None:
    model = attentive()
    five = starts(model, start, 5, 7)  # type: ignore[arg-type]
    with isolated(12, "another global state"):
        assert torch.equal(starts(model, start, 2, 7), five[:2])  # type: ignore[arg-type]
    assert torch.equal(starts(model, start, 2, 7, first=3), five[3:])  # type: ignore[arg-type]
    assert not torch.equal(starts(model, start, 5, 8), five)  # type: ignore[arg-type]


def test_starts_by_the_prior_are_its_draws() -> None:
    model = attentive()
    params, _ = model.constrain(starts(model, "prior", 2, 7))
    for index in range(2):
        expected = model.sample_prior(7, "start", index)
        assert all(torch.allclose(params[name][index], value) for name, value in expected.items())


def test_starts_at_the_module_are_its_values() -> None:
    model = attentive()
    flat = starts(model, "module", 3, 7)
    own = dict(model.module.named_parameters())
    for name, values in model.constrain(flat)[0].items():
        expected = own[name].detach() if name in own else torch.ones(())
        assert torch.equal(values, torch.stack([expected] * 3)), name


def test_starts_of_some_parameters_only() -> None:
    model = attentive(bayesian="body.1")
    params, _ = model.constrain(starts(model, "reset", 2, 7))
    assert list(params) == ["body.1.0.weight", "body.1.0.bias", "body.1.1.weight", "body.1.1.bias", "@likelihood.scale"]
    assert not torch.equal(params["body.1.1.weight"][0], params["body.1.1.weight"][1])


def test_what_is_not_finite_is_refused_by_its_step() -> None:
    """Of three steps of two positions, from number 4 on."""
    good, flat = torch.tensor([[-1.0, -3.0], [-2.0, -6.0], [0.0, 0.0]]), torch.zeros(2, 5)
    require_finite("Here", good, flat, start=4, last_good=None, lr=0.1)
    bad = good.clone()
    bad[1:, 1] = torch.nan
    with pytest.raises(FitError, match=r"Here: .* at step 5; the last good one was -2; lower lr \(it is 0\.1\), or"):
        require_finite("Here", bad, flat, start=4, last_good=-12.5, lr=0.1)
    bad[0, 0] = -torch.inf
    with pytest.raises(FitError, match=r"at step 4; the last good one was -12\.5; lower rate \(it is 0\.1\)"):
        require_finite("Here", bad, flat, start=4, last_good=-12.5, lr=0.1, option="rate")
    with pytest.raises(FitError, match=r"at step 4; none before it; "):
        require_finite("Here", bad, flat, start=4, last_good=None, lr=0.1)
    with pytest.raises(FitError, match=r"at step 6; the last good one was -4; "):
        require_finite("Here", good, torch.full((2, 5), -torch.inf), start=4, last_good=None, lr=0.1)
