"""The posterior predictive distribution, streamed over the samples of a bank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.functional import FunctionalModel
from bnn.likelihoods import Gaussian, Likelihood, as_columns, likelihood_from_config
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
    scales: Tensor  # [S, 1, 1], or [S, 1, C] where targets have units of their own
    log_weight: Tensor  # [S] normalised

    @property
    def mean(self) -> Tensor:
        """Predictive mean [B, C]."""
        return (self.log_weight.exp()[:, None, None] * self.means).sum(dim=0)

    @property
    def aleatoric(self) -> Tensor:
        """Expected noise variance [B, C]."""
        variances = self.scales.square().expand_as(self.means)
        return (self.log_weight.exp()[:, None, None] * variances).sum(dim=0)

    @property
    def epistemic(self) -> Tensor:
        """Variance of the samples' means [B, C]."""
        return (self.log_weight.exp()[:, None, None] * (self.means - self.mean).square()).sum(dim=0)


def predict(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> ClassPredictive | NormalPredictive:
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
        `ClassPredictive` or `NormalPredictive`.

    Raises:
        DataError: a sample gives NaN or Inf; its index is named.
        ConfigError: neither the bank nor the caller names a likelihood; a prior shift for a regression.
    """
    loc, scale = torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ConfigError(
            "predict(scale=)", want="positive numbers", got=str(scale.tolist()), fix="pass the target's spread"
        )
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if not len(net.bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    if isinstance(likelihood, Gaussian):
        if prior_shift is not None:
            raise ConfigError("prior_shift", want="none for a regression", got="some", fix="leave it out")
        return _normal(net, x, likelihood, loc, scale)
    return _classes(net, x, prior_shift)


@torch.no_grad()
def _classes(net: FunctionalModel, x: Any, shift: tuple[Any, Any] | None) -> ClassPredictive:
    log_probs = expected_entropy = expected_log_prob = torch.zeros(())
    for start, log_weight, _, outputs in _outputs(net, x):
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
def _normal(net: FunctionalModel, x: Any, likelihood: Gaussian, loc: Tensor, scale: Tensor) -> NormalPredictive:
    means, scales, weights = [], [], []
    for _, log_weight, block, outputs in _outputs(net, x):
        if outputs.dim() not in (2, 3):
            raise _shape("[B] or [B, C]", outputs)
        means.append(torch.stack([as_columns(one) for one in outputs]).double().cpu() * scale + loc)  # [K, B, C]
        noise = likelihood.scale_of(block.params).double().cpu().expand(block.num_samples)
        scales.append(noise[:, None, None] * scale)  # [K, 1, 1]
        weights.append(log_weight.cpu())
    return NormalPredictive(torch.cat(means), torch.cat(scales), torch.cat(weights))


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
