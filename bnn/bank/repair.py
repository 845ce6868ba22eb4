"""Keep what is whole of a damaged bank: every sound shard, named by a manifest or not, goes into a new bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bnn.bank import files
from bnn.bank import format as fmt
from bnn.bank.manifests import Described, read_config, read_manifest
from bnn.bank.moving import check_apart
from bnn.bank.reader import Bank
from bnn.bank.shards import open_shard
from bnn.bank.virtual import is_virtual
from bnn.bank.writer import BankWriter
from bnn.errors import BankError
from bnn.types import Block, Params, State

ROWS_AT_ONCE = 64
MOST_REASONS = 20  # in one error
NOT_CONFIG = ("format", "version", "requires", "layout", "fingerprint", "base", "checksum")  # a writer adds them


class Found(NamedTuple):
    """A file of the damaged bank and what became of it."""

    name: str
    fate: str  # "kept", "adopted" (sound, and named by no manifest) or "dropped"
    reason: str


class Repaired(NamedTuple):
    """A new bank, the fate of every file of the old one, and whether each writer's fit can go on from it."""

    bank: Bank
    files: list[Found]
    resumable: bool


class _Piece(NamedTuple):
    """A sound shard."""

    name: str
    first_row: int
    rows: int
    committed: bool


class _Part(NamedTuple):
    """What is whole of one writer: shards in the order of rows, and the state that follows the last of them."""

    writer: str
    pieces: list[_Piece]
    rows: int
    state: State | None
    complete: bool


def repair(
    path: str | Path,
    out: str | Path,
    *,
    resumable: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Repaired:
    """Copy every sound row of a bank into a new one; the old one is left as it is.

    A shard is sound if its header is that of this bank, writer and layout, the crc32 that it carries are those of its
    tensors, and its rows are finite: then it is kept, whether or not a manifest that can be read names it. Of two that
    hold the same rows, the one that the manifest names counts, else the later. Nothing is ever put in the place of
    rows that are lost: those behind them move up.

    Where `base.safetensors` is damaged, the new bank keeps no parameters outside the sample and no buffers; its
    `bank.json` says so under `lost`, and whoever needs them gives them again.

    Args:
        path: the damaged bank; its `bank.json` must be whole.
        out: folder of the new one.
        resumable: keep rows only as far as a state follows them, so that the fit can go on. Without it all rows
            are kept, and the state only where it follows the last one.
        overwrite: replace a bank at `out`.
        progress: told after each block how many bytes of shards are looked at and copied, and how many that will be.

    Raises:
        BankCorrupt: `bank.json` is damaged, from which everything else follows, or the means and scales of coded samples.
        BankError: a bank of version 1, whose shards carry no checksums, or not one sound row.
    """
    folder, target = Path(path), Path(out)
    check_apart(target, folder)
    damaged = read_config(folder)
    if damaged.identity is None:
        raise BankError(
            str(folder), want="a bank of version 2, whose shards carry checksums", got="version 1", fix="restore a copy"
        )
    if is_virtual(damaged.config):
        raise BankError(
            str(folder), want="a bank that keeps rows", got="a virtual bank", fix="restore a copy, or fit it again"
        )
    names = files.names(folder)
    patterns = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME)
    writers = sorted({m.group(1) for pattern in patterns for m in map(pattern.fullmatch, names) if m})
    told_of: list[Found] = []
    looked, most = (
        0,
        2 * sum(files.regular_size(folder / name) or 0 for name in names if fmt.SHARD_NAME.fullmatch(name)),
    )

    def told(size: int) -> None:
        nonlocal looked
        looked += size
        if progress is not None:
            progress(min(looked, most), most)

    parts = [_part(folder, damaged, writer, names, told_of, told, resumable=resumable) for writer in writers]
    parts = [part for part in parts if part.pieces or part.state is not None]
    if not any(part.pieces for part in parts):
        reasons = "; ".join(f"{file.name}: {file.reason}" for file in told_of[:MOST_REASONS])
        more = f"; and {len(told_of) - MOST_REASONS} more files" if len(told_of) > MOST_REASONS else ""
        got = f"none ({reasons}{more})" if told_of else "none, and no shard"
        raise BankError(str(folder), want="one sound row at least", got=got, fix="restore the bank from a copy")
    base = _base(folder, damaged, told_of)
    codec = None if damaged.coding is None else damaged.coding.read(folder)
    config = {key: value for key, value in damaged.config.items() if key not in NOT_CONFIG}
    if codec is not None:
        config["codec"] = {**config["codec"], **codec.fact()}
    if base is None:
        config["lost"] = ["base.safetensors"]
    writers_of_new: list[BankWriter] = []
    try:
        for part in parts:
            replaces = overwrite and not writers_of_new
            writer = BankWriter(
                target,
                layout=damaged.layout,
                config=config,
                base=base or {},
                writer=part.writer,
                overwrite=replaces,
                codec=codec,
                beside=False,
            )
            writers_of_new.append(writer)
            _copy(folder, damaged, part, writer, told)
            writer.commit()
            writer.spare_memory()  # each part has a writer of its own, all of which stay
    except BaseException:
        for writer in writers_of_new[1:]:
            writer.release()
        for writer in writers_of_new[:1]:
            writer.abandon(rows=True)  # half a bank, whose rows are all in the damaged one
        raise
    for writer, part in zip(writers_of_new, parts, strict=True):
        writer.close(complete=part.complete)
    resumed = base is not None and all(part.state is not None for part in parts)
    return Repaired(Bank.open(target), told_of, resumed)


def _base(folder: Path, damaged: Described, told_of: list[Found]) -> Params | None:
    """What the bank keeps once; None where that is lost."""
    try:
        return damaged.base(folder)
    except BankError as error:
        told_of.append(Found("base.safetensors", "dropped", f"{_reason(error)}: the new bank keeps no such values"))
        return None


def _reason(error: BankError) -> str:
    return f"want {error.want}, got {error.got}"


def _part(
    folder: Path,
    damaged: Described,
    writer: str,
    names: list[str],
    told_of: list[Found],
    told: Callable[[int], object],
    *,
    resumable: bool,
) -> _Part:
    """The sound shards of a writer and its state; the fate of each file is added to `told_of`."""
    manifest = _manifest(folder, damaged, writer, names, told_of)
    names = files.names(folder)  # after the manifest: what it names is there, also where a writer goes on
    committed = {fact["file"] for fact in manifest["shards"]} if manifest else set[str]()
    pieces = _pieces(folder, damaged, writer, names, committed, told_of, told)
    found = [(name, _state(folder / name, damaged, writer, told_of)) for name in names]
    states = [(*each, name) for name, each in found if each is not None]
    if not pieces and not states:
        if manifest is not None:
            told_of.append(Found(f"manifest-{writer}.json", "dropped", "its writer has neither a shard nor a state"))
        return _Part(writer, [], 0, None, False)
    whole = _contiguous(pieces)
    last = max((each for each in states if each[0] <= whole), key=lambda each: each[0], default=None)
    rows = sum(piece.rows for piece in pieces)
    state: State | None = None
    if resumable:
        if last is None and pieces:
            raise BankError(
                str(folder), want=f"a state of '{writer}' to go on from", got="none", fix="repair without resumable"
            )
        rows, state = last[:2] if last is not None else (0, None)
        for piece in [piece for piece in pieces if piece.first_row >= rows]:
            told_of.append(Found(piece.name, "dropped", f"the state follows row {rows}: the fit makes these again"))
            pieces.remove(piece)
    elif last is not None and last[0] == rows:
        state = last[1]
    for piece in pieces:
        told_of.append(Found(piece.name, "kept" if piece.committed else "adopted", f"{piece.rows} rows"))
    if not pieces:
        fate, reason = "kept", "no row comes before it"
        if state is None:
            fate, reason = "dropped", f"it follows row {states[-1][0]}, of which none is left"
        told_of.append(Found(states[-1][2], fate, reason))
    complete = bool(manifest and manifest["complete"] and manifest["rows"] == rows == whole)
    return _Part(writer, pieces, rows, state, complete)


def _pieces(
    folder: Path,
    damaged: Described,
    writer: str,
    names: list[str],
    committed: set[str],
    told_of: list[Found],
    told: Callable[[int], object],
) -> list[_Piece]:
    """The sound shards of a writer in the order of rows, none twice; the fate of the others is added to `told_of`."""
    sound: list[_Piece] = []
    for name in names:
        match = fmt.SHARD_NAME.fullmatch(name)
        if match and match.group(1) == writer:
            try:
                sound.append(_sound(folder / name, damaged, writer, told, committed=name in committed))
            except BankError as error:
                told_of.append(Found(name, "dropped", _reason(error)))
    for name in sorted(committed - set(names)):
        told_of.append(Found(name, "dropped", "the manifest names it, and it is gone"))
    pieces: list[_Piece] = []
    row = 0
    sound.sort(key=lambda piece: piece.name, reverse=True)  # the later before the earlier
    for piece in sorted(sound, key=lambda piece: (piece.first_row, not piece.committed)):
        if piece.first_row < row:
            told_of.append(Found(piece.name, "dropped", f"row {piece.first_row} is there already, in another shard"))
            continue
        pieces.append(piece)
        row = piece.first_row + piece.rows
    return pieces


def _manifest(
    folder: Path, damaged: Described, writer: str, names: list[str], told_of: list[Found]
) -> Mapping[str, Any] | None:
    """A writer's manifest if it can be believed."""
    name = f"manifest-{writer}.json"
    if name not in names:
        return None
    try:
        limit = fmt.MAX_MANIFEST_BYTES + fmt.facts_limit(damaged.names, len(names))
        return read_manifest(folder / name, writer, damaged, limit)
    except BankError as error:
        told_of.append(Found(name, "dropped", _reason(error)))
        return None


def _number(metadata: Mapping[str, str], key: str, path: Path) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise fmt.corrupt(str(path), f"a number as '{key}' in its header", repr(text)[:100])
    return int(text)


def _check_sums(path: Path, mapped: files.MappedFile) -> None:
    """Raise BankCorrupt unless the tensors have the crc32 that the file itself names."""
    sums = fmt.parse_json(mapped.metadata.get("crc32", "").encode(), str(path))
    for name in mapped.tensors:
        if not name.startswith("@pad.") and mapped.crc32(name) != sums.get(name):
            raise fmt.corrupt(str(path), f"tensor '{name}' with the crc32 of its header", "other bytes")


def _sound(path: Path, damaged: Described, writer: str, told: Callable[[int], object], *, committed: bool) -> _Piece:
    """A shard that can be believed by itself.

    Raises:
        BankError: it cannot.
    """
    metadata = files.map_tensors(path, max_header=fmt.header_limit(damaged.names)).metadata
    rows, first_row = _number(metadata, "rows", path), _number(metadata, "first_row", path)
    mapped = open_shard(path, damaged.origin(writer), rows=rows, first_row=first_row)
    _check_sums(path, mapped)
    if rows < 1:
        raise fmt.corrupt(str(path), "one row at least", "none")
    told(len(mapped.map) - rows * damaged.stored.num_bytes)
    for start in range(0, rows, ROWS_AT_ONCE):
        params = {name: mapped.tensors[name][start : start + ROWS_AT_ONCE] for name in damaged.layout.names}
        fmt.check_rows(params, str(path), start)
        fmt.check_weights(mapped.tensors["@log_weight"][start : start + ROWS_AT_ONCE], str(path))
        mapped.release()
        told(min(ROWS_AT_ONCE, rows - start) * damaged.stored.num_bytes)
    return _Piece(path.name, first_row, rows, committed)


def _state(path: Path, damaged: Described, writer: str, told_of: list[Found]) -> tuple[int, State] | None:
    """A producer's state of this writer, and how many rows it follows."""
    match = fmt.STATE_NAME.fullmatch(path.name)
    if not match or match.group(1) != writer:
        return None
    try:
        mapped = files.map_tensors(path)
        for key, want in (("bank", damaged.identity), ("writer", writer)):
            if mapped.metadata.get(key) != want:
                raise fmt.corrupt(str(path), f"{key} {want}", f"{mapped.metadata.get(key)}"[:100])
        _check_sums(path, mapped)
        rows = _number(mapped.metadata, "rows", path)
        tensors = {name: tensor.clone() for name, tensor in mapped.tensors.items()}
        return rows, fmt.decode_state(tensors, mapped.metadata, str(path))
    except BankError as error:
        told_of.append(Found(path.name, "dropped", _reason(error)))
        return None


def _contiguous(pieces: list[_Piece]) -> int:
    """How many rows there are from the first without a gap."""
    row = 0
    for piece in pieces:
        if piece.first_row != row:
            break
        row += piece.rows
    return row


def _copy(folder: Path, damaged: Described, part: _Part, writer: BankWriter, told: Callable[[int], object]) -> None:
    """The rows of a part, some at a time, and its state behind the last."""
    left = part.rows
    for piece in part.pieces:
        origin = damaged.origin(part.writer)
        mapped = open_shard(folder / piece.name, origin, rows=piece.rows, first_row=piece.first_row)
        for start in range(0, min(piece.rows, left), ROWS_AT_ONCE):
            here = slice(start, min(start + ROWS_AT_ONCE, piece.rows, left))
            tensors = {name: tensor[here] for name, tensor in mapped.tensors.items()}
            chain, draw, log_joint, log_weight = (tensors[name] for name in fmt.COLUMNS)
            columns = {name: tensors[f"@{name}"] for name in damaged.columns}
            params = {name: tensors[name] for name in damaged.layout.names}
            writer.append(Block(params, chain, draw, log_joint, log_weight, columns))
            mapped.release()
            told((here.stop - here.start) * damaged.stored.num_bytes)
        left -= piece.rows
    writer.append(damaged.stored.no_rows(), part.state)
