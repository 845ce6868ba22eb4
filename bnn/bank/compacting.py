"""The rows of a bank in another order, over shards of another size."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from bnn.bank import format as fmt
from bnn.bank.moving import Progress, kept_info, new_writer, rows_at_once
from bnn.bank.planning import shard_size
from bnn.bank.reader import Bank
from bnn.bank.residency import num_bytes
from bnn.bank.writer import SHARD_BYTES
from bnn.errors import BankError, ConfigError, choose

RowOrder: TypeAlias = Literal["striped", "chain"]
ORDERS: tuple[str, ...] = ("striped", "chain")


def compact(
    bank: Bank,
    out: str | Path,
    *,
    shard_bytes: int | str = SHARD_BYTES,
    order: RowOrder = "striped",
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank of the same samples, in shards of one size and in an order of its own.

    `"striped"` makes every shard a small bank: rows are put in the order of chains and draws, of every N neighbours each
    of the N shards gets one, by chance, and each shard is shuffled. Whatever is read shard by shard is then as good as a
    shuffle of the whole. `"chain"` puts chain after chain, draws in order: many small shards become few. Rows keep their
    `chain` and `draw`; `bank.json` says `"row_order"`, and `"compacted": {"of", "seed"}` with the digest of the old
    bank, which is left alone.

    Args:
        bank: S samples; read in blocks, so that it may be larger than memory.
        out: folder of the new bank.
        shard_bytes: at most so many a shard, a number or a text such as `"64MB"`; there are as few as that allows.
        order: of the rows.
        seed: of what is left to chance.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are written, and S.

    Returns:
        The new bank.

    Raises:
        ConfigError: the bank has no sample, a shard holds not even one, or `out` is the bank itself.
        BankExists: something is at `out`.

    Examples:
        >>> import tempfile, torch
        >>> module = torch.nn.Linear(3, 2)
        >>> bank = Bank.from_state_dicts([module.state_dict()] * 7, module=module)
        >>> compact(bank, tempfile.mkdtemp(), order="chain").draw.shape
        torch.Size([7])
    """
    choose("order", order, ORDERS)
    if not len(bank):
        raise ConfigError("bank", want="at least one sample", got="none", fix="compact a bank that holds some")
    most = _rows_of(bank, num_bytes("shard_bytes", shard_bytes))
    shards = places(bank.chain.numpy(), bank.draw.numpy(), most, order, seed)
    config = kept_info(bank) | {"row_order": order, "compacted": {"of": bank.digest, "seed": seed}}
    largest = max(map(len, shards))
    writer = new_writer(out, [bank], config, overwrite=overwrite, shard_rows=largest)
    done, step = 0, rows_at_once(bank.layout)
    try:
        for rows in shards:
            for start in range(0, len(rows), step):
                block = bank.block(rows[start : start + step])  # type: ignore[arg-type]
                try:
                    writer.append(block)
                except BankError:
                    fmt.check_rows(block.params, str(bank.path or "bank"), 0)  # whose fault it is
                    raise
                done += block.num_samples
                if progress is not None:
                    progress(done, len(bank))
            if len(rows) < largest:  # full ones are committed by themselves
                writer.commit()
        bank.release()
        writer.close(complete=bank.info.get("complete", True))
    except BaseException:
        writer.abandon(rows=True)
        raise
    return Bank.open(writer.path)


def places(chain: np.ndarray, draw: np.ndarray, most: int, order: RowOrder, seed: int) -> list[np.ndarray]:
    """The rows of each new shard, as indices of the old bank.

    Args:
        chain: of each sample [S].
        draw: of each sample [S].
        most: rows of a shard.
        order: of the rows.
        seed: any whole number.
    """
    size = len(chain)
    count = -(-size // most)
    by_draw = np.lexsort((np.arange(size), draw, chain))  # [S]
    if order == "chain":
        return np.array_split(by_draw, count)
    source = np.random.default_rng(seed % 2**64)
    turns = [source.permutation(count)[: min(count, size - first)] for first in range(0, size, count)]
    shard = np.concatenate(turns)  # of each row of `by_draw`
    return [source.permutation(by_draw[shard == number]) for number in range(count)]


def _rows_of(bank: Bank, shard_bytes: int) -> int:
    """Rows that fit into a shard of so many bytes, wherever it stands in the bank."""

    def size(rows: int) -> int:
        return shard_size(bank.layout, rows, len(bank), columns=tuple(bank.columns))

    if size(1) > shard_bytes:
        raise ConfigError(
            "shard_bytes", want=f"at least {size(1)}, for one sample", got=str(shard_bytes), fix="raise it"
        )
    return bisect.bisect_right(range(1, len(bank) + 1), shard_bytes, key=size)
