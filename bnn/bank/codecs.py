"""Samples in fewer bytes: the mean of each parameter once, and for each sample scaled differences from it.

theta_s = mean + scale * delta_s

The product is exact in float32: a scale has 8 significant bits (int8), is a power of two (fp16) or 1 (bf16). So every way
of computing the sum, fused or not, one sample or many, gives the same bits.
"""

from __future__ import annotations

import hashlib
import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.errors import BankError
from bnn.layout import Layout
from bnn.machine import FRESH, blank
from bnn.types import Params

CodecName: TypeAlias = Literal["bf16", "fp16", "int8"]

CODECS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
FILE = "codec.safetensors"
STEPS = 127  # of int8 on either side of the mean
HALF_EXPONENT = 15  # float16 holds numbers below 2^16
MOST_APART = 1e38  # from the mean: differences up to here, and their scales, are numbers of float32
# Values decoded at once: their float32 stay in the cache between one operation and the next, and from 2^15 on torch would
# share each operation among threads, which costs more than it brings where these have other work.
TILE = 32_000


class Coding(NamedTuple):
    """What `bank.json` says of a codec: which, what it leaves as it is, and the file with means and scales."""

    name: str
    layout: Layout  # of the samples as they are read
    exact: frozenset[str]  # entries that stand in the shards as they are
    bytes: int
    sha256: str

    @property
    def stored(self) -> Layout:
        """The layout of the shards: the same names and shapes, in the dtypes of the codec."""
        dtype = CODECS[self.name]
        entries = (e if e.name in self.exact else e._replace(dtype=dtype) for e in self.layout.entries)
        return Layout(tuple(entries), self.layout.aliases)

    def read(self, folder: Path) -> Codec:
        """Means and scales, checked.

        Raises:
            BankCorrupt: the file is missing, another bank's or altered, or holds what no codec makes.
        """
        path = folder / FILE
        if files.sha256_of(path) != self.sha256:
            raise fmt.corrupt(str(path), "the sha256 that bank.json names", "other bytes")
        found = files.map_tensors(path, self.bytes).tensors
        tensors = {name: tensor.clone() for name, tensor in found.items() if not name.startswith("@pad.")}
        wanted = _shapes(self.name, self.layout, self.exact)
        for name in sorted(wanted.keys() | tensors.keys()):
            got = (tensors[name].dtype, tuple(tensors[name].shape)) if name in tensors else "no tensor"
            if wanted.get(name) != got:
                raise fmt.corrupt(str(path), f"tensor '{name}' as {wanted.get(name, 'no tensor')}", f"{got}")
        for name, tensor in tensors.items():
            if not fmt.is_finite(tensor) or (name.startswith("scale.") and bool((tensor < 0).any())):
                raise fmt.corrupt(str(path), f"finite numbers in '{name}', and no negative scale", "others")
        return Codec(self.name, self.layout, self.exact, tensors)


def coding_of(config: Mapping[str, Any], layout: Layout, place: str) -> Coding | None:
    """What a `bank.json` says of its codec; None where samples lie in the shards as they are.

    Raises:
        BankCorrupt: it is not what the format allows.
    """
    said = config.get("codec")
    if (said is not None) != ("codec" in config.get("requires", [])):
        raise fmt.corrupt(place, "'codec' and the feature of that name, or neither", repr(config.get("requires"))[:100])
    if said is None:
        return None
    try:
        exact = frozenset(said["exact"])
        legal = said["file"] == FILE and said["name"] in CODECS and exact <= set(layout.names)
        legal = legal and isinstance(said["sha256"], str) and type(said["bytes"]) is int and said["bytes"] > 0
        legal = legal and all(isinstance(said.get(key), (dict, type(None))) for key in ("errors", "predictive"))
        if legal:
            return Coding(said["name"], layout, exact, said["bytes"], said["sha256"])
    except (AttributeError, KeyError, TypeError):
        pass
    raise fmt.corrupt(place, f"one of {', '.join(CODECS)} and {FILE} as 'codec'", repr(said)[:200])


class Codec:
    """Means and scales by which samples are coded and read; made by `codec_of`, or read by `Coding.read`.

    Args:
        name: bf16, fp16 or int8.
        layout: of the samples as they are read.
        exact: entries that are not coded.
        tensors: `mean.<entry>` [*shape], in float32 or the entry's float64, and `scale.<entry>`: bfloat16 [*shape] of
            int8, float32 [] of fp16, none of bf16.
    """

    def __init__(self, name: str, layout: Layout, exact: frozenset[str], tensors: Params) -> None:
        self.name, self.layout, self.exact, self.tensors = name, layout, exact, tensors
        self._placed: dict[torch.device, dict[str, tuple[Tensor, Tensor | None]]] = {}

    @cached_property
    def stored(self) -> Layout:
        """The layout of coded samples."""
        return Coding(self.name, self.layout, self.exact, 0, "").stored

    def encode(self, params: Mapping[str, Tensor]) -> Params:
        """Samples [K, *shape] in the dtypes of `stored`, rounded to the nearest, ties to even.

        delta = round((theta - mean) / scale)
        """
        return {name: self._encoded(name, params[name]) for name in self.layout.names}

    def decode(self, params: Mapping[str, Tensor], memory: Reused | None = None) -> Params:
        """Coded samples [K, *shape], or one of them [*shape], as they are read: in memory of their own, but for exact entries."""
        found = {}
        for name, _, dtype in self.layout.entries:
            if name in self.exact:
                found[name] = params[name]
                continue
            make = blank if memory is None else partial(memory, name)
            found[name] = self._decoded(name, params[name], make).to(dtype)
        return found

    def fact(self) -> dict[str, Any]:
        """What `bank.json` says of the file, before it is written."""
        crc32 = {name: zlib.crc32(fmt.tensor_bytes(tensor)) for name, tensor in self.tensors.items()}
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}
        header, places = fmt.encode_header(shapes, fmt.seal_tensors({}, crc32))
        digest, size = hashlib.sha256(), 0
        for piece in fmt.chunks_of(header, places, self.tensors):
            digest.update(piece)
            size += len(piece)
        return {
            "name": self.name,
            "exact": sorted(self.exact),
            "file": FILE,
            "bytes": size,
            "sha256": digest.hexdigest(),
        }

    def write(self, folder: Path) -> None:
        """Write means and scales as one sealed file, atomically."""
        files.write_tensors(folder / FILE, self.tensors, {}, sealed=True)

    def _of(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Mean and scale of an entry, in the mean's dtype, on a device; None for a scale of 1."""
        placed = self._placed.get(device)
        if placed is None:
            placed = {}
            for entry in self.layout.entries:
                if entry.name not in self.exact:
                    mean, scale = self.tensors[f"mean.{entry.name}"], self.tensors.get(f"scale.{entry.name}")
                    placed[entry.name] = mean.to(device), None if scale is None else scale.to(device, mean.dtype)
            self._placed[device] = placed
        return placed[name]

    def _encoded(self, name: str, values: Tensor) -> Tensor:
        if name in self.exact:
            return values
        mean, scale = self._of(name, values.device)
        coded = torch.empty(values.shape, dtype=CODECS[self.name], device=values.device)
        rows = max(TILE // max(mean.numel(), 1), 1)  # a few: large arrays in between would leave holes in the heap
        for top in range(0, len(values), rows):
            delta = values[top : top + rows].to(mean.dtype) - mean
            if scale is not None:
                delta = torch.where(scale > 0, delta / scale, 0.0)  # 0: the values of all samples are the mean
            if self.name == "int8":
                delta = delta.round_().clamp_(-STEPS, STEPS)  # by at most a last bit of the division
            coded[top : top + rows] = delta
        return coded

    def _decoded(self, name: str, delta: Tensor, memory: Callable[[Sequence[int], torch.dtype], Tensor]) -> Tensor:
        mean, scale = self._of(name, delta.device)
        size = max(mean.numel(), 1)
        if delta.numel() <= TILE or delta.device.type != "cpu":
            values = torch.empty(delta.shape, dtype=mean.dtype, device=delta.device)
            _decode_into(values, delta, mean, scale)
            return values
        values = memory(delta.shape, mean.dtype)
        flat, coded = values.view(-1, size), delta.reshape(-1, size)  # [K, M]
        means, scales = mean.reshape(-1), scale if scale is None or not scale.dim() else scale.reshape(-1)
        rows = max(TILE // size, 1)
        for left in range(0, size, TILE):
            columns = slice(left, left + TILE)
            few = scales[columns] if scales is not None and scales.dim() else scales
            pieces = zip(flat[:, columns].split(rows), coded[:, columns].split(rows), strict=True)
            for out, piece in pieces:  # cut by one call: a slice of each would take a tenth of the time
                _decode_into(out, piece, means[columns], few)
        return values


class Reused:
    """Memory for one decoded block after another: what nobody holds any more is written over, and new memory taken only else.

    A pass over large blocks then pays once for its pages, which cost as much as decoding into them.
    """

    def __init__(self) -> None:
        # By entry, dtype and shape of a row: of a block, and of the one before.
        self._kept: dict[tuple[str, torch.dtype, tuple[int, ...]], list[_Held]] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor [K, *shape] for an entry, whose values are not set."""
        if math.prod(shape) * dtype.itemsize < FRESH:  # which the allocator uses again itself
            return blank(shape, dtype)
        kept = self._kept.setdefault((name, dtype, tuple(shape[1:])), [])
        memory = next((each.memory for each in kept if each.lease() is None and len(each.memory) >= shape[0]), None)
        if memory is None:
            memory = blank(shape, dtype).numpy()
        lease = memory[: shape[0]]  # an array of its own, which torch keeps as long as a tensor or a view of it is held
        kept[:] = [*(each for each in kept if each.memory is not memory), _Held(memory, weakref.ref(lease))][-2:]
        return torch.from_numpy(lease)


class _Held(NamedTuple):
    """Memory, and an array of it that is gone when nobody holds what was read into it."""

    memory: np.ndarray
    lease: weakref.ref[np.ndarray]


def _decode_into(values: Tensor, delta: Tensor, mean: Tensor, scale: Tensor | None) -> None:
    values.copy_(delta)
    if scale is None:
        values.add_(mean)
    else:
        torch.addcmul(mean, values, scale, out=values)


def _shapes(name: str, layout: Layout, exact: frozenset[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The tensors of a codec's file."""
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for entry in layout.entries:
        if entry.name not in exact:
            shapes[f"mean.{entry.name}"] = torch.promote_types(entry.dtype, torch.float32), entry.shape
            if name == "int8":
                shapes[f"scale.{entry.name}"] = torch.bfloat16, entry.shape
            elif name == "fp16":
                shapes[f"scale.{entry.name}"] = torch.float32, ()
    return shapes


class Moments(NamedTuple):
    """Mean, standard deviation, least and greatest value of each number of a sample over a bank, float64 [*shape]."""

    mean: Params
    deviation: Params
    least: Params
    greatest: Params


def moments_of(layout: Layout, blocks: Iterable[Params]) -> Moments:
    """Moments over all samples, from blocks [K, *shape]; memory of four samples in float64 and two blocks.

    Raises:
        BankError: an entry is not of real numbers, or a sample is not finite.
    """
    count, sums = 0, dict[str, _Sums]()
    for params in blocks:
        fmt.check_rows(params, "bank", count)
        for name in layout.names:
            if name not in sums:
                sums[name] = _Sums.begun(params[name][0])
            sums[name].add(params[name])
        count += len(params[layout.names[0]])
    found = Moments({}, {}, {}, {})
    for entry in layout.entries:
        shift, first, second, least, greatest = sums[entry.name]
        about = first / count
        deviation = (second / count - about.square()).clamp_min_(0).sqrt_()
        deviation[least == greatest] = 0.0  # whatever the sums were rounded to
        for kept, value in zip(found, (shift + about, deviation, least, greatest), strict=True):
            kept[entry.name] = value.view(entry.shape)
    return found


class _Sums(NamedTuple):
    """Of one entry over samples, float64 [M], changed in place: what was kept anew would leave holes in the heap."""

    shift: Tensor  # the first sample: squares of what is near 0 lose nothing
    first: Tensor
    second: Tensor
    least: Tensor
    greatest: Tensor

    @staticmethod
    def begun(sample: Tensor) -> _Sums:
        shift = sample.double().flatten()
        return _Sums(shift, torch.zeros_like(shift), torch.zeros_like(shift), shift.clone(), shift.clone())

    def add(self, values: Tensor) -> None:
        """Take rows [K, *shape], a few columns of all of them at a time."""
        rows = values.reshape(len(values), -1)  # [K, M]
        width = max(TILE // max(len(rows), 1), 1)
        for left in range(0, rows.shape[1], width):
            shift, first, second, least, greatest = (total[left : left + width] for total in self)
            few = rows[:, left : left + width].double()
            torch.minimum(least, few.amin(dim=0), out=least)
            torch.maximum(greatest, few.amax(dim=0), out=greatest)
            few = few - shift
            first.add_(few.sum(dim=0))
            second.add_(few.square_().sum(dim=0))


def check_codable(layout: Layout) -> None:
    """Raise BankError where an entry is not of real numbers."""
    for entry in layout.entries:
        if not entry.dtype.is_floating_point:
            raise BankError(
                f"entry '{entry.name}'",
                want="real numbers to be coded",
                got=str(entry.dtype),
                fix="keep it outside the sample: a codec is for parameters",
            )


def codec_of(name: str, layout: Layout, moments: Moments) -> Codec:
    """The codec of a bank with such moments.

    Left as they are: unknowns of likelihood and prior, whose names begin with `@`, and entries that vary and are nowhere
    negative, such as variances of batch norm. They are few, and a value that fell below 0 would mean nothing.

    Args:
        name: bf16, fp16 or int8.
        layout: of the samples.
        moments: of all samples.

    Raises:
        BankError: samples are further apart than float32 reaches.
    """
    exact, tensors = set[str](), Params()
    for entry in layout.entries:
        least, greatest = moments.least[entry.name], moments.greatest[entry.name]
        varies = bool((least < greatest).any())
        if entry.name.startswith("@") or (varies and bool((least >= 0).all())):
            exact.add(entry.name)
            continue
        wide = torch.promote_types(entry.dtype, torch.float32)
        mean = torch.where(least == greatest, least, moments.mean[entry.name]).to(wide)
        apart = torch.maximum(greatest - mean, mean - least)  # float64
        if not bool((apart <= MOST_APART).all()):
            raise BankError(
                f"entry '{entry.name}'",
                want=f"samples within {MOST_APART:g} of their mean",
                got=f"one {float(apart.max()):.3g} away",
                fix="keep this bank as it is, and look at what made such values",
            )
        tensors[f"mean.{entry.name}"] = mean
        if name == "int8":
            tensors[f"scale.{entry.name}"] = _rounded_up(apart / STEPS)
        elif name == "fp16":
            tensors[f"scale.{entry.name}"] = torch.tensor(_power_above(float(apart.max()) if apart.numel() else 0.0))
    return Codec(name, layout, frozenset(exact), tensors)


def _rounded_up(values: Tensor) -> Tensor:
    """The least bfloat16 that is not below a positive float64; 0 of 0."""
    near = values.float()
    near = torch.where(near.double() < values, torch.nextafter(near, torch.tensor(torch.inf)), near)
    bits = near.view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def _power_above(value: float) -> float:
    """The power of two by which numbers up to `value` fit float16; 0 of 0."""
    if value == 0:
        return 0.0
    _, exponent = math.frexp(value)  # value < 2^exponent
    return math.ldexp(1.0, max(exponent - HALF_EXPONENT, -149))  # the least float32
