"""Rows moved from banks to a new one: every n-th draw of the chains, chosen ones, coded ones, or those of a virtual bank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bnn.bank import format as fmt
from bnn.bank.codecs import Codec
from bnn.bank.reader import Bank
from bnn.bank.writer import BankWriter
from bnn.errors import BankError, ConfigError
from bnn.layout import Layout
from bnn.types import Block

Progress: TypeAlias = Callable[[int, int], object]
"""Told how much is done, and how much there is to do."""

BLOCK_BYTES = 32 * 1024 * 1024  # samples of one block: a small part of the shard that the writer gathers

# What a bank says of itself only: the writer says it anew, or `Bank.open` found it in the manifests.
OWN_KEYS = (
    "format",
    "version",
    "requires",
    "layout",
    "fingerprint",
    "base",
    "checksum",
    "codec",
    "complete",
    "diagnostics",
    "resumable",
    "virtual",
    "ranks",
)


def thin(bank: Bank, out: str | Path, *, every: int, overwrite: bool = False, progress: Progress | None = None) -> Bank:
    """A new bank with every n-th draw of each chain: the first, the one `every` places after it, and so on.

    Places are counted in the order of draws. Where every chain has a single draw (an ensemble, checkpoints), every
    n-th sample of the bank is kept. Rows keep their order and their `chain` and `draw`; `bank.json` says what the
    old one did, and `"thinned": {"every", "of"}` with the digest of the old one, which is left alone.

    Args:
        bank: S samples; read block by block, so that it may be larger than memory.
        out: folder of the new bank.
        every: at least 1; 1 copies the bank.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are read, and S.

    Returns:
        The new bank, of ceil(D / every) samples for each chain of D draws.

    Raises:
        ConfigError: `every` is below 1, the bank has no sample, or `out` is the bank itself.
        BankExists: something is at `out`.

    Examples:
        >>> import tempfile, torch
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = Bank.from_state_dicts([module.state_dict()] * 7, module=module)
        >>> len(thin(bank, tempfile.mkdtemp(), every=3))
        3
    """
    if every < 1:
        raise ConfigError("every", want="at least 1", got=str(every), fix="raise it; 2 keeps half of the samples")
    if not len(bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="thin a bank that holds some")
    places = _places(bank.chain.numpy(), bank.draw.numpy())  # [S]
    kept = torch.from_numpy(places % every == 0)  # [S]
    return keep(bank, out, kept, {"every": every, "of": bank.digest}, overwrite=overwrite, progress=progress)


def keep(
    bank: Bank,
    out: str | Path,
    kept: Tensor,
    record: Mapping[str, Any],
    *,
    alike: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the samples that `kept` [S] says, in their order; `record` is its `thinned`.

    With `alike` they count alike in it, whatever their weights were.
    """
    writer = new_writer(out, [bank], kept_info(bank) | {"thinned": dict(record)}, overwrite=overwrite)

    def chosen(number: int, first: int, block: Block) -> Block:
        del number
        rows = _rows(block, kept[first : first + block.num_samples])
        return rows._replace(log_weight=torch.zeros_like(rows.log_weight)) if alike else rows

    return pour(writer, [bank], chosen, progress)


def recode(
    bank: Bank,
    out: str | Path,
    codec: Codec,
    record: Mapping[str, Any],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the same rows, coded; columns stay as they are, and `record` is in its `codec`."""
    config = kept_info(bank) | {"codec": {**codec.fact(), **record}}
    writer = new_writer(out, [bank], config, overwrite=overwrite, codec=codec)
    return pour(writer, [bank], lambda _, first, block: block._replace(params=codec.encode(block.params)), progress)


def materialise(bank: Bank, out: str | Path, *, overwrite: bool = False, progress: Progress | None = None) -> Bank:
    """The ordinary bank of a virtual one: every sample made once and written, block by block.

    Its shards are, byte for byte, those of the fit without `virtual`; its `bank.json` says what that one's does.

    Args:
        bank: a virtual bank of S samples, of whatever length it was given.
        out: folder of the new bank.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are written, and S.

    Raises:
        ConfigError: the bank is not virtual, or `out` is the bank itself.
        BankExists: something is at `out`.

    Examples:
        >>> import bnn, tempfile, torch
        >>> model = bnn.BayesianModel(torch.nn.Linear(3, 2), prior=bnn.priors.Normal(),
        ...                           likelihood=bnn.likelihoods.Categorical(), num_data=4)
        >>> data = torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])
        >>> bank = bnn.fit(model, data, method=bnn.inference.Prior(), num_samples=7, virtual=True)
        >>> torch.equal(materialise(bank, tempfile.mkdtemp())[6]["bias"], bank[6]["bias"])
        True
    """
    if not isinstance(bank.info.get("virtual"), dict):
        raise ConfigError(
            str(bank.path or "bank"), want="a virtual bank", got="one that keeps its rows", fix="copy it with thin"
        )
    writer = new_writer(out, [bank], kept_info(bank), overwrite=overwrite)
    return pour(writer, [bank], lambda _, __, block: block, progress)


def check_apart(out: Path, path: Path) -> None:
    """Raise ConfigError where a new bank would be an old one, or lie in it."""
    target, own = out.resolve(), path.resolve()
    if target == own or own in target.parents:
        got = "the bank itself" if target == own else f"one inside the bank {path}"
        raise ConfigError(str(out), want="the folder of a new bank", got=got, fix="choose another name for it")


def rows_at_once(layout: Layout) -> int:
    """Samples of a block that is read or written at once."""
    return max(BLOCK_BYTES // max(layout.num_bytes, 1), 1)


def _places(chain: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The place of each sample's draw among those of its chain [S]; in the bank, where every chain has one draw.

    Samples of several writers that share the number of a chain and of a draw share its place.
    """
    order = np.lexsort((draw, chain))
    starts = np.diff(chain[order], prepend=chain[order[:1]]) != 0  # where a chain begins, the first left out
    steps = (np.diff(draw[order], prepend=draw[order[:1]]) != 0) | starts
    number = np.cumsum(steps)  # of each draw, over all chains
    first = np.maximum.accumulate(np.where(starts, number, 0))  # that of the first in its chain
    if not (number - first).any():
        return np.arange(len(chain))
    places = np.empty(len(chain), dtype=np.int64)
    places[order] = number - first
    return places


def _rows(block: Block, kept: Tensor) -> Block:
    """The rows of a block [K] that are kept; views, where all are."""
    if kept.all():
        return block
    rows = kept.nonzero().flatten()
    return Block(
        params={name: tensor[rows] for name, tensor in block.params.items()},
        chain=block.chain[rows],
        draw=block.draw[rows],
        log_joint=block.log_joint[rows],
        log_weight=block.log_weight[rows],
        columns={name: column[rows] for name, column in block.columns.items()},
    )


def kept_info(bank: Bank) -> dict[str, Any]:
    """What a new bank says as the old one did; of a coded one, also that its samples went through a codec."""
    codec = bank.info.get("codec")
    decoded = {} if codec is None else {"decoded": {"codec": codec["name"], "of": codec.get("of")}}
    return {key: value for key, value in bank.info.items() if key not in OWN_KEYS} | decoded


def name_of(bank: Bank, number: int) -> str:
    """What a bank of several is called in errors."""
    return f"bank {number}" if bank.path is None else str(bank.path)


def new_writer(
    out: str | Path,
    banks: Sequence[Bank],
    config: dict[str, Any],
    *,
    overwrite: bool,
    codec: Codec | None = None,
    shard_rows: int | None = None,
) -> BankWriter:
    """The writer of a new bank, which is none of those that are read."""
    for bank in banks:
        if bank.path is not None:
            check_apart(Path(out), bank.path)
    base = {} if config.get("lost") else banks[0].base()  # lost: the new bank has none either, and says so
    return BankWriter(
        out,
        layout=banks[0].layout,
        config=config,
        base=base,
        overwrite=overwrite,
        codec=codec,
        shard_rows=shard_rows,
        beside=False,  # the memory of a second shard is another's, where what is read fills it too
    )


def pour(
    writer: BankWriter,
    banks: Sequence[Bank],
    change: Callable[[int, int, Block], Block],
    progress: Progress | None,
) -> Bank:
    """Blocks of all banks through `change(number of the bank, first index, block)` into a new one.

    Whatever goes wrong, half a bank is not left behind: nothing could tell it from a whole one of fewer samples.
    """
    total, done = sum(map(len, banks)), 0
    try:
        for number, bank in enumerate(banks):
            for first, block in bank.blocks(rows_at_once(bank.layout)):
                try:
                    writer.append(change(number, first, block))
                except BankError:
                    fmt.check_rows(block.params, name_of(bank, number), first)  # whose fault it is
                    raise
                done += block.num_samples
                if progress is not None:
                    progress(done, total)
            bank.release()  # maps keep about a shard of pages each, and there may be many banks
        writer.close(complete=all(bank.info.get("complete", True) for bank in banks))
    except BaseException:
        writer.abandon(rows=True)
        raise
    return Bank.open(writer.path)
