"""The data sets and file formats that the command line understands."""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError
from bnn.likelihoods import Task
from bnn.modules import is_reference, load
from bnn.seeding import derive
from bnn.types import Batch

TEST_SHARE = 0.2
BUILT_IN = ("digits", "digits-shuffled", "diabetes")


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


class Raw(NamedTuple):
    """Rows as they are on disk; `test` numbers the test rows where the data bring a split."""

    x: np.ndarray  # [N, ...]
    y: np.ndarray  # [N], or [N, C] for several targets
    task: Task
    classes: list[str] | None = None
    split: tuple[np.ndarray, np.ndarray] | None = None  # training and test rows
    standardise: bool = True  # digits come in one unit already


class Units(NamedTuple):
    """target = standardised * scale + loc."""

    loc: float
    scale: float


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
            return Units(0.0, 1.0)
        if self.target.loc.dim():
            raise DataError(
                "data",
                want="one target",
                got=f"{len(self.target.loc)}",
                fix="evaluate several targets through bnn.evaluate, in standardised units",
            )
        return Units(float(self.target.loc), float(self.target.scale))


def load_data(
    spec: str,
    *,
    split: int = 0,
    task: Task | None = None,
    root: str | Path | None = None,
    fitted: Mapping[str, Any] | None = None,
) -> DataSet:
    """Read a data set, split off its test rows and standardise with its training rows.

    Args:
        spec: `digits`, `digits-shuffled` (their pixels permuted, one order an image), `diabetes`,
            `FILE.csv:TARGET`, `FILE.npz` (arrays x and y, and x_test and y_test if it brings a test
            set), a UCI folder with `data.txt` and `index_{train,test}_{k}.txt`, a folder of MNIST
            files in IDX format, or `package.module:function`, which returns such arrays as a dict.
        split: k of a UCI folder; the seed of the 20 % test split of data that bring none.
        task: for a CSV file: whether a numeric target is a class or a number (the default).
        root: where relative paths begin.
        fitted: the `record` of the data that a bank was fitted to. Its standardisers and classes are
            used; and if these are other data, all of them are test rows.

    Raises:
        DataError: the file is missing or malformed, or holds NaN; column and row are named.
        ConfigError: no such data set.
    """
    raw = _read(spec, split, task, Path(root or "."), None if fitted is None else fitted["classes"])
    _check_finite(raw, spec)
    digest = _sha256(raw)
    if fitted is not None and fitted["sha256"] != digest:
        raw = raw._replace(split=(np.arange(0), np.arange(len(raw.x))))
    train_rows, test_rows = raw.split or _seeded_split(len(raw.x), split)
    x, y = torch.from_numpy(np.ascontiguousarray(raw.x)).to(torch.float64), torch.from_numpy(raw.y)
    if fitted is not None:
        inputs, target = (Standardiser.from_config(fitted[key], like) for key, like in (("inputs", x), ("target", y)))
    else:
        inputs = Standardiser.of(x[train_rows]) if raw.standardise else None
        target = Standardiser.of(y[train_rows].double()) if raw.task == "regression" else None
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
        "inputs": inputs.to_config() if inputs else None,
        "target": target.to_config() if target else None,
    }
    train, test = Batch(x[train_rows], y[train_rows]), Batch(x[test_rows], y[test_rows])
    return DataSet(train, test, raw.task, num_outputs, target, inputs, record)


def load_outside(spec: str, like: DataSet, *, root: str | Path | None = None, split: int = 0) -> Batch:
    """Out-of-distribution rows, put through the standardiser of `like`; the test rows of a data set.

    Raises:
        DataError: rows of another shape.
    """
    raw = _read(spec, split, None, Path(root or "."))
    _check_finite(raw, spec)
    _, rows = raw.split or _seeded_split(len(raw.x), split)
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


def _read(spec: str, split: int, task: Task | None, root: Path, classes: list[str] | None = None) -> Raw:
    if spec in BUILT_IN:
        return _built_in(spec)
    path, _, column = spec.rpartition(":")
    if path.endswith(".csv"):
        return _csv(root / path, column, task, classes)
    if spec.endswith(".csv"):
        raise DataError(spec, want="FILE.csv:TARGET", got="no target", fix="add the name of the target's column")
    if spec.endswith(".npz"):
        return _npz(root / spec)
    if (root / spec).is_dir():
        return _folder(root / spec, split)
    if is_reference(spec):
        return _from_arrays(spec, load(spec, "data")())
    raise ConfigError(
        "data",
        want=f"{', '.join(BUILT_IN)}, FILE.csv:TARGET, FILE.npz, a folder or package.module:function",
        got=repr(spec),
        fix="check the name and the path",
    )


def _built_in(spec: str) -> Raw:
    try:
        from sklearn.datasets import load_diabetes, load_digits
    except ImportError as error:
        raise ConfigError(
            f"data '{spec}'",
            want="scikit-learn, which brings it",
            got="none installed",
            fix="pip install 'bnn-toolkit[demo]'",
        ) from error
    if spec == "diabetes":
        bunch = load_diabetes(scaled=False)
        return Raw(bunch.data, bunch.target, "regression")
    bunch = load_digits()
    x = bunch.data / 16.0  # 17 grey levels -> [0, 1]
    if spec == "digits-shuffled":
        random = np.random.default_rng(derive(0, "digits-shuffled"))
        x = random.permuted(x, axis=1)
    names = [str(name) for name in bunch.target_names]
    return Raw(x.reshape(-1, 1, 8, 8), bunch.target, "classification", names, standardise=False)


def _csv(path: Path, target: str, task: Task | None, known: list[str] | None) -> Raw:
    _require_file(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file))
    if len(lines) < 2:
        raise DataError(str(path), want="a header and rows", got=f"{len(lines)} lines", fix="check the file")
    header, rows = lines[0], [line for line in lines[1:] if line]
    if target not in header:
        raise DataError(
            str(path),
            want=f"a column '{target}'",
            got=f"columns {', '.join(header)}",
            fix="name one of them after the colon",
        )
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(
                f"{path} line {number}", want=f"{len(header)} fields", got=str(len(row)), fix="mend the line"
            )
    place = header.index(target)
    features = [name for name in header if name != target]
    if not features:
        raise DataError(
            str(path), want="at least one feature column", got="none", fix="check the separator: it is a comma"
        )
    columns = [
        [_number(path, name, n, row[i]) for n, row in enumerate(rows, 2)] for i, name in enumerate(header) if i != place
    ]
    x = np.array(columns, dtype=np.float64).T
    words = [row[place] for row in rows]
    numeric = all(_is_number(word) for word in words)
    if known is not None or task == "classification" or (task is None and not numeric):
        classes = known or sorted(set(words), key=lambda word: (float(word), word) if numeric else (0.0, word))
        strange = sorted(set(words) - set(classes))
        if strange:
            raise DataError(
                str(path),
                want=f"classes {', '.join(classes)} in '{target}'",
                got=repr(strange[0]),
                fix="drop such rows, or fit a bank that knows the class",
            )
        return Raw(x, np.array([classes.index(word) for word in words]), "classification", classes)
    values = [_number(path, target, n, word, " for regression") for n, word in enumerate(words, 2)]
    return Raw(x, np.array(values), "regression")


def _npz(path: Path) -> Raw:
    _require_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            str(path),
            want="an .npz archive of plain arrays",
            got=str(error),
            fix="write it with numpy.savez(FILE, x=..., y=...)",
        ) from error
    return _from_arrays(str(path), arrays)


def _from_arrays(place: str, arrays: Any) -> Raw:
    """Arrays x and y, perhaps x_test and y_test; whole-number y are classes."""
    if not isinstance(arrays, dict) or not {"x", "y"} <= arrays.keys():
        got = ", ".join(arrays) if isinstance(arrays, dict) else type(arrays).__name__
        raise DataError(place, want="arrays x and y", got=got, fix="name them so; x_test and y_test may follow")
    found = {name: np.asarray(arrays[name]) for name in ("x", "y", "x_test", "y_test") if name in arrays}
    for name, array in found.items():
        other = found.get("y" + name[1:])
        if array.dtype.kind not in "fiub" or other is None or len(array) != len(other) or not len(array):
            raise DataError(
                f"{place} {name}",
                want="numbers, as many rows as its y",
                got=f"{array.dtype} {list(array.shape)}",
                fix="convert or cut it",
            )
    x, y, split = found["x"], found["y"], None
    if "x_test" in found:
        split = np.arange(len(x)), np.arange(len(x), len(x) + len(found["x_test"]))
        x, y = np.concatenate([x, found["x_test"]]), np.concatenate([y, found["y_test"]])
    classification = y.dtype.kind in "iub"
    if classification and (y.ndim != 1 or y.min() < 0):
        raise DataError(
            f"{place} y",
            want="classes numbered from 0, [N]",
            got=f"{list(y.shape)} from {y.min()}",
            fix="number them, or pass floats for a regression",
        )
    x = x.reshape(len(x), -1) if x.ndim == 1 else x
    return Raw(x.astype(np.float64), y, "classification" if classification else "regression", split=split)


def _folder(path: Path, split: int) -> Raw:
    if (path / "data.txt").exists():
        return _uci(path, split)
    if (path / "t10k-images-idx3-ubyte.gz").exists():
        return _mnist(path)
    raise DataError(
        str(path), want="a UCI folder with data.txt or a folder of MNIST files", got="neither", fix="check the path"
    )


def _uci(path: Path, split: int) -> Raw:
    def numbers(name: str) -> np.ndarray:
        _require_file(path / name)
        try:
            return np.loadtxt(path / name)
        except ValueError as error:
            raise DataError(str(path / name), want="numbers", got=str(error), fix="mend the file") from error

    table = numbers("data.txt")
    features, target = numbers("index_features.txt").astype(int), int(numbers("index_target.txt"))
    if not (path / f"index_train_{split}.txt").exists():
        count = len(list(path.glob("index_train_*.txt")))
        raise DataError(
            str(path), want=f"a split from 0 to {count - 1}", got=str(split), fix="pass --split with one of them"
        )
    rows = tuple(numbers(f"index_{part}_{split}.txt").astype(int) for part in ("train", "test"))
    return Raw(table[:, features], table[:, target], "regression", split=(rows[0], rows[1]))


def _mnist(path: Path) -> Raw:
    def idx(name: str, header: int) -> np.ndarray:
        _require_file(path / name)
        return np.frombuffer(gzip.decompress((path / name).read_bytes()), np.uint8, offset=header)

    labels = idx("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64)
    images = idx("t10k-images-idx3-ubyte.gz", 16).reshape(len(labels), 1, 28, 28) / 255.0
    return Raw(images, labels, "classification", [str(digit) for digit in range(10)], standardise=False)


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
    digest = hashlib.sha256()
    for array in (raw.x.astype(np.float64), raw.y.astype(np.float64)):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(
            str(path), want="a file", got="none", fix="check the path, or say where paths begin with --data-root"
        )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _number(path: Path, column: str, line: int, word: str, why: str = "") -> float:
    if not _is_number(word):
        raise DataError(
            f"{path} line {line}",
            want=f"a number in column '{column}'{why}",
            got=repr(word),
            fix="encode it as numbers, or drop the column or row",
        )
    return float(word)
