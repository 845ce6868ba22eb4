"""Targets and modules with known answers, shared by the tests."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnn.likelihoods import Categorical, Gaussian
from bnn.model import BayesianModel
from bnn.modules import build
from bnn.priors import FanIn, Normal
from bnn.seeding import generator


class LinearRegression(NamedTuple):
    """Bayesian linear regression with known noise: its posterior is a normal in closed form.

    theta = (w, b) ~ N(0, prior^2), y ~ N(w x + b, noise^2)
    cov = (X^T X / noise^2 + I / prior^2)^-1, mean = cov X^T y / noise^2
    """

    model: BayesianModel
    data: tuple[Tensor, Tensor]
    mean: Tensor  # [P], weights then bias
    covariance: Tensor  # [P, P]
    log_evidence: float


def linear_regression(
    num_rows: int = 30, num_inputs: int = 4, noise: float = 0.5, prior: float = 1.5
) -> LinearRegression:
    source = generator(3, "linear regression")
    # Correlated inputs of unlike scales give a posterior far from a sphere, which would hide errors of scale.
    x = torch.randn(num_rows, num_inputs, generator=source)
    x = (x + 0.6 * x.roll(1, dims=1)) * torch.linspace(0.5, 1.5, num_inputs)
    truth = torch.randn(num_inputs, generator=source)
    y = x @ truth + 0.7 + noise * torch.randn(num_rows, generator=source)
    design = torch.cat([x, torch.ones(num_rows, 1)], dim=1).double()
    size = num_inputs + 1
    precision = design.T @ design / noise**2 + torch.eye(size, dtype=torch.float64) / prior**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ design.T @ y.double() / noise**2
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(num_rows, dtype=torch.float64),
        prior**2 * design @ design.T + noise**2 * torch.eye(num_rows, dtype=torch.float64),
    )
    module = nn.Linear(num_inputs, 1)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    model = BayesianModel(module, prior=Normal(0.0, prior), likelihood=Gaussian(noise), num_data=num_rows)
    return LinearRegression(model, (x, y.unsqueeze(1)), mean, covariance, float(marginal.log_prob(y.double())))


def classifier(num_rows: int = 23, width: int = 5) -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """A small MLP on three classes; B, C and the widths all differ."""
    source = generator(1, "classifier")
    x = torch.randn(num_rows, 4, generator=source)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    module = build(f"mlp:{width}", input_shape=[4], num_outputs=3, seed=0)
    model = BayesianModel(module, prior=FanIn(1.5), likelihood=Categorical(), num_data=num_rows)
    return model, (x, y)


class Undefined(nn.Module):
    """Outputs of NaN, whatever the processor: what sums of huge numbers come to hangs on its instructions."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.nan


def undefined_classifier() -> tuple[BayesianModel, tuple[Tensor, Tensor]]:
    """`classifier` with a log joint that is NaN everywhere."""
    model, data = classifier()
    module = nn.Sequential(model.module, Undefined())
    return BayesianModel(module, prior=FanIn(1.5), likelihood=Categorical(), num_data=len(data[1])), data


def effective_sample_size(chains: Tensor) -> float:
    """ESS of draws [C, D] by the initial positive sequence over chains, for tolerances.

    Source: Geyer (1992), section 3.3, with autocovariances averaged over chains.
    """
    num_chains, num_draws = chains.shape
    centred = chains.double() - chains.double().mean()
    size = 2 ** math.ceil(math.log2(2 * num_draws))
    spectrum = torch.fft.rfft(centred, n=size)
    covariance = torch.fft.irfft(spectrum * spectrum.conj(), n=size)[:, :num_draws].mean(dim=0) / num_draws
    rho = covariance / covariance[0]
    pairs = rho[: num_draws // 2 * 2].view(-1, 2).sum(dim=1)
    stop = int((pairs <= 0).nonzero()[0]) if bool((pairs <= 0).any()) else len(pairs)
    time = max(2 * float(pairs[:stop].sum()) - 1, 1 / math.log10(num_chains * num_draws))
    return num_chains * num_draws / time
