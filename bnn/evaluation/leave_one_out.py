"""How a bank would predict rows that it was fitted to, had it not seen them: PSIS-LOO and WAIC."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bnn.diagnostics import MIN_DRAWS, ess_mean
from bnn.errors import ConfigError, DataError
from bnn.evaluation.pointwise import Pointwise

HIGH_K, INFINITE_K = 0.7, 1.0  # of Pareto's shape: above, the estimate is not to be trusted; has no mean
FLAT = 1e-9  # nats by which importance ratios differ at most that count as equal: ArviZ calls k of those infinite
HIGH_VARIANCE = 0.4  # of the log likelihood of a row: above, WAIC is not to be trusted
PROBED_ROWS = 256  # whose likelihoods tell what draws of chains are worth
SMOOTHED_VALUES = 2**20  # importance ratios that ArviZ gets at once, between two steps of the bar

Smoother = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


class Loo(NamedTuple):
    """Leave-one-out cross-validation by Pareto-smoothed importance sampling."""

    elpd: float  # sum over rows of the log density of each, given all others; nats
    error: float  # standard error over rows
    num_parameters: float  # effective: log density of rows that were seen, less elpd
    rows: Tensor  # [N], whose sum elpd is
    pareto_k: Tensor  # [N] shape of the tail of the importance weights, 0 where they are all equal
    efficiency: float  # of draws, by which the tail is chosen
    num_samples: int

    @property
    def num_high(self) -> int:
        """Rows with Pareto k above 0.7, for which too few samples speak."""
        return int((~(self.pareto_k <= HIGH_K)).sum())

    @property
    def num_infinite(self) -> int:
        """Rows with Pareto k above 1, whose importance weights have no mean."""
        return int((~(self.pareto_k <= INFINITE_K)).sum())

    def __str__(self) -> str:
        told = f"elpd_loo {self.elpd:.2f} ± {self.error:.2f}, p_loo {self.num_parameters:.2f}, {len(self.rows)} rows"
        if not self.num_high:
            return f"{told}, Pareto k at most {float(self.pareto_k.max()):.2f}"
        infinite = f" ({self.num_infinite} above {INFINITE_K:g})" if self.num_infinite else ""
        return (
            f"{told}, Pareto k above {HIGH_K} for {self.num_high} of them{infinite}: not to be trusted there, "
            "draw more samples or judge by held-out rows"
        )


class Waic(NamedTuple):
    """The widely applicable information criterion, as an estimate of the same elpd."""

    elpd: float  # nats
    error: float  # standard error over rows
    num_parameters: float  # effective: sum of the variances
    rows: Tensor  # [N], whose sum elpd is
    num_high: int  # rows whose log likelihood varies by more than 0.4

    def __str__(self) -> str:
        told = f"elpd_waic {self.elpd:.2f} ± {self.error:.2f}, p_waic {self.num_parameters:.2f}"
        return told + (f", variance above {HIGH_VARIANCE} for {self.num_high} rows" if self.num_high else "")


def loo(source: str | Path | Pointwise, *, efficiency: float | None = None, progress: bool | None = None) -> Loo:
    """Expected log density of each row given all the others, from one posterior given all.

    elpd = sum_n log sum_s v_ns p(y_n | theta_s),  v_ns proportional to w_s p(y_n | theta_s)^(-1 / T), its tail smoothed

    T is the temperature of the posterior, w the samples' weights. Samples must be draws of the posterior given these
    very rows: of an approximation the figure is that approximation's own, and of a prior or of checkpoints it means nothing.
    Rows are taken some at a time, so that a file may be larger than memory. ArviZ smooths the tails.

    Args:
        source: `log_likelihoods` of the rows that the bank was fitted to, or the path of their file.
        efficiency: what a draw is worth in independent ones, by which the length of the tail is chosen; by default from
            the effective sample size of the likelihood of 256 rows, and 1 where samples are weighted or no chains.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Raises:
        ConfigError: ArviZ is not installed, or `efficiency` is not positive.
        DataError: no sample has weight.

    Examples:
        >>> source = torch.Generator().manual_seed(0)
        >>> theta, y = torch.randn(400, 1, generator=source), torch.zeros(1, 3)
        >>> values = torch.distributions.Normal(theta.double(), 9.0).log_prob(y)  # [S, N]
        >>> columns = torch.zeros(400, dtype=torch.int64), torch.arange(400), torch.zeros(400, dtype=torch.float64)
        >>> found = loo(Pointwise(values, *columns, about={}), efficiency=1.0)
        >>> round(found.elpd / 3, 2), found.num_high
        (-3.12, 0)

    Source: Vehtari, Gelman and Gabry (2017), arXiv:1507.04544; Vehtari et al. (2024), JMLR 25(72).
    """
    if efficiency is not None and not efficiency > 0:
        raise ConfigError("loo(efficiency=)", want="a positive number", got=str(efficiency), fix="leave it out")
    smooth = _smoother()
    values, kept, log_weight = _weighted(source)
    temperature = float(values.about.get("temperature", 1.0))
    efficiency = _efficiency(values) if efficiency is None else efficiency
    rows, shapes, seen = [], [], []
    with tqdm(
        total=values.num_rows, desc="loo", unit="row", delay=1.0, disable=None if progress is None else not progress
    ) as bar:
        for _, slab in values.slabs():
            for part in slab[kept].split(max(1, SMOOTHED_VALUES // len(kept)), dim=1):  # [S, n]
                ratios = (log_weight.unsqueeze(1) - part / temperature).T.contiguous()  # [n, S]
                smoothed, shape = smooth(ratios.numpy(), efficiency)
                log_shares = torch.from_numpy(np.ascontiguousarray(smoothed)).log_softmax(dim=1)
                rows.append((log_shares + part.T).logsumexp(dim=1))
                seen.append((log_weight.unsqueeze(1) + part).logsumexp(dim=0))
                flat = ratios.amax(dim=1) - ratios.amin(dim=1) < FLAT
                shapes.append(torch.where(flat, 0.0, torch.from_numpy(np.atleast_1d(shape)).double()))
                bar.update(part.shape[1])
    found, elpd = torch.cat(rows), float(torch.cat(rows).sum())
    number = float(torch.cat(seen).sum()) - elpd
    return Loo(elpd, _error(found), number, found, torch.cat(shapes), efficiency, len(kept))


def waic(source: str | Path | Pointwise) -> Waic:
    """The widely applicable information criterion, without the factor -2.

    elpd = sum_n (log sum_s w_s p(y_n | theta_s) - V_n / T),  V_n = variance over samples of log p(y_n | theta_s)

    It rests on the same assumptions as `loo`, and fails more quietly: prefer that one.

    Args:
        source: `log_likelihoods` of the rows that the bank was fitted to, or the path of their file.

    Raises:
        DataError: no sample has weight.

    Source: Watanabe (2010), JMLR 11; Vehtari, Gelman and Gabry (2017), arXiv:1507.04544.
    """
    values, kept, log_weight = _weighted(source)
    temperature = float(values.about.get("temperature", 1.0))
    share = log_weight.exp().unsqueeze(1)  # [S, 1]
    rows, variances = [], []
    for _, slab in values.slabs():
        part = slab[kept]
        mean = (share * part).sum(dim=0)
        variances.append((share * (part - mean).square()).sum(dim=0))
        rows.append((log_weight.unsqueeze(1) + part).logsumexp(dim=0) - variances[-1] / temperature)
    found, variance = torch.cat(rows), torch.cat(variances)
    number = float(variance.sum()) / temperature
    return Waic(float(found.sum()), _error(found), number, found, int((variance > HIGH_VARIANCE).sum()))


def to_arviz(source: str | Path | Pointwise) -> Any:
    """The values as ArviZ takes them, with axes chain, draw and row: `InferenceData`, a `DataTree` from ArviZ 1 on.

    Chains must be of one length; all of the values are read into memory. The group `posterior` holds `total`, the log
    likelihood of all rows together, since ArviZ asks for one. ArviZ knows no weights.

    Raises:
        ConfigError: ArviZ is not installed.
        DataError: chains of unequal length, or samples of unequal weight.
    """
    values = source if isinstance(source, Pointwise) else Pointwise.open(source)
    arviz = _arviz()
    order = _by_chain(values)
    if order is None or bool((values.log_weight != values.log_weight[0]).any()):
        got = "unequal lengths" if order is None else "unequal weights"
        raise DataError("to_arviz", want="chains of one length, of equal weights", got=got, fix="use loo(...) itself")
    ordered = values.log_likelihood[order].numpy()  # [C, D, N]
    groups = {"posterior": {"total": ordered.sum(axis=2)}, "log_likelihood": {"y": ordered}}
    return arviz.from_dict(groups) if int(arviz.__version__.split(".")[0]) >= 1 else arviz.from_dict(**groups)


def _arviz() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces its next version at each import
            import arviz
    except ImportError as error:
        raise ConfigError("loo", want="ArviZ", got="none installed", fix="pip install arviz") from error
    return arviz


def _smoother() -> Smoother:
    """ArviZ's smoothing of log importance ratios [n, S] at an efficiency: log weights up to a constant a row, and k [n]."""
    arviz = _arviz()
    if hasattr(arviz, "psislw"):
        found: Smoother = arviz.psislw
        return found
    from arviz_stats.base import array_stats  # ArviZ from 1 on is made of this

    # That one takes log likelihoods, and turns them round; not in all versions. Which it does is seen in a row.
    probe = np.linspace(0.0, 1.0, 100)[None]
    told = np.asarray(array_stats.psislw(probe, 1.0)[0])
    sign = 1.0 if told[0, -1] > told[0, 0] else -1.0

    def smooth(ratios: np.ndarray, efficiency: float) -> tuple[np.ndarray, np.ndarray]:
        log_weights, shape = array_stats.psislw(sign * ratios, efficiency)
        return np.asarray(log_weights), np.asarray(shape)

    return smooth


def _weighted(source: str | Path | Pointwise) -> tuple[Pointwise, Tensor, Tensor]:
    """The values, the samples that have weight [S'], and their normalised log weights [S']."""
    values = source if isinstance(source, Pointwise) else Pointwise.open(source)
    kept = (values.log_weight > -math.inf).nonzero().flatten()
    if not len(kept):
        raise DataError(
            "log likelihoods", want="a sample with weight", got="none", fix="look at the bank's log weights"
        )
    return values, kept, values.log_weight[kept].log_softmax(dim=0)


def _efficiency(values: Pointwise) -> float:
    """Effective number of draws over their number, of the likelihood averaged over rows; 1 where there are no chains."""
    order = _by_chain(values)
    if order is None or order.shape[1] < MIN_DRAWS or bool((values.log_weight != values.log_weight[0]).any()):
        return 1.0
    some = torch.linspace(0, values.num_rows - 1, min(values.num_rows, PROBED_ROWS)).long().unique()
    draws = values.log_likelihood[:, some]
    draws = (draws - draws.amax(dim=0)).exp()[order]  # [C, D, n]
    worth = ess_mean(draws)
    worth = worth[worth.isfinite()]  # not of a row that all draws say the same of
    return float(worth.mean()) / order.numel() if len(worth) else 1.0


def _by_chain(values: Pointwise) -> Tensor | None:
    """Sample numbers [C, D] by chain and draw; None where chains are of unequal length."""
    chain, draw = values.chain.numpy(), values.draw.numpy()
    lengths = np.unique(chain, return_counts=True)[1]
    if lengths.min() != lengths.max():
        return None
    return torch.from_numpy(np.lexsort((draw, chain))).view(len(lengths), -1)


def _error(rows: Tensor) -> float:
    """Standard error of a sum over rows; NaN of a single one."""
    return float(rows.std(correction=0)) * math.sqrt(len(rows)) if len(rows) > 1 else math.nan
