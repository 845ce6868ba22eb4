"""What every metric asks of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

from bnn.errors import ConfigError, DataError


def check_numbers(place: str, **values: Tensor) -> None:
    """Raise DataError where a row holds a NaN."""
    for name, each in values.items():
        if torch.isnan(each).any():
            raise DataError(
                f"{place}({name}=)",
                want="numbers",
                got=f"NaN in row {int(torch.isnan(each).nonzero()[0, 0])}",
                fix="find the sample or the input that it comes from",
            )


def check_filled(place: str, **values: Tensor) -> None:
    """Raise DataError where there are no rows, whose mean would be NaN, or where one holds a NaN."""
    for name, each in values.items():
        if not each.numel():
            raise DataError(
                f"{place}({name}=)", want="at least one row", got=f"{list(each.shape)}", fix="check the data set"
            )
    check_numbers(place, **values)


def check_alike(place: str, **values: Tensor) -> None:
    """Raise DataError unless all have one shape, and hold no NaN."""
    shapes = [list(each.shape) for each in values.values()]
    if any(shape != shapes[0] for shape in shapes):
        raise DataError(
            place,
            want=f"{' and '.join(values)} of one shape",
            got=" and ".join(map(str, shapes)),
            fix="reshape one of them: nothing is broadcast",
        )
    check_numbers(place, **values)


def check_rows(place: str, **values: Tensor) -> None:
    """Raise DataError unless all are [N] of one N, at least 1, and hold no NaN."""
    shapes = [list(each.shape) for each in values.values()]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise DataError(
            place,
            want=f"{' and '.join(values)} of {'one shape' if len(shapes) > 1 else 'shape'} [N]",
            got=" and ".join(map(str, shapes)),
            fix="pass one number a row",
        )
    check_filled(place, **values)


def check_level(place: str, level: float) -> None:
    """Raise ConfigError unless 0 < level < 1."""
    if not 0.0 < level < 1.0:
        raise ConfigError(f"{place}(level=)", want="a probability between 0 and 1", got=repr(level), fix="pass 0.9")
