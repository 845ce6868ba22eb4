"""Priors: densities against torch.distributions, scales by glob and fan-in, draws."""

from __future__ import annotations

import math

import pytest
import torch

from bnn import priors
from bnn.errors import ConfigError
from bnn.layout import Entry
from bnn.priors import FanIn, HalfCauchy, LogNormal, Normal
from bnn.seeding import generator

ENTRIES = (
    Entry("fc.weight", (5, 4), torch.float32),
    Entry("fc.bias", (5,), torch.float32),
    Entry("conv.weight", (6, 3, 2, 2), torch.float64),
)


@pytest.mark.parametrize("prior", [Normal(0.3, 0.7), Normal(0.0, {"*.bias": 0.1, "*": 2.0}), FanIn(3.0, 0.5)])
def test_log_prob_is_that_of_independent_normals(prior: priors.Prior) -> None:
    params = priors.sample(prior, ENTRIES, generator(0))
    expected = sum(
        torch.distributions.Normal(prior.place(e).loc, prior.place(e).scale).log_prob(params[e.name].double()).sum()
        for e in ENTRIES
    )
    torch.testing.assert_close(priors.log_prob(prior, ENTRIES, params).double(), expected, rtol=1e-6, atol=1e-4)


def test_fan_in_is_the_number_of_inputs_of_an_output() -> None:
    prior = FanIn(3.0, 0.5)
    assert [prior.place(e).scale for e in ENTRIES] == [3.0 / 2.0, 0.5, 3.0 / math.sqrt(12)]


def test_draws_have_the_moments_of_the_prior() -> None:
    entry = Entry("w", (400, 100), torch.float32)
    drawn = priors.sample(Normal(0.5, 2.0), [entry], generator(1))["w"].double()
    count = drawn.numel()
    assert abs(float(drawn.mean()) - 0.5) < 4 * 2.0 / math.sqrt(count)
    assert abs(float(drawn.var()) - 4.0) < 4 * 4.0 * math.sqrt(2 / count)


def test_the_first_matching_pattern_counts() -> None:
    prior = Normal(0.0, {"fc.*": 0.1, "*.weight": 0.2, "*": 0.3})
    assert [prior.place(e).scale for e in ENTRIES] == [0.1, 0.1, 0.2]


def test_uncovered_entries_and_idle_patterns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a pattern for 'conv\.weight'"):
        Normal(0.0, {"fc.*": 0.1}).check(ENTRIES)
    with pytest.raises(ConfigError, match=r"'head\.\*', which matches none"):
        Normal(0.0, {"head.*": 0.1, "*": 1.0}).check(ENTRIES)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan, "1"])
def test_scales_must_be_positive(scale: float) -> None:
    for make in (Normal, FanIn, HalfCauchy, LogNormal):
        with pytest.raises(ConfigError, match="a positive number"):
            make(scale=scale)


def test_half_cauchy_and_log_normal_densities() -> None:
    s = torch.tensor([0.01, 0.5, 3.0, 40.0], dtype=torch.float64)
    expected = torch.distributions.HalfCauchy(torch.tensor(0.7, dtype=torch.float64)).log_prob(s)
    torch.testing.assert_close(HalfCauchy(0.7).log_prob(s), expected)
    expected = torch.distributions.LogNormal(torch.tensor(0.3, dtype=torch.float64), 0.8).log_prob(s)
    torch.testing.assert_close(LogNormal(0.3, 0.8).log_prob(s), expected)


@pytest.mark.parametrize(("prior", "median"), [(HalfCauchy(0.7), 0.7), (LogNormal(0.3, 0.8), math.exp(0.3))])
def test_positive_draws_have_their_median(prior: priors.PositivePrior, median: float) -> None:
    source = generator(2)
    drawn = torch.stack([prior.sample(source) for _ in range(4000)])
    share = float((drawn < median).double().mean())
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert bool((drawn > 0).all())
