"""Simulation-based calibration: where data come from the prior's own parameters, these rank like one more draw.

theta ~ p(theta), y ~ p(y | theta), theta_1..L ~ p(theta | y)  =>  #{l: f(theta_l) < f(theta)} is uniform on 0..L

Source: Talts et al. (2018), arXiv:1804.06788; of the log joint among the functions f, Modrak et al. (2023),
arXiv:2211.02383.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnn import likelihoods, priors
from bnn.inference.hmc import sample
from bnn.model import BayesianModel
from bnn.seeding import generator
from bnn.types import Batch

pytestmark = pytest.mark.slow

REPLICATIONS, ROWS = 200, 15
DRAWS, THIN, BINS = 31, 5, 8  # ranks 0 to 31, four of them a bin; 25 replications are expected in each
FAMILY_LEVEL = 1e-4  # chance that a right sampler fails on any of the functions

INPUTS = torch.randn(ROWS, 2, generator=generator(0, "inputs"))
PROBES = torch.tensor([[0.0, 0.0], [1.5, -0.5], [-3.0, 2.0]])

LogDensity = Callable[[Tensor, Tensor], Tensor]


def network(noise: float = -0.5) -> BayesianModel:
    """2-3-1 with tanh, standard normal weights, and a noise scale with log s ~ N(noise, 0.3^2)."""
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    likelihood = likelihoods.Gaussian(priors.LogNormal(noise, 0.3))
    return BayesianModel(module, prior=priors.Normal(), likelihood=likelihood, num_data=ROWS)


MODEL, NOISIER = network(), network(noise=-0.5 + 0.262)


def log_density(flat: Tensor, y: Tensor) -> Tensor:
    return MODEL.log_density(flat, Batch(INPUTS, y))[0]


def simulated(number: int) -> tuple[Tensor, Tensor]:
    """Parameters of a replication, drawn from the prior, and the data that they make: u [P], y [N, 1]."""
    params = MODEL.sample_prior(0, "truth", number)
    y = MODEL.likelihood.sample(MODEL.forward(params, INPUTS), params, generator(0, "data", number))
    return MODEL.unconstrain(params), y


def functions(flat: Tensor, y: Tensor) -> Tensor:
    """What is ranked of one sample u [P], none of which knows the order or sign of hidden units: [F]."""
    params, _ = MODEL.constrain(flat)
    outputs = MODEL.forward(params, PROBES).squeeze(1)  # three probes
    log_likelihood = MODEL.log_likelihood(params, Batch(INPUTS, y))
    log_joint = log_likelihood + MODEL.log_prior(params)
    return torch.cat([outputs.double(), torch.stack([flat[-1].double(), log_likelihood, log_joint])])


def p_values(density: LogDensity) -> Tensor:
    """Chi-square p-values of uniform ranks, one a function [F]: 200 replications as chains of one run."""
    truths, data = (torch.stack(parts) for parts in zip(*map(simulated, range(REPLICATIONS)), strict=True))
    # Starts know nothing of the truths; under much noise no density is so steep that a chain could not leave.
    starts = torch.stack([MODEL.unconstrain(MODEL.sample_prior(0, "start", n)) for n in range(REPLICATIONS)])
    starts[:, -1] = 1.0
    found = sample(
        density,
        starts,  # [C, P]
        context=data,  # [C, N, 1]
        num_draws=DRAWS,
        num_warmup=200,
        thin=THIN,
        trajectory="jittered",
        num_steps=16,
        target_accept=0.95,
        compile=False,
        seed=1,
    )
    at_draws = torch.func.vmap(torch.func.vmap(functions, in_dims=(0, None)))(found.draws, data)  # [C, L, F]
    at_truths = torch.func.vmap(functions)(truths, data)  # [C, F]
    ranks = (at_draws < at_truths.unsqueeze(1)).sum(dim=1)  # [C, F]
    bins = ranks * BINS // (DRAWS + 1)
    counts = torch.stack([(bins == number).sum(dim=0) for number in range(BINS)]).double()  # [BINS, F]
    expected = REPLICATIONS / BINS
    statistic = (counts - expected).square().sum(dim=0) / expected  # [F]
    found_p: Tensor = torch.special.gammaincc(torch.tensor((BINS - 1) / 2).double(), statistic / 2)
    return found_p


def test_truths_rank_like_draws_of_their_posterior() -> None:
    found = p_values(log_density)
    assert float(found.min()) > FAMILY_LEVEL / len(found), found.tolist()


def noisier(flat: Tensor, y: Tensor) -> Tensor:
    """A prior whose noise scale is 30 % larger."""
    return NOISIER.log_density(flat, Batch(INPUTS, y))[0]


def tempered(flat: Tensor, y: Tensor) -> Tensor:
    """A likelihood to the power 0.8."""
    return MODEL.log_density(flat, Batch(INPUTS, y), weight=0.8)[0]


@pytest.mark.parametrize("wrong", [noisier, tempered])
def test_a_wrong_density_is_found_out(wrong: LogDensity) -> None:
    found = p_values(wrong)
    assert float(found.min()) < FAMILY_LEVEL / len(found), found.tolist()
