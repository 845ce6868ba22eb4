"""Work that ranks take in turn: results in the order of the items on all ranks, and errors too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

from bnn import errors
from bnn.distributed import ALONE, Ranks
from bnn.pacing import Meetings

HELD = 64 * 2**20  # bytes of the tensors of all ranks that wait, beyond those of one round
FAULT = "@error"  # under which a rank says what went wrong in place of a state

Item = TypeVar("Item")
State = Mapping[str, Any]  # tensors, and plain values as JSON has them


def in_turn(
    items: Iterable[Item], work: Callable[[Item], State], together: Ranks, row: Ranks = ALONE
) -> Iterator[State]:
    """What `work` makes of each item, in their order, on all ranks; item n is rank n mod world_size's.

    A collective call, and so every rank has the same items. Ranks tell what they have made about every two seconds, each of
    so many rounds of one item a rank; earlier where `HELD` bytes of tensors wait. An error of `bnn.errors` is raised on all
    ranks, that of the first item of those that met one.

    Args:
        items: as many on every rank; what is dear about one belongs into `work`.
        work: makes a state of an item.
        together: the ranks.
        row: of a mesh whose columns take turns, with whom `work` is shared: all columns tell after the same items.

    Examples:
        >>> list(in_turn([2, 3], lambda number: {"square": number**2}, Ranks()))
        [{'square': 4}, {'square': 9}]
    """
    if not together.several:
        yield from map(work, items)
        return
    mine: list[State | None] = []  # of rounds that the others have not heard of
    meetings, number = Meetings(together.timeout), -1
    for number, item in enumerate(items):
        turn, place = divmod(number, together.world_size)
        if place == 0:
            mine.append(None)
        if place == together.rank:
            mine[-1] = _tried(lambda: work(item))  # noqa: B023
        if place == together.world_size - 1 and meetings.due(turn + 1):
            yield from _said(mine, together, row, meetings, turn + 1)
            mine = []
    if mine:
        yield from _said(mine, together, row, meetings, 1 + number // together.world_size)


def by_all(work: Callable[[], State], together: Ranks) -> list[State]:
    """What `work` makes on each rank, in their order, on all ranks; an error of the first that met one is raised on all."""
    return list(_raised(together.states(_tried(work)))) if together.several else [work()]


def bounded(num_rounds: int, round_bytes: float) -> int:
    """As many rounds of so many bytes of tensors, of all ranks, as may wait: no more than `HELD` holds, but one at least.

    Examples:
        >>> bounded(8, 16 * 2**20), bounded(2, 16 * 2**20), bounded(8, 1e9), bounded(8, 0)
        (4, 2, 1, 8)
    """
    return max(1, min(num_rounds, int(HELD / max(round_bytes, 1))))


def _tried(work: Callable[[], State]) -> State:
    try:
        return work()
    except errors.RankLost:
        raise
    except errors.BnnError as error:
        return {FAULT: [type(error).__name__, error.place, error.want, error.got, error.fix]}


def _said(mine: list[State | None], together: Ranks, row: Ranks, meetings: Meetings, turn: int) -> Iterator[State]:
    """What all ranks have made in these rounds, of which the last is number `turn`; round by round."""
    size = sum(value.nbytes for state in mine if state for value in state.values() if isinstance(value, Tensor))
    more = bounded(meetings.proposal(turn), size / len(mine) * together.world_size)
    told: dict[str, Any] = {"more": more, "made": [state is not None for state in mine]}
    for place, state in enumerate(mine):
        told |= {f"{place}/{name}": value for name, value in (state or {}).items()}
    heard = [dict(each) for each in together.states(told) if each is not None]
    meetings.agree(turn, row.first_value(heard[0]["more"]))
    for of_round in zip(*map(_by_round, heard), strict=True):
        yield from _raised(of_round)


def _by_round(heard: dict[str, Any]) -> list[State | None]:
    """What a rank said, round by round."""
    found: list[dict[str, Any] | None] = [{} if made else None for made in heard.pop("made")]
    del heard["more"]
    for key, value in heard.items():
        place, _, name = key.partition("/")
        found[int(place)][name] = value  # type: ignore[index]
    return list(found)


def _raised(states: Iterable[State | None]) -> Iterator[State]:
    """States as they are, or the error in place of one raised."""
    for state in states:
        if state is not None and FAULT in state:
            kind, place, want, got, fix = state[FAULT]
            raise getattr(errors, kind, errors.BnnError)(place, want=want, got=got, fix=fix)
        if state is not None:
            yield state
