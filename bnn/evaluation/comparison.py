"""How faithful one bank's predictive is to another's on the same inputs, streamed batch after batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bnn.errors import ConfigError, DataError
from bnn.evaluation.batches import batches
from bnn.evaluation.wasserstein import LEAST_DF, has_distance, wasserstein
from bnn.functional import FunctionalModel
from bnn.likelihoods import Likelihood, Task, likelihood_from_config
from bnn.mixtures import Mixture
from bnn.predictive import mixture, predict
from bnn.types import Batch

CLASSES = {
    "agreement": "share of rows with the same most probable class",
    "total_variation": "mean of 1/2 sum_c |p_c - q_c|, in [0, 1]",
}
TARGETS = {
    "w2": "mean Wasserstein distance of order 2 between the two predictives, target units",
    "mean_difference": "mean of |mean of the other - mean of the first|, target units",
    "std_difference": "mean of |standard deviation of the other - that of the first|, target units",
    "std_bias": "mean of the standard deviation of the other less that of the first, target units",
}


class Closeness(NamedTuple):
    """One figure of a comparison: a mean over rows, its standard error over them, and that of its quadrature."""

    value: float
    error: float | None  # None of a single row
    quadrature_error: float | None  # None of what is exact
    definition: str


@dataclass(frozen=True)
class Comparison:
    """How far a bank's predictive is from that of a reference.

    `figures` maps a name to its `Closeness`, `rows` a name to a value a row [N]; of several targets the mean over them.
    """

    task: Task
    figures: dict[str, Closeness]
    rows: dict[str, Tensor]
    num_samples: tuple[int, int]  # of the reference, and of the other
    notes: tuple[str, ...] = ()  # what is left out, and why
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.rows.values())))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        figures = {
            name: {
                "value": figure.value,
                "standard_error": figure.error,
                "quadrature_error": figure.quadrature_error,
                "n": self.num_rows,
                "definition": figure.definition,
            }
            for name, figure in self.figures.items()
        }
        return {
            **self.about,
            "task": self.task,
            "num_rows": self.num_rows,
            "num_samples": list(self.num_samples),
            "metrics": figures,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.num_rows} rows, {self.num_samples[0]} and {self.num_samples[1]} samples"]
        for name, figure in self.figures.items():
            lines.append(f"{name:16} {figure.value:.4g}" + ("" if figure.error is None else f" ± {figure.error:.2g}"))
        return "\n".join([*lines, *self.notes])


def compare(
    one: FunctionalModel,
    other: FunctionalModel,
    data: Any,
    *,
    likelihood: Likelihood | None = None,
    loc: float | Tensor = 0.0,
    scale: float | Tensor = 1.0,
    batch_size: int = 512,
    progress: bool | None = None,
) -> Comparison:
    """Say how close the predictive of a bank is to that of a reference, such as mean-field to HMC.

    agreement = mean_n 1[argmax_c p_n = argmax_c q_n],  total variation = mean_n 1/2 sum_c |p_nc - q_nc|

    Of a regression: W2^2 = integral over u of (F^-1(u) - G^-1(u))^2 of each row and target, and the differences of means
    and standard deviations; W2^2 is at least the sum of their squares, and equal to it where both are normal. Nothing is
    said of which one is right: no targets are looked at.

    Args:
        one: the reference, a module under a bank.
        other: another one under its own; the modules may differ, their targets may not.
        data: inputs alone, or what `evaluate` takes: a pair of tensors, a data set, a loader.
        likelihood: what outputs of both mean; that of each bank by default.
        loc: the mean that targets were standardised with, or one a target [C].
        scale: their standard deviation, so that distances are in the target's own units.
        batch_size: rows at once, where `data` is no loader.
        progress: show a bar on stderr; by default where stderr is a terminal.

    Returns:
        A `Comparison`: figures with standard errors over rows, and the values of each row.

    Raises:
        ConfigError: one is of classes and the other of targets, or a bank names no likelihood and none is given.
        DataError: other numbers of classes or targets, or outputs of a sample that are not finite; its index is named.

    Examples:
        >>> import bnn
        >>> module = torch.nn.Linear(3, 2)
        >>> banks = [bnn.Bank.from_state_dicts([module.state_dict()] * size, module=module) for size in (4, 5)]
        >>> nets = [bnn.FunctionalModel(module, bank) for bank in banks]
        >>> found = compare(*nets, torch.zeros(7, 3), likelihood=bnn.likelihoods.Categorical())
        >>> found.figures["agreement"].value, round(found.figures["total_variation"].value, 6)
        (1.0, 0.0)

    Source: Izmailov et al. (2021), arXiv:2104.14421, on the fidelity of approximations to HMC.
    """
    nets = {"the reference": one, "the other bank": other}
    meant = [likelihood or likelihood_from_config(net.bank.info.get("likelihood")) for net in nets.values()]
    tasks = [each.task for each in meant]
    if tasks[0] != tasks[1]:
        raise ConfigError(
            "compare", want="two banks of one task", got=f"a {tasks[0]} and a {tasks[1]}", fix="choose two of one"
        )
    rows: dict[str, list[Tensor]] = {}
    for batch in _rows(data, batch_size, progress):
        if tasks[0] == "classification":
            probs = [predict(net, batch.x, likelihood=m).mean for net, m in zip(nets.values(), meant, strict=True)]
            found = _class_rows(*probs)
        else:
            mixed = [
                mixture(net, batch.x, likelihood=m, loc=loc, scale=scale)
                for net, m in zip(nets.values(), meant, strict=True)
            ]
            found = _target_rows(*mixed)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    if not rows:
        raise DataError("data", want="at least one row", got="none", fix="check the data set")
    kept = {name: torch.cat(values) for name, values in rows.items()}
    notes = () if tasks[0] == "classification" or "w2" in kept else (_without_distance(),)
    figures = _figures(kept, CLASSES if tasks[0] == "classification" else TARGETS)
    return Comparison(tasks[0], figures, kept, (len(one.bank), len(other.bank)), notes)


def _rows(data: Any, batch_size: int, progress: bool | None) -> Iterator[Batch]:
    """Batches of the data, whose targets are not looked at; inputs may come alone."""
    if isinstance(data, (Tensor, dict)):
        length = len(data) if isinstance(data, Tensor) else len(next(iter(data.values())))
        data = data, torch.zeros(length)
    elif not isinstance(data, (tuple, list, Dataset, DataLoader)):
        raise DataError(
            "compare", want="inputs, or rows with targets", got=type(data).__name__, fix="pass a tensor of inputs"
        )
    return batches(data, batch_size, "compare", progress, targets=False)


def _class_rows(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    if p.shape != q.shape:
        raise _unlike("classes", p, q)
    return {
        "agreement": (p.argmax(dim=1) == q.argmax(dim=1)).double(),
        "total_variation": 0.5 * (p - q).abs().sum(dim=1),
    }


def _target_rows(p: Mixture, q: Mixture) -> dict[str, Tensor]:
    if p.mean.shape != q.mean.shape:
        raise _unlike("targets", p.mean, q.mean)
    stds = [(each.aleatoric + each.epistemic).sqrt() for each in (p, q)]  # [B, C]
    rows = {"mean_difference": (q.mean - p.mean).abs()}
    if all(bool(std.isfinite().all()) for std in stds):  # not of Student's t with df up to 2
        rows |= {"std_difference": (stds[1] - stds[0]).abs(), "std_bias": stds[1] - stds[0]}
    if has_distance(p) and has_distance(q):
        found = wasserstein(p, q)
        rows |= {"w2": found.value, "w2_error": found.error}
    return {name: values.mean(dim=1) for name, values in rows.items()}


def _figures(rows: dict[str, Tensor], definitions: dict[str, str]) -> dict[str, Closeness]:
    figures = {}
    for name, definition in definitions.items():
        if name not in rows:
            continue
        values = rows[name]
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else None
        quadrature = float(rows[f"{name}_error"].mean()) if f"{name}_error" in rows else None
        figures[name] = Closeness(float(values.mean()), error, quadrature, definition)
    return figures


def _without_distance() -> str:
    return f"w2 is left out: of Student's t it is told from df = {LEAST_DF:g} on, and infinite for df up to 2"


def _unlike(what: str, p: Tensor, q: Tensor) -> DataError:
    return DataError(
        "compare",
        want=f"predictives of as many {what}",
        got=f"{p.shape[1]} of the reference and {q.shape[1]} of the other",
        fix="compare banks of one task on the same data",
    )
