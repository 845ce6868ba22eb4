"""The built-in data sets and the file formats of the command line, as arrays."""

from __future__ import annotations

import csv
import gzip
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bnn import corruptions
from bnn.arrays import read_npz
from bnn.errors import ConfigError, DataError
from bnn.likelihoods import Task
from bnn.modules import call, is_reference
from bnn.seeding import derive

MAX_CLASSES = 100_000
BUILT_IN = ("digits", "digits-shuffled", "diabetes")


class Raw(NamedTuple):
    """Rows as they are on disk; `test` numbers the test rows where the data bring a split."""

    x: np.ndarray  # [N, ...]
    y: np.ndarray  # [N], or [N, C] for several targets
    task: Task
    classes: list[str] | None = None
    split: tuple[np.ndarray, np.ndarray] | None = None  # training and test rows
    standardise: bool = True  # digits come in one unit already
    columns: list[str] | None = None  # names of the features, where the file has them
    clean: np.ndarray | None = None  # x before a corruption: by it rows are known again, and split


def read(spec: str, split: int, task: Task | None, root: Path, classes: list[str] | None = None) -> Raw:
    """The rows that a spec of `bnn.data.load_data` names.

    Args:
        classes: names of classes that are known already, in their order.

    Raises:
        DataError, ConfigError: as `load_data` says.
    """
    if is_built_in(spec):
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
        return _from_arrays(spec, call(spec, "data"))
    raise ConfigError(
        "data",
        want=f"{', '.join(BUILT_IN)}, digits-KIND-SEVERITY (KIND {', '.join(corruptions.KINDS)}; SEVERITY 1 to 5), "
        "FILE.csv:TARGET, FILE.npz, a folder or package.module:function",
        got=repr(spec),
        fix="check the name and the path",
    )


def is_built_in(spec: str) -> bool:
    """Whether a spec names data that need no file."""
    return spec in BUILT_IN or corruptions.parse(spec) is not None


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
    x, clean = bunch.data / 16.0, None  # 17 grey levels -> [0, 1]
    if spec == "digits-shuffled":
        random = np.random.default_rng(derive(0, "digits-shuffled"))
        x = random.permuted(x, axis=1)
    x = x.reshape(-1, 1, 8, 8)
    if (corruption := corruptions.parse(spec)) is not None:
        x, clean = corruptions.corrupted(torch.from_numpy(x), *corruption).numpy(), x
    names = [str(name) for name in bunch.target_names]
    return Raw(x, bunch.target, "classification", names, standardise=False, clean=clean)


def _csv(path: Path, target: str, task: Task | None, known: list[str] | None) -> Raw:
    _require_file(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(str(path), want="comma-separated text in UTF-8", got=str(error), fix="convert it") from error
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
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            str(path), want="columns of different names", got=f"'{twice[0]}' twice", fix="rename one of them"
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
    if known is None and task is None and not numeric and any(_is_number(word) for word in words):
        line, word = next((n, word) for n, word in enumerate(words, 2) if not _is_number(word))
        raise DataError(
            f"{path} line {line}",
            want=f"numbers in column '{target}', or names of classes throughout",
            got=repr(word),
            fix="mend the line, or say --task classification if these are classes",
        )
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
        numbers = np.array([classes.index(word) for word in words])
        return Raw(x, numbers, "classification", classes, columns=features)
    values = [_number(path, target, n, word, " for regression") for n, word in enumerate(words, 2)]
    return Raw(x, np.array(values), "regression", columns=features)


def _npz(path: Path) -> Raw:
    _require_file(path)
    return _from_arrays(str(path), read_npz(path, fix="write it with numpy.savez(FILE, x=..., y=...)"))


def _from_arrays(place: str, arrays: Any) -> Raw:
    """Arrays x and y, perhaps x_test and y_test; whole-number y are classes."""
    if not isinstance(arrays, dict) or not {"x", "y"} <= arrays.keys():
        got = ", ".join(arrays) if isinstance(arrays, dict) else type(arrays).__name__
        raise DataError(place, want="arrays x and y", got=got, fix="name them so; x_test and y_test may follow")
    found = {name: np.asarray(arrays[name]) for name in ("x", "y", "x_test", "y_test") if name in arrays}
    for name, array in found.items():
        other = found.get("y" + name[1:])
        fits = array.dtype.kind in "fiub" and array.ndim > 0 and other is not None and other.ndim > 0
        if other is None or not fits or len(array) != len(other) or not len(array):
            raise DataError(
                f"{place} {name}",
                want="numbers, as many rows as its y",
                got=f"{array.dtype} {list(array.shape)}",
                fix="convert or cut it",
            )
    x, y, split = found["x"], found["y"], None
    if "x_test" in found:
        if found["x_test"].shape[1:] != x.shape[1:] or found["y_test"].shape[1:] != y.shape[1:]:
            raise DataError(
                f"{place} x_test",
                want="rows shaped as those of x and y",
                got=f"{list(found['x_test'].shape)}",
                fix="check it",
            )
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
    if classification and y.max() >= MAX_CLASSES:
        raise DataError(
            f"{place} y", want=f"fewer than {MAX_CLASSES} classes", got=str(y.max()), fix="pass floats for a regression"
        )
    x = x.reshape(len(x), -1) if x.ndim == 1 else x
    y = y.astype(np.int64 if classification else np.float64)
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an empty file warns; here it is an error
                found = np.atleast_1d(np.loadtxt(path / name))
        except ValueError as error:
            raise DataError(str(path / name), want="numbers", got=str(error), fix="mend the file") from error
        if not found.size:
            raise DataError(str(path / name), want="numbers", got="none", fix="mend the file")
        return found

    def places(name: str, below: int) -> np.ndarray:
        found = numbers(name).astype(int)
        if found.min() < 0 or found.max() >= below:
            raise DataError(
                str(path / name),
                want=f"numbers in [0, {below})",
                got=f"{found.min()} to {found.max()}",
                fix="mend the file",
            )
        return found

    table = numbers("data.txt")
    table = table.reshape(len(table), -1)
    features = places("index_features.txt", table.shape[1])
    target = int(places("index_target.txt", table.shape[1])[0])
    if not (path / f"index_train_{split}.txt").exists():
        count = len(list(path.glob("index_train_*.txt")))
        raise DataError(
            str(path), want=f"a split from 0 to {count - 1}", got=str(split), fix="pass --split with one of them"
        )
    rows = tuple(places(f"index_{part}_{split}.txt", len(table)) for part in ("train", "test"))
    return Raw(table[:, features], table[:, target], "regression", split=(rows[0], rows[1]))


def _mnist(path: Path) -> Raw:
    def idx(name: str, header: int) -> np.ndarray:
        _require_file(path / name)
        try:
            return np.frombuffer(gzip.decompress((path / name).read_bytes()), np.uint8, offset=header)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise DataError(
                str(path / name), want="a gzip file in IDX format", got=str(error), fix="restore it"
            ) from error

    labels = idx("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64)
    pixels = idx("t10k-images-idx3-ubyte.gz", 16)
    if pixels.size != len(labels) * 784:
        raise DataError(
            str(path), want=f"{len(labels)} images of 28 x 28", got=f"{pixels.size} pixels", fix="restore it"
        )
    images = pixels.reshape(-1, 1, 28, 28) / 255.0
    return Raw(images, labels, "classification", [str(digit) for digit in range(10)], standardise=False)


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
