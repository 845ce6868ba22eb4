"""Figures of class predictions, each with its error over rows and over samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn import metrics
from bnn.evaluation.bins import counted, equal_places, equally_filled_places
from bnn.evaluation.class_sums import ClassRows
from bnn.evaluation.definitions import SCORES
from bnn.evaluation.ranking import Kept, Outside, Ranked, Surest, all_by_resampling, by_influence, by_resampling, ranked
from bnn.evaluation.report import Report
from bnn.evaluation.views import Views

TOP = 5
BASIC = ("accuracy", "nll", "brier", "predictive_entropy", "expected_entropy", "mutual_information")
MORE = ("gibbs_nll", "variation_ratio", "disagreement", f"top_{TOP}")
MAIN = ("accuracy", "nll", "brier", "ece", "predictive_entropy", "mutual_information")  # shown against samples


class ClassCollector:
    """Takes the batches of a data set, and keeps of each what figures of all rows need.

    Means are summed, and confidences counted in bins, for every view; scores of each row are kept for the bank and for
    the H halves of its runs of draws, since they are ranked.
    """

    def __init__(self, views: Views, *, num_bins: int, whole: bool, ranked: bool) -> None:
        self.views, self.num_bins, self.whole, self.ranked = views, num_bins, whole, ranked
        self.weight: Tensor | None = None
        self.count = 0
        self._sums: dict[str, Tensor] = {}  # [V] each
        self._rows: dict[str, list[Tensor]] = {}  # [B] each, of the whole bank
        self._kept: dict[str, list[Tensor]] = {}  # [1 + H, B] each
        self._bins = torch.zeros(3, views.num_views, num_bins, dtype=torch.float64)  # rows, confidence, correct
        self._own: Tensor | None = None  # [2, 1 + H, C, M] probability and truth of each class in its own bins
        self._probs: list[Tensor] = []  # [B, C]

    def add(self, found: ClassRows, y: Tensor) -> None:
        """One batch, with its targets int64 [B]."""
        assert found.log_prob is not None
        self.weight, self.count = found.weight, self.count + len(y)
        probs, target = found.probs, y.to(found.probs.device)  # [C, V, B]
        at_target = probs.gather(0, target.expand(1, *probs.shape[1:]))[0]  # [V, B]
        confidence = probs.amax(dim=0)
        correct = _first_of_largest(probs, at_target, confidence, target)
        each = {
            "accuracy": correct,
            "nll": 0.0 - found.log_prob,
            "brier": (probs.square().sum(dim=0) - 2.0 * at_target + 1.0).clamp_min(0),
            "predictive_entropy": found.entropy,
            "expected_entropy": found.expected_entropy,
            "mutual_information": found.mutual_information,
        }
        if self.whole:
            each |= self._more(found, at_target, target)
        for name, values in each.items():
            values = values.cpu()
            total = values.sum(dim=1)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._rows.setdefault(name, []).append(values[0].clone())  # a view would keep all of them
        confidence, correct = confidence.cpu(), correct.cpu()
        self._rows.setdefault("y", []).append(y)
        self._rows.setdefault("predicted", []).append(probs[:, 0].max(dim=0).indices.cpu())
        self._rows.setdefault("confidence", []).append(confidence[0].clone())
        self._count(confidence, correct)
        if self.ranked:
            for name, values in (scores_of(found) | {"correct": correct}).items():
                self._kept.setdefault(name, []).append(values[: self.views.left_out.stop].cpu().clone())
        if self.whole:
            self._count_classes(probs, target)

    def _more(self, found: ClassRows, at_target: Tensor, target: Tensor) -> dict[str, Tensor]:
        assert found.expected_log_prob is not None
        assert found.votes is not None
        each = {"gibbs_nll": 0.0 - found.expected_log_prob, "variation_ratio": 1.0 - found.votes.amax(dim=0)}
        # Of two samples drawn without putting the first one back: 1 - sum_c V_c^2 counts samples against themselves too.
        alone = (found.squares / found.weight.square())[:, None].to(target.device)
        apart = (1.0 - found.votes.square().sum(dim=0)) / (1.0 - alone)
        each["disagreement"] = torch.where(alone < 1.0, apart, torch.where(alone.isnan(), torch.nan, 0.0).double())
        if len(found.probs) > TOP:
            lower = torch.arange(len(found.probs), device=target.device)[:, None, None] < target
            ahead = (found.probs > at_target) | ((found.probs == at_target) & lower)  # [C, V, B]
            each[f"top_{TOP}"] = (ahead.sum(dim=0) < TOP).double()
        return each

    def _count(self, confidence: Tensor, correct: Tensor) -> None:
        place = equal_places(confidence, self.num_bins)  # [V, B]
        self._bins += counted(place, self.num_bins, confidence, correct)

    def _count_classes(self, probs: Tensor, target: Tensor) -> None:
        probs, target = probs[:, : self.views.left_out.stop].cpu(), target.cpu()  # [C, 1 + H, B]
        place, shape = equal_places(probs, self.num_bins), (*probs.shape[:2], self.num_bins)
        confidence = counted(place.flatten(0, 1), self.num_bins, probs.flatten(0, 1))[1].view(shape)
        # Of a row one class is the true one, of which alone the place is asked.
        own = place.gather(0, target.expand(1, *place.shape[1:]))[0] + self.num_bins * target  # [1 + H, B]
        truth = counted(own, len(probs) * self.num_bins)[0].view(shape[1], shape[0], self.num_bins)
        found = torch.stack([confidence.transpose(0, 1), truth])
        self._own = found if self._own is None else self._own + found
        self._probs.append(probs[:, 0].T.clone())

    def fresh(self) -> ClassCollector:
        """One that has taken nothing, of the same options."""
        return ClassCollector(self.views, num_bins=self.num_bins, whole=self.whole, ranked=self.ranked)

    def state(self) -> dict[str, Any]:
        """What it has taken, as tensors and numbers by name, for `merge`, maybe on another rank."""
        own = {} if self._own is None else {"own": self._own, "probs": torch.cat(self._probs)}
        return {
            "weight": self.weight,
            "count": self.count,
            "bins": self._bins,
            **own,
            **{f"sum.{name}": values for name, values in self._sums.items()},
            **{f"row.{name}": torch.cat(parts) for name, parts in self._rows.items()},
            **{f"kept.{name}": torch.cat(parts, dim=1) for name, parts in self._kept.items()},
        }

    def merge(self, state: Mapping[str, Any]) -> None:
        """Take what another one has, of the rows that follow: sums are added batch by batch, whoever takes the batches."""
        self.weight, self.count = state["weight"], self.count + state["count"]
        self._bins = self._bins + state["bins"]
        if "own" in state:
            self._own = state["own"] if self._own is None else self._own + state["own"]
            self._probs.append(state["probs"])
        merge_named(state, self._sums, self._rows)
        for name, values in named(state, "kept").items():
            self._kept.setdefault(name, []).append(values)

    def report(self, report: Report) -> None:
        """Put all figures into a report."""
        assert self.weight is not None
        report.rows = {name: torch.cat(parts) for name, parts in self._rows.items()}
        kept = {name: torch.cat(parts, dim=1) for name, parts in self._kept.items()}
        for name in (*BASIC, *MORE) if self.whole else BASIC:
            if name in self._sums:
                self._add_mean(report, name)
        if not self.whole:
            self._add_calibration(report)
        else:
            surest = Surest.of(kept["one_minus_max_prob"], kept["correct"])
            jumps = self._errors_of_jumps(report, surest)
            self._add_calibration(report, kept, jumps)
            self._add_selective(report, surest, jumps)
        report.rows["correct"] = report.rows.pop("accuracy")

    def _add_mean(self, report: Report, name: str) -> None:
        views, rows = self._sums[name] / self.count, report.rows[name]
        note = None
        if not math.isfinite(float(views[0])):
            note = f"infinite: {int(rows.isinf().sum())} rows give their class no chance"
        self._add(report, name, views, standard_error(rows), note=note)

    def _errors_of_jumps(self, report: Report, surest: Surest) -> dict[str, float | None]:
        """Errors over rows of the figures that jump, of which influences tell too little, all from the same drawn rows."""
        confidence = report.rows["confidence"]
        place, apart = equal_places(confidence, self.num_bins), report.rows["accuracy"] - confidence
        member = torch.nn.functional.one_hot(place, self.num_bins).double()  # [N, M]
        both = torch.cat([member * apart[:, None], member], dim=1)

        def largest_gap(weight: Tensor) -> Tensor:  # [R, N] -> [R]
            gap, filled = (weight @ both).split(self.num_bins, dim=1)
            largest: Tensor = (gap.abs() / filled.clamp_min(1)).amax(dim=1)
            return largest

        def selective(weight: Tensor) -> Tensor:  # [R, N] -> [2, R]
            drawn = surest.kept(weight)
            return torch.stack([drawn.coverage_at_risk(), drawn.risk_at_coverage()])

        names = ("mce", "coverage_at_risk_5", "risk_at_coverage_80")
        if self.count < 2:
            return dict.fromkeys(names)
        return dict(zip(names, all_by_resampling([largest_gap, selective], (self.count,)), strict=True))

    def _add_calibration(
        self,
        report: Report,
        kept: dict[str, Tensor] | None = None,
        jumps: Mapping[str, float | None] | None = None,
    ) -> None:
        rows, bins = report.rows, self._bins
        gap = bins[2] - bins[1]  # [V, M], times the number of rows
        sign, place = gap[0].sign(), equal_places(rows["confidence"], self.num_bins)
        apart = rows["accuracy"] - rows["confidence"]  # [N]
        of_row = sign[place] * apart
        self._add(report, "ece", gap.abs().sum(dim=1) / self.count, standard_error(of_row), bins=self.num_bins)
        if kept is None or jumps is None:
            return
        share = (gap.square() / bins[0].clamp_min(1)).sum(dim=1) / self.count  # [V]
        root = share.sqrt()
        filled = bins[0, 0].clamp_min(1)
        of_bin = (gap[0] / filled)[place]  # mean gap of the bin of each row
        slope = 2.0 * of_bin * apart - of_bin.square()
        self._add(report, "rmsce", root, _of_root(slope, float(root[0])), bins=self.num_bins)
        largest = (gap.abs() / bins[0].clamp_min(1)).amax(dim=1)
        self._add(report, "mce", largest, jumps["mce"], bins=self.num_bins)
        self._add_adaptive(report, kept)
        assert self._own is not None
        own = self._own[1] - self._own[0]  # [1 + H, C, M]
        probs = torch.cat(self._probs)  # [N, C]
        truth = torch.nn.functional.one_hot(rows["y"], probs.shape[1])
        signs = own[0].sign().gather(1, equal_places(probs.T, self.num_bins))  # [C, N]
        of_row = (signs * (truth - probs).T).mean(dim=0)
        value = own.abs().sum(dim=(1, 2)) / (self.count * probs.shape[1])
        self._add(report, "classwise_ece", value, standard_error(of_row), bins=self.num_bins)

    def _add_adaptive(self, report: Report, kept: dict[str, Tensor]) -> None:
        confidence, correct = 1.0 - kept["one_minus_max_prob"], kept["correct"]  # [1 + H, N]
        confidence[0] = report.rows["confidence"]

        place = equally_filled_places(confidence, self.num_bins)
        _, sure, right = counted(place, self.num_bins, confidence, correct)
        gap = right - sure  # [1 + H, M]
        of_row = gap[0].sign()[place[0]] * (correct[0] - confidence[0])
        value = gap.abs().sum(dim=1) / self.count
        self._add(report, "ace", value, standard_error(of_row), bins=self.num_bins)

    def _add_selective(self, report: Report, surest: Surest, jumps: Mapping[str, float | None]) -> None:
        every = Kept.of(torch.ones_like(surest.lost), *surest)
        for name, figure in {"aurc": Kept.aurc, "augrc": Kept.augrc}.items():

            def again(weight: Tensor, figure: Callable[[Kept], Tensor] = figure) -> Tensor:
                return figure(surest.kept(weight))

            error = by_influence(again, (self.count,)) if self.count > 1 else None
            self._add(report, name, figure(every), error)
        self._add(report, "coverage_at_risk_5", every.coverage_at_risk(), jumps["coverage_at_risk_5"])
        self._add(report, "risk_at_coverage_80", every.risk_at_coverage(), jumps["risk_at_coverage_80"])

    def _add(
        self,
        report: Report,
        name: str,
        views: Tensor,
        error: float | None,
        *,
        bins: int | None = None,
        note: str | None = None,
    ) -> None:
        assert self.weight is not None
        report.add(
            name, float(views[0]), n=self.count, standard_error=error, bins=bins, note=note,
            monte_carlo_error=self.views.monte_carlo_error(views, self.weight),
        )  # fmt: skip

    def beginnings(self) -> Iterator[tuple[str, list[float]]]:
        """Main metrics of the beginnings of the bank and of the whole, by id."""
        place = [*range(self.views.beginnings.start, self.views.beginnings.stop), 0]
        gap = (self._bins[2] - self._bins[1]).abs().sum(dim=1)  # [V]
        empty = self._sums["nll"].isnan()  # of samples without any weight
        for name in MAIN:
            found = (gap if name == "ece" else self._sums[name]) / self.count
            found = torch.where(empty, torch.nan, found)
            yield name, found[place].tolist()

    def bins(self) -> metrics.Bins:
        """The reliability diagram of the whole bank."""
        rows, confidence, correct = self._bins[:, 0]
        filled = rows.clamp_min(1)
        return metrics.Bins(rows.to(torch.int64), confidence / filled, correct / filled)

    def scores(self) -> dict[str, Tensor]:
        """Scores [1 + H, N] by which rows are ranked."""
        return {name: torch.cat(self._kept[name], dim=1) for name in SCORES if name in self._kept}


def named(state: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What stands in a state under `kind.`, by name."""
    return {name.removeprefix(f"{kind}."): value for name, value in state.items() if name.startswith(f"{kind}.")}


def merge_named(state: Mapping[str, Any], sums: dict[str, Tensor], rows: dict[str, list[Tensor]]) -> None:
    """Add the sums of a state to others, and its rows behind others."""
    for name, values in named(state, "sum").items():
        sums[name] = sums[name] + values if name in sums else values
    for name, values in named(state, "row").items():
        rows.setdefault(name, []).append(values)


def scores_of(found: ClassRows) -> dict[str, Tensor]:
    """Uncertainty of each row by the four scores, [V, B]; larger means less sure."""
    return {
        "predictive_entropy": found.entropy,
        "expected_entropy": found.expected_entropy,
        "mutual_information": found.mutual_information,
        "one_minus_max_prob": 1.0 - found.probs.amax(dim=0),
    }


class Sides(NamedTuple):
    """One score of rows inside [1 + H, N] and outside [1 + H, M]."""

    inside: Tensor
    outside: Tensor


def add_outside(
    report: Report, views: Views, weight: Tensor, inside: dict[str, Tensor], outside: dict[str, Tensor]
) -> None:
    """Figures that tell rows outside apart, by each of the scores."""
    for score in SCORES:
        sides = Sides(inside[score], outside[score])
        for kind, (values, error) in _outside(sides).items():
            name = kind if score == "predictive_entropy" else f"{kind}_{score}"
            report.add(
                name, float(values[0]), n=sides.inside.shape[1], standard_error=error, outside=sides.outside.shape[1],
                monte_carlo_error=views.monte_carlo_error(values, weight),
            )  # fmt: skip


def _outside(sides: Sides) -> dict[str, tuple[Tensor, float | None]]:
    """Values in each view, and error over rows, of the four figures of one score."""
    # Rows of each side in the order of their scores, so that resamples do not hang on the order of the data.
    inside, outside = (side.sort(dim=1).values for side in sides)
    sizes = inside.shape[1], outside.shape[1]
    both = torch.cat([inside, outside], dim=1)  # [1 + H, N + M]
    is_outside = torch.arange(sum(sizes)) >= sizes[0]
    falling, rising = ranked(both), ranked(-both)
    found = {}
    for kind, order, figure in (
        ("auroc", falling, Outside.auroc),
        ("aupr_in", rising, Outside.average_precision),
        ("aupr_out", falling, Outside.average_precision),
        ("fpr95", falling, Outside.fpr),
    ):
        side = is_outside ^ (kind == "aupr_in")  # whose rows are the positives

        again = partial(_drawn_again, figure, order, side)

        values = figure(Outside.of(torch.ones_like(both), side[order.order], order.last))
        error = None
        if min(sizes) > 1:
            error = by_resampling(again, sizes) if kind == "fpr95" else by_influence(again, sizes)
        found[kind] = values, error
    return found


def _drawn_again(figure: Callable[[Outside], Tensor], order: Ranked, side: Tensor, weight: Tensor) -> Tensor:
    """A figure of the whole bank under weights [R, N + M] of rows."""
    first = order.order[:1].expand(len(weight), -1)
    return figure(Outside.of(weight.gather(1, first), side[first], order.last[:1]))


def standard_error(values: Tensor) -> float | None:
    """Of the mean of a value a row [N]; None of one row, or of values that are not finite."""
    if len(values) < 2 or not bool(values.isfinite().all()):
        return None
    return float(values.std() / len(values) ** 0.5)


def _of_root(values: Tensor, root: float) -> float | None:
    """Of the root of a mean of values [N], by the delta method: d sqrt(m) = dm / (2 sqrt(m))."""
    error = standard_error(values)
    return None if error is None or root == 0 else error / (2.0 * root)


def _first_of_largest(probs: Tensor, at_target: Tensor, confidence: Tensor, target: Tensor) -> Tensor:
    """Whether the target is the most probable class, the first of several, [V, B] of 0 and 1."""
    largest = at_target == confidence
    less = -float((probs - confidence).sign_().sum())  # places that are: quicker than to count what is equal
    if less != probs.numel() - confidence.numel():
        largest = probs.max(dim=0).indices == target
    return largest.double()
