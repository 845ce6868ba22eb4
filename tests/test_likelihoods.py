"""Likelihoods: densities against torch.distributions, shapes that must not broadcast, round trips."""

from __future__ import annotations

import pytest
import torch

from bnn.errors import ConfigError, DataError
from bnn.likelihoods import SCALE, Categorical, Gaussian, likelihood_from_config
from bnn.priors import HalfCauchy, LogNormal
from bnn.seeding import generator


def test_categorical_is_the_log_softmax_at_the_target() -> None:
    logits = 3 * torch.randn(7, 4, generator=generator(0))
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    expected = torch.distributions.Categorical(logits=logits).log_prob(y)
    torch.testing.assert_close(Categorical().log_prob(logits, y, {}), expected)


def test_gaussian_sums_over_outputs() -> None:
    mean, y = (torch.randn(7, 2, generator=generator(i)) for i in range(2))
    expected = torch.distributions.Normal(mean, 0.3).log_prob(y).sum(dim=1)
    torch.testing.assert_close(Gaussian(0.3).log_prob(mean, y, {}), expected)


def test_gaussian_with_learnt_scale_takes_it_from_the_sample() -> None:
    mean, y = (torch.randn(7, 2, generator=generator(i)) for i in range(2))
    learnt = Gaussian(HalfCauchy(1.0)).log_prob(mean, y, {SCALE: torch.tensor(0.3)})
    torch.testing.assert_close(learnt, Gaussian(0.3).log_prob(mean, y, {}))


def test_columns_and_vectors_do_not_broadcast_against_each_other() -> None:
    mean, y = torch.randn(7, 1, generator=generator(0)), torch.randn(7, generator=generator(1))
    assert Gaussian(1.0).log_prob(mean, y, {}).shape == (7,)
    torch.testing.assert_close(Gaussian(1.0).log_prob(mean, y, {}), Gaussian(1.0).log_prob(mean[:, 0], y, {}))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y"),
    [
        (Gaussian(1.0), torch.zeros(7, 2), torch.zeros(7)),
        (Gaussian(1.0), torch.zeros(7, 2), torch.zeros(7, 3)),
        (Categorical(), torch.zeros(7, 4), torch.zeros(7)),
        (Categorical(), torch.zeros(7), torch.zeros(7, dtype=torch.int64)),
        (Categorical(), torch.zeros(7, 4), torch.zeros(6, dtype=torch.int64)),
    ],
)
def test_targets_that_do_not_fit_are_refused(
    likelihood: Gaussian | Categorical, outputs: torch.Tensor, y: torch.Tensor
) -> None:
    with pytest.raises(DataError, match="want"):
        likelihood.log_prob(outputs, y, {})


@pytest.mark.parametrize(
    "likelihood", [Categorical(), Gaussian(0.3), Gaussian(HalfCauchy(2.0)), Gaussian(LogNormal(0.1, 0.4))]
)
def test_config_round_trip(likelihood: Gaussian | Categorical) -> None:
    assert likelihood_from_config(likelihood.to_config()) == likelihood


@pytest.mark.parametrize("config", [None, {}, {"name": "Weibull"}])
def test_a_bank_without_a_known_likelihood_says_so(config: dict | None) -> None:
    with pytest.raises(ConfigError, match="pass likelihood="):
        likelihood_from_config(config)
