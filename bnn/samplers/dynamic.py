"""Class balance that changes as training goes on: by epoch, or by what is learnt worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError, choose
from bnn.samplers.balanced import ClassRows, shares
from bnn.samplers.epochs import EpochSampler, Plan
from bnn.samplers.hashing import key_of
from bnn.samplers.weights import labels_of


class Schedule(Protocol):
    """Weights of a row of each class at an epoch."""

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        """Weights [C], at least 0, at `epoch` after the metrics that were seen last (none: empty)."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same skew at every epoch."""

    skew: float = 1.0

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        del epoch, metrics
        return rows.weights_of_skew(self.skew)


@dataclass(frozen=True)
class Linear:
    """skew(e) = start + (stop - start) min(e / (num_epochs - 1), 1), so the last epoch has `stop`."""

    start: float
    stop: float
    num_epochs: int

    def __post_init__(self) -> None:
        _require(self.num_epochs >= 1, "Linear(num_epochs=)", "at least 1", self.num_epochs)

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        del metrics
        share = min(epoch / max(self.num_epochs - 1, 1), 1.0)
        return rows.weights_of_skew(self.start + (self.stop - self.start) * share)


@dataclass(frozen=True)
class Exponential:
    """skew(e) = start rate^e, with rate in (0, 1] falling to the natural order of things."""

    start: float
    rate: float

    def __post_init__(self) -> None:
        _require(0 < self.rate <= 1, "Exponential(rate=)", "above 0, at most 1", self.rate)

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        del metrics
        return rows.weights_of_skew(self.start * self.rate**epoch)


@dataclass(frozen=True)
class Table:
    """The skew of the last epoch in the table that has come: `Table({0: 1.0, 10: 0.5})`."""

    skews: Mapping[int, float]

    def __post_init__(self) -> None:
        _require(0 in self.skews and min(self.skews) == 0, "Table", "a skew for epoch 0, none before", self.skews)

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        del metrics
        return rows.weights_of_skew(self.skews[max(begun for begun in self.skews if begun <= epoch)])


@dataclass(frozen=True)
class ByMetric:
    """Classes that are learnt worst are drawn more often.

    w_c proportional to n_c^-skew (floor + need_c / mean need)^strength,
    need_c = 1 - recall_c, or the class's mean loss

    Until the first `update`, w_c is proportional to n_c^-skew.

    Args:
        metric: what `update` is given for each class.
        skew: of the balance that is lifted from.
        strength: how much need counts; 0 not at all.
        floor: keeps classes in play that are learnt well, above 0.
    """

    metric: Literal["recall", "loss"] = "recall"
    skew: float = 1.0
    strength: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        choose("ByMetric(metric=)", self.metric, ("recall", "loss"))
        _require(self.floor > 0, "ByMetric(floor=)", "above 0", self.floor)
        _require(self.strength >= 0, "ByMetric(strength=)", "at least 0", self.strength)

    def weights(self, rows: ClassRows, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        del epoch
        balance = rows.weights_of_skew(self.skew)
        if not metrics:
            return balance
        if self.metric not in metrics:
            raise DataError(
                "update(metrics)",
                want=f"'{self.metric}' of each class, as the schedule says",
                got=", ".join(metrics),
                fix=f"call update({{'{self.metric}': [...]}})",
            )
        values = np.array(metrics[self.metric])
        need = 1.0 - values if self.metric == "recall" else values
        mean = need[rows.counts > 0].mean()
        lift = (self.floor + (need / mean if mean > 0 else np.ones_like(need))) ** self.strength
        lifted = balance * lift
        total: np.ndarray = lifted / lifted.sum()
        return total


class DynamicClassSampler(EpochSampler[int]):
    """Rows drawn with replacement, by class shares that a schedule sets for every epoch.

    P(class c at epoch e) proportional to n_c w_c(e, metrics), rows of a class all alike

    `update(metrics)` holds from the next epoch on: loaders fetch ahead, so anything else would depend
    on their number of workers. **Resampling changes what a posterior is fitted to**; see
    `WeightedIndexSampler`.

    Args:
        labels: class of each row [N], whole numbers from 0, or a data set of such rows.
        schedule: `Constant`, `Linear`, `Exponential`, `Table`, `ByMetric`, or your own with a method
            `weights(rows, epoch, metrics)`.
        num_samples, seed, rank, world_size, drop_last, auto_epoch: as for `WeightedIndexSampler`.

    Raises:
        DataError: labels that are no whole numbers from 0; metrics that are not one number a class.

    Examples:
        >>> sampler = DynamicClassSampler([0] * 90 + [1] * 10, Linear(1.0, 0.0, num_epochs=11))
        >>> [round(float(sampler.class_shares(epoch)[1]), 2) for epoch in (0, 5, 10)]
        [0.5, 0.25, 0.1]
    """

    def __init__(
        self,
        labels: Any,
        schedule: Schedule,
        *,
        num_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        auto_epoch: bool = False,
    ) -> None:
        self._rows, self.schedule = ClassRows(labels_of(labels)), schedule
        self._metrics: dict[str, list[float]] = {}
        self._in_force: dict[str, list[float]] = {}  # the metrics that the present epoch was begun with
        items = len(self._rows.labels) if num_samples is None else num_samples
        super().__init__(items, seed=seed, rank=rank, world_size=world_size, drop_last=drop_last, auto_epoch=auto_epoch)
        self._weights(0, {})

    def update(self, metrics: Mapping[str, Any]) -> None:
        """What each class has come to: `{"recall": [C]}` or `{"loss": [C]}`, as the schedule asks.

        Raises:
            DataError: not one finite number of at least 0 a class, or a recall above 1.
        """
        try:
            found = {name: [float(value) for value in values] for name, values in metrics.items()}
        except TypeError as error:
            raise DataError(
                "update(metrics)", want="a list of numbers, one a class", got=str(metrics)[:100], fix="pass such lists"
            ) from error
        for name, values in found.items():
            high = 1.0 if name == "recall" else np.inf
            if len(values) != len(self._rows.counts) or not all(
                0 <= value <= high and value < np.inf for value in values
            ):
                raise DataError(
                    f"update(metrics) '{name}'",
                    want=f"{len(self._rows.counts)} finite numbers of at least 0, one a class"
                    + (", at most 1" if name == "recall" else ""),
                    got=str(values)[:100],
                    fix="give a class without rows 0",
                )
        self._weights(self.epoch, found)
        self._metrics = found

    @property
    def wants_metrics(self) -> bool:
        """Whether the schedule may look at what `update` is told."""
        return not isinstance(self.schedule, (Constant, Linear, Exponential, Table))

    def reset(self) -> None:
        """Forget every `update`: the next iteration begins as that of a new sampler."""
        self._metrics, self._in_force = {}, {}

    def class_shares(self, epoch: int | None = None) -> Tensor:
        """Chance of each class at a draw of an epoch, the present one by default, after the last update; [C]."""
        metrics = self._in_force if epoch is None else self._metrics
        return torch.from_numpy(self._shares(self.epoch if epoch is None else epoch, metrics))

    def natural_shares(self) -> Tensor:
        """Share of each class among the rows, [C]."""
        return torch.from_numpy(self._rows.counts / len(self._rows.labels))

    def probabilities(self) -> Tensor:
        """Chance of each row at a draw of the present epoch, [N]."""
        return torch.from_numpy(self._rows.probabilities(self._shares(self.epoch, self._in_force)))

    def expected_counts(self) -> Tensor:
        """How often each class is drawn in the present epoch, on average, [C]."""
        return self.num_items * self.class_shares()

    def importance_weights(self, indices: Any) -> Tensor:
        """1 / (N pi_i) of these rows [B] in the present epoch; see `WeightedIndexSampler.importance_weights`."""
        return torch.from_numpy(self._rows.importance(indices, self._shares(self.epoch, self._in_force)))

    def freeze(self, epoch: int, *, resumed: bool) -> Plan:
        if not resumed:
            self._in_force = self._metrics
        return self._rows.draws(self._shares(epoch, self._in_force), key_of(self.seed, "classes", epoch))

    @property
    def num_rows(self) -> int:
        return len(self._rows.labels)

    @property
    def reweights(self) -> bool:
        return self.schedule != Constant(0.0)

    @property
    def each_once(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        known = is_dataclass(self.schedule)  # others may print as the place in memory where they are
        return {"labels": self._rows.digest, "schedule": repr(self.schedule) if known else type(self.schedule).__name__}

    def memory(self) -> dict[str, Any]:
        return {"metrics": self._metrics, "in_force": self._in_force}

    def remember(self, memory: dict[str, Any]) -> None:
        self._metrics, self._in_force = memory["metrics"], memory["in_force"]

    def _shares(self, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        return shares(self._rows.counts, self._weights(epoch, metrics))

    def _weights(self, epoch: int, metrics: Mapping[str, list[float]]) -> np.ndarray:
        found = np.asarray(self.schedule.weights(self._rows, epoch, metrics), dtype=np.float64)
        counts = self._rows.counts
        if found.shape != counts.shape or not ((found >= 0) & np.isfinite(found)).all() or not (found * counts).any():
            raise DataError(
                f"schedule {type(self.schedule).__name__}",
                want=f"{len(counts)} finite weights of at least 0, one of a class with rows above 0",
                got=str(found)[:100],
                fix=f"mend its weights at epoch {epoch}",
            )
        return found


def _require(holds: bool, place: str, want: str, got: Any) -> None:
    if not holds:
        raise ConfigError(place, want=want, got=str(got), fix="change it")
