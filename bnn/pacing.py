"""At which steps ranks that work side by side meet: by rank 0's clock, the same on all."""

from __future__ import annotations

import time

SECONDS = 2.0  # between two meetings, about; an eighth of the timeout where that is less


class Meetings:
    """After the first step, and then each time after as many steps as rank 0 takes two seconds for, but at most twice as many as
    before; and after the last step, where it is known. Between them no rank waits for another.

    Args:
        timeout: of the ranks, in seconds.
        last: number of the last step.
    """

    def __init__(self, timeout: float, last: int | None = None) -> None:
        self._seconds, self._last = min(SECONDS, timeout / 8), last
        self._next = self._met = -1  # numbers of steps; none yet
        self._at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether all ranks meet after this step."""
        return step >= self._next or step == self._last

    def proposal(self, step: int) -> int:
        """Steps until the next meeting, by the clock of this rank; that of rank 0 counts."""
        passed = 1 if self._met < 0 else step - self._met
        return following(passed, time.monotonic() - self._at, self._seconds)

    def agree(self, step: int, more: int) -> None:
        """All have met after this step, and meet again after so many more."""
        self._next, self._met, self._at = step + more, step, time.monotonic()


def following(passed: int, elapsed: float, seconds: float = SECONDS) -> int:
    """Steps until the next meeting, where `passed` steps since the last took `elapsed` seconds.

    Examples:
        >>> following(4, elapsed=1.0), following(4, elapsed=3.0), following(1, elapsed=60.0)
        (8, 2, 1)
    """
    return max(1, int(min(2.0 * passed, passed * seconds / max(elapsed, 1e-9))))


def meetings_in(num_steps: int, step_seconds: float) -> int:
    """How many there are in so many steps that take as long each.

    Examples:
        >>> meetings_in(45, 0.0), meetings_in(45, 0.5), meetings_in(45, 60.0)  # after 1, 3, 7, 15, 31, 45; every 4; each
        (6, 13, 45)
    """
    step, passed, number = min(1, num_steps), 1, min(1, num_steps)
    while step < num_steps:
        passed = following(passed, passed * step_seconds)
        step, number = min(step + passed, num_steps), number + 1
    return number
