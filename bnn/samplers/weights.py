"""How likely each row is to be drawn: from classes, files, data sets, or what a predictive is unsure of."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from bnn.arrays import read_array
from bnn.errors import ConfigError, DataError, choose

Score: TypeAlias = Literal["mutual_information", "entropy", "expected_entropy", "epistemic", "aleatoric"]
SCORES: tuple[str, ...] = ("mutual_information", "entropy", "expected_entropy", "epistemic", "aleatoric")


@runtime_checkable
class HasWeights(Protocol):
    """A data set that brings a weight a row."""

    @property
    def weights(self) -> Any: ...


def class_weights(labels: Any, skew: float = 1.0, *, max_ratio: float | None = None) -> Tensor:
    """Weight of a row of each class, so that classes are drawn as balanced as the skew says.

    w_c proportional to n_c^-skew, so class c is drawn with probability proportional to n_c^(1 - skew)

    Skew 0 is the natural order of things, 0.5 draws by the square root of the counts, 1 draws all
    classes alike, above 1 favours the rare ones. Tempered sampling p_c ~ n_c^(1/T) is skew = 1 - 1/T.

    Args:
        labels: class of each row, whole numbers [N] from 0, or a data set of such rows.
        skew: any finite number.
        max_ratio: largest weight over smallest, at least 1; larger weights are cut to it.

    Returns:
        Weights [C], float64, summing to 1 over classes; 0 for numbers that no row has.

    Raises:
        DataError: labels that are no whole numbers from 0.
        ConfigError: an option out of range.

    Examples:
        >>> class_weights([0, 0, 0, 1]).tolist()  # a row of class 1 is drawn three times as often
        [0.25, 0.75]
    """
    check_skew(skew)
    if max_ratio is not None and not max_ratio >= 1:
        raise ConfigError("max_ratio", want="at least 1", got=str(max_ratio), fix="leave it out")
    return torch.from_numpy(weights_of_counts(np.bincount(labels_of(labels)), skew, max_ratio))


def check_skew(skew: float) -> None:
    """Raise ConfigError unless the skew is a finite number."""
    if not isinstance(skew, (int, float, np.number)) or not np.isfinite(skew):
        raise ConfigError("skew", want="a finite number", got=repr(skew), fix="0 is natural, 1 balanced")


def weights_of_counts(counts: np.ndarray, skew: float, max_ratio: float | None = None) -> np.ndarray:
    """w_c proportional to n_c^-skew, summing to 1; 0 where a class has no rows."""
    seen = counts > 0
    log_weight = -skew * np.log(np.where(seen, counts, 1))  # powers of large skews would overflow
    if max_ratio is not None:
        log_weight = np.minimum(log_weight, log_weight[seen].min() + np.log(max_ratio))
    weights = np.where(seen, np.exp(log_weight - log_weight[seen].max()), 0.0)
    total: np.ndarray = weights / weights.sum()
    return total


def labels_of(source: Any) -> np.ndarray:
    """Class of each row, int64 [N], of an array or of a data set's `targets`, `labels`, `y` or last tensor.

    Raises:
        DataError: none of these, or anything but whole numbers from 0.
    """
    labels = as_array(_labels_in(source))
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
        raise DataError(
            "labels",
            want="one whole number a row, the class, counted from 0",
            got=f"{labels.dtype} {list(labels.shape)}",
            fix="pass int64 labels [N]; number text labels with numpy.unique(..., return_inverse=True)",
        )
    if labels.min() < 0:
        raise DataError("labels", want="classes from 0", got=str(labels.min()), fix="number the classes from 0")
    if labels.max() > 10 * len(labels) + 2**16:
        raise DataError(
            "labels",
            want="classes numbered from 0 without wide gaps",
            got=f"class {labels.max()} among {len(labels)} rows",
            fix="number them with numpy.unique(..., return_inverse=True)",
        )
    return copied(labels, np.int64)


def _labels_in(source: Any) -> Any:
    """What a data set calls its labels, also through `Subset` and `ConcatDataset`; other things as they are."""
    if isinstance(source, Subset):
        return as_array(_labels_in(source.dataset))[np.asarray(source.indices)]
    if isinstance(source, ConcatDataset):
        return np.concatenate([as_array(_labels_in(part)) for part in source.datasets])
    for name in ("targets", "labels", "y"):
        if hasattr(source, name):
            return getattr(source, name)
    if getattr(source, "tensors", None):  # a TensorDataset, or tensors in memory
        return source.tensors[-1]
    return _no_data_set(source, "labels")


def _no_data_set(source: Any, what: str) -> Any:
    """The source, unless it is a data set, which would be read row by row only to be refused."""
    if isinstance(source, Dataset):
        raise DataError(
            what,
            want=f"an array, or a data set that has {what} as an attribute",
            got=f"a {type(source).__name__} without",
            fix=f"collect them once, and pass the array [N] of {what}",
        )
    return source


def weights_of(source: Any, *, rows: int | None = None) -> np.ndarray:
    """Weights of rows, float64 [N]: from an array, a file, or a data set's `weights`.

    Raises:
        DataError: not one finite weight of at least 0 a row, or none above 0.
    """
    if isinstance(source, (str, Path)):
        place, found = f"weights '{source}'", read_array(source)
    else:
        place, found = "weights", source.weights if isinstance(source, HasWeights) else _no_data_set(source, "weights")
    found = as_array(found)
    if found.dtype.kind not in "iuf" or found.ndim != 1 or not found.size:
        raise DataError(
            place, want="numbers [N], one a row", got=f"{found.dtype} {list(found.shape)}", fix="pass a flat array"
        )
    if rows is not None and len(found) != rows:
        raise DataError(
            place,
            want=f"{rows} weights, one a row",
            got=str(len(found)),
            fix="weights of classes become weights of rows as weights[labels]",
        )
    weights = copied(found, np.float64)
    low, high = weights.min(), weights.max()  # NaN spreads to both
    if not (low >= 0 and high < np.inf):
        bad = int(np.argmax(~(np.isfinite(weights) & (weights >= 0))))
        raise DataError(
            place, want="finite weights of at least 0", got=f"{weights[bad]} in row {bad}", fix="mend that row"
        )
    if not high > 0:
        raise DataError(place, want="a weight above 0", got="none", fix="give the rows to be drawn one")
    return weights


def weights_from_uncertainty(predictive: Any, score: Score = "mutual_information", *, uniform: float = 0.1) -> Tensor:
    """Weights by which rows that a predictive is unsure of are drawn more often.

    w_i = (1 - a) s_i / mean(s) + a, with s the score and a the share that is drawn uniformly

    The uniform share keeps every row in play, and bounds importance weights by 1 / a.

    Args:
        predictive: of all N rows, as `predict` gives it.
        score: for classes `"mutual_information"` (epistemic), `"expected_entropy"` (aleatoric) or
            `"entropy"` (their sum); for regressions `"epistemic"` or `"aleatoric"` variance, summed over outputs.
        uniform: a, in (0, 1].

    Returns:
        Weights [N] with mean 1, float64.

    Raises:
        ConfigError: a score that the predictive has not, or an `uniform` out of range.

    Source: of the uniform share, Hesterberg (1995), Technometrics 37(2), defensive mixtures.
    """
    choose("score", score, SCORES)
    if not 0 < uniform <= 1:
        raise ConfigError("uniform", want="above 0, at most 1", got=str(uniform), fix="pass 0.1")
    if not hasattr(predictive, score):
        known = [name for name in SCORES if hasattr(predictive, name)]
        raise ConfigError(
            "score",
            want=f"one that a {type(predictive).__name__} has",
            got=repr(score),
            fix=f"choose {' or '.join(known)}",
        )
    values: Tensor = getattr(predictive, score).double()
    values = values.flatten(1).sum(dim=1) if values.dim() > 1 else values  # [N]
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).nonzero()[0])
        raise DataError(
            f"predictive.{score}", want="finite values", got=f"{values[row]} in row {row}", fix="drop that row"
        )
    mean = values.mean()
    relative = values / mean if mean > 0 else torch.ones_like(values)
    return (1 - uniform) * relative + uniform


def as_array(values: Any) -> np.ndarray:
    """Values as an array; one of no numbers, which every caller refuses, where that cannot be."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no such dtype
        return np.asarray(values)
    except (ValueError, TypeError):  # ragged lists, objects
        return np.array(None)


def copied(array: np.ndarray, dtype: type) -> np.ndarray:
    """A copy in this dtype, so that what its owner does to the array later changes no draw.

    Memory that torch allocates was measured to be much faster to touch first than NumPy's.
    """
    found: np.ndarray = torch.empty(len(array), dtype=torch.float64 if dtype is np.float64 else torch.int64).numpy()
    found[:] = array
    return found


def digest_of(array: np.ndarray) -> str:
    """A short name for the content of an array."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()
