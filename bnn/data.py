"""Data ready for a module: read, split, standardised with their training rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.corruptions import corrupted as corrupted
from bnn.errors import ConfigError, DataError
from bnn.formats import Raw, is_built_in, read
from bnn.likelihoods import Task
from bnn.seeding import derive
from bnn.types import Batch

TEST_SHARE = 0.2


class Standardiser(NamedTuple):
    """x -> (x - loc) / scale, fitted on training rows; a constant column keeps scale 1."""

    loc: Tensor
    scale: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.loc) / self.scale

    @staticmethod
    def of(values: Tensor) -> Standardiser:
        scale = values.std(dim=0, correction=0)
        return Standardiser(values.mean(dim=0), torch.where(scale > 1e-12, scale, torch.ones_like(scale)))

    @staticmethod
    def from_config(config: Mapping[str, list[float]] | None, like: Tensor) -> Standardiser | None:
        """The standardiser that `to_config` wrote, for rows of the shape of `like`; None for None."""
        if config is None:
            return None
        try:
            loc, scale = (
                torch.tensor(config[key], dtype=torch.float64).view(like.shape[1:]) for key in ("loc", "scale")
            )
        except RuntimeError as error:
            raise DataError(
                "data",
                want=f"rows of {len(config['loc'])} values, as the bank was fitted to",
                got=f"rows of shape {list(like.shape[1:])}",
                fix="choose data of the same columns",
            ) from error
        return Standardiser(loc, scale)

    def to_config(self) -> dict[str, list[float]]:
        return {"loc": self.loc.flatten().tolist(), "scale": self.scale.flatten().tolist()}


class Units(NamedTuple):
    """target = standardised * scale + loc; scalars, or [C] for several targets."""

    loc: Tensor
    scale: Tensor


class DataSet(NamedTuple):
    """Rows ready for a module: float32 inputs, int64 classes or standardised float32 targets."""

    train: Batch
    test: Batch
    task: Task
    num_outputs: int
    target: Standardiser | None  # of a regression's targets
    inputs: Standardiser | None
    record: dict[str, Any]  # what `bank.json` keeps of the data

    @property
    def input_shape(self) -> list[int]:
        return list(self.train.x.shape[1:])

    @property
    def units(self) -> Units:
        """What leads predictions back to the target's own units."""
        if self.target is None:
            return Units(torch.zeros(()), torch.ones(()))
        return Units(self.target.loc, self.target.scale)


def load_data(
    spec: str,
    *,
    split: int = 0,
    task: Task | None = None,
    root: str | Path | None = None,
    counts: bool = False,
    fitted: Mapping[str, Any] | None = None,
) -> DataSet:
    """Read a data set, split off its test rows and standardise with its training rows.

    Args:
        spec: `digits`, `digits-shuffled` (their pixels permuted, one order an image), `digits-KIND-SEVERITY`
            (see `corrupted`: the rows of `digits`, also in their split), `diabetes`, `FILE.csv:TARGET`, `FILE.npz` (arrays x and y, and x_test and y_test if it brings a test
            set), a UCI folder with `data.txt` and `index_{train,test}_{k}.txt`, a folder of MNIST
            files in IDX format, or `package.module:function`, which returns such arrays as a dict.
        split: k of a UCI folder; the seed of the 20 % test split of data that bring none.
        task: for a CSV file: whether a numeric target is a class or a number (the default).
        root: where relative paths begin.
        counts: leave the targets of a regression as they are: counts mean nothing when they are scaled.
        fitted: the `record` of the data that a bank was fitted to. Its standardisers and classes are
            used; and if these are other data, all of them are test rows.

    Raises:
        DataError: the file is missing or malformed, or holds NaN; column and row are named.
        ConfigError: no such data set.
    """
    raw = read(spec, split, task, Path(root or "."), None if fitted is None else fitted["classes"])
    _check_finite(raw, spec)
    digest = _sha256(raw)
    if fitted is not None:
        _check_fitted(raw, spec, split, digest, fitted)
        if fitted["sha256"] != digest:
            raw = raw._replace(split=(np.arange(0), np.arange(len(raw.x))))
    train_rows, test_rows = raw.split or _seeded_split(len(raw.x), split)
    x, y = torch.from_numpy(np.ascontiguousarray(raw.x)).to(torch.float64), torch.from_numpy(raw.y)
    if fitted is not None:
        inputs, target = (Standardiser.from_config(fitted[key], like) for key, like in (("inputs", x), ("target", y)))
    else:
        inputs = Standardiser.of(x[train_rows]) if raw.standardise else None
        target = Standardiser.of(y[train_rows].double()) if raw.task == "regression" and not counts else None
    x = (inputs(x) if inputs else x).to(torch.float32)
    if raw.task == "classification":
        y = y.to(torch.int64)
        num_outputs = int(y.max()) + 1 if raw.classes is None else len(raw.classes)
    else:
        y = (target(y.double()) if target else y).to(torch.float32)
        num_outputs = 1 if y.dim() == 1 else y.shape[1]
    record = {
        "spec": spec,
        "split": split,
        "task": raw.task,
        "num_train": len(train_rows),
        "num_test": len(test_rows),
        "sha256": digest,
        "classes": raw.classes,
        "columns": raw.columns,
        "inputs": inputs.to_config() if inputs else None,
        "target": target.to_config() if target else None,
    }
    train, test = Batch(x[train_rows], y[train_rows]), Batch(x[test_rows], y[test_rows])
    return DataSet(train, test, raw.task, num_outputs, target, inputs, record)


def load_outside(spec: str, like: DataSet, *, root: str | Path | None = None, split: int = 0) -> Batch:
    """Out-of-distribution rows, put through the standardiser of `like`.

    They are the test rows of a built-in set or of data that bring a split, and all rows of other files.

    Raises:
        DataError: rows of another shape.
    """
    raw = read(spec, split, None, Path(root or "."))
    _check_finite(raw, spec)
    if is_built_in(spec) or raw.split is not None:
        _, rows = raw.split or _seeded_split(len(raw.x), split)
    else:
        rows = np.arange(len(raw.x))
    x = torch.from_numpy(np.ascontiguousarray(raw.x))[rows].to(torch.float64)
    if list(x.shape[1:]) != like.input_shape:
        raise DataError(
            f"ood '{spec}'",
            want=f"rows of shape {like.input_shape}",
            got=str(list(x.shape[1:])),
            fix="choose data of the same shape",
        )
    x = (like.inputs(x) if like.inputs else x).to(torch.float32)
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


def held_out(data: DataSet, *, share: float = 0.5, seed: int = 0) -> tuple[Batch, Batch]:
    """Test rows as those to calibrate on and the rest, on which the calibrated predictive is judged.

    The first round(share N) of the N test rows in an order drawn by `seed`, and those after them.

    Args:
        data: of `load_data`.
        share: of the test rows that calibrate, in (0, 1).
        seed: of their choice.

    Returns:
        Rows for the calibration, and the rest; both with one row at least.

    Raises:
        ConfigError: another share.
        DataError: fewer than two test rows.

    Examples:
        >>> held, rest = held_out(load_data("diabetes"), share=0.25)
        >>> len(held.y), len(rest.y)
        (22, 66)
    """
    if not 0.0 < share < 1.0:
        raise ConfigError("share", want="a number between 0 and 1", got=str(share), fix="0.5 takes half of the rows")
    x, y, _ = data.test
    if len(y) < 2:
        raise DataError("data", want="at least 2 test rows", got=str(len(y)), fix="bring more data")
    order = torch.from_numpy(np.random.default_rng(derive(seed, "held out")).permutation(len(y)))
    cut = min(max(1, round(share * len(y))), len(y) - 1)
    return Batch(x[order[:cut]], y[order[:cut]]), Batch(x[order[cut:]], y[order[cut:]])


def _check_fitted(raw: Raw, spec: str, split: int, digest: str, fitted: Mapping[str, Any]) -> None:
    """Raise DataError for data that a bank cannot be judged on: its own on another split, or other columns."""
    if fitted["sha256"] == digest and split != fitted["split"]:
        raise DataError(
            f"data '{spec}'",
            want=f"split {fitted['split']}, which the bank was fitted on",
            got=str(split),
            fix="leave the split out: on another one the bank has seen test rows",
        )
    if raw.columns is not None and fitted.get("columns") not in (None, raw.columns):
        raise DataError(
            f"data '{spec}'",
            want=f"columns {', '.join(fitted['columns'])}, as the bank was fitted to",
            got=", ".join(raw.columns),
            fix="bring the columns into that order",
        )
    if raw.task != fitted["task"]:
        raise DataError(
            f"data '{spec}'", want=f"a {fitted['task']}", got=f"a {raw.task}", fix="choose data of the same task"
        )


def _seeded_split(rows: int, split: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows: 20 % for the test, drawn by the split's number."""
    if rows < 2:
        raise DataError("data", want="at least 2 rows", got=str(rows), fix="bring more data")
    order = np.random.default_rng(derive(split, "split")).permutation(rows)
    cut = rows - max(1, round(TEST_SHARE * rows))
    return order[:cut], order[cut:]


def _check_finite(raw: Raw, spec: str) -> None:
    for name, array in (("x", raw.x), ("y", raw.y)):
        bad = ~np.isfinite(array.astype(np.float64))
        if bad.any():
            row = int(np.argwhere(bad)[0][0])
            raise DataError(
                f"data '{spec}'",
                want="finite numbers",
                got=f"NaN or Inf in row {row} of {name}",
                fix="drop or impute such rows",
            )


def _sha256(raw: Raw) -> str:
    """Of the rows as they are, or were before a corruption: a bank that saw digits has seen them blurred too."""
    digest, x = hashlib.sha256(), raw.x if raw.clean is None else raw.clean
    for array in (x.astype(np.float64), raw.y.astype(np.float64)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
