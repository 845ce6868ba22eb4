"""Several banks in one: more chains of one posterior, or a mixture of posteriors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bnn.bank import format as fmt
from bnn.bank.moving import Progress, kept_info, name_of, new_writer, pour
from bnn.bank.reader import Bank
from bnn.errors import BankError, BankMismatch, ConfigError
from bnn.types import Block


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
        shifts.append(_weight_shift(bank.log_weight, name_of(bank, number), total[number]))
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

    return pour(writer, banks, renumbered, progress)


def _is_one_run(banks: Sequence[Bank]) -> bool:
    """Whether banks are what the ranks of one run wrote on hosts of their own: their chains are numbered together."""
    writers = [writer for bank in banks for writer in bank.info.get("diagnostics", {})]
    runs = {bank.info.get("checksum") for bank in banks if bank.info.get("ranks")}
    alike = len(runs) == 1 and None not in runs and all(bank.info.get("ranks") for bank in banks)
    return alike and len(writers) == len(set(writers))


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
        place = name_of(bank, number)
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
                name_of(bank, number),
                want=f"{what} as in {name_of(banks[0], 0)}: {want}",
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
