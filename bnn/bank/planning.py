"""What a bank will take on disk, before there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from bnn.bank import format as fmt
from bnn.bank.part import MOST_FILES, shard_metadata
from bnn.bank.writer import rows_per_shard
from bnn.errors import ConfigError
from bnn.layout import Layout


class BankSize(NamedTuple):
    """What a bank takes: of one sample, of a shard, and in all."""

    num_samples: int
    num_values: int  # P, the numbers in one sample
    row_bytes: int  # of one sample with its columns
    rows_per_shard: int  # at most
    num_shards: int  # if none is committed early
    num_bytes: int  # shards and base.safetensors; JSON and states come to it


def size_of(
    layout: Layout, num_samples: int, *, columns: Sequence[str] = (), base: Mapping[str, Tensor] | None = None
) -> BankSize:
    """The size of a bank that is to be written, but for its JSON files and states.

    bytes = sum over shards (header + R (P values + columns) + pads) + base.safetensors

    It is exact but for two things: a header is counted with checksums of ten digits, and a shorter one can save its
    last 4 KiB; a shard that is committed early, because its first row has waited ten seconds, costs a header more.

    Args:
        layout: of the samples.
        num_samples: S, at least 1.
        columns: names of the method's own columns, float64 each.
        base: what the bank keeps once: parameters outside the sample, and buffers.

    Raises:
        ConfigError: `num_samples` is below 1, or more than the shards of a writer hold.

    Examples:
        >>> from torch import nn
        >>> from bnn.layout import layout_of
        >>> size = size_of(layout_of(nn.Linear(99, 10)), 500)
        >>> size.num_values, size.row_bytes, size.num_shards, size.num_bytes
        (1000, 4032, 1, 2020768)
    """
    if num_samples < 1:
        raise ConfigError("num_samples", want="at least 1", got=str(num_samples), fix="raise it")

    @cache
    def shard_bytes(rows: int, digits: int) -> int:
        return shard_size(layout, rows, 10 ** (digits - 1), columns=columns)

    most = rows_per_shard(layout.num_bytes)
    firsts = range(0, num_samples, most)
    if len(firsts) > MOST_FILES:
        raise ConfigError(
            "num_samples",
            want=f"at most {MOST_FILES * most}, which fill the {MOST_FILES} shards of a writer",
            got=str(num_samples),
            fix="lower it, or plan several banks",
        )
    num_bytes, low = shard_bytes(num_samples - firsts[-1], len(str(firsts[-1]))), 0
    for digits in range(1, len(str(firsts[-1])) + 1):  # of the first row, on which the header depends
        high = min(-(-(10**digits) // most), len(firsts) - 1)  # full shards that begin below it
        num_bytes += max(high - low, 0) * shard_bytes(most, digits)
        low = max(low, high)
    if base:
        num_bytes += _file_bytes({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in base.items()}, {})
    row_bytes = layout.num_bytes + sum(dtype.itemsize for dtype in fmt.column_dtypes(columns).values())
    return BankSize(num_samples, layout.num_values, row_bytes, most, len(firsts), num_bytes)


def shard_size(layout: Layout, rows: int, first_row: int, *, columns: Sequence[str] = ()) -> int:
    """Bytes of a shard that holds the rows of the writer "main" from `first_row` on, its checksums of ten digits."""
    shapes = {entry.name: (entry.dtype, (rows, *entry.shape)) for entry in layout.entries}
    shapes |= {name: (dtype, (rows,)) for name, dtype in fmt.column_dtypes(columns).items()}
    metadata = shard_metadata(layout, "0" * 64, "main", first_row, rows)
    return _file_bytes(shapes, fmt.seal_tensors(metadata, dict.fromkeys(shapes, 2**32 - 1)))


def _file_bytes(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]) -> int:
    header, places = fmt.encode_header(shapes, metadata)
    return max((place.end for place in places.values()), default=len(header))
