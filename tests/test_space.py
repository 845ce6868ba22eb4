"""The log prior at a position, as one vector, against the sum over entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bnn import likelihoods, priors
from bnn.inference.costs import record
from bnn.model import BayesianModel
from bnn.priors import FanIn, HalfCauchy, Laplace, Normal, ScaleMixture, StudentT
from bnn.seeding import generator, isolated
from bnn.types import Batch

PRIORS: dict[str, Any] = {
    "normal": Normal(0.3, 0.7),
    "by glob": Normal(0.0, {"*.bias": 0.1, "3": 3.0, "*": 1.5}),
    "laplace": Laplace(-0.2, 1.3),
    "student": StudentT(3.0, 0.4, 0.8),
    "mixture": ScaleMixture(0.3, 0.05),
    "fan-in": FanIn(0.8, 0.4),
    "heavy fan-in": FanIn(1.2, 0.5, StudentT(2.5)),
}


def model_of(prior: Any, dtype: torch.dtype = torch.float32, depth: int = 1, noise: Any = 0.5) -> BayesianModel:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]
    with isolated(0):
        module = nn.Sequential(nn.Linear(3, 4), *hidden, nn.Linear(4, 2)).to(dtype)
    return BayesianModel(module, prior=prior, likelihood=likelihoods.Gaussian(noise), num_data=7)


def at(model: BayesianModel, flat: torch.Tensor) -> torch.Tensor:
    return model.space.log_prior_at(flat, model.constrain(flat)[0])


@pytest.mark.parametrize("noise", [0.5, HalfCauchy(0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRIORS)
def test_as_one_vector_it_is_the_sum_over_entries(name: str, dtype: torch.dtype, noise: Any) -> None:
    model = model_of(PRIORS[name], dtype, noise=noise)
    flat = 0.8 * torch.randn(model.layout.num_values, generator=generator(1, name), dtype=dtype)
    params = model.constrain(flat)[0]
    one, several = at(model, flat), model.log_prior(params)
    assert one.dtype == torch.float64
    # Divided by a scale in float32, or by it in float64 and rounded: a last digit of each value may differ.
    torch.testing.assert_close(one, several.double(), rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    slope = torch.func.grad(lambda u: at(model, u))(flat)
    expected = torch.func.grad(lambda u: model.log_prior(model.constrain(u)[0]))(flat)
    torch.testing.assert_close(slope, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_its_operations_do_not_grow_with_the_entries() -> None:
    counts = []
    for depth in (1, 5):
        model = model_of(FanIn(), depth=depth)
        flat = torch.randn(model.layout.num_values, generator=generator(2))
        params = model.constrain(flat)[0]
        counts.append(len(record(lambda u, m=model, p=params: m.space.log_prior_at(u, p), [flat])))  # type: ignore[misc]
    assert counts[0] == counts[1] < 10


@pytest.mark.parametrize("kind", ["another dtype", "half precision", "unknown scale", "too many values", "one vector"])
def test_where_values_are_no_one_vector_it_is_the_sum_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnn.space.FEW", 45 if kind == "too many values" else 46)
    prior = Normal(0.1, HalfCauchy(0.4)) if kind == "unknown scale" else Normal(0.1, 0.4)
    model = model_of(prior, torch.bfloat16 if kind == "half precision" else torch.float32)
    assert model.layout.num_values - len(model.unknowns) == 46
    dtype = torch.float64 if kind == "another dtype" else torch.float32
    flat = torch.randn(model.layout.num_values, generator=generator(3), dtype=dtype)
    params = model.constrain(flat)[0]
    asked: list[Any] = []
    monkeypatch.setattr(type(model.space), "log_prior", lambda self, params: asked.append(params) or torch.tensor(3.0))
    found = model.space.log_prior_at(flat, params)
    assert (asked == [params] and float(found) == 3.0) if kind != "one vector" else not asked


def test_a_class_with_a_prior_of_its_own_has_it_at_positions_too() -> None:
    class Own(BayesianModel):
        def log_prior(self, params: Any) -> torch.Tensor:
            return super().log_prior(params) - 300.0

    plain = model_of(Normal())
    own = Own(plain.module, prior=Normal(), likelihood=plain.likelihood, num_data=7)
    batch = Batch(torch.randn(7, 3, generator=generator(5)), torch.randn(7, 2, generator=generator(6)))
    flat = torch.randn(plain.layout.num_values, generator=generator(7))
    for found, expected in zip(own.log_density(flat, batch), plain.log_density(flat, batch), strict=True):
        torch.testing.assert_close(found, expected - 300.0)


def test_a_prior_of_unlike_families_is_summed_by_entry() -> None:
    class Mixed:
        def place(self, entry: Any) -> priors.Place:
            family = Normal() if entry.name.endswith("weight") else Laplace()
            return priors.Place(family, 0.0, 1.0)

        def check(self, entries: Any) -> None:
            del entries

        def to_config(self) -> dict[str, Any]:
            return {"name": "Mixed"}

    model = model_of(Mixed())
    flat = torch.randn(model.layout.num_values, generator=generator(4))
    assert torch.equal(at(model, flat), model.log_prior(model.constrain(flat)[0]))
