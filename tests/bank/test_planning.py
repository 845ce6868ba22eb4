"""The size of a bank that is planned is that of the bank that is written."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnn.bank import BankWriter, files, part, planning, size_of, writer
from bnn.bank import format as fmt
from bnn.errors import ConfigError
from bnn.layout import Entry, Layout, layout_of
from bnn.types import make_block

LAYOUTS = {
    "float32": layout_of(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 7))),
    "odd": layout_of(nn.Linear(3, 1), extra=[Entry("@likelihood.scale", (), torch.float32)]),
    "half": layout_of(nn.Linear(33, 9).to(torch.bfloat16)),
}


@pytest.mark.parametrize("base", [None, {"running": torch.zeros(77), "count": torch.tensor(3)}], ids=["bare", "base"])
@pytest.mark.parametrize("columns", [(), ("energy", "acceptance")], ids=["plain", "columns"])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("samples", [1, 64, 1100])
def test_bytes_are_those_on_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    samples: int,
    columns: tuple[str, ...],
    base: dict[str, torch.Tensor] | None,
) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 192 * LAYOUTS[name].num_bytes)  # 192 rows: first rows of 1 to 4 digits
    layout: Layout = LAYOUTS[name]
    bank_writer = BankWriter(tmp_path / "bank", layout=layout, config={"columns": list(columns)}, base=base)
    for start in range(0, samples, 64):
        draw = torch.arange(start, min(start + 64, samples))
        bank_writer.append(
            make_block(
                {e.name: torch.zeros(len(draw), *e.shape, dtype=e.dtype) for e in layout.entries},
                chain=draw * 0,
                draw=draw,
                columns={column: torch.zeros(len(draw)) for column in columns},
            )
        )
    bank_writer.close()
    files = list((tmp_path / "bank").glob("*.safetensors"))
    found = size_of(layout, samples, columns=columns, base=base)
    assert found.num_bytes == sum(path.stat().st_size for path in files)
    assert found.num_shards == len(files) - (base is not None) == -(-samples // 192)
    assert (found.num_samples, found.num_values, found.rows_per_shard) == (samples, layout.num_values, 192)
    assert found.row_bytes == layout.num_bytes + 8 * (4 + len(columns))


def test_a_header_that_grows_by_a_page_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one digit more in the number of its first row a header can need 4 KiB more."""
    monkeypatch.setattr(writer, "rows_per_shard", lambda row_bytes: 64)
    monkeypatch.setattr(files, "zlib", SimpleNamespace(crc32=lambda *data: 2**32 - 1))  # of ten digits, as planned
    monkeypatch.setattr(planning, "rows_per_shard", lambda row_bytes: 64)
    sizes = set()
    # Names stand twice in a header, so that their length alone meets every other size of it.
    for length, width in product(range(1200, 2040), (64, 100)):
        half = length // 2
        layout = Layout((Entry("x" * half, (width,), torch.float32), Entry("y" * (length - half), (2,), torch.float32)))
        sizes.add(size_of(layout, 128).num_bytes - 2 * size_of(layout, 64).num_bytes)
        if 4096 in sizes:
            break
    assert sizes == {0, 4096}
    bank_writer = BankWriter(tmp_path / "bank", layout=layout, config={})
    draw = torch.arange(128)
    params = {entry.name: torch.zeros(128, *entry.shape) for entry in layout.entries}
    bank_writer.append(make_block(params, chain=draw, draw=draw))
    bank_writer.close()
    first, second = sorted((tmp_path / "bank").glob("main-*.safetensors"))
    assert second.stat().st_size - first.stat().st_size == 4096
    assert size_of(layout, 128).num_bytes == first.stat().st_size + second.stat().st_size


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_samples: want at least 1, got 0"):
        size_of(LAYOUTS["odd"], 0)


def test_a_plan_of_more_than_any_writer_fills_is_refused_at_once() -> None:
    layout = LAYOUTS["odd"]
    most = writer.rows_per_shard(layout.num_bytes) * part.MOST_FILES
    assert size_of(layout, most).num_shards == part.MOST_FILES
    for samples in (most + 1, 10**15, 10**18):
        with pytest.raises(ConfigError, match=f"want at most {most}, which fill the 1000000 shards"):
            size_of(layout, samples)


def test_the_bytes_of_many_shards_are_counted_in_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten million samples: 52,084 shards, against the sum over each of them."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 192 * LAYOUTS["odd"].num_bytes)
    for samples in (1, 192, 193, 192 * 53, 10**5, 10**7):
        slow = sum(
            size_of_shard(min(192, samples - first), first)
            for first in ([0] if samples < 193 else range(0, samples, 192))
        )
        assert size_of(LAYOUTS["odd"], samples).num_bytes == slow


def size_of_shard(rows: int, first: int, found: dict[tuple[int, int], int] = {}) -> int:  # noqa: B006
    """Bytes of a shard by its header and the end of its last tensor."""
    key = rows, len(str(first))
    if key not in found:
        layout = LAYOUTS["odd"]
        shapes = {e.name: (e.dtype, (rows, *e.shape)) for e in layout.entries}
        shapes |= {name: (dtype, (rows,)) for name, dtype in fmt.column_dtypes(()).items()}
        metadata = part.shard_metadata(layout, "0" * 64, "main", first, rows)
        _, places = fmt.encode_header(shapes, fmt.seal_tensors(metadata, dict.fromkeys(shapes, 2**32 - 1)))
        found[key] = max(place.end for place in places.values())
    return found[key]
