"""Rows moved from banks to a new one: every n-th draw of the chains, chosen ones, coded ones, or those of several banks."""

from __future__ import annotations

import json
import math
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
from bnn.errors import BankError, BankMismatch, ConfigError
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

    return _pour(writer, [bank], chosen, progress)


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
    return _pour(writer, [bank], lambda _, first, block: block._replace(params=codec.encode(block.params)), progress)


def merge(
    banks: Sequence[Bank],
    out: str | Path,
    *,
    shares: Sequence[float] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bank:
    """A new bank with the samples of several, in their order: more chains of one posterior.

    Chains of the second bank and later ones are renumbered, `chain + max(chains before) + 1`, so that no two banks
    share one; parts of one run that its ranks wrote on hosts of their own keep their numbers. `bank.json` keeps what all say alike, and the first one's `model` where they differ in its seed only;
    `method` is `merge` where methods differ, and `"merged"` lists the digest, method, seed and number of samples of each.

    Log weights have meaning within their bank only, up to a constant. Where those of a bank differ, or are one number
    other than 0, they are shifted so that the bank weighs as much as it has samples: log w_i - log(sum_j w_j / S).

    With `shares` it is a mixture of posteriors rather than one: bank k weighs share_k in total, log w_i + log share_k -
    log sum_j w_j. Temperatures and columns may then differ, of which those are kept that all banks have; `method` is
    `stack`, and `"merged"` tells the `share` of each.

    Args:
        banks: at least two, of one layout (names, shapes, dtypes, ties), columns, likelihood, temperature and values
            outside the sample. Read block by block.
        out: folder of the new bank.
        shares: one a bank, at least 0, summing to 1.
        overwrite: replace a bank at `out`.
        progress: told after each block how many samples are read, and how many there are.

    Returns:
        The new bank, of as many samples as the others have together.

    Raises:
        ConfigError: fewer than two banks, one without samples, one of them twice, or `out` is one of them; shares that
            are no such numbers.
        BankMismatch: the banks are not of one kind; the first difference is named.
        BankError: the weights of a bank are all zero.
        BankExists: something is at `out`.

    Examples:
        >>> import tempfile, torch
        >>> module = torch.nn.Linear(3, 2)
        >>> one = Bank.from_state_dicts([module.state_dict()] * 4, module=module)
        >>> two = Bank.from_state_dicts([torch.nn.Linear(3, 2).state_dict()], module=module)
        >>> merge([one, two], tempfile.mkdtemp()).chain.tolist()
        [0, 1, 2, 3, 4]
    """
    banks = list(banks)
    _check_alike(banks, ("likelihood",) if shares is not None else ("columns", "likelihood", "temperature"))
    total = _total_weights(banks, shares)
    chains, shifts, following, one_run = [], [], 0, _is_one_run(banks)
    for number, bank in enumerate(banks):
        chains.append(0 if one_run else following)
        following += int(bank.chain.max()) + 1
        shifts.append(_weight_shift(bank.log_weight, _name(bank, number), total[number]))
    columns = [name for name in banks[0].columns if all(name in bank.columns for bank in banks)]
    writer = new_writer(
        out, banks, _merged_info(banks, columns, None if shares is None else total), overwrite=overwrite
    )

    def renumbered(number: int, first: int, block: Block) -> Block:
        del first
        return block._replace(
            chain=block.chain + chains[number],
            log_weight=block.log_weight + shifts[number],
            columns={name: block.columns[name] for name in columns},
        )

    return _pour(writer, banks, renumbered, progress)


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
    return _pour(writer, [bank], lambda _, __, block: block, progress)


def _is_one_run(banks: Sequence[Bank]) -> bool:
    """Whether banks are what the ranks of one run wrote on hosts of their own: their chains are numbered together."""
    writers = [writer for bank in banks for writer in bank.info.get("diagnostics", {})]
    runs = {bank.info.get("checksum") for bank in banks if bank.info.get("ranks")}
    alike = len(runs) == 1 and None not in runs and all(bank.info.get("ranks") for bank in banks)
    return alike and len(writers) == len(set(writers))


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


def _total_weights(banks: Sequence[Bank], shares: Sequence[float] | None) -> list[float]:
    """What the weights of each bank are to sum to: its number of samples, or its share."""
    if shares is None:
        return [float(len(bank)) for bank in banks]
    legal = len(shares) == len(banks) and all(math.isfinite(share) and share >= 0 for share in shares)
    if not legal or abs(sum(shares) - 1.0) > 1e-6:
        raise ConfigError(
            "shares",
            want=f"{len(banks)} numbers of at least 0 that sum to 1",
            got=", ".join(f"{share:g}" for share in shares)[:100] or "none",
            fix="pass one a bank, such as stacking_weights(...).weights",
        )
    return [share / sum(shares) for share in shares]


def _weight_shift(log_weight: Tensor, place: str, wanted: float) -> float:
    """What makes a bank's weights [S] sum to `wanted`; exactly 0 where all are 0 and that is S."""
    if not log_weight.any() and wanted == len(log_weight):
        return 0.0
    total = float(log_weight.logsumexp(dim=0))
    if total == -math.inf:
        raise BankError(place, want="a sample with weight", got="log weights of -inf alone", fix="leave the bank out")
    return (math.log(wanted) if wanted > 0 else -math.inf) - total


def _check_alike(banks: Sequence[Bank], facts: Sequence[str]) -> None:
    """Raise unless there are two banks or more, of one kind by their facts, and none of them twice."""
    if len(banks) < 2:
        raise ConfigError("banks", want="at least two", got=str(len(banks)), fix="name the banks to be merged")
    seen: dict[str, str] = {}
    for number, bank in enumerate(banks):
        place = _name(bank, number)
        if not len(bank):
            raise ConfigError(
                place, want="at least one sample", got="none", fix="leave it out, or look at it with 'bnn bank verify'"
            )
        if bank.digest in seen:
            raise ConfigError(
                place, want="each bank once", got=f"the samples of {seen[bank.digest]}", fix="leave one of them out"
            )
        seen[bank.digest] = place
    base = banks[0].base()
    for number, bank in enumerate(banks[1:], 1):
        difference = _difference(banks[0], bank, facts) or _base_difference(base, bank.base())
        if difference is not None:
            what, want, got = difference
            raise BankMismatch(
                _name(bank, number),
                want=f"{what} as in {_name(banks[0], 0)}: {want}",
                got=got,
                fix="merge banks of one module, likelihood and temperature",
            )


def _difference(one: Bank, other: Bank, facts: Sequence[str]) -> tuple[str, str, str] | None:
    """The first of layout and facts in which two banks differ: what, and the two values."""
    difference = one.layout.difference(other.layout)
    if difference is not None:
        return "the layout", one.layout.fingerprint[:12], difference
    mine, theirs = sorted(one.columns), sorted(other.columns)
    if "columns" in facts and mine != theirs:
        return "columns", ", ".join(mine) or "none", ", ".join(theirs) or "none"
    for key in ("likelihood", "temperature"):
        if key in facts and one.info.get(key) != other.info.get(key):
            return f"the {key}", str(one.info.get(key)), str(other.info.get(key))
    return None


def _base_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[str, str, str] | None:
    """The first value outside the sample in which two banks differ, byte by byte."""
    for name in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(name), other.get(name)
        if mine is None or theirs is None:
            words = ("nothing", "one there")
            return f"'{name}' outside the sample", words[mine is not None], words[theirs is not None]
        facts = [f"{tensor.dtype} {list(tensor.shape)}" for tensor in (mine, theirs)]
        if facts[0] != facts[1]:
            return f"'{name}' outside the sample", facts[0], facts[1]
        if fmt.tensor_bytes(mine.cpu().contiguous()) != fmt.tensor_bytes(theirs.cpu().contiguous()):
            return f"'{name}' outside the sample", "its values", "other values"
    return None


def kept_info(bank: Bank) -> dict[str, Any]:
    """What a new bank says as the old one did; of a coded one, also that its samples went through a codec."""
    codec = bank.info.get("codec")
    decoded = {} if codec is None else {"decoded": {"codec": codec["name"], "of": codec.get("of")}}
    return {key: value for key, value in bank.info.items() if key not in OWN_KEYS} | decoded


def _merged_info(banks: Sequence[Bank], kept: list[str], shares: Sequence[float] | None) -> dict[str, Any]:
    """What `bank.json` of a merged bank says."""
    first, *others = [kept_info(bank) for bank in banks]
    alike = {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}
    alike.pop("columns", None)
    columns = {"columns": kept} if kept else {}
    merged: list[dict[str, Any]] = [
        {
            "digest": bank.digest,
            "method": bank.info.get("method"),
            "seed": bank.info.get("seed"),
            "samples": len(bank),
        }
        for bank in banks
    ]
    for key in ("row_order", "compacted"):  # of each bank's own shards
        alike.pop(key, None)
    if shares is not None:
        alike["method"] = {"name": "stack", "options": {}}
        merged = [{**fact, "share": share} for fact, share in zip(merged, shares, strict=True)]
    # Runs differ in their seed, and so does the module that each began with; what that left outside the sample is alike.
    built = {_built(bank) for bank in banks}
    model = {"model": first["model"]} if len(built) == 1 and None not in built else {}
    return {"method": {"name": "merge", "options": {}}, **alike, **model, **columns, "merged": merged}


def _built(bank: Bank) -> str | None:
    """How the module of a bank is built, whatever it is seeded with; None where that is not recorded."""
    model = bank.info.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("options"), dict):
        return None
    options = {key: value for key, value in model["options"].items() if key != "seed"}
    return json.dumps({**model, "options": options}, sort_keys=True)


def _name(bank: Bank, number: int) -> str:
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


def _pour(
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
                    fmt.check_rows(block.params, _name(bank, number), first)  # whose fault it is
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
