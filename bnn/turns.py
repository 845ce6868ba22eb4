"""Work that ranks take in turn: results in the order of the items on all ranks, and errors too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from bnn import errors
from bnn.distributed import Ranks

FAULT = "@error"  # under which a rank says what went wrong in place of a state

Item = TypeVar("Item")
State = Mapping[str, Any]  # tensors, and plain values as JSON has them


def in_turn(items: Iterable[Item], work: Callable[[Item], State], together: Ranks) -> Iterator[State]:
    """What `work` makes of each item, in their order, on all ranks; item n is rank n mod world_size's.

    A collective call, and so every rank has the same items. No more than world_size results wait at a time. An error
    of `bnn.errors` is raised on all ranks, that of the first item of those that met one.

    Args:
        items: as many on every rank; what is dear about one belongs into `work`.
        work: makes a state of an item.
        together: the ranks.

    Examples:
        >>> list(in_turn([2, 3], lambda number: {"square": number**2}, Ranks()))
        [{'square': 4}, {'square': 9}]
    """
    if not together.several:
        yield from map(work, items)
        return
    mine: State | None = None
    waiting = 0
    for number, item in enumerate(items):
        if number % together.world_size == together.rank:
            mine = _tried(lambda: work(item))  # noqa: B023
        waiting += 1
        if waiting == together.world_size:
            yield from _said(mine, together)
            mine, waiting = None, 0
    if waiting:
        yield from _said(mine, together)


def by_all(work: Callable[[], State], together: Ranks) -> list[State]:
    """What `work` makes on each rank, in their order, on all ranks; an error of the first that met one is raised on all."""
    return list(_said(_tried(work), together)) if together.several else [work()]


def _tried(work: Callable[[], State]) -> State:
    try:
        return work()
    except errors.RankLost:
        raise
    except errors.BnnError as error:
        return {FAULT: [type(error).__name__, error.place, error.want, error.got, error.fix]}


def _said(mine: State | None, together: Ranks) -> Iterator[State]:
    for state in together.states(mine):
        if state is not None and FAULT in state:
            kind, place, want, got, fix = state[FAULT]
            raise getattr(errors, kind, errors.BnnError)(place, want=want, got=got, fix=fix)
        if state is not None:
            yield state
