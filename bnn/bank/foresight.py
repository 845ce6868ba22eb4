"""Which shards of a bank will be wanted, in which order, and how far off each is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

LOOK = 256  # positions that a reader may skip and still be on the plan
ASTRAY = 8  # changes of shard off the plan, after which it is given up


class Plan:
    """Bank indices that will be asked for, in order, as far as they are known.

    What was asked for moves the plan on; `next_use` tells how far ahead a shard is wanted again, by which the one to
    give up is the one that is wanted last (Belady).

    Args:
        indices: pieces of the sequence, each made when it is needed.
        shards_of: bank indices -> the shards that hold them.
        window: positions to know ahead, at least.

    Source: Belady (1966), A study of replacement algorithms for a virtual-storage computer, IBM Systems Journal 5(2).
    """

    def __init__(
        self, indices: Iterator[np.ndarray], shards_of: Callable[[np.ndarray], np.ndarray], window: int
    ) -> None:
        self._pieces, self._shards_of, self._window = indices, shards_of, window
        self._indices: list[int] = []  # from position `_base` on
        self._shards: list[int] = []
        self._base = self._now = self._ahead = (
            0  # positions: of the first kept, the next asked for, the next to be read
        )
        self._uses: dict[int, deque[int]] = {}  # shard -> positions from `_now` on
        self._astray = 0
        self._extend()

    @property
    def is_lost(self) -> bool:
        """Whether nothing more is known, or others things are asked for than it says."""
        return self._astray > ASTRAY or self._now >= self._end

    @property
    def _end(self) -> int:
        return self._base + len(self._indices)

    def next_use(self, shard: int) -> float:
        """Positions until a shard is wanted; infinite where it is not, as far as is known."""
        uses = self._uses.get(shard)
        while uses and uses[0] < self._now:
            uses.popleft()
        return uses[0] - self._now if uses else math.inf

    def upcoming(self, is_here: Callable[[int], bool]) -> tuple[int, float] | None:
        """The next shard that is wanted and not here, and positions until then."""
        self._ahead = max(self._ahead, self._now)
        while self._ahead < self._end:
            shard = self._shards[self._ahead - self._base]
            if not is_here(shard):
                return shard, self._ahead - self._now
            self._ahead += 1
        return None

    def note(self, asked: Sequence[int], shard: int) -> None:
        """Move on behind what was asked for; other things than the plan has leave it where it is."""
        start, size = self._now - self._base, len(asked)
        if self._indices[start : start + size] == asked:
            self._move(size)
            return
        near = self._indices[start : start + size + LOOK]
        places = [place for place, index in enumerate(near) if index == asked[-1]]
        if places:
            self._move(next((place for place in places if place >= size - 1), places[-1]) + 1)
        elif self.next_use(shard) == math.inf:
            self._astray += 1

    def reach(self, shard: int) -> None:
        """Say which shard is asked for, before it is there: a plan knew."""

    def _move(self, count: int) -> None:
        self._now, self._astray = self._now + count, 0
        if self._end - self._now < self._window:
            self._extend()

    def _extend(self) -> None:
        """Know at least a window ahead, and forget what is past."""
        past = self._now - self._base
        del self._indices[:past], self._shards[:past]
        self._base = self._now
        while self._end - self._now < 2 * self._window:  # twice: so that it is done seldom
            piece = next(self._pieces, None)
            if piece is None:
                return
            first, shards = self._end, self._shards_of(piece)
            order = np.argsort(shards, kind="stable")
            wanted, starts = np.unique(shards[order], return_index=True)
            indices_there, shards_there = piece.tolist(), shards.tolist()
            self._indices += indices_there  # no call between the two, so that Ctrl-C finds them of one length
            self._shards += shards_there
            for shard, places in zip(wanted.tolist(), np.split(order, starts[1:]), strict=True):
                self._uses.setdefault(shard, deque()).extend((places + first).tolist())


class ReadAhead:
    """No plan: from first to last while shards are asked for in that order, and nothing ahead where they are not."""

    is_lost = False

    def __init__(self, count: int, depth: int) -> None:
        self._count, self._depth = count, depth
        self._last, self._is_running = -1, False  # the shard asked for last, and whether it followed the one before

    def next_use(self, shard: int) -> float:
        distance = shard - self._last
        return distance if self._is_running and 0 <= distance <= self._depth else math.inf

    def upcoming(self, is_here: Callable[[int], bool]) -> tuple[int, float] | None:
        if not self._is_running:
            return None
        ahead = range(self._last + 1, min(self._last + 1 + self._depth, self._count))
        return next(((shard, shard - self._last) for shard in ahead if not is_here(shard)), None)

    def reach(self, shard: int) -> None:
        """Say which shard is asked for, before it is there."""
        if shard != self._last:
            self._last, self._is_running = shard, shard in (0, self._last + 1)

    def note(self, asked: Sequence[int], shard: int) -> None:
        """Which indices they were says nothing of the next ones."""
