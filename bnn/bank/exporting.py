"""Values of a bank as files that other tools read: state dicts, and chains for ArviZ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.bank import disk, files
from bnn.bank import format as fmt
from bnn.bank.moving import Progress, rows_at_once
from bnn.bank.reader import Bank
from bnn.errors import BankError, BankExists, BankMismatch, ConfigError
from bnn.layout import select
from bnn.types import Params

PIECE_BYTES = 128 * 1024 * 1024  # rows of one tensor, gathered in the order of chains

STATISTICS = {"log_joint": "lp", "divergent": "diverging", "acceptance": "acceptance_rate"}  # as ArviZ calls them
HALVES = (torch.float16, torch.bfloat16)  # NumPy knows no bfloat16, and sums of float16 overflow


def mean(bank: Bank, *, progress: Progress | None = None) -> Params:
    """The weighted mean of the samples: one set of values of the module's parameters.

    theta_mean = sum_i w_i theta_i,  w = softmax(log_weight)

    A point in the middle of a bank predicts well where samples surround one mode, as those of SWAG and of guides do.
    Between modes, as of ensembles and most chains of HMC, it is a point of low density.

    Args:
        bank: S samples, read block by block; sums are kept in float64.
        progress: told after each block how many samples are read, and S.

    Returns:
        A tensor [*shape] a parameter of the module in the layout's dtype; entries of likelihood and prior (`@...`) are
        left out.

    Raises:
        BankError: the bank has no sample, or none with weight; or one holds NaN or Inf, and is named.

    Examples:
        >>> module = torch.nn.Linear(1, 1, bias=False)
        >>> states = [{"weight": torch.tensor([[value]])} for value in (1.0, 2.0, 6.0)]
        >>> mean(Bank.from_state_dicts(states, module=module))
        {'weight': tensor([[3.]])}
    """
    if not len(bank) or torch.isneginf(bank.log_weight).all():
        got = "log weights of -inf alone" if len(bank) else "none"
        raise BankError(_name(bank), want="samples with weight", got=got, fix="fit a bank first")
    weight = bank.log_weight.softmax(dim=0)  # [S]
    entries = [entry for entry in bank.layout.entries if not entry.name.startswith("@")]
    sums = {entry.name: torch.zeros(entry.shape, dtype=torch.float64) for entry in entries}
    for first, block in bank.blocks(rows_at_once(bank.layout)):
        fmt.check_rows(block.params, _name(bank), first)
        here = weight[first : first + block.num_samples]  # [K]
        for name, total in sums.items():
            total += torch.tensordot(here, block.params[name].double(), dims=1)  # [K], [K, *shape] -> [*shape]
        if progress is not None:
            progress(first + block.num_samples, len(bank))
    return {entry.name: sums[entry.name].to(entry.dtype) for entry in entries}


def write_state_dict(bank: Bank, path: str | Path, params: Mapping[str, Tensor], *, overwrite: bool = False) -> None:
    """Write one set of values as an ordinary safetensors state dict, which `load_state_dict` takes as it is.

    It holds `params`, tied weights under each of their names, and what the bank keeps once: parameters outside the
    sample, and buffers. Entries of likelihood and prior (`@...`) are left out.

    Args:
        bank: of the module.
        path: the file.
        params: a tensor [*shape] an entry of the bank's layout, in its dtype: `bank[i]`, or `mean(bank)`.
        overwrite: replace a file at `path`.

    Raises:
        BankMismatch: an entry is missing, unknown, or of another shape or dtype.
        BankError: an entry holds NaN or Inf.
        BankExists: something is at `path`, or it is a file of a bank.
        BankWriteError: the disk refused.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = Bank.from_state_dicts([module.state_dict()], module=module)
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_state_dict(bank, path, bank[0])
        >>> module.load_state_dict(load_file(path))
        <All keys matched successfully>
    """
    tensors: Params = {}
    for entry in bank.layout.entries:
        if entry.name.startswith("@"):
            continue
        tensor = params.get(entry.name)
        if tensor is None or tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            got = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise BankMismatch(
                "params", want=f"{entry} of {entry.dtype}", got=got, fix="pass bank[i] or mean(bank) of this bank"
            )
        if not fmt.is_finite(tensor):
            raise BankError(
                _name(bank), want="finite values", got=f"NaN or Inf in '{entry.name}'", fix="choose another sample"
            )
        tensors[entry.name] = tensor
    unknown = sorted(name for name in params if name not in bank.layout.names and not name.startswith("@"))
    if unknown:
        raise BankMismatch("params", want="entries of the bank", got=f"'{unknown[0]}' too", fix="leave it out")
    tensors |= {alias: tensors[name] for alias, name in bank.layout.aliases.items()}
    tensors |= bank.base()
    # Wide dtypes first: each tensor begins at a multiple of its width without pads, which load_state_dict would refuse.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    ready = {name: tensors[name].detach().cpu().contiguous() for name in order}
    check_target(Path(path), overwrite=overwrite)
    facts = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ready.items()}
    header, places = fmt.encode_header(facts, {}, alignment=1)
    files.write_atomic(Path(path), fmt.chunks_of(header, places, ready))


class _Source(NamedTuple):
    """A tensor of the chains' file: where its rows come from, and what they become."""

    name: str  # of an entry, or of a column
    is_column: bool
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one row


def write_chains(
    bank: Bank,
    path: str | Path,
    *,
    params: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write draws by chain for ArviZ: a safetensors file of tensors with axes chain and draw first.

    - `posterior.<name>` [chains, draws, *shape] for each parameter that `params` chooses, `@...` too; half precision
      becomes float32.
    - `sample_stats.<column>` [chains, draws]: `log_joint` as `lp`, `divergent` as the bool `diverging`, `acceptance`
      as `acceptance_rate`; `log_weight` and other columns of the method under their names.

    Chains stand in the order of their numbers, draws in the order of theirs. ArviZ knows no weights: where
    `log_weight` is not constant, its figures are not those of the bank.

    Args:
        bank: its chains have as many draws each. Read piece by piece, so that it may be larger than memory.
        path: the file.
        params: globs as of `BayesianModel(bayesian=)`, `!` negates; none by default, since all may be many.
        overwrite: replace a file at `path`.
        progress: told after each piece how many numbers are written, and how many there are.

    Raises:
        BankError: no samples, chains of unequal length, or of several writers under one number.
        ConfigError: a glob that matches nothing.
        BankExists: something is at `path`, or it is a file of a bank.
        BankWriteError: the disk refused.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.numpy import load_file
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = Bank.from_state_dicts([module.state_dict()] * 4, module=module)  # four chains of one draw
        >>> path = Path(tempfile.mkdtemp()) / "chains.safetensors"
        >>> write_chains(bank, path, params=["weight"])
        >>> {name: array.shape for name, array in sorted(load_file(path).items())}
        {'posterior.weight': (4, 1, 2, 3), 'sample_stats.log_weight': (4, 1), 'sample_stats.lp': (4, 1)}
    """
    rows = _rows_by_chain(bank)  # [chains, draws]
    sources = _sources(bank, params)
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    facts = {name: (sources[name].dtype, (*rows.shape, *sources[name].shape)) for name in order}
    header, places = fmt.encode_header(facts, {}, alignment=1)
    check_target(Path(path), overwrite=overwrite)

    def chunks() -> Iterator[memoryview]:
        yield memoryview(header)
        done, total = 0, sum(place.end - place.begin for place in places.values())
        for name in order:
            for piece in _pieces(bank, sources[name], rows.ravel()):
                yield fmt.tensor_bytes(piece)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)

    files.write_atomic(Path(path), chunks())


def _rows_by_chain(bank: Bank) -> np.ndarray:
    """Bank indices [chains, draws]."""
    chain, draw = bank.chain.numpy(), bank.draw.numpy()
    lengths = np.unique(chain, return_counts=True)[1]
    if not len(chain):
        raise BankError(_name(bank), want="samples", got="none", fix="fit a bank first")
    if lengths.min() != lengths.max():
        raise BankError(
            _name(bank),
            want="chains of one length",
            got=f"{lengths.min()} to {lengths.max()} draws",
            fix="resume the run to its end, choose whole chains, or thin so far that all keep as many draws",
        )
    order = np.lexsort((draw, chain))
    twice = (np.diff(chain[order]) == 0) & (np.diff(draw[order]) == 0)
    if twice.any():
        row = order[twice.argmax()]
        raise BankError(
            _name(bank),
            want="each draw of a chain once",
            got=f"draw {draw[row]} of chain {chain[row]} more than once, as several writers leave it",
            fix="write each run to a bank of its own, and merge them",
        )
    return order.reshape(len(lengths), -1)


def _sources(bank: Bank, params: Sequence[str]) -> dict[str, _Source]:
    """The tensors of the file by name."""
    try:
        chosen = select(bank.layout.names, params)
    except ConfigError as error:  # it speaks of `bayesian`
        raise ConfigError("params", want=error.want, got=error.got, fix=error.fix) from error
    found = {}
    for entry in bank.layout.entries:
        if entry.name in chosen:
            dtype = torch.float32 if entry.dtype in HALVES else entry.dtype
            found[f"posterior.{entry.name}"] = _Source(entry.name, False, dtype, entry.shape)
    for name in ("log_joint", "log_weight", *bank.columns):
        dtype = torch.bool if name == "divergent" else torch.float64
        found[f"sample_stats.{STATISTICS.get(name, name)}"] = _Source(name, True, dtype, ())
    return found


def _pieces(bank: Bank, source: _Source, rows: np.ndarray) -> Iterator[Tensor]:
    """Rows of one tensor in the order of bank indices [R], as many at once as memory is given."""
    column = None
    if source.is_column:
        own = {"log_joint": bank.log_joint, "log_weight": bank.log_weight}
        column = own[source.name] if source.name in own else bank.columns[source.name]  # [S]
    row_bytes = int(np.prod(source.shape, dtype=np.int64)) * source.dtype.itemsize
    size = max(PIECE_BYTES // max(row_bytes, 1), 1)
    for start in range(0, len(rows), size):
        wanted = rows[start : start + size]
        if column is not None:
            yield column[torch.from_numpy(wanted)].to(source.dtype)
        else:
            yield _gathered(bank, source, wanted)


def _gathered(bank: Bank, source: _Source, wanted: np.ndarray) -> Tensor:
    """Rows of an entry [R, *shape]; blocks are views, of which only the rows asked for are read."""
    piece = torch.empty(len(wanted), *source.shape, dtype=source.dtype)
    low, high = wanted.min(), wanted.max()
    for first, block in bank.blocks(rows_at_once(bank.layout)):
        stop = first + block.num_samples
        if stop <= low or first > high:
            continue
        here = np.flatnonzero((wanted >= first) & (wanted < stop))
        local = torch.from_numpy(wanted[here] - first)
        piece[torch.from_numpy(here)] = block.params[source.name][local].to(source.dtype)
    return piece


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise BankExists where a file must not be written."""
    names = (fmt.SHARD_NAME, fmt.STATE_NAME, fmt.MANIFEST_NAME, fmt.LOCK_NAME)
    is_own = path.name in ("bank.json", "base.safetensors") or any(name.fullmatch(path.name) for name in names)
    if is_own and disk.exists(path.parent / "bank.json"):
        raise BankExists(
            str(path), want="a file beside the bank's own", got="one of the bank", fix="choose another name"
        )
    if disk.exists(path) and disk.regular_size(path) is None:  # a device would be replaced by a file of its name
        got = "a folder" if disk.is_folder(path) else "a link, device or pipe"
        raise BankExists(str(path), want="a file or nothing", got=got, fix="choose another name")
    if disk.exists(path) and not overwrite:
        raise BankExists(
            str(path), want="nothing there", got="a file, which is kept", fix="overwrite it, or choose another name"
        )


def _name(bank: Bank) -> str:
    return "bank in memory" if bank.path is None else str(bank.path)
