"""The posterior predictive distribution, streamed over the samples of a bank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.functional import FunctionalModel
from bnn.likelihoods import (
    Bernoulli,
    Gaussian,
    HeteroscedasticGaussian,
    Likelihood,
    Poisson,
    StudentT,
    likelihood_from_config,
    poisson_log_prob,
    student_t_log_prob,
)
from bnn.metrics import mixture_cdf, mixture_log_prob
from bnn.types import Block
from bnn.uncertainty import entropy, prior_shift

OUTPUT_VALUES = 8_000_000  # outputs of one block held at once, K * B * C
SAMPLE_BYTES = 64 * 1024 * 1024  # samples of one block, which are copied where they lie in two shards


class ClassPredictive(NamedTuple):
    """Mean predictive over classes, and the split of its entropy; in nats, float64."""

    log_probs: Tensor  # [B, C] log sum_s w_s p_s
    expected_entropy: Tensor  # [B] sum_s w_s H[p_s], the aleatoric part
    expected_log_prob: Tensor  # [B, C] sum_s w_s log p_s, for the Gibbs loss

    @property
    def probs(self) -> Tensor:
        """Mean class probabilities [B, C]."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty H[sum_s w_s p_s], [B]."""
        return entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty [B], total minus expected entropy."""
        return (self.entropy - self.expected_entropy).clamp_min(0)  # rounding can leave -1e-17


class NormalPredictive(NamedTuple):
    """A mixture of S normals a row and output, in units of the target, float64."""

    means: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1], [S, 1, C] where targets have units of their own, or [S, B, C] where noise varies
    log_weight: Tensor  # [S] normalised

    @property
    def mean(self) -> Tensor:
        """Predictive mean [B, C]."""
        return _average(self.means, self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected noise variance [B, C]."""
        return _average(self.scales.square().expand_as(self.means), self.log_weight)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' means [B, C]."""
        return _average((self.means - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of targets [B, C], summed over outputs inside a sample, [B]."""
        return mixture_log_prob(self.means, self.scales, y, self.log_weight)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]."""
        return mixture_cdf(self.means, self.scales, y, self.log_weight)


class StudentTPredictive(NamedTuple):
    """A mixture of S Student's t a row and output, in units of the target, float64."""

    locs: Tensor  # [S, B, C]
    scales: Tensor  # [S, 1, 1] or [S, 1, C]
    log_weight: Tensor  # [S] normalised
    df: float

    @property
    def mean(self) -> Tensor:
        """Predictive mean [B, C]; of df up to 1, where there is none, the mean of the centres."""
        return _average(self.locs, self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected noise variance [B, C]: df / (df - 2) scale^2, infinite for df up to 2."""
        factor = self.df / (self.df - 2.0) if self.df > 2.0 else math.inf
        return factor * _average(self.scales.square().expand_as(self.locs), self.log_weight)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' centres [B, C]."""
        return _average((self.locs - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of targets [B, C], summed over outputs inside a sample, [B]."""
        each = student_t_log_prob(y, self.locs, self.scales, self.df).sum(dim=-1)  # [S, B]
        return torch.logsumexp(each + self.log_weight.unsqueeze(1), dim=0)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each target, [B, C]; needs SciPy."""
        from scipy.special import stdtr

        z = ((y - self.locs) / self.scales).numpy()
        return _average(torch.from_numpy(stdtr(self.df, z)), self.log_weight)


class PoissonPredictive(NamedTuple):
    """A mixture of S Poisson distributions a row and output, float64."""

    log_rates: Tensor  # [S, B, C]
    log_weight: Tensor  # [S] normalised

    @property
    def mean(self) -> Tensor:
        """Expected count [B, C]."""
        return _average(self.log_rates.exp(), self.log_weight)

    @property
    def aleatoric(self) -> Tensor:
        """Expected variance of the counts given a sample, which is their expected rate, [B, C]."""
        return self.mean

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' rates [B, C]."""
        return _average((self.log_rates.exp() - self.mean).square(), self.log_weight)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log probability of counts [B, C], summed over outputs inside a sample, [B]."""
        each = poisson_log_prob(y, self.log_rates).sum(dim=-1)  # [S, B]
        return torch.logsumexp(each + self.log_weight.unsqueeze(1), dim=0)

    def cdf(self, y: Tensor) -> Tensor:
        """P(Y <= y) of each count, [B, C]; 0 below 0."""
        counts = y.double().floor().expand_as(self.log_rates)
        below = torch.special.gammaincc(counts.clamp_min(0) + 1.0, self.log_rates.exp())
        return _average(torch.where(counts < 0, torch.zeros_like(below), below), self.log_weight)


TargetPredictive: TypeAlias = NormalPredictive | StudentTPredictive | PoissonPredictive
"""The predictive of a regression: `mean`, `aleatoric` and `epistemic` variance, `log_prob` and `cdf`."""


def predict(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> ClassPredictive | TargetPredictive:
    """Predictive distribution of one batch under all samples of a bank.

    Probabilities are averaged, with the bank's weights, not logits. Samples are taken block by block:
    classification needs memory for B * C numbers whatever S is, regression for the S means a row
    that its scores are made of.

    Args:
        net: a module under a bank.
        x: inputs of B rows.
        likelihood: what outputs mean; the one that the bank was made with by default.
        prior_shift: shares of the classes [C] in training and where predictions are made: each sample's
            probabilities are corrected before they are averaged, see `uncertainty.prior_shift`.
        loc: added to predicted targets after scaling: the mean the targets were standardised with, or
            one a target [C].
        scale: their standard deviation, so that predictions are in the target's own units.

    Returns:
        `ClassPredictive` for `Categorical` and `Bernoulli`, `NormalPredictive` for the Gaussian likelihoods,
        `StudentTPredictive` or `PoissonPredictive`.

    Raises:
        DataError: a sample gives NaN or Inf; its index is named.
        ConfigError: neither the bank nor the caller names a likelihood; a prior shift for a regression;
            other units for counts.
    """
    loc, scale = torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ConfigError(
            "predict(scale=)", want="positive numbers", got=str(scale.tolist()), fix="pass the target's spread"
        )
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if not len(net.bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    if likelihood.task == "classification":
        return _classes(net, x, likelihood, prior_shift)
    if prior_shift is not None:
        raise ConfigError("prior_shift", want="none for a regression", got="some", fix="leave it out")
    return _targets(net, x, likelihood, loc, scale)


@torch.no_grad()
def _classes(net: FunctionalModel, x: Any, likelihood: Likelihood, shift: tuple[Any, Any] | None) -> ClassPredictive:
    log_probs = expected_entropy = expected_log_prob = torch.zeros(())
    for start, log_weight, _, outputs in _outputs(net, x):
        if isinstance(likelihood, Bernoulli):
            outputs = outputs.unsqueeze(-1) if outputs.dim() == 2 else outputs
            if outputs.dim() != 3 or outputs.shape[-1] != 1:
                raise _shape("[B] or [B, 1], the logit", outputs)
            outputs = likelihood.class_logits(outputs)
        if outputs.dim() != 3:
            raise _shape("[B, C], one output a class", outputs)
        each = outputs.double().log_softmax(dim=-1)  # [K, B, C]
        if shift is not None:
            each = prior_shift(each, train=shift[0], natural=shift[1])
        weight = log_weight.exp()[:, None, None]
        mixed = torch.logsumexp(each + log_weight[:, None, None], dim=0)  # [B, C]
        log_probs = mixed if start == 0 else torch.logaddexp(log_probs, mixed)
        expected_entropy = expected_entropy + (weight[:, 0] * entropy(each.exp())).sum(dim=0)  # [B]
        expected_log_prob = expected_log_prob + (weight * each).sum(dim=0)
    return ClassPredictive(log_probs.cpu(), expected_entropy.cpu(), expected_log_prob.cpu())


@torch.no_grad()
def _targets(net: FunctionalModel, x: Any, likelihood: Likelihood, loc: Tensor, scale: Tensor) -> TargetPredictive:
    if isinstance(likelihood, Poisson) and not (bool((loc == 0).all()) and bool((scale == 1).all())):
        raise ConfigError(
            "predict(loc=, scale=)", want="0 and 1 for counts", got="others", fix="fit counts without standardising"
        )
    places, scales, weights = [], [], []
    for _, log_weight, block, outputs in _outputs(net, x):
        if outputs.dim() not in (2, 3):
            raise _shape("[B] or [B, C]", outputs)
        columns = (outputs.unsqueeze(-1) if outputs.dim() == 2 else outputs).double()  # [K, B, C]
        noise = torch.ones(block.num_samples, 1, 1)
        if isinstance(likelihood, HeteroscedasticGaussian):
            if columns.shape[-1] % 2 or not columns.shape[-1]:
                raise _shape("[B, 2 C], the means and then their noise", outputs)
            columns, noise = likelihood.split(columns)
        elif isinstance(likelihood, Gaussian | StudentT):
            noise = likelihood.scale_of(block.params).expand(block.num_samples)[:, None, None]  # [K, 1, 1]
        places.append(columns.cpu() * scale + loc)
        scales.append(noise.double().cpu() * scale)
        weights.append(log_weight.cpu())
    at, spread, weight = torch.cat(places), torch.cat(scales), torch.cat(weights)
    if isinstance(likelihood, Poisson):
        return PoissonPredictive(at, weight)
    if isinstance(likelihood, StudentT):
        return StudentTPredictive(at, spread, weight, likelihood.df)
    return NormalPredictive(at, spread, weight)


def _average(values: Tensor, log_weight: Tensor) -> Tensor:
    """sum_s w_s values_s, [S, B, C] -> [B, C]."""
    return (log_weight.exp()[:, None, None] * values).sum(dim=0)


def _shape(want: str, outputs: Tensor) -> DataError:
    return DataError(
        "module", want=f"outputs {want}", got=str(list(outputs.shape[1:])), fix="reshape them in the module's forward"
    )


def _outputs(net: FunctionalModel, x: Any) -> Iterator[tuple[int, Tensor, Block, Tensor]]:
    """First index, normalised log weights [K], block and outputs [K, B, ...] of the whole bank, in order."""
    log_weight = net.bank.log_weight.log_softmax(dim=0).to(net.device)
    size = 1
    start = 0
    while start < len(net.bank):
        block = net.bank.block(slice(start, start + size))
        outputs = net.apply(block, x)
        if not isinstance(outputs, Tensor):
            raise DataError(
                "module",
                want="one tensor of outputs",
                got=type(outputs).__name__,
                fix="wrap the module so that it returns its logits or means",
            )
        if not torch.isfinite(outputs).all():
            bad = int((~torch.isfinite(outputs.flatten(1))).any(dim=1).nonzero()[0]) + start
            raise DataError(
                f"sample {bad}", want="finite outputs", got="NaN or Inf", fix="check the inputs, or drop the sample"
            )
        yield start, log_weight[start : start + size], block, outputs
        start += size
        # The first block of one sample shows how large its outputs are.
        by_outputs = OUTPUT_VALUES // max(math.prod(outputs.shape[1:]), 1)
        size = max(1, min(64, by_outputs, SAMPLE_BYTES // net.bank.layout.num_bytes))
