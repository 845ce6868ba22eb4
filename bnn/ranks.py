"""The ranks of a run: all collective calls, and what each rank leaves for others to read."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from bnn.errors import ConfigError, RankLost
from bnn.traffic import DIRECT, count

TIMEOUT = 300.0  # seconds that a rank waits for a sign of another one
TIMEOUT_NAME = "BNN_RANKS_TIMEOUT"  # of the environment, for another number of seconds
ASKING = 1.0  # seconds in which the meeting place says why a rank ended, once something is wrong
FAILED = "failed"  # where a rank says why it ends


def restarts() -> int:
    """How often torchrun has started this run again for what failed on this host; `Ranks.again` says it of all."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Ranks:
    """The ranks of a run: who this one is, and what they say to each other.

    Every call but `share`, `stride`, `begin`, `post` and `posted` is collective: all ranks make the same calls in the same
    order. Results are the same on all, bit for bit; sums over chains are made by whoever asked for them, over
    rows gathered in the order of ranks, so that they do not depend on how chains are split. With one rank all
    calls return their argument.

    Args:
        rank: of this process, 0 <= rank < world_size.
        world_size: how many there are.
        store: of torch.distributed, where they meet; None for one rank.
        timeout: seconds without a sign of another rank after which RankLost is raised.
        group: of torch.distributed, where these are only some of the run's ranks, which then do not `wait`.
        again: whether any rank knows of an earlier start.
    """

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        *,
        store: Any = None,
        timeout: float = TIMEOUT,
        group: Any = None,
        again: bool = False,
    ) -> None:
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._store, self._waits, self._group = store, 0, group
        self._meshes: dict[int, tuple[Ranks, Ranks]] = {}
        self._lanes: tuple[Any, Any] | None = None  # groups that are made at the first sum of two ranks
        self._sums = 0  # of two ranks: their tags, so that none is taken for another that was given up
        self._again = again
        self._place: Any = None  # where this start and others under one torchrun meet
        self._remembers = False  # whether that place was there in an earlier one

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.world_size > 1

    @property
    def again(self) -> bool:
        """Whether torchrun has started this run before: the same on all ranks, also where it has counted on some hosts alone."""
        return self._again or restarts() > 0

    def begun(self, work: str) -> str | None:
        """What `begin` left of this work in an earlier start, or None if none had begun it: the same on all ranks; a call of all.

        Where nobody remembers earlier starts, since torchrun has made a new meeting place, each is taken to have: "".
        """
        if not self.again:
            return None
        found: str | None = ""
        if self.rank == 0 and self._remembers:
            with self._told("what earlier starts have left"):
                found = self._place.get(_begun(work)).decode() if self._place.check([_begun(work)]) else None
        told: str | None = self.first_value(found)
        return told

    def begin(self, work: str, note: str = "") -> None:
        """Let later starts know that this work is theirs to go on with, with a note for them; rank 0's counts."""
        if self.several and self.rank == 0:
            with self._told("later starts to find what this one has begun"):
                self._place.set(_begun(work), note)

    def share(self, total: int) -> range:
        """This rank's neighbours among `total` things: parts differ by one at most, in the order of ranks.

        Examples:
            >>> [Ranks(rank, 3).share(8) for rank in range(3)]
            [range(0, 2), range(2, 5), range(5, 8)]
        """
        return range(total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size)

    def stride(self, total: int) -> range:
        """Every `world_size`-th of `total` things from `rank` on: what a rank has stays its own where the total grows.

        Examples:
            >>> [list(Ranks(rank, 3).stride(8)) for rank in range(3)]
            [[0, 3, 6], [1, 4, 7], [2, 5]]
        """
        return range(self.rank, total, self.world_size)

    def pooled(self, tensor: Tensor) -> Tensor:
        """Rows of all ranks [sum of n, *shape], in the order of ranks, from the rows [n, *shape] of each."""
        return torch.cat(self.gathered(tensor)) if self.several else tensor

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The rows [n, *shape] of each rank, of one dtype; n may differ."""
        if not self.several:
            return [tensor]
        with self._told("what every rank has to say"):
            counts = [int(size) for size in self._of_each(torch.tensor([len(tensor)], device=tensor.device))]
            padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
            padded[: len(tensor)] = tensor
            found = self._of_each(padded)
        return [rows[:count] for rows, count in zip(found, counts, strict=True)]

    def _of_each(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape."""
        count("all_gather", tensor.nbytes)
        if self.world_size <= DIRECT and tensor.device.type == "cpu":
            return self._exchanged(tensor)
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(found, tensor, group=self._group)
        return found

    def _exchanged(self, tensor: Tensor) -> list[Tensor]:
        """The same, each rank telling each other one: gloo makes buffers anew for every collective call, which takes longer."""
        found = [tensor if rank == self.rank else torch.empty_like(tensor) for rank in range(self.world_size)]
        others = [rank for rank in range(self.world_size) if rank != self.rank] if tensor.numel() else []
        ways = torch.distributed
        calls = [ways.P2POp(ways.isend, tensor, group=self._group, group_peer=rank) for rank in others]
        calls += [ways.P2POp(ways.irecv, found[rank], group=self._group, group_peer=rank) for rank in others]
        for work in ways.batch_isend_irecv(calls) if calls else []:
            work.wait()
        return found

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of tensors of one shape."""
        return self.coming_total(tensor)(tensor)

    def coming_total(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """`total` of tensors such as `like` that ranks have yet to work out; a call of all, as is that of what it returns.

        Of two ranks on CPUs each is ready from now on for what the other one has to say. gloo's receiving thread spins while its
        connection is being sent on: on a shared core it keeps the sender waiting until the system switches.
        So each direction has a connection of its own, and what is to come is asked for early.
        """
        if self.world_size != 2 or like.device.type != "cpu" or self._group is not None:
            return self._reduced
        with self._told("a sum over ranks"):
            lanes, other = self._two_lanes(), 1 - self.rank
            self._sums += 1
            number, theirs = self._sums, torch.empty(like.shape, dtype=like.dtype)
            coming = torch.distributed.irecv(theirs, other, group=lanes[other], tag=number)

        def summed(own: Tensor) -> Tensor:
            assert (own.shape, own.dtype) == (theirs.shape, theirs.dtype), "a tensor such as was announced"
            with self._told("a sum over ranks"):
                count("all_reduce", own.nbytes)  # as many bytes as around a ring
                going = torch.distributed.isend(own.contiguous(), other, group=lanes[self.rank], tag=number)
                for work in (coming, going):
                    assert work is not None, "both ranks are of these groups"
                    work.wait()
            return own + theirs if self.rank == 0 else theirs + own

        return summed

    def _two_lanes(self) -> tuple[Any, Any]:
        """Groups of two ranks: one to hear rank 0 by, and one to hear rank 1."""
        if self._lanes is None:
            self._exchanged(
                torch.zeros(1)
            )  # a rank that has ended is missed at once here, and not where groups are made
            limit = timedelta(seconds=self.timeout)
            self._lanes = torch.distributed.new_group(timeout=limit), torch.distributed.new_group(timeout=limit)
        return self._lanes

    def _reduced(self, tensor: Tensor) -> Tensor:
        """The sum over any number of ranks, by torch's own call."""
        if not self.several:
            return tensor
        with self._told("a sum over ranks"):
            count("all_reduce", tensor.nbytes)
            summed = tensor.clone().contiguous()
            torch.distributed.all_reduce(summed, group=self._group)
        return summed

    def broadcast(self, tensor: Tensor | None, *, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Rank 0's tensor, of this shape and dtype; the others pass None."""
        found = torch.empty(shape, dtype=dtype) if tensor is None else tensor.contiguous()
        if self.several:
            with self._told("what rank 0 has to say"):
                count("broadcast", found.nbytes)
                torch.distributed.broadcast(found, group=self._group, group_src=0)
        return found

    def values(self, value: Any) -> list[Any]:
        """What each rank says, as JSON: numbers, strings, lists and dictionaries of them."""
        if not self.several:
            return [value]
        raw = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(rows.tolist())) for rows in self.gathered(raw)]

    def states(self, state: Mapping[str, Any] | None) -> list[dict[str, Any] | None]:
        """The state of each rank, tensors and plain values, on all ranks; tensors come to the CPU."""
        if not self.several:
            return [None if state is None else dict(state)]
        tensors = {n: v.detach().cpu().contiguous() for n, v in (state or {}).items() if isinstance(v, Tensor)}
        plain = {n: v for n, v in (state or {}).items() if not isinstance(v, Tensor)}
        told = {n: [list(v.shape), str(v.dtype).removeprefix("torch.")] for n, v in tensors.items()}
        facts = self.values(None if state is None else {"plain": plain, "tensors": told})
        # Cloned, for one number counts as contiguous whatever its stride, which a view as bytes refuses.
        ordered = [v.flatten().clone(memory_format=torch.contiguous_format) for v in tensors.values() if v.numel()]
        flat = [each.view(torch.uint8) for each in ordered]
        sent = self.gathered(torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8))
        found: list[dict[str, Any] | None] = []
        for fact, raw in zip(facts, sent, strict=True):
            one, place = None if fact is None else dict(fact["plain"]), 0
            for name, (shape, dtype) in ({} if fact is None else fact["tensors"]).items():
                value = torch.empty(shape, dtype=getattr(torch, dtype))
                if value.numel():
                    value.flatten().view(torch.uint8).copy_(raw[place : place + value.nbytes])
                place += value.nbytes
                assert one is not None
                one[name] = value
            found.append(one)
        return found

    def mesh(self, columns: int) -> tuple[Ranks, Ranks]:
        """The ranks of this one's column and of its row, where all stand in rows of `columns` in their order.

        Args:
            columns: how many, of which world_size is a multiple.

        Examples:
            >>> column, row = Ranks(0, 1).mesh(1)
            >>> column.world_size, row.world_size
            (1, 1)
        """
        if columns == 1 or not self.several:
            return self, ALONE
        if columns == self.world_size:
            return ALONE, self
        if columns not in self._meshes:
            rows = self.world_size // columns
            by_row = [[columns * row + column for column in range(columns)] for row in range(rows)]
            by_column = [[columns * row + column for row in range(rows)] for column in range(columns)]
            with self._told("groups of ranks"):  # which all ranks make, of whatever ranks
                row_groups, column_groups = (
                    [torch.distributed.new_group(ranks, timeout=timedelta(seconds=self.timeout)) for ranks in lines]
                    for lines in (by_row, by_column)
                )
            row, column = divmod(self.rank, columns)
            store: dict[str, Any] = {"store": self._store, "timeout": self.timeout, "again": self.again}
            self._meshes[columns] = (
                Ranks(row, rows, group=column_groups[column], **store),
                Ranks(column, columns, group=row_groups[row], **store),
            )
        return self._meshes[columns]

    def placed(self, mesh: tuple[int, int] | None) -> tuple[Ranks, Ranks]:
        """The same of (data, samples): ranks that take data in turn, and ranks that share samples; by default all take data.

        Raises:
            ConfigError: a mesh of another number of ranks.
        """
        data, samples = mesh or (self.world_size, 1)
        if min(data, samples) < 1 or data * samples != self.world_size:
            raise ConfigError(
                "mesh",
                want=f"(data, samples) whose product is {self.world_size}, the number of ranks",
                got=f"{data} x {samples}",
                fix="leave it out, so that data alone are split, or start as many ranks with torchrun",
            )
        return self.mesh(samples)

    def first_value(self, value: Any) -> Any:
        """What rank 0 says; what the others pass is not looked at."""
        if not self.several:
            return value
        raw = bytearray(json.dumps(value).encode()) if self.rank == 0 else None
        size = int(self.broadcast(None if raw is None else torch.tensor(len(raw)), shape=(), dtype=torch.int64))
        sent = None if raw is None else torch.frombuffer(raw, dtype=torch.uint8)
        return json.loads(bytes(self.broadcast(sent, shape=(size,), dtype=torch.uint8).tolist()))

    def first_flag(self, flag: bool) -> bool:
        """Rank 0's answer to a question."""
        if not self.several:
            return flag
        own = torch.tensor(int(flag), dtype=torch.uint8) if self.rank == 0 else None
        return bool(self.broadcast(own, shape=(), dtype=torch.uint8))

    def first_state(self, state: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's state, tensors and plain values, on all ranks."""
        if not self.several:
            return None if state is None else dict(state)
        tensors = {name: v.cpu() for name, v in (state or {}).items() if isinstance(v, Tensor)}
        plain = {name: v for name, v in (state or {}).items() if not isinstance(v, Tensor)}
        told = {n: [list(v.shape), str(v.dtype).removeprefix("torch.")] for n, v in tensors.items()}
        facts = self.first_value(None if state is None else {"plain": plain, "tensors": told})
        if facts is None:
            return None
        found = dict(facts["plain"])
        for name, (shape, dtype) in facts["tensors"].items():
            own = tensors.get(name) if self.rank == 0 else None
            found[name] = self.broadcast(own, shape=tuple(shape), dtype=getattr(torch, dtype))
        return found

    def barrier(self) -> None:
        """Go on once all ranks are here, within the timeout."""
        self.values(None)

    def wait(self) -> None:
        """Go on once all ranks are here, however long they work, as long as each gives signs of life.

        Raises:
            RankLost: a rank has ended, or was silent for longer than the timeout.
        """
        if not self.several:
            return
        self._waits += 1
        place, pause = f"wait/{self._waits}", 0.01
        seen: dict[int, tuple[bytes, float]] = {}  # signs of each rank, and when the last one was new
        with self._told("every rank at the end of its part"):
            arrived = self._store.add(place, 1)
            while arrived < self.world_size:
                if self._store.check([FAILED]):
                    raise RuntimeError("one has ended")
                for rank in range(self.world_size):
                    beat = self._store.get(f"pulse/{rank}")
                    if rank not in seen or seen[rank][0] != beat:
                        seen[rank] = beat, time.monotonic()
                now = time.monotonic()
                silent = [rank for rank, (_, at) in seen.items() if now - at > self.timeout]
                if silent:
                    raise RuntimeError(f"no sign of rank {silent[0]} for {self.timeout:g} s")
                time.sleep(pause)
                pause = min(1.3 * pause, self.timeout / 8, 0.25)
                arrived = self._store.add(place, 0)

    def post(self, name: str, text: str) -> None:
        """Leave a text where all ranks can read it."""
        if self.several:
            self._store.set(name, text)

    def posted(self, name: str) -> str | None:
        """A text that some rank left, or None."""
        if not self.several or not self._store.check([name]):
            return None
        return str(self._store.get(name).decode())

    @contextmanager
    def _told(self, want: str) -> Iterator[None]:
        """What torch.distributed raises becomes a RankLost that says who ended, where that is known."""
        try:
            yield
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RankLost(
                f"rank {self.rank} of {self.world_size}",
                want=f"{want}, within {self.timeout:g} s",
                got=self._reason() or lines[0][:200],
                fix=f"start the same command again with --resume, let torchrun do so with --max-restarts, or set "
                f"{TIMEOUT_NAME} to more seconds for slow hosts",
            ) from error

    def _reason(self) -> str | None:
        """Why another rank ended, where it could say so; it may be about to."""
        self._store.limit = min(ASKING, self.timeout)  # nobody answers where the link is cut
        for _ in range(10):
            with suppress(RuntimeError):
                if (found := self.posted(FAILED)) is not None:
                    return found
            time.sleep(0.02)
        return None


def _begun(work: str) -> str:
    return f"begun/{work}"


ALONE = Ranks()
"""The one rank of a run that nobody splits."""
