"""Figures of a regression, each with its error over rows and over samples, in the target's own units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnn.evaluation.class_figures import merge_named, standard_error
from bnn.evaluation.definitions import LEVELS, PINBALL_LEVELS
from bnn.evaluation.report import Report
from bnn.evaluation.target_sums import TargetRows
from bnn.evaluation.views import Views
from bnn.metrics import interval_score, mixture_crps, mixture_crps_quadrature
from bnn.mixtures import Mixture, NormalMixture, PoissonMixture, quantiles, tiled

EXACT = 1000  # samples up to which the CRPS is a sum over pairs
REFERENCES = 200  # samples that others are compared with for the Monte Carlo error of the CRPS
PAIR_VALUES = 2**20  # numbers held at once while pairs are summed
LEVEL = 0.9  # of the interval
BASIC = ("rmse", "mae", "nll", *(f"coverage_{level * 100:.0f}" for level in LEVELS), "aleatoric", "epistemic")
MORE = ("gibbs_nll", "sharpness", "crps", "width_90", "interval_score_90", "pinball")
ALWAYS = 2  # of them, which cost nothing and so are found whether asked for or not
MAIN = ("rmse", "nll", "coverage_90")  # shown against samples
ROOTS = {"rmse": "squared_error", "sharpness": "variance"}


class TargetCollector:
    """Takes the batches of a data set, and keeps of each what figures of all rows need."""

    def __init__(self, views: Views, *, whole: bool) -> None:
        self.views, self.whole = views, whole
        self.weight: Tensor | None = None
        self.count = 0
        self._sums: dict[str, Tensor] = {}  # [V] each, of means over the outputs of a row
        self._rows: dict[str, list[Tensor]] = {}
        self._note: dict[str, str] = {}
        self._quadrature_error: float | None = None  # of the CRPS, where it is no sum over pairs

    def add(self, found: TargetRows, y: Tensor, mixture: Mixture | None) -> None:
        """One batch, with its targets [B, C], and the whole mixture where all figures are wanted."""
        self.weight, self.count = found.weight, self.count + len(y)
        error = y - found.mean
        variance = found.aleatoric + found.epistemic
        each = {
            "squared_error": error.square(),
            "mae": error.abs(),
            "nll": 0.0 - found.log_prob[..., None],
            "gibbs_nll": 0.0 - found.expected_log_prob[..., None],
            "aleatoric": found.aleatoric,
            "epistemic": found.epistemic,
            "variance": variance,
        }
        for level in LEVELS:
            tail = 0.5 - 0.5 * level
            inside = (found.pit >= tail) & (found.pit_below <= 1.0 - tail)
            empty = found.pit.isnan()
            each[f"coverage_{level * 100:.0f}"] = torch.where(empty, torch.nan, inside.double())
        if mixture is not None:
            each |= self._of_quantiles(mixture, found, y)
            each |= self._of_crps(mixture, y)
        for name, values in each.items():
            total = values.mean(dim=-1).sum(dim=-1)  # [V, B, C] -> [V]
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._rows.setdefault(name, []).append(values[0].clone())  # a view would keep all of them
        for name, values in {
            "y": y,
            "mean": found.mean[0],
            "pit": found.pit[0],
            "pit_below": found.pit_below[0],
        }.items():
            self._rows.setdefault(name, []).append(values.clone())

    def _of_quantiles(self, mixture: Mixture, found: TargetRows, y: Tensor) -> dict[str, Tensor]:
        """Interval and pinball scores in each view; those of quantiles but the whole bank's to first order.

        q_v = q - (F_v(q) - F(q)) / f(q), as the implicit function has it
        """
        levels = PINBALL_LEVELS
        place = quantiles(mixture, levels)  # [L, B, C]
        views = place.unsqueeze(0).expand(self.views.num_views, *place.shape)  # [V, L, B, C]
        if isinstance(mixture, PoissonMixture):
            views = torch.cat([views[:1], torch.full_like(views[1:], torch.nan)])
            self._note |= dict.fromkeys(
                ("width_90", "interval_score_90", "pinball"),
                "quantiles of counts are whole numbers: no error over samples",
            )
        else:
            views = torch.cat([views[:1], *([self._moved(mixture, place, found)] if self.views.num_views > 1 else [])])
        low, high = levels.index(0.05), levels.index(0.95)
        self._rows.setdefault("lower", []).append(place[low])
        self._rows.setdefault("upper", []).append(place[high])
        lower, upper = views[:, low], torch.maximum(views[:, high], views[:, low])
        outside = torch.maximum(lower - y, y - upper).clamp_min(0)
        own = interval_score(lower[0], upper[0], y, level=LEVEL)
        every = (upper - lower) + 2.0 / (1.0 - LEVEL) * outside
        level = torch.tensor(levels, dtype=torch.float64)[:, None, None]
        losses = (((y < views).double() - level) * (views - y)).mean(dim=1)  # [V, B, C]
        return {
            "width_90": upper - lower,
            "interval_score_90": torch.cat([own[None], every[1:]]),
            "pinball": losses,
        }

    def _moved(self, mixture: Mixture, place: Tensor, found: TargetRows) -> Tensor:
        """Quantiles [V - 1, L, B, C] of the views but the first."""
        assert not isinstance(mixture, PoissonMixture)
        present, weights = self.views.sets(torch.arange(len(mixture.log_weight)))
        spread = (found.aleatoric[0] + found.epistemic[0]).sqrt()
        total = torch.where(found.weight > 0, found.weight, torch.nan)[:, None, None, None]
        moved = []
        for some in place.split(max(1, PAIR_VALUES // mixture.centres.numel())):
            again, rows = tiled(mixture, len(some)), some.flatten(0, 1)  # [l B, C]
            sums = torch.zeros(self.views.num_sums, rows.numel(), dtype=torch.float64)
            sums.index_add_(0, present, weights @ again.cdfs(rows).flatten(1))
            share = self.views.of(sums).view(-1, *some.shape) / total  # [V, l, B, C]
            step = (share[1:] - share[:1]) / again.density(rows).view(some.shape)
            moved.append(
                some - torch.maximum(torch.minimum(step, spread), -spread)
            )  # between modes there is no density
        return torch.cat(moved, dim=1)

    def _of_crps(self, mixture: Mixture, y: Tensor) -> dict[str, Tensor]:
        """The CRPS, and in halves of the runs of draws to first order.

        h_s = A(y - mu_s, sigma_s^2) - sum_t w_t A(mu_s - mu_t, sigma_s^2 + sigma_t^2)
        CRPS_half = CRPS + mean of h in the half - mean h
        """
        if not isinstance(mixture, NormalMixture):
            kind = "counts" if isinstance(mixture, PoissonMixture) else "Student's t noise"
            self._note["crps"] = f"none of {kind}: it is exact for normal noise alone"
            return {"crps": torch.full((self.views.num_views, *y.shape), torch.nan, dtype=torch.float64)}
        arguments = mixture.means, mixture.scales, y, mixture.log_weight
        if len(mixture.means) <= EXACT:
            value = mixture_crps(*arguments)
        else:
            bounded = mixture_crps_quadrature(*arguments)
            value, own = bounded.value, float(bounded.error.max())
            self._quadrature_error = max(self._quadrature_error or 0.0, own)
        views = torch.full((self.views.num_views, *y.shape), torch.nan, dtype=torch.float64)
        views[0] = value
        if self.views.num_groups > 1:
            views[self.views.left_out] = value + self._changes(mixture, y)
        return {"crps": views}

    def _changes(self, mixture: NormalMixture, y: Tensor) -> Tensor:
        """Mean of h in each half - mean h, [H, B, C]."""
        size = len(mixture.means)
        chosen = torch.linspace(0, size - 1, min(size, REFERENCES), dtype=torch.float64).round().long()
        share = mixture.log_weight[chosen].softmax(dim=0)
        variances = mixture.scales.square().expand_as(mixture.means)
        found = torch.zeros(self.views.num_groups, *y.shape, dtype=torch.float64)
        weight = mixture.log_weight.exp()
        step = max(1, PAIR_VALUES // (len(chosen) * y.numel()))
        for some in torch.arange(size).split(step):
            apart = mixture.means[some, None] - mixture.means[chosen]
            pairs = _distance(apart, variances[some, None] + variances[chosen])  # [K, T, B, C]
            change = _distance(y - mixture.means[some], variances[some]) - torch.einsum("t,ktbc->kbc", share, pairs)
            found.index_add_(0, self.views.group[some], weight[some, None, None] * change)
        of_group = torch.zeros(self.views.num_groups, dtype=torch.float64).index_add_(0, self.views.group, weight)
        halves = self.views.halves
        means = (halves @ found.flatten(1)).view(-1, *y.shape) / (halves @ of_group)[:, None, None]
        return means - found.sum(dim=0)

    def fresh(self) -> TargetCollector:
        """One that has taken nothing, of the same options."""
        return TargetCollector(self.views, whole=self.whole)

    def state(self) -> dict[str, Any]:
        """What it has taken, as tensors and plain values by name, for `merge`, maybe on another rank."""
        return {
            "weight": self.weight,
            "count": self.count,
            "note": self._note,
            "quadrature_error": self._quadrature_error,
            **{f"sum.{name}": values for name, values in self._sums.items()},
            **{f"row.{name}": torch.cat(parts) for name, parts in self._rows.items()},
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take what another one has, of the rows that follow: sums are added batch by batch, whoever takes the batches."""
        self.weight, self.count = state["weight"], self.count + state["count"]
        merge_named(state, self._sums, self._rows)
        self._note |= state["note"]
        if state["quadrature_error"] is not None:
            self._quadrature_error = max(self._quadrature_error or 0.0, state["quadrature_error"])
            self._note["crps"] = f"by quadrature, off by at most {self._quadrature_error:.1g} a row"

    def report(self, report: Report) -> None:
        """Put all figures into a report."""
        assert self.weight is not None
        report.rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        for name in (*BASIC, *MORE) if self.whole else BASIC:
            views = self._sums[ROOTS.get(name, name)] / self.count
            rows = report.rows[ROOTS.get(name, name)].mean(dim=1)  # [N]
            error = standard_error(rows)
            if name in ROOTS:
                views = views.sqrt()
                # The error of a square root by the delta method: d sqrt(m) = dm / (2 sqrt(m)).
                error = None if error is None or not views[0] > 0 else error / (2.0 * float(views[0]))
            note = self._note.get(name)
            if note is None and math.isinf(float(views[0])):
                note = "infinite: Student's t of at most 2 degrees of freedom has no variance"
            report.add(
                name, float(views[0]), n=self.count, standard_error=error, note=note,
                monte_carlo_error=self.views.monte_carlo_error(views, self.weight),
            )  # fmt: skip
        for name in ("nll", "gibbs_nll"):  # of all outputs of a row together
            report.rows[name] = report.rows[name].squeeze(1)

    def beginnings(self) -> Iterator[tuple[str, list[float]]]:
        """Main metrics of the beginnings of the bank and of the whole, by id."""
        place = [*range(self.views.beginnings.start, self.views.beginnings.stop), 0]
        for name in MAIN:
            found = self._sums[ROOTS.get(name, name)][place] / self.count
            yield name, (found.sqrt() if name in ROOTS else found).tolist()


def _distance(m: Tensor, v: Tensor) -> Tensor:
    """A(m, v) = E|X| for X ~ Normal(m, v)."""
    scale = v.sqrt()
    z = m / scale
    return m * torch.erf(z / math.sqrt(2.0)) + scale * math.sqrt(2.0 / math.pi) * torch.exp(-0.5 * z.square())
