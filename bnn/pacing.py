"""At which steps ranks that work side by side meet: by rank 0's clock, the same on all."""

from __future__ import annotations

import time
from typing import TypeAlias

import torch

from bnn.ranks import Ranks

SECONDS = 2.0  # between two meetings, about; an eighth of the timeout where that is less
Facts: TypeAlias = tuple[int, int, int]
NUMBERS = 4  # int64 that a rank tells at a meeting: steps until the next, and facts


class Meetings:
    """After the first step, and then each time after as many steps as rank 0 takes two seconds for, but at most twice as many as
    before; and after the last step. Between them no rank waits for another.

    Args:
        together: the ranks, which all take the same steps.
        last: number of the last step.
    """

    def __init__(self, together: Ranks, last: int) -> None:
        self._together, self._last = together, last
        self._next = self._met = -1  # numbers of steps; none yet
        self._at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether all ranks meet after this step."""
        return step >= self._next or step == self._last

    def meet(self, step: int, facts: Facts) -> list[Facts]:
        """The facts of all ranks, in their order; a call of all, which agree on the next meeting."""
        passed = 1 if self._met < 0 else step - self._met
        now = time.monotonic()
        more = following(passed, now - self._at, min(SECONDS, self._together.timeout / 8))
        told = self._together.pooled(torch.tensor([[more, *facts]])).tolist()  # [R, NUMBERS]
        self._next, self._met, self._at = step + told[0][0], step, now
        return [(one, two, three) for _, one, two, three in told]


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
