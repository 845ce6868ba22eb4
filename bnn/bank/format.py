"""The bytes of a bank: aligned safetensors files and strict JSON. `docs/bank-format.md` is the law here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.errors import BankCorrupt, BankError, BankLimit, ConfigError
from bnn.types import Block

FORMAT = "bnn-bank"
VERSION = 2  # written; 1 is read too: it had no checksum of its JSON files, and its shards did not name their bank
READS = (1, 2)
FEATURES: frozenset[str] = frozenset(
    {"codec", "columns", "virtual"}
)  # features beyond the version that this reader knows

DATA_ALIGNMENT = 4096  # direct I/O and GPU-direct reads want pages
TENSOR_ALIGNMENT = 256  # what cuBLAS and vector loads ask of a base pointer
MAX_HEADER_BYTES = 4 * 1024 * 1024  # safetensors allows 100 MB; as Python objects JSON takes up to 25 times its bytes
MAX_JSON_BYTES = 4 * 1024 * 1024  # of bank.json
MAX_NAME = 1024  # characters of the name of an entry
MAX_INFO_BYTES = 64 * 1024  # of the diagnostics in a manifest
MAX_MANIFEST_BYTES = 1024 * 1024  # of one, beside what its shards account for
MAX_MANIFESTS_BYTES = 2 * 1024 * 1024  # of all writers' together, beside what shards account for
MAX_WRITERS = 1000

COLUMNS: dict[str, torch.dtype] = {
    "@chain": torch.int64,
    "@draw": torch.int64,
    "@log_joint": torch.float64,
    "@log_weight": torch.float64,
}
HEADER = "@header"  # among the crc32 of a shard: that of all bytes before its tensors
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
CODE_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}

COLUMN_NAME = re.compile(r"[a-z][a-z_]{0,31}")
WRITER_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,31}")
SHARD_NAME = re.compile(r"([a-z0-9][a-z0-9_]{0,31})-([0-9]{6})\.safetensors")
STATE_NAME = re.compile(r"state-([a-z0-9][a-z0-9_]{0,31})-([0-9]{6})\.safetensors")
MANIFEST_NAME = re.compile(r"manifest-([a-z0-9][a-z0-9_]{0,31})\.json")
LOCK_NAME = re.compile(r"lock-([a-z0-9][a-z0-9_]{0,31})")


class Place(NamedTuple):
    """Where a tensor lies: dtype, shape, and its byte range in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    alignment: int = TENSOR_ALIGNMENT,
) -> tuple[bytes, dict[str, Place]]:
    """The first bytes of a file, up to its data, and where each tensor goes.

    Data start at a multiple of 4096 bytes and every tensor at a multiple of `alignment`: the header is padded
    with blanks, gaps are filled with `@pad.<n>` tensors, since the format allows no holes; with an alignment of 1
    there are none. Metadata are sorted, so that equal content gives equal bytes.
    """
    relative: dict[str, Place] = {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        gap = -offset % alignment
        if gap:
            relative[f"@pad.{len(relative)}"] = Place(torch.uint8, (gap,), offset, offset + gap)
            offset += gap
        size = math.prod(shape) * dtype.itemsize
        relative[name] = Place(dtype, tuple(shape), offset, offset + size)
        offset += size
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **{key: metadata[key] for key in sorted(metadata)}}}
    for name, place in relative.items():
        header[name] = {
            "dtype": DTYPE_CODES[place.dtype],
            "shape": list(place.shape),
            "data_offsets": [place.begin, place.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    start = 8 + len(text)
    places = {n: p._replace(begin=p.begin + start, end=p.end + start) for n, p in relative.items()}
    return len(text).to_bytes(8, "little") + text, places


def decode_header(
    raw: bytes | memoryview, file_size: int, place: str, *, max_header: int = MAX_HEADER_BYTES
) -> tuple[dict[str, Place], dict[str, str]]:
    """Places of all tensors of a safetensors file, and its metadata.

    Args:
        raw: the file, or at least its header.
        file_size: bytes of the whole file, which the tensors must fill without holes or overlap.
        place: the file's name, for errors.
        max_header: bytes that the header may have.

    Raises:
        BankCorrupt: anything that the format forbids.
        BankLimit: a header longer than `max_header`.
    """
    length = int.from_bytes(raw[:8], "little") if len(raw) >= 8 else -1
    if not 2 <= length <= file_size - 8:
        raise corrupt(place, "a safetensors header", f"a header of {length} bytes in a file of {file_size}")
    if length > max_header:
        raise too_large(place, f"a header of at most {max_header} bytes", f"{length}")
    header = parse_json(bytes(raw[8 : 8 + length]), place)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(place, "string metadata", "something else")
    places: dict[str, Place] = {}
    for name, fact in header.items():
        try:
            dtype, shape = CODE_DTYPES[fact["dtype"]], tuple(fact["shape"])
            begin, end = fact["data_offsets"]
            legal = len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, begin, end))
            legal = legal and math.prod(shape) * dtype.itemsize == end - begin
        except (KeyError, TypeError, ValueError):
            legal = False
        if not legal:
            raise corrupt(place, f"dtype, shape and offsets of tensor '{name}' that agree", repr(fact)[:200])
        places[name] = Place(dtype, shape, begin + 8 + length, end + 8 + length)
    offset = 8 + length
    for where in sorted(places.values(), key=lambda p: (p.begin, p.end)):
        if where.begin != offset:
            raise corrupt(place, f"tensors without holes or overlap at byte {offset}", f"one at {where.begin}")
        offset = where.end
    if offset != file_size:
        raise corrupt(place, f"{offset} bytes", f"{file_size}")
    return places, metadata


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def parse_json(raw: bytes, place: str) -> dict[str, Any]:
    """A JSON object, read strictly: no duplicate keys, no NaN, no deep nesting.

    Raises:
        BankCorrupt: the bytes are no such object.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            raise ValueError("a key stands twice")
        return keys

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            raise ValueError(f"{text[:20]} is no number that a float holds")
        return value

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        raise corrupt(place, "a JSON object", f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(value, dict):
        raise corrupt(place, "a JSON object", type(value).__name__)
    return value


def dump_json(value: Mapping[str, Any], place: str) -> bytes:
    """JSON for people and machines: sorted keys, two blanks, no NaN."""
    try:
        return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(place, want="plain finite values", got=str(error), fix="store tensors in shards") from error


def check_version(config: Mapping[str, Any], place: str) -> None:
    """Raise BankError unless this reader understands the format, version and features named."""
    if config.get("format") != FORMAT:
        raise corrupt(place, f"format {FORMAT!r}", repr(config.get("format"))[:100])
    requires = config.get("requires", [])
    if not isinstance(requires, list) or not all(isinstance(feature, str) for feature in requires):
        raise corrupt(place, "a list of features", repr(requires)[:100])
    missing = set(requires) - FEATURES
    if type(config.get("version")) is not int or config["version"] not in READS or missing:
        got = f"version {config.get('version')}"[:100] + (
            f" with {', '.join(sorted(missing))}"[:200] if missing else ""
        )
        raise BankError(place, want=f"format version {VERSION} at most", got=got, fix="install a newer bnn-toolkit")
    if config["version"] > 1 and config.get("checksum") != checksum(config):
        raise corrupt(place, f"the checksum {checksum(config)[:12]} of its content", f"{config.get('checksum')}"[:100])


def checksum(config: Mapping[str, Any]) -> str:
    """The sha256 of an object's JSON without blanks, keys sorted, apart from the key `checksum` itself."""
    content = {key: value for key, value in config.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An object with its checksum, as it will be read again."""
    plain = json.loads(dump_json(config, place))  # tuples are lists there
    return {**plain, "checksum": checksum(plain)}


def seal_tensors(metadata: Mapping[str, str], crc32: Mapping[str, int]) -> dict[str, str]:
    """Metadata with the crc32 of every tensor."""
    return {**metadata, "crc32": json.dumps(crc32, sort_keys=True, separators=(",", ":"))}


def header_limit(names: Iterable[str]) -> int:
    """Bytes that the header of a shard may have: a MiB, and room for each tensor, its pad and its crc32."""
    return min(2**20 + sum(512 + 12 * len(name) for name in names), MAX_HEADER_BYTES)


def facts_limit(names: Iterable[str], num_shards: int) -> int:
    """Bytes that manifests may take for the facts of the shards that are there."""
    return num_shards * (1024 + sum(64 + 6 * len(name) for name in names))


def more_columns(config: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """Names of the columns, float64 each, that a bank has beyond those of every bank.

    Raises:
        BankCorrupt: they are no list of names, each once.
    """
    names = config.get("columns", [])
    legal = isinstance(names, list) and all(isinstance(name, str) and COLUMN_NAME.fullmatch(name) for name in names)
    if not legal or len(set(names)) < len(names) or any(f"@{name}" in COLUMNS for name in names):
        raise corrupt(place, "columns with names of their own, of small letters and '_'", repr(names)[:100])
    return tuple(names)


def column_dtypes(more: Sequence[str]) -> dict[str, torch.dtype]:
    """The columns of a bank under their names on disk: those of every bank, then its own."""
    return COLUMNS | {f"@{name}": torch.float64 for name in more}


def columns_of(block: Block) -> dict[str, Tensor]:
    """The columns of a block under their names on disk."""
    own = dict(zip(COLUMNS, (block.chain, block.draw, block.log_joint, block.log_weight), strict=True))
    return own | {f"@{name}": column for name, column in block.columns.items()}


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf.

    Its sum is finite then, which is asked first, for no memory is written and strides cost nothing. Where it is not,
    huge values may have overflown it, and the extremes decide.
    """
    if not tensor.numel():
        return True
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    if torch.isfinite(tensor.sum(dtype=wide)):
        return True
    least, greatest = torch.aminmax(tensor)  # NaN wherever there is one
    return bool(torch.isfinite(least) & torch.isfinite(greatest))


def check_rows(params: Mapping[str, Tensor], place: str, first_row: int) -> None:
    """Raise BankError, naming parameter and row, where a sample holds NaN or Inf."""
    for name, tensor in params.items():
        if not is_finite(tensor):
            row = (
                int((~torch.isfinite(tensor).flatten(1).all(dim=1)).nonzero()[0])
                if tensor.dim() > 1
                else int((~torch.isfinite(tensor)).nonzero()[0])
            )
            raise BankError(
                place,
                want="finite samples",
                got=f"NaN or Inf in '{name}' of row {first_row + row}",
                fix="no such row belongs in a bank; look at the producer's step size or learning rate",
            )


def check_weights(log_weight: Tensor, place: str) -> None:
    """Raise BankError where a log weight is NaN or +inf."""
    if torch.isnan(log_weight).any() or torch.isposinf(log_weight).any():
        raise BankError(
            place, want="log weights that are numbers, or -inf for none", got="NaN or +inf", fix="normalise the weights"
        )


def encode_state(state: Mapping[str, Any], place: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A producer's state as tensors, and its plain values as one metadata string."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    return tensors, {"state": dump_json(plain, place).decode()}


def decode_state(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], place: str) -> dict[str, Any]:
    """The state that `encode_state` took apart."""
    plain = parse_json(metadata.get("state", "").encode(errors="surrogatepass"), place)
    return {**{name: tensor for name, tensor in tensors.items() if not name.startswith("@pad.")}, **plain}


def corrupt(place: str, want: str, got: str) -> BankCorrupt:
    """The error for a file that is not what the format says."""
    return BankCorrupt(place, want=want, got=got, fix="restore the file from a copy, or make the bank again")


def too_large(place: str, want: str, got: str) -> BankLimit:
    """The error for a file that would take more memory than a reader gives."""
    return BankLimit(place, want=want, got=got, fix="no writer makes such a file: get the bank from its source again")


def chunks_of(header: bytes, places: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Iterable[memoryview]:
    """The bytes of a file in order: header, tensors, pads."""
    yield memoryview(header)
    for name, place in places.items():
        yield tensor_bytes(tensors[name]) if name in tensors else memoryview(bytes(place.end - place.begin))
