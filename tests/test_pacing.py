"""When ranks meet: seldom enough that none waits long, and often enough that all soon hear of what goes wrong."""

from __future__ import annotations

import pytest

from bnn import pacing
from bnn.pacing import Meetings, meetings_in


class Clock:
    now = 0.0

    @staticmethod
    def monotonic() -> float:
        return Clock.now


def met(num_steps: int, seconds: list[float], timeout: float = 300.0) -> list[int]:
    """The steps at which they meet, where each takes so many seconds, the last ones as the last of the list."""
    Clock.now = 0.0
    meetings, found = Meetings(timeout, num_steps), []
    for step in range(1, num_steps + 1):
        Clock.now += seconds[min(step, len(seconds)) - 1]
        if meetings.due(step):
            meetings.agree(step, meetings.proposal(step))
            found.append(step)
    return found


def test_ranks_meet_every_two_seconds_and_come_to_it_by_doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "time", Clock)
    assert met(45, [1e-4]) == [1, 3, 7, 15, 31, 45]
    assert met(30, [0.25]) == [1, 3, 7, 15, 23, 30]
    assert met(5, [60.0]) == [1, 2, 3, 4, 5]
    assert met(12, [9.0, 0.5]) == [1, 2, 4, 8, 12]  # the first, with what comes before it, was slow
    assert met(12, [0.25], timeout=4.0) == [1, 3, 5, 7, 9, 11, 12]
    assert met(1, [0.25]) == [1]


@pytest.mark.parametrize("seconds", [1e-4, 0.3, 60.0])
@pytest.mark.parametrize("num_steps", [1, 2, 45, 200])
def test_as_many_meetings_are_foreseen_as_there_are(
    num_steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "time", Clock)
    assert meetings_in(num_steps, seconds) == len(met(num_steps, [seconds]))


def test_of_no_steps_there_is_no_meeting() -> None:
    assert meetings_in(0, 1.0) == 0
