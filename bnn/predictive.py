"""The posterior predictive distribution, streamed over the samples of a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bnn.batches import finite
from bnn.distributed import ALONE, Ranks
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
)
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, StudentTMixture, quantile
from bnn.posthoc import Calibration, ClassSets, Interval
from bnn.softmax import log_softmax
from bnn.spread import Spread
from bnn.turns import by_all, in_turn
from bnn.types import Block
from bnn.uncertainty import entropy, prior_shift

BATCH_SIZE = 512  # rows of a data set at once


class ClassPredictive(NamedTuple):
    """Mean predictive over classes, and the split of its entropy; in nats, float64."""

    log_probs: Tensor  # [N, C] log sum_s w_s p_s
    expected_entropy: Tensor  # [N] sum_s w_s H[p_s], the aleatoric part
    expected_log_prob: Tensor  # [N, C] sum_s w_s log p_s, for the Gibbs loss
    variance: Tensor  # [N, C] of the samples' probabilities
    samples_used: Tensor  # int64 [N]
    standard_error: Tensor  # [N, C] of the mean, from drawing so many samples; NaN with one
    quantiles: dict[float, Tensor] = {}  # level -> [N, C], of the samples' probabilities  # noqa: RUF012
    outputs: Tensor | None = None  # [S, N, C] of the module
    calibrated: ClassSets | None = None  # where a calibration was asked for: then `log_probs` are tempered

    @property
    def probs(self) -> Tensor:
        """Mean class probabilities [N, C]."""
        return self.log_probs.exp()

    @property
    def mean(self) -> Tensor:
        """The same: the mean predictive [N, C]."""
        return self.probs

    @property
    def entropy(self) -> Tensor:
        """Total uncertainty H[sum_s w_s p_s], [N]."""
        return entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """Epistemic uncertainty [N], total minus expected entropy; both of the mixture, before any temperature."""
        total = self.entropy if self.calibrated is None else self.calibrated.mixture_entropy
        return (total - self.expected_entropy).clamp_min(0)  # rounding can leave -1e-17


class TargetPredictive(NamedTuple):
    """Mean and variances of the predictive of a regression, in units of the target, float64."""

    mean: Tensor  # [N, C]
    aleatoric: Tensor  # [N, C] expected noise variance
    epistemic: Tensor  # [N, C] variance of the samples' means
    samples_used: Tensor  # int64 [N]
    standard_error: Tensor  # [N, C] of the mean, from drawing so many samples; NaN with one
    quantiles: dict[float, Tensor]  # level -> [N, C], of the predictive
    outputs: Tensor | None  # [S, N, C] of the module
    calibrated: Interval | None = None  # where a calibration was asked for

    @property
    def variance(self) -> Tensor:
        """Total variance [N, C]."""
        return self.aleatoric + self.epistemic


Predictive: TypeAlias = ClassPredictive | TargetPredictive


class _Asked(NamedTuple):
    """What is wanted of a predictive."""

    likelihood: Likelihood
    shift: tuple[Any, Any] | None
    loc: Tensor
    scale: Tensor
    quantiles: tuple[float, ...]
    outputs: bool
    tolerance: float | None


def predict(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    quantiles: Sequence[float] = (),
    outputs: bool = False,
    tolerance: float | None = None,
    calibration: Calibration | None = None,
    ranks: Ranks = ALONE,
    mesh: tuple[int, int] | None = None,
    progress: bool | None = None,
) -> Predictive:
    """Predictive distribution under all samples of a bank, or as many as a tolerance asks for.

    p(y | x) = sum_s w_s p(y | x, theta_s), w_s proportional to exp(log_weight_s)

    Probabilities are averaged, with the bank's weights, not logits. Samples are taken block by block, so that memory
    does not grow with S, unless quantiles or outputs are asked for, which need those of all samples on one batch.

    **Tolerance.** Samples spread over the whole bank are added until the standard error of the mean predictive is at most
    `tolerance` in every row and class or output: s sqrt(tau / n), with s the standard deviation over the n samples used
    (n the effective number where they are weighted), and tau >= 1 how much more the means of runs of draws differ than
    those of independent draws would, averaged over rows (batch means by chain). Where even all samples do not
    reach it, `errors.NotConverged` is warned of.

    **On several ranks** each predicts on its own, unless `ranks=` is given: then all call it with the same arguments, batches of
    a data set or loader are taken in turn, a batch is cut into shares of its rows, and all ranks have all predictions.
    With a mesh ranks of a row share the samples of each, which changes predictions in their last bits.

    Args:
        net: a module under a bank.
        x: inputs of N rows as the module takes them, or a data set or loader, whose targets are not looked at.
        likelihood: what outputs mean; the one that the bank was made with by default.
        prior_shift: shares of the classes [C] in training and where predictions are made: each sample's
            probabilities are corrected before they are averaged, see `uncertainty.prior_shift`.
        loc: added to predicted targets after scaling: the mean the targets were standardised with, or
            one a target [C].
        scale: their standard deviation, so that predictions are in the target's own units.
        quantiles: levels in (0, 1): of the predictive of a regression, and of the samples' class probabilities.
        outputs: whether to keep what the module says under each sample.
        tolerance: standard error of the mean predictive at which to stop; in probability, or units of the target.
        calibration: of `bnn.calibrate` with the same bank: `calibrated` then holds conformal sets or intervals, and class
            probabilities are tempered. Expected entropy and mutual information stay those of the mixture.
        ranks: that share the rows: what `bnn.distributed.joined()` gives.
        mesh: (data, samples): how many rows of these ranks take rows in turn, and how many ranks of a row share the samples;
            by default all ranks take rows.
        progress: show a bar on stderr for a data set or loader; by default where stderr is a terminal.

    Returns:
        `ClassPredictive` for `Categorical` and `Bernoulli`, else `TargetPredictive`.

    Raises:
        DataError: a sample gives NaN or Inf; its index is named.
        ConfigError: neither the bank nor the caller names a likelihood; a prior shift for a regression;
            other units for counts; levels outside (0, 1); outputs or a calibration beside a tolerance; a tolerance for
            one batch, or samples, that ranks share; a mesh of another number of ranks.
        BankMismatch: a calibration of other samples.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = bnn.Bank.from_state_dicts([module.state_dict()] * 4, module=module)
        >>> found = predict(bnn.FunctionalModel(module, bank), torch.zeros(5, 3), likelihood=bnn.likelihoods.Categorical())
        >>> found.mean.shape, round(found.mutual_information.max().item(), 12)
        (torch.Size([5, 2]), 0.0)

    Source: batch means, Flegal and Jones (2010), arXiv:0811.1729.
    """
    asked = _asked(net, likelihood, prior_shift, loc, scale, quantiles, outputs, tolerance)
    if calibration is None:
        return _predicted(net, x, asked, progress, ranks, mesh)
    if tolerance is not None:
        raise ConfigError(
            "calibration", want="all samples, as it was made with", got="a tolerance", fix="leave out one of them"
        )
    calibration.check(net.bank, asked.likelihood, prior_shift)
    asked_too = asked._replace(quantiles=(*asked.quantiles, *calibration.quantiles))
    found = _predicted(net, x, asked_too, progress, ranks, mesh)
    if isinstance(found, ClassPredictive):
        return calibration.of_classes(found)
    found = calibration.of_targets(found, asked.scale)
    return found._replace(quantiles={level: found.quantiles[level] for level in asked.quantiles})


def _predicted(
    net: FunctionalModel, x: Any, asked: _Asked, progress: bool | None, ranks: Ranks, mesh: tuple[int, int] | None
) -> Predictive:
    """The predictive of a batch, or of a data set or loader batch by batch."""
    column, row = ranks.placed(mesh)
    if row.several and asked.tolerance is not None:
        raise ConfigError(
            "tolerance",
            want="all samples on one rank, which stops once there are enough",
            got=f"{row.world_size} ranks that share them",
            fix="leave out tolerance or mesh",
        )
    batch = _of_classes if asked.likelihood.task == "classification" else _of_targets
    if not isinstance(x, (Dataset, DataLoader)):
        if not ranks.several:
            return batch(net, x, asked, row)
        if asked.tolerance is not None:
            raise ConfigError(
                "tolerance",
                want="a data set, whose batches ranks take whole",
                got="one batch, whose rows decide together",
                fix="leave out tolerance or ranks",
            )
        rows = {len(leaf) for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)}
        shares: Iterable[Any] = _shares(x, max(rows), column.world_size)
    else:
        loader = x if isinstance(x, DataLoader) else DataLoader(x, batch_size=BATCH_SIZE, generator=torch.Generator())
        shares = _shown(loader, progress if ranks.rank == 0 else False)
    kind = ClassPredictive if asked.likelihood.task == "classification" else TargetPredictive
    found = in_turn(shares, lambda share: _as_state(batch(net, share, asked, row)), column, row)
    parts = [_from_state(kind, state) for state in found]
    if not parts:
        raise DataError("x", want="at least one row", got="none", fix="check the data set")
    return _joined(parts)


def _shares(x: Any, size: int, count: int) -> Iterator[Any]:
    """The rows of a batch, cut into as many neighbouring shares as there are rows for."""
    count = max(1, min(count, size))
    for place in range(count):
        here = slice(size * place // count, size * (place + 1) // count)
        yield pytree.tree_map(lambda leaf: leaf[here] if isinstance(leaf, Tensor) else leaf, x)  # noqa: B023


def _as_state(found: Predictive) -> dict[str, Any]:
    """A predictive for other ranks, before any calibration."""
    plain = {name: value for name, value in found._asdict().items() if isinstance(value, Tensor)}
    return {
        **plain,
        "levels": list(found.quantiles),
        **{f"quantile.{place}": value for place, value in enumerate(found.quantiles.values())},
    }


def _from_state(kind: type[Predictive], state: Mapping[str, Any]) -> Predictive:
    fields = {name: state[name] for name in kind._fields if name in state}
    levels = {float(level): state[f"quantile.{place}"] for place, level in enumerate(state["levels"])}
    if kind is TargetPredictive:
        fields.setdefault("outputs", None)
    found: Predictive = kind(**fields, quantiles=levels)
    return found


def mixture(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
) -> Mixture:
    """The predictive of a regression on one batch with all its samples, [S, B, C], for scores that need them."""
    parts = list(mixtures(net, x, likelihood=likelihood, loc=loc, scale=scale))
    return joined([part for _, part in parts], net.bank.log_weight.double())


def mixtures(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    batch: int | None = None,
    samples: range | None = None,
) -> Iterator[tuple[Tensor, Mixture]]:
    """The same block by block: bank indices [K], and the mixture of those K samples alone.

    `batch` and `samples` are those of `FunctionalModel.stream`.
    """
    asked = _asked(net, likelihood, None, loc, scale, (), False, None)
    if asked.likelihood.task == "classification":
        raise ConfigError("likelihood", want="one of targets", got="one of classes", fix="use predict")
    with torch.no_grad():
        for indices, block, found in _outputs(net, x, spread=False, batch=batch, samples=samples):
            log_weight = net.bank.log_weight[indices].double().log_softmax(dim=0)
            yield indices, _mixture(*_columns(found, block, asked), log_weight, asked.likelihood)


def class_logits(
    net: FunctionalModel,
    x: Any,
    *,
    likelihood: Likelihood | None = None,
    prior_shift: tuple[Any, Any] | None = None,
    batch: int | None = None,
    samples: range | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What all samples say of one batch, block by block: bank indices [K], and logits [K, B, C] of the classes.

    Logits of a `Bernoulli` are those of its two classes; of shifted priors they are corrected, and -Inf where a class
    has no share. Arguments as of `predict`; `batch` and `samples` are those of `FunctionalModel.stream`.
    """
    asked = _asked(net, likelihood, prior_shift, 0.0, 1.0, (), False, None)
    if asked.likelihood.task != "classification":
        raise ConfigError("likelihood", want="one of classes", got="one of targets", fix="use mixtures")
    with torch.no_grad():
        for indices, _, found in _outputs(net, x, spread=False, batch=batch, samples=samples):
            logits = _class_outputs(found, asked)
            yield indices, logits if asked.shift is None else _class_log_probs(found, asked)


def by_sample(net: FunctionalModel, x: Any, *, likelihood: Likelihood | None = None) -> tuple[Tensor, Tensor | None]:
    """What each sample says of one batch, float32: class probabilities [S, B, C] and None, or of a regression the mean of
    each target and the variance of its noise, [S, B, C] both, in the units that the module was fitted in."""
    asked = _asked(net, likelihood, None, 0.0, 1.0, (), False, None)
    means: list[Tensor] = []
    variances: list[Tensor] = []
    with torch.no_grad():
        for _, block, found in _outputs(net, x, spread=False):
            if asked.likelihood.task == "classification":
                means.append(_class_log_probs(found, asked).exp().float().cpu())
                continue
            mean, variance = _moments(*_columns(found, block, asked), asked.likelihood)
            means.append(mean.float())
            variances.append((variance.expand_as(mean) * _widened(asked.likelihood)).float())
    return torch.cat(means), torch.cat(variances) if variances else None


def _asked(
    net: FunctionalModel,
    likelihood: Likelihood | None,
    shift: tuple[Any, Any] | None,
    loc: float | Tensor,
    scale: float | Tensor,
    quantiles: Sequence[float],
    outputs: bool,
    tolerance: float | None,
) -> _Asked:
    loc, scale = torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64)
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise ConfigError(
            "predict(scale=)", want="positive numbers", got=str(scale.tolist()), fix="pass the target's spread"
        )
    if not all(0.0 < level < 1.0 for level in quantiles):
        raise ConfigError(
            "quantiles", want="levels between 0 and 1", got=str(list(quantiles)), fix="such as (0.05, 0.95)"
        )
    if tolerance is not None and not tolerance > 0:
        raise ConfigError("tolerance", want="a positive number", got=str(tolerance), fix="leave it out for all samples")
    if tolerance is not None and outputs:
        raise ConfigError("outputs", want="all samples", got="a tolerance, which may stop before", fix="leave out one")
    likelihood = likelihood or likelihood_from_config(net.bank.info.get("likelihood"))
    if not len(net.bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="go on with its fit first")
    if likelihood.task != "classification":
        if shift is not None:
            raise ConfigError("prior_shift", want="none for a regression", got="some", fix="leave it out")
        if isinstance(likelihood, Poisson) and not (bool((loc == 0).all()) and bool((scale == 1).all())):
            raise ConfigError(
                "predict(loc=, scale=)", want="0 and 1 for counts", got="others", fix="fit counts without standardising"
            )
    return _Asked(likelihood, shift, loc, scale, tuple(quantiles), outputs, tolerance)


@torch.no_grad()
def _of_classes(net: FunctionalModel, x: Any, asked: _Asked, row: Ranks) -> ClassPredictive:
    spread = Spread(net.bank, asked.tolerance)

    def own() -> dict[str, Tensor]:
        log_probs = expected_entropy = expected_log_prob = torch.zeros((), dtype=torch.float64, device=net.device)
        kept: list[Tensor] = []
        raw: list[Tensor] = []
        for indices, _, found in _outputs(net, x, spread=asked.tolerance is not None, samples=_part(net, row)):
            each = _class_log_probs(found, asked)  # [K, B, C]
            log_weight = spread.log_weight[indices].to(net.device)
            weight = log_weight.exp()[:, None, None]
            probs = each.exp()
            mixed = torch.logsumexp(each + log_weight[:, None, None], dim=0)  # [B, C]
            log_probs = mixed if not spread.count else torch.logaddexp(log_probs, mixed)
            expected_entropy = expected_entropy + (weight[:, 0] * entropy(probs)).sum(dim=0)  # [B]
            expected_log_prob = expected_log_prob + (weight * each).sum(dim=0)
            spread.add(indices, probs)
            kept += [probs.cpu()] if asked.quantiles else []
            raw += [found.cpu()] if asked.outputs else []
            if spread.enough():
                break
        sums = {"log_probs": log_probs, "expected_entropy": expected_entropy, "expected_log_prob": expected_log_prob}
        return sums | _cat("kept", kept) | _cat("outputs", raw)

    sums = _shared(own, spread, row)
    total, rows = spread.total.to(sums["log_probs"].device), len(sums["log_probs"])
    return ClassPredictive(
        (sums["log_probs"] - total.log()).cpu(),
        (sums["expected_entropy"] / total).cpu(),
        (sums["expected_log_prob"] / total).cpu(),
        spread.variance().cpu(),
        torch.full((rows,), spread.count),
        spread.standard_error().cpu(),
        _sample_quantiles(sums["kept"], spread.used_weights(), asked.quantiles) if asked.quantiles else {},
        sums.get("outputs"),
    )


@torch.no_grad()
def _of_targets(net: FunctionalModel, x: Any, asked: _Asked, row: Ranks) -> TargetPredictive:
    spread = Spread(net.bank, asked.tolerance)

    def own() -> dict[str, Tensor]:
        noise_variance = torch.zeros((), dtype=torch.float64)
        kept: list[tuple[Tensor, Tensor]] = []
        raw: list[Tensor] = []
        for indices, block, found in _outputs(net, x, spread=asked.tolerance is not None, samples=_part(net, row)):
            places, noise = _columns(found, block, asked)
            means, variances = _moments(places, noise, asked.likelihood)
            weight = spread.log_weight[indices].exp()[:, None, None]
            noise_variance = noise_variance + (weight * variances).sum(dim=0)
            spread.add(indices, means)
            kept += [(places, noise)] if asked.quantiles else []
            raw += [found.cpu()] if asked.outputs else []
            if spread.enough():
                break
        places_kept, noise_kept = _cat("places", [one for one, _ in kept]), _cat("noise", [one for _, one in kept])
        return {"noise_variance": noise_variance} | places_kept | noise_kept | _cat("outputs", raw)

    sums = _shared(own, spread, row)
    mean, levels = spread.mean(), {}
    if asked.quantiles:
        whole = _mixture(sums["places"], sums["noise"], spread.used_weights(), asked.likelihood)
        levels = {level: quantile(whole, level) for level in asked.quantiles}
    aleatoric = (sums["noise_variance"] / spread.total).expand_as(mean) * _widened(asked.likelihood)
    rows = torch.full((len(mean),), spread.count)
    return TargetPredictive(
        mean, aleatoric, spread.variance(), rows, spread.standard_error(), levels, sums.get("outputs")
    )


def _part(net: FunctionalModel, row: Ranks) -> range | None:
    """The samples of this rank, where several share those of a batch."""
    return row.share(len(net.bank)) if row.several else None


def _cat(name: str, blocks: list[Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat(blocks)} if blocks else {}


def _shared(own: Callable[[], dict[str, Tensor]], spread: Spread, row: Ranks) -> dict[str, Tensor]:
    """Sums over all samples and what is kept of each, of which each rank of a row adds and keeps its own."""
    if not row.several:
        return own()

    def told() -> dict[str, Tensor]:
        found = own()
        moments = spread.state()
        return {**found, **moments} if moments else {}  # a rank may have no samples

    states = [dict(state) for state in by_all(told, row)]
    states = [state for state in states if state]
    spread.take([{name: state[name] for name in state if name.startswith("spread.")} for state in states])
    merged: dict[str, Tensor] = {}
    for name in states[0]:
        values = [state[name] for state in states]
        if name == "log_probs":
            merged[name] = torch.logsumexp(torch.stack(values), dim=0)
        elif name in ("kept", "places", "noise", "outputs"):
            merged[name] = torch.cat(values)
        elif not name.startswith("spread."):
            merged[name] = torch.stack(values).sum(dim=0)
    return merged


def _class_log_probs(outputs: Tensor, asked: _Asked) -> Tensor:
    each = log_softmax(_class_outputs(outputs, asked).double()).contiguous()  # [K, B, C]
    return each if asked.shift is None else prior_shift(each, train=asked.shift[0], natural=asked.shift[1])


def _class_outputs(outputs: Tensor, asked: _Asked) -> Tensor:
    """Logits [K, B, C] of the classes."""
    if isinstance(asked.likelihood, Bernoulli):
        outputs = outputs.unsqueeze(-1) if outputs.dim() == 2 else outputs
        if outputs.dim() != 3 or outputs.shape[-1] != 1:
            raise _shape("[B] or [B, 1], the logit", outputs)
        outputs = asked.likelihood.class_logits(outputs)
    if outputs.dim() != 3:
        raise _shape("[B, C], one output a class", outputs)
    return outputs


def _columns(outputs: Tensor, block: Block, asked: _Asked) -> tuple[Tensor, Tensor]:
    """Where the samples put the targets [K, B, C], and the scale of the noise [K, 1, 1] to [K, B, C], in the target's units."""
    if outputs.dim() not in (2, 3):
        raise _shape("[B] or [B, C]", outputs)
    columns = (outputs.unsqueeze(-1) if outputs.dim() == 2 else outputs).double()  # [K, B, C]
    noise = torch.ones(block.num_samples, 1, 1)
    if isinstance(asked.likelihood, HeteroscedasticGaussian):
        if columns.shape[-1] % 2 or not columns.shape[-1]:
            raise _shape("[B, 2 C], the means and then their noise", outputs)
        columns, noise = asked.likelihood.split(columns)
    elif isinstance(asked.likelihood, Gaussian | StudentT):
        noise = asked.likelihood.scale_of(block.params).expand(block.num_samples)[:, None, None]  # [K, 1, 1]
    return columns.cpu() * asked.scale + asked.loc, noise.double().cpu() * asked.scale


def joined(parts: Sequence[Mixture], log_weight: Tensor) -> Mixture:
    """Mixtures of blocks of samples as one, under log weights [S] of them all."""
    log_weight = log_weight.log_softmax(dim=0)
    first = parts[0]
    if isinstance(first, PoissonMixture):
        return PoissonMixture(torch.cat([part.log_rates for part in parts]), log_weight)  # type: ignore[union-attr]
    scales = torch.cat([part.scales for part in parts])  # type: ignore[union-attr]
    if isinstance(first, StudentTMixture):
        return StudentTMixture(torch.cat([part.locs for part in parts]), scales, log_weight, first.df)  # type: ignore[union-attr]
    return NormalMixture(torch.cat([part.means for part in parts]), scales, log_weight)  # type: ignore[union-attr]


def _moments(places: Tensor, noise: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Mean and squared noise of the targets under each sample, from what `_columns` gives."""
    if isinstance(likelihood, Poisson):
        means = places.exp()
        return means, means
    return places, noise.square()


def _widened(likelihood: Likelihood) -> float:
    """What the noise variance is of the squared scale: of Student-t's noise more, or infinite."""
    if not isinstance(likelihood, StudentT):
        return 1.0
    return likelihood.df / (likelihood.df - 2.0) if likelihood.df > 2.0 else torch.inf


def _mixture(places: Tensor, noise: Tensor, log_weight: Tensor, likelihood: Likelihood) -> Mixture:
    if isinstance(likelihood, Poisson):
        return PoissonMixture(places, log_weight)
    if isinstance(likelihood, StudentT):
        return StudentTMixture(places, noise, log_weight, likelihood.df)
    return NormalMixture(places, noise, log_weight)


def _sample_quantiles(kept: Tensor, log_weight: Tensor, levels: tuple[float, ...]) -> dict[float, Tensor]:
    """The least value that samples of so much weight do not pass, [B, C] a level."""
    ordered, order = kept.sort(dim=0)  # [S, B, C]
    reached = log_weight.exp()[order].cumsum(dim=0)
    last = len(ordered) - 1
    return {
        level: ordered.gather(0, (reached < level - 1e-12).sum(dim=0, keepdim=True).clamp_max(last)).squeeze(0)
        for level in levels
    }


def _outputs(
    net: FunctionalModel, x: Any, *, spread: bool, batch: int | None = None, samples: range | None = None
) -> Iterator[tuple[Tensor, Block, Tensor]]:
    """Bank indices [K], block and outputs [K, B, ...] of the whole bank, in order or spread over it, or of some samples."""
    for indices, block, outputs in net.stream(x, batch=batch, spread=spread, samples=samples):
        if not isinstance(outputs, Tensor):
            raise DataError(
                "module",
                want="one tensor of outputs",
                got=type(outputs).__name__,
                fix="wrap the module so that it returns its logits or means",
            )
        if not finite(outputs):
            bad = int(indices[int((~torch.isfinite(outputs.flatten(1))).any(dim=1).nonzero()[0])])
            raise DataError(
                f"sample {bad}", want="finite outputs", got="NaN or Inf", fix="check the inputs, or drop the sample"
            )
        yield indices, block, outputs


def _shown(loader: DataLoader[Any], progress: bool | None) -> Iterator[Any]:
    """The inputs of each batch of a loader, with a bar."""
    disable = None if progress is None else not progress
    sized: Iterable[Any] = loader
    for part in tqdm(sized, desc="predict", unit="batch", delay=1.0, disable=disable):
        x = part[0] if isinstance(part, (tuple, list)) else part
        yield tuple(x) if isinstance(x, list) else x  # a pair of inputs is collated into a list


def _joined(parts: Sequence[Any]) -> Predictive:
    """Predictives of the batches of a loader as one."""
    joined: dict[str, Any] = {}
    for name in parts[0]._fields:
        values = [getattr(part, name) for part in parts]
        if name == "quantiles":
            joined[name] = {level: torch.cat([one[level] for one in values]) for level in values[0]}
        elif values[0] is None:  # outputs that nobody asked for; a calibration comes after
            joined[name] = None
        else:
            joined[name] = torch.cat(values, dim=1 if name == "outputs" else 0)
    whole: Predictive = type(parts[0])(**joined)
    return whole


def _shape(want: str, outputs: Tensor) -> DataError:
    return DataError(
        "module", want=f"outputs {want}", got=str(list(outputs.shape[1:])), fix="reshape them in the module's forward"
    )
