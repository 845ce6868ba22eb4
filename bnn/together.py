"""A fit on several ranks: who writes what, from where all go on, and what must be alike before anyone begins."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnn.bank import BankWriter
from bnn.distributed import Ranks
from bnn.errors import BankError, BankExists, ConfigError
from bnn.types import Block, Method, State

STATE_SECONDS = 20.0  # between two states of warm-up that all ranks commit
PREVIOUS = "previous."  # under which a state keeps the one before it


def writer_name(rank: int) -> str:
    """Under which a rank writes: names sort as ranks do.

    Examples:
        >>> writer_name(7)
        'r0007'
    """
    return f"r{rank:04d}"


def own_rows(method: Method, num_samples: int, together: Ranks) -> int:
    """How many of `num_samples` rows this rank makes."""
    if split_of(method) == "chains":
        chains: int = method.num_chains  # type: ignore[attr-defined]
        return num_samples // chains * len(together.share(chains))
    return len(together.stride(num_samples))


def split_of(method: Method) -> str:
    """How ranks share a method: "chains", "rows" or "gradients"; "" where they cannot."""
    return str(getattr(method, "split", ""))


def check_method(method: Method, together: Ranks) -> None:
    """Raise ConfigError for a method that cannot be split over these ranks."""
    from bnn.inference import METHODS

    split = split_of(method)
    if not split:
        names = [name for name, make in METHODS.items() if split_of(make())]
        own = "" if getattr(method, "is_own", True) else ", a guide of Pyro"
        raise ConfigError(
            f"method {method.name}",
            want=f"one that several ranks can share: {', '.join(names)}",
            got=f"{type(method).__name__}{own} on {together.world_size} ranks",
            fix="run it in one process, without torchrun"
            + (" or without variance_reduction" if getattr(method, "variance_reduction", "none") != "none" else ""),
        )
    if split != "chains":
        return
    if method.num_chains < together.world_size:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{type(method).__name__}(num_chains=)",
            want=f"a chain for each of {together.world_size} ranks",
            got=str(method.num_chains),  # type: ignore[attr-defined]
            fix="raise it, or start fewer ranks",
        )
    if getattr(method, "together", ()) and not method.num_warmup:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{type(method).__name__}(num_warmup=)",
            want="at least 1 on several ranks, which part at its end",
            got="0",
            fix="raise it, or run in one process",
        )


def check_alike(facts: Mapping[str, Any], together: Ranks) -> None:
    """Raise ConfigError on every rank unless all have the same facts, with the first difference.

    `resume` and `overwrite` are no facts of a run that was started again, which goes on whatever they say: a host that comes back may
    find the bank there, and say `--resume`.

    Args:
        facts: dictionaries, however deep, of plain values.
    """
    facts = {key: value for key, value in facts.items() if not (together.again and key in ("resume", "overwrite"))}
    told = [_flat(each) for each in together.values(dict(facts))]
    for rank, found in enumerate(told):
        for key in sorted(told[0].keys() | found.keys()):
            if found.get(key) != told[0].get(key):
                raise ConfigError(
                    f"rank {rank}",
                    want=f"{key} = {told[0].get(key)}, as on rank 0",
                    got=str(found.get(key)),
                    fix="start all ranks with the same versions, options, module and data",
                )


def _flat(facts: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= _flat(value, f"{place}{key}.") if isinstance(value, Mapping) else {f"{place}{key}": value}
    return found


def open_part(
    out: Path, options: Mapping[str, Any], together: Ranks, *, alone: bool, resume: bool, overwrite: bool
) -> BankWriter | None:
    """This rank's writer in the bank at `out`, begun, taken up or put in place of an old one by all ranks alike.

    A run that torchrun started again goes on with what it had begun, and with nothing else: what its first start refused it
    refuses again. Each host may have a folder of its own: then the first rank of each replaces what is there.

    Args:
        options: of `BankWriter`, but for name, resume and overwrite.
        alone: whether rank 0 writes for all; the others then get None.

    Raises:
        BankExists: a bank is there, of which nobody said what to do with it.
    """
    work = str(out)
    earlier = together.begun(work)
    resume, overwrite = together.first_value([resume, overwrite])  # after a restart hosts may differ
    there, here = any(together.values((out / "bank.json").exists())), (out / "bank.json").exists()
    if there and not resume and not overwrite and earlier is None:
        raise BankExists(
            work,
            want="a new folder",
            got="a bank, which is kept",
            fix="go on with resume, replace it with overwrite, or choose another name",
        )
    old = _mark(out) if alone and overwrite else ""  # rank 0 replaces it with its first commit
    overwrite = overwrite and earlier in (None, old or None)
    resume = resume and (here or not there) if earlier is None else here and not overwrite
    own = "main" if alone else writer_name(together.rank)
    if overwrite and not alone:  # the old bank is gone before others join the new one
        local = int(os.environ.get("LOCAL_RANK", "0"))
        turn = 0 if together.rank == 0 else 1 if local == 0 else 2
        for number in range(2):
            if number == turn and (turn == 0 or (out / f"manifest-{own}.json").exists()):
                begun = BankWriter(out, writer=own, overwrite=True, **options)
                begun.commit()
                begun.release()  # and with it the names of all, which it held
            together.barrier()
        overwrite, resume = False, True
    together.begin(work, old if overwrite else "")
    together.barrier()  # before anyone commits a row
    if alone and together.rank:
        return None
    return BankWriter(out, writer=own, resume=resume, overwrite=overwrite, **options)


def _mark(out: Path) -> str:
    """By which the bank at a path is told from one that takes its place; nothing where there is none."""
    if not (out / "bank.json").exists():
        return ""
    found = (out / "bank.json").stat()
    return f"{found.st_ino}/{found.st_mtime_ns}"


def agreed_state(part: BankWriter, method: Method, together: Ranks) -> State | None:
    """The state to go on from: a rank's own, or the newest that all ranks have committed where they go together.

    Where ranks go together each state holds the one before it, and no rank goes on before all have committed: those
    that are ahead are so by one state, and step back to it. Where ranks go alone, draws hang on nothing
    but their keys, and each goes on from its own last row.

    Raises:
        BankError: ranks whose states do not meet.
    """
    phases = getattr(method, "together", ())
    if not phases:
        return part.state
    state = part.state
    told = together.values([-1 if state is None else state["step"], _stage(state, phases)])
    if any(stage == "parted" for _, stage in told):  # which none is before all have come to the end
        late = [rank for rank, (_, stage) in enumerate(told) if stage not in ("parted", "end")]
        if late:
            raise _no_meeting(part, late[0], *told[late[0]])
        return state
    step = min(step for step, _ in told)
    found = _without_previous(state)
    if found is not None and found["step"] > step:
        found = _previous(state)
    if (-1 if found is None else found["step"]) != step:
        raise _no_meeting(part, together.rank, *told[together.rank])
    return found


def _no_meeting(part: BankWriter, rank: int, step: int, stage: str) -> BankError:
    return BankError(
        str(part.path),
        want=f"states from which all ranks can go on together, of {writer_name(rank)} too",
        got=f"one at step {step}, {stage}" if step >= 0 else "none of its own",
        fix="restore the files that were lost, or begin anew with overwrite",
    )


def _stage(state: State | None, phases: tuple[str, ...]) -> str:
    """How far a state is: "begun", "together", "end" of what ranks do together, or "parted"."""
    if state is None:
        return "begun"
    phase = state["phase"]
    if phase["name"] not in phases:
        return "parted"
    return "end" if phase["name"] == phases[-1] and phase["step"] == phase["num_steps"] else "together"


def _without_previous(state: State | None) -> State | None:
    return None if state is None else {k: v for k, v in state.items() if not k.startswith(PREVIOUS)}


def _previous(state: State | None) -> State | None:
    """The state before one that was committed; None where it was the first."""
    return {k.removeprefix(PREVIOUS): v for k, v in (state or {}).items() if k.startswith(PREVIOUS)} or None


class Checkpoints:
    """Hands a rank's blocks to its writer; where ranks go together, states are committed by all at the same steps."""

    def __init__(self, part: BankWriter, method: Method, together: Ranks, state: State | None) -> None:
        self._part, self._together, self._before = part, together, state
        self._phases: tuple[str, ...] = getattr(method, "together", ())
        self._kept_at = time.monotonic()

    def take(self, block: Block, state: State) -> None:
        """Append a block, with the state that follows it; in a common phase where all meet, once it is time by rank 0's clock."""
        if not self._phases or _stage(state, self._phases) == "parted":
            self._part.append(block, state)
            return
        if not state.get("meets", True):
            return
        due = _stage(state, self._phases) == "end" or time.monotonic() - self._kept_at > STATE_SECONDS
        if not self._together.first_flag(due):
            return
        before = {f"{PREVIOUS}{name}": value for name, value in (self._before or {}).items()}
        self._part.append(block, {**state, **before})
        if self._part.has_news:
            self._part.commit()
        self._together.barrier()
        self._before, self._kept_at = state, time.monotonic()
