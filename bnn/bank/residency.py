"""Where the samples of a bank are while it is read: mapped, in memory, on a device, or streamed through a budget."""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from contextlib import closing
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bnn.bank import disk
from bnn.bank import format as fmt
from bnn.bank.reading import ShardFile, read_whole, streamable, tensors_of
from bnn.bank.shards import MappedShard, Shard
from bnn.bank.slots import CudaMemory, HostMemory, Memory
from bnn.bank.streaming import LEAST_BUFFERS, THREADS, Ring, Stream, StreamedShard
from bnn.beside import mapped
from bnn.errors import BankLimit, ConfigError, choose

Residency: TypeAlias = Literal["mapped", "host", "device", "streamed"]
RESIDENCIES: tuple[str, ...] = ("mapped", "host", "device", "streamed")

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kKMGT]?)(i?)B?")
PREFIXES = ("", "k", "m", "g", "t")  # each a thousand, or 1024, of the one before
MOST_STAGING = 4  # pinned buffers: two keep disk and bus busy, more only even out


class Placement(NamedTuple):
    """Where samples are to be; plain values, which travel with a bank to other processes."""

    residency: Residency = "mapped"
    device: str | None = None
    host_budget: int | None = None
    device_budget: int | None = None


def num_bytes(option: str, size: int | str) -> int:
    """A size in bytes, from a number or a text such as "2GB" (10^9) or "512MiB" (2^20).

    Raises:
        ConfigError: it is no such size, or below 1.

    Examples:
        >>> num_bytes("host_budget", "1.5GB"), num_bytes("host_budget", "64 KiB"), num_bytes("host_budget", 4096)
        (1500000000, 65536, 4096)
    """
    found = -1
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif isinstance(size, str) and (match := SIZE.fullmatch(size.strip())):
        number, prefix, binary = match.groups()
        found = int(float(number) * (1024 if binary else 1000) ** PREFIXES.index(prefix.lower()))
    if found < 1:
        raise ConfigError(
            option,
            want="a number of bytes, or a text such as '2GB' or '512MiB'",
            got=repr(size)[:50],
            fix="say how much memory samples may take",
        )
    return found


def placement(
    residency: Residency,
    device: str | torch.device | None,
    host_budget: int | str | None,
    device_budget: int | str | None,
) -> Placement:
    """What was asked for, checked.

    Raises:
        ConfigError: an option that says nothing under this residency, or a device that is not there.
    """
    choose("residency", residency, RESIDENCIES)
    host = None if host_budget is None else num_bytes("host_budget", host_budget)
    on_device = None if device_budget is None else num_bytes("device_budget", device_budget)
    place = f"residency={residency!r}"
    if residency == "device" and device is None:
        device = "cuda"
    where = None if device is None else _checked_device(device)
    if residency in ("mapped", "host") and where is not None:
        raise ConfigError(place, want="no device", got=repr(str(device)), fix="use residency='device' or 'streamed'")
    takes = {
        "mapped": ("host_budget",),
        "host": ("host_budget",),
        "device": ("device_budget",),
        "streamed": ("host_budget", "device_budget") if _is_cuda(where) else ("host_budget",),
    }[residency]
    for name, given in (("host_budget", host), ("device_budget", on_device)):
        if given is not None and name not in takes:
            raise ConfigError(place, want=f"no {name}", got=f"{given}", fix="leave it out: it would bound nothing")
    needed = "device_budget" if _is_cuda(where) else "host_budget"
    if residency == "streamed" and (on_device if _is_cuda(where) else host) is None:
        raise ConfigError(
            place,
            want=f"a {needed}",
            got="none",
            fix=f"say how much memory: {needed}='2GB', --{'-'.join(needed.split('_'))} 2GB",
        )
    return Placement(residency, None if where is None else str(where), host, on_device)


def placed(
    shards: Sequence[MappedShard], names: Sequence[str], wanted: Placement, place: str
) -> tuple[list[Shard], Stream | None]:
    """Shards as the bank is to hold them, and the stream behind them if they are streamed.

    Raises:
        BankLimit: a budget that is too small, with the bytes that are needed.
    """
    total = sum(shard.bytes for shard in shards)
    if wanted.residency == "host":
        _check_budget(place, "host_budget", wanted.host_budget, total, "the whole bank")
        return [HeldShard(file, names, None) for file in streamable(shards, place)], None
    if wanted.residency == "device":
        _check_budget(place, "device_budget", wanted.device_budget, total, "the whole bank")
        return [
            HeldShard(file, names, torch.device(wanted.device or "cpu")) for file in streamable(shards, place)
        ], None
    if wanted.residency == "streamed" and shards:
        return _streamed(streamable(shards, place), names, wanted, place)
    largest = max((shard.bytes for shard in shards), default=0)
    _check_budget(place, "host_budget", wanted.host_budget, largest, f"the largest of its shards, {largest} bytes")
    return list(shards), None


def load(shards: Sequence[Shard]) -> None:
    """Read all shards that are to be held, several at once."""
    from tqdm import tqdm

    held = [shard for shard in shards if isinstance(shard, HeldShard)]
    total = sum(shard.file.size for shard in held)
    with (
        tqdm(total=total, desc="load", unit="B", unit_scale=True, delay=1.0, disable=None) as bar,
        closing(mapped(HeldShard.loaded, held, THREADS)) as loaded,
    ):
        for shard in loaded:
            bar.update(shard.file.size)


class HeldShard:
    """Rows of one file in memory, or on a device; read when first touched, at the latest."""

    def __init__(self, file: ShardFile, names: Sequence[str], device: torch.device | None) -> None:
        self.file, self.rows, self.writer = file, file.rows, file.shard.writer
        self._names, self._device = names, device
        self._tensors: dict[str, Tensor] | None = None

    def loaded(self) -> HeldShard:
        """Itself, with its rows there."""
        self._found()
        return self

    def tensor(self, name: str) -> Tensor:
        return self._found()[name]

    def column(self, name: str) -> Tensor:
        return self._found()[name]

    def take(self, names: Sequence[str]) -> dict[str, Tensor]:
        found = self._found()
        return {name: found[name] for name in names}

    def _found(self) -> dict[str, Tensor]:
        if self._tensors is None:
            flat = torch.from_numpy(np.frombuffer(disk.blank_pages(self.file.size), dtype=np.uint8))
            read_whole(self.file, fmt.tensor_bytes(flat))
            tensors = tensors_of(flat, self.file.places, self._names)
            if self._device is not None:
                columns = [name for name in self._names if name in self._columns]
                there = tensors_of(flat.to(self._device), self.file.places, self._names)
                tensors = there | {name: tensors[name].clone() for name in columns}  # asked of by the CPU
            self._tensors = tensors
        return self._tensors

    @property
    def _columns(self) -> set[str]:
        return set(self._names) - set(self.file.shard.origin.layout.names)


def _streamed(
    files: list[ShardFile], names: Sequence[str], wanted: Placement, place: str
) -> tuple[list[Shard], Stream]:
    largest = max(file.size for file in files)
    size = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE
    least, what = min(LEAST_BUFFERS, len(files)) * size, f"{min(LEAST_BUFFERS, len(files))} shards of {size} bytes"
    firsts = np.cumsum([0, *(file.rows for file in files)])
    if _is_cuda(wanted.device):
        assert wanted.device_budget is not None
        pinned = 1 << (size - 1).bit_length()  # torch's allocator of pinned memory rounds up so
        staging = LEAST_BUFFERS
        if wanted.host_budget is not None:
            least_pinned, whom = LEAST_BUFFERS * pinned, f"{LEAST_BUFFERS} pinned shards of {pinned} bytes"
            _check_budget(place, "host_budget", wanted.host_budget, least_pinned, whom)
            staging = min(wanted.host_budget // pinned, MOST_STAGING)
        _check_budget(place, "device_budget", wanted.device_budget, least, what)
        count = min(wanted.device_budget // size, len(files))

        def memory() -> Memory:
            return CudaMemory(size, torch.device(wanted.device or "cuda"), staging)
    else:
        assert wanted.host_budget is not None
        _check_budget(place, "host_budget", wanted.host_budget, least, what)
        count = min(wanted.host_budget // size, len(files))

        def memory() -> Memory:
            return HostMemory(size)

    stream = Stream(lambda: Ring(files, firsts, names, memory(), count))
    return [StreamedShard(file, number, stream) for number, file in enumerate(files)], stream


def _check_budget(place: str, option: str, budget: int | None, least: int, what: str) -> None:
    if budget is not None and budget < least:
        fix = "raise it, or use residency='streamed'"
        if "shards" in what:
            fix = "raise it"
            if budget >= 2 * mmap.PAGESIZE:  # for two shards of a page each
                fix += f", or make smaller shards: 'bnn bank compact --shard-bytes {budget // 4}'"
        raise BankLimit(
            place,
            want=f"{option} of at least {least} bytes, for {what}",
            got=f"{budget}",
            fix=fix,
        )


def _is_cuda(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _checked_device(device: str | torch.device) -> torch.device:
    """The device, with its number.

    Raises:
        ConfigError: it is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            "device", want="a device of torch", got=repr(device), fix="such as 'cuda' or 'cpu'"
        ) from error
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type not in ("cpu", "cuda") or (found.index or 0) >= count:
        raise ConfigError(
            "device",
            want="cpu" if not torch.cuda.is_available() else f"cpu, or cuda with a number below {count}",
            got=str(device),
            fix="choose a device that is there, or residency='mapped'",
        )
    if found.type == "cpu":
        return found
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)
